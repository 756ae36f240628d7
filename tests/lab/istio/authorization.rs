//! Who may: `AuthorizationPolicy` and `PeerAuthentication`.

use anyhow::{Context, Result, ensure};
use mesh_tests::wait::SOON;

use super::bed::{Bed, KubePod};
use crate::report::Report;

pub(super) fn check(bed: &Bed, report: &mut Report) -> Result<()> {
    report.stage("who may");
    let client = bed.pod("shop", "client")?;
    let other = bed.pod("shop", "other")?;
    let legacy = bed.pod("outside", "legacy")?;
    let [_, far] = bed.servers()?;
    let case =
        Case { bed, url: format!("http://{}:8080/", far.address), far, client, other, legacy };
    report.check("allow-principal", || {
        case.under(
            "ALLOW",
            "- from: [{source: {principals: [cluster.local/ns/shop/sa/client]}}]",
            &case.client,
            &case.other,
        )
    });
    report.check("allow-namespace", || {
        case.under("ALLOW", "- from: [{source: {namespaces: [shop]}}]", &case.client, &case.legacy)
    });
    report.check("deny-principal", || {
        case.under(
            "DENY",
            "- from: [{source: {principals: [cluster.local/ns/shop/sa/other]}}]",
            &case.client,
            &case.other,
        )
    });
    report.check("deny-source-ip", || {
        let rule = format!("- from: [{{source: {{ipBlocks: [{}]}}}}]", case.other.address);
        case.under("DENY", &rule, &case.client, &case.other)
    });
    report.check("deny-port", || case.port());
    report.check("closed-by-policy", || case.closed());
    report.check("strict", || case.strict());
    report.check("permissive-port", || case.per_port());
    report.check("probes", || case.probes());
    report.check("strict-everywhere", || case.strict_everywhere());
    report.check("allow-nothing", || case.allow_nothing());
    Ok(())
}

struct Case<'a> {
    bed: &'a Bed,
    url: String,
    far: KubePod,
    client: KubePod,
    other: KubePod,
    legacy: KubePod,
}

pub(super) fn policy(action: &str, rules: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: lab, namespace: shop}}\n\
         spec:\n  selector: {{matchLabels: {{app: server}}}}\n  action: {action}\n  rules:\n  {rules}\n"
    )
}

pub(super) fn strict(ports: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: lab, namespace: shop}}\n\
         spec:\n  selector: {{matchLabels: {{app: server}}}}\n  mtls: {{mode: STRICT}}\n{ports}"
    )
}

