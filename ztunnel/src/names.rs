//! The addresses of workloads that the control plane knows by name alone.
//!
//! Resolved in our own network namespace, with the node's resolver, and kept for a while: the plan
//! that needs one is made again once it is here.

use mesh_core::{Failure, Hostname, Reason};
use std::{
    collections::HashMap,
    fmt,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{
    runtime::Handle,
    time::{Instant, timeout},
};

/// Names kept, at most. Istio's proxy keeps as many.
const KEPT: usize = 4096;

/// How long an answer is used. The node's resolver does not say how long it may be.
const TTL: Duration = Duration::from_secs(30);

/// How long a look-up may take.
const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Clone, Debug)]
struct Answer {
    ips: Arc<[IpAddr]>,
    until: Instant,
}

/// The resolver and its cache.
#[derive(Clone, Debug)]
pub(crate) struct Names {
    answers: Arc<Mutex<HashMap<Hostname, Answer>>>,
    /// Where blocking look-ups run.
    runtime: Handle,
    ipv6: bool,
}

/// The name has no address, as far as the node's resolver can tell.
#[derive(Debug)]
struct Unresolved {
    host: Hostname,
    cause: Option<std::io::Error>,
}

impl fmt::Display for Unresolved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the workload's hostname {} has no address for this node's resolver", self.host)?;
        self.cause.as_ref().map_or(Ok(()), |cause| write!(f, ": {cause}"))
    }
}

impl std::error::Error for Unresolved {}

impl Names {
    /// An empty cache; look-ups run on this runtime.
    pub(crate) fn new(runtime: Handle, ipv6: bool) -> Self {
        Self { answers: Arc::default(), runtime, ipv6 }
    }

    fn answers(&self) -> MutexGuard<'_, HashMap<Hostname, Answer>> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The addresses of the name, if it was resolved lately.
    fn known(&self, host: &Hostname) -> Option<Arc<[IpAddr]>> {
        let answers = self.answers();
        let answer = answers.get(host)?;
        (answer.until > Instant::now()).then(|| Arc::clone(&answer.ips))
    }

    /// The addresses of the name.
    ///
    /// # Errors
    ///
    /// Returns a failure where it has none.
    pub(crate) async fn resolve(&self, host: &Hostname) -> Result<Arc<[IpAddr]>, Failure> {
        if let Some(known) = self.known(host) {
            return Ok(known);
        }
        let name = host.clone();
        let look_up = self.runtime.spawn_blocking(move || {
            use std::net::ToSocketAddrs;
            (name.as_str(), 0).to_socket_addrs().map(|found| found.collect::<Vec<_>>())
        });
        let fail = |cause| {
            let host = host.clone();
            Failure::upstream(Reason::NoUpstream, Unresolved { host, cause })
        };
        let found: Vec<SocketAddr> = timeout(PATIENCE, look_up)
            .await
            .map_err(|_elapsed| fail(Some(std::io::ErrorKind::TimedOut.into())))?
            .map_err(|stopped| fail(Some(stopped.into())))?
            .map_err(|error| fail(Some(error)))?;
        let ips: Arc<[IpAddr]> =
            found.iter().map(SocketAddr::ip).filter(|ip| ip.is_ipv4() || self.ipv6).collect();
        if ips.is_empty() {
            return Err(fail(None));
        }
        let now = Instant::now();
        let mut answers = self.answers();
        if answers.len() >= KEPT {
            answers.retain(|_, answer| answer.until > now);
            if answers.len() >= KEPT {
                answers.clear();
            }
        }
        answers.insert(host.clone(), Answer { ips: Arc::clone(&ips), until: now + TTL });
        Ok(ips)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn resolves_what_the_node_can_and_says_so_where_it_cannot() {
        let names = Names::new(Handle::current(), true);
        let localhost: Hostname = "localhost".parse().unwrap();
        assert!(names.known(&localhost).is_none());
        names.resolve(&localhost).await.unwrap();
        assert!(names.known(&localhost).unwrap().iter().all(IpAddr::is_loopback));
        let nowhere = names.resolve(&"nowhere.invalid".parse().unwrap()).await.unwrap_err();
        assert_eq!(nowhere.reason, Reason::NoUpstream);
    }
}
