//! A policy in the shape of Istio's `/config_dump`. The rules are read back from the compiled condition, so
//! that they need not be kept a second time.

use crate::{
    Action, Predicate, StringMatch,
    wire::{Authorization, Scope},
};
use serde_json::{Map, Value, json};
use std::slice;

impl Authorization {
    /// The policy in the shape of Istio's `/config_dump`. What was left out when it was read is not in it.
    #[must_use]
    pub fn dump(&self) -> Value {
        let name = self.name().as_str();
        json!({
            "name": name.split_once('/').map_or(name, |(_, name)| name),
            "namespace": self.namespace.as_str(),
            "scope": match self.scope {
                Scope::Global => "Global",
                Scope::Namespace => "Namespace",
                Scope::WorkloadSelector => "WorkloadSelector",
            },
            "action": match self.policy.action {
                Action::Allow => "Allow",
                Action::Deny => "Deny",
            },
            "rules": parts(&self.policy.when).iter().map(rule).collect::<Value>(),
            "dryRun": self.policy.dry_run,
        })
    }
}

/// What a condition is made of: itself, where it is not made of others.
pub(crate) fn parts(predicate: &Predicate) -> &[Predicate] {
    match predicate {
        Predicate::All(parts) | Predicate::Any(parts) => parts,
        one => slice::from_ref(one),
    }
}

fn rule(rule: &Predicate) -> Value {
    parts(rule).iter().map(|clause| parts(clause).iter().map(one).collect::<Value>()).collect()
}

/// A match: what must hold is in an `Any` of its kind, what must not is alone in a `Not`.
fn one(predicate: &Predicate) -> Value {
    let mut lists = Map::new();
    for part in parts(predicate) {
        let (is_negative, conditions) = match part {
            Predicate::Not(condition) => (true, slice::from_ref(&**condition)),
            positive => (false, parts(positive)),
        };
        for (key, value) in conditions.iter().filter_map(|c| condition(c, is_negative)) {
            let list = lists.entry(key).or_insert_with(|| Value::Array(Vec::new()));
            if let Value::Array(list) = list {
                list.push(value);
            }
        }
    }
    lists.into()
}

fn condition(predicate: &Predicate, is_negative: bool) -> Option<(&'static str, Value)> {
    let key = |positive, negative| if is_negative { negative } else { positive };
    Some(match predicate {
        Predicate::SourceNamespace(m) => (key("namespaces", "notNamespaces"), text(m)),
        Predicate::SourcePrincipal(m) => (key("principals", "notPrincipals"), text(m)),
        Predicate::SourceServiceAccount(namespace, account) => (
            key("serviceAccounts", "notServiceAccounts"),
            json!({ "namespace": namespace.as_str(), "serviceAccount": account.as_str() }),
        ),
        Predicate::SourceIp(block) => (key("sourceIps", "notSourceIps"), block.to_string().into()),
        Predicate::DestinationIp(block) => {
            (key("destinationIps", "notDestinationIps"), block.to_string().into())
        }
        Predicate::DestinationPort(port) => {
            (key("destinationPorts", "notDestinationPorts"), (*port).into())
        }
        // Istio's messages hold none of these.
        Predicate::All(_) | Predicate::Any(_) | Predicate::Not(_) | Predicate::Path(_) => {
            return None;
        }
    })
}

fn text(m: &StringMatch) -> Value {
    match m {
        StringMatch::Exact(text) => json!({ "Exact": text }),
        StringMatch::Prefix(text) => json!({ "Prefix": text }),
        StringMatch::Suffix(text) => json!({ "Suffix": text }),
        StringMatch::Present => json!({ "Presence": [] }),
    }
}
