use std::collections::BTreeMap;
use std::path::Path;
use std::pin::Pin;
use std::sync::Mutex;

use mesh_proto::envoy::service::discovery::v3::aggregated_discovery_service_server::{
    AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
};
use mesh_proto::envoy::service::discovery::v3::{DeltaDiscoveryRequest, Resource};
use mesh_proto::istio::security::Authorization;
use mesh_proto::istio::workload::{Address, Workload, address::Type};
use mesh_runtime::control_plane::{Roots, Tls};
use mesh_runtime::tasks::Tasks;
use prost::Message as _;
use prost_types::Any;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tonic::codegen::tokio_stream::Stream;
use tonic::metadata::MetadataMap;
use tonic::{Response, Streaming};

use super::*;
use crate::{Handler, Rejected, Unanswered, Update};

type Sent = Result<DeltaDiscoveryResponse, Status>;

/// One stream as the control plane has it.
struct Call {
    headers: MetadataMap,
    requests: Streaming<DeltaDiscoveryRequest>,
    answers: mpsc::Sender<Sent>,
}

impl Call {
    async fn next(&mut self) -> DeltaDiscoveryRequest {
        self.requests.message().await.unwrap().expect("the client ended its stream")
    }

    async fn send(&self, kind: Kind, nonce: &str, resources: Vec<Resource>) {
        let response = DeltaDiscoveryResponse {
            type_url: kind.url().to_owned(),
            nonce: nonce.to_owned(),
            resources,
            ..DeltaDiscoveryResponse::default()
        };
        self.answers.send(Ok(response)).await.unwrap();
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }
}

struct Ads(mpsc::Sender<Call>);

struct Answers(mpsc::Receiver<Sent>);

impl Stream for Answers {
    type Item = Sent;

    fn poll_next(
        mut self: Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Sent>> {
        self.0.poll_recv(context)
    }
}

#[tonic::async_trait]
impl AggregatedDiscoveryService for Ads {
    type DeltaAggregatedResourcesStream = Answers;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Answers>, Status> {
        if request.metadata().get("authorization").is_some_and(|token| token == "Bearer wrong") {
            return Err(Status::unauthenticated("no"));
        }
        let headers = request.metadata().clone();
        let (answers, stream) = mpsc::channel(8);
        let call = Call { headers, requests: request.into_inner(), answers };
        self.0.send(call).await.map_err(|_gone| Status::cancelled("the test is over"))?;
        Ok(Response::new(Answers(stream)))
    }
}

struct Ca {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Ca {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::<String>::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self { issuer: CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap() }
    }

    fn server(&self, name: &str) -> rustls::ServerConfig {
        let key = KeyPair::generate().unwrap();
        let leaf = CertificateParams::new(vec![name.to_owned()])
            .unwrap()
            .signed_by(&key, &self.issuer)
            .unwrap();
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let mut config = rustls::ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![leaf.der().clone()], key)
            .unwrap();
        config.alpn_protocols = vec![b"h2".to_vec()];
        config
    }
}

static VERSIONS: &[&rustls::SupportedProtocolVersion] = &[&rustls::version::TLS13];

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

/// A control plane on loopback; its address, and the streams that come.
async fn control_plane(
    config: rustls::ServerConfig,
    tasks: &Tasks,
) -> (String, mpsc::Receiver<Call>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("https://{}", listener.local_addr().unwrap());
    let (calls, incoming) = mpsc::channel(8);
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let connections = tasks.child();
    tasks.spawn(move |_| async move {
        loop {
            let (tcp, _) = listener.accept().await.unwrap();
            let (acceptor, calls) = (acceptor.clone(), calls.clone());
            connections.spawn(move |_| async move {
                let Ok(tls) = acceptor.accept(tcp).await else { return };
                let service = hyper::service::service_fn(move |request| {
                    let mut ads = AggregatedDiscoveryServiceServer::new(Ads(calls.clone()));
                    tonic::codegen::Service::call(&mut ads, request)
                });
                let io = hyper_util::rt::TokioIo::new(tls);
                let _end =
                    hyper::server::conn::http2::Builder::new(hyper_util::rt::TokioExecutor::new())
                        .serve_connection(io, service)
                        .await;
            });
        }
    });
    (address, incoming)
}

#[derive(Clone, Default)]
struct Mesh(Arc<Mutex<BTreeMap<String, Vec<u8>>>>);

