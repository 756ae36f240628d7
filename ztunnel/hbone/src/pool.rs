//! The tunnels of one pod, by where they lead and on whose behalf.
//!
//! One slot a key. The slot's lock is the single flight: who holds it makes the tunnel, who waits for it
//! finds the tunnel made, or shares the failure to make it. A slot without tunnels goes with the last who
//! uses it. A peer that takes no streams is not dialled again for each: who holds the lock waits for room.

use crate::{
    HandshakeError, Settings, Stream,
    engine::{self, Requests, keep_alive},
    error::{NoRoom, Unanswered},
    request::{Refused, ResponseHead, TunnelRequest},
    stream::Counted,
    tls::TlsStream,
};
use http::StatusCode;
use mesh_core::{Failure, NetworkId, Reason, Side, SpiffeId};
use mesh_runtime::tasks::{Draining, Tasks};
use rustls::{ClientConfig, pki_types::CertificateDer};
use std::{
    collections::HashMap,
    error::Error,
    fmt,
    net::{IpAddr, SocketAddr, TcpStream},
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::time::{Instant, sleep, timeout_at};

/// How often who waits for room looks for it: nothing tells that a peer takes streams again.
const LOOK: Duration = Duration::from_millis(50);

/// The answer to a CONNECT is waited for this many times as long as room.
const ANSWER: u32 = 6;

/// What tells tunnels apart.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct PoolKey {
    /// The far end.
    pub to: SocketAddr,
    /// Whom it must be.
    pub expect: Vec<SpiffeId>,
    /// Who we are.
    pub source: SpiffeId,
    /// Our address.
    pub source_ip: IpAddr,
    /// Our network.
    pub network: NetworkId,
}

/// A stream that was opened.
#[derive(Debug)]
pub struct Opened {
    /// The stream.
    pub stream: Stream,
    /// What the far end said.
    pub head: ResponseHead,
    /// Who the far end is: its certificates.
    pub certificates: Arc<[CertificateDer<'static>]>,
    /// Whether the tunnel was ended by whoever watched it.
    pub ended: Ended,
}

/// A connection that is being made, and what to secure it with.
pub type Dialing<'a> = Pin<Box<dyn Future<Output = Result<Dialed, Failure>> + Send + 'a>>;

/// A connection that was made.
pub struct Dialed {
    stream: TcpStream,
    tls: Arc<ClientConfig>,
    shaken: Shaken,
}

/// Told how the handshake went: who the peer is, or why there is no tunnel. It says what that is as a failure, or
/// what the tunnel ends with: as soon as that completes, the tunnel is dropped with all its streams.
pub type Shaken = Box<
    dyn FnOnce(Result<&[CertificateDer<'static>], HandshakeError>) -> Result<Ending, Failure>
        + Send,
>;

/// Completes when a tunnel must not live any longer.
pub type Ending = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Whether a tunnel was ended by its [`Ending`], and by nothing else. Clones are the same.
#[derive(Clone, Debug, Default)]
pub struct Ended(Arc<AtomicBool>);

impl Ended {
    /// Whether it was.
    #[must_use]
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

impl Dialed {
    /// To be secured with this, and watched by nobody.
    #[must_use]
    pub fn new(stream: TcpStream, tls: Arc<ClientConfig>) -> Self {
        let shaken: Shaken = Box::new(|outcome| match outcome {
            Ok(_) => Ok(Box::pin(std::future::pending()) as Ending),
            Err(error) => Err(error.upstream()),
        });
        Self { stream, tls, shaken }
    }

    /// The same, watched.
    #[must_use]
    pub fn watched(self, shaken: Shaken) -> Self {
        Self { shaken, ..self }
    }
}

impl fmt::Debug for Dialed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dialed").field("stream", &self.stream).finish_non_exhaustive()
    }
}

/// The tunnels of one pod. Dropping it closes them.
pub struct Pool {
    settings: Arc<Settings>,
    slots: Slots,
    tasks: Tasks,
}

type Slots = Arc<Mutex<HashMap<PoolKey, Arc<Slot>>>>;

#[derive(Default)]
struct Slot {
    making: tokio::sync::Mutex<()>,
    tunnels: Mutex<Vec<Tunnel>>,
    failed: Mutex<Failed>,
}

/// Failures to make a tunnel: how many, and the last. Who waited while it happened does not try again:
/// else the last in a long line would wait for as many timeouts.
#[derive(Default)]
struct Failed {
    count: u64,
    last: Option<(Side, Reason, Option<Shared>)>,
}

/// The cause of several failures.
#[derive(Clone, Debug)]
struct Shared(Arc<dyn Error + Send + Sync>);

impl fmt::Display for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Error for Shared {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.0.source()
    }
}

/// One tunnel, as those who open streams on it see it.
#[derive(Clone)]
struct Tunnel {
    requests: Requests,
    streams: Arc<AtomicUsize>,
    used: Arc<Mutex<Instant>>,
    certificates: Arc<[CertificateDer<'static>]>,
    ended: Ended,
}

impl Tunnel {
    /// How many streams the peer takes. Before it has said so, what we want.
    fn limit(&self) -> usize {
        self.requests.most()
    }

