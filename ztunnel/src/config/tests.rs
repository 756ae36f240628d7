use super::*;
use std::collections::BTreeMap;

fn settings(pairs: &[(&str, &str)]) -> Result<Config, ConfigErrors> {
    let map: BTreeMap<String, String> =
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    load(&map)
}

#[test]
fn nothing_set_is_what_istio_defaults_to() {
    let config = settings(&[]).unwrap();
    assert!(matches!(config.capture, Capture::External(_)));
    assert_eq!(config.authority, Authority::Nobody);
    assert_eq!(config.pods, Pods::Shared("/var/run/ztunnel/ztunnel.sock".into()));
    let Process { drain, admin_port, stats_port, ipv6, .. } = config.process;
    assert_eq!((drain.as_secs(), admin_port, stats_port, ipv6), (5, 15000, 15020, true));
}

#[test]
fn the_deadline_follows_the_grace_period() {
    for (grace, seconds) in [("30", 25), ("11", 6), ("10", 9), ("1", 1), ("0", 1)] {
        let config = settings(&[("TERMINATION_GRACE_PERIOD_SECONDS", grace)]).unwrap();
        assert_eq!(config.process.drain.as_secs(), seconds, "{grace}");
    }
}

#[test]
fn threads_follow_limit_and_request() {
    for (pairs, threads) in [
        (&[("ZTUNNEL_WORKER_THREADS", "3")][..], 3),
        (&[("ZTUNNEL_CPU_LIMIT", "1500m")], 2),
        (&[("ZTUNNEL_CPU_LIMIT", "1"), ("ZTUNNEL_RESOURCE_CPU_REQUEST", "4")], 4),
    ] {
        assert_eq!(settings(pairs).unwrap().process.workers.get(), threads, "{pairs:?}");
    }
}

#[test]
fn all_faults_are_said_together() {
    let errors = settings(&[
        ("CAPTURE", "magic"),
        ("LOCAL_XDS", "x"),
        ("LOCAL_XDS_PATH", "/x"),
        ("LOCAL_CA_DIR", "/x"),
        ("CA_ADDRESS", "https://ca"),
        ("PROXY_MODE", "dedicated"),
        ("STATS_PORT", "70000"),
    ])
    .unwrap_err()
    .to_string();
    for name in ["CAPTURE", "LOCAL_XDS", "LOCAL_CA_DIR", "PROXY_WORKLOAD_INFO", "STATS_PORT"] {
        assert!(errors.contains(name), "{name} in {errors}");
    }
}

/// `ztunnel settings` prints what belongs there.
#[test]
fn the_readme_has_the_table() {
    let readme = include_str!("../../../README.md");
    let table = mesh_runtime::config::markdown(keys::ALL);
    assert!(readme.contains(table.trim()), "the README should hold:\n{table}");
}
