//! Memory of the process.
#![expect(unsafe_code, reason = "nothing wraps malloc_trim, and madvise is told addresses")]

use std::{fs, io};

/// What is free at the end of a heap and is kept, in bytes.
const KEPT: i32 = 1 << 20;

/// What is as large as this is a mapping of its own, in bytes, and goes back to the kernel as soon as it is freed.
/// Buffers of connections are smaller.
const LARGE: i32 = 1 << 20;

/// Has the allocator keep little that is free. Left alone it learns from what a start allocates and frees to keep up to
/// tens of megabytes at the end of each thread's heap, where [`give_back_freed`] does not reach.
pub fn keep_little() {
    #[cfg(target_env = "gnu")]
    for (what, value) in [(libc::M_TRIM_THRESHOLD, KEPT), (libc::M_MMAP_THRESHOLD, LARGE)] {
        // SAFETY: two numbers, for the process's allocator.
        unsafe { libc::mallopt(what, value) };
    }
}

/// Gives memory that was freed back to the kernel, after much of it was: the allocator keeps what lies between
/// pieces that live. Whoever allocates meanwhile may wait for it, some milliseconds for tens of megabytes.
pub fn give_back_freed() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it touches nothing but free memory.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Lets go of the pages of code that are in memory for this process: those that it needs come back from the page
/// cache at once, the many that only a start needs do not, and are the kernel's to reclaim. Returns how many bytes
/// of mappings were named.
///
/// # Errors
///
/// Returns the error of reading `/proc/self/maps`, or of the kernel.
pub fn let_go_of_code() -> io::Result<usize> {
    let mut all = 0;
    for (start, length) in code(&fs::read_to_string("/proc/self/maps")?) {
        // SAFETY: the range is a private mapping of a file that was never writable (position-independent code
        // has no relocations in it): what is dropped is read again from the file as it was.
        if unsafe { libc::madvise(start as *mut libc::c_void, length, libc::MADV_DONTNEED) } != 0 {
            return Err(io::Error::last_os_error());
        }
        all += length;
    }
    Ok(all)
}

/// The mappings of files that are executable and cannot be written: where, and how long.
fn code(maps: &str) -> Vec<(usize, usize)> {
    let range = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let (place, flags, file) = (words.next()?, words.next()?, words.nth(3)?);
        let (start, end) = place.split_once('-')?;
        let number = |text| usize::from_str_radix(text, 16).ok();
        let (start, end) = (number(start)?, number(end)?);
        (flags == "r-xp" && file.starts_with('/')).then_some((start, end.checked_sub(start)?))
    };
    maps.lines().filter_map(range).collect()
}

#[cfg(test)]
mod tests {
    #[cfg(target_env = "gnu")]
    use std::sync::Barrier;

    #[test]
    fn code_is_what_is_of_a_file_and_never_written() {
        let maps = "\
            5606c81ff000-5606c83d1000 r--p 00000000 fe:00 11553515 /usr/bin/ztunnel\n\
            5606c83d1000-5606c83d3000 r-xp 001d2000 fe:00 11553515 /usr/bin/ztunnel\n\
            5606c8ca2000-5606c8ca7000 rw-p 00000000 fe:00 11553515 /usr/bin/ztunnel\n\
            7f0000000000-7f0000001000 r-xp 00000000 00:00 0\n\
            7ffd00000000-7ffd00002000 r-xp 00000000 00:00 0          [vdso]\n";
        assert_eq!(super::code(maps), [(0x5606_c83d_1000, 0x2000)]);
    }

    #[test]
    fn what_is_let_go_of_comes_back() {
        let resident = || {
            let status = std::fs::read_to_string("/proc/self/status").unwrap();
            let line = status.lines().find(|line| line.starts_with("RssFile:")).unwrap();
            line.split_ascii_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
        };
        let before = resident();
        assert!(super::let_go_of_code().unwrap() > 0);
        let after = resident();
        assert!(after < before, "{before} KiB of files before, {after} after");
    }

    #[cfg(target_env = "gnu")]
    fn resident_kib() -> u64 {
        let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
        pages.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4
    }

    /// Without the setting the allocator keeps 48 MiB from then on, in a thread that is not the first one.
    #[test]
    #[cfg(target_env = "gnu")]
    fn what_is_freed_at_the_end_of_a_heap_goes_back() {
        super::keep_little();
        drop(vec![7_u8; 24 << 20]);
        let (full, empty) = (Barrier::new(2), Barrier::new(2));
        let (before, after) = std::thread::scope(|scope| {
            // It does nothing else: what it took to look would lie behind the pieces.
            let behind = scope.spawn(|| {
                let pieces: Vec<_> = (0..400).map(|_| vec![7_u8; 64 << 10]).collect();
                full.wait();
                full.wait();
                drop(pieces);
                empty.wait();
            });
            full.wait();
            let before = resident_kib();
            full.wait();
            empty.wait();
            let after = resident_kib();
            behind.join().unwrap();
            (before, after)
        });
        assert!(after + 20_000 < before, "{before} KiB before, {after} after");
    }

    #[test]
    #[cfg(target_env = "gnu")]
    fn what_was_freed_goes_back() {
        let mut pieces: Vec<_> = (0..40_000).map(|_| vec![7_u8; 2048]).collect();
        // What stays lies between: nothing at the end of the heap is free.
        let mut nth = 0;
        pieces.retain(|_| {
            nth += 1;
            nth % 16 == 0
        });
        let before = resident_kib();
        super::give_back_freed();
        let after = resident_kib();
        assert!(after + 30_000 < before, "{before} KiB before, {after} after");
        assert_eq!(pieces.len(), 2500);
    }
}
