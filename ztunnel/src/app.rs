//! The process: what it is made of and who owns it, from top to bottom.

use crate::{
    config::{Authority, Capture, Config, Pods, Resources},
    control_plane,
    metrics::Metrics,
    names::Names,
    pod::{
        Shared,
        manager::{Manager, Served},
    },
    resources::{self, Sources},
    telemetry::Telemetry,
};
use anyhow::Context as _;
use mesh_identity::{
    Certificates, Manager as CertificateManager,
    ca::{CertificateAuthority, Nobody, local::LocalCa},
    tls::{Context, Options},
};
use mesh_platform::{
    limits, probe,
    redirect::{Ebpf, External, Redirect},
};
use mesh_runtime::{
    admin::{self, Dump},
    clock::SystemClock,
    log::LogHandle,
    metrics::{Labels, Registry, register_process, register_workers},
    net::Listener,
    ready::Readiness,
    signal::{Signals, Trigger},
    tasks::Tasks,
    threads::{self, Workers},
};
use mesh_state::{Handle, Writer};
use std::{
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    process::ExitCode,
    sync::{Arc, OnceLock},
    time::Duration,
};
use tokio::time::Instant;

/// The readiness port. Istio's, and not to be changed.
const READINESS_PORT: u16 = 15021;

/// How long the log is given to write its last lines.
pub(crate) const LAST_LINES: Duration = Duration::from_secs(1);

/// Runs the node proxy until it is told to stop.
///
/// # Errors
///
/// Returns why it cannot start.
pub(crate) fn run(config: Config, log: &LogHandle) -> anyhow::Result<ExitCode> {
    let files = limits::raise_nofile().context("raise the limit of open files (RLIMIT_NOFILE)")?;
    tracing::info!(files, workers = config.process.workers, "starting");
    let control = threads::control().context("start the control thread")?;
    let code = control.block_on(serve(config, log));
    log.flush(LAST_LINES);
    code
}

/// What is served over HTTP.
struct Doors {
    registry: Registry,
    readiness: Readiness,
    dump: Dump,
    quit: Trigger,
}