impl Handler<Address> for Mesh {
    fn handle(&mut self, updates: Vec<Update<Address>>) -> Result<(), Vec<Rejected>> {
        for update in updates {
            match update {
                Update::Upsert { name, resource } => {
                    self.0.lock().unwrap().insert(name, resource.encode_to_vec());
                }
                Update::Unreadable { .. } => {}
                Update::Remove { name } => {
                    self.0.lock().unwrap().remove(&name);
                }
            }
        }
        Ok(())
    }
}

impl Handler<Authorization> for Mesh {
    fn handle(&mut self, updates: Vec<Update<Authorization>>) -> Result<(), Vec<Rejected>> {
        let names = updates.iter().map(|update| update.name().to_owned());
        Err(names.map(|name| Rejected { name, reason: "scope: unknown".to_owned() }).collect())
    }
}

fn workload(uid: &str) -> Resource {
    let workload = Workload { uid: uid.to_owned(), ..Workload::default() };
    let address = Address { r#type: Some(Type::Workload(workload)) };
    let any = Any { type_url: Kind::Address.url().to_owned(), value: address.encode_to_vec() };
    Resource {
        name: uid.to_owned(),
        version: "v1".to_owned(),
        resource: Some(any),
        aliases: Vec::new(),
    }
}

/// Everything around a client that runs.
struct Bed {
    tasks: Tasks,
    dir: TempDir,
    mesh: Mesh,
    registry: Registry,
    readiness: Readiness,
    demand: Option<Demand>,
    known: Known,
}

impl Bed {
    fn new() -> Self {
        Self {
            tasks: Tasks::new(),
            dir: TempDir::new().unwrap(),
            mesh: Mesh::default(),
            registry: Registry::new(),
            readiness: Readiness::new(),
            demand: None,
            known: Known::already(),
        }
    }

    fn write(&self, name: &str, text: &str) {
        // Renamed into place, as files are that somebody reads.
        std::fs::write(self.dir.path().join("new"), text).unwrap();
        std::fs::rename(self.dir.path().join("new"), self.dir.path().join(name)).unwrap();
    }

    fn client(&mut self, address: &str, also_named: Option<&str>, on_demand: bool) {
        let tls = Tls {
            roots: Roots::File(self.dir.path().join("root.pem")),
            also_named: also_named.map(|name| ServerName::try_from(name.to_owned()).unwrap()),
            provider: provider(),
            versions: VERSIONS,
        };
        let plane = ControlPlane::new(address, tls, &self.tasks).unwrap();
        let token = self.dir.path().join("token");
        let settings = Settings {
            node: Node::default(),
            cluster: "c1".to_owned(),
            on_demand,
            headers: vec![("X-Custom".to_owned(), "yes".to_owned())],
            token: Arc::new(move || Ok(read(&token))),
        };
        let (client, demand) =
            Client::new(settings, plane, self.mesh.clone(), (&self.registry, &self.readiness))
                .unwrap();
        self.demand = Some(demand);
        self.known = client.known();
        self.tasks.spawn(|draining| client.run(draining));
    }

    fn counted(&self, sample: &str) -> bool {
        self.registry.render().lines().any(|line| line == sample)
    }
}

fn read(path: &Path) -> Option<String> {
    std::fs::read_to_string(path).ok()
}

async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(30), what).await.expect("it never happened")
}

