//! What is put together before it is encrypted.

/// The small beginnings of records, put together.
pub(super) struct Small {
    bytes: [u8; Self::SIZE],
    pub(super) len: usize,
}

impl Small {
    pub(super) const SIZE: usize = 4096;
    /// Slices shorter than this are worth copying.
    pub(super) const LIMIT: usize = 1024;

    pub(super) const fn new() -> Self {
        Self { bytes: [0; Self::SIZE], len: 0 }
    }

    pub(super) const fn space(&self) -> usize {
        Self::SIZE - self.len
    }

    pub(super) fn put(&mut self, data: &[u8]) {
        if let Some(room) = self.bytes.get_mut(self.len..self.len + data.len()) {
            room.copy_from_slice(data);
            self.len += data.len();
        }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }
}