    /// Whether streams wait in the tunnel, which the peer does not take.
    fn is_over(&self) -> bool {
        self.streams.load(Ordering::Acquire) > self.limit()
    }
}

/// The tunnel did not take a request.
struct Untaken {
    failure: Failure,
    /// Another may.
    again: bool,
}

impl Untaken {
    fn dead(error: crate::Http2Error) -> Self {
        Self { failure: Failure::upstream(Reason::Http2, error), again: true }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("slots", &lock(&self.slots).len()).finish_non_exhaustive()
    }
}

impl Slot {
    /// A tunnel with room for a stream, counted as taken.
    fn usable(&self, most: usize) -> Option<(Tunnel, Counted)> {
        let tunnels = lock(&self.tunnels);
        tunnels.iter().find_map(|tunnel| {
            // The peer may lower it at the same time: the excess waits in the tunnel.
            if tunnel.streams.load(Ordering::Acquire) >= most.min(tunnel.limit()) {
                return None;
            }
            *lock(&tunnel.used) = Instant::now();
            Some((tunnel.clone(), Counted::new(&tunnel.streams)))
        })
    }

    fn forget(&self, streams: &Arc<AtomicUsize>) {
        lock(&self.tunnels).retain(|tunnel| !Arc::ptr_eq(&tunnel.streams, streams));
    }

    /// Why there may not be another tunnel: there are many, or the peer takes no streams.
    fn full(&self, settings: &Settings) -> Option<NoRoom> {
        let mut tunnels = lock(&self.tunnels);
        tunnels.retain(|tunnel| tunnel.limit() > 0 || !tunnel.requests.is_leaving());
        if tunnels.iter().any(|tunnel| tunnel.limit() == 0) {
            return Some(NoRoom::Few(0, settings.pool_patience));
        }
        let full = tunnels.len() >= settings.pool_tunnels;
        full.then(|| NoRoom::Full(tunnels.len(), settings.pool_patience))
    }

    /// Lets go of tunnels whose peer takes no streams: who comes next tries another.
    fn forget_closed(&self) {
        lock(&self.tunnels).retain(|tunnel| tunnel.limit() > 0);
    }

    fn failures(&self) -> u64 {
        lock(&self.failed).count
    }

    /// The last failure, if it is later than those.
    fn failed_since(&self, count: u64) -> Option<Failure> {
        let failed = lock(&self.failed);
        let (side, reason, source) = failed.last.clone().filter(|_| failed.count > count)?;
        Some(Failure { side, reason, source: source.map(|shared| Box::new(shared) as Box<_>) })
    }

    /// Shares a failure with those who wait.
    fn fail(&self, failure: Failure) -> Failure {
        let before = {
            let mut failed = lock(&self.failed);
            let Failure { side, reason, source } = failure;
            failed.last = Some((side, reason, source.map(|source| Shared(Arc::from(source)))));
            failed.count += 1;
            failed.count - 1
        };
        self.failed_since(before).unwrap_or_else(|| Failure::local(Reason::Connect))
    }
}

/// Dropped after a use of a slot, it takes the slot with it if that is empty and nobody else's.
struct Sweep<'a> {
    slots: &'a Mutex<HashMap<PoolKey, Arc<Slot>>>,
    key: &'a PoolKey,
}

impl Drop for Sweep<'_> {
    fn drop(&mut self) {
        let mut slots = lock(self.slots);
        // Under this lock nobody comes by another reference, and of several users the last finds one left.
        let unused = slots
            .get(self.key)
            .is_some_and(|slot| Arc::strong_count(slot) == 1 && lock(&slot.tunnels).is_empty());
        if unused {
            slots.remove(self.key);
        }
    }
}

impl Pool {
    /// Without tunnels. Their tasks are owned by `tasks`.
    #[must_use]
    pub fn new(settings: Settings, tasks: Tasks) -> Self {
        Self { settings: Arc::new(settings), slots: Slots::default(), tasks }
    }

    /// How many tunnels there are.
    #[must_use]
    pub fn tunnels(&self) -> usize {
        lock(&self.slots).values().map(|slot| lock(&slot.tunnels).len()).sum()
    }

    fn slot(&self, key: &PoolKey) -> Arc<Slot> {
        let mut slots = lock(&self.slots);
        if let Some(slot) = slots.get(key) {
            return Arc::clone(slot);
        }
        Arc::clone(slots.entry(key.clone()).or_default())
    }

