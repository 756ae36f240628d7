//! Contract with a real istiod, unmodified: what it sends and signs, and what becomes of the mesh when it is in
//! trouble. Run by `tests/run realmesh`, because Go builds it.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod cluster;
mod faults;
mod kubernetes;
mod mesh;
mod oracle;
mod tokens;
mod world;
