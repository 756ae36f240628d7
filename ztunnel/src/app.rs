//! The process: what it is made of and who owns it, from top to bottom.

use crate::{
    config::{Authority, Capture, Config, Pods, Resources},
    control_plane,
    demand::Demand,
    memory,
    metrics::Metrics,
    names::Names,
    pod::{Shared, manager::Manager, served::Served},
    resources::{self, Sources},
    telemetry::Telemetry,
};
use anyhow::Context as _;
use mesh_identity::{
    Certificates, Manager as CertificateManager,
    ca::{CertificateAuthority, Nobody, local::LocalCa},
    crl::Revocations,
    tls::Context,
};
use mesh_platform::{
    limits,
    memory::keep_little,
    probe,
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
    threads::{self, Background, Workers},
};
use mesh_state::{Handle, Writer};
use mesh_xds::Known;
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
    keep_little();
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
    let writer = state_writer(&config);
    let state = writer.handle();
    watch_state(&doors.registry, &state);
    let sources = Sources::new(writer, &doors.dump);
    let background = Background::start("state", give_way).context("start a thread")?;
    let (demand, known) = load(&config, sources, &doors, (&base, background.handle()))?;

    let certificates = certificates(&config, &doors.registry, &base)?;
    let dumped = certificates.clone();
    doors.dump.register("certificates", move || dumped.dump());
    mesh_identity::metrics::certificates(&doors.registry, &certificates);
    let redirect = redirect(&config)?;
    let metrics = Arc::new(Metrics::new(&doors.registry, &config.node.version));
    let (counted, ready) = (Arc::clone(&metrics), doors.readiness.clone());
    base.spawn(move |draining| memory::watch(counted, ready, draining));
    let dns = config.dns.map(|dns| {
        let metrics = mesh_dns::Metrics::new(&doors.registry);
        let resolver = mesh_dns::Resolver::new(dns.settings, state.clone(), metrics);
        crate::dns::Names { resolver: Arc::new(resolver), known: known.clone() }
    });
    watch_log(&doors.registry, log);
    let shared = Shared {
        dns,
        demand,
        known,
        names: Names::new(tokio::runtime::Handle::current(), config.process.ipv6),
        config: Arc::new(config.data_path),
        state,
        certificates,
        redirect,
        workers: workers.clone(),
        telemetry: Telemetry { log: log.access_log(), metrics },
    };
    let drain = config.process.drain;
    let served = Served::new(match config.capture {
        Capture::External(_) => "external",
        Capture::Ebpf(_) => "ebpf",
    });
    if let Some(info) = config.own {
        crate::pod::own::serve(&shared, info, config.process.ipv6, &pods)?;
    }
    let failed = take_pods(shared, (config.pods, served), &doors, &pods)?;

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
    background.shutdown(LAST_LINES);
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
    let version = version(&config.node.version);
    doors.dump.register("version", move || version.clone());
    let effective = config.effective.clone();
    doors.dump.register("config", move || effective.clone());
    Ok(())
}

/// Istio's names for what this is.
fn version(istio: &str) -> serde_json::Value {
    serde_json::json!({
        "version": env!("CARGO_PKG_VERSION"),
        "gitRevision": option_env!("GIT_REVISION").unwrap_or("unknown"),
        "rustVersion": env!("CARGO_PKG_RUST_VERSION"),
        "buildProfile": if cfg!(debug_assertions) { "debug" } else { "release" },
        "buildStatus": "Clean",
        "istioVersion": istio,
        "cryptoProvider": if cfg!(feature = "fips") { "aws-lc-fips" } else { "aws-lc" },
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

fn state_writer(config: &Config) -> Writer {
    let mut writer = Writer::new(config.node.name.clone()).timed(uptime);
    if let Some(namespace) = &config.node.preferred {
        writer = writer.preferring(namespace.clone());
    }
    if let Some(namespace) = &config.node.root {
        writer = writer.rooted(namespace.clone());
    }
    writer
}

/// How long the writer of the state has kept the data path waiting.
fn watch_state(registry: &Registry, state: &Handle) {
    let (labels, state) = (Labels::empty(), state.clone());
    registry.on_scrape(move |samples| {
        samples.gauge(
            "istio_state_longest_hold_seconds",
            "The longest time that an update has kept a reader of the state from it.",
            &labels,
            state.longest_wait().as_secs_f64(),
        );
    });
}

/// The thread on which updates are applied comes after those of the data path.
fn give_way() {
    if let Err(error) = mesh_platform::threads::give_way() {
        tracing::warn!(%error, "updates of the mesh are applied at the data path's expense");
    }
}

/// Has workloads, services and policies come, from now on in the background. Returns whom to ask for those that do
/// not come by themselves, and when the others have come.
fn load(
    config: &Config,
    sources: Sources,
    doors: &Doors,
    background: (&Tasks, &tokio::runtime::Handle),
) -> anyhow::Result<(Demand, Known)> {
    let Doors { registry, readiness, dump, .. } = doors;
    let is_local = matches!(config.resources, Resources::File(_) | Resources::Inline(_));
    sources.show_static(dump, is_local);
    match &config.resources {
        Resources::ControlPlane(remote) => {
            let doors = (registry, readiness);
            return control_plane::follow(config, remote, sources, doors, background);
        }
        Resources::File(path) => resources::watch(path, sources, background)?,
        Resources::Inline(text) => resources::inline(text, sources)?,
        Resources::Nothing => {
            tracing::warn!("no source of workloads: set XDS_ADDRESS, or LOCAL_XDS_PATH in a lab")
        }
    }
    Ok((Demand::default(), Known::already()))
}

fn certificates(
    config: &Config,
    registry: &Registry,
    base: &Tasks,
) -> anyhow::Result<Certificates> {
    anyhow::ensure!(
        !cfg!(feature = "fips") || config.tls.options.is_fips(),
        "this was built for FIPS, and its crypto is not the validated module's"
    );
    let clock = Arc::new(SystemClock);
    let mut context = Context::new(config.tls.options, Arc::<SystemClock>::clone(&clock));
    if let Some(path) = &config.tls.revocations
        && let Some((watcher, revocations)) = Revocations::open(path.clone())
    {
        mesh_identity::metrics::revocations(registry, &revocations);
        context = context.with_revocations(revocations);
        base.spawn(move |draining| watcher.run(async move { draining.stopping().await }));
    }
    let ca: Arc<dyn CertificateAuthority> = match &config.authority {
        Authority::Local { folder, ttl } => {
            let open = LocalCa::open(folder, *ttl, clock);
            Arc::new(open.with_context(|| {
                format!("open the local CA (LOCAL_CA_DIR={})", folder.display())
            })?)
        }
        Authority::Istio { remote, ttl } => {
            let shared = matches!(config.pods, Pods::Shared(_));
            control_plane::authority(config, remote, (*ttl, shared), base)?
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
    (pods, served): (Pods, Served),
    doors: &Doors,
    tasks: &Tasks,
) -> anyhow::Result<tokio_util::sync::CancellationToken> {
    let broken = tokio_util::sync::CancellationToken::new();
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
