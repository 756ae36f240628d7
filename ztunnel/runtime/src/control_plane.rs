//! Connections to the control plane: HTTP/2 over TLS in which only the server shows a certificate.
//!
//! xDS and the CA share it. The roots are read for each new connection, so that a root that was rotated in its
//! file is trusted from then on; the server may be known under one more name than the one that was dialled. Who
//! we are goes with each call, as a token, and is the caller's business.

mod loss;

use std::error::Error;
use std::fmt;
use std::io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::Uri;
use hyper_util::rt::TokioIo;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    SupportedProtocolVersion,
};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tonic::codegen::Service;
use tonic::transport::{Channel, Endpoint};

use self::loss::Noted;
pub use self::loss::{Cause, Loss};
use crate::tasks::Tasks;

/// For name, TCP and TLS together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// The peer is asked for a sign of life so often, and given so long for it. istiod does the same the other way;
/// whoever asks it more than twice as often is turned away. Until then what is known is served.
const PING_EVERY: Duration = Duration::from_secs(30);
const PING_TIMEOUT: Duration = Duration::from_secs(10);
/// Large enough that a first push of many megabytes is not held up by round trips.
const STREAM_WINDOW: u32 = 2 * 1024 * 1024;
const CONNECTION_WINDOW: u32 = 5 * 1024 * 1024;
const HEADER_LIST: u32 = 16 * 1024;
/// TCP's own, for what lies below TLS: idle, between probes, probes.
const TCP_IDLE: Duration = Duration::from_secs(300);
const TCP_INTERVAL: Duration = Duration::from_secs(75);
const TCP_PROBES: u32 = 9;

/// Where distributions keep the roots that the system trusts; the first that exists is taken.
const SYSTEM_ROOTS: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/cert.pem",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
];

/// Whom to believe that it is the control plane.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Roots {
    /// Those in a PEM file, read for each connection.
    File(PathBuf),
    /// Those in this PEM text.
    Pem(String),
    /// Those of the operating system.
    System,
}

impl Roots {
    /// Reads a setting: `SYSTEM`, PEM text, or else a path. The file need not exist yet.
    ///
    /// Upstream takes a path that does not exist for PEM, and so fails later with an error that does not name it.
    #[must_use]
    pub fn from_setting(text: &str) -> Self {
        match text {
            "SYSTEM" => Self::System,
            text if text.contains("-----BEGIN") => Self::Pem(text.to_owned()),
            path => Self::File(path.into()),
        }
    }

    fn read(&self) -> Result<RootCertStore, ConnectError> {
        let (origin, text) = match self {
            Self::Pem(text) => ("the inline roots".to_owned(), text.clone().into_bytes()),
            Self::File(path) => (path.display().to_string(), read(path)?),
            Self::System => {
                let path = SYSTEM_ROOTS.iter().map(PathBuf::from).find(|path| path.exists());
                let path = path.ok_or_else(|| ConnectError::NoRoots("the system".to_owned()))?;
                (path.display().to_string(), read(&path)?)
            }
        };
        let mut store = RootCertStore::empty();
        // As every client does with such bundles: what cannot be read is left out.
        let (added, _left_out) = store.add_parsable_certificates(
            CertificateDer::pem_slice_iter(&text).filter_map(Result::ok),
        );
        if added == 0 { Err(ConnectError::NoRoots(origin)) } else { Ok(store) }
    }
}

fn read(path: &PathBuf) -> Result<Vec<u8>, ConnectError> {
    std::fs::read(path).map_err(|source| ConnectError::Roots { path: path.clone(), source })
}

/// How TLS is spoken with the control plane.
#[derive(Clone, Debug)]
pub struct Tls {
    /// Whom to believe.
    pub roots: Roots,
    /// One more name that the server's certificate may have instead of the dialled one. Never sent.
    pub also_named: Option<ServerName<'static>>,
    /// Algorithms.
    pub provider: Arc<CryptoProvider>,
    /// Versions.
    pub versions: &'static [&'static SupportedProtocolVersion],
}

impl Tls {
    fn config(&self) -> Result<Arc<ClientConfig>, ConnectError> {
        let roots = Arc::new(self.roots.read()?);
        let provider = Arc::clone(&self.provider);
        let inner = WebPkiServerVerifier::builder_with_provider(roots, Arc::clone(&provider))
            .build()
            .map_err(|error| ConnectError::Tls(Box::new(error)))?;
        let verifier = AlsoNamed { inner, name: self.also_named.clone() };
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(self.versions)
            .map_err(|error| ConnectError::Tls(Box::new(error)))?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Arc::new(config))
    }
}

