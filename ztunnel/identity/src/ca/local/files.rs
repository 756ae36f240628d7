//! The files of a local CA: read, checked, and made where there are none.
//!
//! Making them is safe against others who do the same and against being killed at any point. Under a lock,
//! the whole set is written into one folder, which is renamed into `.new` when it is complete; then its
//! files are moved out, and `.new` is removed. So a `.new` always holds what is still to be moved, whoever
//! comes next moves it, and files without a `.new` beside them are all there.

use rcgen::{
    BasicConstraints, CertificateParams, DnType, IsCa, KeyPair, KeyUsagePurpose, PublicKeyData as _,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem, pem::PemObject as _};
use std::{
    error::Error,
    fmt,
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};
use x509_parser::prelude::{FromDer as _, X509Certificate};

/// The signing certificate.
pub const CA_CERT: &str = "ca-cert.pem";
/// Its key: ECDSA or RSA; PKCS#8, PKCS#1 or SEC1.
pub const CA_KEY: &str = "ca-key.pem";
/// Whom workloads trust.
pub const ROOT_CERT: &str = "root-cert.pem";
/// What stands between a leaf and the root. May be absent or empty.
pub const CERT_CHAIN: &str = "cert-chain.pem";

/// The key last: what needs it most is told soonest that it is not there.
const ALL: [&str; 4] = [CERT_CHAIN, ROOT_CERT, CA_CERT, CA_KEY];

/// As long as Istio's own self-signed root.
const ROOT_VALIDITY: Duration = Duration::from_secs(3650 * 24 * 3600);

/// A file or folder of the local CA is not as it must be.
#[derive(Debug)]
pub struct OpenError {
    path: PathBuf,
    problem: Problem,
}

/// What is wrong.
#[derive(Debug)]
pub enum Problem {
    /// An operation on it failed.
    Io(&'static str, io::Error),
    /// It is missing, while others of the set are there.
    Missing,
    /// It has no PEM block of the right kind.
    Pem(&'static str, pem::Error),
    /// It is not X.509.
    Malformed,
    /// The kind of key is not supported.
    Key(rcgen::Error),
    /// The key is not that of the certificate.
    KeyMismatch,
    /// It is not a CA's.
    NotCa,
    /// It has something that cannot be dealt with.
    Unsupported(rcgen::Error),
    /// No trial certificate could be signed.
    Trial(Box<dyn Error + Send + Sync>),
    /// A trial certificate did not verify.
    Chain(webpki::Error),
    /// A new CA could not be made.
    Create(rcgen::Error),
    /// The system has no randomness to give.
    Random,
}

impl Problem {
    pub(super) fn at(self, folder: &Path, name: &str) -> OpenError {
        OpenError { path: folder.join(name), problem: self }
    }
}

impl OpenError {
    /// What is wrong.
    #[must_use]
    pub fn problem(&self) -> &Problem {
        &self.problem
    }
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "local CA: {}: ", self.path.display())?;
        match &self.problem {
            Problem::Io(what, _) => write!(f, "cannot {what}"),
            Problem::Missing => write!(
                f,
                "missing, while other files of the set are there; put {CA_CERT}, {CA_KEY} and {ROOT_CERT} \
                 there, or empty the folder to have a new CA made"
            ),
            Problem::Pem(kind, _) => write!(f, "holds no {kind} in PEM"),
            Problem::Malformed => f.write_str("is not an X.509 certificate"),
            Problem::Key(_) => f.write_str(
                "is not a key that can sign here; ECDSA (P-256, P-384, P-521) and RSA (2048 bits and \
                 more) are, unencrypted, as PKCS#8, PKCS#1 or SEC1",
            ),
            Problem::KeyMismatch => write!(f, "is not the key of {CA_CERT}; copy both from one CA"),
            Problem::NotCa => f.write_str("may not sign certificates (basic constraints, key usage)"),
            Problem::Unsupported(_) => f.write_str("cannot be used as an issuer"),
            Problem::Trial(_) => f.write_str("a trial certificate could not be signed"),
            Problem::Chain(_) => write!(
                f,
                "a trial certificate does not verify: {CERT_CHAIN} must lead from it to {ROOT_CERT}, none \
                 of them may have expired, and its subject may not repeat an attribute"
            ),
            Problem::Create(_) | Problem::Random => f.write_str("a new CA could not be made"),
        }
    }
}

impl Error for OpenError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match &self.problem {
            Problem::Io(_, error) => Some(error),
            Problem::Pem(_, error) => Some(error),
            Problem::Key(error) | Problem::Unsupported(error) | Problem::Create(error) => {
                Some(error)
            }
            Problem::Chain(error) => Some(error),
            Problem::Trial(error) => Some(error.as_ref()),
            Problem::Missing
            | Problem::Malformed
            | Problem::KeyMismatch
            | Problem::NotCa
            | Problem::Random => None,
        }
    }
}

/// The set, parsed.
pub(super) struct Files {
    folder: PathBuf,
    pub(super) certificate: CertificateDer<'static>,
    pub(super) key: KeyPair,
    pub(super) roots: Vec<CertificateDer<'static>>,
    pub(super) chain: Vec<CertificateDer<'static>>,
}

