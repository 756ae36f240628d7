//! Who reaches whom, and what is seen of it.

use std::net::IpAddr;

use anyhow::{Context, Result, ensure};
use mesh_tests::{
    capture::Capture,
    log::Line,
    wait::{self, SOON},
};
use serde_json::Value;

use super::bed::{Bed, KubePod};
use crate::{checks::text, report::Report};

pub(super) const CLIENT: &str = "spiffe://cluster.local/ns/shop/sa/client";
pub(super) const SERVER: &str = "spiffe://cluster.local/ns/shop/sa/server";
const MARKER: &str = "a-marker-in-the-path";

pub(super) fn check(bed: &Bed, report: &mut Report) -> Result<()> {
    report.stage("who reaches whom");
    let client = bed.pod("shop", "client")?;
    let [near, far] = bed.servers()?;
    let [_, node_b] = &bed.nodes;
    let across = |from: IpAddr, to: IpAddr| match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let ([a, b, x, _], [c, d, y, _]) = (from.octets(), to.octets());
            [a, b] == [10, 1] && [c, d] == [10, 1] && x != y
        }
        _ => false,
    };
    let capture = Capture::start_for(&node_b.namespace, &[MARKER], across)?;
    let mark = bed.proxy_of(&far)?.log().mark();
    report.check("across-nodes", || {
        let there = bed.reaches(&client, &format!("http://{}:8080/{MARKER}", far.address))?;
        let source = text(&there, "client").split(':').next().unwrap_or_default().to_owned();
        ensure!(source == client.address, "the server saw {source}, not {}", client.address);
        let back = bed.reaches(&far, &format!("http://{}:8080/{MARKER}", near.address))?;
        Ok(format!(
            "{} to {} and back to {}; it saw {source}",
            client.name,
            text(&there, "pod"),
            text(&back, "pod")
        ))
    });
    report.check("identities", || {
        let line = bed.proxy_of(&far)?.wait_access(mark, "the request from client", |line| {
            line.field("direction") == "inbound" && line.field("src.identity") == CLIENT
        })?;
        let identity = line.field("dst.identity");
        ensure!(identity == SERVER, "dst.identity is {identity:?}: {}", line.text);
        Ok(format!("{CLIENT} to {identity}, both signed by istiod"))
    });
    report.check("wire", || capture.stop()?.only_tunnels());
    report.check("certificates", || certificates(bed));
    report.check("impersonation", || {
        bed.certificate(CLIENT)?;
        let elsewhere = "spiffe://cluster.local/ns/shop/sa/guarded";
        let Err(refused) = bed.certificate(elsewhere) else {
            anyhow::bail!("node-a's token was good for {elsewhere}, which is on node-b alone");
        };
        let refused = refused.to_string();
        ensure!(refused.contains("Unauthenticated"), "{refused}");
        Ok("node-a's token is good for client, and not for an account of node-b".to_owned())
    });
    report.check("vip", || {
        let vip = bed.vip("shop", "server")?;
        both(bed, &client, &format!("http://{vip}/")).map(|pods| format!("{vip}: {pods}"))
    });
    for name in ["server", "server.shop", "server.shop.svc.cluster.local"] {
        report.check(&format!("name {name}"), || {
            let answer = bed.reaches(&client, &format!("http://{name}/"))?;
            Ok(format!("{} answered", text(&answer, "pod")))
        });
    }
    report.check("headless", || both(bed, &client, "http://headless:8080/"));
    report.check("self", || {
        let vip = bed.vip("shop", "server")?;
        both(bed, &near, &format!("http://{vip}/"))
    });
    seen(bed, &client, &far, report);
    Ok(())
}

fn seen(bed: &Bed, client: &KubePod, far: &KubePod, report: &mut Report) {
    report.check("outsider", || {
        let legacy = bed.pod("outside", "legacy")?;
        let answer = bed.reaches(&legacy, &format!("http://{}:8080/", far.address))?;
        bed.reaches(client, &format!("http://{}:8080/", legacy.address))?;
        Ok(format!(
            "PERMISSIVE: {} answered a pod outside of the mesh; and the other way",
            text(&answer, "pod")
        ))
    });
    report.check("metrics", || {
        let opened = "istio_tcp_connections_opened_total";
        let labels = [
            ("reporter", "source"),
            ("connection_security_policy", "mutual_tls"),
            ("source_principal", CLIENT),
            ("destination_principal", SERVER),
            ("destination_service_name", "server"),
        ];
        let count = bed.proxy_of(client)?.metrics()?.sum(opened, &labels);
        ensure!(count > 0.0, "no {opened} with {labels:?}");
        Ok(format!("{count} connections opened by mutual TLS to service server"))
    });
    report.check("istioctl", || istioctl(bed));
    report.check("istioctl-log", || istioctl_log(bed, client));
}

/// Both servers answer, sooner or later.
pub(super) fn both(bed: &Bed, client: &KubePod, url: &str) -> Result<String> {
    let mut pods = std::collections::BTreeSet::new();
    for _ in 0..40 {
        pods.insert(text(&bed.reaches(client, url)?, "pod").to_owned());
        if pods.len() == 2 {
            return Ok(format!("{pods:?}"));
        }
    }
    anyhow::bail!("of 40 requests all went to {pods:?}")
}

fn certificates(bed: &Bed) -> Result<String> {
    let [node, _] = &bed.nodes;
    let dump = node.proxy()?.config_dump()?;
    let all = dump.get("certificates").and_then(Value::as_array).context("no certificates")?;
    let mine = all.iter().find(|one| text(one, "identity") == CLIENT).context("none of client")?;
    ensure!(text(mine, "state") == "Available", "{mine}");
    Ok(format!("{} identities on {}; {CLIENT} is Available", all.len(), node.name))
}

fn istioctl(bed: &Bed) -> Result<String> {
    // It finds the pod by its label, and reaches its admin port through the API server and kubelet.
    let ask = |kind: &str| bed.istioctl(&["ztunnel-config", kind, "--node", "node-a"]);
    for kind in ["services", "policies", "certificates", "connections", "all"] {
        ask(kind)?;
    }
    let said = ask("workloads")?;
    let client = bed.pod("shop", "client")?;
    let row = said.lines().find(|line| line.contains(&client.name)).context("no row of client")?;
    ensure!(row.contains("HBONE"), "{row}");
    Ok(row.split_whitespace().collect::<Vec<_>>().join(" "))
}

/// It sets what is logged, on all nodes.
fn istioctl_log(bed: &Bed, client: &KubePod) -> Result<String> {
    let said = bed.istioctl(&["ztunnel-config", "log", "--level", "access:off,info"])?;
    let levels = said.lines().filter(|line| line.contains("access")).count();
    ensure!(levels == bed.nodes.len(), "{said}");
    let proxy = bed.proxy_of(client)?;
    let ended = || -> Result<f64> {
        Ok(proxy.metrics()?.sum("istio_tcp_connections_closed_total", &[("reporter", "source")]))
    };
    let (mark, before) = (proxy.log().mark(), ended()?);
    bed.get(client, "http://server/")?;
    wait::until("the connection to end", SOON, || Ok((ended()? > before).then_some(())))?;
    bed.istioctl(&["ztunnel-config", "log", "--reset"])?;
    bed.get(client, &format!("http://server/{MARKER}"))?;
    let outbound = |line: &Line| line.field("direction") == "outbound";
    proxy.wait_access(mark, "a request", outbound)?;
    let count = proxy.log().access_since(mark).iter().filter(|line| outbound(line)).count();
    ensure!(count == 1, "{count} lines of two requests");
    Ok("the access log was off for one request, and is on again".to_owned())
}
