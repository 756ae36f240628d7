//! Istio's `CreateCertificate`: istiod, or what stands in its place, signs for us.

use crate::{
    ca::{CertificateAuthority, IssueError, Issued, Signing},
    certificate::InvalidCertificate,
    csr::Csr,
    token::Token,
    verify::peer_identity,
};
use mesh_core::SpiffeId;
use mesh_proto::istio::v1::auth::{
    IstioCertificateRequest, IstioCertificateResponse,
    istio_certificate_service_client::IstioCertificateServiceClient as Client,
};
use prost_types::{Struct, Value, value::Kind};
use rustls_pki_types::{CertificateDer, pem::PemObject as _};
use std::{
    error::Error,
    fmt, fs,
    os::unix::fs::MetadataExt as _,
    path::PathBuf,
    sync::{Mutex, PoisonError},
    time::Duration,
};
use tonic::{
    Code, Request, Status,
    client::GrpcService,
    metadata::{AsciiMetadataKey, AsciiMetadataValue},
};

/// Any error, as connections have them.
pub type BoxError = Box<dyn Error + Send + Sync>;

/// Opens connections to the CA. The control plane's shared code does, and a test.
pub trait Connect: Send + Sync + 'static {
    /// A connection; its clones share it. Expected to connect again by itself.
    type Channel: GrpcService<
            tonic::body::Body,
            ResponseBody = tonic::body::Body,
            Error: Into<BoxError>,
            Future: Send,
        > + Clone
        + Send
        + Sync;

    /// Connects, with the roots as they are now.
    fn connect(&self) -> impl Future<Output = Result<Self::Channel, BoxError>> + Send;
}

/// A function that connects.
impl<F, Connecting, Channel> Connect for F
where
    F: Fn() -> Connecting + Send + Sync + 'static,
    Connecting: Future<Output = Result<Channel, BoxError>> + Send,
    Channel: GrpcService<
            tonic::body::Body,
            ResponseBody = tonic::body::Body,
            Error: Into<BoxError>,
            Future: Send,
        > + Clone
        + Send
        + Sync,
{
    type Channel = Channel;

    fn connect(&self) -> impl Future<Output = Result<Channel, BoxError>> + Send {
        self()
    }
}

/// What is asked for, and by whom.
#[derive(Debug)]
pub struct Settings {
    /// Whether we ask for others (shared mode) or for the one that our token is of.
    pub impersonate: bool,
    /// `SECRET_TTL`.
    pub validity: Duration,
    /// `CLUSTER_ID`. istiod wants it before it lets us impersonate.
    pub cluster: String,
    /// `AUTH_TOKEN`.
    pub token: Token,
    /// `CA_HEADER_*`: names and values.
    pub headers: Vec<(String, String)>,
    /// `CA_ROOT_CA`, where it is a file: when it changes, the next request has a new connection.
    pub root: Option<PathBuf>,
}

/// A setting cannot be sent as a header.
#[derive(Debug)]
pub struct InvalidHeader(String);

impl fmt::Display for InvalidHeader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} is no header that gRPC can carry", self.0)
    }
}

impl Error for InvalidHeader {}

/// Asks Istio's CA.
#[expect(clippy::module_name_repetitions, reason = "there is a local one too")]
pub struct IstioCa<C: Connect> {
    connect: C,
    settings: Settings,
    headers: Vec<(AsciiMetadataKey, AsciiMetadataValue)>,
    connection: Mutex<Option<Connection<C::Channel>>>,
}

/// The connection in use, and the root file that it was made with.
#[derive(Clone)]
struct Connection<T> {
    channel: T,
    root: Option<[i64; 4]>,
}

