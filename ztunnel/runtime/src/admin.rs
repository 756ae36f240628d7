//! What is served on the admin, metrics and readiness ports (`spec/ztunnel.md` §11.1, §11.5, §11.6).

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::{Map, Value};

use crate::http::{Method, Methods, Response, Server, StatusCode};
use crate::log::LogHandle;
use crate::metrics::Registry;
use crate::ready::Readiness;
use crate::signal::Trigger;

/// Sections of `/config_dump`, each registered by the owner of what it shows. Clones are one dump.
#[derive(Clone, Default)]
pub struct Dump(Arc<Mutex<Vec<Section>>>);

type Section = (&'static str, Arc<dyn Fn() -> Value + Send + Sync>);

impl Dump {
    /// A dump without sections.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a section. Where a name is taken, maps are merged and lists joined. The closure runs for each dump,
    /// on a thread of its own.
    pub fn register(
        &self,
        name: &'static str,
        section: impl Fn() -> Value + Send + Sync + 'static,
    ) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push((name, Arc::new(section)));
    }

    /// All sections, by name. Sections that are null are left out.
    #[must_use]
    pub fn collect(&self) -> Value {
        let sections = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut dump = BTreeMap::new();
        for (name, section) in sections {
            merge(dump.entry(name.to_owned()).or_insert(Value::Null), section());
        }
        dump.retain(|_, section| !section.is_null());
        Value::Object(dump.into_iter().collect::<Map<_, _>>())
    }
}

fn merge(into: &mut Value, other: Value) {
    match (into, other) {
        (Value::Object(into), Value::Object(other)) => {
            for (name, value) in other {
                merge(into.entry(name).or_insert(Value::Null), value);
            }
        }
        (Value::Array(into), Value::Array(mut other)) => into.append(&mut other),
        (_, Value::Null) => {}
        (into, other) => *into = other,
    }
}

impl fmt::Debug for Dump {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sections = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        f.debug_list().entries(sections.iter().map(|(name, _)| name)).finish()
    }
}

const INDEX: &str = "<!DOCTYPE html>
<html><head><meta charset=\"utf-8\"><title>node proxy admin</title></head><body>
<h1>Node proxy</h1>
<ul>
<li><a href=\"config_dump\">/config_dump</a>: what it knows and what it does</li>
<li>/logging (POST): log levels; <code>?level=info,xds=debug</code>, <code>?reset</code></li>
<li>/quitquitquit (POST): stop, gracefully</li>
<li>/debug/pprof/profile, /debug/pprof/heap: not in this build, and say what to use instead</li>
</ul>
</body></html>
";

/// Upstream profiles itself. A profiler inside would unwind stacks in signal handlers of a process that everybody's
/// traffic passes, and weigh more than this whole server; the node has better ones.
const NOT_HERE: [(&str, &str); 3] = [
    ("/debug/pprof/profile", PROFILE),
    ("/debug/pprof/heap", HEAP),
    ("/debug/pprof/heap/profiling", HEAP),
];
const PROFILE: &str = "this build does not profile itself; on the node, run: \
    perf record --call-graph fp --pid <pid of ztunnel> -- sleep 10 (frame pointers are kept)\n";
const HEAP: &str = "this build has no heap profiler; what it takes is in \
    /proc/<pid of ztunnel>/smaps_rollup on the node\n";

/// The routes of the admin port.
#[must_use]
pub fn server(dump: &Dump, log: &LogHandle, quit: &Trigger) -> Server {
    let (dump, log, quit) = (dump.clone(), log.clone(), quit.clone());
    let not_here = |server: Server, (path, instead): (&'static str, &'static str)| {
        server.route(path, Methods::Any, move |_| async move {
            Response::text(StatusCode::NOT_IMPLEMENTED, instead)
        })
    };
    NOT_HERE
        .into_iter()
        .fold(Server::new(), not_here)
        .route("/", Methods::Only(Method::GET), |_| async {
            Response::ok("text/html; charset=utf-8", INDEX)
        })
        .route("/config_dump", Methods::Any, move |_| {
            let dump = dump.clone();
            async move {
                // A large mesh takes a while: certificates and updates must not wait for it.
                let text =
                    tokio::task::spawn_blocking(move || serde_json::to_vec_pretty(&dump.collect()));
                match text.await {
                    Ok(Ok(text)) => Ok(Response::ok("application/json", text)),
                    Ok(Err(error)) => Err(error.to_string()),
                    Err(error) => Err(error.to_string()),
                }
            }
        })
        .route("/logging", Methods::Only(Method::POST), move |request| {
            let response = logging(&log, &request.query);
            async { response }
        })
        .route("/quitquitquit", Methods::Only(Method::POST), move |_| {
            tracing::info!("asked to stop over the admin port");
            quit.fire();
            async { Response::text(StatusCode::OK, "shutdown now\n") }
        })
}

