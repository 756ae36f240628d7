//! A real Envoy as HBONE waypoint between two node proxies.

#![expect(clippy::indexing_slicing, clippy::unwrap_used, reason = "a test may panic")]

use std::net::{IpAddr, SocketAddr};

use mesh_tests::{
    Pod, Program, Scene,
    envoy::{self, HEADER, Route},
    hbone::{Dial, Listener, Tunnel},
    mesh::{hostname, identity, principal},
    scene::{HTTP, TCP, web},
    topology::NAMESPACE,
};
use serde_json::{Value, json};

struct World {
    scene: Scene,
    waypoint: Pod,
    _envoy: Program,
}

/// The server lets in the waypoint alone, and Envoy runs: whoever skips it fails.
fn world() -> World {
    let mut scene = Scene::start(&[]).unwrap();
    let waypoint = scene.b.pod("waypoint").unwrap();
    scene.lab.settle(&[&waypoint]).unwrap();
    let Scene { mesh, server, .. } = &mut scene;
    mesh.workload(&waypoint, "waypoint");
    mesh.service("waypoint", &["10.96.0.30".parse().unwrap()], &[(15008, 15008)], &[&waypoint]);
    let rules = json!([[[{ "principals": [{ "Exact": principal("waypoint") }] }]]]);
    mesh.policy("only-waypoint", "Allow", &rules).set("scope", json!("WorkloadSelector"));
    mesh.select("only-waypoint", NAMESPACE, &[server]);
    let routes = web(80).into_iter().chain(scene.server_at(HTTP)).map(|authority| Route {
        authority,
        to: SocketAddr::new(
            if authority.is_ipv4() { scene.server.v4() } else { scene.server.v6() },
            HTTP,
        ),
        identity: identity("server"),
    });
    let routes: Vec<_> = routes.collect();
    let issued = scene.certificate("waypoint").unwrap();
    let envoy = envoy::waypoint(&waypoint, scene.lab.folder(), &issued, &routes).unwrap();
    World { scene, waypoint, _envoy: envoy }
}

fn reference(waypoint: &Pod, by_name: bool) -> Value {
    let name = format!("{NAMESPACE}/{}", hostname("waypoint"));
    let destination = if by_name { name } else { format!("/{}", waypoint.v4()) };
    json!({ "destination": destination, "hboneMtlsPort": 15008 })
}

/// Every one of them passes Envoy, and the server sees Envoy's address.
fn pass(world: &World, to: &[SocketAddr]) {
    let own: Vec<String> =
        [world.waypoint.v4(), world.waypoint.v6()].map(|ip: IpAddr| ip.to_string()).into();
    for to in to {
        let said = world.scene.ask_until(&world.scene.client, *to).unwrap();
        assert_eq!(said["headers"][HEADER], "envoy", "{to}: {said}");
        assert!(own.contains(&said["client"].as_str().unwrap().to_owned()), "{said}");
    }
}

#[test]
fn a_service_with_a_waypoint() {
    let mut world = world();
    for by_name in [true, false] {
        let waypoint = reference(&world.waypoint, by_name);
        world.scene.mesh.service_of("web").unwrap().set("waypoint", waypoint);
        world.scene.apply_policy("only-waypoint").unwrap();
        pass(&world, &web(80));
    }
    // The untranslated address is what Envoy was asked for: it has a route for nothing else. And
    // the pods' own addresses have no waypoint, so that the policy stops them.
    assert!(world.scene.ask(&world.scene.client, world.scene.server_at(HTTP)[0]).is_err());
    // Envoy's connections stay open; they are counted as the waypoint's.
    let metrics = world.scene.b.with_proxy(|proxy| proxy.metrics()).unwrap();
    let labels = [("source_principal", &*identity("waypoint")), ("response_flags", "-")];
    assert!(metrics.sum("istio_tcp_connections_opened_total", &labels) >= 1.0);
}

#[test]
fn a_workload_with_a_waypoint() {
    let mut world = world();
    let waypoint = reference(&world.waypoint, true);
    let Scene { mesh, server, .. } = &mut world.scene;
    mesh.workload_of(server).unwrap().set("waypoint", waypoint);
    world.scene.apply_policy("only-waypoint").unwrap();
    pass(&world, &world.scene.server_at(HTTP));
}

