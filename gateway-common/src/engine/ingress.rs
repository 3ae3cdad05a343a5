//! From nodes: out of the tunnel with every check, or plain from a directly reached node.

use network_types::vxlan::VXLAN_I_FLAG_MASK;

use super::{
    Frame, Tables, Verdict, arp,
    classify::{self, Link, Packet, Tunnel},
    mss, outward, session,
};
use crate::{
    abi::{Outcome, Overlay, OverlayAddress, OverlayFlags, Roles, VtepFlags},
    wire::{EtherType, Ethernet, Ipv4, Mac, TunnelHeaders, Vni},
};

const GBP_FLAG: u8 = 0x80;

/// A packet of a pod that is on its way out.
#[derive(Clone, Copy)]
pub(super) struct Arrived<'a> {
    pub packet: Packet,
    /// Overlay id.
    pub id: u32,
    pub overlay: &'a Overlay,
    /// VTEP id of the node that sent it; `None` if the outer source is no node's, which only an overlay without source
    /// check admits.
    pub vtep: Option<u32>,
    /// New ECN bits, if they change.
    pub ecn: Option<u8>,
    /// What is counted if it is routed.
    pub outcome: Outcome,
}

/// Sends a pod's packet to its client: back through its session, or by the kernel's FIB.
#[inline(always)]
pub(super) fn to_client<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    arrived: Arrived<'_>,
) -> Result<Verdict, Verdict> {
    // The path back to the pod: 0 while it is not known.
    let limit = match arrived.vtep {
        Some(vtep) if mss::applies(frame, arrived.packet, arrived.overlay) => {
            tables.vtep(vtep).map_or(0, |vtep| vtep.slot().mtu)
        }
        _ => 0,
    };
    if arrived.overlay.may_be_snat(arrived.packet.destination) {
        session::from_pod(frame, tables, arrived, limit)?;
    }
    if arrived.outcome == Outcome::Decap
        && let Some(vtep) = arrived.vtep
    {
        check_inner_source(tables, arrived.overlay, arrived.id, arrived.packet.source, vtep)?;
    }
    outward::route(frame, tables, arrived.packet, arrived.ecn, limit, arrived.outcome)
}

/// Takes a packet out of the tunnel (protocol order of Linux `vxlan_rcv`, and the source checks that it lacks).
#[inline(always)]
pub(super) fn from_tunnel<'t, F: Frame, T: Tables>(
    frame: &mut F,
    tables: &'t T,
    link: Link,
    outer: Packet,
    tunnel: Tunnel,
) -> Result<Arrived<'t>, Verdict> {
    if !link.roles.has(Roles::UNDERLAY) {
        return Err(Verdict::drop(Outcome::TunnelPortExternal));
    }
    if outer.is_fragment() {
        return Err(Verdict::drop(Outcome::OuterFragment));
    }
    let carried = outer.total_len.wrapping_sub(outer.header_len as u16);
    if tunnel.udp_len != carried || usize::from(carried) < TunnelHeaders::LEN {
        return Err(Verdict::drop(Outcome::OuterUdpLength));
    }
    let Some(headers) = frame.read::<TunnelHeaders>(tunnel.udp) else {
        return Err(Verdict::drop(Outcome::InnerTruncated));
    };
    let (vxlan, ethernet) = (headers.vxlan, headers.ethernet);
    if vxlan.flags & VXLAN_I_FLAG_MASK == 0 {
        return Err(Verdict::drop(Outcome::VxlanFlags));
    }
    let vni = Vni { bytes: vxlan.vni };
    let found = tables.config().overlays().find(|(_, overlay)| {
        overlay.local == outer.destination && overlay.port == tunnel.port && overlay.vni == vni
    });
    let Some((id, overlay)) = found else {
        return Err(Verdict::drop(Outcome::VniUnknown));
    };
    check_reserved(overlay, vxlan.flags, vxlan._reserved1, vxlan._reserved2)?;

    let sender = tables.source(&OverlayAddress { overlay: id, address: outer.source });
    if overlay.flags.has(OverlayFlags::SOURCE_CHECK) && sender.is_none() {
        return Err(Verdict::drop(Outcome::OuterSource));
    }
    check_macs(overlay, ethernet.src, ethernet.dst)?;

    let inner_at = tunnel.udp + TunnelHeaders::LEN;
    let inner_space = u32::from(carried) - TunnelHeaders::LEN as u32;
    match ethernet.kind {
        kind if kind == EtherType::IPV4 => {}
        kind if kind == EtherType::ARP => {
            let (Ok(verdict) | Err(verdict)) =
                arp::from_tunnel(frame, tables, overlay, sender, inner_at, inner_space);
            return Err(verdict);
        }
        kind if kind == EtherType::IPV6 => return Err(Verdict::drop(Outcome::InnerIpv6)),
        kind if kind == EtherType::VLAN || kind == EtherType::SERVICE_VLAN => {
            return Err(Verdict::drop(Outcome::InnerVlan));
        }
        _ => return Err(Verdict::drop(Outcome::InnerEtherType)),
    }
    if ethernet.dst == Mac::BROADCAST {
        return Err(Verdict::drop(Outcome::InnerBroadcast));
    }
    let inner = classify::header(frame, inner_at, inner_space).map_err(|flaw| {
        let short = matches!(flaw, classify::Flaw::Truncated) || inner_space < 20;
        Verdict::drop(if short { Outcome::InnerTruncated } else { Outcome::InnerMalformed })
    })?;
    let ecn = decapsulated_ecn(outer.tos, inner.tos)?;
    let vtep = sender.map(|sender| sender.vtep);
    Ok(Arrived { packet: inner, id, overlay, vtep, ecn, outcome: Outcome::Decap })
}

