//! The contract with those who read us: the tables of spec/ztunnel.md §11 and §12, row by row, against a real run;
//! a real Prometheus with the queries of Istio's dashboard.

#![expect(clippy::indexing_slicing, clippy::unwrap_used, reason = "a test may panic")]

mod ads;
mod dashboard;
mod dump;
mod log;
mod metrics;
mod queue;
mod settings;
mod world;
