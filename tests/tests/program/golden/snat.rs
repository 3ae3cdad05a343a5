//! Translated connections: their packets there and back, the errors about them, and what is refused.
//!
//! Each case has a client port of its own, because the sessions of the cases before are still there.

use std::collections::BTreeSet;

use etherparse::{
    Icmpv4Type,
    icmpv4::{DestUnreachableHeader, TimeExceededCode, TimestampMessage},
};
use gateway_common::{
    abi::{Forward, ForwardKey, LastHop, Outcome, Phase, Reverse, ReverseKey, State, map},
    wire::{Be16, Ipv4, Mac},
};

use crate::{
    case::{Case, FromNode, check_all},
    packet::{ACK, Address, FIN, Ip, Link, RST, SYN, UDP},
    rig::{self, CLIENT_MAC},
    subject::Subject,
    world::{
        self, ABSENT_PORT, AMONG_SNAT, CILIUM, DIRECT, DIRECT_TAGGED, DRAINED, FOREIGN, OTHER_PORT, OWN_PORT,
        PLAIN, POOL, POOLED, SNAT, SNAT_CILIUM, SNAT_TAGGED, STRANGER, TAGGED, TRUSTED, UNRESOLVED,
        VLAN_EXTERNAL, World, pod,
    },
};

/// A router between the clients and the gateway, and one in the cluster.
const ROUTER: Address = [203, 0, 113, 1];
const POD_ROUTER: Address = [10, 244, 1, 1];

fn client_side(world: &World) -> Link {
    Link::new(CLIENT_MAC, world.ports.own.mac)
}

/// `packet` of a client, which must leave for node `id` as `translated`.
fn there(
    name: impl Into<String>,
    world: &World,
    outcome: Outcome,
    id: u32,
    packet: &Ip,
    translated: &Ip,
) -> Case {
    let (node, config, inner) = (world.nodes[&id].clone(), *world.config(), translated.clone());
    Case::to_node(name, world, outcome, &node.clone(), world.client_link().ip(packet), move |port| {
        node.carries(&config, &inner, port)
    })
}

/// `packet` of a pod of node `id`, which must leave for the client as `translated`.
fn back(
    name: impl Into<String>,
    world: &World,
    outcome: Outcome,
    id: u32,
    packet: &Ip,
    translated: &Ip,
) -> Case {
    let input = FromNode::new(world, id, packet).bytes();
    Case::transmit(name, outcome, input, client_side(world).ip(&translated.hop()))
}

/// A connection: what its ends send, and how it must look on the other side.
struct Connection {
    name: &'static str,
    request: fn(Address, Address, u16, &[u8]) -> Ip,
    reply: fn(Address, Address, u16, &[u8]) -> Ip,
}

const CONNECTIONS: [Connection; 4] = [
    Connection {
        name: "udp",
        request: |client, pod, port, data| Ip::udp(client, pod, (port, 53), data),
        reply: |pod, client, port, data| Ip::udp(pod, client, (53, port), data),
    },
    Connection {
        name: "udp-without-checksum",
        request: |client, pod, port, data| unchecked(Ip::udp(client, pod, (port, 54), data)),
        reply: |pod, client, port, data| unchecked(Ip::udp(pod, client, (54, port), data)),
    },
    Connection {
        name: "tcp",
        request: |client, pod, port, data| Ip::segment(client, pod, (port, 80), SYN, (100, 0), data),
        reply: |pod, client, port, data| Ip::segment(pod, client, (80, port), SYN | ACK, (200, 101), data),
    },
    Connection {
        name: "echo",
        request: |client, pod, id, data| Ip::echo(client, pod, id, data),
        reply: |pod, client, id, data| Ip::echo_reply(pod, client, id, data),
    },
];

/// RFC 768: 0 stands for no checksum.
fn unchecked(mut packet: Ip) -> Ip {
    packet.payload[6..8].fill(0);
    packet
}

