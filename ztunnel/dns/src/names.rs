//! The names that a client may mean by the one that it asks for.

use crate::Settings;
use mesh_core::Namespace;

/// A name to look for.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Alias {
    pub(crate) name: String,
    /// The requested name without the search domain that was cut off for this.
    pub(crate) stripped: Option<String>,
}

/// All of them, best first: the name itself, what Kubernetes would make of it, and the same without each
/// search domain that it ends with. The name is in lower case, without a final dot.
pub(crate) fn aliases(name: &str, client: &Namespace, settings: &Settings) -> Vec<Alias> {
    let mut found = Vec::with_capacity(16);
    let mut add = |name: String, stripped: Option<&str>| {
        if !found.iter().any(|alias: &Alias| alias.name == name) {
            found.push(Alias { name, stripped: stripped.map(str::to_owned) });
        }
    };
    let client = client.as_str().to_ascii_lowercase();
    let mut expand = |name: &str, stripped: Option<&str>| {
        add(name.to_owned(), stripped);
        expansions(name, &client, &settings.domain, |name| add(name, stripped));
    };
    expand(name, None);
    let domain = &settings.domain;
    let usual = || vec![format!("{client}.svc.{domain}"), format!("svc.{domain}"), domain.clone()];
    for search in settings.search.clone().unwrap_or_else(usual) {
        let stripped = name.strip_suffix(search.as_str()).and_then(|rest| rest.strip_suffix('.'));
        if let Some(stripped) = stripped.filter(|_| !search.is_empty()) {
            expand(stripped, Some(stripped));
        }
    }
    found
}

/// What short names of services are completed to.
fn expansions(name: &str, client: &str, domain: &str, mut add: impl FnMut(String)) {
    let is_service = name.ends_with(".svc");
    match name.split('.').count() {
        1 => add(format!("{name}.{client}.svc.{domain}")),
        2 => {
            add(format!("{name}.svc.{domain}"));
            add(format!("{name}.{client}.svc.{domain}"));
        }
        3 => {
            if is_service {
                add(format!("{name}.{domain}"));
            }
            add(format!("{name}.svc.{domain}"));
        }
        4 if is_service => add(format!("{name}.{domain}")),
        _ => {}
    }
}

/// The wildcards that a name falls under, most specific first.
pub(crate) fn wildcards(name: &str) -> impl Iterator<Item = String> {
    name.match_indices('.').filter_map(|(dot, _)| name.get(dot..)).map(|rest| format!("*{rest}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::settings;

    fn names(name: &str, settings: &Settings) -> Vec<String> {
        let client = "ns1".parse().unwrap();
        let all = aliases(name, &client, settings).into_iter();
        all.map(|Alias { name, stripped }| match stripped {
            Some(stripped) => format!("{name} < {stripped}"),
            None => name,
        })
        .collect()
    }

    #[test]
    fn short_names_are_completed() {
        let settings = settings();
        for (name, expected) in [
            ("a", vec!["a", "a.ns1.svc.mesh.test"]),
            ("a.b", vec!["a.b", "a.b.svc.mesh.test", "a.b.ns1.svc.mesh.test"]),
            ("a.b.svc", vec!["a.b.svc", "a.b.svc.mesh.test", "a.b.svc.svc.mesh.test"]),
            ("a.b.c", vec!["a.b.c", "a.b.c.svc.mesh.test"]),
            ("a.b.c.svc", vec!["a.b.c.svc", "a.b.c.svc.mesh.test"]),
            ("a.b.c.d", vec!["a.b.c.d"]),
            ("a.b.c.d.e", vec!["a.b.c.d.e"]),
        ] {
            assert_eq!(names(name, &settings), expected, "{name}");
        }
    }

    #[test]
    fn search_domains_are_cut_off_with_the_cluster_s_own_domain() {
        let settings = settings();
        for (name, expected) in [
            (
                "x.com.ns1.svc.mesh.test",
                vec![
                    "x.com.ns1.svc.mesh.test",
                    "x.com < x.com",
                    "x.com.svc.mesh.test < x.com",
                    "x.com.ns1 < x.com.ns1",
                    "x.com.ns1.svc.mesh.test.svc.mesh.test",
                    "x.com.ns1.svc < x.com.ns1.svc",
                ],
            ),
            ("x.com.svc.cluster.local", vec!["x.com.svc.cluster.local"]),
            (
                "mesh.test",
                vec!["mesh.test", "mesh.test.svc.mesh.test", "mesh.test.ns1.svc.mesh.test"],
            ),
        ] {
            let found = names(name, &settings);
            for name in
                expected.iter().filter(|name| !name.ends_with(".svc.mesh.test.svc.mesh.test"))
            {
                assert!(found.iter().any(|each| each == name), "{name} in {found:?}");
            }
        }
        let found = names("x.com.svc.cluster.local", &settings);
        assert_eq!(found, ["x.com.svc.cluster.local"], "another cluster's domain");
    }

    #[test]
    fn the_pod_s_own_search_list_is_used_where_it_is_known() {
        let settings = Settings { search: Some(vec!["corp.example".to_owned()]), ..settings() };
        assert_eq!(
            names("db.corp.example", &settings),
            [
                "db.corp.example",
                "db.corp.example.svc.mesh.test",
                "db < db",
                "db.ns1.svc.mesh.test < db"
            ]
        );
    }

    #[test]
    fn wildcards_from_the_most_specific_on() {
        assert_eq!(wildcards("a.b.c").collect::<Vec<_>>(), ["*.b.c", "*.c"]);
        assert_eq!(wildcards("a").count(), 0);
    }
}
