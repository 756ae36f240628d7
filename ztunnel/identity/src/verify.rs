//! Is the peer who it must be? The rules for both directions, and the words for what went wrong.
//!
//! | we are the | chain | then |
//! |---|---|---|
//! | server | to this workload's roots, client usage | one SPIFFE SAN in our own trust domain |
//! | client | to this workload's roots, server usage; DNS names ignored | one SPIFFE SAN that was expected |

use crate::{crl::Peer, trust::Trust};
use mesh_core::{Reason, SpiffeId, TrustDomain};
use rustls::{
    AlertDescription, CertificateError, DigitallySignedStruct, DistinguishedName, OtherError,
    SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    server::danger::{ClientCertVerified, ClientCertVerifier},
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use std::{error::Error, fmt, fmt::Write as _, sync::Arc};
use webpki::EndEntityCert;

/// The identity of a peer whose chain was verified: the first SPIFFE URI in its leaf that parses.
#[must_use]
pub fn peer_identity(chain: &[CertificateDer<'_>]) -> Option<SpiffeId> {
    let leaf = EndEntityCert::try_from(chain.first()?).ok()?;
    leaf.valid_uri_names().find_map(|uri| uri.parse().ok())
}

/// Judges those who connect to us.
#[derive(Debug)]
pub(crate) struct Downstream {
    pub(crate) trust: Arc<Trust>,
    /// Our own. None, and then no rule, where our leaf carries no SPIFFE identity.
    pub(crate) trust_domain: Option<TrustDomain>,
}

/// Judges those whom we connect to.
#[derive(Debug)]
pub(crate) struct Upstream {
    pub(crate) trust: Arc<Trust>,
    /// One of these. None of them if empty.
    pub(crate) expect: Box<[SpiffeId]>,
}

impl ClientCertVerifier for Downstream {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.trust.subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let leaf = EndEntityCert::try_from(end_entity).map_err(chain_error)?;
        self.trust.admit(&leaf, intermediates, now, Peer::Client).map_err(chain_error)?;
        if let Some(expected) = &self.trust_domain
            && !identities(&leaf).any(|id| id.trust_domain == *expected)
        {
            let expected = expected.clone();
            return Err(Rejection::TrustDomain { expected, presented: presented(&leaf) }.into());
        }
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, self.trust.algorithms())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, self.trust.algorithms())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.trust.algorithms().supported_schemes()
    }
}

impl ServerCertVerifier for Upstream {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let leaf = EndEntityCert::try_from(end_entity).map_err(chain_error)?;
        self.trust.admit(&leaf, intermediates, now, Peer::Server).map_err(chain_error)?;
        if !identities(&leaf).any(|id| self.expect.contains(&id)) {
            let expected = self.expect.to_vec();
            return Err(Rejection::Identity { expected, presented: presented(&leaf) }.into());
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, self.trust.algorithms())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, self.trust.algorithms())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.trust.algorithms().supported_schemes()
    }
}

fn identities<'a>(leaf: &'a EndEntityCert<'a>) -> impl Iterator<Item = SpiffeId> + use<'a> {
    leaf.valid_uri_names().filter_map(|uri| match uri.parse() {
        Ok(id) => Some(id),
        Err(error) => {
            tracing::warn!(uri = %Printable(uri), %error, "peer's certificate: SAN skipped");
            None
        }
    })
}

/// What the leaf said it was, for the log. The peer chose these bytes.
fn presented(leaf: &EndEntityCert<'_>) -> Vec<String> {
    /// More is noise.
    const MOST: usize = 4;
    leaf.valid_uri_names().take(MOST).map(|uri| Printable(uri).to_string()).collect()
}

/// Text of a peer's, made safe for a line of log: one line, bounded.
struct Printable<'a>(&'a str);

impl fmt::Display for Printable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        /// Longer than any identity that Kubernetes can make (253 + 63 + 253 and 14).
        const MOST: usize = 600;
        self.0.chars().flat_map(char::escape_default).take(MOST).try_for_each(|c| f.write_char(c))
    }
}

