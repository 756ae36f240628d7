//! The task that runs a session over gRPC, and over again.

mod stream;
#[cfg(test)]
mod tests;

use std::error::Error;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use mesh_proto::envoy::service::discovery::v3::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient as Ads;
use mesh_proto::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use mesh_runtime::backoff::Backoff;
use mesh_runtime::control_plane::{Cause, ControlPlane, Loss};
use mesh_runtime::metrics::Registry;
use mesh_runtime::ready::{Gate, Readiness};
use mesh_runtime::tasks::Draining;
use tokio::sync::{mpsc, watch};
use tonic::metadata::{AsciiMetadataKey, AsciiMetadataValue};
use tonic::{Code, Request, Status};

use crate::demand::{self, Demand, Waiting};
use crate::file::Handlers;
use crate::metrics::{Metrics, Reason};
use crate::session::{Chunk, Kind, Session};
use crate::{Known, Node};
use stream::Requests;

/// A first push of a large mesh is one message.
const MAX_MESSAGE: usize = 200 * 1024 * 1024;
/// Requests on their way: each response makes one, and each asked name; a peer that does not read makes us wait.
const REQUESTS: usize = 64;

/// Delays between connections, without jitter: the first that grows is 20 ms.
const FIRST_DELAY: Duration = Duration::from_millis(20);
const LONGEST_DELAY: Duration = Duration::from_secs(15);
/// After a stream that ended as streams do.
const RECONNECT_DELAY: Duration = Duration::from_millis(10);

/// The gate that opens when everything has come once, in Istio's words.
pub const STATE: &str = "state manager";

/// Any error.
pub type BoxError = Box<dyn Error + Send + Sync>;

/// Gives the token to send now, if any: it is asked for each call, because files of tokens are replaced.
pub type Token = Arc<dyn Fn() -> Result<Option<String>, BoxError> + Send + Sync>;

/// What is said to the control plane.
#[derive(Clone)]
pub struct Settings {
    /// Who we are.
    pub node: Node,
    /// `CLUSTER_ID`, for the header that istiod reads.
    pub cluster: String,
    /// `XDS_ON_DEMAND`.
    pub on_demand: bool,
    /// `XDS_HEADER_*`: names and values.
    pub headers: Vec<(String, String)>,
    /// `AUTH_TOKEN`.
    pub token: Token,
}

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { node, cluster, on_demand, headers, token: _ } = self;
        f.debug_struct("Settings")
            .field("node", node)
            .field("cluster", cluster)
            .field("on_demand", on_demand)
            .field("headers", &headers.iter().map(|(name, _)| name).collect::<Vec<_>>())
            .finish_non_exhaustive()
    }
}

/// A setting cannot be sent as a header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InvalidHeader(String);

impl fmt::Display for InvalidHeader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} is no header that gRPC can carry", self.0)
    }
}

impl Error for InvalidHeader {}

/// Keeps a stream to the control plane, and hands over what comes.
#[derive(Debug)]
pub struct Client<H> {
    link: Link,
    session: Session,
    handlers: H,
    waiting: Waiting,
    /// Opens once a first response was taken, whole, of each of these types, which are subscribed to as a whole.
    gate: (Gate, Vec<Kind>),
    /// The same, whatever was refused of it.
    known: (watch::Sender<bool>, Vec<Kind>),
    metrics: Metrics,
    /// Of the last connection.
    loss: Loss,
}

/// How a call begins.
#[derive(Debug)]
struct Link {
    plane: ControlPlane,
    headers: Vec<(AsciiMetadataKey, AsciiMetadataValue)>,
    settings: Settings,
}

/// How a stream ended.
#[derive(Debug)]
enum End {
    /// It never began.
    NotConnected(BoxError),
    /// It began, and failed.
    Failed(Status),
    /// The peer closed it; whether it had sent anything before.
    Closed { useful: bool },
    /// Something here was wrong, such as the token.
    Local(BoxError),
}

