//! Dedicated mode: a node proxy for one workload, in its own network namespace.

use mesh_tests::{
    Pod, Proxy, Scene,
    capture::Capture,
    istio_cni::{Backend, Rules},
    mesh::identity,
    scene::{HTTP, TCP, web},
    wait::SOON,
};

/// Client and server, each with a node proxy of its own.
fn start() -> (Scene, [Proxy; 2]) {
    let scene = Scene::bare().unwrap();
    let settings = [
        ("CAPTURE", "external"),
        ("PACKET_MARK", "1337"),
        ("TERMINATION_GRACE_PERIOD_SECONDS", "20"),
    ];
    for pod in [&scene.client, &scene.server] {
        Rules::new(Backend::Iptables).write(pod).unwrap();
    }
    let proxy = |node: &mesh_tests::Node, pod: &Pod| {
        let info = format!("lab/{0}/{0}", pod.name());
        let mode = [("PROXY_MODE", "dedicated"), ("PROXY_WORKLOAD_INFO", info.as_str())];
        let settings: Vec<_> = mode.into_iter().chain(settings).collect();
        let proxy = node.begin_proxy_in(pod, &settings).unwrap();
        proxy.wait_ready(SOON).unwrap();
        proxy
    };
    let proxies = [proxy(&scene.a, &scene.client), proxy(&scene.b, &scene.server)];
    (scene, proxies)
}

fn serves(scene: &Scene, [near, far]: &[Proxy; 2]) {
    let capture = Capture::start(scene.lab.wire(), &["GET /"]).unwrap();
    for (to, own) in web(80).into_iter().zip([scene.client.v4(), scene.client.v6()]) {
        assert_eq!(scene.seen_as(&scene.client, to).unwrap(), own.to_string());
    }
    assert_eq!(capture.stop().unwrap().objection(), None);
    let own = [scene.outsider.v4(), scene.outsider.v6()];
    for (to, own) in scene.server_at(HTTP).into_iter().zip(own) {
        assert_eq!(scene.seen_as(&scene.outsider, to).unwrap(), own.to_string());
    }
    near.wait_access(0, "out", |line| line.field("dst.identity") == identity("server")).unwrap();
    far.wait_access(0, "in", |line| line.field("src.identity") == identity("client")).unwrap();
}

#[test]
fn one_workload_under_rules_of_istio_cni() {
    let (scene, proxies) = start();
    serves(&scene, &proxies);
}

#[test]
fn its_end_is_graceful_too() {
    let (scene, [_near, mut far]) = start();
    scene.ask_until(&scene.client, web(80)[0]).unwrap();
    let to = web(TCP)[0].to_string();
    let mut ticking = scene.client.spawn(["tcp", &to, "tick", "30", "50"]).unwrap();
    ticking.says("open", SOON).unwrap();
    assert_eq!(far.terminate(SOON).unwrap(), 0);
    ticking.finish(SOON).unwrap().ok().unwrap();
}

/// It would capture its own calls to the control plane.
#[test]
fn capture_of_our_own_is_refused() {
    let scene = Scene::bare().unwrap();
    let mode = [("PROXY_MODE", "dedicated"), ("PROXY_WORKLOAD_INFO", "lab/client/client")];
    let proxy = scene.a.begin_proxy_in(&scene.client, &mode).unwrap();
    let why = proxy.wait_ready(SOON).unwrap_err();
    assert!(format!("{why:#}").contains("in dedicated mode nothing is captured by us"), "{why:#}");
}
