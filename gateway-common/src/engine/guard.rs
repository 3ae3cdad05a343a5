//! Keeps tunnel packets that the engine did not take away from the kernel: its vxlan socket listens on every address,
//! also for broadcast and multicast, and checks no source.

use network_types::udp::UdpHdr;

use super::{
    Frame, Tables, Verdict,
    classify::{self, Link, Packet, UDP},
};
use crate::{
    abi::{Config, Outcome, Roles},
    wire::{Be16, EtherType, Tag},
};

/// A packet of ours that nobody wants: drops what the kernel would take for a tunnel packet.
#[inline(always)]
pub(super) fn to_the_kernel<F: Frame, T: Tables>(
    frame: &F,
    tables: &T,
    link: Link,
    packet: Packet,
) -> Result<(), Verdict> {
    if !has_tunnel_port(frame, tables.config(), packet) {
        return Ok(());
    }
    if !packet.destination.is_routable() || tables.is_kernels(packet.destination) {
        return Err(refuse(link));
    }
    Ok(())
}

/// A frame that the engine leaves alone: without a role, for another MAC address (the kernel takes groups, and the
/// addresses of devices stacked on this one), or no IPv4 at first sight because of more tags.
#[inline(always)]
pub(super) fn left_alone<F: Frame, T: Tables>(frame: &F, tables: &T, link: Link) -> Result<(), Verdict> {
    let link = behind_tags(frame, link)?;
    if link.kind != EtherType::IPV4 {
        return Ok(());
    }
    match classify::header(frame, link.len, classify::behind(frame, link)) {
        Ok(packet) if link.destination.is_group() && has_tunnel_port(frame, tables.config(), packet) => {
            Err(refuse(link))
        }
        Ok(packet) => to_the_kernel(frame, tables, link, packet),
        Err(_) => Ok(()),
    }
}

/// What lies behind further tags. The kernel takes off any number of priority tags, of either kind, and those of its
/// VLAN devices; nobody stacks more than three.
#[inline(always)]
fn behind_tags<F: Frame>(frame: &F, mut link: Link) -> Result<Link, Verdict> {
    for _ in 0..2 {
        if !is_tag(link.kind) {
            return Ok(link);
        }
        let Some(tag) = frame.read::<Tag>(link.len) else {
            return Ok(link);
        };
        link = Link { len: link.len + size_of::<Tag>(), kind: tag.kind, ..link };
    }
    if is_tag(link.kind) { Err(Verdict::drop(Outcome::VlanDepth)) } else { Ok(link) }
}

#[inline(always)]
fn is_tag(kind: Be16) -> bool {
    kind == EtherType::VLAN || kind == EtherType::SERVICE_VLAN
}

#[inline(always)]
fn refuse(link: Link) -> Verdict {
    let underlay = link.roles.has(Roles::UNDERLAY);
    Verdict::drop(if underlay { Outcome::TunnelAddress } else { Outcome::TunnelPortExternal })
}

#[inline(always)]
fn has_tunnel_port<F: Frame>(frame: &F, config: &Config, packet: Packet) -> bool {
    if packet.protocol != UDP || packet.is_later_fragment() {
        return false;
    }
    match frame.read::<UdpHdr>(packet.transport()) {
        Some(udp) => classify::is_tunnel_port(config, Be16 { bytes: udp.dst }),
        None => false,
    }
}