#[tokio::test]
async fn a_stream_from_end_to_end() {
    let ca = Ca::new();
    let mut bed = Bed::new();
    let (address, mut calls) = control_plane(ca.server("127.0.0.1"), &bed.tasks).await;
    bed.write("root.pem", &ca.issuer.pem());
    bed.write("token", "t1\n");
    bed.client(&address, None, false);

    let mut call = soon(calls.recv()).await.unwrap();
    assert_eq!(call.header("authorization"), Some("Bearer t1"));
    assert_eq!((call.header("clusterid"), call.header("x-custom")), (Some("c1"), Some("yes")));
    for kind in Kind::ALL {
        assert_eq!(soon(call.next()).await.type_url, kind.url());
    }
    assert_eq!(bed.readiness.pending(), ["state manager"]);
    call.send(Kind::Address, "n1", vec![workload("a"), workload("b")]).await;
    let ack = soon(call.next()).await;
    assert_eq!((ack.response_nonce.as_str(), ack.error_detail), ("n1", None));
    assert_eq!(bed.mesh.0.lock().unwrap().len(), 2, "in effect before it is acknowledged");
    assert_eq!(bed.readiness.pending(), ["state manager"]);

    assert!(!bed.known.is(), "policies have not come");

    // The policies' handler refuses everything.
    let any = Any { type_url: Kind::Authorization.url().to_owned(), value: Vec::new() };
    let policy = Resource { name: "n/p".to_owned(), resource: Some(any), ..Resource::default() };
    call.send(Kind::Authorization, "n2", vec![policy]).await;
    let nack = soon(call.next()).await;
    assert_eq!(nack.error_detail.unwrap().message, "n/p: scope: unknown");
    // It goes into effect that the policy is not to be had.
    soon(bed.known.wait()).await;
    assert_eq!(bed.readiness.pending(), ["state manager"]);
    call.send(Kind::Authorization, "n3", vec![]).await;
    assert_eq!(soon(call.next()).await.error_detail, None);
    assert!(bed.readiness.pending().is_empty());

    // The stream ends; the next one claims what is there, with the token of then.
    bed.write("token", "t2");
    drop(call);
    let mut call = soon(calls.recv()).await.unwrap();
    assert_eq!(call.header("authorization"), Some("Bearer t2"));
    let versions: BTreeMap<_, _> =
        soon(call.next()).await.initial_resource_versions.into_iter().collect();
    assert_eq!(versions, ["a", "b"].map(|name| (name.to_owned(), "v1".to_owned())).into());
    assert!(bed.readiness.pending().is_empty(), "ready once is ready");

    let url = Kind::Address.url();
    for sample in [
        r#"istio_xds_connection_terminations_total{reason="Complete"} 1"#.to_owned(),
        format!(r#"istio_xds_message_total{{url="{url}"}} 1"#),
        format!(r#"istio_xds_message_bytes_total{{url="{url}"}} 12"#),
        format!(r#"istio_xds_rejected_resources_total{{url="{}"}} 1"#, Kind::Authorization.url()),
        format!(r#"istio_xds_nacks_total{{url="{}"}} 1"#, Kind::Authorization.url()),
    ] {
        assert!(bed.counted(&sample), "{sample} is not in\n{}", bed.registry.render());
    }
    for kind in Kind::ALL {
        let age = format!(r#"istio_xds_last_message_age_seconds{{url="{}"}}"#, kind.url());
        assert!(bed.registry.render().contains(&age), "{age}");
    }
    bed.tasks.cancel();
}

#[tokio::test]
async fn the_other_name_and_no_third() {
    let ca = Ca::new();
    for (also, trusted) in
        [(None, false), (Some("istiod.test"), true), (Some("istiod.other"), false)]
    {
        let mut bed = Bed::new();
        let (address, mut calls) = control_plane(ca.server("istiod.test"), &bed.tasks).await;
        bed.write("root.pem", &ca.issuer.pem());
        bed.client(&address, also, false);
        if trusted {
            soon(calls.recv()).await.unwrap();
        } else {
            soon(async {
                while !bed.counted(
                    r#"istio_xds_connection_terminations_total{reason="ConnectionError"} 2"#,
                ) {
                    tokio::task::yield_now().await;
                }
            })
            .await;
            assert!(calls.try_recv().is_err(), "{also:?}");
        }
        bed.tasks.cancel();
    }
}

#[tokio::test]
async fn the_root_is_read_for_each_connection() {
    let (ca, other) = (Ca::new(), Ca::new());
    let mut bed = Bed::new();
    let (address, mut calls) = control_plane(ca.server("127.0.0.1"), &bed.tasks).await;
    // Not there, then another one's, then the right one.
    bed.client(&address, None, false);
    for (root, failures) in [("", 1), (other.issuer.pem().as_str(), 4)] {
        if !root.is_empty() {
            bed.write("root.pem", root);
        }
        let sample = format!(
            r#"istio_xds_connection_terminations_total{{reason="ConnectionError"}} {failures}"#
        );
        soon(async {
            while !bed.counted(&sample) {
                tokio::task::yield_now().await;
            }
        })
        .await;
    }
    assert!(calls.try_recv().is_err());
    bed.write("root.pem", &ca.issuer.pem());
    soon(calls.recv()).await.unwrap();
    bed.tasks.cancel();
}

#[tokio::test]
async fn who_is_refused_tries_again_with_a_new_token() {
    let ca = Ca::new();
    let mut bed = Bed::new();
    let (address, mut calls) = control_plane(ca.server("127.0.0.1"), &bed.tasks).await;
    bed.write("root.pem", &ca.issuer.pem());
    bed.write("token", "wrong");
    bed.client(&address, None, false);
    soon(async {
        while !bed.counted(r#"istio_xds_connection_terminations_total{reason="ConnectionError"} 1"#)
        {
            tokio::task::yield_now().await;
        }
    })
    .await;
    bed.write("token", "right");
    let call = soon(calls.recv()).await.unwrap();
    assert_eq!(call.header("authorization"), Some("Bearer right"));
    bed.tasks.cancel();
}

#[tokio::test]
async fn asked_names_are_answered_when_they_are_in_effect() {
    let ca = Ca::new();
    let mut bed = Bed::new();
    let (address, mut calls) = control_plane(ca.server("127.0.0.1"), &bed.tasks).await;
    bed.write("root.pem", &ca.issuer.pem());
    bed.client(&address, None, true);
    assert_eq!(bed.readiness.pending(), ["state manager"]);
    let mut call = soon(calls.recv()).await.unwrap();
    soon(call.next()).await;
    soon(call.next()).await;
    // So that the client has the stream's headers, without which it does not listen to anybody.
    call.send(Kind::Authorization, "n0", vec![]).await;
    soon(call.next()).await;

    let demand = bed.demand.clone().unwrap();
    let asking = std::pin::pin!(demand.ask("uid".to_owned()));
    let serving = async {
        assert_eq!(call.next().await.resource_names_subscribe, ["uid"]);
        call.send(Kind::Address, "n1", vec![workload("uid")]).await;
        call.next().await
    };
    let (asked, _) = soon(async { tokio::join!(asking, serving) }).await;
    assert_eq!(asked, Ok(()));
    assert!(bed.mesh.0.lock().unwrap().contains_key("uid"));

    bed.tasks.cancel();
    assert_eq!(soon(demand.ask("other".to_owned())).await, Err(Unanswered));
}

#[test]
fn how_long_to_wait_after_which_end() {
    let failed = |code: Code, text: &str| End::Failed(Status::new(code, text));
    let ms = Duration::from_millis;
    let table = [
        ("not connected", End::NotConnected("x".into()), Reason::ConnectionError, ms(20)),
        ("again", End::NotConnected("x".into()), Reason::ConnectionError, ms(40)),
        ("failed", failed(Code::Internal, "x"), Reason::Error, ms(80)),
        ("unavailable", failed(Code::Unavailable, "x"), Reason::Error, ms(160)),
        ("no token", End::Local("x".into()), Reason::Error, ms(320)),
        ("closed at once", End::Closed { useful: false }, Reason::Complete, ms(640)),
        (
            "goaway",
            failed(Code::Unavailable, "received prior goaway: x"),
            Reason::Reconnect,
            ms(10),
        ),
        ("begins anew", failed(Code::Internal, "x"), Reason::Error, ms(20)),
        ("cancelled", failed(Code::Cancelled, ""), Reason::Reconnect, ms(10)),
        ("closed", End::Closed { useful: true }, Reason::Complete, Duration::ZERO),
    ];
    let mut delays = Backoff::new(FIRST_DELAY, LONGEST_DELAY, 2.0, 0.0);
    for (name, end, reason, delay) in table {
        assert_eq!(next(&end, &mut delays), (reason, delay), "{name}");
    }
    for _ in 0..20 {
        next(&End::NotConnected("x".into()), &mut delays);
    }
    assert_eq!(next(&End::NotConnected("x".into()), &mut delays).1, LONGEST_DELAY);
}

#[test]
fn settings_print_no_secret() {
    let settings = Settings {
        node: Node::default(),
        cluster: "c".to_owned(),
        on_demand: false,
        headers: vec![("x-key".to_owned(), "secret".to_owned())],
        token: Arc::new(|| Ok(Some("secret".to_owned()))),
    };
    let printed = format!("{settings:?}");
    assert!(printed.contains("x-key") && !printed.contains("secret"), "{printed}");
}
