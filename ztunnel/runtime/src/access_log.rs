//! One line a connection, in the log's shape and queue, without the cost of a `tracing` event.

use std::cell::Cell;
use std::sync::Arc;

use tracing::Level;

pub use crate::log::Fields;
use crate::log::{Sink, with_buffer};

thread_local! {
    static LINE: Cell<String> = const { Cell::new(String::new()) };
}

/// Writes lines of target `access`. Clones are one log.
#[derive(Clone, Debug)]
pub struct AccessLog(Option<Arc<Sink>>);

impl AccessLog {
    pub(crate) const fn new(sink: Arc<Sink>) -> Self {
        Self(Some(sink))
    }

    /// A log that wants nothing.
    #[must_use]
    pub const fn disabled() -> Self {
        Self(None)
    }

    /// Whether the filter wants lines of this level. Cheap: one atomic load.
    #[must_use]
    pub fn enabled(&self, level: Level) -> bool {
        self.0.as_ref().is_some_and(|sink| sink.access_enabled(level))
    }

    /// Writes a line if its level is wanted; fields appear in the order in which the closure names them. Never
    /// waits: a full queue drops the line and counts it.
    pub fn line(&self, level: Level, message: &str, fields: impl FnOnce(&mut Fields<'_>)) {
        if let Some(sink) = self.0.as_ref().filter(|sink| sink.access_enabled(level)) {
            with_buffer(&LINE, |out| sink.access_line(out, level, message, fields));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{self, Write};
    use std::sync::{Mutex, PoisonError};
    use std::time::Duration;

    use super::*;
    use crate::clock::FixedClock;
    use crate::log::{LogConfig, LogHandle, Shape, build};

    #[derive(Clone, Default)]
    struct Memory(Arc<Mutex<Vec<u8>>>);

    impl Write for Memory {
        fn write(&mut self, text: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(text);
            Ok(text.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn log(filter: &str, shape: Shape) -> (LogHandle, Memory) {
        let memory = Memory::default();
        let clock = FixedClock::at(Duration::from_micros(1_795_315_899_947_229));
        let config = LogConfig { filter: filter.parse().unwrap(), shape };
        let (handle, _) = build(config, memory.clone(), Arc::new(clock)).unwrap();
        (handle, memory)
    }

    fn written(handle: &LogHandle, memory: &Memory) -> String {
        assert!(handle.flush(Duration::from_secs(10)));
        String::from_utf8(memory.0.lock().unwrap().clone()).unwrap()
    }

    fn complete(fields: &mut Fields<'_>) {
        fields
            .addr("src.addr", "10.1.0.2:53080")
            .str("src.workload", "web-a")
            .addr("dst.hbone_addr", "10.1.0.2:8080")
            .str("direction", "outbound")
            .number("bytes_sent", 77)
            .milliseconds("duration", Duration::from_micros(3999))
            .text("error", format_args!("denied by: {}", "a/b"));
    }

    #[test]
    fn plain_lines_are_as_upstream_writes_them() {
        let (handle, memory) = log("info", Shape::Plain);
        handle.access_log().line(Level::ERROR, "connection complete", complete);
        assert_eq!(
            written(&handle, &memory),
            "2026-11-22T02:51:39.947229Z\terror\taccess\tconnection complete\tsrc.addr=10.1.0.2:53080 \
             src.workload=\"web-a\" dst.hbone_addr=10.1.0.2:8080 direction=\"outbound\" bytes_sent=77 \
             duration=\"3ms\" error=\"denied by: a/b\"\n"
        );
    }

    #[test]
    fn json_lines_are_flat() {
        let (handle, memory) = log("info", Shape::Json);
        handle.access_log().line(Level::INFO, "connection complete", complete);
        assert_eq!(
            written(&handle, &memory),
            "{\"level\":\"info\",\"time\":\"2026-11-22T02:51:39.947229Z\",\"scope\":\"access\",\
             \"message\":\"connection complete\",\"src.addr\":\"10.1.0.2:53080\",\
             \"src.workload\":\"web-a\",\"dst.hbone_addr\":\"10.1.0.2:8080\",\"direction\":\"outbound\",\
             \"bytes_sent\":77,\"duration\":\"3ms\",\"error\":\"denied by: a/b\"}\n"
        );
    }

    #[test]
    fn the_filter_decides_and_can_change() {
        let (handle, memory) = log("info", Shape::Plain);
        let access = handle.access_log();
        assert!(access.enabled(Level::INFO) && !access.enabled(Level::DEBUG));
        access.line(Level::DEBUG, "connection opened", |_| panic!("not wanted"));
        handle.add("access=debug").unwrap();
        access.line(Level::DEBUG, "opened", |_| {});
        handle.add("access:off").unwrap();
        assert!(!access.enabled(Level::ERROR));
        handle.reset();
        assert!(access.enabled(Level::INFO) && !access.enabled(Level::DEBUG));
        assert!(written(&handle, &memory).ends_with("\tdebug\taccess\topened\t\n"));
        assert!(!AccessLog::disabled().enabled(Level::ERROR));
    }
}
