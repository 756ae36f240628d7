//! HBONE spoken by hand: a peer that asks what no node proxy would, and one that only listens.

use std::{
    collections::BTreeMap,
    future::Future,
    io,
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use h2::{RecvStream, SendStream, client::SendRequest};
use http::{HeaderMap, Method, Request, Response};
use rustls::{
    ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme,
    SupportedProtocolVersion,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, aws_lc_rs},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject},
    server::WebPkiClientVerifier,
    version::{TLS12, TLS13},
};
use tokio::{
    runtime::{Builder, Runtime},
    task::{JoinHandle, LocalSet},
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, TlsConnector, client::TlsStream};

use crate::{Pod, ca::Issued, netns::Namespace};

/// What a peer may take its time for.
const PATIENCE: Duration = Duration::from_secs(20);

/// How to come in.
#[derive(Clone, Debug)]
pub struct Dial<'a> {
    /// From where.
    pub from: &'a Namespace,
    /// To which tunnel port.
    pub to: SocketAddr,
    /// As whom; nobody, without.
    pub certificate: Option<&'a Issued>,
    /// What is offered to be spoken.
    pub alpn: &'a str,
    /// With TLS 1.2 alone.
    pub old: bool,
}

impl<'a> Dial<'a> {
    /// As a node proxy would.
    #[must_use]
    pub fn new(from: &'a Namespace, to: SocketAddr, certificate: &'a Issued) -> Self {
        Self { from, to, certificate: Some(certificate), alpn: "h2", old: false }
    }
}

/// A tunnel, as the client.
pub struct Tunnel {
    requests: SendRequest<Bytes>,
    connection: JoinHandle<Result<(), h2::Error>>,
    server: Vec<u8>,
    // Dropped last: the others live on it.
    local: LocalSet,
    runtime: Runtime,
}

impl std::fmt::Debug for Tunnel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tunnel").finish_non_exhaustive()
    }
}

/// What came back for a request.
#[derive(Debug)]
pub struct Reply {
    /// The status.
    pub status: u16,
    /// The headers.
    pub headers: HeaderMap,
    /// Whether the stream ended with them.
    pub ended: bool,
    send: SendStream<Bytes>,
    receive: RecvStream,
}

impl Tunnel {
    /// Opens it: TCP, TLS, and HTTP/2 up to the server's settings.
    pub fn open(dial: &Dial<'_>) -> Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let local = LocalSet::new();
        let (requests, connection, server) = local.block_on(&runtime, dial.connect())?;
        Ok(Self { requests, connection, server, local, runtime })
    }

    /// Whether the server's certificate is for this identity.
    #[must_use]
    pub fn server_is(&self, identity: &str) -> bool {
        self.server.windows(identity.len()).any(|window| window == identity.as_bytes())
    }

    fn wait<T>(&self, future: impl Future<Output = Result<T>>) -> Result<T> {
        self.local.block_on(&self.runtime, async { timeout(PATIENCE, future).await? })
    }

    /// CONNECT to the authority, with these headers.
    pub fn connect(&mut self, authority: &str, headers: &[(&str, &str)]) -> Result<Reply> {
        let mut request = Request::builder().method(Method::CONNECT).uri(authority);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        self.request(request.body(())?)
    }

    /// Any request.
    pub fn request(&mut self, request: Request<()>) -> Result<Reply> {
        let requests = self.requests.clone();
        self.wait(async {
            let mut requests = requests.ready().await?;
            let (response, send) = requests.send_request(request, false)?;
            let (head, receive) = response.await?.into_parts();
            let ended = receive.is_end_stream();
            Ok(Reply { status: head.status.as_u16(), headers: head.headers, ended, send, receive })
        })
    }

    /// Sends, ends its side, and reads to the end.
    pub fn exchange(&self, reply: Reply, bytes: &[u8]) -> Result<Vec<u8>> {
        let (mut send, mut receive) = (reply.send, reply.receive);
        self.wait(async {
            send.send_data(Bytes::copy_from_slice(bytes), true)?;
            let mut back = Vec::new();
            while let Some(data) = receive.data().await {
                let data = data?;
                receive.flow_control().release_capacity(data.len())?;
                back.extend_from_slice(&data);
            }
            Ok(back)
        })
    }

