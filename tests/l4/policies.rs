//! Who may.

use mesh_tests::{
    Scene,
    mesh::STRICT,
    scene::{HTTP, TCP, web},
    topology::NAMESPACE,
    wait::{self, SOON},
};
use serde_json::{Value, json};

use crate::start;

#[test]
fn plain_text_meets_strict() {
    let mut scene = start(&[]).unwrap();
    let own = [scene.outsider.v4(), scene.outsider.v6()];
    for (to, own) in scene.server_at(HTTP).into_iter().zip(own) {
        let said = scene.ask_until(&scene.outsider, to).unwrap();
        assert_eq!(said["client"], own.to_string());
    }
    scene.mesh.strict(&[&scene.server]);
    scene.apply_policy(STRICT).unwrap();
    for to in scene.server_at(HTTP) {
        assert!(scene.ask(&scene.outsider, to).is_err(), "{to} answered");
        scene.ask(&scene.client, to).unwrap();
    }
    scene.mesh.permissive();
    scene.apply().unwrap();
    for to in scene.server_at(HTTP) {
        scene.ask_until(&scene.outsider, to).unwrap();
    }
}

#[test]
fn policies_decide_by_port_identity_and_address() {
    let mut scene = start(&[]).unwrap();
    let client = &scene.client;
    let http = web(80)[0];
    let tcp = web(TCP)[0];
    let answered = |scene: &Scene| scene.ask(&scene.client, http).is_ok();
    let echoed =
        |scene: &Scene| scene.client.tcp(tcp, &["echo", "x"]).is_ok_and(|echo| echo.is_ok());
    let (v4, v6) = (format!("{}/32", client.v4()), format!("{}/128", client.v6()));
    let table: [(&str, &str, Value, bool, bool); 6] = [
        ("port", "Deny", json!([[[{ "destinationPorts": [HTTP] }]]]), false, true),
        ("address", "Allow", json!([[[{ "sourceIps": [v4, v6] }]]]), true, true),
        ("other-address", "Allow", json!([[[{ "sourceIps": ["192.0.2.0/24"] }]]]), false, false),
        ("namespace", "Allow", json!([[[{ "namespaces": [{ "Prefix": "la" }] }]]]), true, true),
        ("nobody", "Allow", json!([]), false, false),
        (
            "both-clauses",
            "Deny",
            json!([[[{ "destinationPorts": [TCP] }],
                    [{ "principals": [{ "Suffix": "/sa/client" }] }]]]),
            true,
            false,
        ),
    ];
    for (name, action, rules, http_may, tcp_may) in table {
        scene.mesh.policy(name, action, &rules);
        scene.apply_policy(name).unwrap();
        assert_eq!((answered(&scene), echoed(&scene)), (http_may, tcp_may), "{name}");
        // A dry run decides nothing.
        scene.mesh.policy(name, action, &rules).set("dryRun", json!(true));
        scene.apply().unwrap();
        wait::until("dry run", SOON, || Ok((answered(&scene) && echoed(&scene)).then_some(())))
            .unwrap();
        scene.mesh.remove_policy(name);
        scene.apply().unwrap();
        scene.b.with_proxy(|proxy| proxy.wait_policy(name, false)).unwrap();
    }
}

#[test]
fn a_policy_that_has_not_come_denies_after_a_while() {
    let mut scene = start(&[]).unwrap();
    scene.ask_until(&scene.client, web(80)[0]).unwrap();
    scene.mesh.select("not-yet", NAMESPACE, &[&scene.server]);
    scene.apply().unwrap();
    let waits = |dump: &Value| dump.to_string().contains("lab/not-yet");
    scene.b.with_proxy(|proxy| proxy.wait_dump("the reference", waits)).unwrap();
    let mark = scene.b.with_proxy(|proxy| Ok(proxy.log().mark())).unwrap();
    assert!(scene.ask(&scene.client, web(80)[0]).is_err());
    let named = |line: &mesh_tests::log::Line| line.field("error").contains("lab/not-yet");
    scene.b.with_proxy(|proxy| proxy.wait_access(mark, "it", named)).unwrap();
    let labels = [("policy", "lab/not-yet"), ("reason", "missing")];
    let denied = |proxy: &mut mesh_tests::Proxy| {
        Ok(proxy.metrics()?.sum("istio_policy_unavailable_denials_total", &labels))
    };
    assert!(scene.b.with_proxy(denied).unwrap() > 0.5);
    // It comes while a connection waits for it.
    let to = web(TCP)[0].to_string();
    let waiting = scene.client.spawn(["tcp", &to, "wait", "patience"]).unwrap();
    let rules = json!([[[{ "namespaces": [{ "Exact": NAMESPACE }] }]]]);
    let policy = scene.mesh.policy("not-yet", "Allow", &rules);
    policy.set("scope", json!("WorkloadSelector"));
    scene.apply_policy("not-yet").unwrap();
    waiting.finish(SOON).unwrap().ok().unwrap();
}

