//! Programs inside this one, run by the harness as processes of their own:
//! `lab internal <name> …`, and the node proxy under the name `ztunnel`.

use std::{
    ffi::OsString,
    fs::File,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    sync::OnceLock,
};

use anyhow::{Context, Result, bail};
use nix::{
    sched::{CloneFlags, setns},
    sys::{
        prctl,
        signal::{SigSet, Signal},
    },
    unistd::{Pid, setpgid},
};

use crate::programs;

static SELF: OnceLock<PathBuf> = OnceLock::new();

/// The name under which this executable is the node proxy.
pub const ZTUNNEL: &str = "ztunnel";

/// To be called first thing by `lab` and by the benches: does what this process was started for, if
/// that is something internal.
pub fn dispatch() -> Option<ExitCode> {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    let name = arguments.first().map(Path::new).and_then(Path::file_name);
    if name.is_some_and(|name| name == ZTUNNEL) {
        return Some(ztunnel::main());
    }
    if let Ok(exe) = std::env::current_exe() {
        let _set = SELF.set(exe);
    }
    let (_, rest) = arguments.split_first()?;
    let (first, rest) = rest.split_first()?;
    if first != "internal" {
        return None;
    }
    Some(match run(rest) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            #[expect(clippy::print_stderr, reason = "it is a program")]
            {
                eprintln!("{why:#}");
            }
            ExitCode::FAILURE
        }
    })
}

/// The node proxy that is built into this executable, by its name in the folder.
pub(crate) fn ztunnel_in(folder: &Path) -> Result<PathBuf> {
    let link = folder.join(ZTUNNEL);
    std::os::unix::fs::symlink(executable(), &link)?;
    Ok(link)
}

/// The executable that knows [`dispatch`]: this one, or `lab` beside a test.
pub(crate) fn executable() -> PathBuf {
    let beside = || {
        let exe = std::env::current_exe().unwrap_or_default();
        // target/<profile>/deps/<test>
        let profile = exe.parent().and_then(Path::parent).unwrap_or(Path::new(""));
        profile.join("lab")
    };
    SELF.get().cloned().unwrap_or_else(beside)
}

fn run(arguments: &[OsString]) -> Result<()> {
    let Some((name, rest)) = arguments.split_first() else { bail!("internal: what?") };
    if name == "in" {
        return become_program(rest);
    }
    let words: Result<Vec<_>, _> = rest.iter().cloned().map(OsString::into_string).collect();
    let Ok(words) = words else { bail!("internal: not text") };
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match (name.to_str().unwrap_or_default(), words.as_slice()) {
        ("http-server", [name, addresses @ ..]) => programs::http::serve(name, addresses),
        ("http-get", urls) => programs::http::get(None, urls),
        ("http-get-from", [from, urls @ ..]) => programs::http::get(Some(from.parse()?), urls),
        ("announced-server", addresses) => programs::announced::serve(addresses),
        ("tcp-server", addresses) => programs::tcp::serve(addresses),
        ("tcp", [address, what @ ..]) => programs::tcp::client(address, what),
        (name, _) => bail!("internal: no program {name}, or not with these arguments"),
    }
}

/// Enters the namespace and becomes the program: it dies with the harness, has a process group of its
/// own (Ctrl-C is for the harness alone), and inherits no signal mask.
fn become_program(arguments: &[OsString]) -> Result<()> {
    let [namespace, program, rest @ ..] = arguments else { bail!("internal: in what, what?") };
    prctl::set_pdeathsig(Signal::SIGKILL).context("cannot tie the program to the lab")?;
    setpgid(Pid::from_raw(0), Pid::from_raw(0)).context("cannot make a process group")?;
    SigSet::empty().thread_set_mask().context("cannot reset the signal mask")?;
    let namespace = File::open(namespace).context("cannot open the namespace")?;
    setns(&namespace, CloneFlags::CLONE_NEWNET).context("cannot enter the namespace")?;
    drop(namespace);
    let why = Command::new(program).args(rest).exec();
    Err(why).with_context(|| format!("cannot run {}", program.to_string_lossy()))
}