    /// Sends without ending.
    pub fn send(&self, reply: &mut Reply, bytes: &[u8]) -> Result<()> {
        self.wait(async { Ok(reply.send.send_data(Bytes::copy_from_slice(bytes), false)?) })
    }

    /// The next bytes: empty at the end of the stream.
    pub fn receive(&self, reply: &mut Reply) -> Result<Bytes> {
        self.wait(async {
            let data = match reply.receive.data().await {
                Some(data) => data?,
                None => Bytes::new(),
            };
            reply.receive.flow_control().release_capacity(data.len())?;
            Ok(data)
        })
    }

    /// Resets the stream.
    pub fn reset(&self, mut reply: Reply) -> Result<()> {
        reply.send.send_reset(h2::Reason::CANCEL);
        self.wait(async {
            tokio::task::yield_now().await;
            Ok(())
        })
    }

    /// Waits for the end of the connection.
    pub fn closed(self) -> Result<()> {
        let Self { requests, connection, local, runtime, .. } = self;
        local.block_on(&runtime, async move {
            let end = timeout(PATIENCE, connection).await.context("it was left open")?;
            drop(requests);
            // How it ended is not the question.
            let _how = end?;
            Ok(())
        })
    }
}

type Opened = (SendRequest<Bytes>, JoinHandle<Result<(), h2::Error>>, Vec<u8>);

impl Dial<'_> {
    /// TCP and TLS.
    pub(crate) async fn tls(&self) -> Result<TlsStream<tokio::net::TcpStream>> {
        let stream = self.from.run(|| {
            let stream = TcpStream::connect_timeout(&self.to, Duration::from_secs(10))?;
            stream.set_nonblocking(true)?;
            stream.set_nodelay(true)?;
            Ok(stream)
        })?;
        let stream = tokio::net::TcpStream::from_std(stream)?;
        let connector = TlsConnector::from(Arc::new(self.config()?));
        let name = ServerName::IpAddress(self.to.ip().into());
        let handshake = timeout(PATIENCE, connector.connect(name, stream)).await?;
        handshake.context("TLS handshake")
    }

    async fn connect(&self) -> Result<Opened> {
        let stream = self.tls().await?;
        let server = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
        let server = server.map(|leaf| leaf.to_vec()).unwrap_or_default();
        let handshake = timeout(PATIENCE, h2::client::handshake(stream)).await?;
        let (requests, mut connection) = handshake.context("HTTP/2 handshake")?;
        // With TLS 1.3 a client believes that it is in until it reads: a ping finds out.
        let mut ping = connection.ping_pong().context("no ping")?;
        let connection = tokio::task::spawn_local(connection);
        let pong = timeout(PATIENCE, ping.ping(h2::Ping::opaque())).await?;
        pong.context("the server refused us")?;
        Ok((requests, connection, server))
    }

    fn config(&self) -> Result<ClientConfig> {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let version: &SupportedProtocolVersion = if self.old { &TLS12 } else { &TLS13 };
        let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[version])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Anyone(provider)));
        let mut config = match self.certificate {
            Some(issued) => builder.with_client_auth_cert(chain(issued)?, key(issued)?)?,
            None => builder.with_no_client_auth(),
        };
        config.enable_sni = false;
        config.alpn_protocols = vec![self.alpn.as_bytes().to_vec()];
        Ok(config)
    }
}

fn chain(issued: &Issued) -> Result<Vec<CertificateDer<'static>>> {
    let chain: Result<_, _> = CertificateDer::pem_slice_iter(issued.chain.as_bytes()).collect();
    Ok(chain?)
}

fn key(issued: &Issued) -> Result<PrivateKeyDer<'static>> {
    Ok(PrivateKeyDer::from_pem_slice(issued.key.as_bytes())?)
}

/// Lets any server in: tests look at its certificate themselves.
#[derive(Debug)]
struct Anyone(Arc<CryptoProvider>);

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _leaf: &CertificateDer<'_>,
        _between: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _staple: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, leaf, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, leaf, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// A CONNECT as a server saw it.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Its method.
    pub method: String,
    /// Its authority.
    pub authority: String,
    /// Its headers.
    pub headers: BTreeMap<String, String>,
    /// Their names, in the order in which they came.
    pub order: Vec<String>,
    /// Whom it came from.
    pub client: SocketAddr,
}

