//! Whether everything has come once.

use tokio::sync::watch;

/// Whether everything that is subscribed to as a whole has come once and is in effect. Until then, what is not in the
/// state cannot be told from what has not come yet: a destination that is unknown may be one of the mesh, and a policy
/// that is not there may deny. What was refused of it does not count against it.
#[derive(Clone, Debug)]
pub struct Known(watch::Receiver<bool>);

impl Known {
    /// For a source that has everything before anybody asks.
    #[must_use]
    pub fn already() -> Self {
        Self(watch::channel(true).1)
    }

    /// When this says so.
    pub(crate) fn of(sender: &watch::Sender<bool>) -> Self {
        Self(sender.subscribe())
    }

    /// Whether it has.
    #[must_use]
    pub fn is(&self) -> bool {
        *self.0.borrow()
    }

    /// Waits until it has: for ever, where the source has ended before.
    ///
    /// # Cancel safety
    ///
    /// May be dropped at any time.
    pub async fn wait(&self) {
        if self.0.clone().wait_for(|known| *known).await.is_err() {
            std::future::pending().await
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn it_is_known_from_when_it_is_said() {
        Known::already().wait().await;
        let sender = watch::Sender::new(false);
        let known = Known::of(&sender);
        assert!(!known.is());
        let say = async {
            tokio::task::yield_now().await;
            sender.send_replace(true);
        };
        tokio::join!(known.wait(), say);
        drop(sender);
        assert!(known.is(), "and stays so");
        known.wait().await;
    }
}
