//! A control plane by script: ADS and CA over TLS on one port, as istiod has them, on a thread of its own. It
//! answers as istiod answers, says what it was asked, and fails as it is told to.

mod door;
mod resources;
mod signer;
mod talk;

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use hyper_util::rt::{TokioExecutor, TokioIo};
use mesh_proto::{
    envoy::service::discovery::v3::{
        DeltaDiscoveryRequest,
        aggregated_discovery_service_server::AggregatedDiscoveryServiceServer,
    },
    istio::v1::auth::istio_certificate_service_server::IstioCertificateServiceServer,
};
pub use mesh_xds::session::Kind;
use rustls::{ServerConfig, crypto::aws_lc_rs::default_provider};
use tokio::{
    net::TcpStream,
    runtime::Builder,
    sync::{mpsc, watch},
    task::JoinSet,
};
use tokio_rustls::TlsAcceptor;
use tonic::codegen::Service as _;

pub use self::{door::Fault, talk::Order};
use self::{
    door::{Bounded, Budget},
    resources::Resources,
    signer::Signer,
    talk::{Ads, Ca, Call},
};
use crate::{
    Lab, Mesh,
    wait::{self, SOON},
};

/// Where it is on the underlay: at the end of every node's default route.
const ADDRESS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 77, 0, 254)), 15012);
/// What it wants to see of those who ask.
const TOKEN: &str = "a-token";

/// The control plane. It ends when this is dropped.
#[derive(Debug)]
pub struct ControlPlane {
    shared: Arc<Shared>,
    folder: PathBuf,
    address: String,
    root: String,
    lists: String,
    stop: watch::Sender<bool>,
}

/// A request that it got.
#[derive(Clone, Debug)]
pub struct Seen {
    /// The node of the stream, by its metadata.
    pub node: String,
    /// The stream, counted over all nodes.
    pub stream: usize,
    /// The headers of the stream: `clusterid`, `authorization`.
    pub headers: [String; 2],
    /// What was asked.
    pub request: DeltaDiscoveryRequest,
}

impl Seen {
    /// Of this type.
    #[must_use]
    pub fn is(&self, kind: Kind) -> bool {
        self.request.type_url == kind.url()
    }

    /// The first of its type on its stream.
    #[must_use]
    pub fn is_first(&self) -> bool {
        self.request.node.is_some()
    }

    /// Why a response was refused; empty where none was.
    #[must_use]
    pub fn complaint(&self) -> &str {
        self.request.error_detail.as_ref().map_or("", |status| status.message.as_str())
    }
}

struct Shared {
    state: Mutex<State>,
    /// Counts up when all connections are to end.
    cut: watch::Sender<u64>,
    /// The types whose answers are held back.
    hold: watch::Sender<Vec<Kind>>,
    budget: Budget,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").finish_non_exhaustive()
    }
}

