//! Certificates for peers of our own, from the authority that the node proxies use.

use std::{fs, path::Path};

use anyhow::{Context, Result};
use rcgen::{
    CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType,
};

/// The authority in a folder like Istio's `cacerts` secret.
#[derive(Debug)]
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    chain: String,
    root: String,
}

/// A certificate with its key, all in PEM.
#[derive(Clone, Debug)]
pub struct Issued {
    /// The leaf and what is between it and the root.
    pub chain: String,
    /// The key, PKCS#8.
    pub key: String,
    /// The root.
    pub root: String,
}

impl Authority {
    /// Reads what a node proxy has made there, or what was put there for it.
    pub fn load(folder: &Path) -> Result<Self> {
        let read = |name: &str| {
            let path = folder.join(name);
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
        };
        let key = KeyPair::from_pem(&read("ca-key.pem")?).context("the authority's key")?;
        let certificate = read("ca-cert.pem")?;
        let issuer = Issuer::from_ca_cert_pem(&certificate, key).context("the authority")?;
        let root = read("root-cert.pem")?;
        // What stands between a leaf and the root: nothing, where the authority is the root.
        let chain = if certificate.trim() == root.trim() { String::new() } else { certificate };
        Ok(Self { issuer, chain, root })
    }

    /// A self-signed one that nobody trusts.
    pub fn stranger() -> Result<Self> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        let root = params.self_signed(&key)?.pem();
        Ok(Self { issuer: Issuer::new(params, key), chain: String::new(), root })
    }

    /// A certificate for this identity, if it is one (any URI, or none).
    pub fn issue(&self, identity: Option<&str>) -> Result<Issued> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        if let Some(identity) = identity {
            params.subject_alt_names = vec![SanType::URI(identity.try_into()?)];
        }
        params.key_usages =
            vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        let leaf = params.signed_by(&key, &self.issuer)?.pem();
        Ok(Issued {
            chain: format!("{leaf}{}", self.chain),
            key: key.serialize_pem(),
            root: self.root.clone(),
        })
    }
}
