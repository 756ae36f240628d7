//! Wall time as an input. Monotonic time is `tokio::time`, which tests can pause.

use std::fmt::Debug;
use std::time::{Duration, SystemTime};

/// Tells the wall time.
pub trait Clock: Debug + Send + Sync {
    /// The time now.
    fn now(&self) -> SystemTime;
}

/// The machine's clock.
#[expect(clippy::module_name_repetitions, reason = "used without its module")]
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    #[expect(clippy::disallowed_methods, reason = "the one place that reads the wall clock")]
    fn now(&self) -> SystemTime {
        SystemTime::now()
    }
}

/// A clock that stands still, for tests.
#[expect(clippy::module_name_repetitions, reason = "used without its module")]
#[derive(Clone, Copy, Debug)]
pub struct FixedClock(pub SystemTime);

impl FixedClock {
    /// Stands at so much time after the Unix epoch.
    #[must_use]
    pub fn at(since_epoch: Duration) -> Self {
        Self(SystemTime::UNIX_EPOCH + since_epoch)
    }
}

impl Clock for FixedClock {
    fn now(&self) -> SystemTime {
        self.0
    }
}
