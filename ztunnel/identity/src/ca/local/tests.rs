use super::*;
use crate::testing::{CLIENT, HOUR, TestCa, clock, handshake, id, now};
use crate::{WorkloadCertificate, tls::Context};
use mesh_runtime::clock::FixedClock;
use rcgen::{PKCS_ECDSA_P384_SHA384, PKCS_RSA_SHA256, RsaKeySize};
use std::{
    collections::HashSet,
    fs,
    os::unix::fs::PermissionsExt as _,
    sync::{Barrier, LazyLock},
};
use tempfile::TempDir;
use x509_parser::{
    extensions::GeneralName,
    prelude::{FromDer as _, X509Certificate},
};

const DAY: Duration = Duration::from_hours(24);

fn open(folder: &Path) -> Result<LocalCa, OpenError> {
    LocalCa::open(folder, DAY, clock())
}

fn workload(ca: &LocalCa, identity: &str) -> WorkloadCertificate {
    let identity = id(identity);
    let (key, csr) = Csr::generate(&identity).unwrap();
    let issued = ca.issue(&identity, &csr).unwrap();
    WorkloadCertificate::new(identity, key, issued, &Context::new(Options::default(), clock()))
        .unwrap()
}

fn talk(one: &LocalCa, other: &LocalCa) -> bool {
    let (client, server) = (workload(one, CLIENT), workload(other, CLIENT));
    let ends = handshake(client.client_config(&[id(CLIENT)]), server.server_config());
    ends.client.is_ok() && ends.server.is_ok()
}

/// Error and causes, as the log prints them.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

#[test]
fn makes_a_ca_in_an_empty_folder_once() {
    let dir = TempDir::new().unwrap();
    let folder = dir.path().join("deep/ca");
    let first = open(&folder).unwrap();
    assert_eq!(folder.metadata().unwrap().permissions().mode() & 0o777, 0o700);
    let mut names = HashSet::new();
    for file in fs::read_dir(&folder).unwrap() {
        let file = file.unwrap();
        assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600, "{file:?}");
        names.insert(file.file_name().into_string().unwrap());
    }
    let expected = [CA_CERT, CA_KEY, ROOT_CERT, CERT_CHAIN, ".lock"];
    assert_eq!(names, expected.map(String::from).into());
    let second = open(&folder).unwrap();
    assert_eq!(first.roots, second.roots);
    assert!(talk(&first, &second));
    assert!(!talk(&first, &open(dir.path()).unwrap()), "another folder is another CA");
}

#[test]
fn leaves_are_what_istiod_would_issue() {
    let dir = TempDir::new().unwrap();
    let ca = open(dir.path()).unwrap();
    let (one, two) = (workload(&ca, CLIENT), workload(&ca, CLIENT));
    assert_eq!(one.not_before(), now() - DATED_BACK);
    assert_eq!(one.not_after(), now() + DAY);
    assert_eq!(one.chain().len(), 1, "no root in the chain");
    let (_, leaf) = X509Certificate::from_der(&one.chain()[0]).unwrap();
    let (_, other) = X509Certificate::from_der(&two.chain()[0]).unwrap();
    assert_eq!(leaf.subject().iter().count(), 0);
    assert!(!leaf.is_ca());
    let san = leaf.subject_alternative_name().unwrap().unwrap();
    assert!(san.critical);
    assert_eq!(san.value.general_names, [GeneralName::URI(CLIENT)]);
    let usage = leaf.extended_key_usage().unwrap().unwrap().value;
    assert!(usage.server_auth && usage.client_auth && !usage.any);
    assert_ne!(leaf.tbs_certificate.serial, other.tbs_certificate.serial);
    assert!((120..=127).contains(&leaf.tbs_certificate.serial.bits()));
}

#[test]
fn signs_only_what_was_asked_for() {
    let dir = TempDir::new().unwrap();
    let ca = open(dir.path()).unwrap();
    let (_, csr) = Csr::generate(&id("spiffe://cluster.local/ns/a/sa/b")).unwrap();
    assert!(matches!(ca.issue(&id(CLIENT), &csr), Err(SigningError::Identity)));
}

#[test]
fn no_leaf_outlives_its_ca() {
    let dir = TempDir::new().unwrap();
    let root = TestCa::new("root");
    save(dir.path(), &root, &root, "");
    // A test CA ends in 1000 hours.
    let long = LocalCa::open(dir.path(), 5000 * HOUR, clock()).unwrap();
    assert_eq!(workload(&long, CLIENT).not_after(), now() + 1000 * HOUR);

    let later = Arc::new(FixedClock(now() + 1001 * HOUR));
    let error = LocalCa::open(dir.path(), DAY, later).unwrap_err();
    assert!(chain(&error).contains("has expired"), "{}", chain(&error));
}

