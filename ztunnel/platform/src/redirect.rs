//! Capture as one trait: take a pod's connections, open its sockets, say where a connection meant to go.

mod dns;
mod ebpf;
mod external;

pub use dns::{Asker, Dns, DnsAddress, DnsSockets, Queries, Served};
pub use ebpf::{Ebpf, Settings as EbpfSettings};
pub use external::{External, OriginalSource, Settings as ExternalSettings};

use crate::netns::Netns;
use mesh_core::OriginalDst;
use std::{
    error::Error,
    fmt, io,
    net::{SocketAddr, TcpListener},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

pub use crate::socket::Connecting;

/// How a node's pods are captured. Everything here is synchronous and quick (an enrolment takes
/// milliseconds), and is meant for any thread.
pub trait Redirect: Send + Sync + fmt::Debug {
    /// Opens the pod's listeners in its namespace, then captures it. Enrolling again what an earlier
    /// process left takes it over without a moment in which it is open.
    ///
    /// # Errors
    ///
    /// See [`CaptureError`]. Nothing is captured then, unless it was before.
    fn enrol(&self, uid: &str, netns: &Netns) -> Result<Pod, CaptureError> {
        self.enrol_with(uid, netns, None)
    }

    /// The same, on sockets that another process has opened in the namespace and passed on; what is among them is not
    /// opened anew.
    ///
    /// # Errors
    ///
    /// As [`enrol`](Self::enrol).
    fn enrol_with(
        &self,
        uid: &str,
        netns: &Netns,
        inherited: Option<Inherited>,
    ) -> Result<Pod, CaptureError>;

    /// Withdraws the capture of a pod (ZDS's Del). Its open connections go on through the proxy as long as
    /// the proxy holds them; new ones go past it. When none is left, call [`finish`](Self::finish).
    ///
    /// # Errors
    ///
    /// Fails where the kernel refuses; calling it again is harmless.
    fn remove(&self, pod: &Pod) -> Result<(), CaptureError>;

    /// Takes away what [`remove`](Self::remove) left for the open connections, and makes what it changed in the
    /// namespace as it was found. Returns whether that is done: not while a node proxy, this one or another,
    /// has a connection of the pod. Harmless where the pod was enrolled again meanwhile.
    ///
    /// # Errors
    ///
    /// Fails where the kernel refuses.
    fn finish(&self, pod: &Pod) -> Result<bool, CaptureError>;

    /// Forgets what earlier processes pinned for pods other than `keep`, and withdraws the capture of those
    /// whose namespace lives and can be found. For use after the snapshot.
    ///
    /// # Errors
    ///
    /// Fails where the pins cannot be read; one bad pod is logged and does not stop the others.
    fn prune(&self, keep: &[String]) -> Result<(), CaptureError>;

    /// Withdraws capture without being the pod's proxy: `ztunnel release`. Without a uid: of all that are
    /// pinned. Returns the uids released.
    ///
    /// # Errors
    ///
    /// Fails where a pod is unknown, or its namespace is not to be found from here.
    fn release(&self, uid: Option<&str>) -> Result<Vec<String>, CaptureError>;

    /// Where an accepted connection meant to go.
    ///
    /// # Errors
    ///
    /// Fails where the socket is dead.
    fn original_dst(&self, stream: &std::net::TcpStream) -> io::Result<OriginalDst>;

    /// Begins a connection from the pod to somewhere else.
    ///
    /// # Errors
    ///
    /// Fails with the kernel's error where the connection cannot even begin.
    fn to_network(&self, pod: &Pod, to: SocketAddr) -> io::Result<Connecting>;

    /// A UDP socket of the pod that is connected to a DNS server, and skips capture. Not blocking.
    ///
    /// # Errors
    ///
    /// Fails with the kernel's error.
    fn to_resolver(&self, pod: &Pod, to: SocketAddr) -> io::Result<std::net::UdpSocket>;

    /// Begins a connection to the pod's application, in the name of `client` if one is given.
    ///
    /// # Errors
    ///
    /// As [`to_network`](Self::to_network).
    fn to_application(
        &self,
        pod: &Pod,
        client: Option<SocketAddr>,
        to: SocketAddr,
    ) -> io::Result<Connecting>;

    /// Whether the application sees its clients' addresses.
    fn original_source(&self, pod: &Pod) -> bool;

    /// Why the pod's connections do not come to us, as far as its namespace shows; `None` where they should. What was
    /// written there may be taken away by anybody.
    ///
    /// # Errors
    ///
    /// Fails where the kernel does not say.
    fn uncaptured(&self, pod: &Pod) -> Result<Option<String>, CaptureError>;
}

/// Which listener.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Door {
    /// What the application dials, 15001.
    Outbound,
    /// Plain TCP from outside, 15006.
    Inbound,
    /// Tunnels, 15008.
    Hbone,
}

