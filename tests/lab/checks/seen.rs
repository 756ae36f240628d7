//! What the machine and the node proxies show of all this.

use anyhow::{Context, Result, ensure};
use mesh_tests::{
    Node,
    mesh::{hostname, identity},
    rules,
};
use serde_json::Value;

use crate::{report::Report, world::World};

pub(crate) fn check(world: &mut World, report: &mut Report) -> Result<()> {
    report.check("no-packet-filter", || {
        let namespaces = world.namespaces();
        for namespace in &namespaces {
            let found = rules::packet_filters(namespace)?;
            ensure!(found.is_empty(), "{} has {}", namespace.name(), found.join(", "));
        }
        let count = namespaces.len();
        Ok(format!("{count} namespaces, and no iptables or nftables table in any"))
    });
    report.check("metrics", || metrics(world));
    report.check("config-dump", || dump(&world.a));
    Ok(())
}

fn metrics(world: &World) -> Result<String> {
    let labels = |reporter| {
        [
            ("reporter", reporter),
            ("source_workload", "client"),
            ("destination_workload", "server"),
            ("connection_security_policy", "mutual_tls"),
        ]
    };
    let mut said = Vec::new();
    for (node, reporter) in [(&world.a, "source"), (&world.b, "destination")] {
        let metrics = node.with_proxy(|proxy| proxy.metrics())?;
        let opened = metrics.sum("istio_tcp_connections_opened_total", &labels(reporter));
        ensure!(opened > 0.0, "{} counts no connection of client", node.name());
        said.push(format!("{reporter} {opened}"));
    }
    Ok(format!("istio_tcp_connections_opened_total, client to server: {}", said.join(", ")))
}

fn dump(node: &Node) -> Result<String> {
    let dump = node.with_proxy(|proxy| proxy.config_dump())?;
    let count = |section: &str| -> Result<usize> {
        let section = dump.get(section).with_context(|| format!("no {section}"))?;
        Ok(section.as_array().map(Vec::len).or(section.as_object().map(|o| o.len())).unwrap_or(0))
    };
    let text = dump.to_string();
    ensure!(!text.contains("PRIVATE KEY"), "there is a key in it");
    ensure!(text.contains(&hostname("server")), "server is not in it");
    let certificates = dump.get("certificates").and_then(Value::as_array);
    let of_client =
        |c: &Value| c.get("identity").and_then(Value::as_str) == Some(&identity("client"));
    ensure!(certificates.is_some_and(|c| c.iter().any(of_client)), "client has no certificate");
    let (workloads, services) = (count("workloads")?, count("services")?);
    let (policies, certificates) = (count("policies")?, count("certificates")?);
    Ok(format!(
        "{workloads} workloads, {services} services, {policies} policies, {certificates} certificates"
    ))
}
