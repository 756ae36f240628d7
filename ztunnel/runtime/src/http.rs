//! The little HTTP/1.1 server behind admin, metrics and readiness (`spec/ztunnel.md` §1.3). No TLS, no bodies in.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fmt::{self, Display};
use std::future::Future;
use std::net::TcpStream;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use ::http::header::{ACCEPT, ALLOW, CONTENT_TYPE, HeaderValue};
pub use ::http::{Method, StatusCode};
use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::sync::Semaphore;

use crate::net::{Listener, accept_loop};
use crate::tasks::{Draining, Tasks};

/// How long a client may take to send a request's head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(2);
/// Bytes of a request's head; also the smallest that hyper takes.
const HEAD_LIMIT: usize = 8 * 1024;
/// Connections at a time: anybody can reach the metrics and readiness ports.
const CONNECTIONS: usize = 256;

/// What a handler may see of a request.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Request {
    /// The method, one that the route allows.
    pub method: Method,
    /// The path, as routed.
    pub path: String,
    /// What follows the question mark, not decoded; empty if nothing does.
    pub query: String,
    /// The `accept` header, if there is one.
    pub accept: Option<String>,
}

/// What a handler answers. An `Err` becomes 500 with its text.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Response {
    /// The status.
    pub status: StatusCode,
    /// The content type.
    pub content_type: &'static str,
    /// The body.
    pub body: Bytes,
}

/// Methods that a route takes; others get 405.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Methods {
    /// All of them.
    Any,
    /// This one.
    Only(Method),
}

type Handler = Box<dyn Fn(Request) -> Pin<Box<dyn Future<Output = Response> + Send>> + Send + Sync>;

/// Routes by exact path.
#[derive(Default)]
pub struct Server {
    routes: BTreeMap<&'static str, (Methods, Handler)>,
}

impl Response {
    /// Plain text.
    pub fn text(status: StatusCode, body: impl Into<String>) -> Self {
        Self::new(status, "text/plain", body.into())
    }

    /// 200 with a body of another type.
    pub fn ok(content_type: &'static str, body: impl Into<Bytes>) -> Self {
        Self::new(StatusCode::OK, content_type, body)
    }

    fn new(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Self {
        Self { status, content_type, body: body.into() }
    }
}

impl<E: Display> From<Result<Self, E>> for Response {
    fn from(result: Result<Self, E>) -> Self {
        result.unwrap_or_else(|error| {
            Self::text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n"))
        })
    }
}

impl Server {
    /// A server of which every path is 404.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a route. A handler returns a [`Response`] or a `Result` of one.
    #[must_use]
    pub fn route<F, R>(
        mut self,
        path: &'static str,
        methods: Methods,
        handler: impl Fn(Request) -> F + Send + Sync + 'static,
    ) -> Self
    where
        F: Future<Output = R> + Send + 'static,
        R: Into<Response>,
    {
        let handler: Handler = Box::new(move |request| {
            let answer = handler(request);
            Box::pin(async move { answer.await.into() })
        });
        self.routes.insert(path, (methods, handler));
        self
    }

    /// Serves a listener from a task of `tasks`, until they stop: the listener then closes at once, and requests
    /// in flight are finished. Call it once a listener.
    pub fn serve(self: &Arc<Self>, tasks: &Tasks, listener: Listener) {
        let server = Arc::clone(self);
        let connections = tasks.child();
        let places = Arc::new(Semaphore::new(CONNECTIONS));
        tasks.spawn(|draining| async move {
            let accepted = accept_loop(listener, draining, |stream, _| {
                // One too many is closed unread.
                if let Ok(place) = Arc::clone(&places).try_acquire_owned() {
                    let server = Arc::clone(&server);
                    connections.spawn(|draining| async move {
                        server.connection(stream, draining).await;
                        drop(place);
                    });
                }
            });
            if let Err(error) = accepted.await {
                tracing::error!(%error, "a listener of the admin, metrics or readiness server failed");
            }
            connections.finished().await;
        });
    }

    async fn connection(self: Arc<Self>, stream: TcpStream, draining: Draining) {
        let stream = match tokio::net::TcpStream::from_std(stream) {
            Ok(stream) => stream,
            Err(error) => return tracing::debug!(%error, "cannot serve a connection"),
        };
        let service = service_fn(|request| self.answer(request));
        let mut connection = pin!(
            http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_TIMEOUT)
                .max_buf_size(HEAD_LIMIT)
                .half_close(true)
                .serve_connection(TokioIo::new(stream), service)
        );
        let served = tokio::select! {
            served = connection.as_mut() => served,
            () = draining.stopping() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = served {
            // Clients that go away or time out; hyper has answered those that talk nonsense with 400.
            tracing::debug!(%error, "an HTTP connection failed");
        }
    }