    #[cfg(test)]
    fn is_empty(&self) -> bool {
        lock(&self.slots).is_empty()
    }

    /// Opens a stream, on a tunnel that is there or on a new one, which `dial` connects.
    ///
    /// # Errors
    ///
    /// Returns a failure of the upstream side, or what `dial` returned, to whoever waited for it.
    ///
    /// # Cancel safety
    ///
    /// Who is dropped while making a tunnel leaves that to the next in line.
    pub async fn open<'d>(
        &self,
        key: &PoolKey,
        request: &TunnelRequest,
        dial: impl Fn() -> Dialing<'d> + Send + Sync,
    ) -> Result<Opened, Failure> {
        // Declared first, dropped last, even where the caller gives up.
        let _sweep = Sweep { slots: &self.slots, key };
        let slot = self.slot(key);
        self.open_in(key, &slot, request, dial).await
    }

    async fn open_in<'d>(
        &self,
        key: &PoolKey,
        slot: &Arc<Slot>,
        request: &TunnelRequest,
        dial: impl Fn() -> Dialing<'d> + Send + Sync,
    ) -> Result<Opened, Failure> {
        loop {
            let (tunnel, count, fresh) = match slot.usable(self.most()) {
                Some((tunnel, count)) => (tunnel, count, false),
                None => self.wait(key, slot, &dial).await?,
            };
            match self.request(&tunnel, request, count).await {
                Ok(opened) => return opened,
                // It was closed while it lay there, or takes no streams: that one is not to be had any more.
                Err(Untaken { failure, again }) => {
                    slot.forget(&tunnel.streams);
                    if !again {
                        return Err(slot.fail(failure));
                    }
                    if fresh {
                        return Err(failure);
                    }
                }
            }
        }
    }

    /// Waits in line for a tunnel with room, or makes one. The last tells which.
    async fn wait<'d>(
        &self,
        key: &PoolKey,
        slot: &Arc<Slot>,
        dial: &(impl Fn() -> Dialing<'d> + Send + Sync),
    ) -> Result<(Tunnel, Counted, bool), Failure> {
        let failures = slot.failures();
        let _making = slot.making.lock().await;
        let until = Instant::now() + self.settings.pool_patience;
        loop {
            if let Some((tunnel, count)) = slot.usable(self.most()) {
                return Ok((tunnel, count, false));
            }
            if let Some(failure) = slot.failed_since(failures) {
                return Err(failure);
            }
            let Some(full) = slot.full(&self.settings) else { break };
            if Instant::now() >= until {
                slot.forget_closed();
                return Err(slot.fail(Failure::upstream(Reason::Http2, full)));
            }
            sleep(LOOK).await;
        }
        // Boxed: a connection that is held must not carry the room that this takes.
        let made = Box::pin(self.make(key, slot, dial())).await;
        let (tunnel, count) = made.map_err(|failure| slot.fail(failure))?;
        Ok((tunnel, count, true))
    }

    fn most(&self) -> usize {
        usize::try_from(self.settings.pool_streams).unwrap_or(usize::MAX).max(1)
    }

    /// Sends the CONNECT and waits for its answer. The outer error means that the tunnel did not take the
    /// request at all.
    async fn request(
        &self,
        tunnel: &Tunnel,
        request: &TunnelRequest,
        count: Counted,
    ) -> Result<Result<Opened, Failure>, Untaken> {
        let dead = |error| Untaken::dead(engine::failed(error));
        let mut asked = tunnel.requests.send(request.to_http()).map_err(dead)?;
        let response = match self.answered(tunnel, &mut asked).await? {
            Some(Ok(response)) => response,
            Some(Err(error)) if engine::was_not_processed(&error) => return Err(dead(error)),
            Some(Err(error)) => {
                return Ok(Err(Failure::upstream(Reason::Http2, engine::failed(error))));
            }
            None => {
                let waited = Unanswered(self.settings.pool_patience * ANSWER);
                return Ok(Err(Failure::upstream(Reason::Connect, waited)));
            }
        };
        if response.status != StatusCode::OK {
            return Ok(Err(Failure::upstream(Reason::Refused, Refused(response.status))));
        }
        let head = ResponseHead::from_http(&response.headers);
        let Some(raw) = asked.into_stream() else {
            return Ok(Err(Failure::local(Reason::Reset)));
        };
        let stream = Stream::new(raw, Some(count));
        let certificates = Arc::clone(&tunnel.certificates);
        Ok(Ok(Opened { stream, head, certificates, ended: tunnel.ended.clone() }))
    }

    /// What the peer answers, if it does in time.
    async fn answered(
        &self,
        tunnel: &Tunnel,
        asked: &mut engine::Asked,
    ) -> Result<Option<Result<engine::Response, engine::Error>>, Untaken> {
        let patience = self.settings.pool_patience;
        let began = Instant::now();
        for nth in 1..=ANSWER {
            match timeout_at(began + patience * nth, &mut *asked).await {
                Ok(answered) => return Ok(Some(answered)),
                Err(_) if tunnel.is_over() => {
                    let failure =
                        Failure::upstream(Reason::Http2, NoRoom::Few(tunnel.limit(), patience));
                    return Err(Untaken { failure, again: false });
                }
                Err(_) => {}
            }
        }
        Ok(None)
    }

    async fn make(
        &self,
        key: &PoolKey,
        slot: &Arc<Slot>,
        dialing: Dialing<'_>,
    ) -> Result<(Tunnel, Counted), Failure> {
        let Dialed { stream, tls, shaken } = dialing.await?;
        let io = tokio::net::TcpStream::from_std(stream)
            .map_err(|error| Failure::upstream(Reason::Connect, error))?;
        let (io, ending) = match TlsStream::connect(io, tls).await {
            Ok(io) => {
                let ending = shaken(Ok(io.peer_certificates()))?;
                (io, ending)
            }
            // A failure all the same, should whoever watches find nothing wrong with it.
            Err(error) => {
                return Err(shaken(Err(error)).err().unwrap_or(Failure::local(Reason::Tls)));
            }
        };
        let certificates: Arc<[_]> = io.peer_certificates().into();
        let (requests, connection) = engine::connect(io, &self.settings);
        let tunnel = Tunnel {
            requests,
            streams: Arc::default(),
            used: Arc::new(Mutex::new(Instant::now())),
            certificates,
            ended: Ended::default(),
        };
        // Counted before others see it.
        let count = Counted::new(&tunnel.streams);
        lock(&slot.tunnels).push(tunnel.clone());
        let watched = Watched {
            key: key.clone(),
            slot: Arc::downgrade(slot),
            slots: Arc::downgrade(&self.slots),
            streams: Arc::clone(&tunnel.streams),
            used: Arc::clone(&tunnel.used),
            settings: Arc::clone(&self.settings),
            ended: tunnel.ended.clone(),
        };
        self.tasks.spawn(move |draining| watched.drive(connection, ending, draining));
        Ok((tunnel, count))
    }
}

