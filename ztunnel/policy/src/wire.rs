//! From `istio.security` to the evaluator.

use crate::{Action, Policy, Predicate, StringMatch};
use mesh_core::{Cidr, Interner, Namespace, PolicyName, ServiceAccount};
use mesh_proto::istio::security::{
    self as proto, Action as ProtoAction, Clause, Match, Rule, ServiceAccountMatch,
    string_match::MatchType,
};
use std::{error::Error, fmt, net::IpAddr, sync::Arc};

pub use proto::Authorization as Message;

/// To whom a policy applies.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Scope {
    /// To every workload.
    Global,
    /// To the workloads of its namespace.
    Namespace,
    /// To the workloads that name it.
    WorkloadSelector,
}

/// A policy as the control plane sends it.
#[derive(Clone, Debug, PartialEq)]
pub struct Authorization {
    /// Its namespace.
    pub namespace: Namespace,
    /// To whom it applies.
    pub scope: Scope,
    /// What it says.
    pub policy: Arc<Policy>,
    /// What was sent, for the dump.
    pub message: Arc<Message>,
}

/// A policy that cannot be enforced.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum InvalidAuthorization {
    /// The name or the namespace cannot be one.
    Name,
    /// The scope is unknown.
    Scope(i32),
    /// The action is unknown.
    Action(i32),
}

impl fmt::Display for InvalidAuthorization {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name => f.write_str("name: not the name of a policy"),
            Self::Scope(value) => write!(f, "scope: unknown value {value}"),
            Self::Action(value) => write!(f, "action: unknown value {value}"),
        }
    }
}

impl Error for InvalidAuthorization {}

impl Authorization {
    /// Reads a message.
    ///
    /// # Errors
    ///
    /// Returns the field that cannot be used. A match that is malformed is left out of its list, as
    /// Istio has it.
    pub fn read(message: Message, names: &mut Interner) -> Result<Self, InvalidAuthorization> {
        let namespace = Namespace::interned(&message.namespace, names)
            .map_err(|_invalid| InvalidAuthorization::Name)?;
        let name = PolicyName::interned(&format!("{namespace}/{}", message.name), names)
            .map_err(|_invalid| InvalidAuthorization::Name)?;
        let scope = match proto::Scope::try_from(message.scope) {
            Ok(proto::Scope::Global) => Scope::Global,
            Ok(proto::Scope::Namespace) => Scope::Namespace,
            Ok(proto::Scope::WorkloadSelector) => Scope::WorkloadSelector,
            Err(_unknown) => return Err(InvalidAuthorization::Scope(message.scope)),
        };
        let action = match ProtoAction::try_from(message.action) {
            Ok(ProtoAction::Allow) => Action::Allow,
            Ok(ProtoAction::Deny) => Action::Deny,
            Err(_unknown) => return Err(InvalidAuthorization::Action(message.action)),
        };
        let when = Predicate::Any(message.rules.iter().map(|r| rule(r, action)).collect());
        let policy = Arc::new(Policy { name, action, dry_run: message.dry_run, when });
        Ok(Self { namespace, scope, policy, message: Arc::new(message) })
    }

    /// The name of the policy.
    #[must_use]
    pub fn name(&self) -> &PolicyName {
        &self.policy.name
    }
}

fn rule(rule: &Rule, action: Action) -> Predicate {
    Predicate::All(rule.clauses.iter().map(|c| clause(c, action)).collect())
}

fn clause(clause: &Clause, action: Action) -> Predicate {
    if clause.matches.is_empty() {
        return Predicate::All(vec![]);
    }
    Predicate::Any(clause.matches.iter().map(|m| one(m, action)).collect())
}

/// A match without a field is what istiod makes of a rule that has HTTP attributes only. Istio's proxy
/// never matches it, so that a `DENY` is inert while istiod reports that it is enforced. Ours is true in
/// a `DENY`, as reported, and never in an `ALLOW`.
fn one(message: &Match, action: Action) -> Predicate {
    let mut parts = Vec::new();
    let texts = |list: &[proto::StringMatch], of: fn(StringMatch) -> Predicate| {
        list.iter().filter_map(text).map(of).collect::<Vec<_>>()
    };
    let blocks = |list: &[proto::Address], of: fn(Cidr) -> Predicate| {
        list.iter().filter_map(block).map(of).collect::<Vec<_>>()
    };
    let ports = |list: &[u32]| {
        // Istio keeps the low 16 bits.
        list.iter()
            .map(|port| Predicate::DestinationPort((port & 0xffff).try_into().unwrap_or_default()))
            .collect::<Vec<_>>()
    };
    let accounts = |list: &[ServiceAccountMatch]| list.iter().filter_map(account).collect();
    let mut family = |positive: Vec<Predicate>, negative: Vec<Predicate>| {
        if !positive.is_empty() {
            parts.push(Predicate::Any(positive));
        }
        parts.extend(negative.into_iter().map(|part| Predicate::Not(Box::new(part))));
    };
    let m = message;
    family(
        texts(&m.namespaces, Predicate::SourceNamespace),
        texts(&m.not_namespaces, Predicate::SourceNamespace),
    );
    family(
        texts(&m.principals, Predicate::SourcePrincipal),
        texts(&m.not_principals, Predicate::SourcePrincipal),
    );
    family(accounts(&m.service_accounts), accounts(&m.not_service_accounts));
    family(
        blocks(&m.source_ips, Predicate::SourceIp),
        blocks(&m.not_source_ips, Predicate::SourceIp),
    );
    family(
        blocks(&m.destination_ips, Predicate::DestinationIp),
        blocks(&m.not_destination_ips, Predicate::DestinationIp),
    );
    family(ports(&m.destination_ports), ports(&m.not_destination_ports));
    match (parts.is_empty(), action) {
        (true, Action::Allow) => Predicate::Any(vec![]),
        (true, Action::Deny) | (false, Action::Allow | Action::Deny) => Predicate::All(parts),
    }
}

