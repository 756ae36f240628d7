//! What the control plane knows, as the file that node proxies read in its place.

use std::{fmt::Write, net::IpAddr};

use serde_json::{Map, Value, json};

use crate::topology::{NAMESPACE, Pod};

/// The trust domain of all.
pub const TRUST_DOMAIN: &str = "cluster.local";

/// Workloads, services and policies.
#[derive(Clone, Debug, Default)]
pub struct Mesh {
    workloads: Vec<Entry>,
    services: Vec<Entry>,
    policies: Vec<Entry>,
}

/// One of them, whose fields can be set.
#[derive(Clone, Debug)]
pub struct Entry(Map<String, Value>);

impl Entry {
    /// Sets a field, or removes it by null.
    pub fn set(&mut self, field: &str, value: Value) -> &mut Self {
        match value {
            Value::Null => self.0.remove(field),
            value => self.0.insert(field.to_owned(), value),
        };
        self
    }

    fn is(&self, name: &str) -> bool {
        self.0.get("name").and_then(Value::as_str) == Some(name)
    }
}

/// The identity of an account.
#[must_use]
pub fn identity(account: &str) -> String {
    format!("spiffe://{TRUST_DOMAIN}/{}", principal(account).split_once('/').unwrap_or_default().1)
}

/// The same as policies have it.
#[must_use]
pub fn principal(account: &str) -> String {
    format!("{TRUST_DOMAIN}/ns/{NAMESPACE}/sa/{account}")
}

/// The host name of a service.
#[must_use]
pub fn hostname(service: &str) -> String {
    format!("{service}.{NAMESPACE}.svc.cluster.local")
}

impl Mesh {
    /// A pod with the account, in the mesh.
    pub fn workload(&mut self, pod: &Pod, account: &str) -> &mut Entry {
        let ips = [pod.v4(), pod.v6()].map(|ip| ip.to_string());
        let value = json!({
            "uid": format!("Kubernetes//Pod/{NAMESPACE}/{}", pod.name()),
            "name": pod.name(), "namespace": NAMESPACE, "trustDomain": TRUST_DOMAIN,
            "serviceAccount": account, "workloadIps": ips, "protocol": "HBONE",
            "node": pod.node(), "network": "", "clusterId": "Kubernetes",
            "workloadName": account, "workloadType": "deployment", "canonicalName": account,
            "canonicalRevision": "latest", "status": "Healthy", "capacity": 1,
        });
        push(&mut self.workloads, pod.name(), value)
    }

    /// A pod that is not in the mesh.
    pub fn stranger(&mut self, pod: &Pod, account: &str) -> &mut Entry {
        self.workload(pod, account).set("protocol", json!("TCP"))
    }

    /// A service of these pods, from its port to theirs, at these addresses.
    pub fn service(
        &mut self,
        name: &str,
        vips: &[IpAddr],
        ports: &[(u16, u16)],
        pods: &[&Pod],
    ) -> &mut Entry {
        let ports: Map<_, _> =
            ports.iter().map(|(port, target)| (port.to_string(), json!(target))).collect();
        let key = format!("{NAMESPACE}/{}", hostname(name));
        for workload in &mut self.workloads {
            if pods.iter().any(|pod| workload.is(pod.name())) {
                let services = workload.0.entry("services").or_insert_with(|| json!({}));
                if let Some(services) = services.as_object_mut() {
                    services.insert(key.clone(), Value::Object(ports.clone()));
                }
            }
        }
        let vips: Vec<_> = vips.iter().map(|ip| format!("/{ip}")).collect();
        let value = json!({
            "name": name, "namespace": NAMESPACE, "hostname": hostname(name), "vips": vips,
            "ports": ports, "ipFamilies": "Dual", "canonical": true,
        });
        push(&mut self.services, name, value)
    }

    /// A policy for the whole of the pods' namespace: rules of clauses of matches.
    pub fn policy(&mut self, name: &str, action: &str, rules: &Value) -> &mut Entry {
        let value = json!({
            "name": name, "namespace": NAMESPACE, "scope": "Namespace", "action": action,
            "rules": rules,
        });
        push(&mut self.policies, name, value)
    }

