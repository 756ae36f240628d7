use std::io::{self, Write};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tracing::level_filters::LevelFilter;
use tracing::{Level, subscriber};

use super::*;
use crate::clock::FixedClock;

#[derive(Clone, Default)]
struct Memory(Arc<Mutex<Vec<u8>>>);

impl Write for Memory {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(text);
        Ok(text.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What is logged by a closure, with the time cut off where the shape is plain.
fn logged(filter: &str, shape: Shape, log: impl FnOnce(&LogHandle)) -> String {
    let memory = Memory::default();
    let clock = FixedClock::at(Duration::from_micros(1_500_000));
    let config = LogConfig { filter: filter.parse().unwrap(), shape };
    let (handle, subscriber) = build(config, memory.clone(), Arc::new(clock)).unwrap();
    subscriber::with_default(subscriber, || log(&handle));
    assert!(handle.flush(Duration::from_secs(10)));
    let text = String::from_utf8(memory.0.lock().unwrap().clone()).unwrap();
    text.lines()
        .map(|line| line.trim_start_matches("1970-01-01T00:00:01.500000Z\t").to_owned() + "\n")
        .collect()
}

#[derive(Debug)]
struct Outer(io::Error);

impl std::fmt::Display for Outer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("outer")
    }
}

impl std::error::Error for Outer {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.0)
    }
}

fn one_of_each(_: &LogHandle) {
    let cause: &(dyn std::error::Error + 'static) = &Outer(io::Error::other("inner"));
    tracing::info!(target: "mesh_xds::client", peer = %"10.0.0.1:5", name = "a\tb", n = -3, ok = true, "stream\nopen");
    tracing::error!(target: "ztunnel::app", error = cause, half = 0.5, nan = f64::NAN);
    let pod = tracing::info_span!("pod", uid = "1", state = tracing::field::Empty);
    pod.record("state", "up");
    let _pod = pod.entered();
    let _inner = tracing::info_span!("inbound").entered();
    tracing::warn!(target: "other::place", list = ?[1, 2], "done");
}

#[test]
fn plain_lines() {
    assert_eq!(
        logged("info", Shape::Plain, one_of_each),
        "info\txds::client\tstream\\nopen\tpeer=10.0.0.1:5 name=\"a\\tb\" n=-3 ok=true\n\
         error\tapp\t\terror=\"outer: inner\" half=0.5 nan=NaN\n\
         warn\tother::place:pod{uid=\"1\" state=\"up\"}:inbound\tdone\tlist=[1, 2]\n"
    );
}

#[test]
fn json_lines() {
    let time = r#""time":"1970-01-01T00:00:01.500000Z""#;
    assert_eq!(
        logged("info", Shape::Json, one_of_each),
        format!(
            r#"{{"level":"info",{time},"scope":"mesh_xds::client","message":"stream\nopen","peer":"10.0.0.1:5","name":"a\tb","n":-3,"ok":true}}
{{"level":"error",{time},"scope":"ztunnel::app","error":"outer: inner","half":0.5,"nan":"NaN"}}
{{"level":"warn",{time},"scope":"other::place","message":"done","list":"[1, 2]","pod":{{"uid":"1","state":"up"}},"inbound":{{}}}}
"#
        )
    );
}

#[test]
fn a_value_that_logs_while_it_is_printed_keeps_lines_apart() {
    struct Noisy;
    impl std::fmt::Display for Noisy {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            tracing::info!(target: "inner", "from inside");
            f.write_str("x")
        }
    }
    let text = logged(
        "info",
        Shape::Plain,
        |_| tracing::info!(target: "outer", value = %Noisy, "message"),
    );
    assert!(text.ends_with("info\touter\tmessage\tvalue=x\n"), "{text}");
}

#[test]
fn levels_change_at_run_time() {
    fn say() {
        tracing::debug!(target: "mesh_hbone::pool", "detail");
        tracing::info!(target: "mesh_state", "news");
    }
    let text = logged("warn", Shape::Plain, |handle| {
        say();
        handle.add("hbone=debug").unwrap();
        say();
        handle.add("info,hbone=off").unwrap();
        say();
        handle.reset();
        say();
    });
    assert_eq!(text, "debug\thbone::pool\tdetail\t\ninfo\tstate\tnews\t\n");
}

#[test]
fn filters() {
    let of = |filter: &str, target| filter.parse::<Filter>().unwrap().level(target);
    for (filter, target, expected) in [
        ("info", "anything", LevelFilter::INFO),
        ("access=debug", "access", LevelFilter::DEBUG),
        ("access=debug", "mesh_xds", LevelFilter::OFF),
        ("info,access:debug", "access", LevelFilter::DEBUG),
        ("info,xds=trace,xds::client=off", "mesh_xds::client", LevelFilter::OFF),
        ("info,xds::client=off,xds=trace", "mesh_xds::client::x", LevelFilter::OFF),
        ("info,xds=trace", "mesh_xdsx", LevelFilter::INFO),
        ("mesh_xds", "mesh_xds::client", LevelFilter::TRACE),
        ("ztunnel::xds:debug", "mesh_xds::client", LevelFilter::DEBUG),
        ("ztunnel=debug", "mesh_hbone::pool", LevelFilter::DEBUG),
        ("ztunnel=debug,hbone=warn", "mesh_hbone::pool", LevelFilter::WARN),
        ("ztunnel=debug,app=warn", "ztunnel::app", LevelFilter::WARN),
        ("ztunnel=debug", "hyper", LevelFilter::OFF),
        ("WARN", "anything", LevelFilter::WARN),
        ("info,error", "anything", LevelFilter::ERROR),
    ] {
        assert_eq!(of(filter, target), expected, "{filter} for {target}");
    }
    for bad in ["", "info,", "a=b", "a:b", "=info", "a=", "3", "a b", "a[b]=info", "info;debug"] {
        assert!(bad.parse::<Filter>().is_err(), "{bad:?}");
    }
}

#[test]
fn filters_print_as_they_are_read() {
    for text in ["info", "info,access=debug", "access=off", "warn,a::b=trace,c=error"] {
        assert_eq!(text.parse::<Filter>().unwrap().to_string(), text);
    }
    let mut filter: Filter = "info,a=warn".parse().unwrap();
    filter.add("a:debug,error,b=trace").unwrap();
    assert_eq!(filter.to_string(), "error,a=debug,b=trace");
    let error = filter.add("off,c=loud").unwrap_err().to_string();
    assert!(error.contains("\"c=loud\""), "{error}");
    assert_eq!(filter.to_string(), "error,a=debug,b=trace", "unchanged by a mistake");
}

#[test]
fn access_lines_follow_the_filter_of_their_target() {
    let text = logged("access=debug", Shape::Plain, |handle| {
        tracing::error!(target: "mesh_xds", "not wanted");
        handle.access_log().line(Level::DEBUG, "connection opened", |fields| {
            fields.number("n", 1);
        });
    });
    assert_eq!(text, "debug\taccess\tconnection opened\tn=1\n");
}
