//! A flood of forged clients against sessions that live: none of these breaks, and honest clients still get in. And hours
//! without a daemon: a table full of expired sessions has room for new ones.
//!
//! Every SYN is a test run of its own, which takes a few microseconds: frames of a live-frames run are recycled with the
//! bytes that the program left in them. So the program is measured, and no pod ever sees a packet.
//!
//! Environment: `GATEWAY_TEST_FULL` for 10 million SYNs.

use std::{
    collections::BTreeMap,
    env,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use aya::util::nr_cpus;
use gateway_common::{
    abi::{
        Forward, ForwardKey, Outcome, Phase, Reverse, ReverseKey, SessionEvent, Slot, SnatRule, State,
        Timeouts, map, ticks,
    },
    wire::{Be16, Ipv4},
};
use rand::{RngExt as _, SeedableRng as _, rngs::SmallRng};

use crate::{
    case::FromNode,
    packet::{ACK, Address, Ip, Link, SYN},
    rig::{self, Ports},
    subject::{Returned, Subject},
    world::{PLAIN, POOL, World, pod},
};

const SYNS: u64 = 500_000;
const FULL: u64 = 10_000_000;
const LIVE: u16 = 10_000;
/// A small table: the default has four times as many.
const SLOTS: u32 = 65_536;
/// How far honest clients are away.
const ROUND_TRIP: Duration = Duration::from_millis(20);

/// All clients of the world share the pool.
fn world(ports: Ports) -> World {
    World::new(ports).with(|world| {
        let config = &mut world.tables.config;
        config.snat_rules[0] = SnatRule { first: 1, count: 3, ..SnatRule::default() };
        config.snat_rule_count = 1;
        config.session_slots = SLOTS;
        world.tables.sessions.capacity = Some(SLOTS as usize + 1024);
    })
}

/// A connection of a client with the pod that is attacked, and how the pod sees it.
#[derive(Clone, Copy)]
struct Connection {
    client: Address,
    port: u16,
    is_tcp: bool,
    seen: (Address, u16),
}

/// A frame after the program, if it was sent to the pod: how the pod sees its sender.
fn seen(frame: &[u8]) -> Option<(Address, u16)> {
    let inner = frame.get(64..86)?;
    Some((inner[12..16].try_into().unwrap(), u16::from_be_bytes([inner[20], inner[21]])))
}

impl Connection {
    /// By number; not opened yet.
    fn new(number: u16, is_tcp: bool) -> Self {
        let [high, low] = (number / 4).to_be_bytes();
        Self { client: [100, 64, high, low], port: 40_000 + number % 4, is_tcp, seen: ([0; 4], 0) }
    }

    fn request(&self, world: &World, flags: u8, numbers: (u32, u32)) -> Vec<u8> {
        let ports = |port| (self.port, port);
        world.client_link().ip(&if self.is_tcp {
            Ip::segment(self.client, pod(PLAIN), ports(80), flags, numbers, b"")
        } else {
            Ip::udp(self.client, pod(PLAIN), ports(53), b"question")
        })
    }

    fn reply(&self, to: Address, port: u16, flags: u8, numbers: (u32, u32)) -> Ip {
        if self.is_tcp {
            Ip::segment(pod(PLAIN), to, (80, port), flags, numbers, b"")
        } else {
            Ip::udp(pod(PLAIN), to, (53, port), b"answer")
        }
    }

    /// The first packet; whether it was sent.
    fn open(&mut self, subject: &Subject, world: &World) -> bool {
        match seen(&subject.run(&self.request(world, SYN, (100, 0))).1) {
            Some(seen) => {
                self.seen = seen;
                true
            }
            None => false,
        }
    }

    /// The pod's answer; whether it came back to the client.
    fn answer(&self, subject: &Subject, world: &World, flags: u8, numbers: (u32, u32)) -> bool {
        let (address, port) = self.seen;
        let frame = FromNode::new(world, PLAIN, &self.reply(address, port, flags, numbers)).bytes();
        let told = self.reply(self.client, self.port, flags, numbers);
        subject.run(&frame) == (Returned::Transmit, home(world).ip(&told.hop()))
    }

    /// A packet that goes on; whether it was sent as the same sender.
    fn goes_on(&self, subject: &Subject, world: &World) -> bool {
        seen(&subject.run(&self.request(world, ACK, (101, 201))).1) == Some(self.seen)
    }
}

fn home(world: &World) -> Link {
    Link::new(rig::CLIENT_MAC, world.ports.own.mac)
}

#[test]
fn live_sessions_survive_a_flood_and_honest_clients_get_in() {
    let syns = if env::var_os("GATEWAY_TEST_FULL").is_some() { FULL } else { SYNS };
    rig::inside(|ports| {
        let world = world(ports);
        let subject = Subject::load(&world.tables);
        let live: Vec<Connection> = (0..LIVE)
            .map(|number| {
                let mut connection = Connection::new(number, number % 2 == 0);
                assert!(connection.open(&subject, &world));
                assert!(connection.answer(&subject, &world, SYN | ACK, (200, 101)));
                assert!(connection.goes_on(&subject, &world));
                connection
            })
            .collect();
        assert_eq!(subject.events()[&SessionEvent::Confirmed], u64::from(LIVE));

        let (left, done) = (AtomicU64::new(syns), AtomicBool::new(false));
        let start = Instant::now();
        let (passes, handshakes, time) = thread::scope(|scope| {
            let floods: Vec<_> = (0..nr_cpus().unwrap() as u64)
                .map(|seed| {
                    scope.spawn({
                        let frame = Connection::new(0, true).request(&world, SYN, (100, 0));
                        let (subject, left) = (&subject, &left);
                        move || flood(subject, frame, left, seed)
                    })
                })
                .collect();
            let (live, done) = (&live, &done);
            let subject = &subject;
            let prober = scope.spawn(move || probe(subject, &self::world(ports), live, done));
            let honest = scope.spawn(move || handshakes(subject, &self::world(ports), done));
            for flood in floods {
                flood.join().unwrap();
            }
            let time = start.elapsed();
            done.store(true, Ordering::Relaxed);
            (prober.join().unwrap(), honest.join().unwrap(), time)
        });
        // And once more when it is over.
        probe_all(&subject, &world, &live);
        let events = subject.events();
        println!(
            "{syns} forged SYNs in {:.1} s ({} a second) against {LIVE} live sessions, which were probed {passes} times; \
             {} honest handshakes of {ROUND_TRIP:?}, by tries {handshakes:?}; {events:?}, new {:?}, refused {:?}",
            time.as_secs_f64(),
            syns / time.as_secs().max(1),
            handshakes.values().sum::<u32>(),
            subject.counter(Outcome::SnatNew.number()).0,
            subject.counter(Outcome::SnatTableFull.number()).0,
        );
        assert!(passes > 0 && handshakes.values().sum::<u32>() > 0, "nobody was there during the flood");
        assert!(handshakes.keys().all(|&tries| tries <= TRIES), "a client did not get in");
        assert!(events[&SessionEvent::Evicted] > syns - u64::from(SLOTS), "the flood found room elsewhere");
        let reverse: Vec<(ReverseKey, Reverse)> = subject.table(map::REVERSE).read().unwrap();
        let established = reverse.iter().filter(|(_, session)| session.state.phase() == Phase::Live).count();
        assert_eq!(established, usize::from(LIVE) + handshakes.values().sum::<u32>() as usize);
    });
}

/// Forged SYNs, each of another client, until none are left.
fn flood(subject: &Subject, mut frame: Vec<u8>, left: &AtomicU64, seed: u64) {
    const BATCH: u64 = 256;
    let mut random = SmallRng::seed_from_u64(seed);
    while left
        .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
            left.checked_sub(BATCH).or((left > 0).then_some(0))
        })
        .is_ok()
    {
        for _ in 0..BATCH {
            // 11.0.0.0/8, which no honest client has; the checksums are the pod's to judge.
            frame[26] = 11;
            random.fill(&mut frame[27..30]);
            random.fill(&mut frame[34..36]);
            subject.feed(&frame);
        }
    }
}

