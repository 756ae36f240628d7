//! What was measured, as text and as JSON.

use serde_json::{Value, json};

use crate::{
    load::client::Outcome,
    memory::{Held, Loaded},
    over_xds::{Applied, Churned},
    rounds::{median, table},
    rows::{Row, precise},
    scene::Run,
    tunnels::Opened,
};

/// Quoted from the issue: new tunnels a second, and processor seconds per thousand.
const TUNNELS: [f64; 2] = [1480.0, 1.2];
/// Quoted: resident memory when idle, in MB, and per held connection in KB, of both node proxies.
const MEMORY: [f64; 2] = [15.0, 6.1];
/// Quoted: workloads, MB resident, MB at most, seconds to load.
const LARGE: [(u32, [f64; 3]); 2] =
    [(100_000, [126.0, 598.0, 2.0]), (500_000, [603.0, 3600.0, 16.0])];

/// All rounds of one row.
#[derive(Debug)]
pub struct Measured {
    /// What was measured.
    pub row: Row,
    /// Without node proxies.
    pub without: Vec<Outcome>,
    /// Through them.
    pub through: Vec<Run>,
    /// Why there are fewer rounds than there should be.
    pub failure: Option<String>,
}

/// Everything that was measured.
#[derive(Debug, Default)]
pub struct Report {
    /// Machine, versions and settings.
    pub conditions: Vec<(&'static str, String)>,
    /// The rows.
    pub rows: Vec<Measured>,
    /// Rounds of new tunnels.
    pub tunnels: Vec<Opened>,
    /// Memory idle and for held connections.
    pub held: Vec<Held>,
    /// Memory for large meshes.
    pub loaded: Vec<Loaded>,
    /// A large mesh applied over xDS.
    pub applied: Option<Applied>,
    /// A large mesh that changes all the time.
    pub churned: Option<Churned>,
    /// Parts that could not be measured, and why.
    pub failures: Vec<String>,
}

/// The medians of a row.
#[derive(Clone, Copy, Debug)]
struct Medians {
    rate: [Option<f64>; 2],
    p50: [Option<f64>; 2],
    p99: [Option<f64>; 2],
    cpu: Option<f64>,
    switches: Option<f64>,
}

impl Measured {
    fn medians(&self) -> Medians {
        let row = &self.row;
        let without = |of: fn(&Row, &Outcome) -> f64| -> Option<f64> {
            median(&self.without.iter().map(|outcome| of(row, outcome)).collect::<Vec<_>>())
        };
        let through = |of: fn(&Row, &Run) -> f64| -> Option<f64> {
            median(&self.through.iter().map(|run| of(row, run)).collect::<Vec<_>>())
        };
        Medians {
            rate: [without(Row::rate), through(|row, run| row.rate(&run.outcome))],
            p50: [without(|_, outcome| outcome.p50), through(|_, run| run.outcome.p50)],
            p99: [without(|_, outcome| outcome.p99), through(|_, run| run.outcome.p99)],
            cpu: through(|row, run| run.used.cpu / row.units(&run.outcome)),
            switches: through(|row, run| precise(run.used.switches) / row.per_switch(&run.outcome)),
        }
    }

    fn line(&self) -> Vec<String> {
        let (row, medians) = (&self.row, self.medians());
        let [without, through] = medians.rate;
        let decimals = if row.is_bulk() { 2 } else { 0 };
        let latency = |pair: [Option<f64>; 2]| {
            pair.map(|value| {
                value.filter(|_| !row.is_bulk()).map_or_else(none, |value| format!("{value:.0}"))
            })
        };
        let ([p50_without, p50], [p99_without, p99]) = (latency(medians.p50), latency(medians.p99));
        vec![
            row.title.to_owned(),
            shown(without, decimals),
            shown(through, decimals),
            shown(over(through, without), 2),
            shown(row.quoted.ratio, 2),
            format!("{} / {}", p50_without, p50),
            format!("{} / {}", p99_without, p99),
            shown(medians.cpu, 3),
            shown(row.quoted.cpu, 2),
            verdict(over(medians.cpu, row.quoted.cpu), row.goal),
            shown(medians.switches, 2),
        ]
    }

