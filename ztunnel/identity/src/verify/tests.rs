use super::*;
use crate::{
    WorkloadCertificate,
    testing::{CLIENT, Ends, HOUR, SERVER, TestCa, clock, context, handshake, id, now},
    tls::{Context, Options},
};
use rcgen::ExtendedKeyUsagePurpose;
use rustls::{CipherSuite, ClientConfig, ProtocolVersion, ServerConfig};

fn connect(client: &WorkloadCertificate, server: &WorkloadCertificate, expect: &[&str]) -> Ends {
    let expect: Vec<_> = expect.iter().map(|text| id(text)).collect();
    handshake(client.client_config(&expect), server.server_config())
}

#[test]
fn both_ends_learn_who_the_other_is() {
    let ca = TestCa::new("mesh");
    let ends = connect(&ca.workload(CLIENT), &ca.workload(SERVER), &[SERVER]);
    let (client, server) = (ends.client.unwrap(), ends.server.unwrap());
    assert_eq!(peer_identity(client.peer_certificates().unwrap()), Some(id(SERVER)));
    assert_eq!(peer_identity(server.peer_certificates().unwrap()), Some(id(CLIENT)));
    assert_eq!(client.alpn_protocol(), Some(&b"h2"[..]));
    assert_eq!(server.alpn_protocol(), Some(&b"h2"[..]));
    assert_eq!(server.server_name(), None, "no SNI");
    assert_eq!(client.protocol_version(), Some(ProtocolVersion::TLSv1_3));
    let suite = client.negotiated_cipher_suite().unwrap().suite();
    assert_eq!(suite, CipherSuite::TLS13_AES_128_GCM_SHA256);
    assert_eq!(ends.tail, 0, "no tickets");
}

fn only(suite: rustls::SupportedCipherSuite, tls12: bool) -> Context {
    let mut context = Context::new(Options { post_quantum: false, tls12 }, clock());
    let mut provider = (*context.provider).clone();
    provider.cipher_suites = vec![suite];
    context.provider = Arc::new(provider);
    context
}

#[test]
fn suites_and_groups_are_negotiated() {
    use rustls::crypto::aws_lc_rs::cipher_suite as s;
    let ca = TestCa::new("mesh");
    let tls12 = Context::new(Options { post_quantum: false, tls12: true }, clock());
    let pqc = Context::new(Options { post_quantum: true, tls12: true }, clock());
    for (name, ours, theirs, suite, group) in [
        (
            "a peer with the long key alone",
            context(),
            only(s::TLS13_AES_256_GCM_SHA384, false),
            CipherSuite::TLS13_AES_256_GCM_SHA384,
            rustls::NamedGroup::X25519,
        ),
        (
            "tls 1.2, where both allow it",
            tls12,
            only(s::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384, true),
            CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
            rustls::NamedGroup::X25519,
        ),
        (
            "post-quantum with a peer that prefers otherwise",
            pqc,
            context(),
            CipherSuite::TLS13_AES_128_GCM_SHA256,
            rustls::NamedGroup::X25519MLKEM768,
        ),
    ] {
        let ours = ca.workload_with(&[SERVER], &ours, |_| ());
        let theirs = ca.workload_with(&[SERVER], &theirs, |_| ());
        for (role, client, server) in [("server", &theirs, &ours), ("client", &ours, &theirs)] {
            let ends = connect(client, server, &[SERVER]);
            let client = ends.client.unwrap();
            ends.server.unwrap();
            assert_eq!(
                client.negotiated_cipher_suite().unwrap().suite(),
                suite,
                "{name}, we are the {role}"
            );
            let negotiated = client.negotiated_key_exchange_group().unwrap().name();
            assert_eq!(negotiated, group, "{name}, we are the {role}");
        }
    }
}

#[test]
fn our_order_of_suites_wins() {
    let ca = TestCa::new("mesh");
    let mut theirs = context();
    let mut provider = (*theirs.provider).clone();
    provider.cipher_suites.reverse();
    theirs.provider = Arc::new(provider);
    let theirs = ca.workload_with(&[CLIENT], &theirs, |_| ());
    let ends = connect(&theirs, &ca.workload(SERVER), &[SERVER]);
    let suite = ends.client.unwrap().negotiated_cipher_suite().unwrap().suite();
    assert_eq!(suite, CipherSuite::TLS13_AES_128_GCM_SHA256);
}