fn text(message: &proto::StringMatch) -> Option<StringMatch> {
    Some(match message.match_type.as_ref()? {
        MatchType::Exact(text) => StringMatch::Exact(text.clone()),
        MatchType::Prefix(text) => StringMatch::Prefix(text.clone()),
        MatchType::Suffix(text) => StringMatch::Suffix(text.clone()),
        MatchType::Presence(()) => StringMatch::Present,
    })
}

fn block(message: &proto::Address) -> Option<Cidr> {
    let ip: IpAddr = match message.address.len() {
        4 => <[u8; 4]>::try_from(message.address.as_slice()).ok()?.into(),
        16 => <[u8; 16]>::try_from(message.address.as_slice()).ok()?.into(),
        _ => return None,
    };
    Cidr::new(ip, u8::try_from(message.length).ok()?).ok()
}

fn account(message: &ServiceAccountMatch) -> Option<Predicate> {
    let namespace: Namespace = message.namespace.parse().ok()?;
    let account: ServiceAccount = message.service_account.parse().ok()?;
    Some(Predicate::SourceServiceAccount(namespace, account))
}

impl Authorization {
    /// The policy in the shape of Istio's `/config_dump`.
    #[must_use]
    pub fn dump(&self) -> serde_json::Value {
        use serde_json::json;
        let Message { name, namespace, rules, dry_run, .. } = &*self.message;
        let rule = |rule: &Rule| -> Vec<Vec<serde_json::Value>> {
            rule.clauses.iter().map(|c| c.matches.iter().map(dump_match).collect()).collect()
        };
        json!({
            "name": name,
            "namespace": namespace,
            "scope": match self.scope {
                Scope::Global => "Global",
                Scope::Namespace => "Namespace",
                Scope::WorkloadSelector => "WorkloadSelector",
            },
            "action": match self.policy.action {
                Action::Allow => "Allow",
                Action::Deny => "Deny",
            },
            "rules": rules.iter().map(rule).collect::<Vec<_>>(),
            "dryRun": dry_run,
        })
    }
}

fn dump_match(message: &Match) -> serde_json::Value {
    use serde_json::{Map, Value, json};
    let text = |m: &proto::StringMatch| match m.match_type.as_ref()? {
        MatchType::Exact(text) => Some(json!({ "Exact": text })),
        MatchType::Prefix(text) => Some(json!({ "Prefix": text })),
        MatchType::Suffix(text) => Some(json!({ "Suffix": text })),
        MatchType::Presence(()) => Some(json!({ "Presence": [] })),
    };
    let texts = |list: &[proto::StringMatch]| list.iter().filter_map(text).collect::<Vec<_>>();
    let blocks = |list: &[proto::Address]| {
        list.iter().filter_map(block).map(|b| Value::from(b.to_string())).collect::<Vec<_>>()
    };
    let ports = |list: &[u32]| list.iter().map(|port| Value::from(*port)).collect::<Vec<_>>();
    let accounts = |list: &[ServiceAccountMatch]| {
        list.iter()
            .map(|a| json!({ "namespace": a.namespace, "serviceAccount": a.service_account }))
            .collect::<Vec<_>>()
    };
    let m = message;
    let lists = [
        ("namespaces", texts(&m.namespaces)),
        ("notNamespaces", texts(&m.not_namespaces)),
        ("principals", texts(&m.principals)),
        ("notPrincipals", texts(&m.not_principals)),
        ("serviceAccounts", accounts(&m.service_accounts)),
        ("notServiceAccounts", accounts(&m.not_service_accounts)),
        ("sourceIps", blocks(&m.source_ips)),
        ("notSourceIps", blocks(&m.not_source_ips)),
        ("destinationIps", blocks(&m.destination_ips)),
        ("notDestinationIps", blocks(&m.not_destination_ips)),
        ("destinationPorts", ports(&m.destination_ports)),
        ("notDestinationPorts", ports(&m.not_destination_ports)),
    ];
    let filled = lists.into_iter().filter(|(_, list)| !list.is_empty());
    filled.map(|(key, list)| (key.to_owned(), Value::from(list))).collect::<Map<_, _>>().into()
}
