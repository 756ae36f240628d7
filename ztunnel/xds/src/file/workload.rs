//! Workloads of the local file.

use std::net::IpAddr;

use mesh_proto::istio::workload::{
    ApplicationTunnel, Locality, NetworkMode, Port, PortList, TunnelProtocol, Workload,
    WorkloadStatus, WorkloadType, application_tunnel,
};

use super::address;
use super::fault::Fault;
use super::tokens::{Token, Tokens};
use super::value;

type Result<T> = std::result::Result<T, Box<Fault>>;

/// One item of `workloads`.
pub(super) fn read(tokens: &mut Tokens<'_>, start: &Token) -> Result<Workload> {
    let mut workload = Workload::default();
    value::map(tokens, start, |tokens, key, name, token| {
        // Plain texts first: they are most of a large file.
        if let Some(field) = text_field(&mut workload, name) {
            *field = value::text(token)?;
            return Ok(());
        }
        field(&mut workload, tokens, (key, name), token)
    })?;
    if workload.namespace.is_empty() {
        return Err(value::missing(start, "namespace"));
    }
    if workload.uid.is_empty() {
        if workload.name.is_empty() {
            return Err(value::missing(start, "uid"));
        }
        workload.uid = uid(&workload);
    }
    Ok(workload)
}

/// Upstream takes workloads without uid, all under the empty one, so that the last remains. Ours get the uid that
/// istiod would give a pod of that name.
fn uid(workload: &Workload) -> String {
    let cluster = if workload.cluster_id.is_empty() { "Kubernetes" } else { &workload.cluster_id };
    format!("{cluster}//Pod/{}/{}", workload.namespace, workload.name)
}

fn text_field<'w>(workload: &'w mut Workload, name: &str) -> Option<&'w mut String> {
    Some(match name {
        "uid" => &mut workload.uid,
        "name" => &mut workload.name,
        "namespace" => &mut workload.namespace,
        "trustDomain" => &mut workload.trust_domain,
        "serviceAccount" => &mut workload.service_account,
        "network" => &mut workload.network,
        "node" => &mut workload.node,
        "hostname" => &mut workload.hostname,
        "workloadName" => &mut workload.workload_name,
        "canonicalName" => &mut workload.canonical_name,
        "canonicalRevision" => &mut workload.canonical_revision,
        "clusterId" => &mut workload.cluster_id,
        _ => return None,
    })
}

fn field(
    workload: &mut Workload,
    tokens: &mut Tokens<'_>,
    (key, name): (&Token, &str),
    token: Token,
) -> Result<()> {
    match name {
        "workloadIps" => {
            workload.addresses = value::each(tokens, &token, |item| {
                value::parsed::<IpAddr>(&item, "an address").map(address::octets)
            })?;
        }
        "services" => services(workload, tokens, &token)?,
        "authorizationPolicies" => {
            workload.authorization_policies = value::each(tokens, &token, value::text)?;
        }
        "waypoint" => workload.waypoint = address::gateway(tokens, &token)?,
        "networkGateway" => workload.network_gateway = address::gateway(tokens, &token)?,
        "applicationTunnel" => workload.application_tunnel = tunnel(tokens, &token)?,
        "locality" => workload.locality = locality(tokens, &token)?,
        // What is null is as if it were not there.
        _ if token.is_null() && SCALARS.contains(&name) => {}
        "protocol" => {
            let words = [("HBONE", TunnelProtocol::Hbone), ("TCP", TunnelProtocol::None)];
            workload.set_tunnel_protocol(value::one_of(&token, &words)?);
        }
        "networkMode" => {
            let words =
                [("Standard", NetworkMode::Standard), ("HostNetwork", NetworkMode::HostNetwork)];
            workload.set_network_mode(value::one_of(&token, &words)?);
        }
        "status" => {
            let words =
                [("Healthy", WorkloadStatus::Healthy), ("Unhealthy", WorkloadStatus::Unhealthy)];
            workload.set_status(value::one_of(&token, &words)?);
        }
        "workloadType" => workload.set_workload_type(kind(&value::text(token)?)),
        "nativeTunnel" => workload.native_tunnel = value::flag(&token)?,
        "capacity" => workload.capacity = Some(value::parsed(&token, "a number of 32 bits")?),
        _ => return Err(value::unknown(key)),
    }
    Ok(())
}

const SCALARS: [&str; 6] =
    ["protocol", "networkMode", "status", "workloadType", "nativeTunnel", "capacity"];

/// Free text upstream, and only for telemetry: what is not known is a deployment, as with xDS.
fn kind(text: &str) -> WorkloadType {
    match text.to_ascii_lowercase().as_str() {
        "cronjob" => WorkloadType::Cronjob,
        "pod" => WorkloadType::Pod,
        "job" => WorkloadType::Job,
        _ => WorkloadType::Deployment,
    }
}

/// `"namespace/hostname": {port: target}`.
fn services(workload: &mut Workload, tokens: &mut Tokens<'_>, start: &Token) -> Result<()> {
    value::map(tokens, start, |tokens, key, name, token| {
        value::with(key, "namespace/hostname", |text| text.split_once('/').map(|_| ()))?;
        let ports = ports(tokens, &token)?;
        workload.services.insert(name.to_owned(), PortList { ports });
        Ok(())
    })
}

/// `{port: target}`; no target means that the workload's own mapping gives it.
pub(super) fn ports(tokens: &mut Tokens<'_>, start: &Token) -> Result<Vec<Port>> {
    let mut ports = Vec::new();
    value::map(tokens, start, |_, key, _, token| {
        let service: u16 = value::key(key, "a port")?;
        let target: u16 = value::parsed(&token, "a port")?;
        ports.push(Port {
            service_port: service.into(),
            target_port: target.into(),
            app_protocol: 0,
        });
        Ok(())
    })?;
    Ok(ports)
}

fn tunnel(tokens: &mut Tokens<'_>, start: &Token) -> Result<Option<ApplicationTunnel>> {
    if start.is_null() {
        return Ok(None);
    }
    let mut tunnel = ApplicationTunnel::default();
    value::map(tokens, start, |_, key, name, token| {
        match name {
            "protocol" => tunnel.set_protocol(value::one_of(
                &token,
                &[
                    ("NONE", application_tunnel::Protocol::None),
                    ("PROXY", application_tunnel::Protocol::Proxy),
                ],
            )?),
            "port" if token.is_null() => {}
            "port" => tunnel.port = u32::from(value::parsed::<u16>(&token, "a port")?),
            _ => return Err(value::unknown(key)),
        }
        Ok(())
    })?;
    Ok(Some(tunnel))
}

fn locality(tokens: &mut Tokens<'_>, start: &Token) -> Result<Option<Locality>> {
    if start.is_null() {
        return Ok(None);
    }
    let mut locality = Locality::default();
    value::map(tokens, start, |_, key, name, token| {
        match name {
            "region" => locality.region = value::text(token)?,
            "zone" => locality.zone = value::text(token)?,
            "subzone" => locality.subzone = value::text(token)?,
            _ => return Err(value::unknown(key)),
        }
        Ok(())
    })?;
    Ok(Some(locality))
}