pub(super) fn packets(world: &World) -> Vec<Case> {
    let link = world.client_link();
    let mut cases = Vec::new();
    for (port, connection) in (5000..).zip(CONNECTIONS) {
        let name = |what: &str| format!("snat-{}-{what}", connection.name);
        let to = |address, data: &[u8]| (connection.request)(address, pod(PLAIN), port, data);
        let from = |address, data: &[u8]| (connection.reply)(pod(PLAIN), address, port, data);
        cases.extend([
            there(name("new"), world, Outcome::SnatNew, PLAIN, &to(FOREIGN, b"one"), &to(SNAT, b"one")),
            there(name("again"), world, Outcome::SnatForward, PLAIN, &to(FOREIGN, b""), &to(SNAT, b"")),
            back(
                name("reply"),
                world,
                Outcome::SnatReply,
                PLAIN,
                &from(SNAT, b"odd"),
                &from(FOREIGN, b"odd"),
            ),
            there(name("third"), world, Outcome::SnatForward, PLAIN, &to(FOREIGN, b"3"), &to(SNAT, b"3")),
        ]);
    }
    let udp = |client, id, port| Ip::udp(client, pod(id), (port, 53), b"question");
    let answer = |id, client, port| Ip::udp(pod(id), client, (53, port), b"answer");
    for (name, id, address, port) in
        [("destination-rule", TAGGED, SNAT_TAGGED, 5100), ("other-overlay", CILIUM, SNAT_CILIUM, 5101)]
    {
        cases.extend([
            there(
                format!("snat-{name}"),
                world,
                Outcome::SnatNew,
                id,
                &udp(FOREIGN, id, port),
                &udp(address, id, port),
            ),
            back(
                format!("snat-{name}-reply"),
                world,
                Outcome::SnatReply,
                id,
                &answer(id, address, port),
                &answer(id, FOREIGN, port),
            ),
        ]);
    }
    // Nodes that are reached without a tunnel.
    let direct = |id, port| {
        let out = world.nodes[&id].carries(world.config(), &udp(SNAT, id, port), 0);
        (link.ip(&udp(FOREIGN, id, port)), out)
    };
    let (input, output) = direct(DIRECT, 5200);
    cases.push(Case::transmit("snat-direct", Outcome::SnatNew, input, output));
    cases.push(Case::transmit(
        "snat-direct-reply",
        Outcome::SnatReply,
        world.underlay_link().ip(&answer(DIRECT, SNAT, 5200)),
        client_side(world).ip(&answer(DIRECT, FOREIGN, 5200).hop()),
    ));
    let (input, output) = direct(DIRECT_TAGGED, 5201);
    cases.push(Case::redirect("snat-direct-tagged", Outcome::SnatNew, input, output));
    // Rules that do not translate, clients without a rule.
    cases.push(Case::encap("snat-routed-by-rule", world, PLAIN, link, &udp(TRUSTED, PLAIN, 5300)));
    for (name, client, id) in [
        ("no-rule", STRANGER, PLAIN),
        ("no-rule-in-overlay", POOLED, CILIUM),
        ("no-rule-at-all", FOREIGN, OTHER_PORT),
    ] {
        cases.push(Case::drop(
            format!("snat-{name}"),
            Outcome::ClientForeign,
            link.ip(&udp(client, id, 5301)),
        ));
    }
    // The answer goes where the last packet came from.
    let moved = Link { source: Mac::new([0x52, 0x54, 0, 0, 0, 0xd7]), ..link };
    let (first, second) = (udp(FOREIGN, PLAIN, 5400), answer(PLAIN, SNAT, 5400));
    for (name, way) in [("tagged", link.tagged(VLAN_EXTERNAL)), ("moved", moved), ("untagged", link)] {
        let home = Link { destination: way.source, source: world.ports.own.mac, vlan: way.vlan };
        cases.push(
            Case::transmit(
                format!("snat-last-hop-{name}"),
                Outcome::SnatReply,
                FromNode::new(world, PLAIN, &second).bytes(),
                home.ip(&answer(PLAIN, FOREIGN, 5400).hop()),
            )
            .after([way.ip(&first)]),
        );
    }
    // A client's segment size is held to the path in both directions.
    let syn = |address, mss: u16| {
        let mut packet = Ip::syn(address, pod(PLAIN), &[[2, 4], mss.to_be_bytes()].concat());
        packet.id = 7;
        packet
    };
    cases.push(there("snat-mss", world, Outcome::SnatNew, PLAIN, &syn(FOREIGN, 1460), &syn(SNAT, 1410)));
    // Among the SNAT addresses, but a client of its own.
    cases.push(Case::pass(
        "snat-address-of-none",
        Outcome::OutLocal,
        FromNode::new(world, PLAIN, &answer(PLAIN, AMONG_SNAT, 5500)).bytes(),
    ));
    cases.push(Case::encap("snat-client-among-addresses", world, PLAIN, link, &udp(AMONG_SNAT, PLAIN, 5501)));
    cases.push(Case::pass(
        "snat-ttl",
        Outcome::TtlExpired,
        link.ip(&Ip { ttl: 1, ..udp(FOREIGN, PLAIN, 5502) }),
    ));
    cases
}

