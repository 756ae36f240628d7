//! What the node proxies keep: idle, for connections that are held, and for a large mesh.

use std::time::Duration;

use anyhow::{Context as _, Result};
use mesh_tests::wait::pause;
use tokio::time::Instant;

use crate::{
    process::{Memory, Usage},
    scene::Scene,
    workloads,
};

/// Long enough that what is freed late is freed, and what is fetched at start is there.
const SETTLE: Duration = Duration::from_secs(2);
/// When what connections have left has been given back.
const GIVEN_BACK: Duration = Duration::from_secs(12);
/// How long a load of the largest mesh may take.
const LOADED: Duration = Duration::from_secs(300);

/// The memory of the near and the far node proxy, in KiB.
#[derive(Clone, Copy, Debug, Default)]
pub struct Held {
    /// How many connections are held.
    pub connections: u32,
    /// Resident, of each.
    pub rss: [u64; 2],
    /// Of this what is no file's: what connections take is in there.
    pub anonymous: [u64; 2],
}

/// Idle, then with 1 000 and 10 000 connections held, then with none again.
pub fn held(scene: &Scene) -> Result<Vec<Held>> {
    scene.start_proxies(&[])?;
    let mut seen = Vec::new();
    let mut look = |connections| {
        pause(SETTLE);
        let memory = scene.memory()?;
        let (rss, anonymous) = (memory.map(|of| of.rss), memory.map(|of| of.anonymous));
        seen.push(Held { connections, rss, anonymous });
        anyhow::Ok(())
    };
    look(0)?;
    let first = scene.hold(1000).context("holding 1000")?;
    look(1000)?;
    let second = scene.hold(9000).context("holding 10000")?;
    look(10_000)?;
    drop((first, second));
    pause(GIVEN_BACK);
    look(0)?;
    Ok(seen)
}

/// What a mesh of this size cost.
#[derive(Clone, Copy, Debug, Default)]
pub struct Loaded {
    /// How many workloads.
    pub workloads: u32,
    /// From the start of the process until it said that it is ready.
    pub seconds: f64,
    /// Processor seconds until then.
    pub cpu: f64,
    /// Its memory some seconds later.
    pub memory: Memory,
}

/// Loads meshes of these sizes, each into a fresh node proxy.
pub fn loaded(scene: &Scene, sizes: &[u32]) -> Result<Vec<Loaded>> {
    let node = scene.lab().node("loader")?;
    let mut seen = Vec::new();
    for &size in sizes {
        let file = scene.lab().folder().join("large.yaml");
        workloads::write(&file, size)?;
        let began = Instant::now();
        let mut proxy = scene.start_loader(&node, &file)?;
        proxy.wait_ready(LOADED)?;
        let seconds = began.elapsed().as_secs_f64();
        let id = proxy.program().id();
        let cpu = Usage::of(id)?.cpu;
        pause(SETTLE);
        seen.push(Loaded { workloads: size, seconds, cpu, memory: Memory::of(id)? });
    }
    Ok(seen)
}
