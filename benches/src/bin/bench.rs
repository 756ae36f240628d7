//! Measures node proxies between pods. `bench --help` says how.

use std::{
    env, fs,
    io::Write as _,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::PathBuf,
    process::ExitCode,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use mesh_benches::{
    load::{
        client::{hold, run},
        server,
    },
    memory, over_xds,
    report::{Measured, Report},
    rows::{Length, PORTS, ROWS, Row},
    scene::{CLIENT_PORTS, Run, Scene},
    tunnels,
};
use mesh_tests::{Lab, instance::end_on_signals, internal, netns::Namespace};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

const HELP: &str = "\
Measures node proxies between pods on two nodes, beside the same load with none in the way.

    bench [--rounds 5] [--seconds 5] [--only ROW,…] [--json FILE] [--proxy PATH] [--set KEY=VALUE]… [--perf FOLDER]

--rounds   rounds of every row, interleaved; medians are shown
--seconds  of every row in every round, once without and once with node proxies
--only     these rows alone; besides those of the table: tunnels, held, loaded, applied, churn
--json     every round, to a file as well
--proxy    another node proxy with the same settings in its environment (not the one built in)
--set      a setting of the node proxies
--without  the load between the bare pods alone
--perf     profiles of both node proxies, one a row, to this folder
";

/// What the hard limit of open files may be on a machine of this kind: more would not compare.
const OPEN_FILES: u64 = 20_000;

fn main() -> ExitCode {
    if let Some(code) = internal::dispatch() {
        return code;
    }
    match begin() {
        Ok(code) => code,
        Err(why) => {
            drop(writeln!(std::io::stderr(), "{why:#}"));
            ExitCode::FAILURE
        }
    }
}

fn begin() -> Result<ExitCode> {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    // The two ends of the load are this program too, in pods.
    match words.as_slice() {
        ["serve"] => serve().map(|()| ExitCode::SUCCESS),
        ["serve-short", namespaces @ ..] => serve_short(namespaces).map(|()| ExitCode::SUCCESS),
        ["load", work, parallel, seconds, to @ ..] => {
            let work = work.parse().map_err(|_invalid| anyhow::anyhow!("no such work"))?;
            let to: Vec<SocketAddr> = to.iter().map(|to| to.parse()).collect::<Result<_, _>>()?;
            let outcome =
                run(work, &to, parallel.parse()?, Duration::from_secs_f64(seconds.parse()?))?;
            say(&outcome.to_json().to_string())?;
            Ok(ExitCode::SUCCESS)
        }
        ["hold", to, count] => {
            all_files()?;
            let held = hold(to.parse()?, count.parse()?)?;
            say(&format!("holding {}", held.len()))?;
            forever()
        }
        words => {
            let Some(options) = Options::parse(words)? else {
                say(HELP)?;
                return Ok(ExitCode::SUCCESS);
            };
            measure(&options)
        }
    }
}

struct Options {
    length: Length,
    only: Vec<String>,
    json: Option<PathBuf>,
    proxy: Option<PathBuf>,
    settings: Vec<(String, String)>,
    perf: Option<PathBuf>,
    /// No node proxy at all: what the machine does by itself.
    without: bool,
}

impl Options {
    /// None where help is asked for.
    fn parse(words: &[&str]) -> Result<Option<Self>> {
        let mut options = Self {
            length: Length { rounds: 5, time: Duration::from_secs(5) },
            only: Vec::new(),
            json: None,
            proxy: None,
            settings: Vec::new(),
            perf: None,
            without: false,
        };
        let mut words = words.iter();
        while let Some(&word) = words.next() {
            match word {
                "--help" | "-h" | "help" => return Ok(None),
                "--without" => {
                    options.without = true;
                    continue;
                }
                _ => {}
            }
            let value = *words.next().with_context(|| format!("{word} needs a value"))?;
            match word {
                "--rounds" => {
                    options.length.rounds = value.parse().context("--rounds is a number")?
                }
                "--seconds" => {
                    options.length.time =
                        Duration::from_secs_f64(value.parse().context("--seconds is a number")?);
                }
                "--only" => options.only.extend(value.split(',').map(str::to_owned)),
                "--json" => options.json = Some(value.into()),
                "--proxy" => options.proxy = Some(value.into()),
                "--perf" => options.perf = Some(value.into()),
                "--set" => {
                    let (key, value) = value.split_once('=').context("--set is KEY=VALUE")?;
                    options.settings.push((key.to_owned(), value.to_owned()));
                }
                _ => bail!("{word} is not known: see --help"),
            }
        }
        let known =
            |key: &String| ROWS.iter().any(|row| row.key == key) || PARTS.contains(&key.as_str());
        if let Some(unknown) = options.only.iter().find(|key| !known(key)) {
            let keys: Vec<_> = ROWS.iter().map(|row| row.key).chain(PARTS).collect();
            bail!("no row {unknown}: there are {}", keys.join(", "));
        }
        Ok(Some(options))
    }

    fn wants(&self, key: &str) -> bool {
        self.only.is_empty() && !(self.without && PARTS.contains(&key))
            || self.only.iter().any(|only| only == key)
    }
}

const PARTS: [&str; 5] = ["tunnels", "held", "loaded", "applied", "churn"];

fn measure(options: &Options) -> Result<ExitCode> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if hard > OPEN_FILES {
        setrlimit(Resource::RLIMIT_NOFILE, soft.min(OPEN_FILES), OPEN_FILES)?;
    }
    let lab = Lab::named(None, options.proxy.as_deref())?;
    end_on_signals(lab.id().to_owned(), 130)?;
    let mut scene = Scene::build(lab, &options.settings)?;
    let mut report = Report { conditions: conditions(options), ..Report::default() };
    let wanted: Vec<Row> = ROWS.into_iter().filter(|row| options.wants(row.key)).collect();
    if !wanted.is_empty() {
        if !options.without {
            scene.start_proxies(&[])?;
        }
        report.rows = rounds(&scene, &wanted, options)?;
    }
    let mut failed =
        |what: &str, why: anyhow::Error| report.failures.push(format!("{what}: {why:#}"));
    if options.wants("held") {
        progress("held connections")?;
        match memory::held(&scene) {
            Ok(held) => report.held = held,
            Err(why) => failed("held", why),
        }
    }
    if options.wants("loaded") {
        progress("large meshes")?;
        match memory::loaded(&scene, &[10_000, 100_000, 500_000]) {
            Ok(loaded) => report.loaded = loaded,
            Err(why) => failed("loaded", why),
        }
    }
    if options.wants("tunnels") {
        progress("new tunnels")?;
        match tunnels::measure(&mut scene, options.length) {
            Ok(tunnels) => report.tunnels = tunnels,
            Err(why) => failed("tunnels", why),
        }
    }
    if let Err(why) = large_meshes(&scene, options, &mut report) {
        report.failures.push(format!("over xDS: {why:#}"));
    }
    say(&report.text())?;
    if let Some(file) = &options.json {
        fs::write(file, report.json().to_string()).context("cannot write the JSON")?;
    }
    Ok(if report.is_whole() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The parts in which a control plane has a large mesh.
fn large_meshes(scene: &Scene, options: &Options, report: &mut Report) -> Result<()> {
    if !["applied", "churn"].into_iter().any(|key| options.wants(key)) {
        return Ok(());
    }
    let control = scene.control_plane()?;
    if options.wants("applied") {
        progress("a large mesh applied over xDS")?;
        report.applied = Some(over_xds::applied(scene, &control)?);
    }
    if options.wants("churn") {
        progress("a large mesh that changes")?;
        report.churned = Some(over_xds::churned(scene, &control)?);
    }
    Ok(())
}

fn rounds(scene: &Scene, rows: &[Row], options: &Options) -> Result<Vec<Measured>> {
    let mut all: Vec<_> = rows
        .iter()
        .map(|&row| Measured { row, without: Vec::new(), through: Vec::new(), failure: None })
        .collect();
    for round in 0..options.length.rounds {
        for measured in all.iter_mut().filter(|measured| measured.failure.is_none()) {
            let row = measured.row;
            progress(&format!("round {} of {}: {}", round + 1, options.length.rounds, row.title))?;
            let profile = options.perf.as_ref().filter(|_| round + 1 == options.length.rounds);
            let profile = profile.map(|folder| folder.join(row.key));
            let without = scene.without(&row, options.length.time).context("without node proxies");
            let through = || through(scene, &row, options.length.time, profile);
            match without
                .and_then(|without| Ok((without, (!options.without).then(through).transpose()?)))
            {
                Ok((without, through)) => {
                    measured.without.push(without);
                    measured.through.extend(through);
                }
                Err(why) => measured.failure = Some(format!("{}: {why:#}", row.key)),
            }
        }
    }
    Ok(all)
}

/// How long the first connections of a row may take, uncounted: tunnels are opened and code is read in.
const WARM: Duration = Duration::from_millis(200);

fn through(scene: &Scene, row: &Row, length: Duration, profile: Option<PathBuf>) -> Result<Run> {
    scene.through(row, WARM).context("warming up")?;
    let profile = profile.map(|file| scene.profile(&file, length)).transpose()?;
    let run = scene.through(row, length)?;
    drop(profile);
    Ok(run)
}

fn conditions(options: &Options) -> Vec<(&'static str, String)> {
    let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let cpus = text("/proc/cpuinfo");
    let model = cpus.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or_default();
    let cores = thread::available_parallelism().map_or(0, usize::from);
    let proxy = options
        .proxy
        .as_ref()
        .map_or_else(|| "built in".to_owned(), |path| path.display().to_string());
    vec![
        ("command", env::args().collect::<Vec<_>>().join(" ")),
        ("machine", format!("{cores} cores, {}", model.trim_start_matches([' ', '\t', ':']))),
        ("kernel", text("/proc/sys/kernel/osrelease").trim().to_owned()),
        ("node proxy", proxy),
        (
            "settings",
            options.settings.iter().map(|(key, value)| format!("{key}={value} ")).collect(),
        ),
        ("rounds", format!("{} of {} s", options.length.rounds, options.length.time.as_secs_f64())),
        (
            "conditions",
            format!(
                "cubic everywhere, 2 workers, access log at info to a file, client ports {CLIENT_PORTS}"
            ),
        ),
        ("load average before", text("/proc/loadavg").trim().to_owned()),
    ]
}

fn serve() -> Result<()> {
    all_files()?;
    server::serve(Ipv4Addr::UNSPECIFIED.into(), PORTS)?;
    say("listening")?;
    forever()
}

/// Threads for each of the pods that only answer short connections.
const SHORT_THREADS: usize = 2;

fn serve_short(namespaces: &[&str]) -> Result<()> {
    for name in namespaces {
        let listener = Namespace::open(name)?.run(|| {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORTS.short)).context("cannot listen")
        })?;
        server::serve_short(&listener, SHORT_THREADS)?;
    }
    say("listening")?;
    forever()
}

/// As many open files as this process may have.
fn all_files() -> Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).context("open files")
}

fn forever<T>() -> Result<T> {
    loop {
        thread::park();
    }
}

fn say(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{text}")?;
    Ok(out.flush()?)
}

fn progress(text: &str) -> Result<()> {
    Ok(writeln!(std::io::stderr(), "{text}")?)
}
