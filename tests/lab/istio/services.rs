//! Services that are more than pods behind an address.

use anyhow::{Context, Result, ensure};
use mesh_tests::wait::{self, SOON};

use super::{bed::Bed, paths::both};
use crate::{checks::text, report::Report};

pub(super) fn check(bed: &Bed, report: &mut Report) -> Result<()> {
    report.stage("entries, nearness, a waypoint");
    report.check("service-entry", || entry(bed));
    report.check("near-ones", || near(bed));
    report.check("waypoint", || waypoint(bed));
    report.check("waypoint-unbound", || unbound(bed));
    Ok(())
}

fn entry(bed: &Bed) -> Result<String> {
    let (client, legacy) = (bed.pod("shop", "client")?, bed.pod("outside", "legacy")?);
    let address = &legacy.address;
    bed.apply(&format!(
        "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: ext, namespace: shop}}\n\
         spec:\n  hosts: [ext.example.com]\n  addresses: [10.96.255.10]\n  location: MESH_EXTERNAL\n  resolution: STATIC\n  \
         ports: [{{number: 80, targetPort: 8080, name: http, protocol: HTTP}}]\n  workloadSelector: {{labels: {{app: ext}}}}\n\
         ---\napiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata: {{name: ext, namespace: shop}}\n\
         spec: {{address: {address}, labels: {{app: ext}}}}\n"
    ))?;
    let by_address = bed.reaches(&client, "http://10.96.255.10/")?;
    let by_name = bed.reaches(&client, "http://ext.example.com/")?;
    for answer in [&by_address, &by_name] {
        ensure!(text(answer, "pod") == legacy.name, "{answer}");
    }
    Ok(format!("ext.example.com and its address lead to {address}, the WorkloadEntry"))
}

/// A Service that is to stay on the node does, and then does not.
fn near(bed: &Bed) -> Result<String> {
    let client = bed.pod("shop", "client")?;
    let [near, _] = bed.servers()?;
    let policy = |policy: &str| {
        let patch = format!("{{\"spec\": {{\"internalTrafficPolicy\": \"{policy}\"}}}}");
        bed.kubectl(&["-n", "shop", "patch", "service", "server", "-p", &patch])
    };
    policy("Local")?;
    wait::until("the near server alone to answer", SOON, || {
        for _ in 0..12 {
            if text(&bed.get(&client, "http://server/")?, "pod") != near.name {
                return Ok(None);
            }
        }
        Ok(Some(()))
    })?;
    policy("Cluster")?;
    let all = wait::retry("both to answer", SOON, || both(bed, &client, "http://server/"))?;
    Ok(format!("{} alone, then {all}", near.name))
}

/// As far as a node proxy goes: all goes to the waypoint, and nothing elsewhere.
fn waypoint(bed: &Bed) -> Result<String> {
    let client = bed.pod("shop", "client")?;
    let stand_in = bed.pod("shop", "wp-stand-in")?;
    let guarded = bed.pod("shop", "guarded")?;
    let [_, node_b] = &bed.nodes;
    let outbound = bed.proxy_of(&client)?;
    let (mark, there) = (outbound.log().mark(), node_b.proxy()?.log().mark());
    let vip = bed.vip("shop", "guarded")?;
    let answer = bed.get(&client, &format!("http://{vip}/"));
    ensure!(answer.is_err(), "it was answered past the waypoint: {answer:?}");
    let line = outbound.wait_access(mark, "the request to guarded", |line| {
        line.field("dst.service").starts_with("guarded.")
            || line.field("dst.addr").starts_with(&format!("{}:", stand_in.address))
    })?;
    let to = line.field("dst.addr").to_owned();
    ensure!(to == format!("{}:15008", stand_in.address), "it went to {to}: {}", line.text);
    let seen = node_b.proxy()?.log().access_since(there);
    let past = seen.iter().find(|line| line.field("dst.addr").starts_with(&guarded.address));
    ensure!(past.is_none(), "guarded was reached: {}", past.context("none")?.text);
    Ok(format!("to {to}, the waypoint, and nowhere else: \"{}\"", line.field("error")))
}

/// Without its waypoint the Service is gone to directly.
fn unbound(bed: &Bed) -> Result<String> {
    let client = bed.pod("shop", "client")?;
    let label = |label| bed.kubectl(&["-n", "shop", "label", "service", "guarded", label]);
    label("istio.io/use-waypoint-")?;
    let answer = bed.reaches(&client, "http://guarded/")?;
    label("istio.io/use-waypoint=wp")?;
    bed.refused(&client, "http://guarded/")?;
    Ok(format!("{} answered without it, and not when it was bound again", text(&answer, "pod")))
}
