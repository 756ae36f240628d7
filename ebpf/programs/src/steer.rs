//! `sk_lookup`: which listener gets a new connection.
//!
//! Safe verdict: `SK_DROP`. Whatever was routed here and finds no listener gets no clear-text path.

use aya_ebpf::{
    bindings::{bpf_sk_lookup, sk_action::SK_DROP, sk_action::SK_PASS},
    macros::{map, sk_lookup},
    maps::{Array, HashMap, PerCpuArray, SockMap},
    programs::SkLookupContext,
};
use mesh_ebpf_common::{
    Address, DNS_PORT, HBONE_PORT, LOOPBACK_INDEX, MAX_ADDRESSES, cfg, flag, slot, stat,
};

/// The proxy's listeners.
#[map]
static SOCKS: SockMap = SockMap::with_max_entries(slot::COUNT, 0);
/// The pod's addresses, link-local ones too, loopback excepted. Grows as it is filled.
#[map]
static SELF_IPS: HashMap<Address, u8> = HashMap::with_max_entries(MAX_ADDRESSES, NO_PREALLOC);
/// Sources that reach the application directly: what kubelet's probes are rewritten to.
#[map]
static PROBE_IPS: HashMap<Address, u8> = HashMap::with_max_entries(MAX_ADDRESSES, NO_PREALLOC);
/// See [`cfg`].
#[map]
static CFG: Array<u32> = Array::with_max_entries(cfg::COUNT, 0);
/// See [`stat`].
#[map]
static STATS: PerCpuArray<u64> = PerCpuArray::with_max_entries(stat::COUNT, 0);

const NO_PREALLOC: u32 = 1;
const AF_INET: u32 = 2;
const IPPROTO_TCP: u32 = 6;
/// `BPF_SK_LOOKUP_F_NO_REUSEPORT`.
const NO_REUSEPORT: u64 = 2;
const ENOENT: i64 = 2;

/// Loads a word of the context in a way that LLVM can neither merge with another load nor re-base: of
/// the IPv4 and IPv6 branches it makes one load at a computed place, which the verifier refuses
/// ("dereference of modified ctx ptr"). `volatile` did not help.
macro_rules! load {
    ($context:expr, $field:ident, $index:literal) => {{
        const OFFSET: usize = core::mem::offset_of!(bpf_sk_lookup, $field) + 4 * $index;
        let value: u64;
        // SAFETY: an aligned word inside the context, as the verifier checks.
        unsafe {
            core::arch::asm!(
                "{value} = *(u32 *)({context} + {offset})",
                value = out(reg) value,
                context = in(reg) $context,
                offset = const OFFSET,
                options(nostack),
            );
        }
        value as u32
    }};
}

macro_rules! load4 {
    ($context:expr, $field:ident) => {
        [
            load!($context, $field, 0),
            load!($context, $field, 1),
            load!($context, $field, 2),
            load!($context, $field, 3),
        ]
    };
}

/// What to do with a connection.
enum Choice {
    /// Leave it to the kernel.
    Pass,
    /// To the listener in this slot.
    Steer(u32),
    /// Neither end is known.
    Unknown,
}

/// A connection, as the kernel asks.
struct Flow {
    tcp: bool,
    /// It came in over the loopback device: the proxy's own, spoofed socket, which is bound to it.
    /// A packet that the pod sends to its *own* address carries the index of the device that has the
    /// address, so that calls to oneself are told by their source instead.
    looped: bool,
    local: Address,
    local_port: u32,
    remote: Address,
}

#[inline(always)]
fn count(index: u32, verdict: u32) -> u32 {
    if let Some(counter) = STATS.get_ptr_mut(index) {
        // SAFETY: this CPU's own counter; programs of this type are not interrupted by themselves.
        unsafe { *counter += 1 }
    }
    verdict
}

#[inline(always)]
fn is_own(address: &Address) -> bool {
    // SAFETY: only presence is asked; nothing is read through the pointer.
    unsafe { SELF_IPS.get(address).is_some() }
}

#[inline(always)]
fn is_probe(address: &Address) -> bool {
    // SAFETY: as above.
    unsafe { PROBE_IPS.get(address).is_some() }
}

#[inline(always)]
fn choose(flow: &Flow, flags: u32) -> Choice {
    let to_tunnel = flow.local_port == HBONE_PORT as u32;
    let to_dns = flow.local_port == DNS_PORT as u32 && flags & flag::DNS != 0;
    let bypass = flags & flag::BYPASS_INBOUND != 0;
    if is_own(&flow.local) {
        if !flow.tcp {
            return Choice::Pass;
        }
        let from_self = is_own(&flow.remote);
        if to_tunnel && (!flow.looped || from_self) {
            // Tunnels end in the proxy: from outside, and from this pod to itself.
            Choice::Steer(slot::HBONE)
        } else if flow.looped || bypass || from_self || is_probe(&flow.remote) {
            Choice::Pass
        } else {
            Choice::Steer(slot::INBOUND)
        }
    } else if is_own(&flow.remote) {
        // Not an address of ours, and we are the source: table 100 delivered it, so it is outbound.
        match (flow.tcp, to_dns) {
            (true, true) => Choice::Steer(slot::DNS_TCP),
            (true, false) => Choice::Steer(slot::OUTBOUND),
            (false, true) => Choice::Steer(slot::DNS_UDP),
            (false, false) => Choice::Pass,
        }
    } else if !flow.tcp || flow.looped {
        Choice::Unknown
    } else if to_tunnel {
        // An address of ours that the agent has not learnt yet. Never outbound.
        Choice::Steer(slot::HBONE)
    } else if bypass {
        Choice::Pass
    } else {
        Choice::Steer(slot::INBOUND)
    }
}

/// Chooses a listener.
#[sk_lookup]
pub fn steer(context: SkLookupContext) -> u32 {
    let raw: *mut bpf_sk_lookup = context.lookup;
    // SAFETY: fields of the context, read at their own offsets.
    let (family, protocol) = unsafe { ((*raw).family, (*raw).protocol) };
    // SAFETY: as above.
    let (port, device) = unsafe { ((*raw).local_port, (*raw).ingress_ifindex) };
    let (local, remote) = if family == AF_INET {
        (Address::v4(load!(raw, local_ip4, 0)), Address::v4(load!(raw, remote_ip4, 0)))
    } else {
        (Address::v6(load4!(raw, local_ip6)), Address::v6(load4!(raw, remote_ip6)))
    };
    if local.is_loopback() {
        return count(stat::PASSED, SK_PASS);
    }
    let flow = Flow {
        tcp: protocol == IPPROTO_TCP,
        looped: device == LOOPBACK_INDEX,
        local,
        local_port: port,
        remote,
    };
    let flags = CFG.get(cfg::FLAGS).copied().unwrap_or(0);
    match choose(&flow, flags) {
        Choice::Pass => count(stat::PASSED, SK_PASS),
        Choice::Unknown => count(stat::UNKNOWN, SK_DROP),
        Choice::Steer(slot) => {
            let exact = if flags & flag::EXACT != 0 { NO_REUSEPORT } else { 0 };
            match SOCKS.redirect_sk_lookup(&context, slot, exact) {
                Ok(()) => count(slot, SK_PASS),
                Err(error) if i64::from(error) == -ENOENT => count(stat::NO_LISTENER, SK_DROP),
                Err(_) => count(stat::ASSIGN, SK_DROP),
            }
        }
    }
}
