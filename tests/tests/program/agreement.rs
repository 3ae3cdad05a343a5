//! Program and host engine on the same random frames: they must agree (see [`Mirror`]). The frames are such that every
//! way through the engine is taken that takes one frame; [`sequences`](crate::sequences) has those that take more.
//!
//! Environment: `GATEWAY_TEST_FULL` for twenty times as many frames, `GATEWAY_TEST_SEED` to repeat a run.

use std::{
    collections::{BTreeMap, BTreeSet},
    env,
    hash::{BuildHasher as _, RandomState},
    time::Instant,
};

use gateway_common::{
    abi::{Class, MAX_VLANS, Outcome, OverlayFlags, Roles},
    wire::Mac,
};
use rand::{Rng, RngExt as _, SeedableRng as _, rngs::SmallRng, seq::IndexedRandom as _};

use crate::{
    case::FromNode,
    evidence,
    mirror::Mirror,
    packet::{ARP, Address, Arp, Ip, Link},
    rig,
    world::{
        self, CILIUM, DIRECT, DIRECT_TAGGED, OTHER_PORT, PLAIN, TAGGED, VLAN_BOTH, VLAN_EXTERNAL, VLAN_IDLE,
        VLAN_UNDERLAY, VNI_ZERO, World, pod,
    },
};

const FRAMES: u32 = 100_000;
/// The kernel's test run refuses less than an Ethernet header.
const SHORTEST: usize = 14;
/// Faults that are told before giving up.
const ENOUGH: usize = 5;

#[test]
fn program_and_host_engine_agree() {
    let seed = match env::var("GATEWAY_TEST_SEED") {
        Ok(text) => text.parse().expect("GATEWAY_TEST_SEED is a decimal number"),
        Err(_) => RandomState::new().hash_one(0),
    };
    let frames = match env::var("GATEWAY_TEST_FRAMES") {
        Ok(text) => text.parse().expect("GATEWAY_TEST_FRAMES is a decimal number"),
        Err(_) if env::var_os("GATEWAY_TEST_FULL").is_some() => 20 * FRAMES,
        Err(_) => FRAMES,
    };
    println!("GATEWAY_TEST_SEED={seed} repeats these {frames} frames");
    let start = Instant::now();
    let mut seen: BTreeMap<Outcome, u64> = BTreeMap::new();
    rig::inside(|ports| {
        let variants = variants(&World::new(ports));
        let mut random = SmallRng::seed_from_u64(seed);
        for (name, percent, world) in &variants {
            compare(name, world, frames / 100 * percent, &mut random, &mut seen);
        }
        let percents: u32 = variants.iter().map(|(_, percent, _)| percent).sum();
        assert_eq!(percents, 100);
    });
    println!("{frames} frames agree, in {:.1} s: {seen:?}", start.elapsed().as_secs_f64());
    // A generator that makes nothing but noise would prove nothing.
    let forwarded: u64 =
        seen.iter().filter(|(outcome, _)| class(**outcome) == Class::Forward).map(|(_, n)| n).sum();
    assert!(forwarded > u64::from(frames) / 6, "only {forwarded} of {frames} frames were forwarded");
    // What takes more than one frame of a connection is left to `sequences`.
    let missing: Vec<Outcome> = Outcome::TABLE
        .iter()
        .filter(|row| !row.label.starts_with("snat_") && !seen.contains_key(&row.outcome))
        .map(|row| row.outcome)
        .collect();
    assert!(missing.len() <= 4, "the random frames never ended in {missing:?}");
}

fn class(outcome: Outcome) -> Class {
    Outcome::by_number(outcome.number()).unwrap().class
}

/// The same tables under different constants, because the verifier removes other code for each; and percentages of the
/// frames. Where a role is missing, most frames just pass.
fn variants(world: &World) -> Vec<(&'static str, u32, World)> {
    let with = |change: fn(&mut World)| world.with(change);
    vec![
        ("one-armed", 50, world.clone()),
        ("routed", 10, with(|w| w.tables.config.snat_rule_count = 0)),
        ("underlay-only", 10, with(|w| w.tables.config.roles = Roles::UNDERLAY)),
        ("external-only", 10, with(|w| w.tables.config.roles = Roles::EXTERNAL)),
        (
            "one-overlay",
            10,
            with(|w| {
                w.tables.config.overlay_count = 1;
                w.tables.config.vlan_count = 0;
            }),
        ),
        (
            "all-vlans-no-checks",
            10,
            with(|w| {
                w.tables.config.vlan_count = u32::try_from(MAX_VLANS).unwrap();
                for overlay in &mut w.tables.config.overlays {
                    overlay.flags = OverlayFlags::DF_INHERIT;
                }
            }),
        ),
    ]
}