impl<H: Handlers> Client<H> {
    /// A client that is not connected yet, and what asks it for names. Readiness waits for the first response of
    /// each type that is subscribed to as a whole.
    ///
    /// # Errors
    ///
    /// The first header that cannot be one.
    pub fn new(
        settings: Settings,
        plane: ControlPlane,
        handlers: H,
        (registry, readiness): (&Registry, &Readiness),
    ) -> Result<(Self, Demand), InvalidHeader> {
        let cluster = ("clusterid".to_owned(), settings.cluster.clone());
        let headers = std::iter::once(&cluster)
            .chain(&settings.headers)
            .map(|(name, value)| {
                let invalid = || InvalidHeader(format!("{name}: {value}"));
                let name = name.to_lowercase().parse().map_err(|_invalid| invalid())?;
                Ok((name, value.parse().map_err(|_invalid| invalid())?))
            })
            .collect::<Result<_, _>>()?;
        let mut outstanding = vec![Kind::Authorization];
        if !settings.on_demand {
            outstanding.push(Kind::Address);
        }
        let known = (watch::Sender::new(false), outstanding.clone());
        let gate = (readiness.gate(STATE), outstanding);
        let (demand, waiting) = demand::channel();
        let session = Session::new(settings.node.clone(), settings.on_demand);
        let link = Link { plane, headers, settings };
        let metrics = Metrics::new(registry);
        let loss = Loss::default();
        Ok((Self { link, session, handlers, waiting, gate, known, metrics, loss }, demand))
    }

    /// Says when everything has come once.
    #[must_use]
    pub fn known(&self) -> Known {
        Known::of(&self.known.0)
    }

    /// Runs until told to stop. The state stays as it is whenever there is no connection.
    pub async fn run(mut self, draining: Draining) {
        let mut delays = Backoff::new(FIRST_DELAY, LONGEST_DELAY, 2.0, 0.0);
        loop {
            let end = tokio::select! {
                end = Box::pin(self.connection()) => end,
                () = draining.stopping() => return,
            };
            let (reason, delay) = next(&end, &mut delays);
            self.metrics.terminated(reason);
            report(&end, self.loss.cause().as_ref(), delay);
            tokio::select! {
                () = tokio::time::sleep(delay) => {}
                () = draining.stopping() => return,
            }
        }
    }

    /// One connection from its beginning to its end.
    async fn connection(&mut self) -> End {
        self.loss = Loss::default();
        let channel = match self.link.plane.connect().await {
            Ok((channel, loss)) => {
                self.loss = loss;
                channel
            }
            Err(error) => return End::NotConnected(error.into()),
        };
        let (requests, outgoing) = mpsc::channel(REQUESTS);
        for request in self.session.connect() {
            // There is room for these.
            if requests.try_send(request).is_err() {
                return End::Closed { useful: false };
            }
        }
        let call = match self.link.call(Requests(outgoing)) {
            Ok(call) => call,
            Err(error) => return End::Local(error),
        };
        let mut ads = Ads::new(channel).max_decoding_message_size(MAX_MESSAGE);
        let mut responses = match ads.delta_aggregated_resources(call).await {
            Ok(response) => response.into_inner(),
            Err(status) => return End::NotConnected(status.into()),
        };
        tracing::info!("connected to the control plane");
        let mut useful = false;
        loop {
            let send = tokio::select! {
                message = responses.message() => match message {
                    Ok(Some(response)) => {
                        useful = true;
                        self.take(response).await
                    }
                    Ok(None) => return End::Closed { useful },
                    Err(status) => return End::Failed(status),
                },
                name = self.waiting.next() => {
                    if !self.link.settings.on_demand {
                        // Everything comes by itself, so whatever is not there does not exist.
                        self.waiting.answer([name]);
                        continue;
                    }
                    self.session.demand(&name)
                }
            };
            for request in send {
                // Closed: the next message tells why.
                let _closed = requests.send(request).await;
            }
        }
    }

    /// Hands a response over, chunk by chunk, and makes its answer.
    async fn take(&mut self, response: DeltaDiscoveryResponse) -> Vec<DeltaDiscoveryRequest> {
        let mut round = self.session.receive(response);
        self.metrics.received(round.type_url(), round.bytes());
        while let Some(chunk) = self.session.next(&mut round) {
            let result = match chunk {
                Chunk::Addresses(updates) => self.handlers.handle(updates),
                Chunk::Policies(updates) => self.handlers.handle(updates),
            };
            round.handled(result);
            // Readiness, scrapes and pings of the connection must not wait for a first push.
            tokio::task::yield_now().await;
        }
        let answer = self.session.finish(round);
        if !answer.rejected.is_empty() {
            self.metrics.refused(&answer.request.type_url, answer.rejected.len());
            for rejected in &answer.rejected {
                tracing::warn!(name = %rejected.name, reason = %rejected.reason, "resource rejected");
            }
        }
        let (known, unknown) = &mut self.known;
        unknown.retain(|kind| kind.url() != answer.request.type_url);
        if unknown.is_empty() {
            known.send_if_modified(|known| !std::mem::replace(known, true));
        }
        if let Some(first) = answer.first {
            let (gate, outstanding) = &mut self.gate;
            outstanding.retain(|kind| *kind != first);
            if outstanding.is_empty() {
                gate.set(true);
            }
        }
        self.waiting.answer(answer.answered);
        [Some(answer.request), answer.leave].into_iter().flatten().collect()
    }
}