pub(super) fn errors(world: &World) -> Vec<Case> {
    let kinds = [
        ("port", Icmpv4Type::DestinationUnreachable(DestUnreachableHeader::Port)),
        (
            "too-big",
            Icmpv4Type::DestinationUnreachable(DestUnreachableHeader::FragmentationNeeded {
                next_hop_mtu: 1400,
            }),
        ),
        ("ttl", Icmpv4Type::TimeExceeded(TimeExceededCode::TtlExceededInTransit)),
    ];
    let mut cases = Vec::new();
    for (base, connection) in (6000..).step_by(10).zip(CONNECTIONS) {
        for (port, (kind_name, kind)) in (base..).zip(kinds.clone()) {
            let name = |what: &str| format!("snat-error-{}-{kind_name}-{what}", connection.name);
            let to = |address| (connection.request)(address, pod(PLAIN), port, b"request");
            let from = |address| (connection.reply)(pod(PLAIN), address, port, b"reply");
            let open = world.client_link().ip(&to(FOREIGN));
            // Routers quote the IP header and eight bytes; those that quote more are in the engine's own tests.
            for (who, reporter) in [("pod", pod(PLAIN)), ("router", POD_ROUTER)] {
                let seen = Ip::error(reporter, kind.clone(), &to(SNAT).hop(), 28);
                let told = Ip::error(reporter, kind.clone(), &to(FOREIGN).hop(), 28);
                cases.push(
                    back(name(&format!("by-{who}")), world, Outcome::SnatErrorReply, PLAIN, &seen, &told)
                        .after([open.clone()]),
                );
            }
            for (who, reporter, shown) in [("client", FOREIGN, SNAT), ("client-router", ROUTER, SNAT)] {
                let seen = Ip::error(reporter, kind.clone(), &from(FOREIGN).hop(), 28);
                let told = Ip::error(shown, kind.clone(), &from(SNAT).hop(), 28);
                cases.push(
                    there(name(&format!("by-{who}")), world, Outcome::SnatErrorForward, PLAIN, &seen, &told)
                        .after([open.clone()]),
                );
            }
        }
    }
    let quiet = Ip::udp(pod(PLAIN), FOREIGN, (53, 6900), b"");
    let port = Icmpv4Type::DestinationUnreachable(DestUnreachableHeader::Port);
    cases.push(Case::drop(
        "snat-error-of-client-unrelated",
        Outcome::SnatErrorUnrelated,
        world.client_link().ip(&Ip::error(FOREIGN, port.clone(), &quiet, 28)),
    ));
    // A pod of another node about somebody else's session.
    let (open, about) = [FOREIGN, SNAT].map(|source| Ip::udp(source, pod(PLAIN), (6902, 53), b"")).into();
    cases.push(
        Case::drop(
            "snat-error-of-another-node",
            Outcome::SnatReplySource,
            FromNode::new(world, TAGGED, &Ip::error(pod(TAGGED), port.clone(), &about.hop(), 28)).bytes(),
        )
        .after([world.client_link().ip(&open)]),
    );
    let quiet = Ip::udp(SNAT, pod(PLAIN), (6901, 53), b"");
    cases.push(Case::drop(
        "snat-error-of-pod-unrelated",
        Outcome::SnatErrorUnrelated,
        FromNode::new(world, PLAIN, &Ip::error(pod(PLAIN), port, &quiet, 28)).bytes(),
    ));
    cases
}

