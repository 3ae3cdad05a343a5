//! Frames that the link layer or the kernel decides about.

use gateway_common::{abi::Outcome, wire::Mac};

use super::{answer, ping};
use crate::{
    case::{Case, FromNode},
    packet::{IPV4, IPV6, Ip, Link},
    rig::{self, CLIENT},
    world::{PLAIN, VLAN_BOTH, VLAN_IDLE, World, pod},
};

/// Frames whose link layer decides.
pub(super) fn links(world: &World) -> Vec<Case> {
    let link = world.client_link();
    let ip = ping();
    let service_tag = link.frame(0x88a8, &[&[0, 100, 8, 0], ip.bytes().as_slice()].concat());
    let two_tags = link.tagged(VLAN_BOTH).frame(0x8100, &[&[0, 5, 8, 0], ip.bytes().as_slice()].concat());
    let four_tags = link.frame(
        0x8100,
        &[[0, 0, 0x81, 0].repeat(3).as_slice(), &[0, 0, 8, 0], ip.bytes().as_slice()].concat(),
    );
    let other_host = Link::new(Mac::new([0x52, 0x54, 0, 0, 0, 0x55]), rig::CLIENT_MAC);
    vec![
        Case::pass("vlan-without-role", Outcome::NoRole, link.tagged(VLAN_IDLE).ip(&ip)),
        Case::pass("vlan-unknown", Outcome::NoRole, link.tagged(999).ip(&ip)),
        Case::pass("vlan-4095", Outcome::NoRole, link.tagged(4095).ip(&ip)),
        Case::pass("ipv6", Outcome::NotIp, link.frame(IPV6, &[0x60; 40])),
        Case::pass("service-tag", Outcome::NotIp, service_tag),
        Case::pass("two-tags", Outcome::NotIp, two_tags),
        Case::drop("four-tags", Outcome::VlanDepth, four_tags),
        Case::pass("tag-truncated", Outcome::NotIp, link.frame(0x8100, &[0, 100, 8])),
        Case::pass("llc", Outcome::NotIp, link.frame(0x0026, &[0x42; 38])),
        Case::pass("other-host", Outcome::NotForUs, other_host.ip(&ip)),
        Case::pass("broadcast", Outcome::NotForUs, Link::new(Mac::BROADCAST, rig::CLIENT_MAC).ip(&ip)),
        Case::pass("other-host-malformed", Outcome::NotForUs, other_host.frame(IPV4, &[0; 3])),
    ]
}

/// Frames that the kernel must get because the program cannot or may not handle them.
pub(super) fn kernels(world: &World) -> Vec<Case> {
    let link = world.underlay_link();
    let plain = FromNode::new(world, PLAIN, &answer(PLAIN, CLIENT));
    let large = world.client_link().ip(&Ip::echo(CLIENT, pod(PLAIN), 1, &[0; 200]));
    vec![
        Case::pass("no-headroom", Outcome::NoHeadroom, large).cramped(),
        // Its first fragment is dropped, so the kernel never completes it.
        Case::pass("outer-later-fragment", Outcome::NoRoute, plain.with(|p| p.outer.offset = 9).bytes()),
        Case::pass("other-udp-port", Outcome::NoRoute, plain.with(|p| p.port = 8473).bytes()),
        // Port 4789 is overlay 2's, which has another address.
        Case::drop("port-of-another-vtep", Outcome::TunnelAddress, plain.with(|p| p.port = 4789).bytes()),
        Case::drop("tunnel-behind-a-service-tag", Outcome::TunnelAddress, behind_service_tag(&plain.bytes())),
        Case::pass(
            "tunnel-through-us",
            Outcome::NoRoute,
            plain.with(|p| p.outer.destination = [203, 0, 113, 4]).bytes(),
        ),
        Case::pass(
            "tcp-to-the-tunnel-port",
            Outcome::NoRoute,
            link.ip(&Ip::tcp(CLIENT, rig::UNDERLAY, (1, 8472), b"")),
        ),
        Case::pass(
            "ping-the-underlay-address",
            Outcome::NoRoute,
            link.ip(&Ip::echo(CLIENT, rig::UNDERLAY, 1, b"")),
        ),
    ]
}

/// The kernel takes such a tag off as it does a priority tag of 802.1Q.
fn behind_service_tag(frame: &[u8]) -> Vec<u8> {
    [&frame[..12], &[0x88, 0xa8, 0, 0], &frame[12..]].concat()
}
