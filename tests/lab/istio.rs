//! `cargo lab --istio`: a real mesh. Unmodified istiod, Kubernetes, kubelets, istio-cni and istioctl
//! on two nodes (`tests/realmesh`), with our node proxy on both in the place of theirs.

mod authorization;
mod bed;
mod ipv6;
mod lives;
mod paths;
mod services;

use std::{
    ffi::OsString,
    fs,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
};

use anyhow::{Context, Result, bail, ensure};
use mesh_tests::realmesh;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{Options, istio::bed::Bed, report::Report};

const HINTS: &str = "
It stays up. From another terminal:
  cargo lab istio -- kubectl get pods -A -o wide
  cargo lab istio -- kubectl -n istio-system logs -l app=ztunnel --prefix -f
  cargo lab istio -- istioctl ztunnel-config workloads --node node-a
  cargo lab istio-stop";

/// Builds the bed's programs where that is needed, and becomes the process that runs the bed with
/// [`inside`] in it: namespaces and all of its processes end with that.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let scripts = realmesh::folder()?.join("scripts");
    let built = Command::new(scripts.join("build")).stderr(Stdio::inherit()).output()?;
    ensure!(built.status.success(), "the real mesh could not be built: see above");
    let said = String::from_utf8(built.stdout)?;
    let bin = PathBuf::from(said.lines().last().context("the build says no folder")?);
    let run = std::env::temp_dir().join(format!("ambient-istio-{}", std::process::id()));
    let this = std::env::current_exe()?;
    let node_proxy = match &options.ztunnel {
        Some(theirs) => theirs.canonicalize().context("no such node proxy")?,
        None => this.clone(),
    };
    let mut command = Command::new(scripts.join("cluster.sh"));
    command.env("NODES", "2").env("NODE_PROXY", node_proxy).arg(&bin).arg(&run).arg(this);
    command.arg("istio-inside").arg(&bin).arg(&run);
    if options.json {
        command.arg("--json").stderr(Stdio::null());
    }
    if options.keeps() {
        command.arg("--keep");
    }
    command.env("BED_TEMPORARY", "yes");
    Err(anyhow::Error::new(command.exec()).context("cluster.sh"))
}

/// The checks, within the bed.
pub(crate) fn inside(options: &Options, words: &[&str]) -> Result<ExitCode> {
    let &[bin, run] = words else { bail!("for cluster.sh alone") };
    let mut report = Report::new(options.json);
    report.stage("two nodes of Kubernetes, istiod, istio-cni; a node proxy for each");
    let mut bed = Bed::new(Path::new(bin), Path::new(run))?;
    report.check("nodes", || bed.start());
    report.check("workloads", || bed.populate());
    if report.failed() == 0 {
        paths::check(&bed, &mut report)?;
        authorization::check(&bed, &mut report)?;
        ipv6::check(&bed, &mut report)?;
        services::check(&bed, &mut report)?;
        lives::check(&mut bed, &mut report)?;
    }
    let held = report.failed() == 0;
    if !options.json {
        println!("\n{}", report.summary(report.elapsed()));
    }
    if !held {
        let kept = bed.save_logs()?;
        eprintln!("The logs are in {}", kept.display());
    }
    if options.keeps() {
        println!("{HINTS}");
        bed.stay();
    }
    Ok(if held { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Runs a command within the bed that stays up: kubectl, istioctl, anything.
pub(crate) fn enter(options: &Options) -> Result<ExitCode> {
    let held = held()?;
    let (program, rest) = options.command.split_first().context("what? put it after --")?;
    let mut command = Command::new("nsenter");
    command.args(["-t", &held.process.to_string(), "-m", "-n", "-p", "env"]);
    command.arg(format!("KUBECONFIG={}/kubeconfig", held.run));
    match program.to_str() {
        Some("kubectl") => command.arg(format!("{}/kube", held.bin)).arg("kubectl"),
        Some("istioctl") => command.arg(format!("{}/istioctl", held.bin)),
        _ => command.arg(program),
    };
    Err(anyhow::Error::new(command.args(rest).exec()).context("nsenter"))
}

/// Ends the bed that stays up.
pub(crate) fn stop() -> Result<ExitCode> {
    kill(Pid::from_raw(held()?.process), Signal::SIGTERM)?;
    Ok(ExitCode::SUCCESS)
}

/// The process that holds a bed.
struct Held {
    process: i32,
    bin: String,
    run: String,
}

fn held() -> Result<Held> {
    for entry in fs::read_dir("/proc")?.flatten() {
        let process = entry.file_name().to_str().and_then(|name| name.parse().ok());
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let words: Vec<_> = line.split(|byte| *byte == 0).map(String::from_utf8_lossy).collect();
        if let (Some(process), [_, inside, bin, run, ..]) = (process, words.as_slice())
            && inside == "istio-inside"
        {
            return Ok(Held { process, bin: bin.to_string(), run: run.to_string() });
        }
    }
    bail!("no real mesh is up: `cargo lab --istio --keep` leaves one")
}

/// The words of a command as the harness takes them.
fn words(words: &[&str]) -> Vec<OsString> {
    words.iter().map(OsString::from).collect()
}
