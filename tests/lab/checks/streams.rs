//! Bytes: many of them, and how a stream ends.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use mesh_tests::wait::{self, SOON};
use serde_json::Value;

use super::text;
use crate::{
    report::Report,
    world::{FIRST, TCP, World, url},
};

const GIBIBYTE: u64 = 1 << 30;

pub(crate) fn check(world: &mut World, report: &mut Report) -> Result<()> {
    let to = SocketAddr::new(FIRST.0, TCP);
    report.check("bulk-up", || bulk(world, to, "sum", GIBIBYTE));
    report.check("bulk-down", || bulk(world, SocketAddr::new(FIRST.1, TCP), "send", GIBIBYTE / 4));
    report.check("half-close", || {
        let said = world.client.tcp(to, &["sum", "100000"])?.ok()?;
        let said: Value = serde_json::from_str(&said)?;
        let sum = text(&said, "sum");
        Ok(format!("client ends its side after 100000 bytes, and then gets their sum {sum}"))
    });
    report.check("reset-by-server", || {
        let said = world.client.tcp(to, &["reset", "100000"])?.ok()?;
        let said: Value = serde_json::from_str(&said)?;
        ensure!(text(&said, "end") == "reset", "the client saw {said}");
        Ok("the server resets after 100000 bytes: client gets them, then a reset".to_owned())
    });
    report.check("reset-by-client", || {
        let said = |world: &World| world.v1_tcp.output().matches(": reset").count();
        let before = said(world);
        world.client.tcp(to, &["cut"])?.ok()?;
        wait::until(
            "the server to see a reset",
            SOON,
            || Ok((said(world) > before).then_some(())),
        )?;
        Ok("the client resets: the server sees a reset, not an end".to_owned())
    });
    report.check("refused-port", || {
        let nobody = SocketAddr::new(world.v1.v4(), 9999);
        let finished = world.client.tcp(nobody, &["who"])?;
        ensure!(!finished.is_ok(), "somebody answered: {}", finished.out);
        Ok(format!("nobody listens on 9999: client gets \"{}\"", finished.err.trim()))
    });
    report.check("keep-alive", || {
        let two = [url(FIRST.0, 80, "/bytes/10"), url(FIRST.0, 80, "/bytes/20")];
        let [one, other] = &two;
        let pod = &world.client;
        if mesh_tests::program::installed("curl").is_none() {
            let said = pod.fetch_all(&[one, other])?.ok()?;
            let lengths: Vec<_> = said.lines().map(str::len).collect();
            ensure!(lengths == [10, 20], "{lengths:?} bytes");
            return Ok("our own client sends two requests on one connection".to_owned());
        }
        let said = pod.run(["curl", "-gsSv", "--max-time", "8", one, other])?;
        ensure!(said.out.len() == 30, "{} bytes", said.out.len());
        ensure!(said.err.contains("Re-using existing connection"), "{}", said.err);
        Ok("curl sends two requests on one connection".to_owned())
    });
    Ok(())
}

fn bulk(world: &World, to: SocketAddr, what: &str, bytes: u64) -> Result<String> {
    let said = world.client.tcp(to, &[what, &bytes.to_string()])?.ok()?;
    let said: Value = serde_json::from_str(&said)?;
    let number = |field: &str| said.get(field).and_then(Value::as_u64);
    let (there, ms) = number("bytes").zip(number("ms")).context("no answer")?;
    ensure!(there == bytes, "{there} bytes");
    let rate = bytes.saturating_mul(8) / 1_000_000 / ms.max(1);
    Ok(format!("{bytes} bytes in {ms} ms ({rate} Gb/s), sum {} on both sides", text(&said, "sum")))
}
