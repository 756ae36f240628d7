//! The process's log, in the shapes Istio's tools expect (`spec/ztunnel.md` §11.4), as a `tracing` subscriber.
//!
//! Lines go through one bounded queue to one thread. When the queue is full they are dropped and counted, and a
//! line says how many: the data path never waits for a log (upstream's does).

mod filter;
mod format;
mod layer;
mod queue;
mod sink;

use std::io::{self, Write};
use std::sync::Arc;

use tracing::Subscriber;
use tracing_subscriber::layer::SubscriberExt;

pub use self::filter::{Filter, InvalidFilter};
pub(crate) use self::format::with_buffer;
pub use self::format::{Fields, Shape};
use self::layer::Printer;
pub(crate) use self::sink::Sink;
#[expect(clippy::module_name_repetitions, reason = "used without its module")]
pub use self::sink::{LogConfig, LogHandle};
use crate::clock::{Clock, SystemClock};

/// Makes this the log of the process, written to standard output.
///
/// # Errors
/// When there is one already, or the kernel gives no thread.
pub fn init(config: LogConfig) -> io::Result<LogHandle> {
    let (handle, subscriber) = build(config, io::stdout(), Arc::new(SystemClock))?;
    tracing::subscriber::set_global_default(subscriber).map_err(io::Error::other)?;
    Ok(handle)
}

/// Makes a log that is written elsewhere, and the subscriber that feeds it: for tests.
///
/// # Errors
/// When the kernel gives no thread.
pub fn build(
    config: LogConfig,
    output: impl Write + Send + 'static,
    clock: Arc<dyn Clock>,
) -> io::Result<(LogHandle, impl Subscriber + Send + Sync)> {
    let sink = Sink::start(config, output, clock)?;
    let subscriber = tracing_subscriber::registry().with(Printer::new(Arc::clone(&sink)));
    Ok((LogHandle::new(sink), subscriber))
}

#[cfg(test)]
mod tests;