/// Why there is no connection to the control plane.
#[derive(Debug)]
pub enum ConnectError {
    /// The address is not one.
    Address(String),
    /// The roots' file cannot be read.
    Roots {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// There is not one root in it.
    NoRoots(String),
    /// TLS cannot be set up as configured.
    Tls(Box<dyn Error + Send + Sync>),
    /// Name resolution or TCP failed.
    Tcp(io::Error),
    /// The handshake failed: mostly, the server is not whom we want.
    Handshake(io::Error),
    /// It took too long.
    Timeout,
    /// HTTP/2 did not begin.
    Http(tonic::transport::Error),
}

impl fmt::Display for ConnectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(text) => write!(f, "`{text}` is not an address of a control plane"),
            Self::Roots { path, .. } => write!(f, "the roots in {} cannot be read", path.display()),
            Self::NoRoots(origin) => write!(f, "there is no root certificate in {origin}"),
            Self::Tls(_) => f.write_str("TLS cannot be set up"),
            Self::Tcp(_) => f.write_str("no TCP connection to the control plane"),
            Self::Handshake(_) => f.write_str("TLS with the control plane failed"),
            Self::Timeout => write!(f, "no connection within {} s", CONNECT_TIMEOUT.as_secs()),
            Self::Http(_) => f.write_str("no connection to the control plane"),
        }
    }
}

impl Error for ConnectError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Roots { source, .. } => Some(source),
            Self::Tcp(error) | Self::Handshake(error) => Some(error),
            Self::Tls(error) => Some(error.as_ref()),
            Self::Http(error) => Some(error),
            Self::Address(_) | Self::NoRoots(_) | Self::Timeout => None,
        }
    }
}

/// One control plane, by address. Clones are the same.
#[derive(Clone, Debug)]
pub struct ControlPlane(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    endpoint: Endpoint,
    host: String,
    port: u16,
    /// None without TLS.
    tls: Option<Tls>,
}

impl ControlPlane {
    /// Takes `https://host:port`; without a scheme it is `https`. `http` is spoken without TLS.
    ///
    /// The connections' tasks belong to `tasks`, and are dropped when it begins to stop.
    ///
    /// # Errors
    /// If the address is not one.
    pub fn new(address: &str, tls: Tls, tasks: &Tasks) -> Result<Self, ConnectError> {
        let invalid = || ConnectError::Address(address.to_owned());
        let whole =
            if address.contains("://") { address.to_owned() } else { format!("https://{address}") };
        let uri: Uri = whole.parse().map_err(|_invalid| invalid())?;
        let (tls, default) = match uri.scheme_str() {
            Some("https") => (Some(tls), 443),
            Some("http") => (None, 80),
            _ => return Err(invalid()),
        };
        let host = uri.host().ok_or_else(invalid)?.trim_matches(['[', ']']).to_owned();
        let port = uri.port_u16().unwrap_or(default);
        let endpoint = Endpoint::from(uri)
            .http2_keep_alive_interval(PING_EVERY)
            .keep_alive_timeout(PING_TIMEOUT)
            .keep_alive_while_idle(true)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .http2_max_header_list_size(HEADER_LIST)
            .executor(Owned(tasks.child()));
        Ok(Self(Arc::new(Inner { endpoint, host, port, tls })))
    }

    /// Connects. The channel connects again by itself when a call finds it broken, with the roots of then; the
    /// loss is of its last connection.
    ///
    /// # Errors
    /// Why not. Bounded in time.
    ///
    /// # Cancel safety
    /// Dropping it gives the attempt up.
    pub async fn connect(&self) -> Result<(Channel, Loss), ConnectError> {
        let loss = Loss::default();
        let dial = Dial(Arc::clone(&self.0), loss.clone());
        let connected = self.0.endpoint.connect_with_connector(dial).await;
        let channel = connected.map_err(|error| match own(error) {
            Ok(own) => own,
            Err(error) => ConnectError::Http(error),
        })?;
        Ok((channel, loss))
    }
}

/// Our own error out of the wrappings of the transport.
fn own(error: tonic::transport::Error) -> Result<ConnectError, tonic::transport::Error> {
    let mut cause: Option<&(dyn Error + 'static)> = Some(&error);
    while let Some(at) = cause {
        if let Some(found) = at.downcast_ref::<Shared>() {
            let taken = found.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
            return taken.ok_or(error);
        }
        cause = at.source();
    }
    Err(error)
}

/// Carries a [`ConnectError`] through the transport, which gives out its errors by reference only.
#[derive(Debug)]
struct Shared(std::sync::Mutex<Option<ConnectError>>);

impl fmt::Display for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &*self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner) {
            Some(error) => {
                error.fmt(f)?;
                // One wrapping hides the causes from a walk along `source`.
                let mut cause = error.source();
                while let Some(at) = cause {
                    write!(f, ": {at}")?;
                    cause = at.source();
                }
                Ok(())
            }
            None => f.write_str("no connection to the control plane"),
        }
    }
}