    fn json(&self) -> Value {
        let medians = self.medians();
        let run = |run: &Run| json!({ "outcome": run.outcome.to_json(), "cpu": run.used.cpu, "switches": run.used.switches });
        json!({
            "key": self.row.key, "title": self.row.title, "unit": self.row.unit(),
            "rate": { "none": medians.rate[0], "mesh": medians.rate[1] },
            "p50_us": { "none": medians.p50[0], "mesh": medians.p50[1] },
            "p99_us": { "none": medians.p99[0], "mesh": medians.p99[1] },
            "cpu_seconds_per_unit": medians.cpu, "switches_per_operation": medians.switches,
            "reference": { "ratio": self.row.quoted.ratio, "cpu_seconds_per_unit": self.row.quoted.cpu },
            "rounds": {
                "none": self.without.iter().map(Outcome::to_json).collect::<Vec<_>>(),
                "mesh": self.through.iter().map(run).collect::<Vec<_>>(),
            },
            "failure": self.failure,
        })
    }
}

impl Report {
    /// As tables.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = String::new();
        for (what, how) in &self.conditions {
            text.push_str(&format!("{what}: {how}\n"));
        }
        if !self.rows.is_empty() {
            text.push_str(
                "\nMedians. Rates in Gb/s (bulk) or a second, latencies in µs, CPU in seconds of both node proxies per \
                 GB (bulk) or per 10k,\nswitches of both per operation (bulk: per MB). \"ref\" is quoted from the \
                 issue: the best existing node proxy on a machine of this kind.\n\n",
            );
            let head = [
                "",
                "none",
                "mesh",
                "ratio",
                "ref",
                "p50 none/mesh",
                "p99 none/mesh",
                "CPU",
                "ref",
                "CPU/ref",
                "switches",
            ];
            let mut rows = vec![head.map(str::to_owned).to_vec()];
            rows.extend(self.rows.iter().map(Measured::line));
            text.push_str(&table(&rows));
        }
        let parts = [
            self.tunnels_text(),
            self.held_text(),
            self.loaded_text(),
            self.applied.as_ref().map(Applied::text),
            self.churned.as_ref().map(Churned::text),
        ];
        for part in parts.into_iter().flatten() {
            text.push('\n');
            text.push_str(&part);
        }
        let broken = self.rows.iter().filter_map(|measured| measured.failure.as_ref());
        for failure in broken.chain(&self.failures) {
            text.push_str(&format!("\nFAILED: {failure}\n"));
        }
        text
    }

    /// Whether everything was measured.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.failures.is_empty() && self.rows.iter().all(|measured| measured.failure.is_none())
    }

    fn tunnels_text(&self) -> Option<String> {
        let of = |of: fn(&Opened) -> f64| median(&self.tunnels.iter().map(of).collect::<Vec<_>>());
        let rate = of(|one| one.tunnels / one.seconds)?;
        let cpu = of(|one| one.cpu * 1000.0 / one.tunnels)?;
        let fresh = of(|one| one.tunnels / one.connections)?;
        let p50 = of(|one| one.p50)?;
        let [rate_quoted, cpu_quoted] = TUNNELS;
        let rows = [
            [
                "new tunnels, 64 keys",
                "a second",
                "ref",
                "CPU s per 1k",
                "ref",
                "CPU/ref",
                "p50 µs",
                "per connection",
            ]
            .map(str::to_owned)
            .to_vec(),
            vec![
                String::new(),
                format!("{rate:.0}"),
                format!("{rate_quoted:.0}"),
                format!("{cpu:.3}"),
                format!("{cpu_quoted:.2}"),
                verdict(Some(cpu / cpu_quoted), 1.0),
                format!("{p50:.0}"),
                format!("{fresh:.3}"),
            ],
        ];
        Some(table(&rows))
    }

    fn held_text(&self) -> Option<String> {
        let idle = self.held.first()?;
        let [idle_quoted, per_quoted] = MEMORY;
        let mut rows = vec![
            ["held connections", "near, MB", "far, MB", "KB each, both", "ref", "of ref"]
                .map(str::to_owned)
                .to_vec(),
        ];
        for held in &self.held {
            let [near, far] = held.rss.map(|kib| precise(kib) * 1024.0 / 1e6);
            let grown = precise(held.anonymous.iter().sum::<u64>())
                - precise(idle.anonymous.iter().sum::<u64>());
            let each =
                Some(grown * 1.024 / f64::from(held.connections)).filter(|_| held.connections > 0);
            let (quoted, share) = match each {
                Some(each) => (per_quoted, each / per_quoted),
                None => (idle_quoted, near.max(far) / idle_quoted),
            };
            rows.push(vec![
                held.connections.to_string(),
                format!("{near:.1}"),
                format!("{far:.1}"),
                shown(each, 2),
                format!("{quoted:.1}"),
                verdict(Some(share), 0.5),
            ]);
        }
        Some(table(&rows))
    }

    fn loaded_text(&self) -> Option<String> {
        self.loaded.first()?;
        let head = [
            "workloads",
            "seconds",
            "ref",
            "CPU s",
            "RSS, MB",
            "ref",
            "of ref",
            "peak, MB",
            "ref",
            "of ref",
        ];
        let mut rows = vec![head.map(str::to_owned).to_vec()];
        for loaded in &self.loaded {
            let quoted =
                LARGE.iter().find(|(size, _)| *size == loaded.workloads).map(|(_, quoted)| *quoted);
            let [rss_quoted, peak_quoted, seconds_quoted] =
                quoted.map_or([None; 3], |quoted| quoted.map(Some));
            let [rss, peak] = [loaded.memory.rss, loaded.memory.peak]
                .map(|kib| Some(precise(kib) * 1024.0 / 1e6));
            rows.push(vec![
                loaded.workloads.to_string(),
                format!("{:.2}", loaded.seconds),
                shown(seconds_quoted, 1),
                format!("{:.2}", loaded.cpu),
                shown(rss, 1),
                shown(rss_quoted, 0),
                verdict(over(rss, rss_quoted), 0.5),
                shown(peak, 1),
                shown(peak_quoted, 0),
                verdict(over(peak, peak_quoted), 0.5),
            ]);
        }
        Some(table(&rows))
    }

    /// As JSON, rounds and all.
    #[must_use]
    pub fn json(&self) -> Value {
        let conditions: serde_json::Map<String, Value> =
            self.conditions.iter().map(|(what, how)| ((*what).to_owned(), json!(how))).collect();
        let tunnels = self.tunnels.iter().map(|one| {
            json!({
                "connections": one.connections, "tunnels": one.tunnels, "seconds": one.seconds, "cpu": one.cpu,
                "p50_us": one.p50,
            })
        });
        let held = self
            .held
            .iter()
            .map(|held| json!({ "connections": held.connections, "rss_kib": held.rss, "anonymous_kib": held.anonymous }));
        let loaded = self.loaded.iter().map(|loaded| {
            json!({
                "workloads": loaded.workloads, "seconds": loaded.seconds, "cpu": loaded.cpu, "rss_kib": loaded.memory.rss,
                "peak_kib": loaded.memory.peak,
            })
        });
        json!({
            "conditions": conditions,
            "rows": self.rows.iter().map(Measured::json).collect::<Vec<_>>(),
            "tunnels": tunnels.collect::<Vec<_>>(),
            "held": held.collect::<Vec<_>>(),
            "loaded": loaded.collect::<Vec<_>>(),
            "applied": self.applied.as_ref().map(Applied::json),
            "churn": self.churned.as_ref().map(Churned::json),
            "failures": self.failures,
        })
    }
}

