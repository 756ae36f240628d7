//! The kernel programs of one pod: loaded, or adopted from what an earlier process pinned.

use super::{
    CaptureError,
    pins::{self, ENTRANCE, LINK},
    rules::{Device, Surroundings},
    sys,
    sysctls::Found,
};
use crate::{
    memory,
    netns::Netns,
    redirect::{Dns, Listeners},
};
use aya::{
    Btf, Ebpf, EbpfLoader,
    maps::{Array, HashMap, Map, MapData, SockMap},
    programs::{
        Iter, LinkOrder, SchedClassifier, SkLookup, TcAttachType,
        links::FdLink,
        tc::{SchedClassifierLink, TcAttachOptions},
    },
};
use mesh_ebpf_common::{LAYOUT_VERSION, cfg, flag, marking, slot};
use std::{
    collections::HashSet,
    error::Error,
    fmt,
    io::Read,
    net::IpAddr,
    os::fd::AsFd,
    path::{Path, PathBuf},
};

/// Built by `ebpf/build` and committed.
static OBJECT: &[u8] = aya::include_bytes_aligned!("../../../../../ebpf/programs.o");

type Fault = Box<dyn Error + Send + Sync>;
type Key = [u32; 4];

/// The maps of one pod's programs, and the links that nothing else holds.
pub(super) struct Program {
    socks: SockMap<MapData>,
    self_ips: HashMap<MapData, Key, u8>,
    probe_ips: HashMap<MapData, Key, u8>,
    cfg: Array<MapData, u32>,
    /// The kernel's number of `steer`.
    id: u32,
    links: Vec<FdLink>,
    /// Devices whose entrance has `mark_in`.
    entrances: HashSet<u32>,
    folder: Option<PathBuf>,
}

impl fmt::Debug for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Program").field("folder", &self.folder).finish_non_exhaustive()
    }
}

/// What is put into the maps.
pub(super) struct Contents<'a> {
    pub(super) listeners: &'a Listeners,
    pub(super) dns: Option<&'a Dns>,
    pub(super) here: &'a Surroundings,
    pub(super) probes: &'a [IpAddr],
    pub(super) ingress: bool,
    pub(super) generation: u32,
    pub(super) found: Found,
}

/// In the layout of [`mesh_ebpf_common::Address`].
fn key(ip: IpAddr) -> Key {
    let octets = match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
        IpAddr::V6(ip) => ip.octets(),
    };
    let (words, _) = octets.as_chunks::<4>();
    let mut key = [0; 4];
    for (word, bytes) in key.iter_mut().zip(words) {
        *word = u32::from_ne_bytes(*bytes);
    }
    key
}

fn load() -> Result<Ebpf, Fault> {
    // The kernel's BTF is for relocations only, which the programs have none of; to parse it takes long.
    Ok(EbpfLoader::new().btf(None).load(OBJECT)?)
}

fn missing(name: &str) -> Fault {
    format!("the object has no {name}").into()
}

impl Program {
    /// What is pinned in `folder`, if it is alive, in this namespace, and laid out as we know it.
    pub(super) fn adopt(folder: &Path, netns: &Netns) -> Result<Self, Fault> {
        let link = sys::pinned(&folder.join(LINK))?;
        let attached = sys::attached(&link)?.ok_or("what is pinned is not its link")?;
        if attached.netns == 0 {
            return Err("its namespace is gone".into());
        }
        if u64::from(attached.netns) != netns.id().ino {
            return Err("it is attached to another namespace".into());
        }
        let map = |name: &str| MapData::from_pin(folder.join(name));
        let cfg = Array::try_from(Map::Array(map("cfg")?))?;
        let layout = cfg.get(&cfg::LAYOUT, 0)?;
        if layout != LAYOUT_VERSION {
            return Err(format!("its layout is {layout}, ours is {LAYOUT_VERSION}").into());
        }
        let socks = map("socks")?;
        if !sys::maps_of(attached.program)?.contains(&socks.info()?.id()) {
            return Err("the pinned sockets are not the program's".into());
        }
        let entrances =
            pins::links(folder).into_iter().filter_map(|link| sys::entrance(&link).ok().flatten());
        Ok(Self {
            socks: Map::SockMap(socks).try_into()?,
            self_ips: Map::HashMap(map("self_ips")?).try_into()?,
            probe_ips: Map::HashMap(map("probe_ips")?).try_into()?,
            cfg,
            id: attached.program,
            links: Vec::new(),
            entrances: entrances.filter(|index| *index != 0).collect(),
            folder: Some(folder.to_owned()),
        })
    }

