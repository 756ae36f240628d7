//! What a node proxy is to know of pods and Services, by what the API server's objects say of them. Made from the
//! documentation of Kubernetes and Istio, and not from what istiod sends.

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};

use crate::cluster::Cluster;

/// What decides.
const KINDS: &str = "namespaces,nodes,pods,services,gateways.gateway.networking.k8s.io,\
                     authorizationpolicies.security.istio.io,peerauthentications.security.istio.io,\
                     serviceentries.networking.istio.io";
/// Its policies are for the whole mesh.
const ROOT: &str = "istio-system";
/// What STRICT is made of, for all workloads alike.
const STRICT: &str = "istio-system/istio_converted_static_strict";

/// The API server's objects.
pub(crate) struct Objects(Vec<Value>);

fn text<'a>(of: &'a Value, pointer: &str) -> &'a str {
    of.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

fn list<'a>(of: &'a Value, pointer: &str) -> &'a [Value] {
    of.pointer(pointer).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

fn label<'a>(of: &'a Value, name: &str) -> Option<&'a str> {
    of.pointer("/metadata/labels")?.get(name)?.as_str()
}

fn name(of: &Value) -> &str {
    text(of, "/metadata/name")
}

fn namespace(of: &Value) -> &str {
    text(of, "/metadata/namespace")
}

/// Whether the labels that are selected by are all there.
fn selects(of: &Value, selector: &str, pod: &Value) -> bool {
    let selector = of.pointer(selector).and_then(Value::as_object);
    selector
        .is_some_and(|wanted| wanted.iter().all(|(key, value)| label(pod, key) == value.as_str()))
}

fn hostname(service: &Value) -> String {
    format!("{}.{}.svc.cluster.local", name(service), namespace(service))
}

fn is_ready(pod: &Value) -> bool {
    let ready = |condition: &&Value| text(condition, "/type") == "Ready";
    let condition = list(pod, "/status/conditions").iter().find(ready);
    condition.is_some_and(|condition| text(condition, "/status") == "True")
}

fn uid(pod: &Value) -> String {
    format!("Kubernetes//Pod/{}/{}", namespace(pod), name(pod))
}

/// The number of a port of a Service in a pod; a name that the pod has no port of is none.
fn target(port: &Value, pod: &Value) -> Option<Value> {
    match port.get("targetPort") {
        Some(Value::String(wanted)) => {
            let containers = list(pod, "/spec/containers").iter();
            let mut ports = containers.flat_map(|container| list(container, "/ports"));
            let named = ports.find(|port| text(port, "/name") == wanted)?;
            named.get("containerPort").cloned()
        }
        Some(number) => Some(number.clone()),
        None => port.get("port").cloned(),
    }
}

fn by_port(service: &Value, number: impl Fn(&Value) -> Option<Value>) -> Value {
    let ports = list(service, "/spec/ports").iter();
    // A port that leaves its target to each endpoint, and an endpoint that has none, is 0.
    let ports = ports.map(|port| (port["port"].to_string(), number(port).unwrap_or(json!(0))));
    Value::Object(ports.collect())
}

impl Objects {
    pub(crate) fn read(cluster: &Cluster) -> Result<Self> {
        let said = cluster.kubectl(&["get", KINDS, "--all-namespaces", "--output", "json"])?;
        let mut all: Value = serde_json::from_str(&said)?;
        let items = all.get_mut("items").and_then(Value::as_array_mut).context("no list")?;
        Ok(Self(std::mem::take(items)))
    }

    fn of<'a>(&'a self, kind: &'a str) -> impl Iterator<Item = &'a Value> {
        self.0.iter().filter(move |object| text(object, "/kind") == kind)
    }

    /// Pods that have an address and are not over.
    fn pods(&self) -> impl Iterator<Item = &Value> {
        self.of("Pod").filter(|pod| {
            let over = ["Succeeded", "Failed"].contains(&text(pod, "/status/phase"));
            !over && !text(pod, "/status/podIP").is_empty()
        })
    }

    /// The workloads of pods in these namespaces, as they are dumped.
    pub(crate) fn workloads(&self, namespaces: &[&str]) -> Vec<Value> {
        let pods = self.pods().filter(|pod| namespaces.contains(&namespace(pod)));
        pods.map(|pod| self.workload(pod)).collect()
    }

