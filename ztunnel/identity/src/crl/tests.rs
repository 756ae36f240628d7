use super::*;
use crate::{
    testing::{CLIENT, HOUR, SERVER, TestCa, clock, handshake, id, now},
    tls::{Context, Options},
    verify::{Fault, explain},
};
use rcgen::{CertificateRevocationListParams, KeyIdMethod, RevokedCertParams, SerialNumber};
use std::{fs, time::Duration};
use tokio::time::timeout;

/// A list of `ca`'s, out of date by an hour, which must not matter.
fn list(ca: &TestCa, serials: &[u64]) -> rcgen::CertificateRevocationList {
    list_of(ca, serials.iter().map(|serial| SerialNumber::from(*serial)))
}

fn list_of(
    ca: &TestCa,
    serials: impl Iterator<Item = SerialNumber>,
) -> rcgen::CertificateRevocationList {
    let revoked = |serial_number| RevokedCertParams {
        serial_number,
        revocation_time: (now() - HOUR).into(),
        reason_code: None,
        invalidity_date: None,
    };
    CertificateRevocationListParams {
        this_update: (now() - 2 * HOUR).into(),
        next_update: (now() - HOUR).into(),
        crl_number: SerialNumber::from(1),
        issuing_distribution_point: None,
        revoked_certs: serials.map(revoked).collect(),
        key_identifier_method: KeyIdMethod::Sha256,
    }
    .signed_by(&ca.issuer)
    .unwrap()
}

/// The serial number `serial` is revoked.
pub(crate) fn revoking(ca: &TestCa, serial: u64) -> Lists {
    Lists::parse(list(ca, &[serial]).pem().unwrap().as_bytes()).unwrap()
}

fn lists(all: &[&rcgen::CertificateRevocationList]) -> Arc<Lists> {
    let text: String = all.iter().map(|list| list.pem().unwrap()).collect();
    Arc::new(Lists::parse(text.as_bytes()).unwrap())
}

#[test]
fn parses_what_operators_write() {
    let ca = TestCa::new("mesh");
    let one = list(&ca, &[7]);
    let pem = one.pem().unwrap();
    for (name, bytes, count) in [
        ("nothing", vec![], Some(0)),
        ("no block", b"nothing yet\n".to_vec(), Some(0)),
        ("a block of another kind", ca.pem().into_bytes(), Some(0)),
        ("PEM", pem.clone().into_bytes(), Some(1)),
        ("several, and others between", format!("{pem}{}{pem}", ca.pem()).into_bytes(), Some(2)),
        ("DER", one.der().to_vec(), Some(1)),
        ("PEM cut short", pem.as_bytes()[..100].to_vec(), None),
        ("DER cut short", one.der()[..100].to_vec(), None),
        (
            "one good, one bad",
            format!("{pem}{}", pem.replace("-----\nMI", "-----\nAI")).into_bytes(),
            None,
        ),
    ] {
        let parsed = Lists::parse(&bytes);
        assert_eq!(parsed.as_ref().ok().map(Lists::len), count, "{name}: {parsed:?}");
    }
}

#[test]
fn handshakes_look_at_the_lists() {
    let ca = TestCa::new("mesh");
    let below = ca.intermediate("below", rcgen::KeyPair::generate().unwrap());
    let (sender, revocations) = Revocations::new(Lists::default());
    let context = Context::new(Options::default(), clock()).with_revocations(revocations.clone());
    // Leaves have the serial number 7; the intermediate's was made of its key.
    let serial = EndEntityCert::try_from(&below.certificate).unwrap().serial().to_vec();
    let of_intermediate = list_of(&ca, std::iter::once(serial.into()));
    let bundle = |uri: &str| {
        let (key, mut issued) = below.issue(&[uri], |_| ());
        issued.chain.push(below.certificate.clone());
        issued.roots = vec![ca.certificate.clone()];
        crate::WorkloadCertificate::new(id(uri), key, issued, &context).unwrap()
    };
    let (client, server) = (bundle(CLIENT), bundle(SERVER));
    let try_it = || handshake(client.client_config(&[id(SERVER)]), server.server_config());

    let impostor = TestCa::new("below");
    for (name, lists, fault) in [
        ("no list", lists(&[]), None),
        ("a list of others", lists(&[&list(&below, &[1, 8])]), None),
        ("a list of another CA", lists(&[&list(&TestCa::new("x"), &[7])]), None),
        ("the leaf", lists(&[&list(&below, &[1, 7])]), Some(Fault::Revoked)),
        (
            "the leaf, second list",
            lists(&[&list(&ca, &[7]), &list(&below, &[7])]),
            Some(Fault::Revoked),
        ),
        ("the intermediate", lists(&[&of_intermediate]), Some(Fault::Revoked)),
        ("a forged list", lists(&[&list(&impostor, &[7])]), Some(Fault::BadCertificate)),
    ] {
        sender.send_replace(lists);
        let before = revocations.rejections();
        let error = try_it().client.err();
        assert_eq!(error.as_ref().map(Fault::of), fault, "{name}: {error:?}");
        let counted = revocations.rejections().0 - before.0;
        assert_eq!(counted, u64::from(fault == Some(Fault::Revoked)), "{name}");
        let words = match fault {
            Some(Fault::Revoked) => "in the peer's chain is revoked",
            _ => "CRL_PATH did not",
        };
        if let Some(error) = error {
            assert!(explain(&error).contains(words), "{name}: {}", explain(&error));
        }
    }
}

