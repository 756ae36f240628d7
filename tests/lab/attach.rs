//! A lab that stays, and what can be done with it.

use std::{
    ffi::OsString,
    fs::{self, File},
    os::unix::process::CommandExt,
    process::{Command, ExitCode},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use mesh_tests::{http, instance, netns::Namespace, proxy, wait};
use nix::{
    sys::signal::{Signal, kill},
    unistd::{Pid, dup2_stderr, dup2_stdout, setsid},
};

use crate::{Options, checks};

const DEFAULT: &str = "demo";

/// Starts another process that builds the lab and holds it; returns when its checks are through.
pub(crate) fn keep(options: &Options) -> Result<ExitCode> {
    let name = options.name.as_deref().unwrap_or(DEFAULT);
    if instance::running().iter().any(|id| id == name) {
        bail!("a lab named {name} is running: stop it by `cargo lab stop {name}`");
    }
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["--held", "--name", name]);
    if options.json {
        command.arg("--json");
    }
    if let Some(ztunnel) = &options.ztunnel {
        command.arg("--ztunnel").arg(ztunnel);
    }
    let mut child = command.spawn().context("cannot start the lab")?;
    loop {
        if let Some(status) = child.try_wait()? {
            bail!("the lab ended: {status}");
        }
        let result = instance::folder(name).map(|folder| folder.join("result"));
        if let Some(code) = result.ok().and_then(|file| fs::read_to_string(file).ok()) {
            if !options.json {
                println!("{}", hints(name));
            }
            return Ok(if code == "0" { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        wait::pause(Duration::from_millis(50));
    }
}

fn hints(name: &str) -> String {
    let name = if name == DEFAULT { String::new() } else { format!(" --name {name}") };
    format!(
        "\nIt stays up. To look around:
  cargo lab exec{name} client -- curl -s http://10.96.0.10/
  cargo lab exec{name} intruder -- curl -s http://10.96.0.10/
  cargo lab log{name} node-a        cargo lab metrics{name} node-a        cargo lab dump{name} node-a
  cargo lab stop{name}"
    )
}

/// The other process: builds, checks, says so, and waits to be stopped.
pub(crate) fn hold(options: &Options) -> Result<ExitCode> {
    let name = options.name.clone().unwrap_or_else(|| DEFAULT.to_owned());
    // Ctrl-C is for the one who waits; if it comes early, that one's end is noticed below.
    setsid().context("cannot leave the terminal")?;
    instance::end_on_signals(name.clone(), 0)?;
    let (world, held) = checks::run(options, &name)?;
    fs::write(world.lab.folder().join("owner"), std::process::id().to_string())?;
    let result = world.lab.folder().join("result");
    let new = world.lab.folder().join("result.new");
    fs::write(&new, if held { "0" } else { "1" })?;
    fs::rename(&new, &result)?;
    // Whoever reads our output is to see its end.
    let nothing = File::options().write(true).open("/dev/null")?;
    dup2_stdout(&nothing)?;
    dup2_stderr(&nothing)?;
    loop {
        wait::pause(Duration::from_secs(3600));
    }
}

/// The lab that is meant: the named one, or the only one.
fn one(name: Option<&str>) -> Result<String> {
    if let Some(name) = name {
        instance::folder(name)?;
        return Ok(name.to_owned());
    }
    match instance::running().as_slice() {
        [] => bail!("no lab is running: start one by `cargo lab --keep`"),
        [one] => Ok(one.clone()),
        several => match several.iter().find(|id| *id == DEFAULT) {
            Some(default) => Ok(default.clone()),
            None => bail!("several labs are running: name one of {}", several.join(", ")),
        },
    }
}

fn inside(name: Option<&str>, part: &str) -> Result<Namespace> {
    let id = one(name)?;
    Namespace::open(&format!("lab-{id}-{part}"))
        .with_context(|| format!("{part} is no pod or node of the lab {id}"))
}

/// Becomes the command, in a pod.
pub(crate) fn exec(name: Option<&str>, pod: &str, command: &[OsString]) -> Result<ExitCode> {
    let Some((program, arguments)) = command.split_first() else {
        bail!("what is to be run in {pod}? (… exec {pod} -- <command>)");
    };
    inside(name, pod)?.enter()?;
    let why = Command::new(program).args(arguments).exec();
    Err(why).with_context(|| format!("cannot run {}", program.to_string_lossy()))
}

/// Prints a log.
pub(crate) fn log(name: Option<&str>, node: &str, follow: bool) -> Result<ExitCode> {
    let path = proxy::log_of(&instance::folder(&one(name)?)?, node);
    if follow {
        return Err(Command::new("tail").arg("-F").arg(path).exec().into());
    }
    let text =
        fs::read_to_string(&path).with_context(|| format!("{node} is no node of the lab"))?;
    print!("{text}");
    Ok(ExitCode::SUCCESS)
}

/// Prints what a port of a node proxy says.
pub(crate) fn print(name: Option<&str>, node: &str, port: u16, path: &str) -> Result<ExitCode> {
    let answer = http::get(&inside(name, node)?, port, path).context("the node proxy is silent")?;
    print!("{}", answer.body);
    Ok(if answer.status == 200 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Ends it.
pub(crate) fn stop(name: Option<&str>) -> Result<ExitCode> {
    let id = one(name)?;
    let folder = instance::folder(&id)?;
    let owner = fs::read_to_string(folder.join("owner")).ok().and_then(|pid| pid.parse().ok());
    let Some(owner) = owner else { bail!("{id} is still being checked: stop that by Ctrl-C") };
    kill(Pid::from_raw(owner), Signal::SIGTERM).context("cannot stop it")?;
    wait::until("its end", wait::SOON, || Ok((!folder.exists()).then_some(())))?;
    Ok(ExitCode::SUCCESS)
}