struct State {
    resources: Resources,
    /// The streams that live, and some that did.
    streams: Vec<mpsc::Sender<Order>>,
    opened: usize,
    seen: Vec<Seen>,
    signer: Signer,
    fault: Fault,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ControlPlane {
    /// Starts one for the nodes of this lab. It has nothing yet.
    pub fn start(lab: &Lab) -> Result<Self> {
        let signer = Signer::new()?;
        let (chain, key) = signer.server(&[&ADDRESS.ip().to_string()])?;
        let mut tls = ServerConfig::builder_with_provider(Arc::new(default_provider()))
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(chain, key)?;
        tls.alpn_protocols = vec![b"h2".to_vec()];
        let folder = lab.folder().join("istiod");
        std::fs::create_dir(&folder)?;
        let root = folder.join("root-cert.pem");
        std::fs::write(&root, signer.roots())?;
        let listener = lab.wire().run(|| Ok(TcpListener::bind(ADDRESS)?))?;
        listener.set_nonblocking(true)?;
        let state = State {
            resources: Resources::default(),
            streams: Vec::new(),
            opened: 0,
            seen: Vec::new(),
            signer,
            fault: Fault::None,
        };
        let (cut, hold) = (watch::Sender::new(0), watch::Sender::new(Vec::new()));
        let shared =
            Arc::new(Shared { state: Mutex::new(state), cut, hold, budget: Budget::default() });
        let (stop, stopped) = watch::channel(false);
        let (runtime, serving) =
            (Builder::new_current_thread().enable_all().build()?, Arc::clone(&shared));
        thread::Builder::new().name("control plane".into()).spawn(move || {
            // An error ends it, which the test notices.
            let _ended = runtime.block_on(serve(listener, &serving, Arc::new(tls), stopped));
        })?;
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let address = format!("https://{ADDRESS}");
        let lists = text(&folder.join("ca-crl.pem"));
        Ok(Self { shared, address, root: text(&root), lists, folder, stop })
    }

    /// What a node proxy has to be told to use it, for resources and for certificates.
    #[must_use]
    pub fn settings(&self) -> Vec<(&str, &str)> {
        vec![
            ("LOCAL_XDS_PATH", ""),
            ("LOCAL_CA_DIR", ""),
            ("XDS_ADDRESS", &self.address),
            ("CA_ADDRESS", &self.address),
            ("XDS_ROOT_CA", &self.root),
            ("CA_ROOT_CA", &self.root),
            ("AUTH_TOKEN", TOKEN),
            ("CLUSTER_ID", "lab-cluster"),
            ("POD_NAME", "ztunnel-x"),
            ("POD_NAMESPACE", "istio-system"),
        ]
    }

    /// Where its revocation lists are, once something is revoked: for `CRL_PATH`.
    #[must_use]
    pub fn lists(&self) -> &str {
        &self.lists
    }

    /// Has this mesh from now on, and tells everybody what has changed.
    pub fn apply(&self, mesh: &Mesh) -> Result<()> {
        let new = Resources::of(mesh)?;
        let old = std::mem::replace(&mut self.shared.state().resources, new.clone());
        for kind in Kind::ALL {
            let (old, new) = (old.all(kind), new.all(kind));
            let changed = new.iter().filter(|(name, resource)| old.get(*name) != Some(resource));
            let resources: Vec<_> = changed.map(|(_, resource)| resource.clone()).collect();
            let removed: Vec<_> =
                old.keys().filter(|name| !new.contains_key(*name)).cloned().collect();
            if !(resources.is_empty() && removed.is_empty()) {
                self.order(&Order { kind, resources, removed });
            }
        }
        Ok(())
    }

    /// Sends everything again, to everybody, as it is.
    pub fn repeat(&self) {
        let all = self.shared.state().resources.clone();
        for kind in Kind::ALL {
            let resources = all.all(kind).values().cloned().collect();
            self.order(&Order { kind, resources, removed: Vec::new() });
        }
    }

    /// Has this resource too, whatever it is, until the next [`Self::apply`]: a name, and the bytes of a message.
    pub fn also(&self, kind: Kind, name: &str, bytes: Vec<u8>) {
        self.shared.state().resources.put(kind, name, bytes);
    }

    /// Sends these resources, whatever they are: names, and bytes of messages.
    pub fn push(&self, kind: Kind, resources: &[(&str, Vec<u8>)]) {
        let owned = |(name, bytes): &(&str, Vec<u8>)| ((*name).to_owned(), bytes.clone());
        self.order(&Order::new(kind, resources.iter().map(owned), Vec::new()));
    }

    /// Sends this to everybody in one response each, and waits where a node proxy does not read fast enough.
    /// Returns how many it is sent to. Not for a task: it blocks.
    #[must_use]
    pub fn deliver(&self, order: &Order) -> usize {
        let streams = self.shared.state().streams.clone();
        streams.iter().filter(|stream| stream.blocking_send(order.clone()).is_ok()).count()
    }

    /// How many responses were acknowledged after the mark; fails if one was refused.
    pub fn acknowledged(&self, mark: usize) -> Result<usize> {
        let state = self.shared.state();
        let since = state.seen.get(mark..).unwrap_or_default();
        if let Some(refusal) = since.iter().find(|seen| !seen.complaint().is_empty()) {
            bail!("{} refuses: {}", refusal.node, refusal.complaint());
        }
        Ok(since.iter().filter(|seen| !seen.request.response_nonce.is_empty()).count())
    }

    fn order(&self, order: &Order) {
        self.shared.state().streams.retain(|stream| stream.try_send(order.clone()).is_ok());
    }

    /// What it was asked so far.
    #[must_use]
    pub fn seen(&self) -> Vec<Seen> {
        self.shared.state().seen.clone()
    }

    /// Waits until it is asked something that answers this. Only what was asked after the mark counts.
    pub fn wait_seen(
        &self,
        what: &str,
        mark: usize,
        mut is: impl FnMut(&Seen) -> bool,
    ) -> Result<Seen> {
        wait::until(&format!("a request: {what}"), SOON, || {
            Ok(self.seen().into_iter().skip(mark).find(&mut is))
        })
    }

    /// How often it was asked.
    #[must_use]
    pub fn mark(&self) -> usize {
        self.shared.state().seen.len()
    }

    /// What becomes of new connections.
    pub fn fail(&self, fault: Fault) {
        self.shared.state().fault = fault;
    }

    /// Ends all connections.
    pub fn cut(&self) {
        self.shared.budget.set(usize::MAX);
        self.shared.cut.send_modify(|cut| *cut += 1);
    }

    /// Has all connections break after so many more bytes, wherever in a message that is. Until [`Self::cut`].
    pub fn break_after(&self, bytes: usize) {
        self.shared.budget.set(bytes);
    }

    /// Holds answers back, or gives them.
    pub fn hold(&self, hold: bool) {
        self.hold_only(if hold { &Kind::ALL } else { &[] });
    }

    /// Holds answers of these types back, and gives the others.
    pub fn hold_only(&self, kinds: &[Kind]) {
        self.shared.hold.send_replace(kinds.to_vec());
    }

    /// How long certificates live from now on.
    pub fn validity(&self, validity: Duration) {
        self.shared.state().signer.validity = validity;
    }

    /// Signs with a new root from now on. The old one stays trusted until [`Self::retire`].
    pub fn rotate(&self) -> Result<()> {
        self.shared.state().signer.rotate()
    }

    /// Trusts the newest root alone.
    pub fn retire(&self) {
        self.shared.state().signer.retire();
    }

    /// How many certificates were signed for this identity.
    #[must_use]
    pub fn signed(&self, identity: &str) -> usize {
        self.shared.state().signer.signed.get(identity).map_or(0, Vec::len)
    }

    /// Revokes all certificates of this identity.
    pub fn revoke(&self, identity: &str) -> Result<()> {
        let list = self.shared.state().signer.revoke(identity)?;
        // Swapped in, as Kubernetes does.
        let new = self.folder.join("new");
        std::fs::write(&new, list)?;
        std::fs::rename(&new, &self.lists).context("cannot write the revocation list")
    }
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        self.stop.send_replace(true);
    }
}

