//! The worker threads of the data path, the runtime of everything else, and a thread for what takes long.
//!
//! Their flavour is decided here alone. Code elsewhere may assume only that a task spawned on a handle stays
//! with that handle, and that all futures are `Send`.

use std::io;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::Notify;
use tokio::time::Instant;

/// How workers share work.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Flavour {
    /// One single-threaded runtime per worker: a task never changes thread, so a relay and its tunnel wake each
    /// other without waking a thread.
    #[default]
    PerThread,
    /// One runtime whose threads steal tasks from each other. For comparison in benches.
    WorkStealing,
}

/// The threads of the data path. Clones are one set.
#[derive(Clone, Debug)]
pub struct Workers(Arc<Set>);

#[derive(Debug)]
struct Set {
    // Never empty. One per thread, or a single one when work is stolen.
    handles: Box<[Handle]>,
    count: NonZeroUsize,
    next: AtomicUsize,
    stop: Mutex<Option<Stop>>,
}

#[derive(Debug)]
enum Stop {
    Threads { stop: Box<[Arc<Notify>]>, ended: Receiver<()> },
    Runtime(Runtime),
}

/// What the runtimes of the workers say about themselves.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Numbers {
    /// Tasks spawned and not yet ended.
    pub alive_tasks: u64,
    /// Tasks waiting in the queues that are fed from other threads.
    pub global_queue_depth: u64,
    /// One entry a worker thread.
    pub workers: Vec<WorkerNumbers>,
}

/// What one worker thread has done since it started.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct WorkerNumbers {
    /// Time spent on tasks.
    pub busy: Duration,
    /// Times it went to sleep.
    pub parks: u64,
    /// Times it went to sleep or woke.
    pub parks_and_unparks: u64,
}

impl Workers {
    /// Starts so many threads, named `worker-0` and on.
    ///
    /// # Errors
    /// When the kernel gives no more threads or descriptors.
    pub fn start(count: NonZeroUsize) -> io::Result<Self> {
        Self::start_as(count, Flavour::default())
    }

    /// Starts threads of a given flavour.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn start_as(count: NonZeroUsize, flavour: Flavour) -> io::Result<Self> {
        let (handles, stop) = match flavour {
            Flavour::PerThread => one_runtime_each(count)?,
            Flavour::WorkStealing => {
                let names = AtomicUsize::new(0);
                let runtime = Builder::new_multi_thread()
                    .worker_threads(count.get())
                    .thread_name_fn(move || name(names.fetch_add(1, Ordering::Relaxed)))
                    .enable_all()
                    .build()?;
                (vec![runtime.handle().clone()], Stop::Runtime(runtime))
            }
        };
        Ok(Self(Arc::new(Set {
            handles: handles.into(),
            count,
            next: AtomicUsize::new(0),
            stop: Mutex::new(Some(stop)),
        })))
    }

    /// The worker for a key, always the same.
    #[must_use]
    pub fn on(&self, key: u64) -> &Handle {
        self.at(usize::try_from(mix(key) >> 32).unwrap_or_default())
    }

    /// The workers in turn.
    #[must_use]
    pub fn next(&self) -> &Handle {
        self.at(self.0.next.fetch_add(1, Ordering::Relaxed))
    }

    fn at(&self, index: usize) -> &Handle {
        let handles = &self.0.handles;
        handles
            .get(index.checked_rem(handles.len()).unwrap_or_default())
            .expect("start() makes at least one, and the index is below their number")
    }

    /// How many threads there are; never zero.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "never empty")]
    pub fn len(&self) -> usize {
        self.0.count.get()
    }

    /// What the runtimes say about themselves, for `tokio_*` metrics.
    #[must_use]
    pub fn numbers(&self) -> Numbers {
        let mut all = Numbers::default();
        for handle in &self.0.handles {
            let metrics = handle.metrics();
            all.alive_tasks += metrics.num_alive_tasks() as u64;
            all.global_queue_depth += metrics.global_queue_depth() as u64;
            all.workers.extend((0..metrics.num_workers()).map(|worker| WorkerNumbers {
                busy: metrics.worker_total_busy_duration(worker),
                parks: metrics.worker_park_count(worker),
                parks_and_unparks: metrics.worker_park_unpark_count(worker),
            }));
        }
        all
    }

    /// Ends the threads and drops their tasks; waits at most so long. True if all ended. Blocks: call it from
    /// the main thread, when the control runtime has nothing left to do.
    pub fn shutdown(&self, deadline: Duration) -> bool {
        let stop = self.0.stop.lock().unwrap_or_else(PoisonError::into_inner).take();
        match stop {
            None => true,
            Some(Stop::Runtime(runtime)) => {
                runtime.shutdown_timeout(deadline);
                true
            }
            Some(Stop::Threads { stop, ended }) => {
                stop.iter().for_each(|stop| stop.notify_one());
                let start = Instant::now();
                (0..self.len())
                    .all(|_| ended.recv_timeout(deadline.saturating_sub(start.elapsed())).is_ok())
            }
        }
    }
}

fn one_runtime_each(count: NonZeroUsize) -> io::Result<(Vec<Handle>, Stop)> {
    let (end, ended) = sync_channel(count.get());
    let mut handles = Vec::with_capacity(count.get());
    let mut stops = Vec::with_capacity(count.get());
    for index in 0..count.get() {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let stop = Arc::new(Notify::new());
        handles.push(runtime.handle().clone());
        stops.push(Arc::clone(&stop));
        let end = end.clone();
        thread::Builder::new().name(name(index)).spawn(move || run(runtime, &stop, &end))?;
    }
    Ok((handles, Stop::Threads { stop: stops.into(), ended }))
}

