//! The cache of certificates, and the one task that fills it.

use crate::{
    ca::{CertificateAuthority, IssueError},
    certificate::WorkloadCertificate,
    crl::{Peer, Tracked},
    csr::Csr,
    dump,
    schedule::{Landing, Priority, Schedule, Start},
    tls::Context,
};
use mesh_core::SpiffeId;
use rustls_pki_types::CertificateDer;
use std::{
    collections::HashMap,
    error::Error,
    fmt,
    pin::pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};
use tokio::{
    sync::{Notify, watch},
    task::JoinSet,
    time::Instant,
};

/// Istio's: a CA that serves a whole mesh is not to be flooded by one node.
const MOST_FETCHES: usize = 8;

/// A CA that says nothing must not hold one of the eight places for ever.
const LONGEST_FETCH: Duration = Duration::from_secs(10);

/// The certificates of this proxy's workloads. Cheap to clone.
#[derive(Clone)]
pub struct Certificates(Arc<Shared>);

/// The task behind [`Certificates`]. Nothing is fetched while it does not [`run`](Self::run).
pub struct Manager {
    shared: Arc<Shared>,
    ca: Arc<dyn CertificateAuthority>,
}

struct Shared {
    context: Context,
    /// For the fast path. Whoever holds `work` may take it too, never the other way round.
    slots: RwLock<HashMap<SpiffeId, watch::Sender<State>>>,
    work: Mutex<Work>,
    /// There may be something to start.
    wake: Notify,
    issued: AtomicU64,
    failed: AtomicU64,
}

struct Work {
    schedule: Schedule<SpiffeId>,
    /// How many workloads of this node have each identity.
    held: HashMap<SpiffeId, usize>,
    stopped: bool,
}

/// What is known of one identity.
#[derive(Clone, Debug, Default)]
pub(crate) struct State {
    /// The newest certificate. May have expired since.
    pub(crate) current: Option<Arc<WorkloadCertificate>>,
    /// Why there is none, or no newer one.
    pub(crate) failure: Option<Failure>,
}

/// A fetch that failed.
#[derive(Clone, Debug)]
pub(crate) struct Failure {
    pub(crate) error: Arc<IssueError>,
    next: Option<Instant>,
}

impl State {
    pub(crate) fn valid_at(&self, now: SystemTime) -> Option<&Arc<WorkloadCertificate>> {
        self.current.as_ref().filter(|certificate| certificate.is_valid_at(now))
    }
}

/// There is no valid certificate for an identity.
#[derive(Clone, Debug)]
pub enum IdentityError {
    /// The CA gave none.
    Unavailable {
        /// Whose.
        identity: SpiffeId,
        /// Until the next attempt, if that is planned.
        retry: Option<Duration>,
        /// Why.
        cause: Arc<IssueError>,
    },
    /// Its last workload left while we waited.
    Forgotten(SpiffeId),
    /// The proxy is stopping.
    Stopped(SpiffeId),
}

impl fmt::Display for IdentityError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unavailable { identity, retry, .. } => {
                write!(f, "no certificate for {identity}")?;
                match retry {
                    Some(delay) => write!(f, " (next attempt in {:.1} s)", delay.as_secs_f32()),
                    None => Ok(()),
                }
            }
            Self::Forgotten(identity) => write!(f, "{identity} is no longer of this node"),
            Self::Stopped(identity) => write!(f, "no certificate for {identity}: stopping"),
        }
    }
}

impl Error for IdentityError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Unavailable { cause, .. } => Some(cause.as_ref()),
            Self::Forgotten(_) | Self::Stopped(_) => None,
        }
    }
}

impl Certificates {
    /// A valid certificate for `identity`: at once if there is one, else when the CA has issued it, ahead of
    /// all that is not waited for. Keeps it fresh from then on, until [`Self::forget`].
    ///
    /// # Errors
    ///
    /// Returns why the latest attempt failed. While the next one is held back, this is known at once.
    ///
    /// # Cancel safety
    ///
    /// The fetch goes on, for the next who asks.
    pub async fn get(
        &self,
        identity: &SpiffeId,
    ) -> Result<Arc<WorkloadCertificate>, IdentityError> {
        if let Some(certificate) = self.0.cached(identity) {
            return Ok(certificate);
        }
        let mut slot = self.0.want(identity, Priority::RealTime)?;
        loop {
            let state = slot.borrow_and_update().clone();
            if let Some(certificate) = state.valid_at(self.0.context.now()) {
                return Ok(Arc::clone(certificate));
            }
            if let Some(failure) = state.failure {
                let retry = failure.next.map(|at| at.saturating_duration_since(Instant::now()));
                let identity = identity.clone();
                return Err(IdentityError::Unavailable { identity, retry, cause: failure.error });
            }
            if slot.changed().await.is_err() {
                let identity = identity.clone();
                return Err(if self.0.work().stopped {
                    IdentityError::Stopped(identity)
                } else {
                    IdentityError::Forgotten(identity)
                });
            }
        }
    }

