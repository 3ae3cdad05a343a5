//! The programs that serve as references.

use aya_ebpf::{
    bindings::xdp_action::{XDP_ABORTED, XDP_DROP, XDP_TX},
    btf_maps::{HashMap, PerCpuArray},
    macros::{btf_map, xdp},
    programs::XdpContext,
};
use gateway_common::{
    abi::{Counter, VtepSlot},
    checksum::Sum,
    flow::{self, Flow},
    wire::{Be16, EtherType, Ethernet, EthernetIpv4, Ipv4, TunnelHeaders, Vni, Wire, view},
};
use network_types::ip::Ipv4Hdr;

use crate::{front, live, move_front};

/// Pods and the finished headers of their nodes. The benchmark sets the size.
#[btf_map]
pub(crate) static REF_PODS: HashMap<Ipv4, VtepSlot, 1> = HashMap::new();
/// Packets that were encapsulated or decapsulated.
#[btf_map]
static REF_COUNTER: PerCpuArray<Counter, 1> = PerCpuArray::new();

const UDP: u8 = 17;
/// Flannel's port and VNI.
const PORT: Be16 = Be16::new(8472);
const VNI: Vni = Vni { bytes: [0, 0, 1] };

/// What stands in front of the inner packet.
#[repr(C)]
#[derive(Clone, Copy)]
struct Outer {
    link: EthernetIpv4,
    tunnel: TunnelHeaders,
}

// SAFETY: `repr(C)` of `Wire` fields: alignment 1, no padding, any bit pattern.
unsafe impl Wire for Outer {}

/// A packet with ports.
#[repr(C)]
#[derive(Clone, Copy)]
struct Inner {
    link: EthernetIpv4,
    ports: [u8; 4],
}

// SAFETY: as above.
unsafe impl Wire for Inner {}

/// What encapsulation adds, bytes.
const OVERHEAD: i32 = size_of::<Outer>() as i32 - size_of::<Ethernet>() as i32;

#[inline(always)]
fn count(bytes: u32) {
    if let Some(counter) = REF_COUNTER.get_ptr_mut(0) {
        // SAFETY: the slot belongs to this CPU, and XDP programs do not interrupt one another on a CPU.
        let counter = unsafe { &mut *counter };
        counter.packets += 1;
        counter.bytes += u64::from(bytes);
    }
}

/// The floor: what calling a program costs.
#[xdp(frags)]
fn ref_drop(_: XdpContext) -> u32 {
    XDP_DROP
}

/// Touches the frame once.
#[xdp(frags)]
#[expect(clippy::needless_pass_by_value, reason = "the macro's calling convention")]
fn ref_tx(context: XdpContext) -> u32 {
    let Some(link) = front::<Ethernet>(&context) else {
        return XDP_ABORTED;
    };
    core::mem::swap(&mut link.dst, &mut link.src);
    XDP_TX
}

/// Pod by exact address, copy of a finished header, flow hash, header checksum, counter. No TTL, no check of anything.
#[xdp(frags)]
#[expect(clippy::needless_pass_by_value, reason = "the macro's calling convention")]
fn ref_encap(context: XdpContext) -> u32 {
    encapsulate(&context).unwrap_or(XDP_ABORTED)
}

#[inline(always)]
fn encapsulate(context: &XdpContext) -> Option<u32> {
    let bytes = (context.data_end() - context.data()) as u32;
    let &mut Inner { link, ports } = front::<Inner>(context)?;
    if link.ethernet.kind != EtherType::IPV4 {
        return None;
    }
    let (source, destination) = (Ipv4::new(link.ip.src_addr), Ipv4::new(link.ip.dst_addr));
    // SAFETY: nobody changes the entries while the benchmark runs.
    let slot = unsafe { REF_PODS.get(destination) }?;
    let flow = Flow { source, destination, ports: u32::from_ne_bytes(ports), protocol: link.ip.proto };
    if !move_front(context, -OVERHEAD) {
        return None;
    }
    let outer = front::<Outer>(context)?;
    *outer = *view::prefix(&slot.header);
    let payload = (bytes as u16).wrapping_sub(size_of::<Ethernet>() as u16);
    let udp = payload.wrapping_add(size_of::<TunnelHeaders>() as u16);
    let total = Be16::new(udp.wrapping_add(size_of::<Ipv4Hdr>() as u16)).bytes;
    outer.link.ip.tot_len = total;
    outer.link.ip.check = Sum::new(slot.checksum_base).add(total).checksum();
    outer.tunnel.udp.src = flow::source_port(flow.hash()).bytes;
    outer.tunnel.udp.len = Be16::new(udp).bytes;
    count(bytes);
    Some(live::leave())
}

/// Recognises the tunnel by port and VNI, swaps the link addresses into the inner header, strips the rest, counts. No check of
/// who sent it, no route.
#[xdp(frags)]
#[expect(clippy::needless_pass_by_value, reason = "the macro's calling convention")]
fn ref_decap(context: XdpContext) -> u32 {
    decapsulate(&context).unwrap_or(XDP_ABORTED)
}

#[inline(always)]
fn decapsulate(context: &XdpContext) -> Option<u32> {
    let bytes = (context.data_end() - context.data()) as u32;
    let Outer { link, tunnel } = front::<Outer>(context)?;
    if link.ethernet.kind != EtherType::IPV4
        || link.ip.proto != UDP
        || tunnel.udp.dst != PORT.bytes
        || tunnel.vxlan.vni != VNI.bytes
    {
        return None;
    }
    tunnel.ethernet.dst = link.ethernet.src;
    tunnel.ethernet.src = link.ethernet.dst;
    if !move_front(context, OVERHEAD) {
        return None;
    }
    count(bytes);
    Some(live::leave())
}