/// A peer that we do not want, for a reason that is ours and not TLS's.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Rejection {
    /// It connected to us, and belongs to another trust domain.
    TrustDomain {
        /// Our own.
        expected: TrustDomain,
        /// Its URI SANs.
        presented: Vec<String>,
    },
    /// We connected to it, and it is someone else.
    Identity {
        /// Whom we wanted.
        expected: Vec<SpiffeId>,
        /// Its URI SANs.
        presented: Vec<String>,
    },
    /// The revocation list that its CA has by name is not signed by that CA.
    RevocationList,
}

impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let presented = match self {
            Self::RevocationList => {
                return f.write_str(
                    "the revocation list of the peer's CA is not that CA's (a root changed; CRL_PATH did not)",
                );
            }
            Self::TrustDomain { expected, presented } => {
                write!(f, "the peer must be of trust domain {expected}")?;
                presented
            }
            Self::Identity { expected, presented } if expected.is_empty() => {
                f.write_str("no identity is known for the peer, so none is accepted")?;
                presented
            }
            Self::Identity { expected, presented } => {
                f.write_str("the peer must be ")?;
                separated(f, expected, " or ")?;
                presented
            }
        };
        if presented.is_empty() {
            return f.write_str(", but its certificate names no identity");
        }
        f.write_str(", but its certificate says ")?;
        separated(f, presented, ", ")
    }
}

fn separated(f: &mut fmt::Formatter<'_>, items: &[impl fmt::Display], by: &str) -> fmt::Result {
    items.iter().enumerate().try_for_each(|(i, item)| {
        f.write_str(if i == 0 { "" } else { by })?;
        item.fmt(f)
    })
}

impl Error for Rejection {}

/// Goes to the peer as the alert `certificate_unknown`.
impl From<Rejection> for rustls::Error {
    fn from(rejection: Rejection) -> Self {
        CertificateError::Other(OtherError(Arc::new(rejection))).into()
    }
}

/// A fault of a chain, as the error of rustls that sends the right alert.
fn chain_error(error: webpki::Error) -> rustls::Error {
    use webpki::Error as E;
    match error {
        E::BadDer | E::BadDerTime | E::TrailingData(_) => CertificateError::BadEncoding,
        E::CertNotValidYet { time, not_before } => {
            CertificateError::NotValidYetContext { time, not_before }
        }
        E::CertExpired { time, not_after } => CertificateError::ExpiredContext { time, not_after },
        E::InvalidCertValidity => CertificateError::Expired,
        // The roots of Istio's meshes all have one name unless someone chose another: what does not verify
        // under ours was signed by another of that name.
        E::UnknownIssuer | E::InvalidSignatureForPublicKey => CertificateError::UnknownIssuer,
        E::CertRevoked => CertificateError::Revoked,
        E::RequiredEkuNotFoundContext(_) => CertificateError::InvalidPurpose,
        E::InvalidCrlSignatureForPublicKey | E::IssuerNotCrlSigner => {
            return Rejection::RevocationList.into();
        }
        // Theirs, not ours: new causes come with new versions.
        other => CertificateError::Other(OtherError(Arc::new(other))),
    }
    .into()
}

/// The sort of a failed handshake, for a metric's label and for [`explain`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Fault {
    /// The peer is not whom we want: [`Rejection`].
    WrongIdentity,
    /// The chain ends at no root of ours.
    UnknownIssuer,
    /// Not yet or no longer valid.
    Expired,
    /// On a revocation list.
    Revoked,
    /// There was none.
    NoCertificate,
    /// Another fault in the peer's certificate.
    BadCertificate,
    /// The peer refused ours.
    RefusedByPeer,
    /// No version, suite, group or protocol in common, or not TLS at all.
    Protocol,
}

