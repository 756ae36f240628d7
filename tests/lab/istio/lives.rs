//! Things that come and go while clients work.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use mesh_tests::{
    Program,
    wait::{self, SOON},
};
use nix::sys::signal::Signal;
use serde_json::Value;

use super::{
    authorization::policy,
    bed::{Bed, KUBERNETES, KubePod},
};
use crate::report::Report;

pub(super) fn check(bed: &mut Bed, report: &mut Report) -> Result<()> {
    report.stage("while clients work");
    report.check("rolled", || rolled(bed));
    report.check("labelled", || labelled(bed));
    report.check("node-proxy-killed", || killed(bed));
    report.check("node-proxy-deleted", || deleted(bed));
    report.check("node-proxy-rolled", || rolled_over(bed));
    report.check("istio-cni-killed", || without_cni(bed));
    report.check("istiod-killed", || without_istiod(bed));
    Ok(())
}

fn start_loop(bed: &Bed, from: &KubePod, url: &str) -> Result<Program> {
    let mut client = bed.exec(from, &["loop", url])?;
    client.says("looping", SOON)?;
    Ok(client)
}

/// Ends the loop: requests held, and the failures.
fn end_loop(mut client: Program) -> Result<(u64, Vec<String>)> {
    client.signal(Signal::SIGTERM)?;
    client.wait(SOON)?;
    let said = client.output();
    let line = said.lines().last().context("it says nothing")?;
    let sum: Value = serde_json::from_str(line).with_context(|| said.clone())?;
    let failures = sum.get("failures").and_then(Value::as_array).context("no failures")?;
    let failures = failures.iter().map(|one| one.as_str().unwrap_or_default().to_owned());
    Ok((sum.get("held").and_then(Value::as_u64).unwrap_or_default(), failures.collect()))
}

/// A Deployment is rolled while a client loops.
fn rolled(bed: &Bed) -> Result<String> {
    let client = bed.pod("shop", "client")?;
    let before = wait::retry("two servers", KUBERNETES, || bed.servers())?;
    let running = start_loop(bed, &client, "http://server/")?;
    bed.kubectl(&["-n", "shop", "rollout", "restart", "deployment/server"])?;
    bed.kubectl(&["-n", "shop", "rollout", "status", "deployment/server", "--timeout=90s"])?;
    wait::until("the old servers to go", KUBERNETES, || {
        let said = bed.kubectl(&["-n", "shop", "get", "pods", "-o", "name"])?;
        Ok((!before.iter().any(|pod| said.contains(&pod.name))).then_some(()))
    })?;
    let (held, failures) = end_loop(running)?;
    ensure!(
        failures.is_empty(),
        "{} of {held} requests failed: {:?}",
        failures.len(),
        failures.first()
    );
    Ok(format!("{held} requests, none failed"))
}

/// A namespace is labelled, and unlabelled, while traffic flows to its pod.
fn labelled(bed: &Bed) -> Result<String> {
    let (client, mover) = (bed.pod("shop", "client")?, bed.pod("moving", "mover")?);
    let mut open = bed.exec(&client, &["hold", &format!("{}:9000", mover.address)])?;
    open.says("open", SOON)?;
    let running = start_loop(bed, &client, &format!("http://{}:8080/", mover.address))?;
    let enrolled = |wanted: bool| {
        wait::until(&format!("mover to be enrolled: {wanted}"), KUBERNETES, || {
            Ok((bed.pod("moving", "mover")?.enrolled == wanted).then_some(()))
        })
    };
    bed.kubectl(&["label", "namespace", "moving", "istio.io/dataplane-mode=ambient"])?;
    enrolled(true)?;
    let mark = bed.proxy_of(&mover)?.log().mark();
    let inbound = bed.proxy_of(&mover)?.wait_access(mark, "mover by HBONE", |line| {
        line.field("direction") == "inbound"
            && line.field("dst.addr").starts_with(&mover.address)
            && !line.field("src.identity").is_empty()
    });
    inbound.context("labelled")?;
    bed.kubectl(&["label", "namespace", "moving", "istio.io/dataplane-mode-"])?;
    enrolled(false)?;
    bed.reaches(&client, &format!("http://{}:8080/", mover.address))?;
    let (held, failures) = end_loop(running)?;
    let lives = open.is_running();
    // Clients hear of an un-enrolment from istiod, a debounce of 100 ms after istio-cni has taken its rules away.
    let span = span(&failures)?;
    ensure!(span < 2000, "requests failed for {span} ms: {failures:?}");
    let lost = failures.len();
    let open = if lives { "lives" } else { "was ended" };
    Ok(format!(
        "{held} requests held, {lost} failed within {span} ms; a connection from before {open}"
    ))
}

