//! The settings of every pod's data path.

use super::{Capture, keys};
use crate::pod::DataPath;
use mesh_core::NetworkId;
use mesh_runtime::config::{Key, Reader};
use std::{ops::RangeInclusive, time::Duration};
use tracing::Level;

/// RFC 9113, section 6.9.1.
const WINDOW: RangeInclusive<u32> = 1..=0x7fff_ffff;
/// RFC 9113, section 6.9.2: where every connection begins, and no setting makes it less.
const CONNECTION_WINDOW: RangeInclusive<u32> = 65_535..=0x7fff_ffff;
/// RFC 9113, section 4.2.
const FRAME: RangeInclusive<u32> = 16_384..=0x00ff_ffff;
const STREAMS: RangeInclusive<u32> = 1..=0x7fff_ffff;

pub(super) fn data_path(reader: &mut Reader<'_>, capture: &Capture) -> DataPath {
    let network = super::name(reader, &keys::NETWORK, NetworkId::default());
    let hbone = hbone(reader);
    DataPath {
        hbone,
        plan: crate::outbound::PlanConfig::new(network.clone()),
        network,
        response_baggage: reader.toggle(&keys::ENABLE_RESPONSE_BAGGAGE),
        localhost_tunnel: reader.toggle(&keys::LOCALHOST_APP_TUNNEL),
        policy_log: match reader.toggle(&keys::AUTHZ_POLICY_INFO_LOGGING) {
            true => Level::INFO,
            false => Level::DEBUG,
        },
        // Whose open connections go on after a pod has left the mesh: with rules of somebody else's
        // they cannot, because those are gone by then.
        farewell: match capture {
            Capture::External(_) => Duration::ZERO,
            Capture::Ebpf(_) => Duration::from_secs(60 * 60),
        },
        patience: Duration::ZERO,
    }
}

/// What the protocol does not allow would end every tunnel.
fn hbone(reader: &mut Reader<'_>) -> mesh_hbone::Settings {
    let mut settings = mesh_hbone::Settings::default();
    let mut set = |key: &Key, allowed: RangeInclusive<u32>, field: &mut u32| {
        let Some(value) = reader.optional_count(key) else { return };
        match u32::try_from(value).ok().filter(|value| allowed.contains(value)) {
            Some(value) => *field = value,
            None => {
                let (least, most) = allowed.into_inner();
                reader.invalid(key, format!("write {least} to {most}"));
            }
        }
    };
    set(&keys::HTTP2_STREAM_WINDOW_SIZE, WINDOW, &mut settings.stream_window);
    let window = &mut settings.connection_window;
    set(&keys::HTTP2_CONNECTION_WINDOW_SIZE, CONNECTION_WINDOW, window);
    set(&keys::HTTP2_FRAME_SIZE, FRAME, &mut settings.frame_size);
    set(&keys::POOL_MAX_STREAMS_PER_CONNECTION, STREAMS, &mut settings.pool_streams);
    settings.pool_idle = reader.duration(&keys::POOL_UNUSED_RELEASE_TIMEOUT);
    settings
}

#[cfg(test)]
mod tests {
    use crate::config::load;
    use std::collections::BTreeMap;

    #[test]
    fn what_http2_does_not_allow_is_said_at_the_start() {
        for (name, bad, good) in [
            ("HTTP2_FRAME_SIZE", "16383", "16384"),
            ("HTTP2_FRAME_SIZE", "16777216", "16777215"),
            ("HTTP2_STREAM_WINDOW_SIZE", "0", "1"),
            ("HTTP2_STREAM_WINDOW_SIZE", "2147483648", "2147483647"),
            ("HTTP2_CONNECTION_WINDOW_SIZE", "65534", "65535"),
            ("HTTP2_CONNECTION_WINDOW_SIZE", "4294967296", "2147483647"),
            ("POOL_MAX_STREAMS_PER_CONNECTION", "0", "1"),
        ] {
            let load = |value: &str| load(&BTreeMap::from([(name.to_owned(), value.to_owned())]));
            let why = load(bad).unwrap_err().to_string();
            assert!(why.contains(name), "{name}={bad}: {why}");
            load(good).unwrap();
        }
    }
}
