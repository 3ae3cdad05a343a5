//! Sessions under packets, evictions and sweeps of all CPUs at once. When everything is quiet, both tables tell the same
//! sessions: nobody has a port that is somebody else's, nothing is left half made or half removed.
//!
//! Environment: `GATEWAY_TEST_FULL` for minutes instead of seconds, `GATEWAY_TEST_SEED` for other frames.

use std::{
    collections::{BTreeMap, BTreeSet},
    env,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use aya::util::nr_cpus;
use gateway_common::{
    abi::{
        Forward, ForwardKey, Outcome, Phase, Reverse, ReverseKey, SWEEP_CAPACITY, SessionEvent, Slot, Sweep,
        SweepMode, map,
    },
    wire::Ipv4,
};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};
use rand::{RngExt as _, SeedableRng as _, rngs::SmallRng};

use crate::{
    agreement::pick,
    case::FromNode,
    packet::{ACK, Address, FIN, Ip, RST, SYN},
    rig,
    subject::{Returned, Subject},
    world::{PLAIN, SNAT, TAGGED, World, pod},
};

/// How long everybody works before the tables are looked at.
const ROUND: Duration = Duration::from_millis(500);

/// Clients that want the same port, by the same rule.
const CLIENTS: u8 = 24;
const PORTS: [u16; 2] = [40_000, 40_001];

#[test]
fn sessions_are_consistent_after_all_cpus_worked_on_them() {
    let full = env::var_os("GATEWAY_TEST_FULL").is_some();
    let rounds = if full { 120 } else { 2 };
    let seed = env::var("GATEWAY_TEST_SEED").map_or(1, |text| text.parse().expect("a decimal number"));
    rig::inside(|ports| {
        let world = World::new(ports);
        for (name, slots, room) in
            [("tight", 28, 64), ("table-smaller-than-slots", 64, 20), ("room", 1024, 2048)]
        {
            let world = world.with(|world| {
                world.tables.config.session_slots = slots;
                world.tables.sessions.capacity = Some(room);
            });
            hammer(name, &world, rounds, seed);
        }
    });
}

/// What happened in all rounds.
#[derive(Default)]
struct Work {
    frames: u64,
    swept: u64,
}

fn hammer(name: &str, world: &World, rounds: u64, seed: u64) {
    let subject = Subject::load(&world.tables);
    let cpus = nr_cpus().unwrap();
    let mut work = Work::default();
    let start = Instant::now();
    for round in 0..rounds {
        let done = AtomicBool::new(false);
        let end = Instant::now() + ROUND;
        thread::scope(|scope| {
            let senders: Vec<_> = (0..cpus)
                .map(|cpu| {
                    let random = SmallRng::seed_from_u64(seed ^ round << 8 ^ (cpu as u64) << 32);
                    let frames = Frames::new(world, random);
                    let subject = &subject;
                    scope.spawn(move || {
                        pin(cpu);
                        frames.send(subject, end)
                    })
                })
                .collect();
            let sweeper = scope.spawn(|| sweep(&subject, &done, seed ^ round));
            work.frames += senders.into_iter().map(|sender| sender.join().unwrap()).sum::<u64>();
            done.store(true, Ordering::Relaxed);
            work.swept += sweeper.join().unwrap();
        });
        check(&subject, world).unwrap_or_else(|what| panic!("{name}, round {round} of seed {seed}: {what}"));
    }
    let events = subject.events();
    println!(
        "{name}: {} frames on {cpus} CPUs and {} sweeps in {:.1} s, {events:?}, {} races",
        work.frames,
        work.swept,
        start.elapsed().as_secs_f64(),
        subject.counter(Outcome::SnatRace.number()).0
    );
    for event in [SessionEvent::Opened, SessionEvent::Confirmed, SessionEvent::Flushed] {
        assert!(events.contains_key(&event), "{name}: {event:?} never happened");
    }
    if world.tables.config.session_slots < 64 {
        assert!(events.contains_key(&SessionEvent::Evicted), "{name}: nothing was evicted");
    }
}

fn pin(cpu: usize) {
    let mut set = CpuSet::new();
    set.set(cpu).unwrap();
    sched_setaffinity(Pid::from_raw(0), &set).unwrap();
}

/// What one CPU gets: packets of clients that want the same ports, and what pods answer.
struct Frames {
    random: SmallRng,
    of_clients: Vec<Vec<u8>>,
    of_pods: Vec<Vec<u8>>,
}

impl Frames {
    fn new(world: &World, random: SmallRng) -> Self {
        let link = world.client_link();
        let mut of_clients = Vec::new();
        let mut of_pods = Vec::new();
        for port in PORTS {
            for node in [PLAIN, TAGGED] {
                for last in 0..CLIENTS {
                    let client = [198, 51, 100, last];
                    let segment =
                        |flags, numbers| Ip::segment(client, pod(node), (port, 80), flags, numbers, b"");
                    of_clients.extend([
                        link.ip(&segment(SYN, (100, 0))),
                        link.ip(&segment(SYN, (100, 0))),
                        link.ip(&segment(ACK, (101, 201))),
                        link.ip(&segment(FIN | ACK, (101, 201))),
                        link.ip(&segment(RST, (101, 0))),
                        link.ip(&Ip::udp(client, pod(node), (port, 53), b"")),
                        link.ip(&Ip::echo(client, pod(node), port, b"")),
                    ]);
                }
            }
            of_pods.extend(answers(world, PLAIN, SNAT, port));
        }
        Self { random, of_clients, of_pods }
    }

