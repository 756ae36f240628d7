//! The anchors that a workload trusts, and the chains that are known to lead to them.
//!
//! A chain check costs two thirds of what the signature of the handshake itself does, at both ends of each
//! tunnel, and mostly of chains that were seen before: a workload's peers are few, and a peer has one leaf for
//! half a day. So what was verified is remembered, by all of its bytes. It is used again only where the check
//! could have no other result: under the same anchors and for the same usage (one memory for each), with the
//! same revocation lists (else all is forgotten), and while every certificate that was shown is valid (else
//! the check is made in full, and says what is wrong). That the peer holds the key is proven each time.

use crate::{
    certificate::validity,
    crl::{Lists, Peer, Revocations},
    tls::unix,
};
use rustls::{DistinguishedName, crypto::WebPkiSupportedAlgorithms};
use rustls_pki_types::{CertificateDer, TrustAnchor, UnixTime};
use std::{
    collections::HashMap,
    ops::RangeInclusive,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};
use webpki::{EndEntityCert, RevocationOptions};

/// Chains remembered for one set of anchors. About 700 bytes each: a third of a megabyte.
const MOST_KNOWN: usize = 512;

/// The anchors that came with a certificate.
#[derive(Debug)]
pub(crate) struct Trust {
    roots: Box<[CertificateDer<'static>]>,
    anchors: Vec<TrustAnchor<'static>>,
    /// What a server tells its clients: which roots it would like to see.
    subjects: Vec<DistinguishedName>,
    algorithms: WebPkiSupportedAlgorithms,
    revocations: Option<Revocations>,
    known: Mutex<Known>,
}

/// Chains that passed.
#[derive(Debug, Default)]
struct Known {
    /// The lists that they passed under.
    lists: Option<Arc<Lists>>,
    /// By peer and all bytes, the time in which every member is valid.
    chains: HashMap<(Peer, Box<[u8]>), RangeInclusive<UnixTime>>,
}

impl Trust {
    pub(crate) fn new(
        roots: &[CertificateDer<'static>],
        algorithms: WebPkiSupportedAlgorithms,
        revocations: Option<Revocations>,
    ) -> Result<Self, webpki::Error> {
        let anchors = roots
            .iter()
            .map(|root| webpki::anchor_from_trusted_cert(root).map(|anchor| anchor.to_owned()))
            .collect::<Result<Vec<_>, _>>()?;
        let subjects = anchors
            .iter()
            .map(|anchor| DistinguishedName::in_sequence(anchor.subject.as_ref()))
            .collect();
        let known = Mutex::default();
        Ok(Self { roots: roots.into(), anchors, subjects, algorithms, revocations, known })
    }

    /// Checks a chain in full, the revocation of its members included.
    pub(crate) fn check(
        &self,
        leaf: &EndEntityCert<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
        peer: Peer,
    ) -> Result<(), webpki::Error> {
        let lists = self.revocations.as_ref().map(Revocations::current);
        self.check_with(lists.as_deref(), (leaf, intermediates), now, peer)
    }

    /// As [`Self::check`], of a peer in a handshake: known chains pass at once, revoked ones are counted.
    pub(crate) fn admit(
        &self,
        leaf: &EndEntityCert<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
        peer: Peer,
    ) -> Result<(), webpki::Error> {
        let lists = self.revocations.as_ref().map(Revocations::current);
        let key = (peer, bytes(&leaf.der(), intermediates));
        if self.known(lists.as_ref()).chains.get(&key).is_some_and(|valid| valid.contains(&now)) {
            return Ok(());
        }
        let checked = self.check_with(lists.as_deref(), (leaf, intermediates), now, peer);
        match (&checked, &self.revocations) {
            (Ok(()), _) => {
                if let Some(valid) = all_valid(&leaf.der(), intermediates) {
                    self.known(lists.as_ref()).remember(key, valid, now);
                }
            }
            (Err(webpki::Error::CertRevoked), Some(revocations)) => {
                revocations.count_rejection(peer);
            }
            (Err(_), _) => {}
        }
        checked
    }

    fn check_with(
        &self,
        lists: Option<&Lists>,
        (leaf, intermediates): (&EndEntityCert<'_>, &[CertificateDer<'_>]),
        now: UnixTime,
        peer: Peer,
    ) -> Result<(), webpki::Error> {
        let verify = |revocation: Option<RevocationOptions<'_>>| {
            leaf.verify_for_usage(
                self.algorithms.all,
                &self.anchors,
                intermediates,
                now,
                peer.usage(),
                revocation,
                None,
            )
            .map(|_| ())
        };
        match lists {
            None => verify(None),
            Some(lists) => lists.with_options(verify),
        }
    }