    async fn answer(
        &self,
        request: ::http::Request<Incoming>,
    ) -> Result<::http::Response<Full<Bytes>>, Infallible> {
        let uri = request.uri();
        let (response, allow) = match self.routes.get(uri.path()) {
            None => (Response::text(StatusCode::NOT_FOUND, "not found\n"), None),
            Some((Methods::Only(method), _)) if request.method() != method => (
                Response::text(StatusCode::METHOD_NOT_ALLOWED, "method not allowed\n"),
                Some(method),
            ),
            Some((Methods::Any | Methods::Only(_), handler)) => {
                let accept = request.headers().get(ACCEPT).and_then(|value| value.to_str().ok());
                let request = Request {
                    method: request.method().clone(),
                    path: uri.path().to_owned(),
                    query: uri.query().unwrap_or_default().to_owned(),
                    accept: accept.map(str::to_owned),
                };
                (handler(request).await, None)
            }
        };
        let mut answer = ::http::Response::new(Full::new(response.body));
        *answer.status_mut() = response.status;
        answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(response.content_type));
        if let Some(method) = allow.and_then(|method| HeaderValue::from_str(method.as_str()).ok()) {
            answer.headers_mut().insert(ALLOW, method);
        }
        Ok(answer)
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.routes.keys()).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, SocketAddr};

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream as Stream;
    use tokio::sync::Notify;

    use super::*;

    fn serve(server: Server) -> (Tasks, SocketAddr) {
        let listener = Listener::bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let address = listener.local_addr().unwrap();
        let tasks = Tasks::new();
        Arc::new(server).serve(&tasks, listener);
        (tasks, address)
    }

    /// Sends bytes, closes that direction, and reads to the end.
    async fn exchange(address: SocketAddr, bytes: &[u8]) -> String {
        let mut stream = Stream::connect(address).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    fn example() -> Server {
        Server::new()
            .route("/any", Methods::Any, |request| async move {
                let Request { method, query, accept, .. } = request;
                Response::ok("text/x", format!("{method} {query} {accept:?}"))
            })
            .route("/post", Methods::Only(Method::POST), |_| async {
                Response::text(StatusCode::OK, "done")
            })
            .route("/fails", Methods::Any, |_| async {
                Err::<Response, _>(std::io::Error::other("out of luck"))
            })
    }

    #[tokio::test]
    async fn requests_get_what_the_spec_says() {
        let (_tasks, address) = serve(example());
        let long = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(9000));
        for (request, status, text) in [
            ("GET /any?a=1%20 HTTP/1.1\r\naccept: x/y\r\n\r\n", "200", "GET a=1%20 Some(\"x/y\")"),
            ("DELETE /any HTTP/1.1\r\n\r\n", "200", "DELETE  None"),
            ("POST /post HTTP/1.1\r\ncontent-length: 2\r\n\r\nxx", "200", "done"),
            ("GET /post HTTP/1.1\r\n\r\n", "405", "allow: POST"),
            ("GET /fails HTTP/1.1\r\n\r\n", "500", "out of luck\n"),
            ("GET /other HTTP/1.1\r\n\r\n", "404", "not found"),
            ("\x16\x03\x01 no http\r\n\r\n", "400", ""),
            (&long, "4", ""),
        ] {
            let answer = exchange(address, request.as_bytes()).await;
            assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{request:.40}: {answer}");
            assert!(answer.contains(text), "{request:.40}: {answer}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_head_is_cut_off() {
        let (_tasks, address) = serve(example());
        let mut stream = Stream::connect(address).await.unwrap();
        stream.write_all(b"GET /any HTTP/1.1\r\n").await.unwrap();
        let start = tokio::time::Instant::now();
        let mut answer = Vec::new();
        // Time is paused: it advances when nothing else can happen.
        let _ = stream.read_to_end(&mut answer).await;
        assert_eq!(start.elapsed().as_secs(), HEAD_TIMEOUT.as_secs());
    }

    #[tokio::test]
    async fn a_drain_closes_the_listener_and_finishes_requests() {
        let entered = Arc::new(Notify::new());
        let release = Arc::new(Notify::new());
        let (inside, go) = (Arc::clone(&entered), Arc::clone(&release));
        let server = Server::new().route("/slow", Methods::Any, move |_| {
            let (inside, go) = (Arc::clone(&inside), Arc::clone(&go));
            async move {
                inside.notify_one();
                go.notified().await;
                Response::text(StatusCode::OK, "finished")
            }
        });
        let (tasks, address) = serve(server);
        let mut idle = Stream::connect(address).await.unwrap();
        let request = exchange(address, b"GET /slow HTTP/1.1\r\n\r\n");
        let drain = async {
            entered.notified().await;
            let release = async {
                // The listener is gone while the request is still in flight.
                while Stream::connect(address).await.is_ok() {
                    tokio::task::yield_now().await;
                }
                assert_eq!(idle.read(&mut [0]).await.unwrap(), 0, "idle connections close");
                release.notify_one();
            };
            let (graceful, ()) = tokio::join!(tasks.drain(Duration::from_secs(10)), release);
            assert!(graceful);
        };
        let (answer, ()) = tokio::join!(request, drain);
        assert!(answer.ends_with("finished"), "{answer}");
    }
}
