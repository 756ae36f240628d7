//! What the two ends of a tunnel say of themselves: the `baggage` header (W3C Baggage), with the keys of
//! OpenTelemetry that Istio uses.

use std::fmt;

/// What a workload says of itself.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Baggage {
    /// `k8s.cluster.name`.
    pub cluster: Option<String>,
    /// `k8s.namespace.name`.
    pub namespace: Option<String>,
    /// What made the workload; part of the key of its name.
    pub kind: Kind,
    /// `k8s.<kind>.name`.
    pub workload_name: Option<String>,
    /// `service.name`.
    pub service_name: Option<String>,
    /// `service.version`.
    pub revision: Option<String>,
    /// `cloud.region`.
    pub region: Option<String>,
    /// `cloud.availability_zone`.
    pub zone: Option<String>,
}

/// What made a workload.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Kind {
    /// A Deployment.
    #[default]
    Deployment,
    /// A `CronJob`.
    CronJob,
    /// A pod by itself.
    Pod,
    /// A Job.
    Job,
}

impl Kind {
    const ALL: [Self; 4] = [Self::Deployment, Self::CronJob, Self::Pod, Self::Job];

    const fn key(self) -> &'static str {
        match self {
            Self::Deployment => "k8s.deployment.name",
            Self::CronJob => "k8s.cronjob.name",
            Self::Pod => "k8s.pod.name",
            Self::Job => "k8s.job.name",
        }
    }
}

impl From<mesh_core::WorkloadKind> for Kind {
    fn from(kind: mesh_core::WorkloadKind) -> Self {
        use mesh_core::WorkloadKind as K;
        match kind {
            K::Deployment => Self::Deployment,
            K::CronJob => Self::CronJob,
            K::Pod => Self::Pod,
            K::Job => Self::Job,
        }
    }
}

impl Baggage {
    /// Reads the lines of the header; `None` where there is none, or one is not ASCII.
    pub fn parse(lines: impl IntoIterator<Item = impl AsRef<[u8]>>) -> Option<Self> {
        let mut baggage = Self::default();
        let mut any = false;
        for line in lines {
            any = true;
            let line = std::str::from_utf8(line.as_ref()).ok().filter(|line| line.is_ascii())?;
            for pair in line.split(',') {
                let mut parts = pair.split('=');
                let (Some(key), Some(value)) = (parts.next(), parts.next()) else { continue };
                baggage.put(key.trim(), value.trim());
            }
        }
        any.then_some(baggage)
    }

    fn put(&mut self, key: &str, value: &str) {
        let field = match key {
            "k8s.cluster.name" => &mut self.cluster,
            "k8s.namespace.name" => &mut self.namespace,
            "service.name" => &mut self.service_name,
            "service.version" => &mut self.revision,
            "cloud.region" => &mut self.region,
            "cloud.availability_zone" => &mut self.zone,
            _ => match Kind::ALL.into_iter().find(|kind| kind.key() == key) {
                Some(kind) => {
                    self.kind = kind;
                    &mut self.workload_name
                }
                None => return,
            },
        };
        *field = Some(value.to_owned()).filter(|value| !value.is_empty());
    }
}

impl fmt::Display for Baggage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut first = true;
        for (key, value) in [
            ("k8s.cluster.name", &self.cluster),
            ("k8s.namespace.name", &self.namespace),
            (self.kind.key(), &self.workload_name),
            ("service.name", &self.service_name),
            ("service.version", &self.revision),
            ("cloud.region", &self.region),
            ("cloud.availability_zone", &self.zone),
        ] {
            let Some(value) = value.as_deref().filter(|value| !value.is_empty()) else { continue };
            write!(f, "{}{key}={value}", if first { "" } else { "," })?;
            first = false;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::{option, prelude::*};

    #[test]
    fn reads_what_istio_sends() {
        let line = "k8s.cluster.name=Kubernetes,k8s.namespace.name=shop,k8s.pod.name=web,service.name=web,service.version=latest";
        let baggage = Baggage::parse([line.as_bytes()]).unwrap();
        assert_eq!(baggage.kind, Kind::Pod);
        assert_eq!(baggage.workload_name.as_deref(), Some("web"));
        assert_eq!(baggage.to_string(), line, "and says it the same way");
    }

    #[test]
    fn tolerates() {
        let of = |lines: &[&str]| Baggage::parse(lines.iter().map(|line| line.as_bytes()));
        assert_eq!(of(&[]), None);
        assert_eq!(of(&["service.name=é"]), None, "not ASCII");
        assert_eq!(of(&["", "nonsense", "a=b=c"]), Some(Baggage::default()));
        let two = of(&["service.name=a", "service.version=v,service.name="]).unwrap();
        assert_eq!((two.service_name, two.revision.as_deref()), (None, Some("v")));
    }

    proptest! {
        #[test]
        fn what_is_printed_parses_to_the_same(
            fields in prop::array::uniform7(option::of("[A-Za-z0-9._/-]{1,12}")),
            kind in 0_usize..4,
        ) {
            let [cluster, namespace, workload_name, service_name, revision, region, zone] = fields;
            let kind = if workload_name.is_some() { Kind::ALL[kind] } else { Kind::default() };
            let baggage = Baggage { cluster, namespace, kind, workload_name, service_name, revision, region, zone };
            let text = baggage.to_string();
            prop_assert_eq!(Baggage::parse([text.as_bytes()]), Some(baggage));
        }
    }
}
