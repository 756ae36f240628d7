use std::collections::BTreeMap;
use std::time::Duration;

use super::*;

fn key(name: &'static str, default: &'static str) -> Key {
    Key { name, unit: "", default, doc: "" }
}

fn source(settings: &[(&str, &str)]) -> BTreeMap<String, String> {
    settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

#[test]
fn durations() {
    let ms = |n| Some(Duration::from_millis(n));
    for (text, expected) in [
        ("500ms", ms(500)),
        ("3m", ms(180_000)),
        ("1d", ms(86_400_000)),
        ("3m+31", ms(211_000)),
        ("3m + 31s", ms(211_000)),
        ("1h30m", ms(5_400_000)),
        ("1.5s", ms(1500)),
        ("7", ms(7000)),
        ("0", ms(0)),
        ("250us", Some(Duration::from_micros(250))),
        ("", None),
        ("+", None),
        ("3m+", None),
        ("-1s", None),
        ("s", None),
        (".5s", None),
        ("1.2.3s", None),
        ("3 potatoes", None),
        ("99999999999999999999d", None),
        ("9999999999d", None),
        ("1é", None),
    ] {
        assert_eq!(parse_duration(text), expected, "{text:?}");
    }
}

#[test]
fn cpu_quantities_round_up_to_cores() {
    for (text, expected) in [
        ("2", Some(2)),
        ("1.0", Some(1)),
        ("1.5", Some(2)),
        ("200m", Some(1)),
        ("1000m", Some(1)),
        ("1001m", Some(2)),
        ("0", Some(0)),
        ("1n", Some(1)),
        ("2e1", Some(20)),
        ("15e-1", Some(2)),
        ("1k", Some(1000)),
        ("", None),
        ("m", None),
        ("2e", None),
        ("-1", None),
        ("1e99", None),
        ("two", None),
    ] {
        assert_eq!(value::parse_cpu(text), expected, "{text:?}");
    }
}

#[test]
fn amounts() {
    assert_eq!(value::parse_amount("0").unwrap().of(8), 8);
    assert_eq!(value::parse_amount("3").unwrap().of(8), 3);
    assert_eq!(value::parse_amount("25%").unwrap().of(8), 2);
    assert_eq!(value::parse_amount("26%").unwrap().of(8), 3);
    assert_eq!(value::parse_amount("1%").unwrap().of(2), 1);
    for bad in ["", "%", "-5%", "0%", "NaN%", "1.5", "+1"] {
        assert_eq!(value::parse_amount(bad), None, "{bad:?}");
    }
}

#[test]
fn byte_sizes() {
    for (text, expected) in [
        ("65536", Some(65536)),
        ("4Mi", Some(4 << 20)),
        ("64 Ki", Some(65536)),
        ("1M", Some(1_000_000)),
        ("Ki", None),
        ("1.5Mi", None),
        ("99999999999Gi", None),
    ] {
        assert_eq!(value::parse_bytes(text), expected, "{text:?}");
    }
}

#[test]
fn every_mistake_is_reported() {
    let source = source(&[
        ("A", "x"),
        ("B", "70000"),
        ("C", "TRUE"),
        ("D", ""),
        ("E", "maybe"),
        ("F", "1s"),
    ]);
    let mut reader = Reader::new(&source);
    assert_eq!(reader.duration(&key("A", "5s")), Duration::from_secs(5), "the default meanwhile");
    assert_eq!(reader.port(&key("B", "15020")), 15020);
    assert!(!reader.flag(&key("C", "true")), "only exactly true");
    assert!(reader.toggle(&key("D", "true")), "empty is absent");
    assert_eq!(reader.optional_toggle(&key("E", "")), None);
    assert_eq!(reader.optional_duration(&key("F", "")), Some(Duration::from_secs(1)));
    assert_eq!(reader.optional_count(&key("G", "")), None);
    reader.invalid(&key("F", ""), "not together with A");
    assert_eq!(
        reader.finish().unwrap_err().to_string(),
        "4 invalid settings\n  \
         A=\"x\": write a duration such as 500ms, 30s, 3m, 1d or 3m+31 (a bare number is seconds)\n  \
         B=\"70000\": write a port, 1 to 65535\n  \
         E=\"maybe\": write true or false\n  \
         F=\"1s\": not together with A"
    );
}

#[test]
fn a_wrong_default_is_noticed() {
    let nothing = source(&[]);
    let mut reader = Reader::new(&nothing);
    reader.count(&key("A", "many"));
    assert!(reader.finish().unwrap_err().to_string().contains("its default is wrong"));
}

#[test]
fn empty_text_is_a_value() {
    let set = source(&[("XDS_ADDRESS", "")]);
    let mut reader = Reader::new(&set);
    assert_eq!(reader.text(&key("XDS_ADDRESS", "https://x")), "");
    assert_eq!(reader.optional_text(&key("XDS_ADDRESS", "")), Some(String::new()));
    assert_eq!(reader.optional_text(&key("CA_ADDRESS", "")), None);
    reader.finish().unwrap();
}

#[test]
fn stronger_layers_win() {
    let mesh = "defaultConfig:\n  discoveryAddress: mesh:1\n  statsPort: 1\n  proxyMetadata:\n    A: mesh\n    \
                B: mesh\n  tracing: {zipkin: {address: x}}\nrootNamespace: istio-system\n";
    let proxy = "discoveryAddress: proxy:2\nconcurrency: 4\nproxyMetadata: {A: proxy, ISTIO_META_C: proxy}\n";
    let mesh = FromYaml::mesh_config(mesh).unwrap();
    let proxy = FromYaml::proxy_config(proxy).unwrap();
    let env = source(&[("ISTIO_META_A", "env"), ("OTHER", "env")]);
    let all = Layers::new().then(&env).then(&proxy).then(&mesh);
    let get = |name| all.get(name).unwrap();
    assert_eq!(get("discoveryAddress"), "proxy:2");
    assert_eq!(get("statsPort"), "1");
    assert_eq!(get("concurrency"), "4");
    assert_eq!(all.get("tracing"), None);
    let metadata = all.prefixed("ISTIO_META_");
    let expected = [("ISTIO_META_A", "env"), ("ISTIO_META_B", "mesh"), ("ISTIO_META_C", "proxy")];
    assert_eq!(metadata, expected.map(|(name, value)| (name.to_owned(), value.to_owned())));
}

#[test]
fn yaml_faults_say_where() {
    for (text, expected) in [
        ("a: 1\nb: [}", "line 2"),
        ("- a\n- b", "the text must be a map"),
        ("just text", "the text must be a map"),
        ("a: &x 1\nb: *x", "line 2: aliases are not supported"),
        ("a: 1\na: 2", "line 2: \"a\" is set twice"),
        ("proxyMetadata: [a]", "proxyMetadata must be a map"),
        ("{[a]: 1}", "a key must be plain text"),
        (&"[".repeat(100), "nested too deeply"),
    ] {
        let error = FromYaml::proxy_config(text).unwrap_err().to_string();
        assert!(error.contains(expected), "{text:?}: {error}");
    }
    let empty = FromYaml::default();
    for text in ["", "---\n", "~", "# nothing\n", "{}", "defaultConfig:\n"] {
        assert_eq!(FromYaml::mesh_config(text).unwrap(), empty, "{text:?}");
        assert_eq!(FromYaml::proxy_config(text).unwrap(), empty, "{text:?}");
    }
}

#[test]
fn the_table_is_markdown() {
    let keys = [
        &Key { name: "A", unit: "duration", default: "5s", doc: "How long." },
        &Key { name: "B", unit: "a|b", default: "", doc: "Which." },
    ];
    assert_eq!(
        markdown(&keys),
        "| Variable | Value | Default | Meaning |\n|---|---|---|---|\n| `A` | duration | `5s` | How long. |\n\
         | `B` | a\\|b | – | Which. |\n"
    );
}
