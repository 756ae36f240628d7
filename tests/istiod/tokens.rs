//! Who is who: tokens are reviewed by the API server, and what a node proxy may ask for depends on its node's pods.
//! And what holds while one or the other is gone.

use std::fs;

use anyhow::{Context as _, ensure};
use mesh_tests::{
    Node,
    wait::{self, SOON},
};
use serde_json::Value;

use crate::{
    cluster::{self, enrol, namespace, object},
    world::dump,
};

fn identity(namespace: &str, account: &str) -> String {
    format!("spiffe://cluster.local/ns/{namespace}/sa/{account}")
}

/// Waits until the state of the certificate of an identity begins with this.
fn certificate(node: &Node, identity: &str, state: &str) {
    let found = || {
        let dump = dump(node);
        let all = dump.get("certificates").and_then(Value::as_array).into_iter().flatten();
        let all: Vec<_> = all.map(|one| (one["identity"].clone(), one["state"].clone())).collect();
        let is = |state: &Value, begin: &str| state.as_str().is_some_and(|s| s.starts_with(begin));
        ensure!(all.iter().any(|(of, said)| of == identity && is(said, state)), "{all:?}");
        Ok(())
    };
    wait::retry(&format!("{identity} to be {state}"), SOON, found).unwrap();
}

/// Waits until the node proxy's log has this since the mark.
fn says(node: &Node, mark: u64, sentences: &[&str]) {
    let log = node.with_proxy(|proxy| Ok(proxy.log())).unwrap();
    let said = || {
        let has = |line: &String| sentences.iter().all(|sentence| line.contains(sentence));
        Ok(log.since(mark).iter().any(has).then_some(()))
    };
    let waited = wait::until(&format!("a line with {sentences:?}"), SOON, said);
    waited.with_context(|| log.tail(8)).unwrap();
}

#[test]
fn a_token_is_good_for_the_accounts_of_its_node() {
    let cluster = cluster::beside();
    let node = cluster.node("node-tokens").unwrap();
    cluster.node("node-other").unwrap();
    cluster.apply(&namespace("tokens", &["here", "there", "nowhere"])).unwrap();
    let here = object(("tokens", "here"), ("node-tokens", "10.9.4.1"), "here");
    let there = object(("tokens", "there"), ("node-other", "10.9.4.2"), "there");
    cluster.apply(&(here.clone() + &there)).unwrap();
    let of = |account: &str| identity("tokens", account);
    let good = cluster.token("ztunnel", "ztunnel-node-tokens", "istio-ca").unwrap();
    // istiod may not have heard of the pods yet.
    wait::retry("a certificate", SOON, || cluster.certificate(&good, &of("here"))).unwrap();
    let said = cluster.certificate(&good, &of("here")).unwrap();
    assert!(said.contains(&of("here")), "{said}");

    let other = cluster.token("ztunnel", "ztunnel-node-other", "istio-ca").unwrap();
    wait::retry("a certificate", SOON, || cluster.certificate(&other, &of("there"))).unwrap();
    let audience = cluster.token("ztunnel", "ztunnel-node-tokens", "somebody-else").unwrap();
    let unbound = cluster.token("ztunnel", "", "istio-ca").unwrap();
    let untrusted = cluster.token("istiod", "", "istio-ca").unwrap();
    let forged = format!("{}x", good.trim_end_matches(|c: char| c.is_ascii_alphanumeric()));
    for (what, token, account) in [
        ("an account of another node", &good, "there"),
        ("an account of this node with another node's token", &other, "here"),
        ("an account without a pod", &good, "nowhere"),
        ("a token for another audience", &audience, "here"),
        ("a token that is bound to no pod", &unbound, "here"),
        ("a token of an account that is no node proxy's", &untrusted, "here"),
        ("a token that nobody signed", &forged, "here"),
        ("no token", &String::new(), "here"),
    ] {
        let refused = cluster.certificate(token, &of(account)).err();
        let refused = refused.with_context(|| format!("{what} was good enough")).unwrap();
        assert!(format!("{refused:#}").contains("Unauthenticated"), "{what}: {refused:#}");
    }
    // A pod that has gone takes the right with it.
    cluster.delete(&here).unwrap();
    let gone = || Ok(cluster.certificate(&good, &of("here")).is_err().then_some(()));
    wait::until("a refusal", SOON, gone).unwrap();
    drop(node);
}

