//! A file that others replace.

use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

/// How long a file must have stayed as it is before it is read: Kubernetes swaps a symlink, people copy.
const SETTLE: Duration = Duration::from_secs(2);

/// How often to look. Looking follows links, so that the swap of any of them shows, needs no descriptor
/// that can go stale with its directory, and costs microseconds.
const LOOK: Duration = Duration::from_secs(1);

/// What tells two states of a file apart: device, inode, size, and its times of change.
type Stamp = Option<[i64; 6]>;

/// Follows one path, present or not.
#[derive(Debug)]
pub(crate) struct WatchedFile {
    path: PathBuf,
    seen: Stamp,
}

impl WatchedFile {
    pub(crate) fn new(path: PathBuf) -> Self {
        Self { path, seen: None }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Reads the file. [`Self::changed`] compares with this moment.
    pub(crate) fn read(&mut self) -> io::Result<Vec<u8>> {
        self.seen = self.stamp();
        fs::read(&self.path)
    }

    /// Waits until the file differs from what was read and has been left alone for a while.
    ///
    /// # Cancel safety
    ///
    /// Nothing is lost: the change is still one at the next call.
    pub(crate) async fn changed(&self) {
        let mut last = self.seen;
        let mut quiet = Duration::ZERO;
        loop {
            tokio::time::sleep(LOOK).await;
            let now = self.stamp();
            quiet = if now == last { quiet + LOOK } else { Duration::ZERO };
            last = now;
            if last != self.seen && quiet >= SETTLE {
                return;
            }
        }
    }

    fn stamp(&self) -> Stamp {
        let meta = fs::metadata(&self.path).ok()?;
        let id = |number: u64| i64::from_ne_bytes(number.to_ne_bytes());
        Some([
            id(meta.dev()),
            id(meta.ino()),
            id(meta.size()),
            meta.mtime(),
            meta.mtime_nsec(),
            meta.ctime().wrapping_mul(1_000_000_000).wrapping_add(meta.ctime_nsec()),
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;
    use tokio::time::{Instant, timeout};

    async fn is_quiet(file: &WatchedFile) -> bool {
        timeout(Duration::from_secs(60), file.changed()).await.is_err()
    }

    #[tokio::test(start_paused = true)]
    async fn sees_appearance_swap_and_removal_once_settled() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("link");
        let mut file = WatchedFile::new(path.clone());
        file.read().unwrap_err();
        assert!(is_quiet(&file).await, "still absent");

        fs::write(dir.path().join("one"), "1").unwrap();
        symlink("one", &path).unwrap();
        let start = Instant::now();
        file.changed().await;
        assert!(start.elapsed() >= SETTLE, "{:?}", start.elapsed());
        assert_eq!(file.read().unwrap(), b"1");
        assert!(is_quiet(&file).await, "unchanged");

        fs::write(dir.path().join("two"), "2").unwrap();
        symlink("two", dir.path().join("new")).unwrap();
        fs::rename(dir.path().join("new"), &path).unwrap();
        file.changed().await;
        assert_eq!(file.read().unwrap(), b"2");

        fs::remove_file(&path).unwrap();
        file.changed().await;
        file.read().unwrap_err();
        assert!(is_quiet(&file).await, "known to be gone");
    }
}
