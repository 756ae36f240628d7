//! The owner of tasks, with a drain in two phases.
//!
//! ```text
//! running --stop--> stopping --deadline or cancel--> forced
//!    \_______________cancel or drop___________________/
//! ```
//!
//! A phase reaches children before the call that sets it returns, and is never left again.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use pin_project_lite::pin_project;
use slab::Slab;
use tokio::runtime::Handle;
use tokio::sync::Notify;

const RUNNING: u8 = 0;
const STOPPING: u8 = 1;
const FORCED: u8 = 2;

/// How long a drain waits, once forced, for tasks to be dropped by the threads that run them. Only a task that
/// blocks its thread, or a child `Tasks` kept outside any task, can take that long.
const AFTER_FORCE: Duration = Duration::from_secs(1);

/// Owns tasks and children. Dropping it cancels them.
///
/// Spawning costs one task and a few reference counts; a poll of a spawned task costs one relaxed-contention
/// atomic load on top of the task's own work.
pub struct Tasks {
    owner: Owner,
    live: Arc<Live>,
}

/// What a task is told about the drain of its owner.
#[derive(Clone)]
pub struct Draining(Arc<Node>);

/// Forces its node when dropped. Apart from [`Tasks`], so that a drain can take that to pieces.
struct Owner(Arc<Node>);

struct Node {
    phase: AtomicU8,
    stopping: Notify,
    forced: Notify,
    /// Who of the tasks is to be woken when they are forced. Here and not in the tasks, each of which is as large as
    /// its connection is held long.
    tasks: Mutex<Slab<Waker>>,
    idle: Notify,
    children: Mutex<Vec<Weak<Node>>>,
}

/// Held by a [`Tasks`], by each of its tasks, and by the `Live` of each child: its end is the end of them all.
struct Live {
    node: Arc<Node>,
    _parent: Option<Arc<Self>>,
}

impl Tasks {
    /// An owner without a parent.
    #[must_use]
    pub fn new() -> Self {
        Self::under(Node::new(), None)
    }

    /// An owner that stops when this one does, and for which this one's drain waits: a pod, a listener, a
    /// connection.
    #[must_use]
    pub fn child(&self) -> Self {
        let node = Node::new();
        let parent = &self.owner.0;
        {
            let mut children = parent.children.lock().unwrap_or_else(PoisonError::into_inner);
            // Forgets those that ended, each time the list would grow: constant work a child on average.
            if children.len() == children.capacity() {
                children.retain(|child| child.strong_count() > 0);
            }
            children.push(Arc::downgrade(&node));
        }
        // After the push: a phase set before it is seen here, one set later finds the child in the list.
        node.advance(parent.phase.load(Ordering::SeqCst));
        Self::under(node, Some(Arc::clone(&self.live)))
    }

    fn under(node: Arc<Node>, parent: Option<Arc<Live>>) -> Self {
        let live = Arc::new(Live { node: Arc::clone(&node), _parent: parent });
        Self { owner: Owner(node), live }
    }

    /// Spawns a task on the current runtime. It is dropped where it stands when forced.
    ///
    /// # Panics
    /// Outside a runtime.
    pub fn spawn<F>(&self, task: impl FnOnce(Draining) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let task = self.owned(task);
        #[expect(
            clippy::disallowed_methods,
            reason = "the one door through which tasks are spawned"
        )]
        tokio::spawn(task);
    }

    /// Spawns a task on a worker.
    pub fn spawn_on<F>(&self, worker: &Handle, task: impl FnOnce(Draining) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        worker.spawn(self.owned(task));
    }

    fn owned<F>(&self, task: impl FnOnce(Draining) -> F) -> Owned<F> {
        let place = Place { key: None, live: Arc::clone(&self.live) };
        Owned { task: task(self.draining()), place }
    }

    /// The state of this owner's drain.
    #[must_use]
    pub fn draining(&self) -> Draining {
        Draining(Arc::clone(&self.owner.0))
    }

    /// Begins the graceful stop, here and in children, without waiting for it.
    pub fn stop(&self) {
        self.owner.0.advance(STOPPING);
    }

    /// Stops, waits for tasks and children, and forces what is left at the deadline. True if nothing was.
    ///
    /// # Cancel safety
    /// Dropping it forces at once.
    pub async fn drain(self, deadline: Duration) -> bool {
        self.stop();
        let Self { owner, live } = self;
        let rest = Arc::downgrade(&live);
        drop(live);
        let graceful = tokio::time::timeout(deadline, owner.0.idle(&rest)).await.is_ok();
        owner.0.advance(FORCED);
        if !graceful && tokio::time::timeout(AFTER_FORCE, owner.0.idle(&rest)).await.is_err() {
            tracing::warn!("tasks are still held one second after the end of their drain");
        }
        graceful
    }

    /// Waits for tasks and children to end by themselves; only a parent's force can cut it short.
    ///
    /// # Cancel safety
    /// Dropping it forces at once.
    pub async fn finished(self) {
        let Self { owner, live } = self;
        let rest = Arc::downgrade(&live);
        drop(live);
        owner.0.idle(&rest).await;
    }

    /// Drops every task, here and in children, at once.
    pub fn cancel(&self) {
        self.owner.0.advance(FORCED);
    }
}