async fn serve(config: Config, log: &LogHandle) -> anyhow::Result<ExitCode> {
    let doors = Doors {
        registry: Registry::new(),
        readiness: Readiness::new(),
        dump: Dump::new(),
        quit: Trigger::new(),
    };
    let mut signals = Signals::catch(doors.quit.clone()).context("catch signals")?;
    // Three owners, in the order in which they stop: what is asked about us, what we serve, and what
    // that needs until its last connection is over.
    let (http, pods, base) = (Tasks::new(), Tasks::new(), Tasks::new());
    listen(&config, &doors, log, &http)?;

    let workers = Workers::start(config.process.workers).context("start the workers")?;
    register_process(&doors.registry);
    register_workers(&doors.registry, &workers);
    let writer = Writer::new(config.node.name.clone()).timed(uptime);
    let state = writer.handle();
    watch_state(&doors.registry, &state);
    let sources = Sources::new(writer, &doors.dump);
    load(&config, sources, &doors, &base)?;

    let certificates = certificates(&config, &base)?;
    let dumped = certificates.clone();
    doors.dump.register("certificates", move || dumped.dump());
    mesh_identity::metrics::certificates(&doors.registry, &certificates);
    let redirect = redirect(&config)?;
    let metrics = Metrics::new(&doors.registry, &config.node.version);
    watch_log(&doors.registry, log);
    let shared = Shared {
        names: Names::new(tokio::runtime::Handle::current(), config.process.ipv6),
        config: Arc::new(config.data_path),
        state,
        certificates,
        redirect,
        workers: workers.clone(),
        telemetry: Telemetry { log: log.access_log(), metrics: Arc::new(metrics) },
    };
    let drain = config.process.drain;
    let failed = take_pods(shared, config.pods, &doors, &pods)?;

    let cause = signals.requested().await;
    let broken = failed.is_cancelled();
    tracing::info!(?cause, deadline = ?drain, "stopping: finishing what is open");
    http.cancel();
    let stop = async {
        let graceful = pods.drain(drain).await;
        tracing::info!(graceful, "stopped");
    };
    tokio::select! {
        () = stop => {}
        () = signals.exit_on_interrupt() => {}
    }
    base.cancel();
    workers.shutdown(LAST_LINES);
    Ok(if broken { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Opens admin, metrics and readiness.
fn listen(config: &Config, doors: &Doors, log: &LogHandle, http: &Tasks) -> anyhow::Result<()> {
    let process = &config.process;
    let bind = |address: SocketAddr| {
        Listener::bind(address)
            .with_context(|| format!("listen on {address}: is another node proxy running here?"))
    };
    let wildcard = |port| -> anyhow::Result<Listener> {
        // A kernel without IPv6 has only the other one.
        if process.ipv6
            && let Ok(listener) = Listener::bind((Ipv6Addr::UNSPECIFIED, port).into())
        {
            return Ok(listener);
        }
        bind((Ipv4Addr::UNSPECIFIED, port).into())
    };
    let admin = Arc::new(admin::server(&doors.dump, log, &doors.quit));
    admin.serve(http, bind((Ipv4Addr::LOCALHOST, process.admin_port).into())?);
    if process.ipv6
        && let Ok(listener) = Listener::bind((Ipv6Addr::LOCALHOST, process.admin_port).into())
    {
        admin.serve(http, listener);
    }
    Arc::new(admin::metrics_server(&doors.registry)).serve(http, wildcard(process.stats_port)?);
    Arc::new(admin::readiness_server(&doors.readiness)).serve(http, wildcard(READINESS_PORT)?);
    doors.dump.register("version", version);
    let effective = config.effective.clone();
    doors.dump.register("config", move || effective.clone());
    Ok(())
}

/// Istio's names for what this is.
fn version() -> serde_json::Value {
    serde_json::json!({
        "version": env!("CARGO_PKG_VERSION"),
        "gitRevision": option_env!("GIT_REVISION").unwrap_or("unknown"),
        "rustVersion": env!("CARGO_PKG_RUST_VERSION"),
        "buildProfile": if cfg!(debug_assertions) { "debug" } else { "release" },
        "buildStatus": "Clean",
        "istioVersion": "unknown",
        "cryptoProvider": "aws-lc",
    })
}

/// Lines that the log dropped, for all to see.
fn watch_log(registry: &Registry, log: &LogHandle) {
    let dropped = registry.counter(
        "istio_log_lines_dropped",
        "Lines that the log dropped because its queue was full.",
    );
    let (dropped, log) = (dropped.single(), log.clone());
    registry.on_scrape(move |_| dropped.absolute(log.dropped()));
}

/// A monotonic clock.
fn uptime() -> Duration {
    static BEGAN: OnceLock<Instant> = OnceLock::new();
    BEGAN.get_or_init(Instant::now).elapsed()
}

/// How long the writer of the state has kept the data path waiting.
fn watch_state(registry: &Registry, state: &Handle) {
    let (labels, state) = (Labels::empty(), state.clone());
    registry.on_scrape(move |samples| {
        samples.gauge(
            "istio_state_longest_hold_seconds",
            "The longest time that one step of an update has kept readers of the state waiting.",
            &labels,
            state.longest_hold().as_secs_f64(),
        );
    });
}

fn load(config: &Config, sources: Sources, doors: &Doors, base: &Tasks) -> anyhow::Result<()> {
    let Doors { registry, readiness, .. } = doors;
    match &config.resources {
        Resources::ControlPlane(remote) => {
            let with = (registry, readiness, base);
            control_plane::follow(&config.control_plane, remote, &config.node, sources, with)?;
        }
        Resources::File(path) => resources::watch(path, sources, base)?,
        Resources::Inline(text) => resources::inline(text, sources)?,
        Resources::Nothing => {
            tracing::warn!("no source of workloads: set XDS_ADDRESS, or LOCAL_XDS_PATH in a lab")
        }
    }
    Ok(())
}

fn certificates(config: &Config, base: &Tasks) -> anyhow::Result<Certificates> {
    let clock = Arc::new(SystemClock);
    let context = Context::new(Options::default(), Arc::<SystemClock>::clone(&clock));
    let ca: Arc<dyn CertificateAuthority> = match &config.authority {
        Authority::Local { folder, ttl } => {
            let open = LocalCa::open(folder, *ttl, clock);
            Arc::new(open.with_context(|| {
                format!("open the local CA (LOCAL_CA_DIR={})", folder.display())
            })?)
        }
        Authority::Istio { remote, ttl } => {
            let shared = matches!(config.pods, Pods::Shared(_));
            let settings = &config.control_plane;
            control_plane::authority(settings, remote, &config.node, (*ttl, shared), base)?
        }
        Authority::Nobody => {
            tracing::warn!("nobody signs certificates: every tunnel will fail. Set CA_ADDRESS");
            Arc::new(Nobody)
        }
    };
    let (certificates, manager) = CertificateManager::new(ca, context);
    base.spawn(move |draining| manager.run(async move { draining.stopping().await }));
    Ok(certificates)
}

fn redirect(config: &Config) -> anyhow::Result<Arc<dyn Redirect>> {
    let lacking = probe::lacking(matches!(config.capture, Capture::Ebpf(_)));
    for lack in &lacking {
        tracing::error!("{lack}");
    }
    anyhow::ensure!(
        lacking.is_empty(),
        "this machine lacks what the node proxy needs; the lines above say what to do"
    );
    Ok(match &config.capture {
        Capture::External(settings) => Arc::new(External::new(*settings)),
        Capture::Ebpf(settings) => {
            Arc::new(Ebpf::new(settings.clone()).context("prepare capture by eBPF")?)
        }
    })
}

/// Serves the pods. What it returns is cancelled where the CNI agent does not speak our protocol.
fn take_pods(
    shared: Shared,
    pods: Pods,
    doors: &Doors,
    tasks: &Tasks,
) -> anyhow::Result<tokio_util::sync::CancellationToken> {
    let broken = tokio_util::sync::CancellationToken::new();
    let served = Served::default();
    let dumped = served.clone();
    doors.dump.register("workloadState", move || dumped.dump());
    match pods {
        Pods::Shared(agent) => {
            let gate = doors.readiness.gate("workload proxy manager");
            let manager = Manager::new(shared, tasks.child(), gate, served);
            let (quit, failed) = (doors.quit.clone(), broken.clone());
            tasks.spawn(move |draining| async move {
                if let Err(error) = manager.run(agent, draining).await {
                    tracing::error!(%error, "giving up");
                    failed.cancel();
                    quit.fire();
                }
            });
        }
        Pods::Dedicated(info) => {
            let gate = doors.readiness.gate("proxy");
            crate::pod::dedicated(&shared, info, tasks)?;
            gate.set(true);
            gate.release();
        }
    }
    Ok(broken)
}
