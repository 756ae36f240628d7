//! From `istio.security` to the evaluator.

use crate::{Action, Policy, Predicate, StringMatch, dump::parts};
use mesh_core::{Cidr, Interner, Namespace, PolicyName};
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
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Authorization {
    /// Its namespace.
    pub namespace: Namespace,
    /// To whom it applies.
    pub scope: Scope,
    /// What it says.
    pub policy: Arc<Policy>,
}

/// A policy that cannot be enforced.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum InvalidAuthorization {
    /// The name or the namespace cannot be one.
    Name,
    /// The scope is unknown.
    Scope(i32),
    /// The action is unknown; the scope is not.
    Action(i32, Scope),
}

impl InvalidAuthorization {
    /// To whom the policy would apply, where that can be told.
    #[must_use]
    pub const fn scope(&self) -> Option<Scope> {
        match self {
            Self::Name | Self::Scope(_) => None,
            Self::Action(_, scope) => Some(*scope),
        }
    }
}

impl fmt::Display for InvalidAuthorization {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name => f.write_str("name: not the name of a policy"),
            Self::Scope(value) => write!(f, "scope: unknown value {value}"),
            Self::Action(value, _) => write!(f, "action: unknown value {value}"),
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
        let scope = scope(message.scope).ok_or(InvalidAuthorization::Scope(message.scope))?;
        let action = match ProtoAction::try_from(message.action) {
            Ok(ProtoAction::Allow) => Action::Allow,
            Ok(ProtoAction::Deny) => Action::Deny,
            Err(_unknown) => return Err(InvalidAuthorization::Action(message.action, scope)),
        };
        let when = Predicate::Any(message.rules.iter().map(|r| rule(r, action)).collect());
        if action == Action::Deny && has_empty_match(&when) {
            tracing::warn!(
                policy = %name,
                "a rule of this DENY policy has a condition that says nothing, as istiod makes of one on HTTP \
                 alone: the rule denies without it",
            );
        }
        let policy = Arc::new(Policy { name, action, dry_run: message.dry_run, when });
        Ok(Self { namespace, scope, policy })
    }

    /// The name of the policy.
    #[must_use]
    pub fn name(&self) -> &PolicyName {
        &self.policy.name
    }
}

/// The scope of a policy whose bytes cannot be read whole, if it can be told.
#[must_use]
pub fn scope_of_unreadable(bytes: &[u8]) -> Option<Scope> {
    /// Of `istio.security.Authorization` only this, so that nothing else need be right but the frame around it.
    #[derive(Clone, Copy, prost::Message)]
    struct Scoped {
        #[prost(int32, optional, tag = "3")]
        scope: Option<i32>,
    }
    let mut scoped = Scoped::default();
    // What stands before a fault is read all the same.
    let whole = prost::Message::merge(&mut scoped, bytes).is_ok() && !bytes.is_empty();
    match scoped.scope {
        Some(value) => scope(value),
        // What is not there has its default.
        None => whole.then_some(Scope::Global),
    }
}

fn scope(value: i32) -> Option<Scope> {
    Some(match proto::Scope::try_from(value).ok()? {
        proto::Scope::Global => Scope::Global,
        proto::Scope::Namespace => Scope::Namespace,
        proto::Scope::WorkloadSelector => Scope::WorkloadSelector,
    })
}

/// Whether there is a match that is always true, as [`one`] makes of one without a field.
fn has_empty_match(when: &Predicate) -> bool {
    let clauses = parts(when).iter().flat_map(parts);
    clauses.flat_map(parts).any(|one| matches!(one, Predicate::All(parts) if parts.is_empty()))
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
    let accounts = |list: &[ServiceAccountMatch]| list.iter().map(account).collect();
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

/// What is no name matches nobody. To leave it out would make an empty list of it, which is everybody.
fn account(message: &ServiceAccountMatch) -> Predicate {
    match (message.namespace.parse(), message.service_account.parse()) {
        (Ok(namespace), Ok(account)) => Predicate::SourceServiceAccount(namespace, account),
        (Ok(_) | Err(_), Ok(_) | Err(_)) => Predicate::Any(vec![]),
    }
}

#[cfg(test)]
mod tests;
