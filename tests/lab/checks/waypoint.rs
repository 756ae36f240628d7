//! A service and a pod with an Envoy waypoint: our node proxy, Envoy, our node proxy, the application.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, ensure};
use mesh_tests::{
    Program,
    ca::Authority,
    envoy::{self, HEADER, Route},
    hbone::{Dial, Tunnel},
    mesh::{hostname, identity, principal},
    topology::NAMESPACE,
    wait::{self, SOON},
};
use serde_json::{Value, json};

use super::{ask, text};
use crate::{
    report::Report,
    world::{HTTP, World, url, vip},
};

const INNER: (IpAddr, IpAddr) = vip(12);
const WAYPOINT: (IpAddr, IpAddr) = vip(13);
const POLICY: &str = "only-by-waypoint";

pub(crate) fn check(world: &mut World, report: &mut Report) -> Result<()> {
    let mut running = None;
    report.check("envoy-waypoint", || {
        running = Some(start(world)?);
        enlist(world)?;
        for vip in [INNER.0, INNER.1] {
            passed(world, &url(vip, 80, "/"))?;
        }
        Ok(format!(
            "client's requests to {} and {} pass Envoy, and inner answers",
            INNER.0, INNER.1
        ))
    });
    report.check("workload-waypoint", || {
        for ip in [world.inner.v4(), world.inner.v6()] {
            passed(world, &url(ip, HTTP, "/"))?;
        }
        Ok("so do its requests to inner's own addresses".to_owned())
    });
    report.check("waypoint-not-skipped", || {
        let client = Authority::load(&world.lab.ca_folder())?.issue(Some(&identity("client")))?;
        let to = SocketAddr::new(world.inner.v4(), 15008);
        let mut tunnel = Tunnel::open(&Dial::new(world.legacy.namespace(), to, &client))?;
        let reply = tunnel.connect(&SocketAddr::new(world.inner.v4(), HTTP).to_string(), &[])?;
        ensure!(reply.status == 401, "status {}", reply.status);
        Ok("client's identity without the waypoint's gets 401 from inner's node proxy".to_owned())
    });
    drop(running);
    Ok(())
}

fn start(world: &World) -> Result<Program> {
    let issued = Authority::load(&world.lab.ca_folder())?.issue(Some(&identity("waypoint")))?;
    let (v4, v6) = (world.inner.v4(), world.inner.v6());
    let route = |authority, port, to| Route {
        authority: SocketAddr::new(authority, port),
        to: SocketAddr::new(to, HTTP),
        identity: identity("inner"),
    };
    let routes =
        [route(INNER.0, 80, v4), route(INNER.1, 80, v6), route(v4, HTTP, v4), route(v6, HTTP, v6)];
    envoy::waypoint(&world.waypoint, world.lab.folder(), &issued, &routes)
}

/// The service has the waypoint by its host name, the pod by its address.
fn enlist(world: &mut World) -> Result<()> {
    let World { mesh, inner, waypoint, .. } = world;
    mesh.service("inner", &[INNER.0, INNER.1], &[(80, HTTP)], &[inner]);
    mesh.service("waypoint", &[WAYPOINT.0, WAYPOINT.1], &[(15008, 15008)], &[waypoint]);
    let by_name = format!("{NAMESPACE}/{}", hostname("waypoint"));
    let by_name = json!({ "destination": by_name, "hboneMtlsPort": 15008 });
    mesh.service_of("inner").context("no inner")?.set("waypoint", by_name);
    let by_address = format!("/{}", waypoint.v4());
    let by_address = json!({ "destination": by_address, "hboneMtlsPort": 15008 });
    mesh.workload_of(inner).context("no inner")?.set("waypoint", by_address);
    let rules = json!([[[{ "principals": [{ "Exact": principal("waypoint") }] }]]]);
    mesh.policy(POLICY, "Allow", &rules).set("scope", json!("WorkloadSelector"));
    mesh.select(POLICY, NAMESPACE, &[inner]);
    world.apply()?;
    world.b.with_proxy(|proxy| proxy.wait_policy(POLICY, true))?;
    world.a.with_proxy(|proxy| proxy.wait_policy(POLICY, true))
}

fn passed(world: &World, url: &str) -> Result<()> {
    let said: Value = wait::retry(url, SOON / 2, || ask(&world.client, url))?;
    let headers = said.get("headers").context("no headers")?;
    ensure!(text(headers, HEADER) == "envoy", "the request did not pass Envoy: {said}");
    let from: IpAddr = text(&said, "client").parse()?;
    let waypoint = [world.waypoint.v4(), world.waypoint.v6()];
    ensure!(waypoint.contains(&from), "inner saw {from}, not the waypoint");
    Ok(())
}
