//! Frames written down beforehand: every outcome, every table of the RFCs, the vectors of VXLAN and ARP.

use std::collections::BTreeSet;

use gateway_common::{
    abi::{Outcome, OverlayFlags, Roles},
    wire::Mac,
};

use crate::{
    case::{Case, FromNode, check_all},
    packet::{ARP, Address, Arp, IPV4, IPV6, Ip, Link, hex},
    rig::{self, CLIENT},
    subject::{Counters, Subject},
    world::{
        self, CILIUM, CILIUM_ADDRESS, DIRECT, DIRECT_TAGGED, Node, OTHER_PORT, OVERLAY_ADDRESS, PLAIN,
        TAGGED, UNRESOLVED, VLAN_BOTH, VLAN_EXTERNAL, VLAN_IDLE, VLAN_OUT, VLAN_UNDERLAY, VNI_ZERO, World,
        pod,
    },
};

/// A client's packet in the tunnel: Ethernet, IPv4, UDP from port 53812 with checksum 0, VXLAN with VNI 1, and an echo
/// request from 10.244.30.15 to 10.244.1.2 that had a TTL of 64 before it was routed.
const VECTOR: &str = "52540000000a5254000000010800450000560000000040111da5ac1002c8ac10020ad234211800420000080000000000\
                      0100de70bcb6ca8d0e1122334455080045000024000100003f0146e00af41e0f0af4010208007c0e1234000167772d70\
                      726f6265";
/// VXLAN payloads with VNI 2: an ARP request for 10.0.1.1 as Cilium's VTEP integration knows it, and the answer.
const ARP_REQUEST: &str =
    "0800000000000200ffffffffffff82364c982e560806000108000604000182364c982e560a0101ec0000000000000a000101";
const ARP_ANSWER: &str =
    "080000000000020082364c982e5606a66eb5692c0806000108000604000206a66eb5692c0a00010182364c982e560a0101ec";

/// Outcomes that no frame can reach here, and why.
const UNREACHABLE: &[(Outcome, &str)] = &[(
    Outcome::ResizeFailed,
    "every header that is written was read before, and resizing moves only the start of the frame",
)];

/// RFC 6040 section 4.2, figure 4, as Linux implements it: rows are the inner field, columns the outer one, both in the
/// order Not-ECT, ECT(1), ECT(0), CE of their code points; `None` is a drop.
const DECAPSULATED_ECN: [[Option<u8>; 4]; 4] = [
    [Some(0), Some(0), Some(0), None],
    [Some(1), Some(1), Some(1), Some(3)],
    [Some(2), Some(1), Some(2), Some(3)],
    [Some(3), Some(3), Some(3), Some(3)],
];

fn cases(world: &World) -> Vec<Case> {
    let parts = [
        vectors,
        encap,
        refused_clients,
        direct,
        decap,
        refused_tunnels,
        outward,
        arp,
        tunnel_arp,
        links,
        kernels,
    ];
    parts.into_iter().flat_map(|part| part(world)).collect()
}

#[test]
fn every_frame_ends_as_written() {
    rig::inside(|ports| {
        let world = World::new(ports);
        check_all(&Subject::load(&world.tables), &cases(&world));
    });
}

#[test]
fn every_outcome_has_a_case() {
    rig::inside(|ports| {
        let world = World::new(ports);
        let cases = cases(&world);
        let names: BTreeSet<&str> = cases.iter().map(|case| case.name.as_str()).collect();
        assert_eq!(names.len(), cases.len(), "two cases share a name, and so a pcap file");
        let covered: BTreeSet<Outcome> = cases.iter().map(|case| case.outcome).collect();
        let excused: BTreeSet<Outcome> = UNREACHABLE.iter().map(|(outcome, _)| *outcome).collect();
        let all: BTreeSet<Outcome> = Outcome::TABLE.iter().map(|row| row.outcome).collect();
        assert_eq!(&all - &covered, excused, "outcomes without a case, and those that may be without one");
    });
}

