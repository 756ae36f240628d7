//! Addresses by role. A bare `SocketAddr` is a place to dial; what we were told has a type.

use crate::NetworkId;
use std::{
    error::Error,
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

/// Where the connection came from, in canonical form (IPv4-mapped IPv6 is IPv4).
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct PeerAddr(SocketAddr);

/// Where the application meant to go, before redirection.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct OriginalDst(SocketAddr);

/// An IP address is only unique within its network.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct NetworkAddress {
    /// The network.
    pub network: NetworkId,
    /// The address in that network.
    pub ip: IpAddr,
}

/// A block of addresses. Its host bits need not be zero.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Cidr {
    ip: IpAddr,
    len: u8,
}

/// The prefix is longer than the address.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct InvalidCidr;

macro_rules! role {
    ($($name:ident),*) => {$(
        impl From<SocketAddr> for $name {
            fn from(addr: SocketAddr) -> Self {
                Self(SocketAddr::new(addr.ip().to_canonical(), addr.port()))
            }
        }

        impl From<$name> for SocketAddr {
            fn from(addr: $name) -> Self {
                addr.0
            }
        }
    )*};
}

role!(PeerAddr, OriginalDst);

impl Cidr {
    /// The block of the addresses that share their first `len` bits with `ip`.
    ///
    /// # Errors
    ///
    /// Returns [`InvalidCidr`] where the address has fewer than `len` bits.
    pub fn new(ip: IpAddr, len: u8) -> Result<Self, InvalidCidr> {
        let bits = if ip.is_ipv4() { 32 } else { 128 };
        if len > bits {
            return Err(InvalidCidr);
        }
        // An IPv4-mapped block is IPv4, as the addresses that it is compared with are.
        match (ip.to_canonical(), len.checked_sub(96)) {
            (v4 @ IpAddr::V4(_), Some(len)) if ip.is_ipv6() => Ok(Self { ip: v4, len }),
            _ => Ok(Self { ip, len }),
        }
    }

    /// Whether the address is in the block. One family never holds the other's.
    #[must_use]
    pub fn contains(&self, ip: IpAddr) -> bool {
        let same = match (self.ip, ip.to_canonical()) {
            (IpAddr::V4(a), IpAddr::V4(b)) => (a.to_bits() ^ b.to_bits()).leading_zeros(),
            (IpAddr::V6(a), IpAddr::V6(b)) => (a.to_bits() ^ b.to_bits()).leading_zeros(),
            (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => return false,
        };
        same >= u32::from(self.len)
    }
}

impl Cidr {
    /// The block that holds one address.
    #[must_use]
    pub fn host(ip: IpAddr) -> Self {
        let ip = ip.to_canonical();
        Self { ip, len: if ip.is_ipv4() { 32 } else { 128 } }
    }

    /// An address in the block: the one that it was made with.
    #[must_use]
    pub const fn ip(&self) -> IpAddr {
        self.ip
    }

    /// How many bits the addresses of the block share.
    #[must_use]
    pub const fn prefix_len(&self) -> u8 {
        self.len
    }

    /// The same block, with its host bits zero: equal for all that hold the same addresses.
    #[must_use]
    pub fn masked(&self) -> Self {
        let len = u32::from(self.len);
        let ip = match self.ip {
            IpAddr::V4(ip) => {
                Ipv4Addr::from(ip.to_bits() & !u32::MAX.checked_shr(len).unwrap_or(0)).into()
            }
            IpAddr::V6(ip) => {
                Ipv6Addr::from(ip.to_bits() & !u128::MAX.checked_shr(len).unwrap_or(0)).into()
            }
        };
        Self { ip, len: self.len }
    }

    /// The address, where the block holds just one.
    #[must_use]
    pub const fn single(&self) -> Option<IpAddr> {
        match (self.ip, self.len) {
            (IpAddr::V4(_), 32) | (IpAddr::V6(_), 128) => Some(self.ip),
            (IpAddr::V4(_) | IpAddr::V6(_), _) => None,
        }
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.ip, self.len)
    }
}

impl fmt::Display for NetworkAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.ip)
    }
}

impl fmt::Display for PeerAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for OriginalDst {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl PeerAddr {
    /// The address.
    #[must_use]
    pub const fn ip(&self) -> IpAddr {
        self.0.ip()
    }
}

impl OriginalDst {
    /// The address.
    #[must_use]
    pub const fn ip(&self) -> IpAddr {
        self.0.ip()
    }

    /// The port.
    #[must_use]
    pub const fn port(&self) -> u16 {
        self.0.port()
    }
}

impl fmt::Display for InvalidCidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("prefix is longer than the address")
    }
}

impl Error for InvalidCidr {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contains() {
        for (name, block, len, ip, expect) in [
            ("inside", "10.1.0.0", 16, "10.1.2.3", true),
            ("outside", "10.1.0.0", 16, "10.2.2.3", false),
            ("host bits set", "10.1.9.9", 16, "10.1.2.3", true),
            ("all of v4", "1.2.3.4", 0, "9.9.9.9", true),
            ("all of v6 is not v4", "::", 0, "9.9.9.9", false),
            ("one host", "10.1.0.1", 32, "10.1.0.1", true),
            ("mapped address", "10.1.0.0", 16, "::ffff:10.1.2.3", true),
            ("mapped block", "::ffff:10.1.0.0", 112, "10.1.2.3", true),
            ("v6", "fd00::", 8, "fdff::1", true),
        ] {
            let block = Cidr::new(block.parse().unwrap(), len).unwrap();
            assert_eq!(block.contains(ip.parse().unwrap()), expect, "{name}");
        }
        assert_eq!(Cidr::new("10.0.0.0".parse().unwrap(), 33), Err(InvalidCidr));
    }

    #[test]
    fn masks() {
        for (ip, len, expect) in [
            ("10.1.2.3", 16, "10.1.0.0/16"),
            ("10.1.2.3", 0, "0.0.0.0/0"),
            ("10.1.2.3", 32, "10.1.2.3/32"),
            ("fd00:1:2::3", 32, "fd00:1::/32"),
            ("fd00::1", 0, "::/0"),
            ("fd00::1", 128, "fd00::1/128"),
        ] {
            let block = Cidr::new(ip.parse().unwrap(), len).unwrap();
            assert_eq!(block.masked().to_string(), expect);
        }
    }
}