    /// What is known under these lists. Its holders only insert and remove, so a panic leaves nothing wrong.
    fn known(&self, lists: Option<&Arc<Lists>>) -> MutexGuard<'_, Known> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let same = match (&known.lists, lists) {
            (Some(then), Some(now)) => Arc::ptr_eq(then, now),
            (then, now) => then.is_none() && now.is_none(),
        };
        if !same {
            known.chains.clear();
            known.lists = lists.map(Arc::clone);
        }
        known
    }

    pub(crate) fn roots(&self) -> &[CertificateDer<'static>] {
        &self.roots
    }

    pub(crate) fn subjects(&self) -> &[DistinguishedName] {
        &self.subjects
    }

    pub(crate) fn algorithms(&self) -> &WebPkiSupportedAlgorithms {
        &self.algorithms
    }

    pub(crate) fn revocations(&self) -> Option<&Revocations> {
        self.revocations.as_ref()
    }
}

impl Known {
    fn remember(&mut self, key: (Peer, Box<[u8]>), valid: RangeInclusive<UnixTime>, now: UnixTime) {
        if self.chains.len() >= MOST_KNOWN {
            self.chains.retain(|_, valid| valid.contains(&now));
            if self.chains.len() >= MOST_KNOWN {
                // More peers than places: each of them was worth little.
                self.chains.clear();
            }
        }
        self.chains.insert(key, valid);
    }
}

/// The whole chain, in a form that no other has.
fn bytes(leaf: &CertificateDer<'_>, intermediates: &[CertificateDer<'_>]) -> Box<[u8]> {
    let chain = || std::iter::once(leaf).chain(intermediates);
    let mut bytes = Vec::with_capacity(chain().map(|cert| cert.len() + 8).sum());
    for cert in chain() {
        bytes.extend_from_slice(&cert.len().to_le_bytes());
        bytes.extend_from_slice(cert);
    }
    bytes.into_boxed_slice()
}

/// The time in which every certificate that was shown is valid. None, for safety, if one cannot be read.
fn all_valid(
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
) -> Option<RangeInclusive<UnixTime>> {
    let (mut from, mut to) = validity(leaf).ok()?;
    for cert in intermediates {
        let (begin, end) = validity(cert).ok()?;
        from = from.max(begin);
        to = to.min(end);
    }
    Some(unix(from)..=unix(to))
}

/// One [`Trust`] for each set of roots: all certificates of a mesh share what is known.
#[derive(Debug, Default)]
pub(crate) struct Trusts(Mutex<Vec<Weak<Trust>>>);

