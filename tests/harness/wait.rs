//! Waiting: on a condition, until a deadline.

use std::time::Duration;

use anyhow::{Result, bail};
use tokio::time::Instant;

/// How long the machine may take over what should be quick: it may have two busy cores.
pub const SOON: Duration = Duration::from_secs(20);

/// Lets `pause` pass. For loops that look again, never to give something time.
#[expect(clippy::disallowed_methods, reason = "the harness has no worker to block")]
pub fn pause(pause: Duration) {
    std::thread::sleep(pause);
}

/// Asks until there is an answer, every 10 to 50 ms; an error ends it at once.
pub fn until<T>(
    what: &str,
    deadline: Duration,
    mut ask: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let (start, mut step) = (Instant::now(), Duration::from_millis(10));
    loop {
        if let Some(answer) = ask()? {
            return Ok(answer);
        }
        if start.elapsed() > deadline {
            bail!("waited {} s in vain for {what}", deadline.as_secs());
        }
        pause(step);
        step = (step * 5 / 4).min(Duration::from_millis(50));
    }
}

/// Tries until it succeeds; at the deadline, fails with the last reason.
pub fn retry<T>(
    what: &str,
    deadline: Duration,
    mut attempt: impl FnMut() -> Result<T>,
) -> Result<T> {
    let (start, mut step) = (Instant::now(), Duration::from_millis(10));
    loop {
        match attempt() {
            Ok(answer) => return Ok(answer),
            Err(why) if start.elapsed() > deadline => {
                return Err(why.context(format!("waited {} s for {what}", deadline.as_secs())));
            }
            Err(_) => {}
        }
        pause(step);
        step = (step * 5 / 4).min(Duration::from_millis(50));
    }
}
