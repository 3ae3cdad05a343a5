//! Packets at the edge of what the path takes: ICMP errors to clients, and segment sizes in TCP handshakes.

use std::{
    thread,
    time::{Duration, Instant},
};

use gateway_common::abi::Outcome;
use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};

use crate::{
    case::{Case, FromNode},
    packet::{Address, Ip, Link},
    rig::{self, CLIENT, CLIENT_MAC},
    subject::{Returned, Subject},
    world::{DIRECT, OTHER_PORT, PLAIN, TAGGED, VLAN_EXTERNAL, World, pod},
};

/// MTU of the path to most nodes, to [`TAGGED`] and to [`DIRECT`].
const INNER: u16 = 1450;
const JUMBO: u16 = 8950;
const PLAIN_LINK: u16 = 1500;

/// A packet of `length` bytes that may not be fragmented.
fn packet(to: Address, length: u16) -> Ip {
    let data = vec![0x6d; usize::from(length) - 28];
    Ip { dont_fragment: true, ..Ip::udp(CLIENT, to, (40_000, 80), &data) }
}

/// The client gets the error from the gateway's address on its own link, back the way its packet came.
fn answered(name: impl Into<String>, world: &World, link: Link, packet: &Ip, mtu: u16) -> Case {
    let back = Link { destination: CLIENT_MAC, source: world.ports.own.mac, ..link };
    let error = Ip::too_big(rig::GATEWAY, packet, mtu);
    Case::transmit(name, Outcome::TooBigReply, link.ip(packet), back.ip(&error))
}

pub(super) fn too_big(world: &World) -> Vec<Case> {
    let link = world.client_link();
    let tagged = link.tagged(VLAN_EXTERNAL);
    let size = INNER + 1;
    let large = |packet: Ip| Ip { dont_fragment: true, ..packet };
    let body = [0x6d; 1500];
    let icmp = |kind: u8| large(Ip::new(CLIENT, pod(PLAIN), 1, [&[kind, 0, 0, 0], body.as_slice()].concat()));
    let mut cases = vec![
        answered("too-big", world, link, &packet(pod(PLAIN), size), INNER),
        answered("too-big-tagged", world, tagged, &packet(pod(PLAIN), size), INNER),
        answered("too-big-priority-tag", world, link.tagged(0), &packet(pod(PLAIN), size), INNER),
        answered("too-big-full-frame", world, link, &packet(pod(PLAIN), 1500), INNER),
        answered("too-big-jumbo", world, link, &packet(pod(PLAIN), 9000), INNER),
        answered("too-big-for-a-jumbo-path", world, link, &packet(pod(TAGGED), JUMBO + 1), JUMBO),
        answered("too-big-direct", world, link, &packet(pod(DIRECT), PLAIN_LINK + 1), PLAIN_LINK),
        answered("too-big-tcp", world, link, &large(Ip::tcp(CLIENT, pod(PLAIN), (1, 2), &body)), INNER),
        // RFC 1191 asks for nothing about the type of service or the identification: they come back in the quote.
        answered(
            "too-big-quote",
            world,
            link,
            &Ip { tos: 0xb9, id: 0xbeef, ..packet(pod(PLAIN), size) },
            INNER,
        ),
        answered(
            "too-big-first-fragment",
            world,
            link,
            &Ip { more_fragments: true, ..packet(pod(PLAIN), size) },
            INNER,
        ),
        // RFC 1122 section 3.2.2.
        Case::drop(
            "too-big-later-fragment",
            Outcome::TooBigSilent,
            link.ip(&Ip { offset: 1, ..packet(pod(PLAIN), size) }),
        ),
        // Whoever may fragment it may do so.
        Case::pass(
            "too-big-without-df",
            Outcome::Oversize,
            link.ip(&Ip { dont_fragment: false, ..packet(pod(PLAIN), size) }),
        ),
        Case::pass("too-big-ttl", Outcome::TtlExpired, link.ip(&Ip { ttl: 1, ..packet(pod(PLAIN), size) })),
    ];
    // RFC 1122 section 3.2.2: no error about an error; of the types that exist, queries and their answers are none.
    for (kind, error) in [
        (0, false),
        (3, true),
        (4, true),
        (5, true),
        (8, false),
        (11, true),
        (12, true),
        (13, false),
        (14, false),
    ] {
        let name = format!("too-big-icmp-{kind}");
        cases.push(if error {
            Case::drop(name, Outcome::TooBigSilent, link.ip(&icmp(kind)))
        } else {
            answered(name, world, link, &icmp(kind), INNER)
        });
    }
    let zeros = large(Ip::udp(CLIENT, pod(PLAIN), (40_000, 80), &[0; INNER as usize]));
    cases.push(Case::pass("too-big-no-headroom", Outcome::NoHeadroom, link.ip(&zeros)).cramped());
    cases
}

/// Every size around the MTU, and from the smallest packet on, in steps of one.
pub(super) fn edges(world: &World) -> Vec<Case> {
    let link = world.client_link();
    let mut cases = Vec::new();
    for size in (28..=100).chain(INNER - 20..=INNER) {
        cases.push(Case::encap(format!("edge-{size}"), world, PLAIN, link, &packet(pod(PLAIN), size)));
    }
    for size in INNER + 1..=INNER + 8 {
        cases.push(answered(format!("edge-{size}"), world, link, &packet(pod(PLAIN), size), INNER));
    }
    for size in JUMBO - 8..=JUMBO {
        cases.push(Case::encap(
            format!("edge-jumbo-{size}"),
            world,
            TAGGED,
            link,
            &packet(pod(TAGGED), size),
        ));
    }
    for size in JUMBO + 1..=JUMBO + 8 {
        cases.push(answered(format!("edge-jumbo-{size}"), world, link, &packet(pod(TAGGED), size), JUMBO));
    }
    cases
}

