//! tc ingress of every device but lo, where inbound is not captured.
//!
//! With `tcp_fwmark_accept` the application's accepted socket and its SYN-ACK inherit the mark, with
//! `fwmark_reflect` so do the kernel's RSTs: replies take the main table, what the application dials
//! itself does not.
//!
//! Safe verdict: the next program. An unmarked packet's reply is captured, never let out.

use aya_ebpf::{macros::classifier, programs::TcContext};
use mesh_ebpf_common::{MARK, MARK_MASK};

/// `TCX_NEXT`, `TC_ACT_UNSPEC`: other programs on the device still run.
const NEXT: i32 = -1;

/// Marks a packet that nobody marked.
#[classifier]
pub fn mark_in(context: TcContext) -> i32 {
    // SAFETY: a field of the context, as the verifier checks.
    let mark = unsafe { (*context.skb.skb).mark };
    if mark & MARK_MASK == 0 {
        context.skb.set_mark(mark | MARK);
    }
    NEXT
}
