//! The `forwarded` header (RFC 7239) as Istio uses it: the client's address, and the service it meant.

use mesh_core::Hostname;
use std::{fmt, net::SocketAddr};

/// On whose behalf a tunnel is opened.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Forwarded {
    /// The client. Sent, and not read: the TCP peer is what is believed.
    pub client: Option<SocketAddr>,
    /// The service that the client meant.
    pub host: Option<Hostname>,
}

impl Forwarded {
    /// Reads the header; what makes no sense is not there.
    #[must_use]
    pub fn parse(line: &[u8]) -> Self {
        let text = std::str::from_utf8(line).ok().filter(|text| text.is_ascii()).unwrap_or("");
        let part = |key: &str| {
            let value = text.split(';').find_map(|part| part.trim().strip_prefix(key))?;
            let bare = value.strip_prefix('"').and_then(|value| value.strip_suffix('"'));
            Some(bare.unwrap_or(value))
        };
        Self {
            client: part("for=").and_then(|value| value.parse().ok()),
            host: part("host=").and_then(|value| value.parse().ok()),
        }
    }
}

impl fmt::Display for Forwarded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(client) = self.client {
            write!(f, "for=\"{client}\"")?;
        }
        if let Some(host) = &self.host {
            write!(f, "{}host={host}", if self.client.is_some() { ";" } else { "" })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::{option, prelude::*};

    #[test]
    fn reads() {
        for (text, host) in [
            ("for=\"10.1.0.2:38340\"", None),
            (
                "for=\"10.1.0.2:1\";host=web.shop.svc.cluster.local",
                Some("web.shop.svc.cluster.local"),
            ),
            ("host=\"web.shop\"", Some("web.shop")),
            ("by=x; host=web", Some("web")),
            ("host=", None),
            ("host=\"", None),
            ("host=é", None),
            ("", None),
        ] {
            let read = Forwarded::parse(text.as_bytes()).host;
            assert_eq!(read.as_ref().map(Hostname::as_str), host, "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn what_is_printed_parses_to_the_same(
            client: Option<SocketAddr>,
            host in option::of("[a-z][a-z0-9.-]{0,30}"),
        ) {
            // A scope and a flow are not part of what is printed.
            let client = client.map(|c| SocketAddr::new(c.ip(), c.port()));
            let forwarded = Forwarded { client, host: host.map(|h| h.parse().unwrap()) };
            prop_assert_eq!(Forwarded::parse(forwarded.to_string().as_bytes()), forwarded);
        }
    }
}