impl Link {
    /// The call, with all its headers. The token is read now.
    fn call(&self, requests: Requests) -> Result<Request<Requests>, BoxError> {
        let mut call = Request::new(requests);
        let headers = call.metadata_mut();
        for (name, value) in &self.headers {
            headers.insert(name.clone(), value.clone());
        }
        if let Some(token) = (self.settings.token)()? {
            let mut value: AsciiMetadataValue = format!("Bearer {}", token.trim()).parse()?;
            value.set_sensitive(true);
            headers.insert("authorization", value);
        }
        Ok(call)
    }
}

/// What an end counts as, and how long to wait then.
///
/// Upstream tries again at once after an error of its own, and after a stream that was closed without a word: a
/// missing token, or a server that closes at once, then costs a core. Here both wait.
fn next(end: &End, delays: &mut Backoff) -> (Reason, Duration) {
    match end {
        End::NotConnected(_) => (Reason::ConnectionError, delays.next_delay()),
        End::Failed(status) if is_routine(status) => {
            delays.reset();
            (Reason::Reconnect, RECONNECT_DELAY)
        }
        End::Failed(_) | End::Local(_) => (Reason::Error, delays.next_delay()),
        End::Closed { useful: true } => {
            delays.reset();
            (Reason::Complete, Duration::ZERO)
        }
        End::Closed { useful: false } => (Reason::Complete, delays.next_delay()),
    }
}

/// Streams end so every half hour, when istiod wants its clients spread anew, and whenever it restarts.
fn is_routine(status: &Status) -> bool {
    match status.code() {
        Code::Unknown | Code::Cancelled | Code::DeadlineExceeded => true,
        Code::Unavailable => {
            let text = status.message();
            text.contains("transport is closing") || text.contains("received prior goaway")
        }
        Code::Ok
        | Code::InvalidArgument
        | Code::NotFound
        | Code::AlreadyExists
        | Code::PermissionDenied
        | Code::ResourceExhausted
        | Code::FailedPrecondition
        | Code::Aborted
        | Code::OutOfRange
        | Code::Unimplemented
        | Code::Internal
        | Code::DataLoss
        | Code::Unauthenticated => false,
    }
}

/// Says how it ended. Where the connection was lost, the stream knows no more than that it broke.
fn report(end: &End, lost: Option<&Cause>, delay: Duration) {
    match (end, lost) {
        (End::NotConnected(_), Some(cause)) => {
            tracing::warn!(error = %cause, retry = ?delay, "no stream from the control plane");
        }
        (End::NotConnected(error), None) => {
            tracing::warn!(error = %chain(error.as_ref()), retry = ?delay, "no stream from the control plane");
        }
        (End::Failed(_), Some(cause)) => {
            tracing::warn!(error = %cause, retry = ?delay, "connection to the control plane lost");
        }
        (End::Failed(status), None) if is_routine(status) => {
            tracing::info!(error = %chain(status), retry = ?delay, "stream of the control plane ended");
        }
        (End::Failed(status), None) => {
            tracing::warn!(error = %chain(status), retry = ?delay, "stream of the control plane failed");
        }
        (End::Local(error), _) => {
            tracing::error!(error = %chain(error.as_ref()), retry = ?delay, "cannot call the control plane");
        }
        (End::Closed { .. }, _) => {
            tracing::info!(retry = ?delay, "the control plane closed its stream")
        }
    }
}

/// An error with its causes, in one line.
fn chain(error: &(dyn Error + 'static)) -> String {
    let mut line = match error.downcast_ref::<Status>() {
        Some(status) => format!("{:?}: {}", status.code(), status.message()),
        None => error.to_string(),
    };
    let mut cause = error.source();
    while let Some(at) = cause {
        let text = at.to_string();
        // Wrappings that only repeat what they wrap are left out.
        if !line.contains(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
        cause = at.source();
    }
    line
}
