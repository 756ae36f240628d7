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
    let Authority::Istio { remote, .. } = config.authority else { panic!("{config:?}") };
    assert_eq!(remote.address, "https://localhost:15012");
    let Resources::ControlPlane(remote) = config.resources else { panic!() };
    assert_eq!(remote.address, "https://localhost:15012");
    assert_eq!(config.pods, Pods::Shared("/var/run/ztunnel/ztunnel.sock".into()));
    let Process { drain, admin_port, stats_port, ipv6, .. } = config.process;
    assert_eq!((drain.as_secs(), admin_port, stats_port, ipv6), (5, 15000, 15020, true));
}

#[test]
fn in_kubernetes_istiod_is_asked_unless_told_otherwise() {
    let kubernetes = ("KUBERNETES_SERVICE_HOST", "10.96.0.1");
    let address = |pairs: &[_]| match settings(pairs).unwrap().resources {
        Resources::ControlPlane(remote) => Some(remote.address),
        Resources::File(_) | Resources::Inline(_) | Resources::Nothing => None,
    };
    assert_eq!(address(&[kubernetes]).unwrap(), ISTIOD);
    assert_eq!(address(&[kubernetes, ("XDS_ADDRESS", "other:1")]).unwrap(), "other:1");
    assert_eq!(address(&[kubernetes, ("XDS_ADDRESS", "")]), None);
    let headers = settings(&[("XDS_HEADER_X-One", "1"), ("CA_ADDRESS", "")]).unwrap();
    assert_eq!(headers.authority, Authority::Nobody);
    let Resources::ControlPlane(remote) = headers.resources else { panic!() };
    assert_eq!(remote.headers, [("x-one".to_owned(), "1".to_owned())]);
}

#[test]
fn we_are_a_workload_if_all_is_known() {
    let all =
        [("POD_NAME", "z"), ("POD_NAMESPACE", "istio-system"), ("SERVICE_ACCOUNT", "ztunnel")];
    let own = settings(&all).unwrap().own.unwrap();
    assert_eq!(
        (own.to_string().as_str(), own.service_account.as_str()),
        ("istio-system/z", "ztunnel")
    );
    for missing in 0..3 {
        let some: Vec<_> = all.into_iter().enumerate().filter(|(n, _)| *n != missing).collect();
        let some: Vec<_> = some.into_iter().map(|(_, pair)| pair).collect();
        assert_eq!(settings(&some).unwrap().own, None);
    }
    let dedicated = [("PROXY_MODE", "dedicated"), ("PROXY_WORKLOAD_INFO", "a/b/c")];
    assert_eq!(settings(&[&all[..], &dedicated].concat()).unwrap().own, None);
}

#[test]
fn what_tls_may_speak() {
    let tls = |pairs: &[_]| settings(pairs).unwrap().tls;
    assert_eq!(tls(&[]), Tls::default());
    let pqc = tls(&[("COMPLIANCE_POLICY", "pqc"), ("CRL_PATH", "/crl.pem")]);
    assert!(pqc.options.post_quantum && !pqc.options.tls12);
    assert_eq!(pqc.revocations, Some("/crl.pem".into()));
    // Exactly these words, as Istio has it.
    for other in ["PQC", "fips-140-2", ""] {
        assert!(!tls(&[("COMPLIANCE_POLICY", other)]).options.post_quantum, "{other}");
    }
    assert!(tls(&[("TLS12_ENABLED", "true")]).options.tls12);
    let off = tls(&[("TLS12_ENABLED", "1"), ("CRL_PATH", "")]);
    assert!(!off.options.tls12 && off.revocations.is_none());
}

#[test]
fn on_demand_is_for_the_control_plane() {
    let on = ("XDS_ON_DEMAND", "true");
    assert!(settings(&[on]).unwrap().data_path.plan.on_demand);
    assert!(!settings(&[on, ("LOCAL_XDS_PATH", "/x")]).unwrap().data_path.plan.on_demand);
    let liked = settings(&[("PREFERED_SERVICE_NAMESPACE", "shop")]).unwrap();
    assert_eq!(liked.node.preferred, Some("shop".parse().unwrap()));
    assert!(settings(&[("PREFERED_SERVICE_NAMESPACE", "no/name")]).is_err());
    assert!(!liked.data_path.plan.on_demand);
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
        (&[("PROXY_CONFIG", "concurrency: 5"), ("ZTUNNEL_CPU_LIMIT", "1")], 5),
        (&[("PROXY_CONFIG", "concurrency: 5"), ("ZTUNNEL_WORKER_THREADS", "3")], 3),
    ] {
        assert_eq!(settings(pairs).unwrap().process.workers.get(), threads, "{pairs:?}");
    }
}

/// Not there is none; what is there and cannot be used is no start.
#[test]
fn the_mesh_s_config_is_read_or_is_a_fault() {
    let read = |text: io::Result<&str>| {
        let mut faults = Vec::new();
        let found = mesh_config(text.map(str::to_owned), &mut faults);
        (
            found.get("ISTIO_META_A"),
            faults.into_iter().map(|fault| fault.advice).collect::<Vec<_>>(),
        )
    };
    let file = "defaultConfig: {proxyMetadata: {A: b}}";
    assert_eq!(read(Ok(file)), (Some("b".to_owned()), vec![]));
    assert_eq!(read(Err(io::ErrorKind::NotFound.into())), (None, vec![]));
    for bad in [Ok("defaultConfig: ["), Err(io::ErrorKind::PermissionDenied.into())] {
        let (found, faults) = read(bad);
        assert!(found.is_none() && faults.len() == 1, "{faults:?}");
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

/// The manifest sets what is read, to what is taken, whoever captures.
#[test]
fn the_manifest_sets_what_is_read() {
    // Of Istio's chart, for nobody here; and of Rust.
    const OTHERS: [&str; 2] = ["INPOD_ENABLED", "RUST_BACKTRACE"];
    let manifest = include_str!("../../../deploy/ztunnel.yaml");
    let lines: Vec<_> = manifest.lines().map(str::trim).filter(|l| !l.starts_with('#')).collect();
    let is_variable = |name: &str| name.bytes().all(|b| b.is_ascii_uppercase() || b == b'_');
    let mut set = Vec::new();
    for pair in lines.windows(2) {
        let Some(name) = pair[0].strip_prefix("- name: ").filter(|name| is_variable(name)) else {
            continue;
        };
        let is_read = keys::ALL.iter().any(|key| key.name == name);
        assert!(is_read || OTHERS.contains(&name), "nobody reads {name}");
        set.extend(pair[1].strip_prefix("value: ").map(|value| (name, value.trim_matches('"'))));
    }
    assert!(set.len() > 5 && set.contains(&("CAPTURE", "external")), "{set:?}");
    settings(&set).unwrap();
    set.push(("CAPTURE", "ebpf"));
    assert!(matches!(settings(&set).unwrap().capture, Capture::Ebpf(_)));
}
