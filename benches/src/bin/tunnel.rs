//! Measures a pair of relays with a tunnel between them: `tunnel [--rounds N] [--seconds S] [--only TEXT]
//! [--perf FOLDER]`.

use std::{
    env, fs,
    io::Write as _,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::{Child, Command},
    thread,
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use mesh_benches::{
    flavour::Route,
    load::{
        Ports,
        client::{Work, run},
        server,
    },
    process::Usage,
    rounds::{median, table},
    rows::precise,
    tunnel,
};
use mesh_runtime::threads::Flavour;
use nix::sched::{CloneFlags, unshare};

const IP: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const DIRECT: Ports = Ports::from(7000);
const RELAYED: Ports = Ports::from(7100);
const FAR: SocketAddr = SocketAddr::new(IP, 7200);

const ROWS: [(&str, Work, usize); 7] = [
    ("bulk, 1 stream", Work::Bulk, 1),
    ("bulk, 8 streams", Work::Bulk, 8),
    ("ping-pong 1 B, 1 connection", Work::PingPong(1), 1),
    ("HTTP, 1 connection", Work::Http, 1),
    ("HTTP, 16 connections", Work::Http, 16),
    ("HTTP, 64 connections", Work::Http, 64),
    ("short connections, 16 at once", Work::Short, 16),
];

const FLAVOURS: [(&str, Flavour); 2] =
    [("pinned", Flavour::PerThread), ("steal", Flavour::WorkStealing)];

fn main() -> anyhow::Result<()> {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let flavour =
        |name: &str| FLAVOURS.into_iter().find(|(of, _)| *of == name).map(|(_, flavour)| flavour);
    match words.as_slice() {
        ["--near", name, ca] => {
            let routes = [
                (RELAYED.echo, DIRECT.echo),
                (RELAYED.short, DIRECT.short),
                (RELAYED.sink, DIRECT.sink),
                (RELAYED.http, DIRECT.http),
            ]
            .map(|(from, to)| Route { from: (IP, from).into(), to: (IP, to).into() });
            tunnel::near(flavour(name).context("no such flavour")?, Path::new(ca), FAR, &routes)
        }
        ["--far", name, ca] => {
            tunnel::far(flavour(name).context("no such flavour")?, Path::new(ca), FAR)
        }
        words => measure(words),
    }
}

fn measure(words: &[&str]) -> anyhow::Result<()> {
    let (mut rounds, mut seconds, mut only, mut perf) = (5, 1.0, "", None);
    for pair in words.chunks(2) {
        match *pair {
            ["--rounds", value] => rounds = value.parse()?,
            ["--seconds", value] => seconds = value.parse()?,
            ["--only", value] => only = value,
            ["--perf", value] => perf = Some(PathBuf::from(value)),
            _ => bail!("usage: tunnel [--rounds N] [--seconds S] [--only TEXT] [--perf FOLDER]"),
        }
    }
    ensure!(rounds > 0, "no rounds, no medians");
    let length = Duration::from_secs_f64(seconds);
    unshare(CloneFlags::CLONE_NEWNET).context("a network namespace of our own needs root")?;
    ensure!(
        Command::new("ip").args(["link", "set", "lo", "up"]).status()?.success(),
        "lo does not come up"
    );
    fs::write("/proc/sys/net/ipv4/tcp_congestion_control", "cubic").context(
        "cubic is not allowed here: add it to net.ipv4.tcp_allowed_congestion_control first",
    )?;
    server::serve(IP, DIRECT)?;
    let ca = env::temp_dir().join(format!("mesh-bench-ca-{}", std::process::id()));
    let mut out = std::io::stdout().lock();
    for (name, work, parallel) in ROWS.into_iter().filter(|(name, ..)| name.contains(only)) {
        let mut shown: Vec<Vec<[f64; 5]>> = vec![Vec::new(); FLAVOURS.len() + 1];
        for round in 0..rounds {
            for (index, all) in shown.iter_mut().enumerate() {
                let flavour = index.checked_sub(1).and_then(|index| FLAVOURS.get(index));
                let file = perf.as_ref().filter(|_| round + 1 == rounds && flavour.is_some());
                let file = file.map(|folder| {
                    folder.join(format!("{}-{index}", name.replace([' ', ','], "-")))
                });
                let pair = flavour.map(|(flavour, _)| Pair::start(flavour, &ca)).transpose()?;
                all.push(
                    one(pair.as_ref(), work, parallel, length, file.as_deref()).context(name)?,
                );
            }
        }
        let head = match work {
            Work::Bulk => ["Gb/s", "-", "-", "CPU s/GB", "switches/MB"],
            _ => ["op/s", "p50 µs", "p99 µs", "CPU s/10k", "switches/op"],
        };
        let mut rows = vec![[name].into_iter().chain(head).map(str::to_owned).collect::<Vec<_>>()];
        let names = ["none"].into_iter().chain(FLAVOURS.map(|(name, _)| name));
        for (name, all) in names.zip(&shown) {
            let figure = |column: usize| {
                let values: Vec<f64> =
                    all.iter().filter_map(|one| one.get(column)).copied().collect();
                median(&values).map_or_else(String::new, |value| format!("{value:.3}"))
            };
            rows.push([name.to_owned()].into_iter().chain((0..5).map(figure)).collect());
        }
        writeln!(out, "{}", table(&rows))?;
    }
    drop(fs::remove_dir_all(&ca));
    Ok(())
}

fn one(
    pair: Option<&Pair>,
    work: Work,
    parallel: usize,
    length: Duration,
    perf: Option<&Path>,
) -> anyhow::Result<[f64; 5]> {
    let ports = if pair.is_some() { RELAYED } else { DIRECT };
    let port = match work {
        Work::Bulk => ports.sink,
        Work::Short | Work::Rested(_) => ports.short,
        Work::PingPong(_) => ports.echo,
        Work::Http => ports.http,
    };
    let to = [(IP, port).into()];
    run(work, &to, parallel, Duration::from_millis(100)).context("warming up")?;
    let profile = match (pair, perf) {
        (Some(pair), Some(file)) => Some(pair.profile(file)?),
        _ => None,
    };
    let usage = || pair.map_or_else(|| Ok(Usage::default()), Pair::usage);
    let before = usage()?;
    let outcome = run(work, &to, parallel, length)?;
    let used = usage()? - before;
    drop(profile);
    let operations = precise(outcome.operations);
    let bytes = precise(outcome.bytes);
    Ok(if work == Work::Bulk {
        [
            bytes * 8e-9 / outcome.seconds,
            0.0,
            0.0,
            used.cpu * 1e9 / bytes,
            precise(used.switches) * 1e6 / bytes,
        ]
    } else {
        [
            operations / outcome.seconds,
            outcome.p50,
            outcome.p99,
            used.cpu * 1e4 / operations,
            precise(used.switches) / operations,
        ]
    })
}

/// The two relays. Ended when dropped.
struct Pair([Ended; 2]);

struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        // It may have ended by itself, which the run has reported.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

impl Pair {
    fn start(flavour: &str, ca: &Path) -> anyhow::Result<Self> {
        let start = |side: &str, port: u16| {
            let mut command = Command::new(env::current_exe()?);
            let child = Ended(command.args([side, flavour]).arg(ca).spawn()?);
            for _ in 0..300 {
                if std::net::TcpStream::connect((IP, port)).is_ok() {
                    return Ok(child);
                }
                thread::park_timeout(Duration::from_millis(10));
            }
            bail!("a relay did not start")
        };
        Ok(Self([start("--far", FAR.port())?, start("--near", RELAYED.sink)?]))
    }

    fn usage(&self) -> anyhow::Result<Usage> {
        let [far, near] = &self.0;
        Ok([Usage::of(far.0.id())?, Usage::of(near.0.id())?].into_iter().sum())
    }

    fn profile(&self, file: &Path) -> anyhow::Result<Ended> {
        let [far, near] = &self.0;
        let pids = format!("{},{}", far.0.id(), near.0.id());
        let mut command = Command::new("timeout");
        command
            .args(["-s", "INT", "60", "perf", "record", "-q", "-F", "499", "-g", "-o"])
            .arg(file)
            .args(["-p", &pids]);
        Ok(Ended(command.spawn().context("perf does not start")?))
    }
}