/// Packets of clients that cannot be translated.
pub(super) fn refused_clients(world: &World) -> Vec<Case> {
    let link = world.client_link();
    let udp = |id, port| Ip::udp(FOREIGN, pod(id), (port, 53), b"question");
    let drop =
        |name: &str, outcome, packet: &Ip| Case::drop(format!("snat-{name}"), outcome, link.ip(packet));
    let other = |protocol| Ip::new(FOREIGN, pod(PLAIN), protocol, vec![0x42; 40]);
    let timestamp = Icmpv4Type::TimestampRequest(TimestampMessage {
        id: 1,
        seq: 1,
        originate_timestamp: 0,
        receive_timestamp: 0,
        transmit_timestamp: 0,
    });
    let large = Ip::udp(FOREIGN, pod(PLAIN), (7000, 53), &[0x6d; 1423]);
    let mut cases = vec![
        drop("sctp", Outcome::SnatProtocol, &other(132)),
        drop("esp", Outcome::SnatProtocol, &other(50)),
        drop("gre", Outcome::SnatProtocol, &other(47)),
        drop("timestamp", Outcome::SnatProtocol, &Ip::error_to(pod(PLAIN), FOREIGN, timestamp, &[])),
        drop("client-echo-reply", Outcome::SnatProtocol, &Ip::echo_reply(FOREIGN, pod(PLAIN), 7, b"")),
        drop("first-fragment", Outcome::SnatFragment, &Ip { more_fragments: true, ..udp(PLAIN, 7001) }),
        drop("later-fragment", Outcome::SnatFragment, &Ip { offset: 185, ..udp(PLAIN, 7002) }),
        drop("short-udp", Outcome::SnatMalformed, &Ip::new(FOREIGN, pod(PLAIN), UDP, vec![0; 7])),
        drop("options", Outcome::SnatOptions, &Ip { options: vec![0x94, 4, 0, 0], ..udp(PLAIN, 7003) }),
        drop("oversize", Outcome::SnatOversize, &large),
        drop(
            "reset-of-none",
            Outcome::SnatNoSession,
            &Ip::segment(FOREIGN, pod(PLAIN), (7004, 80), RST, (1, 0), b""),
        ),
        drop(
            "pod-of-no-node",
            Outcome::SnatPodGone,
            &Ip { destination: world::POD_OF_NOWHERE, ..udp(PLAIN, 7005) },
        ),
        drop("unresolved", Outcome::VtepUnresolved, &udp(UNRESOLVED, 7006)),
        Case::transmit(
            "snat-too-big",
            Outcome::TooBigReply,
            link.ip(&Ip { dont_fragment: true, ..large.clone() }),
            client_side(world).ip(&Ip::too_big(rig::GATEWAY, &Ip { dont_fragment: true, ..large }, 1450)),
        ),
        drop("of-a-snat-address", Outcome::SnatSource, &Ip { source: SNAT, ..udp(PLAIN, 7009) }),
        drop("of-a-drained-address", Outcome::SnatSource, &Ip { source: DRAINED, ..udp(PLAIN, 7009) }),
        Case::drop(
            "snat-of-a-group",
            Outcome::SnatSource,
            Link { source: Mac::BROADCAST, ..link }.ip(&udp(PLAIN, 7010)),
        ),
        // Not to a pod: none of the rules' business.
        Case::pass(
            "snat-no-pod",
            Outcome::NoRoute,
            link.ip(&Ip { destination: [203, 0, 113, 9], ..other(132) }),
        ),
        // A rule that does not translate lets everything through.
        Case::encap("snat-routed-sctp", world, PLAIN, link, &Ip { source: TRUSTED, ..other(132) }),
    ];
    let zeros = Ip::udp(FOREIGN, pod(PLAIN), (7007, 53), &[0; 200]);
    cases.push(drop("no-headroom", Outcome::ResizeFailed, &zeros).cramped());
    // The table lost the other half of the session, as when it is copied; the client sends again, to a new session.
    let packet = udp(PLAIN, 7008);
    let gone = ReverseKey {
        pod: Ipv4::new(pod(PLAIN)),
        address: Ipv4::new(SNAT),
        pod_port: Be16::new(53),
        port: Be16::new(7008),
        protocol: UDP.into(),
        overlay: 0,
    };
    cases.push(drop("half-a-session", Outcome::SnatRace, &packet).after([link.ip(&packet)]).once(
        move |subject| {
            subject.table::<ReverseKey, Reverse>(map::REVERSE).delete(&[gone]).unwrap();
        },
    ));
    cases
}