/// A policy that was there before denies a workload's connections from when the workload names it.
#[test]
fn a_policy_that_comes_to_apply_closes_what_it_denies() {
    let mut scene = start(&[]).unwrap();
    scene.ask_until(&scene.client, web(80)[0]).unwrap();
    let rules = json!([[[{ "destinationPorts": [TCP] }]]]);
    scene.mesh.policy("chosen", "Deny", &rules).set("scope", json!("WorkloadSelector"));
    scene.apply_policy("chosen").unwrap();
    let to = web(TCP)[0].to_string();
    let mut open = scene.client.spawn(["tcp", &to, "hold"]).unwrap();
    open.says("open", SOON).unwrap();
    scene.mesh.select("chosen", NAMESPACE, &[&scene.server]);
    scene.apply().unwrap();
    open.says("closed", SOON).unwrap();
}

/// What istiod makes of a rule on HTTP alone, beside one on the namespace: it denies as its status says, without the
/// HTTP part, and allows nothing.
#[test]
fn a_condition_that_says_nothing_denies_and_never_allows() {
    let mut scene = start(&[]).unwrap();
    scene.ask_until(&scene.client, web(80)[0]).unwrap();
    let rules = json!([[[{}], [{ "namespaces": [{ "Exact": NAMESPACE }] }]]]);
    for action in ["Deny", "Allow"] {
        scene.mesh.policy("http-only", action, &rules);
        scene.apply_policy("http-only").unwrap();
        assert!(scene.ask(&scene.client, web(80)[0]).is_err(), "{action}");
        scene.mesh.remove_policy("http-only");
        scene.apply().unwrap();
        scene.b.with_proxy(|proxy| proxy.wait_policy("http-only", false)).unwrap();
        scene.ask_until(&scene.client, web(80)[0]).unwrap();
    }
}

/// What a policy says of a connection is in the log, above all what one on trial would do.
#[test]
fn what_is_on_trial_is_told() {
    let mut scene = start(&[("AUTHZ_POLICY_INFO_LOGGING", "true")]).unwrap();
    let rules = json!([[[{ "destinationPorts": [HTTP] }]]]);
    scene.mesh.policy("trial", "Deny", &rules).set("dryRun", json!(true));
    scene.mesh.policy("real", "Allow", &json!([[[{ "namespaces": [{ "Exact": NAMESPACE }] }]]]));
    scene.apply_policy("real").unwrap();
    scene.b.with_proxy(|proxy| proxy.wait_policy("trial", true)).unwrap();
    scene.ask_until(&scene.client, web(80)[0]).unwrap();
    let log = scene.b.with_proxy(|proxy| Ok(proxy.log())).unwrap();
    for (policy, says) in
        [("trial", "would be denied by this dry-run policy"), ("real", "explicitly allowed")]
    {
        let told = |line: &String| {
            let name = format!("policy=lab/{policy}");
            line.contains("\tinfo\t") && line.contains(says) && line.contains(&name)
        };
        let found = || Ok(log.since(0).iter().any(told).then_some(()));
        wait::until(policy, SOON, found).unwrap();
    }
}

/// A denial that comes later ends what is open; a dry run, another's policy and a missing one do not.
#[test]
fn a_new_policy_closes_what_it_denies_and_nothing_else() {
    let mut scene = start(&[]).unwrap();
    scene.ask_until(&scene.client, web(80)[0]).unwrap();
    let [tunnelled, plain] =
        [(&scene.client, web(TCP)[0]), (&scene.outsider, scene.server_at(TCP)[1])].map(
            |(from, to)| {
                let mut program = from.spawn(["tcp", &to.to_string(), "hold"]).unwrap();
                program.says("open", SOON).unwrap();
                program
            },
        );
    let (mut tunnelled, mut plain) = (tunnelled, plain);
    let mark = scene.b.with_proxy(|proxy| Ok(proxy.log().mark())).unwrap();
    let rules = json!([[[{ "destinationPorts": [TCP] }]]]);
    scene.mesh.policy("dry", "Deny", &rules).set("dryRun", json!(true));
    scene.mesh.policy("other", "Deny", &json!([[[{ "destinationPorts": [HTTP] }]]]));
    scene.mesh.select("missing", NAMESPACE, &[&scene.server]);
    scene.apply_policy("other").unwrap();
    scene.b.with_proxy(|proxy| proxy.wait_policy("dry", true)).unwrap();
    assert!(tunnelled.is_running() && plain.is_running());
    // Who has no identity goes, and who has one stays.
    let rules = json!([[[{ "notPrincipals": [{ "Presence": [] }] }]]]);
    scene.mesh.policy("identified", "Deny", &rules);
    scene.apply_policy("identified").unwrap();
    plain.says("closed", SOON).unwrap();
    assert!(tunnelled.is_running());
    scene.mesh.policy("all", "Deny", &json!([[[{ "destinationPorts": [TCP] }]]]));
    scene.apply_policy("all").unwrap();
    tunnelled.says("closed", SOON).unwrap();
    for name in ["identified", "all"] {
        let told =
            format!("connection closed due to policy change: explicitly denied by: lab/{name}");
        scene
            .b
            .with_proxy(|proxy| {
                let is = |line: &mesh_tests::log::Line| line.field("error").contains(&told);
                proxy.wait_access(mark, name, is)
            })
            .unwrap();
    }
    let denied = [("response_flags", "DENY"), ("reporter", "destination")];
    scene
        .b
        .with_proxy(|proxy| {
            let closed = proxy.metrics()?.sum("istio_tcp_connections_closed_total", &denied);
            assert!(closed >= 2.0, "{closed}");
            Ok(())
        })
        .unwrap();
}
