//! TLS handshakes of tunnels: counted by result, told in words where they fail, and followed where they do not,
//! because a certificate may be revoked while its tunnel lives.

use crate::{metrics::Metrics, telemetry::Reporter};
use mesh_core::{Failure, Side};
use mesh_hbone::HandshakeError;
use mesh_identity::verify::{self, Fault};
use std::{error::Error, fmt};

/// Counts a handshake that went well.
pub(crate) fn done(metrics: &Metrics, reporter: Reporter) {
    metrics.handshake(reporter, "ok");
}

/// Counts a handshake that failed, and says why in words for an operator.
pub(crate) fn failed(metrics: &Metrics, reporter: Reporter, error: HandshakeError) -> Failure {
    let result = match &error {
        HandshakeError::Tls(error) => Fault::of(error).as_str(),
        HandshakeError::Io(_) => "closed",
        HandshakeError::Late => "timeout",
    };
    metrics.handshake(reporter, result);
    let HandshakeError::Tls(error) = error else {
        return match reporter {
            Reporter::Source => error.upstream(),
            Reporter::Destination => error.downstream(),
        };
    };
    let side = match reporter {
        Reporter::Source => Side::Upstream,
        Reporter::Destination => Side::Downstream,
    };
    let source = Some(Box::new(Explained(verify::explain(&error))) as _);
    Failure { side, reason: Fault::of(&error).reason(), source }
}

/// Counts how the handshake of an inbound tunnel failed, if it was that which did.
pub(crate) fn inbound_failed(metrics: &Metrics, failure: Failure) -> Failure {
    let Failure { side, reason, source } = failure;
    let rebuilt = |source| Failure { side, reason, source };
    match source.map(|source| source.downcast::<HandshakeError>()) {
        Some(Ok(error)) => failed(metrics, Reporter::Destination, *error),
        Some(Err(other)) => rebuilt(Some(other)),
        None => rebuilt(None),
    }
}

/// In Istio's words, with ours behind them.
#[derive(Debug)]
struct Explained(String);

impl fmt::Display for Explained {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "tls handshake error: {}", self.0)
    }
}

impl Error for Explained {}

/// The tunnel was closed because of the certificates of its peer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Revoked;

impl fmt::Display for Revoked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("connection closed: a certificate of the peer's chain has been revoked")
    }
}

impl Error for Revoked {}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_core::Reason;
    use mesh_runtime::metrics::Registry;
    use rustls::{CertificateError, Error};

    #[test]
    fn each_end_of_a_handshake_has_a_word() {
        let registry = Registry::new();
        let metrics = Metrics::new(&registry, "test");
        let io = || HandshakeError::Io(std::io::ErrorKind::UnexpectedEof.into());
        let revoked = Error::InvalidCertificate(CertificateError::Revoked);
        for (name, error, reporter, side, reason, word) in [
            (
                "revoked",
                HandshakeError::Tls(revoked),
                Reporter::Source,
                Side::Upstream,
                Reason::Revoked,
                "revoked",
            ),
            (
                "none",
                HandshakeError::Tls(Error::NoCertificatesPresented),
                Reporter::Destination,
                Side::Downstream,
                Reason::Tls,
                "no_certificate",
            ),
            ("closed", io(), Reporter::Source, Side::Upstream, Reason::Connect, "closed"),
            (
                "late",
                HandshakeError::Late,
                Reporter::Destination,
                Side::Downstream,
                Reason::Tls,
                "timeout",
            ),
        ] {
            let failure = failed(&metrics, reporter, error);
            assert_eq!((failure.side, failure.reason), (side, reason), "{name}");
            let text = failure.source.unwrap().to_string();
            assert!(text.starts_with("tls handshake error: "), "{text}");
            let reporter = reporter.as_str();
            let line =
                format!(r#"istio_tls_handshakes_total{{reporter="{reporter}",result="{word}"}} 1"#);
            assert!(registry.render().contains(&line), "{line} in {}", registry.render());
        }
    }

    #[test]
    fn what_is_no_handshake_is_not_counted() {
        let registry = Registry::new();
        let metrics = Metrics::new(&registry, "test");
        let failure = inbound_failed(&metrics, Failure::downstream(Reason::Http2, Revoked));
        assert_eq!(failure.reason, Reason::Http2);
        assert!(failure.source.unwrap().downcast_ref::<Revoked>().is_some());
        assert!(!registry.render().contains("istio_tls_handshakes_total"));
        let late = HandshakeError::Late.downstream();
        assert_eq!(inbound_failed(&metrics, late).reason, Reason::Tls);
        assert!(registry.render().contains(r#"result="timeout"} 1"#));
    }
}