/// Packets of pods to SNAT addresses that go no further.
pub(super) fn refused_pods(world: &World) -> Vec<Case> {
    let from = |id, packet: &Ip| FromNode::new(world, id, packet).bytes();
    let answer = |port| Ip::udp(pod(PLAIN), SNAT, (53, port), b"answer");
    let open = |port| world.client_link().ip(&Ip::udp(FOREIGN, pod(PLAIN), (port, 53), b"question"));
    let drop = |name: &str, outcome, packet: &Ip| {
        Case::drop(format!("snat-pod-{name}"), outcome, from(PLAIN, packet))
    };
    let other = |protocol| Ip::new(pod(PLAIN), SNAT, protocol, vec![0x42; 40]);
    let large = Ip::udp(pod(PLAIN), SNAT, (53, 8003), &[0x6d; 1473]);
    // With DF the pod gets the error, from the address that it sent to.
    let set = Ip { dont_fragment: true, ..Ip::udp(pod(PLAIN), SNAT, (53, 8006), &[0x6d; 1473]) };
    let error = Ip { ttl: 65, ..Ip::too_big(SNAT, &set, 1500) };
    let (node, config) = (world.nodes[&PLAIN].clone(), *world.config());
    let too_large = Case::to_node(
        "snat-pod-too-big",
        world,
        Outcome::SnatTooBigReply,
        &node.clone(),
        from(PLAIN, &set),
        move |port| node.carries(&config, &error, port),
    )
    .after([open(8006)]);
    let direct = Ip { dont_fragment: true, ..Ip::udp(pod(DIRECT), SNAT, (53, 8007), &[0x6d; 1473]) };
    let opened = ReverseKey {
        pod: Ipv4::new(pod(PLAIN)),
        address: Ipv4::new(SNAT),
        pod_port: Be16::new(53),
        port: Be16::new(8004),
        protocol: UDP.into(),
        overlay: 0,
    };
    vec![
        drop("begins", Outcome::SnatNoSession, &answer(8000)),
        drop("to-a-drained-address", Outcome::SnatNoSession, &Ip { destination: DRAINED, ..answer(8000) }),
        drop("sctp", Outcome::SnatProtocol, &other(132)),
        drop("echo-request", Outcome::SnatProtocol, &Ip::echo(pod(PLAIN), SNAT, 7, b"")),
        drop("first-fragment", Outcome::SnatFragment, &Ip { more_fragments: true, ..answer(8000) }),
        drop("later-fragment", Outcome::SnatFragment, &Ip { offset: 8, ..answer(8000) }),
        drop("options", Outcome::SnatOptions, &Ip { options: vec![1; 4], ..answer(8000) }),
        drop("short-tcp", Outcome::SnatMalformed, &Ip::new(pod(PLAIN), SNAT, 6, vec![0; 19])),
        Case::drop("snat-pod-of-another-node", Outcome::SnatReplySource, from(TAGGED, &answer(8001)))
            .after([open(8001)]),
        Case::drop("snat-pod-behind-nobody", Outcome::OuterSource, {
            FromNode::new(world, PLAIN, &answer(8001)).from([172, 16, 2, 77]).bytes()
        }),
        drop("oversize", Outcome::SnatReplyOversize, &large).after([open(8003)]),
        too_large,
        Case::transmit(
            "snat-pod-too-big-direct",
            Outcome::SnatTooBigReply,
            world.underlay_link().ip(&direct),
            world.nodes[&DIRECT].link.ip(&Ip::too_big(SNAT, &direct, 1500)),
        )
        .after([world.client_link().ip(&Ip::udp(FOREIGN, pod(DIRECT), (8007, 53), b"question"))]),
        drop("port-is-absent", Outcome::SnatNoPort, &answer(8004)).after([open(8004)]).once(move |subject| {
            let table = subject.table::<ReverseKey, Reverse>(map::REVERSE);
            let mut entry = table.lookup(&opened).unwrap().expect("the session is there");
            assert_eq!(entry.last_hop, LastHop::new(CLIENT_MAC, OWN_PORT, 0));
            entry.last_hop = LastHop::new(CLIENT_MAC, ABSENT_PORT, 0);
            table.replace(&opened, &entry).unwrap();
        }),
        Case::pass("snat-pod-ttl", Outcome::OutTtlExpired, from(PLAIN, &Ip { ttl: 1, ..answer(8005) }))
            .after([open(8005)]),
    ]
}