impl Error for Shared {}

/// Spawns the transport's tasks under our owner.
struct Owned(Tasks);

impl hyper::rt::Executor<Pin<Box<dyn Future<Output = ()> + Send>>> for Owned {
    fn execute(&self, task: Pin<Box<dyn Future<Output = ()> + Send>>) {
        self.0.spawn(|draining| async move {
            tokio::select! {
                () = task => {}
                () = draining.stopping() => {}
            }
        });
    }
}

/// One connection, as the transport asks for it.
struct Dial(Arc<Inner>, Loss);

type Connected = TokioIo<Noted<Box<dyn Io>>>;
type Dialling = Pin<Box<dyn Future<Output = Result<Connected, Shared>> + Send>>;

impl Service<Uri> for Dial {
    type Response = Connected;
    type Error = Shared;
    type Future = Dialling;

    fn poll_ready(&mut self, _context: &mut Context<'_>) -> Poll<Result<(), Shared>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _uri: Uri) -> Self::Future {
        let (inner, loss) = (Arc::clone(&self.0), self.1.clone());
        Box::pin(async move {
            let dialled = tokio::time::timeout(CONNECT_TIMEOUT, inner.dial()).await;
            let dialled = dialled.unwrap_or(Err(ConnectError::Timeout));
            let dialled = dialled.map(|io| TokioIo::new(loss.note(io)));
            dialled.map_err(|error| Shared(std::sync::Mutex::new(Some(error))))
        })
    }
}

impl Inner {
    async fn dial(&self) -> Result<Box<dyn Io>, ConnectError> {
        // First what needs no network: the roots are read for each connection.
        let tls = self.tls.as_ref().map(Tls::config).transpose()?;
        let tcp =
            TcpStream::connect((self.host.as_str(), self.port)).await.map_err(ConnectError::Tcp)?;
        options(&tcp).map_err(ConnectError::Tcp)?;
        let Some(config) = tls else { return Ok(Box::new(tcp)) };
        // An address is no SNI; rustls sends none then.
        let name = match self.host.parse::<IpAddr>() {
            Ok(ip) => ServerName::IpAddress(ip.into()),
            Err(_) => ServerName::try_from(self.host.clone())
                .map_err(|_invalid| ConnectError::Address(self.host.clone()))?,
        };
        let connector = tokio_rustls::TlsConnector::from(config);
        let stream = connector.connect(name, tcp).await.map_err(ConnectError::Handshake)?;
        Ok(Box::new(stream))
    }
}

fn options(tcp: &TcpStream) -> io::Result<()> {
    tcp.set_nodelay(true)?;
    let keepalive = socket2::TcpKeepalive::new()
        .with_time(TCP_IDLE)
        .with_interval(TCP_INTERVAL)
        .with_retries(TCP_PROBES);
    socket2::SockRef::from(tcp).set_tcp_keepalive(&keepalive)
}

/// TCP, or TLS over it.
trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// Verifies as always, and where only the name is wrong, under the other name.
#[derive(Debug)]
struct AlsoNamed {
    inner: Arc<WebPkiServerVerifier>,
    name: Option<ServerName<'static>>,
}

impl ServerCertVerifier for AlsoNamed {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let verified = self.inner.verify_server_cert(leaf, intermediates, server_name, ocsp, now);
        match (&self.name, verified) {
            (
                Some(name),
                Err(rustls::Error::InvalidCertificate(
                    CertificateError::NotValidForName
                    | CertificateError::NotValidForNameContext { .. },
                )),
            ) => self.inner.verify_server_cert(leaf, intermediates, name, ocsp, now),
            (_, verified) => verified,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_setting_means() {
        assert_eq!(Roots::from_setting("SYSTEM"), Roots::System);
        assert_eq!(
            Roots::from_setting("./var/run/root.pem"),
            Roots::File("./var/run/root.pem".into())
        );
        let pem = "-----BEGIN CERTIFICATE-----\n";
        assert_eq!(Roots::from_setting(pem), Roots::Pem(pem.to_owned()));
        assert!(matches!(Roots::from_setting(pem).read(), Err(ConnectError::NoRoots(_))));
        let missing = Roots::File("/nonexistent/root.pem".into()).read();
        assert!(matches!(missing, Err(ConnectError::Roots { .. })));
    }
}
