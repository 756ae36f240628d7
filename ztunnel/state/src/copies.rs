//! Two copies of one value: readers use the one that is shown, the writer changes the other one, shows it, and
//! does the same to the first as soon as its last reader has left.
//!
//! ```text
//! writer    change hidden · show it · wait for the last reader of the other · change that too
//! reader    which is shown? · enter it, or look again · is it still shown? or look again · ask · leave
//! ```
//!
//! A reader only ever tries a lock. It finds it taken where the copy was hidden after it had looked which one is
//! shown, and so the other one is there for it: it waits for no change, nor for a writer that has lost its core in
//! the middle of one. It looks once more when it is in, because the copy may have been hidden, changed and left
//! again in between: what it then saw would not be shown yet.

use std::{
    fmt, hint,
    sync::{
        OnceLock, RwLock, RwLockReadGuard,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

/// The time since some moment in the past.
pub(crate) type Clock = fn() -> Duration;

/// The two.
pub(crate) struct Copies<T> {
    left: RwLock<T>,
    right: RwLock<T>,
    is_right_shown: AtomicBool,
    clock: OnceLock<Clock>,
    longest_wait: AtomicU64,
}

impl<T> Copies<T> {
    /// Of what is twice the same.
    pub(crate) fn of([left, right]: [T; 2]) -> Self {
        Self {
            left: RwLock::new(left),
            right: RwLock::new(right),
            is_right_shown: AtomicBool::new(false),
            clock: OnceLock::new(),
            longest_wait: AtomicU64::new(0),
        }
    }

    /// The clock that says how long readers have waited. The first one stays.
    pub(crate) fn measure_by(&self, clock: Clock) {
        let _first = self.clock.set(clock);
    }

    const fn copy(&self, is_right: bool) -> &RwLock<T> {
        if is_right { &self.right } else { &self.left }
    }

    pub(crate) fn read<R>(&self, ask: impl FnOnce(&T) -> R) -> R {
        let mut refused = None;
        loop {
            let is_right = self.is_right_shown.load(Ordering::SeqCst);
            if let Some(copy) = self.enter(is_right) {
                if let Some(since) = refused {
                    self.waited(since);
                }
                return ask(&copy);
            }
            refused = refused.or_else(|| Some(self.now()));
            hint::spin_loop();
        }
    }

    /// This copy, if it is still shown. Poisoned is none that is: see [`change`](Self::change).
    fn enter(&self, is_right: bool) -> Option<RwLockReadGuard<'_, T>> {
        let copy = self.copy(is_right).try_read().ok()?;
        (self.is_right_shown.load(Ordering::SeqCst) == is_right).then_some(copy)
    }

    /// Makes the same change to both, one after the other. For one writer: with two, the copies would come to
    /// differ.
    pub(crate) fn change(&self, mut change: impl FnMut(&mut T)) {
        // A change that panics leaves the copy that it was made to hidden for good, and readers with the other.
        let invariant = "a writer whose change has panicked makes no other one";
        let shown = self.is_right_shown.load(Ordering::SeqCst);
        change(&mut self.copy(!shown).write().expect(invariant));
        self.is_right_shown.store(!shown, Ordering::SeqCst);
        // Here it waits for readers, and new ones do not come: theirs is the other one.
        change(&mut self.copy(shown).write().expect(invariant));
    }

    fn now(&self) -> Duration {
        self.clock.get().map_or(Duration::ZERO, |clock| clock())
    }

    fn waited(&self, since: Duration) {
        let time = self.now().saturating_sub(since);
        let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.longest_wait.fetch_max(nanos, Ordering::Relaxed);
    }

    /// The longest that a reader had to look again; zero where none had to, or nothing measures it.
    pub(crate) fn longest_wait(&self) -> Duration {
        Duration::from_nanos(self.longest_wait.load(Ordering::Relaxed))
    }
}

impl<T: fmt::Debug> fmt::Debug for Copies<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.read(|shown| f.debug_tuple("Copies").field(shown).finish())
    }
}

#[cfg(test)]
mod tests;