/// What the failing end says, and what the other end is told.
fn refusal(ends: Ends, by_client: bool) -> (Fault, String, String) {
    let (mine, other) = if by_client {
        (ends.client.err(), ends.server.err())
    } else {
        (ends.server.err(), ends.client.err())
    };
    let mine = mine.expect("refused");
    (Fault::of(&mine), explain(&mine), explain(&other.expect("told so")))
}

#[test]
fn a_client_accepts_whom_it_expects_alone() {
    let ca = TestCa::new("mesh");
    let other = "spiffe://cluster.local/ns/shop/sa/other";
    let client = ca.workload(CLIENT);
    for (name, sans, expect, ok) in [
        ("the one", &[SERVER][..], &[SERVER][..], true),
        ("one of two expected", &[SERVER], &[other, SERVER], true),
        ("its second SAN", &[other, SERVER], &[SERVER], true),
        ("a SAN that does not parse is skipped", &["spiffe://x", "urn:x", SERVER], &[SERVER], true),
        ("someone else", &[other], &[SERVER], false),
        ("another trust domain", &["spiffe://td2/ns/shop/sa/server"], &[SERVER], false),
        ("another namespace", &["spiffe://cluster.local/ns/x/sa/server"], &[SERVER], false),
        ("nobody is expected", &[SERVER], &[], false),
        ("no identity", &[], &[SERVER], false),
        ("no identity that parses", &["urn:x"], &[SERVER], false),
    ] {
        let server = ca.workload_with(sans, &context(), |_| ());
        let ends = connect(&client, &server, expect);
        assert_eq!(ends.client.is_ok(), ok, "{name}: {:?}", ends.client.err());
        if !ok {
            let (fault, ours, theirs) = refusal(ends, true);
            assert_eq!(fault, Fault::WrongIdentity, "{name}");
            let word = if expect.is_empty() { "no identity is known" } else { SERVER };
            assert!(ours.contains(word), "{name}: {ours}");
            for san in sans {
                assert!(ours.contains(san), "{name}: {ours}");
            }
            assert!(theirs.starts_with("the peer refused our certificate"), "{name}: {theirs}");
        }
    }
}

#[test]
fn a_server_accepts_its_own_trust_domain_alone() {
    let ca = TestCa::new("mesh");
    for (name, own, sans, ok) in [
        ("the same", SERVER, &[CLIENT][..], true),
        ("the same, second", SERVER, &["spiffe://td2/ns/a/sa/b", CLIENT], true),
        ("after one that does not parse", SERVER, &["spiffe://x", CLIENT], true),
        ("another", SERVER, &["spiffe://td2/ns/a/sa/b"], false),
        ("none", SERVER, &[], false),
        ("none that parses", SERVER, &["spiffe://cluster.local/ns/a"], false),
        ("any, if we have none", "urn:x", &["spiffe://td2/ns/a/sa/b"], true),
    ] {
        let client = ca.workload_with(sans, &context(), |_| ());
        let server = ca.workload(own);
        // A client that takes any server, so that only the server can refuse.
        let ends = handshake(trusting(&client), server.server_config());
        assert_eq!(ends.server.is_ok(), ok, "{name}: {:?}", ends.server.err());
        if !ok {
            let (fault, ours, _) = refusal(ends, false);
            assert_eq!(fault, Fault::WrongIdentity, "{name}");
            assert!(ours.contains("cluster.local"), "{name}: {ours}");
        }
    }
}

/// A client that does not verify.
fn trusting(certificate: &WorkloadCertificate) -> Arc<ClientConfig> {
    let mut config = (*certificate.client_config(&[])).clone();
    config.dangerous().set_certificate_verifier(Arc::new(Trusting));
    Arc::new(config)
}

#[derive(Debug)]
struct Trusting;

impl ServerCertVerifier for Trusting {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ECDSA_NISTP256_SHA256]
    }
}

