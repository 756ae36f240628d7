//! The addresses of workloads that the control plane knows by name alone.
//!
//! Resolved in our own network namespace, with the node's resolver, and kept for a while: the plan
//! that needs one is made again once it is here.

use mesh_core::{Failure, Hostname, Reason};
use std::{
    collections::HashMap,
    fmt, io,
    net::{IpAddr, ToSocketAddrs},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};
use tokio::{
    runtime::Handle,
    sync::{OnceCell, Semaphore},
    time::{Instant, timeout},
};

/// Names kept, at most. Istio's proxy keeps as many.
const KEPT: usize = 4096;

/// How long an answer is used. The node's resolver does not say how long it may be.
const TTL: Duration = Duration::from_secs(30);

/// How long a look-up may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// Look-ups at a time, at most: each has a thread for as long as the node's resolver takes, which is longer than anybody
/// waits for it where its servers are silent. The threads are those that enrol pods, too.
const AT_ONCE: usize = 32;

#[derive(Clone, Debug)]
struct Answer {
    ips: Arc<[IpAddr]>,
    until: Instant,
}

/// What the node's resolver does.
type LookUp = dyn Fn(&str) -> io::Result<Vec<IpAddr>> + Send + Sync;

/// One look-up, and all who wait for it.
type Flight = OnceCell<Result<Arc<[IpAddr]>, Cause>>;

/// The resolver and its cache.
#[derive(Clone)]
pub(crate) struct Names(Arc<Inner>);

struct Inner {
    answers: Mutex<HashMap<Hostname, Answer>>,
    flights: Mutex<HashMap<Hostname, Weak<Flight>>>,
    places: Arc<Semaphore>,
    /// Where blocking look-ups run.
    runtime: Handle,
    ipv6: bool,
    look_up: Arc<LookUp>,
}

impl fmt::Debug for Names {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Names").field("answers", &lock(&self.0.answers).len()).finish()
    }
}

/// Why there is no address, told to all who wait for it.
#[derive(Clone, Debug)]
enum Cause {
    /// The resolver has none.
    None,
    /// It said this.
    Resolver(Arc<str>),
    /// It did not answer in time.
    Silent,
}

/// The name has no address, as far as the node's resolver can tell.
#[derive(Debug)]
struct Unresolved {
    host: Hostname,
    cause: Cause,
}

impl fmt::Display for Unresolved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the workload's hostname {} has no address for this node's resolver", self.host)?;
        match &self.cause {
            Cause::None => Ok(()),
            Cause::Resolver(why) => write!(f, ": {why}"),
            Cause::Silent => write!(f, ": no answer within {} s", PATIENCE.as_secs()),
        }
    }
}

impl std::error::Error for Unresolved {}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Names {
    /// An empty cache; look-ups run on this runtime.
    pub(crate) fn new(runtime: Handle, ipv6: bool) -> Self {
        let look_up = |host: &str| {
            let found = (host, 0).to_socket_addrs()?;
            Ok(found.map(|address| address.ip()).collect())
        };
        Self::asking(Arc::new(look_up), runtime, ipv6)
    }

    fn asking(look_up: Arc<LookUp>, runtime: Handle, ipv6: bool) -> Self {
        Self(Arc::new(Inner {
            answers: Mutex::default(),
            flights: Mutex::default(),
            places: Arc::new(Semaphore::new(AT_ONCE)),
            runtime,
            ipv6,
            look_up,
        }))
    }

    /// The addresses of the name, if it was resolved lately.
    fn known(&self, host: &Hostname) -> Option<Arc<[IpAddr]>> {
        let answers = lock(&self.0.answers);
        let answer = answers.get(host)?;
        (answer.until > Instant::now()).then(|| Arc::clone(&answer.ips))
    }

    /// The addresses of the name. However many ask for one at a time, it is looked up once.
    ///
    /// # Errors
    ///
    /// Returns a failure where it has none.
    pub(crate) async fn resolve(&self, host: &Hostname) -> Result<Arc<[IpAddr]>, Failure> {
        if let Some(known) = self.known(host) {
            return Ok(known);
        }
        let flight = self.flight(host);
        let found = match timeout(PATIENCE, flight.get_or_init(|| self.look_up(host))).await {
            Ok(found) => found.clone(),
            Err(_elapsed) => Err(Cause::Silent),
        };
        found.map_err(|cause| {
            Failure::upstream(Reason::NoUpstream, Unresolved { host: host.clone(), cause })
        })
    }

