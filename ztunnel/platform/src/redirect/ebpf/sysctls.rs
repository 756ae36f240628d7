//! The sysctls of a pod's namespace that capture needs otherwise than they were, and how they were.

use super::sys;
use std::{
    collections::HashMap,
    io,
    sync::{Mutex, MutexGuard, PoisonError},
};

use crate::netns::NetnsId;

/// Accepted sockets, and the answers before there is one, inherit the packet's mark. Both families.
pub(super) const ACCEPT: &str = "net/ipv4/tcp_fwmark_accept";
/// So do the kernel's own answers, such as a reset.
pub(super) const REFLECT: &str = "net/ipv4/fwmark_reflect";
/// The same for IPv6.
pub(super) const REFLECT_V6: &str = "net/ipv6/fwmark_reflect";
/// What waits for a listener that is closed goes to another one of its `SO_REUSEPORT` group. Both families.
pub(super) const MIGRATE: &str = "net/ipv4/tcp_migrate_req";

/// All, in the order of the bits of [`Found`]. New ones go to the end: pins outlive the process.
const ALL: [&str; 4] = [ACCEPT, REFLECT, REFLECT_V6, MIGRATE];
/// The bit that tells a record from an empty one.
const RECORDED: u32 = 1 << 31;

/// How they were before capture.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Found(u32);

impl Found {
    /// How they are now in the namespace of the thread. One that does not exist counts as off.
    pub(super) fn here() -> Self {
        let is_on = |key: &&str| sys::read_sysctl(key).is_ok_and(|value| value != "0");
        let bits = ALL.iter().zip(0..).filter(|(key, _)| is_on(key));
        Self(bits.fold(RECORDED, |word, (_, bit)| word | (1 << bit)))
    }

    /// As it was kept; none where nothing was.
    pub(super) const fn from_word(word: u32) -> Option<Self> {
        if word & RECORDED == 0 { None } else { Some(Self(word)) }
    }

    /// To be kept.
    pub(super) const fn word(self) -> u32 {
        self.0
    }

    /// Makes them so again in the namespace of the thread.
    pub(super) fn restore(self) {
        for (key, bit) in ALL.iter().zip(0..) {
            let value = if self.0 & (1 << bit) == 0 { "0" } else { "1" };
            set_or_warn(key, value);
        }
    }

    /// The same, for one of them.
    pub(super) fn restore_one(self, wanted: &str) {
        for (key, bit) in ALL.iter().zip(0..).filter(|(key, _)| **key == wanted) {
            set_or_warn(key, if self.0 & (1 << bit) == 0 { "0" } else { "1" });
        }
    }
}

fn set_or_warn(key: &str, value: &str) {
    match sys::sysctl(key, value) {
        // Of an older kernel, or one without IPv6.
        Err(error) if error.kind() == io::ErrorKind::NotFound => (),
        Err(error) => tracing::warn!(%error, key, value, "a sysctl of a pod cannot be set"),
        Ok(()) => (),
    }
}

/// Namespaces whose capture is withdrawn while connections of theirs go on: how often, because a pod may be
/// enrolled and withdrawn again meanwhile, and what was found before the first time.
#[derive(Debug, Default)]
pub(super) struct Leaving(Mutex<HashMap<NetnsId, (usize, Found)>>);

impl Leaving {
    fn all(&self) -> MutexGuard<'_, HashMap<NetnsId, (usize, Found)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was found in a namespace that is being left.
    pub(super) fn found(&self, netns: NetnsId) -> Option<Found> {
        self.all().get(&netns).map(|(_, found)| *found)
    }

    /// One more pod leaves.
    pub(super) fn begin(&self, netns: NetnsId, found: Found) {
        self.all().entry(netns).or_insert((0, found)).0 += 1;
    }

    /// One has left. Returns whether it was the last.
    pub(super) fn end(&self, netns: NetnsId) -> bool {
        let mut all = self.all();
        let Some((count, _)) = all.get_mut(&netns) else { return true };
        *count = count.saturating_sub(1);
        let last = *count == 0;
        if last {
            all.remove(&netns);
        }
        last
    }
}
