//! What the tests of this crate share: a CA of any temper, clocks, and a handshake in memory.

use crate::{WorkloadCertificate, ca::Issued, tls::Context, tls::Options};
use mesh_core::SpiffeId;
use mesh_runtime::clock::{Clock, FixedClock};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType, SerialNumber,
};
use rustls::{ClientConfig, ClientConnection, ServerConfig, ServerConnection};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};
use tokio::time::Instant;

/// 2026-11-22, some time of the day.
pub(crate) const NOW: Duration = Duration::from_secs(1_795_300_000);
pub(crate) const HOUR: Duration = Duration::from_hours(1);

pub(crate) fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + NOW
}

pub(crate) fn clock() -> Arc<dyn Clock> {
    Arc::new(FixedClock::at(NOW))
}

pub(crate) fn context() -> Context {
    Context::new(Options::default(), clock())
}

pub(crate) fn id(text: &str) -> SpiffeId {
    text.parse().unwrap()
}

pub(crate) const CLIENT: &str = "spiffe://cluster.local/ns/shop/sa/client";
pub(crate) const SERVER: &str = "spiffe://cluster.local/ns/shop/sa/server";

/// Wall time that follows tokio's, so that pausing one pauses both.
#[derive(Debug)]
pub(crate) struct TokioClock {
    start: Instant,
    ahead_secs: AtomicU64,
}

impl TokioClock {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self { start: Instant::now(), ahead_secs: AtomicU64::new(0) })
    }

    /// Time passes that tokio does not see, as when a machine sleeps.
    pub(crate) fn jump(&self, time: Duration) {
        self.ahead_secs.fetch_add(time.as_secs(), Ordering::Relaxed);
    }
}

impl Clock for TokioClock {
    fn now(&self) -> SystemTime {
        let ahead = Duration::from_secs(self.ahead_secs.load(Ordering::Relaxed));
        now() + self.start.elapsed() + ahead
    }
}

/// Signs anything.
pub(crate) struct TestCa {
    pub(crate) issuer: Issuer<'static, KeyPair>,
    pub(crate) certificate: CertificateDer<'static>,
    pub(crate) key_pem: String,
}

impl TestCa {
    pub(crate) fn params(name: &str) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.not_before = (now() - HOUR).into();
        params.not_after = (now() + 1000 * HOUR).into();
        params
    }

    pub(crate) fn new(name: &str) -> Self {
        Self::with_key(name, KeyPair::generate().unwrap())
    }

    pub(crate) fn with_key(name: &str, key: KeyPair) -> Self {
        let params = Self::params(name);
        let certificate = params.self_signed(&key).unwrap().into();
        let key_pem = key.serialize_pem();
        Self { issuer: Issuer::new(params, key), certificate, key_pem }
    }

    /// A CA below this one.
    pub(crate) fn intermediate(&self, name: &str, key: KeyPair) -> Self {
        let params = Self::params(name);
        let certificate = params.signed_by(&key, &self.issuer).unwrap().into();
        let key_pem = key.serialize_pem();
        Self { issuer: Issuer::new(params, key), certificate, key_pem }
    }

    pub(crate) fn pem(&self) -> String {
        crate::dump::pem(&self.certificate)
    }

    /// A leaf with these URIs, for an hour, edited as the test likes.
    pub(crate) fn issue(
        &self,
        uris: &[&str],
        edit: impl FnOnce(&mut CertificateParams),
    ) -> (PrivateKeyDer<'static>, Issued) {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names =
            uris.iter().map(|uri| SanType::URI((*uri).try_into().unwrap())).collect();
        params.not_before = (now() - HOUR).into();
        params.not_after = (now() + HOUR).into();
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.serial_number = Some(SerialNumber::from(7));
        edit(&mut params);
        let key = KeyPair::generate().unwrap();
        let leaf = params.signed_by(&key, &self.issuer).unwrap().into();
        (key.into(), Issued { chain: vec![leaf], roots: vec![self.certificate.clone()] })
    }

    pub(crate) fn workload_with(
        &self,
        uris: &[&str],
        context: &Context,
        edit: impl FnOnce(&mut CertificateParams),
    ) -> WorkloadCertificate {
        let (key, issued) = self.issue(uris, edit);
        WorkloadCertificate::new(id(SERVER), key, issued, context).unwrap()
    }

    pub(crate) fn workload(&self, uri: &str) -> WorkloadCertificate {
        self.workload_with(&[uri], &context(), |_| ())
    }
}

/// Both ends after a handshake, successful or not.
pub(crate) struct Ends {
    pub(crate) client: Result<ClientConnection, rustls::Error>,
    pub(crate) server: Result<ServerConnection, rustls::Error>,
    /// Bytes that the server sent after its first flight and the client's.
    pub(crate) tail: usize,
}

pub(crate) fn handshake(client: Arc<ClientConfig>, server: Arc<ServerConfig>) -> Ends {
    let name = ServerName::try_from("nobody.looks").unwrap();
    let mut client = ClientConnection::new(client, name).unwrap();
    let mut server = ServerConnection::new(server).unwrap();
    let (mut client_result, mut server_result) = (Ok(()), Ok(()));
    let mut tail = 0;
    loop {
        let mut wire = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut wire).unwrap();
        }
        let upwards = wire.len();
        feed(&mut server, &wire, &mut server_result);
        wire.clear();
        while server.wants_write() {
            server.write_tls(&mut wire).unwrap();
        }
        feed(&mut client, &wire, &mut client_result);
        if upwards == 0 && wire.is_empty() {
            break;
        }
        tail = wire.len();
    }
    Ends { client: client_result.map(|()| client), server: server_result.map(|()| server), tail }
}

fn feed<D>(
    connection: &mut impl std::ops::DerefMut<Target = rustls::ConnectionCommon<D>>,
    mut wire: &[u8],
    result: &mut Result<(), rustls::Error>,
) {
    while !wire.is_empty() && result.is_ok() {
        connection.read_tls(&mut wire).unwrap();
        *result = connection.process_new_packets().map(|_| ());
    }
}