async fn serve(
    listener: TcpListener,
    shared: &Arc<Shared>,
    tls: Arc<ServerConfig>,
    mut stopped: watch::Receiver<bool>,
) -> Result<()> {
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let (calls, mut called) = mpsc::channel::<Call>(16);
    let mut tasks = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let tls = TlsAcceptor::from(Arc::clone(&tls));
                tasks.spawn(connection(accepted?.0, tls, Arc::clone(shared), calls.clone()));
            }
            Some(call) = called.recv() => {
                tasks.spawn(call.serve(Arc::clone(shared)));
            }
            Some(_) = tasks.join_next(), if !tasks.is_empty() => {}
            _ = stopped.changed() => return Ok(()),
        }
    }
}

async fn connection(
    tcp: TcpStream,
    tls: TlsAcceptor,
    shared: Arc<Shared>,
    calls: mpsc::Sender<Call>,
) {
    let mut cut = shared.cut.subscribe();
    let fault = shared.state().fault;
    let served = async {
        if fault != Fault::None {
            return door::fail(fault, tcp, &tls).await;
        }
        let Ok(tls) = tls.accept(Bounded { tcp, budget: shared.budget.clone() }).await else {
            return;
        };
        let service =
            hyper::service::service_fn(|request: http::Request<hyper::body::Incoming>| {
                let ca = Ca(Arc::clone(&shared));
                let ads = Ads { shared: Arc::clone(&shared), calls: calls.clone() };
                async move {
                    if request.uri().path().starts_with("/istio.v1.auth.") {
                        IstioCertificateServiceServer::new(ca).call(request).await
                    } else {
                        AggregatedDiscoveryServiceServer::new(ads).call(request).await
                    }
                }
            });
        let _end = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
            .serve_connection(TokioIo::new(tls), service)
            .await;
    };
    tokio::select! {
        () = served => {}
        _ = cut.changed() => {}
    }
}
