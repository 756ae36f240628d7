//! Asking for an address that is not known, and waiting until it is answered for.

use std::collections::HashMap;

use tokio::sync::{mpsc, oneshot};

/// Names on their way to the client's task. Who finds the queue full waits: it would wait anyway.
const QUEUE: usize = 100;

/// Asks for names. Clones ask the same client.
#[derive(Debug, Clone)]
pub struct Demand(mpsc::Sender<Ask>);

#[derive(Debug)]
struct Ask {
    name: String,
    answered: oneshot::Sender<()>,
}

/// The client is gone, and with it the hope of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unanswered;

impl std::fmt::Display for Unanswered {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the client of the control plane has ended")
    }
}

impl std::error::Error for Unanswered {}

impl Demand {
    /// Waits until the control plane has answered for a name, whether there is such a thing or not; what there is
    /// is in the state by then. How long to wait is the caller's decision: without a control plane, for ever.
    ///
    /// # Errors
    ///
    /// If nobody will answer any more.
    ///
    /// # Cancel safety
    ///
    /// Dropping it gives up waiting; the name may be asked for all the same.
    pub async fn ask(&self, name: String) -> Result<(), Unanswered> {
        let (answered, wait) = oneshot::channel();
        self.0.send(Ask { name, answered }).await.map_err(|_closed| Unanswered)?;
        wait.await.map_err(|_dropped| Unanswered)
    }
}

/// The other end: who waits for what.
#[derive(Debug)]
pub(crate) struct Waiting {
    asks: mpsc::Receiver<Ask>,
    waiting: HashMap<String, Vec<oneshot::Sender<()>>>,
}

pub(crate) fn channel() -> (Demand, Waiting) {
    let (sender, asks) = mpsc::channel(QUEUE);
    (Demand(sender), Waiting { asks, waiting: HashMap::new() })
}

impl Waiting {
    /// The next name that somebody asks for; never, once nobody can.
    ///
    /// # Cancel safety
    ///
    /// Nothing is lost.
    pub(crate) async fn next(&mut self) -> String {
        match self.asks.recv().await {
            Some(Ask { name, answered }) => {
                let waiting = self.waiting.entry(name.clone()).or_default();
                waiting.retain(|waiter| !waiter.is_closed());
                waiting.push(answered);
                name
            }
            None => std::future::pending().await,
        }
    }

    /// Releases those who wait for these names.
    pub(crate) fn answer(&mut self, names: impl IntoIterator<Item = String>) {
        for waiter in names.into_iter().filter_map(|name| self.waiting.remove(&name)).flatten() {
            // Whoever waited may have gone away.
            let _gone = waiter.send(());
        }
    }
}
