//! What this kind of capture keeps of a pod.

use super::{
    diag,
    follow::Follower,
    pins,
    program::Program,
    rules::{Rules, Surroundings},
    sysctls::{self, Found, Leaving},
};
use crate::{netns::Netns, redirect::CaptureError};
use std::{
    net::IpAddr,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, atomic::AtomicBool},
    time::Duration,
};

/// What this kind of capture knows of a pod.
#[derive(Clone, Debug)]
pub(in crate::redirect) struct Captured(pub(super) Arc<Shared>);

/// The same, shared by who serves the pod and who follows it.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) netns: Netns,
    pub(super) probes: Vec<IpAddr>,
    pub(super) ingress: bool,
    pub(super) dns: bool,
    pub(super) mark: u32,
    pub(super) generation: u32,
    pub(super) folder: Option<PathBuf>,
    pub(super) own: RwLock<Vec<IpAddr>>,
    /// How the namespace's sysctls were.
    pub(super) found: Found,
    pub(super) left: Arc<Leaving>,
    /// Capture is being withdrawn: connections to the application must survive that.
    pub(super) leaving: AtomicBool,
    pub(super) state: Mutex<State>,
}

/// What changes of it.
#[derive(Debug)]
pub(super) struct State {
    pub(super) program: Option<Program>,
    pub(super) withdrawn: bool,
    pub(super) finished: bool,
}

impl Shared {
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether somebody has detached the program. One that is not pinned nobody else finds.
    pub(super) fn is_detached(&self) -> bool {
        let ino = u32::try_from(self.netns.id().ino).ok();
        self.folder.as_deref().is_some_and(|folder| pins::namespace(folder) != ino)
    }

    /// Why its connections do not come to us, as far as can be seen.
    pub(super) fn uncaptured(&self) -> Result<Option<String>, CaptureError> {
        if self.state().withdrawn {
            return Ok(Some("its capture was withdrawn".to_owned()));
        }
        if self.is_detached() {
            return Ok(Some("its program is detached".to_owned()));
        }
        self.netns
            .run(|| Rules::open()?.missing(&Surroundings::look()?))
            .map_err(CaptureError::kernel("enter the pod's network namespace"))?
            .map_err(CaptureError::kernel("read the rules"))
    }

    /// Takes away what is left once nobody needs it, in the namespace of the thread. Returns whether it did.
    pub(super) fn finish_here(&self) -> Result<bool, CaptureError> {
        let mut rules =
            Rules::open().map_err(CaptureError::kernel("speak to the kernel's routing"))?;
        // Where the rule is there again, so is the pod.
        let again = rules.capturing().map_err(CaptureError::kernel("read the rules"))?;
        if !again && diag::is_held().map_err(CaptureError::kernel("list the pod's sockets"))? {
            return Ok(false);
        }
        // Somebody else of the same namespace still leaves.
        if !self.left.end(self.netns.id()) {
            return Ok(true);
        }
        if again {
            if !self.ingress {
                self.found.restore_one(sysctls::ACCEPT);
            }
            rules.end_leaving().map_err(CaptureError::kernel("take a rule away"))?;
        } else {
            rules.flush().map_err(CaptureError::kernel("take the rules away"))?;
            self.found.restore();
        }
        Ok(true)
    }
}

impl Captured {
    /// See [`Pod::yielded`].
    pub(in crate::redirect) fn yielded(
        &self,
        patience: Duration,
    ) -> impl Future<Output = ()> + Send + use<> {
        let shared = Arc::clone(&self.0);
        async move { shared.yielded(patience).await }
    }

    /// See [`Pod::follow`].
    pub(in crate::redirect) fn follower(&self) -> Option<Follower> {
        Follower::new(Arc::clone(&self.0))
            .inspect_err(|error| tracing::error!(%error, "a pod's addresses are not followed"))
            .ok()
    }
}