/// A SYN that announces 1460 bytes, with other options around, before and after the program.
fn syns(source: Address, destination: Address, limit: u16) -> Vec<(&'static str, Ip, Ip)> {
    let value = |mss: u16| [[2, 4], mss.to_be_bytes()].concat();
    // Options in front of the MSS and behind it.
    let around: [(&str, &[u8], &[u8]); 4] = [
        ("linux", &[], &[4, 2, 8, 10, 1, 2, 3, 4, 0, 0, 0, 0, 1, 3, 3, 7]),
        ("alone", &[], &[]),
        ("behind-odd", &[1], &[1, 1, 1]),
        ("behind-window-scale", &[1, 3, 3, 7], &[]),
    ];
    let packet = |options: &[u8]| Ip::syn(source, destination, options);
    let mut all: Vec<_> = around
        .into_iter()
        .map(|(name, front, back)| {
            let with = |mss| packet(&[front, &value(mss), back].concat());
            (name, with(1460), with(limit))
        })
        .collect();
    for (name, mss) in [("as-large-as-fits", limit), ("smaller", 536), ("zero", 0)] {
        all.push((name, packet(&value(mss)), packet(&value(mss))));
    }
    for (name, options) in [
        ("none", &[][..]),
        ("ended-before", &[0, 2, 4, 255, 255]),
        ("lying-size-0", &[3, 0, 2, 4, 255, 255]),
        ("lying-size-1", &[3, 1, 2, 4, 255, 255]),
        ("size-3", &[2, 3, 255, 255]),
    ] {
        all.push((name, packet(options), packet(options)));
    }
    all
}

/// SYNs are lowered to what the path to the pod takes, in both directions.
pub(super) fn segments(world: &World) -> Vec<Case> {
    let link = world.client_link();
    let mut cases = Vec::new();
    for (name, before, after) in syns(CLIENT, pod(PLAIN), INNER - 40) {
        let (node, config) = (world.nodes[&PLAIN].clone(), *world.config());
        cases.push(Case::to_node(
            format!("mss-out-{name}"),
            world,
            Outcome::Encap,
            &world.nodes[&PLAIN],
            link.ip(&before),
            move |port| node.carries(&config, &after, port),
        ));
    }
    for (name, before, after) in syns(pod(PLAIN), CLIENT, INNER - 40) {
        cases.push(Case::redirect(
            format!("mss-in-{name}"),
            Outcome::Decap,
            FromNode::new(world, PLAIN, &before).bytes(),
            world.to_client().ip(&after.hop()),
        ));
    }
    let full = [2, 4, 255, 255];
    let most = |from, to| Ip::syn(from, to, &[[2, 4], (PLAIN_LINK - 40).to_be_bytes()].concat());
    // Directly reached nodes have a path as well.
    cases.push(Case::transmit(
        "mss-direct-out",
        Outcome::RouteDirect,
        link.ip(&Ip::syn(CLIENT, pod(DIRECT), &full)),
        world.nodes[&DIRECT].carries(world.config(), &most(CLIENT, pod(DIRECT)), 0),
    ));
    cases.push(Case::redirect(
        "mss-direct-in",
        Outcome::DirectIn,
        world.underlay_link().ip(&Ip::syn(pod(DIRECT), CLIENT, &full)),
        world.to_client().ip(&most(pod(DIRECT), CLIENT).hop()),
    ));
    // Not switched on, no SYN, no beginning of a segment.
    let off = Ip::syn([10, 61, 0, 5], pod(OTHER_PORT), &full);
    cases.push(Case::encap("mss-off", world, OTHER_PORT, link, &off));
    let mut data = Ip::syn(CLIENT, pod(PLAIN), &full);
    data.payload[13] = 0x10;
    cases.push(Case::encap("mss-no-syn", world, PLAIN, link, &data));
    let fragment = Ip { more_fragments: true, ..Ip::syn(CLIENT, pod(PLAIN), &full) };
    cases.push(Case::encap("mss-fragment", world, PLAIN, link, &fragment));
    cases
}

/// RFC 1812 section 4.3.2.8: a flood of large packets gets a bounded number of errors, and others soon again.
#[test]
fn errors_are_limited() {
    /// As the program has them, for each CPU.
    const ALLOWANCE: usize = 100;
    const PERIOD: Duration = Duration::from_millis(100);
    rig::inside(|ports| {
        let world = World::new(ports);
        let subject = Subject::load(&world.tables);
        let mut cpu = CpuSet::new();
        cpu.set(0).unwrap();
        sched_setaffinity(Pid::from_raw(0), &cpu).unwrap();
        let frame = world.client_link().ip(&packet(pod(PLAIN), INNER + 1));
        // On a busy machine a round may take longer than the period.
        let round = || {
            thread::sleep(PERIOD + Duration::from_millis(20));
            let start = Instant::now();
            let returned: Vec<Returned> = (0..ALLOWANCE + 50).map(|_| subject.run(&frame).0).collect();
            (start.elapsed() < PERIOD / 2).then_some(returned)
        };
        for _ in 0..2 {
            let returned = (0..20).find_map(|_| round()).expect("no round was fast enough");
            let (within, beyond) = returned.split_at(ALLOWANCE);
            assert!(within.iter().all(|one| *one == Returned::Transmit), "{within:?}");
            assert!(beyond.iter().all(|one| *one == Returned::Drop), "{beyond:?}");
        }
        assert!(subject.counter(Outcome::TooBigLimited.number()).0 >= 100);
    });
}