fn compare(name: &str, world: &World, frames: u32, random: &mut SmallRng, seen: &mut BTreeMap<Outcome, u64>) {
    let mut mirror = Mirror::new(world);
    let mut faults = Vec::new();
    for number in 0..frames {
        let frame = random_frame(world, random);
        match mirror.run(&frame) {
            Ok(outcome) => *seen.entry(outcome).or_default() += 1,
            Err(fault) => {
                let path = evidence::keep(&format!("disagreement-{name}-{number}"), &fault.frames());
                faults.push(format!("{name}, frame {number}: {}; {path}", fault.what));
            }
        }
        if faults.len() == ENOUGH {
            break;
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
    mirror.check_tables().unwrap_or_else(|what| panic!("{name}, after all frames: {what}"));
}

pub(crate) fn random_frame(world: &World, random: &mut SmallRng) -> Vec<u8> {
    let mut frame = match random.random_range(0..20) {
        0..6 => from_client(world, random),
        6..14 => from_node(world, random),
        14 => direct_return(world, random),
        15..17 => arp(world, random),
        17..19 => arp_in_tunnel(world, random),
        _ => noise(world, random),
    };
    if random.random_bool(0.3) {
        for _ in 0..random.random_range(1..4) {
            mutate(&mut frame, random);
        }
    }
    frame.resize(frame.len().max(SHORTEST), 0);
    frame
}

pub(crate) fn pick<T: Copy>(choices: &[T], random: &mut SmallRng) -> T {
    *choices.choose(random).expect("there is a choice")
}

const DESTINATIONS: [Address; 20] = [
    rig::CLIENT,
    rig::CLIENT,
    rig::CLIENT,
    rig::CLIENT,
    rig::CLIENT,
    rig::CLIENT_SAME_PORT,
    rig::CLIENT_SAME_PORT,
    rig::CLIENT_IN_VLAN,
    rig::CLIENT_IN_VLAN,
    rig::CLIENT_IN_VLAN,
    rig::UNRESOLVED,
    rig::BEHIND_FOREIGN,
    rig::BEHIND_TUNNEL,
    rig::BEHIND_INSIDE,
    rig::BLACKHOLE,
    rig::UNREACHABLE,
    rig::PROHIBITED,
    rig::FAR_AWAY,
    rig::GATEWAY,
    rig::UNDERLAY_OTHER,
];

/// Nodes in the VTEP table, good and bad ones.
const NODES: std::ops::RangeInclusive<u32> = 1..=10;

fn pod_address(random: &mut SmallRng) -> Address {
    if random.random_bool(0.1) {
        return pick(
            &[world::MOVED_POD, world::POD_OF_FREE, world::POD_OF_NOWHERE, world::POD_OF_BAD_HEADER],
            random,
        );
    }
    // Mostly nodes that work.
    let working = [PLAIN, TAGGED, DIRECT, DIRECT_TAGGED, CILIUM, OTHER_PORT, VNI_ZERO];
    let node = if random.random_bool(0.9) { pick(&working, random) } else { random.random_range(NODES) };
    let mut address = pod(node);
    if random.random_bool(0.3) {
        address[3] = random.random();
    }
    address
}

fn packet(source: Address, destination: Address, random: &mut SmallRng) -> Ip {
    let length = match random.random_range(0..20) {
        0 => random.random_range(1300..1600),
        // More than a page: the frame arrives in fragments.
        1 => random.random_range(3000..6000),
        _ => random.random_range(0..100),
    };
    let data = vec![0x77; length];
    let ports = (random.random(), pick(&[80, 443, 8472, 4789], random));
    let mut packet = match random.random_range(0..5) {
        0 => Ip::echo(source, destination, random.random(), &data),
        1 => Ip::tcp(source, destination, ports, &data),
        2 => Ip::syn(source, destination, &options(random)),
        3 => Ip::udp(source, destination, ports, &data),
        _ => Ip::new(source, destination, pick(&[0, 1, 2, 6, 17, 47, 132], random), data),
    };
    packet.ttl =
        if random.random_bool(0.9) { pick(&[64, 255, 128, 2], random) } else { pick(&[0, 1], random) };
    packet.tos = if random.random() { 0 } else { random.random() };
    packet.id = random.random();
    packet.dont_fragment = random.random();
    if random.random_bool(0.1) {
        packet.more_fragments = random.random();
        packet.offset = random.random_range(0..0x2000);
    }
    if random.random_bool(0.05) {
        packet.options = vec![1; 4 * random.random_range(1..=10)];
    }
    packet
}

/// TCP options that hold together, mostly.
fn options(random: &mut SmallRng) -> Vec<u8> {
    let mss: u16 = pick(&[0, 536, 1360, 1409, 1410, 1411, 1460, 8960, u16::MAX], random);
    let mut options: Vec<u8> = Vec::new();
    for _ in 0..random.random_range(0..5) {
        match random.random_range(0..6) {
            0 => options.push(1),
            1 => options.extend([3, 3, 7]),
            2 => options.extend([4, 2]),
            3 => options.extend(random.random::<[u8; 2]>()),
            _ => options.extend([[2, 4], mss.to_be_bytes()].concat()),
        }
    }
    options
}

fn tag(link: Link, random: &mut SmallRng) -> Link {
    match random.random_range(0..10) {
        0..8 => link,
        8 => link.tagged(pick(&[VLAN_BOTH, VLAN_EXTERNAL, VLAN_UNDERLAY], random)),
        _ => link.tagged(pick(&[0, 0, 0, VLAN_IDLE, 5], random)),
    }
}

fn link(world: &World, random: &mut SmallRng) -> Link {
    let mut link = tag(world.client_link(), random);
    if random.random_bool(0.05) {
        link.destination = pick(&[Mac::BROADCAST, Mac::new([1, 0, 0x5e, 0, 0, 1]), rig::CLIENT_MAC], random);
    }
    link
}

fn from_client(world: &World, random: &mut SmallRng) -> Vec<u8> {
    let mut destination = pod_address(random);
    // Who may talk to the pod: a client of its overlay's subnet.
    let mut source = match destination {
        [10, 1, ..] => [10, 0, 1, 5],
        [10, 60, ..] => [10, 61, 0, 5],
        [10, 70, ..] => [10, 71, 0, 5],
        _ => [10, 244, 30, random.random()],
    };
    if random.random_bool(0.1) {
        destination = random.random();
    }
    if random.random_bool(0.3) {
        source = pick(&[world::FOREIGN, world::POOLED, world::TRUSTED, world::STRANGER], random);
    }
    if random.random_bool(0.1) {
        source = random.random();
    }
    link(world, random).ip(&packet(source, destination, random))
}

fn tunnel(world: &World, random: &mut SmallRng) -> FromNode {
    let id = pick(&[PLAIN, PLAIN, TAGGED, DIRECT, CILIUM, OTHER_PORT, VNI_ZERO], random);
    let mut destination = pick(&DESTINATIONS, random);
    if random.random_bool(0.1) {
        destination = pick(&[world::SNAT, world::SNAT_CILIUM, world::DRAINED, world::AMONG_SNAT], random);
    }
    if random.random_bool(0.05) {
        destination = random.random();
    }
    let mut source = pod(id);
    if random.random_bool(0.1) {
        source = pod_address(random);
    }
    let inner = packet(source, destination, random);
    let mut from = FromNode::new(world, id, &inner);
    from.link = link(world, random);
    from.outer.ttl = random.random();
    from.outer.tos = if random.random() { 0 } else { random.random() };
    if random.random_bool(0.05) {
        from.outer.options = vec![1; 4 * random.random_range(1..=10)];
    }
    if random.random_bool(0.04) {
        from.outer.more_fragments = true;
    }
    if random.random_bool(0.04) {
        from.outer.destination = pick(&[rig::UNDERLAY_OTHER, rig::UNDERLAY_SECOND, rig::GATEWAY], random);
    }
    if random.random_bool(0.05) {
        from.outer.source = random.random();
    }
    if random.random_bool(0.1) {
        from.header[random.random_range(0..8)] ^= 1 << random.random_range(0..8);
    }
    if random.random_bool(0.05) {
        from.header[0] |= 0x80;
    }
    if random.random_bool(0.1) {
        let ours = from.inner_link.destination;
        let macs = [Mac::ZERO, Mac::BROADCAST, ours, from.inner_link.source, Mac::new([1, 0, 0x5e, 0, 0, 1])];
        from.inner_link = Link::new(pick(&macs, random), pick(&macs, random));
    }
    if random.random_bool(0.04) {
        from.inner.truncate(random.random_range(0..=from.inner.len()));
    }
    if random.random_bool(0.05) {
        from.kind = pick(&[0x86dd, 0x0806, 0x8100, 0x88a8, 0x8847, 0x0026], random);
    }
    from
}

fn from_node(world: &World, random: &mut SmallRng) -> Vec<u8> {
    tunnel(world, random).bytes()
}

fn direct_return(world: &World, random: &mut SmallRng) -> Vec<u8> {
    let source = if random.random_bool(0.8) { pod(DIRECT) } else { pod_address(random) };
    let destination = pick(&DESTINATIONS, random);
    link(world, random).ip(&packet(source, destination, random))
}

fn request(random: &mut SmallRng) -> Arp {
    let target = match random.random_range(0..4) {
        0 => pick(&DESTINATIONS, random),
        1 => pick(&[world::OVERLAY_ADDRESS, world::CILIUM_ADDRESS], random),
        _ => pod_address(random),
    };
    let mut arp = Arp::request(rig::CLIENT_MAC, rig::CLIENT, target);
    if random.random_bool(0.1) {
        arp.operation = random.random_range(0..5);
    }
    if random.random_bool(0.1) {
        arp.sender = pick(&[[0; 4], target], random);
    }
    if random.random_bool(0.05) {
        arp.sender_mac = pick(&[Mac::ZERO, Mac::BROADCAST], random);
    }
    arp
}

fn arp(world: &World, random: &mut SmallRng) -> Vec<u8> {
    let mut to = link(world, random);
    if random.random() {
        to.destination = Mac::BROADCAST;
    }
    let padding = vec![0; random.random_range(0..20)];
    to.frame(ARP, &[request(random).bytes(), padding].concat())
}

fn arp_in_tunnel(world: &World, random: &mut SmallRng) -> Vec<u8> {
    let mut from = tunnel(world, random);
    let mut arp = request(random);
    if random.random_bool(0.7) {
        arp.target = pick(&[world::OVERLAY_ADDRESS, world::CILIUM_ADDRESS], random);
    }
    from.kind = ARP;
    from.inner = arp.bytes();
    if random.random() {
        from.inner_link.destination = Mac::BROADCAST;
    }
    from.bytes()
}

/// Nothing that anybody would send, behind a good link header so that it is looked at.
fn noise(world: &World, random: &mut SmallRng) -> Vec<u8> {
    let mut bytes = vec![0; random.random_range(0..200)];
    random.fill_bytes(&mut bytes);
    let kind = pick(&[0x0800, 0x0806, 0x86dd, 0x8100, random.random()], random);
    link(world, random).frame(kind, &bytes)
}

/// Headers end before this offset, mostly.
const HEADERS: usize = 120;

pub(crate) fn mutate(frame: &mut Vec<u8>, random: &mut SmallRng) {
    if frame.is_empty() {
        return;
    }
    let at = random.random_range(0..frame.len().min(HEADERS));
    match random.random_range(0..8) {
        0 | 1 => frame[at] ^= 1 << random.random_range(0..8),
        2 => frame[at] = pick(&[0, 1, 0x45, 0x46, 0x4f, 0x7f, 0x80, 0xff, random.random()], random),
        // Length fields of both IP headers and of UDP, wherever the tag puts them.
        3 => {
            let field = pick(&[16, 20, 38, 42, 66, 70], random);
            if let Some(bytes) = frame.get_mut(field..field + 2) {
                let length: u16 = u16::from_be_bytes([bytes[0], bytes[1]]);
                let lie = pick(
                    &[0, 19, 20, length.wrapping_sub(1), length.wrapping_add(1), 0xffff, random.random()],
                    random,
                );
                bytes.copy_from_slice(&lie.to_be_bytes());
            }
        }
        4 => frame.truncate(random.random_range(0..=frame.len())),
        5 => frame.extend(vec![0xee; random.random_range(1..64)]),
        6 => {
            frame.splice(at..at, pick(&[[0x81, 0, 0, 100], [0x81, 0, 0, 0], [0x88, 0xa8, 0, 5]], random));
        }
        _ => {
            let end = (at + 4).min(frame.len());
            frame.drain(at..end);
        }
    }
}

/// Else a seed could not repeat a run.
#[test]
fn same_seed_same_frames() {
    rig::inside(|ports| {
        let world = World::new(ports);
        let frames = |seed| {
            let mut random = SmallRng::seed_from_u64(seed);
            (0..200).map(|_| random_frame(&world, &mut random)).collect::<BTreeSet<_>>()
        };
        assert_eq!(frames(1), frames(1));
        assert_ne!(frames(1), frames(2));
    });
}
