//! The hand-over to the process that follows (`spec/capture.md` §1.9): whoever closes a listener resets what it
//! has not accepted, and forgets who is about to connect.

use super::{Shared, diag};
use std::{io, time::Duration};
use tokio::time::{Instant, sleep};

/// Between two looks.
const STEP: Duration = Duration::from_millis(20);
/// Looks in a row that must show nobody waiting.
const QUIET: u32 = 3;
/// No half-open connection lives longer: `tcp_synack_retries` is 5.
const LIMIT: Duration = Duration::from_secs(65);

impl Shared {
    /// Ends when the listeners may be closed: a successor has the slots, and nobody waits for ours any more. Gives
    /// a successor `patience` to come: without one, what is dialled after the end waits for it, as SYN.
    pub(in crate::redirect) async fn yielded(&self, patience: Duration) {
        let began = Instant::now();
        loop {
            match self.succession() {
                Succession::None => return,
                Succession::Done => break,
                Succession::Open if began.elapsed() >= patience => return,
                Succession::Open => sleep(STEP).await,
            }
        }
        let (mut quiet, began) = (0, Instant::now());
        while quiet < QUIET && began.elapsed() < LIMIT {
            sleep(STEP).await;
            match self.is_anybody_waiting() {
                Ok(false) => quiet += 1,
                Ok(true) => quiet = 0,
                Err(error) => {
                    tracing::warn!(%error, "cannot see who waits for the listeners of a pod");
                    return;
                }
            }
        }
        tracing::debug!(took = ?began.elapsed(), "a pod's listeners are handed over");
    }

    fn succession(&self) -> Succession {
        let state = self.state();
        match &state.program {
            Some(program) if program.is_pinned() && !state.withdrawn => {
                if program.is_taken_over(self.generation) {
                    Succession::Done
                } else {
                    Succession::Open
                }
            }
            // Nobody can find what is not pinned, and nobody comes to what is withdrawn.
            Some(_) | None => Succession::None,
        }
    }

    fn is_anybody_waiting(&self) -> io::Result<bool> {
        let sockets = self.netns.run(diag::tcp)??;
        Ok(sockets.iter().any(|socket| socket.is_waiting_for(self.mark)))
    }
}

/// Whether somebody follows.
enum Succession {
    /// Nobody can.
    None,
    /// Nobody has yet.
    Open,
    /// Somebody has.
    Done,
}
