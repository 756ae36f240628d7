//! The rules and routes of `spec/capture.md` §1.1, in the namespace of the thread. All carry our protocol
//! number. Nothing is ever deleted and written anew, so that a restart has no open moment.

use super::netlink::Netlink;
use crate::socket;
use mesh_ebpf_common::{DNS_PORT, MARK, MARK_LEAVING, MARK_MASK};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::{
    AddressFamily, IpProtocol, RouteNetlinkMessage,
    route::{RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType},
    rule::{RuleAction, RuleAttribute, RuleMessage, RulePortRange},
};
use nix::{ifaddrs::getifaddrs, net::if_::if_nameindex};
use socket2::Domain;
use std::{io, net::IpAddr};

/// Of all that we write: tells it from what others wrote.
const PROTOCOL: u8 = 137;
/// Ours.
const TABLE: u8 = 100;
/// Where our rules stand.
const LEAVING: u32 = 97;
const PROBES: u32 = 98;
const ESCAPE: u32 = 99;
const CAPTURE: u32 = 100;
/// For what finds no route in our table: somebody took it away, or IPv6 is off and may come back.
const STOP: u32 = 101;
const LANDING: u32 = 102;

/// An interface.
#[derive(Clone, Debug)]
pub(super) struct Device {
    pub(super) name: String,
    pub(super) index: u32,
}

/// What the namespace has.
#[derive(Clone, Debug)]
pub(super) struct Surroundings {
    /// All addresses but loopback ones, in the kernel's order.
    pub(super) addresses: Vec<IpAddr>,
    /// All devices but lo.
    pub(super) devices: Vec<Device>,
    /// The names of the devices that have `addresses`, in their order.
    owners: Vec<String>,
    lo: u32,
}

impl Surroundings {
    /// Looks around.
    pub(super) fn look() -> io::Result<Self> {
        let owned = getifaddrs()?.filter_map(|interface| {
            let address = interface.address?;
            let v4 = address.as_sockaddr_in().map(|address| IpAddr::from(address.ip()));
            let ip = v4.or_else(|| address.as_sockaddr_in6().map(|address| address.ip().into()))?;
            (!ip.is_loopback()).then_some((interface.interface_name, ip))
        });
        let (owners, addresses) = owned.unzip();
        let mut lo = mesh_ebpf_common::LOOPBACK_INDEX;
        let mut devices = Vec::new();
        for device in &if_nameindex()? {
            let (name, index) = (device.name().to_string_lossy().into_owned(), device.index());
            if name == "lo" {
                lo = index;
            } else {
                devices.push(Device { name, index });
            }
        }
        Ok(Self { addresses, devices, owners, lo })
    }

    /// The source of a captured connection that did not choose one. Without it the kernel makes the source
    /// of a local route the destination. A socket that is bound to a device needs that device's address: what
    /// comes back to another one is shown as that other device's, and the socket never sees it.
    fn source(&self, family: AddressFamily, device: Option<&str>) -> Option<IpAddr> {
        let fits = |ip: &IpAddr| match ip {
            IpAddr::V4(ip) => family == AddressFamily::Inet && !ip.is_link_local(),
            IpAddr::V6(ip) => family == AddressFamily::Inet6 && !ip.is_unicast_link_local(),
        };
        let mut owned = self.owners.iter().zip(&self.addresses);
        let own =
            owned.find(|(owner, ip)| device == Some(owner.as_str()) && fits(ip)).map(|(_, ip)| ip);
        own.or_else(|| self.addresses.iter().find(|ip| fits(ip))).copied()
    }
}

/// A way to the rules of one namespace.
pub(super) struct Rules {
    netlink: Netlink,
    families: Vec<AddressFamily>,
}

impl Rules {
    /// In the namespace of the thread.
    pub(super) fn open() -> io::Result<Self> {
        let v6 = match socket::tcp(Domain::IPV6) {
            Ok(_) => true,
            Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => false,
            Err(error) => return Err(error),
        };
        let mut families = vec![AddressFamily::Inet];
        families.extend(v6.then_some(AddressFamily::Inet6));
        Ok(Self { netlink: Netlink::open()?, families })
    }

    /// Whether the rule that captures is there, and ours.
    pub(super) fn capturing(&mut self) -> io::Result<bool> {
        let rules = self.rules()?;
        Ok(rules.iter().any(|rule| is_ours(rule) && priority(rule) == CAPTURE))
    }

