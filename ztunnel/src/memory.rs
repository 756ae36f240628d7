//! What many connections have left behind goes back to the kernel once they have gone; and so does the code that only
//! the start needs, once that is over.

use crate::metrics::Metrics;
use mesh_platform::memory::{give_back_freed, let_go_of_code};
use mesh_runtime::{ready::Readiness, tasks::Draining};
use std::{sync::Arc, time::Duration};
use tokio::time::sleep;

/// How often it is looked at how many live.
const LOOK: Duration = Duration::from_secs(10);

/// How often it is looked at whether the start is over.
const STARTING: Duration = Duration::from_secs(1);

/// Fewer than these are not worth it.
const MANY: usize = 1000;

/// The most connections that lived at a time.
#[derive(Debug, Default)]
struct Highest(usize);

impl Highest {
    /// Whether they are many fewer now, and less than half. If so, it begins anew.
    const fn has_fallen(&mut self, live: usize) -> bool {
        if live > self.0 {
            self.0 = live;
        }
        let fallen = self.0 - live > MANY && live < self.0.div_ceil(2);
        if fallen {
            self.0 = live;
        }
        fallen
    }
}

/// Looks until the stop begins.
pub(crate) async fn watch(metrics: Arc<Metrics>, ready: Readiness, draining: Draining) {
    let (mut highest, mut look) = (Highest::default(), STARTING);
    loop {
        tokio::select! {
            () = sleep(look) => {}
            () = draining.stopping() => return,
        }
        if look == STARTING && ready.pending().is_empty() {
            look = LOOK;
            if let Err(error) = let_go_of_code() {
                tracing::debug!(%error, "the code of the start stays in memory");
            }
        }
        if highest.has_fallen(metrics.live()) {
            give_back_freed();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn falls_by_many_and_by_half() {
        let mut highest = Highest::default();
        for (live, fallen) in [
            (0, false),
            (1000, false),
            // Not many fewer.
            (0, false),
            (1001, false),
            (1, false),
            // More than a thousand, and all of them.
            (0, true),
            // It began anew.
            (0, false),
            (10_000, false),
            (8_000, false),
            // Half is not less than half.
            (5_000, false),
            (4_999, true),
            // Of the 4999 that it began with.
            (4_000, false),
            (2_499, true),
            (1_498, false),
            (3_000, false),
            (1_400, true),
            (usize::MAX, false),
            (usize::MAX / 2, true),
        ] {
            assert_eq!(highest.has_fallen(live), fallen, "{live}");
        }
    }
}
