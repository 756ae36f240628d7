//! How many new tunnels a second: connections of which each needs a tunnel of its own.
//!
//! A tunnel is kept for the next connection with the same key (address, identities, source), so the same key is only
//! of use again when its tunnel is gone. There are 64 keys: 64 pods on the far node, each with an account of its own.
//! Sixteen threads each walk round four of them, one short connection each, and leave every address alone until the
//! idle tunnel has been released: the node proxies run with `POOL_UNUSED_RELEASE_TIMEOUT` = [`RELEASE`], and an
//! address rests for [`REST`]. That this worked is checked, not believed: each namespace of the far pods counts the
//! connections that were opened to it (`PassiveOpens`), which are one for the application and one for each tunnel.

use std::{fs, net::SocketAddr, time::Duration};

use anyhow::{Context as _, Result};
use mesh_tests::Pod;

use crate::{
    load::client::Work,
    rows::{Length, PORTS, precise},
    scene::Scene,
};

/// How many keys there are.
pub const KEYS: usize = 64;
/// How many connections are opened at once.
pub const PARALLEL: usize = 16;
/// When an idle tunnel is released.
const RELEASE: &str = "10ms";
/// How long an address rests.
const REST: Duration = Duration::from_millis(20);

/// One round.
#[derive(Clone, Copy, Debug, Default)]
pub struct Opened {
    /// Connections that were served.
    pub connections: f64,
    /// Tunnels that were opened for them.
    pub tunnels: f64,
    /// How long it took.
    pub seconds: f64,
    /// Processor seconds of both node proxies.
    pub cpu: f64,
    /// Half of the connections were answered and closed within so many microseconds.
    pub p50: f64,
}

/// Adds the pods, restarts the node proxies and measures.
pub fn measure(scene: &mut Scene, length: Length) -> Result<Vec<Opened>> {
    let pods = scene.add_servers(KEYS)?;
    scene.start_proxies(&[("POOL_UNUSED_RELEASE_TIMEOUT", RELEASE)])?;
    let to: Vec<_> = pods.iter().map(|pod| SocketAddr::new(pod.v4(), PORTS.short)).collect();
    // Certificates are fetched now, and not again.
    scene.measured(Work::Rested(REST), &to, PARALLEL, Duration::from_secs(1))?;
    (0..length.rounds)
        .map(|_| {
            let before = opened(&pods)?;
            let run = scene.measured(Work::Rested(REST), &to, PARALLEL, length.time)?;
            let connections = precise(run.outcome.operations);
            Ok(Opened {
                connections,
                tunnels: precise(opened(&pods)? - before) - connections,
                seconds: run.outcome.seconds,
                cpu: run.used.cpu,
                p50: run.outcome.p50,
            })
        })
        .collect()
}

/// Connections that have been opened to these pods, by anybody.
fn opened(pods: &[Pod]) -> Result<u64> {
    pods.iter()
        .map(|pod| {
            pod.namespace().run(|| {
                let text = fs::read_to_string("/proc/thread-self/net/snmp")?;
                let mut lines = text.lines().filter(|line| line.starts_with("Tcp:"));
                let (names, values) =
                    (lines.next().unwrap_or_default(), lines.next().unwrap_or_default());
                let mut columns = names.split_whitespace().zip(values.split_whitespace());
                let (_, value) =
                    columns.find(|(name, _)| *name == "PassiveOpens").context("no PassiveOpens")?;
                value.parse::<u64>().context("PassiveOpens is no number")
            })
        })
        .sum()
}
