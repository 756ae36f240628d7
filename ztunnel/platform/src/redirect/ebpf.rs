//! Capture by our own programs: rules lead what a pod's sockets send back to the pod, `sk_lookup` picks the
//! proxy's listener (`spec/capture.md` §1). The kernel's work is once per connection, not per packet.

mod follow;
mod foreign;
mod netlink;
mod pins;
mod program;
mod rules;
mod sockets;
mod sys;
#[cfg(test)]
mod tests;

use super::{CaptureError, Pod, Recipe, Redirect, SocketOptions, wrong_pod};
use crate::{netns::Netns, socket::Connecting};
use aya::Btf;
use follow::Follower;
use mesh_core::OriginalDst;
use mesh_ebpf_common::MARK_LEAVING;
use program::{Contents, Program};
use rules::{Rules, Surroundings};
use std::{
    fs::read_dir,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering},
    },
};

/// What istio-cni rewrites the source of kubelet's probes to.
const PROBES: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(169, 254, 7, 127)),
    IpAddr::V6(Ipv6Addr::new(0xfd16, 0x9254, 0x7127, 0x1337, 0xffff, 0xffff, 0xffff, 0xffff)),
];
/// Passes over a namespace's sockets until none is left to mark.
const PASSES: usize = 10;
/// Generations fit the upper four bits of a mark.
const GENERATIONS: u32 = 16;

/// How to capture.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Options of connections.
    pub options: SocketOptions,
    /// Where programs outlive the process: a folder of this instance, on a bpffs or where one can be mounted.
    /// Without, a restart loads them anew.
    pub pins: Option<PathBuf>,
    /// Sources that reach applications directly: what kubelet's probes are rewritten to, and nothing else.
    pub probes: Vec<IpAddr>,
    /// Inbound is left alone, but for tunnels.
    pub ingress: bool,
}

impl Default for Settings {
    /// Without pins; Istio's probe addresses.
    fn default() -> Self {
        Self {
            options: SocketOptions::default(),
            pins: None,
            probes: PROBES.to_vec(),
            ingress: false,
        }
    }
}

/// The redirect that is our own.
#[derive(Debug)]
pub struct Ebpf {
    settings: Settings,
    pins: Option<PathBuf>,
    /// The kernel's types: parsed once, and only where they are needed.
    btf: OnceLock<Option<Btf>>,
}

