//! Random sequences of packets of connections, between which time passes, sessions are swept, pods move and vanish:
//! program and host engine must agree on every frame, and in the end hold the same sessions.
//!
//! Environment: `GATEWAY_TEST_FULL` for 100,000 sequences and more, `GATEWAY_TEST_SEED` to repeat a run.

use std::{
    collections::BTreeMap,
    env,
    hash::{BuildHasher as _, RandomState},
    time::Instant,
};

use etherparse::{
    Icmpv4Type,
    icmpv4::{DestUnreachableHeader, TimeExceededCode},
};
use gateway_common::{
    abi::{
        Class, LastHop, Outcome, Phase, Reverse, ReverseKey, Route, SWEEP_CAPACITY, SessionEvent, State,
        SweepMode, ticks,
    },
    checksum::Sum,
    wire::{Be16, Ipv4, Mac},
};
use rand::{RngExt as _, SeedableRng as _, rngs::SmallRng, seq::IteratorRandom as _};

use crate::{
    agreement::{mutate, pick},
    case::FromNode,
    evidence,
    mirror::Mirror,
    packet::{ACK, Address, FIN, ICMP, Ip, Link, RST, SYN, TCP, UDP},
    rig::{self, CLIENT},
    world::{
        self, CILIUM, DIRECT, DRAINED, PLAIN, POOLED, SNAT, STRANGER, TAGGED, TRUSTED, VLAN_EXTERNAL, World,
        key, pod,
    },
};

const SEQUENCES: u32 = 1_200;
const FULL: u32 = 120_000;

#[test]
fn program_and_host_engine_agree_on_sequences() {
    let seed = match env::var("GATEWAY_TEST_SEED") {
        Ok(text) => text.parse().expect("GATEWAY_TEST_SEED is a decimal number"),
        Err(_) => RandomState::new().hash_one(0),
    };
    let sequences = if env::var_os("GATEWAY_TEST_FULL").is_some() { FULL } else { SEQUENCES };
    println!("GATEWAY_TEST_SEED={seed} repeats these {sequences} sequences");
    let start = Instant::now();
    let mut seen = Seen::default();
    rig::inside(|ports| {
        let variants = variants(&World::new(ports));
        for (name, world) in &variants {
            let mut mirror = Mirror::new(world);
            for number in 0..sequences / u32::try_from(variants.len()).unwrap() {
                let random = SmallRng::seed_from_u64(seed ^ u64::from(number) << 32);
                let mut sequence = Sequence { world, mirror: &mut mirror, random, numbers: Vec::new() };
                if let Err(what) = sequence.run(&mut seen) {
                    panic!("{name}, sequence {number}: {what}");
                }
            }
            for (event, count) in mirror.subject.events() {
                *seen.events.entry(event).or_default() += count;
            }
        }
    });
    let Seen { frames, outcomes, events } = seen;
    println!(
        "{sequences} sequences of {frames} frames agree, in {:.1} s: {outcomes:?}, {events:?}",
        start.elapsed().as_secs_f64()
    );
    // A generator that makes nothing but noise would prove nothing.
    let forwarded: u64 = outcomes
        .iter()
        .filter(|(outcome, _)| Outcome::by_number(outcome.number()).unwrap().class == Class::Forward)
        .map(|(_, count)| count)
        .sum();
    assert!(forwarded > frames / 3, "only {forwarded} of {frames} frames were forwarded");
    let missing: Vec<Outcome> = Outcome::TABLE
        .iter()
        .filter(|row| row.label.starts_with("snat_") && !outcomes.contains_key(&row.outcome))
        .map(|row| row.outcome)
        .collect();
    assert!(missing.is_empty(), "no sequence ended in {missing:?}");
    for (event, name) in SessionEvent::ALL {
        assert!(events.contains_key(&event), "no session was {name}");
    }
}

/// What the sequences reached.
#[derive(Default)]
struct Seen {
    frames: u64,
    outcomes: BTreeMap<Outcome, u64>,
    events: BTreeMap<SessionEvent, u64>,
}

