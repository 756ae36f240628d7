use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::*;

const SECOND: Duration = Duration::from_secs(1);

/// Counts those that were dropped.
struct Dropped(Arc<AtomicUsize>);

impl Drop for Dropped {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

fn endless(tasks: &Tasks, dropped: &Arc<AtomicUsize>) {
    let guard = Dropped(Arc::clone(dropped));
    tasks.spawn(|_| async move {
        let _guard = guard;
        std::future::pending::<()>().await;
    });
}

#[tokio::test(start_paused = true)]
async fn a_graceful_drain_lets_tasks_finish() {
    let tasks = Tasks::new();
    let (done, mut saw) = oneshot::channel();
    tasks.spawn(|draining| async move {
        draining.stopping().await;
        tokio::time::sleep(3 * SECOND).await;
        done.send(()).unwrap();
    });
    let start = Instant::now();
    assert!(tasks.drain(10 * SECOND).await);
    assert_eq!(start.elapsed(), 3 * SECOND);
    saw.try_recv().unwrap();
}

#[tokio::test(start_paused = true)]
async fn what_is_left_at_the_deadline_is_dropped() {
    let tasks = Tasks::new();
    let dropped = Arc::default();
    endless(&tasks, &dropped);
    endless(&tasks.child(), &dropped);
    let child = tasks.child();
    endless(&child, &dropped);
    let outside = child.draining();
    tasks.spawn(|_| async move { child.finished().await });
    let start = Instant::now();
    assert!(!tasks.drain(5 * SECOND).await);
    assert_eq!(start.elapsed(), 5 * SECOND);
    assert_eq!(dropped.load(Ordering::SeqCst), 3);
    outside.forced().await;
}

#[tokio::test(start_paused = true)]
async fn a_parent_waits_for_its_child_and_tells_it() {
    let parent = Tasks::new();
    let pod = parent.child();
    let connection = pod.child();
    let (done, mut saw) = oneshot::channel();
    connection.spawn(|draining| async move {
        draining.stopping().await;
        assert!(draining.is_stopping());
        tokio::time::sleep(2 * SECOND).await;
        done.send(()).unwrap();
    });
    pod.spawn(|_| async move { connection.finished().await });
    parent.spawn(|_| async move { pod.finished().await });
    assert!(parent.drain(10 * SECOND).await);
    saw.try_recv().unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_child_drains_alone() {
    let parent = Tasks::new();
    let child = parent.child();
    child.spawn(|draining| async move { draining.stopping().await });
    assert!(child.drain(SECOND).await);
    assert!(!parent.draining().is_stopping());
}

#[tokio::test(start_paused = true)]
async fn cancelling_and_dropping_drop_tasks() {
    let dropped = Arc::default();
    let cancelled = Tasks::new();
    let child = cancelled.child();
    endless(&child, &dropped);
    tokio::task::yield_now().await;
    cancelled.cancel();
    assert!(child.draining().is_stopping());
    assert!(child.drain(Duration::ZERO).await || dropped.load(Ordering::SeqCst) == 1);
    assert_eq!(dropped.load(Ordering::SeqCst), 1);

    let tasks = Tasks::new();
    endless(&tasks, &dropped);
    tokio::task::yield_now().await;
    let draining = tasks.draining();
    drop(tasks);
    draining.forced().await;
    tokio::task::yield_now().await;
    assert_eq!(dropped.load(Ordering::SeqCst), 2);
}

#[tokio::test(start_paused = true)]
async fn who_comes_late_is_told_at_once() {
    let tasks = Tasks::new();
    tasks.stop();
    let child = tasks.child();
    child.draining().stopping().await;
    tasks.cancel();
    child.draining().forced().await;
    let dropped = Arc::default();
    endless(&child, &dropped);
    endless(&tasks.child(), &dropped);
    tokio::task::yield_now().await;
    assert_eq!(dropped.load(Ordering::SeqCst), 2);
}

#[tokio::test(start_paused = true)]
async fn a_dropped_drain_forces() {
    let tasks = Tasks::new();
    let dropped = Arc::default();
    endless(&tasks, &dropped);
    assert!(tokio::time::timeout(SECOND, tasks.drain(60 * SECOND)).await.is_err());
    tokio::task::yield_now().await;
    assert_eq!(dropped.load(Ordering::SeqCst), 1);
}

#[tokio::test(start_paused = true)]
async fn a_child_kept_outside_does_not_hang_a_drain() {
    let tasks = Tasks::new();
    let child = tasks.child();
    let start = Instant::now();
    assert!(!tasks.drain(SECOND).await);
    assert_eq!(start.elapsed(), SECOND + AFTER_FORCE);
    drop(child);
}

#[tokio::test(start_paused = true)]
async fn children_that_ended_are_forgotten() {
    let tasks = Tasks::new();
    for _ in 0..1000 {
        drop(tasks.child());
    }
    assert!(tasks.owner.0.children.lock().unwrap().capacity() <= 8);
}

#[tokio::test]
async fn tasks_that_ended_leave_no_place() {
    let tasks = Tasks::new();
    let dropped = Arc::default();
    for n in 0..100 {
        tasks.spawn(|_| async {});
        if n % 10 == 0 {
            endless(&tasks, &dropped);
        }
    }
    while Arc::strong_count(&tasks.live) > 11 {
        tokio::task::yield_now().await;
    }
    assert_eq!(tasks.owner.0.tasks().len(), 10, "those that have not ended");
    tasks.cancel();
    assert!(tasks.drain(SECOND).await);
    assert_eq!(dropped.load(Ordering::SeqCst), 10);
}

#[test]
fn a_task_is_not_much_larger_than_its_future() {
    fn size<F>(_: &F) -> usize {
        size_of::<F>()
    }
    let tasks = Tasks::new();
    let body = [0_u8; 1024];
    let task = tasks.owned(|_| async move {
        tokio::task::yield_now().await;
        std::hint::black_box(&body);
    });
    let extra = size(&task) - size(&task.task);
    assert!(extra <= 16, "{extra} bytes");
}

/// Looks, when it is woken, how far another owner has come.
struct Looks {
    at: Draining,
    saw: std::sync::atomic::AtomicBool,
}

impl std::task::Wake for Looks {
    fn wake(self: Arc<Self>) {
        self.saw.store(self.at.is_stopping(), Ordering::SeqCst);
    }
}

/// Else a task could see its tunnel end, and not that it is to end as well.
#[test]
fn everybody_has_the_phase_before_anybody_is_woken() {
    let parent = Tasks::new();
    let child = parent.child();
    let looks = Arc::new(Looks { at: child.draining(), saw: false.into() });
    let waker = Arc::clone(&looks).into();
    let draining = parent.draining();
    let mut stopping = std::pin::pin!(draining.stopping());
    assert!(stopping.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
    parent.stop();
    assert!(looks.saw.load(Ordering::SeqCst));
}
