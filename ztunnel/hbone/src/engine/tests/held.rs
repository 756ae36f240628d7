//! What a stream that nobody reads keeps of the buffers that its data came in.

use crate::{
    Settings,
    engine::{
        receive::Piece,
        state::{Head, Inner, Role},
    },
};
use bytes::Bytes;
use std::sync::Arc;

/// A buffer that says whether it lives.
struct Owner(Vec<u8>, #[expect(dead_code, reason = "counted")] Arc<()>);

impl AsRef<[u8]> for Owner {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// Delivers so many batches of these pieces, each in a buffer of its own; says how many buffers live.
fn delivered(inner: &mut Inner, key: usize, batches: usize, pieces: &[usize]) -> usize {
    let live = Arc::new(());
    for _ in 0..batches {
        let mut at = 0;
        let pieces: Vec<_> = pieces
            .iter()
            .map(|length| {
                at += length;
                Piece { key, id: 1, range: at - length..at }
            })
            .collect();
        let buffer = Owner(vec![7; at], Arc::clone(&live));
        if inner.may_share_any(&pieces) {
            let whole = Bytes::from_owner(buffer);
            inner.deliver(&pieces, Some(&whole), &whole);
        } else {
            inner.deliver(&pieces, None, &buffer.0);
        }
    }
    Arc::strong_count(&live) - 1
}

#[test]
fn who_does_not_read_keeps_few_buffers() {
    for (pieces, kept) in
        [(&[8 * 1024][..], 2), (&[16 * 1024; 8], 2), (&[100, 9000], 2), (&[100], 0)]
    {
        let mut inner = Inner::new(Role::Server, &Settings::default());
        let key = inner.add(Head::None);
        inner.open(key, 1);
        assert_eq!(delivered(&mut inner, key, 50, pieces), kept, "pieces of {pieces:?}");
        let sum = 50 * pieces.iter().sum::<usize>();
        let taken = inner.entries.get_mut(key).unwrap().received.take(usize::MAX);
        assert_eq!(taken.iter().map(Bytes::len).sum::<usize>(), sum, "and loses nothing");
    }
}