/// One more thread with a runtime of its own: what takes long there keeps neither the data path nor the control
/// runtime.
#[derive(Debug)]
pub struct Background {
    handle: Handle,
    stop: Arc<Notify>,
    ended: Receiver<()>,
}

impl Background {
    /// Starts it under this name. It first does this.
    ///
    /// # Errors
    /// When the kernel gives no more threads or descriptors.
    pub fn start(name: &str, first: impl FnOnce() + Send + 'static) -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let stop = Arc::new(Notify::new());
        let stopped = Arc::clone(&stop);
        let (end, ended) = sync_channel(1);
        thread::Builder::new().name(name.to_owned()).spawn(move || {
            first();
            run(runtime, &stopped, &end);
        })?;
        Ok(Self { handle, stop, ended })
    }

    /// Where to spawn.
    #[must_use]
    pub const fn handle(&self) -> &Handle {
        &self.handle
    }

    /// Ends the thread and drops its tasks; waits at most so long. True if it ended. Blocks, as
    /// [`Workers::shutdown`] does.
    pub fn shutdown(self, deadline: Duration) -> bool {
        self.stop.notify_one();
        self.ended.recv_timeout(deadline).is_ok()
    }
}

fn run(runtime: Runtime, stop: &Notify, end: &SyncSender<()>) {
    runtime.block_on(stop.notified());
    // Drops the tasks; does not wait for blocking ones, of which the data path has none.
    runtime.shutdown_background();
    // Fails only if nobody waits any more.
    let _ = end.send(());
}

fn name(index: usize) -> String {
    format!("worker-{index}")
}

/// Spreads a key that need not be a hash (the finaliser of splitmix64).
const fn mix(key: u64) -> u64 {
    let key = (key ^ (key >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let key = (key ^ (key >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    key ^ (key >> 31)
}

/// The runtime of all that is quick, such as admin and certificates: single-threaded, run by the main thread.
///
/// # Errors
/// When the kernel gives no more descriptors.
pub fn control() -> io::Result<Runtime> {
    Builder::new_current_thread().enable_all().build()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use tokio::sync::oneshot;

    use super::*;
    use crate::tasks::Tasks;

    const TWO: NonZeroUsize = NonZeroUsize::new(2).unwrap();

    fn thread_of(handle: &Handle) -> String {
        let (tell, told) = oneshot::channel();
        Tasks::new().spawn_on(handle, |_| async {});
        let tasks = Tasks::new();
        tasks.spawn_on(handle, |_| async move {
            tell.send(thread::current().name().unwrap_or_default().to_owned()).unwrap();
        });
        told.blocking_recv().unwrap()
    }

    #[test]
    fn keys_are_stable_and_spread_and_turns_alternate() {
        let workers = Workers::start(TWO).unwrap();
        let of = |key| thread_of(workers.on(key));
        assert_eq!(of(7), of(7));
        let first = (0..64).filter(|key| of(*key) == "worker-0").count();
        assert!((16..=48).contains(&first), "{first} of 64 keys on one worker");
        assert_ne!(thread_of(workers.next()), thread_of(workers.next()));
        assert!(workers.shutdown(Duration::from_secs(10)));
        assert!(workers.shutdown(Duration::ZERO), "a second call has nothing to do");
    }

    #[test]
    fn numbers_have_an_entry_for_each_worker() {
        for flavour in [Flavour::PerThread, Flavour::WorkStealing] {
            let workers = Workers::start_as(TWO, flavour).unwrap();
            let tasks = Tasks::new();
            let (tell, told) = oneshot::channel();
            tasks.spawn_on(workers.next(), |_| async move {
                tell.send(()).unwrap();
                std::future::pending::<()>().await;
            });
            told.blocking_recv().unwrap();
            let numbers = workers.numbers();
            assert_eq!(numbers.workers.len(), 2, "{flavour:?}");
            assert_eq!(numbers.alive_tasks, 1, "{flavour:?}");
            assert!(workers.shutdown(Duration::from_secs(10)), "{flavour:?}");
        }
    }

    #[test]
    fn shutdown_drops_tasks() {
        struct Dropped(Arc<AtomicBool>);
        impl Drop for Dropped {
            fn drop(&mut self) {
                self.0.store(true, Ordering::SeqCst);
            }
        }
        let dropped: Arc<AtomicBool> = Arc::default();
        let workers = Workers::start(TWO).unwrap();
        let guard = Dropped(Arc::clone(&dropped));
        let tasks = Tasks::new();
        tasks.spawn_on(workers.next(), |_| async move {
            let _guard = guard;
            std::future::pending::<()>().await;
        });
        assert!(workers.shutdown(Duration::from_secs(10)));
        assert!(dropped.load(Ordering::SeqCst));
    }

    #[test]
    fn the_background_is_a_thread_of_its_own() {
        let (tell, told) = sync_channel(1);
        let background = Background::start("behind", move || {
            tell.send(thread::current().name().unwrap_or_default().to_owned()).unwrap();
        });
        let background = background.unwrap();
        assert_eq!(told.recv().unwrap(), "behind", "what it first does is done there");
        assert_eq!(thread_of(background.handle()), "behind");
        assert!(background.shutdown(Duration::from_secs(10)));
    }

    #[test]
    fn a_blocked_worker_does_not_hold_up_the_shutdown() {
        let workers = Workers::start(TWO).unwrap();
        let (tell, told) = oneshot::channel();
        let (release, blocked) = sync_channel::<()>(1);
        let tasks = Tasks::new();
        tasks.spawn_on(workers.next(), |_| async move {
            tell.send(()).unwrap();
            let _ = blocked.recv();
        });
        told.blocking_recv().unwrap();
        assert!(!workers.shutdown(Duration::from_millis(10)));
        release.send(()).unwrap();
    }
}
