//! A control plane for one node proxy: incremental xDS without TLS, saying what it is given.

use std::{
    net::{SocketAddr, TcpListener},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
};

use anyhow::{Context, Result};
use bytes::{BufMut, Bytes, BytesMut};
use h2::{
    RecvStream, SendStream,
    server::{Connection, SendResponse},
};
use http::{Request, Response};
use mesh_proto::{
    envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource},
    istio::{security::Authorization, workload::Address},
};
use mesh_tests::{Mesh, netns::Namespace};
use mesh_xds::{
    Handler, Rejected, Update,
    file::{self, Source},
};
use prost::Message;
use tokio::{net::TcpStream, runtime::Builder, sync::watch};

pub(crate) const ADDRESS: &str = "type.googleapis.com/istio.workload.Address";
pub(crate) const AUTHORIZATION: &str = "type.googleapis.com/istio.security.Authorization";

/// What it says, by name.
#[derive(Clone, Debug, Default)]
pub(crate) struct Said {
    pub(crate) addresses: Vec<(String, Address)>,
    pub(crate) policies: Vec<(String, Authorization)>,
}

impl Said {
    /// What this mesh is, in the messages of istiod.
    pub(crate) fn of(mesh: &Mesh) -> Result<Self> {
        let mut said = Self::default();
        file::load(&Source::Inline(mesh.yaml()), &mut said)?;
        Ok(said)
    }
}

fn upserts<T>(updates: Vec<Update<T>>) -> impl Iterator<Item = (String, T)> {
    updates.into_iter().filter_map(|update| match update {
        Update::Upsert { name, resource } => Some((name, resource)),
        Update::Unreadable { .. } | Update::Remove { .. } => None,
    })
}

impl Handler<Address> for Said {
    fn handle(&mut self, updates: Vec<Update<Address>>) -> Result<(), Vec<Rejected>> {
        self.addresses.extend(upserts(updates));
        Ok(())
    }
}

impl Handler<Authorization> for Said {
    fn handle(&mut self, updates: Vec<Update<Authorization>>) -> Result<(), Vec<Rejected>> {
        self.policies.extend(upserts(updates));
        Ok(())
    }
}

/// What it was told.
#[derive(Debug, Default)]
struct Heard {
    refused: Vec<String>,
    headers: Vec<(String, String)>,
    node: String,
    connections: usize,
}

/// The control plane. It lives as long as the process of the test.
#[derive(Debug)]
pub(crate) struct Ads {
    address: SocketAddr,
    heard: Arc<Mutex<Heard>>,
    cut: watch::Sender<()>,
}

fn locked(heard: &Mutex<Heard>) -> MutexGuard<'_, Heard> {
    heard.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Ads {
    /// Listens on the namespace's loopback device.
    pub(crate) fn start(namespace: &Namespace, said: Said) -> Result<Self> {
        let listener = namespace.run(|| Ok(TcpListener::bind("127.0.0.1:0")?))?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let heard = Arc::<Mutex<Heard>>::default();
        let (cut, cuts) = watch::channel(());
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let told = Arc::clone(&heard);
        thread::Builder::new().name("ads".into()).spawn(move || {
            // An error ends it, which the test notices.
            let _ended = runtime.block_on(serve(listener, said, told, cuts));
        })?;
        Ok(Self { address, heard, cut })
    }

    /// For `XDS_ADDRESS`.
    pub(crate) fn uri(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Cuts the connection.
    pub(crate) fn cut(&self) {
        self.cut.send_replace(());
    }

    /// What was refused, and why.
    pub(crate) fn refused(&self) -> Vec<String> {
        locked(&self.heard).refused.clone()
    }

    /// The headers of the last call.
    pub(crate) fn header(&self, name: &str) -> Option<String> {
        let heard = locked(&self.heard);
        heard.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone())
    }

    /// What the node said of itself, printed.
    pub(crate) fn node(&self) -> String {
        locked(&self.heard).node.clone()
    }

    /// Calls so far.
    pub(crate) fn connections(&self) -> usize {
        locked(&self.heard).connections
    }
}