impl Trusts {
    pub(crate) fn of(
        &self,
        roots: &[CertificateDer<'static>],
        make: impl FnOnce() -> Result<Trust, webpki::Error>,
    ) -> Result<Arc<Trust>, webpki::Error> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let known = all.iter().filter_map(Weak::upgrade).find(|trust| *trust.roots == *roots);
        if let Some(known) = known {
            return Ok(known);
        }
        let new = Arc::new(make()?);
        all.retain(|trust| trust.strong_count() > 0);
        all.push(Arc::downgrade(&new));
        Ok(new)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{CLIENT, HOUR, TestCa, context, now};
    use std::time::{Duration, SystemTime};

    fn trust(ca: &TestCa, revocations: Option<Revocations>) -> Trust {
        let algorithms = context().provider.signature_verification_algorithms;
        Trust::new(std::slice::from_ref(&ca.certificate), algorithms, revocations).unwrap()
    }

    fn known(trust: &Trust) -> usize {
        trust.known.lock().unwrap().chains.len()
    }

    fn admit(
        trust: &Trust,
        chain: &[CertificateDer<'_>],
        now: SystemTime,
        peer: Peer,
    ) -> Result<(), webpki::Error> {
        let (leaf, rest) = chain.split_first().unwrap();
        trust.admit(&EndEntityCert::try_from(leaf).unwrap(), rest, unix(now), peer)
    }

    #[test]
    fn what_is_known_passes_only_while_the_full_check_would() {
        let ca = TestCa::new("mesh");
        let below = ca.intermediate("below", rcgen::KeyPair::generate().unwrap());
        let (_, issued) = below.issue(&[CLIENT], |_| ());
        let chain = [issued.chain[0].clone(), below.certificate.clone()];
        let trust = trust(&ca, None);
        let (leaf, _) = chain.split_first().unwrap();
        let leaf = EndEntityCert::try_from(leaf).unwrap();
        for _ in 0..2 {
            // The leaf is valid from an hour before to an hour after.
            for seconds in [0, 3599, 3600, 3601, 7200, 10_800, 10_801] {
                let at = now() - HOUR * 2 + Duration::from_secs(seconds);
                let full = trust.check(&leaf, &chain[1..], unix(at), Peer::Client);
                assert_eq!(admit(&trust, &chain, at, Peer::Client), full, "{seconds}");
            }
            let end = now() + HOUR;
            for (at, ok) in [(end, true), (end + Duration::from_secs(1), false), (now(), true)] {
                assert_eq!(admit(&trust, &chain, at, Peer::Client).is_ok(), ok, "{at:?}");
            }
        }
        assert_eq!(known(&trust), 1);
    }

    #[test]
    fn what_is_known_is_known_of_exactly_that() {
        let ca = TestCa::new("mesh");
        let (_, issued) = ca.issue(&[CLIENT], |params| {
            params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
        });
        let trust = trust(&ca, None);
        admit(&trust, &issued.chain, now(), Peer::Client).unwrap();
        admit(&trust, &issued.chain, now(), Peer::Server).unwrap_err();
        // One bit of the signature.
        let mut forged = issued.chain[0].to_vec();
        *forged.last_mut().unwrap() ^= 1;
        admit(&trust, &[forged.into()], now(), Peer::Client).unwrap_err();
        assert_eq!(known(&trust), 1, "failures are not remembered");
    }

    #[test]
    fn new_lists_end_all_knowledge() {
        let ca = TestCa::new("mesh");
        let (sender, revocations) = Revocations::new(Lists::default());
        let trust = trust(&ca, Some(revocations));
        let (_, issued) = ca.issue(&[CLIENT], |_| ());
        admit(&trust, &issued.chain, now(), Peer::Client).unwrap();
        sender.send_replace(Arc::new(crate::crl::tests::revoking(&ca, 7)));
        let refused = admit(&trust, &issued.chain, now(), Peer::Client);
        assert_eq!(refused, Err(webpki::Error::CertRevoked));
        sender.send_replace(Arc::default());
        admit(&trust, &issued.chain, now(), Peer::Client).unwrap();
    }

    #[test]
    fn is_bounded() {
        let mut all = Known::default();
        let at = |secs| UnixTime::since_unix_epoch(Duration::from_secs(secs));
        for i in 0..5_000_u64 {
            let key = (Peer::Client, i.to_le_bytes().as_slice().into());
            all.remember(key, at(i)..=at(i + 100), at(i));
            assert!(all.chains.len() <= MOST_KNOWN);
        }
        assert!(all.chains.len() >= 100, "those that are valid were not lost");
    }

    #[test]
    fn one_for_each_set_of_roots() {
        let (one, two) = (TestCa::new("one"), TestCa::new("two"));
        let context = context();
        let workload = |ca: &TestCa| ca.workload_with(&[CLIENT], &context, |_| ());
        let (a, b, c) = (workload(&one), workload(&one), workload(&two));
        assert!(Arc::ptr_eq(a.trust(), b.trust()));
        assert!(!Arc::ptr_eq(a.trust(), c.trust()));
        drop((a, b));
        workload(&two);
        workload(&TestCa::new("three"));
        assert_eq!(context.trusts.0.lock().unwrap().len(), 2, "the first is gone");
    }
}
