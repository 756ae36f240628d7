//! Redirection that somebody else wrote, as istio-cni does: fixed ports on the wildcard address, the original
//! destination from conntrack (REDIRECT) or from the socket itself (TPROXY).

use super::{
    CaptureError, Dns, DnsAddress, DnsSockets, Door, Inherited, Listeners, Pod, Queries, Recipe,
    Redirect, SocketOptions, dns, ebpf::chains, wrong_pod,
};
use crate::{
    netns::Netns,
    socket::{self, Connecting},
};
use mesh_core::OriginalDst;
use mesh_ebpf_common::MARK;
use socket2::{Domain, SockRef, Socket};
use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
};

/// What Istio's node proxy uses for in-pod listeners.
const BACKLOG: i32 = 128;

/// `ENABLE_ORIG_SRC`.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum OriginalSource {
    /// The application sees its clients' addresses where the kernel lets us.
    #[default]
    BestEffort,
    /// It does, or the pod is not started.
    Required,
    /// It sees the proxy's.
    Never,
}

/// How the sockets are to be.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Options of connections.
    pub options: SocketOptions,
    /// Listen on `[::]` and not on `0.0.0.0`.
    pub ipv6: bool,
    /// `SO_REUSEPORT`, so that two proxies can follow one another (`INPOD_PORT_REUSE`).
    pub port_reuse: bool,
    /// Whether applications see their clients.
    pub original_source: OriginalSource,
    /// The packet mark of all sockets: Istio's in a pod's namespace, `PACKET_MARK` or none in our own.
    pub mark: Option<u32>,
    /// Where names are answered, if they are.
    pub dns: Option<DnsAddress>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            options: SocketOptions::default(),
            ipv6: true,
            port_reuse: true,
            original_source: OriginalSource::default(),
            mark: Some(MARK),
            dns: None,
        }
    }
}

/// The redirect that leaves redirection to others.
#[derive(Debug)]
pub struct External {
    settings: Settings,
}

#[derive(Debug)]
pub(super) struct Captured {
    original_source: bool,
}

impl External {
    /// With these settings.
    #[must_use]
    pub const fn new(settings: Settings) -> Self {
        Self { settings }
    }

    /// For what runs in our own network namespace and is captured by nobody: one door, for tunnels. Use settings
    /// without a mark and without the clients' addresses there.
    ///
    /// # Errors
    ///
    /// Returns why the door cannot be opened.
    pub fn own(&self, uid: &str) -> Result<(Pod, TcpListener), CaptureError> {
        let netns =
            Netns::current().map_err(CaptureError::kernel("find our own network namespace"))?;
        let (listener, original_source) =
            self.listen(Door::Hbone).map_err(CaptureError::kernel("listen for tunnels to us"))?;
        let recipe = Recipe::External(Captured { original_source });
        Ok((Pod::without_listeners(uid, netns, recipe), listener))
    }

    fn listen(&self, door: Door) -> io::Result<(TcpListener, bool)> {
        // A kernel without IPv6 has only the other one.
        let (socket, ip) = match self.settings.ipv6.then(|| socket::tcp(Domain::IPV6)) {
            Some(Ok(socket)) => {
                socket.set_only_v6(false)?;
                (socket, IpAddr::from(Ipv6Addr::UNSPECIFIED))
            }
            Some(Err(error)) if error.raw_os_error() != Some(libc::EAFNOSUPPORT) => {
                return Err(error);
            }
            Some(Err(_)) | None => (socket::tcp(Domain::IPV4)?, Ipv4Addr::UNSPECIFIED.into()),
        };
        let transparent = match self.settings.original_source {
            OriginalSource::Never => false,
            // Of level IP on IPv6 sockets too, as this is a matter of the one capability.
            OriginalSource::BestEffort => socket.set_ip_transparent_v4(true).is_ok(),
            OriginalSource::Required => socket.set_ip_transparent_v4(true).map(|()| true)?,
        };
        if let Some(mark) = self.settings.mark {
            socket.set_mark(mark)?;
        }
        socket.set_reuse_address(true)?;
        if self.settings.port_reuse
            && let Err(error) = socket.set_reuse_port(true)
        {
            tracing::warn!(%error, ?door, "cannot share a port with the proxy that follows");
        }
        self.settings.options.apply(&socket, door.is_probed())?;
        socket.bind(&SocketAddr::new(ip, door.port()).into())?;
        socket.listen(BACKLOG)?;
        Ok((socket.into(), transparent))
    }

