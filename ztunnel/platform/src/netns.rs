//! Network namespaces: hold one, run a closure in one.
#![expect(unsafe_code, reason = "setns acts on the thread; only its wrapper is unsafe-free")]

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    sched::{CloneFlags, setns},
};
use std::{
    cell::{Cell, OnceCell},
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
        unix::fs::MetadataExt,
    },
    path::Path,
    sync::Arc,
};

/// A network namespace, held by descriptor: it lives as long as this does. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Netns {
    fd: Arc<OwnedFd>,
    id: NetnsId,
}

/// What two descriptors of one namespace have in common. The kernel reuses inode numbers at once, so it is
/// no key for what outlives the namespace.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[expect(clippy::module_name_repetitions, reason = "used without its module")]
pub struct NetnsId {
    /// The device of nsfs.
    pub dev: u64,
    /// The inode there.
    pub ino: u64,
}

thread_local! {
    /// Where this thread was when it first entered another namespace.
    static HOME: OnceCell<Netns> = const { OnceCell::new() };
    /// Where it is, if not at home.
    static AWAY: Cell<Option<(RawFd, NetnsId)>> = const { Cell::new(None) };
}

impl Netns {
    /// The namespace that this thread is in.
    ///
    /// # Errors
    ///
    /// Fails where `/proc` is not mounted, or without descriptors.
    pub fn current() -> io::Result<Self> {
        Self::open("/proc/thread-self/ns/net")
    }

    /// The namespace behind a path, such as `/run/netns/name`.
    ///
    /// # Errors
    ///
    /// Fails where there is no such file, or it is no network namespace.
    pub fn open(path: impl AsRef<Path>) -> io::Result<Self> {
        Self::from_fd(File::open(path)?.into())
    }

    /// The namespace behind a descriptor.
    ///
    /// # Errors
    ///
    /// Fails where the descriptor is something else.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        // SAFETY: this request takes no argument and writes nothing.
        let kind = unsafe { libc::ioctl(fd.as_raw_fd(), libc::NS_GET_NSTYPE) };
        if kind != libc::CLONE_NEWNET {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a network namespace"));
        }
        let file = File::from(fd);
        let meta = file.metadata()?;
        let id = NetnsId { dev: meta.dev(), ino: meta.ino() };
        Ok(Self { fd: Arc::new(file.into()), id })
    }

    /// Its identity.
    #[must_use]
    pub const fn id(&self) -> NetnsId {
        self.id
    }

    /// Runs `f` in the namespace, on this thread, and comes back. May be nested.
    ///
    /// What `f` opens stays in the namespace. `f` cannot await, by its type, and it must not start threads.
    /// Where there is no way back the process aborts: the thread would go on in the wrong namespace.
    ///
    /// # Errors
    ///
    /// Fails, without running `f`, where the namespace cannot be entered.
    pub fn run<T>(&self, f: impl FnOnce() -> T) -> io::Result<T> {
        let home = HOME.with(|home| match home.get() {
            Some(home) => Ok(home.clone()),
            None => Self::current().map(|now| home.get_or_init(|| now).clone()),
        })?;
        let before = AWAY.get();
        let here = before.map_or(home.id, |(_, id)| id);
        if here == self.id {
            return Ok(f());
        }
        setns(&self.fd, CloneFlags::CLONE_NEWNET)?;
        AWAY.set(Some((self.fd.as_raw_fd(), self.id)));
        // Goes back when it is dropped, so that a panic of `f` does not leave the thread there.
        let _back = Back { home, before };
        Ok(f())
    }
}

/// The namespace is ours to change, until this is dropped.
#[derive(Debug)]
#[must_use]
pub(crate) struct Exclusive(#[expect(dead_code, reason = "held, and not looked at")] Flock<File>);

impl Netns {
    /// Waits until nobody else, of this process or of another, changes the namespace by several steps. Not to be
    /// nested.
    ///
    /// # Errors
    ///
    /// Fails without descriptors, or where `/proc` is not mounted.
    pub(crate) fn exclusive(&self) -> io::Result<Exclusive> {
        loop {
            match Flock::lock(self.reopen()?, FlockArg::LockExclusive) {
                Ok(lock) => return Ok(Exclusive(lock)),
                Err((_, Errno::EINTR)) => {}
                Err((_, error)) => return Err(error.into()),
            }
        }
    }

    /// The same, without waiting: `None` where somebody does.
    ///
    /// # Errors
    ///
    /// As [`exclusive`](Self::exclusive).
    pub(crate) fn try_exclusive(&self) -> io::Result<Option<Exclusive>> {
        match Flock::lock(self.reopen()?, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Some(Exclusive(lock))),
            Err((_, Errno::EWOULDBLOCK | Errno::EINTR)) => Ok(None),
            Err((_, error)) => Err(error.into()),
        }
    }

    /// A lock is of who opened the file: our descriptor came from the CNI agent, as that of another node proxy did,
    /// and both would be one owner.
    fn reopen(&self) -> io::Result<File> {
        File::open(format!("/proc/self/fd/{}", self.fd.as_raw_fd()))
    }
}

struct Back {
    home: Netns,
    before: Option<(RawFd, NetnsId)>,
}

impl Drop for Back {
    fn drop(&mut self) {
        let result = match self.before {
            None => setns(&self.home.fd, CloneFlags::CLONE_NEWNET),
            Some((fd, _)) => {
                // SAFETY: the frame of the outer `run` borrows the namespace that owns it.
                setns(unsafe { BorrowedFd::borrow_raw(fd) }, CloneFlags::CLONE_NEWNET)
            }
        };
        if let Err(error) = result {
            tracing::error!(%error, "no way back from a pod's network namespace");
            std::process::abort();
        }
        AWAY.set(self.before);
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl PartialEq for Netns {
    fn eq(&self, other: &Self) -> bool {
        self.id == other.id
    }
}

impl Eq for Netns {}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sched::unshare;

    /// A fresh namespace, made on a thread that ends.
    fn fresh() -> Netns {
        std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            Netns::current().unwrap()
        })
        .join()
        .unwrap()
    }

    #[test]
    fn comes_back_from_nested_namespaces_and_from_panics() {
        let home = Netns::current().unwrap();
        let (a, b) = (fresh(), fresh());
        assert_ne!(a.id(), b.id());
        let seen = a.run(|| {
            let inner = b.run(|| Netns::current().unwrap()).unwrap();
            (Netns::current().unwrap(), inner)
        });
        assert_eq!(seen.unwrap(), (a.clone(), b));
        assert_eq!(Netns::current().unwrap(), home);
        let broken = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            a.run(|| panic!("on purpose"))
        }));
        assert!(broken.is_err());
        assert_eq!(Netns::current().unwrap(), home);
    }

    #[test]
    fn one_at_a_time_changes_a_namespace() {
        let (one, other) = (fresh(), fresh());
        // What a process got from another is the same open file.
        let again = one.clone();
        let held = one.exclusive().unwrap();
        assert!(again.try_exclusive().unwrap().is_none());
        assert!(other.try_exclusive().unwrap().is_some());
        drop(held);
        assert!(again.try_exclusive().unwrap().is_some());
    }

    #[test]
    fn other_descriptors_are_refused() {
        let file = File::open("/proc/self/status").unwrap();
        assert!(Netns::from_fd(file.into()).is_err());
        let mnt = File::open("/proc/self/ns/mnt").unwrap();
        assert!(Netns::from_fd(mnt.into()).is_err(), "a mount namespace");
    }
}