/// RFC 7348 section 5 wants entropy; a flow keeps its port, and fragments of a datagram stay together.
#[test]
fn source_ports_follow_flows() {
    rig::inside(|ports| {
        let world = World::new(ports);
        let subject = Subject::load(&world.tables);
        let port_of = |packet: &Ip| {
            let (_, output) = subject.run(&world.client_link().ip(packet));
            u16::from_be_bytes([output[34], output[35]])
        };
        let flow = |port: u16| Ip::udp(CLIENT, pod(PLAIN), (port, 80), b"data");
        assert_eq!(port_of(&flow(7)), port_of(&Ip { id: 9, ttl: 3, ..flow(7) }));
        // 1024 balls in 16384 bins leave 992 distinct ones on average, with a deviation of 6.
        let ports: BTreeSet<u16> = (0..1024).map(|port| port_of(&flow(port))).collect();
        assert!(ports.len() > 950, "{} distinct source ports for 1024 flows", ports.len());
        let echoes: BTreeSet<u16> =
            (0..64).map(|id| port_of(&Ip::echo(CLIENT, pod(PLAIN), id, b""))).collect();
        assert!(echoes.len() > 55, "{} distinct source ports for 64 echo identifiers", echoes.len());
        let first = Ip { more_fragments: true, ..flow(7) };
        let later = Ip { offset: 100, payload: vec![0x55; 64], ..flow(8) };
        assert_eq!(port_of(&first), port_of(&later));
    });
}

/// The identification goes through all its values, so the header checksums do too: before and after the TTL goes down, and
/// when the ECN bits change as well. RFC 1624 is about the values where careless updates go wrong.
#[test]
fn header_checksums_are_right_for_every_value() {
    rig::inside(|ports| {
        let world = World::new(ports);
        let subject = Subject::load(&world.tables);
        let (link, to_client, node) = (world.client_link(), world.to_client(), &world.nodes[&DIRECT]);
        for id in 0..=u16::MAX {
            let out = Ip { id, ..Ip::new(CLIENT, pod(DIRECT), 6, Vec::new()) };
            let (_, routed) = subject.run(&link.ip(&out));
            assert_eq!(routed, node.link.ip(&out.hop()), "to a direct node, identification {id}");

            let back = Ip { id, tos: 2, ..Ip::new(pod(PLAIN), CLIENT, 6, Vec::new()) };
            let congested = FromNode::new(&world, PLAIN, &back).with(|p| p.outer.tos = 3);
            let (_, taken_out) = subject.run(&congested.bytes());
            assert_eq!(
                taken_out,
                to_client.ip(&Ip { tos: 3, ..back.hop() }),
                "out of the tunnel, identification {id}"
            );
        }
    });
}

/// The outer checksum is a base from userspace and what the packet adds to it: here for many bases and all lengths.
#[test]
fn outer_checksums_are_right_for_every_length() {
    rig::inside(|ports| {
        let world = World::new(ports);
        let mut subject = Subject::load(&world.tables);
        for length in 0..=1430_u16 {
            let [high, low] = length.wrapping_mul(47).to_be_bytes();
            let node = Node { endpoint: [172, 20, high, low], ..world.nodes[&PLAIN].clone() };
            subject.set_vtep(PLAIN, world::entry(node.slot(world.config())));
            let packet = Ip { tos: high & 3, ..Ip::new(CLIENT, pod(PLAIN), 6, vec![0x42; length.into()]) };
            let (_, output) = subject.run(&world.client_link().ip(&packet));
            let port = u16::from_be_bytes([output[34], output[35]]);
            assert_eq!(
                output,
                node.carries(world.config(), &packet, port),
                "{length} bytes to {:?}",
                node.endpoint
            );
        }
    });
}

