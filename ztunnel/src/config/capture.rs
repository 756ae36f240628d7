//! The settings of capture, and of the sockets that go with it.

use super::{Capture, Dns, Pods, keys};
use mesh_platform::redirect::{
    EbpfSettings, ExternalSettings, Keepalive, OriginalSource, SocketOptions,
};
use mesh_runtime::config::{Key, Reader};
use std::{path::PathBuf, time::Duration};

/// The longest that the kernel takes for `TCP_KEEPIDLE` and `TCP_KEEPINTVL`.
const LONGEST: Duration = Duration::from_secs(32_767);
/// The most that it takes for `TCP_KEEPCNT`.
const MOST: u64 = 127;
/// What our own rules let past, and what those of istio-cni do.
const MARK: u64 = 1337;

pub(super) fn capture(reader: &mut Reader<'_>, pods: &Pods, dns: Option<&Dns>) -> Capture {
    let options = options(reader);
    let pins = PathBuf::from(reader.text(&keys::CAPTURE_PIN_DIR));
    let original_source = match reader.optional_toggle(&keys::ENABLE_ORIG_SRC) {
        None => OriginalSource::BestEffort,
        Some(true) => OriginalSource::Required,
        Some(false) => OriginalSource::Never,
    };
    let shared = matches!(pods, Pods::Shared(_));
    let told = reader.source().get(keys::PACKET_MARK.name).is_some();
    let mark = reader.optional_count(&keys::PACKET_MARK);
    let choices = [("external", false), ("ebpf", true)];
    if reader.choice(&keys::CAPTURE, &choices).unwrap_or_default() {
        if !shared {
            reader.invalid(&keys::CAPTURE, "unset it: in dedicated mode nothing is captured by us");
        }
        if mark.is_some_and(|mark| mark != MARK) {
            reader.invalid(&keys::PACKET_MARK, "unset it: with CAPTURE=ebpf it is 1337");
        }
        let dns = dns.map(|dns| dns.address.port());
        return Capture::Ebpf(EbpfSettings {
            options,
            pins: Some(pins),
            dns,
            original_source: original_source != OriginalSource::Never,
            ..EbpfSettings::default()
        });
    }
    let mark = mark.and_then(|mark| match u32::try_from(mark) {
        Ok(mark) => Some(mark),
        Err(_) => {
            reader.invalid(&keys::PACKET_MARK, "write a number of 32 bits");
            None
        }
    });
    Capture::External(ExternalSettings {
        options,
        ipv6: reader.toggle(&keys::IPV6_ENABLED),
        port_reuse: reader.toggle(&keys::INPOD_PORT_REUSE),
        original_source,
        mark: mark.filter(|_| shared || told),
        dns: dns.map(|dns| dns.address),
    })
}

/// What the kernel does not take would fail every connection, and every listener of a pod.
fn options(reader: &mut Reader<'_>) -> SocketOptions {
    let mut seconds = |key: &Key| {
        let duration = reader.duration(key);
        if duration.subsec_nanos() != 0 || duration.is_zero() || duration > LONGEST {
            reader.invalid(key, "write whole seconds, 1s to 32767s");
        }
        duration
    };
    let (time, interval) = (seconds(&keys::KEEPALIVE_TIME), seconds(&keys::KEEPALIVE_INTERVAL));
    let retries = reader.count(&keys::KEEPALIVE_RETRIES);
    if !(1..=MOST).contains(&retries) {
        reader.invalid(&keys::KEEPALIVE_RETRIES, "write 1 to 127");
    }
    let keepalive =
        Keepalive { time, interval, retries: u32::try_from(retries).unwrap_or(u32::MAX) };
    SocketOptions {
        keepalive: reader.toggle(&keys::KEEPALIVE_ENABLED).then_some(keepalive),
        user_timeout: reader.toggle(&keys::USER_TIMEOUT_ENABLED),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::load;
    use std::collections::BTreeMap;

    fn settings(pairs: &[(&str, &str)]) -> Result<Capture, String> {
        let map: BTreeMap<String, String> =
            pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        load(&map).map(|config| config.capture).map_err(|errors| errors.to_string())
    }

    #[test]
    fn what_the_kernel_does_not_take_is_said_at_the_start() {
        for (name, bad, good) in [
            ("KEEPALIVE_TIME", "500ms", "1s"),
            ("KEEPALIVE_TIME", "0", "32767"),
            ("KEEPALIVE_INTERVAL", "1d", "9h"),
            ("KEEPALIVE_INTERVAL", "1500ms", "2s"),
            ("KEEPALIVE_RETRIES", "0", "1"),
            ("KEEPALIVE_RETRIES", "128", "127"),
            ("PACKET_MARK", "4294967296", "4294967295"),
        ] {
            let why = settings(&[(name, bad)]).unwrap_err();
            assert!(why.contains(name), "{name}={bad}: {why}");
            settings(&[(name, good)]).unwrap();
        }
    }

    #[test]
    fn what_capture_of_our_own_obeys_and_what_it_cannot() {
        let ebpf = ("CAPTURE", "ebpf");
        for (told, expected) in [(None, true), (Some("true"), true), (Some("false"), false)] {
            let told = told.map(|told| ("ENABLE_ORIG_SRC", told));
            let all: Vec<_> = told.into_iter().chain([ebpf]).collect();
            let Ok(Capture::Ebpf(settings)) = settings(&all) else { panic!("{all:?}") };
            assert_eq!(settings.original_source, expected, "{all:?}");
        }
        settings(&[ebpf, ("PACKET_MARK", "1337")]).unwrap();
        let why = settings(&[ebpf, ("PACKET_MARK", "1338")]).unwrap_err();
        assert!(why.contains("PACKET_MARK"), "{why}");
        settings(&[("PACKET_MARK", "1338")]).unwrap();
    }
}