    fn workload(&self, pod: &Value) -> Value {
        let enrolled = pod.pointer("/metadata/annotations/ambient.istio.io~1redirection")
            == Some(&json!("enabled"));
        let host = pod.pointer("/spec/hostNetwork") == Some(&json!(true));
        let ips: Vec<_> = list(pod, "/status/podIPs").iter().map(|one| text(one, "/ip")).collect();
        let owner = owner(pod);
        let canonical = ["service.istio.io/canonical-name", "app.kubernetes.io/name", "app"];
        let revision =
            ["service.istio.io/canonical-revision", "app.kubernetes.io/version", "version"];
        let first = |names: [&str; 3]| names.iter().find_map(|name| label(pod, name));
        let mut workload = json!({
            "uid": uid(pod),
            "name": name(pod),
            "namespace": namespace(pod),
            "workloadIps": ips,
            "protocol": if enrolled { "HBONE" } else { "TCP" },
            "networkMode": if host { "HostNetwork" } else { "Standard" },
            "trustDomain": "cluster.local",
            "serviceAccount": text(pod, "/spec/serviceAccountName"),
            "canonicalName": first(canonical).unwrap_or(&owner),
            "canonicalRevision": first(revision).unwrap_or("latest"),
            "workloadName": owner,
            "workloadType": "pod",
            "node": text(pod, "/spec/nodeName"),
            "status": if is_ready(pod) { "Healthy" } else { "Unhealthy" },
            "clusterId": "Kubernetes",
            "capacity": 1,
        });
        let mut more = |key: &str, value: Value| {
            if let (false, Some(map)) = (is_empty(&value), workload.as_object_mut()) {
                map.insert(key.to_owned(), value);
            }
        };
        more("locality", self.locality(pod));
        more("services", self.services_of(pod).into());
        more("authorizationPolicies", self.policies_of(pod).into());
        more("waypoint", self.waypoint(pod, "workload"));
        workload
    }

    fn locality(&self, pod: &Value) -> Value {
        let node = self.of("Node").find(|node| name(node) == text(pod, "/spec/nodeName"));
        let parts = [
            ("region", "topology.kubernetes.io/region"),
            ("zone", "topology.kubernetes.io/zone"),
            ("subzone", "topology.istio.io/subzone"),
        ];
        let part = |(key, of): (&str, &str)| Some((key.to_owned(), label(node?, of)?.into()));
        Value::Object(parts.into_iter().filter_map(part).collect())
    }

    fn services_of(&self, pod: &Value) -> Vec<String> {
        let near = |of: &&Value| namespace(of) == namespace(pod);
        let services = self.of("Service").filter(near);
        let services =
            services.filter(|service| selects(service, "/spec/selector", pod)).map(hostname);
        let entries = self.of("ServiceEntry").filter(near);
        let entries = entries.filter(|entry| selects(entry, "/spec/workloadSelector/labels", pod));
        let hosts = entries.flat_map(|entry| list(entry, "/spec/hosts"));
        let hosts = services.chain(hosts.filter_map(Value::as_str).map(str::to_owned));
        let mut all: Vec<_> = hosts.map(|host| format!("{}/{host}", namespace(pod))).collect();
        all.sort();
        all
    }

    /// Policies that select pods; those of whole namespaces are not named by each of their pods.
    fn policies_of(&self, pod: &Value) -> Vec<String> {
        let policies = self.of("AuthorizationPolicy").filter(|policy| {
            let dry = policy.pointer("/metadata/annotations/istio.io~1dry-run").is_some();
            [namespace(pod), ROOT].contains(&namespace(policy))
                && ["ALLOW", "DENY", ""].contains(&text(policy, "/spec/action"))
                && !dry
                && selects(policy, "/spec/selector/matchLabels", pod)
        });
        let full = |policy: &Value| format!("{}/{}", namespace(policy), name(policy));
        let mut all: Vec<_> = policies.map(full).chain(self.strict(pod)).collect();
        all.sort();
        all
    }

    /// What `PeerAuthentication` makes of a pod: the one that selects it is before its namespace's.
    fn strict(&self, pod: &Value) -> Option<String> {
        let near = self.of("PeerAuthentication").filter(|one| namespace(one) == namespace(pod));
        let near: Vec<_> = near.collect();
        let own = near.iter().find(|one| selects(one, "/spec/selector/matchLabels", pod));
        let all = near.iter().find(|one| one.pointer("/spec/selector").is_none());
        match own.or(all) {
            Some(one) if one.pointer("/spec/portLevelMtls").is_some() => {
                Some(format!("{}/converted_peer_authentication_{}", namespace(pod), name(one)))
            }
            Some(one) if text(one, "/spec/mtls/mode") == "STRICT" => Some(STRICT.to_owned()),
            _ => None,
        }
    }

