//! What is to hold, in order.

mod life;
mod paths;
mod policy;
mod seen;
mod streams;
mod waypoint;

use std::{fs, path::Path};

use anyhow::{Context, Result, bail, ensure};
use mesh_platform::probe;
use mesh_tests::{Lab, Pod, program::Finished};
use serde_json::Value;

use crate::{Options, report::Report, world::World};

/// Builds a lab and checks everything; the lab, and whether all held.
pub(crate) fn run(options: &Options, id: &str) -> Result<(World, bool)> {
    capabilities()?;
    // What the node proxy would say of it, said before anything is built.
    if let Some(lack) = probe::lacking(true).first() {
        bail!("{lack}");
    }
    let mut report = Report::new(options.json);
    let lab = Lab::named(Some(id), options.ztunnel.as_deref())?;
    report.stage("two nodes, eight pods, their programs");
    let mut world = World::build(lab)?;
    report.check("nodes", || {
        world.a.start_proxy(&[])?;
        world.b.start_proxy(&[])?;
        Ok("the node proxies of both nodes are ready".to_owned())
    });
    if report.failed() == 0 {
        all(&mut world, &mut report)?;
    }
    let held = report.failed() == 0;
    if !options.json {
        println!("\n{}", report.summary(report.elapsed()));
    }
    if !held {
        let kept = Path::new("/tmp").join(format!("ambient-lab-{id}"));
        save_logs(&world, &kept)?;
        eprintln!("The logs are in {}", kept.display());
    }
    Ok((world, held))
}

fn all(world: &mut World, report: &mut Report) -> Result<()> {
    report.check("enrolled", || {
        world.enrol()?;
        Ok("client, intruder; server-v1, server-v2, inner; legacy and late are not".to_owned())
    });
    report.stage("requests");
    paths::check(world, report)?;
    report.stage("who may");
    policy::check(world, report)?;
    report.stage("streams");
    streams::check(world, report)?;
    report.stage("lives");
    life::check(world, report)?;
    report.stage("what is seen of it");
    seen::check(world, report)?;
    if mesh_tests::envoy::binary().is_some() {
        report.stage("an Envoy waypoint");
        waypoint::check(world, report)?;
    }
    Ok(())
}

/// What namespaces, sockets in them and eBPF take: a root in a container may lack some.
fn capabilities() -> Result<()> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = u64::from_str_radix(line.context("no capabilities in /proc")?.trim(), 16)?;
    for (name, bit) in [("CAP_NET_ADMIN", 12), ("CAP_NET_RAW", 13), ("CAP_SYS_ADMIN", 21)] {
        ensure!(
            effective >> bit & 1 == 1,
            "this root has no {name}: run it outside of the container"
        );
    }
    Ok(())
}

fn save_logs(world: &World, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for node in [&world.a, &world.b] {
        let log = mesh_tests::proxy::log_of(world.lab.folder(), node.name());
        let name = log.file_name().context("no name")?;
        let _none = fs::copy(&log, to.join(name));
    }
    let _none = fs::copy(world.lab.mesh_file(), to.join("mesh.yaml"));
    Ok(())
}

/// The object that our HTTP server answers with.
fn answer(finished: Finished) -> Result<Value> {
    let said = finished.ok()?;
    serde_json::from_str(&said).with_context(|| format!("not our server's answer: {said}"))
}

pub(crate) fn text<'a>(value: &'a Value, field: &str) -> &'a str {
    value.get(field).and_then(Value::as_str).unwrap_or_default()
}

/// Asks our HTTP server by this URL.
fn ask(pod: &Pod, url: &str) -> Result<Value> {
    answer(pod.fetch(url)?)
}
