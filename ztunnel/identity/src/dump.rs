//! The section `certificates` of `/config_dump`, as istioctl reads it.

use crate::manager::State;
use mesh_core::SpiffeId;
use rustls_pki_types::CertificateDer;
use serde_json::{Value, json};
use std::{error::Error as _, time::SystemTime};
use x509_parser::prelude::{ASN1Time, FromDer as _, X509Certificate};

pub(crate) fn identity(identity: &SpiffeId, state: &State, now: SystemTime) -> Value {
    let words = match (state.valid_at(now), &state.failure) {
        (Some(_), _) => "Available".to_owned(),
        (None, Some(failure)) => match failure.error.source() {
            Some(cause) => format!("Unavailable: {}: {cause}", failure.error),
            None => format!("Unavailable: {}", failure.error),
        },
        (None, None) => "Initializing".to_owned(),
    };
    let (chain, roots) = match &state.current {
        Some(current) => (certificates(current.chain()), certificates(current.roots())),
        None => (json!([]), json!([])),
    };
    json!({
        "identity": identity.to_string(),
        "state": words,
        "certChain": chain,
        "rootCerts": roots,
    })
}

fn certificates(certificates: &[CertificateDer<'_>]) -> Value {
    certificates.iter().map(certificate).collect()
}

fn certificate(der: &CertificateDer<'_>) -> Value {
    let mut value = json!({ "pem": base64(pem(der).as_bytes()) });
    // A root of the CA's that webpki took and x509-parser does not keeps its PEM at least.
    if let Ok((_, parsed)) = X509Certificate::from_der(der)
        && let Value::Object(fields) = &mut value
    {
        let validity = parsed.validity();
        fields.insert("serialNumber".into(), parsed.tbs_certificate.serial.to_string().into());
        fields.insert("validFrom".into(), rfc3339(validity.not_before).into());
        fields.insert("expirationTime".into(), rfc3339(validity.not_after).into());
    }
    value
}

fn rfc3339(time: ASN1Time) -> String {
    let time = time.to_datetime();
    format!(
        "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}Z",
        time.year(),
        u8::from(time.month()),
        time.day(),
        time.hour(),
        time.minute(),
        time.second()
    )
}

/// RFC 7468.
pub(crate) fn pem(der: &[u8]) -> String {
    let mut text = "-----BEGIN CERTIFICATE-----\n".to_owned();
    // 48 bytes make a line of 64.
    for line in der.chunks(48) {
        text.push_str(&base64(line));
        text.push('\n');
    }
    text.push_str("-----END CERTIFICATE-----\n");
    text
}

/// RFC 4648, section 4.
fn base64(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let byte = |i: usize| u32::from(group.get(i).copied().unwrap_or(0));
        let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
        for i in 0..4_usize {
            let letter = (bits >> (18 - 6 * i) & 0x3f) as usize;
            let letter = LETTERS.get(letter).copied().unwrap_or(b'=');
            text.push(char::from(if i <= group.len() { letter } else { b'=' }));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_of_rfc_4648() {
        for (bytes, text) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
        assert_eq!(base64(&[0xff, 0xef, 0xbe]), "/+++");
    }
}
