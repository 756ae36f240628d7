//! How the kernel shares the processors among our threads.
#![expect(unsafe_code, reason = "nothing wraps sched_setattr")]

use std::{io, time::Duration};

/// Of its share where others want a core too: about a tenth of theirs each.
const NICE: i32 = 10;

/// The longest turn that the kernel knows. Whoever wakes and asks for a shorter one, as all do that ask for none,
/// gets the core at once. Kernels before 6.12 leave it out.
const TURN: Duration = Duration::from_millis(100);

/// Has the calling thread, and those that it starts from now on, give way to the others: they take a core from it
/// as soon as they wake, and it takes none from them.
///
/// It is not starved: what waits for it is done even where every core is busy, only later.
///
/// # Errors
///
/// Fails where the kernel refuses, as a filter of system calls may have it. Nothing has changed then.
pub fn give_way() -> io::Result<()> {
    // SAFETY: a struct of numbers, for which zero is a value.
    let mut attributes: libc::sched_attr = unsafe { std::mem::zeroed() };
    attributes.size = u32::try_from(size_of_val(&attributes)).unwrap_or_default();
    attributes.sched_policy = u32::try_from(libc::SCHED_BATCH).unwrap_or_default();
    attributes.sched_nice = NICE;
    attributes.sched_runtime = u64::try_from(TURN.as_nanos()).unwrap_or_default();
    // SAFETY: it reads the struct, which says how long it is, and keeps nothing of it. Zero is the calling thread.
    let done = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, thread};

    /// Nice value and policy of the calling thread, by the kernel.
    fn standing() -> (i32, i32) {
        let stat = fs::read_to_string("/proc/thread-self/stat").unwrap();
        // After the name, which may hold anything, comes the third field.
        let (_, rest) = stat.rsplit_once(") ").unwrap();
        let fields: Vec<_> = rest.split(' ').collect();
        (fields[19 - 3].parse().unwrap(), fields[41 - 3].parse().unwrap())
    }

    #[test]
    fn one_thread_gives_way_and_what_it_starts() {
        let before = standing();
        assert_ne!(before.1, libc::SCHED_BATCH);
        let behind = thread::spawn(|| {
            give_way().unwrap();
            (standing(), thread::spawn(standing).join().unwrap())
        });
        let behind = behind.join().unwrap();
        assert_eq!(behind, ((NICE, libc::SCHED_BATCH), (NICE, libc::SCHED_BATCH)));
        assert_eq!(standing(), before, "the others stay as they are");
    }
}