    /// What capture takes and is not there: somebody has taken it away. `None` where all is.
    pub(super) fn missing(&mut self, here: &Surroundings) -> io::Result<Option<String>> {
        let (rules, routes) = (self.rules()?, self.table()?);
        for family in self.families.clone() {
            let is_gone = |place: &u32| {
                !rules.iter().any(|rule| {
                    is_ours(rule) && rule.header.family == family && priority(rule) == *place
                })
            };
            if let Some(place) = [ESCAPE, CAPTURE, STOP, LANDING].into_iter().find(is_gone) {
                return Ok(Some(format!(
                    "the {} rule of preference {place} is gone",
                    name(family)
                )));
            }
            // Where IPv6 is off it has none.
            let is_led = here.source(family, None).is_some();
            let is_route = |route: &RouteMessage| {
                route.header.protocol == RouteProtocol::Other(PROTOCOL)
                    && route.header.address_family == family
            };
            if is_led && !routes.iter().any(is_route) {
                return Ok(Some(format!("the {} routes of table {TABLE} are gone", name(family))));
            }
        }
        Ok(None)
    }

    /// What lets probes and our own sockets past. Harmless at any time.
    pub(super) fn escape(&mut self, probes: &[IpAddr]) -> io::Result<()> {
        let mut all = Vec::new();
        for family in self.families.clone() {
            all.push(rule(family, LANDING, RuleAction::Nop));
            for probe in
                probes.iter().filter(|probe| probe.is_ipv6() == (family == AddressFamily::Inet6))
            {
                let mut message = tcp_from_here(family, PROBES, RuleAction::Goto);
                message.header.dst_len = if probe.is_ipv6() { 128 } else { 32 };
                message
                    .attributes
                    .extend([RuleAttribute::Destination(*probe), RuleAttribute::Goto(LANDING)]);
                all.push(message);
            }
            // Not `not fwmark` in the rule that captures: `not` inverts the whole rule.
            let mut message = rule(family, ESCAPE, RuleAction::Goto);
            message.attributes.extend(marked(MARK));
            message.attributes.push(RuleAttribute::Goto(LANDING));
            all.push(message);
        }
        self.add_all(all)
    }

    /// Routes everything in our table to ourselves, from unbound sockets and from those bound to a device. What is
    /// there already is not written again: whoever follows the routes would hear of it, and write it again.
    pub(super) fn routes(&mut self, here: &Surroundings) -> io::Result<()> {
        let there = self.table()?;
        for family in self.families.clone() {
            let (lo, other) = if family == AddressFamily::Inet { (0, 10) } else { (1024, 2000) };
            match self.route(&there, family, here.lo, (here.source(family, None), lo)) {
                Err(error) if family == AddressFamily::Inet6 && is_off(&error) => continue,
                result => result?,
            }
            for device in &here.devices {
                // By index: a device keeps its metric whatever others come and go.
                let source = here.source(family, Some(&device.name));
                let metric = other + device.index;
                match self.route(&there, family, device.index, (source, metric)) {
                    // A device that is down, or without this family, is no way out; its event comes.
                    Err(error) if is_off(&error) => {
                        tracing::debug!(%error, device = device.name, "no route over a device");
                    }
                    result => result?,
                }
            }
        }
        Ok(())
    }

    fn route(
        &mut self,
        there: &[RouteMessage],
        family: AddressFamily,
        device: u32,
        (source, metric): (Option<IpAddr>, u32),
    ) -> io::Result<()> {
        let mut message = RouteMessage::default();
        message.header = RouteHeader {
            address_family: family,
            table: TABLE,
            protocol: RouteProtocol::Other(PROTOCOL),
            scope: RouteScope::Host,
            kind: RouteType::Local,
            ..RouteHeader::default()
        };
        message.attributes = vec![RouteAttribute::Oif(device), RouteAttribute::Priority(metric)];
        let flags = NLM_F_CREATE | NLM_F_REPLACE;
        let is_there = |wanted: &RouteMessage| there.iter().any(|route| is_same(route, wanted));
        if let Some(source) = source {
            let mut sourced = message.clone();
            sourced.attributes.push(RouteAttribute::PrefSource(source.into()));
            if is_there(&sourced) {
                return Ok(());
            }
            match self.netlink.change(RouteNetlinkMessage::NewRoute(sourced), flags) {
                // An IPv6 address that is still tentative; its event comes when it is not.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) && source.is_ipv6() => (),
                result => return result,
            }
        }
        if is_there(&message) {
            return Ok(());
        }
        self.netlink.change(RouteNetlinkMessage::NewRoute(message), flags)
    }

