use super::*;
use Priority::{Background, RealTime, Warmup};
use proptest::prelude::*;
use std::collections::HashSet;

const SECOND: Duration = Duration::from_secs(1);
const HOUR: Duration = Duration::from_hours(1);

fn failed() -> Landing {
    Landing::Failed { chance: 0.0, expires: None }
}

fn keys(schedule: &mut Schedule<&'static str>, now: Instant) -> Vec<&'static str> {
    std::iter::from_fn(|| schedule.start(now)).map(|start| start.key).collect()
}

#[test]
fn by_priority_then_first_come() {
    let now = Instant::now();
    let mut schedule = Schedule::new(8);
    for (key, priority) in
        [("b1", Background), ("w1", Warmup), ("r1", RealTime), ("w2", Warmup), ("r2", RealTime)]
    {
        schedule.want(&key, priority);
    }
    assert_eq!(keys(&mut schedule, now), ["r1", "r2", "w1", "w2", "b1"]);
}

#[test]
fn wanting_it_sooner_moves_it_up_and_never_down() {
    let now = Instant::now();
    let mut schedule = Schedule::new(8);
    for key in ["a", "b", "c"] {
        schedule.want(&key, Warmup);
    }
    schedule.want(&"c", RealTime);
    schedule.want(&"c", Background);
    assert_eq!(keys(&mut schedule, now), ["c", "a", "b"]);
}

#[test]
fn at_most_so_many_flights() {
    let now = Instant::now();
    let mut schedule = Schedule::new(2);
    for key in ["a", "b", "c"] {
        schedule.want(&key, Warmup);
    }
    let a = schedule.start(now).unwrap();
    schedule.start(now).unwrap();
    assert_eq!(schedule.start(now), None);
    assert!(schedule.landed(&a, failed(), now));
    assert_eq!(schedule.start(now).unwrap().key, "c");
}

#[test]
fn one_flight_per_key() {
    let now = Instant::now();
    let mut schedule = Schedule::new(8);
    schedule.want(&"a", RealTime);
    let flight = schedule.start(now).unwrap();
    schedule.want(&"a", RealTime);
    assert_eq!(schedule.start(now), None);
    // Not even where it was forgotten and is wanted anew.
    schedule.forget(&"a");
    schedule.want(&"a", RealTime);
    assert_eq!(schedule.start(now), None);
    assert!(!schedule.landed(&flight, Landing::Issued { refresh: now + HOUR }, now), "discarded");
    let second = schedule.start(now).unwrap();
    assert!(schedule.landed(&second, Landing::Issued { refresh: now + HOUR }, now));
}

#[test]
fn a_refresh_comes_when_due_and_in_the_background() {
    let now = Instant::now();
    let mut schedule = Schedule::new(8);
    schedule.want(&"a", RealTime);
    let flight = schedule.start(now).unwrap();
    schedule.landed(&flight, Landing::Issued { refresh: now + HOUR }, now);
    assert_eq!(schedule.next_due(), Some(now + HOUR));
    assert_eq!(schedule.start(now + HOUR - SECOND), None);
    schedule.want(&"b", Warmup);
    assert_eq!(keys(&mut schedule, now + HOUR), ["b", "a"]);
}

#[test]
fn backs_off_by_the_table() {
    let mut now = Instant::now();
    let start = now;
    let mut schedule = Schedule::new(8);
    schedule.want(&"a", RealTime);
    let mut delays = Vec::new();
    for _ in 0..16 {
        let flight = schedule.start(now).unwrap();
        schedule.landed(&flight, failed(), now);
        let due = schedule.due(&"a").unwrap();
        delays.push((due - now).as_secs());
        // Impatience does not help.
        schedule.want(&"a", RealTime);
        assert_eq!(schedule.start(due - SECOND / 10), None);
        now = due;
    }
    assert_eq!(delays[..9], [1, 2, 4, 8, 16, 32, 64, 128, 150]);
    assert!(delays[9..].iter().all(|delay| *delay == 150), "{delays:?}");
    assert!(now - start > GIVE_UP_HURRYING);

    // A success makes it young again.
    let flight = schedule.start(now).unwrap();
    schedule.landed(&flight, Landing::Issued { refresh: now }, now);
    let flight = schedule.start(now).unwrap();
    schedule.landed(&flight, failed(), now);
    assert_eq!(schedule.due(&"a"), Some(now + SECOND));
}

#[test]
fn after_fifteen_minutes_delays_are_constant() {
    let now = Instant::now();
    let mut schedule = Schedule::new(8);
    schedule.want(&"a", RealTime);
    let flight = schedule.start(now).unwrap();
    schedule.landed(&flight, failed(), now);
    // Slow failures: the second attempt ends after a quarter of an hour.
    let flight = schedule.start(now + SECOND).unwrap();
    let later = now + GIVE_UP_HURRYING;
    schedule.landed(&flight, Landing::Failed { chance: -1.0, expires: None }, later);
    assert_eq!(schedule.due(&"a"), Some(later + LONGEST_DELAY), "no jitter either");
}

#[test]
fn chance_moves_a_delay_by_a_fifth() {
    for (chance, millis) in [(-1.0, 800), (0.5, 1100), (1.0, 1200), (7.0, 1200)] {
        let now = Instant::now();
        let mut schedule = Schedule::new(8);
        schedule.want(&"a", RealTime);
        let flight = schedule.start(now).unwrap();
        schedule.landed(&flight, Landing::Failed { chance, expires: None }, now);
        assert_eq!((schedule.due(&"a").unwrap() - now).as_millis(), millis);
    }
}

#[test]
fn what_expires_first_is_tried_first() {
    let now = Instant::now();
    let mut schedule = Schedule::new(8);
    schedule.want(&"a", RealTime);
    let flight = schedule.start(now).unwrap();
    let expires = Some(now + SECOND / 2);
    schedule.landed(&flight, Landing::Failed { chance: 0.0, expires }, now);
    assert_eq!(schedule.due(&"a"), expires);
}

#[test]
fn what_is_fresh_can_be_wanted_again() {
    let now = Instant::now();
    let mut schedule = Schedule::new(8);
    schedule.want(&"a", RealTime);
    let flight = schedule.start(now).unwrap();
    schedule.landed(&flight, Landing::Issued { refresh: now + HOUR }, now);
    // The clock was set forward, say: the certificate is not valid any more.
    schedule.want(&"a", RealTime);
    assert_eq!(keys(&mut schedule, now), ["a"]);
    assert_eq!(schedule.next_due(), None);
}

#[derive(Clone, Debug)]
enum Step {
    Want(u8, Priority),
    Forget(u8),
    Start,
    Land(usize, bool),
    Wait(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let key = 0..6_u8;
    let priority = prop_oneof![Just(Background), Just(Warmup), Just(RealTime)];
    prop_oneof![
        (key.clone(), priority).prop_map(|(key, priority)| Step::Want(key, priority)),
        key.prop_map(Step::Forget),
        Just(Step::Start),
        (any::<usize>(), any::<bool>()).prop_map(|(which, ok)| Step::Land(which, ok)),
        (0..200_u64).prop_map(Step::Wait),
    ]
}

proptest! {
    /// Whatever happens: never more flights than allowed, never two of a key, nothing lost, nothing wanted
    /// that was forgotten, and what may start does.
    #[test]
    fn holds_its_promises(steps in proptest::collection::vec(step(), 0..200)) {
        const MOST: usize = 3;
        let mut now = Instant::now();
        let mut schedule = Schedule::new(MOST);
        let mut wanted = HashSet::new();
        let mut flights: Vec<Start<u8>> = Vec::new();
        for step in steps {
            match step {
                Step::Want(key, priority) => {
                    schedule.want(&key, priority);
                    wanted.insert(key);
                }
                Step::Forget(key) => {
                    schedule.forget(&key);
                    wanted.remove(&key);
                }
                Step::Start => {
                    if let Some(start) = schedule.start(now) {
                        prop_assert!(wanted.contains(&start.key));
                        prop_assert!(flights.iter().all(|flight| flight.key != start.key));
                        flights.push(start);
                        prop_assert!(flights.len() <= MOST);
                    }
                }
                Step::Land(_, _) if flights.is_empty() => {}
                Step::Land(which, ok) => {
                    let flight = flights.swap_remove(which % flights.len());
                    let landing = if ok {
                        Landing::Issued { refresh: now + 100 * SECOND }
                    } else {
                        failed()
                    };
                    if schedule.landed(&flight, landing, now) {
                        prop_assert!(wanted.contains(&flight.key));
                    }
                }
                Step::Wait(seconds) => now += Duration::from_secs(seconds),
            }
        }
        for flight in flights.drain(..) {
            schedule.landed(&flight, failed(), now);
        }
        // After a long wait, all that is wanted is due, three at a time.
        now += HOUR;
        let mut seen = HashSet::new();
        while let Some(start) = schedule.start(now) {
            seen.insert(start.key);
            schedule.landed(&start, Landing::Issued { refresh: now + HOUR }, now);
        }
        prop_assert_eq!(seen, wanted);
    }
}
