//! Ordinary programs that speak plain TCP or HTTP/1.1: what runs in pods where curl is not enough.

pub(crate) mod announced;
pub(crate) mod checksum;
pub(crate) mod http;
pub(crate) mod tcp;

use std::{
    io::Write,
    net::{TcpListener, TcpStream},
    thread,
    time::Duration,
};

use anyhow::{Context, Result};

/// Says a line, at once.
pub(crate) fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    let _closed = writeln!(out, "{line}").and_then(|()| out.flush());
}

/// Listens on the addresses and gives each connection a thread.
pub(crate) fn serve_all(
    addresses: &[&str],
    serve: impl Fn(TcpStream) + Clone + Send + 'static,
) -> Result<()> {
    let mut threads = Vec::new();
    for address in addresses {
        let listener =
            TcpListener::bind(address).with_context(|| format!("listen on {address}"))?;
        let serve = serve.clone();
        threads.push(thread::spawn(move || {
            for stream in listener.incoming() {
                // Out of descriptors, most likely: those that are open will end.
                let Ok(stream) = stream else {
                    crate::wait::pause(Duration::from_millis(10));
                    continue;
                };
                let serve = serve.clone();
                let _thread = thread::Builder::new().spawn(move || serve(stream));
            }
        }));
    }
    say("listening");
    for thread in threads {
        let _panicked = thread.join();
    }
    Ok(())
}