/// Worlds without room: in the table, and among the ports.
pub(super) fn exhausted(world: &World) -> Vec<(World, Vec<Case>)> {
    let client = |last: u8| [198, 51, 100, last];
    let request = |last, port| Ip::udp(client(last), pod(PLAIN), (port, 53), b"q");
    let link = world.client_link();
    let slots: u8 = 8;
    let small = world.with(|world| world.tables.config.session_slots = slots.into());
    let established: Vec<Vec<u8>> = (0..slots)
        .flat_map(|last| {
            let port = 9000 + u16::from(last);
            let reply = FromNode::new(world, PLAIN, &Ip::udp(pod(PLAIN), SNAT, (53, port), b"a")).bytes();
            [link.ip(&request(last, port)), reply, link.ip(&request(last, port))]
        })
        .collect();
    let full = Case::drop("snat-table-full", Outcome::SnatTableFull, link.ip(&request(20, 9100)))
        .once(move |subject| established.iter().for_each(|frame| drop(subject.run(frame))));

    let many = world.with(|world| {
        world.tables.config.session_slots = 1 << 17;
        world.tables.sessions.capacity = Some(1 << 17);
    });
    let none_left =
        Case::drop("snat-ports-exhausted", Outcome::SnatPortsExhausted, link.ip(&request(21, 9200))).once(
            |subject| {
                let now = gateway::dataplane::sessions::now();
                let taken: Vec<(ReverseKey, Reverse)> =
                    (0..=u16::MAX).map(|port| established_on(port, now)).collect();
                subject.table(map::REVERSE).update(&taken).unwrap();
            },
        );
    // Towards another port of the pod all of them are free.
    let elsewhere = |address| Ip::udp(address, pod(PLAIN), (9200, 54), b"q");
    let free = there(
        "snat-ports-elsewhere",
        &many,
        Outcome::SnatNew,
        PLAIN,
        &elsewhere(client(21)),
        &elsewhere(SNAT),
    );
    vec![(small, vec![full]), (many, vec![none_left, free])]
}

