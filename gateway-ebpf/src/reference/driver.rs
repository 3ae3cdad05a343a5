//! Makes every round of a test run a round on a fresh frame.
//!
//! The kernel keeps what a program did to the frame from one round of `BPF_PROG_TEST_RUN` to the next. A driver first puts
//! the frame back as it was: its two ends, then every header, for the next of the flows. Then it tail-calls the program,
//! which is loaded as it always is. What the driver costs is measured by having it call a program that drops.

use aya_ebpf::{
    EbpfContext as _,
    bindings::xdp_action::XDP_ABORTED,
    btf_maps::{Array, ProgramArray},
    helpers::generated::bpf_xdp_adjust_tail,
    macros::{btf_map, xdp},
    programs::XdpContext,
};
use gateway_common::{
    checksum::Sum,
    wire::{Be16, Ethernet, EthernetIpv4, Ipv4, Mac, TunnelHeaders, Wire, view},
};
use network_types::ip::Ipv4Hdr;

use crate::{constants::constants, front, move_front};

/// The program that is measured.
#[btf_map]
static DRIVEN: ProgramArray<1> = ProgramArray::new();
/// State of the generator of flows. Its low bits go through all their values before one comes again.
#[btf_map]
static ROUND: Array<u32, 1> = Array::new();

const CLIENT_COUNT: usize = 16;
const NODE_COUNT: usize = 2;

constants! {
    /// The first bytes of the frame; what differs from flow to flow is 0.
    TEMPLATE: [u8; 128] = [0; 128];
    /// Length of the frame.
    FRAME_LEN: u32 = 0;
    /// By how much the beginning of a frame moves that is not `FRAME_LEN` bytes long; forward if positive.
    UNDO_HEAD: i32 = 0;
    /// By how much the end of such a frame moves then.
    UNDO_TAIL: i32 = 0;
    /// Number of flows, a power of two, minus one.
    FLOW_MASK: u32 = 0;
    /// Addresses on the clients' side of the packet.
    CLIENTS: [Ipv4; CLIENT_COUNT] = [Ipv4::UNSPECIFIED; CLIENT_COUNT];
    /// Port of the first flow on that side.
    CLIENT_PORT: u32 = 0;
    /// The first pod: the first of the first node.
    POD: Ipv4 = Ipv4::UNSPECIFIED;
    /// Tunnel addresses of the nodes.
    NODES: [Ipv4; NODE_COUNT] = [Ipv4::UNSPECIFIED; NODE_COUNT];
    /// MAC addresses of their VTEPs.
    NODE_MACS: [Mac; NODE_COUNT] = [Mac::ZERO; NODE_COUNT];
    /// Sums over what of the template the checksums cover.
    IP_SUM: u16 = 0;
    TCP_SUM: u16 = 0;
    OUTER_SUM: u16 = 0;
}

/// What a flow is: a pod on one of two nodes, one of 16 clients, and a port of that client. See `flow` of the
/// benchmark, which takes the numbers apart in the same way.
#[derive(Clone, Copy)]
struct Flow {
    node: usize,
    pod: Ipv4,
    client: Ipv4,
    port: Be16,
}

impl Flow {
    #[inline(always)]
    fn new(number: u32) -> Self {
        let [a, b, c, d] = POD.get().octets;
        let node = (number & 1) as u8;
        let pod = (number >> 1 & 3) as u8;
        let client = (number >> 3) as usize & (CLIENT_COUNT - 1);
        Self {
            node: usize::from(node),
            pod: Ipv4::new([a, b, c.wrapping_add(node), d.wrapping_add(pod)]),
            client: CLIENTS.get()[client],
            port: Be16::new((*CLIENT_PORT.get() + (number >> 7)) as u16),
        }
    }

    #[inline(always)]
    fn add_addresses(&self, sum: u16) -> Sum {
        let [[a, b, c, d], [e, f, g, h]] = [self.pod.octets, self.client.octets];
        Sum::new(sum).add([a, b]).add([c, d]).add([e, f]).add([g, h])
    }
}

/// Headers up to TCP.
#[repr(C)]
#[derive(Clone, Copy)]
struct Segment<F> {
    front: F,
    ip: Ipv4Hdr,
    ports: [[u8; 2]; 2],
    middle: [u8; 12],
    check: [u8; 2],
    urgent: [u8; 2],
}

