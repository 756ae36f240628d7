//! What the command line asks for.

use crate::{
    app,
    config::{self, Capture},
};
use mesh_platform::redirect::{Ebpf, Redirect};
use mesh_runtime::{
    config::Env,
    log::{self, LogConfig},
};
use std::{io::Write, process::ExitCode};

const HELP: &str = "\
The node proxy of an ambient mesh.

  ztunnel [proxy [ztunnel]]    serve the pods of this node (settings: environment, see the README)
  ztunnel release <uid>|--all  withdraw the capture of a pod, or of all (CAPTURE_PIN_DIR)
  ztunnel settings             say what can be set, as the README has it
  ztunnel version              say which version this is
  ztunnel help                 say this
";

/// Runs the program.
#[must_use]
pub fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let command = arguments.next();
    match (command.as_deref(), arguments.next().as_deref()) {
        // What follows `proxy` is Istio's business, and ignored.
        (None | Some("proxy"), _) => serve(),
        (Some("release"), Some("--all")) => release(None),
        (Some("release"), Some(uid)) => release(Some(uid)),
        (Some("settings"), _) => {
            say(&mesh_runtime::config::markdown(config::keys::ALL));
            ExitCode::SUCCESS
        }
        (Some("version"), _) => {
            say(&format!("ztunnel {}\n", env!("CARGO_PKG_VERSION")));
            ExitCode::SUCCESS
        }
        (Some("help" | "--help" | "-h"), _) => {
            say(HELP);
            ExitCode::SUCCESS
        }
        (Some(other), _) => fail(&format!("unknown command {other:?}: see `ztunnel help`")),
    }
}

fn say(text: &str) {
    // Nobody reads it, then.
    let _closed = std::io::stdout().write_all(text.as_bytes());
}

fn fail(text: &str) -> ExitCode {
    let _closed = writeln!(std::io::stderr(), "ztunnel: {text}");
    ExitCode::FAILURE
}

fn serve() -> ExitCode {
    let config = match config::load(&Env) {
        Ok(config) => config,
        Err(errors) => return fail(&errors.to_string()),
    };
    let shape = LogConfig { filter: config.process.filter.clone(), shape: config.process.shape };
    let log = match log::init(shape) {
        Ok(log) => log,
        Err(error) => return fail(&format!("the log cannot be set up: {error}")),
    };
    match app::run(config, &log) {
        Ok(code) => code,
        Err(error) => {
            tracing::error!("{error:#}");
            log.flush(app::LAST_LINES);
            fail(&format!("{error:#}"))
        }
    }
}

fn release(uid: Option<&str>) -> ExitCode {
    let config = match config::load(&Env) {
        Ok(config) => config,
        Err(errors) => return fail(&errors.to_string()),
    };
    let Capture::Ebpf(settings) = config.capture else {
        return fail(
            "nothing is captured by us: set CAPTURE=ebpf, and CAPTURE_PIN_DIR as the proxy has it",
        );
    };
    let released = Ebpf::new(settings).and_then(|redirect| redirect.release(uid));
    match released {
        Ok(uids) => {
            for uid in uids {
                say(&format!("released {uid}\n"));
            }
            ExitCode::SUCCESS
        }
        Err(error) => fail(&crate::pod::manager::chain(&error)),
    }
}
