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
    pub origin: Origin<'a>,
    /// New ECN bits, if they change.
    pub ecn: Option<u8>,
    /// What is counted if it is routed.
    pub outcome: Outcome,
}

/// Where a packet came from.
#[derive(Clone, Copy)]
pub(super) struct Origin<'a> {
    pub overlay: &'a Overlay,
    /// Overlay id.
    pub id: u32,
    /// The word of the outer source address. Octets would lie unaligned on the stack, and the verifier refuses to copy them.
    address: u32,
    /// VTEP id of the sender of a plain packet, which has no outer source.
    direct: Option<u32>,
}

impl Origin<'_> {
    /// The sender's VTEP id. `None` if the outer source is no node's: an overlay with source check drops that.
    ///
    /// This asks a table. Where an entry already says who should have sent the packet, [`is_from`](Self::is_from) does not.
    #[inline(always)]
    pub(super) fn vtep<T: Tables>(&self, tables: &T) -> Option<u32> {
        if self.direct.is_some() {
            return self.direct;
        }
        let address = Ipv4::new(self.address.to_ne_bytes());
        Some(tables.source(&OverlayAddress { overlay: self.id, address })?.vtep)
    }

    /// Whether it came from the tunnel address of this VTEP. A node may have more: `false` says nothing.
    #[inline(always)]
    pub(super) fn is_from<T: Tables>(&self, tables: &T, vtep: u32) -> bool {
        match self.direct {
            Some(direct) => direct == vtep,
            None => tables.vtep(vtep).is_some_and(|vtep| {
                let slot = vtep.slot();
                slot.endpoint.word() == self.address
                    && u32::from(slot.overlay) == self.id
                    && slot.flags.has(VtepFlags::USED)
            }),
        }
    }

    /// Why a packet is dropped that has this flaw: above all because nobody knows its sender.
    #[inline(always)]
    pub(super) fn refused<T: Tables>(&self, tables: &T, flaw: Outcome) -> Verdict {
        let checked = self.overlay.flags.has(OverlayFlags::SOURCE_CHECK);
        Verdict::drop(if checked && self.vtep(tables).is_none() { Outcome::OuterSource } else { flaw })
    }
}

/// Sends a pod's packet to its client: back through its session, or by the kernel's FIB.
#[inline(always)]
pub(super) fn to_client<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    arrived: Arrived<'_>,
) -> Result<Verdict, Verdict> {
    // The path back to the pod: 0 while it is not known.
    let origin = arrived.origin;
    let limit = if mss::applies(frame, arrived.packet, origin.overlay) {
        origin.vtep(tables).and_then(|vtep| tables.vtep(vtep)).map_or(0, |vtep| vtep.slot().mtu)
    } else {
        0
    };
    if origin.overlay.may_be_snat(arrived.packet.destination) {
        session::from_pod(frame, tables, arrived, limit)?;
    }
    if arrived.outcome == Outcome::Decap {
        check_inner_source(tables, origin, arrived.packet.source)?;
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

    let origin = Origin { overlay, id, address: outer.source.word(), direct: None };
    let at = tunnel.udp + TunnelHeaders::LEN;
    let space = u32::from(carried) - TunnelHeaders::LEN as u32;
    check_macs(overlay, ethernet.src, ethernet.dst).map_err(|flaw| origin.refused(tables, flaw))?;
    if ethernet.kind == EtherType::ARP {
        let (Ok(verdict) | Err(verdict)) = arp::from_tunnel(frame, tables, origin, at, space);
        return Err(verdict);
    }
    let packet = inner(frame, &ethernet, at, space).map_err(|flaw| origin.refused(tables, flaw))?;
    let ecn = decapsulated_ecn(outer.tos, packet.tos).map_err(|flaw| origin.refused(tables, flaw))?;
    Ok(Arrived { packet, origin, ecn, outcome: Outcome::Decap })
}

/// The packet in the tunnel at `at`, for which there are `space` bytes; what is wrong with it if there is none.
#[inline(always)]
fn inner<F: Frame>(frame: &F, ethernet: &Ethernet, at: usize, space: u32) -> Result<Packet, Outcome> {
    match ethernet.kind {
        EtherType::IPV4 => {}
        EtherType::IPV6 => return Err(Outcome::InnerIpv6),
        EtherType::VLAN | EtherType::SERVICE_VLAN => return Err(Outcome::InnerVlan),
        _ => return Err(Outcome::InnerEtherType),
    }
    if ethernet.dst == Mac::BROADCAST {
        return Err(Outcome::InnerBroadcast);
    }
    classify::header(frame, at, space).map_err(|flaw| {
        let short = matches!(flaw, classify::Flaw::Truncated) || space < 20;
        if short { Outcome::InnerTruncated } else { Outcome::InnerMalformed }
    })
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
            // The frame was long enough for its link header before.
            let Some(ethernet) = frame.read::<Ethernet>(0) else {
                continue;
            };
            let sender = ethernet.src;
            if overlay.flags.has(OverlayFlags::SOURCE_CHECK) && sender != vtep.slot().next_hop {
                return Err(Verdict::drop(Outcome::DirectSource));
            }
            let origin = Origin { overlay, id, address: 0, direct: Some(route.vtep) };
            return Ok(Some(Arrived { packet, origin, ecn: None, outcome: Outcome::DirectIn }));
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
fn check_macs(overlay: &Overlay, source: Mac, destination: Mac) -> Result<(), Outcome> {
    if !source.is_station() {
        return Err(Outcome::InnerSourceMac);
    }
    if source == overlay.mac {
        return Err(Outcome::InnerLoop);
    }
    if destination != overlay.mac && destination != Mac::BROADCAST {
        return Err(Outcome::InnerDestinationMac);
    }
    Ok(())
}

/// The pod must be on the node that sent the packet.
#[inline(always)]
fn check_inner_source<T: Tables>(tables: &T, origin: Origin<'_>, source: Ipv4) -> Result<(), Verdict> {
    if !origin.overlay.flags.has(OverlayFlags::SOURCE_CHECK) {
        return Ok(());
    }
    let route = tables.route(origin.id, source);
    if route.is_some_and(|route| origin.is_from(tables, route.vtep)) {
        return Ok(());
    }
    match (origin.vtep(tables), route) {
        (None, _) => Err(Verdict::drop(Outcome::OuterSource)),
        (Some(vtep), Some(route)) if route.vtep == vtep => Ok(()),
        _ => Err(Verdict::drop(Outcome::InnerSource)),
    }
}

/// The inner ECN bits after decapsulation, if they change (RFC 6040 section 4.2, as Linux `INET_ECN_decapsulate`).
#[inline(always)]
fn decapsulated_ecn(outer: u8, inner: u8) -> Result<Option<u8>, Outcome> {
    const NOT_ECT: u8 = 0;
    const ECT1: u8 = 1;
    const ECT0: u8 = 2;
    const CE: u8 = 3;
    match (inner & 3, outer & 3) {
        (NOT_ECT, CE) => Err(Outcome::EcnIllegal),
        (ECT0 | ECT1, CE) => Ok(Some(CE)),
        (ECT0, ECT1) => Ok(Some(ECT1)),
        _ => Ok(None),
    }
}