    /// Begins capture. In one packet: what is dialled between the marking of what lives and the last of these is reset.
    pub(super) fn capture(&mut self, dns: bool) -> io::Result<()> {
        if !dns {
            // What is led here and steered nowhere would be lost.
            let is_dns = |rule: &RuleMessage| {
                let udp = RuleAttribute::IpProtocol(IpProtocol::Udp);
                [CAPTURE, STOP].contains(&priority(rule)) && rule.attributes.contains(&udp)
            };
            self.delete_where(is_dns)?;
        }
        let mut all = Vec::new();
        for family in self.families.clone() {
            all.push(to_table(tcp_from_here(family, CAPTURE, RuleAction::ToTable)));
            all.push(tcp_from_here(family, STOP, RuleAction::Prohibit));
            if dns {
                all.push(to_table(dns_from_here(family, CAPTURE, RuleAction::ToTable)));
                all.push(dns_from_here(family, STOP, RuleAction::Prohibit));
            }
        }
        self.add_all(all)
    }

    /// Connections that go on through the proxy keep our table by their mark.
    pub(super) fn keep_leaving(&mut self) -> io::Result<()> {
        for family in self.families.clone() {
            let mut message = to_table(tcp_from_here(family, LEAVING, RuleAction::ToTable));
            message.attributes.extend(marked(MARK_LEAVING));
            self.add(message)?;
        }
        Ok(())
    }

    /// Ends capture of what is new, in one packet.
    pub(super) fn end_capture(&mut self) -> io::Result<()> {
        self.delete_where(|rule| [CAPTURE, STOP].contains(&priority(rule)))
    }

    /// Takes away the rule of the connections that go on: none is left.
    pub(super) fn end_leaving(&mut self) -> io::Result<()> {
        self.delete_where(|rule| priority(rule) == LEAVING)
    }

    /// Deletes those of ours, the last ones first: what is led somewhere is not stopped on the way.
    fn delete_where(&mut self, chosen: impl Fn(&RuleMessage) -> bool) -> io::Result<()> {
        let mut messages = self.rules()?;
        messages.retain(|rule| is_ours(rule) && chosen(rule));
        messages.sort_by_key(|rule| std::cmp::Reverse(priority(rule)));
        let messages =
            messages.into_iter().map(|rule| (RouteNetlinkMessage::DelRule(rule), 0)).collect();
        self.netlink.batch(messages)?.into_iter().try_for_each(gone)
    }

    /// Takes away all that is ours.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        self.delete_where(|_| true)?;
        for route in self.table()? {
            if route.header.protocol == RouteProtocol::Other(PROTOCOL) {
                gone(self.netlink.change(RouteNetlinkMessage::DelRoute(route), 0))?;
            }
        }
        Ok(())
    }

    /// Rules at our places and routes in our table that are not ours.
    pub(super) fn foreign(&mut self) -> io::Result<Vec<String>> {
        let mut found = Vec::new();
        for rule in self.rules()?.iter().filter(|rule| !is_ours(rule)) {
            let (priority, family) = (priority(rule), name(rule.header.family));
            let ours = rule.header.action == RuleAction::ToTable
                && table_of_rule(rule) == u32::from(TABLE);
            if (LEAVING..=LANDING).contains(&priority) || ours {
                found.push(format!("an {family} rule of preference {priority} is not ours"));
            }
        }
        for route in self.table()? {
            if route.header.protocol != RouteProtocol::Other(PROTOCOL) {
                let family = name(route.header.address_family);
                found.push(format!("table {TABLE} has an {family} route that is not ours"));
            }
        }
        Ok(found)
    }

    fn rules(&mut self) -> io::Result<Vec<RuleMessage>> {
        let mut found = Vec::new();
        for family in self.families.clone() {
            let mut message = RuleMessage::default();
            message.header.family = family;
            let all = self.netlink.dump(RouteNetlinkMessage::GetRule(message))?;
            found.extend(all.into_iter().filter_map(|message| match message {
                RouteNetlinkMessage::NewRule(rule) => Some(rule),
                _ => None,
            }));
        }
        Ok(found)
    }

    /// The routes of our table.
    fn table(&mut self) -> io::Result<Vec<RouteMessage>> {
        let mut found = Vec::new();
        for family in self.families.clone() {
            let mut message = RouteMessage::default();
            message.header.address_family = family;
            let all = self.netlink.dump(RouteNetlinkMessage::GetRoute(message))?;
            found.extend(all.into_iter().filter_map(|message| match message {
                RouteNetlinkMessage::NewRoute(route) => {
                    (table_of_route(&route) == u32::from(TABLE)).then_some(route)
                }
                _ => None,
            }));
        }
        Ok(found)
    }

    fn add(&mut self, message: RuleMessage) -> io::Result<()> {
        self.add_all(vec![message])
    }

    fn add_all(&mut self, messages: Vec<RuleMessage>) -> io::Result<()> {
        let flags = NLM_F_CREATE | NLM_F_EXCL;
        let messages =
            messages.into_iter().map(|rule| (RouteNetlinkMessage::NewRule(rule), flags)).collect();
        self.netlink.batch(messages)?.into_iter().try_for_each(|answer| match answer {
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
            result => result,
        })
    }
}

