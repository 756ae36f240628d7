//! What is said of one connection: its labels, its counters, its line in the access log.
//!
//! All is resolved once, when the connection is known. A [`Connection`] cannot be forgotten: it is
//! consumed by `finish`, and reports itself as cut by a drain where it is dropped instead.

mod labels;
mod line;

pub(crate) use labels::{Counters, Ends, Identity, Reporter, Source, name_labels};
pub(crate) use line::{advise, explain};

use crate::metrics::Metrics;
use mesh_core::{Failure, Reason};
use mesh_hbone::{Authority, Meter};
use mesh_runtime::access_log::AccessLog;
use std::{
    fmt,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};
use tokio::time::Instant;
use tracing::Level;

/// Where connections are reported.
#[derive(Clone, Debug)]
pub(crate) struct Telemetry {
    pub(crate) log: AccessLog,
    pub(crate) metrics: Arc<Metrics>,
}

/// A connection that is counted: `opened` now, `closed` when it is over.
pub(crate) struct Connection {
    telemetry: Telemetry,
    ends: Ends,
    place: Place,
    bytes: Bytes,
    began: Instant,
    over: bool,
}

/// The addresses of a connection.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    /// The client.
    pub(crate) source: SocketAddr,
    /// What was dialled; for an inbound tunnel the address that it came to.
    pub(crate) destination: SocketAddr,
    /// The authority of the CONNECT, in a tunnel.
    pub(crate) authority: Option<Authority>,
}

/// The bytes of a connection, counted while they move.
#[derive(Debug)]
pub(crate) struct Bytes {
    to_server: AtomicU64,
    to_client: AtomicU64,
    counters: Arc<Counters>,
}

impl Meter for Bytes {
    fn to_upstream(&self, bytes: u64) {
        self.to_server.fetch_add(bytes, Ordering::Relaxed);
        self.counters.received.increment(bytes);
    }

    fn to_downstream(&self, bytes: u64) {
        self.to_client.fetch_add(bytes, Ordering::Relaxed);
        self.counters.sent.increment(bytes);
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("place", &self.place).finish_non_exhaustive()
    }
}

impl Connection {
    /// Counts a connection as opened.
    pub(crate) fn open(telemetry: &Telemetry, ends: Ends, place: Place, began: Instant) -> Self {
        let counters = telemetry.metrics.counters(&ends);
        counters.opened.increment(1);
        telemetry.metrics.socket_in(ends.reporter);
        let bytes = Bytes { to_server: AtomicU64::new(0), to_client: AtomicU64::new(0), counters };
        let this = Self { telemetry: telemetry.clone(), ends, place, bytes, began, over: false };
        if this.telemetry.log.enabled(Level::DEBUG) {
            this.log(Level::DEBUG, "connection opened", None);
        }
        this
    }

    /// What counts its bytes.
    pub(crate) fn meter(&self) -> &Bytes {
        &self.bytes
    }

    /// Counts the connection as closed and writes its line.
    pub(crate) fn finish(mut self, outcome: Result<(), Failure>) {
        self.end(outcome.as_ref().err());
    }

    fn end(&mut self, failure: Option<&Failure>) {
        if std::mem::replace(&mut self.over, true) {
            return;
        }
        self.telemetry.metrics.socket_out(self.ends.reporter);
        let flag = failure.map_or("-", |failure| failure.reason.report().flag);
        self.telemetry.metrics.closed(&self.ends, &self.bytes.counters, flag);
        // A reset is how some applications say goodbye, and no fault of the mesh.
        let level = match failure.map(|failure| failure.reason) {
            None | Some(Reason::Reset) => Level::INFO,
            Some(_) => Level::ERROR,
        };
        if self.telemetry.log.enabled(level) {
            self.log(level, "connection complete", failure);
        }
    }
}

impl Drop for Connection {
    /// The failure path: whoever owned the task ended it.
    fn drop(&mut self) {
        self.end(Some(&Failure::local(Reason::Drained)));
    }
}
