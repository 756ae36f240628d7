//! The node proxy at its door, whoever captures: paths, refusals, policy, streams, ends. Each suite includes
//! this and says how a scene starts.

use mesh_tests::hbone::Reply;

mod inbound;
mod life;
mod outbound;
mod pods;
mod policies;
mod streams;

/// As an empty tunnel answers: with this status and nothing else.
fn is_refusal(reply: &Reply, status: u16) -> bool {
    reply.status == status && reply.ended && reply.headers.is_empty()
}
