//! The settings of the node proxy: read once, all faults reported together.

mod capture;
mod data_path;
mod dns;
pub mod keys;

pub use dns::Dns;

use crate::pod::DataPath;
use mesh_core::{Namespace, ServiceAccount, Text};
use mesh_platform::redirect::{EbpfSettings, ExternalSettings};
use mesh_runtime::{
    config::{Amount, ConfigErrors, FromYaml, Invalid, Key, Reader, Source},
    log::{Filter, Shape},
};
use mesh_state::PodInfo;
use std::{collections::BTreeMap, io, num::NonZeroUsize, path::PathBuf, time::Duration};

/// Where Istio is installed, if nothing else is said.
const ROOT_NAMESPACE: &str = "istio-system";

/// Where Istio keeps the mesh's config in its images.
const MESH_CONFIG: &str = "./etc/istio/config/mesh";

/// What the process was told.
#[derive(Debug)]
pub struct Config {
    /// Who we are.
    pub node: Node,
    /// How we present ourselves to a control plane.
    pub control_plane: ControlPlane,
    /// The data path of every pod.
    pub data_path: DataPath,
    /// Who redirects the pods' traffic, and how sockets are made.
    pub capture: Capture,
    /// How names are answered, if they are.
    pub dns: Option<Dns>,
    /// Where workloads, services and policies come from.
    pub resources: Resources,
    /// Who signs certificates.
    pub authority: Authority,
    /// How certificates are used.
    pub tls: Tls,
    /// Which pods are served.
    pub pods: Pods,
    /// Who we are as a workload, where tunnels are to be taken to ourselves.
    pub own: Option<PodInfo>,
    /// The process itself.
    pub process: Process,
    /// All settings as they are in effect, for the dump.
    pub effective: serde_json::Value,
}

/// Who we are.
#[derive(Clone, Debug)]
pub struct Node {
    /// The node; workloads on it are local.
    pub name: Text,
    /// The cluster.
    pub cluster: Text,
    /// The release, for `istio_build`.
    pub version: String,
    /// Whose service a hostname means where nothing else decides.
    pub preferred: Option<Namespace>,
    /// Istio's root namespace, which is the one that it is installed in unless `rootNamespace` of its mesh
    /// configuration says otherwise.
    pub root: Option<Namespace>,
}

/// Who redirects the pods' traffic.
#[derive(Clone, Debug)]
pub enum Capture {
    /// Somebody else.
    External(ExternalSettings),
    /// We do.
    Ebpf(EbpfSettings),
}

/// How certificates are used.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Tls {
    /// Versions, suites and groups: of tunnels, and of the connections to the control plane.
    pub options: mesh_identity::tls::Options,
    /// Where the revocation lists are.
    pub revocations: Option<PathBuf>,
}

/// How long a process that is told to stop waits for one that takes over, at most. As a rule that one is there
/// before: an upgrade waits for its readiness.
const PATIENCE: Duration = Duration::from_secs(5);

/// How we present ourselves to a control plane.
#[derive(Clone, Debug)]
pub struct ControlPlane {
    /// Our address.
    pub ip: String,
    /// Our pod.
    pub pod: String,
    /// Its namespace.
    pub namespace: String,
    /// The bearer token, or where it is; `None` is Istio's place.
    pub token: Option<String>,
    /// `ISTIO_META_*`.
    pub metadata: BTreeMap<String, String>,
    /// `ISTIO_METAJSON_*`.
    pub json_metadata: BTreeMap<String, String>,
    /// Whether workloads and services are asked for one by one.
    pub on_demand: bool,
}

/// A server of the control plane.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Remote {
    /// Its URI.
    pub address: String,
    /// The roots that it is verified with: a path, PEM, or `SYSTEM`.
    pub root: String,
    /// Another name that its certificate may bear.
    pub also_named: Option<String>,
    /// Headers to send along.
    pub headers: Vec<(String, String)>,
}

