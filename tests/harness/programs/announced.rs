//! An application that is told by a PROXY protocol header, version 2, who its client is. It says what it was
//! told, and then does what our TCP server does.

use std::{
    io::{self, Read},
    net::{IpAddr, SocketAddr, TcpStream},
};

use anyhow::Result;
use serde_json::{Value, json};

use super::{say, serve_all, tcp};

const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";

pub(crate) fn serve(addresses: &[&str]) -> Result<()> {
    serve_all(addresses, |mut stream| {
        let peer = stream.peer_addr().map(|peer| peer.ip().to_canonical().to_string());
        match read(&mut stream) {
            Ok(mut told) => {
                if let Some(told) = told.as_object_mut() {
                    told.insert("peer".to_owned(), json!(peer.unwrap_or_default()));
                }
                say(&told.to_string());
                let _end = tcp::obey(stream, &mut String::new());
            }
            Err(why) => say(&format!("no header: {why}")),
        }
    })
}

fn read(stream: &mut TcpStream) -> io::Result<Value> {
    let bad = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
    let mut head = [0; 16];
    stream.read_exact(&mut head)?;
    let (signature, [command, family, high, low]) = head.split_first_chunk::<12>().map_or_else(
        || (SIGNATURE, [0; 4]),
        |(signature, rest)| (*signature, rest.try_into().unwrap_or_default()),
    );
    if signature != SIGNATURE || command != 0x21 {
        return Err(bad("not version 2, command PROXY"));
    }
    let mut body = vec![0; usize::from(u16::from_be_bytes([high, low]))];
    stream.read_exact(&mut body)?;
    let ip = match family {
        0x11 => 4,
        0x21 => 16,
        _ => return Err(bad("neither family")),
    };
    let address = |at: usize, port: usize| {
        let octets = body.get(at..at + ip)?;
        let port = body.get(port..port + 2)?.try_into().ok().map(u16::from_be_bytes)?;
        let ip = match <[u8; 4]>::try_from(octets) {
            Ok(octets) => IpAddr::from(octets),
            Err(_) => IpAddr::from(<[u8; 16]>::try_from(octets).ok()?),
        };
        Some(SocketAddr::new(ip, port).to_string())
    };
    let source = address(0, 2 * ip).ok_or_else(|| bad("no source"))?;
    let destination = address(ip, 2 * ip + 2).ok_or_else(|| bad("no destination"))?;
    let mut rest = body.get(2 * ip + 4..).unwrap_or_default();
    let mut values = serde_json::Map::new();
    while let [kind, high, low, after @ ..] = rest {
        let length = usize::from(u16::from_be_bytes([*high, *low]));
        let (value, next) = after.split_at_checked(length).ok_or_else(|| bad("cut short"))?;
        values.insert(format!("{kind:x}"), json!(String::from_utf8_lossy(value)));
        rest = next;
    }
    Ok(json!({ "source": source, "destination": destination, "values": values }))
}