#[test]
fn who_skips_the_waypoint_is_refused() {
    let mut world = world();
    let waypoint = reference(&world.waypoint, true);
    world.scene.mesh.service_of("web").unwrap().set("waypoint", waypoint);
    world.scene.apply_policy("only-waypoint").unwrap();
    pass(&world, &web(80)[..1]);
    let authority = world.scene.server_at(HTTP)[0].to_string();
    for (account, status) in [("client", 401), ("waypoint", 200)] {
        let issued = world.scene.certificate(account).unwrap();
        let from = world.scene.outsider.namespace();
        let mut tunnel = Tunnel::open(&Dial::new(from, world.scene.tunnel(), &issued)).unwrap();
        assert_eq!(tunnel.connect(&authority, &[]).unwrap().status, status, "{account}");
    }
}

#[test]
fn a_waypoint_that_is_down_is_no_way_round() {
    let mut world = world();
    let waypoint = reference(&world.waypoint, true);
    world.scene.mesh.service_of("web").unwrap().set("waypoint", waypoint);
    world.scene.mesh.remove_policy("only-waypoint");
    world.scene.apply().unwrap();
    let World { scene, _envoy: envoy, .. } = world;
    drop(envoy);
    let has = |dump: &Value| dump["services"].to_string().contains("hboneMtlsPort");
    scene.a.with_proxy(|proxy| proxy.wait_dump("the waypoint", has)).unwrap();
    assert!(scene.ask(&scene.client, web(80)[0]).is_err());
}

/// What the waypoint of a workload sends to it goes there, and not to the waypoint again.
#[test]
fn who_is_the_waypoint_goes_on_to_the_workload() {
    let mut scene = Scene::start(&[]).unwrap();
    let waypoint = scene.a.pod("waypoint").unwrap();
    scene.lab.settle(&[&waypoint]).unwrap();
    scene.mesh.workload(&waypoint, "waypoint");
    let vip = "10.96.0.30".parse().unwrap();
    scene.mesh.service("waypoint", &[vip], &[(15008, 15008)], &[&waypoint]);
    scene.a.enrol(&waypoint, "waypoint").unwrap();
    for by_name in [true, false] {
        let Scene { mesh, server, .. } = &mut scene;
        let waypoint_of = reference(&waypoint, by_name);
        mesh.workload_of(server).unwrap().set("waypoint", waypoint_of.clone());
        scene.apply().unwrap();
        let destination = waypoint_of["destination"].as_str().unwrap();
        let has = |dump: &Value| {
            let mut workloads = dump["workloads"].as_array().unwrap().iter();
            workloads.any(|workload| workload["waypoint"]["destination"] == destination)
        };
        scene.a.with_proxy(|proxy| proxy.wait_dump("the waypoint", has)).unwrap();
        for (to, own) in scene.server_at(HTTP).into_iter().zip([waypoint.v4(), waypoint.v6()]) {
            let said = scene.ask_until(&waypoint, to).unwrap();
            assert_eq!(said["client"], own.to_string());
            // Nobody but the waypoint gets there: it terminates no tunnels in this test.
            assert!(scene.ask(&scene.client, to).is_err());
        }
    }
}

/// Several waypoints share the connections of a service by their weights.
#[test]
fn waypoints_have_weights() {
    let mut scene = Scene::start(&[]).unwrap();
    let pods = ["first", "second"].map(|name| scene.b.pod(name).unwrap());
    scene.lab.settle(&pods.each_ref()).unwrap();
    let listeners = pods.each_ref().map(|pod| {
        scene.mesh.workload(pod, pod.name());
        let issued = scene.certificate(pod.name()).unwrap();
        Listener::start(pod.namespace(), &issued, 200).unwrap()
    });
    let [to, _] = web(TCP);
    for (weights, shares) in [([3, 0], [true, false]), ([0, 1], [false, true]), ([1, 1], [true; 2])]
    {
        let weighted = pods
            .iter()
            .zip(weights)
            .map(|(pod, weight)| json!({ "destination": reference(pod, false), "weight": weight }));
        let weighted = Value::Array(weighted.collect());
        scene.mesh.service_of("web").unwrap().set("weightedWaypoints", weighted.clone());
        scene.apply().unwrap();
        let has = |dump: &Value| {
            let services = dump["services"].as_array().unwrap();
            services.iter().any(|service| service["weightedWaypoints"] == weighted)
        };
        scene.a.with_proxy(|proxy| proxy.wait_dump("the weights", has)).unwrap();
        let before = listeners.each_ref().map(|listener| listener.seen().len());
        for _ in 0..30 {
            Listener::answers(&scene.client, to).unwrap();
        }
        let seen = listeners.each_ref().map(|listener| listener.seen().len());
        let grown = [seen[0] > before[0], seen[1] > before[1]];
        assert_eq!(grown, shares, "{weights:?}: {before:?}, {seen:?}");
        let asked =
            listeners.iter().flat_map(Listener::seen).all(|seen| seen.authority == to.to_string());
        assert!(asked, "the waypoint is asked for the service");
    }
}
