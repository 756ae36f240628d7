//! Versions, suites and groups: what both ends of HBONE speak, and the control plane's connections too.
//!
//! Where we differ from upstream: AES-128-GCM stands before AES-256-GCM, and as a server we follow our
//! own order. It costs less per byte, nothing in Istio's contract asks for the longer key, and a peer
//! that offers AES-256 alone gets it.

use crate::{
    crl::Revocations,
    trust::{Trust, Trusts},
};
use mesh_runtime::clock::Clock;
use rustls::{
    SupportedCipherSuite, SupportedProtocolVersion,
    crypto::{
        CryptoProvider, SupportedKxGroup,
        aws_lc_rs::{self, cipher_suite, kx_group},
    },
    time_provider::TimeProvider,
};
use rustls_pki_types::{CertificateDer, UnixTime};
use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

/// The protocol inside: both ends offer and require it.
pub const ALPN: &[u8] = b"h2";

/// What an operator may change. The default is TLS 1.3 alone.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Options {
    /// `COMPLIANCE_POLICY=pqc`: X25519MLKEM768 is the only group. Implies TLS 1.3.
    pub post_quantum: bool,
    /// `TLS12_ENABLED=true`: TLS 1.2 is allowed beside 1.3.
    pub tls12: bool,
}

static SUITES: [SupportedCipherSuite; 2] =
    [cipher_suite::TLS13_AES_128_GCM_SHA256, cipher_suite::TLS13_AES_256_GCM_SHA384];

static SUITES_12: [SupportedCipherSuite; 4] = [
    cipher_suite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
    cipher_suite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
    cipher_suite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
    cipher_suite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
];

/// The hybrid group comes last: its key share is 1.2 kB, and a `ClientHello` with it takes two packets.
#[cfg(not(feature = "fips"))]
static GROUPS: [&dyn SupportedKxGroup; 4] =
    [kx_group::X25519, kx_group::SECP256R1, kx_group::SECP384R1, kx_group::X25519MLKEM768];

/// X25519 by itself is not approved.
#[cfg(feature = "fips")]
static GROUPS: [&dyn SupportedKxGroup; 3] =
    [kx_group::SECP256R1, kx_group::SECP384R1, kx_group::X25519MLKEM768];

static TLS13: [&SupportedProtocolVersion; 1] = [&rustls::version::TLS13];
static TLS13_AND_12: [&SupportedProtocolVersion; 2] =
    [&rustls::version::TLS13, &rustls::version::TLS12];

impl Options {
    /// The crypto, limited to what these options allow. For the control plane's connections too.
    #[must_use]
    pub fn provider(self) -> CryptoProvider {
        let mut cipher_suites = SUITES.to_vec();
        if self.allows_tls12() {
            cipher_suites.extend(SUITES_12);
        }
        let kx_groups =
            if self.post_quantum { vec![kx_group::X25519MLKEM768] } else { GROUPS.to_vec() };
        CryptoProvider { cipher_suites, kx_groups, ..aws_lc_rs::default_provider() }
    }

    /// Whether all of it is the validated module's. Only a build with the feature `fips` has that.
    #[must_use]
    pub fn is_fips(self) -> bool {
        self.provider().fips()
    }

    /// The versions, newest first.
    #[must_use]
    pub fn versions(self) -> &'static [&'static SupportedProtocolVersion] {
        if self.allows_tls12() { &TLS13_AND_12 } else { &TLS13 }
    }

    /// ML-KEM is a group of TLS 1.3 only, so a policy that asks for it rules 1.2 out.
    const fn allows_tls12(self) -> bool {
        self.tls12 && !self.post_quantum
    }
}

/// What every certificate's configurations are built with: one for the process.
#[derive(Clone, Debug)]
pub struct Context {
    pub(crate) provider: Arc<CryptoProvider>,
    pub(crate) versions: &'static [&'static SupportedProtocolVersion],
    pub(crate) time: Arc<WallTime>,
    pub(crate) revocations: Option<Revocations>,
    pub(crate) trusts: Arc<Trusts>,
}

impl Context {
    /// A context without revocation lists.
    #[must_use]
    pub fn new(options: Options, clock: Arc<dyn Clock>) -> Self {
        Self {
            provider: Arc::new(options.provider()),
            versions: options.versions(),
            time: Arc::new(WallTime(clock)),
            revocations: None,
            trusts: Arc::default(),
        }
    }

    /// The same, with peers' chains checked against `revocations`.
    #[must_use]
    pub fn with_revocations(self, revocations: Revocations) -> Self {
        Self { revocations: Some(revocations), trusts: Arc::default(), ..self }
    }

    /// What checks chains against `roots`.
    pub(crate) fn trust(
        &self,
        roots: &[CertificateDer<'static>],
    ) -> Result<Arc<Trust>, webpki::Error> {
        let algorithms = self.provider.signature_verification_algorithms;
        self.trusts.of(roots, || Trust::new(roots, algorithms, self.revocations.clone()))
    }

    /// The time by which certificates are judged.
    #[must_use]
    pub fn now(&self) -> SystemTime {
        self.time.0.now()
    }
}

/// Our clock, as rustls asks for it.
#[derive(Debug)]
pub(crate) struct WallTime(Arc<dyn Clock>);

impl TimeProvider for WallTime {
    fn current_time(&self) -> Option<UnixTime> {
        Some(unix(self.0.now()))
    }
}

/// `time` as X.509 counts it: a clock before 1970 reads as 1970, when no certificate is valid.
pub(crate) fn unix(time: SystemTime) -> UnixTime {
    UnixTime::since_unix_epoch(
        time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls::{CipherSuite, NamedGroup};

    #[test]
    fn offers_what_the_contract_says() {
        let provider = Options::default().provider();
        let suites: Vec<_> =
            provider.cipher_suites.iter().map(SupportedCipherSuite::suite).collect();
        assert_eq!(
            suites,
            [CipherSuite::TLS13_AES_128_GCM_SHA256, CipherSuite::TLS13_AES_256_GCM_SHA384]
        );
        let groups: Vec<_> = provider.kx_groups.iter().map(|g| g.name()).collect();
        let approved = [NamedGroup::secp256r1, NamedGroup::secp384r1, NamedGroup::X25519MLKEM768];
        match cfg!(feature = "fips") {
            true => assert_eq!(groups, approved),
            false => assert_eq!(groups, [&[NamedGroup::X25519], &approved[..]].concat()),
        }
        assert_eq!(Options::default().is_fips(), cfg!(feature = "fips"));
    }

    #[test]
    fn options() {
        for (name, post_quantum, tls12, suites, groups, versions) in [
            ("default", false, false, 2, GROUPS.len(), 1),
            ("tls 1.2", false, true, 6, GROUPS.len(), 2),
            ("post-quantum", true, false, 2, 1, 1),
            ("post-quantum rules tls 1.2 out", true, true, 2, 1, 1),
        ] {
            let options = Options { post_quantum, tls12 };
            let provider = options.provider();
            assert_eq!(provider.cipher_suites.len(), suites, "{name}");
            assert_eq!(provider.kx_groups.len(), groups, "{name}");
            assert_eq!(options.versions().len(), versions, "{name}");
        }
    }
}
