//! Measures one plain TCP relay under several runtimes: `flavour [--rounds N] [--seconds S] [--only bulk]`.

use std::{
    env, fs,
    io::Write as _,
    net::{IpAddr, Ipv4Addr},
    num::NonZeroUsize,
    process::{Child, Command},
    thread,
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use mesh_benches::{
    flavour::{Flavour, Route, relay},
    load::{
        Ports,
        client::{Work, run},
        server,
    },
    process::Usage,
    rounds::{median, table},
};
use nix::sched::{CloneFlags, unshare};

const IP: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const DIRECT: Ports = Ports::from(7000);
const RELAYED: Ports = Ports::from(7100);
const WORKERS: NonZeroUsize = NonZeroUsize::new(2).expect("two is not zero");

fn main() -> anyhow::Result<()> {
    let mut rounds = 5;
    let mut seconds = 2.0;
    let mut only = String::new();
    let mut args = env::args().skip(1);
    while let Some(arg) = args.next() {
        let value = args.next().with_context(|| format!("{arg} needs a value"))?;
        match arg.as_str() {
            "--rounds" => rounds = value.parse()?,
            "--seconds" => seconds = value.parse()?,
            "--only" => only = value,
            // How this program starts its own relays.
            "--relay" => {
                let flavour =
                    value.parse().map_err(|_invalid| anyhow::anyhow!("no such flavour"))?;
                let routes = [
                    (RELAYED.echo, DIRECT.echo),
                    (RELAYED.short, DIRECT.short),
                    (RELAYED.sink, DIRECT.sink),
                ]
                .map(|(from, to)| Route { from: (IP, from).into(), to: (IP, to).into() });
                return relay(flavour, &routes, WORKERS).context("the relay");
            }
            _ => bail!("usage: flavour [--rounds N] [--seconds S] [--only bulk]"),
        }
    }
    ensure!(rounds > 0, "no rounds, no medians");
    measure(rounds, Duration::from_secs_f64(seconds), &only)
}

const ROWS: [(&str, Work, usize); 4] = [
    ("ping-pong 1 B, 1 connection", Work::PingPong(1), 1),
    ("ping-pong 1 B, 16 connections", Work::PingPong(1), 16),
    ("short connections, 16 at once", Work::Short, 16),
    ("bulk, 1 stream", Work::Bulk, 1),
];

/// What one run showed: operations a second, p50 and p99 in µs, CPU µs and switches of the relay per operation.
/// Of bulk: MB a second, and per MB.
type Shown = [f64; 5];

fn measure(rounds: usize, length: Duration, only: &str) -> anyhow::Result<()> {
    // A namespace of our own: nobody else's ports, and a congestion control that is the same everywhere.
    unshare(CloneFlags::CLONE_NEWNET).context("a network namespace of our own needs root")?;
    ensure!(
        Command::new("ip").args(["link", "set", "lo", "up"]).status()?.success(),
        "lo does not come up"
    );
    fs::write("/proc/sys/net/ipv4/tcp_congestion_control", "cubic").context(
        "cubic is not allowed here: add it to net.ipv4.tcp_allowed_congestion_control first",
    )?;
    server::serve(IP, DIRECT)?;

    let mut out = std::io::stdout().lock();
    for (name, work, parallel) in ROWS.into_iter().filter(|(name, ..)| name.contains(only)) {
        let mut shown: Vec<Vec<Shown>> = vec![Vec::new(); Flavour::ALL.len() + 1];
        for _ in 0..rounds {
            for (index, all) in shown.iter_mut().enumerate() {
                let flavour =
                    index.checked_sub(1).and_then(|index| Flavour::ALL.get(index)).copied();
                all.push(
                    one(flavour, work, parallel, length)
                        .with_context(|| format!("{name}: {flavour:?}"))?,
                );
            }
        }
        let mut rows = vec![head(name, work)];
        for (index, all) in shown.iter().enumerate() {
            let flavour = index.checked_sub(1).and_then(|index| Flavour::ALL.get(index)).copied();
            let mut row = vec![flavour.map_or("none", Flavour::name).to_owned()];
            for column in 0..5 {
                let values: Vec<f64> =
                    all.iter().filter_map(|one| one.get(column)).copied().collect();
                let latency = matches!(column, 1 | 2);
                row.push(match median(&values) {
                    Some(median) if !(latency && work == Work::Bulk) => format!("{median:.2}"),
                    _ => "-".to_owned(),
                });
            }
            rows.push(row);
        }
        writeln!(out, "{}", table(&rows))?;
    }
    Ok(())
}

fn head(name: &str, work: Work) -> Vec<String> {
    let columns = match work {
        Work::Bulk => ["MB/s", "-", "-", "CPU µs/MB", "switches/MB"],
        _ => ["op/s", "p50 µs", "p99 µs", "CPU µs/op", "switches/op"],
    };
    [name].into_iter().chain(columns).map(str::to_owned).collect()
}

/// One run with a fresh relay, or with none.
fn one(
    flavour: Option<Flavour>,
    work: Work,
    parallel: usize,
    length: Duration,
) -> anyhow::Result<Shown> {
    let relay = flavour.map(Relay::start).transpose()?;
    let ports = if relay.is_some() { RELAYED } else { DIRECT };
    let port = match work {
        Work::Bulk => ports.sink,
        Work::Short | Work::Rested(_) => ports.short,
        Work::PingPong(_) | Work::Http => ports.echo,
    };
    let to = [(IP, port).into()];
    // The first connections fault the code in.
    run(work, &to, parallel, Duration::from_millis(100))?;
    let before = relay.as_ref().map(Relay::usage).transpose()?.unwrap_or_default();
    let outcome = run(work, &to, parallel, length)?;
    let used = relay.as_ref().map(Relay::usage).transpose()?.unwrap_or_default() - before;
    let units =
        if work == Work::Bulk { precise(outcome.bytes) / 1e6 } else { precise(outcome.operations) };
    Ok([
        units / outcome.seconds,
        outcome.p50,
        outcome.p99,
        used.cpu * 1e6 / units,
        precise(used.switches) / units,
    ])
}

/// Counts here stay far below 2^53.
#[expect(clippy::cast_precision_loss, reason = "counts of a run of seconds")]
const fn precise(count: u64) -> f64 {
    count as f64
}

struct Relay(Child);

impl Relay {
    fn start(flavour: Flavour) -> anyhow::Result<Self> {
        let child = Command::new(env::current_exe()?).args(["--relay", flavour.name()]).spawn()?;
        let relay = Self(child);
        for _ in 0..200 {
            if std::net::TcpStream::connect((IP, RELAYED.sink)).is_ok() {
                return Ok(relay);
            }
            thread::park_timeout(Duration::from_millis(10));
        }
        bail!("the relay did not start")
    }

    fn usage(&self) -> anyhow::Result<Usage> {
        Ok(Usage::of(self.0.id())?)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        // It may have ended by itself, which the run has reported.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}