/// Where workloads, services and policies come from.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Resources {
    /// The control plane.
    ControlPlane(Remote),
    /// A file, read again when it changes.
    File(PathBuf),
    /// Text in a setting.
    Inline(String),
    /// Nowhere.
    Nothing,
}

/// Who signs certificates.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Authority {
    /// A CA in a folder. For labs.
    Local {
        /// The folder.
        folder: PathBuf,
        /// The validity of what it signs.
        ttl: Duration,
    },
    /// Istio's.
    Istio {
        /// Where it is.
        remote: Remote,
        /// The validity to ask for.
        ttl: Duration,
    },
    /// Nobody: every tunnel fails, with that reason.
    Nobody,
}

/// Which pods are served.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Pods {
    /// Those that the CNI agent behind this socket names.
    Shared(PathBuf),
    /// One, whose network namespace is ours.
    Dedicated(PodInfo),
}

/// The process itself.
#[derive(Clone, Debug)]
pub struct Process {
    /// Worker threads.
    pub workers: NonZeroUsize,
    /// How long a shutdown waits for connections.
    pub drain: Duration,
    /// The admin port, on loopback.
    pub admin_port: u16,
    /// The metrics port.
    pub stats_port: u16,
    /// Whether our own listeners are dual-stack.
    pub ipv6: bool,
    /// What is logged.
    pub filter: Filter,
    /// The shape of log lines.
    pub shape: Shape,
}

/// Reads everything.
///
/// # Errors
///
/// Returns all faults together.
pub fn load(environment: &dyn Source) -> Result<Config, ConfigErrors> {
    let mut faults = Vec::new();
    let mesh = mesh_config(std::fs::read_to_string(MESH_CONFIG), &mut faults);
    let proxy = proxy_config(environment, &mut faults);
    let layers = mesh_runtime::config::Layers::new().then(environment).then(&proxy).then(&mesh);
    let mut reader = Reader::new(&layers);
    reader.extend(faults);
    let config = read(&mut reader);
    reader.finish()?;
    Ok(config)
}

