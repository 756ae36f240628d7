//! Where maps and links outlive the process: one folder for each pod, named by its uid.

use super::sys;
use crate::netns::NetnsId;
use nix::{
    mount::{MsFlags, mount},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};
use std::{
    fs::{DirBuilder, read_dir, remove_dir, remove_file, rename},
    io,
    os::{fd::OwnedFd, unix::fs::DirBuilderExt},
    path::{Path, PathBuf},
};

/// The name of the link of `steer`.
pub(super) const LINK: &str = "link";
/// What the names of links of `mark_in` begin with; the device's index follows, as names of devices may hold
/// a dot, and bpffs takes none.
pub(super) const ENTRANCE: &str = "in-";
/// What is not complete yet.
const NEW: &str = "new";

/// Makes a folder, and its parents, that nobody else may look into.
pub(super) fn make(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// A bpffs at `root`, mounted if there is none.
pub(super) fn root(root: &Path) -> io::Result<()> {
    make(root)?;
    // A folder inside a bpffs will do.
    if statfs(root)?.filesystem_type() == BPF_FS_MAGIC {
        return Ok(());
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("bpf"), root, Some("bpf"), flags, Some("mode=0700"))?;
    tracing::info!(path = %root.display(), "mounted a bpffs");
    Ok(())
}

/// Whether it can name a folder of bpffs: letters, digits and dashes.
pub(super) fn is_uid(uid: &str) -> bool {
    let letters = uid.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    letters && (1..=63).contains(&uid.len())
}

/// The uids that have a folder.
pub(super) fn uids(root: &Path) -> io::Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in read_dir(root)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            found.extend(entry.file_name().into_string().ok().filter(|name| is_uid(name)));
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// An empty folder for pins that are not complete yet.
pub(super) fn begin(pod: &Path) -> io::Result<PathBuf> {
    let new = pod.join(NEW);
    remove(&new)?;
    make(&new)?;
    Ok(new)
}

/// Puts what is in the folder of [`begin`] in the place of what was pinned.
pub(super) fn complete(pod: &Path) -> io::Result<()> {
    let new = pod.join(NEW);
    for entry in read_dir(pod)? {
        let path = entry?.path();
        if path != new {
            remove_file(path)?;
        }
    }
    for entry in read_dir(&new)? {
        let entry = entry?;
        rename(entry.path(), pod.join(entry.file_name()))?;
    }
    remove_dir(new)
}

/// All links that are pinned.
pub(super) fn links(pod: &Path) -> Vec<OwnedFd> {
    let Ok(entries) = read_dir(pod) else { return Vec::new() };
    let names = entries.flatten().filter(|entry| {
        let name = entry.file_name();
        name == LINK || name.to_string_lossy().starts_with(ENTRANCE)
    });
    names.filter_map(|entry| sys::pinned(&entry.path()).ok()).collect()
}

/// The inode of the namespace whose program is pinned, 0 when that is gone; none without such a pin.
pub(super) fn namespace(pod: &Path) -> Option<u32> {
    let link = sys::pinned(&pod.join(LINK)).ok()?;
    sys::attached(&link).ok().flatten().map(|attached| attached.netns)
}

/// The id of the program that is pinned.
pub(super) fn program(pod: &Path) -> Option<u32> {
    let link = sys::pinned(&pod.join(LINK)).ok()?;
    sys::attached(&link).ok().flatten().map(|attached| attached.program)
}

/// Detaches what is pinned for this namespace, and forgets it. What is another's stays.
pub(super) fn withdraw(pod: &Path, netns: NetnsId) -> io::Result<()> {
    // 0: it was this one, or is nobody's any more.
    if namespace(pod).is_some_and(|ino| ino != 0 && u64::from(ino) != netns.ino) {
        return Ok(());
    }
    for link in links(pod) {
        if let Err(error) = sys::detach(&link) {
            tracing::debug!(%error, "a link was detached already");
        }
    }
    remove(pod)
}

/// Removes a folder and what is in it, if it is there.
pub(super) fn remove(pod: &Path) -> io::Result<()> {
    match std::fs::remove_dir_all(pod) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}
