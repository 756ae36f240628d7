//! Delays that grow.

use std::time::Duration;

/// A growing delay: `first`, then times `factor` at each call, never above `cap`, each spread by `jitter`.
#[derive(Clone, Debug)]
pub struct Backoff {
    first: Duration,
    cap: Duration,
    factor: f64,
    jitter: f64,
    next: Duration,
}

impl Backoff {
    /// `factor` below 1 counts as 1; `jitter` is a share, 0.2 means ±20 %, and is kept within 0 to 1.
    #[must_use]
    pub fn new(first: Duration, cap: Duration, factor: f64, jitter: f64) -> Self {
        let factor = if factor >= 1.0 { factor } else { 1.0 };
        let jitter = if jitter >= 0.0 { jitter.min(1.0) } else { 0.0 };
        Self { first, cap, factor, jitter, next: first.min(cap) }
    }

    /// The delay to wait now; the one after it is longer.
    pub fn next_delay(&mut self) -> Duration {
        let delay = self.next;
        // Saturates: a factor of any size cannot overflow a Duration.
        let grown = delay.as_secs_f64() * self.factor;
        self.next = Duration::try_from_secs_f64(grown).unwrap_or(self.cap).min(self.cap);
        if self.jitter == 0.0 {
            return delay;
        }
        let spread = 1.0 + self.jitter * (2.0 * fastrand::f64() - 1.0);
        Duration::try_from_secs_f64(delay.as_secs_f64() * spread).unwrap_or(delay)
    }

    /// Begins at the first delay again, after a success.
    pub fn reset(&mut self) {
        self.next = self.first.min(self.cap);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: fn(u64) -> Duration = Duration::from_millis;

    #[test]
    fn doubles_up_to_the_cap_and_starts_again() {
        let mut delay = Backoff::new(MS(10), MS(50), 2.0, 0.0);
        let seen: Vec<_> = (0..5).map(|_| delay.next_delay()).collect();
        assert_eq!(seen, [MS(10), MS(20), MS(40), MS(50), MS(50)]);
        delay.reset();
        assert_eq!(delay.next_delay(), MS(10));
    }

    #[test]
    fn jitter_stays_within_its_share() {
        let mut delay = Backoff::new(MS(1000), MS(1000), 2.0, 0.2);
        let seen: Vec<_> = (0..200).map(|_| delay.next_delay()).collect();
        assert!(seen.iter().all(|d| (MS(800)..=MS(1200)).contains(d)), "{seen:?}");
        assert!(seen.iter().any(|d| *d != MS(1000)));
    }

    #[test]
    fn absurd_arguments_do_no_harm() {
        let mut delay = Backoff::new(Duration::MAX, MS(5), f64::INFINITY, f64::NAN);
        assert_eq!((delay.next_delay(), delay.next_delay()), (MS(5), MS(5)));
    }
}
