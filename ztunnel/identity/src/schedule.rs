//! What to fetch when. Pure: time and chance are arguments.
//!
//! ```text
//!            want              start                 landed: issued
//!   (none) ───────▶ Queued ───────────▶ Flying ────────────────────▶ Later (refresh)
//!                     ▲                   │                            │
//!                     │ due, or wanted    │ landed: failed             │
//!                     ├───────────────────┴──▶ Later (back-off) ───────┤
//!                     └────────────────── due, as Background ──────────┘
//! ```
//!
//! `forget` leads back to nothing from everywhere. A flight cannot be called back: it is remembered until
//! it lands, so that there is never a second one for its key, and what it brings is then not wanted.

use std::{
    cmp::Reverse,
    collections::{BTreeSet, HashMap},
    hash::Hash,
    time::Duration,
};
use tokio::time::Instant;

/// How urgent a fetch is.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Priority {
    /// A refresh, or another attempt.
    Background,
    /// It will be wanted soon.
    Warmup,
    /// A connection waits.
    RealTime,
}

/// The first delay after a failure. Then twice the last.
pub const FIRST_DELAY: Duration = Duration::from_secs(1);
/// The longest delay.
pub const LONGEST_DELAY: Duration = Duration::from_secs(150);
/// After failing for so long, every delay is the longest.
pub const GIVE_UP_HURRYING: Duration = Duration::from_mins(15);
/// The share of a delay by which chance changes it, either way.
pub const JITTER: f64 = 0.2;

/// A fetch to do now. To be handed back to [`Schedule::landed`].
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Start<K> {
    /// What to fetch.
    pub key: K,
    generation: u64,
}

/// How a fetch ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Landing {
    /// Well, and it wants to be refreshed then.
    Issued {
        /// When.
        refresh: Instant,
    },
    /// Badly.
    Failed {
        /// Chance, from -1 to 1.
        chance: f64,
        /// The end of what is held from before: the next attempt is no later.
        expires: Option<Instant>,
    },
}

/// The keys that are wanted, each in one state.
#[derive(Debug)]
pub struct Schedule<K> {
    most_flights: usize,
    jobs: HashMap<K, Job>,
    /// Highest priority first, then first come.
    queue: BTreeSet<(Reverse<Priority>, u64, K)>,
    later: BTreeSet<(Instant, u64, K)>,
    /// By key, the generation that a flight was started for. May be of a job that is forgotten.
    flights: HashMap<K, u64>,
    /// Counts jobs and entries; makes them distinct, and first come first served.
    next: u64,
}

#[derive(Debug)]
struct Job {
    generation: u64,
    phase: Phase,
    failing: Option<Failing>,
}

#[derive(Clone, Copy, Debug)]
enum Phase {
    Queued(Priority, u64),
    Flying,
    Later(Instant, u64),
}

#[derive(Clone, Copy, Debug)]
struct Failing {
    since: Instant,
    next_delay: Duration,
}

impl<K: Clone + Hash + Ord> Schedule<K> {
    /// An empty schedule that has at most so many flights at a time.
    #[must_use]
    pub fn new(most_flights: usize) -> Self {
        Self {
            most_flights,
            jobs: HashMap::new(),
            queue: BTreeSet::new(),
            later: BTreeSet::new(),
            flights: HashMap::new(),
            next: 0,
        }
    }

    /// Asks for `key`. Moves it up if it is queued; changes nothing if it is in flight, or was tried in vain
    /// and is waiting for its next attempt.
    pub fn want(&mut self, key: &K, priority: Priority) {
        let stamp = self.stamp();
        let Some(job) = self.jobs.get_mut(key) else {
            let job =
                Job { generation: stamp, phase: Phase::Queued(priority, stamp), failing: None };
            self.jobs.insert(key.clone(), job);
            self.queue.insert((Reverse(priority), stamp, key.clone()));
            return;
        };
        match job.phase {
            Phase::Queued(old, order) if old < priority => {
                self.queue.remove(&(Reverse(old), order, key.clone()));
                self.queue.insert((Reverse(priority), order, key.clone()));
                job.phase = Phase::Queued(priority, order);
            }
            Phase::Later(due, order) if job.failing.is_none() => {
                self.later.remove(&(due, order, key.clone()));
                self.queue.insert((Reverse(priority), stamp, key.clone()));
                job.phase = Phase::Queued(priority, stamp);
            }
            Phase::Queued(..) | Phase::Flying | Phase::Later(..) => {}
        }
    }

