//! One instance of the lab on this machine: its folder, its names, and their end.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    os::linux::fs::MetadataExt,
    path::{Path, PathBuf},
    process,
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use nix::{
    fcntl::{Flock, FlockArg},
    mount::{MntFlags, umount2},
    sys::signal::{SigSet, Signal, kill},
    unistd::{Pid, Uid},
};

use crate::{netns, wait};

const ROOT: &str = "/run/ambient-lab";
const PREFIX: &str = "lab-";

/// The instances of this process.
static OWN: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

fn own() -> MutexGuard<'static, BTreeSet<String>> {
    OWN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An instance that this process owns. Everything in it goes when this is dropped.
#[derive(Debug)]
pub struct Instance {
    id: String,
    folder: PathBuf,
    _lock: Flock<File>,
}

impl Instance {
    /// Begins one, with this name if given, after removing what dead ones left.
    pub fn begin(id: Option<&str>) -> Result<Self> {
        if !Uid::effective().is_root() {
            bail!("the lab makes network namespaces and loads eBPF: run it as root");
        }
        let all = lock_all()?;
        for stale in stale() {
            tear_down(&stale);
        }
        let id = match id {
            Some(id) => id.to_owned(),
            None => free_id()?,
        };
        let folder = Path::new(ROOT).join(&id);
        if fs::create_dir(&folder).is_err() {
            bail!("a lab named {id} is running: stop it by `cargo lab stop {id}`");
        }
        own().insert(id.clone());
        let lock = lock(&folder, FlockArg::LockExclusiveNonblock)
            .with_context(|| format!("cannot lock {}", folder.display()))?;
        drop(all);
        Ok(Self { id, folder, _lock: lock })
    }

    /// What tells it from others.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Its files: logs, settings, pins, certificates.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The name of a namespace of it.
    #[must_use]
    pub fn name(&self, of: &str) -> String {
        format!("{PREFIX}{}-{of}", self.id)
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        tear_down(&self.id);
    }
}

/// Where an instance keeps its files, if it is there.
pub fn folder(id: &str) -> Result<PathBuf> {
    let folder = Path::new(ROOT).join(id);
    if !folder.is_dir() {
        bail!("no lab is running under the name {id}");
    }
    Ok(folder)
}

/// The instances that are alive.
#[must_use]
pub fn running() -> Vec<String> {
    let stale = stale();
    folders().into_iter().filter(|id| !stale.contains(id)).collect()
}

/// Ends everything that an instance has: its processes, mounts, namespaces and files.
pub fn tear_down(id: &str) {
    let prefix = format!("{PREFIX}{id}-");
    let names = netns::names(&prefix);
    let inodes: BTreeSet<_> = names
        .iter()
        .filter_map(|name| fs::metadata(Path::new("/run/netns").join(name)).ok())
        .map(|file| (file.st_dev(), file.st_ino()))
        .collect();
    // Programs may start others while they are being ended.
    for _ in 0..50 {
        let inside = processes_in(&inodes);
        if inside.is_empty() {
            break;
        }
        for pid in inside {
            let _gone = kill(pid, Signal::SIGKILL);
        }
        wait::pause(Duration::from_millis(5));
    }
    let folder = Path::new(ROOT).join(id);
    for mounted in mounts_below(&folder) {
        let _gone = umount2(&mounted, MntFlags::MNT_DETACH);
    }
    for name in names {
        netns::remove(&name);
    }
    let _gone = fs::remove_dir_all(&folder);
}

/// On SIGINT, SIGTERM and SIGHUP, tears down the instance and ends the process. To be called before
/// any thread is started, because threads inherit the mask.
pub fn end_on_signals(id: String, code: i32) -> Result<()> {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        signals.add(signal);
    }
    signals.thread_block()?;
    thread::Builder::new().name("signals".into()).spawn(move || {
        if signals.wait().is_ok() {
            // It may be another's, whose name is not to be had.
            if own().contains(&id) {
                tear_down(&id);
            }
            #[expect(clippy::exit, reason = "nothing is left to be dropped, and main is blocked")]
            process::exit(code);
        }
    })?;
    Ok(())
}

/// A name that nobody has.
fn free_id() -> Result<String> {
    let taken = folders();
    (process::id()..)
        .take(1 << 16)
        .map(|n| format!("{:04x}", n & 0xffff))
        .find(|id| !taken.contains(id) && netns::names(&format!("{PREFIX}{id}-")).is_empty())
        .context("there are too many labs on this machine")
}

fn folders() -> Vec<String> {
    let entries = fs::read_dir(ROOT).into_iter().flatten().flatten();
    let folders = entries.filter(|entry| entry.path().is_dir());
    folders.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

/// Instances whose owner is gone, and names whose folder is.
fn stale() -> BTreeSet<String> {
    let folders = folders();
    let free =
        |id: &&String| lock(&Path::new(ROOT).join(id), FlockArg::LockExclusiveNonblock).is_ok();
    let mut stale: BTreeSet<String> = folders.iter().filter(free).cloned().collect();
    for name in netns::names(PREFIX) {
        let id = name.trim_start_matches(PREFIX).split('-').next().unwrap_or_default();
        let ours = id.len() == 4 && id.chars().all(|c| c.is_ascii_hexdigit());
        if ours && !folders.iter().any(|folder| folder == id) {
            stale.insert(id.to_owned());
        }
    }
    stale
}

fn lock_all() -> Result<Flock<File>> {
    fs::create_dir_all(ROOT).with_context(|| format!("cannot make {ROOT}"))?;
    lock(Path::new(ROOT), FlockArg::LockExclusive)
}

fn lock(folder: &Path, how: FlockArg) -> Result<Flock<File>> {
    Flock::lock(File::open(folder)?, how).map_err(|(_, why)| why.into())
}

fn processes_in(inodes: &BTreeSet<(u64, u64)>) -> Vec<Pid> {
    let inside = |pid: i32| {
        let file = fs::metadata(format!("/proc/{pid}/ns/net")).ok()?;
        inodes.contains(&(file.st_dev(), file.st_ino())).then_some(Pid::from_raw(pid))
    };
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter_map(inside).collect()
}

/// Mount points in the folder, the deepest first.
fn mounts_below(folder: &Path) -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let points = table.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from);
    let mut below: Vec<_> = points.filter(|point| point.starts_with(folder)).collect();
    below.sort_by_key(|point| std::cmp::Reverse(point.components().count()));
    below
}
