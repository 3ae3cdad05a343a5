//! From outside to a pod: route, check, encapsulate.

use super::{
    Frame, Tables, Verdict,
    classify::{ICMP, Link, Packet, SCTP, TCP, UDP},
    emit, mss, too_big,
};
use crate::{
    abi::{Outcome, OverlayFlags, VtepFlags},
    flow::Flow,
};

const ECHO_REPLY: u8 = 0;
const ECHO_REQUEST: u8 = 8;
const DONT_FRAGMENT: u16 = 0x4000;

/// Sends a client's packet to its pod; `Ok` if the destination is no pod.
#[inline(always)]
pub(super) fn from_outside<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    link: Link,
    packet: Packet,
) -> Result<(), Verdict> {
    let config = tables.config();
    for (id, overlay) in config.overlays() {
        let Some(route) = tables.route(id, packet.destination) else {
            continue;
        };
        // A mistaken pod CIDR must not take this host off the network.
        if tables.is_kernels(packet.destination) {
            return Ok(());
        }
        if !packet.source.in_subnet(overlay.subnet, overlay.mask) {
            return Err(Verdict::drop(Outcome::ClientForeign));
        }
        if packet.has_options() {
            return Err(Verdict::pass(Outcome::IpOptions));
        }
        if packet.ttl <= 1 {
            return Err(Verdict::pass(Outcome::TtlExpired));
        }
        let Some(vtep) = tables.vtep(route.vtep) else {
            return Err(Verdict::drop(Outcome::VtepMissing));
        };
        let slot = vtep.slot();
        if !slot.flags.has(VtepFlags::USED) {
            return Err(Verdict::drop(Outcome::VtepMissing));
        }
        if !slot.flags.has(VtepFlags::READY) {
            return Err(Verdict::drop(Outcome::VtepUnresolved));
        }
        if packet.space > u32::from(slot.mtu) {
            if packet.fragment & DONT_FRAGMENT == 0 {
                return Err(Verdict::pass(Outcome::Oversize));
            }
            let mtu = slot.mtu;
            return Err(too_big::answer(frame, tables, link, packet, mtu));
        }
        let limit = mss::limit(overlay, slot.mtu);
        let copy_df = overlay.flags.has(OverlayFlags::DF_INHERIT) && packet.fragment & DONT_FRAGMENT != 0;
        let outer = emit::Outer { hash: flow(frame, packet).hash(), tos: packet.tos, dont_fragment: copy_df };
        return Err(emit::to_vtep(frame, config, link.len, packet.space, slot, outer, limit));
    }
    Ok(())
}

/// What tells the packet's flow apart. Fragments have no ports, and the first one must hash like the others.
#[inline(always)]
fn flow<F: Frame>(frame: &F, packet: Packet) -> Flow {
    let at = packet.transport();
    let ports = match packet.protocol {
        _ if packet.is_fragment() => None,
        TCP | UDP | SCTP => frame.read::<[u8; 4]>(at).copied(),
        ICMP => match frame.read::<[u8; 8]>(at) {
            Some(&[ECHO_REQUEST | ECHO_REPLY, _, _, _, high, low, _, _]) => Some([high, low, 0, 0]),
            _ => None,
        },
        _ => None,
    };
    Flow {
        source: packet.source,
        destination: packet.destination,
        ports: u32::from_ne_bytes(ports.unwrap_or_default()),
        protocol: packet.protocol,
    }
}