type Edit = fn(&mut rcgen::CertificateParams);

#[test]
fn chains_that_do_not_hold() {
    let ca = TestCa::new("mesh");
    let other = TestCa::new("another mesh");
    let good = ca.workload(SERVER);
    let cases: [(&str, &TestCa, Edit, Fault, &str, &str); 5] = [
        ("another CA", &other, |_| (), Fault::UnknownIssuer, "not signed by", "does not trust"),
        (
            "another CA of the same name",
            &TestCa::new("mesh"),
            |_| (),
            Fault::UnknownIssuer,
            "not signed by",
            "does not trust",
        ),
        (
            "expired",
            &ca,
            |p| p.not_after = (now() - HOUR / 2).into(),
            Fault::Expired,
            "expired 1800 s ago",
            "for expired",
        ),
        (
            "not yet valid",
            &ca,
            |p| p.not_before = (now() + HOUR / 2).into(),
            Fault::Expired,
            "valid only in 1800 s",
            "for expired",
        ),
        (
            "not for either side",
            &ca,
            |p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::CodeSigning],
            Fault::BadCertificate,
            "may not be used",
            "refused our certificate",
        ),
    ];
    for (name, ca, edit, fault, ours, theirs) in cases {
        let bad = ca.workload_with(&[SERVER], &context(), edit);
        let by_client = refusal(connect(&good, &bad, &[SERVER]), true);
        let by_server = refusal(handshake(trusting(&bad), good.server_config()), false);
        for (by, (f, o, t)) in [("client", by_client), ("server", by_server)] {
            assert_eq!(f, fault, "{name}, refused by the {by}: {o}");
            assert!(o.contains(ours), "{name}, refused by the {by}: {o}");
            assert!(t.contains(theirs), "{name}, refused by the {by}: {t}");
        }
    }
}

#[test]
fn usages_of_the_wrong_side() {
    let ca = TestCa::new("mesh");
    let server_only: Edit = |p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let client_only: Edit = |p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    let good = ca.workload(SERVER);
    let server = ca.workload_with(&[SERVER], &context(), server_only);
    let client = ca.workload_with(&[SERVER], &context(), client_only);
    connect(&client, &server, &[SERVER]).server.expect("each on its side");
    let ends = connect(&server, &good, &[SERVER]);
    assert_eq!(refusal(ends, false).0, Fault::BadCertificate);
    let ends = connect(&good, &client, &[SERVER]);
    assert_eq!(refusal(ends, true).0, Fault::BadCertificate);
}

#[test]
fn several_roots_and_intermediates() {
    let (old, new) = (TestCa::new("old"), TestCa::new("new"));
    let below = new.intermediate("below", rcgen::KeyPair::generate().unwrap());
    let both = vec![old.certificate.clone(), new.certificate.clone()];
    let (key, mut issued) = old.issue(&[CLIENT], |_| ());
    issued.roots = both.clone();
    let client = WorkloadCertificate::new(id(CLIENT), key, issued, &context()).unwrap();
    let (key, mut issued) = below.issue(&[SERVER], |_| ());
    issued.chain.push(below.certificate.clone());
    issued.roots = both;
    let server = WorkloadCertificate::new(id(SERVER), key, issued, &context()).unwrap();
    let ends = connect(&client, &server, &[SERVER]);
    assert_eq!(ends.client.unwrap().peer_certificates().unwrap().len(), 2);
    ends.server.unwrap();
}

#[test]
fn a_client_without_a_certificate_is_refused() {
    let ca = TestCa::new("mesh");
    let context = context();
    let client = ClientConfig::builder_with_details(Arc::clone(&context.provider), context.time)
        .with_protocol_versions(context.versions)
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Trusting))
        .with_no_client_auth();
    let mut client = client;
    client.alpn_protocols = vec![b"h2".to_vec()];
    let ends = handshake(Arc::new(client), ca.workload(SERVER).server_config());
    let (fault, ours, theirs) = refusal(ends, false);
    assert_eq!(fault, Fault::NoCertificate);
    assert_eq!(ours, "the peer presented no certificate");
    assert_eq!(theirs, "the peer refused our certificate: it got none");
}

