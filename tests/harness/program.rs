//! Programs in namespaces: ordinary processes, which know nothing of the mesh.

use std::{
    ffi::{OsStr, OsString},
    fs::{self, File, OpenOptions},
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{internal, netns::Namespace, wait};

/// A running program. It is killed when this is dropped, and when the harness dies.
#[derive(Debug)]
pub struct Program {
    child: Child,
    name: String,
    out: PathBuf,
    err: PathBuf,
}

/// What a program left.
#[derive(Clone, Debug)]
pub struct Finished {
    /// Its exit code; -1 where a signal ended it.
    pub code: i32,
    /// Its output.
    pub out: String,
    /// Its errors.
    pub err: String,
}

impl Finished {
    /// Whether it ended well.
    #[must_use]
    pub fn is_ok(&self) -> bool {
        self.code == 0
    }

    /// Its output, or why there is none.
    pub fn ok(self) -> Result<String> {
        if self.is_ok() {
            return Ok(self.out);
        }
        bail!("exit code {}: {}{}", self.code, self.err.trim(), self.out.trim())
    }
}

/// How to run a program.
#[derive(Debug)]
pub struct Start<'a> {
    namespace: &'a Namespace,
    folder: &'a Path,
    name: String,
    command: Vec<OsString>,
    environment: Option<Vec<(String, String)>>,
    log: Option<PathBuf>,
}

impl<'a> Start<'a> {
    /// The command, in the namespace; its output goes to files in the folder.
    pub fn new<S: AsRef<OsStr>>(
        namespace: &'a Namespace,
        folder: &'a Path,
        command: impl IntoIterator<Item = S>,
    ) -> Self {
        let command: Vec<_> = command.into_iter().map(|word| word.as_ref().to_owned()).collect();
        let program = command.first().map(Path::new).and_then(Path::file_name);
        let name = program.unwrap_or_default().to_string_lossy().into_owned();
        Self { namespace, folder, name, command, environment: None, log: None }
    }

    /// One of our own programs ([`internal`]).
    pub fn ours<S: AsRef<OsStr>>(
        namespace: &'a Namespace,
        folder: &'a Path,
        command: impl IntoIterator<Item = S>,
    ) -> Self {
        let exe = [internal::executable().into_os_string(), "internal".into()];
        let words = command.into_iter().map(|word| word.as_ref().to_owned());
        Self::new(namespace, folder, exe.into_iter().chain(words))
    }

    /// With this environment, and nothing of ours but the path.
    #[must_use]
    pub fn environment(mut self, variables: Vec<(String, String)>) -> Self {
        self.environment = Some(variables);
        self
    }

    /// With output and errors both appended to this file.
    #[must_use]
    pub fn log(mut self, file: &Path) -> Self {
        self.log = Some(file.to_owned());
        self
    }

    /// Starts it.
    pub fn spawn(self) -> Result<Program> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let file = |end| self.folder.join(format!("{number:04}-{}.{end}", self.name));
        let (out, err) = match self.log {
            Some(log) => (log.clone(), log),
            None => (file("out"), file("err")),
        };
        let open = |path: &Path| {
            OpenOptions::new()
                .create(true)
                .append(true)
                .open(path)
                .with_context(|| format!("cannot open {}", path.display()))
        };
        let mut command = Command::new(internal::executable());
        command.arg("internal").arg("in").arg(self.namespace.path()).args(&self.command);
        if let Some(variables) = self.environment {
            command.env_clear().env("PATH", "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
            command.envs(variables);
        }
        command.stdin(Stdio::null()).stdout(open(&out)?).stderr(open(&err)?);
        let child = spawn(command).with_context(|| format!("cannot start {}", self.name))?;
        Ok(Program { child, name: self.name, out, err })
    }

    /// Runs it to its end.
    pub fn run(self, deadline: Duration) -> Result<Finished> {
        self.spawn()?.finish(deadline)
    }
}

