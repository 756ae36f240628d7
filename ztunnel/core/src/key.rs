//! How the control plane names what it knows.

use crate::{NetworkAddress, ServiceKey, WorkloadUid};
use std::fmt;

/// What to ask the control plane for. Prints as the resource name to subscribe to.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub enum Key {
    /// Whatever has this address: `network/ip`.
    Address(NetworkAddress),
    /// A workload: its uid.
    Workload(WorkloadUid),
    /// A service: `namespace/hostname`.
    Service(ServiceKey),
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Workload(uid) => uid.fmt(f),
            Self::Service(key) => key.fmt(f),
        }
    }
}