impl Door {
    const fn port(self) -> u16 {
        match self {
            Self::Outbound => 15001,
            Self::Inbound => 15006,
            Self::Hbone => 15008,
        }
    }

    /// What is accepted here gets TCP keepalive probes; tunnels have PING instead.
    const fn is_probed(self) -> bool {
        matches!(self, Self::Outbound | Self::Inbound)
    }
}

/// A pod's listeners. Not blocking. What they accept has the options of proxied connections from them, without
/// a system call for each: Linux copies them.
#[derive(Debug)]
pub struct Listeners {
    /// What the application dials.
    pub outbound: TcpListener,
    /// Plain TCP from outside.
    pub inbound: TcpListener,
    /// Tunnels.
    pub hbone: TcpListener,
}

/// What a process passes on of a pod. Nothing but descriptors gets to the next one.
#[derive(Debug)]
pub struct Inherited {
    /// The pod's listeners.
    pub listeners: Listeners,
    /// The sockets of its DNS proxy; without them they are opened, where names are answered.
    pub dns: Option<DnsSockets>,
}

/// An enrolled pod. Cheap to clone. Dropping it leaves the capture as it is.
#[derive(Clone)]
pub struct Pod(Arc<Inner>);

struct Inner {
    uid: String,
    netns: Netns,
    listeners: Mutex<Option<Listeners>>,
    dns: Mutex<Option<Dns>>,
    recipe: Recipe,
}

/// What each kind of capture knows of a pod.
#[derive(Debug)]
enum Recipe {
    /// Nothing.
    Plain,
    External(external::Captured),
    Ebpf(ebpf::Captured),
}

impl Pod {
    /// A pod that nothing captures: for a double of [`Redirect`].
    #[must_use]
    pub fn plain(uid: &str, netns: Netns, listeners: Listeners) -> Self {
        Self::new(uid, netns, listeners, Recipe::Plain)
    }

    fn new(uid: &str, netns: Netns, listeners: Listeners, recipe: Recipe) -> Self {
        let pod = Self::without_listeners(uid, netns, recipe);
        *pod.0.listeners.lock().unwrap_or_else(PoisonError::into_inner) = Some(listeners);
        pod
    }

    fn without_listeners(uid: &str, netns: Netns, recipe: Recipe) -> Self {
        let (listeners, dns) = (Mutex::default(), Mutex::default());
        Self(Arc::new(Inner { uid: uid.to_owned(), netns, listeners, dns, recipe }))
    }

    /// Its Kubernetes uid.
    #[must_use]
    pub fn uid(&self) -> &str {
        &self.0.uid
    }

    /// Its namespace, which lives as long as this.
    #[must_use]
    pub fn netns(&self) -> &Netns {
        &self.0.netns
    }

