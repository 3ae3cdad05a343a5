//! What live frames need around a program: somebody who sends them on, and somebody who counts and drops them.

use aya_ebpf::{
    bindings::{
        TC_ACT_OK, TC_ACT_SHOT,
        xdp_action::{XDP_DROP, XDP_PASS, XDP_TX},
    },
    btf_maps::{Array, PerCpuArray},
    helpers::generated::{bpf_redirect, bpf_xdp_get_buff_len},
    macros::{btf_map, classifier, xdp},
    programs::{TcContext, XdpContext},
};
use gateway_common::abi::Counter;

use crate::constants::constants;

constants! {
    /// Interface that frames leave by.
    OUT: u32 = 0;
}

/// Length of the frames that are counted; others are passed on.
#[btf_map]
static EXPECTED: Array<u32, 1> = Array::new();
/// Frames that arrived.
#[btf_map]
static ARRIVED: PerCpuArray<Counter, 1> = PerCpuArray::new();

#[inline(always)]
fn arrived(bytes: u32) -> bool {
    if EXPECTED.get(0) != Some(&bytes) {
        return false;
    }
    if let Some(counter) = ARRIVED.get_ptr_mut(0) {
        // SAFETY: the slot belongs to this CPU, and neither XDP nor tcx programs interrupt one another on a CPU.
        let counter = unsafe { &mut *counter };
        counter.packets += 1;
        counter.bytes += u64::from(bytes);
    }
    true
}

/// The least that forwarding is.
#[xdp(frags)]
fn ref_redirect(_: XdpContext) -> u32 {
    leave()
}

/// How a frame leaves: by the interface `OUT`, or if that is 0 by the one it came in by.
#[inline(always)]
pub(crate) fn leave() -> u32 {
    match *OUT.get() {
        0 => XDP_TX,
        // SAFETY: a helper without pointers.
        out => unsafe { bpf_redirect(out, 0) as u32 },
    }
}

/// The end of a way through XDP.
#[xdp(frags)]
#[expect(clippy::needless_pass_by_value, reason = "the macro's calling convention")]
fn sink(context: XdpContext) -> u32 {
    // SAFETY: the context is the kernel's.
    let bytes = unsafe { bpf_xdp_get_buff_len(context.ctx) };
    if arrived(bytes as u32) { XDP_DROP } else { XDP_PASS }
}

/// The end of a way through the kernel, which would have to copy the packet for XDP.
#[classifier]
#[expect(clippy::needless_pass_by_value, reason = "the macro's calling convention")]
fn sink_tc(context: TcContext) -> i32 {
    if arrived(context.len()) { TC_ACT_SHOT } else { TC_ACT_OK }
}
