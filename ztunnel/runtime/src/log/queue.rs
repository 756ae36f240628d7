//! The lines on their way to the thread that writes them.

use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

/// Lines that may wait, as many as upstream lets wait.
const LINES: usize = 10_000;
/// Bytes that may wait: a bound for lines of any length.
const BYTES: usize = 16 << 20;
/// How long lines may gather. Without it, each line of a busy proxy would wake the thread that writes it: one
/// switch and one `write` a connection instead of one for all of these.
const GATHER: Duration = Duration::from_millis(2);
/// Lines that are written at once.
const ENOUGH: usize = 1_000;
/// A buffer that grew larger than this in a burst is given back.
const KEEP: usize = 1 << 20;

/// Bounded; full means drop and count.
#[derive(Debug, Default)]
pub(super) struct Queue {
    waiting: Mutex<Waiting>,
    wake: Condvar,
    written: Condvar,
    dropped: AtomicU64,
}

#[derive(Debug, Default)]
struct Waiting {
    text: Vec<u8>,
    lines: usize,
    writer: Writer,
    /// Somebody waits for the queue to be empty.
    hurry: bool,
    closed: bool,
}

/// What the thread is doing.
#[derive(Debug, Default, Eq, PartialEq)]
enum Writer {
    /// It has seen lines, and waits a little for more.
    #[default]
    Gathers,
    /// It sleeps until somebody wakes it.
    Sleeps,
    /// It has lines of its own that are not out yet.
    Writes,
}

impl Queue {
    /// Starts the thread. `note` makes the line that tells how many were dropped.
    pub(super) fn start(
        output: impl Write + Send + 'static,
        note: impl Fn(u64) -> String + Send + 'static,
    ) -> io::Result<Arc<Self>> {
        let queue = Arc::new(Self::default());
        let writer = Arc::clone(&queue);
        thread::Builder::new().name("log".to_owned()).spawn(move || writer.run(output, note))?;
        Ok(queue)
    }

    /// Adds a line, which ends in a line feed.
    pub(super) fn push(&self, line: &str) {
        let mut waiting = self.lock();
        if waiting.lines >= LINES || waiting.text.len() + line.len() > BYTES {
            drop(waiting);
            self.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        waiting.text.extend_from_slice(line.as_bytes());
        waiting.lines += 1;
        let wake = waiting.writer == Writer::Sleeps || waiting.lines == ENOUGH;
        if wake && waiting.writer == Writer::Sleeps {
            // Woken once, by the first.
            waiting.writer = Writer::Gathers;
        }
        drop(waiting);
        if wake {
            self.wake.notify_one();
        }
    }

    /// Lines dropped so far: the queue was full, or the output failed.
    pub(super) fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    /// Waits until all lines are out, at most so long. True if they are.
    pub(super) fn flush(&self, deadline: Duration) -> bool {
        let mut waiting = self.lock();
        waiting.hurry = true;
        self.wake.notify_one();
        let busy = |waiting: &mut Waiting| waiting.writer == Writer::Writes || waiting.lines > 0;
        let (_guard, timeout) = self
            .written
            .wait_timeout_while(waiting, deadline, busy)
            .unwrap_or_else(PoisonError::into_inner);
        !timeout.timed_out()
    }

    /// Ends the thread when all lines are out.
    pub(super) fn close(&self) {
        let mut waiting = self.lock();
        waiting.closed = true;
        waiting.hurry = true;
        self.wake.notify_one();
    }

    fn run(&self, mut output: impl Write, note: impl Fn(u64) -> String) {
        let mut text = Vec::new();
        let mut told = 0;
        while let Some(lines) = self.take(&mut text) {
            let dropped = self.dropped();
            if dropped > told {
                text.extend_from_slice(note(dropped - told).as_bytes());
                told = dropped;
            }
            if output.write_all(&text).and_then(|()| output.flush()).is_err() {
                // Nowhere to say so but in the count; what comes next may get through again.
                self.dropped.fetch_add(lines, Ordering::Relaxed);
                told += lines;
            }
            if text.capacity() > KEEP {
                text = Vec::new();
            }
        }
    }

    /// Waits for lines and swaps them in. None at the end.
    fn take(&self, text: &mut Vec<u8>) -> Option<u64> {
        text.clear();
        let mut waiting = self.lock();
        waiting.writer = Writer::Gathers;
        while waiting.lines == 0 {
            waiting.hurry = waiting.closed;
            self.written.notify_all();
            if waiting.closed {
                return None;
            }
            waiting.writer = Writer::Sleeps;
            waiting = self.wake.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
        waiting.writer = Writer::Gathers;
        let gather = |waiting: &mut Waiting| !waiting.hurry && waiting.lines < ENOUGH;
        waiting = self
            .wake
            .wait_timeout_while(waiting, GATHER, gather)
            .unwrap_or_else(PoisonError::into_inner)
            .0;
        std::mem::swap(&mut waiting.text, text);
        waiting.writer = Writer::Writes;
        Some(std::mem::take(&mut waiting.lines) as u64)
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

    use super::*;

    const LONG: Duration = Duration::from_secs(10);

    /// Takes one write, then stands still until told.
    struct Stuck {
        entered: SyncSender<()>,
        go: Receiver<()>,
        seen: Arc<Mutex<Vec<u8>>>,
    }

    impl Write for Stuck {
        fn write(&mut self, text: &[u8]) -> io::Result<usize> {
            let _ = self.entered.send(());
            let _ = self.go.recv();
            self.seen.lock().unwrap().extend_from_slice(text);
            Ok(text.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_full_queue_drops_counts_and_says_so() {
        let (entered, was_entered) = sync_channel(16);
        let (release, go) = sync_channel(16);
        let seen: Arc<Mutex<Vec<u8>>> = Arc::default();
        let output = Stuck { entered, go, seen: Arc::clone(&seen) };
        let queue = Queue::start(output, |count| format!("{count} dropped\n")).unwrap();
        queue.push("first\n");
        was_entered.recv_timeout(LONG).unwrap();
        for _ in 0..LINES + 7 {
            queue.push("x\n");
        }
        assert_eq!(queue.dropped(), 7);
        drop(release);
        assert!(queue.flush(LONG));
        queue.push("last\n");
        assert!(queue.flush(LONG));
        let seen = String::from_utf8(seen.lock().unwrap().clone()).unwrap();
        assert!(seen.starts_with("first\nx\n"), "{:?}", seen.get(..20));
        assert!(seen.ends_with("x\n7 dropped\nlast\n"), "in order, and told once");
        assert_eq!(seen.lines().count(), LINES + 3);
        queue.close();
    }

    #[test]
    fn a_failing_output_counts() {
        struct Broken;
        impl Write for Broken {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let queue = Queue::start(Broken, |_| String::new()).unwrap();
        queue.push("lost\n");
        assert!(queue.flush(LONG));
        assert_eq!(queue.dropped(), 1);
        queue.close();
    }

    #[test]
    fn flushing_an_empty_queue_returns() {
        let queue = Queue::start(io::sink(), |_| String::new()).unwrap();
        assert!(queue.flush(LONG));
        queue.close();
    }
}
