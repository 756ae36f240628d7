//! Who we are, as the control plane wants to read it.

use std::collections::BTreeMap;

use mesh_proto::envoy::config::core::v3;
use prost_types::{Struct, Value, value};

/// Who we are.
#[derive(Debug, Clone, Default)]
pub struct Node {
    /// `INSTANCE_IP`.
    pub ip: String,
    /// `POD_NAME`.
    pub name: String,
    /// `POD_NAMESPACE`.
    pub namespace: String,
    /// `NODE_NAME`.
    pub node: String,
    /// `ISTIO_META_*`, without the prefix, as text.
    pub metadata: BTreeMap<String, String>,
    /// `ISTIO_METAJSON_*`, without the prefix, as JSON. What cannot be parsed is logged and left out.
    pub json_metadata: BTreeMap<String, String>,
}

impl Node {
    /// The message. istiod takes the id apart: role, address, name with namespace, domain.
    pub(crate) fn message(&self) -> v3::Node {
        let Self { ip, name, namespace, node, .. } = self;
        let mut fields: BTreeMap<String, Value> = BTreeMap::new();
        for (key, text) in
            [("NAME", name), ("NAMESPACE", namespace), ("INSTANCE_IPS", ip), ("NODE_NAME", node)]
        {
            fields.insert(key.to_owned(), string(text));
        }
        for (key, text) in &self.metadata {
            fields.insert(key.clone(), string(text));
        }
        for (key, text) in &self.json_metadata {
            match serde_json::from_str(text) {
                Ok(json) => {
                    fields.insert(key.clone(), from_json(json));
                }
                Err(error) => {
                    tracing::warn!(%key, %error, "ISTIO_METAJSON_ value is not JSON; left out")
                }
            }
        }
        v3::Node {
            id: format!("ztunnel~{ip}~{name}.{namespace}~{namespace}.svc.cluster.local"),
            cluster: String::new(),
            metadata: Some(Struct { fields: fields.into_iter().collect() }),
        }
    }
}

fn string(text: &str) -> Value {
    Value { kind: Some(value::Kind::StringValue(text.to_owned())) }
}

fn from_json(json: serde_json::Value) -> Value {
    use serde_json::Value as Json;
    let kind = match json {
        Json::Null => value::Kind::NullValue(0),
        Json::Bool(flag) => value::Kind::BoolValue(flag),
        Json::Number(number) => value::Kind::NumberValue(number.as_f64().unwrap_or_default()),
        Json::String(text) => value::Kind::StringValue(text),
        Json::Array(items) => {
            let values = items.into_iter().map(from_json).collect();
            value::Kind::ListValue(prost_types::ListValue { values })
        }
        Json::Object(fields) => {
            let fields = fields.into_iter().map(|(key, json)| (key, from_json(json))).collect();
            value::Kind::StructValue(Struct { fields })
        }
    };
    Value { kind: Some(kind) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_istiod_reads() {
        let node = Node {
            ip: "10.0.0.1".to_owned(),
            name: "ztunnel-x".to_owned(),
            namespace: "istio-system".to_owned(),
            node: "n1".to_owned(),
            metadata: BTreeMap::from([("CLUSTER_ID".to_owned(), "c1".to_owned())]),
            json_metadata: BTreeMap::from([
                ("LABELS".to_owned(), r#"{"a":[1,true,null,"x"]}"#.to_owned()),
                ("BROKEN".to_owned(), "{".to_owned()),
            ]),
        }
        .message();
        assert_eq!(
            node.id,
            "ztunnel~10.0.0.1~ztunnel-x.istio-system~istio-system.svc.cluster.local"
        );
        let fields = node.metadata.unwrap().fields;
        let keys: Vec<&str> = fields.keys().map(String::as_str).collect();
        assert_eq!(
            keys,
            ["CLUSTER_ID", "INSTANCE_IPS", "LABELS", "NAME", "NAMESPACE", "NODE_NAME"]
        );
        assert_eq!(fields["CLUSTER_ID"], string("c1"));
        let Some(value::Kind::StructValue(labels)) = &fields["LABELS"].kind else {
            panic!("{fields:?}")
        };
        let Some(value::Kind::ListValue(list)) = &labels.fields["a"].kind else {
            panic!("{labels:?}")
        };
        assert_eq!(list.values[0].kind, Some(value::Kind::NumberValue(1.0)));
    }
}
