//! Out of the tunnel: what is taken, what is refused, what is the kernel's.

use gateway_common::{
    abi::{Outcome, OverlayFlags},
    wire::Mac,
};

use super::answer;
use crate::{
    case::{Case, FromNode},
    packet::{IPV6, Ip, Link},
    rig::{self, CLIENT},
    world::{
        self, CILIUM, OTHER_PORT, PLAIN, TAGGED, VLAN_EXTERNAL, VLAN_OUT, VLAN_UNDERLAY, VNI_ZERO, World, pod,
    },
};

/// RFC 6040 section 4.2, figure 4, as Linux implements it: rows are the inner field, columns the outer one, both in the
/// order Not-ECT, ECT(1), ECT(0), CE of their code points; `None` is a drop.
const DECAPSULATED_ECN: [[Option<u8>; 4]; 4] = [
    [Some(0), Some(0), Some(0), None],
    [Some(1), Some(1), Some(1), Some(3)],
    [Some(2), Some(1), Some(2), Some(3)],
    [Some(3), Some(3), Some(3), Some(3)],
];

pub(super) fn decap(world: &World) -> Vec<Case> {
    let to_client = world.to_client();
    let packet = answer(PLAIN, CLIENT);
    let plain = FromNode::new(world, PLAIN, &packet);
    let done = |name: &str, from: &FromNode| {
        Case::redirect(name, Outcome::Decap, from.bytes(), to_client.ip(&answer(PLAIN, CLIENT).hop()))
    };
    let mut cases = vec![
        done("decap", &plain),
        done("decap-tag-in", &plain.with(|p| p.link = p.link.tagged(VLAN_UNDERLAY))),
        done("decap-priority-tag", &plain.with(|p| p.link = p.link.tagged(0))),
        done("decap-outer-options", &plain.with(|p| p.outer.options = vec![0x94, 4, 0, 0])),
        done("decap-outer-longest-options", &plain.with(|p| p.outer.options = vec![1; 40])),
        done("decap-outer-ttl-1", &plain.with(|p| p.outer.ttl = 1)),
        done("decap-outer-df", &plain.with(|p| p.outer.dont_fragment = true)),
    ];
    // RFC 7348 section 4.1 lets the receiver ignore the outer checksum.
    let mut checksum = plain.bytes();
    checksum[40..42].copy_from_slice(&[0xc3, 0xdb]);
    cases.push(Case::redirect("decap-udp-checksum", Outcome::Decap, checksum, to_client.ip(&packet.hop())));
    let mut padded = plain.bytes();
    padded.extend([0xee; 9]);
    let mut with_padding = to_client.ip(&packet.hop());
    with_padding.extend([0xee; 9]);
    cases.push(Case::redirect("decap-padding", Outcome::Decap, padded, with_padding));

    let ways = [
        ("same-interface", rig::CLIENT_SAME_PORT, Link::new(rig::CLIENT_SAME_PORT_MAC, world.ports.own.mac)),
        (
            "tag-out",
            rig::CLIENT_IN_VLAN,
            Link::new(rig::CLIENT_IN_VLAN_MAC, world.ports.vlan.mac).tagged(VLAN_OUT),
        ),
        ("by-a-router", rig::FAR_AWAY, to_client),
    ];
    for (name, address, link) in ways {
        for tag in [None, Some(VLAN_UNDERLAY)] {
            let packet = answer(PLAIN, address);
            let input = FromNode::new(world, PLAIN, &packet).with(|p| p.link.vlan = tag).bytes();
            let name = format!("decap-{name}{}", if tag.is_some() { "-tag-in" } else { "" });
            let output = link.ip(&packet.hop());
            cases.push(match address {
                rig::CLIENT_SAME_PORT => Case::transmit(name, Outcome::Decap, input, output),
                _ => Case::redirect(name, Outcome::Decap, input, output),
            });
        }
    }
    for (name, packet) in [
        ("ttl-2", Ip { ttl: 2, ..packet.clone() }),
        ("ttl-255", Ip { ttl: 255, ..packet.clone() }),
        ("first-fragment", Ip { more_fragments: true, ..packet.clone() }),
        ("later-fragment", Ip { offset: 185, ..packet.clone() }),
        ("no-payload", Ip::new(pod(PLAIN), CLIENT, 6, Vec::new())),
        ("prefix-source", Ip { source: [10, 244, 1, 250], ..packet.clone() }),
    ] {
        let from = FromNode::new(world, PLAIN, &packet);
        cases.push(Case::redirect(
            format!("decap-{name}"),
            Outcome::Decap,
            from.bytes(),
            to_client.ip(&packet.hop()),
        ));
    }
    for (inner, row) in (0..).zip(DECAPSULATED_ECN) {
        for (outer, result) in (0..).zip(row) {
            let packet = Ip { tos: 0x48 | inner, ..packet.clone() };
            let from = FromNode::new(world, PLAIN, &packet).with(|p| p.outer.tos = 0xb8 | outer);
            let name = format!("decap-ecn-inner-{inner}-outer-{outer}");
            cases.push(match result {
                None => Case::drop(name, Outcome::EcnIllegal, from.bytes()),
                Some(ecn) => {
                    let marked = Ip { tos: 0x48 | ecn, ..packet.hop() };
                    Case::redirect(name, Outcome::Decap, from.bytes(), to_client.ip(&marked))
                }
            });
        }
    }
    // Other overlays: VXLAN GBP where it is allowed, another port, VNI 0.
    for (name, id, change) in [
        ("vni-2", CILIUM, None),
        ("gbp", CILIUM, Some([0x88, 0, 0x12, 0x34])),
        ("gbp-dont-learn-applied", CILIUM, Some([0x88, 0x48, 0, 1])),
        ("other-port", OTHER_PORT, None),
        ("vni-0", VNI_ZERO, None),
    ] {
        let packet = answer(id, CLIENT);
        let from = FromNode::new(world, id, &packet).with(|p| {
            if let Some(flags) = change {
                p.header[..4].copy_from_slice(&flags);
            }
        });
        cases.push(Case::redirect(
            format!("decap-{name}"),
            Outcome::Decap,
            from.bytes(),
            to_client.ip(&packet.hop()),
        ));
    }
    // Without a source check anybody's packets are taken, for any inner source.
    assert_eq!(world.config().overlays[world.nodes[&OTHER_PORT].overlay].flags, OverlayFlags::NONE);
    let packet = answer(PLAIN, CLIENT);
    let from = FromNode::new(world, OTHER_PORT, &packet).from([192, 0, 2, 1]);
    cases.push(Case::redirect("decap-unchecked", Outcome::Decap, from.bytes(), to_client.ip(&packet.hop())));
    cases
}

