use std::pin::Pin;
use std::task::{Context, Poll};

use mesh_proto::envoy::service::discovery::v3::DeltaDiscoveryRequest;
use tokio::sync::mpsc;
use tonic::codegen::tokio_stream::Stream;

/// Requests, as gRPC takes them.
#[derive(Debug)]
pub(super) struct Requests(pub(super) mpsc::Receiver<DeltaDiscoveryRequest>);

impl Stream for Requests {
    type Item = DeltaDiscoveryRequest;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_recv(context)
    }
}
