//! What the node proxy shows of a real connection, with capture of our own: numbers, not names. The names, the
//! orders and the shapes are `contract`'s.

#![expect(clippy::indexing_slicing, clippy::unwrap_used, reason = "a test may panic")]

use std::fs;

use mesh_tests::{
    Scene, http,
    log::Line,
    mesh::{hostname, identity},
    metrics::{Metrics, Sample},
    scene::{TCP, web},
    wait::{self, SOON},
};
use serde_json::Value;

/// One connection over the service, of 11 bytes there and 6 back, ended.
fn once(scene: &Scene) {
    let to = web(TCP)[0];
    // "echo\n" and "hello\n"; "hello\n" comes back.
    wait::retry("an echo", SOON, || scene.client.tcp(to, &["echo", "hello"])?.ok()).unwrap();
}

/// Metrics of both nodes, once the connection is counted as closed.
fn metrics(scene: &Scene) -> [(&'static str, Metrics); 2] {
    [(&scene.a, "source"), (&scene.b, "destination")].map(|(node, reporter)| {
        let closed = node.with_proxy(|proxy| {
            wait::until("the connection's end", SOON, || {
                let metrics = proxy.metrics()?;
                let count = metrics.sum("istio_tcp_connections_closed_total", &[]);
                Ok((count >= 1.0).then_some(metrics))
            })
        });
        (reporter, closed.unwrap())
    })
}

fn only<'a>(metrics: &'a Metrics, name: &'a str) -> &'a Sample {
    let found: Vec<_> = metrics.find(name, &[]).collect();
    assert_eq!(found.len(), 1, "{name}: {found:?}");
    found[0]
}

#[test]
fn a_connection_is_counted_on_both_sides() {
    let scene = Scene::start(&[]).unwrap();
    once(&scene);
    for (reporter, metrics) in metrics(&scene) {
        for (name, value) in [
            ("istio_tcp_connections_opened_total", 1.0),
            ("istio_tcp_connections_closed_total", 1.0),
            ("istio_tcp_received_bytes_total", 11.0),
            ("istio_tcp_sent_bytes_total", 6.0),
        ] {
            let sample = only(&metrics, name);
            assert!((sample.value - value).abs() < 0.5, "{reporter}: {sample:?}");
            for (label, value) in [
                ("reporter", reporter),
                ("source_workload", "client"),
                ("source_principal", &identity("client")),
                ("destination_service", &hostname("web")),
                ("destination_workload", "server"),
                ("destination_principal", &identity("server")),
                ("response_flags", "-"),
                ("connection_security_policy", "mutual_tls"),
            ] {
                assert_eq!(sample.label(label), value, "{reporter} {name} {label}");
            }
        }
        assert_eq!(metrics.find("istio_tcp_connections_failed_total", &[]).count(), 0);
        let open = metrics.sum("istio_tcp_sockets_open", &[("reporter", reporter)]);
        assert!(open.abs() < 0.5, "{open} sockets open");
    }
}

#[test]
fn prometheus_reads_our_metrics() {
    let scene = Scene::start(&[]).unwrap();
    once(&scene);
    metrics(&scene);
    for node in [&scene.a, &scene.b] {
        let text = node.with_proxy(|proxy| proxy.metrics_text()).unwrap();
        let groups = ["process_", "tokio_", "istio_", "workload_manager_"];
        let samples = text.lines().filter(|line| !line.starts_with('#'));
        let order: Vec<_> = samples
            .filter_map(|line| groups.iter().position(|group| line.starts_with(group)))
            .collect();
        assert!(order.is_sorted(), "{text}");
        // Prometheus's own parser of OpenMetrics takes samples with a time only.
        let timed: String = text
            .lines()
            .map(|line| match line {
                comment if comment.starts_with('#') => format!("{comment}\n"),
                sample => format!("{sample} 1700000000\n"),
            })
            .collect();
        let file = scene.lab.folder().join("metrics.txt");
        fs::write(&file, &timed).unwrap();
        let blocks = scene.lab.folder().join("blocks");
        let (file, blocks) = (file.to_str().unwrap(), blocks.to_str().unwrap());
        let parse = ["promtool", "tsdb", "create-blocks-from", "openmetrics", file, blocks];
        let parsed = node.run(parse).unwrap();
        assert!(parsed.is_ok(), "{}{}\n{timed}", parsed.err, parsed.out);
        // And the older parser, which most still use.
        let check = format!("promtool check metrics < {file}");
        let checked = node.run(["bash", "-c", &check]).unwrap();
        assert!(!checked.err.contains("error while linting"), "{}", checked.err);
        for name in ["istio_build", "istio_tcp_connections_opened_total", "process_open_fds"] {
            assert!(text.contains(&format!("\n{name}")) || text.starts_with(name), "no {name}");
        }
        assert!(text.contains("# TYPE istio_tcp_connections_opened counter\n"), "{text}");
        assert!(text.contains("component=\"ztunnel\""), "{text}");
    }
}

#[test]
fn metrics_have_the_type_that_was_asked_for() {
    let scene = Scene::bare().unwrap();
    scene.a.start_proxy(&[]).unwrap();
    let namespace = scene.a.namespace();
    for (path, status) in [("/metrics", 200), ("/stats/prometheus", 200), ("/else", 404)] {
        assert_eq!(http::get(namespace, 15020, path).unwrap().status, status, "{path}");
    }
    let ask = |accept: &str| {
        let head = format!(
            "GET /metrics HTTP/1.1\r\nhost: x\r\naccept: {accept}\r\nconnection: close\r\n\r\n"
        );
        let answer = http::raw(namespace, 15020, head.as_bytes()).unwrap();
        String::from_utf8_lossy(&answer).to_ascii_lowercase()
    };
    let open = ask("application/openmetrics-text; version=1.0.0");
    let wanted = "content-type: application/openmetrics-text;charset=utf-8;version=1.0.0";
    assert!(open.contains(wanted), "{open:.400}");
    assert!(ask("*/*").contains("content-type: text/plain; charset=utf-8"));
}

fn complete(scene: &Scene) -> [Line; 2] {
    [&scene.a, &scene.b].map(|node| {
        let line = node.with_proxy(|proxy| {
            proxy.wait_access(0, "complete", |line| {
                line.message == "connection complete" && line.field("error").is_empty()
            })
        });
        line.unwrap()
    })
}

fn says_what_it_should(scene: &Scene, [source, destination]: &[Line; 2]) {
    for (line, direction, sent, received) in
        [(source, "outbound", "11", "6"), (destination, "inbound", "6", "11")]
    {
        assert_eq!(line.level, "info", "{}", line.text);
        for (field, value) in [
            ("direction", direction),
            ("bytes_sent", sent),
            ("bytes_recv", received),
            ("src.workload", "client"),
            ("src.identity", &identity("client")),
            ("dst.addr", &scene.tunnel().to_string()),
            ("dst.hbone_addr", &format!("{}:{TCP}", scene.server.v4())),
            ("dst.service", &hostname("web")),
            ("dst.workload", "server"),
            ("dst.identity", &identity("server")),
        ] {
            assert_eq!(line.field(field), value, "{field} in {}", line.text);
        }
        assert!(line.field("duration").ends_with("ms"), "{}", line.text);
        assert!(line.field("src.addr").starts_with(&scene.client.v4().to_string()));
    }
}

#[test]
fn a_connection_is_logged_on_both_sides() {
    let scene = Scene::start(&[]).unwrap();
    once(&scene);
    let lines = complete(&scene);
    says_what_it_should(&scene, &lines);
    let log = scene.a.with_proxy(|proxy| Ok(proxy.log().since(0))).unwrap();
    let warns = |line: &String| line.contains("\twarn\t") && line.contains("a local CA signs");
    assert!(log.iter().any(warns), "{log:#?}");
    for line in &lines {
        let time = line.text.split('\t').next().unwrap();
        assert!(time.len() == 27 && time.ends_with('Z') && time.contains('T'), "{time}");
    }
}

#[test]
fn every_line_is_json_where_that_is_wanted() {
    let scene = Scene::start(&[("LOG_FORMAT", "json")]).unwrap();
    once(&scene);
    says_what_it_should(&scene, &complete(&scene));
    let log = scene.a.with_proxy(|proxy| Ok(proxy.log().since(0))).unwrap();
    for line in log {
        assert!(serde_json::from_str::<Value>(&line).is_ok(), "{line}");
    }
}

#[test]
fn what_is_open_is_in_the_dump_and_goes_when_it_ends() {
    let scene = Scene::start(&[]).unwrap();
    once(&scene);
    let dump = scene.a.with_proxy(|proxy| proxy.config_dump()).unwrap();
    let uid = scene.client.uid();
    assert_eq!(dump["workloadState"][&uid]["state"], "Up", "{dump}");
    assert_eq!(dump["workloadState"][&uid]["info"]["serviceAccount"], "client");
    let certificates = dump["certificates"].as_array().unwrap();
    let own = certificates.iter().find(|c| c["identity"] == identity("client").as_str()).unwrap();
    assert_eq!(own["state"], "Available");
    // What is open is there, and gone when it has ended.
    let to = web(TCP)[0].to_string();
    let mut open = scene.client.spawn(["tcp", &to, "hold"]).unwrap();
    open.says("open", SOON).unwrap();
    let dump = scene.a.with_proxy(|proxy| proxy.config_dump()).unwrap();
    let connections = &dump["workloadState"][&uid]["connections"];
    assert_eq!(connections["outbound"][0]["protocol"], "HBONE", "{connections}");
    assert_eq!(connections["outbound"][0]["originalDst"], to, "{connections}");
    drop(open);
    let none = |dump: &Value| {
        let open = &dump["workloadState"][&uid]["connections"]["outbound"];
        open.as_array().is_some_and(Vec::is_empty)
    };
    scene.a.with_proxy(|proxy| proxy.wait_dump("no connection", none)).unwrap();
}

#[test]
fn readiness_says_what_it_waits_for() {
    let scene = Scene::bare().unwrap();
    // Nobody listens where it looks for the CNI agent.
    let none = scene.lab.folder().join("nobody.sock");
    let proxy = scene.a.begin_proxy(&[("INPOD_UDS", none.to_str().unwrap())]).unwrap();
    let waits = wait::until("what it waits for", SOON, || {
        let Ok(answer) = proxy.readiness() else { return Ok(None) };
        let settled = answer.body == "not ready, pending: workload proxy manager\n";
        Ok(settled.then_some(answer))
    });
    assert_eq!(waits.unwrap().status, 500);
    let namespace = scene.a.namespace();
    for (method, path, status) in [("POST", "/healthz/ready", 405), ("GET", "/", 404)] {
        let answer = http::request(namespace, method, 15021, path).unwrap();
        assert_eq!(answer.status, status, "{method} {path}");
    }
    drop(proxy);
    scene.a.start_proxy(&[]).unwrap();
    let answer = scene.a.with_proxy(|proxy| proxy.readiness()).unwrap();
    assert_eq!((answer.status, answer.body.as_str()), (200, "ready\n"));
}

/// A file that was good and is bad now changes nothing, and the log says where it is bad.
#[test]
fn a_bad_file_is_said_and_changes_nothing() {
    let scene = Scene::start(&[]).unwrap();
    once(&scene);
    let good = fs::read_to_string(scene.lab.mesh_file()).unwrap();
    let mark = scene.a.with_proxy(|proxy| Ok(proxy.log().mark())).unwrap();
    let write = |text: &str| {
        // Renamed into place, as files are that somebody reads.
        let new = scene.lab.folder().join("mesh.new");
        fs::write(&new, text).unwrap();
        fs::rename(new, scene.lab.mesh_file()).unwrap();
    };
    write(&good.replace("HBONE", "SMOKE"));
    let said = |line: &String| line.contains("protocol") && line.contains("line ");
    wait::until("what is wrong", SOON, || {
        scene.a.with_proxy(|proxy| Ok(proxy.log().since(mark).into_iter().find(said)))
    })
    .unwrap();
    once(&scene);
    // And a good one is taken again.
    write(&good.replace("latest", "newest"));
    let taken = |dump: &Value| dump["workloads"].to_string().contains("newest");
    scene.a.with_proxy(|proxy| proxy.wait_dump("the good one", taken)).unwrap();
}

#[test]
fn what_is_wrong_at_the_start_is_said_in_a_line() {
    let scene = Scene::bare().unwrap();
    for (settings, says) in [
        (vec![("PROXY_MODE", "sideways")], "PROXY_MODE"),
        (vec![("CAPTURE", "magic")], "CAPTURE"),
        (vec![("CA_ADDRESS", "https://localhost:1")], "CA_ADDRESS"),
        (vec![("LOCAL_XDS_PATH", "/nonexistent.yaml")], "nonexistent"),
    ] {
        let mark = mesh_tests::proxy::log_of(scene.lab.folder(), "a");
        let before = fs::read_to_string(&mark).unwrap_or_default().len();
        let mut proxy = scene.a.begin_proxy(&settings).unwrap();
        let code = proxy.program().wait(SOON).unwrap();
        assert_eq!(code, 1, "{settings:?}");
        let log = fs::read_to_string(&mark).unwrap();
        let said = log.get(before..).unwrap();
        assert!(said.contains(says), "{settings:?}: {said}");
    }
    let version = scene.a.proxy_command(&["version"]).unwrap();
    assert!(version.is_ok() && !version.out.is_empty());
    assert!(scene.a.proxy_command(&["help"]).unwrap().is_ok());
    assert_eq!(scene.a.proxy_command(&["dance"]).unwrap().code, 1);
}