    /// Loads the program, fills its maps, attaches it, and only then detaches what was pinned before: while
    /// both are attached the first that selects a socket wins, so that there is no moment without.
    pub(super) fn attach(
        folder: Option<&Path>,
        netns: &Netns,
        contents: &Contents<'_>,
    ) -> Result<Self, CaptureError> {
        let old = folder.map(pins::links).unwrap_or_default();
        let new = folder
            .map(pins::begin)
            .transpose()
            .map_err(CaptureError::kernel("make room for pins"))?;
        let mut object = load().map_err(CaptureError::kernel("load the programs"))?;
        let mut program = Self::take(&mut object, new.as_deref())
            .map_err(CaptureError::kernel("set up the maps"))?;
        program.fill(contents)?;
        let (link, id) =
            Self::steer(&mut object, netns).map_err(CaptureError::kernel("attach the program"))?;
        program.id = id;
        program
            .hold(link, new.as_deref(), LINK)
            .map_err(CaptureError::kernel("pin the program"))?;
        for link in old {
            if let Err(error) = sys::detach(&link) {
                tracing::debug!(%error, "an earlier link was detached already");
            }
        }
        if let Some(folder) = folder {
            pins::complete(folder).map_err(CaptureError::kernel("complete the pins"))?;
            program.folder = Some(folder.to_owned());
        }
        Ok(program)
    }

    fn take(object: &mut Ebpf, new: Option<&Path>) -> Result<Self, Fault> {
        let mut map = |name: &str| -> Result<Map, Fault> {
            let map = object.take_map(name).ok_or_else(|| missing(name))?;
            if let Some(new) = new {
                map.pin(new.join(name.to_lowercase()))?;
            }
            Ok(map)
        };
        let mut cfg: Array<MapData, u32> = map("CFG")?.try_into()?;
        cfg.set(cfg::LAYOUT, LAYOUT_VERSION, 0)?;
        let program = Self {
            socks: map("SOCKS")?.try_into()?,
            self_ips: map("SELF_IPS")?.try_into()?,
            probe_ips: map("PROBE_IPS")?.try_into()?,
            cfg,
            id: 0,
            links: Vec::new(),
            entrances: HashSet::new(),
            folder: None,
        };
        // Nobody here reads the counters; the pin is for tools. The program is not loaded yet, so that the
        // map must stay open.
        let counters = object.map("STATS").ok_or_else(|| missing("STATS"))?;
        if let Some(new) = new {
            counters.pin(new.join("stats"))?;
        }
        Ok(program)
    }

    fn steer(object: &mut Ebpf, netns: &Netns) -> Result<(FdLink, u32), Fault> {
        let program = object.program_mut("steer").ok_or_else(|| missing("steer"))?;
        let program: &mut SkLookup = program.try_into()?;
        program.load()?;
        let number = program.info()?.id();
        let id = program.attach(netns.as_fd())?;
        Ok((program.take_link(id)?.into(), number))
    }

    fn hold(&mut self, link: FdLink, folder: Option<&Path>, name: &str) -> Result<(), Fault> {
        self.links.push(match folder {
            Some(folder) => link.pin(folder.join(name))?.into(),
            None => link,
        });
        Ok(())
    }

    /// The generation of whoever is in the slots of what is pinned, even if that is not to be adopted: the
    /// next one must be told from it.
    pub(super) fn pinned_generation(folder: &Path) -> u32 {
        pinned_word(folder, cfg::GENERATION).unwrap_or(0)
    }

    /// How the sysctls were before what is pinned captured.
    pub(super) fn pinned_found(folder: &Path) -> Option<Found> {
        let ours = pinned_word(folder, cfg::LAYOUT) == Some(LAYOUT_VERSION);
        ours.then(|| pinned_word(folder, cfg::FOUND).and_then(Found::from_word)).flatten()
    }