    /// The next fetch to begin, if one is due and there is room.
    pub fn start(&mut self, now: Instant) -> Option<Start<K>> {
        self.promote(now);
        if self.flights.len() >= self.most_flights {
            return None;
        }
        let entry = self.queue.iter().find(|(_, _, key)| !self.flights.contains_key(key))?.clone();
        self.queue.remove(&entry);
        let (_, _, key) = entry;
        let job = self.jobs.get_mut(&key)?;
        job.phase = Phase::Flying;
        self.flights.insert(key.clone(), job.generation);
        Some(Start { key, generation: job.generation })
    }

    /// When [`Self::start`] is worth calling again, if nothing else happens first.
    #[must_use]
    pub fn next_due(&self) -> Option<Instant> {
        if self.flights.len() >= self.most_flights {
            return None;
        }
        self.later.first().map(|(due, _, _)| *due)
    }

    /// Takes note of a flight's end. False if it is not wanted any more.
    pub fn landed(&mut self, flight: &Start<K>, landing: Landing, now: Instant) -> bool {
        if self.flights.get(&flight.key) == Some(&flight.generation) {
            self.flights.remove(&flight.key);
        }
        let order = self.stamp();
        let Some(job) = self.jobs.get_mut(&flight.key) else { return false };
        if job.generation != flight.generation {
            return false;
        }
        let due = match landing {
            Landing::Issued { refresh } => {
                job.failing = None;
                refresh
            }
            Landing::Failed { chance, expires } => {
                let next = now + job.fail(now, chance);
                expires.map_or(next, |end| next.min(end.max(now)))
            }
        };
        job.phase = Phase::Later(due, order);
        self.later.insert((due, order, flight.key.clone()));
        true
    }

    /// Wants `key` no more.
    pub fn forget(&mut self, key: &K) {
        match self.jobs.remove(key).map(|job| job.phase) {
            Some(Phase::Queued(priority, order)) => {
                self.queue.remove(&(Reverse(priority), order, key.clone()));
            }
            Some(Phase::Later(due, order)) => {
                self.later.remove(&(due, order, key.clone()));
            }
            Some(Phase::Flying) | None => {}
        }
    }

    /// When `key` is fetched next, if that is known.
    #[must_use]
    pub fn due(&self, key: &K) -> Option<Instant> {
        match self.jobs.get(key)?.phase {
            Phase::Later(due, _) => Some(due),
            Phase::Queued(..) | Phase::Flying => None,
        }
    }

    fn promote(&mut self, now: Instant) {
        while let Some((due, _, _)) = self.later.first()
            && *due <= now
            && let Some((_, order, key)) = self.later.pop_first()
        {
            if let Some(job) = self.jobs.get_mut(&key) {
                job.phase = Phase::Queued(Priority::Background, order);
                self.queue.insert((Reverse(Priority::Background), order, key));
            }
        }
    }

    fn stamp(&mut self) -> u64 {
        // At one a nanosecond, it lasts for centuries.
        self.next = self.next.wrapping_add(1);
        self.next
    }
}

impl Job {
    /// The delay before the next attempt.
    fn fail(&mut self, now: Instant, chance: f64) -> Duration {
        let failing = self.failing.get_or_insert(Failing { since: now, next_delay: FIRST_DELAY });
        if now.saturating_duration_since(failing.since) >= GIVE_UP_HURRYING {
            return LONGEST_DELAY;
        }
        let delay = failing.next_delay.mul_f64(JITTER.mul_add(chance.clamp(-1.0, 1.0), 1.0));
        failing.next_delay = (failing.next_delay * 2).min(LONGEST_DELAY);
        delay.min(LONGEST_DELAY)
    }
}

#[cfg(test)]
mod tests;
