//! Big buffers, lent for the length of a read or a write. What is idle holds none.

use std::cell::RefCell;

/// The size of a buffer, in bytes: 17 TLS records, however much they are expanded. What an application writes at a
/// time is most often a power of two of up to 256 KiB, and with its frames goes into one system call, whole: eight
/// records cut the usual 128 KiB into a full buffer and a rest of 72 bytes, with a packet and a wake-up for each.
pub(crate) const SIZE: usize = 17 * (16 * 1024 + 256);

/// Buffers that a thread keeps at hand.
const KEPT: usize = 6;

/// What the allocator keeps for its next use instead of giving it back to the kernel, in bytes.
const RETAINED: usize = 2 * 1024 * 1024;

/// Teaches the allocator, once, that big buffers come and go: where a thread has more than it keeps.
///
/// glibc maps what is larger than its threshold (128 KiB at first) and unmaps it when it is freed, and gives
/// the top of its heap back from twice that: every buffer beyond those that a thread keeps is then paid for in page
/// faults, a fifth of the processor time of bulk. Freeing one mapped block raises both thresholds to its size.
fn prepare() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| drop(std::hint::black_box(Vec::<u8>::with_capacity(RETAINED))));
}

thread_local! {
    static SPARE: RefCell<Vec<Box<[u8]>>> = const { RefCell::new(Vec::new()) };
}

/// A buffer of [`SIZE`] bytes, given back when it is dropped. Its bytes are anybody's.
#[derive(Debug)]
pub(crate) struct Buffer(Option<Box<[u8]>>);

impl Buffer {
    pub(crate) fn borrow() -> Self {
        let spare = SPARE.with_borrow_mut(Vec::pop);
        Self(Some(spare.unwrap_or_else(|| {
            // Mapped, and zero by itself: it takes memory as it is filled.
            vec![0; SIZE].into()
        })))
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        self.0.as_deref().unwrap_or_default()
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        self.0.as_deref_mut().unwrap_or_default()
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        self.bytes()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let Some(bytes) = self.0.take() else { return };
        // At the end of a thread there is nowhere to put it.
        let _gone = SPARE.try_with(|spare| {
            let mut spare = spare.borrow_mut();
            if spare.len() < KEPT {
                spare.push(bytes);
            } else {
                prepare();
            }
        });
    }
}