/// Sends a packet each way on every live session.
fn probe_all(subject: &Subject, world: &World, live: &[Connection]) {
    for connection in live {
        let Connection { client, port, .. } = connection;
        assert!(
            connection.goes_on(subject, world),
            "{client:?}:{port} is not {:?} any more",
            connection.seen
        );
        assert!(connection.answer(subject, world, ACK, (201, 101)), "{client:?}:{port} gets no answer");
    }
}

/// Probes all the time; how often every session was.
fn probe(subject: &Subject, world: &World, live: &[Connection], done: &AtomicBool) -> u32 {
    let mut passes = 0;
    while !done.load(Ordering::Relaxed) {
        probe_all(subject, world, live);
        passes += 1;
    }
    passes
}

/// A client sends its SYN again after a second; more often than this it would not.
const TRIES: u32 = 3;

/// Clients that connect during the flood; how many needed how many tries, [`TRIES`] + 1 for those that did not get in.
fn handshakes(subject: &Subject, world: &World, done: &AtomicBool) -> BTreeMap<u32, u32> {
    let mut tries = BTreeMap::new();
    for number in LIVE.. {
        if done.load(Ordering::Relaxed) {
            break;
        }
        let mut connection = Connection::new(number, true);
        let needed = (1..=TRIES).find(|_| handshake(subject, world, &mut connection)).unwrap_or(TRIES + 1);
        *tries.entry(needed).or_default() += 1;
    }
    tries
}

