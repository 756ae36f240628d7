//! Capture by our own programs: rules lead what a pod's sockets send back to the pod, `sk_lookup` picks the
//! proxy's listener (`spec/capture.md` §1). The kernel's work is once per connection, not per packet.
//!
//! Without a live proxy a pod is closed. Where the program is pinned it drops what it has no listener for: over
//! IPv4 nobody answers, and what is dialled meanwhile is taken by the next proxy; over IPv6 the kernel refuses at
//! once, since its reset can leave from an address that is not the pod's. Where there are no pins either, no
//! program is left, only the rules: what the pod dials comes back to the pod. Nobody listens there as a rule: IPv4
//! waits, IPv6 is refused; but an application that listens on the wildcard address and that very port gets it.
//! It is misled, and nothing gets out.

mod diag;
mod dns;
mod follow;
mod foreign;
mod netlink;
mod pins;
mod program;
mod rules;
mod shared;
mod sockets;
mod sys;
mod sysctls;
mod takeover;
#[cfg(test)]
mod tests;

use super::{
    CaptureError, Dns, Inherited, Listeners, Pod, Recipe, Redirect, SocketOptions, wrong_pod,
};
use crate::{
    netns::{Exclusive, Netns},
    socket::Connecting,
};
use mesh_core::OriginalDst;
use mesh_ebpf_common::MARK_LEAVING;
use program::{Contents, Marker, Program};
use rules::{Rules, Surroundings};
use shared::{Shared, State};
use std::{
    fs::read_dir,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering},
    },
};
use sysctls::{Found, Leaving};
pub(super) use {foreign::chains, shared::Captured};

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
    /// The port of the DNS sockets, where names are answered. Nothing can be reached there: port 53 is steered.
    pub dns: Option<u16>,
    /// Whether applications see their clients' addresses.
    pub original_source: bool,
}

impl Default for Settings {
    /// Without pins; Istio's probe addresses.
    fn default() -> Self {
        Self {
            options: SocketOptions::default(),
            pins: None,
            probes: PROBES.to_vec(),
            ingress: false,
            dns: None,
            original_source: true,
        }
    }
}

/// The redirect that is our own.
#[derive(Debug)]
pub struct Ebpf {
    settings: Settings,
    pins: Option<PathBuf>,
    /// The kernel's types: parsed once, and only where they are needed.
    marker: Mutex<Option<Marker>>,
    left: Arc<Leaving>,
}