impl Files {
    pub(super) fn read(folder: &Path) -> Result<Self, OpenError> {
        let certificate = certificates(folder, CA_CERT)?;
        let certificate = certificate.into_iter().next().ok_or_else(|| none(folder, CA_CERT))?;
        let key = PrivateKeyDer::from_pem_slice(&bytes(folder, CA_KEY)?)
            .map_err(|error| Problem::Pem("private key", error).at(folder, CA_KEY))?;
        let key = KeyPair::try_from(&key).map_err(|e| Problem::Key(e).at(folder, CA_KEY))?;
        let roots = certificates(folder, ROOT_CERT)?;
        if roots.is_empty() {
            return Err(none(folder, ROOT_CERT));
        }
        let chain = if folder.join(CERT_CHAIN).exists() {
            certificates(folder, CERT_CHAIN)?
        } else {
            Vec::new()
        };
        Ok(Self { folder: folder.to_owned(), certificate, key, roots, chain })
    }

    /// Whether the parts fit. Returns the end of the certificate's validity.
    pub(super) fn check(&self) -> Result<SystemTime, OpenError> {
        let (_, certificate) = X509Certificate::from_der(&self.certificate)
            .map_err(|_unclear| Problem::Malformed.at(&self.folder, CA_CERT))?;
        if certificate.public_key().subject_public_key.data != self.key.der_bytes() {
            return Err(Problem::KeyMismatch.at(&self.folder, CA_KEY));
        }
        let may_sign =
            certificate.key_usage().ok().flatten().is_none_or(|usage| usage.value.key_cert_sign());
        if !certificate.is_ca() || !may_sign {
            return Err(Problem::NotCa.at(&self.folder, CA_CERT));
        }
        let end = u64::try_from(certificate.validity().not_after.timestamp()).unwrap_or(0);
        Ok(SystemTime::UNIX_EPOCH + Duration::from_secs(end))
    }
}

fn none(folder: &Path, name: &str) -> OpenError {
    Problem::Pem("certificate", pem::Error::NoItemsFound).at(folder, name)
}

fn bytes(folder: &Path, name: &str) -> Result<Vec<u8>, OpenError> {
    fs::read(folder.join(name)).map_err(|error| {
        match error.kind() {
            io::ErrorKind::NotFound => Problem::Missing,
            _ => Problem::Io("read it", error),
        }
        .at(folder, name)
    })
}

fn certificates(folder: &Path, name: &str) -> Result<Vec<CertificateDer<'static>>, OpenError> {
    CertificateDer::pem_slice_iter(&bytes(folder, name)?)
        .collect::<Result<_, _>>()
        .map_err(|error| Problem::Pem("certificate", error).at(folder, name))
}

/// Sees to it that the set is there, if it is ours to make.
pub(super) fn ensure(folder: &Path, now: SystemTime) -> Result<(), OpenError> {
    let failed = |what| move |error| Problem::Io(what, error).at(folder, "");
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .map_err(failed("create this folder"))?;
    let (new, draft) = (folder.join(".new"), folder.join(".draft"));
    // In this order: who sees a file and then no `.new` sees a whole set, or somebody else's. That one may be
    // on a read-only mount, where there can be no lock.
    let any = || ALL.iter().any(|name| folder.join(name).exists());
    if any() && !new.exists() {
        return Ok(());
    }
    let lock = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(folder.join(".lock"))
        .map_err(failed("create a CA in this folder"))?;
    lock.lock().map_err(failed("lock this folder"))?;
    if !new.exists() {
        if any() {
            return Ok(());
        }
        // Left by someone who was killed while writing.
        remove(&draft).map_err(failed("clean this folder up"))?;
        let set = create(now).map_err(|problem| problem.at(folder, ""))?;
        write(&draft, &set).map_err(failed("write into this folder"))?;
        fs::rename(&draft, &new).map_err(failed("write into this folder"))?;
        tracing::info!(folder = %folder.display(), "made a new local CA");
    }
    publish(folder, &new).map_err(failed("move the new files into this folder"))
    // The lock ends with its file.
}

fn remove(draft: &Path) -> io::Result<()> {
    match fs::remove_dir_all(draft) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

fn write(draft: &Path, set: &[(&str, String)]) -> io::Result<()> {
    DirBuilder::new().mode(0o700).create(draft)?;
    for (name, text) in set {
        let mut file =
            OpenOptions::new().write(true).create_new(true).mode(0o600).open(draft.join(name))?;
        // Whatever the umask is.
        file.set_permissions(fs::Permissions::from_mode(0o600))?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
    }
    File::open(draft)?.sync_all()
}

fn publish(folder: &Path, new: &Path) -> io::Result<()> {
    for name in ALL {
        match fs::rename(new.join(name), folder.join(name)) {
            // Moved by someone who was killed after it.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            result => result?,
        }
    }
    File::open(folder)?.sync_all()?;
    fs::remove_dir(new)?;
    File::open(folder)?.sync_all()
}

/// A self-signed CA.
fn create(now: SystemTime) -> Result<[(&'static str, String); 4], Problem> {
    let key = KeyPair::generate().map_err(Problem::Create)?;
    // A name of its own: verification finds an issuer by name, and two roots of one name confuse people.
    let mut tag = [0; 4];
    crate::tls::Options::default()
        .provider()
        .secure_random
        .fill(&mut tag)
        .map_err(|_failed| Problem::Random)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "cluster.local");
    let name = format!("local CA {:08x}", u32::from_be_bytes(tag));
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.not_before = (now - Duration::from_mins(2)).into();
    params.not_after = (now + ROOT_VALIDITY).into();
    let certificate = params.self_signed(&key).map_err(Problem::Create)?.pem();
    Ok([
        (CERT_CHAIN, String::new()),
        (ROOT_CERT, certificate.clone()),
        (CA_CERT, certificate),
        (CA_KEY, key.serialize_pem()),
    ])
}
