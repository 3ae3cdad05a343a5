//! Keeps tunnel packets that the engine did not take away from the kernel: its vxlan socket listens on every address,
//! also for broadcast and multicast, and checks no source.

use network_types::udp::UdpHdr;

use super::{
    Frame, Tables, Verdict,
    classify::{self, Link, Packet, UDP},
};
use crate::{
    abi::{Config, LocalAddress, Outcome, Roles},
    wire::{Be16, EtherType},
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
    match tables.address(packet.destination) {
        Some(address) if address.kind & LocalAddress::KERNEL != 0 => Err(refuse(link)),
        _ => Ok(()),
    }
}

/// A frame of an interface or VLAN without a role, where tunnel packets have no business either.
#[inline(always)]
pub(super) fn without_role<F: Frame, T: Tables>(frame: &F, tables: &T, link: Link) -> Result<(), Verdict> {
    if link.kind != EtherType::IPV4 {
        return Ok(());
    }
    let space = frame.len().wrapping_sub(link.len as u32);
    match classify::header(frame, link.len, space) {
        Ok(packet) if link.destination.is_group() && has_tunnel_port(frame, tables.config(), packet) => {
            Err(refuse(link))
        }
        Ok(packet) => to_the_kernel(frame, tables, link, packet),
        Err(_) => Ok(()),
    }
}

/// A frame with another destination MAC address: the kernel takes group addresses.
#[inline(always)]
pub(super) fn not_for_us<F: Frame>(frame: &F, config: &Config, link: Link) -> Result<(), Verdict> {
    if !link.destination.is_group() {
        return Ok(());
    }
    let space = frame.len().wrapping_sub(link.len as u32);
    match classify::header(frame, link.len, space) {
        Ok(packet) if has_tunnel_port(frame, config, packet) => Err(refuse(link)),
        _ => Ok(()),
    }
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
