//! Asking the control plane for what a connection needs and nobody has needed before.

use mesh_core::{Failure, Key, Reason};
use std::{fmt, time::Duration};
use tokio::time::timeout;

/// How long a connection waits for an answer. Istio's proxy waits for ever, and so does what it holds; here the
/// control plane may be away for as long as a restart takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// Asks, where resources come on demand; elsewhere all that there is comes by itself.
#[derive(Clone, Debug, Default)]
pub(crate) struct Demand(Option<mesh_xds::Demand>);

/// There is no answer.
#[derive(Debug)]
struct NotAnswered(Key);

impl fmt::Display for NotAnswered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the control plane was asked for {} and has not answered within {} s: check that it is connected",
            self.0,
            PATIENCE.as_secs(),
        )
    }
}

impl std::error::Error for NotAnswered {}

impl Demand {
    /// Asks this client of the control plane.
    pub(crate) fn of(client: mesh_xds::Demand) -> Self {
        Self(Some(client))
    }

    /// Waits until the control plane has answered for this; what there is is in the state by then.
    ///
    /// # Errors
    ///
    /// Returns a failure where no answer comes.
    pub(crate) async fn ask(&self, key: &Key) -> Result<(), Failure> {
        let Some(client) = &self.0 else { return Ok(()) };
        let fail = || Failure::local_because(Reason::NoUpstream, NotAnswered(key.clone()));
        timeout(PATIENCE, client.ask(key.to_string()))
            .await
            .map_err(|_elapsed| fail())?
            .map_err(|_stopped| Failure::local(Reason::Drained))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn where_everything_comes_by_itself_nobody_waits() {
        let key = Key::Workload("c//Pod/ns/a".parse().unwrap());
        Demand::default().ask(&key).await.unwrap();
        let why = NotAnswered(key).to_string();
        assert!(why.contains("c//Pod/ns/a"), "{why}");
    }
}
