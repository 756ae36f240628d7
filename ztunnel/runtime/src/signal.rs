//! When to stop: SIGTERM, SIGINT, or a request over the admin port.

use std::io;
use std::sync::Arc;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::Notify;

/// Asks the process to stop, from inside. Clones are one trigger.
#[derive(Clone, Debug, Default)]
pub struct Trigger(Arc<Notify>);

/// Who asked.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Cause {
    /// SIGTERM.
    Terminated,
    /// SIGINT.
    Interrupted,
    /// [`Trigger::fire`], which is what `/quitquitquit` does.
    Asked,
}

/// The signals, caught from the moment this is made.
#[derive(Debug)]
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
    trigger: Trigger,
}

impl Trigger {
    /// Makes a trigger that has not fired.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Asks for shutdown. Remembered if nobody listens yet.
    pub fn fire(&self) {
        self.0.notify_one();
    }
}

impl Signals {
    /// Catches SIGTERM and SIGINT from now on. Call it inside the control runtime, before anything is set up.
    ///
    /// # Errors
    /// When the kernel refuses the handlers.
    pub fn catch(trigger: Trigger) -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            trigger,
        })
    }

    /// Waits for the first request to stop.
    ///
    /// # Cancel safety
    /// Safe: no request is lost.
    pub async fn requested(&mut self) -> Cause {
        tokio::select! {
            _ = self.terminate.recv() => Cause::Terminated,
            _ = self.interrupt.recv() => Cause::Interrupted,
            () = self.trigger.0.notified() => Cause::Asked,
        }
    }

    /// Waits for a SIGINT, then ends the process with status 0 at once. Select it against the drain.
    pub async fn exit_on_interrupt(&mut self) {
        if self.interrupt.recv().await.is_some() {
            tracing::info!("interrupted again: exiting without draining");
            // Spec §0: a second SIGINT ends the process at once.
            std::process::exit(0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_trigger_fired_early_is_remembered() {
        let trigger = Trigger::new();
        trigger.clone().fire();
        assert_eq!(Signals::catch(trigger).unwrap().requested().await, Cause::Asked);
    }
}
