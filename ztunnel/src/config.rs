//! The settings of the node proxy: read once, all faults reported together.

pub mod keys;

use crate::{inbound::InboundConfig, outbound::PlanConfig};
use mesh_platform::RedirectConfig;
use mesh_runtime::config::{ConfigErrors, Reader, Source};
use std::{num::NonZeroUsize, path::PathBuf, time::Duration};

/// Ports of ours that a connection must not be sent to: it would come back.
const OWN_PORTS: [u16; 3] = [15008, 15006, 15001];

/// What the process was told.
#[derive(Debug)]
pub struct Config {
    /// The data path of every pod.
    pub data_path: DataPath,
    /// Who we are.
    pub node: Node,
    /// Who redirects the pods' traffic, and how sockets are made.
    pub redirect: RedirectConfig,
    /// Where workloads, services and policies come from.
    pub resources: Resources,
    /// Who signs certificates.
    pub authority: Authority,
    /// The CNI agent's socket; `None` in dedicated mode.
    pub agent: Option<PathBuf>,
    /// The workload of dedicated mode.
    pub dedicated: Option<mesh_state::PodInfo>,
    /// The process itself.
    pub process: Process,
}
