//! The answering end.

use std::{
    io::{self, Read as _, Write as _},
    net::{IpAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};

use mesh_tests::wait::pause;

use super::{BODY, PATIENCE, Ports, SHORT};

/// Threads that accept short connections: more than any row opens at once, so that none waits for another's close.
const SHORT_THREADS: usize = 32;

/// Answers on all ports of this address until the process ends.
///
/// # Errors
/// A port cannot be listened on.
pub fn serve(ip: IpAddr, ports: Ports) -> io::Result<()> {
    each(TcpListener::bind((ip, ports.sink))?, sink)?;
    each(TcpListener::bind((ip, ports.echo))?, echo)?;
    each(TcpListener::bind((ip, ports.http))?, http)?;
    serve_short(&TcpListener::bind((ip, ports.short))?, SHORT_THREADS)?;
    let hold = TcpListener::bind((ip, ports.hold))?;
    small_thread(move || hold_all(&hold))
}

/// Answers short connections with so many threads, until the process ends.
///
/// # Errors
/// A thread cannot be started.
pub fn serve_short(listener: &TcpListener, threads: usize) -> io::Result<()> {
    for _ in 0..threads {
        let listener = listener.try_clone()?;
        small_thread(move || {
            while let Ok((stream, _)) = listener.accept() {
                drop(short(stream));
            }
        })?;
    }
    Ok(())
}

/// A thread for every connection: they last as long as a row does.
fn each(listener: TcpListener, answer: fn(TcpStream) -> io::Result<()>) -> io::Result<()> {
    small_thread(move || {
        while let Ok((stream, _)) = listener.accept() {
            // An end that goes away in the middle is the client's to report.
            drop(small_thread(move || drop(answer(stream))));
        }
    })
}

fn small_thread(run: impl FnOnce() + Send + 'static) -> io::Result<()> {
    thread::Builder::new().stack_size(512 * 1024).spawn(run).map(drop)
}

fn sink(mut stream: TcpStream) -> io::Result<()> {
    let mut buffer = vec![0; 256 * 1024];
    let mut total: u64 = 0;
    loop {
        match stream.read(&mut buffer)? {
            0 => break,
            read => total += read as u64,
        }
    }
    stream.write_all(&total.to_be_bytes())
}

fn echo(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = vec![0; 16 * 1024];
    loop {
        let read = stream.read(&mut buffer)?;
        let Some(got @ [_, ..]) = buffer.get(..read) else { return Ok(()) };
        stream.write_all(got)?;
    }
}

fn http(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {BODY}\r\n\r\n").into_bytes();
    answer.resize(answer.len() + BODY, b'x');
    let mut head = Vec::new();
    let mut buffer = [0; 2048];
    loop {
        let read = stream.read(&mut buffer)?;
        let Some(got @ [_, ..]) = buffer.get(..read) else { return Ok(()) };
        head.extend_from_slice(got);
        if head.ends_with(b"\r\n\r\n") {
            head.clear();
            stream.write_all(&answer)?;
        }
    }
}

fn short(mut stream: TcpStream) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut buffer = [0; SHORT];
    stream.read_exact(&mut buffer)?;
    stream.write_all(&buffer)
}

fn hold_all(listener: &TcpListener) {
    let held = Arc::new(Mutex::new(Vec::<TcpStream>::new()));
    let looked = Arc::clone(&held);
    // Whose client has gone is held no longer.
    let _without = small_thread(move || {
        loop {
            pause(Duration::from_secs(1));
            let mut held = looked.lock().unwrap_or_else(PoisonError::into_inner);
            held.retain(|stream| match stream.peek(&mut [0]) {
                Ok(there) => there > 0,
                Err(error) => error.kind() == io::ErrorKind::WouldBlock,
            });
        }
    });
    while let Ok((mut stream, _)) = listener.accept() {
        let mut byte = [0];
        if stream.read_exact(&mut byte).is_ok()
            && stream.write_all(&byte).is_ok()
            && stream.set_nonblocking(true).is_ok()
        {
            held.lock().unwrap_or_else(PoisonError::into_inner).push(stream);
        }
    }
}
