//! The XDP program: the engine of `gateway-common` over the kernel's frames and maps. No decision is made here.

#![no_std]
#![no_main]
// Compare-and-swap of a map value has no stable form on this target (see `atomic`).
#![feature(core_intrinsics)]
#![expect(internal_features, reason = "as above; the toolchain is pinned")]
#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    reason = "helpers give and take small numbers in 64-bit registers"
)]

mod atomic;
mod frame;
mod maps;

use core::mem::offset_of;

use aya_ebpf::{
    bindings::xdp_action::{XDP_ABORTED, XDP_DROP, XDP_PASS, XDP_TX},
    macros::xdp,
    programs::XdpContext,
};
use aya_log_ebpf::debug;
use gateway_common::{
    abi::{ReverseKey, SWEEP_CAPACITY, Sweep, SweepMode},
    engine::{Action, Frame as _, Sessions as _, process, session},
};

use crate::{frame::XdpFrame, maps::KernelTables};

/// Entry point, attached to every interface with a role. Jumbo frames arrive in fragments.
#[xdp(frags)]
#[expect(clippy::needless_pass_by_value, reason = "the macro's calling convention")]
fn gateway(context: XdpContext) -> u32 {
    let mut frame = XdpFrame::new(&context);
    let verdict = process(&mut frame, &KernelTables::new(&context));
    let bytes = frame.arrived();
    maps::count(verdict.number(), bytes);
    debug!(&context, "outcome {} of {} bytes", verdict.number(), bytes);
    match verdict.action() {
        Action::Pass => XDP_PASS,
        Action::Drop => XDP_DROP,
        Action::Transmit => XDP_TX,
        Action::Redirect(ifindex) => maps::redirect(ifindex),
    }
}

/// Removes sessions that the daemon names: see [`Sweep`](gateway_common::abi::Sweep). Never attached to an interface.
#[xdp]
#[expect(clippy::needless_pass_by_value, reason = "the macro's calling convention")]
fn sweep(context: XdpContext) -> u32 {
    let mut frame = XdpFrame::new(&context);
    let tables = KernelTables::new(&context);
    let Some(mode) = frame
        .read::<[u8; 4]>(offset_of!(Sweep, mode))
        .map(|code| SweepMode { code: u32::from_ne_bytes(*code) })
    else {
        return XDP_ABORTED;
    };
    tables.repeat(SWEEP_CAPACITY as u32, |index| {
        let at =
            offset_of!(Sweep, sessions) + (index as usize & (SWEEP_CAPACITY - 1)) * size_of::<ReverseKey>();
        let Some(bytes) = frame.read::<[u8; size_of::<ReverseKey>()]>(at) else {
            return true;
        };
        let key: ReverseKey = bytemuck::must_cast(*bytes);
        if key.protocol != 0
            && session::sweep(&tables, &key, mode)
            && let Some(protocol) = frame.write::<[u8; 2]>(at + offset_of!(ReverseKey, protocol))
        {
            *protocol = [0; 2];
        }
        false
    });
    XDP_PASS
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
