//! The vocabulary of the mesh: names, identities, addresses, failures. No I/O, no clock, no async.

mod addr;
mod failure;
mod gateway;
mod key;
mod name;
mod service;
mod spiffe;
mod workload;

pub use addr::{Cidr, InvalidCidr, NetworkAddress, OriginalDst, PeerAddr};
pub use failure::{Failure, Reason, Report, Side};
pub use gateway::{Destination, Gateway, WeightedGateway};
pub use key::Key;
pub use name::{
    Hostname, Interner, InvalidName, Namespace, NetworkId, PolicyName, ServiceAccount, Text,
    TrustDomain, WorkloadUid,
};
pub use service::{
    HealthPolicy, IpFamilies, LoadBalancing, Mode, PortMap, Scope, Service, ServiceKey, Vip,
    Visibility,
};
pub use spiffe::{InvalidSpiffeId, SpiffeId};
pub use workload::{
    ApplicationTunnel, Health, Ips, Locality, Membership, NetworkMode, Template, TunnelProtocol,
    Workload, WorkloadKind,
};
