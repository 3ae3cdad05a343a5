//! What the benchmark compares the XDP program with, and what feeds both with fresh frames. Compiled with the same flags;
//! no part of the gateway.
//!
//! - [`programs`]: the least that a program can do, and the least that can be called VXLAN encapsulation and
//!   decapsulation.
//! - [`pieces`]: what such programs are made of, one by one.
//! - [`driver`]: restores the frame before each round of `BPF_PROG_TEST_RUN`, for another flow each time, and tail-calls
//!   the program that is measured.
//! - [`live`]: what sends, counts and drops frames that really leave.

#![no_std]
#![no_main]
#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    reason = "lengths of headers and of one packet fit the narrower type; helpers give small numbers"
)]

mod constants;
mod driver;
mod live;
mod pieces;
mod programs;

use aya_ebpf::{EbpfContext as _, helpers::generated::bpf_xdp_adjust_head, programs::XdpContext};
use gateway_common::wire::Wire;

/// The beginning of the frame as a `T`; `None` if the frame is shorter.
#[inline(always)]
#[expect(clippy::mut_from_ref, reason = "the context stands for the frame, which it does not own")]
fn front<T: Wire>(context: &XdpContext) -> Option<&mut T> {
    let start = context.data();
    if start + size_of::<T>() > context.data_end() {
        return None;
    }
    // SAFETY: inside the frame (checked above); `Wire` types have alignment 1 and take any bit pattern. Callers hold one
    // reference at a time, and none while they resize the frame.
    Some(unsafe { &mut *(start as *mut T) })
}

/// Moves the beginning of the frame: forward if `by` is positive. Whether there was room.
#[inline(always)]
fn move_front(context: &XdpContext, by: i32) -> bool {
    // SAFETY: the context is the kernel's.
    unsafe { bpf_xdp_adjust_head(context.as_ptr().cast(), by) == 0 }
}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 4] = *b"GPL\0";