/// What this kind of capture knows of a pod.
#[derive(Clone, Debug)]
pub(super) struct Captured(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    netns: Netns,
    ingress: bool,
    mark: u32,
    generation: u32,
    folder: Option<PathBuf>,
    own: RwLock<Vec<IpAddr>>,
    /// Capture is being withdrawn: connections to the application must survive that.
    leaving: AtomicBool,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    program: Option<Program>,
    withdrawn: bool,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Captured {
    /// See [`Pod::follow`].
    pub(super) fn follower(&self) -> Option<Follower> {
        Follower::new(Arc::clone(&self.0))
            .inspect_err(|error| tracing::error!(%error, "a pod's addresses are not followed"))
            .ok()
    }
}

impl Ebpf {
    /// With these settings. Where pins are wanted and impossible, it does without, and says so.
    ///
    /// # Errors
    ///
    /// Fails where a probe address is one that others have.
    pub fn new(settings: Settings) -> Result<Self, CaptureError> {
        let here =
            Surroundings::look().map_err(CaptureError::kernel("read the node's addresses"))?;
        let open = settings.probes.iter().find(|ip| !is_probe(**ip) || here.addresses.contains(ip));
        if let Some(ip) = open {
            return Err(CaptureError::InvalidProbe(*ip));
        }
        let pins = settings.pins.clone().filter(|root| match pins::root(root) {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!(%error, path = %root.display(), "no bpffs: a restart will load programs anew");
                false
            }
        });
        Ok(Self { settings, pins, btf: OnceLock::new() })
    }

    /// Marks sockets that live. Without the kernel's types it cannot, and says so.
    fn mark(&self, mark: u32) -> Result<u32, CaptureError> {
        let types = self.btf.get_or_init(|| {
            Btf::from_sys_fs()
                .inspect_err(|error| {
                    tracing::warn!(%error, "no kernel BTF: connections that live when a pod is enrolled or released are reset");
                })
                .ok()
        });
        let Some(types) = types else { return Ok(0) };
        program::mark_existing(types, mark)
            .map_err(CaptureError::kernel("mark the sockets that live"))
    }

    /// In the pod's namespace.
    fn enrol_here(&self, uid: &str, netns: &Netns) -> Result<Pod, CaptureError> {
        let mut rules =
            Rules::open().map_err(CaptureError::kernel("speak to the kernel's routing"))?;
        let reasons =
            foreign::reasons(&mut rules).map_err(CaptureError::kernel("look for others' rules"))?;
        if !reasons.is_empty() {
            return Err(CaptureError::Foreign(reasons));
        }
        let captured = rules.capturing().map_err(CaptureError::kernel("read the rules"))?;
        let folder = self.pins.as_ref().map(|root| root.join(uid));
        let result = self.capture(uid, netns, folder.as_deref(), captured);
        if result.is_err() && !captured {
            // What is written by now does nothing, but need not stay.
            if let Err(error) = rules.flush() {
                tracing::debug!(%error, "rules of a failed enrolment stay");
            }
            if let Some(folder) = folder
                && let Err(error) = pins::withdraw(&folder, netns.id())
            {
                tracing::debug!(%error, "pins of a failed enrolment stay");
            }
        }
        result
    }

    fn capture(
        &self,
        uid: &str,
        netns: &Netns,
        folder: Option<&Path>,
        captured: bool,
    ) -> Result<Pod, CaptureError> {
        let adopted = folder.and_then(|folder| adopt(folder, netns));
        let generation =
            adopted.as_ref().map_or(0, Program::generation).wrapping_add(1) % GENERATIONS;
        let listeners = sockets::listeners(&self.settings.options, generation)
            .map_err(CaptureError::kernel("listen in the pod"))?;
        let mut rules =
            Rules::open().map_err(CaptureError::kernel("speak to the kernel's routing"))?;
        let here =
            Surroundings::look().map_err(CaptureError::kernel("read the pod's addresses"))?;
        let Settings { probes, ingress, .. } = &self.settings;
        rules.escape(probes).map_err(CaptureError::kernel("write the rules"))?;
        rules.routes(&here).map_err(CaptureError::kernel("write the routes"))?;
        let contents =
            Contents { listeners: &listeners, here: &here, probes, ingress: *ingress, generation };
        let mut program = match adopted {
            Some(mut program) => program.fill(&contents).map(|()| program)?,
            None => Program::attach(folder, netns, &contents)?,
        };
        if *ingress {
            bypass(&mut program, &here)?;
        }
        // The sockets that live where capture is on are captured ones, or wait for us: marked, they would be
        // reset, or leave in clear text.
        if !captured {
            self.mark(sockets::mark(generation))?;
        }
        rules.capture().map_err(CaptureError::kernel("begin capture"))?;
        let shared = Shared {
            netns: netns.clone(),
            ingress: *ingress,
            mark: sockets::mark(generation),
            generation,
            folder: folder.map(Path::to_owned),
            own: RwLock::new(here.addresses),
            leaving: AtomicBool::new(false),
            state: Mutex::new(State { program: Some(program), withdrawn: false }),
        };
        Ok(Pod::new(uid, netns.clone(), listeners, Recipe::Ebpf(Captured(Arc::new(shared)))))
    }

    /// Ends capture in the namespace of the thread; what lives stays with the proxy. Returns whether anything
    /// did. `leaving` is called when the proxy is to mark what it begins.
    fn withdraw(&self, leaving: impl FnOnce()) -> Result<bool, CaptureError> {
        let mut rules =
            Rules::open().map_err(CaptureError::kernel("speak to the kernel's routing"))?;
        rules.keep_leaving().map_err(CaptureError::kernel("keep what lives"))?;
        if let Err(error) = sys::sysctl("net/ipv4/tcp_fwmark_accept", "1") {
            tracing::warn!(%error, "connections that begin during the release may be reset");
        }
        leaving();
        let mut lives = false;
        for _ in 0..PASSES {
            if self.mark(MARK_LEAVING)? == 0 {
                break;
            }
            lives = true;
        }
        rules.end_capture().map_err(CaptureError::kernel("end capture"))?;
        Ok(lives)
    }

    /// Withdraws what somebody else captured.
    fn release_one(&self, root: &Path, uid: &str) -> Result<(), CaptureError> {
        let folder = root.join(uid);
        let ino = pins::namespace(&folder).unwrap_or(0);
        if ino == 0 {
            return pins::remove(&folder)
                .map_err(CaptureError::kernel("forget a pod that is gone"));
        }
        let netns = find(ino.into()).ok_or(CaptureError::NamespaceNotFound)?;
        let release = || {
            if !self.withdraw(|| ())? {
                let flush = Rules::open().and_then(|mut rules| rules.flush());
                flush.map_err(CaptureError::kernel("take the rules away"))?;
            }
            pins::withdraw(&folder, netns.id()).map_err(CaptureError::kernel("detach the program"))
        };
        netns.run(release).map_err(CaptureError::kernel("enter the pod's network namespace"))?
    }
}

