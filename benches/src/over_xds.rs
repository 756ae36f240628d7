//! A large mesh that comes over xDS while connections are opened, and one that changes all the time.
//!
//! The control plane is the tests' own, in this process. It sends the same to both node proxies, encoded before the
//! clock starts, and each acknowledges what it has applied. The connections are short ones between pods of the two
//! nodes, some 900 a second: enough to count one in a thousand, and few enough to leave the machine idle otherwise.

use std::{process, thread, time::Duration};

use anyhow::{Context as _, Result, anyhow, ensure};
use mesh_tests::{
    control_plane::{ControlPlane, Kind, Order},
    wait::pause,
};
use prost::Message as _;
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::{
    process::{Memory, Usage},
    report::verdict,
    rounds::{median, table},
    rows::precise,
    scene::{Run, Scene},
    workloads::{Named, Place, REPLICAS},
};

/// Workloads of the mesh. A service for each ten comes with them.
const SIZE: u32 = 100_000;
/// Resources of a response, at most.
const RESPONSE: usize = 2000;
/// Node proxies that follow the control plane.
const PROXIES: usize = 2;
/// How long connections are opened while nothing changes, and then while the mesh is applied.
const WINDOW: Duration = Duration::from_secs(20);
/// How long the first connections may take, uncounted.
const WARM: Duration = Duration::from_secs(1);
/// Long enough that what is freed late is freed.
const SETTLE: Duration = Duration::from_secs(3);
/// When a response that is not acknowledged counts as lost.
const PATIENCE: Duration = Duration::from_secs(60);

/// How often the mesh changes: istiod gathers changes for so long.
const STEP: Duration = Duration::from_millis(100);
/// For a minute.
const STEPS: u32 = 600;
/// Steps between two looks at the memory.
const LOOK: u32 = 100;
/// Workloads that each step changes in place.
const CHANGED: u32 = 50;
/// Pods that each step replaces: one goes, and one with another name and address comes.
const REPLACED: u32 = 25;

/// What it took to apply the mesh, and what connections felt of it.
#[derive(Clone, Debug, Default)]
pub struct Applied {
    /// While nothing was applied, and while something always was.
    set_up: [Run; 2],
    /// How long it took both node proxies to add, to change and to remove all.
    seconds: [Vec<f64>; 3],
    /// How long updates have kept a reader of the state from it at most, in each node proxy, in seconds.
    holds: [f64; 2],
    /// Processor seconds of the control plane for each of those rounds.
    control: f64,
    /// Of both node proxies, without the mesh and with it.
    memory: [[Memory; 2]; 2],
}

/// What it took to follow the mesh for a minute.
#[derive(Clone, Debug, Default)]
pub struct Churned {
    /// While nothing changed, and while it did.
    set_up: [Run; 2],
    /// Updates a second that were applied.
    rate: f64,
    /// How long after it was sent the last one was applied, in seconds.
    lag: f64,
    /// How long a reader was kept from the state at most in each node proxy, in seconds, applying the mesh included.
    holds: [f64; 2],
    /// Of both node proxies, every ten seconds.
    memory: Vec<[Memory; 2]>,
}

/// Applies the mesh to fresh node proxies, changes all of it and takes it away, over and over.
pub fn applied(scene: &Scene, control: &ControlPlane) -> Result<Applied> {
    let stages = [orders(mesh()), orders(changed()), removals()];
    let before = fresh(scene, control)?;
    let idle = scene.gentle(WINDOW).context("idle")?;
    let mut seconds: [Vec<f64>; 3] = Default::default();
    let used = Usage::of(process::id())?;
    let (during, ()) = beside(scene, WINDOW, |is_loaded| {
        while is_loaded() {
            for (orders, seconds) in stages.iter().zip(&mut seconds) {
                seconds.push(deliver(control, orders)?);
            }
        }
        Ok(())
    })?;
    let rounds = seconds.iter().map(Vec::len).sum::<usize>();
    let control_used = (Usage::of(process::id())? - used).cpu / precise(rounds as u64);
    let [mesh, ..] = &stages;
    deliver(control, mesh)?;
    pause(SETTLE);
    Ok(Applied {
        set_up: [idle, during],
        seconds,
        holds: scene.longest_holds()?,
        control: control_used,
        memory: [before, scene.memory()?],
    })
}