/// After a change of configuration a template may still have DF set where the program is told to inherit it.
#[test]
fn inherited_df_over_a_template_that_sets_it() {
    rig::inside(|ports| {
        let mut world = World::new(ports);
        let flags = &mut world.tables.config.overlays[0].flags;
        *flags = flags.with(OverlayFlags::DF_INHERIT);
        let packet = Ip { dont_fragment: true, ..Ip::udp(CLIENT, pod(TAGGED), (1, 2), b"data") };
        let case = Case::encap("encap-df-twice", &world, TAGGED, world.client_link(), &packet);
        check_all(&Subject::load(&world.tables), &[case]);
    });
}

/// What an interface may do comes from its roles; the tables are the same.
#[test]
fn roles_decide() {
    rig::inside(|ports| {
        let world = World::new(ports);
        let client = world.client_link().ip(&ping());
        let node = FromNode::new(&world, PLAIN, &answer(PLAIN, CLIENT)).bytes();
        let plain = world.underlay_link().ip(&answer(DIRECT, CLIENT));
        let arp = Arp::request(rig::CLIENT_MAC, CLIENT, pod(PLAIN)).bytes();
        let arp = Link::new(Mac::BROADCAST, rig::CLIENT_MAC).frame(ARP, &arp);
        let expectations = [
            (Roles::NONE, [Outcome::NoRole; 4]),
            (
                Roles::EXTERNAL,
                [Outcome::Encap, Outcome::TunnelPortExternal, Outcome::NoRoute, Outcome::ArpReply],
            ),
            (Roles::UNDERLAY, [Outcome::NoRoute, Outcome::Decap, Outcome::DirectIn, Outcome::ArpOther]),
            (Roles::BOTH, [Outcome::Encap, Outcome::Decap, Outcome::DirectIn, Outcome::ArpReply]),
        ];
        for (roles, outcomes) in expectations {
            let mut tables = world.tables.clone();
            tables.config.roles = roles;
            let subject = Subject::load(&tables);
            for (frame, outcome) in [&client, &node, &plain, &arp].into_iter().zip(outcomes) {
                let before = subject.counters();
                subject.run(frame);
                let counted = &subject.counters() - &before;
                let once = Counters([(outcome.number(), (1, frame.len() as u64))].into());
                assert_eq!(counted, once, "{roles:?}: {outcome:?} is expected");
            }
        }
    });
}

/// An interface that does not forward: the kernel is asked, refuses, and gets the frame.
#[test]
fn forwarding_switched_off() {
    rig::inside(|ports| {
        let mut world = World::new(ports);
        world.tables.config.ifindex = ports.still.index;
        let frame = FromNode::new(&world, PLAIN, &answer(PLAIN, CLIENT)).bytes();
        check_all(&Subject::load(&world.tables), &[Case::pass("forwarding-off", Outcome::OutRefused, frame)]);
    });
}

fn ping() -> Ip {
    Ip { id: 1, ..Ip::echo(CLIENT, pod(PLAIN), 0x1234, b"gw-probe") }
}

fn vectors(world: &World) -> Vec<Case> {
    let with_port = |at: usize, frame: Vec<u8>| {
        move |port: u16| [&frame[..at], &port.to_be_bytes(), &frame[at + 2..]].concat()
    };
    let vector = hex(VECTOR);
    let encap = Case::to_node(
        "vector-encap",
        world,
        Outcome::Encap,
        &world.nodes[&PLAIN],
        world.client_link().ip(&ping()),
        with_port(34, vector),
    );
    let cilium = &world.nodes[&CILIUM];
    let tunnel = FromNode::new(world, CILIUM, &ping());
    let udp = |payload: &[u8]| [&tunnel.datagram()[..8], payload].concat();
    let mut request = udp(&hex(ARP_REQUEST));
    let length = u16::try_from(request.len()).unwrap();
    request[4..6].copy_from_slice(&length.to_be_bytes());
    let mut answer = request.clone();
    answer[8..].copy_from_slice(&hex(ARP_ANSWER));
    let answer =
        cilium.link.ip(&Ip { payload: answer, ..Ip::new(rig::UNDERLAY, cilium.endpoint, 17, Vec::new()) });
    let arp = Case::to_node(
        "vector-arp",
        world,
        Outcome::ArpReplyTunnel,
        cilium,
        tunnel.link.ip(&Ip { payload: request, ..tunnel.outer.clone() }),
        with_port(34, answer),
    );
    vec![encap, arp]
}

