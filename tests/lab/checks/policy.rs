//! Who may come in, and who may not.

use std::net::SocketAddr;

use anyhow::{Result, bail, ensure};
use mesh_tests::{
    mesh::{STRICT, principal},
    wait::SOON,
};
use serde_json::json;

use super::{ask, text};
use crate::{
    report::Report,
    world::{FIRST, HTTP, TCP, VIP, World, url},
};

const CLOSED: &str = "no-tcp-for-client";

pub(crate) fn check(world: &mut World, report: &mut Report) -> Result<()> {
    report.check("intruder-refused", || intruder(world));
    report.check("strict-refuses", || strict(world));
    world.mesh.permissive();
    report.check("permissive-lets-in", || permissive(world));
    world.mesh.strict(&[&world.v1, &world.v2]);
    report.check("strict-again", || {
        world.apply()?;
        world.b.with_proxy(|proxy| proxy.wait_policy(STRICT, true))?;
        strict(world)
    });
    let held = policy_closes(world);
    report.check("policy-closes", || held);
    world.mesh.remove_policy(CLOSED);
    report.check("policy-removed", || {
        world.apply()?;
        world.b.with_proxy(|proxy| proxy.wait_policy(CLOSED, false))?;
        let to = SocketAddr::new(FIRST.0, TCP);
        world.client.tcp(to, &["echo", "again"])?.ok()?;
        Ok("without it, client is let in again".to_owned())
    });
    Ok(())
}

fn intruder(world: &World) -> Result<String> {
    let mark = world.b.with_proxy(|proxy| Ok(proxy.log().mark()))?;
    for vip in [VIP.0, VIP.1] {
        if let Ok(said) = ask(&world.intruder, &url(vip, 80, "/")) {
            bail!("intruder was answered at {vip}: {said}");
        }
    }
    let line = world.b.with_proxy(|proxy| {
        proxy.wait_access(mark, "intruder's refusal", |line| {
            line.field("src.workload") == "intruder" && !line.field("error").is_empty()
        })
    })?;
    Ok(format!("no answer; the server's side: {}", line.field("error")))
}

fn strict(world: &World) -> Result<String> {
    let mark = world.b.with_proxy(|proxy| Ok(proxy.log().mark()))?;
    for ip in [world.v1.v4(), world.v1.v6()] {
        if let Ok(said) = ask(&world.legacy, &url(ip, HTTP, "/")) {
            bail!("legacy was answered at {ip}: {said}");
        }
    }
    let line = world.b.with_proxy(|proxy| {
        proxy.wait_access(mark, "legacy's refusal", |line| line.field("error").contains(STRICT))
    })?;
    Ok(format!("legacy gets no answer: {}", line.field("error")))
}

fn permissive(world: &World) -> Result<String> {
    world.apply()?;
    world.b.with_proxy(|proxy| proxy.wait_policy(STRICT, false))?;
    for (ip, own) in [(world.v1.v4(), world.legacy.v4()), (world.v1.v6(), world.legacy.v6())] {
        let said = ask(&world.legacy, &url(ip, HTTP, "/"))?;
        ensure!(text(&said, "client") == own.to_string(), "{said}");
    }
    Ok(format!("legacy is answered, and seen as {} and {}", world.legacy.v4(), world.legacy.v6()))
}

/// A connection is open when a policy comes that denies it.
fn policy_closes(world: &mut World) -> Result<String> {
    let mut open = Vec::new();
    for ip in [FIRST.0, FIRST.1] {
        let to = SocketAddr::new(ip, TCP).to_string();
        let mut program = world.client.spawn(["tcp", &to, "hold"])?;
        program.says("open", SOON)?;
        open.push(program);
    }
    let mark = world.b.with_proxy(|proxy| Ok(proxy.log().mark()))?;
    let rules = json!([[[{ "principals": [{ "Exact": principal("client") }] }],
                        [{ "destinationPorts": [TCP] }]]]);
    world.mesh.policy(CLOSED, "Deny", &rules);
    let start = tokio::time::Instant::now();
    world.apply()?;
    let mut ends = Vec::new();
    for mut program in open {
        ends.push(program.says("closed", SOON)?);
    }
    let took = start.elapsed().as_millis();
    let line = world.b.with_proxy(|proxy| {
        proxy.wait_access(mark, "the policy's", |line| line.field("error").contains("policy"))
    })?;
    Ok(format!("{} within {took} ms, both families: {}", ends.join(", "), line.field("error")))
}