/// The same tables under different limits.
fn variants(world: &World) -> Vec<(&'static str, World)> {
    vec![
        ("room", world.clone()),
        ("few-slots", world.with(|w| w.tables.config.session_slots = 2)),
        (
            "table-smaller-than-slots",
            world.with(|w| {
                w.tables.config.session_slots = 24;
                w.tables.sessions.capacity = Some(6);
            }),
        ),
        (
            "one-overlay",
            world.with(|w| {
                w.tables.config.overlay_count = 1;
                w.tables.config.vlan_count = 0;
            }),
        ),
    ]
}

/// Pods that move: only the exact table knows them.
const NOMADS: [Address; 2] = [[10, 244, 99, 5], [10, 244, 99, 6]];
const CLIENTS: [Address; 5] =
    [world::FOREIGN, [198, 51, 100, 1], [198, 51, 100, 2], [198, 51, 100, 3], POOLED];
const OTHERS: [Address; 5] = [TRUSTED, STRANGER, CLIENT, [198, 51, 100, 71], SNAT];
const CLIENT_PORTS: [u16; 3] = [40_000, 40_001, 0];
const POD_PORTS: [u16; 2] = [80, 53];
/// A router between the gateway and its clients, and one in the cluster.
const ROUTER: Address = [203, 0, 113, 1];
const POD_ROUTER: Address = [10, 244, 1, 1];

/// What a client and a pod say, in an order in which they may say it.
const OF_CLIENT: [(u8, (u32, u32)); 8] = [
    (SYN, (100, 0)),
    (ACK, (101, 201)),
    (ACK, (101, 201)),
    (ACK, (105, 201)),
    (ACK, (101, 300)),
    (FIN | ACK, (105, 201)),
    (RST, (105, 0)),
    (SYN | ACK, (100, 201)),
];
const OF_POD: [(u8, (u32, u32)); 6] = [
    (SYN | ACK, (200, 101)),
    (SYN | ACK, (200, 101)),
    (ACK, (201, 105)),
    (FIN | ACK, (201, 105)),
    (RST | ACK, (201, 105)),
    (SYN, (200, 0)),
];

struct Sequence<'a> {
    world: &'a World,
    mirror: &'a mut Mirror,
    random: SmallRng,
    /// The outcomes so far, for the message of a fault.
    numbers: Vec<Outcome>,
}

