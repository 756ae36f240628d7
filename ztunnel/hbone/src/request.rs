//! A CONNECT and its answer, apart from how HTTP/2 frames them.

use crate::engine::{Request, Response};
use crate::{Authority, Baggage, Forwarded, InvalidAuthority, TraceParent};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use mesh_core::NetworkId;
use std::{error::Error, fmt};

const BAGGAGE: HeaderName = HeaderName::from_static("baggage");
const FORWARDED: HeaderName = http::header::FORWARDED;
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const FORWARDED_NETWORK: HeaderName = HeaderName::from_static("x-forwarded-network");

/// What a CONNECT asks for and says.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct TunnelRequest {
    /// The target.
    pub authority: Authority,
    /// What the client says of itself.
    pub baggage: Option<Baggage>,
    /// On whose behalf.
    pub forwarded: Forwarded,
    /// The place in a trace.
    pub trace: TraceParent,
    /// The client's network, in the inner of two tunnels.
    pub forwarded_network: Option<NetworkId>,
}

/// What a 200 says besides.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct ResponseHead {
    /// What the workload that took the tunnel says of itself.
    pub baggage: Option<Baggage>,
}

/// A request that is answered with 400.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum BadRequest {
    /// Not a CONNECT.
    Method(Method),
    /// The target makes no sense.
    Authority(InvalidAuthority),
}

impl fmt::Display for BadRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Method(method) => write!(f, "expected method CONNECT, got {method}"),
            Self::Authority(invalid) => invalid.fmt(f),
        }
    }
}

impl Error for BadRequest {}

fn put(headers: &mut HeaderMap, name: HeaderName, text: &str) {
    // What is not a header value is better not said.
    if !text.is_empty()
        && let Ok(value) = HeaderValue::from_str(text)
    {
        headers.insert(name, value);
    }
}

impl TunnelRequest {
    /// A request for this target that says nothing else.
    #[must_use]
    pub fn to(authority: Authority) -> Self {
        Self {
            authority,
            baggage: None,
            forwarded: Forwarded::default(),
            trace: TraceParent::random(),
            forwarded_network: None,
        }
    }

    pub(crate) fn to_http(&self) -> Request {
        let mut headers = HeaderMap::new();
        if let Some(baggage) = &self.baggage {
            put(&mut headers, BAGGAGE, &baggage.to_string());
        }
        put(&mut headers, FORWARDED, &self.forwarded.to_string());
        put(&mut headers, TRACEPARENT, &self.trace.to_string());
        if let Some(network) = &self.forwarded_network {
            put(&mut headers, FORWARDED_NETWORK, network.as_str());
        }
        Request { method: Method::CONNECT, authority: self.authority.to_string(), headers }
    }

    pub(crate) fn from_http(request: &Request) -> Result<Self, BadRequest> {
        if request.method != Method::CONNECT {
            return Err(BadRequest::Method(request.method.clone()));
        }
        let headers = &request.headers;
        let one = |name: HeaderName| headers.get(name).map(HeaderValue::as_bytes);
        Ok(Self {
            authority: request.authority.parse().map_err(BadRequest::Authority)?,
            baggage: Baggage::parse(headers.get_all(BAGGAGE).iter().map(HeaderValue::as_bytes)),
            forwarded: one(FORWARDED).map(Forwarded::parse).unwrap_or_default(),
            trace: one(TRACEPARENT)
                .and_then(TraceParent::parse)
                .unwrap_or_else(TraceParent::random),
            forwarded_network: one(FORWARDED_NETWORK)
                .and_then(|bytes| std::str::from_utf8(bytes).ok()?.parse().ok()),
        })
    }
}

impl ResponseHead {
    pub(crate) fn to_http(&self) -> Response {
        let mut headers = HeaderMap::new();
        if let Some(baggage) = &self.baggage {
            put(&mut headers, BAGGAGE, &baggage.to_string());
        }
        Response { status: StatusCode::OK, headers }
    }

    pub(crate) fn from_http(headers: &HeaderMap) -> Self {
        let lines = headers.get_all(BAGGAGE);
        Self { baggage: Baggage::parse(lines.iter().map(HeaderValue::as_bytes)) }
    }
}

/// The far end answered with another status than 200. In Istio's words.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Refused(pub StatusCode);

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "http status: {}", self.0)
    }
}

impl Error for Refused {}
