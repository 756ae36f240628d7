//! Memory of the process.
#![expect(unsafe_code, reason = "nothing wraps malloc_trim")]

/// Gives memory that was freed back to the kernel, after much of it was: the allocator keeps what lies between
/// pieces that live. Whoever allocates meanwhile may wait for it, some milliseconds for tens of megabytes.
pub fn give_back_freed() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it touches nothing but free memory.
    unsafe {
        libc::malloc_trim(0);
    }
}

#[cfg(test)]
mod tests {
    #[cfg(target_env = "gnu")]
    fn resident_kib() -> u64 {
        let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
        pages.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4
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
