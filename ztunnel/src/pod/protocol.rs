//! ZDS, the protocol of the CNI agent: what its packets mean, and what ours look like.
//!
//! One protobuf message a packet, at most [`MAX_PACKET`] bytes, lock-step: each packet from the
//! agent is answered by exactly one `Ack` before the next one comes, and we send nothing else.

use mesh_core::{Namespace, ServiceAccount, Text};
use mesh_proto::istio::workload::zds::{
    Ack, Version, WorkloadRequest, WorkloadResponse, ZdsHello, workload_request,
    workload_response::Payload,
};
use mesh_state::PodInfo;
use prost::Message;
use std::{error::Error, fmt};

/// The longest packet, in bytes, either way.
pub const MAX_PACKET: usize = 1024;

/// What the agent says.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Request {
    /// Serve this pod; its network namespace came along as a descriptor.
    Add {
        /// The Kubernetes uid of the pod.
        uid: String,
        /// Who it is.
        pod: PodInfo,
    },
    /// Go on serving this pod: the agent cannot find its namespace.
    Keep {
        /// The Kubernetes uid of the pod.
        uid: String,
    },
    /// Serve this pod no more.
    Del {
        /// The Kubernetes uid of the pod.
        uid: String,
    },
    /// Those were all the pods; what follows is changes.
    SnapshotSent,
}

/// A packet that cannot be taken.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum InvalidRequest {
    /// Not a message of this protocol. The connection is given up and made anew.
    Undecodable,
    /// A message without a payload that we know. The connection is given up and made anew.
    Empty,
    /// An `Add` without a descriptor. The connection is given up and made anew.
    NoNamespace,
    /// A descriptor with a message that carries none. The connection is given up and made anew.
    StrayDescriptor,
    /// An `Add` that does not say which pod it is. The peer does not speak our protocol.
    NoWorkload,
    /// An `Add` of a pod whose name, namespace or account cannot be one. It is refused, and nothing else: the
    /// agent would send it again on every connection.
    InvalidName,
}

/// What a packet that cannot be taken leads to, once it is answered.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Reaction {
    /// The next packet.
    GoOn,
    /// Another connection.
    Reconnect,
    /// The end of the process: there is no point in another connection.
    GiveUp,
}

impl InvalidRequest {
    /// What it leads to.
    #[must_use]
    pub const fn reaction(self) -> Reaction {
        match self {
            Self::InvalidName => Reaction::GoOn,
            Self::Undecodable | Self::Empty | Self::NoNamespace | Self::StrayDescriptor => {
                Reaction::Reconnect
            }
            Self::NoWorkload => Reaction::GiveUp,
        }
    }

    /// The answer.
    #[must_use]
    pub fn answer(self) -> String {
        let what = match self.reaction() {
            Reaction::GoOn => "start proxy",
            Reaction::Reconnect => "read message",
            Reaction::GiveUp => "process message",
        };
        format!("failure to {what} : {self}")
    }
}

impl fmt::Display for InvalidRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Undecodable => "the packet is not a WorkloadRequest",
            Self::Empty => "the WorkloadRequest has no payload that this version knows",
            Self::NoNamespace => "AddWorkload came without a network namespace descriptor",
            Self::StrayDescriptor => "a descriptor came with a message that carries none",
            Self::NoWorkload => "AddWorkload does not say which pod it is (workload_info)",
            Self::InvalidName => "AddWorkload names a pod with what cannot be a name",
        })
    }
}

impl Error for InvalidRequest {}

/// Reads a packet; `descriptor` says whether one came along.
///
/// # Errors
///
/// Returns why the packet cannot be taken.
pub fn parse(packet: &[u8], descriptor: bool) -> Result<Request, InvalidRequest> {
    use workload_request::Payload as P;
    let request =
        WorkloadRequest::decode(packet).map_err(|_undecodable| InvalidRequest::Undecodable)?;
    let request = match request.payload.ok_or(InvalidRequest::Empty)? {
        P::Add(add) => {
            if !descriptor {
                return Err(InvalidRequest::NoNamespace);
            }
            let info = add.workload_info.ok_or(InvalidRequest::NoWorkload)?;
            let pod = || {
                Some(PodInfo {
                    name: info.name.parse::<Text>().ok()?,
                    namespace: info.namespace.parse::<Namespace>().ok()?,
                    service_account: info.service_account.parse::<ServiceAccount>().ok()?,
                })
            };
            return Ok(Request::Add {
                pod: pod().ok_or(InvalidRequest::InvalidName)?,
                uid: add.uid,
            });
        }
        P::Keep(keep) => Request::Keep { uid: keep.uid },
        P::Del(del) => Request::Del { uid: del.uid },
        P::SnapshotSent(_) => Request::SnapshotSent,
    };
    if descriptor { Err(InvalidRequest::StrayDescriptor) } else { Ok(request) }
}

