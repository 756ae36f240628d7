//! Istio's `CreateCertificate`.