    /// The waypoint that a Service or a pod names, or else its namespace, if there is one for such.
    fn waypoint(&self, of: &Value, kind: &str) -> Value {
        const USE: &str = "istio.io/use-waypoint";
        if label(of, "gateway.istio.io/managed").is_some() {
            return Value::Null;
        }
        let whole = self.of("Namespace").find(|one| name(one) == namespace(of));
        let says = [Some(of), whole].into_iter().flatten().find(|one| label(one, USE).is_some());
        let Some(says) = says else { return Value::Null };
        let place = label(says, "istio.io/use-waypoint-namespace").unwrap_or(namespace(of));
        let gateway = self.of("Gateway").find(|gateway| {
            let serves = label(gateway, "istio.io/waypoint-for").unwrap_or("service");
            let all = text(gateway, "/spec/listeners/0/allowedRoutes/namespaces/from") == "All";
            Some(name(gateway)) == label(says, USE)
                && namespace(gateway) == place
                && [kind, "all"].contains(&serves)
                && (all || place == namespace(of))
        });
        let Some(gateway) = gateway else { return Value::Null };
        // Its address by name, where it has one.
        let addresses = || list(gateway, "/status/addresses").iter();
        let of = |kind: &str| addresses().find(|one| text(one, "/type") == kind);
        let name = of("Hostname").map(|one| format!("{place}/{}", text(one, "/value")));
        let ip = of("IPAddress").map(|one| format!("/{}", text(one, "/value")));
        match name.or(ip) {
            Some(destination) => json!({ "destination": destination, "hboneMtlsPort": 15008 }),
            None => Value::Null,
        }
    }

    /// The Services in these namespaces that select pods, as they are dumped.
    pub(crate) fn services(&self, namespaces: &[&str]) -> Vec<Value> {
        let services = self.of("Service").filter(|service| {
            namespaces.contains(&namespace(service)) && service.pointer("/spec/selector").is_some()
        });
        services.map(|service| self.service(service)).collect()
    }

    fn service(&self, service: &Value) -> Value {
        let vips: Vec<_> = list(service, "/spec/clusterIPs")
            .iter()
            .filter_map(Value::as_str)
            .filter(|ip| *ip != "None")
            .map(|ip| format!("/{ip}"))
            .collect();
        let same = self.pods().filter(|pod| namespace(pod) == namespace(service));
        let chosen = same.filter(|pod| selects(service, "/spec/selector", pod));
        let endpoints: Map<_, _> = chosen
            .map(|pod| {
                let endpoint = json!({
                    "workloadUid": uid(pod),
                    "port": by_port(service, |port| target(port, pod)),
                    "status": if is_ready(pod) { "Healthy" } else { "Unhealthy" },
                });
                (uid(pod), endpoint)
            })
            .collect();
        let families = list(service, "/spec/ipFamilies");
        let declared = |port: &Value| match port.get("targetPort") {
            Some(Value::String(_)) => None,
            _ => target(port, &Value::Null),
        };
        let mut dumped = json!({
            "name": name(service),
            "namespace": namespace(service),
            "hostname": hostname(service),
            "vips": vips,
            "ports": by_port(service, declared),
            "endpoints": endpoints,
            "subjectAltNames": [],
            "canonical": true,
            "visibility": "Public",
            "ipFamilies": if families == [json!("IPv4")] { "IPv4" } else { "Dual" },
        });
        let mut more = |key: &str, value: Value| {
            if let (false, Some(map)) = (value.is_null(), dumped.as_object_mut()) {
                map.insert(key.to_owned(), value);
            }
        };
        more("loadBalancer", preference(service));
        more("waypoint", self.waypoint(service, "service"));
        dumped
    }
}

/// What made a pod, if anything: a `ReplicaSet` is its Deployment's.
fn owner(pod: &Value) -> String {
    let owner = list(pod, "/metadata/ownerReferences").first();
    match (owner, label(pod, "pod-template-hash")) {
        (Some(owner), Some(hash)) => {
            text(owner, "/name").trim_end_matches(&format!("-{hash}")).to_owned()
        }
        _ => name(pod).to_owned(),
    }
}

/// Which endpoints come first.
fn preference(service: &Value) -> Value {
    let near = ["Network", "Region", "Zone"];
    let healthy = match service.pointer("/spec/publishNotReadyAddresses") {
        Some(Value::Bool(true)) => "AllowAll",
        _ => "OnlyHealthy",
    };
    let by = |mode: &str, preferences: &[&str]| json!({ "mode": mode, "healthPolicy": healthy, "routingPreferences": preferences });
    if text(service, "/spec/internalTrafficPolicy") == "Local" {
        return by("Strict", &["Node"]);
    }
    // A waypoint's own Service is made to prefer what is near.
    let managed = label(service, "gateway.istio.io/managed").map(|_| "PreferSameZone");
    match managed.unwrap_or(text(service, "/spec/trafficDistribution")) {
        "PreferClose" | "PreferSameZone" => by("Failover", &near),
        "PreferSameNode" => by("Failover", &[&near[..], &["Subzone", "Node"]].concat()),
        _ if healthy == "AllowAll" => by("Standard", &[]),
        _ => Value::Null,
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::Bool(_) | Value::Number(_) | Value::String(_) => false,
    }
}
