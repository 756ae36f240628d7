//! Families of this crate. The first is Istio's, the others are ours.

use crate::{Certificates, crl::Revocations};
use mesh_runtime::metrics::{Labels, Registry};
use std::time::{Duration, SystemTime};

/// Upstream's, without the `_untracked_` one beside it: here every tunnel is tracked.
const REJECTIONS: &str = "istio_crl_policy_rejections";
const EXPIRY: &str = "istio_certificate_expiration_timestamp_seconds";
const FETCHES: &str = "istio_certificate_fetches";

/// Shows the certificates in `registry`. Computed at each scrape.
pub fn certificates(registry: &Registry, certificates: &Certificates) {
    let certificates = certificates.clone();
    registry.on_scrape(move |samples| {
        let (issued, failed) = certificates.fetches();
        for (result, count) in [("issued", issued), ("failed", failed)] {
            let help = "Certificates asked for, by result (ours).";
            samples.counter(FETCHES, help, &Labels::new([("result", result)]), number(count));
        }
        for (identity, end) in certificates.expiries() {
            let labels = Labels::new([("identity", identity.to_string().as_str())]);
            let end = end.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
            let help =
                "End of the validity of a workload's certificate, in seconds since 1970 (ours).";
            samples.gauge(EXPIRY, help, &labels, end.as_secs_f64());
        }
    });
}

/// Shows what revocation lists refused in `registry`.
pub fn revocations(registry: &Registry, revocations: &Revocations) {
    let revocations = revocations.clone();
    registry.on_scrape(move |samples| {
        let (source, destination) = revocations.rejections();
        for (reporter, count) in [("source", source), ("destination", destination)] {
            let help = "Handshakes and tunnels refused because a certificate is revoked.";
            let labels = Labels::new([("reporter", reporter)]);
            samples.counter(REJECTIONS, help, &labels, number(count));
        }
    });
}

/// Exact up to 2^53.
fn number(count: u64) -> f64 {
    count as f64
}
