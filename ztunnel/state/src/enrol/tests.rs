use super::*;
use crate::{
    Update, Writer,
    testing::{with, workload, writer},
};
use mesh_policy::wire::Scope;
use std::{sync::atomic::AtomicU32, thread};

fn pod(name: &str) -> PodInfo {
    PodInfo {
        name: name.parse().unwrap(),
        namespace: "ns".parse().unwrap(),
        service_account: name.parse().unwrap(),
    }
}

fn policy(name: &str, scope: Scope) -> Update {
    crate::testing::policy(name.parse().unwrap(), scope)
}

fn selecting(policies: &[&str]) -> Update {
    let names = policies.iter().map(|name| name.parse().unwrap()).collect();
    with(workload("c//Pod/ns/a", &[]), |t| t.policies = names).into()
}

fn said(enrolment: &mut Enrolment) -> Vec<String> {
    let set = Arc::clone(&enrolment.policies.borrow_and_update());
    let name = |entry: &Entry| match entry {
        Entry::Known(policy) => policy.name.to_string(),
        Entry::Missing(name) => format!("missing {name}"),
        Entry::Rejected(name) => format!("rejected {name}"),
    };
    set.entries().iter().map(name).collect()
}

fn enrolled(updates: impl IntoIterator<Item = Update>) -> (Writer, Enrolment) {
    let mut writer = writer();
    writer.apply(updates);
    let enrolment = writer.handle().enrol(pod("a"));
    (writer, enrolment)
}

#[test]
fn the_workload_comes_and_goes() {
    let (mut writer, mut enrolment) = enrolled([]);
    assert!(enrolment.workload.borrow_and_update().is_none());
    writer.apply([workload("c//Pod/ns/other", &[]).into()]);
    assert!(!enrolment.workload.has_changed().unwrap(), "not ours");
    let elsewhere = Workload { node: "n2".parse().unwrap(), ..workload("c//Pod/ns/a", &[]) };
    writer.apply([elsewhere.into()]);
    assert!(enrolment.workload.borrow().is_none(), "of another node");
    writer.apply([workload("c//Pod/ns/a", &[]).into()]);
    assert_eq!(enrolment.workload.borrow_and_update().as_ref().unwrap().name.as_str(), "a");
    writer.apply([workload("c//Pod/ns/a", &[]).into()]);
    assert!(!enrolment.workload.has_changed().unwrap(), "nothing new");
    writer.apply([Update::RemoveWorkload("c//Pod/ns/a".parse().unwrap())]);
    assert!(enrolment.workload.borrow().is_none());
}

#[test]
fn scopes() {
    let (mut writer, mut enrolment) = enrolled([
        policy("root/all", Scope::Global),
        policy("ns/ours", Scope::Namespace),
        policy("other/theirs", Scope::Namespace),
        policy("ns/named", Scope::WorkloadSelector),
        policy("ns/unnamed", Scope::WorkloadSelector),
        selecting(&["ns/named", "ns/later"]),
    ]);
    assert_eq!(said(&mut enrolment), ["missing ns/later", "ns/named", "ns/ours", "root/all"]);
    writer.apply([policy("ns/later", Scope::WorkloadSelector)]);
    assert!(enrolment.policies.has_changed().unwrap());
    assert_eq!(said(&mut enrolment), ["ns/later", "ns/named", "ns/ours", "root/all"]);
    writer
        .apply([policy("other/theirs", Scope::Namespace), policy("other/more", Scope::Namespace)]);
    assert!(!enrolment.policies.has_changed().unwrap(), "not about this pod");
    writer.apply([policy("ns/ours", Scope::WorkloadSelector)]);
    assert_eq!(said(&mut enrolment), ["ns/later", "ns/named", "root/all"], "another scope");
    writer.apply(["root/all", "ns/named"].map(|name| Update::RemovePolicy(name.parse().unwrap())));
    assert_eq!(said(&mut enrolment), ["ns/later", "missing ns/named"]);
}

