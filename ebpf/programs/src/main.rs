//! The kernel side of capture, one object for each pod's network namespace. One file per attach point:
//!
//! * [`steer`] (`sk_lookup`) picks the proxy's listener for a new connection; it runs once per connection.
//! * [`mark_in`] (tc ingress, only where inbound is bypassed) marks what arrives from outside.
//! * [`mark_existing`] (`iter/tcp`) marks the sockets that live when a pod is enrolled or released.
//!
//! Built by `ebpf/build`; the object is committed. `unsafe` is how a program reads its context: the
//! verifier proves each access before the program runs.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

mod mark_existing;
mod mark_in;
mod steer;

/// Programs do not panic: the verifier would not accept a path that ends here.
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// Helpers that the programs call are for GPL programs only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 4] = *b"GPL\0";