fn gone(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error)
            if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH | libc::ENODEV)) =>
        {
            Ok(())
        }
        result => result,
    }
}

/// What the kernel says of a device that is down, gone or without IPv6.
fn is_off(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EACCES | libc::ENODEV | libc::ENETDOWN | libc::ENXIO))
}

fn rule(family: AddressFamily, priority: u32, action: RuleAction) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = family;
    message.header.action = action;
    message.attributes = vec![
        RuleAttribute::Priority(priority),
        RuleAttribute::Protocol(RouteProtocol::Other(PROTOCOL)),
    ];
    message
}

/// `iif lo`, too, keeps the rule out of the reverse path check of what arrives: a rule with a protocol that
/// is not bound to lo makes IPv4 packets from outside martians.
fn tcp_from_here(family: AddressFamily, priority: u32, action: RuleAction) -> RuleMessage {
    let mut message = rule(family, priority, action);
    message.attributes.extend([
        RuleAttribute::Iifname("lo".to_owned()),
        RuleAttribute::IpProtocol(IpProtocol::Tcp),
    ]);
    message
}

/// Datagrams to a DNS server.
fn dns_from_here(family: AddressFamily, priority: u32, action: RuleAction) -> RuleMessage {
    let mut message = rule(family, priority, action);
    message.attributes.extend([
        RuleAttribute::Iifname("lo".to_owned()),
        RuleAttribute::IpProtocol(IpProtocol::Udp),
        RuleAttribute::DestinationPortRange(RulePortRange { start: DNS_PORT, end: DNS_PORT }),
    ]);
    message
}

fn to_table(mut message: RuleMessage) -> RuleMessage {
    message.header.table = TABLE;
    message.attributes.push(RuleAttribute::Table(TABLE.into()));
    message
}

fn marked(mark: u32) -> [RuleAttribute; 2] {
    [RuleAttribute::FwMark(mark), RuleAttribute::FwMask(MARK_MASK)]
}

fn is_ours(rule: &RuleMessage) -> bool {
    rule.attributes.contains(&RuleAttribute::Protocol(RouteProtocol::Other(PROTOCOL)))
}

fn priority(rule: &RuleMessage) -> u32 {
    let mut attributes = rule.attributes.iter();
    attributes
        .find_map(|attribute| match attribute {
            RuleAttribute::Priority(priority) => Some(*priority),
            _ => None,
        })
        .unwrap_or(0)
}

fn table_of_rule(rule: &RuleMessage) -> u32 {
    let mut attributes = rule.attributes.iter();
    let found = attributes.find_map(|attribute| match attribute {
        RuleAttribute::Table(table) => Some(*table),
        _ => None,
    });
    found.unwrap_or(rule.header.table.into())
}

/// Whether they lead the same: the kernel fills in what was left out.
fn is_same(one: &RouteMessage, other: &RouteMessage) -> bool {
    let sense = |route: &RouteMessage| {
        let mut sense = (None, None, 0);
        for attribute in &route.attributes {
            match attribute {
                RouteAttribute::Oif(device) => sense.0 = Some(*device),
                RouteAttribute::PrefSource(source) => sense.1 = Some(source.clone()),
                RouteAttribute::Priority(metric) => sense.2 = *metric,
                _ => {}
            }
        }
        let header = &route.header;
        (
            header.address_family,
            header.kind,
            header.protocol,
            header.destination_prefix_length,
            sense,
        )
    };
    sense(one) == sense(other)
}

fn table_of_route(route: &RouteMessage) -> u32 {
    let mut attributes = route.attributes.iter();
    let found = attributes.find_map(|attribute| match attribute {
        RouteAttribute::Table(table) => Some(*table),
        _ => None,
    });
    found.unwrap_or(route.header.table.into())
}

fn name(family: AddressFamily) -> &'static str {
    if family == AddressFamily::Inet { "IPv4" } else { "IPv6" }
}
