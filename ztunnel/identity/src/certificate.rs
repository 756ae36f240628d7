//! One workload's certificate, and what TLS needs of it, built once.

use crate::{
    ca::Issued,
    crl::{Peer, Tracked},
    tls::{ALPN, Context},
    trust::Trust,
    verify::{Downstream, Upstream, peer_identity},
};
use mesh_core::SpiffeId;
use rustls::{
    ClientConfig, ServerConfig,
    client::Resumption,
    server::NoServerSessionStorage,
    sign::{CertifiedKey, SingleCertAndKey},
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use std::{
    error::Error,
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};
use x509_parser::prelude::{FromDer as _, X509Certificate};

/// A chain, its key and the roots that came with it. Valid when made; look at [`Self::not_after`].
pub struct WorkloadCertificate {
    identity: SpiffeId,
    chain: Vec<CertificateDer<'static>>,
    not_before: SystemTime,
    not_after: SystemTime,
    trust: Arc<Trust>,
    server: Arc<ServerConfig>,
    /// Complete but for whom to expect. Copying it copies a handful of `Arc`s, which is why there is no
    /// cache by expectation that would have to be bounded.
    client: ClientConfig,
}

impl WorkloadCertificate {
    /// Puts together what a CA issued for `identity` with the key that it was issued to.
    ///
    /// # Errors
    ///
    /// Returns why nothing can be done with the parts.
    pub fn new(
        identity: SpiffeId,
        key: PrivateKeyDer<'static>,
        issued: Issued,
        context: &Context,
    ) -> Result<Self, InvalidCertificate> {
        let Issued { chain, roots } = issued;
        let leaf = chain.first().ok_or(InvalidCertificate::Empty)?;
        if roots.is_empty() {
            return Err(InvalidCertificate::NoRoot);
        }
        let (not_before, not_after) = validity(leaf)?;
        let trust = context.trust(&roots).map_err(InvalidCertificate::Root)?;
        let certified = CertifiedKey::from_der(chain.clone(), key, &context.provider)
            .map_err(InvalidCertificate::Key)?;
        let certified = Arc::new(SingleCertAndKey::from(certified));

        let downstream = Downstream {
            trust: Arc::clone(&trust),
            trust_domain: peer_identity(&chain).map(|id| id.trust_domain),
        };
        let time = Arc::clone(&context.time);
        let mut server = ServerConfig::builder_with_details(Arc::clone(&context.provider), time)
            .with_protocol_versions(context.versions)
            .map_err(InvalidCertificate::Key)?
            .with_client_cert_verifier(Arc::new(downstream))
            .with_cert_resolver(Arc::clone(&certified) as _);
        server.alpn_protocols = vec![ALPN.to_vec()];
        server.ignore_client_order = true;
        // The tunnel's own record layer asks for them; they never leave the process.
        server.enable_secret_extraction = true;
        // A ticket would outlive the checks that the handshake made.
        server.send_tls13_tickets = 0;
        server.session_storage = Arc::new(NoServerSessionStorage {});

        let upstream = Upstream { trust: Arc::clone(&trust), expect: Box::default() };
        let time = Arc::clone(&context.time);
        let mut client = ClientConfig::builder_with_details(Arc::clone(&context.provider), time)
            .with_protocol_versions(context.versions)
            .map_err(InvalidCertificate::Key)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(upstream))
            .with_client_cert_resolver(certified);
        client.alpn_protocols = vec![ALPN.to_vec()];
        client.enable_sni = false;
        client.enable_secret_extraction = true;
        client.resumption = Resumption::disabled();

        let server = Arc::new(server);
        Ok(Self { identity, chain, not_before, not_after, trust, server, client })
    }

    /// For accepting: this certificate, and peers of this workload's roots and trust domain.
    #[must_use]
    pub fn server_config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.server)
    }

    /// For connecting: this certificate, and a peer who is one of `expect`. An empty list matches nobody.
    ///
    /// The server name that rustls asks for is neither sent nor checked: any will do.
    #[must_use]
    pub fn client_config(&self, expect: &[SpiffeId]) -> Arc<ClientConfig> {
        let mut config = self.client.clone();
        let upstream = Upstream { trust: Arc::clone(&self.trust), expect: expect.into() };
        config.dangerous().set_certificate_verifier(Arc::new(upstream));
        Arc::new(config)
    }

    /// Whose it is.
    #[must_use]
    pub fn identity(&self) -> &SpiffeId {
        &self.identity
    }

    /// The leaf and its intermediates, without a root.
    #[must_use]
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }

    /// The roots that this workload trusts.
    #[must_use]
    pub fn roots(&self) -> &[CertificateDer<'static>] {
        self.trust.roots()
    }

    /// The start of its validity.
    #[must_use]
    pub fn not_before(&self) -> SystemTime {
        self.not_before
    }

    /// The end of its validity.
    #[must_use]
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// The middle of its validity, when it is to be refreshed.
    #[must_use]
    pub fn half_life(&self) -> SystemTime {
        let validity = self.not_after.duration_since(self.not_before).unwrap_or(Duration::ZERO);
        self.not_before + validity / 2
    }

    /// Whether it may still be shown at `now`.
    #[must_use]
    pub fn is_valid_at(&self, now: SystemTime) -> bool {
        now < self.not_after
    }

    #[cfg(test)]
    pub(crate) fn trust(&self) -> &Arc<Trust> {
        &self.trust
    }

    /// Follows a peer whose chain was verified with this certificate's configurations, for as long as the
    /// tunnel with it lives. Call it when the handshake is done.
    #[must_use]
    pub fn track(&self, peer: &[CertificateDer<'_>], side: Peer, now: SystemTime) -> Tracked {
        Tracked::new(&self.trust, peer, side, now)
    }
}

