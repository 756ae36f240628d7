//! The fields of requests and answers, and what makes them malformed: RFC 9113, sections 8.2, 8.3 and 8.5.

use super::hpack::{AUTHORITY, Encoder, METHOD, STATUS, STATUS_200};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};

/// A request. Its scheme and path, if it has them, are checked and not kept.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) method: Method,
    /// Empty where there is none.
    pub(crate) authority: String,
    pub(crate) headers: HeaderMap,
}

/// The head of an answer.
#[derive(Clone, Debug)]
pub(crate) struct Response {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
}

impl Request {
    pub(super) fn encode(&self, out: &mut Vec<u8>, first: bool) {
        let mut encoder = Encoder::new(out, first);
        encoder.indexed(METHOD, self.method.as_str().as_bytes());
        encoder.indexed(AUTHORITY, self.authority.as_bytes());
        rest(&mut encoder, &self.headers);
    }
}

impl Response {
    pub(super) fn encode(&self, out: &mut Vec<u8>, first: bool) {
        let mut encoder = Encoder::new(out, first);
        if self.status == StatusCode::OK {
            encoder.known(STATUS_200);
        } else {
            encoder.indexed(STATUS, self.status.as_str().as_bytes());
        }
        rest(&mut encoder, &self.headers);
    }
}

fn rest(encoder: &mut Encoder<'_>, headers: &HeaderMap) {
    for (name, value) in headers {
        encoder.literal(name.as_str().as_bytes(), value.as_bytes());
    }
}

/// Why a list of fields is not a message.
pub(super) type Malformed = &'static str;

/// A list of fields, as it is read.
#[derive(Debug, Default)]
pub(super) struct Fields {
    method: Option<Method>,
    authority: Option<String>,
    status: Option<StatusCode>,
    scheme: bool,
    path: bool,
    headers: HeaderMap,
    length: Option<u64>,
    /// Its size by section 6.5.2, in bytes.
    size: usize,
    malformed: Option<Malformed>,
}

impl Fields {
    /// Adds a field of a list that may be no longer than this.
    pub(super) fn add(&mut self, name: &[u8], value: &[u8], most: usize) {
        self.size = self.size.saturating_add(name.len() + value.len() + 32);
        // What is wrong stays wrong: the rest is read for the sake of the tables.
        if self.size > most {
            self.malformed = Some("a list of headers that is too long");
        }
        if self.malformed.is_none()
            && let Err(malformed) = self.try_add(name, value)
        {
            self.malformed = Some(malformed);
        }
    }

    fn try_add(&mut self, name: &[u8], value: &[u8]) -> Result<(), Malformed> {
        if let Some(pseudo) = name.strip_prefix(b":") {
            if !self.headers.is_empty() {
                return Err("a pseudo-header behind a header");
            }
            return self.add_pseudo(pseudo, value);
        }
        if name.iter().any(u8::is_ascii_uppercase) {
            return Err("a header name in upper case");
        }
        let name = HeaderName::from_bytes(name).map_err(|_invalid| "a header name that is none")?;
        let value =
            HeaderValue::from_bytes(value).map_err(|_invalid| "a header value that is none")?;
        match name.as_str() {
            "connection" | "proxy-connection" | "keep-alive" | "transfer-encoding" | "upgrade" => {
                return Err("a header of HTTP/1.1 connections");
            }
            "te" if value != "trailers" => return Err("TE other than trailers"),
            "content-length" => {
                let text = value.to_str().unwrap_or_default();
                let length = text.parse().map_err(|_invalid| "a content-length that is none")?;
                if self.length.replace(length).is_some_and(|before| before != length) {
                    return Err("two lengths of one content");
                }
            }
            _ => {}
        }
        self.headers.append(name, value);
        Ok(())
    }

    fn add_pseudo(&mut self, name: &[u8], value: &[u8]) -> Result<(), Malformed> {
        let twice = match name {
            b"method" => {
                let method =
                    Method::from_bytes(value).map_err(|_invalid| "a method that is none")?;
                self.method.replace(method).is_some()
            }
            b"authority" => {
                let text = std::str::from_utf8(value)
                    .map_err(|_invalid| "an authority that is no text")?;
                self.authority.replace(text.to_owned()).is_some()
            }
            b"status" => {
                let status =
                    StatusCode::from_bytes(value).map_err(|_invalid| "a status that is none")?;
                self.status.replace(status).is_some()
            }
            b"scheme" => std::mem::replace(&mut self.scheme, true),
            b"path" if value.is_empty() => return Err("an empty path"),
            b"path" => std::mem::replace(&mut self.path, true),
            _ => return Err("an unknown pseudo-header"),
        };
        if twice { Err("a pseudo-header that stands twice") } else { Ok(()) }
    }

    /// The request that these are, and how long it says that its content is.
    pub(super) fn request(self) -> Result<(Request, Option<u64>), Malformed> {
        if let Some(malformed) = self.malformed {
            return Err(malformed);
        }
        let method = self.method.ok_or("a request without a method")?;
        if self.status.is_some() {
            return Err("a request with a status");
        }
        let connect = method == Method::CONNECT;
        if connect && (self.scheme || self.path || self.authority.is_none()) {
            return Err("a CONNECT with a scheme or a path, or without an authority");
        }
        let complete = self.scheme && self.path;
        if !connect && !complete {
            return Err("a request without a scheme or a path");
        }
        let authority = self.authority.unwrap_or_default();
        // A CONNECT has no content: what follows is the tunnel's.
        let length = self.length.filter(|_| !connect);
        Ok((Request { method, authority, headers: self.headers }, length))
    }

    /// The answer that these are.
    pub(super) fn response(self) -> Result<Response, Malformed> {
        if let Some(malformed) = self.malformed {
            return Err(malformed);
        }
        if self.method.is_some() || self.authority.is_some() || self.scheme || self.path {
            return Err("an answer with the pseudo-headers of a request");
        }
        let status = self.status.ok_or("an answer without a status")?;
        Ok(Response { status, headers: self.headers })
    }

    /// The fields at the end of a stream, which nobody is told of.
    pub(super) fn trailers(self) -> Result<(), Malformed> {
        if let Some(malformed) = self.malformed {
            return Err(malformed);
        }
        let pseudo = self.method.is_some() || self.authority.is_some() || self.status.is_some();
        if pseudo || self.scheme || self.path { Err("a pseudo-header at the end") } else { Ok(()) }
    }
}
