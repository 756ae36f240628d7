//! The DNS proxy of a pod: names of the mesh are answered from the state, all others by the resolver that
//! the pod asked (`spec/ztunnel.md` §10; RFC 1035, 2181, 6891, 7766).
//!
//! * [`resolve`] decides what a name stands for, from a view of the state: pure.
//! * [`Resolver`] takes one message and answers it, or says that it is to be forwarded, and forwards it.
//! * [`tcp`] frames messages on a connection. Sockets are not made here: [`Dial`] brings them.
//!
//! What holds always: a reply has the id and the question of its query, and is never longer than the client
//! takes; nothing that a peer sends panics; no metric has a label that a peer can choose.
//!
//! Where we differ from Istio's node proxy, on purpose:
//!
//! * A query is forwarded to the server that was asked, as it came but for its id, and its answer goes back as
//!   it came: EDNS options, unknown types, the SOA of a negative answer and truncation are the servers' own
//!   business. Istio's asks the servers of its own `resolv.conf` and rebuilds the answer.
//! * Every reply has the RA bit and, if the query had it, EDNS: glibc takes an empty reply without both for a
//!   lame server's and asks the next.
//! * Names of the pods of a headless service (`web-0.web.ns.svc…`) are answered.
//! * A name of the mesh exists for all types: where the upstream says NXDOMAIN to a type that is not ours to
//!   answer, the client gets an empty answer, so that it does not drop the addresses that it has.
//! * Zone transfers are not implemented, and say so: an answer of several messages cannot be forwarded.

mod forward;
pub mod fuzz;
mod message;
mod metrics;
mod names;
mod resolv_conf;
pub mod resolve;
mod resolver;
pub mod tcp;
#[cfg(test)]
mod testing;

pub use forward::Dial;
pub use message::Transport;
pub use metrics::Metrics;
pub use resolv_conf::ResolvConf;
pub use resolver::{Resolver, Step, Unanswered};

/// What the answers depend on besides the state.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Settings {
    /// The domain of the cluster, in lower case and without a final dot.
    pub domain: String,
    /// Whether addresses of IPv6 are given out.
    pub ipv6: bool,
    /// What clients append to short names; `None` is what kubelet writes, by the client's namespace.
    pub search: Option<Vec<String>>,
    /// The servers to ask where it is not known which one was asked.
    pub servers: Vec<std::net::SocketAddr>,
}
