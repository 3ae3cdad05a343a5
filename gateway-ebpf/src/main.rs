//! The XDP program: the engine of `gateway-common` over the kernel's frames and maps. No decision is made here.

#![no_std]
#![no_main]
#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    reason = "helpers give and take small numbers in 64-bit registers"
)]

mod frame;
mod maps;

use aya_ebpf::{
    bindings::xdp_action::{XDP_DROP, XDP_PASS, XDP_TX},
    macros::xdp,
    programs::XdpContext,
};
use aya_log_ebpf::debug;
use gateway_common::engine::{Action, Frame as _, process};

use crate::{frame::XdpFrame, maps::KernelTables};

/// Entry point, attached to every interface with a role. Jumbo frames arrive in fragments.
#[xdp(frags)]
#[expect(clippy::needless_pass_by_value, reason = "the macro's calling convention")]
fn gateway(context: XdpContext) -> u32 {
    let mut frame = XdpFrame::new(&context);
    let bytes = frame.len();
    let verdict = process(&mut frame, &KernelTables::new(&context));
    maps::count(verdict.number(), bytes);
    debug!(&context, "outcome {} of {} bytes", verdict.number(), bytes);
    match verdict.action() {
        Action::Pass => XDP_PASS,
        Action::Drop => XDP_DROP,
        Action::Transmit => XDP_TX,
        Action::Redirect(ifindex) => maps::redirect(ifindex),
    }
}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    // `cargo xtask verify` refuses an object that can get here.
    loop {}
}

// The kernel lets only GPL-compatible programs call bpf_fib_lookup.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 4] = *b"GPL\0";