    /// Whether it is the same enrolment; that of a pod that came back with the same uid is another.
    #[must_use]
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// The listeners, once. Close them when the pod is gone: they hold its namespace.
    #[must_use]
    pub fn take_listeners(&self) -> Option<Listeners> {
        self.0.listeners.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn with_dns(self, dns: Option<Dns>) -> Self {
        *self.0.dns.lock().unwrap_or_else(PoisonError::into_inner) = dns;
        self
    }

    /// The sockets of its DNS proxy, once, where there is one. Close them with the listeners.
    #[must_use]
    pub fn take_dns(&self) -> Option<Dns> {
        self.0.dns.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Follows the pod's addresses and devices as they come and go. To be spawned as one of the pod's tasks,
    /// once: without it, connections to an address that came later are refused, and a new device is a way
    /// round the proxy for sockets bound to it. Ends at once where there is nothing to follow; else never.
    ///
    /// # Cancel safety
    ///
    /// May be dropped at any time; it cannot be started again.
    pub fn follow(&self) -> impl Future<Output = ()> + Send + use<> {
        let follower = match &self.0.recipe {
            Recipe::Plain | Recipe::External(_) => None,
            Recipe::Ebpf(captured) => captured.follower(),
        };
        async move {
            if let Some(follower) = follower {
                follower.run().await;
            }
        }
    }
}

impl Pod {
    /// Whether its namespace has no device but loopback any more: the pod itself is gone.
    #[must_use]
    pub fn is_deserted(&self) -> bool {
        let names = self.0.netns.run(nix::net::if_::if_nameindex);
        // What cannot be told is not so.
        names.is_ok_and(|names| {
            names.is_ok_and(|names| names.iter().all(|device| device.name().to_bytes() == b"lo"))
        })
    }

    /// Ends when the listeners may be closed without a loss: the process that follows has taken the pod over,
    /// and nobody waits for ours any more. Gives it `patience` to come. Where no process can take over, ends at
    /// once. To be waited for when a drain begins, while accepting goes on.
    ///
    /// # Cancel safety
    ///
    /// May be dropped at any time, and be asked for again.
    pub fn yielded(&self, patience: Duration) -> impl Future<Output = ()> + Send + use<> {
        let captured = match &self.0.recipe {
            Recipe::Plain | Recipe::External(_) => None,
            Recipe::Ebpf(captured) => Some(captured.yielded(patience)),
        };
        async move {
            if let Some(yielded) = captured {
                yielded.await;
            }
        }
    }
}

impl fmt::Debug for Pod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pod").field("uid", &self.0.uid).field("netns", &self.0.netns.id()).finish()
    }
}

/// Options of proxied connections (`spec/ztunnel.md` §1.2). No delay is always set.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct SocketOptions {
    /// Keepalive probes, if any.
    pub keepalive: Option<Keepalive>,
    /// Whether unacknowledged data ends a connection as late as missing keepalives would.
    pub user_timeout: bool,
}

/// TCP keepalive.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Keepalive {
    /// Idle time before the first probe.
    pub time: Duration,
    /// Time between probes.
    pub interval: Duration,
    /// Probes without an answer before the connection ends.
    pub retries: u32,
}

impl Default for SocketOptions {
    /// Istio's: 180 s, 180 s, 9; no user timeout.
    fn default() -> Self {
        let (time, interval) = (Duration::from_secs(180), Duration::from_secs(180));
        Self { keepalive: Some(Keepalive { time, interval, retries: 9 }), user_timeout: false }
    }
}

/// Why a pod is not captured, or still is.
#[derive(Debug)]
pub enum CaptureError {
    /// Somebody else's redirection is there; every reason, each a clause.
    Foreign(Vec<String>),
    /// The uid cannot name a folder.
    InvalidUid,
    /// An exempt source address is not what probes are rewritten to.
    InvalidProbe(std::net::IpAddr),
    /// Nobody pinned a pod of this uid.
    UnknownPod,
    /// The pod's namespace cannot be found from here: not under `/run/netns`, nor of any visible process.
    NamespaceNotFound,
    /// The kernel refused; what was being done.
    Kernel(&'static str, Box<dyn Error + Send + Sync>),
}

impl CaptureError {
    /// For `map_err`.
    fn kernel<E: Into<Box<dyn Error + Send + Sync>>>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |error| Self::Kernel(what, error.into())
    }
}

impl fmt::Display for CaptureError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Foreign(reasons) => {
                write!(f, "somebody else redirects this pod: {}", reasons.join("; "))
            }
            Self::InvalidUid => f.write_str("the uid is not a Kubernetes uid"),
            Self::InvalidProbe(ip) => write!(
                f,
                "{ip} cannot be exempt: a probe address is link-local (v4) or unique-local (v6) and none of the node's"
            ),
            Self::UnknownPod => f.write_str("no pod of this uid is captured here"),
            Self::NamespaceNotFound => f.write_str(
                "the pod's network namespace cannot be found from here: run where its processes or /run/netns are visible",
            ),
            Self::Kernel(what, _) => write!(f, "cannot {what}"),
        }
    }
}

impl Error for CaptureError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Kernel(_, source) => Some(source.as_ref()),
            Self::Foreign(_)
            | Self::InvalidUid
            | Self::InvalidProbe(_)
            | Self::UnknownPod
            | Self::NamespaceNotFound => None,
        }
    }
}

/// A pod of one kind of capture given to another.
fn wrong_pod() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, "the pod was enrolled by another redirect")
}