pub(super) fn refused_tunnels(world: &World) -> Vec<Case> {
    let plain = FromNode::new(world, PLAIN, &answer(PLAIN, CLIENT));
    let gbp = FromNode::new(world, CILIUM, &answer(CILIUM, CLIENT));
    let overlay = world.config().overlays[0];
    let node = &world.nodes[&PLAIN];
    let header = |at: usize, value: u8| plain.with(|p| p.header[at] = value).bytes();
    let inner_macs =
        |source, destination| plain.with(|p| p.inner_link = Link::new(destination, source)).bytes();
    let inner_kind = |kind: u16| plain.with(|p| p.kind = kind).bytes();
    let bent = |at: usize, bytes: &[u8]| {
        let mut frame = plain.bytes();
        frame[at..at + bytes.len()].copy_from_slice(bytes);
        frame
    };
    let inner = |change: fn(&mut Ip)| {
        let mut packet = answer(PLAIN, CLIENT);
        change(&mut packet);
        FromNode::new(world, PLAIN, &packet).bytes()
    };
    // The datagram ends `short` bytes early, and says so.
    let cut = |keep: usize| {
        let mut datagram = plain.datagram();
        datagram.truncate(keep);
        let length = u16::try_from(keep).unwrap();
        datagram[4..6].copy_from_slice(&length.to_be_bytes());
        plain.link.ip(&Ip { payload: datagram, ..plain.outer.clone() })
    };
    let outer_to = |address| plain.with(|p| p.outer.destination = address);
    let group = |p: &mut FromNode, mac: [u8; 6]| p.link.destination = Mac::new(mac);
    [
        (
            "tunnel-from-outside",
            Outcome::TunnelPortExternal,
            plain.with(|p| p.link.vlan = Some(VLAN_EXTERNAL)).bytes(),
        ),
        (
            "tunnel-from-outside-to-another-address",
            Outcome::TunnelPortExternal,
            outer_to(rig::UNDERLAY_OTHER).with(|p| p.link.vlan = Some(VLAN_EXTERNAL)).bytes(),
        ),
        (
            "tunnel-from-outside-by-broadcast",
            Outcome::TunnelPortExternal,
            plain
                .with(|p| {
                    p.link.vlan = Some(VLAN_EXTERNAL);
                    group(p, [0xff; 6]);
                })
                .bytes(),
        ),
        ("tunnel-to-another-address", Outcome::TunnelAddress, outer_to(rig::UNDERLAY_OTHER).bytes()),
        ("tunnel-by-broadcast", Outcome::TunnelAddress, plain.with(|p| group(p, [0xff; 6])).bytes()),
        (
            "tunnel-by-multicast",
            Outcome::TunnelAddress,
            plain.with(|p| group(p, [1, 0, 0x5e, 0, 0, 1])).bytes(),
        ),
        (
            "outer-first-fragment",
            Outcome::OuterFragment,
            plain.with(|p| p.outer.more_fragments = true).bytes(),
        ),
        ("outer-truncated-udp", Outcome::OuterMalformed, {
            plain.link.ip(&Ip { payload: plain.datagram()[..7].to_vec(), ..plain.outer.clone() })
        }),
        ("outer-total-length-beyond-the-frame", Outcome::OuterMalformed, bent(16, &[2])),
        ("outer-version", Outcome::OuterMalformed, bent(14, &[0x55])),
        ("outer-one-byte-short", Outcome::OuterMalformed, plain.bytes()[..plain.bytes().len() - 1].to_vec()),
        ("udp-length-too-long", Outcome::OuterUdpLength, bent(38, &[2, 0])),
        ("udp-length-too-short", Outcome::OuterUdpLength, bent(38, &[0, 40])),
        ("udp-without-room", Outcome::OuterUdpLength, cut(29)),
        ("udp-with-nothing", Outcome::OuterUdpLength, cut(8)),
        ("flags-0", Outcome::VxlanFlags, header(0, 0)),
        ("flags-gbp-without-vni", Outcome::VxlanFlags, header(0, 0x80)),
        ("flags-gbp", Outcome::VxlanFlags, header(0, 0x88)),
        ("flags-gpe", Outcome::VxlanFlags, header(0, 0x0c)),
        ("flags-all", Outcome::VxlanFlags, header(0, 0xff)),
        ("flags-gbp-and-another", Outcome::VxlanFlags, gbp.with(|p| p.header[0] = 0x89).bytes()),
        ("reserved-1", Outcome::VxlanReserved, header(1, 1)),
        ("reserved-2", Outcome::VxlanReserved, header(2, 0x80)),
        ("reserved-3", Outcome::VxlanReserved, header(3, 3)),
        ("reserved-7", Outcome::VxlanReserved, header(7, 1)),
        ("reserved-policy-without-gbp", Outcome::VxlanReserved, gbp.with(|p| p.header[3] = 1).bytes()),
        (
            "reserved-gbp-7",
            Outcome::VxlanReserved,
            gbp.with(|p| (p.header[0], p.header[7]) = (0x88, 1)).bytes(),
        ),
        (
            "reserved-gbp-1",
            Outcome::VxlanReserved,
            gbp.with(|p| (p.header[0], p.header[1]) = (0x88, 4)).bytes(),
        ),
        ("vni-unknown", Outcome::VniUnknown, header(6, 3)),
        ("vni-high-byte", Outcome::VniUnknown, header(4, 1)),
        (
            "vni-of-another-port",
            Outcome::VniUnknown,
            plain.with(|p| p.header[4..7].copy_from_slice(&[0xab, 0xcd, 0xef])).bytes(),
        ),
        ("outer-source", Outcome::OuterSource, plain.from([172, 16, 2, 99]).bytes()),
        (
            "outer-source-of-another-overlay",
            Outcome::OuterSource,
            plain.from(world.nodes[&CILIUM].endpoint).bytes(),
        ),
        ("inner-truncated", Outcome::InnerTruncated, cut(30 + 19)),
        ("inner-nothing", Outcome::InnerTruncated, cut(30)),
        ("inner-one-byte-short", Outcome::InnerMalformed, cut(plain.datagram().len() - 1)),
        ("inner-version", Outcome::InnerMalformed, bent(64, &[0x65])),
        ("inner-header-of-16-bytes", Outcome::InnerMalformed, bent(64, &[0x44])),
        ("inner-total-length-of-19", Outcome::InnerMalformed, bent(66, &[0, 19])),
        ("inner-total-length-beyond", Outcome::InnerMalformed, bent(66, &[1])),
        (
            "inner-destination-mac",
            Outcome::InnerDestinationMac,
            inner_macs(node.mac, Mac::new([0x0e, 0x11, 0x22, 0x33, 0x44, 0x56])),
        ),
        (
            "inner-multicast",
            Outcome::InnerDestinationMac,
            inner_macs(node.mac, Mac::new([1, 0, 0x5e, 0, 0, 5])),
        ),
        ("inner-source-mac-zero", Outcome::InnerSourceMac, inner_macs(Mac::ZERO, overlay.mac)),
        ("inner-source-mac-group", Outcome::InnerSourceMac, inner_macs(Mac::BROADCAST, overlay.mac)),
        ("inner-loop", Outcome::InnerLoop, inner_macs(overlay.mac, overlay.mac)),
        ("inner-vlan", Outcome::InnerVlan, plain.with(|p| p.inner_link.vlan = Some(5)).bytes()),
        ("inner-service-vlan", Outcome::InnerVlan, inner_kind(0x88a8)),
        ("inner-ethertype", Outcome::InnerEtherType, inner_kind(0x8847)),
        ("inner-ipv6", Outcome::InnerIpv6, inner_kind(IPV6)),
        ("inner-source", Outcome::InnerSource, inner(|p| p.source = pod(TAGGED))),
        ("inner-source-of-a-client", Outcome::InnerSource, inner(|p| p.source = rig::CLIENT_SAME_PORT)),
        ("inner-source-moved-away", Outcome::InnerSource, inner(|p| p.source = world::MOVED_POD)),
        ("inner-source-of-another-overlay", Outcome::InnerSource, inner(|p| p.source = pod(CILIUM))),
        ("inner-broadcast", Outcome::InnerBroadcast, inner_macs(node.mac, Mac::BROADCAST)),
        ("tunnel-to-tunnel", Outcome::TunnelToTunnel, inner(|p| p.destination = rig::BEHIND_TUNNEL)),
    ]
    .map(|(name, outcome, frame)| Case::drop(name, outcome, frame))
    .into()
}