fn encap(world: &World) -> Vec<Case> {
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
fn refused_clients(world: &World) -> Vec<Case> {
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
fn direct(world: &World) -> Vec<Case> {
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

fn answer(id: u32, to: Address) -> Ip {
    Ip::udp(pod(id), to, (80, 40_000), &[0x3c; 120])
}

fn decap(world: &World) -> Vec<Case> {
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

fn refused_tunnels(world: &World) -> Vec<Case> {
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
fn outward(world: &World) -> Vec<Case> {
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

/// The proxy on the outside: RFC 826, and RFC 5227 for probes and announcements.
fn arp(world: &World) -> Vec<Case> {
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

fn tunnel_arp(world: &World) -> Vec<Case> {
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

/// Frames whose link layer decides.
fn links(world: &World) -> Vec<Case> {
    let link = world.client_link();
    let ip = ping();
    let service_tag = link.frame(0x88a8, &[&[0, 100, 8, 0], ip.bytes().as_slice()].concat());
    let two_tags = link.tagged(VLAN_BOTH).frame(0x8100, &[&[0, 5, 8, 0], ip.bytes().as_slice()].concat());
    let other_host = Link::new(Mac::new([0x52, 0x54, 0, 0, 0, 0x55]), rig::CLIENT_MAC);
    vec![
        Case::pass("vlan-without-role", Outcome::NoRole, link.tagged(VLAN_IDLE).ip(&ip)),
        Case::pass("vlan-unknown", Outcome::NoRole, link.tagged(999).ip(&ip)),
        Case::pass("vlan-4095", Outcome::NoRole, link.tagged(4095).ip(&ip)),
        Case::pass("ipv6", Outcome::NotIp, link.frame(IPV6, &[0x60; 40])),
        Case::pass("service-tag", Outcome::NotIp, service_tag),
        Case::pass("two-tags", Outcome::NotIp, two_tags),
        Case::pass("tag-truncated", Outcome::NotIp, link.frame(0x8100, &[0, 100, 8])),
        Case::pass("llc", Outcome::NotIp, link.frame(0x0026, &[0x42; 38])),
        Case::pass("other-host", Outcome::NotForUs, other_host.ip(&ip)),
        Case::pass("broadcast", Outcome::NotForUs, Link::new(Mac::BROADCAST, rig::CLIENT_MAC).ip(&ip)),
        Case::pass("other-host-malformed", Outcome::NotForUs, other_host.frame(IPV4, &[0; 3])),
    ]
}

/// Frames that the kernel must get because the program cannot or may not handle them.
fn kernels(world: &World) -> Vec<Case> {
    let link = world.underlay_link();
    let plain = FromNode::new(world, PLAIN, &answer(PLAIN, CLIENT));
    let mut no_headroom = Case::pass("no-headroom", Outcome::NoHeadroom, world.client_link().ip(&ping()));
    no_headroom.metadata = 200;
    vec![
        no_headroom,
        // Its first fragment is dropped, so the kernel never completes it.
        Case::pass("outer-later-fragment", Outcome::NoRoute, plain.with(|p| p.outer.offset = 9).bytes()),
        Case::pass("other-udp-port", Outcome::NoRoute, plain.with(|p| p.port = 8473).bytes()),
        // Port 4789 is overlay 2's, which has another address.
        Case::drop("port-of-another-vtep", Outcome::TunnelAddress, plain.with(|p| p.port = 4789).bytes()),
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
