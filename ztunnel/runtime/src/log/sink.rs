//! What the log's users share.

use std::fmt;
use std::io::{self, Write};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use tracing::Level;
use tracing::level_filters::LevelFilter;

use super::filter::{Filter, InvalidFilter};
use super::format::{Fields, Line, Shape};
use super::queue::Queue;
use crate::access_log::AccessLog;
use crate::clock::Clock;

/// What to log and how.
#[derive(Clone, Debug, Default)]
pub struct LogConfig {
    /// Which lines; `info` by default.
    pub filter: Filter,
    /// How they look.
    pub shape: Shape,
}

/// Changes the log while it runs. Clones are one log.
#[derive(Clone, Debug)]
pub struct LogHandle(Arc<Sink>);

pub(crate) struct Sink {
    pub(super) shape: Shape,
    pub(super) clock: Arc<dyn Clock>,
    start: Filter,
    filter: RwLock<Filter>,
    /// The level of target `access`, kept apart because it is asked once a connection.
    access: AtomicUsize,
    queue: Arc<Queue>,
}

/// The target of access lines.
const ACCESS: &str = "access";

impl Sink {
    pub(super) fn start(
        config: LogConfig,
        output: impl Write + Send + 'static,
        clock: Arc<dyn Clock>,
    ) -> io::Result<Arc<Self>> {
        let LogConfig { filter, shape } = config;
        let note_clock = Arc::clone(&clock);
        let note = move |count| {
            let mut text = String::new();
            let line = Line {
                time: note_clock.now(),
                level: Level::WARN,
                target: module_path!(),
                spans: "",
                message: "lines were dropped: the log is not read fast enough",
            };
            line.write(&mut text, shape, |fields| {
                fields.number("count", count);
            });
            text
        };
        Ok(Arc::new(Self {
            shape,
            clock,
            access: AtomicUsize::new(rank(filter.level(ACCESS))),
            start: filter.clone(),
            filter: RwLock::new(filter),
            queue: Queue::start(output, note)?,
        }))
    }

    pub(super) fn level(&self, target: &str) -> LevelFilter {
        self.filter.read().unwrap_or_else(PoisonError::into_inner).level(target)
    }

    pub(super) fn max_level(&self) -> LevelFilter {
        self.filter.read().unwrap_or_else(PoisonError::into_inner).max_level()
    }

    pub(super) fn push(&self, line: &str) {
        self.queue.push(line);
    }

    pub(crate) fn access_enabled(&self, level: Level) -> bool {
        rank(LevelFilter::from_level(level)) <= self.access.load(Ordering::Relaxed)
    }

    /// Writes one access line.
    pub(crate) fn access_line(
        &self,
        out: &mut String,
        level: Level,
        message: &str,
        fields: impl FnOnce(&mut Fields<'_>),
    ) {
        let line = Line { time: self.clock.now(), level, target: ACCESS, spans: "", message };
        line.write(out, self.shape, fields);
        self.queue.push(out);
    }
}

/// Off is 0, trace is 5.
fn rank(level: LevelFilter) -> usize {
    level.into_level().map_or(0, |level| match level {
        Level::ERROR => 1,
        Level::WARN => 2,
        Level::INFO => 3,
        Level::DEBUG => 4,
        Level::TRACE => 5,
    })
}

impl LogHandle {
    pub(super) const fn new(sink: Arc<Sink>) -> Self {
        Self(sink)
    }

    /// The filter in force.
    #[must_use]
    pub fn filter(&self) -> Filter {
        self.0.filter.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Adds clauses to the filter in force.
    ///
    /// # Errors
    /// When one is not understood; then nothing changes.
    pub fn add(&self, clauses: &str) -> Result<(), InvalidFilter> {
        let mut filter = self.filter();
        filter.add(clauses)?;
        self.set(filter);
        Ok(())
    }

    /// The filter that the process started with, in force again.
    pub fn reset(&self) {
        self.set(self.0.start.clone());
    }

    /// Adds clauses to the filter that the process started with.
    ///
    /// # Errors
    /// As [`add`](Self::add).
    pub fn reset_and_add(&self, clauses: &str) -> Result<(), InvalidFilter> {
        let mut filter = self.0.start.clone();
        filter.add(clauses)?;
        self.set(filter);
        Ok(())
    }

    fn set(&self, filter: Filter) {
        self.0.access.store(rank(filter.level(ACCESS)), Ordering::Relaxed);
        *self.0.filter.write().unwrap_or_else(PoisonError::into_inner) = filter;
        // Each place that logs remembers whether it is wanted.
        tracing::callsite::rebuild_interest_cache();
    }

    /// The access log, in the same shape, through the same queue.
    #[must_use]
    pub fn access_log(&self) -> AccessLog {
        AccessLog::new(Arc::clone(&self.0))
    }

    /// Lines dropped so far.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.0.queue.dropped()
    }

    /// Waits until all lines are out, at most so long; true if they are. Blocks: for the end of the process.
    pub fn flush(&self, deadline: Duration) -> bool {
        self.0.queue.flush(deadline)
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        self.queue.close();
    }
}

impl fmt::Debug for Sink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sink")
            .field("shape", &self.shape)
            .field("filter", &self.filter)
            .finish_non_exhaustive()
    }
}