    /// Has a certificate ready before it is asked for.
    pub fn prefetch(&self, identity: SpiffeId) {
        if self.0.cached(&identity).is_none() {
            // After a stop, nobody is going to ask.
            let _stopped = self.0.want(&identity, Priority::Warmup);
        }
    }

    /// Has a certificate ready for a workload of this node, and kept fresh, until the last that has its identity
    /// lets go.
    pub fn hold(&self, identity: SpiffeId) -> Held {
        *self.0.work().held.entry(identity.clone()).or_default() += 1;
        self.prefetch(identity.clone());
        Held { certificates: self.clone(), identity }
    }

    /// Follows a peer whose chain was verified with this certificate just now, for as long as the tunnel with it
    /// lives.
    #[must_use]
    pub fn track(
        &self,
        certificate: &WorkloadCertificate,
        peer: &[CertificateDer<'_>],
        side: Peer,
    ) -> Tracked {
        certificate.track(peer, side, self.0.context.now())
    }

    /// Drops the certificate of an identity that no local workload has any more. Tunnels that use it live on.
    pub fn forget(&self, identity: &SpiffeId) {
        self.0.forget(&mut self.0.work(), identity);
    }

    /// The section `certificates` of `/config_dump`: no keys.
    #[must_use]
    pub fn dump(&self) -> serde_json::Value {
        let now = self.0.context.now();
        let mut states: Vec<_> = self.0.states();
        states.sort_by_cached_key(|(identity, _)| identity.to_string());
        states.iter().map(|(identity, state)| dump::identity(identity, state, now)).collect()
    }

    /// The end of each certificate's validity, for a gauge.
    #[must_use]
    pub fn expiries(&self) -> Vec<(SpiffeId, SystemTime)> {
        let end = |(id, state): (SpiffeId, State)| state.current.map(|c| (id, c.not_after()));
        self.0.states().into_iter().filter_map(end).collect()
    }

    /// How many fetches succeeded and failed so far.
    #[must_use]
    pub fn fetches(&self) -> (u64, u64) {
        (self.0.issued.load(Ordering::Relaxed), self.0.failed.load(Ordering::Relaxed))
    }
}

/// The identity of a workload of this node. While one lives, its certificate is kept.
#[derive(Debug)]
#[must_use]
pub struct Held {
    certificates: Certificates,
    identity: SpiffeId,
}

impl Held {
    /// Whose.
    #[must_use]
    pub fn identity(&self) -> &SpiffeId {
        &self.identity
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let shared = &self.certificates.0;
        let mut work = shared.work();
        let left = work.held.get_mut(&self.identity).map_or(0, |count| {
            *count -= 1;
            *count
        });
        if left == 0 {
            work.held.remove(&self.identity);
            shared.forget(&mut work, &self.identity);
        }
    }
}

impl Shared {
    /// The fast path: no task is involved.
    fn cached(&self, identity: &SpiffeId) -> Option<Arc<WorkloadCertificate>> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        let state = slots.get(identity)?.borrow();
        state.valid_at(self.context.now()).map(Arc::clone)
    }

    fn forget(&self, work: &mut Work, identity: &SpiffeId) {
        work.schedule.forget(identity);
        self.slots.write().unwrap_or_else(PoisonError::into_inner).remove(identity);
    }

    fn want(
        &self,
        identity: &SpiffeId,
        priority: Priority,
    ) -> Result<watch::Receiver<State>, IdentityError> {
        let mut work = self.work();
        if work.stopped {
            return Err(IdentityError::Stopped(identity.clone()));
        }
        work.schedule.want(identity, priority);
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        let receiver = match slots.get(identity) {
            Some(slot) => slot.subscribe(),
            None => slots.entry(identity.clone()).or_default().subscribe(),
        };
        drop(slots);
        drop(work);
        self.wake.notify_one();
        Ok(receiver)
    }

