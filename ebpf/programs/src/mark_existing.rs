//! `iter/tcp`: marks the sockets that live already, so that the rules to come leave them alone (enrolment),
//! or keep them where they are (release).
//!
//! Safe verdict: leave the socket as it is. Unmarked, it is captured: it may be reset, not let out.

use aya_ebpf::{
    helpers::generated::{bpf_getsockopt, bpf_setsockopt},
    macros::map,
    maps::Array,
};
use core::ffi::c_void;
use mesh_ebpf_common::marking;

/// See [`marking`].
#[map]
static MARKING: Array<u32> = Array::with_max_entries(marking::COUNT, 0);

const SOL_SOCKET: i32 = 1;
const SO_MARK: i32 = 36;
const TIME_WAIT: u8 = 6;
const LISTEN: u8 = 10;
const NEW_SYN_RECV: u8 = 12;
/// Of `sk_common` in `bpf_iter__tcp`, in words of eight bytes. Without CO-RE: the verifier compares this
/// and the next with the kernel's BTF, and neither has moved since Linux 3.
const SK_COMMON: usize = 1;
/// Of `skc_state` in `sock_common`.
const STATE: usize = 18;

/// Visits one socket; aya-ebpf has no macro for iterators.
///
/// # Safety
///
/// The kernel calls it, with a `bpf_iter__tcp`.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/tcp")]
pub unsafe extern "C" fn mark_existing(context: *const u64) -> i32 {
    // SAFETY: the second word of the context.
    let socket = unsafe { *context.add(SK_COMMON) } as *const u8;
    if socket.is_null() {
        return 0;
    }
    // SAFETY: not null, and inside `sock_common`.
    let state = unsafe { *socket.add(STATE) };
    // The last two are not whole sockets.
    if matches!(state, LISTEN | TIME_WAIT | NEW_SYN_RECV) {
        return 0;
    }
    let mut mark = 0_i32;
    let place = &raw mut mark;
    let value = place.cast::<c_void>();
    // SAFETY: four bytes of our stack, for an option of four bytes.
    let read = unsafe { bpf_getsockopt(socket as *mut c_void, SOL_SOCKET, SO_MARK, value, 4) };
    // SAFETY: our own variable, which the helper has written.
    if read != 0 || unsafe { *place } != 0 {
        return 0;
    }
    let Some(wanted) = MARKING.get(marking::MARK) else { return 0 };
    // SAFETY: our own variable.
    unsafe { *place = *wanted as i32 }
    // SAFETY: as with the first call.
    let set = unsafe { bpf_setsockopt(socket as *mut c_void, SOL_SOCKET, SO_MARK, value, 4) };
    if set == 0
        && let Some(marked) = MARKING.get_ptr_mut(marking::MARKED)
    {
        // SAFETY: a map's value; one iterator runs at a time, as this map is its own.
        unsafe { *marked += 1 }
    }
    0
}