fn handshake(subject: &Subject, world: &World, connection: &mut Connection) -> bool {
    let opened = connection.open(subject, world);
    thread::sleep(ROUND_TRIP);
    let answered = opened && connection.answer(subject, world, SYN | ACK, (200, 101));
    thread::sleep(ROUND_TRIP);
    answered && connection.goes_on(subject, world)
}

#[test]
fn without_a_daemon_for_hours_new_sessions_find_room() {
    const FEW: u32 = 4096;
    rig::inside(|ports| {
        let world = world(ports).with(|world| {
            world.tables.config.session_slots = FEW;
            world.tables.sessions.capacity = Some(FEW as usize);
        });
        let subject = Subject::load(&world.tables);
        // Established sessions in every slot, last seen two hours and five minutes ago.
        let seen = gateway::dataplane::sessions::now().wrapping_sub(ticks(7500));
        assert!(ticks(7500) > Timeouts::DEFAULT.tcp_established);
        let old: Vec<(ReverseKey, Reverse)> = (0..FEW).map(|slot| established(slot, seen)).collect();
        let halves = old.iter().map(|(key, session)| (session.forward_key(key), other_half(key, session)));
        subject.table(map::FORWARD).update(&halves.collect::<Vec<(ForwardKey, Forward)>>()).unwrap();
        subject.table(map::REVERSE).update(&old).unwrap();
        let slots = old.iter().map(|(key, session)| (session.slot, Slot { session: *key }));
        subject.table(map::SLOTS).update(&slots.collect::<Vec<_>>()).unwrap();

        let new: Vec<Connection> = (0..u16::try_from(FEW).unwrap())
            .map(|number| {
                let mut connection = Connection::new(number, true);
                assert!(connection.open(&subject, &world), "client {number} finds no room");
                assert!(connection.answer(&subject, &world, SYN | ACK, (200, 101)));
                assert!(connection.goes_on(&subject, &world));
                connection
            })
            .collect();
        let events = subject.events();
        assert_eq!(events[&SessionEvent::Reclaimed], u64::from(FEW), "{events:?}");
        assert!(!events.contains_key(&SessionEvent::Expired), "nobody swept");
        probe_all(&subject, &world, &new);
        // Now all of them are established, and none is expired.
        let mut late = Connection::new(u16::try_from(FEW).unwrap(), true);
        assert!(!late.open(&subject, &world));
        assert_eq!(subject.counter(Outcome::SnatTableFull.number()).0, 1);
    });
}

fn established(slot: u32, seen: u32) -> (ReverseKey, Reverse) {
    let port = Be16::new(u16::try_from(slot).unwrap());
    let key = ReverseKey {
        pod: Ipv4::new(pod(PLAIN)),
        address: Ipv4::new(POOL[0]),
        pod_port: Be16::new(443),
        port,
        protocol: 6,
        overlay: 0,
    };
    let session = Reverse {
        state: State::new(Phase::Live).expecting(slot),
        tag: key.tag(),
        seen,
        created: seen,
        slot,
        vtep: PLAIN,
        client: Ipv4::new([192, 0, 2, 1]),
        client_port: port,
        destination: key.pod,
        destination_port: key.pod_port,
        protocol: key.protocol,
        ..Reverse::default()
    };
    (key, session)
}

fn other_half(key: &ReverseKey, session: &Reverse) -> Forward {
    Forward {
        tag: session.forward_key(key).tag(),
        seen: session.seen,
        created: session.created,
        vtep: PLAIN,
        source: key.address,
        source_port: key.port,
        destination: key.pod,
        destination_port: key.pod_port,
        protocol: key.protocol,
        confirmed: 1,
        ..Forward::default()
    }
}
