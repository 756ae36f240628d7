//! The line of a connection in the access log, in Istio's fields and order.

use super::{Connection, Ends, Reporter, Source};
use mesh_core::{Failure, Reason, Side, Workload};
use mesh_runtime::access_log::Fields;
use std::{error::Error, fmt::Write as _, sync::atomic::Ordering};
use tracing::Level;

impl Connection {
    pub(super) fn log(&self, level: Level, message: &str, failure: Option<&Failure>) {
        self.telemetry.log.line(level, message, |fields| {
            source(fields, self);
            destination(fields, self);
            let to_server = self.bytes.to_server.load(Ordering::Relaxed);
            let to_client = self.bytes.to_client.load(Ordering::Relaxed);
            // "Sent" and "received" are the reporting workload's.
            let (direction, sent, received) = match self.ends.reporter {
                Reporter::Source => ("outbound", to_server, to_client),
                Reporter::Destination => ("inbound", to_client, to_server),
            };
            fields.str("direction", direction);
            fields.number("bytes_sent", sent);
            fields.number("bytes_recv", received);
            fields.milliseconds("duration", self.began.elapsed());
            if let Some(failure) = failure {
                fields.str("error", &explain(failure));
            }
        });
    }
}

/// The causes of a failure, outermost first; then whose side it is on, and what to do.
pub(crate) fn explain(failure: &Failure) -> String {
    let mut text = String::new();
    let mut cause: Option<&dyn Error> = failure.source();
    if cause.is_none() {
        let _infallible = write!(text, "{failure}");
    }
    while let Some(error) = cause {
        let printed = error.to_string();
        // Some errors print their own cause as well.
        if !text.ends_with(&printed) {
            let _infallible = write!(text, "{}{printed}", if text.is_empty() { "" } else { ": " });
        }
        cause = error.source();
    }
    advise(text, failure.side, failure.reason)
}

/// Istio's words for what happened, and behind them whose side it is on and what to do.
pub(crate) fn advise(mut text: String, side: Side, reason: Reason) -> String {
    let _infallible = write!(text, " ({side}: {})", reason.remedy());
    text
}

/// What a workload is called in the log: its pod's name, else its canonical service.
fn name(workload: &Workload) -> &str {
    let pod = workload.name.as_str();
    if pod.is_empty() { workload.canonical_name.as_str() } else { pod }
}

fn known(fields: &mut Fields<'_>, key: &'static str, text: &str) {
    if !text.is_empty() {
        fields.str(key, text);
    }
}

fn source(fields: &mut Fields<'_>, connection: &Connection) {
    let source = &connection.ends.source;
    let identity = connection.ends.source_identity();
    fields.addr("src.addr", connection.place.source);
    let (workload, namespace, cluster) = match source {
        Source::Workload(w) => (name(w), w.identity.namespace.as_str(), w.cluster.as_str()),
        Source::Told(baggage) => {
            let text = |value: &'_ Option<String>| value.clone().unwrap_or_default();
            known(fields, "src.workload", &text(&baggage.service_name));
            known(fields, "src.namespace", &text(&baggage.namespace));
            if let Some(identity) = identity {
                fields.text("src.identity", identity);
            }
            known(fields, "src.cluster", &text(&baggage.cluster));
            return;
        }
        Source::Unknown => ("", "", ""),
    };
    known(fields, "src.workload", workload);
    known(fields, "src.namespace", namespace);
    if let Some(identity) = identity {
        fields.text("src.identity", identity);
    }
    known(fields, "src.cluster", cluster);
}

fn destination(fields: &mut Fields<'_>, connection: &Connection) {
    let Ends { destination, service, mutual_tls, .. } = &connection.ends;
    fields.addr("dst.addr", connection.place.destination);
    if let Some(authority) = &connection.place.authority {
        fields.addr("dst.hbone_addr", authority);
    }
    if let Some(service) = service {
        fields.str("dst.service", service.key.hostname.as_str());
    }
    if let Some(workload) = destination {
        known(fields, "dst.workload", name(workload));
        fields.str("dst.namespace", workload.identity.namespace.as_str());
        if *mutual_tls {
            fields.text("dst.identity", &workload.identity);
        }
        known(fields, "dst.cluster", workload.cluster.as_str());
    }
}