/// Writes an existing CA as Istio's documentation has one plug it in.
fn save(folder: &Path, ca: &TestCa, root: &TestCa, chain: &str) {
    fs::write(folder.join(CA_CERT), ca.pem()).unwrap();
    fs::write(folder.join(CA_KEY), &ca.key_pem).unwrap();
    fs::write(folder.join(ROOT_CERT), root.pem()).unwrap();
    fs::write(folder.join(CERT_CHAIN), chain).unwrap();
}

/// Takes seconds to make.
static RSA: LazyLock<String> = LazyLock::new(|| {
    KeyPair::generate_rsa_for(&PKCS_RSA_SHA256, RsaKeySize::_2048).unwrap().serialize_pem()
});

/// The key inside a PKCS#8 envelope: PKCS#1 for RSA, SEC1 for EC.
fn unwrapped(pkcs8: &KeyPair, label: &str) -> String {
    let (_, sequence) = x509_parser::asn1_rs::Sequence::from_der(pkcs8.serialized_der()).unwrap();
    let (rest, _version) = x509_parser::asn1_rs::Any::from_der(&sequence.content).unwrap();
    let (rest, _algorithm) = x509_parser::asn1_rs::Any::from_der(rest).unwrap();
    let (_, key) = x509_parser::asn1_rs::Any::from_der(rest).unwrap();
    crate::dump::pem(key.data).replace("CERTIFICATE", label)
}

#[test]
fn takes_every_kind_of_key() {
    let rsa = || KeyPair::from_pem(&RSA).unwrap();
    let p256 = || KeyPair::generate().unwrap();
    let p384 = || KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384).unwrap();
    let root = TestCa::new("root");
    type Encode = fn(&KeyPair) -> String;
    let cases: [(&str, KeyPair, Encode); 7] = [
        ("EC P-256, PKCS#8", p256(), KeyPair::serialize_pem),
        ("EC P-384, PKCS#8", p384(), KeyPair::serialize_pem),
        ("EC P-256, SEC1", p256(), |key| unwrapped(key, "EC PRIVATE KEY")),
        ("EC P-384, SEC1", p384(), |key| unwrapped(key, "EC PRIVATE KEY")),
        ("EC P-256, SEC1 after its parameters", p256(), |key| {
            let parameters =
                "-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----\n";
            format!("{parameters}{}", unwrapped(key, "EC PRIVATE KEY"))
        }),
        ("RSA, PKCS#8", rsa(), KeyPair::serialize_pem),
        ("RSA, PKCS#1", rsa(), |key| unwrapped(key, "RSA PRIVATE KEY")),
    ];
    for (name, key, encode) in cases {
        let dir = TempDir::new().unwrap();
        let text = encode(&key);
        let ca = root.intermediate("below", key);
        save(dir.path(), &ca, &root, &ca.pem());
        fs::write(dir.path().join(CA_KEY), text).unwrap();
        let ca = open(dir.path()).unwrap_or_else(|error| panic!("{name}: {}", chain(&error)));
        assert!(talk(&ca, &ca), "{name}");
    }
}

#[test]
fn takes_every_shape_of_chain() {
    let root = TestCa::with_key("root", KeyPair::from_pem(&RSA).unwrap());
    let middle = root.intermediate("middle", KeyPair::generate().unwrap());
    let ca = middle.intermediate("ca", KeyPair::generate().unwrap());
    let all = [ca.pem(), middle.pem(), root.pem()];
    for (name, text) in [
        ("what Istio's Makefile makes: all, root included", all.concat()),
        ("without the root", all[..2].concat()),
        ("without the CA itself", all[1].clone()),
        ("with words in between", format!("subject=ca\n{}\nissuer=\n{}", all[0], all[1])),
    ] {
        let dir = TempDir::new().unwrap();
        save(dir.path(), &ca, &root, &text);
        let ca = open(dir.path()).unwrap_or_else(|error| panic!("{name}: {}", chain(&error)));
        assert_eq!(workload(&ca, CLIENT).chain().len(), 3, "{name}: leaf, ca, middle");
        assert!(talk(&ca, &ca), "{name}");
    }

    // Two nodes with different CAs below one root.
    let (one, two) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    save(one.path(), &ca, &root, &all.concat());
    save(two.path(), &middle, &root, "");
    assert!(talk(&open(one.path()).unwrap(), &open(two.path()).unwrap()));
}