    /// Whether somebody else's listeners are in the slots, or somebody else's program is in the place of this.
    pub(super) fn is_taken_over(&self, generation: u32) -> bool {
        let replaced = || {
            let pinned = self.folder.as_deref().and_then(pins::program);
            pinned.is_some_and(|id| id != self.id)
        };
        self.cfg.get(&cfg::GENERATION, 0).unwrap_or(0) != generation || replaced()
    }

    /// Whether another process can find it, and take over.
    pub(super) const fn is_pinned(&self) -> bool {
        self.folder.is_some()
    }

    /// Puts all of it into the maps. Each swap of a listener is atomic. The generation is last: it tells the
    /// process before that none of its listeners gets anything new.
    pub(super) fn fill(&mut self, contents: &Contents<'_>) -> Result<(), CaptureError> {
        self.fill_maps(contents).map_err(CaptureError::kernel("fill the maps"))
    }

    fn fill_maps(&mut self, contents: &Contents<'_>) -> Result<(), Fault> {
        replace(&mut self.self_ips, &contents.here.addresses)?;
        replace(&mut self.probe_ips, contents.probes)?;
        let bypass = if contents.ingress { flag::BYPASS_INBOUND } else { 0 };
        // Their slots first: what is steered to an empty one is lost.
        let dns = if let Some(Dns { tcp, udp }) = contents.dns {
            tcp.iter().try_for_each(|tcp| self.socks.set(slot::DNS_TCP, tcp, 0))?;
            udp.iter().try_for_each(|udp| self.socks.set(slot::DNS_UDP, udp, 0))?;
            flag::DNS
        } else {
            0
        };
        // Exact: the listeners of two generations are one `SO_REUSEPORT` group, and only the newest is meant.
        self.cfg.set(cfg::FLAGS, bypass | dns | flag::EXACT, 0)?;
        self.cfg.set(cfg::FOUND, contents.found.word(), 0)?;
        let Listeners { outbound, inbound, hbone } = contents.listeners;
        self.socks.set(slot::OUTBOUND, outbound, 0)?;
        self.socks.set(slot::INBOUND, inbound, 0)?;
        self.socks.set(slot::HBONE, hbone, 0)?;
        self.cfg.set(cfg::GENERATION, contents.generation, 0)?;
        Ok(())
    }

    /// Learns the pod's addresses anew.
    pub(super) fn learn(&mut self, addresses: &[IpAddr]) -> Result<(), Fault> {
        replace(&mut self.self_ips, addresses)
    }

    /// Marks what arrives by these devices. In the namespace of the thread.
    pub(super) fn guard(&mut self, devices: &[Device]) -> Result<(), Fault> {
        self.entrances.retain(|index| devices.iter().any(|device| device.index == *index));
        if devices.iter().all(|device| self.entrances.contains(&device.index)) {
            return Ok(());
        }
        let mut object = load()?;
        let program = object.program_mut("mark_in").ok_or_else(|| missing("mark_in"))?;
        let program: &mut SchedClassifier = program.try_into()?;
        program.load()?;
        for device in devices {
            if self.entrances.contains(&device.index) {
                continue;
            }
            let options = TcAttachOptions::TcxOrder(LinkOrder::default());
            let id = program.attach_with_options(&device.name, TcAttachType::Ingress, options)?;
            let link: SchedClassifierLink = program.take_link(id)?;
            let name = format!("{ENTRANCE}{}", device.index);
            let folder = self.folder.clone();
            self.hold(link.try_into()?, folder.as_deref(), &name)?;
            self.entrances.insert(device.index);
        }
        Ok(())
    }
}

#[cfg(test)]
impl Program {
    /// The kernel's number of `steer`.
    pub(super) const fn id(&self) -> u32 {
        self.id
    }

    /// Sets a word of the configuration.
    pub(super) fn set_word(&mut self, index: u32, value: u32) {
        self.cfg.set(index, value, 0).unwrap();
    }

