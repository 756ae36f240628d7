//! Named gates: the process is ready when every gate has been opened by an explicit call.

use std::collections::BTreeSet;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// What the process still waits for.
#[derive(Clone, Debug, Default)]
pub struct Readiness(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    gates: Mutex<Gates>,
    opened: Notify,
}

#[derive(Debug, Default)]
struct Gates {
    next: u64,
    closed: BTreeSet<(&'static str, u64)>,
}

/// One thing to wait for. Closed until [`set`](Self::set) says otherwise, and closed again when dropped: a
/// task that dies is not ready.
#[derive(Debug)]
pub struct Gate {
    readiness: Readiness,
    name: &'static str,
    id: u64,
    released: bool,
}

impl Readiness {
    /// Ready, as long as nobody asks for a gate.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a gate, closed.
    #[must_use = "a dropped gate stays closed"]
    pub fn gate(&self, name: &'static str) -> Gate {
        let mut gates = self.lock();
        // A task that comes back takes the place of its predecessor.
        gates.closed.retain(|(other, _)| *other != name);
        let id = gates.next;
        gates.next = gates.next.wrapping_add(1);
        gates.closed.insert((name, id));
        drop(gates);
        Gate { readiness: self.clone(), name, id, released: false }
    }

    /// Names of the gates still closed, sorted; empty when ready.
    #[must_use]
    pub fn pending(&self) -> Vec<String> {
        let gates = self.lock();
        let names: BTreeSet<&str> = gates.closed.iter().map(|(name, _)| *name).collect();
        names.into_iter().map(str::to_owned).collect()
    }

    /// Whether no gate of this name is closed.
    #[must_use]
    pub fn is_open(&self, name: &str) -> bool {
        !self.lock().closed.iter().any(|(closed, _)| *closed == name)
    }

    /// Waits until no gate of this name is closed.
    ///
    /// # Cancel safety
    ///
    /// May be dropped at any time.
    pub async fn opened(&self, name: &str) {
        loop {
            let mut opened = pin!(self.0.opened.notified());
            opened.as_mut().enable();
            if self.is_open(name) {
                return;
            }
            opened.await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Gates> {
        self.0.gates.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Gate {
    /// Opens or closes the gate.
    pub fn set(&self, open: bool) {
        let mut gates = self.readiness.lock();
        if open {
            gates.closed.remove(&(self.name, self.id));
            self.readiness.0.opened.notify_waiters();
        } else {
            gates.closed.insert((self.name, self.id));
        }
    }

    /// Opens the gate for good: there is nothing left that could close it.
    pub fn release(mut self) {
        self.set(true);
        self.released = true;
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        if !self.released {
            self.set(false);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn opens_only_by_an_explicit_call() {
        let ready = Readiness::new();
        let workloads = ready.gate("workload proxy manager");
        let state = ready.gate("state manager");
        assert_eq!(ready.pending(), ["state manager", "workload proxy manager"]);
        state.set(true);
        workloads.set(true);
        assert!(ready.pending().is_empty());
        workloads.set(false);
        assert_eq!(ready.pending(), ["workload proxy manager"]);
    }

    #[tokio::test]
    async fn who_waits_for_a_gate_is_told() {
        let ready = Readiness::new();
        let gate = ready.gate("state manager");
        let _other = ready.gate("proxy");
        assert!(!ready.is_open("state manager") && ready.is_open("nobody's"));
        let open = async {
            tokio::task::yield_now().await;
            gate.set(true);
        };
        tokio::join!(ready.opened("state manager"), open);
        ready.opened("state manager").await;
    }

    #[test]
    fn dropping_is_not_ready_but_releasing_is() {
        let ready = Readiness::new();
        ready.gate("proxy").release();
        assert!(ready.pending().is_empty());
        let dns = ready.gate("dns proxy");
        dns.set(true);
        drop(dns);
        assert_eq!(ready.pending(), ["dns proxy"]);
        ready.gate("dns proxy").release();
        assert!(ready.pending().is_empty(), "its successor takes its place");
    }
}