#[test]
fn a_node_proxy_waits_for_a_token_that_is_right() {
    let cluster = cluster::beside();
    let node = cluster.node("node-waits").unwrap();
    cluster.apply(&namespace("waits", &["mine", "theirs"])).unwrap();
    let mine = cluster.pod(&node, ("waits", "mine"), "mine").unwrap();
    let settings = cluster.settings(&node).unwrap();
    let file = cluster.token_file(&node);
    let good = fs::read_to_string(&file).unwrap();
    let audience = cluster.token("ztunnel", "ztunnel-node-waits", "somebody-else").unwrap();
    fs::write(&file, "not a token").unwrap();
    let settings: Vec<_> = settings.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
    let proxy = node.begin_proxy(&settings).unwrap();
    let log = proxy.log();
    for token in ["not a token", &audience] {
        let mark = log.mark();
        fs::write(&file, token).unwrap();
        let refused = || {
            let lines = log.since(mark);
            let mut refused = lines.iter().filter(|line| {
                line.contains("no stream from the control plane")
                    && line.contains("Unauthenticated")
            });
            // The first may have been of the token before.
            Ok(refused.nth(1).map(drop))
        };
        wait::until("the log to say that the token is refused", SOON, refused).unwrap();
        let readiness = proxy.readiness().unwrap();
        assert!(readiness.body.contains("state manager"), "{}", readiness.body);
    }
    drop(proxy);
    // Another node's token is good for what there is to know, and for no pod of this node.
    cluster.node("node-else").unwrap();
    let other = cluster.token("ztunnel", "ztunnel-node-else", "istio-ca").unwrap();
    fs::write(&file, other).unwrap();
    node.start_proxy(&settings).unwrap();
    enrol(&node, &mine, "waits", "mine").unwrap();
    certificate(&node, &identity("waits", "mine"), "Unavailable");
    says(&node, 0, &["sa/mine", "Unauthenticated", "does a pod of this service account run"]);
    fs::write(&file, good).unwrap();
    certificate(&node, &identity("waits", "mine"), "Available");
    // A pod that istiod has on another node gets nothing here, whoever has enrolled it.
    let stranger = node.pod("stranger").unwrap();
    let ip = stranger.v4().to_string();
    cluster.apply(&object(("waits", "stranger"), ("node-else", &ip), "theirs")).unwrap();
    let mark = node.with_proxy(|proxy| Ok(proxy.log().mark())).unwrap();
    enrol(&node, &stranger, "waits", "theirs").unwrap();
    let asked = stranger.fetch(&format!("http://{}:8080/", mine.v4())).unwrap();
    assert!(!asked.is_ok(), "{asked:?}");
    says(&node, mark, &["has not sent the workload of this pod (waits/stranger"]);
}

/// Without istiod, and without the API server behind it, all that is known works; what takes both waits for them.
#[test]
fn either_goes_and_comes_back() {
    let cluster = cluster::alone();
    let node = cluster.node("node-alone").unwrap();
    cluster.apply(&namespace("alone", &["asker", "asked", "late"])).unwrap();
    let client = cluster.pod(&node, ("alone", "asker"), "asker").unwrap();
    let server = cluster.pod(&node, ("alone", "asked"), "asked").unwrap();
    let late = cluster.pod(&node, ("alone", "late"), "late").unwrap();
    let _programs = server.serve(8080, 9000).unwrap();
    cluster.begin(&node, &[]).unwrap();
    enrol(&node, &client, "alone", "asker").unwrap();
    enrol(&node, &server, "alone", "asked").unwrap();
    let url = format!("http://{}:8080/", server.v4());
    let works = || wait::retry("an answer", SOON, || client.fetch(&url)?.ok()).map(drop).unwrap();
    works();
    let to = format!("{}:9000", server.v4());
    let mut open = client.spawn(["tcp", &to, "tick", "1000000", "25"]).unwrap();
    open.says("open", SOON).unwrap();
    let mark = || node.with_proxy(|proxy| Ok(proxy.log().mark())).unwrap();
    let before = mark();
    cluster.kill("istiod").unwrap();
    says(&node, before, &["control plane", "warn"]);
    works();
    let back = mark();
    cluster.restart("istiod").unwrap();
    says(&node, back, &["connected to the control plane"]);
    // The API server is who reviews tokens: without it nobody gets a certificate, and nobody loses one.
    cluster.kill("apiserver").unwrap();
    works();
    let before = mark();
    enrol(&node, &late, "alone", "late").unwrap();
    says(&node, before, &["identity", "sa/late"]);
    works();
    cluster.restart("apiserver").unwrap();
    certificate(&node, &identity("alone", "late"), "Available");
    cluster.in_order(&node).unwrap();
    assert!(open.is_running(), "{}", open.errors());
}