/// A pod to be captured.
struct Asked<'a> {
    uid: &'a str,
    netns: &'a Netns,
    folder: Option<&'a Path>,
    /// Whether it is already.
    captured: bool,
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
        Ok(Self { settings, pins, marker: Mutex::default(), left: Arc::default() })
    }

    /// Marks sockets that live.
    fn mark(&self, mark: u32) -> Result<u32, CaptureError> {
        let what = "mark the sockets that live (it takes CONFIG_DEBUG_INFO_BTF)";
        let mut held = self.marker.lock().unwrap_or_else(PoisonError::into_inner);
        let marker = match &mut *held {
            Some(marker) => marker,
            None => held.insert(Marker::load().map_err(CaptureError::kernel(what))?),
        };
        marker.mark(mark).map_err(CaptureError::kernel(what))
    }

    /// In the pod's namespace.
    fn enrol_here(
        &self,
        uid: &str,
        netns: &Netns,
        inherited: Option<Inherited>,
    ) -> Result<Pod, CaptureError> {
        let mut rules =
            Rules::open().map_err(CaptureError::kernel("speak to the kernel's routing"))?;
        let reasons =
            foreign::reasons(&mut rules).map_err(CaptureError::kernel("look for others' rules"))?;
        if !reasons.is_empty() {
            return Err(CaptureError::Foreign(reasons));
        }
        let captured = rules.capturing().map_err(CaptureError::kernel("read the rules"))?;
        let folder = self.pins.as_ref().map(|root| root.join(uid));
        let before = Found::here();
        let asked = Asked { uid, netns, folder: folder.as_deref(), captured };
        let result = self.capture(&asked, inherited);
        if result.is_err() && !captured {
            before.restore();
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
        asked: &Asked<'_>,
        inherited: Option<Inherited>,
    ) -> Result<Pod, CaptureError> {
        let Asked { uid, netns, folder, captured } = *asked;
        let adopted = folder.and_then(|folder| adopt(folder, netns));
        let generation = folder.map_or(0, Program::pinned_generation).wrapping_add(1) % GENERATIONS;
        // As it was before the first of us came: of what is taken over, or is only just being left.
        let found = adopted.as_ref().and_then(|_| folder.and_then(Program::pinned_found));
        let found = found.or_else(|| self.left.found(netns.id())).unwrap_or_else(Found::here);
        let (listeners, dns) = self.sockets(inherited, generation)?;
        let mut rules =
            Rules::open().map_err(CaptureError::kernel("speak to the kernel's routing"))?;
        let here =
            Surroundings::look().map_err(CaptureError::kernel("read the pod's addresses"))?;
        let Settings { probes, ingress, .. } = &self.settings;
        rules.escape(probes).map_err(CaptureError::kernel("write the rules"))?;
        rules.routes(&here).map_err(CaptureError::kernel("write the routes"))?;
        // The safety net of a hand-over, for a process that dies in it. Of Linux 5.14; not worth failing for.
        if let Err(error) = sys::sysctl(sysctls::MIGRATE, "1") {
            tracing::debug!(%error, "what waits for a listener dies with it");
        }
        let contents = Contents {
            listeners: &listeners,
            dns: dns.as_ref(),
            here: &here,
            probes,
            ingress: *ingress,
            generation,
            found,
        };
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
        rules.capture(dns.is_some()).map_err(CaptureError::kernel("begin capture"))?;
        let shared = Shared {
            netns: netns.clone(),
            probes: probes.clone(),
            ingress: *ingress,
            dns: dns.is_some(),
            mark: sockets::mark(generation),
            generation,
            folder: folder.map(Path::to_owned),
            own: RwLock::new(here.addresses),
            found,
            left: Arc::clone(&self.left),
            leaving: AtomicBool::new(false),
            state: Mutex::new(State { program: Some(program), withdrawn: false, finished: false }),
        };
        let recipe = Recipe::Ebpf(Captured(Arc::new(shared)));
        Ok(Pod::new(uid, netns.clone(), listeners, recipe).with_dns(dns))
    }

    /// What the pod is served on, opened or inherited, in the namespace of the thread.
    fn sockets(
        &self,
        inherited: Option<Inherited>,
        generation: u32,
    ) -> Result<(Listeners, Option<Dns>), CaptureError> {
        let options = &self.settings.options;
        let (listeners, dns) = match inherited {
            Some(Inherited { listeners, dns }) => (sockets::inherit(listeners, generation), dns),
            None => (sockets::listeners(options, generation), None),
        };
        let listeners = listeners.map_err(CaptureError::kernel("listen in the pod"))?;
        let dns = self.settings.dns.map(|port| match dns {
            Some(inherited) => dns::inherit(inherited, generation),
            None => dns::open(options, generation, port),
        });
        Ok((listeners, dns.transpose().map_err(CaptureError::kernel("listen for DNS in the pod"))?))
    }

    /// Ends capture in the namespace of the thread; what lives stays with the proxy. `leaving` is called when
    /// the proxy is to mark what it begins.
    fn withdraw(&self, leaving: impl FnOnce()) -> Result<(), CaptureError> {
        let mut rules =
            Rules::open().map_err(CaptureError::kernel("speak to the kernel's routing"))?;
        rules.keep_leaving().map_err(CaptureError::kernel("keep what lives"))?;
        if let Err(error) = sys::sysctl(sysctls::ACCEPT, "1") {
            tracing::warn!(%error, "connections that begin during the release may be reset");
        }
        leaving();
        for _ in 0..PASSES {
            match self.mark(MARK_LEAVING) {
                Ok(0) => break,
                Ok(_) => (),
                // Not a reason to keep the pod.
                Err(error) => {
                    let error: &dyn std::error::Error = &error;
                    tracing::warn!(error, "connections that live will break");
                    break;
                }
            }
        }
        rules.end_capture().map_err(CaptureError::kernel("end capture"))
    }

    /// Withdraws what somebody else captured. Where a proxy lives that has connections of the pod, it notices,
    /// and cleans up when the last is over; else that is done here.
    fn release_one(&self, root: &Path, uid: &str) -> Result<(), CaptureError> {
        let folder = root.join(uid);
        let ino = pins::namespace(&folder).unwrap_or(0);
        if ino == 0 {
            return pins::remove(&folder)
                .map_err(CaptureError::kernel("forget a pod that is gone"));
        }
        let netns = find(ino.into()).ok_or(CaptureError::NamespaceNotFound)?;
        let _exclusive = exclusive(&netns)?;
        let found = Program::pinned_found(&folder);
        let release = || {
            self.withdraw(|| ())?;
            if diag::is_held().map_err(CaptureError::kernel("list the pod's sockets"))? {
                tracing::info!(uid, "a node proxy still has connections of the pod");
            } else {
                let flush = Rules::open().and_then(|mut rules| rules.flush());
                flush.map_err(CaptureError::kernel("take the rules away"))?;
                if let Some(found) = found {
                    found.restore();
                }
            }
            pins::withdraw(&folder, netns.id()).map_err(CaptureError::kernel("detach the program"))
        };
        netns.run(release).map_err(CaptureError::kernel("enter the pod's network namespace"))?
    }
}