    /// STRICT mutual TLS for these pods: the policy that istiod makes of it.
    pub fn strict(&mut self, pods: &[&Pod]) {
        let root = "istio-system";
        let rules = json!([[[{ "notPrincipals": [{ "Presence": [] }] }]]]);
        let policy = self.policy(STRICT, "Deny", &rules);
        policy.set("namespace", json!(root)).set("scope", json!("WorkloadSelector"));
        self.select(STRICT, root, pods);
    }

    /// Ends STRICT.
    pub fn permissive(&mut self) {
        self.remove_policy(STRICT);
        let strict = json!(format!("istio-system/{STRICT}"));
        for workload in &mut self.workloads {
            if let Some(Value::Array(list)) = workload.0.get_mut("authorizationPolicies") {
                list.retain(|policy| *policy != strict);
            }
        }
    }

    /// Lists the policy with these workloads.
    pub fn select(&mut self, policy: &str, namespace: &str, pods: &[&Pod]) {
        for workload in &mut self.workloads {
            if pods.iter().any(|pod| workload.is(pod.name())) {
                let list = workload.0.entry("authorizationPolicies").or_insert_with(|| json!([]));
                if let Some(list) = list.as_array_mut() {
                    list.push(json!(format!("{namespace}/{policy}")));
                }
            }
        }
    }

    /// Takes a policy away.
    pub fn remove_policy(&mut self, name: &str) {
        self.policies.retain(|policy| !policy.is(name));
    }

    /// Takes a workload away.
    pub fn remove_workload(&mut self, pod: &Pod) {
        self.workloads.retain(|workload| !workload.is(pod.name()));
    }

    /// Takes a service away; its endpoints still name it.
    pub fn remove_service(&mut self, name: &str) {
        self.services.retain(|service| !service.is(name));
    }

    /// A workload, to change it.
    pub fn workload_of(&mut self, pod: &Pod) -> Option<&mut Entry> {
        self.workloads.iter_mut().find(|workload| workload.is(pod.name()))
    }

    /// A service, to change it.
    pub fn service_of(&mut self, name: &str) -> Option<&mut Entry> {
        self.services.iter_mut().find(|service| service.is(name))
    }

    /// The file.
    #[must_use]
    pub fn yaml(&self) -> String {
        let mut text = String::new();
        for (key, entries) in [
            ("workloads", &self.workloads),
            ("services", &self.services),
            ("policies", &self.policies),
        ] {
            if entries.is_empty() {
                continue;
            }
            let _always = writeln!(text, "{key}:");
            for entry in entries {
                for (n, (field, value)) in entry.0.iter().enumerate() {
                    // What is in JSON's syntax is YAML too.
                    let dash = if n == 0 { '-' } else { ' ' };
                    let _always = writeln!(text, "{dash} {field}: {value}");
                }
            }
        }
        text
    }
}

/// The policy that stands for STRICT.
pub const STRICT: &str = "istio_converted_static_strict";

/// Adds it, in place of any of the same name.
fn push<'a>(entries: &'a mut Vec<Entry>, name: &str, value: Value) -> &'a mut Entry {
    entries.retain(|entry| !entry.is(name));
    let fields = match value {
        Value::Object(fields) => fields,
        _ => Map::new(),
    };
    let last = entries.len();
    entries.push(Entry(fields));
    entries.get_mut(last).unwrap_or_else(|| unreachable!("it has just been added"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_is_written_as_upstream_reads_it() {
        let mut mesh = Mesh::default();
        let rules = json!([[[{ "principals": [{ "Exact": principal("client") }] }]]]);
        mesh.policy("allow", "Allow", &rules);
        let wanted = "policies:\n- action: \"Allow\"\n  name: \"allow\"\n  namespace: \"lab\"\n  \
                      rules: [[[{\"principals\":[{\"Exact\":\"cluster.local/ns/lab/sa/client\"}]}]]]\n  \
                      scope: \"Namespace\"\n";
        assert_eq!(mesh.yaml(), wanted);
        mesh.remove_policy("allow");
        assert_eq!(mesh.yaml(), "");
        assert_eq!(identity("client"), "spiffe://cluster.local/ns/lab/sa/client");
    }
}
