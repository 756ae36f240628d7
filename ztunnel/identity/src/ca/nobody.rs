//! No CA at all, with a reason that says what to do.

use super::{CertificateAuthority, IssueError, Signing};
use crate::csr::Csr;
use mesh_core::SpiffeId;
use std::{error::Error, fmt};

/// Signs nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Nobody;

/// Nobody was named to sign.
#[derive(Clone, Copy, Debug)]
struct NotConfigured;

impl fmt::Display for NotConfigured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("nobody signs certificates: set CA_ADDRESS, or LOCAL_CA_DIR in a lab")
    }
}

impl Error for NotConfigured {}

impl CertificateAuthority for Nobody {
    fn sign<'a>(&'a self, _: &'a SpiffeId, _: &'a Csr) -> Signing<'a> {
        Box::pin(async { Err(IssueError::Refused(Box::new(NotConfigured))) })
    }
}
