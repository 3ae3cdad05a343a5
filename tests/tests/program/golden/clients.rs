//! From clients to pods: through the tunnel, or plain to nodes that are reached directly; and back from those.

use gateway_common::{abi::Outcome, wire::Mac};

use crate::{
    case::Case,
    packet::{Ip, Link},
    rig::{self, CLIENT},
    world::{
        self, CILIUM, DIRECT, DIRECT_TAGGED, OTHER_PORT, PLAIN, TAGGED, UNRESOLVED, VLAN_BOTH, VLAN_EXTERNAL,
        VLAN_UNDERLAY, VNI_ZERO, World, pod,
    },
};

pub(super) fn encap(world: &World) -> Vec<Case> {
    let link = world.client_link();
    let data = vec![0xa5; 200];
    let to = |id| Ip::udp(CLIENT, pod(id), (40_000, 80), &data);
    let mut cases = vec![
        Case::encap("encap-udp", world, PLAIN, link, &to(PLAIN)),
        Case::encap("encap-tcp", world, PLAIN, link, &Ip::tcp(CLIENT, pod(PLAIN), (40_000, 80), &data)),
        Case::encap("encap-prefix", world, PLAIN, link, &Ip::udp(CLIENT, [10, 244, 1, 200], (1, 2), &data)),
        Case::encap(
            "encap-exact-before-prefix",
            world,
            TAGGED,
            link,
            &Ip::udp(CLIENT, world::MOVED_POD, (1, 2), &data),
        ),
        Case::encap(
            "encap-other-protocol",
            world,
            PLAIN,
            link,
            &Ip::new(CLIENT, pod(PLAIN), 47, data.clone()),
        ),
        Case::encap("encap-no-payload", world, PLAIN, link, &Ip::new(CLIENT, pod(PLAIN), 6, Vec::new())),
        Case::encap("encap-largest", world, PLAIN, link, &Ip::udp(CLIENT, pod(PLAIN), (1, 2), &[0; 1422])),
        Case::encap("encap-tag-out", world, TAGGED, link, &to(TAGGED)),
        Case::encap("encap-tag-in", world, PLAIN, link.tagged(VLAN_BOTH), &to(PLAIN)),
        Case::encap("encap-tag-in-external", world, PLAIN, link.tagged(VLAN_EXTERNAL), &to(PLAIN)),
        Case::encap("encap-tag-both", world, TAGGED, link.tagged(VLAN_EXTERNAL), &to(TAGGED)),
        Case::encap("encap-priority-tag", world, PLAIN, link.tagged(0), &to(PLAIN)),
        Case::encap("encap-first-fragment", world, PLAIN, link, &Ip { more_fragments: true, ..to(PLAIN) }),
        Case::encap("encap-later-fragment", world, PLAIN, link, &Ip { offset: 185, ..to(PLAIN) }),
        Case::encap(
            "encap-other-port",
            world,
            OTHER_PORT,
            link,
            &Ip::udp([10, 61, 0, 5], pod(OTHER_PORT), (1, 2), &data),
        ),
        Case::encap(
            "encap-vni-0",
            world,
            VNI_ZERO,
            link,
            &Ip::udp([10, 71, 0, 5], pod(VNI_ZERO), (1, 2), &data),
        ),
    ];
    for ttl in [2, 64, 255] {
        cases.push(Case::encap(format!("encap-ttl-{ttl}"), world, PLAIN, link, &Ip { ttl, ..to(PLAIN) }));
    }
    // Linux INET_ECN_encapsulate, of every inner field, with and without a code point in the template's DSCP.
    for (inner, outer) in [(0, 0), (1, 1), (2, 2), (3, 2)] {
        for id in [PLAIN, TAGGED] {
            let packet = Ip { tos: 0x28 | inner, ..to(id) };
            let (node, config, inner_packet) = (world.nodes[&id].clone(), *world.config(), packet.clone());
            cases.push(Case::to_node(
                format!("encap-ecn-{inner}-node-{id}"),
                world,
                Outcome::Encap,
                &world.nodes[&id],
                link.ip(&packet),
                move |port| node.carries_marked(&config, &inner_packet, port, outer, node.dont_fragment),
            ));
        }
    }
    // Unset, set, inherited; with the inner bit off and on.
    for (id, client, expected) in [
        (PLAIN, CLIENT, [false, false]),
        (TAGGED, CLIENT, [true, true]),
        (CILIUM, [10, 0, 1, 77], [false, true]),
    ] {
        for (inner_df, outer_df) in [false, true].into_iter().zip(expected) {
            let packet = Ip { dont_fragment: inner_df, ..Ip::udp(client, pod(id), (5, 6), &data) };
            let (node, config, inner) = (world.nodes[&id].clone(), *world.config(), packet.clone());
            cases.push(Case::to_node(
                format!("encap-df-{inner_df}-node-{id}"),
                world,
                Outcome::Encap,
                &world.nodes[&id],
                link.ip(&packet),
                move |port| node.carries_marked(&config, &inner, port, 0, outer_df),
            ));
        }
    }
    cases
}