impl Redirect for Ebpf {
    fn enrol(&self, uid: &str, netns: &Netns) -> Result<Pod, CaptureError> {
        if !pins::is_uid(uid) {
            return Err(CaptureError::InvalidUid);
        }
        netns
            .run(|| self.enrol_here(uid, netns))
            .map_err(CaptureError::kernel("enter the pod's network namespace"))?
    }

    fn remove(&self, pod: &Pod) -> Result<(), CaptureError> {
        let Recipe::Ebpf(Captured(shared)) = &pod.0.recipe else { return Ok(()) };
        let mut state = shared.state();
        // Somebody who took it over has the capture, too.
        let ours = |program: &Program| program.generation() == shared.generation;
        if state.withdrawn || !state.program.as_ref().is_some_and(ours) {
            return Ok(());
        }
        let withdraw = || self.withdraw(|| shared.leaving.store(true, Ordering::Release));
        shared
            .netns
            .run(withdraw)
            .map_err(CaptureError::kernel("enter the pod's network namespace"))??;
        state.withdrawn = true;
        state.program = None;
        match &shared.folder {
            Some(folder) => pins::withdraw(folder, shared.netns.id())
                .map_err(CaptureError::kernel("detach the program")),
            None => Ok(()),
        }
    }

    fn finish(&self, pod: &Pod) -> Result<(), CaptureError> {
        let Recipe::Ebpf(Captured(shared)) = &pod.0.recipe else { return Ok(()) };
        let flush = || {
            let mut rules = Rules::open()?;
            // Where the rule is there again, so is the pod.
            if rules.capturing()? { Ok(()) } else { rules.flush() }
        };
        let result = shared.netns.run(flush);
        result
            .map_err(CaptureError::kernel("enter the pod's network namespace"))?
            .map_err(CaptureError::kernel("take the rules away"))
    }

    fn prune(&self, keep: &[String]) -> Result<(), CaptureError> {
        let Some(root) = &self.pins else { return Ok(()) };
        for uid in pins::uids(root).map_err(CaptureError::kernel("read the pins"))? {
            if keep.contains(&uid) {
                continue;
            }
            match self.release_one(root, &uid) {
                Ok(()) => tracing::info!(uid, "a pod of an earlier process is no longer captured"),
                Err(error) => tracing::warn!(
                    uid,
                    error = &error as &dyn std::error::Error,
                    "a pod stays captured"
                ),
            }
        }
        Ok(())
    }

