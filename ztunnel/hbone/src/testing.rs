//! What the tests of this crate share: certificates, a peer that accepts tunnels, a path through both.

use crate::{
    Authority, Dialed, Dialing, Opened, Pool, PoolKey, ResponseHead, Settings, Tcp, TunnelRequest,
    relay,
    server::{self, Incoming},
};
use mesh_core::Failure;
use mesh_runtime::tasks::Tasks;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    SanType,
};
use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    crypto::aws_lc_rs::default_provider,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer},
    server::WebPkiClientVerifier,
};
use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Notify, mpsc, oneshot},
};

/// No test takes longer; one that hangs fails.
pub(crate) fn within<T>(future: impl Future<Output = T>) -> impl Future<Output = T> {
    let future = Box::pin(future);
    async { tokio::time::timeout(Duration::from_secs(20), future).await.expect("it hangs") }
}

/// Gives others their turn until it holds.
pub(crate) async fn until(holds: impl Fn() -> bool) {
    within(async {
        while !holds() {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

pub(crate) struct Configs {
    pub(crate) client: Arc<ClientConfig>,
    pub(crate) server: Arc<ServerConfig>,
}

/// The TLS of both ends: mutual, 1.3, one CA.
pub(crate) fn configs() -> &'static Configs {
    static CONFIGS: OnceLock<Configs> = OnceLock::new();
    CONFIGS.get_or_init(|| {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let leaf = || {
            let key = KeyPair::generate().unwrap();
            let mut params = CertificateParams::default();
            // What a client that verifies no name asks for.
            params.subject_alt_names = vec![SanType::IpAddress(Ipv4Addr::UNSPECIFIED.into())];
            params.extended_key_usages =
                vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
            let chain: Vec<CertificateDer<'static>> =
                vec![params.signed_by(&key, &ca).unwrap().der().clone()];
            let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
            (chain, key)
        };
        let mut roots = RootCertStore::empty();
        roots.add(ca.der().clone()).unwrap();
        let roots = Arc::new(roots);
        let provider = Arc::new(default_provider());
        let (chain, key) = leaf();
        let mut client = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(Arc::clone(&roots))
            .with_client_auth_cert(chain, key)
            .unwrap();
        client.alpn_protocols = vec![b"h2".to_vec()];
        client.enable_secret_extraction = true;
        let (chain, key) = leaf();
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&provider));
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_client_cert_verifier(verifier.build().unwrap())
            .with_single_cert(chain, key)
            .unwrap();
        server.alpn_protocols = vec![b"h2".to_vec()];
        server.enable_secret_extraction = true;
        Configs { client: Arc::new(client), server: Arc::new(server) }
    })
}

/// Two ends of a TCP connection: who connected, who accepted.
pub(crate) async fn tcp() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (far, _) = listener.accept().await.unwrap();
    for stream in [&near, &far] {
        stream.set_nodelay(true).unwrap();
    }
    (near, far)
}

/// Connects with TLS to there.
pub(crate) fn dial(to: SocketAddr) -> Dialing<'static> {
    Box::pin(async move {
        let stream = TcpStream::connect(to).await.unwrap();
        stream.set_nodelay(true).unwrap();
        Ok(Dialed::new(stream.into_std().unwrap(), Arc::clone(&configs().client)))
    })
}

pub(crate) fn key(to: SocketAddr) -> PoolKey {
    PoolKey {
        to,
        expect: Vec::new(),
        source: "spiffe://td/ns/a/sa/b".parse().unwrap(),
        source_ip: Ipv4Addr::LOCALHOST.into(),
        network: "".parse().unwrap_or_default(),
    }
}

pub(crate) fn request() -> TunnelRequest {
    TunnelRequest::to(Authority::Addr("10.0.0.1:80".parse().unwrap()))
}