async fn is_cut(tracked: &mut Tracked) -> bool {
    timeout(Duration::from_secs(1), tracked.revoked()).await.is_ok()
}

#[tokio::test(start_paused = true)]
async fn live_tunnels_are_cut_by_revocation_alone() {
    let ca = TestCa::new("mesh");
    let (sender, revocations) = Revocations::new(Lists::default());
    let context = Context::new(Options::default(), clock()).with_revocations(revocations);
    let certificate = ca.workload_with(&[SERVER], &context, |_| ());
    let chain = certificate.chain();
    // Long after the leaf's end, as of when the handshake was.
    let mut tracked = certificate.track(chain, Peer::Client, now());
    assert!(!is_cut(&mut tracked).await);
    for (name, new) in [
        ("others", list(&ca, &[8])),
        ("another CA's, with our serial number", list(&TestCa::new("x"), &[7])),
        ("forged: the CA's name, another key", list(&TestCa::new("mesh"), &[7])),
    ] {
        sender.send_replace(lists(&[&new]));
        assert!(!is_cut(&mut tracked).await, "{name}");
    }
    sender.send_replace(lists(&[&list(&ca, &[7])]));
    assert!(is_cut(&mut tracked).await);
    // It stays so for whoever asks again, and holds for whoever comes later.
    assert!(is_cut(&mut tracked).await);
    assert!(
        is_cut(&mut certificate.track(chain, Peer::Server, now())).await,
        "raced with a reload"
    );
    drop(sender);
    assert!(is_cut(&mut tracked).await);
}

#[tokio::test(start_paused = true)]
async fn without_lists_nothing_is_cut() {
    let certificate = TestCa::new("mesh").workload(SERVER);
    let mut tracked = certificate.track(certificate.chain(), Peer::Client, now());
    assert!(!is_cut(&mut tracked).await);
}

#[tokio::test(start_paused = true)]
async fn follows_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ca-crl.pem");
    let ca = TestCa::new("mesh");
    let (watcher, revocations) = Revocations::open(path.clone()).expect("it may come later");
    let mut task = tokio::task::JoinSet::new();
    task.spawn(watcher.run(std::future::pending()));
    let settle = || tokio::time::sleep(Duration::from_secs(10));
    settle().await;
    assert_eq!(revocations.current().len(), 0);
    for (name, text, count) in [
        ("appears", list(&ca, &[7]).pem().unwrap(), 1),
        ("grows", list(&ca, &[7]).pem().unwrap().repeat(2), 2),
        ("spoilt: kept", "-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n".into(), 2),
        ("emptied: no revocations", String::new(), 0),
        ("back", list(&ca, &[7]).pem().unwrap(), 1),
    ] {
        fs::write(&path, text).unwrap();
        settle().await;
        assert_eq!(revocations.current().len(), count, "{name}");
    }
    fs::remove_file(&path).unwrap();
    settle().await;
    assert_eq!(revocations.current().len(), 1, "gone: kept");

    fs::write(&path, "-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n").unwrap();
    assert!(Revocations::open(path).is_none(), "unusable at start: off");
}
