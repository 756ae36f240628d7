//! Policies of the local file.

use mesh_proto::istio::security::{
    Action, Authorization, Clause, Match, Rule, Scope, ServiceAccountMatch, StringMatch,
    string_match::MatchType,
};

use super::address;
use super::fault::Fault;
use super::tokens::{Kind, Token, Tokens};
use super::value;

type Result<T> = std::result::Result<T, Box<Fault>>;

/// One item of `policies`. What decides whom it concerns and what it does has no default.
pub(super) fn read(tokens: &mut Tokens<'_>, start: &Token) -> Result<Authorization> {
    let mut policy = Authorization::default();
    let (mut scope, mut action, mut rules) = (None, None, false);
    value::map(tokens, start, |tokens, key, name, token| {
        match name {
            "name" => policy.name = value::text(token)?,
            "namespace" => policy.namespace = value::text(token)?,
            "scope" => {
                let words = [
                    ("Global", Scope::Global),
                    ("Namespace", Scope::Namespace),
                    ("WorkloadSelector", Scope::WorkloadSelector),
                ];
                scope = Some(value::one_of(&token, &words)?);
            }
            "action" => {
                let words = [("Allow", Action::Allow), ("Deny", Action::Deny)];
                action = Some(value::one_of(&token, &words)?);
            }
            "dryRun" if token.is_null() => {}
            "dryRun" => policy.dry_run = value::flag(&token)?,
            "rules" => {
                rules = true;
                value::list(tokens, &token, |tokens, item| {
                    policy.rules.push(rule(tokens, &item)?);
                    Ok(())
                })?;
            }
            _ => return Err(value::unknown(key)),
        }
        Ok(())
    })?;
    if policy.name.is_empty() {
        return Err(value::missing(start, "name"));
    }
    if policy.namespace.is_empty() {
        return Err(value::missing(start, "namespace"));
    }
    if !rules {
        return Err(value::missing(start, "rules"));
    }
    policy.set_scope(scope.ok_or_else(|| value::missing(start, "scope"))?);
    policy.set_action(action.ok_or_else(|| value::missing(start, "action"))?);
    Ok(policy)
}

fn rule(tokens: &mut Tokens<'_>, start: &Token) -> Result<Rule> {
    let mut rule = Rule::default();
    value::list(tokens, start, |tokens, item| {
        let mut clause = Clause::default();
        value::list(tokens, &item, |tokens, item| {
            clause.matches.push(r#match(tokens, &item)?);
            Ok(())
        })?;
        rule.clauses.push(clause);
        Ok(())
    })?;
    Ok(rule)
}

fn r#match(tokens: &mut Tokens<'_>, start: &Token) -> Result<Match> {
    let mut found = Match::default();
    value::map(tokens, start, |tokens, key, name, token| {
        match name {
            "namespaces" => found.namespaces = strings(tokens, &token)?,
            "notNamespaces" => found.not_namespaces = strings(tokens, &token)?,
            "principals" => found.principals = strings(tokens, &token)?,
            "notPrincipals" => found.not_principals = strings(tokens, &token)?,
            "serviceAccounts" => found.service_accounts = accounts(tokens, &token)?,
            "notServiceAccounts" => found.not_service_accounts = accounts(tokens, &token)?,
            "sourceIps" => {
                found.source_ips = value::each(tokens, &token, |item| address::cidr(&item))?
            }
            "notSourceIps" => {
                found.not_source_ips = value::each(tokens, &token, |item| address::cidr(&item))?;
            }
            "destinationIps" => {
                found.destination_ips = value::each(tokens, &token, |item| address::cidr(&item))?;
            }
            "notDestinationIps" => {
                found.not_destination_ips =
                    value::each(tokens, &token, |item| address::cidr(&item))?;
            }
            "destinationPorts" => found.destination_ports = value::each(tokens, &token, port)?,
            "notDestinationPorts" => {
                found.not_destination_ports = value::each(tokens, &token, port)?
            }
            _ => return Err(value::unknown(key)),
        }
        Ok(())
    })?;
    Ok(found)
}

#[expect(clippy::needless_pass_by_value, reason = "the shape that value::each takes")]
fn port(token: Token) -> Result<u32> {
    value::parsed::<u16>(&token, "a port").map(u32::from)
}

fn accounts(tokens: &mut Tokens<'_>, start: &Token) -> Result<Vec<ServiceAccountMatch>> {
    let mut accounts = Vec::new();
    value::list(tokens, start, |tokens, item| {
        let mut account = ServiceAccountMatch::default();
        value::map(tokens, &item, |_, key, name, token| {
            match name {
                "namespace" => account.namespace = value::text(token)?,
                "serviceAccount" => account.service_account = value::text(token)?,
                _ => return Err(value::unknown(key)),
            }
            Ok(())
        })?;
        if account.namespace.is_empty() || account.service_account.is_empty() {
            return Err(Fault::new(item.at, "namespace and serviceAccount must be given"));
        }
        accounts.push(account);
        Ok(())
    })?;
    Ok(accounts)
}

fn strings(tokens: &mut Tokens<'_>, start: &Token) -> Result<Vec<StringMatch>> {
    let mut strings = Vec::new();
    value::list(tokens, start, |tokens, item| {
        strings.push(StringMatch { match_type: Some(string(tokens, item)?) });
        Ok(())
    })?;
    Ok(strings)
}

/// `{Exact: x}`, the same as `!Exact x`, or the bare word `Presence`.
fn string(tokens: &mut Tokens<'_>, mut item: Token) -> Result<MatchType> {
    if let Some(variant) = item.tag.take() {
        return variant_of(tokens, &variant, item);
    }
    if let Kind::Scalar { text, .. } = &item.kind
        && text == "Presence"
    {
        return Ok(MatchType::Presence(()));
    }
    let mut found = None;
    value::map(tokens, &item, |tokens, key, name, token| {
        if found.is_some() {
            return Err(Fault::new(key.at, "one matcher to an item"));
        }
        found = Some(variant_of(tokens, name, token).map_err(|fault| {
            // The name is the key's; its place is better than the value's.
            if VARIANTS.contains(&name) { fault } else { value::unknown(key) }
        })?);
        Ok(())
    })?;
    found.ok_or_else(|| Fault::new(item.at, "expected one of Exact, Prefix, Suffix, Presence"))
}

const VARIANTS: [&str; 4] = ["Exact", "Prefix", "Suffix", "Presence"];

fn variant_of(tokens: &mut Tokens<'_>, variant: &str, token: Token) -> Result<MatchType> {
    let at = token.at;
    let needs_text = |token: Token| {
        if token.is_null() { Err(Fault::new(at, "expected text")) } else { value::text(token) }
    };
    match variant {
        "Exact" => needs_text(token).map(MatchType::Exact),
        "Prefix" => needs_text(token).map(MatchType::Prefix),
        "Suffix" => needs_text(token).map(MatchType::Suffix),
        // `[]`, null or nothing at all.
        "Presence" => {
            value::list(tokens, &token, |_, item| Err(Fault::new(item.at, "expected nothing")))
                .map(|()| MatchType::Presence(()))
        }
        _ => Err(Fault::new(at, "expected one of Exact, Prefix, Suffix, Presence")),
    }
}