impl Program {
    /// Waits for its end.
    pub fn finish(mut self, deadline: Duration) -> Result<Finished> {
        let what = format!("the end of {}", self.name);
        let ended = wait::until(&what, deadline, || Ok(self.child.try_wait()?));
        let status = ended.map_err(|why| {
            let said = format!("{}{}", self.errors(), self.output());
            why.context(format!("it had said: {:.400}", said.trim()))
        })?;
        let code = status.code().unwrap_or(-1);
        Ok(Finished { code, out: self.output(), err: self.errors() })
    }

    /// What it has written.
    #[must_use]
    pub fn output(&self) -> String {
        fs::read(&self.out).map(|b| String::from_utf8_lossy(&b).into_owned()).unwrap_or_default()
    }

    /// What it has complained of.
    #[must_use]
    pub fn errors(&self) -> String {
        fs::read(&self.err).map(|b| String::from_utf8_lossy(&b).into_owned()).unwrap_or_default()
    }

    /// Waits until it has written a line that has this in it.
    pub fn says(&mut self, text: &str, deadline: Duration) -> Result<String> {
        let what = format!("{} to say \"{text}\"", self.name);
        wait::until(&what, deadline, || {
            let output = self.output();
            if let Some(line) = output.lines().find(|line| line.contains(text)) {
                return Ok(Some(line.to_owned()));
            }
            if let Some(status) = self.child.try_wait()? {
                let said = self.errors() + &output;
                return Err(anyhow!("{} ended ({status}): {}", self.name, said.trim()));
            }
            Ok(None)
        })
    }

    /// Its process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// What it has open: what each descriptor leads to. Its own network namespace is left out, of which every thread
    /// of a node proxy keeps a descriptor from when it first enters another.
    pub fn descriptors(&self) -> Result<Vec<String>> {
        let process = PathBuf::from(format!("/proc/{}", self.id()));
        let own = fs::read_link(process.join("ns/net"))?;
        let entries = fs::read_dir(process.join("fd"))?;
        // One that was closed while the folder was read leads nowhere.
        let targets = entries.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
        let others = targets.filter(|target| *target != own);
        Ok(others.map(|target| target.display().to_string()).collect())
    }

    /// Whether it runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.child.id())?;
        kill(Pid::from_raw(pid), signal).with_context(|| format!("cannot signal {}", self.name))
    }

    /// Waits for its end; the exit code, or the signal's number as a negative one.
    pub fn wait(&mut self, deadline: Duration) -> Result<i32> {
        let what = format!("the end of {}", self.name);
        let status = wait::until(&what, deadline, || Ok(self.child.try_wait()?))?;
        Ok(status.code().unwrap_or_else(|| -status.signal().unwrap_or(0)))
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}

/// Starts the command from a thread that lasts: the kernel ends a child with the *thread* that made it.
fn spawn(command: Command) -> Result<Child> {
    type Order = (Command, mpsc::SyncSender<std::io::Result<Child>>);
    static SPAWNER: OnceLock<mpsc::SyncSender<Order>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (orders, taken) = mpsc::sync_channel::<Order>(16);
        let serve = move || {
            for (mut command, answer) in taken {
                let _nobody = answer.send(command.spawn());
            }
        };
        // Without a thread, the channel is closed, which the callers see.
        let _thread = thread::Builder::new().name("spawner".into()).spawn(serve);
        orders
    });
    let (answer, child) = mpsc::sync_channel(1);
    spawner.send((command, answer)).map_err(|_closed| anyhow!("the spawner is gone"))?;
    Ok(child.recv()??)
}

/// Whether a program of this name is installed.
#[must_use]
pub fn installed(name: &str) -> Option<PathBuf> {
    let path = std::env::vars_os().find(|(key, _)| key == "PATH")?.1;
    std::env::split_paths(&path)
        .map(|folder| folder.join(name))
        .find(|file| File::open(file).is_ok_and(|f| f.metadata().is_ok_and(|m| m.is_file())))
}
