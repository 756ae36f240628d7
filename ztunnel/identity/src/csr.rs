//! Keys and certificate signing requests.

use mesh_core::SpiffeId;
use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256, SanType};
use rustls_pki_types::{CertificateSigningRequestDer, PrivateKeyDer};
use std::{error::Error, fmt};

/// A PKCS#10 request: ECDSA P-256, an empty subject, one critical SAN with the identity's URI.
pub struct Csr(rcgen::CertificateSigningRequest);

/// The request could not be made.
#[derive(Debug)]
pub struct RequestError(rcgen::Error);

impl Csr {
    /// Makes a new key, and asks for a certificate for `identity` with it.
    ///
    /// # Errors
    ///
    /// Returns an error if the system has no randomness to give.
    pub fn generate(identity: &SpiffeId) -> Result<(PrivateKeyDer<'static>, Self), RequestError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(RequestError)?;
        let params = params(identity).map_err(RequestError)?;
        let csr = params.serialize_request(&key).map_err(RequestError)?;
        Ok((key.into(), Self(csr)))
    }

    /// The request as DER.
    #[must_use]
    pub fn der(&self) -> &CertificateSigningRequestDer<'static> {
        self.0.der()
    }

    /// The request as PEM.
    ///
    /// # Errors
    ///
    /// None that is known; rcgen's encoder has one.
    pub fn pem(&self) -> Result<String, RequestError> {
        self.0.pem().map_err(RequestError)
    }
}

/// What requests and leaves have in common. rcgen marks the SAN as critical because the subject is empty,
/// as RFC 5280, section 4.1.2.6 asks.
pub(crate) fn params(identity: &SpiffeId) -> Result<CertificateParams, rcgen::Error> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![SanType::URI(identity.to_string().try_into()?)];
    Ok(params)
}

impl fmt::Debug for Csr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Csr")
    }
}

impl fmt::Display for RequestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a certificate signing request could not be made")
    }
}

impl Error for RequestError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        Some(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use x509_parser::{
        certification_request::X509CertificationRequest,
        extensions::{GeneralName, ParsedExtension},
        oid_registry::{OID_EC_P256, OID_SIG_ECDSA_WITH_SHA256},
        prelude::FromDer as _,
    };

    #[test]
    fn asks_for_exactly_what_istiod_signs() {
        let id = "spiffe://cluster.local/ns/shop/sa/web";
        let (key, csr) = Csr::generate(&id.parse().unwrap()).unwrap();
        assert!(matches!(key, PrivateKeyDer::Pkcs8(_)));
        assert!(csr.pem().unwrap().starts_with("-----BEGIN CERTIFICATE REQUEST-----\n"));

        let (rest, csr) = X509CertificationRequest::from_der(csr.der()).unwrap();
        assert!(rest.is_empty());
        csr.verify_signature().unwrap();
        assert_eq!(csr.signature_algorithm.algorithm, OID_SIG_ECDSA_WITH_SHA256);
        let info = &csr.certification_request_info;
        assert_eq!(info.subject.iter().count(), 0, "subject");
        let curve = info.subject_pki.algorithm.parameters.as_ref().unwrap();
        assert_eq!(curve.as_oid().unwrap(), OID_EC_P256);

        let [attribute] = info.attributes() else { panic!("one attribute") };
        let x509_parser::cri_attributes::ParsedCriAttribute::ExtensionRequest(request) =
            attribute.parsed_attribute()
        else {
            panic!("an extension request")
        };
        let [extension] = &request.extensions[..] else { panic!("one extension") };
        assert!(extension.critical);
        let ParsedExtension::SubjectAlternativeName(san) = extension.parsed_extension() else {
            panic!("a SAN")
        };
        assert_eq!(san.general_names, [GeneralName::URI(id)]);
    }

    #[test]
    fn a_new_key_each_time() {
        let id = "spiffe://cluster.local/ns/shop/sa/web".parse().unwrap();
        let (one, _) = Csr::generate(&id).unwrap();
        let (two, _) = Csr::generate(&id).unwrap();
        assert_ne!(one.secret_der(), two.secret_der());
    }
}
