//! Every setting of spec/ztunnel.md §12: its name and its default, as `ztunnel settings` and the dump have them.

use std::collections::BTreeMap;

use mesh_tests::Scene;

use crate::world::{RELEASE, World};

/// Name and default; a dash is none.
const SETTINGS: &[(&str, &str)] = &[
    ("PROXY_MODE", "shared"),
    ("PROXY_WORKLOAD_INFO", "–"),
    ("NETWORK", "–"),
    ("NODE_NAME", "–"),
    ("CLUSTER_ID", "Kubernetes"),
    ("ISTIO_META_CLUSTER_ID", "–"),
    ("CLUSTER_DOMAIN", "cluster.local"),
    ("INSTANCE_IP", "1.1.1.1"),
    ("POD_NAME", "–"),
    ("POD_NAMESPACE", "–"),
    ("SERVICE_ACCOUNT", "–"),
    ("XDS_ADDRESS", "https://localhost:15012"),
    ("CA_ADDRESS", "https://localhost:15012"),
    ("XDS_ROOT_CA", "./var/run/secrets/istio/root-cert.pem"),
    ("CA_ROOT_CA", "./var/run/secrets/istio/root-cert.pem"),
    ("ALT_XDS_HOSTNAME", "–"),
    ("ALT_CA_HOSTNAME", "–"),
    ("AUTH_TOKEN", "./var/run/secrets/tokens/istio-token"),
    ("SECRET_TTL", "24h"),
    ("LOCAL_XDS_PATH", "–"),
    ("LOCAL_XDS", "–"),
    ("XDS_ON_DEMAND", "false"),
    ("PREFERED_SERVICE_NAMESPACE", "–"),
    ("INPOD_UDS", "/var/run/ztunnel/ztunnel.sock"),
    ("INPOD_PORT_REUSE", "true"),
    ("PACKET_MARK", "1337"),
    ("ENABLE_ORIG_SRC", "–"),
    ("KEEPALIVE_ENABLED", "true"),
    ("KEEPALIVE_TIME", "180s"),
    ("KEEPALIVE_INTERVAL", "180s"),
    ("KEEPALIVE_RETRIES", "9"),
    ("USER_TIMEOUT_ENABLED", "false"),
    ("POOL_MAX_STREAMS_PER_CONNECTION", "100"),
    ("POOL_UNUSED_RELEASE_TIMEOUT", "5m"),
    // Ours are smaller, and measured (ztunnel/hbone): what is set is obeyed.
    ("HTTP2_STREAM_WINDOW_SIZE", "–"),
    ("HTTP2_CONNECTION_WINDOW_SIZE", "–"),
    ("HTTP2_FRAME_SIZE", "–"),
    ("CONNECTION_TERMINATION_DEADLINE", "–"),
    ("TERMINATION_GRACE_PERIOD_SECONDS", "–"),
    ("ZTUNNEL_WORKER_THREADS", "–"),
    ("ZTUNNEL_CPU_LIMIT", "–"),
    ("ZTUNNEL_RESOURCE_CPU_LIMIT", "–"),
    ("ZTUNNEL_RESOURCE_CPU_REQUEST", "–"),
    ("IPV6_ENABLED", "true"),
    ("LOCALHOST_APP_TUNNEL", "true"),
    ("ENABLE_RESPONSE_BAGGAGE", "true"),
    ("CRL_PATH", "–"),
    ("AUTHZ_POLICY_INFO_LOGGING", "false"),
    ("COMPLIANCE_POLICY", "–"),
    ("TLS12_ENABLED", "false"),
    ("RUST_LOG", "info"),
    ("LOG_FORMAT", "plain"),
    ("ISTIO_META_DNS_CAPTURE", "true"),
    ("ISTIO_META_DNS_PROXY_ADDR", "localhost:15053"),
    ("ISTIO_META_ISTIO_VERSION", "unknown"),
    ("KUBERNETES_SERVICE_HOST", "–"),
];

/// Upstream's that are without meaning here, with the reason.
const NOT_HERE: &[(&str, &str)] = &[
    ("ENABLE_PROXY", "a node proxy is for the data plane; upstream without it serves DNS alone"),
    ("FAKE_CA", "upstream's test builds only; LOCAL_CA_DIR does it here"),
    ("INPOD_ENABLED", "set by the chart and ignored by upstream as well"),
    ("TRUST_DOMAIN", "upstream's diagnostic identity; ours is that of each workload"),
    ("UNSTABLE_ENABLE_SOCKS5", "off by default, and no part of a mesh"),
];

/// Never in the dump.
const SECRET: [&str; 2] = ["AUTH_TOKEN", "LOCAL_XDS"];

#[test]
fn every_setting_has_its_name_and_its_default() {
    let scene = Scene::bare().unwrap();
    let printed = scene.a.proxy_command(&["settings"]).unwrap().ok().unwrap();
    let cells = |line: &str| -> Option<(String, String)> {
        let mut cells = line.split('|').map(|cell| cell.trim().trim_matches('`').to_owned());
        let (_, name, _, default) = (cells.next()?, cells.next()?, cells.next()?, cells.next()?);
        Some((name, default))
    };
    let printed: BTreeMap<String, String> = printed.lines().filter_map(cells).collect();
    let mut faults = Vec::new();
    for (name, default) in SETTINGS {
        match printed.get(*name) {
            Some(said) if said == default => {}
            other => faults.push(format!("{name}: {other:?} and not {default:?}")),
        }
    }
    for (name, why) in NOT_HERE {
        if printed.contains_key(*name) {
            faults.push(format!("{name} is here, and this test says that it is not: {why}"));
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
    // And in effect: the dump has them all, but for secrets and what is as long as a file.
    scene.a.start_proxy(&[]).unwrap();
    let dump = scene.a.with_proxy(|proxy| proxy.config_dump()).unwrap();
    let config = dump["config"].as_object().unwrap();
    for (name, _) in SETTINGS {
        assert_eq!(config.contains_key(*name), !SECRET.contains(name), "{name} in {config:?}");
    }
    assert_eq!(config["NODE_NAME"], "a");
    assert_eq!(config["KEEPALIVE_TIME"], "180s");
}

/// Those that are a beginning of a name: what they carry reaches the control plane.
#[test]
fn headers_and_metadata_reach_the_control_plane() {
    let world =
        World::start(&[("POD_NAME", "ztunnel-x"), ("POD_NAMESPACE", "istio-system")]).unwrap();
    let ads = &world.ads;
    assert_eq!(ads.header("x-contract").as_deref(), Some("kept"));
    assert_eq!(ads.header("authorization").as_deref(), Some("Bearer a-secret-token"));
    assert_eq!(ads.header("clusterid").as_deref(), Some("Kubernetes"));
    let node = ads.node();
    for part in ["ztunnel~1.1.1.1~ztunnel-x.istio-system~", "CONTRACT", "metadata", RELEASE] {
        assert!(node.contains(part), "{part} in {node}");
    }
}