/// The routes of the metrics port.
#[must_use]
pub fn metrics_server(registry: &Registry) -> Server {
    ["/metrics", "/stats/prometheus"].into_iter().fold(Server::new(), |server, path| {
        let registry = registry.clone();
        server.route(path, Methods::Any, move |request| {
            let content_type = Registry::content_type(request.accept.as_deref());
            let response = Response::ok(content_type, registry.render());
            async { response }
        })
    })
}

/// The routes of the readiness port.
#[must_use]
pub fn readiness_server(readiness: &Readiness) -> Server {
    let readiness = readiness.clone();
    Server::new().route("/healthz/ready", Methods::Only(Method::GET), move |_| {
        let pending = readiness.pending();
        let response = if pending.is_empty() {
            Response::text(StatusCode::OK, "ready\n")
        } else {
            let body = format!("not ready, pending: {}\n", pending.join(", "));
            Response::text(StatusCode::INTERNAL_SERVER_ERROR, body)
        };
        async { response }
    })
}

const USAGE: &str = "usage: POST /logging                      list the current log level
       POST /logging?level=<level>        change it: error, warn, info, debug, trace, off
       POST /logging?level=<module>=<level>,<module>:<level>
                                          change it for modules
       POST /logging?reset                back to that of the start (before level, where both are given)
";

fn logging(log: &LogHandle, query: &str) -> Response {
    let mut clauses: Option<String> = None;
    let mut reset = false;
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        match pair.split_once('=').unwrap_or((pair, "")) {
            ("reset", _) => reset = true,
            ("level", value) => match (decode(value), &mut clauses) {
                (Some(value), Some(clauses)) => *clauses = format!("{clauses},{value}"),
                (Some(value), None) => clauses = Some(value),
                (None, _) => return usage("level is not valid percent encoding"),
            },
            (other, _) => return usage(&format!("unknown parameter {other:?}")),
        }
    }
    let changed = match clauses {
        Some(clauses) if reset => log.reset_and_add(&clauses),
        Some(clauses) => log.add(&clauses),
        None => {
            if reset {
                log.reset();
            }
            Ok(())
        }
    };
    match changed {
        Ok(()) => {
            Response::text(StatusCode::OK, format!("current log level is {}\n", log.filter()))
        }
        Err(error) => usage(&error.to_string()),
    }
}

fn usage(problem: &str) -> Response {
    Response::text(StatusCode::BAD_REQUEST, format!("{problem}\n{USAGE}"))
}

/// Undoes percent encoding. None if it is cut short, or not UTF-8.
fn decode(text: &str) -> Option<String> {
    let mut bytes = text.bytes();
    let mut decoded = Vec::with_capacity(text.len());
    while let Some(byte) = bytes.next() {
        decoded.push(match byte {
            b'%' => {
                let digits = [bytes.next()?, bytes.next()?];
                let number = std::str::from_utf8(&digits).ok()?;
                u8::from_str_radix(number, 16)
                    .ok()
                    .filter(|_| digits.iter().all(u8::is_ascii_hexdigit))?
            }
            b'+' => b' ',
            other => other,
        });
    }
    String::from_utf8(decoded).ok()
}

#[cfg(test)]
mod tests {
    use std::io;

    use serde_json::json;

    use super::*;
    use crate::clock::SystemClock;
    use crate::log::{LogConfig, build};

    #[test]
    fn sections_are_merged_and_sorted() {
        let dump = Dump::new();
        dump.register("workloadState", || json!({"b": {"state": "Up"}}));
        dump.register("config", || json!({"z": 1}));
        dump.register("workloadState", || json!({"a": {}, "b": {"info": {}}}));
        dump.register("list", || json!([1]));
        dump.register("list", || json!([2]));
        dump.register("nothing", || Value::Null);
        assert_eq!(
            dump.collect().to_string(),
            r#"{"config":{"z":1},"list":[1,2],"workloadState":{"a":{},"b":{"info":{},"state":"Up"}}}"#
        );
    }

    #[test]
    fn logging_follows_its_rules() {
        let (log, _) = build(LogConfig::default(), io::sink(), Arc::new(SystemClock)).unwrap();
        for (query, status, text) in [
            ("", 200, "current log level is info\n"),
            ("level=debug", 200, "current log level is debug\n"),
            (
                "level=access%3Dtrace,xds:warn",
                200,
                "current log level is debug,access=trace,xds=warn\n",
            ),
            ("level=xds=off", 200, "current log level is debug,access=trace,xds=off\n"),
            ("level=warn&reset", 200, "current log level is warn\n"),
            ("level=a=debug&level=b=debug", 200, "current log level is warn,a=debug,b=debug\n"),
            ("level=inof", 400, "usage"),
            ("level=a=loud", 400, "usage"),
            ("level=", 400, "usage"),
            ("level=%zz", 400, "usage"),
            ("level=%2", 400, "usage"),
            ("unknown", 400, "usage"),
            ("reset", 200, "current log level is info\n"),
        ] {
            let response = logging(&log, query);
            let body = String::from_utf8(response.body.to_vec()).unwrap();
            assert_eq!(response.status.as_u16(), status, "{query}: {body}");
            assert!(body.contains(text), "{query}: {body}");
        }
    }
}