/// From the first failure to the last, in milliseconds.
fn span(failures: &[String]) -> Result<i64> {
    match (failures.first(), failures.last()) {
        (Some(first), Some(last)) => Ok(moment(last)? - moment(first)?),
        _ => Ok(0),
    }
}

/// The millisecond of the day that a failure begins with.
fn moment(failure: &str) -> Result<i64> {
    let clock = failure.split(' ').next().unwrap_or_default();
    let parts: Vec<f64> = clock.split(':').map_while(|part| part.parse().ok()).collect();
    let [hours, minutes, seconds] = parts.as_slice() else { bail!("no time in {failure}") };
    #[expect(clippy::cast_possible_truncation, reason = "a day has few milliseconds")]
    let moment = ((hours * 60.0 + minutes) * 60_000.0 + seconds * 1000.0) as i64;
    Ok(moment)
}

/// The node proxy of the client's node is killed: nothing goes past it, and its kubelet starts it again.
fn killed(bed: &mut Bed) -> Result<String> {
    let client = bed.pod("shop", "client")?;
    let [_, far] = bed.servers()?;
    let url = format!("http://{}:8080/", far.address);
    bed.reaches(&client, &url)?;
    let before = bed.proxy_pod(&client.node)?;
    bed.kill_proxy(&client.node)?;
    let refused = bed.refused(&client, &url)?;
    wait::until("kubelet to start it again", KUBERNETES, || {
        let now = bed.proxy_pod(&client.node).ok();
        Ok(now.filter(|now| now.name == before.name && now.restarts == before.restarts + 1))
    })?;
    bed.find_proxies()?;
    bed.reaches(&client, &url)?;
    wait::retry("its Service", Duration::from_secs(20), || bed.get(&client, "http://server/"))?;
    Ok(format!("killed: \"{refused}\"; kubelet started it again: answered"))
}

/// Its pod is deleted: the `DaemonSet` makes another, and in between nothing goes past it.
fn deleted(bed: &mut Bed) -> Result<String> {
    let client = bed.pod("shop", "client")?;
    let [_, far] = bed.servers()?;
    let url = format!("http://{}:8080/", far.address);
    let before = bed.proxy_pod(&client.node)?;
    let running = start_loop(bed, &client, &url)?;
    let mark = bed.proxy_of(&far)?.log().mark();
    bed.kubectl(&["-n", "istio-system", "delete", "pod", &before.name])?;
    bed.rolled_out()?;
    bed.find_proxies()?;
    bed.reaches(&client, &url)?;
    let (held, failures) = end_loop(running)?;
    let seen = bed.proxy_of(&far)?.log().access_since(mark);
    let past = seen.iter().find(|line| {
        line.field("src.addr").starts_with(&format!("{}:", client.address))
            && line.field("src.identity").is_empty()
    });
    ensure!(past.is_none(), "one went past it: {}", past.context("none")?.text);
    let span = span(&failures)?;
    Ok(format!("another pod: {held} requests held, {} failed within {span} ms", failures.len()))
}