impl Fault {
    /// What `error` is.
    #[must_use]
    pub fn of(error: &rustls::Error) -> Self {
        use CertificateError as C;
        use rustls::Error as E;
        match error {
            E::NoCertificatesPresented => Self::NoCertificate,
            E::InvalidCertificate(fault) => match fault {
                C::UnknownIssuer => Self::UnknownIssuer,
                C::Revoked => Self::Revoked,
                C::Expired
                | C::ExpiredContext { .. }
                | C::NotValidYet
                | C::NotValidYetContext { .. } => Self::Expired,
                C::Other(OtherError(cause)) => match cause.downcast_ref() {
                    Some(Rejection::TrustDomain { .. } | Rejection::Identity { .. }) => {
                        Self::WrongIdentity
                    }
                    Some(Rejection::RevocationList) | None => Self::BadCertificate,
                },
                _ => Self::BadCertificate,
            },
            E::AlertReceived(alert) if about_our_certificate(*alert).is_some() => {
                Self::RefusedByPeer
            }
            _ => Self::Protocol,
        }
    }

    /// The label.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::WrongIdentity => "wrong_identity",
            Self::UnknownIssuer => "unknown_issuer",
            Self::Expired => "expired",
            Self::Revoked => "revoked",
            Self::NoCertificate => "no_certificate",
            Self::BadCertificate => "bad_certificate",
            Self::RefusedByPeer => "refused_by_peer",
            Self::Protocol => "protocol",
        }
    }

    /// How the connection's failure is reported.
    #[must_use]
    pub const fn reason(self) -> Reason {
        match self {
            Self::Revoked => Reason::Revoked,
            Self::WrongIdentity
            | Self::UnknownIssuer
            | Self::Expired
            | Self::NoCertificate
            | Self::BadCertificate
            | Self::RefusedByPeer
            | Self::Protocol => Reason::Tls,
        }
    }
}

/// What the alert says about our certificate, if it is about that.
const fn about_our_certificate(alert: AlertDescription) -> Option<&'static str> {
    Some(match alert {
        AlertDescription::UnknownCA => {
            "it does not trust the CA that signed it (another mesh, or a root changed on one side)"
        }
        AlertDescription::CertificateExpired => "it holds it for expired (are both clocks right?)",
        AlertDescription::CertificateRevoked => "it is revoked",
        AlertDescription::CertificateRequired => "it got none",
        AlertDescription::CertificateUnknown => {
            "wrong trust domain or identity; the peer's log has more"
        }
        AlertDescription::BadCertificate
        | AlertDescription::UnsupportedCertificate
        | AlertDescription::AccessDenied => "the peer's log has more",
        _ => return None,
    })
}

/// Why a handshake failed, in words for the log: after `tls handshake error: `.
#[must_use]
pub fn explain(error: &rustls::Error) -> String {
    use CertificateError as C;
    use rustls::Error as E;
    match error {
        E::NoCertificatesPresented => "the peer presented no certificate".into(),
        E::InvalidCertificate(C::UnknownIssuer) => "the peer's certificate is not signed by a CA \
            that this workload trusts (another mesh, or a root changed on one side)"
            .into(),
        E::InvalidCertificate(C::Revoked) => "a certificate in the peer's chain is revoked".into(),
        E::InvalidCertificate(C::ExpiredContext { time, not_after }) => format!(
            "the peer's certificate expired {} s ago (are both clocks right?)",
            time.as_secs().saturating_sub(not_after.as_secs())
        ),
        E::InvalidCertificate(C::NotValidYetContext { time, not_before }) => format!(
            "the peer's certificate is valid only in {} s (are both clocks right?)",
            not_before.as_secs().saturating_sub(time.as_secs())
        ),
        E::InvalidCertificate(C::InvalidPurpose) => {
            "the peer's certificate may not be used for this side of a connection".into()
        }
        E::InvalidCertificate(C::Other(OtherError(cause))) => cause.to_string(),
        E::AlertReceived(alert) => match about_our_certificate(*alert) {
            Some(why) => format!("the peer refused our certificate: {why}"),
            None => format!("the peer gave up: {alert:?}"),
        },
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests;
