//! `cargo lab`: the main job of the mesh in one command. Two nodes, real node proxies, ordinary
//! programs; one line for each thing that is to hold, with what was observed.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "it is a program for people")]

mod attach;
mod checks;
mod istio;
mod report;
mod world;

use std::{
    ffi::{OsStr, OsString},
    os::unix::process::CommandExt,
    path::PathBuf,
    process::{Command, ExitCode},
};

use anyhow::{Context, Result, bail};
use mesh_tests::{instance, internal, program::installed};
use nix::unistd::Uid;

const USAGE: &str = "\
cargo lab [--json] [--keep] [--name <id>] [--ztunnel <binary>]
    builds two nodes with pods, runs the node proxies and checks what a mesh is for
    --json     one object a line
    --keep     leave it up afterwards
    --name     what to call it (four hex digits, or a word)
    --ztunnel  another node proxy than the one built with the lab
    --istio    on a real mesh instead: istiod, Kubernetes and istio-cni on two nodes (needs Go 1.26
               once, for 16 minutes); with --keep until it is stopped
cargo lab istio -- <command>      with --istio --keep: kubectl, istioctl or something else in there
cargo lab istio-stop              end it
cargo lab exec [--name <id>] <pod> -- <command>      run something in a pod (or on a node)
cargo lab log [--name <id>] [--follow] <node>        the node proxy's log
cargo lab metrics [--name <id>] <node>               its metrics
cargo lab dump [--name <id>] <node>                  its config_dump
cargo lab list                                       what is running
cargo lab stop [--name <id>]                         end it";

/// What was asked for.
#[derive(Debug, Default)]
pub(crate) struct Options {
    pub(crate) json: bool,
    then: Then,
    on: On,
    follow: bool,
    pub(crate) name: Option<String>,
    pub(crate) ztunnel: Option<PathBuf>,
    /// What is no option.
    words: Vec<String>,
    /// What follows `--`.
    command: Vec<OsString>,
}

/// What the checks are made on.
#[derive(Clone, Copy, Debug, Default)]
enum On {
    /// Namespaces, and a CNI that the lab plays.
    #[default]
    Namespaces,
    /// A real mesh.
    Istio,
}

/// What becomes of the lab when its checks are through.
#[derive(Clone, Copy, Debug, Default)]
enum Then {
    #[default]
    End,
    /// It stays, held by another process.
    Keep,
    /// That other process.
    Hold,
}

fn main() -> ExitCode {
    if let Some(code) = internal::dispatch() {
        return code;
    }
    match run() {
        Ok(code) => code,
        Err(why) => {
            eprintln!("lab: {why:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<ExitCode> {
    let options = Options::parse(std::env::args_os().skip(1))?;
    let words: Vec<&str> = options.words.iter().map(String::as_str).collect();
    if words == ["help"] {
        println!("{USAGE}");
        return Ok(ExitCode::SUCCESS);
    }
    if !Uid::effective().is_root() {
        return Err(through_sudo());
    }
    let name = options.name.as_deref();
    match words.as_slice() {
        [] if matches!(options.on, On::Istio) => istio::run(&options),
        ["istio-inside", rest @ ..] => istio::inside(&options, rest),
        ["istio"] => istio::enter(&options),
        ["istio-stop"] => istio::stop(),
        [] if matches!(options.then, Then::Hold) => attach::hold(&options),
        [] if matches!(options.then, Then::Keep) => attach::keep(&options),
        [] => {
            let own = || format!("{:04x}", std::process::id() & 0xffff);
            let id = options.name.clone().unwrap_or_else(own);
            instance::end_on_signals(id.clone(), 130)?;
            let (world, held) = checks::run(&options, &id)?;
            drop(world);
            Ok(if held { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
        ["exec", pod] => attach::exec(name, pod, &options.command),
        ["log", node] => attach::log(name, node, options.follow),
        ["metrics", node] => attach::print(name, node, 15020, "/metrics"),
        ["dump", node] => attach::print(name, node, 15000, "/config_dump"),
        ["list"] => {
            for id in instance::running() {
                println!("{id}");
            }
            Ok(ExitCode::SUCCESS)
        }
        ["stop"] => attach::stop(name),
        ["stop", id] => attach::stop(Some(id)),
        _ => bail!("not understood: {}\n{USAGE}", words.join(" ")),
    }
}

impl Options {
    /// Whether the lab is to stay up.
    pub(crate) fn keeps(&self) -> bool {
        !matches!(self.then, Then::End)
    }

    fn parse(arguments: impl Iterator<Item = OsString>) -> Result<Self> {
        let mut options = Self::default();
        let mut arguments = arguments;
        while let Some(argument) = arguments.next() {
            let mut value = || arguments.next().with_context(|| format!("{argument:?} what?"));
            match argument.to_str().context("not text")? {
                "--" => {
                    options.command = arguments.collect();
                    break;
                }
                "--json" => options.json = true,
                "--istio" => options.on = On::Istio,
                "--keep" => options.then = Then::Keep,
                "--held" => options.then = Then::Hold,
                "--follow" | "-f" => options.follow = true,
                "--name" => {
                    let name = value()?.into_string().ok().context("the name is not text")?;
                    let plain = |c: char| c.is_ascii_alphanumeric();
                    if name.is_empty() || name.len() > 12 || !name.chars().all(plain) {
                        bail!("a name is 1 to 12 letters and digits");
                    }
                    options.name = Some(name);
                }
                "--ztunnel" => options.ztunnel = Some(value()?.into()),
                "--help" | "-h" => options.words = vec!["help".to_owned()],
                other if other.starts_with('-') => bail!("no option {other}\n{USAGE}"),
                word => options.words.push(word.to_owned()),
            }
        }
        Ok(options)
    }
}

/// Becomes root by sudo; comes back only with the reason why not.
fn through_sudo() -> anyhow::Error {
    if installed("sudo").is_none() {
        return anyhow::anyhow!(
            "it makes network namespaces and loads eBPF: run it as root (there is no sudo here)"
        );
    }
    eprintln!("lab: it makes network namespaces and loads eBPF: asking sudo to run it as root");
    let exe = std::env::current_exe().unwrap_or_default();
    let arguments = std::env::args_os().skip(1);
    let words: Vec<OsString> =
        [OsStr::new("--").to_owned(), exe.into_os_string()].into_iter().chain(arguments).collect();
    anyhow::Error::new(Command::new("sudo").args(words).exec()).context("sudo")
}
