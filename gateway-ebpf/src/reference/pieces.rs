//! What the pieces of a packet's way cost: each program does one of them and drops.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        BPF_FIB_LKUP_RET_SUCCESS, bpf_fib_lookup as FibParameters,
        xdp_action::{XDP_ABORTED, XDP_DROP},
    },
    helpers::generated::{bpf_fib_lookup, bpf_ktime_get_coarse_ns, bpf_xdp_get_buff_len},
    macros::xdp,
    programs::XdpContext,
};
use gateway_common::wire::{EthernetIpv4, Ipv4};

use crate::{front, live::OUT, move_front, programs::REF_PODS};

const AF_INET: u8 = 2;
/// What VXLAN over IPv4 adds, bytes.
const OVERHEAD: i32 = 50;

#[inline(always)]
fn drop_if(done: bool) -> u32 {
    if done { XDP_DROP } else { XDP_ABORTED }
}

/// Makes room for a header, and takes it away.
#[xdp(frags)]
#[expect(clippy::needless_pass_by_value, reason = "the macro's calling convention")]
fn piece_head(context: XdpContext) -> u32 {
    drop_if(move_front(&context, -OVERHEAD) && move_front(&context, OVERHEAD))
}

/// Looks for a pod.
#[xdp(frags)]
#[expect(clippy::needless_pass_by_value, reason = "the macro's calling convention")]
fn piece_hash(context: XdpContext) -> u32 {
    let Some(link) = front::<EthernetIpv4>(&context) else {
        return XDP_ABORTED;
    };
    // SAFETY: nobody changes the entries while the benchmark runs.
    drop_if(unsafe { REF_PODS.get(Ipv4::new(link.ip.dst_addr)) }.is_some())
}

/// Asks for the time.
#[xdp(frags)]
fn piece_time(_: XdpContext) -> u32 {
    // SAFETY: a helper without arguments.
    drop_if(unsafe { bpf_ktime_get_coarse_ns() } != 0)
}

/// Asks for the length of the frame and its fragments.
#[xdp(frags)]
#[expect(clippy::needless_pass_by_value, reason = "the macro's calling convention")]
fn piece_length(context: XdpContext) -> u32 {
    // SAFETY: the context is the kernel's.
    drop_if(unsafe { bpf_xdp_get_buff_len(context.ctx) } != 0)
}

/// Asks the FIB for the way to the packet's source, as if it had come in by the interface `OUT`.
#[xdp(frags)]
#[expect(clippy::needless_pass_by_value, reason = "the macro's calling convention")]
fn piece_fib(context: XdpContext) -> u32 {
    let Some(link) = front::<EthernetIpv4>(&context) else {
        return XDP_ABORTED;
    };
    // SAFETY: a C struct of integers and unions of integers: all zero is a value of it.
    let mut parameters: FibParameters = unsafe { core::mem::zeroed() };
    parameters.family = AF_INET;
    parameters.ifindex = *OUT.get();
    // Writing a union's field is safe; the rest of the union stays zero.
    parameters.__bindgen_anon_3.ipv4_src = Ipv4::new(link.ip.dst_addr).word();
    parameters.__bindgen_anon_4.ipv4_dst = Ipv4::new(link.ip.src_addr).word();
    let size = size_of::<FibParameters>() as i32;
    // SAFETY: the parameters are initialised, and `size` is theirs.
    let answer = unsafe { bpf_fib_lookup(context.as_ptr(), &raw mut parameters, size, 0) };
    drop_if(answer as u32 == BPF_FIB_LKUP_RET_SUCCESS)
}
