//! Invariants of what parses peers' bytes, for `tests/fuzz`: each function may be given anything, and panics
//! where a promise is broken.

use crate::{
    crl::Lists,
    verify::{explain, peer_identity},
};
use mesh_core::SpiffeId;
use rustls_pki_types::CertificateDer;

/// A peer's leaf, as DER: an identity that is found prints as text that parses to itself.
///
/// # Panics
///
/// If it does not.
pub fn peer_certificate(bytes: &[u8]) {
    let leaf = [CertificateDer::from(bytes)];
    if let Some(identity) = peer_identity(&leaf) {
        assert_eq!(identity.to_string().parse::<SpiffeId>().as_ref(), Ok(&identity));
    }
}

/// A file of revocation lists: whatever it is, parsing ends, and what is wrong has words.
///
/// # Panics
///
/// If an error has no text.
pub fn revocation_lists(bytes: &[u8]) {
    if let Err(error) = Lists::parse(bytes) {
        assert!(!error.to_string().is_empty());
    }
}

/// An alert of a peer's: every one has one line of words.
///
/// # Panics
///
/// If it has none, or several.
pub fn alert(bytes: &[u8]) {
    for byte in bytes {
        let text = explain(&rustls::Error::AlertReceived((*byte).into()));
        assert!(!text.is_empty() && !text.contains('\n'));
    }
}
