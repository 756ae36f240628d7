//! The conversations: the incremental protocol as istiod has it, and the signing of certificates.

use std::{
    collections::BTreeSet,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use mesh_proto::{
    envoy::service::discovery::v3::{
        DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource,
        aggregated_discovery_service_server::AggregatedDiscoveryService,
    },
    istio::v1::auth::{
        IstioCertificateRequest, IstioCertificateResponse,
        istio_certificate_service_server::IstioCertificateService,
    },
};
use mesh_xds::session::Kind;
use prost_types::value;
use tokio::sync::{mpsc, watch};
use tonic::{Request, Response, Status, Streaming, codegen::tokio_stream::Stream};

use super::{Seen, Shared, TOKEN, resources::resource};

/// To be told to a stream, in one response.
#[derive(Clone, Debug)]
pub struct Order {
    pub(super) kind: Kind,
    pub(super) resources: Vec<Resource>,
    pub(super) removed: Vec<String>,
}

impl Order {
    /// Of resources by name, encoded, and of names that are gone.
    pub fn new(
        kind: Kind,
        resources: impl IntoIterator<Item = (String, Vec<u8>)>,
        removed: Vec<String>,
    ) -> Self {
        let sent = |(name, bytes): (String, Vec<u8>)| resource(kind, &name, bytes);
        Self { kind, resources: resources.into_iter().map(sent).collect(), removed }
    }
}

type Sent = Result<DeltaDiscoveryResponse, Status>;

/// What a stream answers.
#[derive(Debug)]
pub(super) struct Answers(mpsc::Receiver<Sent>);

impl Stream for Answers {
    type Item = Sent;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Sent>> {
        self.0.poll_recv(cx)
    }
}

/// Who opens streams.
pub(super) struct Ads {
    pub(super) shared: Arc<Shared>,
    pub(super) calls: mpsc::Sender<Call>,
}

/// Who signs.
pub(super) struct Ca(pub(super) Arc<Shared>);

fn header<T>(request: &Request<T>, name: &str) -> String {
    let value = request.metadata().get(name).and_then(|value| value.to_str().ok());
    value.unwrap_or_default().to_owned()
}

/// The token, as istiod wants to see it.
fn authenticate<T>(request: &Request<T>) -> Result<String, Status> {
    let token = header(request, "authorization");
    if token == format!("Bearer {TOKEN}") {
        Ok(token)
    } else {
        Err(Status::unauthenticated("who are you?"))
    }
}

#[tonic::async_trait]
impl AggregatedDiscoveryService for Ads {
    type DeltaAggregatedResourcesStream = Answers;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Answers>, Status> {
        let headers = [header(&request, "clusterid"), authenticate(&request)?];
        let (answers, stream) = mpsc::channel(16);
        let number = {
            let mut state = self.shared.state();
            state.opened += 1;
            state.opened
        };
        let call = Call {
            requests: request.into_inner(),
            answers,
            headers,
            number,
            node: String::new(),
            nonce: 0,
            explicit: false,
            followed: BTreeSet::new(),
        };
        self.calls.send(call).await.map_err(|_gone| Status::cancelled("the test is over"))?;
        Ok(Response::new(Answers(stream)))
    }
}

#[tonic::async_trait]
impl IstioCertificateService for Ca {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        authenticate(&request)?;
        let signed = self.0.state().signer.sign(request.get_ref());
        signed.map(Response::new).map_err(|why| Status::invalid_argument(why.to_string()))
    }
}

/// Waits until one of these need not wait any more. Returns the types that are still held back.
async fn let_go(
    hold: &mut watch::Receiver<Vec<Kind>>,
    waiting: &[(Kind, DeltaDiscoveryRequest)],
) -> Option<Vec<Kind>> {
    let free = |held: &Vec<Kind>| waiting.iter().any(|(kind, _)| !held.contains(kind));
    hold.wait_for(free).await.ok().map(|held| held.clone())
}

/// One stream.
pub(super) struct Call {
    requests: Streaming<DeltaDiscoveryRequest>,
    answers: mpsc::Sender<Sent>,
    headers: [String; 2],
    number: usize,
    node: String,
    nonce: usize,
    /// Whether addresses are subscribed to by name.
    explicit: bool,
    /// The names that are.
    followed: BTreeSet<String>,
}