/// A pool, and a peer that hands its streams to the test.
pub(crate) struct World {
    pub(crate) tasks: Tasks,
    /// Owns the pool's.
    pub(crate) pod: Tasks,
    pub(crate) pool: Arc<Pool>,
    pub(crate) to: SocketAddr,
    /// Tunnels that the peer has accepted.
    pub(crate) accepted: Arc<AtomicUsize>,
    pub(crate) streams: mpsc::Receiver<Incoming>,
    /// Has every tunnel of the peer say GOAWAY.
    pub(crate) leave: Arc<Notify>,
}

impl World {
    pub(crate) async fn new() -> Self {
        Self::with(Settings::default(), Settings::default()).await
    }

    pub(crate) async fn with(client: Settings, server: Settings) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let to = listener.local_addr().unwrap();
        let tasks = Tasks::new();
        let pod = tasks.child();
        let pool = Arc::new(Pool::new(client, pod.child()));
        let accepted = Arc::new(AtomicUsize::new(0));
        let leave = Arc::new(Notify::new());
        let (sender, streams) = mpsc::channel(256);
        let peer = tasks.child();
        let (count, leaving) = (Arc::clone(&accepted), Arc::clone(&leave));
        tasks.spawn(|_| async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                count.fetch_add(1, Ordering::Relaxed);
                let (settings, sender) = (server.clone(), sender.clone());
                let leaving = Arc::clone(&leaving);
                peer.spawn(|_| serve(stream, settings, sender, leaving));
            }
        });
        Self { tasks, pod, pool, to, accepted, streams, leave }
    }

    pub(crate) fn accepted(&self) -> usize {
        self.accepted.load(Ordering::Relaxed)
    }

    /// Opens a stream, and answers it 200.
    pub(crate) async fn open(&mut self) -> (Opened, crate::Stream) {
        let (opened, stream) = tokio::join!(self.ask(), async {
            let incoming = self.streams.recv().await.unwrap();
            incoming.accept(&ResponseHead::default()).unwrap()
        });
        (opened.unwrap(), stream)
    }

    /// Opens a stream.
    pub(crate) fn ask(&self) -> impl Future<Output = Result<Opened, Failure>> + Send + use<> {
        let (pool, to) = (Arc::clone(&self.pool), self.to);
        async move { pool.open(&key(to), &request(), || dial(to)).await }
    }
}

async fn serve(
    stream: TcpStream,
    settings: Settings,
    sender: mpsc::Sender<Incoming>,
    leaving: Arc<Notify>,
) {
    stream.set_nodelay(true).unwrap();
    let tls = Arc::clone(&configs().server);
    let stream = stream.into_std().unwrap();
    let Ok(mut connection) = server::handshake(stream, tls, &settings).await else { return };
    assert_eq!(connection.peer_certificates().len(), 1);
    let mut left = std::pin::pin!(leaving.notified());
    left.as_mut().enable();
    let mut gone = false;
    loop {
        tokio::select! {
            next = connection.next() => match next {
                Some(Ok(incoming)) => {
                    let _test_is_over = sender.send(incoming).await;
                }
                Some(Err(_)) | None => return,
            },
            () = &mut left, if !gone => {
                gone = true;
                connection.shutdown_gracefully();
            }
        }
    }
}

type Outcome = oneshot::Receiver<Result<(), Failure>>;

/// Two programs, with a relay, a tunnel and another relay between them.
pub(crate) struct Path {
    pub(crate) client: TcpStream,
    pub(crate) server: TcpStream,
    pub(crate) near: Outcome,
    pub(crate) far: Outcome,
}

impl Path {
    pub(crate) async fn through(world: &mut World) -> Self {
        let (opened, stream) = world.open().await;
        let (client, down) = tcp().await;
        let (up, server) = tcp().await;
        let (near_done, near) = oneshot::channel();
        world.tasks.spawn(|_| async move {
            let _test_is_over = near_done.send(relay(Tcp::from(down), opened.stream, &()).await);
        });
        let (far_done, far) = oneshot::channel();
        world.tasks.spawn(|_| async move {
            let _test_is_over = far_done.send(relay(stream, Tcp::from(up), &()).await);
        });
        Self { client, server, near, far }
    }
}