#[test]
fn alpn_is_required() {
    let ca = TestCa::new("mesh");
    let server = ca.workload(SERVER);
    let mut client = (*ca.workload(CLIENT).client_config(&[id(SERVER)])).clone();
    client.alpn_protocols = vec![b"http/1.1".to_vec()];
    let ends = handshake(Arc::new(client), server.server_config());
    assert_eq!(Fault::of(&ends.server.err().unwrap()), Fault::Protocol);
}

#[test]
fn configurations_say_what_the_contract_says() {
    let certificate = TestCa::new("mesh").workload(SERVER);
    let server: Arc<ServerConfig> = certificate.server_config();
    assert_eq!(server.send_tls13_tickets, 0);
    assert!(!server.session_storage.can_cache());
    assert!(!certificate.client_config(&[]).enable_sni);
    assert!(Arc::ptr_eq(&server, &certificate.server_config()), "built once");
}

#[test]
fn what_a_peer_says_is_one_bounded_line() {
    let printed = Printable("spiffe://a\nb\u{1b}[31m\u{202e}").to_string();
    assert_eq!(printed, "spiffe://a\\nb\\u{1b}[31m\\u{202e}");
    assert_eq!(Printable(&"x".repeat(5000)).to_string().len(), 600);
    let leaf = TestCa::new("mesh").issue(&["urn:1", "urn:2", "urn:3", "urn:4", "urn:5"], |_| ());
    let leaf = leaf.1.chain.into_iter().next().unwrap();
    let leaf = EndEntityCert::try_from(&leaf).unwrap();
    assert_eq!(presented(&leaf), ["urn:1", "urn:2", "urn:3", "urn:4"]);
}

#[test]
fn identity_of_odd_chains() {
    assert_eq!(peer_identity(&[]), None);
    assert_eq!(peer_identity(&[CertificateDer::from(vec![0x30, 0x82])]), None);
    for byte in 0..=255 {
        crate::fuzz::alert(&[byte]);
    }
}

proptest::proptest! {
    /// Cut, flipped and plain random certificates.
    #[test]
    fn leaves_of_any_bytes(at in 0_usize..400, byte: u8, cut in 0_usize..500, noise: Vec<u8>) {
        use std::sync::LazyLock;
        static LEAF: LazyLock<Vec<u8>> =
            LazyLock::new(|| TestCa::new("mesh").workload(CLIENT).chain()[0].to_vec());
        let mut leaf = LEAF.clone();
        if let Some(at) = leaf.get_mut(at) {
            *at = byte;
        }
        crate::fuzz::peer_certificate(&leaf);
        leaf.truncate(cut);
        crate::fuzz::peer_certificate(&leaf);
        crate::fuzz::peer_certificate(&noise);
        crate::fuzz::revocation_lists(&noise);
    }
}

/// A root is replaced in four steps, and workloads reach them at different times (each at its half life). Whoever
/// is at most one step apart can talk, both ways; what was refused at first is not remembered as such.
#[test]
fn a_root_is_rotated_step_by_step() {
    let (old, new) = (TestCa::new("cluster.local"), TestCa::new("cluster.local"));
    let context = context();
    let (both, only_old, only_new): ([&TestCa; 2], _, _) = ([&old, &new], [&old], [&new]);
    let step = |signer: &TestCa, roots: &[&TestCa]| {
        let (key, mut issued) = signer.issue(&[SERVER], |_| ());
        issued.roots = roots.iter().map(|root| root.certificate.clone()).collect();
        WorkloadCertificate::new(id(SERVER), key, issued, &context).unwrap()
    };
    let steps =
        [step(&old, &only_old), step(&old, &both), step(&new, &both), step(&new, &only_new)];
    for round in 0..2 {
        for (i, client) in steps.iter().enumerate() {
            for (j, server) in steps.iter().enumerate() {
                let ends = connect(client, server, &[SERVER]);
                let talk = ends.client.is_ok() && ends.server.is_ok();
                assert_eq!(talk, i.abs_diff(j) <= 1, "round {round}: step {i} to step {j}");
            }
        }
    }
}
