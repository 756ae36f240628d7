//! Invariants of what reads files and responses. Plain functions: the tests drive them with anything.

use std::collections::BTreeMap;

use mesh_proto::envoy::service::discovery::v3::{DeltaDiscoveryResponse, Resource};
use mesh_proto::istio::security::Authorization;
use mesh_proto::istio::workload::Address;
use prost::Message;

use crate::file::{self, LoadError, Source};
use crate::session::{Chunk, Kind, Session};
use crate::{Handler, Node, Rejected, Update};

/// Keeps what it is given, encoded, by name.
#[derive(Default, PartialEq, Debug)]
struct Kept(BTreeMap<String, usize>);

impl<T: Message + Default> Handler<T> for Kept {
    fn handle(&mut self, updates: Vec<Update<T>>) -> Result<(), Vec<Rejected>> {
        for update in updates {
            match update {
                Update::Upsert { name, resource } => {
                    let bytes = resource.encode_to_vec();
                    assert!(T::decode(bytes.as_slice()).is_ok(), "{name} cannot be decoded again");
                    self.0.insert(name, bytes.len());
                }
                Update::Unreadable { .. } => {}
                Update::Remove { name } => drop(self.0.remove(&name)),
            }
        }
        Ok(())
    }
}

/// A local file: reading ends, is the same each time, and a fault has a place within the text, and words.
///
/// # Panics
///
/// Panics where that does not hold.
pub fn local_file(bytes: &[u8]) {
    let Ok(text) = String::from_utf8(bytes.to_vec()) else { return };
    let lines = text.split(['\n', '\r']).count();
    let source = Source::Inline(text);
    let (mut once, mut twice) = (Kept::default(), Kept::default());
    let first = file::load(&source, &mut once);
    let second = file::load(&source, &mut twice);
    assert_eq!(once, twice);
    match (first, second) {
        (Ok((_, first)), Ok((_, second))) => {
            assert_eq!(first, second);
            assert_eq!(once.0.len(), first.changed, "each name once");
        }
        (
            Err(LoadError::Invalid { source: first, .. }),
            Err(LoadError::Invalid { source: second, .. }),
        ) => {
            assert_eq!(first, second);
            assert!(
                (1..=lines.saturating_add(1)).contains(&first.line()),
                "{first} of {lines} lines"
            );
            assert!(!first.to_string().ends_with(": "), "{first}");
            assert!(!first.to_string().contains(char::is_control), "{first}");
        }
        (first, second) => {
            let not_text =
                |loaded: &Result<_, LoadError>| matches!(loaded, Err(LoadError::NotText { .. }));
            assert!(not_text(&first) && not_text(&second), "{first:?}, then {second:?}");
        }
    }
}

/// A response: each is answered, with its nonce and type; what was taken is claimed, and what was not is named.
///
/// # Panics
///
/// Panics where that does not hold.
pub fn response(bytes: &[u8]) {
    // As it is, and as the payload of each type.
    if let Ok(response) = DeltaDiscoveryResponse::decode(bytes) {
        take(response);
    }
    for kind in Kind::ALL {
        let any = prost_types::Any { type_url: kind.url().to_owned(), value: bytes.to_vec() };
        take(DeltaDiscoveryResponse {
            type_url: kind.url().to_owned(),
            nonce: "1".to_owned(),
            resources: vec![Resource {
                name: "x".to_owned(),
                resource: Some(any),
                ..Resource::default()
            }],
            removed_resources: vec!["y".to_owned()],
            ..DeltaDiscoveryResponse::default()
        });
    }
}

fn take(response: DeltaDiscoveryResponse) {
    for on_demand in [false, true] {
        let mut session = Session::new(Node::default(), on_demand);
        let mut kept = Kept::default();
        let (nonce, type_url) = (response.nonce.clone(), response.type_url.clone());
        let mut round = session.receive(response.clone());
        while let Some(chunk) = session.next(&mut round) {
            let result = match chunk {
                Chunk::Addresses(updates) => Handler::<Address>::handle(&mut kept, updates),
                Chunk::Policies(updates) => Handler::<Authorization>::handle(&mut kept, updates),
            };
            round.handled(result);
        }
        let answer = session.finish(round);
        assert_eq!((&answer.request.response_nonce, &answer.request.type_url), (&nonce, &type_url));
        assert_eq!(answer.request.error_detail.is_none(), answer.rejected.is_empty());
        let known = Kind::ALL.map(|kind| session.known(kind)).iter().sum::<usize>();
        assert_eq!(known, kept.0.len());
        if Kind::from_url(&type_url).is_none() {
            assert!(kept.0.is_empty() && answer.rejected.is_empty() && answer.first.is_none());
        }
        assert!(answer.first.is_none() || answer.rejected.is_empty());
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    /// What files are made of, in any order.
    fn pieces() -> impl Strategy<Value = String> {
        let piece = prop::sample::select(vec![
            "workloads:",
            "services:",
            "policies:",
            "uid: a",
            "namespace: n",
            "hostname: h",
            "\n",
            "\n- ",
            "\n  ",
            "\n    ",
            "- ",
            "{",
            "}",
            "[",
            "]",
            ",",
            ": ",
            "&a ",
            "*a",
            "!Exact ",
            "!!str ",
            "\"",
            "'",
            "|\n",
            ">-\n",
            "#",
            "? ",
            "---\n",
            "...\n",
            "%YAML 1.2\n",
            "é",
            "\t",
            "\r",
            "~",
            "80",
            "rules:",
            "ports:",
            "waypoint:",
            "\u{feff}",
            "destination:",
            "\\x",
            "\u{85}",
            "\0",
            "<<: ",
            "@",
            "`",
        ]);
        prop::collection::vec(piece, 0..40).prop_map(|pieces| pieces.concat())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn local_files(text in pieces()) {
            super::local_file(text.as_bytes());
        }

        #[test]
        fn responses(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            super::response(&bytes);
        }
    }
}