/// An established session of somebody else on this port of the SNAT address.
fn established_on(port: u16, now: u32) -> (ReverseKey, Reverse) {
    let key = ReverseKey {
        pod: Ipv4::new(pod(PLAIN)),
        address: Ipv4::new(SNAT),
        pod_port: Be16::new(53),
        port: Be16::new(port),
        protocol: UDP.into(),
        overlay: 0,
    };
    let value = Reverse {
        state: State::new(Phase::Live),
        tag: key.tag(),
        seen: now,
        created: now,
        client: Ipv4::new(FOREIGN),
        client_port: Be16::new(port),
        destination: key.pod,
        destination_port: key.pod_port,
        protocol: key.protocol,
        ..Reverse::default()
    };
    (key, value)
}

/// Where a client's packet seems to come from, on its way to node `PLAIN`.
fn seen_as(subject: &Subject, world: &World, packet: &Ip) -> (Address, u16) {
    let (_, output) = subject.run(&world.client_link().ip(packet));
    let inner = output.get(64..).unwrap_or_else(|| panic!("a frame of {} bytes was not sent", output.len()));
    (inner[12..16].try_into().unwrap(), u16::from_be_bytes([inner[20], inner[21]]))
}

/// RFC 4787 REQ-2: a client has one address for all its connections; the pool is used evenly.
#[test]
fn clients_are_spread_over_the_pool() {
    rig::inside(|ports| {
        let world = World::new(ports);
        let subject = Subject::load(&world.tables);
        let mut clients = [0; POOL.len()];
        for last in 64..128 {
            let client = [198, 51, 100, last];
            let addresses: BTreeSet<Address> = [(1, 53), (2, 53), (1, 54), (60_000, 443)]
                .map(|ports| seen_as(&subject, &world, &Ip::udp(client, pod(PLAIN), ports, b"")).0)
                .into();
            let [address] = addresses.iter().copied().collect::<Vec<_>>()[..] else {
                panic!("{client:?} has {addresses:?}")
            };
            clients[POOL.iter().position(|pooled| *pooled == address).expect("of the pool")] += 1;
        }
        assert!(clients.iter().all(|&number| number > 10), "64 clients are spread as {clients:?}");
    });
}

/// Who comes second gets another port, and its answers.
#[test]
fn ports_that_are_taken() {
    rig::inside(|ports| {
        let world = World::new(ports);
        let subject = Subject::load(&world.tables);
        let mut given = BTreeSet::new();
        for last in 0..32 {
            let client = [198, 51, 100, last];
            let syn = |source, port| Ip::segment(source, pod(PLAIN), (port, 80), SYN, (1, 0), b"");
            let (address, port) = seen_as(&subject, &world, &syn(client, 40_000));
            assert_eq!(address, SNAT);
            assert!(port >= 1024 && given.insert(port), "{client:?} got port {port}, as somebody else");
            assert_eq!(last == 0, port == 40_000, "the first client keeps its port");
            let reply = |to, port| Ip::segment(pod(PLAIN), to, (80, port), SYN | ACK, (2, 2), b"");
            check_all(
                &subject,
                &[
                    back(
                        format!("snat-port-{last}"),
                        &world,
                        Outcome::SnatReply,
                        PLAIN,
                        &reply(SNAT, port),
                        &reply(client, 40_000),
                    ),
                    there(
                        format!("snat-port-{last}-again"),
                        &world,
                        Outcome::SnatForward,
                        PLAIN,
                        &syn(client, 40_000),
                        &syn(SNAT, port),
                    ),
                ],
            );
        }
    });
}