#[test]
fn what_was_rejected_is_known_to_be() {
    let reject = |name: &str, scope| Update::RejectPolicy(name.parse().unwrap(), scope);
    let (mut writer, mut enrolment) = enrolled([selecting(&["ns/named"])]);
    writer.apply([
        reject("ns/named", None),
        reject("ns/ours", Some(Scope::Namespace)),
        reject("other/theirs", Some(Scope::Namespace)),
        reject("ns/unnamed", Some(Scope::WorkloadSelector)),
    ]);
    assert_eq!(said(&mut enrolment), ["rejected ns/named", "rejected ns/ours"]);
    writer.apply([policy("ns/named", Scope::WorkloadSelector), policy("ns/ours", Scope::Global)]);
    assert_eq!(said(&mut enrolment), ["ns/named", "ns/ours"], "a good version came");
    writer.apply([reject("ns/named", None), reject("ns/ours", Some(Scope::Namespace))]);
    assert_eq!(said(&mut enrolment), ["ns/named", "ns/ours"], "the good version stays in force");
    writer.apply(["ns/named", "ns/ours"].map(|name| Update::RemovePolicy(name.parse().unwrap())));
    writer.apply([reject("ns/ours", Some(Scope::Namespace))]);
    assert_eq!(said(&mut enrolment), ["missing ns/named", "rejected ns/ours"]);
    writer.apply([Update::RemovePolicy("ns/ours".parse().unwrap())]);
    assert_eq!(said(&mut enrolment), ["missing ns/named"]);
}

#[test]
fn what_was_rejected_may_have_any_scope() {
    let reject = |name: &str| Update::RejectPolicy(name.parse().unwrap(), None);
    let mut writer = Writer::new(Text::default()).rooted("root".parse().unwrap());
    let mut enrolment = writer.handle().enrol(pod("a"));
    writer.apply([selecting(&[]), reject("ns/ours"), reject("other/theirs"), reject("root/all")]);
    assert_eq!(said(&mut enrolment), ["rejected ns/ours", "rejected root/all"]);
    writer.apply([policy("ns/ours", Scope::WorkloadSelector)]);
    assert_eq!(said(&mut enrolment), ["rejected root/all"]);
    writer.apply([Update::RemovePolicy("root/all".parse().unwrap())]);
    assert!(said(&mut enrolment).is_empty());
}

/// Else a connection could be let in while its pod's workload is replaced.
#[test]
fn a_workload_that_is_gone_lifts_nothing() {
    let (mut writer, mut enrolment) =
        enrolled([selecting(&["ns/named"]), policy("ns/named", Scope::WorkloadSelector)]);
    assert_eq!(said(&mut enrolment), ["ns/named"]);
    writer.apply([
        Update::RemoveWorkload("c//Pod/ns/a".parse().unwrap()),
        policy("root/all", Scope::Global),
    ]);
    assert_eq!(said(&mut enrolment), ["ns/named", "root/all"], "and what is new still counts");
    writer.apply([selecting(&[])]);
    assert_eq!(said(&mut enrolment), ["root/all"]);
}

#[test]
fn pods_alike_share_a_set() {
    let (mut writer, mut first) = enrolled([]);
    let second = writer.handle().enrol(pod("b"));
    writer.apply([policy("root/all", Scope::Global)]);
    let set = Arc::clone(&first.policies.borrow_and_update());
    assert!(Arc::ptr_eq(&set, &second.policies.borrow()));
    let version = set.version();
    writer.apply([policy("root/more", Scope::Global)]);
    assert!(first.policies.borrow().version() > version, "versions grow");
}

/// Without a node's name (dedicated mode) the workload is found wherever it is.
#[test]
fn without_a_node_any_workload_may_be_the_pod() {
    let mut writer = Writer::new(Text::default());
    let enrolment = writer.handle().enrol(pod("a"));
    writer.apply([workload("c//Pod/ns/a", &[]).into()]);
    assert!(enrolment.workload.borrow().is_some());
}

/// However a pod's enrolment and an update meet: here they begin at the same time, over and over, and the enrolment
/// takes its time over the many policies.
#[test]
fn what_comes_while_a_pod_is_enrolled_is_told() {
    const ROUNDS: u32 = 3000;
    let update = |capacity| Workload { capacity, ..workload("c//Pod/ns/a", &[]) }.into();
    let (mut writer, _first) =
        enrolled((0..100).map(|id| policy(&format!("ns/p{id}"), Scope::Namespace)));
    let handle = writer.handle();
    let (asked, done) = (AtomicU32::new(0), AtomicU32::new(0));
    let reach = |number: &AtomicU32, round| {
        while number.load(Ordering::SeqCst) < round {
            std::hint::spin_loop();
        }
    };
    let mut missed = 0;
    thread::scope(|scope| {
        scope.spawn(|| {
            for round in 1..=ROUNDS {
                reach(&asked, round);
                writer.apply([update(round)]);
                done.store(round, Ordering::SeqCst);
            }
        });
        for round in 1..=ROUNDS {
            asked.store(round, Ordering::SeqCst);
            let enrolment = handle.enrol(pod("a"));
            reach(&done, round);
            let known = enrolment.workload.borrow().as_ref().map(|found| found.capacity);
            missed += u32::from(known != Some(round));
        }
    });
    assert_eq!(missed, 0, "of {ROUNDS} updates");
}
