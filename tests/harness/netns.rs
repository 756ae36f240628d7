//! Network namespaces with names, as `ip netns` makes them, without it.

use std::{
    fs::{self, File},
    os::fd::{AsFd, BorrowedFd},
    panic,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
};

use anyhow::{Context, Result};
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
};

use crate::netlink::Netlink;

const FOLDER: &str = "/run/netns";
const NONE: Option<&str> = None;

/// A network namespace. Clones are the same one.
#[derive(Clone, Debug)]
pub struct Namespace {
    name: String,
    file: Arc<File>,
}

impl Namespace {
    /// Makes one, with its loopback device up, IPv6 usable at once, and cubic: the machine's default
    /// may be another, and figures would not compare.
    pub fn create(name: &str) -> Result<Self> {
        let target = path(name);
        let _lock = share_folder()?;
        allow_cubic()?;
        File::create_new(&target).with_context(|| format!("cannot make {}", target.display()))?;
        let made = on_own_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET).context("cannot make a network namespace")?;
            // There first, for as long as addresses may come: without, an address is of no use for
            // seconds, until nobody has objected to it.
            for (key, value) in [
                ("ipv6/conf/all/accept_dad", "0"),
                ("ipv6/conf/default/accept_dad", "0"),
                ("ipv6/conf/default/router_solicitations", "0"),
                ("ipv4/tcp_congestion_control", "cubic"),
            ] {
                write_sysctl(key, value)?;
            }
            Netlink::open()?.up("lo")?;
            mount(Some("/proc/thread-self/ns/net"), &target, NONE, MsFlags::MS_BIND, NONE)
                .context("cannot name a network namespace")
        });
        if let Err(why) = made {
            let _gone = fs::remove_file(&target);
            return Err(why);
        }
        Self::open(name)
    }

    /// The one that has this name.
    pub fn open(name: &str) -> Result<Self> {
        let path = path(name);
        let file = File::open(&path).with_context(|| format!("no namespace {name}"))?;
        Ok(Self { name: name.to_owned(), file: Arc::new(file) })
    }

    /// The one that this process is in. It has no name of its own, and can be entered while the process lives.
    pub fn of_process(process: u32) -> Result<Self> {
        Self::open(&format!("/proc/{process}/ns/net"))
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where its name lies: for a process to enter by.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        path(&self.name)
    }

    /// Runs this inside, on a thread of its own; sockets made there stay there.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        on_own_thread(|| {
            self.enter()?;
            f()
        })
    }

    /// Moves the calling thread in, for good.
    pub fn enter(&self) -> Result<()> {
        setns(self.file.as_fd(), CloneFlags::CLONE_NEWNET)
            .with_context(|| format!("cannot enter {}", self.name))
    }

    /// Sets one of `net.…`, its dots written as slashes.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        self.run(|| write_sysctl(key, value))
    }

    /// Its descriptor.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Names that begin so.
pub fn names(prefix: &str) -> Vec<String> {
    let entries = fs::read_dir(FOLDER).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    names.filter(|name| name.starts_with(prefix)).collect()
}

/// Takes the name away; the namespace goes with its last process.
pub fn remove(name: &str) {
    let path = path(name);
    // Somebody may have mounted over it.
    while umount2(&path, MntFlags::MNT_DETACH).is_ok() {}
    let _gone = fs::remove_file(&path);
}

fn path(name: &str) -> PathBuf {
    Path::new(FOLDER).join(name)
}

fn write_sysctl(key: &str, value: &str) -> Result<()> {
    let path = format!("/proc/sys/net/{key}");
    fs::write(&path, value).with_context(|| format!("cannot write {value} to {path}"))
}

/// A namespace's default may only be what the machine allows everybody, and only the machine's own namespace
/// has the list: where that is not this one, setting cubic says so.
fn allow_cubic() -> Result<()> {
    let path = "/proc/sys/net/ipv4/tcp_allowed_congestion_control";
    let Ok(allowed) = fs::read_to_string(path) else { return Ok(()) };
    if allowed.split_whitespace().any(|name| name == "cubic") {
        return Ok(());
    }
    fs::write(path, format!("{} cubic", allowed.trim())).context("cannot allow cubic")
}

/// Makes the folder what `ip netns` would make of it (a shared mount), and keeps others from doing the
/// same at the same time.
fn share_folder() -> Result<Flock<File>> {
    fs::create_dir_all(FOLDER).context("cannot make /run/netns")?;
    let lock = Flock::lock(File::open(FOLDER)?, FlockArg::LockExclusive)
        .map_err(|(_, why)| why)
        .context("cannot lock /run/netns")?;
    let share = || mount(NONE, FOLDER, NONE, MsFlags::MS_SHARED | MsFlags::MS_REC, NONE);
    match share() {
        Err(Errno::EINVAL) => {
            let how = MsFlags::MS_BIND | MsFlags::MS_REC;
            mount(Some(FOLDER), FOLDER, NONE, how, NONE).context("cannot mount /run/netns")?;
            share().context("cannot share /run/netns")?;
        }
        other => other.context("cannot share /run/netns")?,
    }
    Ok(lock)
}

fn on_own_thread<T: Send>(f: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| scope.spawn(f).join()).unwrap_or_else(|why| panic::resume_unwind(why))
}
