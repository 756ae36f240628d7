//! What stands between a node proxy and istiod fails in every way that TCP can. Whatever is established goes on,
//! what is known is served, the log says what is wrong, and once it is over what was missed is made good.

use std::time::Duration;

use anyhow::Context as _;
use mesh_tests::{
    Program,
    fault_proxy::{Ending, Fault, FaultProxy},
    topology::NAMESPACE,
    wait::{self, SOON},
};

use crate::world::World;

/// Where the node proxies are told that istiod is: at the end of their default route.
const DOOR: ([u8; 4], u16) = ([10, 77, 0, 254], 15012);
/// A stream that has gone silent is given up 40 s after its last sign of life at the latest: PING after 30, and
/// 10 for the answer.
const PING: Duration = Duration::from_secs(60);

/// A mesh that hears of istiod through the fault proxy alone.
struct Behind {
    world: World,
    door: FaultProxy,
    /// It exchanges something all the time, and no policy of these tests is about it.
    open: Program,
}

/// What was said until now on each node, and by the open connection.
struct Mark {
    logs: [u64; 2],
    ticks: u64,
}

impl Behind {
    fn new() -> Self {
        let mut world = World::new("");
        let (ip, port) = DOOR;
        let listen = (ip, port).into();
        let door = FaultProxy::start(world.scene.lab.wire(), listen, world.istiod()).unwrap();
        world.tell(door.address());
        world.begin(&[]);
        world.works();
        let open = world.ticking();
        Self { world, door, open }
    }

    /// How many round trips the open connection has made, in twenties.
    fn ticks(&self) -> u64 {
        let said = self.open.output();
        let mut lines = said.lines().rev();
        lines.find_map(|line| line.strip_prefix("at ")?.parse().ok()).unwrap_or(0)
    }

    /// Bytes go to the server and back on the open connection, now.
    fn flows(&mut self) {
        let before = self.ticks();
        // The first may have been on its way.
        let flowed =
            wait::until("round trips", SOON, || Ok((self.ticks() > before + 20).then_some(())));
        flowed.context(self.open.errors()).unwrap();
        assert!(self.open.is_running(), "{}", self.open.errors());
    }

    fn mark(&self) -> Mark {
        let mark =
            |node: &mesh_tests::Node| node.with_proxy(|proxy| Ok(proxy.log().mark())).unwrap();
        Mark { logs: [&self.world.scene.a, &self.world.scene.b].map(mark), ticks: self.ticks() }
    }

    /// Waits until both node proxies have said this since the mark.
    fn says(&self, mark: &Mark, sentence: &str, deadline: Duration) {
        let Mark { logs: [a, b], .. } = *mark;
        for (node, mark) in [(&self.world.scene.a, a), (&self.world.scene.b, b)] {
            let log = node.with_proxy(|proxy| Ok(proxy.log())).unwrap();
            let said = || {
                let has = |line: &String| line.contains("\txds") && line.contains(sentence);
                Ok(log.since(mark).iter().any(has).then_some(()))
            };
            let what = format!("node {} to say \"{sentence}\"", node.name());
            wait::until(&what, deadline, said).with_context(|| log.tail(8)).unwrap();
        }
    }

    /// What is known is served, and what is open goes on.
    fn served(&mut self, mark: &Mark) {
        self.world.works();
        self.flows();
        assert!(self.ticks() > mark.ticks, "it stood still");
    }

    /// Has trouble, in which both node proxies lose their streams and say why; makes a change meanwhile, which they
    /// do not hear of; and has it over.
    fn survives(&mut self, fault: Fault, cut: bool, sentence: &str, deadline: Duration) {
        let mark = self.mark();
        self.door.set(fault);
        if cut {
            self.door.cut();
        }
        let change = closed();
        self.world.change("apply", &change).unwrap();
        self.says(&mark, sentence, deadline);
        // They know as much as before: the Service is served, though istiod would have it closed.
        self.served(&mark);
        let back = self.mark();
        self.door.set(Fault::None);
        self.says(&back, "connected to the control plane", SOON);
        self.world.refused();
        self.flows();
        self.world.change("delete", &change).unwrap();
        self.served(&mark);
    }
}

/// Closes the server's HTTP port. It is long, so that it does not come in one piece; and of the whole namespace, so
/// that no workload refers to it: one that came with a policy that has not would be closed at once.
fn closed() -> String {
    let filler: Vec<_> = (0..400).map(|n| format!("cluster.local/ns/nowhere/sa/{n:032}")).collect();
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: closed, namespace: {NAMESPACE}}}\n\
         spec: {{action: DENY, rules: [\
         {{to: [{{operation: {{ports: [\"8080\"]}}}}]}}, {{from: [{{source: {{principals: [{}]}}}}]}}]}}\n",
        filler.join(", ")
    )
}

#[test]
fn nobody_to_connect_to() {
    let mut mesh = Behind::new();
    mesh.survives(Fault::Refuse, true, "Connection refused", SOON);
    mesh.survives(Fault::Silent, true, "no connection within 5 s", SOON);
    mesh.survives(Fault::Garbage, true, "TLS with the control plane failed", SOON);
}

#[test]
fn broken_in_the_middle_of_a_message() {
    let mut mesh = Behind::new();
    mesh.survives(Fault::Cut(5000, Ending::Reset), false, "Connection reset by peer", SOON);
    mesh.survives(Fault::Cut(5000, Ending::Close), false, "closed in the middle", SOON);
    mesh.survives(Fault::Corrupt, false, "decrypt", SOON);
}

#[test]
fn nothing_comes_through() {
    let mut mesh = Behind::new();
    // It heals before anybody has noticed: the stream goes on as if nothing had been.
    let (mark, change) = (mesh.mark(), closed());
    mesh.door.set(Fault::Hole);
    mesh.world.change("apply", &change).unwrap();
    mesh.served(&mark);
    mesh.door.set(Fault::None);
    mesh.world.refused();
    mesh.world.change("delete", &change).unwrap();
    mesh.served(&mark);
    // It does not.
    mesh.survives(Fault::Hole, false, "no answer to PING either", PING);
}

#[test]
fn a_trickle() {
    let mut mesh = Behind::new();
    // What flows, flows slowly, and arrives.
    let (mark, change) = (mesh.mark(), closed());
    mesh.door.set(Fault::Trickle(1000));
    mesh.world.change("apply", &change).unwrap();
    mesh.served(&mark);
    mesh.world.refused();
    mesh.world.change("delete", &change).unwrap();
    mesh.served(&mark);
    // A new connection would take minutes.
    mesh.survives(Fault::Trickle(20), true, "no connection within 5 s", SOON);
}
