//! A pair of relays with a tunnel between them, and nothing else: no capture, no policy, no telemetry. What a node
//! proxy costs beyond this is its own; what this costs beyond a plain relay is the tunnel's.

use std::{
    future::ready,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    num::NonZeroUsize,
    path::Path,
    sync::Arc,
    thread,
    time::Duration,
};

use anyhow::Context as _;
use mesh_core::{Failure, NetworkId, Reason, SpiffeId};
use mesh_hbone::{
    Authority, Dialed, Dialing, Pool, PoolKey, ResponseHead, Settings, Tcp, TunnelRequest, relay,
    server::{self, Incoming},
};
use mesh_identity::{
    CertificateAuthority as _, Csr, WorkloadCertificate,
    ca::local::LocalCa,
    tls::{Context, Options},
};
use mesh_runtime::{
    clock::SystemClock,
    net::{Listener, accept_loop},
    tasks::Tasks,
    threads::{Flavour, Workers},
};

use crate::{flavour::Route, load::PATIENCE};

const WORKERS: NonZeroUsize = NonZeroUsize::new(2).expect("two is not zero");
const NEAR: &str = "spiffe://cluster.local/ns/bench/sa/near";
const FAR: &str = "spiffe://cluster.local/ns/bench/sa/far";

/// Relays into tunnels to `far`, until the process ends.
pub fn near(flavour: Flavour, ca: &Path, far: SocketAddr, routes: &[Route]) -> anyhow::Result<()> {
    let workers = Workers::start_as(WORKERS, flavour)?;
    let certificate = Arc::new(certificate(ca, NEAR)?);
    let tasks = Arc::new(Tasks::new());
    let pool = Arc::new(Pool::new(Settings::default(), tasks.child()));
    let key = PoolKey {
        to: far,
        expect: vec![FAR.parse().context("an identity")?],
        source: NEAR.parse().context("an identity")?,
        source_ip: IpAddr::V4(Ipv4Addr::LOCALHOST),
        network: NetworkId::default(),
    };
    for route in routes {
        let listener = Listener::bind(route.from)?;
        let side = Near {
            workers: workers.clone(),
            certificate: Arc::clone(&certificate),
            pool: Arc::clone(&pool),
            key: key.clone(),
            to: route.to,
        };
        let owner = Arc::clone(&tasks);
        tasks.spawn_on(workers.next(), move |draining| async move {
            let side = Arc::new(side);
            let accepted = accept_loop(listener, draining, |stream, _| {
                let mut hasher = DefaultHasher::new();
                side.key.hash(&mut hasher);
                let side = Arc::clone(&side);
                owner.spawn_on(side.workers.clone().on(hasher.finish()), move |_| async move {
                    // A broken connection is the load's to report.
                    drop(side.serve(stream).await);
                });
            });
            drop(accepted.await);
        });
    }
    park()
}

struct Near {
    workers: Workers,
    certificate: Arc<WorkloadCertificate>,
    pool: Arc<Pool>,
    key: PoolKey,
    to: SocketAddr,
}

impl Near {
    async fn serve(&self, stream: TcpStream) -> anyhow::Result<()> {
        stream.set_nodelay(true)?;
        let request = TunnelRequest::to(Authority::Addr(self.to));
        let (to, tls) = (self.key.to, self.certificate.client_config(&self.key.expect));
        let dial = || -> Dialing<'_> {
            Box::pin(ready(dial(to).map(|stream| Dialed::new(stream, Arc::clone(&tls)))))
        };
        let opened = self.pool.open(&self.key, &request, dial).await?;
        Ok(relay(Tcp::new(stream)?, opened.stream, &()).await?)
    }
}

/// Blocks, but once for the whole run.
fn dial(to: SocketAddr) -> Result<TcpStream, Failure> {
    TcpStream::connect(to)
        .and_then(|stream| stream.set_nodelay(true).map(|()| stream))
        .and_then(|stream| stream.set_nonblocking(true).map(|()| stream))
        .map_err(|error| Failure::upstream(Reason::Connect, error))
}

/// Takes tunnels and connects to what they ask for, until the process ends.
pub fn far(flavour: Flavour, ca: &Path, listen: SocketAddr) -> anyhow::Result<()> {
    let workers = Workers::start_as(WORKERS, flavour)?;
    let certificate = Arc::new(certificate(ca, FAR)?);
    let tasks = Arc::new(Tasks::new());
    let listener = Listener::from_socket(TcpListener::bind(listen)?)?;
    let owner = Arc::clone(&tasks);
    tasks.spawn_on(workers.clone().next(), move |draining| async move {
        let accepted = accept_loop(listener, draining, |stream, _| {
            let certificate = Arc::clone(&certificate);
            let streams = Arc::clone(&owner);
            owner.spawn_on(workers.next(), move |_| async move {
                drop(tunnel(&streams, stream, &certificate).await);
            });
        });
        drop(accepted.await);
    });
    park()
}

async fn tunnel(
    tasks: &Tasks,
    stream: TcpStream,
    certificate: &WorkloadCertificate,
) -> anyhow::Result<()> {
    stream.set_nodelay(true)?;
    let mut tunnel =
        server::handshake(stream, certificate.server_config(), &Settings::default()).await?;
    while let Some(incoming) = tunnel.next().await {
        let incoming = incoming?;
        tasks.spawn(|_| async move { drop(serve(incoming).await) });
    }
    Ok(())
}

async fn serve(incoming: Incoming) -> anyhow::Result<()> {
    let Ok(TunnelRequest { authority: Authority::Addr(to), .. }) = incoming.request else {
        return Ok(());
    };
    let up = tokio::net::TcpStream::connect(to).await?;
    up.set_nodelay(true)?;
    let down = incoming.accept(&ResponseHead::default())?;
    Ok(relay(down, Tcp::from(up), &()).await?)
}

/// From a CA in this folder, which both sides share.
fn certificate(folder: &Path, identity: &str) -> anyhow::Result<WorkloadCertificate> {
    let identity: SpiffeId = identity.parse().context("an identity")?;
    let clock = Arc::new(SystemClock);
    let ca =
        LocalCa::open(folder, Duration::from_secs(24 * 3600), Arc::<SystemClock>::clone(&clock))?;
    let (key, csr) = Csr::generate(&identity)?;
    let issued = mesh_runtime::threads::control()?.block_on(ca.sign(&identity, &csr))?;
    Ok(WorkloadCertificate::new(identity, key, issued, &Context::new(Options::default(), clock))?)
}

fn park() -> anyhow::Result<()> {
    loop {
        thread::park_timeout(PATIENCE);
    }
}
