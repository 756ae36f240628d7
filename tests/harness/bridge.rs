//! A door without a lock: what comes to a port of loopback in plain text goes on over mutual TLS. For tools
//! that speak HTTP/2 and have no identity.

use std::{
    net::{SocketAddr, TcpListener},
    thread,
    time::Duration,
};

use anyhow::{Context, Result};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, copy, split},
    net::TcpStream,
    runtime::Builder,
    task::LocalSet,
    time::timeout,
};
use tokio_rustls::client::TlsStream;

use crate::{ca::Issued, hbone::Dial, netns::Namespace};

/// A pause in what a tool sends.
const QUIET: Duration = Duration::from_millis(10);

/// Takes connections on loopback, in the caller's namespace, and opens one from `from` to `to` for each.
/// It lasts as long as the process.
pub fn start(from: &Namespace, to: SocketAddr, issued: &Issued) -> Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    listener.set_nonblocking(true)?;
    let (from, issued) = (from.clone(), issued.clone());
    let runtime = Builder::new_current_thread().enable_all().build()?;
    thread::Builder::new().name("bridge".into()).spawn(move || {
        let local = LocalSet::new();
        // An error ends it, which the test notices.
        let _ended: Result<()> = local.block_on(&runtime, async move {
            let listener = tokio::net::TcpListener::from_std(listener)?;
            loop {
                let (near, _) = listener.accept().await?;
                let (from, issued) = (from.clone(), issued.clone());
                let one = async move {
                    let far = Dial::new(&from, to, &issued).tls().await.context("bridge")?;
                    carry(near, far).await;
                    anyhow::Ok(())
                };
                let _task = tokio::task::spawn_local(one);
            }
        });
    })?;
    Ok(address)
}

/// Each way to its end, whatever becomes of the other: the last words of a side that has closed, with what it
/// was sent unread, are what a tool looks at.
async fn carry(near: TcpStream, far: TlsStream<TcpStream>) {
    let ((mut near_out, mut near_in), (mut far_out, mut far_in)) = (near.into_split(), split(far));
    let there = async {
        let mut bytes = Vec::new();
        while near_out.read_buf(&mut bytes).await.is_ok_and(|length| length > 0) {
            // What follows soon goes along. Who answers at once would else have closed a stream, now and then,
            // before the frame comes that is a fault on an open one.
            while let Ok(Ok(1..)) = timeout(QUIET, near_out.read_buf(&mut bytes)).await {}
            if far_in.write_all(&bytes).await.is_err() || far_in.flush().await.is_err() {
                break;
            }
            bytes.clear();
        }
        let _gone = far_in.shutdown().await;
        // It may still be sending.
        let mut rest = vec![0; 64 << 10];
        while near_out.read(&mut rest).await.is_ok_and(|length| length > 0) {}
    };
    let back = async {
        let _ended = copy(&mut far_out, &mut near_in).await;
        let _gone = near_in.shutdown().await;
    };
    tokio::join!(there, back);
}
