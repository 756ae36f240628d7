//! The local source: a YAML file with the field names of upstream's local mode, fed to the handlers of xDS.
//!
//! ```yaml
//! workloads:
//! - {uid: c1//v1/Pod/default/a, name: a, namespace: default, workloadIps: [10.0.0.1], protocol: HBONE,
//!    services: {default/example.com: {80: 8080}}}
//! policies:
//! - {name: deny, namespace: default, scope: Namespace, action: Deny,
//!    rules: [[[{principals: [{Exact: cluster.local/ns/default/sa/a}]}]]]}
//! services:
//! - {name: example, namespace: default, hostname: example.com, vips: [/10.1.0.1], ports: {80: 80}}
//! ```
//!
//! The file is read as a stream, one item at a time, and never kept: between two readings there is one
//! fingerprint per resource and a packed list of names. What did not change is not handed on again.
//!
//! Fields that may be missing have xDS's defaults. Unknown fields, unknown words and keys that stand twice are
//! faults, with line, column and path. At start a fault is an error; later, the whole file is read once before
//! anything of it takes effect, and a bad one leaves the state as it was.

mod address;
mod fault;
mod kept;
mod load;
mod policy;
mod service;
mod text;
mod tokens;
mod value;
mod watch;
mod workload;

#[cfg(test)]
mod tests;

pub use fault::Fault;
pub use load::{Handlers, LoadError, Loaded, Report, Source, load};
pub use watch::watch;
