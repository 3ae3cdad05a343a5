//! ARP on the outside, and in the tunnel.

use gateway_common::{abi::Outcome, wire::Mac};

use super::answer;
use crate::{
    case::{Case, FromNode},
    packet::{ARP, Arp, Link},
    rig::{self, CLIENT},
    world::{
        CILIUM, CILIUM_ADDRESS, OVERLAY_ADDRESS, PLAIN, TAGGED, VLAN_EXTERNAL, VLAN_UNDERLAY, World, pod,
    },
};

/// The proxy on the outside: RFC 826, and RFC 5227 for probes and announcements.
pub(super) fn arp(world: &World) -> Vec<Case> {
    let own = world.ports.own.mac;
    let link = Link::new(Mac::BROADCAST, rig::CLIENT_MAC);
    let request = Arp::request(rig::CLIENT_MAC, CLIENT, pod(PLAIN));
    let answered = |name: &str, link: Link, arp: Arp, padding: usize| {
        let back = Link { destination: arp.sender_mac, source: own, ..link };
        let pad = vec![0; padding];
        let frame = |link: Link, arp: Arp| link.frame(ARP, &[arp.bytes(), pad.clone()].concat());
        Case::transmit(name, Outcome::ArpReply, frame(link, arp), frame(back, arp.answered(own)))
    };
    let mut cases = vec![
        answered("arp-pod", link, request, 0),
        answered("arp-padded", link, request, 18),
        answered("arp-tagged", link.tagged(VLAN_EXTERNAL), request, 14),
        answered("arp-priority-tag", link.tagged(0), request, 14),
        answered("arp-unicast", world.client_link(), request, 18),
        answered("arp-prefix", link, Arp { target: [10, 244, 1, 99], ..request }, 18),
        answered("arp-pod-of-another-overlay", link, Arp { target: pod(CILIUM), ..request }, 18),
        answered("arp-probe", link, Arp { sender: [0; 4], ..request }, 18),
        answered("arp-foreign-client", link, Arp { sender: [192, 0, 2, 5], ..request }, 18),
    ];
    let other =
        |name: &str, link: Link, arp: Arp| Case::pass(name, Outcome::ArpOther, link.frame(ARP, &arp.bytes()));
    let to = |target| Arp { target, ..request };
    cases.extend([
        other("arp-own-client", link, to(rig::CLIENT_SAME_PORT)),
        other("arp-gateway", link, to(rig::GATEWAY)),
        other("arp-underlay-address", link, to(rig::UNDERLAY)),
        other("arp-nobody", link, to([203, 0, 113, 1])),
        other("arp-reply", link, Arp { operation: 2, ..request }),
        other("arp-reverse", link, Arp { operation: 3, ..request }),
        other("arp-gratuitous", link, Arp { sender: pod(PLAIN), ..request }),
        other("arp-announcement", link, Arp { operation: 2, sender: pod(PLAIN), ..request }),
        other("arp-to-another-host", Link::new(Mac::new([2, 0, 0, 0, 0, 9]), rig::CLIENT_MAC), request),
        other("arp-on-underlay", link.tagged(VLAN_UNDERLAY), request),
    ]);
    let bytes = link.frame(ARP, &request.bytes());
    let bent = |at: usize, value: u8| {
        let mut frame = bytes.clone();
        frame[14 + at] = value;
        frame
    };
    let from = |sender_mac| link.frame(ARP, &Arp { sender_mac, ..request }.bytes());
    for (name, frame) in [
        ("arp-truncated", bytes[..41].to_vec()),
        ("arp-empty", bytes[..14].to_vec()),
        ("arp-hardware-type", bent(1, 6)),
        ("arp-protocol-type", bent(2, 0x86)),
        ("arp-hardware-length", bent(4, 8)),
        ("arp-protocol-length", bent(5, 16)),
        ("arp-sender-zero", from(Mac::ZERO)),
        ("arp-sender-group", from(Mac::new([1, 0, 0x5e, 0, 0, 1]))),
    ] {
        cases.push(Case::pass(name, Outcome::ArpMalformed, frame));
    }
    cases
}

pub(super) fn tunnel_arp(world: &World) -> Vec<Case> {
    let node = &world.nodes[&PLAIN];
    let overlay = world.config().overlays[0];
    let request = Arp::request(node.mac, [10, 244, 1, 0], OVERLAY_ADDRESS);
    let base = FromNode::new(world, PLAIN, &answer(PLAIN, CLIENT))
        .with(|p| (p.kind, p.inner, p.inner_link.destination) = (ARP, request.bytes(), Mac::BROADCAST));
    let says = |arp: Arp| base.with(|p| p.inner = arp.bytes()).bytes();
    let answered = |name: &str, input: Vec<u8>, id: u32, arp: Arp| {
        let (node, config) = (world.nodes[&id].clone(), *world.config());
        let mac = config.overlays[node.overlay].mac;
        Case::to_node(name, world, Outcome::ArpReplyTunnel, &node.clone(), input, move |port| {
            node.carries_arp(&config, arp.sender_mac, &arp.answered(mac).bytes(), port)
        })
    };
    let tagged_request = Arp::request(world.nodes[&TAGGED].mac, [10, 244, 2, 0], OVERLAY_ADDRESS);
    let tagged = FromNode::new(world, TAGGED, &answer(TAGGED, CLIENT)).with(|p| {
        (p.kind, p.inner, p.inner_link.destination) = (ARP, tagged_request.bytes(), overlay.mac);
    });
    let cilium = Arp::request(world.nodes[&CILIUM].mac, [10, 1, 1, 0], CILIUM_ADDRESS);
    let cilium_frame = FromNode::new(world, CILIUM, &answer(CILIUM, CLIENT))
        .with(|p| (p.kind, p.inner, p.inner_link.destination) = (ARP, cilium.bytes(), Mac::BROADCAST));
    let pass = |name: &str, input: Vec<u8>| Case::pass(name, Outcome::TunnelArp, input);
    vec![
        answered("tunnel-arp", base.bytes(), PLAIN, request),
        answered(
            "tunnel-arp-unicast",
            base.with(|p| p.inner_link.destination = overlay.mac).bytes(),
            PLAIN,
            request,
        ),
        answered("tunnel-arp-cilium", cilium_frame.bytes(), CILIUM, cilium),
        answered(
            "tunnel-arp-tagged",
            tagged.with(|p| p.link = p.link.tagged(VLAN_UNDERLAY)).bytes(),
            TAGGED,
            tagged_request,
        ),
        // The answer must be as long as the request: template with a tag, frame without one.
        pass("tunnel-arp-other-tag", tagged.bytes()),
        pass("tunnel-arp-outer-options", base.with(|p| p.outer.options = vec![1; 4]).bytes()),
        pass("tunnel-arp-client", says(Arp { target: CLIENT, ..request })),
        pass("tunnel-arp-pod", says(Arp { target: pod(PLAIN), ..request })),
        pass("tunnel-arp-gateway", says(Arp { target: rig::GATEWAY, ..request })),
        pass("tunnel-arp-reply", says(Arp { operation: 2, ..request })),
        pass("tunnel-arp-announcement", says(Arp { sender: OVERLAY_ADDRESS, ..request })),
        Case::pass(
            "tunnel-arp-malformed",
            Outcome::ArpMalformed,
            says(Arp { sender_mac: Mac::ZERO, ..request }),
        ),
        Case::drop(
            "tunnel-arp-truncated",
            Outcome::InnerTruncated,
            base.with(|p| p.inner.truncate(27)).bytes(),
        ),
    ]
}
