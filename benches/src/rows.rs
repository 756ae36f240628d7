//! The rows: what is measured, and what the best existing node proxy needed for it.

use std::time::Duration;

use crate::load::{
    Ports,
    client::{Outcome, Work},
};

/// Where a server answers, in every pod.
pub const PORTS: Ports = Ports::from(7000);

/// How the traffic of a row travels when it goes through the node proxies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Via {
    /// Through a tunnel between the two.
    Tunnel,
    /// Captured and passed on by both as it is, because the destination takes no tunnels.
    Plain,
}

/// Figures quoted from the issue, of the best existing node proxy on a machine of this kind, both proxies together.
#[derive(Clone, Copy, Debug)]
pub struct Quoted {
    /// Of the rate without a proxy.
    pub ratio: Option<f64>,
    /// Processor seconds per unit.
    pub cpu: Option<f64>,
}

/// One row of the table.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// For `--only` and for JSON.
    pub key: &'static str,
    /// For people.
    pub title: &'static str,
    /// What is done.
    pub work: Work,
    /// By so many connections at once.
    pub parallel: usize,
    /// How it travels.
    pub via: Via,
    /// What it is held against.
    pub quoted: Quoted,
    /// The most CPU per unit that we allow ourselves, as a share of what is quoted.
    pub goal: f64,
}

const fn quoted(ratio: f64, cpu: f64) -> Quoted {
    Quoted { ratio: Some(ratio), cpu: Some(cpu) }
}

const UNKNOWN: Quoted = Quoted { ratio: None, cpu: None };

/// All rows, in the order of the table.
pub const ROWS: [Row; 11] = [
    row("bulk-1", "bulk, 1 stream", Work::Bulk, 1).held_to(quoted(0.33, 1.50), 0.7),
    row("bulk-8", "bulk, 8 streams", Work::Bulk, 8).held_to(quoted(0.29, 1.75), 0.7),
    row("plain-1", "plain TCP, bulk, 1 stream", Work::Bulk, 1)
        .plain()
        .held_to(quoted(0.58, 0.74), 0.7),
    row("ping-pong-1", "ping-pong 1 B", Work::PingPong(1), 1)
        .held_to(Quoted { ratio: None, cpu: Some(1.44) }, 1.0),
    row("ping-pong-1k", "ping-pong 1 KiB", Work::PingPong(1024), 1),
    row("http-1", "HTTP keep-alive, 1 connection", Work::Http, 1).held_to(quoted(0.42, 1.74), 1.0),
    row("http-16", "HTTP keep-alive, 16 connections", Work::Http, 16)
        .held_to(quoted(0.33, 0.78), 1.0),
    row("http-64", "HTTP keep-alive, 64 connections", Work::Http, 64)
        .held_to(quoted(0.40, 0.72), 1.0),
    row("short-1", "short connections, 1 at once", Work::Short, 1),
    row("short-16", "short connections, 16 at once", Work::Short, 16)
        .held_to(quoted(0.36, 3.25), 0.7),
    row("plain-short-16", "plain TCP, short, 16 at once", Work::Short, 16).plain(),
];

const fn row(key: &'static str, title: &'static str, work: Work, parallel: usize) -> Row {
    Row { key, title, work, parallel, via: Via::Tunnel, quoted: UNKNOWN, goal: 1.0 }
}

impl Row {
    const fn plain(mut self) -> Self {
        self.via = Via::Plain;
        self
    }

    const fn held_to(mut self, quoted: Quoted, goal: f64) -> Self {
        self.quoted = quoted;
        self.goal = goal;
        self
    }

    /// The port that does this work.
    #[must_use]
    pub const fn port(&self) -> u16 {
        match self.work {
            Work::Bulk => PORTS.sink,
            Work::PingPong(_) => PORTS.echo,
            Work::Http => PORTS.http,
            Work::Short | Work::Rested(_) => PORTS.short,
        }
    }

    /// Whether it counts bytes, and not operations.
    #[must_use]
    pub const fn is_bulk(&self) -> bool {
        matches!(self.work, Work::Bulk)
    }

    /// What CPU is counted by.
    #[must_use]
    pub const fn unit(&self) -> &'static str {
        if self.is_bulk() { "GB" } else { "10k" }
    }

    /// How many units this was.
    #[must_use]
    pub fn units(&self, outcome: &Outcome) -> f64 {
        if self.is_bulk() {
            precise(outcome.bytes) / 1e9
        } else {
            precise(outcome.operations) / 1e4
        }
    }

    /// Gb/s, or operations a second.
    #[must_use]
    pub fn rate(&self, outcome: &Outcome) -> f64 {
        let amount = if self.is_bulk() {
            precise(outcome.bytes) * 8.0 / 1e9
        } else {
            precise(outcome.operations)
        };
        amount / outcome.seconds
    }

    /// Context switches are counted per operation, or per MB.
    #[must_use]
    pub fn per_switch(&self, outcome: &Outcome) -> f64 {
        if self.is_bulk() { precise(outcome.bytes) / 1e6 } else { precise(outcome.operations) }
    }
}

/// Counts here stay far below 2^53.
#[expect(clippy::cast_precision_loss, reason = "counts of a run of seconds")]
#[must_use]
pub const fn precise(count: u64) -> f64 {
    count as f64
}

/// How long, and how often.
#[derive(Clone, Copy, Debug)]
pub struct Length {
    /// Rounds; of each figure the median is shown.
    pub rounds: usize,
    /// Of each row in each round, without and with node proxies.
    pub time: Duration,
}