/// A client's packet that the program must not carry.
pub(super) fn refused_clients(world: &World) -> Vec<Case> {
    let link = world.client_link();
    let to = |address| Ip::udp(CLIENT, address, (40_000, 80), b"data");
    let options = vec![0x94, 4, 0, 0]; // router alert, RFC 2113
    let mut cases = vec![
        Case::pass("options", Outcome::IpOptions, link.ip(&Ip { options, ..to(pod(PLAIN)) })),
        Case::pass("oversize", Outcome::Oversize, link.ip(&Ip::udp(CLIENT, pod(PLAIN), (1, 2), &[0; 1423]))),
        Case::pass("no-route", Outcome::NoRoute, link.ip(&to([203, 0, 113, 1]))),
        Case::pass("to-the-gateway", Outcome::NoRoute, link.ip(&to(rig::GATEWAY))),
        Case::drop("unresolved", Outcome::VtepUnresolved, link.ip(&to(pod(UNRESOLVED)))),
        Case::drop("vtep-free", Outcome::VtepMissing, link.ip(&to(world::POD_OF_FREE))),
        Case::drop("vtep-beyond-the-table", Outcome::VtepMissing, link.ip(&to(world::POD_OF_NOWHERE))),
        Case::drop("vtep-bad-header", Outcome::VtepMissing, link.ip(&to(world::POD_OF_BAD_HEADER))),
        Case::drop(
            "foreign-client",
            Outcome::ClientForeign,
            link.ip(&Ip::udp([192, 0, 2, 99], pod(PLAIN), (1, 2), b"data")),
        ),
        Case::drop(
            "client-of-another-overlay",
            Outcome::ClientForeign,
            link.ip(&Ip::udp(CLIENT, pod(CILIUM), (1, 2), b"data")),
        ),
    ];
    for ttl in [0, 1] {
        cases.push(Case::pass(
            format!("ttl-{ttl}"),
            Outcome::TtlExpired,
            link.ip(&Ip { ttl, ..to(pod(PLAIN)) }),
        ));
    }
    // RFC 1812 section 5.2.2.
    let whole = link.ip(&to(pod(PLAIN)));
    let bent = |at: usize, value: u8| {
        let mut frame = whole.clone();
        frame[at] = value;
        frame
    };
    for (name, frame) in [
        ("ipv4-version-6", bent(14, 0x65)),
        ("ipv4-header-of-16-bytes", bent(14, 0x44)),
        ("ipv4-header-beyond-the-packet", bent(14, 0x4f)),
        ("ipv4-total-length-of-19", bent(17, 19)),
        ("ipv4-total-length-beyond-the-frame", bent(16, 1)),
        ("ipv4-one-byte-short", whole[..whole.len() - 1].to_vec()),
        ("ipv4-header-truncated", whole[..33].to_vec()),
        ("ipv4-nothing", whole[..14].to_vec()),
    ] {
        cases.push(Case::drop(name, Outcome::Ipv4Malformed, frame));
    }
    cases
}

/// Nodes that are reached without a tunnel, both ways.
pub(super) fn direct(world: &World) -> Vec<Case> {
    let link = world.client_link();
    let mut cases = Vec::new();
    for (name, id, link) in [
        ("direct", DIRECT, link),
        ("direct-tag-out", DIRECT_TAGGED, link),
        ("direct-tag-in", DIRECT, link.tagged(VLAN_EXTERNAL)),
        ("direct-tag-both", DIRECT_TAGGED, link.tagged(VLAN_EXTERNAL)),
    ] {
        let packet = Ip { tos: 0x2b, ..Ip::udp(CLIENT, pod(id), (1, 2), b"data") };
        let (input, output) = (link.ip(&packet), world.nodes[&id].carries(world.config(), &packet, 0));
        cases.push(match id {
            DIRECT => Case::transmit(name, Outcome::RouteDirect, input, output),
            _ => Case::redirect(name, Outcome::RouteDirect, input, output),
        });
    }
    let back = |to| Ip::tcp(pod(DIRECT), to, (80, 40_000), b"answer");
    let from = world.underlay_link();
    cases.extend([
        Case::redirect(
            "direct-return",
            Outcome::DirectIn,
            from.ip(&back(CLIENT)),
            world.to_client().ip(&back(CLIENT).hop()),
        ),
        Case::redirect(
            "direct-return-tag-in",
            Outcome::DirectIn,
            from.tagged(VLAN_UNDERLAY).ip(&back(CLIENT)),
            world.to_client().ip(&back(CLIENT).hop()),
        ),
        Case::transmit(
            "direct-return-same-interface",
            Outcome::DirectIn,
            from.ip(&back(rig::CLIENT_SAME_PORT)),
            Link::new(rig::CLIENT_SAME_PORT_MAC, world.ports.own.mac).ip(&back(rig::CLIENT_SAME_PORT).hop()),
        ),
        // Another host of the underlay says it is a pod.
        Case::drop(
            "direct-return-other-host",
            Outcome::DirectSource,
            Link::new(world.ports.own.mac, Mac::new([0x52, 0x54, 0, 0, 0, 0x66])).ip(&back(CLIENT)),
        ),
        // Not underlay: it is a client that says it is a pod.
        Case::pass(
            "direct-return-from-outside",
            Outcome::NoRoute,
            from.tagged(VLAN_EXTERNAL).ip(&back(CLIENT)),
        ),
        // The node has a tunnel, so its pods do not send plain packets.
        Case::pass(
            "plain-packet-of-a-tunnel-node",
            Outcome::NoRoute,
            from.ip(&Ip::tcp(pod(PLAIN), CLIENT, (80, 40_000), b"answer")),
        ),
        Case::pass("direct-elsewhere", Outcome::NoRoute, from.ip(&back(rig::FAR_AWAY))),
        Case::pass("direct-return-local", Outcome::OutLocal, from.ip(&back(rig::GATEWAY))),
    ]);
    cases
}