// SAFETY: `repr(C)` of `Wire` fields and byte arrays: alignment 1, no padding, any bit pattern.
unsafe impl<F: Wire> Wire for Segment<F> {}

impl<F> Segment<F> {
    #[inline(always)]
    fn finish(&mut self, flow: Flow) {
        self.ip.check = flow.add_addresses(*IP_SUM.get()).checksum();
        self.check = flow.add_addresses(*TCP_SUM.get()).add(flow.port.bytes).checksum();
    }
}

/// In front of the packet of a pod.
#[repr(C)]
#[derive(Clone, Copy)]
struct Tunnel {
    link: EthernetIpv4,
    tunnel: TunnelHeaders,
}

// SAFETY: `repr(C)` of `Wire` fields: alignment 1, no padding, any bit pattern.
unsafe impl Wire for Tunnel {}

/// The same frame in every round.
#[xdp(frags)]
#[expect(clippy::needless_pass_by_value, reason = "the macro's calling convention")]
fn drive_still(context: XdpContext) -> u32 {
    drive::<[u8; 54]>(&context, |_, _| {})
}

/// A TCP segment of a client, plain.
#[xdp(frags)]
#[expect(clippy::needless_pass_by_value, reason = "the macro's calling convention")]
fn drive_client(context: XdpContext) -> u32 {
    drive::<Segment<Ethernet>>(&context, |segment, number| {
        let flow = Flow::new(number);
        segment.ip.src_addr = flow.client.octets;
        segment.ip.dst_addr = flow.pod.octets;
        segment.ports[0] = flow.port.bytes;
        segment.finish(flow);
    })
}

/// A TCP segment of a pod, in the tunnel.
#[xdp(frags)]
#[expect(clippy::needless_pass_by_value, reason = "the macro's calling convention")]
fn drive_node(context: XdpContext) -> u32 {
    drive::<Segment<Tunnel>>(&context, |segment, number| {
        let flow = Flow::new(number);
        let Tunnel { link, tunnel } = &mut segment.front;
        let node = NODES.get()[flow.node & (NODE_COUNT - 1)].octets;
        link.ip.src_addr = node;
        link.ip.check = Sum::new(*OUTER_SUM.get()).add([node[0], node[1]]).add([node[2], node[3]]).checksum();
        tunnel.ethernet.src = NODE_MACS.get()[flow.node & (NODE_COUNT - 1)];
        segment.ip.src_addr = flow.pod.octets;
        segment.ip.dst_addr = flow.client.octets;
        segment.ports[1] = flow.port.bytes;
        segment.finish(flow);
    })
}

#[inline(always)]
fn drive<T: Wire>(context: &XdpContext, patch: impl FnOnce(&mut T, u32)) -> u32 {
    if restore(context).is_some()
        && let Some(frame) = front::<T>(context)
    {
        *frame = *view::prefix(TEMPLATE.get());
        patch(frame, next() & *FLOW_MASK.get());
        // SAFETY: nothing is left behind that would have to be dropped.
        unsafe { DRIVEN.tail_call(context, 0) };
    }
    XDP_ABORTED
}

/// Puts both ends of the frame where they were.
#[inline(always)]
fn restore(context: &XdpContext) -> Option<()> {
    let len = (context.data_end() - context.data()) as u32;
    if len == *FRAME_LEN.get() {
        return Some(());
    }
    if !move_front(context, *UNDO_HEAD.get()) {
        return None;
    }
    let tail = *UNDO_TAIL.get();
    // SAFETY: the context is the kernel's.
    if tail != 0 && unsafe { bpf_xdp_adjust_tail(context.as_ptr().cast(), tail) } != 0 {
        return None;
    }
    Some(())
}

/// The next number of a linear congruential generator modulo 2^32 (Numerical Recipes), whose lowest bits have the full
/// period too.
#[inline(always)]
fn next() -> u32 {
    let Some(state) = ROUND.get_ptr_mut(0) else {
        return 0;
    };
    // SAFETY: one test run at a time uses the map.
    let state = unsafe { &mut *state };
    *state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
    *state
}
