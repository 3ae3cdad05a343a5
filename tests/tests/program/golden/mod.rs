//! Frames written down beforehand: every outcome, every table of the RFCs, the vectors of VXLAN and ARP.

mod arp;
mod clients;
mod links;
mod nodes;
mod path_mtu;
mod snat;

use std::collections::BTreeSet;

use gateway_common::{
    abi::{Outcome, OverlayFlags, Roles},
    wire::Mac,
};

use crate::{
    case::{Case, FromNode, check_all},
    packet::{ARP, Address, Arp, Ip, Link, hex},
    rig::{self, CLIENT},
    subject::{Counters, Subject},
    world::{self, CILIUM, DIRECT, Node, PLAIN, TAGGED, World, pod},
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
const UNREACHABLE: &[(Outcome, &str)] =
    &[(Outcome::TooBigLimited, "takes more than a hundred frames in a tenth of a second: see path_mtu")];

fn cases(world: &World) -> Vec<Case> {
    let parts = [
        vectors,
        clients::encap,
        clients::refused_clients,
        clients::direct,
        nodes::decap,
        nodes::refused_tunnels,
        nodes::outward,
        arp::arp,
        arp::tunnel_arp,
        links::links,
        links::kernels,
        path_mtu::too_big,
        path_mtu::edges,
        path_mtu::segments,
        snat::packets,
        snat::errors,
        snat::refused_clients,
        snat::refused_pods,
    ];
    parts.into_iter().flat_map(|part| part(world)).collect()
}

#[test]
fn every_frame_ends_as_written() {
    rig::inside(|ports| {
        let world = World::new(ports);
        check_all(&Subject::load(&world.tables), &cases(&world));
        for (world, cases) in snat::exhausted(&world) {
            check_all(&Subject::load(&world.tables), &cases);
        }
    });
}

#[test]
fn every_outcome_has_a_case() {
    rig::inside(|ports| {
        let world = World::new(ports);
        let mut cases = cases(&world);
        cases.extend(snat::exhausted(&world).into_iter().flat_map(|(_, cases)| cases));
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
            (Roles::NONE, [Outcome::NoRole, Outcome::TunnelPortExternal, Outcome::NoRole, Outcome::NoRole]),
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

fn answer(id: u32, to: Address) -> Ip {
    Ip::udp(pod(id), to, (80, 40_000), &[0x3c; 120])
}