impl<C: Connect> IstioCa<C> {
    /// Connects at the first request.
    ///
    /// # Errors
    ///
    /// Returns the first header that cannot be one.
    pub fn new(connect: C, settings: Settings) -> Result<Self, InvalidHeader> {
        let cluster = ("clusterid".to_owned(), settings.cluster.clone());
        let headers = std::iter::once(&cluster)
            .chain(&settings.headers)
            .map(|(name, value)| {
                let invalid = || InvalidHeader(format!("{name}: {value}"));
                let name = name.to_lowercase().parse().map_err(|_invalid| invalid())?;
                Ok((name, value.parse().map_err(|_invalid| invalid())?))
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { connect, settings, headers, connection: Mutex::new(None) })
    }

    /// The connection in use, or a new one where there is none, or where the root file changed since. If that
    /// one fails, the old one stays, and the next request tries anew.
    async fn channel(&self) -> Result<C::Channel, IssueError> {
        let known = self.connection.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let root = self.root_stamp();
        match known {
            Some(known) if known.root == root => Ok(known.channel),
            known => match (self.connect.connect().await, known) {
                (Ok(channel), _) => {
                    let new = Some(Connection { channel: channel.clone(), root });
                    *self.connection.lock().unwrap_or_else(PoisonError::into_inner) = new;
                    Ok(channel)
                }
                (Err(error), Some(known)) => {
                    tracing::warn!(%error, "CA_ROOT_CA changed, but no connection can be made with it");
                    Ok(known.channel)
                }
                (Err(error), None) => Err(IssueError::Unreachable(error)),
            },
        }
    }

    /// What tells two states of the root file apart. None if there is no file (now).
    fn root_stamp(&self) -> Option<[i64; 4]> {
        let meta = fs::metadata(self.settings.root.as_ref()?).ok()?;
        let id = |number: u64| i64::from_ne_bytes(number.to_ne_bytes());
        Some([id(meta.dev()), id(meta.ino()), meta.mtime(), meta.mtime_nsec()])
    }

    fn request(
        &self,
        identity: &SpiffeId,
        csr: &Csr,
    ) -> Result<Request<IstioCertificateRequest>, BoxError> {
        let metadata = self.settings.impersonate.then(|| {
            let whom = Value { kind: Some(Kind::StringValue(identity.to_string())) };
            Struct { fields: [("ImpersonatedIdentity".to_owned(), whom)].into() }
        });
        let validity_duration = i64::try_from(self.settings.validity.as_secs())?;
        let mut request =
            Request::new(IstioCertificateRequest { csr: csr.pem()?, validity_duration, metadata });
        let headers = request.metadata_mut();
        for (name, value) in &self.headers {
            headers.insert(name.clone(), value.clone());
        }
        if let Some(token) = self.settings.token.read()? {
            let mut value: AsciiMetadataValue = format!("Bearer {token}").parse()?;
            value.set_sensitive(true);
            headers.insert("authorization", value);
        }
        Ok(request)
    }
}

impl<C: Connect> CertificateAuthority for IstioCa<C> {
    fn sign<'a>(&'a self, identity: &'a SpiffeId, csr: &'a Csr) -> Signing<'a> {
        Box::pin(async move {
            let request = self.request(identity, csr).map_err(IssueError::Local)?;
            let mut client = Client::new(self.channel().await?);
            let response = client.create_certificate(request).await.map_err(refusal)?;
            let expect = self.settings.impersonate.then_some(identity);
            issued(response.get_ref(), expect).map_err(IssueError::Useless)
        })
    }
}

/// Was it the CA that said no, or did nobody say anything?
fn refusal(status: Status) -> IssueError {
    match status.code() {
        Code::Unavailable | Code::Unknown | Code::Cancelled | Code::DeadlineExceeded => {
            IssueError::Unreachable(Box::new(status))
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
        | Code::Unauthenticated => IssueError::Refused(Box::new(Refused(status))),
    }
}

/// A refusal, with what to look at.
#[derive(Debug)]
pub struct Refused(Status);

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.0.code(), self.0.message())?;
        match self.0.code() {
            // All that istiod says to any of these is that it will not.
            Code::Unauthenticated => f.write_str(
                " (is our service account in istiod's CA_TRUSTED_NODE_ACCOUNTS, is the token bound to our \
                 pod, is CLUSTER_ID right, does a pod of this service account run on this node?)",
            ),
            Code::InvalidArgument => f.write_str(" (is SECRET_TTL within what the CA allows?)"),
            _ => Ok(()),
        }
    }
}

impl Error for Refused {}

/// Takes an answer apart: leaf, intermediates, and in the last element the roots.
pub(crate) fn issued(
    response: &IstioCertificateResponse,
    expect: Option<&SpiffeId>,
) -> Result<Issued, InvalidCertificate> {
    let (roots, chain) = response.cert_chain.split_last().ok_or(InvalidCertificate::Empty)?;
    if chain.is_empty() {
        return Err(InvalidCertificate::NoRoot);
    }
    let parse = |text: &String| {
        CertificateDer::pem_slice_iter(text.as_bytes())
            .collect::<Result<Vec<_>, _>>()
            .map_err(InvalidCertificate::Pem)
    };
    let roots = parse(roots)?;
    let chain: Vec<_> = chain.iter().map(parse).collect::<Result<Vec<_>, _>>()?.concat();
    if chain.is_empty() {
        return Err(InvalidCertificate::Empty);
    }
    let of = peer_identity(&chain);
    match expect {
        Some(expected) if of.as_ref() != Some(expected) => Err(InvalidCertificate::Identity {
            expected: Box::new(expected.clone()),
            issued: of.map(Box::new),
        }),
        _ => Ok(Issued { chain, roots }),
    }
}

impl<C: Connect> fmt::Debug for IstioCa<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IstioCa").field("settings", &self.settings).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