fn mesh_config(text: io::Result<String>, faults: &mut Vec<Invalid>) -> FromYaml {
    let advice = match text {
        Ok(text) => match FromYaml::mesh_config(&text) {
            Ok(settings) => return settings,
            Err(error) => format!("mend the file: {error}"),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => return FromYaml::default(),
        Err(error) => format!("make the file readable, or take it away: {error}"),
    };
    faults.push(Invalid { name: MESH_CONFIG.to_owned(), value: String::new(), advice });
    FromYaml::default()
}

fn proxy_config(environment: &dyn Source, faults: &mut Vec<Invalid>) -> FromYaml {
    let text = environment.get("PROXY_CONFIG").unwrap_or_default();
    FromYaml::proxy_config(&text).unwrap_or_else(|error| {
        faults.push(Invalid {
            name: "PROXY_CONFIG".to_owned(),
            value: String::new(),
            advice: format!("write a ProxyConfig in YAML: {error}"),
        });
        FromYaml::default()
    })
}

fn read(reader: &mut Reader<'_>) -> Config {
    let node = node(reader);
    let authority = authority(reader);
    let resources = resources(reader);
    let pods = pods(reader);
    let own = matches!(pods, Pods::Shared(_)).then(|| own(reader)).flatten();
    let dns = dns::dns(reader, matches!(pods, Pods::Dedicated(_)));
    let dns = dns::without_demand(reader, dns, &resources);
    let capture = capture::capture(reader, &pods, dns.as_ref());
    let process = process(reader);
    let tls = tls(reader);
    let control_plane = control_plane(reader);
    let mut data_path = data_path::data_path(reader, &capture);
    // What is accepted meanwhile needs some of the drain, too.
    data_path.patience = PATIENCE.min(process.drain / 2);
    // A file has everything that there is.
    data_path.plan.on_demand =
        control_plane.on_demand && matches!(resources, Resources::ControlPlane(_));
    let effective = effective(reader);
    Config {
        node,
        control_plane,
        data_path,
        capture,
        dns,
        resources,
        authority,
        tls,
        pods,
        own,
        process,
        effective,
    }
}

/// What may be a secret, or is as long as a file.
const NOT_SHOWN: [&str; 2] = ["AUTH_TOKEN", "LOCAL_XDS"];

fn effective(reader: &mut Reader<'_>) -> serde_json::Value {
    let shown = keys::ALL.iter().filter(|key| !NOT_SHOWN.contains(&key.name));
    let value = |key: &&Key| (key.name.to_owned(), reader.text(key).into());
    shown.map(value).collect::<serde_json::Map<_, _>>().into()
}

fn name<T: std::str::FromStr>(reader: &mut Reader<'_>, key: &Key, fallback: T) -> T {
    let text = reader.text(key);
    text.parse().unwrap_or_else(|_invalid| {
        reader.invalid(key, "write a name of Kubernetes");
        fallback
    })
}

fn node(reader: &mut Reader<'_>) -> Node {
    let meta = reader.text(&keys::ISTIO_META_CLUSTER_ID);
    let cluster = if meta.is_empty() { reader.text(&keys::CLUSTER_ID) } else { meta };
    Node {
        name: name(reader, &keys::NODE_NAME, Text::default()),
        cluster: cluster.parse().unwrap_or_default(),
        preferred: namespace(reader, &keys::PREFERED_SERVICE_NAMESPACE),
        root: namespace(reader, &keys::POD_NAMESPACE).or_else(|| ROOT_NAMESPACE.parse().ok()),
        version: reader.text(&keys::ISTIO_META_ISTIO_VERSION),
    }
}

/// Of a setting that may be left out.
fn namespace(reader: &mut Reader<'_>, key: &Key) -> Option<Namespace> {
    let text = reader.text(key);
    if text.is_empty() {
        return None;
    }
    let namespace = text.parse().ok();
    if namespace.is_none() {
        reader.invalid(key, "write a name of Kubernetes");
    }
    namespace
}

/// Istio's rules: exactly these words, and any other is none.
fn tls(reader: &mut Reader<'_>) -> Tls {
    Tls {
        options: mesh_identity::tls::Options {
            post_quantum: reader.text(&keys::COMPLIANCE_POLICY) == "pqc",
            tls12: reader.flag(&keys::TLS12_ENABLED),
        },
        revocations: optional_path(reader, &keys::CRL_PATH),
    }
}

fn optional_path(reader: &mut Reader<'_>, key: &Key) -> Option<PathBuf> {
    reader.optional_text(key).filter(|text| !text.is_empty()).map(PathBuf::from)
}

fn resources(reader: &mut Reader<'_>) -> Resources {
    let file = optional_path(reader, &keys::LOCAL_XDS_PATH);
    let inline = reader.optional_text(&keys::LOCAL_XDS).filter(|text| !text.is_empty());
    match (file, inline) {
        (Some(_), Some(_)) => {
            reader.invalid(&keys::LOCAL_XDS, "unset it, or LOCAL_XDS_PATH: one source at a time");
            Resources::Nothing
        }
        (Some(file), None) => Resources::File(file),
        (None, Some(inline)) => Resources::Inline(inline),
        (None, None) => {
            let keys = (&keys::XDS_ADDRESS, &keys::XDS_ROOT_CA, &keys::ALT_XDS_HOSTNAME);
            remote(reader, keys, "XDS_HEADER_").map_or(Resources::Nothing, Resources::ControlPlane)
        }
    }
}

/// Where Kubernetes has istiod.
const ISTIOD: &str = "https://istiod.istio-system.svc:15012";

/// A server; `None` where its address is set to nothing.
fn remote(
    reader: &mut Reader<'_>,
    (address, root, name): (&Key, &Key, &Key),
    headers: &str,
) -> Option<Remote> {
    let told = reader.source().get(address.name).or_else(|| {
        (address.name == "XDS_ADDRESS").then(|| reader.source().get("discoveryAddress")).flatten()
    });
    let kubernetes = !reader.text(&keys::KUBERNETES_SERVICE_HOST).is_empty();
    let default = if kubernetes { ISTIOD } else { address.default };
    let address = told.unwrap_or_else(|| default.to_owned());
    if address.is_empty() {
        return None;
    }
    let prefixed = reader.source().prefixed(headers).into_iter();
    let bare = |(name, value): (String, String)| {
        (name.strip_prefix(headers).unwrap_or(&name).to_lowercase(), value)
    };
    Some(Remote {
        address,
        root: reader.text(root),
        also_named: reader.optional_text(name).filter(|name| !name.is_empty()),
        headers: prefixed.map(bare).collect(),
    })
}

fn control_plane(reader: &mut Reader<'_>) -> ControlPlane {
    let stripped = |prefix: &str| {
        let found = reader.source().prefixed(prefix).into_iter();
        let bare = |(name, value): (String, String)| {
            (name.strip_prefix(prefix).unwrap_or(&name).to_owned(), value)
        };
        found.map(bare).collect::<BTreeMap<_, _>>()
    };
    let (metadata, json_metadata) = (stripped("ISTIO_META_"), stripped("ISTIO_METAJSON_"));
    ControlPlane {
        ip: reader.text(&keys::INSTANCE_IP),
        pod: reader.text(&keys::POD_NAME),
        namespace: reader.text(&keys::POD_NAMESPACE),
        token: reader.source().get(keys::AUTH_TOKEN.name).filter(|token| !token.is_empty()),
        metadata,
        json_metadata,
        on_demand: reader.toggle(&keys::XDS_ON_DEMAND),
    }
}

fn authority(reader: &mut Reader<'_>) -> Authority {
    let ttl = reader.duration(&keys::SECRET_TTL);
    let explicit = reader.source().get(keys::CA_ADDRESS.name).is_some_and(|text| !text.is_empty());
    match optional_path(reader, &keys::LOCAL_CA_DIR) {
        Some(_) if explicit => {
            reader.invalid(&keys::LOCAL_CA_DIR, "unset it, or CA_ADDRESS: one CA signs, not two");
            Authority::Nobody
        }
        Some(folder) => Authority::Local { folder, ttl },
        None => {
            let keys = (&keys::CA_ADDRESS, &keys::CA_ROOT_CA, &keys::ALT_CA_HOSTNAME);
            let remote = remote(reader, keys, "CA_HEADER_");
            remote.map_or(Authority::Nobody, |remote| Authority::Istio { remote, ttl })
        }
    }
}

fn pods(reader: &mut Reader<'_>) -> Pods {
    let agent = PathBuf::from(reader.text(&keys::INPOD_UDS));
    let choices = [("shared", false), ("dedicated", true)];
    if !reader.choice(&keys::PROXY_MODE, &choices).unwrap_or_default() {
        return Pods::Shared(agent);
    }
    let text = reader.text(&keys::PROXY_WORKLOAD_INFO);
    let parse = || {
        let mut parts = text.split('/');
        let namespace = parts.next()?.parse::<Namespace>().ok()?;
        let name = parts.next()?.parse::<Text>().ok()?;
        let service_account = parts.next()?.parse::<ServiceAccount>().ok()?;
        parts.next().is_none().then_some(PodInfo { name, namespace, service_account })
    };
    parse().map_or_else(
        || {
            reader.invalid(
                &keys::PROXY_WORKLOAD_INFO,
                "write namespace/name/serviceaccount: dedicated mode serves that workload",
            );
            Pods::Shared(agent)
        },
        Pods::Dedicated,
    )
}

/// All three, or we are no workload.
fn own(reader: &mut Reader<'_>) -> Option<PodInfo> {
    let [name, namespace, account] =
        [&keys::POD_NAME, &keys::POD_NAMESPACE, &keys::SERVICE_ACCOUNT].map(|key| reader.text(key));
    if name.is_empty() || namespace.is_empty() || account.is_empty() {
        return None;
    }
    let info = || {
        let (namespace, service_account) = (namespace.parse().ok()?, account.parse().ok()?);
        Some(PodInfo { name: name.parse().ok()?, namespace, service_account })
    };
    let info = info();
    if info.is_none() {
        reader.invalid(
            &keys::POD_NAME,
            "write names of Kubernetes, as in POD_NAMESPACE and SERVICE_ACCOUNT",
        );
    }
    info
}

fn process(reader: &mut Reader<'_>) -> Process {
    let filter = reader.text(&keys::RUST_LOG).parse().unwrap_or_else(|_invalid| {
        reader.invalid(&keys::RUST_LOG, "write levels such as info or info,access=debug");
        Filter::default()
    });
    let shapes = [("plain", Shape::Plain), ("json", Shape::Json)];
    Process {
        workers: workers(reader),
        drain: drain(reader),
        admin_port: port(reader, &keys::PROXY_ADMIN_PORT, "proxyAdminPort"),
        stats_port: port(reader, &keys::STATS_PORT, "statsPort"),
        ipv6: reader.toggle(&keys::IPV6_ENABLED),
        filter,
        shape: reader.choice(&keys::LOG_FORMAT, &shapes).unwrap_or(Shape::Plain),
    }
}

/// The environment's name, or the one of Istio's `ProxyConfig`.
fn port(reader: &mut Reader<'_>, key: &Key, name: &'static str) -> u16 {
    let in_yaml = Key { name, ..*key };
    if reader.source().get(key.name).is_none() && reader.source().get(name).is_some() {
        reader.port(&in_yaml)
    } else {
        reader.port(key)
    }
}

/// Istio's rule: 5 s less than the grace period, 1 s less if it is 10 s or shorter, at least 1 s.
fn drain(reader: &mut Reader<'_>) -> Duration {
    let explicit = reader.optional_duration(&keys::CONNECTION_TERMINATION_DEADLINE);
    let grace = reader.optional_count(&keys::TERMINATION_GRACE_PERIOD_SECONDS);
    explicit.unwrap_or_else(|| {
        let seconds = grace.map_or(5, |n| if n > 10 { n - 5 } else { n.saturating_sub(1).max(1) });
        Duration::from_secs(seconds)
    })
}

/// In Istio's `ProxyConfig`: worker threads, 0 is one a core.
const CONCURRENCY: Key = Key { name: "concurrency", ..keys::ZTUNNEL_WORKER_THREADS };

/// Istio's rule: what is asked for, in the environment or else in the proxy config; else by the CPU limit and
/// request, else a quarter of the cores, at least 2.
fn workers(reader: &mut Reader<'_>) -> NonZeroUsize {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
    let asked = reader
        .percent_or_count(&keys::ZTUNNEL_WORKER_THREADS)
        .or_else(|| reader.percent_or_count(&CONCURRENCY))
        .map(|n: Amount| n.of(cores));
    let old = reader.cpu_quantity(&keys::ZTUNNEL_CPU_LIMIT);
    let limit = reader.cpu_quantity(&keys::ZTUNNEL_RESOURCE_CPU_LIMIT).or(old);
    let request = reader.cpu_quantity(&keys::ZTUNNEL_RESOURCE_CPU_REQUEST);
    let count = asked.unwrap_or_else(|| match limit {
        Some(limit) => limit.max(request.unwrap_or(0)),
        None => cores.div_ceil(4).max(request.unwrap_or(0)).max(2),
    });
    usize::try_from(count).ok().and_then(NonZeroUsize::new).unwrap_or(NonZeroUsize::MIN)
}

#[cfg(test)]
mod tests;