impl Redirect for Ebpf {
    fn enrol_with(
        &self,
        uid: &str,
        netns: &Netns,
        inherited: Option<Inherited>,
    ) -> Result<Pod, CaptureError> {
        if !pins::is_uid(uid) {
            return Err(CaptureError::InvalidUid);
        }
        let _exclusive = exclusive(netns)?;
        netns
            .run(|| self.enrol_here(uid, netns, inherited))
            .map_err(CaptureError::kernel("enter the pod's network namespace"))?
    }

    fn remove(&self, pod: &Pod) -> Result<(), CaptureError> {
        let Recipe::Ebpf(Captured(shared)) = &pod.0.recipe else { return Ok(()) };
        let _exclusive = exclusive(&shared.netns)?;
        let mut state = shared.state();
        // Somebody who took it over has the capture, too.
        let ours = |program: &Program| !program.is_taken_over(shared.generation);
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
        shared.left.begin(shared.netns.id(), shared.found);
        match &shared.folder {
            Some(folder) => pins::withdraw(folder, shared.netns.id())
                .map_err(CaptureError::kernel("detach the program")),
            None => Ok(()),
        }
    }

    fn finish(&self, pod: &Pod) -> Result<bool, CaptureError> {
        let Recipe::Ebpf(Captured(shared)) = &pod.0.recipe else { return Ok(true) };
        let _exclusive = exclusive(&shared.netns)?;
        let mut state = shared.state();
        if !state.withdrawn || state.finished {
            return Ok(true);
        }
        let result = shared.netns.run(|| shared.finish_here());
        state.finished =
            result.map_err(CaptureError::kernel("enter the pod's network namespace"))??;
        Ok(state.finished)
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

    fn to_resolver(&self, pod: &Pod, to: SocketAddr) -> io::Result<std::net::UdpSocket> {
        let Recipe::Ebpf(Captured(shared)) = &pod.0.recipe else { return Err(wrong_pod()) };
        shared.netns.run(|| super::dns::to_server(Some(shared.mark), to))?
    }

    fn to_application(
        &self,
        pod: &Pod,
        client: Option<SocketAddr>,
        to: SocketAddr,
    ) -> io::Result<Connecting> {
        let Recipe::Ebpf(Captured(shared)) = &pod.0.recipe else { return Err(wrong_pod()) };
        let to = SocketAddr::new(to.ip().to_canonical(), to.port());
        let client = client.filter(|_| self.settings.original_source);
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
        self.settings.original_source && matches!(pod.0.recipe, Recipe::Ebpf(_))
    }

    fn uncaptured(&self, pod: &Pod) -> Result<Option<String>, CaptureError> {
        let Recipe::Ebpf(Captured(shared)) = &pod.0.recipe else { return Ok(None) };
        shared.uncaptured()
    }
}

/// Enrolling a pod, withdrawing its capture and cleaning up after it take several steps each, and more than one may be
/// under way: a pod that comes back while its last connections end, a node proxy that follows another, `release`.
fn exclusive(netns: &Netns) -> Result<Exclusive, CaptureError> {
    netns.exclusive().map_err(CaptureError::kernel("have the pod's network namespace to ourselves"))
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
    for key in [sysctls::ACCEPT, sysctls::REFLECT, sysctls::REFLECT_V6] {
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