impl Sequence<'_> {
    fn run(&mut self, seen: &mut Seen) -> Result<(), String> {
        self.mirror.clear();
        for nomad in NOMADS {
            self.mirror.set_pod(key(0, nomad), Some(Route::to(PLAIN)));
        }
        for _ in 0..self.random.random_range(10..60) {
            match self.random.random_range(0..100_u8) {
                0..46 => {
                    let frame = self.of_client();
                    self.frame(&frame, seen)?;
                }
                46..78 => {
                    let frame = self.of_pod();
                    self.frame(&frame, seen)?;
                }
                78..83 => {
                    let frame = self.error_of_pod();
                    self.frame(&frame, seen)?;
                }
                83..87 => {
                    let frame = self.error_of_client();
                    self.frame(&frame, seen)?;
                }
                87..92 => self.time_passes()?,
                92..95 => self.sweep()?,
                95..98 => self.pod_moves(),
                // Takes long.
                98 if self.random.random_bool(0.1) => self.crowd(seen)?,
                98.. => self.damage()?,
            }
        }
        self.mirror.check_tables().map(drop).map_err(|what| format!("after {:?}: {what}", self.numbers))
    }

    fn frame(&mut self, frame: &[u8], seen: &mut Seen) -> Result<(), String> {
        match self.mirror.run(frame) {
            Ok(outcome) => {
                seen.frames += 1;
                *seen.outcomes.entry(outcome).or_default() += 1;
                self.numbers.push(outcome);
                Ok(())
            }
            Err(fault) => {
                let path = evidence::keep("disagreement-in-sequence", &fault.frames());
                Err(format!("after {:?}: {}; {path}", self.numbers, fault.what))
            }
        }
    }

    fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        pick(choices, &mut self.random)
    }

    /// A frame as it is, mostly; else with an unusual packet or with bytes that are wrong.
    fn finish(&mut self, mut packet: Ip, wrap: impl FnOnce(&Ip) -> Vec<u8>) -> Vec<u8> {
        match self.random.random_range(0..40) {
            0 => packet.more_fragments = true,
            1 => packet.offset = 8,
            2 => packet.options = vec![1; 4],
            3 => packet.ttl = self.random.random_range(0..3),
            4 => packet.payload.truncate(self.random.random_range(0..9)),
            5 => packet.payload.extend([0; 1500]),
            6 => packet.tos = self.random.random(),
            7 => packet.protocol = self.pick(&[1, 6, 17, 132]),
            _ => {}
        }
        packet.dont_fragment = self.random.random();
        let mut frame = wrap(&packet);
        if self.random.random_bool(0.05) {
            mutate(&mut frame, &mut self.random);
            frame.resize(frame.len().max(14), 0);
        }
        frame
    }

    fn client_link(&mut self) -> Link {
        let link = self.world.client_link();
        match self.random.random_range(0..20) {
            0 => link.tagged(VLAN_EXTERNAL),
            1 => Link { source: Mac::new([0x52, 0x54, 0, 0, 0, 0xd7]), ..link },
            _ => link,
        }
    }

    fn data(&mut self) -> Vec<u8> {
        vec![0x3c; self.random.random_range(0..40)]
    }

    /// A packet of a client to a pod.
    fn connection(&mut self) -> Ip {
        let others = self.random.random_bool(0.1);
        let client = if others { self.pick(&OTHERS) } else { self.pick(&CLIENTS) };
        let pods =
            [pod(PLAIN), pod(PLAIN), pod(TAGGED), pod(DIRECT), pod(CILIUM), NOMADS[0], NOMADS[1], NOMADS[0]];
        let to = self.pick(&pods);
        let (port, pod_port) = (self.pick(&CLIENT_PORTS), self.pick(&POD_PORTS));
        let data = self.data();
        match self.random.random_range(0..10) {
            0..5 => {
                let (flags, numbers) = self.pick(&OF_CLIENT);
                Ip::segment(client, to, (port, pod_port), flags, numbers, &data)
            }
            5..8 => Ip::udp(client, to, (port, pod_port), &data),
            _ => Ip::echo(client, to, port, &data),
        }
    }

    fn of_client(&mut self) -> Vec<u8> {
        // Half of the time somebody who has a session goes on.
        let packet = match self.session() {
            Some((key, session)) if self.random.random() => {
                let (client, to) = (session.client.octets, session.destination.octets);
                let ports = (session.client_port.get(), session.destination_port.get());
                let data = self.data();
                match u8::try_from(key.protocol).unwrap() {
                    TCP => {
                        let (flags, numbers) = self.pick(&OF_CLIENT);
                        Ip::segment(client, to, ports, flags, numbers, &data)
                    }
                    UDP => Ip::udp(client, to, ports, &data),
                    _ => Ip::echo(client, to, ports.0, &data),
                }
            }
            _ => self.connection(),
        };
        let link = self.client_link();
        self.finish(packet, |packet| link.ip(packet))
    }

    /// A session of the model.
    fn session(&mut self) -> Option<(ReverseKey, Reverse)> {
        let sessions = self.mirror.tables.sessions.reverse.borrow();
        sessions.iter().choose(&mut self.random).map(|(&key, entry)| (key, entry.get()))
    }

    /// The node of a pod, or another one.
    fn node_of(&mut self, address: Address) -> u32 {
        if self.random.random_bool(0.05) {
            return self.pick(&[PLAIN, TAGGED, CILIUM]);
        }
        let route = self.mirror.tables.pods.get(&key(0, address)).map(|route| route.vtep);
        route.unwrap_or_else(|| {
            [PLAIN, TAGGED, DIRECT, CILIUM].into_iter().find(|&node| pod(node) == address).unwrap_or(PLAIN)
        })
    }

    /// What a pod sends from its node.
    fn node_sends(&mut self, address: Address, packet: Ip) -> Vec<u8> {
        let node = self.node_of(address);
        let world = self.world;
        self.finish(packet, |packet| match node {
            DIRECT => world.underlay_link().ip(packet),
            _ => FromNode::new(world, node, packet).bytes(),
        })
    }

    fn of_pod(&mut self) -> Vec<u8> {
        let data = self.data();
        let Some((key, _)) = self.session() else {
            let to = self.pick(&[SNAT, DRAINED, CLIENT]);
            return self.node_sends(pod(PLAIN), Ip::udp(pod(PLAIN), to, (53, 40_000), &data));
        };
        let packet = self.reply(&key, &data);
        self.node_sends(key.pod.octets, packet)
    }

    fn reply(&mut self, key: &ReverseKey, data: &[u8]) -> Ip {
        let (from, to) = (key.pod.octets, key.address.octets);
        let ports = (key.pod_port.get(), key.port.get());
        match u8::try_from(key.protocol).unwrap() {
            TCP => {
                let (flags, numbers) = self.pick(&OF_POD);
                Ip::segment(from, to, ports, flags, numbers, data)
            }
            UDP => Ip::udp(from, to, ports, data),
            _ => Ip::echo_reply(from, to, ports.1, data),
        }
    }

    fn kind(&mut self) -> Icmpv4Type {
        match self.random.random_range(0..4) {
            0 => Icmpv4Type::DestinationUnreachable(DestUnreachableHeader::Port),
            1 => Icmpv4Type::TimeExceeded(TimeExceededCode::TtlExceededInTransit),
            2 => Icmpv4Type::Unknown { type_u8: self.random.random(), code_u8: 0, bytes5to8: [0; 4] },
            _ => Icmpv4Type::DestinationUnreachable(DestUnreachableHeader::FragmentationNeeded {
                next_hop_mtu: 1400,
            }),
        }
    }

    fn quoted(&mut self, packet: &Ip) -> usize {
        let len = packet.bytes().len();
        if self.random.random() { 28.min(len) } else { self.random.random_range(0..=len) }
    }

    /// About a packet of a client, as the pod's side saw it.
    fn error_of_pod(&mut self) -> Vec<u8> {
        let seen = match self.session() {
            Some((key, _)) => {
                let (pod, address) = (key.pod.octets, key.address.octets);
                let ports = (key.port.get(), key.pod_port.get());
                match u8::try_from(key.protocol).unwrap() {
                    TCP => Ip::segment(address, pod, ports, ACK, (105, 201), b"data"),
                    UDP => Ip::udp(address, pod, ports, b"data"),
                    _ => Ip::echo(address, pod, ports.0, b"data"),
                }
            }
            None => Ip::udp(SNAT, pod(PLAIN), (1, 2), b""),
        };
        let from = if self.random.random() { seen.destination } else { POD_ROUTER };
        let (kind, quoted) = (self.kind(), self.quoted(&seen));
        self.node_sends(seen.destination, Ip::error(from, kind, &seen, quoted))
    }

    /// About a packet of a pod, as the client's side saw it.
    fn error_of_client(&mut self) -> Vec<u8> {
        let seen = match self.session() {
            Some((key, session)) => {
                let (pod, client) = (session.destination.octets, session.client.octets);
                let ports = (session.destination_port.get(), session.client_port.get());
                match u8::try_from(key.protocol).unwrap() {
                    TCP => Ip::segment(pod, client, ports, ACK, (201, 105), b"data"),
                    UDP => Ip::udp(pod, client, ports, b"data"),
                    _ => Ip::echo_reply(pod, client, ports.1, b"data"),
                }
            }
            None => Ip::udp(pod(PLAIN), world::FOREIGN, (1, 2), b""),
        };
        let from = if self.random.random() { seen.destination } else { ROUTER };
        let (kind, quoted) = (self.kind(), self.quoted(&seen));
        let link = self.client_link();
        self.finish(Ip::error(from, kind, &seen, quoted), |packet| link.ip(packet))
    }

    /// All time stamps are set back.
    fn time_passes(&mut self) -> Result<(), String> {
        let passed = ticks(self.pick(&[1, 6, 11, 31, 61, 250, 301, 7441]));
        self.mirror.change(|content| {
            for entry in content.forward.values_mut() {
                entry.seen = entry.seen.wrapping_sub(passed);
                entry.created = entry.created.wrapping_sub(passed);
            }
            for entry in content.reverse.values_mut() {
                entry.seen = entry.seen.wrapping_sub(passed);
                entry.created = entry.created.wrapping_sub(passed);
            }
        })
    }

    fn sweep(&mut self) -> Result<(), String> {
        let mode = if self.random.random_bool(0.8) { SweepMode::EXPIRED } else { SweepMode::ALL };
        let mut keys: Vec<ReverseKey> =
            self.mirror.tables.sessions.reverse.borrow().keys().take(SWEEP_CAPACITY - 2).copied().collect();
        keys.retain(|_| mode == SweepMode::EXPIRED || self.random.random());
        // One that is not there, and one that is named twice.
        keys.push(ReverseKey { protocol: ICMP.into(), port: Be16::new(9), ..ReverseKey::default() });
        keys.extend(keys.first().copied());
        self.mirror.sweep(&keys, mode)
    }

    /// A pod moves, vanishes or comes back, and the daemon says so.
    fn pod_moves(&mut self) {
        let nomad = self.pick(&NOMADS);
        let places = [Some(PLAIN), Some(TAGGED), Some(DIRECT), None];
        let place = self.pick(&places);
        let old = self.mirror.tables.pods.get(&key(0, nomad)).map(|route| route.vtep);
        self.mirror.set_pod(key(0, nomad), place.map(Route::to));
        if let Some(old) = old {
            self.mirror.change_vtep(old, |vtep| vtep.generation = vtep.generation.wrapping_add(1));
        }
    }

    /// What a crash or a copy of the tables can leave: half a session, one that is stuck, one whose way out is gone.
    fn damage(&mut self) -> Result<(), String> {
        let Some((key, session)) = self.session() else { return Ok(()) };
        let kind = self.random.random_range(0..5);
        self.mirror.change(|content| {
            let peer = session.forward_key(&key);
            let state = &mut content.reverse.get_mut(&key).expect("it is there").state;
            match kind {
                0 => drop(content.reverse.remove(&key)),
                1 => drop(content.forward.remove(&peer)),
                2 => *state = state.in_phase(Phase::Claimed),
                3 => *state = state.in_phase(Phase::Dead),
                _ => {
                    let hop = &mut content.reverse.get_mut(&key).expect("it is there").last_hop;
                    hop.port_and_vlan = world::ABSENT_PORT << 12;
                }
            }
        })
    }

    /// Somebody holds every port that a client would get: it finds none, or takes that of a session that is not
    /// established.
    fn crowd(&mut self, seen: &mut Seen) -> Result<(), String> {
        self.mirror.clear();
        let frame = self.world.client_link().ip(&Ip::udp(world::FOREIGN, pod(PLAIN), (40_000, 53), b"crowd"));
        let now = gateway::dataplane::sessions::now();
        let phases: &[Phase] =
            if self.random.random() { &[Phase::Live] } else { &[Phase::Live, Phase::Opening] };
        // More often than it probes.
        for last in 0..17 {
            let Some(key) = self.mirror.would_claim(&frame) else { break };
            let phase = self.pick(phases);
            let (client, port) = (Ipv4::new([203, 0, 113, last]), Be16::new(1));
            let ([[a, b], [c, d]], [[e, f], [g, h]]) = (halves(key.address), halves(client));
            let addresses = Sum::default().remove([a, b]).remove([c, d]).add([e, f]).add([g, h]);
            self.mirror.change(|content| {
                let holder = Reverse {
                    state: State::new(phase),
                    tag: key.tag(),
                    seen: now.wrapping_sub(ticks(u32::from(last))),
                    created: now,
                    slot: u32::MAX,
                    last_hop: LastHop::new(rig::CLIENT_MAC, world::OWN_PORT, 0),
                    client,
                    client_port: port,
                    header_delta: addresses.fold(),
                    transport_delta: addresses.remove(key.port.bytes).add(port.bytes).fold(),
                    destination: key.pod,
                    destination_port: key.pod_port,
                    protocol: key.protocol,
                    ..Reverse::default()
                };
                content.reverse.insert(key, holder);
            })?;
        }
        self.frame(&frame, seen)
    }
}

fn halves(address: Ipv4) -> [[u8; 2]; 2] {
    let [a, b, c, d] = address.octets;
    [[a, b], [c, d]]
}
