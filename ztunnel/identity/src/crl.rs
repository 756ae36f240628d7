//! Certificate revocation lists (`CRL_PATH`), at handshakes and for tunnels that live.
//!
//! Istio's rule: the whole chain is checked, a certificate that no list speaks of is fine, and a list is
//! used past its own expiry. A file that cannot be read as lists never takes away the lists that are in
//! force; at start, it turns revocation off (with a warning), as there is nothing to fall back on.

use crate::{file::WatchedFile, tls::unix, trust::Trust};
use rustls_pki_types::{
    CertificateDer, CertificateRevocationListDer, UnixTime, pem::PemObject as _,
};
use std::{
    error::Error,
    fmt, io,
    path::PathBuf,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::SystemTime,
};
use tokio::sync::watch;
use webpki::{
    CertRevocationList, EndEntityCert, ExpirationPolicy, KeyUsage, OwnedCertRevocationList,
    RevocationCheckDepth, RevocationOptions, RevocationOptionsBuilder, UnknownStatusPolicy,
};

/// The lists of one file.
#[derive(Debug, Default)]
pub struct Lists(Vec<CertRevocationList<'static>>);

/// The bytes are not revocation lists.
#[derive(Debug)]
pub enum InvalidLists {
    /// Neither PEM nor DER.
    Pem(rustls_pki_types::pem::Error),
    /// A list is malformed, or of a kind that is not supported.
    List(webpki::Error),
}

impl fmt::Display for InvalidLists {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pem(_) => "not valid PEM",
            Self::List(_) => "not a certificate revocation list",
        })
    }
}

impl Error for InvalidLists {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Pem(error) => Some(error),
            Self::List(error) => Some(error),
        }
    }
}

impl Lists {
    /// Reads PEM, where blocks of other kinds are skipped, or a single list in DER. Nothing is no lists.
    ///
    /// # Errors
    ///
    /// Returns an error if any list is malformed: half of a file protects nobody.
    pub fn parse(bytes: &[u8]) -> Result<Self, InvalidLists> {
        // DER begins with a SEQUENCE; no PEM does, as 0x30 is the digit 0.
        let lists = if bytes.first() == Some(&0x30) && bytes.get(1).is_some_and(|b| *b >= 0x80) {
            vec![CertificateRevocationListDer::from(bytes.to_vec())]
        } else {
            CertificateRevocationListDer::pem_slice_iter(bytes)
                .collect::<Result<_, _>>()
                .map_err(InvalidLists::Pem)?
        };
        let owned = |der: &CertificateRevocationListDer<'_>| {
            OwnedCertRevocationList::from_der(der).map(CertRevocationList::from)
        };
        lists.iter().map(owned).collect::<Result<_, _>>().map(Self).map_err(InvalidLists::List)
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Runs a verification under Istio's rule.
    pub(crate) fn with_options<T>(
        &self,
        verify: impl FnOnce(Option<RevocationOptions<'_>>) -> T,
    ) -> T {
        let lists: Vec<_> = self.0.iter().collect();
        let options = RevocationOptionsBuilder::new(&lists).ok().map(|options| {
            options
                .with_depth(RevocationCheckDepth::Chain)
                .with_status_policy(UnknownStatusPolicy::Allow)
                .with_expiration_policy(ExpirationPolicy::Ignore)
                .build()
        });
        verify(options)
    }

    /// Whether a list of the right name has the serial number of one of `chain`. Cheap, and not proof:
    /// no signature is looked at.
    fn mention(&self, chain: &[CertificateDer<'_>]) -> bool {
        chain.iter().filter_map(|cert| EndEntityCert::try_from(cert).ok()).any(|cert| {
            self.0.iter().any(|list| {
                list.issuer() == cert.issuer()
                    && matches!(list.find_serial(cert.serial()), Ok(Some(_)))
            })
        })
    }
}

/// The lists in force, for all who verify.
#[derive(Clone, Debug)]
pub struct Revocations {
    lists: watch::Receiver<Arc<Lists>>,
    rejections: Arc<Rejections>,
}

#[derive(Debug, Default)]
struct Rejections {
    of_clients: AtomicU64,
    of_servers: AtomicU64,
}

impl Revocations {
    /// Lists, and who may replace them.
    #[must_use]
    pub fn new(lists: Lists) -> (watch::Sender<Arc<Lists>>, Self) {
        let (sender, lists) = watch::channel(Arc::new(lists));
        (sender, Self { lists, rejections: Arc::default() })
    }

    /// Reads `path`, and returns what keeps reading it. None, with a warning, if what is there is unusable;
    /// a file that is absent may come later.
    #[must_use]
    pub fn open(path: PathBuf) -> Option<(Watcher, Self)> {
        let mut file = WatchedFile::new(path);
        let path = file.path().display().to_string();
        let lists = match file.read() {
            Ok(bytes) => match Lists::parse(&bytes) {
                Ok(lists) => lists,
                Err(error) => {
                    let why = error.source().map(ToString::to_string);
                    tracing::warn!(path, %error, why, "revocation is off: CRL_PATH is unusable");
                    return None;
                }
            },
            Err(error) => {
                tracing::warn!(path, %error, "no revocation list yet");
                Lists::default()
            }
        };
        tracing::info!(path, lists = lists.len(), "revocation lists read");
        let (sender, revocations) = Self::new(lists);
        Some((Watcher { file, sender }, revocations))
    }

    pub(crate) fn current(&self) -> Arc<Lists> {
        Arc::clone(&self.lists.borrow())
    }

    pub(crate) fn count_rejection(&self, of: Peer) {
        let Rejections { of_clients, of_servers } = &*self.rejections;
        match of {
            Peer::Client => of_clients.fetch_add(1, Ordering::Relaxed),
            Peer::Server => of_servers.fetch_add(1, Ordering::Relaxed),
        };
    }

    /// Handshakes refused and tunnels cut because of a list, so far: as their source, as their destination.
    #[must_use]
    pub fn rejections(&self) -> (u64, u64) {
        let Rejections { of_clients, of_servers } = &*self.rejections;
        (of_servers.load(Ordering::Relaxed), of_clients.load(Ordering::Relaxed))
    }
}

/// Reads the file again when it changes.
#[derive(Debug)]
pub struct Watcher {
    file: WatchedFile,
    sender: watch::Sender<Arc<Lists>>,
}

impl Watcher {
    /// Runs until `stop` completes.
    pub async fn run(mut self, stop: impl Future<Output = ()>) {
        let mut stop = pin!(stop);
        loop {
            tokio::select! {
                () = &mut stop => return,
                () = self.file.changed() => self.reload(),
            }
        }
    }

    fn reload(&mut self) {
        let bytes = self.file.read();
        let path = self.file.path().display();
        match bytes.map(|bytes| Lists::parse(&bytes)) {
            Ok(Ok(lists)) => {
                tracing::info!(%path, lists = lists.len(), "revocation lists read");
                self.sender.send_replace(Arc::new(lists));
            }
            Ok(Err(error)) => {
                let why = error.source().map(ToString::to_string);
                tracing::warn!(%path, %error, why, "revocation lists kept as they were");
            }
            // Removed between two swaps, or for good: forgetting revocations would be fail-open.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                tracing::warn!(%path, "the file is gone; revocation lists kept as they were");
            }
            Err(error) => tracing::warn!(%path, %error, "revocation lists kept as they were"),
        }
    }
}

/// Which end of a tunnel the peer is.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Peer {
    /// It connected to us.
    Client,
    /// We connected to it.
    Server,
}

