//! `resolv.conf`, as far as we use it.

use std::net::{IpAddr, SocketAddr};

/// Where to ask, and what to append.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct ResolvConf {
    /// Name servers, in order.
    pub servers: Vec<SocketAddr>,
    /// Search domains, in lower case and without a final dot.
    pub search: Vec<String>,
}

/// The resolvers of the C library look at no more.
const SERVERS: usize = 3;

impl ResolvConf {
    /// Reads the text. What it does not know it passes over, as resolvers do.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let mut found = Self::default();
        for line in text.lines() {
            let mut words = line.split_ascii_whitespace();
            match words.next() {
                Some("nameserver") if found.servers.len() < SERVERS => {
                    // A scope (`%eth0`) has no meaning in another namespace.
                    let ip = words.next().and_then(|word| word.parse::<IpAddr>().ok());
                    found.servers.extend(ip.map(|ip| SocketAddr::new(ip, 53)));
                }
                // The last one counts.
                Some("search" | "domain") => {
                    let domain = |word: &str| word.trim_end_matches('.').to_ascii_lowercase();
                    found.search = words.map(domain).filter(|word| !word.is_empty()).collect();
                }
                _ => {}
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_kubelet_writes() {
        let text = "search a.svc.cluster.local svc.cluster.local.\nnameserver 10.0.0.10\n\
                    # nameserver 9.9.9.9\nnameserver fd00::a\nnameserver fe80::1%eth0\noptions ndots:5\n";
        let found = ResolvConf::parse(text);
        let servers: Vec<SocketAddr> =
            vec!["10.0.0.10:53".parse().unwrap(), "[fd00::a]:53".parse().unwrap()];
        assert_eq!(found.servers, servers);
        assert_eq!(found.search, ["a.svc.cluster.local", "svc.cluster.local"]);
        assert_eq!(ResolvConf::parse("nameserver\nsearch\n"), ResolvConf::default());
    }
}