async fn serve(
    listener: TcpListener,
    said: Said,
    heard: Arc<Mutex<Heard>>,
    mut cuts: watch::Receiver<()>,
) -> Result<()> {
    let listener = tokio::net::TcpListener::from_std(listener)?;
    loop {
        let (stream, _) = listener.accept().await?;
        cuts.mark_unchanged();
        let mut connection = h2::server::handshake(stream).await?;
        tokio::select! {
            // Cut by us or by the node proxy: the next one.
            _ended = call(&mut connection, &said, &heard) => {}
            changed = cuts.changed() => changed?,
        }
    }
}

/// The one call of a connection, to its end.
async fn call(
    connection: &mut Connection<TcpStream, Bytes>,
    said: &Said,
    heard: &Mutex<Heard>,
) -> Result<()> {
    let (request, respond) = connection.accept().await.context("no call")??;
    let session = session(request, respond, said, heard);
    tokio::pin!(session);
    loop {
        tokio::select! {
            ended = &mut session => return ended,
            // Nothing else moves the connection's frames.
            next = connection.accept() => drop(next.context("the connection is gone")??),
        }
    }
}

async fn session(
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
    said: &Said,
    heard: &Mutex<Heard>,
) -> Result<()> {
    {
        let mut heard = locked(heard);
        heard.connections += 1;
        let text = |(name, value): (&http::HeaderName, &http::HeaderValue)| {
            (name.to_string(), String::from_utf8_lossy(value.as_bytes()).into_owned())
        };
        heard.headers = request.headers().iter().map(text).collect();
    }
    let head = Response::builder().header("content-type", "application/grpc").body(())?;
    let mut answers = respond.send_response(head, false)?;
    let mut requests = request.into_body();
    let mut buffer = BytesMut::new();
    while let Some(data) = requests.data().await {
        let data = data?;
        requests.flow_control().release_capacity(data.len())?;
        buffer.put(data);
        while let Some(message) = message(&mut buffer) {
            answer(&DeltaDiscoveryRequest::decode(message)?, said, heard, &mut answers)?;
        }
    }
    Ok(())
}

/// A whole message of gRPC: a flag, a length in four bytes, the message.
fn message(buffer: &mut BytesMut) -> Option<BytesMut> {
    let length: [u8; 4] = buffer.get(1..5)?.try_into().ok()?;
    let length = usize::try_from(u32::from_be_bytes(length)).ok()?;
    if buffer.len() < 5 + length {
        return None;
    }
    let _prefix = buffer.split_to(5);
    Some(buffer.split_to(length))
}

fn answer(
    request: &DeltaDiscoveryRequest,
    said: &Said,
    heard: &Mutex<Heard>,
    answers: &mut SendStream<Bytes>,
) -> Result<()> {
    if let Some(node) = &request.node {
        locked(heard).node = format!("{node:?}");
    }
    if !request.response_nonce.is_empty() {
        let refused = request.error_detail.as_ref().map(|detail| detail.message.clone());
        locked(heard).refused.extend(refused);
        return Ok(());
    }
    let resources = match request.type_url.as_str() {
        ADDRESS => said.addresses.iter().map(|(name, of)| resource(name, ADDRESS, of)).collect(),
        AUTHORIZATION => {
            said.policies.iter().map(|(name, of)| resource(name, AUTHORIZATION, of)).collect()
        }
        _ => Vec::new(),
    };
    let response = DeltaDiscoveryResponse {
        resources,
        type_url: request.type_url.clone(),
        nonce: "1".to_owned(),
        ..DeltaDiscoveryResponse::default()
    };
    let message = response.encode_to_vec();
    let mut frame = BytesMut::with_capacity(5 + message.len());
    frame.put_u8(0);
    frame.put_u32(u32::try_from(message.len())?);
    frame.put_slice(&message);
    answers.send_data(frame.freeze(), false)?;
    Ok(())
}

fn resource(name: &str, url: &str, message: &impl Message) -> Resource {
    let mut resource =
        Resource { name: name.to_owned(), version: "1".to_owned(), ..Resource::default() };
    let any = resource.resource.get_or_insert_default();
    any.type_url = url.to_owned();
    any.value = message.encode_to_vec();
    resource
}