    fn release(&self, uid: Option<&str>) -> Result<Vec<String>, CaptureError> {
        let all = match &self.pins {
            Some(root) => pins::uids(root).map_err(CaptureError::kernel("read the pins"))?,
            None => Vec::new(),
        };
        let chosen = match uid {
            Some(uid) => {
                vec![all.into_iter().find(|each| each == uid).ok_or(CaptureError::UnknownPod)?]
            }
            None => all,
        };
        if let Some(root) = &self.pins {
            chosen.iter().try_for_each(|uid| self.release_one(root, uid))?;
        }
        Ok(chosen)
    }

    fn original_dst(&self, stream: &std::net::TcpStream) -> io::Result<OriginalDst> {
        stream.local_addr().map(OriginalDst::from)
    }

    fn to_network(&self, pod: &Pod, to: SocketAddr) -> io::Result<Connecting> {
        let Recipe::Ebpf(Captured(shared)) = &pod.0.recipe else { return Err(wrong_pod()) };
        let options = &self.settings.options;
        shared.netns.run(|| sockets::marked(options, shared.mark, None, to))?
    }

    fn to_application(
        &self,
        pod: &Pod,
        client: Option<SocketAddr>,
        to: SocketAddr,
    ) -> io::Result<Connecting> {
        let Recipe::Ebpf(Captured(shared)) = &pod.0.recipe else { return Err(wrong_pod()) };
        let to = SocketAddr::new(to.ip().to_canonical(), to.port());
        let client = client.map(|client| client.ip().to_canonical());
        let client = client.filter(|ip| ip.is_ipv4() == to.is_ipv4() && is_client(*ip));
        let options = &self.settings.options;
        let own =
            |ip: &IpAddr| shared.own.read().unwrap_or_else(PoisonError::into_inner).contains(ip);
        let connect = || match client {
            // The application answers itself past lo: a socket bound to lo would never see it.
            Some(client) if own(&client) => sockets::marked(options, shared.mark, Some(client), to),
            Some(client) => {
                sockets::spoofed(options, shared.leaving.load(Ordering::Acquire), client, to)
            }
            None => sockets::marked(options, shared.mark, None, to),
        };
        shared.netns.run(connect)?
    }

    fn original_source(&self, pod: &Pod) -> bool {
        matches!(pod.0.recipe, Recipe::Ebpf(_))
    }
}

/// Whether a client may have it. Nobody out there is loopback.
fn is_client(ip: IpAddr) -> bool {
    !(ip.is_loopback() || ip.is_unspecified() || ip.is_multicast())
}

/// Whether it can only be what probes are rewritten to, and no address of a node.
fn is_probe(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unique_local(),
    }
}

/// What an earlier process left of this pod.
fn adopt(folder: &Path, netns: &Netns) -> Option<Program> {
    match Program::adopt(folder, netns) {
        Ok(program) => Some(program),
        Err(reason) => {
            if pins::namespace(folder).is_some() {
                tracing::info!(reason, path = %folder.display(), "pinned programs are replaced");
            }
            None
        }
    }
}

/// Lets replies to what comes from outside past the rules: marks it at every entrance, and what the kernel
/// and the application answer inherits the mark.
fn bypass(program: &mut Program, here: &Surroundings) -> Result<(), CaptureError> {
    let sysctls =
        ["net/ipv4/tcp_fwmark_accept", "net/ipv4/fwmark_reflect", "net/ipv6/fwmark_reflect"];
    for key in sysctls {
        match sys::sysctl(key, "1") {
            Err(error) if key.contains("ipv6") && error.kind() == io::ErrorKind::NotFound => (),
            result => result.map_err(CaptureError::kernel("let marks be inherited"))?,
        }
    }
    program.guard(&here.devices).map_err(CaptureError::kernel("mark what arrives"))
}

/// The namespace with this inode: of a process that can be seen, or by name.
fn find(ino: u64) -> Option<Netns> {
    let list =
        |folder: &str| read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let named = list("/run/netns");
    let processes = list("/proc").map(|path| path.join("ns/net"));
    named
        .chain(processes)
        .filter_map(|path| Netns::open(path).ok())
        .find(|netns| netns.id().ino == ino)
}