/// Applies the mesh to fresh node proxies, and then a thousand updates a second for a minute.
pub fn churned(scene: &Scene, control: &ControlPlane) -> Result<Churned> {
    let steps: Vec<_> = (0..STEPS).map(step).collect();
    fresh(scene, control)?;
    deliver(control, &orders(mesh()))?;
    pause(SETTLE);
    let idle = scene.gentle(WINDOW).context("idle")?;
    let (during, (rate, lag, memory)) = beside(scene, STEP * STEPS, |_| {
        let (began, mark, mut memory) = (Instant::now(), control.mark(), Vec::new());
        for (number, step) in (0..).zip(&steps) {
            pause((began + STEP * number).saturating_duration_since(Instant::now()));
            if number.is_multiple_of(LOOK) {
                memory.push(scene.memory()?);
            }
            send(control, step)?;
        }
        let sent = Instant::now();
        acknowledged(control, mark, PROXIES * steps.len())?;
        memory.push(scene.memory()?);
        let updates = f64::from(STEPS * (CHANGED + 2 * REPLACED));
        Ok((updates / began.elapsed().as_secs_f64(), sent.elapsed().as_secs_f64(), memory))
    })?;
    Ok(Churned { set_up: [idle, during], rate, lag, holds: scene.longest_holds()?, memory })
}

/// Starts node proxies that follow the control plane, and gives their memory once they have settled.
fn fresh(scene: &Scene, control: &ControlPlane) -> Result<[Memory; 2]> {
    scene.start_proxies(&control.settings())?;
    scene.gentle(WARM).context("warming up")?;
    pause(SETTLE);
    scene.memory()
}

/// Does this while connections are opened for so long; it can ask whether they still are.
fn beside<T>(
    scene: &Scene,
    length: Duration,
    work: impl FnOnce(&dyn Fn() -> bool) -> Result<T>,
) -> Result<(Run, T)> {
    thread::scope(|scope| {
        let load = scope.spawn(|| scene.gentle(length));
        let done = work(&|| !load.is_finished());
        let run = load.join().map_err(|_panic| anyhow!("the load panicked"))?;
        Ok((run.context("while the mesh changes")?, done?))
    })
}

fn send(control: &ControlPlane, order: &Order) -> Result<()> {
    let sent = control.deliver(order);
    ensure!(sent == PROXIES, "{sent} node proxies follow the control plane");
    Ok(())
}

fn acknowledged(control: &ControlPlane, mark: usize, due: usize) -> Result<()> {
    let began = Instant::now();
    while control.acknowledged(mark)? < due {
        ensure!(began.elapsed() < PATIENCE, "not applied after {} s", PATIENCE.as_secs());
        pause(Duration::from_millis(2));
    }
    Ok(())
}

/// Sends these and waits until both node proxies have applied them. How long that took, in seconds.
fn deliver(control: &ControlPlane, orders: &[Order]) -> Result<f64> {
    let (began, mark) = (Instant::now(), control.mark());
    for order in orders {
        send(control, order)?;
    }
    acknowledged(control, mark, PROXIES * orders.len())?;
    Ok(began.elapsed().as_secs_f64())
}

fn mesh() -> impl Iterator<Item = Named> {
    let services = (0..SIZE / REPLICAS).map(|number| Place::of(number * REPLICAS, 0).service());
    services.chain((0..SIZE).map(|number| Place::of(number, number).workload(1)))
}

/// All workloads, with something about them that is new.
fn changed() -> impl Iterator<Item = Named> {
    (0..SIZE).map(|number| Place::of(number, number).workload(2))
}

fn encoded((name, address): Named) -> (String, Vec<u8>) {
    (name, address.encode_to_vec())
}

fn orders(resources: impl Iterator<Item = Named>) -> Vec<Order> {
    let mut resources = resources.map(encoded).peekable();
    let mut orders = Vec::new();
    while resources.peek().is_some() {
        orders.push(Order::new(Kind::Address, resources.by_ref().take(RESPONSE), Vec::new()));
    }
    orders
}

fn removals() -> Vec<Order> {
    let names: Vec<_> = mesh().map(|(name, _)| name).collect();
    names.chunks(RESPONSE).map(|some| Order::new(Kind::Address, [], some.to_vec())).collect()
}

/// Some workloads change and others are replaced; no step touches what another did.
fn step(number: u32) -> Order {
    let replaced = number * REPLACED..(number + 1) * REPLACED;
    let changed = (number * CHANGED..(number + 1) * CHANGED).map(|place| SIZE / 2 + place);
    let removed = replaced.clone().map(|place| Place::of(place, place).uid()).collect();
    let added = replaced.map(|place| Place::of(place, SIZE + place).workload(1));
    let all = changed.map(|place| Place::of(place, place).workload(2 + number)).chain(added);
    Order::new(Kind::Address, all.map(encoded), removed)
}

fn megabytes(kib: u64) -> String {
    format!("{:.1}", precise(kib) * 1024.0 / 1e6)
}

fn line(title: &str, cells: impl IntoIterator<Item = String>) -> Vec<String> {
    [title.to_owned()].into_iter().chain(cells).collect()
}

