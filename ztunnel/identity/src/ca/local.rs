//! A CA in this process, of files: `LOCAL_CA_DIR`. For labs, tests, and meshes without a control plane.
//!
//! The files are those of Istio's own `cacerts` secret, so that an existing intermediate CA can be used, and
//! so that workloads of a local CA and of an istiod with the same secret trust one another. A folder without
//! them gets a self-signed set, once, whoever comes first ([`files`]).

mod files;

pub use files::{CA_CERT, CA_KEY, CERT_CHAIN, OpenError, Problem, ROOT_CERT};

use crate::{
    ca::{CertificateAuthority, IssueError, Issued, Signing},
    crl::Peer,
    csr::{self, Csr},
    tls::{Options, unix},
    trust::Trust,
};
use files::Files;
use mesh_core::SpiffeId;
use mesh_runtime::clock::Clock;
use rcgen::{
    CertificateSigningRequestParams, ExtendedKeyUsagePurpose, Issuer, KeyPair, KeyUsagePurpose,
    SanType,
};
use rustls::crypto::SecureRandom;
use rustls_pki_types::CertificateDer;
use std::{
    error::Error,
    fmt,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};
use webpki::EndEntityCert;

/// Leaves are valid from a little earlier, for peers whose clock is behind. istiod's own figure.
const DATED_BACK: Duration = Duration::from_mins(2);

/// Signs with a key that it holds in memory.
#[expect(clippy::module_name_repetitions, reason = "what everybody calls it")]
pub struct LocalCa {
    issuer: Issuer<'static, KeyPair>,
    /// What a peer needs between a leaf and its root.
    intermediates: Vec<CertificateDer<'static>>,
    roots: Vec<CertificateDer<'static>>,
    /// The end of the CA's own validity, which no leaf outlives.
    not_after: SystemTime,
    validity: Duration,
    random: &'static dyn SecureRandom,
    clock: Arc<dyn Clock>,
}

/// A request that is not to be signed.
#[derive(Debug)]
pub enum SigningError {
    /// It is malformed, or its signature is wrong.
    Request(rcgen::Error),
    /// It does not ask for the identity that it came with.
    Identity,
    /// Our own certificate has expired.
    Expired,
    /// The system has no randomness to give.
    Random,
    /// The certificate could not be made.
    Sign(rcgen::Error),
}

impl fmt::Display for SigningError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Request(_) => "the request is malformed",
            Self::Identity => "the request is for another identity",
            Self::Expired => "the local CA's own certificate has expired: replace its folder",
            Self::Random => "no randomness",
            Self::Sign(_) => "signing failed",
        })
    }
}

impl Error for SigningError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Request(error) | Self::Sign(error) => Some(error),
            Self::Identity | Self::Expired | Self::Random => None,
        }
    }
}

impl LocalCa {
    /// Reads the CA in `folder`, and makes one first if there is none. `validity` is that of leaves.
    /// Blocks, for milliseconds, or while another process makes the files.
    ///
    /// # Errors
    ///
    /// Returns which file is wrong and what to do. What opens can sign: a trial certificate was verified.
    pub fn open(
        folder: &Path,
        validity: Duration,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, OpenError> {
        files::ensure(folder, clock.now())?;
        let files = Files::read(folder)?;
        let not_after = files.check()?;
        let Files { certificate, key, roots, chain, .. } = files;
        let issuer = Issuer::from_ca_cert_der(&certificate, key)
            .map_err(|error| Problem::Unsupported(error).at(folder, CA_CERT))?;
        let mut intermediates = Vec::new();
        for certificate in std::iter::once(certificate).chain(chain) {
            if !roots.contains(&certificate) && !intermediates.contains(&certificate) {
                intermediates.push(certificate);
            }
        }
        let random = Options::default().provider().secure_random;
        let ca = Self { issuer, intermediates, roots, not_after, validity, random, clock };
        ca.try_out().map_err(|problem| problem.at(folder, CA_CERT))?;
        let folder = folder.display();
        tracing::warn!(%folder, "a local CA signs: whoever reads {CA_KEY} can be any workload");
        Ok(ca)
    }

    /// Issues to ourselves what we would issue to others, and verifies it as a peer would: chain, root, dates,
    /// constraints, all at once.
    fn try_out(&self) -> Result<(), Problem> {
        let nobody = || "spiffe://trial.invalid/ns/trial/sa/trial".parse::<SpiffeId>();
        let trial = || -> Result<Issued, Box<dyn Error + Send + Sync>> {
            let identity = nobody()?;
            let (_, csr) = Csr::generate(&identity)?;
            Ok(self.issue(&identity, &csr)?)
        };
        let issued = trial().map_err(Problem::Trial)?;
        let algorithms = Options::default().provider().signature_verification_algorithms;
        let verify = || {
            let trust = Trust::new(&issued.roots, algorithms, None)?;
            let (leaf, rest) = issued.chain.split_first().ok_or(webpki::Error::BadDer)?;
            let leaf = EndEntityCert::try_from(leaf)?;
            let now = unix(self.clock.now());
            trust.check(&leaf, rest, now, Peer::Server)?;
            trust.check(&leaf, rest, now, Peer::Client)
        };
        verify().map_err(Problem::Chain)
    }

    fn issue(&self, identity: &SpiffeId, csr: &Csr) -> Result<Issued, SigningError> {
        let request =
            CertificateSigningRequestParams::from_der(csr.der()).map_err(SigningError::Request)?;
        // The request is only good for its key; what it asks for must be what we mean to give.
        let asked = &request.params.subject_alt_names;
        if !matches!(&asked[..], [SanType::URI(uri)] if uri.as_str() == identity.to_string()) {
            return Err(SigningError::Identity);
        }
        let now = self.clock.now();
        if self.not_after <= now {
            return Err(SigningError::Expired);
        }
        let mut params = csr::params(identity).map_err(SigningError::Sign)?;
        params.not_before = (now - DATED_BACK).into();
        params.not_after = (now + self.validity).min(self.not_after).into();
        params.key_usages =
            vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        params.serial_number = Some(serial(self.random)?);
        let leaf =
            params.signed_by(&request.public_key, &self.issuer).map_err(SigningError::Sign)?;
        let mut chain = vec![leaf.into()];
        chain.extend(self.intermediates.iter().cloned());
        Ok(Issued { chain, roots: self.roots.clone() })
    }
}

impl CertificateAuthority for LocalCa {
    fn sign<'a>(&'a self, identity: &'a SpiffeId, csr: &'a Csr) -> Signing<'a> {
        Box::pin(async {
            self.issue(identity, csr).map_err(|error| IssueError::Refused(Box::new(error)))
        })
    }
}

/// 127 random bits: positive, and never of more than the 20 bytes that RFC 5280, section 4.1.2.2, allows.
fn serial(random: &dyn SecureRandom) -> Result<rcgen::SerialNumber, SigningError> {
    let mut bytes = [0; 16];
    random.fill(&mut bytes).map_err(|_failed| SigningError::Random)?;
    let [first, ..] = &mut bytes;
    // Neither negative nor shortened.
    *first = *first & 0x7f | 0x40;
    Ok(rcgen::SerialNumber::from_slice(&bytes))
}

impl fmt::Debug for LocalCa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LocalCa").field("issuer", &self.issuer).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
