//! The CA of the scripted control plane: it signs what is asked for, under roots that can change, and revokes.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use mesh_proto::istio::v1::auth::{IstioCertificateRequest, IstioCertificateResponse};
use prost_types::value::Kind;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams,
    CertificateSigningRequestParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SanType, SerialNumber,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use std::time::Duration;

/// One root, which signs leaves itself as istiod's does.
struct Root {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

/// Signs certificates.
pub(super) struct Signer {
    /// The newest signs; all are trusted.
    roots: Vec<Root>,
    /// How long a certificate lives.
    pub(super) validity: Duration,
    serial: u64,
    /// What was signed, by identity: the serial numbers.
    pub(super) signed: BTreeMap<String, Vec<u64>>,
    revoked: Vec<u64>,
}

fn root(name: &str) -> Result<Root> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let pem = params.self_signed(&key)?.pem();
    Ok(Root { issuer: Issuer::new(params, key), pem })
}

impl Signer {
    pub(super) fn new() -> Result<Self> {
        let (roots, signed) = (vec![root("root 1")?], BTreeMap::new());
        let validity = Duration::from_hours(24);
        Ok(Self { roots, validity, serial: 1000, signed, revoked: Vec::new() })
    }

    fn newest(&self) -> Result<&Root> {
        self.roots.last().context("there is a root")
    }

    /// All roots, in PEM.
    pub(super) fn roots(&self) -> String {
        self.roots.iter().map(|root| root.pem.as_str()).collect()
    }

    /// Signs with a new root from now on; the old ones stay trusted.
    pub(super) fn rotate(&mut self) -> Result<()> {
        let name = format!("root {}", self.roots.len() + 1);
        self.roots.push(root(&name)?);
        Ok(())
    }

    /// Trusts the newest root alone.
    pub(super) fn retire(&mut self) {
        let old = self.roots.len().saturating_sub(1);
        self.roots.drain(..old);
    }

    /// The control plane's own certificate and key.
    pub(super) fn server(
        &self,
        names: &[&str],
    ) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)> {
        let key = KeyPair::generate()?;
        let names: Vec<String> = names.iter().map(ToString::to_string).collect();
        let leaf = CertificateParams::new(names)?.signed_by(&key, &self.newest()?.issuer)?;
        let key = PrivateKeyDer::from_pem_slice(key.serialize_pem().as_bytes())?;
        Ok((vec![leaf.der().clone()], key))
    }

    /// Answers a request, as istiod does: the leaf, then all roots.
    pub(super) fn sign(
        &mut self,
        request: &IstioCertificateRequest,
    ) -> Result<IstioCertificateResponse> {
        let whom = request.metadata.as_ref().and_then(|m| m.fields.get("ImpersonatedIdentity"));
        let Some(Kind::StringValue(identity)) = whom.and_then(|value| value.kind.clone()) else {
            anyhow::bail!("nobody is impersonated");
        };
        self.serial += 1;
        let csr = CertificateSigningRequestParams::from_pem(&request.csr)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(identity.as_str().try_into()?)];
        params.serial_number = Some(SerialNumber::from(self.serial));
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        #[expect(clippy::disallowed_methods, reason = "certificates are judged by the real clock")]
        let now = std::time::SystemTime::now();
        // Clocks differ, and an X.509 time has no fraction.
        params.not_before = (now - Duration::from_secs(2)).into();
        params.not_after = (now + self.validity).into();
        let leaf = params.signed_by(&csr.public_key, &self.newest()?.issuer)?;
        self.signed.entry(identity).or_default().push(self.serial);
        Ok(IstioCertificateResponse { cert_chain: vec![leaf.pem(), self.roots()] })
    }

    /// Revokes all that an identity has, and returns the list of all that was revoked.
    pub(super) fn revoke(&mut self, identity: &str) -> Result<String> {
        self.revoked.extend(self.signed.get(identity).into_iter().flatten());
        #[expect(clippy::disallowed_methods, reason = "certificates are judged by the real clock")]
        let now = std::time::SystemTime::now();
        let revoked = |serial: &u64| RevokedCertParams {
            serial_number: SerialNumber::from(*serial),
            revocation_time: now.into(),
            reason_code: None,
            invalidity_date: None,
        };
        let list = CertificateRevocationListParams {
            this_update: now.into(),
            next_update: (now + Duration::from_hours(1)).into(),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: self.revoked.iter().map(revoked).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        Ok(list.signed_by(&self.newest()?.issuer)?.pem()?)
    }
}
