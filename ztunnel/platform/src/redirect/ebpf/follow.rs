//! Follows the addresses and devices of a pod, and writes again what somebody takes away of its rules and routes.
#![expect(unsafe_code, reason = "tokio wants a promise about the descriptor")]

use super::{
    Shared,
    rules::{Rules, Surroundings},
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use std::{
    error::Error,
    io,
    sync::{Arc, PoisonError, atomic::Ordering},
    time::Duration,
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    time::sleep,
};

/// Between two looks at a namespace that somebody else changes.
const STEP: Duration = Duration::from_millis(20);

/// `RTMGRP_LINK`, `RTMGRP_IPV4_IFADDR`, `RTMGRP_IPV4_ROUTE`, `RTMGRP_IPV6_IFADDR`, `RTMGRP_IPV6_ROUTE`, and the
/// groups of rules, 8 and 19.
const GROUPS: u32 = 0x1 | 0x10 | 0x40 | 0x100 | 0x400 | 1 << 7 | 1 << 18;

/// Waits for changes of a pod's namespace.
pub(in crate::redirect) struct Follower {
    socket: Socket,
    shared: Arc<Shared>,
}

impl Follower {
    pub(super) fn new(shared: Arc<Shared>) -> io::Result<Self> {
        let open = || {
            let mut socket = Socket::new(NETLINK_ROUTE)?;
            socket.bind(&SocketAddr::new(0, GROUPS))?;
            socket.set_non_blocking(true)?;
            Ok::<_, io::Error>(socket)
        };
        let socket = shared.netns.run(open)??;
        Ok(Self { socket, shared })
    }

    /// Never ends, unless the socket breaks.
    pub(in crate::redirect) async fn run(self) {
        let Self { socket, shared } = self;
        // SAFETY: the socket owns its descriptor, and keeps it until it is dropped with the registration.
        let events = match unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) } {
            Ok(events) => events,
            Err(error) => {
                tracing::error!(%error, "a pod's addresses are not followed");
                return;
            }
        };
        loop {
            // First without an event: something may have come before the subscription.
            match shared.refresh() {
                Ok(true) => {}
                // Not on this thread: it has connections to serve.
                Ok(false) => {
                    sleep(STEP).await;
                    continue;
                }
                Err(error) => {
                    tracing::warn!(error, "cannot follow a pod's addresses and devices");
                }
            }
            match events.readable().await {
                Ok(mut ready) => {
                    while !matches!(
                        ready.try_io(|socket| drain(socket.get_ref())),
                        Err(_) | Ok(Err(_))
                    ) {}
                }
                Err(error) => {
                    tracing::error!(%error, "a pod's addresses are no longer followed");
                    return;
                }
            }
        }
    }
}

/// What it says does not matter, only that it came. Too many at once (`ENOBUFS`) is an event as well.
fn drain(socket: &Socket) -> io::Result<()> {
    let mut room = [0_u8; 4096];
    match socket.recv(&mut room.as_mut_slice(), libc::MSG_TRUNC) {
        Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => Ok(()),
        result => result.map(drop),
    }
}

impl Shared {
    /// Learns addresses anew, and has rules and routes as they should be. Returns whether it could: not while somebody
    /// else changes the namespace.
    fn refresh(&self) -> Result<bool, Box<dyn Error + Send + Sync>> {
        let Some(_exclusive) = self.netns.try_exclusive()? else { return Ok(false) };
        self.netns.run(|| {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            if state.withdrawn {
                return Ok(true);
            }
            let mut rules = Rules::open()?;
            // Somebody else has withdrawn it (`ztunnel release`): what lives goes on, as if it had been us. Who only
            // takes the rules away has not.
            if self.is_detached() && !rules.capturing()? {
                tracing::info!("a pod's capture was withdrawn by somebody else");
                self.leaving.store(true, Ordering::Release);
                state.withdrawn = true;
                state.program = None;
                self.left.begin(self.netns.id(), self.found);
                return Ok(true);
            }
            let here = Surroundings::look()?;
            if let Some(program) = &mut state.program {
                program.learn(&here.addresses)?;
                if self.ingress {
                    program.guard(&here.devices)?;
                }
            }
            rules.escape(&self.probes)?;
            rules.routes(&here)?;
            rules.capture(self.dns)?;
            *self.own.write().unwrap_or_else(PoisonError::into_inner) = here.addresses;
            Ok(true)
        })?
    }
}
