//! Node proxies die and come back; pods come and go while they work.

use std::net::SocketAddr;

use anyhow::{Context, Result, bail, ensure};
use mesh_tests::{
    Pod, Program,
    capture::Capture,
    mesh::identity,
    program::installed,
    wait::{self, SOON},
};
use serde_json::json;

use super::{ask, text};
use crate::{
    report::Report,
    world::{FIRST, HTTP, TCP, VIP, World, url},
};

const MARKER: &str = "marker-in-clear";

pub(crate) fn check(world: &mut World, report: &mut Report) -> Result<()> {
    let to = SocketAddr::new(FIRST.0, TCP).to_string();
    let open = world.client.spawn(["tcp", &to, "hold"]);
    world.a.kill_proxy();
    report.check("killed-nothing-leaks", || {
        let leaked = leaks(world)?;
        drop(open);
        Ok(leaked)
    });
    let waiting = world.client.spawn(["tcp", &to, "wait", "patience"]);
    report.check("restarted", || {
        world.a.start_proxy(&[])?;
        for vip in [VIP.0, VIP.1] {
            ask(&world.client, &url(vip, 80, "/"))?;
        }
        Ok("ready again; client is answered at both addresses".to_owned())
    });
    report.check("pending-completes", || {
        let said = waiting?.finish(SOON * 2)?.ok()?;
        Ok(format!("a connect begun while it was dead is answered: {}", said.trim()))
    });
    report.check("server-side-restarted", || {
        world.b.kill_proxy();
        if let Ok(said) = ask(&world.legacy, &url(world.v1.v4(), HTTP, "/")) {
            bail!("legacy is answered while the server's node proxy is dead: {said}");
        }
        world.b.start_proxy(&[])?;
        wait::retry("an answer", SOON, || ask(&world.client, &url(VIP.0, 80, "/")))?;
        Ok("nothing comes in past a dead node proxy, and it works again after".to_owned())
    });
    let ticking = ticking(world);
    report.check("live-enrolment", || {
        enrol(world)?;
        all_done(ticking?, "enrolled")
    });
    report.check("enrolled-works", || {
        let mark = world.a.with_proxy(|proxy| Ok(proxy.log().mark()))?;
        wait::retry("late in the mesh", SOON, || ask(&world.late, &url(VIP.0, 80, "/")))?;
        let line = world.a.with_proxy(|proxy| {
            proxy.wait_access(mark, "late's", |line| {
                line.field("src.identity") == identity("late") && line.field("error").is_empty()
            })
        })?;
        Ok(format!("its new connections go as {}", line.field("src.identity")))
    });
    let ticking = self::ticking(world);
    report.check("un-enrolment", || {
        release(world)?;
        let done = all_done(ticking?, "released")?;
        for (from, to) in [(&world.late, &world.legacy), (&world.legacy, &world.late)] {
            let said = ask(from, &url(to.v4(), HTTP, "/"))?;
            ensure!(text(&said, "client") == from.v4().to_string(), "{said}");
        }
        Ok(done)
    });
    Ok(())
}

/// With the client's node proxy dead, client gets nowhere and nothing goes past it.
fn leaks(world: &World) -> Result<String> {
    let capture = Capture::start(world.lab.wire(), &[MARKER])?;
    let mut tries = Vec::new();
    for ip in [VIP.0, VIP.1, world.v1.v4(), world.v1.v6()] {
        let port = if ip == VIP.0 || ip == VIP.1 { 80 } else { HTTP };
        let to = url(ip, port, &format!("/{MARKER}"));
        tries.push(if installed("curl").is_some() {
            world.client.program(["curl", "-gsS", "--max-time", "2", &to]).spawn()?
        } else {
            world.client.spawn(["http-get", &to])?
        });
    }
    let to = SocketAddr::new(world.v1.v4(), TCP).to_string();
    tries.push(world.client.spawn(["tcp", &to, "echo", MARKER])?);
    let mut answered = 0;
    for attempt in tries {
        answered += u32::from(attempt.finish(SOON)?.is_ok());
    }
    let seen = capture.stop()?;
    ensure!(answered == 0, "client was answered with its node proxy dead");
    if let Some(objection) = seen.objection() {
        bail!(objection);
    }
    Ok("client gets no answer, and not even a SYN of it leaves its node".to_owned())
}

/// Connections of late that work all the time: out and in, both families.
fn ticking(world: &World) -> Result<Vec<Program>> {
    let (late, legacy) = (&world.late, &world.legacy);
    let start = |from: &Pod, to: SocketAddr| -> Result<Program> {
        let mut program = from.spawn(["tcp", &to.to_string(), "tick", "60", "25"])?;
        program.says("open", SOON)?;
        Ok(program)
    };
    let out = [legacy.v4(), legacy.v6()].map(|ip| start(late, SocketAddr::new(ip, TCP)));
    let into = [late.v4(), late.v6()].map(|ip| start(legacy, SocketAddr::new(ip, TCP)));
    out.into_iter().chain(into).collect()
}

fn all_done(programs: Vec<Program>, what: &str) -> Result<String> {
    let count = programs.len();
    for (n, program) in programs.into_iter().enumerate() {
        let which = ["out v4", "out v6", "in v4", "in v6"].get(n).copied().unwrap_or_default();
        program.finish(SOON)?.ok().with_context(|| format!("the connection {which}"))?;
    }
    Ok(format!("late is {what} with {count} connections open, in and out: none breaks"))
}

fn enrol(world: &mut World) -> Result<()> {
    world.mesh.workload_of(&world.late).context("no late")?.set("protocol", json!("HBONE"));
    world.apply()?;
    world.a.enrol(&world.late, "late")
}

fn release(world: &mut World) -> Result<()> {
    world.a.release(&world.late)?;
    world.mesh.workload_of(&world.late).context("no late")?.set("protocol", json!("TCP"));
    world.apply()
}