impl Call {
    /// Talks until the stream ends.
    pub(super) async fn serve(mut self, shared: Arc<Shared>) {
        let (orders, mut ordered) = mpsc::channel(64);
        shared.state().streams.push(orders);
        let mut hold = shared.hold.subscribe();
        let mut waiting: Vec<(Kind, DeltaDiscoveryRequest)> = Vec::new();
        loop {
            tokio::select! {
                message = self.requests.message() => match message {
                    Ok(Some(request)) => waiting.extend(self.take(&shared, request)),
                    Ok(None) | Err(_) => return,
                },
                Some(order) = ordered.recv() => self.obey(order).await,
                held = let_go(&mut hold, &waiting) => {
                    let Some(held) = held else { return };
                    let free = waiting.extract_if(.., |(kind, _)| !held.contains(kind));
                    for (kind, request) in free.collect::<Vec<_>>() {
                        if let Some(answer) = self.answer(&shared, kind, &request) {
                            self.send(answer).await;
                        }
                    }
                }
            }
        }
    }

    /// Notes a request; returns it if it wants an answer.
    fn take(
        &mut self,
        shared: &Shared,
        request: DeltaDiscoveryRequest,
    ) -> Option<(Kind, DeltaDiscoveryRequest)> {
        let name =
            request.node.as_ref().and_then(|node| node.metadata.as_ref()?.fields.get("NODE_NAME"));
        if let Some(value::Kind::StringValue(name)) = name.and_then(|value| value.kind.clone()) {
            self.node = name;
        }
        shared.state().seen.push(Seen {
            node: self.node.clone(),
            stream: self.number,
            headers: self.headers.clone(),
            request: request.clone(),
        });
        let kind = Kind::from_url(&request.type_url)?;
        request.response_nonce.is_empty().then_some((kind, request))
    }

    fn answer(
        &mut self,
        shared: &Shared,
        kind: Kind,
        request: &DeltaDiscoveryRequest,
    ) -> Option<Order> {
        let resources = shared.state().resources.clone();
        let all = resources.all(kind);
        let claimed = &request.initial_resource_versions;
        let star = ["*".to_owned()];
        let explicit =
            request.resource_names_subscribe == star && request.resource_names_unsubscribe == star;
        if request.node.is_some() && !explicit {
            let new = |resource: &&Resource| claimed.get(&resource.name) != Some(&resource.version);
            let removed = claimed.keys().filter(|name| !all.contains_key(*name)).cloned();
            return Some(Order {
                kind,
                resources: all.values().filter(new).cloned().collect(),
                removed: removed.collect(),
            });
        }
        let asked: Vec<String> = if explicit {
            self.explicit = true;
            claimed.keys().cloned().chain(resources.local(&self.node)).collect()
        } else {
            for name in &request.resource_names_unsubscribe {
                self.followed.remove(name);
            }
            let names = request.resource_names_subscribe.iter();
            names.filter(|name| !self.followed.contains(*name)).cloned().collect()
        };
        // Only what is new is answered.
        if asked.is_empty() && !explicit && request.resource_names_unsubscribe.is_empty() {
            return None;
        }
        let (mut found, mut removed) = (BTreeSet::new(), Vec::new());
        for name in asked {
            let these = resources.find(&name);
            if these.is_empty() {
                removed.push(name.clone());
            }
            found.extend(these);
            self.followed.insert(name);
        }
        let resources = found.iter().filter_map(|name| all.get(name)).cloned().collect();
        self.followed.extend(found);
        Some(Order { kind, resources, removed })
    }

    async fn obey(&mut self, mut order: Order) {
        if self.explicit && order.kind == Kind::Address {
            order.resources.retain(|resource| self.followed.contains(&resource.name));
            order.removed.retain(|name| self.followed.contains(name));
            if order.resources.is_empty() && order.removed.is_empty() {
                return;
            }
        }
        self.send(order).await;
    }

    async fn send(&mut self, Order { kind, resources, removed }: Order) {
        self.nonce += 1;
        let response = DeltaDiscoveryResponse {
            type_url: kind.url().to_owned(),
            nonce: format!("{}/{}", self.number, self.nonce),
            resources,
            removed_resources: removed,
            ..DeltaDiscoveryResponse::default()
        };
        // Gone: the next request tells.
        let _gone = self.answers.send(Ok(response)).await;
    }
}
