//! The same over IPv6: pods, Services and nodes have addresses of both families.

use std::net::IpAddr;

use anyhow::{Context, Result, ensure};
use mesh_tests::capture::Capture;

use super::{
    authorization::{policy, strict},
    bed::{Bed, KubePod},
    paths::{CLIENT, both},
};
use crate::{checks::text, report::Report};

const MARKER: &str = "another-marker-in-the-path";

pub(super) fn check(bed: &Bed, report: &mut Report) -> Result<()> {
    report.stage("over IPv6");
    let client = bed.pod("shop", "client")?;
    let [near, far] = bed.servers()?;
    let [_, node_b] = &bed.nodes;
    let capture = Capture::start_for(&node_b.namespace, &[MARKER], across)?;
    report.check("ipv6-across-nodes", || {
        let mark = bed.proxy_of(&far)?.log().mark();
        let there = bed.reaches(&client, &url(&far))?;
        let source = text(&there, "client");
        ensure!(source.starts_with(&format!("[{}]:", client.ipv6)), "the server saw {source}");
        bed.proxy_of(&far)?.wait_access(mark, "the request from client", |line| {
            line.field("src.identity") == CLIENT
                && line.field("dst.hbone_addr") == format!("[{}]:8080", far.ipv6)
        })?;
        bed.reaches(&far, &url(&near))?;
        Ok(format!("to {} and back to {}; it saw {source}, and who that is", far.ipv6, near.ipv6))
    });
    report.check("ipv6-vip", || {
        let path = "jsonpath={.spec.clusterIPs[1]}";
        let vip = bed.kubectl(&["-n", "shop", "get", "service", "server", "-o", path])?;
        both(bed, &client, &format!("http://[{vip}]/{MARKER}")).map(|pods| format!("{vip}: {pods}"))
    });
    report.check("ipv6-name", || {
        both(bed, &client, &format!("http://six/{MARKER}"))
            .map(|pods| format!("six, which has no other address: {pods}"))
    });
    report.check("ipv6-wire", || capture.stop()?.only_tunnels());
    report.check("ipv6-deny-source", || deny(bed, &client, &far));
    report.check("ipv6-strict", || outsider(bed, &client, &far));
    Ok(())
}

fn url(pod: &KubePod) -> String {
    format!("http://[{}]:8080/{MARKER}", pod.ipv6)
}

/// Between pods of different nodes.
fn across(from: IpAddr, to: IpAddr) -> bool {
    let node = |address| match address {
        IpAddr::V6(address) => match address.segments() {
            [0xfd00, 0x10, 1, node, ..] => Some(node),
            _ => None,
        },
        IpAddr::V4(_) => None,
    };
    matches!((node(from), node(to)), (Some(from), Some(to)) if from != to)
}

fn deny(bed: &Bed, client: &KubePod, far: &KubePod) -> Result<String> {
    let rule = format!("- from: [{{source: {{ipBlocks: [{}]}}}}]", client.ipv6);
    let objects = policy("DENY", &rule);
    bed.apply(&objects)?;
    bed.refused(client, &url(far))?;
    bed.get(client, &format!("http://{}:8080/", far.address)).context("IPv4 was refused too")?;
    bed.delete(&objects)?;
    bed.reaches(client, &url(far))?;
    Ok(format!("{} is refused, and the same pod's {} is not", client.ipv6, client.address))
}

fn outsider(bed: &Bed, client: &KubePod, far: &KubePod) -> Result<String> {
    let legacy = bed.pod("outside", "legacy")?;
    bed.reaches(&legacy, &url(far))?;
    bed.reaches(client, &url(&legacy))?;
    bed.apply(&strict(""))?;
    bed.refused(&legacy, &url(far))?;
    bed.get(client, &url(far)).context("a pod of the mesh was refused")?;
    bed.delete(&strict(""))?;
    bed.reaches(&legacy, &url(far))?;
    Ok(format!("{} is let in, and refused where it is STRICT", legacy.ipv6))
}