/// A plain packet of a pod whose node is reached without a tunnel (flannel's DirectRouting); `None` if it is something
/// else. No outer source tells who sent it: the node's MAC address must.
#[inline(always)]
pub(super) fn from_direct_node<'t, F: Frame, T: Tables>(
    frame: &F,
    tables: &'t T,
    packet: Packet,
) -> Result<Option<Arrived<'t>>, Verdict> {
    for (id, overlay) in tables.config().overlays() {
        if !packet.destination.in_subnet(overlay.subnet, overlay.mask) {
            continue;
        }
        let Some(route) = tables.route(id, packet.source) else {
            continue;
        };
        let Some(vtep) = tables.vtep(route.vtep) else {
            continue;
        };
        if vtep.slot().flags.has(VtepFlags::READY.with(VtepFlags::DIRECT)) {
            let sender = frame.read::<Ethernet>(0).map(|ethernet| ethernet.src);
            if overlay.flags.has(OverlayFlags::SOURCE_CHECK) && sender != Some(vtep.slot().next_hop) {
                return Err(Verdict::drop(Outcome::DirectSource));
            }
            let vtep = Some(route.vtep);
            return Ok(Some(Arrived { packet, id, overlay, vtep, ecn: None, outcome: Outcome::DirectIn }));
        }
    }
    Ok(None)
}

/// Every bit that the overlay does not allow must be 0, as Linux wants it (RFC 7348 would ignore them).
#[inline(always)]
fn check_reserved(overlay: &Overlay, flags: u8, first: [u8; 3], second: u8) -> Result<(), Verdict> {
    let [reserved, policy_high, policy_low] = first;
    if overlay.flags.has(OverlayFlags::ALLOW_GBP) && flags & GBP_FLAG != 0 {
        // Bytes 2 and 3 are the policy id; of byte 1 the D and A bits are assigned (0x40, 0x08).
        if flags != VXLAN_I_FLAG_MASK | GBP_FLAG {
            return Err(Verdict::drop(Outcome::VxlanFlags));
        }
        if reserved & !0x48 != 0 || second != 0 {
            return Err(Verdict::drop(Outcome::VxlanReserved));
        }
        return Ok(());
    }
    if flags != VXLAN_I_FLAG_MASK {
        return Err(Verdict::drop(Outcome::VxlanFlags));
    }
    if reserved | policy_high | policy_low | second != 0 {
        return Err(Verdict::drop(Outcome::VxlanReserved));
    }
    Ok(())
}

#[inline(always)]
fn check_macs(overlay: &Overlay, source: Mac, destination: Mac) -> Result<(), Verdict> {
    if !source.is_station() {
        return Err(Verdict::drop(Outcome::InnerSourceMac));
    }
    if source == overlay.mac {
        return Err(Verdict::drop(Outcome::InnerLoop));
    }
    if destination != overlay.mac && destination != Mac::BROADCAST {
        return Err(Verdict::drop(Outcome::InnerDestinationMac));
    }
    Ok(())
}

#[inline(always)]
fn check_inner_source<T: Tables>(
    tables: &T,
    overlay: &Overlay,
    id: u32,
    source: Ipv4,
    sender: u32,
) -> Result<(), Verdict> {
    if !overlay.flags.has(OverlayFlags::SOURCE_CHECK) {
        return Ok(());
    }
    match tables.route(id, source) {
        Some(route) if route.vtep == sender => Ok(()),
        _ => Err(Verdict::drop(Outcome::InnerSource)),
    }
}

/// The inner ECN bits after decapsulation, if they change (RFC 6040 section 4.2, as Linux `INET_ECN_decapsulate`).
#[inline(always)]
fn decapsulated_ecn(outer: u8, inner: u8) -> Result<Option<u8>, Verdict> {
    const NOT_ECT: u8 = 0;
    const ECT1: u8 = 1;
    const ECT0: u8 = 2;
    const CE: u8 = 3;
    match (inner & 3, outer & 3) {
        (NOT_ECT, CE) => Err(Verdict::drop(Outcome::EcnIllegal)),
        (ECT0 | ECT1, CE) => Ok(Some(CE)),
        (ECT0, ECT1) => Ok(Some(ECT1)),
        _ => Ok(None),
    }
}
