//! Several changes in one packet to the kernel.

use super::{
    super::{netlink::Netlink, rules::Rules},
    lab::Lab,
};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    rule::{RuleAction, RuleAttribute, RuleMessage},
};

fn rule(priority: u32) -> RouteNetlinkMessage {
    let mut message = RuleMessage::default();
    message.header.family = AddressFamily::Inet;
    message.header.action = RuleAction::Nop;
    message.attributes = vec![RuleAttribute::Priority(priority)];
    RouteNetlinkMessage::NewRule(message)
}

#[test]
fn each_has_its_answer_and_none_stops_the_next() {
    let lab = Lab::new("bat");
    let flags = NLM_F_CREATE | NLM_F_EXCL;
    let asked = [7, 7, 8].map(|priority| (rule(priority), flags)).into();
    let answers = lab.pod.run(|| Netlink::open().unwrap().batch(asked)).unwrap().unwrap();
    let codes: Vec<_> =
        answers.iter().map(|answer| answer.as_ref().err().and_then(|e| e.raw_os_error())).collect();
    assert_eq!(codes, [None, Some(libc::EEXIST), None]);
    let none = lab.pod.run(|| Netlink::open().unwrap().batch(Vec::new())).unwrap().unwrap();
    assert!(none.is_empty());
    let foreign = lab.pod.run(|| Rules::open().unwrap().foreign()).unwrap().unwrap();
    assert!(foreign.is_empty(), "they are nobody's business: {foreign:?}");
}
