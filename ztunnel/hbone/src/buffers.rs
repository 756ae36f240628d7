//! Big buffers, lent for the length of a read or a write. What is idle holds none.

use std::cell::RefCell;

/// The size of a buffer, in bytes: eight full TLS records, so that one system call moves as many.
pub(crate) const SIZE: usize = 8 * (16 * 1024 + 256);

/// Buffers that a thread keeps at hand.
const KEPT: usize = 8;

thread_local! {
    static SPARE: RefCell<Vec<Box<[u8]>>> = const { RefCell::new(Vec::new()) };
}

/// A buffer of [`SIZE`] bytes, given back when it is dropped. Its bytes are anybody's.
#[derive(Debug)]
pub(crate) struct Buffer(Option<Box<[u8]>>);

impl Buffer {
    pub(crate) fn borrow() -> Self {
        let spare = SPARE.with_borrow_mut(Vec::pop);
        Self(Some(spare.unwrap_or_else(|| vec![0; SIZE].into())))
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
            }
        });
    }
}