/// A listener for tunnels, which answers every CONNECT with one status and, where that is 200, sends
/// everything back.
#[derive(Clone, Debug)]
pub struct Listener(Arc<Mutex<Vec<Seen>>>);

impl Listener {
    /// Listens on the tunnel port of every address in the namespace, as this identity.
    pub fn start(namespace: &Namespace, issued: &Issued, status: u16) -> Result<Self> {
        let (listener, acceptor) = listen(namespace, issued)?;
        let seen = Arc::new(Mutex::new(Vec::new()));
        let told = Arc::clone(&seen);
        let runtime = Builder::new_current_thread().enable_all().build()?;
        thread::Builder::new().name("hbone".into()).spawn(move || {
            let local = LocalSet::new();
            // An error ends it, which the test notices.
            let _ended = local.block_on(&runtime, accept(listener, acceptor, told, status));
        })?;
        Ok(Self(seen))
    }

    /// Fails unless it is such a listener that answers the pod there: it sends everything back, with the command to the
    /// server that it is not.
    pub fn answers(pod: &Pod, to: SocketAddr) -> Result<()> {
        let got = pod.tcp(to, &["echo", "hello"])?;
        ensure!(got.err.contains(r"echo\nhello"), "{}", got.err);
        Ok(())
    }

    /// What it has been asked so far.
    #[must_use]
    pub fn seen(&self) -> Vec<Seen> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Listens on the tunnel port of every address in the namespace, as this identity.
pub(crate) fn listen(namespace: &Namespace, issued: &Issued) -> Result<(TcpListener, TlsAcceptor)> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(issued.root.as_bytes())?)?;
    let clients = WebPkiClientVerifier::builder_with_provider(roots.into(), Arc::clone(&provider));
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(clients.build()?)
        .with_single_cert(chain(issued)?, key(issued)?)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    let listener = namespace.run(|| Ok(TcpListener::bind("[::]:15008")?))?;
    listener.set_nonblocking(true)?;
    Ok((listener, TlsAcceptor::from(Arc::new(config))))
}

async fn accept(
    listener: TcpListener,
    acceptor: TlsAcceptor,
    seen: Arc<Mutex<Vec<Seen>>>,
    status: u16,
) -> io::Result<()> {
    let listener = tokio::net::TcpListener::from_std(listener)?;
    loop {
        let (stream, client) = listener.accept().await?;
        let client = SocketAddr::new(client.ip().to_canonical(), client.port());
        let (acceptor, seen) = (acceptor.clone(), Arc::clone(&seen));
        let serve = async move {
            let stream = acceptor.accept(stream).await?;
            let mut connection = h2::server::handshake(stream).await?;
            while let Some(request) = connection.accept().await {
                let (request, mut respond) = request?;
                let headers = request.headers().iter().map(|(name, value)| {
                    (name.to_string(), String::from_utf8_lossy(value.as_bytes()).into_owned())
                });
                seen.lock().unwrap_or_else(PoisonError::into_inner).push(Seen {
                    method: request.method().to_string(),
                    authority: request.uri().to_string(),
                    headers: headers.collect(),
                    order: request.headers().keys().map(ToString::to_string).collect(),
                    client,
                });
                let response = Response::builder().status(status).body(())?;
                let send = respond.send_response(response, status != 200)?;
                if status == 200 {
                    let _task = tokio::task::spawn_local(echo(request.into_body(), send));
                }
            }
            anyhow::Ok(())
        };
        let _task = tokio::task::spawn_local(serve);
    }
}

async fn echo(mut receive: RecvStream, mut send: SendStream<Bytes>) -> Result<()> {
    while let Some(data) = receive.data().await {
        let data = data?;
        receive.flow_control().release_capacity(data.len())?;
        send.send_data(data, false)?;
    }
    send.send_data(Bytes::new(), true)?;
    Ok(())
}

/// Fails unless the handshake fails.
pub fn refused(dial: &Dial<'_>) -> Result<String> {
    match Tunnel::open(dial) {
        Ok(_) => bail!("it was let in"),
        Err(why) => Ok(format!("{why:#}")),
    }
}
