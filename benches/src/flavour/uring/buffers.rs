//! A ring of buffers that the kernel takes from and we give back to.

use std::{
    alloc::{Layout, alloc_zeroed, handle_alloc_error},
    io,
    ptr::NonNull,
    sync::atomic::{AtomicU16, Ordering},
};

use io_uring::{IoUring, types::BufRingEntry};

/// Buffers of a loop; a power of two.
const COUNT: u16 = 256;
/// Bytes of each.
const SIZE: usize = 64 * 1024;
/// The ring must begin on a page.
const PAGE: usize = 4096;

/// Owned by one loop, and never freed: a loop lasts as long as the process.
pub(super) struct Buffers {
    entries: NonNull<BufRingEntry>,
    bytes: NonNull<u8>,
    tail: u16,
}

// SAFETY: the pointers are to memory that this value alone owns; it moves to its thread before anything uses it.
unsafe impl Send for Buffers {}

impl Buffers {
    /// The only group of a loop.
    pub(super) const GROUP: u16 = 0;

    pub(super) fn new(ring: &IoUring) -> io::Result<Self> {
        let entries = allocate(usize::from(COUNT) * size_of::<BufRingEntry>())?.cast();
        let bytes = allocate(usize::from(COUNT) * SIZE)?;
        let mut buffers = Self { entries, bytes, tail: 0 };
        // SAFETY: the memory is aligned to a page, has so many entries, and is never freed.
        unsafe {
            ring.submitter().register_buf_ring_with_flags(
                entries.as_ptr().addr() as u64,
                COUNT,
                Self::GROUP,
                0,
            )?;
        }
        for buffer in 0..COUNT {
            buffers.give_back(buffer);
        }
        Ok(buffers)
    }

    /// Where the rest of a piece begins, and how long it is.
    pub(super) fn part(&self, buffer: u16, offset: usize, length: usize) -> (*const u8, u32) {
        debug_assert!(
            buffer < COUNT && offset <= length && length <= SIZE,
            "a piece lies within its buffer"
        );
        // SAFETY: the kernel only names buffers that it was given, and never fills more than their size.
        let start = unsafe { self.bytes.as_ptr().add(usize::from(buffer) * SIZE + offset) };
        (start, u32::try_from(length - offset).unwrap_or(0))
    }

    /// The kernel may take it again.
    pub(super) fn give_back(&mut self, buffer: u16) {
        let slot = usize::from(self.tail % COUNT);
        let (start, _) = self.part(buffer, 0, 0);
        // SAFETY: the slot is below the number of entries.
        let entry = unsafe { self.entries.as_ptr().add(slot) };
        // SAFETY: the slot is ours: the kernel has taken what was in it, as there are as many slots as buffers.
        let entry = unsafe { &mut *entry };
        entry.set_addr(start.addr() as u64);
        entry.set_len(u32::try_from(SIZE).unwrap_or(u32::MAX));
        entry.set_bid(buffer);
        self.tail = self.tail.wrapping_add(1);
        // SAFETY: the pointer is to the first entry of the ring.
        let tail = unsafe { BufRingEntry::tail(self.entries.as_ptr()) }.cast_mut();
        // SAFETY: the field is two bytes, aligned, and only ever accessed atomically by us and by the kernel.
        let tail = unsafe { AtomicU16::from_ptr(tail) };
        tail.store(self.tail, Ordering::Release);
    }
}

fn allocate(bytes: usize) -> io::Result<NonNull<u8>> {
    let layout = Layout::from_size_align(bytes, PAGE).map_err(io::Error::other)?;
    // SAFETY: the size is not zero.
    let start = unsafe { alloc_zeroed(layout) };
    Ok(NonNull::new(start).unwrap_or_else(|| handle_alloc_error(layout)))
}
