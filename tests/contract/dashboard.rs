//! A real Prometheus scrapes a real run, and is asked what Istio's dashboard asks.

use std::{fmt::Write, fs, time::Duration};

use anyhow::{Context, Result};
use mesh_tests::{
    Node, http,
    program::{Program, Start, installed},
    wait::{self, SOON},
};
use serde_json::Value;

use crate::{metrics, world::World};

const QUERIES: &str = include_str!("dashboard.promql");
const PORT: u16 = 9090;

/// As the scrape config of a cluster labels what it scrapes.
const CONFIG: &str = "global:
  scrape_interval: 1s
scrape_configs:
- job_name: ztunnel
  static_configs:
  - targets: ['127.0.0.1:15020']
    labels:
      pod: ztunnel-x
      app: ztunnel
";

fn start(world: &World) -> Result<Program> {
    installed("prometheus").context("no prometheus: install Debian's package `prometheus`")?;
    let folder = world.scene.lab.folder().join("prometheus");
    fs::create_dir_all(&folder)?;
    let config = folder.join("prometheus.yml");
    fs::write(&config, CONFIG)?;
    let words = [
        "prometheus".to_owned(),
        format!("--config.file={}", config.display()),
        format!("--storage.tsdb.path={}", folder.join("data").display()),
        format!("--web.listen-address=127.0.0.1:{PORT}"),
    ];
    Start::new(world.scene.a.namespace(), &folder, words).spawn()
}

/// What a query yields; an error where Prometheus does not take it.
fn ask(node: &Node, query: &str) -> Result<Vec<Value>> {
    let mut path = String::from("/api/v1/query?query=");
    for byte in query.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' | b'.' => path.push(char::from(byte)),
            other => write!(path, "%{other:02X}")?,
        }
    }
    let answer = http::get(node.namespace(), PORT, &path)?;
    let answer: Value = serde_json::from_str(&answer.body).context(answer.body)?;
    let result = answer["data"]["result"].as_array();
    result.cloned().with_context(|| format!("{query}: {answer}"))
}

#[test]
fn every_query_of_the_dashboard_returns_data() {
    let world = World::start(&[]).unwrap();
    let node = &world.scene.a;
    let mut prometheus = start(&world).unwrap();
    let up = || {
        anyhow::ensure!(prometheus.is_running(), "it ended: {}", prometheus.errors());
        let up = ask(node, "up{pod=\"ztunnel-x\"} == 1")?;
        anyhow::ensure!(!up.is_empty(), "nothing is scraped");
        Ok(())
    };
    wait::retry("Prometheus to scrape", Duration::from_secs(40), up).unwrap();
    metrics::traffic(&world);
    let queries = QUERIES.lines().filter(|line| !line.starts_with('#'));
    let mut missing: Vec<_> = queries.map(|line| line.split_once(" | ").unwrap()).collect();
    assert_eq!(missing.len(), 13);
    let all = wait::until("data", SOON, || {
        let mut left = Vec::new();
        for (panel, query) in &missing {
            let found = ask(node, &query.replace("$__rate_interval", "1m"))?;
            if found.is_empty() {
                left.push((*panel, *query));
            }
        }
        missing = left;
        Ok(missing.is_empty().then_some(()))
    });
    assert!(all.is_ok(), "{all:?}: no data for {missing:#?}");
    // And what is shown is what was done: one pod, and bytes that moved.
    let opened = "sum by (pod) (istio_tcp_connections_opened_total{pod=~\"ztunnel-.*\"})";
    let opened = ask(node, opened).unwrap();
    assert_eq!(opened[0]["metric"]["pod"], "ztunnel-x");
    let sent = ask(node, "sum(istio_tcp_sent_bytes_total)").unwrap();
    let sent: f64 = sent[0]["value"][1].as_str().unwrap().parse().unwrap();
    assert!(sent > 5.5, "{sent}");
}