    /// Sets a word of the configuration that is pinned.
    pub(super) fn set_pinned_word(folder: &Path, index: u32, value: u32) {
        let map = MapData::from_pin(folder.join("cfg")).unwrap();
        let mut cfg: Array<MapData, u32> = Map::Array(map).try_into().unwrap();
        cfg.set(index, value, 0).unwrap();
    }

    pub(super) fn clear(&mut self, slot: u32) {
        self.socks.clear_index(&slot).unwrap();
    }

    pub(super) fn put(&mut self, slot: u32, listener: &std::net::TcpListener) {
        self.socks.set(slot, listener, 0).unwrap();
    }

    /// Of all CPUs together.
    pub(super) fn counters(&self) -> Vec<u64> {
        let ids = sys::maps_of(self.id).unwrap();
        let maps = ids.into_iter().map(|id| MapData::from_id(id).unwrap());
        let mut stats = maps.filter(|map| map.info().unwrap().name_as_str() == Some("STATS"));
        let map = Map::PerCpuArray(stats.next().unwrap());
        let stats: aya::maps::PerCpuArray<MapData, u64> = map.try_into().unwrap();
        let sum = |index| stats.get(&index, 0).unwrap().iter().sum();
        (0..mesh_ebpf_common::stat::COUNT).map(sum).collect()
    }
}

/// Runs `mark_in` on this context.
#[cfg(test)]
pub(super) fn test_mark_in(context: &mut [u8]) -> u32 {
    let mut object = load().unwrap();
    let program: &mut SchedClassifier = object.program_mut("mark_in").unwrap().try_into().unwrap();
    program.load().unwrap();
    let id = program.info().unwrap().id();
    sys::test_run_on(id, context, &[0; 64]).unwrap()
}

/// A word of the configuration that is pinned.
fn pinned_word(folder: &Path, index: u32) -> Option<u32> {
    let map = MapData::from_pin(folder.join("cfg")).ok()?;
    let cfg: Array<MapData, u32> = Map::Array(map).try_into().ok()?;
    cfg.get(&index, 0).ok()
}

/// Makes the map hold these addresses: what is new first, then away with what is gone.
fn replace(map: &mut HashMap<MapData, Key, u8>, addresses: &[IpAddr]) -> Result<(), Fault> {
    let wanted: HashSet<Key> = addresses.iter().copied().map(key).collect();
    for key in &wanted {
        map.insert(key, 1, 0)?;
    }
    let gone: Vec<Key> =
        map.keys().filter_map(Result::ok).filter(|key| !wanted.contains(key)).collect();
    for key in gone {
        map.remove(&key)?;
    }
    Ok(())
}

/// Sets marks on sockets that live.
pub(super) struct Marker {
    object: Ebpf,
    map: Array<MapData, u32>,
}

impl fmt::Debug for Marker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Marker").finish_non_exhaustive()
    }
}

impl Marker {
    /// Loads it once: what the kernel says of its types, which it takes to load, is tens of megabytes when read.
    pub(super) fn load() -> Result<Self, Fault> {
        let mut object = load()?;
        let map = object.take_map("MARKING").ok_or_else(|| missing("MARKING"))?;
        let map = map.try_into()?;
        iterator(&mut object)?.load("tcp", &Btf::from_sys_fs()?)?;
        memory::give_back_freed();
        Ok(Self { object, map })
    }

    /// Sets the mark on every socket of the namespace of the thread that neither listens nor has one. Returns how
    /// many there were.
    pub(super) fn mark(&mut self, mark: u32) -> Result<u32, Fault> {
        self.map.set(marking::MARK, mark, 0)?;
        self.map.set(marking::MARKED, 0, 0)?;
        let program = iterator(&mut self.object)?;
        let id = program.attach()?;
        // The iterator visits the namespace in which it is opened.
        program.take_link(id)?.into_file()?.read_to_end(&mut Vec::new())?;
        Ok(self.map.get(&marking::MARKED, 0)?)
    }
}

fn iterator(object: &mut Ebpf) -> Result<&mut Iter, Fault> {
    let program = object.program_mut("mark_existing").ok_or_else(|| missing("mark_existing"))?;
    Ok(program.try_into()?)
}
