//! What the policies of a set say of a flow, one by one, for the log: above all what those on trial
//! (`dry_run`) would do.

use crate::{Action, Attributes, Policy, PolicySet};
use mesh_core::PolicyName;
use std::fmt;

/// What a policy says of a flow. Prints without the policy's name, which is a field of the line.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Finding<'a> {
    /// It denies it.
    Denies(&'a PolicyName),
    /// It allows it.
    Allows(&'a PolicyName),
    /// It is on trial, and would deny it.
    WouldDeny(&'a PolicyName),
    /// It is on trial, and would allow it.
    WouldAllow(&'a PolicyName),
    /// `ALLOW` policies on trial exist and no others, and this one is the first that would not allow it; nor
    /// would any other.
    WouldNotAllow(&'a PolicyName),
}

impl<'a> Finding<'a> {
    /// The policy.
    #[must_use]
    pub const fn policy(&self) -> &'a PolicyName {
        match self {
            Self::Denies(policy)
            | Self::Allows(policy)
            | Self::WouldDeny(policy)
            | Self::WouldAllow(policy)
            | Self::WouldNotAllow(policy) => policy,
        }
    }
}

impl fmt::Display for Finding<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Denies(_) => "explicitly denied",
            Self::Allows(_) => "explicitly allowed",
            Self::WouldDeny(_) => "would be denied by this dry-run policy",
            Self::WouldAllow(_) => "would be allowed by this dry-run policy",
            Self::WouldNotAllow(_) => {
                "would be denied: dry-run allow policies exist, but none would allow"
            }
        })
    }
}

/// What the policies say, in the order in which they are consulted: a denial ends it, as it does the decision.
#[must_use]
pub fn findings<'a>(set: &'a PolicySet, flow: &impl Attributes) -> Vec<Finding<'a>> {
    let hits = |policy: &&Policy| policy.when.holds(flow);
    let mut found: Vec<_> =
        set.on_trial(Action::Deny).filter(hits).map(|p| Finding::WouldDeny(&p.name)).collect();
    if let Some(denying) = set.enforced(Action::Deny).find(hits) {
        found.push(Finding::Denies(&denying.name));
        return found;
    }
    let would = set.on_trial(Action::Allow).filter(hits).map(|p| Finding::WouldAllow(&p.name));
    let before = found.len();
    found.extend(would);
    let mut enforced = set.enforced(Action::Allow).peekable();
    if enforced.peek().is_none() && found.len() == before {
        found.extend(set.on_trial(Action::Allow).next().map(|p| Finding::WouldNotAllow(&p.name)));
    }
    found.extend(enforced.find(hits).map(|p| Finding::Allows(&p.name)));
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Entry, Predicate, predicate::tests::Flow};
    use std::sync::Arc;

    fn policy(policy: Policy) -> Entry {
        Entry::Known(Arc::new(policy))
    }

    fn when(matches: bool) -> Predicate {
        if matches { Predicate::All(vec![]) } else { Predicate::Any(vec![]) }
    }

    #[test]
    fn finds() {
        let (d, a): (&PolicyName, &PolicyName) =
            (&"ns/deny".parse().unwrap(), &"ns/allow".parse().unwrap());
        let of = |name: &PolicyName, action, dry_run, matches| {
            policy(Policy { name: name.clone(), action, dry_run, when: when(matches) })
        };
        let deny = |trial, matches| of(d, Action::Deny, trial, matches);
        let allow = |trial, matches| of(a, Action::Allow, trial, matches);
        for (case, entries, expect) in [
            ("nothing", vec![], vec![]),
            ("denied", vec![deny(false, true), allow(false, true)], vec![Finding::Denies(d)]),
            ("allowed", vec![deny(false, false), allow(false, true)], vec![Finding::Allows(a)]),
            ("trial denial", vec![deny(true, true)], vec![Finding::WouldDeny(d)]),
            ("trial denial misses", vec![deny(true, false)], vec![]),
            (
                "trial denial, allowed",
                vec![deny(true, true), allow(false, true)],
                vec![Finding::WouldDeny(d), Finding::Allows(a)],
            ),
            ("trial allows", vec![allow(true, true)], vec![Finding::WouldAllow(a)]),
            ("trial would not", vec![allow(true, false)], vec![Finding::WouldNotAllow(a)]),
            (
                "trial would not, but others decide",
                vec![allow(true, false), allow(false, false)],
                vec![],
            ),
        ] {
            let set = PolicySet::new(1, entries);
            assert_eq!(findings(&set, &Flow::plaintext()), expect, "{case}");
        }
    }
}