    /// The look-up of this name that is under way, or a new one.
    fn flight(&self, host: &Hostname) -> Arc<Flight> {
        let mut flights = lock(&self.0.flights);
        if let Some(flight) = flights.get(host).and_then(Weak::upgrade) {
            return flight;
        }
        if flights.len() >= 2 * AT_ONCE {
            flights.retain(|_, flight| flight.strong_count() > 0);
        }
        let flight = Arc::default();
        flights.insert(host.clone(), Arc::downgrade(&flight));
        flight
    }

    async fn look_up(&self, host: &Hostname) -> Result<Arc<[IpAddr]>, Cause> {
        // Never closed.
        let Ok(place) = Arc::clone(&self.0.places).acquire_owned().await else {
            return Err(Cause::Silent);
        };
        let (look_up, name) = (Arc::clone(&self.0.look_up), host.clone());
        let found = self.0.runtime.spawn_blocking(move || {
            let found = look_up(name.as_str());
            // As long as the thread is taken, whoever still waits.
            drop(place);
            found
        });
        let why = |error: &dyn fmt::Display| Cause::Resolver(error.to_string().into());
        let found = found.await.map_err(|stopped| why(&stopped))?.map_err(|error| why(&error))?;
        let ips: Arc<[IpAddr]> =
            found.into_iter().filter(|ip| ip.is_ipv4() || self.0.ipv6).collect();
        if ips.is_empty() {
            return Err(Cause::None);
        }
        self.keep(host, &ips);
        Ok(ips)
    }

    fn keep(&self, host: &Hostname, ips: &Arc<[IpAddr]>) {
        let now = Instant::now();
        let mut answers = lock(&self.0.answers);
        if answers.len() >= KEPT {
            answers.retain(|_, answer| answer.until > now);
            if answers.len() >= KEPT {
                answers.clear();
            }
        }
        answers.insert(host.clone(), Answer { ips: Arc::clone(ips), until: now + TTL });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use tokio::task::JoinSet;

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

    /// A resolver that answers nobody until it is let, and says how many it was asked.
    fn slow() -> (Names, Arc<AtomicUsize>, Arc<Mutex<()>>) {
        let (asked, gate) = (Arc::<AtomicUsize>::default(), Arc::<Mutex<()>>::default());
        let (count, wait) = (Arc::clone(&asked), Arc::clone(&gate));
        let look_up = move |_: &str| {
            count.fetch_add(1, Ordering::SeqCst);
            drop(lock(&wait));
            Ok(vec![IpAddr::from([192, 0, 2, 1])])
        };
        (Names::asking(Arc::new(look_up), Handle::current(), true), asked, gate)
    }

    /// All of them are asked for, and of so many the resolver is asked before it has answered any.
    #[expect(clippy::await_holding_lock, reason = "it is what the look-ups wait for")]
    async fn ask(hosts: impl Iterator<Item = Hostname>, at_once: usize) -> usize {
        let (names, asked, gate) = slow();
        let held = lock(&gate);
        let mut waiting = JoinSet::new();
        for host in hosts {
            let names = names.clone();
            waiting.spawn(async move { names.resolve(&host).await });
        }
        while asked.load(Ordering::SeqCst) < at_once {
            tokio::task::yield_now().await;
        }
        // Every one of them has had its turn.
        for _ in 0..waiting.len() {
            tokio::task::yield_now().await;
        }
        assert_eq!(asked.load(Ordering::SeqCst), at_once);
        drop(held);
        while let Some(found) = waiting.join_next().await {
            assert_eq!(found.unwrap().unwrap().len(), 1);
        }
        asked.load(Ordering::SeqCst)
    }

    #[tokio::test]
    async fn a_name_is_looked_up_once_for_all_who_ask() {
        let host: Hostname = "one.example".parse().unwrap();
        assert_eq!(ask(std::iter::repeat_n(host, 100), 1).await, 1);
    }

    #[tokio::test]
    async fn so_many_at_a_time_are_looked_up_and_no_more() {
        let hosts = (0..100).map(|n| format!("host-{n}.example").parse().unwrap());
        assert_eq!(ask(hosts, AT_ONCE).await, 100);
    }
}
