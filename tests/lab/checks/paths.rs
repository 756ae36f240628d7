//! Requests: where they arrive, from whom, and what the wire sees of them.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use mesh_tests::{
    Pod,
    capture::Capture,
    log::Line,
    mesh::{hostname, identity},
    topology::PROBE,
};

use super::{ask, text};
use crate::{
    report::Report,
    world::{HTTP, REDIS, VIP, World, url},
};

/// Nobody else sends this.
const MARKER: &str = "marker-5eaf2741";

pub(crate) fn check(world: &mut World, report: &mut Report) -> Result<()> {
    report.check("vip", || {
        let said = ask(&world.client, &url(VIP.0, 80, "/"))?;
        Ok(format!("{} answers client at {}", text(&said, "name"), VIP.0))
    });
    report.check("both-versions", || both_versions(world));
    report.check("client-address", || client_address(world, VIP.0, &world.client.v4().to_string()));
    report.check("ipv6-vip", || {
        let said = ask(&world.client, &url(VIP.1, 80, "/"))?;
        Ok(format!("{} answers client at {}", text(&said, "name"), VIP.1))
    });
    report.check("ipv6-client-address", || {
        client_address(world, VIP.1, &world.client.v6().to_string())
    });
    report.check("pod-address", || {
        let both = [world.v2.v4(), world.v2.v6()];
        for ip in both {
            let said = ask(&world.client, &url(ip, HTTP, "/"))?;
            ensure!(text(&said, "name") == "server-v2", "{said} answers for {ip}");
        }
        Ok(format!("server-v2 answers at {} and {}", both[0], both[1]))
    });
    let redis = world.redis();
    report.check("wire-tls-only", || wire(world));
    match redis {
        Ok(false) => report.stage("(redis is not installed)"),
        redis => report.check("redis", || {
            redis?;
            redis_works(world)
        }),
    }
    report.check("identity-source", || {
        let line = logged(world, "outbound")?;
        both_identities(&line)
    });
    report.check("identity-destination", || {
        let line = logged(world, "inbound")?;
        both_identities(&line)
    });
    report.check("own-vip", || own_vip(world));
    report.check("itself", || itself(&world.v1));
    report.check("probe", || {
        let to = url(world.v1.v4(), HTTP, "/");
        let said = super::answer(world.b.fetch_from(PROBE.0, &to)?)?;
        let source = PROBE.0.to_string();
        ensure!(text(&said, "client") == source, "the probe came from {said}");
        Ok(format!("a probe from {source} reaches server-v1 past STRICT"))
    });
    Ok(())
}

fn both_versions(world: &World) -> Result<String> {
    let mut hits: BTreeMap<String, u32> = BTreeMap::new();
    for _ in 0..40 {
        let said = ask(&world.client, &url(VIP.0, 80, "/"))?;
        *hits.entry(text(&said, "name").to_owned()).or_default() += 1;
        if hits.len() == 2 && hits.values().sum::<u32>() >= 8 {
            break;
        }
    }
    ensure!(hits.len() == 2, "only {hits:?}");
    let hits: Vec<_> = hits.iter().map(|(name, count)| format!("{name} {count}")).collect();
    Ok(format!("{} times", hits.join(", ")))
}

fn client_address(world: &World, vip: std::net::IpAddr, own: &str) -> Result<String> {
    let said = ask(&world.client, &url(vip, 80, "/"))?;
    let (seen, server) = (text(&said, "client"), text(&said, "name"));
    ensure!(seen == own, "{server} saw {seen}, and client is {own}");
    Ok(format!("{server} sees {seen}, client's own"))
}

/// Looks at all that passes between the nodes while client works.
fn wire(world: &World) -> Result<String> {
    let capture = Capture::start(world.lab.wire(), &[MARKER])?;
    let path = format!("/{MARKER}");
    for vip in [VIP.0, VIP.1] {
        let said = ask(&world.client, &url(vip, 80, &path))?;
        ensure!(text(&said, "path") == path, "{said}");
    }
    for to in [world.v1.v4(), world.v1.v6()] {
        let to = std::net::SocketAddr::new(to, crate::world::TCP);
        world.client.tcp(to, &["echo", MARKER])?.ok()?;
    }
    let seen = capture.stop()?.only_tunnels()?;
    Ok(format!("{seen}; the marker in it was not seen"))
}

fn redis_works(world: &World) -> Result<String> {
    let vip = crate::world::FIRST;
    let port = REDIS.to_string();
    for vip in [vip.0, vip.1] {
        let vip = vip.to_string();
        let cli = |words: &[&str]| {
            let options = ["redis-cli", "-h", &vip, "-p", &port];
            world.client.run(options.iter().chain(words))?.ok()
        };
        ensure!(cli(&["set", "colour", "green"])?.trim() == "OK", "no OK");
        let got = cli(&["get", "colour"])?;
        ensure!(got.trim() == "green", "got {got}");
        let many = cli(&["--raw", "eval", "return string.rep('x', 1000000)", "0"])?;
        ensure!(many.trim().len() == 1_000_000, "got {} bytes", many.len());
    }
    Ok(format!("redis-cli set, got and fetched 1 MB at {} and {}", vip.0, vip.1))
}

/// A line of the access log about client and server.
fn logged(world: &World, direction: &str) -> Result<Line> {
    let node = if direction == "outbound" { &world.a } else { &world.b };
    ask(&world.client, &url(VIP.0, 80, "/"))?;
    node.with_proxy(|proxy| {
        proxy.wait_access(0, direction, |line| {
            line.message == "connection complete"
                && line.field("direction") == direction
                && line.field("dst.service") == hostname("server")
        })
    })
}

fn both_identities(line: &Line) -> Result<String> {
    let (from, to) = (line.field("src.identity"), line.field("dst.identity"));
    ensure!(from == identity("client") && to == identity("server"), "{}", line.text);
    Ok(format!("the {} log: {from} to {to}", line.field("direction")))
}

/// A pod that is a server calls its own service until it gets itself.
fn own_vip(world: &World) -> Result<String> {
    let vip = crate::world::FIRST;
    for vip in [vip.0, vip.1] {
        let said = ask(&world.v1, &url(vip, 80, "/")).with_context(|| format!("at {vip}"))?;
        ensure!(text(&said, "name") == "server-v1", "{said}");
    }
    Ok(format!("server-v1 reaches itself at {} and {}", vip.0, vip.1))
}

/// A pod talks to itself with no node proxy between.
fn itself(pod: &Pod) -> Result<String> {
    for ip in [pod.v4(), pod.v6(), [127, 0, 0, 1].into(), std::net::Ipv6Addr::LOCALHOST.into()] {
        let said = ask(pod, &url(ip, HTTP, "/")).with_context(|| format!("at {ip}"))?;
        ensure!(text(&said, "local") == ip.to_string(), "{said} for {ip}");
    }
    Ok("server-v1 reaches its own addresses and localhost, directly".to_owned())
}
