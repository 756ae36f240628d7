//! One line a check.

use std::time::Duration;

use anyhow::Result;
use serde_json::json;
use tokio::time::Instant;

/// What has been checked so far.
pub(crate) struct Report {
    json: bool,
    held: u32,
    failed: u32,
    start: Instant,
}

impl Report {
    pub(crate) fn new(json: bool) -> Self {
        Self { json, held: 0, failed: 0, start: Instant::now() }
    }

    /// Says what is being done now.
    pub(crate) fn stage(&self, what: &str) {
        if !self.json {
            println!("{:>5.1}s  {what}", self.start.elapsed().as_secs_f32());
        }
    }

    /// Does the check and says what came of it.
    pub(crate) fn check(&mut self, name: &str, check: impl FnOnce() -> Result<String>) {
        let (ok, observed) = match check() {
            Ok(observed) => (true, observed),
            Err(why) => (false, format!("{why:#}")),
        };
        if ok {
            self.held += 1;
        } else {
            self.failed += 1;
        }
        if self.json {
            let (name, observed) = (json!(name), json!(observed));
            println!("{{\"check\":{name},\"ok\":{ok},\"observed\":{observed}}}");
        } else {
            let mark = if ok { "ok  " } else { "FAIL" };
            println!("        {mark} {name:<24} {observed}");
        }
    }

    pub(crate) fn failed(&self) -> u32 {
        self.failed
    }

    /// The sum of it.
    pub(crate) fn summary(&self, took: Duration) -> String {
        let (held, failed) = (self.held, self.failed);
        format!("{held} of {} checks held, in {:.0} s", held + failed, took.as_secs_f32())
    }

    pub(crate) fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }
}
