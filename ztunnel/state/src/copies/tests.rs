use super::*;
use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{atomic::AtomicU32, mpsc::sync_channel},
    thread,
};

fn both(copies: &Copies<u32>) -> [u32; 2] {
    [*copies.left.read().unwrap(), *copies.right.read().unwrap()]
}

#[test]
fn a_change_reaches_both() {
    let copies = Copies::of([0, 0]);
    for now in 1..4 {
        copies.change(|value| *value = now);
        assert_eq!((copies.read(|value| *value), both(&copies)), (now, [now, now]));
    }
}

/// As where it has lost its core: in the middle of the change to the first copy or to the second.
#[test]
fn a_writer_that_stands_still_keeps_no_reader() {
    for (stop_at, seen) in [(1, 0), (2, 1)] {
        let copies = Copies::of([0, 0]);
        let (stopped, stops) = sync_channel(0);
        let (go_on, told) = sync_channel::<()>(0);
        thread::scope(|scope| {
            let copies = &copies;
            let writer = scope.spawn(move || {
                let mut calls = 0;
                copies.change(|value| {
                    calls += 1;
                    if calls == stop_at {
                        stopped.send(()).unwrap();
                        told.recv().unwrap();
                    }
                    *value = 1;
                });
            });
            stops.recv().unwrap();
            for _ in 0..3 {
                assert_eq!(copies.read(|value| *value), seen, "stopped at {stop_at}");
            }
            assert!(!writer.is_finished());
            go_on.send(()).unwrap();
        });
        assert_eq!(both(&copies), [1, 1]);
    }
}

#[test]
fn a_reader_that_stays_keeps_the_writer_and_no_reader() {
    let copies = Copies::of([0, 0]);
    let (entered, enters) = sync_channel(0);
    let (leave, told) = sync_channel::<()>(0);
    thread::scope(|scope| {
        let copies = &copies;
        let slow = scope.spawn(move || {
            copies.read(|value| {
                entered.send(()).unwrap();
                told.recv().unwrap();
                *value
            })
        });
        enters.recv().unwrap();
        let writer = scope.spawn(|| copies.change(|value| *value += 1));
        while copies.read(|value| *value) == 0 {
            thread::yield_now();
        }
        for _ in 0..3 {
            assert_eq!(copies.read(|value| *value), 1);
        }
        assert!(!writer.is_finished(), "the other copy is not to be changed yet");
        leave.send(()).unwrap();
        assert_eq!(slow.join().unwrap(), 0, "what it entered stays as it was");
    });
    assert_eq!(both(&copies), [1, 1]);
}

/// Else a reader could see what is not shown yet, and the next time what was before it.
#[test]
fn who_comes_late_is_turned_away() {
    let copies = Copies::of([0, 0]);
    assert!(copies.enter(false).is_some());
    assert!(copies.enter(true).is_none(), "free, but hidden");
    copies.change(|value| *value = 1);
    assert!(copies.enter(false).is_none(), "shown when it looked");
    assert_eq!(*copies.enter(true).unwrap(), 1);
}

static LOOKS: AtomicU32 = AtomicU32::new(0);

/// Each look at the clock takes 1 ms.
#[test]
fn who_is_turned_away_is_measured() {
    let copies = Copies::of([1, 2]);
    copies.measure_by(|| Duration::from_millis(1) * LOOKS.fetch_add(1, Ordering::SeqCst));
    assert_eq!(copies.read(|value| *value), 1);
    assert_eq!((copies.longest_wait(), LOOKS.load(Ordering::SeqCst)), (Duration::ZERO, 0));
    thread::scope(|scope| {
        // As if this writer had changed what was shown until now.
        let taken = copies.left.write().unwrap();
        let reader = scope.spawn(|| copies.read(|value| *value));
        while LOOKS.load(Ordering::SeqCst) == 0 {
            thread::yield_now();
        }
        copies.is_right_shown.store(true, Ordering::SeqCst);
        assert_eq!(reader.join().unwrap(), 2);
        drop(taken);
    });
    assert_eq!(copies.longest_wait(), Duration::from_millis(1));
}

#[test]
fn a_reader_that_panics_harms_nobody() {
    let copies = Copies::of([0, 0]);
    for now in 1..4 {
        catch_unwind(AssertUnwindSafe(|| copies.read(|_| panic!("a reader's own")))).unwrap_err();
        copies.change(|value| *value = now);
        assert_eq!((copies.read(|value| *value), both(&copies)), (now, [now, now]));
    }
}

#[test]
fn what_a_panic_left_half_done_is_never_shown() {
    for (panics_at, shown) in [(1, 10), (2, 11)] {
        let copies = Copies::of([10, 10]);
        let change = |panics_at| {
            let mut calls = 0;
            let change = |value: &mut i32| {
                calls += 1;
                *value += 1;
                assert_ne!(calls, panics_at, "the writer's own");
            };
            catch_unwind(AssertUnwindSafe(|| copies.change(change)))
        };
        change(panics_at).unwrap_err();
        assert_eq!(copies.read(|value| *value), shown);
        change(0).unwrap_err();
        assert_eq!(copies.read(|value| *value), shown, "nothing more is changed");
    }
}

/// Two numbers that are always changed together, and only grow.
#[test]
fn readers_see_whole_changes_in_order() {
    const LAST: u32 = 20_000;
    let copies = Copies::of([(0, 0); 2]);
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let mut before = 0;
                while before < LAST {
                    let (one, other) = copies.read(|pair| *pair);
                    assert_eq!(one, other);
                    assert!(one >= before, "{one} after {before}");
                    before = one;
                }
            });
        }
        for now in 1..=LAST {
            copies.change(|pair| {
                pair.0 = now;
                hint::spin_loop();
                pair.1 = now;
            });
        }
    });
}
