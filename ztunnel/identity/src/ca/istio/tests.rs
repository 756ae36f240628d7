use super::*;
use crate::{
    WorkloadCertificate,
    testing::{CLIENT, SERVER, TestCa, context, id},
};
use mesh_proto::istio::v1::auth::istio_certificate_service_server::{
    IstioCertificateService, IstioCertificateServiceServer as Server,
};
use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};
use tonic::{Response, metadata::MetadataMap};

/// istiod, as far as it matters: checks what it checks, answers as told.
#[derive(Clone)]
struct Istiod(Arc<Inner>);

struct Inner {
    ca: TestCa,
    answer: Mutex<Answer>,
    seen: Mutex<Vec<(MetadataMap, IstioCertificateRequest)>>,
    connections: AtomicU32,
    unreachable: Mutex<bool>,
}

#[derive(Clone)]
enum Answer {
    Sign,
    Chain(Vec<String>),
    Status(Code, &'static str),
}

#[tonic::async_trait]
impl IstioCertificateService for Istiod {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let (headers, _, request) = request.into_parts();
        self.0.seen.lock().unwrap().push((headers, request.clone()));
        let answer = self.0.answer.lock().unwrap().clone();
        let cert_chain = match answer {
            Answer::Sign => vec![self.0.sign(&request.csr), self.0.ca.pem()],
            Answer::Chain(chain) => chain,
            Answer::Status(code, text) => return Err(Status::new(code, text)),
        };
        Ok(Response::new(IstioCertificateResponse { cert_chain }))
    }
}

impl Inner {
    fn sign(&self, csr: &str) -> String {
        let mut request = rcgen::CertificateSigningRequestParams::from_pem(csr).unwrap();
        request.params.serial_number = Some(7.into());
        request.signed_by(&self.ca.issuer).unwrap().pem()
    }
}

/// No wire in between: the server's service is the client's channel.
impl Connect for Istiod {
    type Channel = Server<Self>;

    async fn connect(&self) -> Result<Self::Channel, BoxError> {
        if *self.0.unreachable.lock().unwrap() {
            return Err("nobody is there".into());
        }
        self.0.connections.fetch_add(1, Ordering::Relaxed);
        Ok(Server::new(self.clone()))
    }
}

fn istiod(answer: Answer) -> Istiod {
    Istiod(Arc::new(Inner {
        ca: TestCa::new("mesh"),
        answer: Mutex::new(answer),
        seen: Mutex::default(),
        connections: AtomicU32::new(0),
        unreachable: Mutex::new(false),
    }))
}

fn settings() -> Settings {
    Settings {
        impersonate: true,
        validity: Duration::from_hours(24),
        cluster: "Kubernetes".into(),
        token: Token::Literal("secret".into()),
        headers: vec![("X-Tenant".into(), "blue".into())],
        root: None,
    }
}

async fn ask(istiod: &Istiod, settings: Settings) -> Result<Issued, IssueError> {
    let ca = IstioCa::new(istiod.clone(), settings).unwrap();
    let identity = id(CLIENT);
    let (_, csr) = Csr::generate(&identity).unwrap();
    ca.sign(&identity, &csr).await
}

fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

#[tokio::test]
async fn asks_as_istiod_wants_to_be_asked() {
    let istiod = istiod(Answer::Sign);
    let ca = IstioCa::new(istiod.clone(), settings()).unwrap();
    let identity = id(CLIENT);
    let (key, csr) = Csr::generate(&identity).unwrap();
    let issued = ca.sign(&identity, &csr).await.unwrap();
    assert_eq!(issued.roots, std::slice::from_ref(&istiod.0.ca.certificate));
    let certificate = WorkloadCertificate::new(identity, key, issued, &context()).unwrap();
    assert_eq!(peer_identity(certificate.chain()), Some(id(CLIENT)));

    let seen = istiod.0.seen.lock().unwrap();
    let (headers, request) = &seen[0];
    for (name, value) in
        [("authorization", "Bearer secret"), ("clusterid", "Kubernetes"), ("x-tenant", "blue")]
    {
        assert_eq!(headers.get(name).unwrap(), value, "{name}");
    }
    assert_eq!(request.validity_duration, 86_400);
    let metadata = request.metadata.as_ref().unwrap();
    let whom = metadata.fields["ImpersonatedIdentity"].kind.as_ref();
    assert_eq!(whom, Some(&Kind::StringValue(CLIENT.into())));
    assert_eq!(metadata.fields.len(), 1);
}

#[tokio::test]
async fn asks_for_itself_in_dedicated_mode() {
    let istiod = istiod(Answer::Sign);
    let alone = Settings { impersonate: false, token: Token::Optional("/no".into()), ..settings() };
    ask(&istiod, alone).await.unwrap();
    let seen = istiod.0.seen.lock().unwrap();
    assert_eq!(seen[0].1.metadata, None);
    assert!(seen[0].0.get("authorization").is_none());
}