#[test]
fn says_which_file_is_wrong_and_what_to_do() {
    type Spoil = fn(&Path, &TestCa);
    let cases: [(&str, &str, Spoil, &str); 9] = [
        ("no key", CA_KEY, |d, _| fs::remove_file(d.join(CA_KEY)).unwrap(), "missing, while other"),
        (
            "no root",
            ROOT_CERT,
            |d, _| fs::remove_file(d.join(ROOT_CERT)).unwrap(),
            "empty the folder",
        ),
        (
            "an empty root",
            ROOT_CERT,
            |d, _| fs::write(d.join(ROOT_CERT), "").unwrap(),
            "no certificate",
        ),
        (
            "garbage",
            CA_CERT,
            |d, _| fs::write(d.join(CA_CERT), "garbage").unwrap(),
            "no certificate",
        ),
        (
            "a key of another CA",
            CA_KEY,
            |d, _| fs::write(d.join(CA_KEY), TestCa::new("x").key_pem).unwrap(),
            "not the key of ca-cert.pem",
        ),
        (
            "an encrypted key",
            CA_KEY,
            |d, _| {
                let key = "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n";
                fs::write(d.join(CA_KEY), key).unwrap();
            },
            "no private key",
        ),
        (
            "a key that is none",
            CA_KEY,
            |d, _| {
                let key = "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n";
                fs::write(d.join(CA_KEY), key).unwrap();
            },
            "unencrypted, as PKCS#8",
        ),
        (
            "a root of another CA",
            CA_CERT,
            |d, _| fs::write(d.join(ROOT_CERT), TestCa::new("x").pem()).unwrap(),
            "must lead from it to root-cert.pem",
        ),
        (
            "a leaf as CA",
            CA_CERT,
            |d, root| {
                let (key, issued) = root.issue(&[CLIENT], |_| ());
                fs::write(d.join(CA_CERT), crate::dump::pem(&issued.chain[0])).unwrap();
                let key = crate::dump::pem(key.secret_der()).replace("CERTIFICATE", "PRIVATE KEY");
                fs::write(d.join(CA_KEY), key).unwrap();
            },
            "may not sign certificates",
        ),
    ];
    for (name, file, spoil, words) in cases {
        let dir = TempDir::new().unwrap();
        let root = TestCa::new("root");
        save(dir.path(), &root, &root, "");
        open(dir.path()).unwrap();
        spoil(dir.path(), &root);
        let text = chain(&open(dir.path()).unwrap_err());
        assert!(text.contains(&dir.path().join(file).display().to_string()), "{name}: {text}");
        assert!(text.contains(words), "{name}: {text}");
    }
}

#[test]
fn one_ca_however_many_come_at_once() {
    for _ in 0..10 {
        let dir = TempDir::new().unwrap();
        let folder = dir.path().join("ca");
        let barrier = Barrier::new(8);
        let roots: HashSet<Vec<u8>> = std::thread::scope(|scope| {
            let start = || {
                barrier.wait();
                open(&folder).unwrap().roots[0].to_vec()
            };
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(start)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(roots.len(), 1);
    }
}

/// Being killed leaves one of these behind.
#[test]
fn a_crash_at_any_point_heals() {
    let made = TempDir::new().unwrap();
    open(made.path()).unwrap();
    let order = [CERT_CHAIN, ROOT_CERT, CA_CERT, CA_KEY];
    let text = |name: &str| fs::read(made.path().join(name)).unwrap();

    for written in 0..=4 {
        let dir = TempDir::new().unwrap();
        let draft = dir.path().join(".draft");
        fs::create_dir(&draft).unwrap();
        for name in &order[..written] {
            fs::write(draft.join(name), text(name)).unwrap();
        }
        open(dir.path()).unwrap_or_else(|e| panic!("{written} written: {}", chain(&e)));
        assert!(!draft.exists(), "{written} written");
    }
    for moved in 0..=4 {
        let dir = TempDir::new().unwrap();
        let new = dir.path().join(".new");
        fs::create_dir(&new).unwrap();
        for (i, name) in order.iter().enumerate() {
            let folder = if i < moved { dir.path() } else { &new };
            fs::write(folder.join(name), text(name)).unwrap();
        }
        let ca = open(dir.path()).unwrap_or_else(|e| panic!("{moved} moved: {}", chain(&e)));
        assert_eq!(ca.roots, open(made.path()).unwrap().roots, "{moved} moved");
        assert!(!new.exists(), "{moved} moved");
    }
}

#[test]
fn an_existing_set_is_not_touched() {
    let dir = TempDir::new().unwrap();
    let root = TestCa::new("root");
    save(dir.path(), &root, &root, "");
    open(dir.path()).unwrap();
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 4, "no lock, nothing new");
    fs::remove_file(dir.path().join(CERT_CHAIN)).unwrap();
    open(dir.path()).expect("the chain may be absent");
}

#[tokio::test]
async fn signs_through_the_trait() {
    let dir = TempDir::new().unwrap();
    let ca: Box<dyn CertificateAuthority> = Box::new(open(dir.path()).unwrap());
    let identity = id(CLIENT);
    let (_, csr) = Csr::generate(&identity).unwrap();
    assert_eq!(ca.sign(&identity, &csr).await.unwrap().chain.len(), 1);
    let error = ca.sign(&id("spiffe://a/ns/b/sa/c"), &csr).await.unwrap_err();
    assert!(chain(&error).contains("another identity"), "{}", chain(&error));
}