/// A tunnel, as its own task sees it. It holds nothing that would keep the tunnel open.
struct Watched {
    key: PoolKey,
    slot: std::sync::Weak<Slot>,
    slots: std::sync::Weak<Mutex<HashMap<PoolKey, Arc<Slot>>>>,
    streams: Arc<AtomicUsize>,
    used: Arc<Mutex<Instant>>,
    settings: Arc<Settings>,
    ended: Ended,
}

impl Watched {
    /// Moves the tunnel until it ends, must end, is idle for too long, or does not answer any more.
    async fn drive(
        self,
        mut connection: engine::ClientConnection,
        mut ending: Ending,
        draining: Draining,
    ) {
        let shared = Arc::clone(connection.shared());
        let alive = keep_alive(shared, self.settings.ping_interval, self.settings.ping_timeout);
        {
            let mut idle = std::pin::pin!(self.idle(&draining));
            let mut alive = std::pin::pin!(alive);
            let mut forgotten = false;
            loop {
                tokio::select! {
                    ended = &mut connection => {
                        if let Err(error) = ended {
                            tracing::debug!(to = %self.key.to, error = %engine::failed(error), "the tunnel broke");
                        }
                        break;
                    }
                    dead = &mut alive => {
                        tracing::debug!(to = %self.key.to, error = %dead, "the tunnel is given up");
                        break;
                    }
                    () = &mut ending => {
                        // Said before its streams fail, so that they can say why.
                        self.ended.0.store(true, Ordering::Release);
                        break;
                    }
                    // Without a holder of requests it ends with its last stream.
                    () = &mut idle, if !forgotten => {
                        forgotten = true;
                        self.forget();
                    }
                }
            }
        }
        self.forget();
    }

    fn forget(&self) {
        let Some(slots) = self.slots.upgrade() else { return };
        let _sweep = Sweep { slots: &slots, key: &self.key };
        if let Some(slot) = self.slot.upgrade() {
            slot.forget(&self.streams);
        }
    }

    /// Waits until nobody has asked for the tunnel for a while, or nobody will.
    async fn idle(&self, draining: &Draining) {
        loop {
            let until = *lock(&self.used) + self.settings.pool_idle;
            tokio::select! {
                () = tokio::time::sleep_until(until) => {}
                () = draining.stopping() => return,
            }
            let unused = *lock(&self.used) + self.settings.pool_idle <= Instant::now();
            if unused && self.streams.load(Ordering::Acquire) == 0 {
                return;
            }
            if unused {
                // In use, though by old streams alone: look again later.
                *lock(&self.used) = Instant::now();
            }
        }
    }
}

#[cfg(test)]
mod tests;