fn none() -> String {
    "-".to_owned()
}

fn shown(value: Option<f64>, decimals: usize) -> String {
    value.map_or_else(none, |value| format!("{value:.decimals$}"))
}

fn over(value: Option<f64>, by: Option<f64>) -> Option<f64> {
    Some(value? / by?)
}

/// A share, and whether it is within the goal.
pub(crate) fn verdict(share: Option<f64>, goal: f64) -> String {
    share.map_or_else(none, |share| {
        let mark = if share <= goal { "ok" } else { "OVER" };
        format!("{share:.2} {mark} {goal}")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{process::Usage, rows::ROWS};

    #[test]
    fn a_row_is_held_against_what_is_quoted() {
        let outcome = |bytes| Outcome { operations: 1, bytes, seconds: 1.0, ..Outcome::default() };
        let run = Run { outcome: outcome(500_000_000), used: Usage { cpu: 0.75, switches: 1000 } };
        let measured = Measured {
            row: ROWS[0],
            without: vec![outcome(1_000_000_000)],
            through: vec![run],
            failure: None,
        };
        let report = Report { rows: vec![measured], ..Report::default() };
        let text = report.text();
        let line = text.lines().find(|line| line.starts_with("bulk, 1 stream")).unwrap();
        let words: Vec<_> = line.split_whitespace().skip(3).collect();
        assert_eq!(words[..4], ["8.00", "4.00", "0.50", "0.33"], "{line}");
        assert!(line.contains("1.500") && line.contains("1.00 OVER 0.7"), "{line}");
        assert!(report.is_whole());
        assert_eq!(report.json()["rows"][0]["rate"]["mesh"], 4.0);
    }

    #[test]
    fn memory_is_shown_beside_what_is_quoted() {
        let held = vec![
            Held { connections: 0, rss: [10_000, 10_000], anonymous: [1_000, 1_000] },
            Held { connections: 10_000, rss: [30_000, 20_000], anonymous: [21_000, 11_000] },
        ];
        let loaded = vec![Loaded {
            workloads: 100_000,
            seconds: 1.0,
            cpu: 0.75,
            memory: Memory { rss: 50_000, anonymous: 40_000, peak: 400_000 },
        }];
        let text = Report { held, loaded, ..Report::default() }.text();
        assert!(text.contains("3.07") && text.contains("0.50 OVER 0.5"), "{text}");
        assert!(
            text.contains("0.75") && text.contains("0.41 ok 0.5") && text.contains("0.68 OVER 0.5"),
            "{text}"
        );
    }

    use crate::process::Memory;
}
