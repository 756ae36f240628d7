//! A connection's state under its lock.

use super::state::Inner;
use std::{
    sync::{Arc, Mutex, PoisonError},
    task::Waker,
};

/// A connection's state, shared by who drives it and who holds its streams.
#[derive(Debug)]
pub(crate) struct Shared(Mutex<Inner>);

impl Shared {
    pub(super) fn new(inner: Inner) -> Arc<Self> {
        Arc::new(Self(Mutex::new(inner)))
    }

    /// Does something to it, and wakes, with the lock given back, whom that concerns.
    pub(super) fn with<T>(&self, action: impl FnOnce(&mut Inner) -> T) -> T {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let result = action(&mut inner);
        if inner.wake.is_empty() {
            return result;
        }
        if inner.wake.len() == 1 {
            // The usual case keeps the list's memory.
            let only = inner.wake.pop();
            drop(inner);
            only.into_iter().for_each(Waker::wake);
        } else {
            let all = std::mem::take(&mut inner.wake);
            drop(inner);
            all.into_iter().for_each(Waker::wake);
        }
        result
    }
}