impl Case<'_> {
    /// With the policy the one is let in and the other is not, with a reason in our log; without, both are.
    fn under(
        &self,
        action: &str,
        rules: &str,
        friend: &KubePod,
        stranger: &KubePod,
    ) -> Result<String> {
        let objects = policy(action, rules);
        self.bed.reaches(stranger, &self.url)?;
        let mark = self.bed.proxy_of(&self.far)?.log().mark();
        self.bed.apply(&objects)?;
        self.bed.refused(stranger, &self.url)?;
        self.bed.get(friend, &self.url).context("a friend was refused")?;
        let reason = self.reason(mark, stranger)?;
        self.bed.delete(&objects)?;
        self.bed.reaches(stranger, &self.url)?;
        Ok(format!("{} is let in, {} is not: {reason}", friend.name, stranger.name))
    }

    /// What the log of the server's node says of the refusal.
    fn reason(&self, mark: u64, refused: &KubePod) -> Result<String> {
        let line = self.bed.proxy_of(&self.far)?.wait_access(mark, "the refusal", |line| {
            line.field("src.addr").starts_with(&format!("{}:", refused.address))
                && !line.field("error").is_empty()
        })?;
        Ok(format!("\"{}\"", line.field("error")))
    }

    /// A TCP connection to port 9000 of the server, which echoes.
    fn hold(&self, pod: &KubePod) -> Result<mesh_tests::Program> {
        let mut program = self.bed.exec(pod, &["hold", &format!("{}:9000", self.far.address)])?;
        program.says("open", SOON)?;
        Ok(program)
    }

    fn holds_not(&self, pod: &KubePod) -> Result<()> {
        mesh_tests::wait::until(&format!("{} to be refused port 9000", pod.name), SOON, || {
            Ok(self.hold(pod).is_err().then_some(()))
        })
    }

    fn port(&self) -> Result<String> {
        let objects = policy("DENY", "- to: [{operation: {ports: [\"9000\"]}}]");
        self.hold(&self.client)?;
        self.bed.apply(&objects)?;
        self.holds_not(&self.client)?;
        self.bed.get(&self.client, &self.url).context("port 8080 was refused as well")?;
        self.bed.delete(&objects)?;
        mesh_tests::wait::retry("port 9000 again", SOON, || self.hold(&self.client))?;
        Ok("port 9000 is refused while 8080 is served; then both are".into())
    }

    fn closed(&self) -> Result<String> {
        let mut open = self.hold(&self.other)?;
        let objects =
            policy("DENY", "- from: [{source: {principals: [cluster.local/ns/shop/sa/other]}}]");
        self.bed.apply(&objects)?;
        open.wait(SOON).context("the connection goes on")?;
        let said = open.errors();
        self.bed.delete(&objects)?;
        self.bed.reaches(&self.other, &self.url)?;
        Ok(format!("an open connection: {}", said.trim()))
    }

    fn strict(&self) -> Result<String> {
        self.bed.reaches(&self.legacy, &self.url)?;
        let mark = self.bed.proxy_of(&self.far)?.log().mark();
        self.bed.apply(&strict(""))?;
        self.bed.refused(&self.legacy, &self.url)?;
        self.bed.get(&self.client, &self.url).context("a pod of the mesh was refused")?;
        let reason = self.reason(mark, &self.legacy)?;
        Ok(format!("{} is refused: {reason}; {} is not", self.legacy.name, self.client.name))
    }

    fn per_port(&self) -> Result<String> {
        self.holds_not(&self.legacy)?;
        self.bed.apply(&strict("  portLevelMtls: {9000: {mode: PERMISSIVE}}\n"))?;
        mesh_tests::wait::retry("port 9000 to be PERMISSIVE", SOON, || self.hold(&self.legacy))?;
        ensure!(self.bed.get(&self.legacy, &self.url).is_err(), "port 8080 is PERMISSIVE as well");
        self.bed.apply(&strict(""))?;
        self.holds_not(&self.legacy)?;
        Ok("STRICT but for port 9000, which legacy may use".into())
    }

    /// A STRICT pod is still probed by its kubelet: none restarts, and a new one becomes ready.
    fn probes(&self) -> Result<String> {
        self.bed.kubectl(&["-n", "shop", "rollout", "restart", "deployment/server"])?;
        self.bed.kubectl(&[
            "-n",
            "shop",
            "rollout",
            "status",
            "deployment/server",
            "--timeout=90s",
        ])?;
        let pods = mesh_tests::wait::retry("two new servers", SOON, || self.bed.servers())?;
        ensure!(pods.iter().all(|pod| pod.enrolled), "a new pod is not enrolled");
        let restarts: u64 = pods.iter().map(|pod| pod.restarts).sum();
        ensure!(restarts == 0, "{restarts} restarts");
        ensure!(
            self.bed.get(&self.legacy, &format!("http://{}:8080/", pods[1].address)).is_err(),
            "not STRICT"
        );
        self.bed.delete(&strict(""))?;
        Ok("two new STRICT pods became ready by their kubelet's probes; no restart".into())
    }

    /// The whole mesh by the root namespace, as most meshes have it.
    fn strict_everywhere(&self) -> Result<String> {
        let [first, second] = self.bed.servers()?;
        let objects = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n\
             metadata: {name: default, namespace: istio-system}\nspec: {mtls: {mode: STRICT}}\n";
        let url = |pod: &KubePod| format!("http://{}:8080/", pod.address);
        self.bed.reaches(&self.legacy, &url(&first))?;
        self.bed.apply(objects)?;
        for pod in [&first, &second] {
            self.bed.refused(&self.legacy, &url(pod))?;
            self.bed.get(&self.client, &url(pod)).context("a pod of the mesh was refused")?;
        }
        self.bed.delete(objects)?;
        self.bed.reaches(&self.legacy, &url(&second))?;
        Ok(format!("{} is refused on both nodes", self.legacy.name))
    }

    /// A mesh that lets nobody in, and a policy that lets one in.
    fn allow_nothing(&self) -> Result<String> {
        let nothing = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
             metadata: {name: nothing, namespace: istio-system}\nspec: {}\n";
        let one =
            policy("ALLOW", "- from: [{source: {principals: [cluster.local/ns/shop/sa/client]}}]");
        let server = "http://server/";
        self.bed.apply(nothing)?;
        self.bed.refused(&self.client, server)?;
        self.bed.refused(&self.other, server)?;
        self.bed.apply(&one)?;
        self.bed.reaches(&self.client, server)?;
        ensure!(self.bed.get(&self.other, server).is_err(), "other was let in");
        self.bed.delete(nothing)?;
        self.bed.delete(&one)?;
        self.bed.reaches(&self.other, server)?;
        Ok("nobody is let in, then client alone".into())
    }
}
