//! h2spec, an independent tool, against the HTTP/2 layer of the tunnel port.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::{collections::BTreeSet, fs, path::PathBuf, process::Command};

use mesh_tests::{Scene, bridge, program::installed};

/// What fails, and why it may: the section, what the tool says there, our reason.
const EXPECTED: &[(&str, &str, &str)] = &[
    ("generic/2", "Sends a WINDOW_UPDATE frame on half-closed (remote) stream", NO_BODY),
    ("generic/2", "Sends a PRIORITY frame on half-closed (remote) stream", NO_BODY),
];

/// The frame is accepted, which is what is asked for. The tool waits for a body to see that.
const NO_BODY: &str = "a request other than CONNECT is answered by headers alone";

/// Where `tests/run packages` puts it, at the version of `tests/h2spec/go.mod`.
fn tool() -> PathBuf {
    let home = std::env::vars_os().find(|(key, _)| key == "HOME").map(|(_, home)| home);
    let ours = home.map(|home| PathBuf::from(home).join(".cache/ambient-mesh/bin/h2spec"));
    let found = ours.filter(|path| path.is_file()).or_else(|| installed("h2spec"));
    found.expect("h2spec is not here: `tests/run packages` builds it with Go 1.26")
}

/// The failures in a report in `JUnit`'s form: section, title, what was seen.
fn failures(report: &str) -> (usize, Vec<[String; 3]>) {
    let attribute = |case: &str, name: &str| {
        let (_, value) = case.split_once(&format!(" {name}=\"")).unwrap();
        value.split_once('"').unwrap().0.to_owned()
    };
    let cases: Vec<_> = report.split("<testcase").skip(1).collect();
    let failed = cases.iter().filter(|case| case.contains("<failure") || case.contains("<error"));
    let told = failed.map(|case| {
        let text: String = case
            .split('>')
            .nth(2)
            .unwrap_or_default()
            .split_whitespace()
            .collect::<Vec<_>>()
            .join(" ");
        [attribute(case, "package"), attribute(case, "classname"), text]
    });
    (cases.len(), told.collect())
}

#[test]
fn the_tunnel_port_speaks_http2_as_the_standard_has_it() {
    let scene = Scene::start(&[]).unwrap();
    let issued = scene.certificate("client").unwrap();
    let port = bridge::start(scene.outsider.namespace(), scene.tunnel(), &issued).unwrap();
    let report = scene.lab.folder().join("h2spec.xml");
    let ran = Command::new(tool())
        .args(["generic", "http2", "hpack", "--host", "127.0.0.1", "--timeout", "2"])
        // A block of five of these is longer than the largest frame that we take.
        .args(["--max-header-length", "31000"])
        .args(["--port", &port.port().to_string(), "--junit-report"])
        .arg(&report)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&ran.stdout).into_owned();
    let (count, failed) = failures(&fs::read_to_string(&report).expect(&said));
    assert!(count >= 140, "{count} cases: {said}");
    let seen: BTreeSet<_> = failed.iter().map(|[s, t, _]| (s.as_str(), t.as_str())).collect();
    let known: BTreeSet<_> = EXPECTED.iter().map(|(s, t, _)| (*s, *t)).collect();
    let new: Vec<_> =
        failed.iter().filter(|[s, t, _]| !known.contains(&(s.as_str(), t.as_str()))).collect();
    assert!(new.is_empty(), "{new:#?}");
    let gone: Vec<_> = known.difference(&seen).collect();
    assert!(gone.is_empty(), "no longer failing, take it off the list: {gone:#?}");
}