/// From when to when a certificate is valid.
pub(crate) fn validity(
    leaf: &CertificateDer<'_>,
) -> Result<(SystemTime, SystemTime), InvalidCertificate> {
    let (_, leaf) = X509Certificate::from_der(leaf).map_err(|_unclear| InvalidCertificate::Leaf)?;
    let validity = leaf.validity();
    let time = |seconds: i64| {
        // No certificate of a workload began before 1970.
        SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
    };
    Ok((time(validity.not_before.timestamp()), time(validity.not_after.timestamp())))
}

impl fmt::Debug for WorkloadCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkloadCertificate")
            .field("identity", &self.identity)
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

/// What a CA issued cannot be used.
#[derive(Debug)]
pub enum InvalidCertificate {
    /// No certificate at all.
    Empty,
    /// The leaf is not X.509.
    Leaf,
    /// No root came with it, so no peer could be verified.
    NoRoot,
    /// A root is not usable as one.
    Root(webpki::Error),
    /// It is not the key's, or the key cannot be used.
    Key(rustls::Error),
    /// It is someone else's.
    Identity {
        /// Whose it should be.
        expected: Box<SpiffeId>,
        /// Whose it is, if anyone's.
        issued: Option<Box<SpiffeId>>,
    },
    /// It is not PEM.
    Pem(rustls_pki_types::pem::Error),
}

impl fmt::Display for InvalidCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => f.write_str("the CA issued no certificate"),
            Self::Leaf => f.write_str("the issued certificate is malformed"),
            Self::NoRoot => f.write_str("no root certificate came with the issued one"),
            Self::Root(_) => f.write_str("a root certificate cannot be used"),
            Self::Key(_) => f.write_str("the issued certificate cannot be used with its key"),
            Self::Identity { expected, issued: Some(issued) } => {
                write!(f, "the CA issued a certificate for {issued} instead of {expected}")
            }
            Self::Identity { expected, issued: None } => {
                write!(f, "the CA issued a certificate without an identity instead of {expected}")
            }
            Self::Pem(_) => f.write_str("the CA's answer is not PEM"),
        }
    }
}

impl Error for InvalidCertificate {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Root(error) => Some(error),
            Self::Key(error) => Some(error),
            Self::Pem(error) => Some(error),
            Self::Empty | Self::Leaf | Self::NoRoot | Self::Identity { .. } => None,
        }
    }
}