/// Sums of the transport header through all their values, with and without a change of port: RFC 1624 is about the values
/// where careless updates go wrong, RFC 768 about a sum of 0.
#[test]
fn transport_checksums_are_right_for_every_value() {
    rig::inside(|ports| {
        let world = World::new(ports);
        let subject = Subject::load(&world.tables);
        let link = world.client_link();
        let first = Ip::udp([198, 51, 100, 1], pod(DIRECT), (4000, 53), b"");
        subject.run(&link.ip(&first));
        for client in [[198, 51, 100, 1], FOREIGN] {
            let request =
                |source, port, word: u16| Ip::udp(source, pod(DIRECT), (port, 53), &word.to_be_bytes());
            let (_, output) = subject.run(&link.ip(&request(client, 4000, 0)));
            let port = u16::from_be_bytes([output[34], output[35]]);
            assert_eq!(port == 4000, client != FOREIGN);
            for word in 0..=u16::MAX {
                let (_, output) = subject.run(&link.ip(&request(client, 4000, word)));
                let expected = world.nodes[&DIRECT].link.ip(&request(SNAT, port, word).hop());
                assert_eq!(output, expected, "to the pod, data {word:#x}");
                let reply = |to, port| Ip::udp(pod(DIRECT), to, (53, port), &word.to_be_bytes());
                let (_, output) = subject.run(&world.underlay_link().ip(&reply(SNAT, port)));
                assert_eq!(
                    output,
                    client_side(&world).ip(&reply(client, 4000).hop()),
                    "back, data {word:#x}"
                );
            }
        }
    });
}

/// What a session keeps, as the program leaves it after a handshake.
#[test]
fn both_halves_of_a_session() {
    rig::inside(|ports| {
        let world = World::new(ports);
        let subject = Subject::load(&world.tables);
        let link = world.client_link();
        let to = |flags, numbers| Ip::segment(FOREIGN, pod(PLAIN), (41_000, 80), flags, numbers, b"");
        let from = |flags, numbers| {
            FromNode::new(&world, PLAIN, &Ip::segment(pod(PLAIN), SNAT, (80, 41_000), flags, numbers, b""))
                .bytes()
        };
        subject.run(&link.ip(&to(SYN, (100, 0))));
        let forward = subject.table::<ForwardKey, Forward>(map::FORWARD);
        let reverse = subject.table::<ReverseKey, Reverse>(map::REVERSE);
        let half = || {
            let [(key, value)] = reverse.read().unwrap()[..] else { panic!("there is one session") };
            (key, value)
        };
        assert_eq!(half().1.state.phase(), Phase::Opening);
        subject.run(&from(SYN | ACK, (200, 101)));
        // Not the number that the pod waits for: somebody guesses.
        subject.run(&link.ip(&to(ACK, (101, 202))));
        assert_eq!(half().1.state.phase(), Phase::Opening);
        subject.run(&link.ip(&to(ACK, (101, 201))));
        let (key, value) = half();
        assert_eq!(value.state.phase(), Phase::Live);
        let [(forward_key, entry)] = forward.read().unwrap()[..] else { panic!("there is one session") };
        assert_eq!(value.forward_key(&key), forward_key);
        assert_eq!(entry.reverse_key(&forward_key), key);
        assert_eq!((entry.tag, value.tag), (forward_key.tag(), key.tag()));
        assert_eq!(entry.last_hop, LastHop::new(CLIENT_MAC, OWN_PORT, 0));
        assert_eq!(entry.last_hop, value.last_hop);
        assert_eq!((entry.source, entry.source_port), (Ipv4::new(SNAT), Be16::new(41_000)));
        assert_eq!((entry.vtep, value.vtep, entry.confirmed), (PLAIN, PLAIN, 1));
        subject.run(&link.ip(&to(FIN | ACK, (101, 201))));
        subject.run(&from(FIN | ACK, (201, 102)));
        assert!(half().1.state.all(State::FIN_CLIENT | State::FIN_POD));
    });
}