impl Peer {
    /// What its certificate must be good for.
    pub(crate) fn usage(self) -> KeyUsage {
        match self {
            Self::Client => KeyUsage::client_auth(),
            Self::Server => KeyUsage::server_auth(),
        }
    }
}

/// A live tunnel's claim on the truth of its peer's chain. See [`crate::WorkloadCertificate::track`].
#[derive(Debug)]
pub struct Tracked(Option<Live>);

#[derive(Debug)]
struct Live {
    lists: watch::Receiver<Arc<Lists>>,
    trust: Arc<Trust>,
    chain: Box<[CertificateDer<'static>]>,
    since: UnixTime,
    peer: Peer,
    /// Once is enough, however often it is asked.
    counted: bool,
}

impl Tracked {
    pub(crate) fn new(
        trust: &Arc<Trust>,
        chain: &[CertificateDer<'_>],
        peer: Peer,
        now: SystemTime,
    ) -> Self {
        Self(trust.revocations().map(|revocations| Live {
            lists: revocations.lists.clone(),
            trust: Arc::clone(trust),
            chain: chain.iter().map(|cert| cert.clone().into_owned()).collect(),
            since: unix(now),
            peer,
            counted: false,
        }))
    }

    /// Completes once a certificate of the peer's is revoked; never, otherwise. The lists that are in force
    /// at the first call count, so that a reload during the handshake is not missed.
    ///
    /// # Cancel safety
    ///
    /// Nothing is lost; a later call looks at the newest lists again.
    pub async fn revoked(&mut self) {
        let Some(live) = &mut self.0 else { return std::future::pending().await };
        loop {
            let lists = Arc::clone(&live.lists.borrow_and_update());
            if lists.mention(&live.chain) && live.is_revoked() {
                if let Some(revocations) = live.trust.revocations()
                    && !std::mem::replace(&mut live.counted, true)
                {
                    revocations.count_rejection(live.peer);
                }
                return;
            }
            if live.lists.changed().await.is_err() {
                return std::future::pending().await;
            }
        }
    }
}

impl Live {
    /// Judged as of the handshake: that a certificate has since expired is no reason to cut.
    fn is_revoked(&self) -> bool {
        let Some((leaf, intermediates)) = self.chain.split_first() else { return false };
        let Ok(leaf) = EndEntityCert::try_from(leaf) else { return false };
        self.trust.check(&leaf, intermediates, self.since, self.peer)
            == Err(webpki::Error::CertRevoked)
    }
}

#[cfg(test)]
pub(crate) mod tests;