/// The first packet, ours.
#[must_use]
pub fn hello() -> Vec<u8> {
    ZdsHello { version: Version::V1.into() }.encode_to_vec()
}

/// The answer to a packet: empty text is success. A text too long for a packet is cut.
#[must_use]
pub fn ack(error: &str) -> Vec<u8> {
    let mut end = error.len().min(MAX_PACKET - 16);
    while !error.is_char_boundary(end) {
        end -= 1;
    }
    let error = error.get(..end).unwrap_or_default().to_owned();
    WorkloadResponse { payload: Some(Payload::Ack(Ack { error })) }.encode_to_vec()
}

/// Nothing that an agent can send makes the parser panic, and what it takes is well formed.
///
/// # Panics
///
/// Where that does not hold.
pub fn fuzz_request(bytes: &[u8]) {
    for descriptor in [false, true] {
        if let Ok(request) = parse(bytes, descriptor) {
            assert_eq!(
                matches!(request, Request::Add { .. }),
                descriptor,
                "descriptors go with Add"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes as unmodified istio-cni sends them.
    #[test]
    fn takes_what_istio_cni_sends() {
        let uid = "5b5ec8f3-0000-4000-8000-000000000001";
        let mut add = vec![0x0a, 0x36, 0x0a, 36];
        add.extend(uid.bytes());
        add.extend([
            0x12, 14, 0x0a, 3, b'w', b'e', b'b', 0x12, 2, b'n', b's', 0x1a, 3, b'w', b'e', b'b',
        ]);
        let pod = PodInfo {
            name: "web".parse().unwrap(),
            namespace: "ns".parse().unwrap(),
            service_account: "web".parse().unwrap(),
        };
        assert_eq!(parse(&add, true), Ok(Request::Add { uid: uid.to_owned(), pod }));
        assert_eq!(parse(&add, false), Err(InvalidRequest::NoNamespace));

        let mut del = vec![0x12, 0x26, 0x12, 36];
        del.extend(uid.bytes());
        assert_eq!(parse(&del, false), Ok(Request::Del { uid: uid.to_owned() }));
        assert_eq!(parse(&del, true), Err(InvalidRequest::StrayDescriptor));
        assert_eq!(parse(&[0x1a, 0x00], false), Ok(Request::SnapshotSent));
        let keep = [0x2a, 0x03, 0x0a, 0x01, b'u'];
        assert_eq!(parse(&keep, false), Ok(Request::Keep { uid: "u".to_owned() }));
    }

    #[test]
    fn refuses() {
        for (name, bytes, error) in [
            ("nothing", &[][..], InvalidRequest::Empty),
            ("garbage", &[0xff, 0xff, 0xff][..], InvalidRequest::Undecodable),
            ("unknown payload", &[0x52, 0x00][..], InvalidRequest::Empty),
        ] {
            assert_eq!(parse(bytes, false), Err(error), "{name}");
        }
        let anonymous = [0x0a, 0x03, 0x0a, 0x01, b'u'];
        assert_eq!(parse(&anonymous, true), Err(InvalidRequest::NoWorkload));
        assert_eq!(InvalidRequest::NoWorkload.reaction(), Reaction::GiveUp);
        let nameless = [0x0a, 0x05, 0x0a, 0x01, b'u', 0x12, 0x00];
        assert_eq!(parse(&nameless, true), Err(InvalidRequest::InvalidName));
        assert_eq!(InvalidRequest::InvalidName.reaction(), Reaction::GoOn);
    }

    #[test]
    fn says_hello_and_ack_in_istios_bytes() {
        assert_eq!(hello(), [0x08, 0x01]);
        assert_eq!(ack(""), [0x0a, 0x00]);
        assert!(ack(&"é".repeat(4000)).len() <= MAX_PACKET);
    }
}