impl Default for Tasks {
    fn default() -> Self {
        Self::new()
    }
}

impl Draining {
    /// A drain that never begins, for code that runs outside any owner.
    #[must_use]
    pub fn never() -> Self {
        Self(Node::new())
    }

    /// Whether the stop has begun.
    #[must_use]
    pub fn is_stopping(&self) -> bool {
        self.0.phase.load(Ordering::SeqCst) >= STOPPING
    }

    /// Waits until the stop begins: take nothing new, finish what there is.
    ///
    /// # Cancel safety
    /// Safe.
    pub async fn stopping(&self) {
        self.0.reached(STOPPING, &self.0.stopping).await;
    }

    /// Waits until the drain is forced. A task need not: it is dropped then. What it has handed elsewhere may.
    ///
    /// # Cancel safety
    /// Safe.
    pub async fn forced(&self) {
        self.0.reached(FORCED, &self.0.forced).await;
    }
}

impl Node {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            phase: AtomicU8::new(RUNNING),
            stopping: Notify::new(),
            forced: Notify::new(),
            tasks: Mutex::default(),
            idle: Notify::new(),
            children: Mutex::default(),
        })
    }

    /// Everybody has the new phase before anybody is woken: whose peer in the tree is dropped for it is not to take
    /// that for a failure of the peer.
    fn advance(self: &Arc<Self>, phase: u8) {
        let mut reached = Vec::new();
        self.mark(phase, &mut reached);
        for node in reached {
            node.stopping.notify_waiters();
            if phase == FORCED {
                node.forced.notify_waiters();
                let tasks = std::mem::take(&mut *node.tasks());
                tasks.into_iter().for_each(|(_, waker)| waker.wake());
            }
        }
    }

    fn mark(self: &Arc<Self>, phase: u8, reached: &mut Vec<Arc<Self>>) {
        if phase == RUNNING || self.phase.fetch_max(phase, Ordering::SeqCst) >= phase {
            return;
        }
        reached.push(Arc::clone(self));
        let children: Vec<_> = {
            let children = self.children.lock().unwrap_or_else(PoisonError::into_inner);
            children.iter().filter_map(Weak::upgrade).collect()
        };
        for child in children {
            child.mark(phase, reached);
        }
    }

    fn tasks(&self) -> MutexGuard<'_, Slab<Waker>> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_forced(&self) -> bool {
        self.phase.load(Ordering::SeqCst) == FORCED
    }

    async fn reached(&self, phase: u8, notify: &Notify) {
        // Made before the check: a notification between the two is not lost.
        let notified = notify.notified();
        if self.phase.load(Ordering::SeqCst) < phase {
            notified.await;
        }
    }

    /// Waits until nobody holds the `Live` any more.
    async fn idle(&self, rest: &Weak<Live>) {
        let notified = self.idle.notified();
        if rest.strong_count() > 0 {
            notified.await;
        }
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.0.advance(FORCED);
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        // The count is already zero here, so whoever waits sees it after this.
        self.node.idle.notify_waiters();
    }
}

pin_project! {
    /// A task, dropped when its owner is forced, and counted until it is dropped.
    struct Owned<F> {
        // Before its place, so that all a task holds is gone before it stops counting.
        #[pin]
        task: F,
        place: Place,
    }
}

/// A task's place with its owner.
struct Place {
    /// Where its waker is, once it has been polled.
    key: Option<u32>,
    live: Arc<Live>,
}

impl Place {
    /// Once: this is of the outermost future of its task, whose waker never changes its meaning. At each turn it would
    /// take a lock that all tasks of the owner share.
    fn enter(&mut self, waker: &Waker) {
        if self.key.is_none() {
            let key = self.live.node.tasks().insert(waker.clone());
            // There is not memory for so many tasks.
            self.key = u32::try_from(key).ok();
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let Some(key) = self.key.and_then(|key| usize::try_from(key).ok()) else { return };
        let mut tasks = self.live.node.tasks();
        let waker = tasks.try_remove(key);
        if tasks.is_empty() {
            tasks.shrink_to_fit();
        }
        drop(tasks);
        // Not under the lock: it may be the last that holds the task.
        drop(waker);
    }
}

impl<F: Future<Output = ()>> Future for Owned<F> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = self.project();
        // Before the check: a force between the two is not lost.
        this.place.enter(cx.waker());
        if this.place.live.node.is_forced() {
            return Poll::Ready(());
        }
        this.task.poll(cx)
    }
}

impl fmt::Debug for Tasks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let held = Arc::strong_count(&self.live).saturating_sub(1);
        f.debug_struct("Tasks").field("phase", &self.owner.0.phase).field("held", &held).finish()
    }
}

impl fmt::Debug for Draining {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Draining").field(&self.0.phase).finish()
    }
}

#[cfg(test)]
mod tests;