/// Out of the tunnel, but for the kernel.
pub(super) fn outward(world: &World) -> Vec<Case> {
    let to = |address| FromNode::new(world, PLAIN, &answer(PLAIN, address)).bytes();
    let bent = |change: fn(&mut Ip)| {
        let mut packet = answer(PLAIN, CLIENT);
        change(&mut packet);
        FromNode::new(world, PLAIN, &packet).bytes()
    };
    [
        ("out-local", Outcome::OutLocal, to(rig::GATEWAY)),
        ("out-no-route", Outcome::OutLocal, to([203, 0, 113, 9])),
        ("out-broadcast", Outcome::OutLocal, to([255, 255, 255, 255])),
        ("out-local-last-ttl", Outcome::OutLocal, bent(|p| (p.destination, p.ttl) = (rig::GATEWAY, 1))),
        ("out-no-neighbour", Outcome::OutNoNeighbour, to(rig::UNRESOLVED)),
        ("out-foreign-interface", Outcome::OutOtherInterface, to(rig::BEHIND_FOREIGN)),
        ("out-inside-interface", Outcome::OutOtherInterface, to(rig::BEHIND_INSIDE)),
        ("out-ttl-0", Outcome::OutTtlExpired, bent(|p| p.ttl = 0)),
        ("out-ttl-1", Outcome::OutTtlExpired, bent(|p| p.ttl = 1)),
        ("out-options", Outcome::OutIpOptions, bent(|p| p.options = vec![0x94, 4, 0, 0])),
        ("out-oversize", Outcome::OutOversize, bent(|p| p.payload = vec![0; 1481])),
        ("out-blackhole", Outcome::OutRefused, to(rig::BLACKHOLE)),
        ("out-unreachable", Outcome::OutRefused, to(rig::UNREACHABLE)),
        ("out-prohibited", Outcome::OutRefused, to(rig::PROHIBITED)),
    ]
    .map(|(name, outcome, frame)| Case::pass(name, outcome, frame))
    .into()
}