/// What connections felt: while nothing happened, and while this did.
fn set_up_text([idle, during]: &[Run; 2], title: &str, what: &str) -> String {
    let cells = |run: &Run| {
        let outcome = &run.outcome;
        let rate = precise(outcome.operations) / outcome.seconds;
        let micros =
            [rate, outcome.p50, outcome.p99, outcome.p999].map(|value| format!("{value:.0}"));
        micros.into_iter().chain([format!("{:.2}", run.used.cpu / outcome.seconds)])
    };
    let head = ["a second", "p50 µs", "p99 µs", "p99.9 µs", "CPU s/s", "p99.9 over idle, ms"];
    let over = verdict(Some((during.outcome.p999 - idle.outcome.p999) / 1000.0), 10.0);
    table(&[
        line(title, head.map(str::to_owned)),
        line("idle", cells(idle)),
        line(what, cells(during).chain([over])),
    ])
}

fn holds_line(holds: [f64; 2]) -> Vec<String> {
    line("longest hold, µs", holds.map(|hold| verdict(Some(hold * 1e6), 1000.0)))
}

fn runs_json([idle, during]: &[Run; 2]) -> Value {
    let run = |run: &Run| json!({ "outcome": run.outcome.to_json(), "cpu": run.used.cpu });
    json!({ "idle": run(idle), "during": run(during) })
}

fn memory_json(memory: &[[Memory; 2]]) -> Value {
    let one = |memory: &Memory| json!({ "rss_kib": memory.rss, "peak_kib": memory.peak });
    memory.iter().map(|[near, far]| json!({ "near": one(near), "far": one(far) })).collect()
}

impl Applied {
    pub(crate) fn text(&self) -> String {
        let title = format!("{SIZE} workloads over xDS");
        let mut text = set_up_text(&self.set_up, &title, "while they are applied");
        let [before, after] = self.memory;
        text.push_str(&table(&[
            line("", ["near", "far"].map(str::to_owned)),
            holds_line(self.holds),
            line("RSS before, MB", before.map(|memory| megabytes(memory.rss))),
            line("RSS with them, MB", after.map(|memory| megabytes(memory.rss))),
            line("peak, MB", after.map(|memory| megabytes(memory.peak))),
        ]));
        let seconds = |all: &Vec<f64>| {
            let first = all.first().copied().unwrap_or_default();
            format!("{:.2} ({first:.2})", median(all).unwrap_or_default())
        };
        let [added, changed, removed] = self.seconds.each_ref().map(seconds);
        text.push_str(&format!(
            "seconds until both have applied all, median (first): added {added}, changed {changed}, removed {removed}\n\
             CPU of the control plane for each: {:.2} s\n",
            self.control,
        ));
        text
    }

    pub(crate) fn json(&self) -> Value {
        let [added, changed, removed] = &self.seconds;
        json!({
            "workloads": SIZE, "set_up": runs_json(&self.set_up), "longest_hold_seconds": self.holds,
            "control_plane_cpu_seconds": self.control,
            "seconds": { "added": added, "changed": changed, "removed": removed },
            "memory": memory_json(&self.memory),
        })
    }
}

impl Churned {
    pub(crate) fn text(&self) -> String {
        let title = format!("{SIZE} workloads, updated");
        let mut text = set_up_text(&self.set_up, &title, "while they are updated");
        let step = STEP * LOOK;
        let times =
            (0..).take(self.memory.len()).map(|look| format!("{} s", (step * look).as_secs()));
        text.push_str(&table(&[
            line("", ["near", "far"].map(str::to_owned)),
            holds_line(self.holds),
        ]));
        let of = |which: fn(&[Memory; 2]) -> u64| {
            self.memory.iter().map(move |memory| megabytes(which(memory)))
        };
        text.push_str(&table(&[
            line("RSS, MB, after", times),
            line("near", of(|[near, _]| near.rss)),
            line("far", of(|[_, far]| far.rss)),
        ]));
        let (rate, lag) = (self.rate, self.lag * 1000.0);
        text.push_str(&format!(
            "updates a second: {rate:.0}; the last was applied after {lag:.0} ms\n"
        ));
        text
    }

    pub(crate) fn json(&self) -> Value {
        json!({
            "workloads": SIZE, "set_up": runs_json(&self.set_up), "updates_per_second": self.rate,
            "lag_seconds": self.lag, "longest_hold_seconds": self.holds,
            "memory": memory_json(&self.memory),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn the_mesh_has_a_name_for_everything() {
        let names: HashSet<_> = mesh().map(|(name, _)| name).collect();
        assert_eq!(names.len(), usize::try_from(SIZE + SIZE / REPLICAS).unwrap());
        const { assert!(STEPS * REPLACED <= SIZE / 2 && STEPS * CHANGED <= SIZE / 2) };
    }

    #[test]
    fn figures_are_held_against_the_goals() {
        let mut run = Run::default();
        run.outcome.p999 = 12_000.0;
        let applied =
            Applied { set_up: [Run::default(), run], holds: [0.0005, 0.002], ..Applied::default() };
        let text = applied.text();
        assert!(text.contains("12.00 OVER 10"), "{text}");
        assert!(text.contains("500.00 ok 1000"), "{text}");
        assert!(text.contains("2000.00 OVER 1000"), "{text}");
        assert!(Churned::default().text().contains("updates a second: 0"));
    }
}
