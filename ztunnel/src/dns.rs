//! The DNS proxy of a pod: `mesh_dns` with the pod's sockets.

use crate::pod::Pod;
use mesh_core::{OriginalDst, Workload};
use mesh_dns::{Dial, Resolver, Step, Transport};
use mesh_platform::redirect::{Asker, Dns, Queries, Served};
use mesh_runtime::net::{Listener, accept_until};
use mesh_xds::Known;
use std::{
    io,
    net::{SocketAddr, TcpListener},
    sync::Arc,
    time::Duration,
};
use tokio::{
    net::{TcpStream, UdpSocket},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

/// Queries of one pod that wait for a server, and its connections, at most: each holds a socket or two of ours.
/// Others get a failure at once.
const AT_ONCE: usize = 1024;
/// The longest query.
const LONGEST: usize = 65535;
/// After a socket's error. Without memory it would fail again at once.
const PAUSE: Duration = Duration::from_millis(10);

/// How long a query waits for the mesh to be known.
const PATIENCE: Duration = Duration::from_secs(5);

/// What the DNS proxies of all pods share.
#[derive(Clone, Debug)]
pub(crate) struct Names {
    /// Answers.
    pub(crate) resolver: Arc<Resolver>,
    /// Until then a name of the mesh would be taken for somebody else's, and what nobody knows is remembered by
    /// clients.
    pub(crate) known: Known,
}

/// The DNS proxy of one pod.
#[derive(Debug)]
struct Proxy {
    pod: Arc<Pod>,
    names: Names,
    places: Arc<Semaphore>,
}

/// Serves the pod until `closing`.
pub(crate) fn serve(pod: &Arc<Pod>, names: &Names, dns: Dns, closing: &CancellationToken) {
    let proxy = Arc::new(Proxy {
        pod: Arc::clone(pod),
        names: names.clone(),
        places: Arc::new(Semaphore::new(AT_ONCE)),
    });
    for queries in dns.udp {
        let (proxy, closing) = (Arc::clone(&proxy), closing.clone());
        pod.tasks.spawn_on(pod.shared.workers.next(), move |_| async move {
            if let Err(error) = proxy.datagrams(queries, &closing).await {
                tracing::error!(pod = %proxy.pod.info, %error, "the pod's DNS socket failed");
            }
        });
    }
    for listener in dns.tcp {
        let (proxy, closing) = (Arc::clone(&proxy), closing.clone());
        pod.tasks.spawn_on(pod.shared.workers.next(), move |_| async move {
            if let Err(error) = proxy.connections(listener, &closing).await {
                tracing::error!(pod = %proxy.pod.info, %error, "the pod's DNS listener failed");
            }
        });
    }
}

impl Dial for Proxy {
    fn udp(&self, to: SocketAddr) -> io::Result<UdpSocket> {
        UdpSocket::from_std(self.pod.shared.redirect.to_resolver(&self.pod.sockets, to)?)
    }

    async fn tcp(&self, to: SocketAddr) -> io::Result<TcpStream> {
        self.pod.shared.redirect.to_network(&self.pod.sockets, to)?.established().await
    }
}

impl Proxy {
    fn place(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.places).try_acquire_owned().ok()
    }

    /// Who asks, once that and the mesh are known.
    async fn client(&self) -> Option<Arc<Workload>> {
        timeout(PATIENCE, self.names.known.wait()).await.ok()?;
        self.pod.workload().await.ok()
    }

    async fn datagrams(
        self: &Arc<Self>,
        queries: Queries,
        closing: &CancellationToken,
    ) -> io::Result<()> {
        let socket = Arc::new(queries.serve()?);
        let mut room = vec![0; LONGEST];
        loop {
            let received = tokio::select! {
                biased;
                () = closing.cancelled() => return Ok(()),
                received = socket.receive(&mut room) => received,
            };
            match received {
                Ok((length, asker)) => {
                    let message = room.get(..length).unwrap_or_default();
                    self.datagram(message, asker, &socket);
                }
                Err(error) => {
                    tracing::debug!(pod = %self.pod.info, %error, "a DNS query was lost");
                    sleep(PAUSE).await;
                }
            }
        }
    }

    fn datagram(self: &Arc<Self>, message: &[u8], asker: Asker, socket: &Arc<Served>) {
        let socket = Arc::clone(socket);
        let pod = self.pod.info.clone();
        self.answer(message, (Transport::Udp, asker.server()), move |reply| {
            if let Err(error) = socket.reply(&asker, &reply) {
                tracing::debug!(%pod, %error, "a DNS reply was lost");
            }
        });
    }

    async fn connections(
        self: &Arc<Self>,
        listener: TcpListener,
        closing: &CancellationToken,
    ) -> io::Result<()> {
        let listener = Listener::from_socket(listener)?;
        let take = |stream: std::net::TcpStream, _| {
            // Closed where there are too many.
            let Some(place) = self.place() else { return };
            let proxy = Arc::clone(self);
            let worker = self.pod.shared.workers.next();
            self.pod.tasks.spawn_on(worker, move |_| async move {
                if let Err(error) = proxy.connection(stream).await {
                    tracing::debug!(pod = %proxy.pod.info, %error, "a DNS connection failed");
                }
                drop(place);
            });
        };
        accept_until(listener, || closing.cancelled(), take).await
    }

    async fn connection(self: &Arc<Self>, stream: std::net::TcpStream) -> io::Result<()> {
        let asked: OriginalDst = self.pod.shared.redirect.original_dst(&stream)?;
        let stream = TcpStream::from_std(stream)?;
        let from = (Transport::Tcp, Some(asked.into()));
        mesh_dns::tcp::serve(stream, |message, reply| {
            self.answer(&message, from, move |answer| reply.send(answer));
        })
        .await
    }

    /// At once if it can be; else as soon as the client is known, and a server has answered.
    fn answer(
        self: &Arc<Self>,
        message: &[u8],
        (transport, asked): (Transport, Option<SocketAddr>),
        reply: impl FnOnce(Vec<u8>) + Send + 'static,
    ) {
        let client = self.pod.workload_now().filter(|_| self.names.known.is());
        let place = self.place();
        // Where there is no room to wait for who the client is, it is nobody.
        let now = client.is_some() || place.is_none();
        let step = now.then(|| self.names.resolver.ask(message, transport, client.as_ref()));
        let unanswered = match step {
            Some(Step::Reply(message)) => return reply(message),
            Some(Step::Ignore) => return,
            Some(Step::Forward(unanswered)) => Some(unanswered),
            None => None,
        };
        let Some(place) = place else {
            if let Some(unanswered) = unanswered {
                reply(unanswered.failure());
            }
            return;
        };
        let (proxy, message) = (Arc::clone(self), message.to_vec());
        let worker = self.pod.shared.workers.next();
        self.pod.tasks.spawn_on(worker, move |_| async move {
            let unanswered = match unanswered {
                Some(unanswered) => unanswered,
                None => {
                    let client = proxy.client().await;
                    match proxy.names.resolver.ask(&message, transport, client.as_ref()) {
                        Step::Reply(message) => return reply(message),
                        Step::Ignore => return,
                        Step::Forward(unanswered) => unanswered,
                    }
                }
            };
            let server = asked.filter(is_elsewhere);
            reply(proxy.names.resolver.forward(&unanswered, server, &*proxy).await);
            drop(place);
        });
    }
}

/// Whether it can be asked in turn. A client that asks us by our own address would have us ask ourselves.
fn is_elsewhere(server: &SocketAddr) -> bool {
    !server.ip().to_canonical().is_loopback() && !server.ip().is_unspecified()
}
