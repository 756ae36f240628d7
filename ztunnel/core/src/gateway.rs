//! References to waypoints and to network gateways.

use crate::{Hostname, Namespace, NetworkAddress};
use std::fmt;

/// Where a waypoint or a network gateway is to be found, and on which port it takes tunnels.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct Gateway {
    /// Who it is.
    pub destination: Destination,
    /// Its HBONE port.
    pub hbone_port: u16,
}

/// The two ways to name a gateway. Prints as `network/ip` or `namespace/hostname`.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub enum Destination {
    /// By address.
    Address(NetworkAddress),
    /// By the hostname of a service or of a workload.
    Hostname(Namespace, Hostname),
}

/// A waypoint that takes a share of the connections.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct WeightedGateway {
    /// The waypoint.
    pub gateway: Gateway,
    /// Its weight among its like; 0 is never chosen.
    pub weight: u32,
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Hostname(namespace, host) => write!(f, "{namespace}/{host}"),
        }
    }
}