#[tokio::test]
async fn answers_that_are_no_use() {
    let mesh = istiod(Answer::Sign);
    let (_, leaf) = mesh.0.ca.issue(&[CLIENT], |_| ());
    let leaf = crate::dump::pem(&leaf.chain[0]);
    let (_, other) = mesh.0.ca.issue(&[SERVER], |_| ());
    let other = crate::dump::pem(&other.chain[0]);
    let (_, nobody) = mesh.0.ca.issue(&[], |_| ());
    let nobody = crate::dump::pem(&nobody.chain[0]);
    let root = mesh.0.ca.pem();
    let middle = TestCa::new("middle").pem();
    for (name, answer, shape, words) in [
        ("leaf and root", vec![leaf.clone(), root.clone()], Some((1, 1)), ""),
        ("an intermediate", vec![leaf.clone(), middle.clone(), root.clone()], Some((2, 1)), ""),
        ("two roots", vec![leaf.clone(), format!("{root}{middle}")], Some((1, 2)), ""),
        ("empty", vec![], None, "no certificate"),
        ("no root", vec![leaf.clone()], None, "no root"),
        ("empty texts", vec![String::new(), root.clone()], None, "no certificate"),
        ("not PEM", vec![leaf.replace("-----END", "--END"), root.clone()], None, "not PEM"),
        ("of another", vec![other, root.clone()], None, "sa/server instead of"),
        ("of nobody", vec![nobody, root.clone()], None, "without an identity"),
    ] {
        let got = ask(&istiod(Answer::Chain(answer)), settings()).await;
        let counts = got.as_ref().ok().map(|issued| (issued.chain.len(), issued.roots.len()));
        assert_eq!(counts, shape, "{name}");
        if let Err(error) = got {
            assert!(chain(&error).contains(words), "{name}: {}", chain(&error));
        }
    }
}

#[tokio::test]
async fn refusals_say_what_to_look_at() {
    for (code, refused, words) in [
        (Code::Unauthenticated, true, "CA_TRUSTED_NODE_ACCOUNTS"),
        (Code::InvalidArgument, true, "SECRET_TTL"),
        (Code::Unavailable, false, "cannot be reached"),
        (Code::Internal, true, "no"),
    ] {
        let error = ask(&istiod(Answer::Status(code, "no")), settings()).await.unwrap_err();
        assert_eq!(matches!(error, IssueError::Refused(_)), refused, "{code:?}");
        assert!(chain(&error).contains(words), "{code:?}: {}", chain(&error));
    }
    let missing = Settings { token: Token::File("/no/token".into()), ..settings() };
    let error = ask(&istiod(Answer::Sign), missing).await.unwrap_err();
    assert!(chain(&error).contains("/no/token"), "{}", chain(&error));
}

#[tokio::test]
async fn a_new_root_makes_a_new_connection() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root-cert.pem");
    fs::write(&root, "1").unwrap();
    let istiod = istiod(Answer::Sign);
    let ca = IstioCa::new(istiod.clone(), Settings { root: Some(root.clone()), ..settings() });
    let ca = ca.unwrap();
    let identity = id(CLIENT);
    let (_, csr) = Csr::generate(&identity).unwrap();
    let connections = || istiod.0.connections.load(Ordering::Relaxed);

    *istiod.0.unreachable.lock().unwrap() = true;
    let error = ca.sign(&identity, &csr).await.unwrap_err();
    assert_eq!(chain(&error), "the CA cannot be reached: nobody is there");
    *istiod.0.unreachable.lock().unwrap() = false;
    ca.sign(&identity, &csr).await.unwrap();
    ca.sign(&identity, &csr).await.unwrap();
    assert_eq!(connections(), 1);

    fs::write(dir.path().join("new"), "2").unwrap();
    fs::rename(dir.path().join("new"), &root).unwrap();
    *istiod.0.unreachable.lock().unwrap() = true;
    ca.sign(&identity, &csr).await.expect("with the old connection");
    assert_eq!(connections(), 1);
    *istiod.0.unreachable.lock().unwrap() = false;
    ca.sign(&identity, &csr).await.unwrap();
    ca.sign(&identity, &csr).await.unwrap();
    assert_eq!(connections(), 2);
}

#[test]
fn headers_that_are_none() {
    for (name, value) in [("a b", "x"), ("x-bin", "x"), ("x", "a\nb")] {
        let settings = Settings { headers: vec![(name.into(), value.into())], ..settings() };
        let error = IstioCa::new(istiod(Answer::Sign), settings).unwrap_err();
        assert!(error.to_string().contains(name), "{error}");
    }
}

/// The channel of tonic's own is one; and nobody listening is no refusal.
#[tokio::test]
async fn over_a_real_channel() {
    // Nobody listens: the port was given back.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let lazily = move || async move {
        let uri = format!("http://127.0.0.1:{port}");
        Ok::<_, BoxError>(tonic::transport::Endpoint::from_shared(uri)?.connect_lazy())
    };
    let ca = IstioCa::new(lazily, settings()).unwrap();
    let identity = id(CLIENT);
    let (_, csr) = Csr::generate(&identity).unwrap();
    let error = ca.sign(&identity, &csr).await.unwrap_err();
    assert!(matches!(error, IssueError::Unreachable(_)), "{}", chain(&error));
}
