use std::num::NonZeroUsize;

use super::*;
use crate::threads::Workers;

const HOUR: Duration = Duration::from_secs(3600);

#[test]
fn the_text_is_exact() {
    let registry = Registry::new();
    registry.gauge("workload_manager_active_proxy_count", "Running proxies").single().set(2);
    let bytes = registry.counter_of("istio_xds_message_bytes", "bytes", "Bytes received");
    bytes.with(&Labels::new([("url", "type.googleapis.com/a")])).increment(2285);
    let durations =
        registry.histogram("istio_dns_seconds", "seconds", "Durations.", &[0.0005, 1.0, 5.0]);
    let dns = durations.with(&Labels::new([("request_protocol", "udp")]));
    dns.record(0.0005);
    dns.record(2.5);
    dns.record(7);
    durations.single().record(0.25);
    let _unused = registry.counter("istio_unused_total", "Never seen");
    let opened = registry.counter("istio_tcp_connections_opened_total", "Connections opened");
    opened.with(&Labels::new([("reporter", "source"), ("name", "a\"b\\c\nd")])).increment(1);
    opened.with(&Labels::new([("reporter", "destination")])).increment(3);
    registry.gauge("istio_open", "Half").single().set(-1.5);
    registry.on_scrape(|samples| {
        samples.gauge("process_max_fds", "Limit", &Labels::empty(), 1024.0);
        samples.counter("tokio_busy_seconds", "Busy", &Labels::new([("worker", "0")]), 0.25);
        samples.counter("tokio_busy_seconds_total", "Busy", &Labels::new([("worker", "1")]), 2.0);
    });
    registry.counter("mesh_own", "Ours").single().increment(1);
    assert_eq!(
        registry.render(),
        r#"# HELP process_max_fds Limit
# TYPE process_max_fds gauge
process_max_fds 1024
# HELP tokio_busy_seconds Busy
# TYPE tokio_busy_seconds counter
tokio_busy_seconds_total{worker="0"} 0.25
tokio_busy_seconds_total{worker="1"} 2
# HELP istio_xds_message_bytes Bytes received.
# TYPE istio_xds_message_bytes counter
# UNIT istio_xds_message_bytes bytes
istio_xds_message_bytes_total{url="type.googleapis.com/a"} 2285
# HELP istio_dns_seconds Durations.
# TYPE istio_dns_seconds histogram
# UNIT istio_dns_seconds seconds
istio_dns_seconds_sum 0.25
istio_dns_seconds_count 1
istio_dns_seconds_bucket{le="0.0005"} 0
istio_dns_seconds_bucket{le="1.0"} 1
istio_dns_seconds_bucket{le="5.0"} 1
istio_dns_seconds_bucket{le="+Inf"} 1
istio_dns_seconds_sum{request_protocol="udp"} 9.5005
istio_dns_seconds_count{request_protocol="udp"} 3
istio_dns_seconds_bucket{le="0.0005",request_protocol="udp"} 1
istio_dns_seconds_bucket{le="1.0",request_protocol="udp"} 1
istio_dns_seconds_bucket{le="5.0",request_protocol="udp"} 2
istio_dns_seconds_bucket{le="+Inf",request_protocol="udp"} 3
# HELP istio_tcp_connections_opened Connections opened.
# TYPE istio_tcp_connections_opened counter
istio_tcp_connections_opened_total{reporter="destination"} 3
istio_tcp_connections_opened_total{reporter="source",name="a\"b\\c\nd"} 1
# HELP istio_open Half.
# TYPE istio_open gauge
istio_open -1.5
# HELP workload_manager_active_proxy_count Running proxies.
# TYPE workload_manager_active_proxy_count gauge
workload_manager_active_proxy_count 2
# HELP mesh_own Ours.
# TYPE mesh_own counter
mesh_own_total 1
# EOF
"#
    );
}

#[test]
fn a_family_registered_twice_is_one() {
    let registry = Registry::new();
    registry.counter("istio_a_total", "A").single().increment(1);
    registry.counter("istio_a", "A").single().increment(1);
    assert!(registry.render().contains("istio_a_total 2\n"));
    // Of another kind it is a mistake of ours, which must not cost more than its own samples.
    registry.gauge("istio_a", "A").single().set(7);
    assert!(registry.render().contains("istio_a_total 2\n"));
}

#[test]
fn gauges_go_up_and_down() {
    let registry = Registry::new();
    let open = registry.gauge("istio_tcp_sockets_open", "Sockets");
    let labels = Labels::new([("reporter", "source")]);
    open.with(&labels).increment(3);
    open.with(&labels).decrement(1);
    assert!(registry.render().contains("istio_tcp_sockets_open{reporter=\"source\"} 2\n"));
}

#[tokio::test(start_paused = true)]
async fn idle_series_are_dropped_by_a_scrape() {
    let registry = Registry::new();
    let family = registry.counter("istio_a", "A");
    let series = |labels: &str| family.with(&Labels::new([("to", labels)]));
    let has = |registry: &Registry, name: &str| registry.render().contains(name);
    series("idle").increment(1);
    let held = series("held");
    held.increment(1);
    family.single().increment(1);
    registry.gauge("istio_build", "Build").with(&Labels::new([("tag", "x")])).set(1);

    assert!(has(&registry, "idle"));
    tokio::time::advance(HOUR - Duration::from_secs(1)).await;
    series("idle").increment(1);
    assert!(has(&registry, "idle"));
    tokio::time::advance(HOUR - Duration::from_secs(1)).await;
    assert!(has(&registry, "idle"), "changed less than an hour before");
    tokio::time::advance(Duration::from_secs(1)).await;
    let text = registry.render();
    assert!(!text.contains("idle"), "{text}");
    for kept in ["held", "istio_a_total 1", "istio_build"] {
        assert!(text.contains(kept), "{kept}: {text}");
    }
    series("idle").increment(1);
    assert!(has(&registry, "istio_a_total{to=\"idle\"} 1"), "it begins again");
    drop(held);
}

#[test]
fn labels_are_a_key() {
    let a = Labels::new([("a", "1"), ("b", "2")]);
    let mut builder = Labels::builder(64);
    let b = builder.push("a", "1").push("b", "2").build();
    assert_eq!(a, b);
    assert_eq!(a.as_str(), r#"a="1",b="2""#);
    assert_ne!(a, Labels::new([("b", "2"), ("a", "1")]));
    // What would be two labels unescaped stays one.
    assert_ne!(a, Labels::new([("a", "1\",b=\"2")]));
}

#[test]
fn content_type_follows_accept() {
    let cases = [
        (None, PLAIN),
        (Some("*/*"), PLAIN),
        (Some("application/openmetrics-text;version=1.0.0;q=0.5,text/plain"), OPEN_METRICS),
    ];
    for (accept, expected) in cases {
        assert_eq!(Registry::content_type(accept), expected, "{accept:?}");
    }
}

#[test]
fn workers_are_described() {
    let registry = Registry::new();
    let workers = Workers::start(NonZeroUsize::new(2).unwrap()).unwrap();
    register_workers(&registry, &workers);
    let text = registry.render();
    for sample in ["tokio_num_workers 2\n", "tokio_worker_park_count_total{worker=\"1\"} "] {
        assert!(text.contains(sample), "{text}");
    }
    assert!(workers.shutdown(Duration::from_secs(10)));
}