    fn states(&self) -> Vec<(SpiffeId, State)> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        slots.iter().map(|(identity, slot)| (identity.clone(), slot.borrow().clone())).collect()
    }

    /// Its holders only move values, so a panic cannot have left it half changed.
    fn work(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

type Fetched = Result<WorkloadCertificate, IssueError>;

impl Manager {
    /// An empty cache in front of `ca`.
    #[must_use]
    pub fn new(ca: Arc<dyn CertificateAuthority>, context: Context) -> (Certificates, Self) {
        let shared = Arc::new(Shared {
            context,
            slots: RwLock::default(),
            work: Mutex::new(Work {
                schedule: Schedule::new(MOST_FETCHES),
                held: HashMap::new(),
                stopped: false,
            }),
            wake: Notify::new(),
            issued: AtomicU64::new(0),
            failed: AtomicU64::new(0),
        });
        (Certificates(Arc::clone(&shared)), Self { shared, ca })
    }

    /// Fetches and refreshes until `stop` completes. What is cached by then stays usable.
    pub async fn run(self, stop: impl Future<Output = ()>) {
        let mut stop = pin!(stop);
        // Also where this future is dropped: nobody may wait for what will not come.
        let _end = End(&self.shared);
        let mut flights = JoinSet::new();
        let mut starts = HashMap::new();
        loop {
            loop {
                let Some(start) = self.shared.work().schedule.start(Instant::now()) else { break };
                let fetch =
                    fetch(Arc::clone(&self.ca), start.key.clone(), self.shared.context.clone());
                starts.insert(flights.spawn(fetch).id(), start);
            }
            let due = self.shared.work().schedule.next_due();
            tokio::select! {
                () = &mut stop => return,
                () = self.shared.wake.notified() => {}
                () = tokio::time::sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {}
                Some(landed) = flights.join_next_with_id() => {
                    let (id, fetched) = match landed {
                        Ok((id, fetched)) => (id, fetched),
                        // A panic in a CA costs one attempt.
                        Err(error) => (error.id(), Err(IssueError::Local(Box::new(error)))),
                    };
                    if let Some(start) = starts.remove(&id) {
                        self.land(&start, fetched);
                    }
                }
            }
        }
    }

    fn land(&self, start: &Start<SpiffeId>, fetched: Fetched) {
        let shared = &self.shared;
        let identity = &start.key;
        let (now, wall) = (Instant::now(), shared.context.now());
        let at = |time: SystemTime| now + time.duration_since(wall).unwrap_or(Duration::ZERO);
        // Under one lock, so that nobody sees the schedule and the slot disagree.
        let mut work = shared.work();
        let slots = shared.slots.read().unwrap_or_else(PoisonError::into_inner);
        let Some(slot) = slots.get(identity) else {
            work.schedule.landed(start, Landing::Issued { refresh: now }, now);
            return;
        };
        match fetched {
            Ok(certificate) => {
                let refresh = at(refresh_time(&certificate, wall));
                if !work.schedule.landed(start, Landing::Issued { refresh }, now) {
                    return;
                }
                shared.issued.fetch_add(1, Ordering::Relaxed);
                tracing::debug!(%identity, refresh_in = ?(refresh - now), "certificate issued");
                slot.send_replace(State { current: Some(Arc::new(certificate)), failure: None });
            }
            Err(error) => {
                let held = slot.borrow().valid_at(wall).map(Arc::clone);
                let expires = held.as_ref().map(|held| at(held.not_after()));
                let chance = fastrand::f64().mul_add(2.0, -1.0);
                if !work.schedule.landed(start, Landing::Failed { chance, expires }, now) {
                    return;
                }
                shared.failed.fetch_add(1, Ordering::Relaxed);
                let next = work.schedule.due(identity);
                let why = error.source().map(ToString::to_string);
                let retry_in = next.map(|next| next - now);
                let kept = held.is_some();
                tracing::warn!(%identity, %error, why, kept, ?retry_in, "no new certificate");
                let failure = Some(Failure { error: Arc::new(error), next });
                slot.send_replace(State { current: held, failure });
            }
        }
    }
}

/// Half of the validity. Where that is past (a short validity that was dated back, a slow answer), a tenth of
/// what is left, so that we never ask in a loop.
fn refresh_time(certificate: &WorkloadCertificate, now: SystemTime) -> SystemTime {
    let left = certificate.not_after().duration_since(now).unwrap_or(Duration::ZERO);
    certificate.half_life().max(now + (left / 10).max(Duration::from_secs(1)))
}

async fn fetch(ca: Arc<dyn CertificateAuthority>, identity: SpiffeId, context: Context) -> Fetched {
    let (key, csr) =
        Csr::generate(&identity).map_err(|error| IssueError::Local(Box::new(error)))?;
    let issued = tokio::time::timeout(LONGEST_FETCH, ca.sign(&identity, &csr))
        .await
        .map_err(|_elapsed| IssueError::Silent(LONGEST_FETCH))??;
    WorkloadCertificate::new(identity, key, issued, &context).map_err(IssueError::Useless)
}

/// Ends all waiting.
struct End<'a>(&'a Shared);

impl Drop for End<'_> {
    fn drop(&mut self) {
        let mut work = self.0.work();
        work.stopped = true;
        let mut slots = self.0.slots.write().unwrap_or_else(PoisonError::into_inner);
        // Nobody waits where there is something valid.
        let now = self.0.context.now();
        slots.retain(|_, slot| slot.borrow().valid_at(now).is_some());
    }
}

impl fmt::Debug for Certificates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Certificates").finish_non_exhaustive()
    }
}

impl fmt::Debug for Manager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Manager").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
