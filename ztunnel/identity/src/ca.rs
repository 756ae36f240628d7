//! Who signs certificates.

pub mod istio;
pub mod local;
mod nobody;

pub use nobody::Nobody;

use crate::{certificate::InvalidCertificate, csr::Csr};
use mesh_core::SpiffeId;
use rustls_pki_types::CertificateDer;
use std::{error::Error, fmt, pin::Pin, time::Duration};

/// Signs requests. Called for one identity at a time, and for several identities at once.
pub trait CertificateAuthority: Send + Sync + 'static {
    /// Has `csr` signed for `identity`.
    fn sign<'a>(&'a self, identity: &'a SpiffeId, csr: &'a Csr) -> Signing<'a>;
}

/// The answer to come.
pub type Signing<'a> = Pin<Box<dyn Future<Output = Result<Issued, IssueError>> + Send + 'a>>;

/// What a CA answers.
#[derive(Clone, Debug)]
pub struct Issued {
    /// The leaf, then its intermediates, without a root.
    pub chain: Vec<CertificateDer<'static>>,
    /// Whom to trust.
    pub roots: Vec<CertificateDer<'static>>,
}

/// There is no certificate. All of these are tried again.
#[derive(Debug)]
pub enum IssueError {
    /// The CA could not be reached, or the connection to it broke.
    Unreachable(Box<dyn Error + Send + Sync>),
    /// It did not answer in this time.
    Silent(Duration),
    /// It answered, and refused.
    Refused(Box<dyn Error + Send + Sync>),
    /// It answered with something useless.
    Useless(InvalidCertificate),
    /// We could not even ask, or sign ourselves.
    Local(Box<dyn Error + Send + Sync>),
}

impl fmt::Display for IssueError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreachable(_) => f.write_str("the CA cannot be reached"),
            Self::Silent(time) => write!(f, "the CA did not answer within {time:?}"),
            Self::Refused(_) => f.write_str("the CA refused to sign"),
            Self::Useless(_) => f.write_str("what the CA issued cannot be used"),
            Self::Local(_) => f.write_str("no certificate could be asked for"),
        }
    }
}

impl Error for IssueError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Unreachable(error) | Self::Refused(error) | Self::Local(error) => {
                Some(error.as_ref())
            }
            Self::Useless(error) => Some(error),
            Self::Silent(_) => None,
        }
    }
}