    fn dns(&self, inherited: Option<DnsSockets>) -> io::Result<Option<Dns>> {
        if let Some(inherited) = inherited.filter(|_| self.settings.dns.is_some()) {
            let as_they_are = |_: &SockRef<'_>| Ok(());
            return inherited.adopt(as_they_are, Queries::redirected).map(Some);
        }
        let prepare = |socket: &Socket| {
            if let Some(mark) = self.settings.mark {
                socket.set_mark(mark)?;
            }
            socket.set_reuse_address(true)?;
            if self.settings.port_reuse { socket.set_reuse_port(true) } else { Ok(()) }
        };
        let open = |address| dns::open(address, self.settings.ipv6, prepare);
        self.settings.dns.map(open).transpose()
    }

    fn dial(&self, to: SocketAddr) -> io::Result<Socket> {
        let socket = socket::tcp(Domain::for_address(to))?;
        if let Some(mark) = self.settings.mark {
            socket.set_mark(mark)?;
        }
        self.settings.options.apply(&socket, true)?;
        Ok(socket)
    }
}

impl Redirect for External {
    fn enrol_with(
        &self,
        uid: &str,
        netns: &Netns,
        inherited: Option<Inherited>,
    ) -> Result<Pod, CaptureError> {
        let (listeners, dns) = inherited.map_or((None, None), |it| (Some(it.listeners), it.dns));
        let open = || -> io::Result<_> {
            if let Some(listeners) = listeners {
                let transparent = SockRef::from(&listeners.outbound).ip_transparent_v4()?;
                return Ok((listeners, transparent));
            }
            let (outbound, transparent) = self.listen(Door::Outbound)?;
            let (inbound, _) = self.listen(Door::Inbound)?;
            let (hbone, _) = self.listen(Door::Hbone)?;
            Ok((Listeners { outbound, inbound, hbone }, transparent))
        };
        let (listeners, original_source) = netns
            .run(open)
            .map_err(CaptureError::kernel("enter the pod's network namespace"))?
            .map_err(CaptureError::kernel("listen in the pod"))?;
        let dns = netns
            .run(|| self.dns(dns))
            .map_err(CaptureError::kernel("enter the pod's network namespace"))?
            .map_err(CaptureError::kernel("listen for DNS in the pod"))?;
        let recipe = Recipe::External(Captured { original_source });
        Ok(Pod::new(uid, netns.clone(), listeners, recipe).with_dns(dns))
    }

    fn remove(&self, _: &Pod) -> Result<(), CaptureError> {
        Ok(())
    }

    fn finish(&self, _: &Pod) -> Result<bool, CaptureError> {
        Ok(true)
    }

    fn prune(&self, _: &[String]) -> Result<(), CaptureError> {
        Ok(())
    }

    fn release(&self, uid: Option<&str>) -> Result<Vec<String>, CaptureError> {
        match uid {
            Some(_) => Err(CaptureError::UnknownPod),
            None => Ok(Vec::new()),
        }
    }

    fn original_dst(&self, stream: &std::net::TcpStream) -> io::Result<OriginalDst> {
        let socket = SockRef::from(stream);
        let found = socket.original_dst_v4().or_else(|_| socket.original_dst_v6()).ok();
        match found.and_then(|address| address.as_socket()) {
            Some(address) => Ok(address.into()),
            None => stream.local_addr().map(OriginalDst::from),
        }
    }

    fn to_network(&self, pod: &Pod, to: SocketAddr) -> io::Result<Connecting> {
        pod.netns().run(|| socket::connect(self.dial(to)?, to))?
    }

    fn to_resolver(&self, pod: &Pod, to: SocketAddr) -> io::Result<std::net::UdpSocket> {
        pod.netns().run(|| dns::to_server(self.settings.mark, to))?
    }

    fn to_application(
        &self,
        pod: &Pod,
        client: Option<SocketAddr>,
        to: SocketAddr,
    ) -> io::Result<Connecting> {
        let Recipe::External(captured) = &pod.0.recipe else { return Err(wrong_pod()) };
        let client =
            client.filter(|client| captured.original_source && client.is_ipv4() == to.is_ipv4());
        pod.netns().run(|| {
            let socket = self.dial(to)?;
            if let Some(client) = client {
                socket::set_transparent(&socket, Domain::for_address(to))?;
                if to.is_ipv4() {
                    socket.set_freebind_v4(true)?;
                } else {
                    socket.set_freebind_v6(true)?;
                }
                socket.bind(&SocketAddr::new(client.ip(), 0).into())?;
            }
            socket::connect(socket, to)
        })?
    }

    fn uncaptured(&self, pod: &Pod) -> Result<Option<String>, CaptureError> {
        let chains = pod
            .netns()
            .run(chains)
            .map_err(CaptureError::kernel("enter the pod's network namespace"))?;
        Ok(chains.is_empty().then(|| {
            "no chain of istio-cni's (ISTIO_*) is there: nobody redirects it, or somebody else does"
                .to_owned()
        }))
    }

    fn original_source(&self, pod: &Pod) -> bool {
        matches!(&pod.0.recipe, Recipe::External(captured) if captured.original_source)
    }
}
