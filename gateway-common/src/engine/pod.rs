//! From outside to a pod: route, check, encapsulate.

use super::{
    Frame, Tables, Verdict,
    classify::{DONT_FRAGMENT, ICMP, Link, Packet, SCTP, TCP, UDP},
    emit, mss,
    session::{self, End, Rewrite},
    too_big,
};
use crate::{
    abi::{Outcome, OverlayAddress, OverlayFlags, PrefixKey, Vtep, VtepFlags},
    flow::Flow,
    wire::Ipv4,
};

const ECHO_REPLY: u8 = 0;
const ECHO_REQUEST: u8 = 8;

/// Sends a client's packet to its pod; `Ok` if the destination is no pod.
#[inline(always)]
pub(super) fn from_outside<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    link: Link,
    packet: Packet,
) -> Result<(), Verdict> {
    let config = tables.config();
    // Nobody is there: the kernel would ask the clients for it.
    if tables.is_snat(packet.destination) {
        return Err(Verdict::drop(Outcome::SnatNoSession));
    }
    let target = if config.snat_rule_count != 0 && !config.is_own(packet.source) {
        session::from_client(frame, tables, packet)?
    } else {
        routed(frame, tables, packet)?
    };
    match target {
        Some(target) => Err(deliver(frame, tables, link, packet, &target)),
        None => Ok(()),
    }
}

/// The way of a client that pods can answer.
#[inline(always)]
fn routed<'t, F: Frame, T: Tables>(
    frame: &F,
    tables: &'t T,
    packet: Packet,
) -> Result<Option<Target<'t>>, Verdict> {
    let Some(found) = find(tables, packet.destination) else {
        return Ok(None);
    };
    let overlay = tables.config().overlay(found.overlay);
    if !packet.source.in_subnet(overlay.subnet, overlay.mask) {
        return Err(Verdict::drop(Outcome::ClientForeign));
    }
    // Nobody has it: this would speak for a client of some session.
    if tables.is_snat(packet.source) {
        return Err(Verdict::drop(Outcome::SnatSource));
    }
    route(frame, tables, packet, &found).map(Some)
}

/// Where a pod is.
#[derive(Clone, Copy)]
pub(super) struct Found {
    /// Overlay id.
    pub overlay: u32,
    /// VTEP id.
    pub vtep: u32,
}

/// Looks for a pod in every overlay.
#[inline(always)]
pub(super) fn find<T: Tables>(tables: &T, address: Ipv4) -> Option<Found> {
    for (overlay, _) in tables.config().overlays() {
        // The plan gives no pod an address of this host, but a mistaken pod CIDR must not take it off the network.
        let (route, is_ours) = match tables.pod(&OverlayAddress { overlay, address }) {
            Some(route) => (route, tables.config().is_in_local_prefix(address)),
            None => match tables.prefix(PrefixKey { overlay, address }) {
                Some(route) => (route, tables.is_kernels(address)),
                None => continue,
            },
        };
        return if is_ours { None } else { Some(Found { overlay, vtep: route.vtep }) };
    }
    None
}

/// The way to a pod.
#[derive(Clone, Copy)]
pub(super) struct Target<'a> {
    /// Overlay id.
    pub overlay: u32,
    pub vtep: &'a Vtep,
    /// Flow hash.
    pub hash: u32,
    /// What is counted; [`Outcome::Encap`] stands for the plain way too.
    pub outcome: Outcome,
    pub translation: Option<Rewrite>,
}

/// The way of a packet that goes as it is.
#[inline(always)]
pub(super) fn route<'t, F: Frame, T: Tables>(
    frame: &F,
    tables: &'t T,
    packet: Packet,
    found: &Found,
) -> Result<Target<'t>, Verdict> {
    let vtep = tables.vtep(found.vtep).ok_or(Verdict::drop(Outcome::VtepMissing))?;
    let hash = flow(frame, packet).hash();
    Ok(Target { overlay: found.overlay, vtep, hash, outcome: Outcome::Encap, translation: None })
}

/// Sends a packet to its pod.
#[inline(always)]
fn deliver<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    link: Link,
    packet: Packet,
    target: &Target<'_>,
) -> Verdict {
    let config = tables.config();
    let overlay = config.overlay(target.overlay);
    if packet.has_options() {
        return Verdict::pass(Outcome::IpOptions);
    }
    if packet.ttl <= 1 {
        return Verdict::pass(Outcome::TtlExpired);
    }
    let slot = target.vtep.slot();
    if !slot.flags.has(VtepFlags::USED) {
        return Verdict::drop(Outcome::VtepMissing);
    }
    if !slot.flags.has(VtepFlags::READY) {
        return Verdict::drop(Outcome::VtepUnresolved);
    }
    let dont_fragment = packet.fragment & DONT_FRAGMENT != 0;
    if packet.space > u32::from(slot.mtu) {
        let verdict = if dont_fragment {
            too_big::answer(frame, tables, link, packet, slot.mtu)
        } else {
            Verdict::pass(Outcome::Oversize)
        };
        return if target.translation.is_some() { verdict.or_drop(Outcome::SnatOversize) } else { verdict };
    }
    let copy_df = overlay.flags.has(OverlayFlags::DF_INHERIT) && dont_fragment;
    let outer = emit::Outer { hash: target.hash, tos: packet.tos, dont_fragment: copy_df };
    let direct = slot.flags.has(VtepFlags::DIRECT);
    let limit = if mss::applies(frame, packet, overlay) { slot.mtu } else { 0 };
    match emit::to_vtep(frame, link.len, packet.space, slot, outer) {
        Ok(at) => {
            if let Some(rewrite) = target.translation
                && session::apply(
                    frame,
                    at,
                    End::Source,
                    rewrite,
                    target.outcome == Outcome::SnatErrorForward,
                )
                .is_none()
            {
                return Verdict::drop(Outcome::ResizeFailed);
            }
            let outcome = match target.outcome {
                Outcome::Encap if direct => Outcome::RouteDirect,
                outcome => outcome,
            };
            Verdict::send(outcome, slot.ifindex, config).clamping(limit).tunnelled(!direct)
        }
        Err(verdict) if target.translation.is_some() => verdict.or_drop(Outcome::ResizeFailed),
        Err(verdict) => verdict,
    }
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
