//! Every setting, declared once. Names are Istio's, misspellings included; those of our own say so.
//! The table in the README is made from these, and a test compares.

use mesh_runtime::config::Key;

macro_rules! keys {
    ($($ident:ident = $name:literal, $unit:literal, $default:literal, $doc:literal;)*) => {
        $(#[doc = $doc] pub(crate) const $ident: Key =
            Key { name: $name, unit: $unit, default: $default, doc: $doc };)*

        /// All of them, in the order of the table.
        pub const ALL: &[&Key] = &[$(&$ident),*];
    };
}

keys! {
    CAPTURE = "CAPTURE", "external, ebpf", "external",
        "Ours. Who redirects the pods' traffic: `external`, istio-cni's rules; `ebpf`, we do.";
    CAPTURE_PIN_DIR = "CAPTURE_PIN_DIR", "path", "/sys/fs/bpf/ztunnel",
        "Ours. The bpffs folder of this instance's pins, mounted there if it is none.";
    LOCAL_CA_DIR = "LOCAL_CA_DIR", "path", "",
        "Ours. Sign certificates with the CA in this folder (the files of Istio's `cacerts`), made there if it is empty. For labs.";
    LOCAL_XDS_PATH = "LOCAL_XDS_PATH", "path", "",
        "A YAML file of workloads, services and policies, reloaded when it changes.";
    LOCAL_XDS = "LOCAL_XDS", "YAML", "", "The same, inline. Not together with `LOCAL_XDS_PATH`.";
    PROXY_MODE = "PROXY_MODE", "shared, dedicated", "shared",
        "`shared`: all enrolled pods of the node. `dedicated`: one workload, in this network namespace.";
    PROXY_WORKLOAD_INFO = "PROXY_WORKLOAD_INFO", "ns/name/sa", "",
        "Who the one workload is, in dedicated mode.";
    NETWORK = "NETWORK", "name", "", "The network that this node is on.";
    NODE_NAME = "NODE_NAME", "name", "", "The node; workloads on it are local.";
    CLUSTER_ID = "CLUSTER_ID", "name", "Kubernetes",
        "The cluster. `ISTIO_META_CLUSTER_ID` is stronger.";
    ISTIO_META_CLUSTER_ID = "ISTIO_META_CLUSTER_ID", "name", "", "The cluster.";
    DNS_CAPTURE = "ISTIO_META_DNS_CAPTURE", "true, else", "true",
        "Whether the pods' DNS is answered here. In Istio `DNS_CAPTURE` of the proxy metadata.";
    DNS_PROXY_ADDR = "ISTIO_META_DNS_PROXY_ADDR", "localhost:port, address", "localhost:15053",
        "Where, in each pod. In Istio `DNS_PROXY_ADDR` of the proxy metadata. With `CAPTURE=ebpf` nothing can be reached there: port 53 is led to it.";
    CLUSTER_DOMAIN = "CLUSTER_DOMAIN", "domain", "cluster.local",
        "The domain of the cluster, which the names of services end in.";
    XDS_ADDRESS = "XDS_ADDRESS", "URI", "https://localhost:15012",
        "The control plane; empty turns it off. In Kubernetes the default is `https://istiod.istio-system.svc:15012`.";
    XDS_ON_DEMAND = "XDS_ON_DEMAND", "bool", "false",
        "Whether workloads and services are asked for when a connection needs them, instead of all being sent.";
    PREFERED_SERVICE_NAMESPACE = "PREFERED_SERVICE_NAMESPACE", "name", "",
        "(sic) Whose service a hostname means, where neither the client's namespace nor a canonical service has it.";
    CA_ADDRESS = "CA_ADDRESS", "URI", "https://localhost:15012",
        "Who signs certificates; empty is nobody. Not together with `LOCAL_CA_DIR`. In Kubernetes the default is `https://istiod.istio-system.svc:15012`.";
    XDS_ROOT_CA = "XDS_ROOT_CA", "path, PEM, SYSTEM", "./var/run/secrets/istio/root-cert.pem",
        "The roots that the control plane is verified with.";
    CA_ROOT_CA = "CA_ROOT_CA", "path, PEM, SYSTEM", "./var/run/secrets/istio/root-cert.pem",
        "The roots that the CA is verified with.";
    ALT_XDS_HOSTNAME = "ALT_XDS_HOSTNAME", "host", "",
        "Another name that the control plane's certificate may bear.";
    ALT_CA_HOSTNAME = "ALT_CA_HOSTNAME", "host", "", "Another name that the CA's certificate may bear.";
    AUTH_TOKEN = "AUTH_TOKEN", "path or token", "./var/run/secrets/tokens/istio-token",
        "The bearer token for both; a file is read anew for each call.";
    INSTANCE_IP = "INSTANCE_IP", "address", "1.1.1.1", "Our address, for the node id.";
    POD_NAME = "POD_NAME", "name", "",
        "Our pod, for the node id. With the next two, tunnels are taken to ourselves on port 15008, in shared mode.";
    POD_NAMESPACE = "POD_NAMESPACE", "name", "",
        "Our pod's namespace, for the node id. A policy of it whose scope cannot be read is one of all pods \
         (`istio-system` where it is not set).";
    SERVICE_ACCOUNT = "SERVICE_ACCOUNT", "name", "", "Our pod's service account.";
    KUBERNETES_SERVICE_HOST = "KUBERNETES_SERVICE_HOST", "host", "",
        "Set by Kubernetes; chooses the default addresses.";
    SECRET_TTL = "SECRET_TTL", "duration", "24h", "The validity to ask for in certificates.";
    CRL_PATH = "CRL_PATH", "path", "",
        "Certificate revocation lists (PEM, or one in DER), read again when they change. Unset or empty is none.";
    COMPLIANCE_POLICY = "COMPLIANCE_POLICY", "text", "",
        "`pqc`: X25519MLKEM768 is the only key exchange. Other values have no effect.";
    TLS12_ENABLED = "TLS12_ENABLED", "bool", "false",
        "`true`: TLS 1.2 is allowed beside 1.3, in tunnels and to the control plane. Not with `pqc`.";
    INPOD_UDS = "INPOD_UDS", "path", "/var/run/ztunnel/ztunnel.sock", "The socket of the CNI agent.";
    INPOD_PORT_REUSE = "INPOD_PORT_REUSE", "bool", "true",
        "Whether the listeners in pods share their ports, as upgrades need. With `CAPTURE=ebpf` they do.";
    PACKET_MARK = "PACKET_MARK", "number", "1337",
        "The mark of our packets; in dedicated mode none unless set. With `CAPTURE=ebpf` it is this one.";
    ENABLE_ORIG_SRC = "ENABLE_ORIG_SRC", "true, false", "",
        "Whether applications see the client's address: required, never, or (unset) if possible; with `CAPTURE=ebpf` it is always possible.";
    KEEPALIVE_ENABLED = "KEEPALIVE_ENABLED", "bool", "true", "TCP keepalive.";
    KEEPALIVE_TIME = "KEEPALIVE_TIME", "duration", "180s", "Idle time before the first probe.";
    KEEPALIVE_INTERVAL = "KEEPALIVE_INTERVAL", "duration", "180s", "Time between probes.";
    KEEPALIVE_RETRIES = "KEEPALIVE_RETRIES", "count", "9", "Unanswered probes that end a connection.";
    USER_TIMEOUT_ENABLED = "USER_TIMEOUT_ENABLED", "bool", "false",
        "Whether unacknowledged data ends a connection after the keepalive's time.";
    POOL_MAX_STREAMS_PER_CONNECTION = "POOL_MAX_STREAMS_PER_CONNECTION", "count", "100",
        "Streams that one tunnel carries at most.";
    POOL_UNUSED_RELEASE_TIMEOUT = "POOL_UNUSED_RELEASE_TIMEOUT", "duration", "5m",
        "How long an unused tunnel is kept.";
    HTTP2_STREAM_WINDOW_SIZE = "HTTP2_STREAM_WINDOW_SIZE", "bytes", "",
        "The receive window of a stream; unset is our own default.";
    HTTP2_CONNECTION_WINDOW_SIZE = "HTTP2_CONNECTION_WINDOW_SIZE", "bytes", "",
        "The receive window of a tunnel; unset is our own default.";
    HTTP2_FRAME_SIZE = "HTTP2_FRAME_SIZE", "bytes", "",
        "The largest frame to be received; unset is our own default.";
    CONNECTION_TERMINATION_DEADLINE = "CONNECTION_TERMINATION_DEADLINE", "duration", "",
        "How long a shutdown waits for connections.";
    TERMINATION_GRACE_PERIOD_SECONDS = "TERMINATION_GRACE_PERIOD_SECONDS", "seconds", "",
        "Kubernetes' grace period; gives the deadline where that is not set: 5 s less, 1 s less up to 10 s.";
    ZTUNNEL_WORKER_THREADS = "ZTUNNEL_WORKER_THREADS", "count, 0, N%", "",
        "Worker threads; 0 is one a core. In Istio also `concurrency` of the proxy config.";
    ZTUNNEL_CPU_LIMIT = "ZTUNNEL_CPU_LIMIT", "quantity", "", "The container's CPU limit.";
    ZTUNNEL_RESOURCE_CPU_LIMIT = "ZTUNNEL_RESOURCE_CPU_LIMIT", "quantity", "",
        "The same, under its newer name.";
    ZTUNNEL_RESOURCE_CPU_REQUEST = "ZTUNNEL_RESOURCE_CPU_REQUEST", "quantity", "",
        "The container's CPU request.";
    IPV6_ENABLED = "IPV6_ENABLED", "bool", "true", "Whether IPv6 is served. With `CAPTURE=ebpf` that of pods is, and only names have no addresses of it.";
    LOCALHOST_APP_TUNNEL = "LOCALHOST_APP_TUNNEL", "bool", "true",
        "Whether applications that take the PROXY protocol are reached on loopback.";
    ENABLE_RESPONSE_BAGGAGE = "ENABLE_RESPONSE_BAGGAGE", "bool", "true",
        "Whether answers describe the workload that took the tunnel.";
    AUTHZ_POLICY_INFO_LOGGING = "AUTHZ_POLICY_INFO_LOGGING", "bool", "false",
        "Whether policy decisions are logged at info instead of debug.";
    RUST_LOG = "RUST_LOG", "filter", "info", "What is logged: `level` or `module=level`, with commas.";
    LOG_FORMAT = "LOG_FORMAT", "plain, json", "plain", "The shape of log lines.";
    PROXY_ADMIN_PORT = "PROXY_ADMIN_PORT", "port", "15000",
        "The admin port. In Istio `proxyAdminPort` of the proxy config.";
    STATS_PORT = "STATS_PORT", "port", "15020", "The metrics port. In Istio `statsPort` of the proxy config.";
    ISTIO_META_ISTIO_VERSION = "ISTIO_META_ISTIO_VERSION", "text", "unknown",
        "The release, for `istio_build`.";
}