    /// Runs frames until `end`; how many.
    fn send(mut self, subject: &Subject, end: Instant) -> u64 {
        let mut sent = 0;
        while Instant::now() < end {
            for _ in 0..64 {
                let answers = self.random.random_bool(0.3);
                let frames = if answers { &self.of_pods } else { &self.of_clients };
                let frame = &frames[self.random.random_range(0..frames.len())];
                let (returned, _) = subject.run(frame);
                assert_ne!(returned, Returned::Pass, "never untranslated to the kernel");
                sent += 1;
            }
        }
        sent
    }
}

/// What a pod answers to whoever has the port.
fn answers(world: &World, node: u32, address: Address, port: u16) -> [Vec<u8>; 3] {
    let from = |packet: &Ip| FromNode::new(world, node, packet).bytes();
    [
        from(&Ip::segment(pod(node), address, (80, port), SYN | ACK, (200, 101), b"")),
        from(&Ip::udp(pod(node), address, (53, port), b"")),
        from(&Ip::echo_reply(pod(node), address, port, b"")),
    ]
}

/// Removes sessions, some by order and some if they are expired, until `done`; how many.
fn sweep(subject: &Subject, done: &AtomicBool, seed: u64) -> u64 {
    let mut random = SmallRng::seed_from_u64(seed);
    let table = subject.table::<ReverseKey, Reverse>(map::REVERSE);
    let mut removed = 0;
    while !done.load(Ordering::Relaxed) {
        let sessions = table.read().unwrap();
        let mut input =
            Sweep { mode: pick(&[SweepMode::ALL, SweepMode::EXPIRED], &mut random), ..bytemuck::zeroed() };
        let chosen = sessions.iter().filter(|_| random.random_bool(0.3)).take(SWEEP_CAPACITY);
        let mut count = 0;
        for (place, (key, _)) in input.sessions.iter_mut().zip(chosen) {
            *place = *key;
            count += 1;
        }
        let output = subject.sweep(&input);
        removed += output.sessions[..count].iter().filter(|key| key.protocol == 0).count() as u64;
        thread::sleep(Duration::from_micros(random.random_range(0..500)));
    }
    removed
}

/// What holds when nobody works on the tables.
fn check(subject: &Subject, world: &World) -> Result<(), String> {
    let forward: BTreeMap<ForwardKey, Forward> =
        subject.table(map::FORWARD).read().unwrap().into_iter().collect();
    let reverse: BTreeMap<ReverseKey, Reverse> =
        subject.table(map::REVERSE).read().unwrap().into_iter().collect();
    let slots: BTreeMap<u32, Slot> = subject.table(map::SLOTS).read().unwrap().into_iter().collect();
    let mut mappings = BTreeSet::new();
    for (key, entry) in &forward {
        let other = entry.reverse_key(key);
        let Some(session) = reverse.get(&other) else {
            return Err(format!("{key:?} leads to {other:?}, which is nobody's"));
        };
        if session.forward_key(&other) != *key {
            return Err(format!("{key:?} leads to {other:?}, which is {:?}'s", session.forward_key(&other)));
        }
        if !mappings.insert(other) {
            return Err(format!("two flows are {other:?}"));
        }
        if entry.tag != key.tag() || entry.destination != key.destination {
            return Err(format!("{key:?} holds what is another flow's: {entry:?}"));
        }
    }
    let mut without_slot = 0;
    for (key, session) in &reverse {
        if !mappings.contains(key) {
            return Err(format!("{key:?} has lost its other half: {session:?}"));
        }
        if !matches!(session.state.phase(), Phase::Opening | Phase::Live) || session.tag != key.tag() {
            return Err(format!("{key:?} is left as {session:?}"));
        }
        without_slot += usize::from(slots[&session.slot].session != *key);
    }
    let config = world.config();
    let address =
        |key: &ReverseKey| config.snat_addresses.contains(&key.address) && key.address != Ipv4::UNSPECIFIED;
    if !reverse.keys().all(address) {
        return Err("a session has an address that is not of the pool".to_owned());
    }
    // A window of slots is one CPU's until the hand has gone round; of few slots two may find the same one free.
    let slots = config.session_slots as usize;
    if slots >= 1024 && without_slot > 0 || reverse.len() > slots + without_slot {
        return Err(format!("{without_slot} of {} sessions have no slot, of {slots}", reverse.len()));
    }
    let events = subject.events();
    let count = |event: SessionEvent| events.get(&event).copied().unwrap_or(0);
    let ended =
        [SessionEvent::Evicted, SessionEvent::Reclaimed, SessionEvent::Expired, SessionEvent::Flushed];
    let living = count(SessionEvent::Opened) - ended.into_iter().map(count).sum::<u64>();
    if living != reverse.len() as u64 {
        return Err(format!("{} sessions where {events:?} leave {living}", reverse.len()));
    }
    Ok(())
}
