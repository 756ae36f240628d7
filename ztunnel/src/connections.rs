//! The connections of one pod that live now, for the dump.

use mesh_core::Hostname;
use serde_json::{Value, json};
use slab::Slab;
use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// Which way a connection goes, as seen from the pod.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Direction {
    /// To the pod.
    Inbound,
    /// From the pod.
    Outbound,
}

/// What carries a connection. The words are those of Istio's dump.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Carrier {
    /// A tunnel.
    Hbone,
    /// A tunnel in a tunnel.
    DoubleHbone,
    /// Nothing: plain TCP.
    Tcp,
}

impl Carrier {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Hbone => "HBONE",
            Self::DoubleHbone => "DOUBLEHBONE",
            Self::Tcp => "TCP",
        }
    }
}

/// Where a connection was meant to go.
#[derive(Clone, Debug)]
pub(crate) enum Original {
    /// Nobody says.
    Unknown,
    /// To this address.
    Addr(SocketAddr),
    /// To this service.
    Host(Hostname),
}

impl Original {
    fn dump(&self) -> Value {
        match self {
            Self::Unknown => Value::Null,
            Self::Addr(address) => address.to_string().into(),
            Self::Host(host) => host.as_str().into(),
        }
    }
}

/// One line of the dump.
#[derive(Clone, Debug)]
pub(crate) struct Live {
    pub(crate) direction: Direction,
    pub(crate) source: SocketAddr,
    pub(crate) original: Original,
    pub(crate) actual: SocketAddr,
    pub(crate) carrier: Carrier,
}

/// The live connections of one pod.
#[derive(Clone, Debug, Default)]
pub(crate) struct Connections(Arc<Mutex<Slab<Live>>>);

/// A connection is on the list for as long as this lives.
#[derive(Debug)]
#[must_use]
pub(crate) struct Listed {
    list: Connections,
    key: usize,
}

impl Connections {
    fn slots(&self) -> MutexGuard<'_, Slab<Live>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a connection on the list.
    pub(crate) fn list(&self, live: Live) -> Listed {
        let key = self.slots().insert(live);
        Listed { list: self.clone(), key }
    }

    /// The two lists, in the shape of Istio's `workloadState`.
    pub(crate) fn dump(&self) -> Value {
        let slots = self.slots();
        let of = |direction| -> Vec<Value> {
            slots
                .iter()
                .filter(|(_, live)| live.direction == direction)
                .map(|(_, live)| {
                    json!({
                        "src": live.source.to_string(),
                        "originalDst": live.original.dump(),
                        "actualDst": live.actual.to_string(),
                        "protocol": live.carrier.as_str(),
                    })
                })
                .collect()
        };
        json!({ "inbound": of(Direction::Inbound), "outbound": of(Direction::Outbound) })
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        let mut slots = self.list.slots();
        slots.try_remove(self.key);
        if slots.is_empty() {
            slots.shrink_to_fit();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_what_lives() {
        let list = Connections::default();
        let live = |direction, carrier| Live {
            direction,
            source: "10.0.0.1:1000".parse().unwrap(),
            original: Original::Addr("10.0.0.9:80".parse().unwrap()),
            actual: "10.0.0.2:15008".parse().unwrap(),
            carrier,
        };
        let one = list.list(live(Direction::Outbound, Carrier::Hbone));
        let two = list.list(live(Direction::Inbound, Carrier::Tcp));
        drop(two);
        let expect = json!({
            "inbound": [],
            "outbound": [{
                "src": "10.0.0.1:1000", "originalDst": "10.0.0.9:80",
                "actualDst": "10.0.0.2:15008", "protocol": "HBONE",
            }],
        });
        assert_eq!(list.dump(), expect);
        drop(one);
        assert_eq!(list.dump(), json!({ "inbound": [], "outbound": [] }));
    }
}