/// The `DaemonSet` is rolled while a client loops: the new one serves before the old one leaves.
fn rolled_over(bed: &mut Bed) -> Result<String> {
    let client = bed.pod("shop", "client")?;
    let before = bed.proxy_pod(&client.node)?;
    let running = start_loop(bed, &client, "http://server/")?;
    bed.kubectl(&["-n", "istio-system", "rollout", "restart", "daemonset/ztunnel"])?;
    bed.rolled_out()?;
    wait::until("the old node proxy to end", KUBERNETES, || {
        let all = bed.kubectl(&["-n", "istio-system", "get", "pods", "-o", "name"])?;
        Ok((!all.contains(&before.name)).then_some(()))
    })?;
    bed.find_proxies()?;
    bed.reaches(&client, "http://server/")?;
    let (held, failures) = end_loop(running)?;
    ensure!(failures.is_empty(), "{} of {held} requests failed: {failures:?}", failures.len());
    Ok(format!("{held} requests, none failed"))
}

/// Without istio-cni's agent all goes on but that no pod starts; when it is back, one does, and is enrolled.
fn without_cni(bed: &Bed) -> Result<String> {
    let client = bed.pod("shop", "client")?;
    let before = bed.pod("shop", "other")?;
    let running = start_loop(bed, &client, "http://server/")?;
    bed.kill("node-a/cni")?;
    bed.kubectl(&["-n", "shop", "delete", "pod", &before.name, "--wait=false"])?;
    wait::until("kubelet to be refused a pod", KUBERNETES, || {
        let about =
            ["-n", "shop", "get", "events", "--field-selector", "reason=FailedCreatePodSandBox"];
        Ok(bed.kubectl(&about)?.contains("istio-cni").then_some(()))
    })?;
    bed.start_again("cni.sh", "node-a")?;
    let other = wait::until("another pod", KUBERNETES, || {
        let pod = bed.pod("shop", "other").ok();
        Ok(pod.filter(|pod| pod.name != before.name && pod.enrolled))
    })?;
    bed.reaches(&other, "http://server/")?;
    let (held, failures) = end_loop(running)?;
    ensure!(failures.is_empty(), "{} of {held} requests failed: {failures:?}", failures.len());
    Ok(format!("{held} requests, none failed; {} waited for it, and is enrolled", other.name))
}

/// Without istiod what is open goes on, new connections are made, and the log says that it is gone; when it is
/// back, what it says counts.
fn without_istiod(bed: &Bed) -> Result<String> {
    let client = bed.pod("shop", "client")?;
    let [_, far] = bed.servers()?;
    let mut open = bed.exec(&client, &["hold", &format!("{}:9000", far.address)])?;
    open.says("open", SOON)?;
    let log = bed.proxy_of(&client)?.log();
    let mark = log.mark();
    bed.kill("istiod")?;
    let line = wait::until("a line on the control plane", SOON, || {
        let lines = log.since(mark);
        Ok(lines.into_iter().find(|line| line.contains("\twarn\t") && line.contains("xds")))
    })?;
    bed.reaches(&client, "http://server/")?;
    bed.reaches(&client, &format!("http://{}:8080/", far.address))?;
    bed.start_again("start.sh", "istiod")?;
    let (other, url) = (bed.pod("shop", "other")?, format!("http://{}:8080/", far.address));
    bed.reaches(&other, &url)?;
    let objects =
        policy("DENY", "- from: [{source: {principals: [cluster.local/ns/shop/sa/other]}}]");
    bed.apply(&objects)?;
    bed.refused(&other, &url)?;
    bed.delete(&objects)?;
    bed.reaches(&other, &url)?;
    ensure!(open.is_running(), "an open connection ended: {}", open.errors());
    let said = line.splitn(4, '\t').nth(3).unwrap_or_default().replace('\t', " ");
    Ok(format!("connections go on, and a policy counts when it is back; the log: {said:.120}"))
}
