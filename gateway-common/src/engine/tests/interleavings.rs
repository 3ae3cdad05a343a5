//! Sessions under every interleaving: the engine runs on two or three threads over tables whose every operation is a point
//! where another thread may go on, and loom tries all ways with up to [`PREEMPTIONS`] forced switches.
//!
//! The tables are as hard as the kernel's: a preallocated element that was removed is the next one to be taken, while others
//! still hold pointers to it, and it is filled in two steps. Entries that no thread touches are no points, else nothing
//! would ever end.
//!
//! `GATEWAY_TEST_FULL` allows one more switch.
//!
//! What this found: without something of its own in its state word, a session was taken for the one before it on the same
//! port, and half of it removed (see [`State::new`]); a forward entry whose other half had just gone was removed after it
//! had become another session's.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, BTreeSet},
    env,
    rc::Rc,
    sync::{Arc, LazyLock},
};

use etherparse::PacketBuilder;
use loom::{
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

use super::fixture::*;
use crate::{
    abi::{
        Config, Egress, Forward, ForwardKey, LocalAddress, Outcome, OverlayAddress, Phase, Port, PrefixKey,
        Reverse, ReverseKey, Route, SessionEvent, SnatRule, State, SweepMode, Ticks, Timeouts, Vtep, ticks,
    },
    engine::{
        Fib, FibQuery, Inserted, Sessions, Tables, WayOut, process,
        session::{Opening, Shared, sweep},
    },
    model::{HostFrame, HostTables},
    wire::{Be16, Ipv4, Mac},
};

/// Switches away from a thread that could have gone on.
const PREEMPTIONS: usize = 2;

const SNAT: [u8; 4] = [10, 244, 30, 200];
const ALICE: [u8; 4] = [198, 51, 100, 7];
const BOB: [u8; 4] = [198, 51, 100, 8];
const CAROL: [u8; 4] = [198, 51, 100, 9];
const NOW: Ticks = ticks(100_000);
/// Two windows of the search for slots.
const SLOTS: u32 = 14;
const CAPACITY: usize = 48;

/// A preallocated hash table.
struct Elements<K, V> {
    places: Vec<Shared<V>>,
    index: RefCell<BTreeMap<K, usize>>,
    free: RefCell<Vec<usize>>,
    /// Keys that are being inserted: the kernel holds the lock of their bucket.
    busy: RefCell<BTreeSet<K>>,
}

impl<K: Ord + Copy, V: bytemuck::Pod> Elements<K, V> {
    fn new() -> Self {
        Self {
            places: (0..CAPACITY).map(|_| Shared::new(V::zeroed())).collect(),
            index: RefCell::default(),
            free: RefCell::new((0..CAPACITY).collect()),
            busy: RefCell::default(),
        }
    }

    fn get(&self, key: &K) -> Option<&Shared<V>> {
        self.index.borrow().get(key).map(|&at| &self.places[at])
    }

    /// `between` is called when half of the element is written.
    fn insert(&self, key: &K, value: V, between: impl FnOnce()) -> Inserted {
        if self.index.borrow().contains_key(key) || !self.busy.borrow_mut().insert(*key) {
            return Inserted::Exists;
        }
        let at = self.free.borrow_mut().pop();
        let Some(at) = at else {
            self.busy.borrow_mut().remove(key);
            return Inserted::Full;
        };
        self.write(at, &value, |at, half| at < half);
        between();
        self.write(at, &value, |at, half| at >= half);
        self.index.borrow_mut().insert(*key, at);
        self.busy.borrow_mut().remove(key);
        Inserted::Done
    }

    fn write(&self, at: usize, value: &V, is_in: fn(usize, usize) -> bool) {
        let mut bytes = bytemuck::bytes_of(&self.places[at].get()).to_vec();
        let half = bytes.len() / 2;
        for (at, (old, new)) in bytes.iter_mut().zip(bytemuck::bytes_of(value)).enumerate() {
            if is_in(at, half) {
                *old = *new;
            }
        }
        self.places[at].set(bytemuck::pod_read_unaligned(&bytes));
    }

    fn remove(&self, key: &K) {
        if let Some(at) = self.index.borrow_mut().remove(key) {
            self.free.borrow_mut().push(at);
        }
    }

    fn content(&self) -> BTreeMap<K, V> {
        self.index.borrow().iter().map(|(&key, &at)| (key, self.places[at].get())).collect()
    }
}

/// Tables of which every operation is a point where threads change.
struct Interleaved {
    host: HostTables,
    forward: Elements<ForwardKey, Forward>,
    reverse: Elements<ReverseKey, Reverse>,
    slots: RefCell<BTreeMap<u32, ReverseKey>>,
    hand: Cell<u32>,
    events: RefCell<BTreeMap<SessionEvent, u32>>,
    /// Sessions that no thread touches.
    quiet: RefCell<BTreeSet<ReverseKey>>,
    /// What loom looks at.
    point: AtomicUsize,
}

// SAFETY: loom's threads take turns on one thread of the system, and switch only at points, where nothing is borrowed.
unsafe impl Send for Interleaved {}

// SAFETY: as above.
unsafe impl Sync for Interleaved {}

impl Interleaved {
    fn new() -> Self {
        Self {
            host: host(),
            forward: Elements::new(),
            reverse: Elements::new(),
            slots: RefCell::default(),
            hand: Cell::default(),
            events: RefCell::default(),
            quiet: RefCell::default(),
            point: AtomicUsize::new(0),
        }
    }

    fn point(&self) {
        self.point.fetch_add(1, Ordering::SeqCst);
    }

    fn point_unless_quiet(&self, key: &ReverseKey) {
        if !self.quiet.borrow().contains(key) {
            self.point();
        }
    }

    /// Runs the engine on a frame.
    fn run(&self, frame: &[u8]) -> (Outcome, Vec<u8>) {
        let mut frame = HostFrame::new(frame);
        let verdict = process(&mut frame, self);
        (verdict.info().expect("every verdict has an outcome").outcome, frame.bytes().to_vec())
    }

    /// Runs frames before the threads begin.
    fn after(self, frames: &[Vec<u8>]) -> Self {
        for frame in frames {
            self.run(frame);
        }
        self
    }

    /// Established sessions of nobody hold all slots but the first `free`.
    fn with_slots_held(self, free: u32) -> Self {
        for slot in free..SLOTS {
            let key = ReverseKey {
                pod: Ipv4::new(OTHER_POD),
                address: Ipv4::new(SNAT),
                port: Be16::new(u16::try_from(slot).unwrap()),
                protocol: 17,
                ..ReverseKey::default()
            };
            self.hold(key, Phase::Live, NOW, slot);
            self.quiet.borrow_mut().insert(key);
        }
        self
    }

    /// A session of nobody, both halves.
    fn hold(&self, key: ReverseKey, phase: Phase, seen: Ticks, slot: u32) -> Reverse {
        let reverse = Reverse {
            state: State::new(phase),
            tag: key.tag(),
            seen,
            slot,
            client: Ipv4::new([203, 0, 113, 1]),
            client_port: key.port,
            destination: key.pod,
            destination_port: key.pod_port,
            protocol: key.protocol,
            ..Reverse::default()
        };
        let peer = reverse.forward_key(&key);
        let forward = Forward {
            tag: peer.tag(),
            seen,
            source: key.address,
            source_port: key.port,
            destination: key.pod,
            destination_port: key.pod_port,
            protocol: key.protocol,
            ..Forward::default()
        };
        self.reverse.insert(&key, reverse, || {});
        self.forward.insert(&peer, forward, || {});
        self.slots.borrow_mut().insert(slot, key);
        reverse
    }

    /// The session under a client's frame, which must have one.
    fn session_of(&self, key: &ForwardKey) -> Option<(ReverseKey, Reverse)> {
        let key = self.forward.get(key)?.get().reverse_key(key);
        self.reverse.get(&key).map(|entry| (key, entry.get()))
    }

    /// What holds when all threads are done.
    fn check(&self) {
        let (forward, reverse) = (self.forward.content(), self.reverse.content());
        for (key, entry) in &forward {
            let other = entry.reverse_key(key);
            let session =
                reverse.get(&other).unwrap_or_else(|| panic!("{key:?} goes to {other:?}, which is nobody's"));
            assert_eq!(session.forward_key(&other), *key, "{other:?} is somebody else's");
            assert_eq!(entry.tag, key.tag());
        }
        for (key, session) in &reverse {
            let peer = session.forward_key(key);
            assert!(forward.contains_key(&peer), "{key:?} {session:?} has lost {peer:?}");
            assert!(
                matches!(session.state.phase(), Phase::Opening | Phase::Live),
                "{key:?} is left {session:?}"
            );
            assert_eq!(session.tag, key.tag());
            // Once the hand has gone round, two windows are one, and the later session gets the slot.
            if self.hand.get() <= SLOTS {
                assert_eq!(self.slots.borrow().get(&session.slot), Some(key), "slot {}", session.slot);
            }
        }
        let count = |event| self.events.borrow().get(&event).copied().unwrap_or(0);
        let ended =
            [SessionEvent::Evicted, SessionEvent::Reclaimed, SessionEvent::Expired, SessionEvent::Flushed];
        let living = reverse.len() - self.quiet.borrow().len();
        assert_eq!(
            count(SessionEvent::Opened) as usize,
            living + ended.into_iter().map(|event| count(event) as usize).sum::<usize>(),
            "{:?}",
            self.events.borrow()
        );
        assert!(self.forward.free.borrow().len() == CAPACITY - forward.len());
        assert!(self.reverse.free.borrow().len() == CAPACITY - reverse.len());
    }
}

impl Sessions for Interleaved {
    type Forward<'a> = &'a Shared<Forward>;
    type Reverse<'a> = &'a Shared<Reverse>;

    fn ticks(&self) -> Ticks {
        NOW
    }

    fn forward(&self, key: &ForwardKey) -> Option<Self::Forward<'_>> {
        self.point();
        self.forward.get(key)
    }

    fn reverse(&self, key: &ReverseKey) -> Option<Self::Reverse<'_>> {
        self.point_unless_quiet(key);
        self.reverse.get(key)
    }

    fn insert_forward(&self, key: &ForwardKey, value: impl FnOnce() -> Forward) -> Inserted {
        self.point();
        self.forward.insert(key, value(), || self.point())
    }

    fn insert_reverse(&self, key: &ReverseKey, value: impl FnOnce() -> Reverse) -> Inserted {
        self.point();
        self.reverse.insert(key, value(), || self.point())
    }

    fn remove_forward(&self, key: &ForwardKey) {
        self.point();
        self.forward.remove(key);
    }

    fn remove_reverse(&self, key: &ReverseKey) {
        self.point();
        self.reverse.remove(key);
    }

    fn exchange(&self, session: &Shared<Reverse>, old: State, new: State) -> bool {
        self.point();
        session.exchange(old, new)
    }

    fn advance_hand(&self, by: u32) -> u32 {
        self.point();
        self.hand.replace(self.hand.get().wrapping_add(by))
    }

    fn slot(&self, index: u32) -> ReverseKey {
        let key = self.slots.borrow().get(&index).copied().unwrap_or_default();
        self.point_unless_quiet(&key);
        self.slots.borrow().get(&index).copied().unwrap_or_default()
    }

    fn set_slot(&self, index: u32, session: &ReverseKey) {
        self.point();
        self.slots.borrow_mut().insert(index, *session);
    }

    fn note(&self, event: SessionEvent) {
        *self.events.borrow_mut().entry(event).or_default() += 1;
    }

    fn with_opening(&self, work: impl FnOnce(&mut Opening) -> u64) -> u64 {
        work(&mut Opening::default())
    }

    fn repeat(&self, count: u32, step: impl FnMut(u32) -> bool) {
        let _ = (0..count).any(step);
    }
}

impl Tables for Interleaved {
    fn config(&self) -> &Config {
        self.host.config()
    }

    fn pod(&self, key: &OverlayAddress) -> Option<Route> {
        self.host.pod(key)
    }

    fn prefix(&self, key: PrefixKey) -> Option<Route> {
        self.host.prefix(key)
    }

    fn vtep(&self, id: u32) -> Option<&Vtep> {
        self.host.vtep(id)
    }

    fn source(&self, key: &OverlayAddress) -> Option<Route> {
        self.host.source(key)
    }

    fn address(&self, address: Ipv4) -> Option<LocalAddress> {
        self.host.address(address)
    }

    fn egress(&self, ifindex: u32) -> Option<Egress> {
        self.host.egress(ifindex)
    }

    fn may_answer(&self) -> bool {
        true
    }

    fn fib(&self, query: &FibQuery) -> Fib {
        self.host.fib(query)
    }

    fn with_way_out<R>(&self, query: &FibQuery, work: impl FnOnce(&mut WayOut) -> R) -> Option<R> {
        self.host.with_way_out(query, work)
    }
}

/// The fixture, with one SNAT address.
fn host() -> HostTables {
    let mut host = gateway();
    let config = &mut host.config;
    config.snat_rule_count = 1;
    config.snat_rules[0] = SnatRule { count: 1, ..SnatRule::default() };
    config.snat_addresses[0] = Ipv4::new(SNAT);
    config.overlays[0].snat_first = u32::from_be_bytes(SNAT);
    config.overlays[0].snat_span = 1;
    config.ports[0] = Port { ifindex: IFINDEX, mac: Mac::new(NIC), mtu: 1500 };
    config.session_slots = SLOTS;
    config.timeouts = Timeouts::DEFAULT;
    host.addresses.insert(Ipv4::new(SNAT), LocalAddress { kind: LocalAddress::SNAT, ifindex: 0 });
    host
}

/// Runs the threads in all ways over tables that `prepare` makes, and checks the tables each time.
fn in_all_ways<const N: usize>(
    prepare: impl Fn() -> Interleaved + Sync + Send + 'static,
    threads: [fn(&Interleaved); N],
    at_end: fn(&Interleaved),
) {
    // Outside of loom's world.
    LazyLock::force(&PROBED);
    let mut builder = loom::model::Builder::new();
    let full = usize::from(env::var_os("GATEWAY_TEST_FULL").is_some());
    builder.preemption_bound = Some(PREEMPTIONS + full);
    builder.max_branches = 10_000;
    let prepare = Arc::new(prepare);
    builder.check(move || {
        let prepare = Arc::clone(&prepare);
        let tables = Arc::new(spawned(move || prepare()).join().unwrap());
        let handles = threads.map(|work| {
            let tables = Arc::clone(&tables);
            spawned(move || work(&tables))
        });
        for handle in handles {
            handle.join().unwrap();
        }
        tables.check();
        if threads.len() < 3 {
            // The engine may run here, too.
            spawned(move || at_end(&tables)).join().unwrap();
        } else {
            // loom has five threads.
            at_end(&tables);
        }
    });
}

/// A thread whose stack the engine fits without optimisation.
fn spawned<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> thread::JoinHandle<T> {
    const WORDS: usize = 1 << 16;
    thread::Builder::new().stack_size(WORDS).spawn(work).expect("loom always can")
}

const PORT: u16 = 5555;
const SERVICE: u16 = 80;
const SYN: u8 = 2;
const ACK: u8 = 16;

fn packet(
    source: [u8; 4],
    destination: [u8; 4],
    ports: (u16, u16),
    flags: u8,
    numbers: (u32, u32),
) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut tcp = etherparse::TcpHeader::new(ports.0, ports.1, numbers.0, 4096);
    tcp.acknowledgment_number = numbers.1;
    (tcp.syn, tcp.ack) = (flags & SYN != 0, flags & ACK != 0);
    PacketBuilder::ipv4(source, destination, 64).tcp_header(tcp).write(&mut bytes, &[]).unwrap();
    bytes
}

fn syn(client: [u8; 4]) -> Vec<u8> {
    ethernet(NIC, CLIENT_NIC, 0x0800, &packet(client, POD, (PORT, SERVICE), SYN, (100, 0)))
}

/// The pod's answer to whoever has the port that its client wanted.
fn syn_ack() -> Vec<u8> {
    let inner = packet(POD, SNAT, (SERVICE, PORT), SYN | ACK, (200, 101));
    tunnel(NODE, 0, VNI_1, &ethernet(VTEP, NODE_VTEP, 0x0800, &inner))
}

fn ack(client: [u8; 4]) -> Vec<u8> {
    ethernet(NIC, CLIENT_NIC, 0x0800, &packet(client, POD, (PORT, SERVICE), ACK, (101, 201)))
}

fn key_of(client: [u8; 4]) -> ForwardKey {
    ForwardKey {
        client: Ipv4::new(client),
        destination: Ipv4::new(POD),
        client_port: Be16::new(PORT),
        destination_port: Be16::new(SERVICE),
        protocol: 6,
        pad: 0,
    }
}

/// The session that gets its client's port.
fn kept() -> ReverseKey {
    ReverseKey {
        pod: Ipv4::new(POD),
        address: Ipv4::new(SNAT),
        pod_port: Be16::new(SERVICE),
        port: Be16::new(PORT),
        protocol: 6,
        overlay: 0,
    }
}

fn sessions(tables: &Interleaved) -> usize {
    tables.reverse.content().len() - tables.quiet.borrow().len()
}

#[test]
fn two_packets_of_one_new_flow() {
    in_all_ways(
        Interleaved::new,
        [|tables| drop(tables.run(&syn(ALICE))), |tables| drop(tables.run(&syn(ALICE)))],
        |tables| assert_eq!(sessions(tables), 1),
    );
}

#[test]
fn two_flows_want_one_port() {
    in_all_ways(
        Interleaved::new,
        [
            |tables| assert_eq!(tables.run(&syn(ALICE)).0, Outcome::SnatNew),
            |tables| assert_eq!(tables.run(&syn(BOB)).0, Outcome::SnatNew),
        ],
        |tables| {
            let [alice, bob] =
                [ALICE, BOB].map(|client| tables.session_of(&key_of(client)).expect("a session").0);
            assert_ne!(alice, bob);
            assert!(alice == kept() || bob == kept());
        },
    );
}

/// The pod goes on with what was a session before, on the same port.
#[test]
fn a_reply_against_the_opening() {
    in_all_ways(
        Interleaved::new,
        [|tables| drop(tables.run(&syn(ALICE))), |tables| drop(tables.run(&syn_ack()))],
        |tables| assert_eq!(sessions(tables), 1),
    );
}

#[test]
fn the_last_slot_is_taken_from_two_sides() {
    in_all_ways(
        || Interleaved::new().after(&[syn(ALICE)]).with_slots_held(1),
        [|tables| drop(tables.run(&syn(BOB))), |tables| drop(tables.run(&syn(CAROL)))],
        |_| {},
    );
}

/// The clock of slots comes round to the new session of another flow that took the port and the element of the old one.
#[test]
fn eviction_against_removal_and_another_flow_on_the_same_port() {
    in_all_ways(
        || Interleaved::new().after(&[syn(ALICE)]).with_slots_held(2),
        [
            |tables| drop(tables.run(&syn(BOB))),
            |tables| {
                sweep(tables, &kept(), SweepMode::ALL);
                tables.run(&syn(CAROL));
            },
        ],
        |_| {},
    );
}

#[test]
fn promotion_against_eviction() {
    in_all_ways(
        || Interleaved::new().after(&[syn(ALICE), syn_ack()]).with_slots_held(1),
        [|tables| drop(tables.run(&ack(ALICE))), |tables| drop(tables.run(&syn(BOB)))],
        |tables| {
            let confirmed = tables.events.borrow().contains_key(&SessionEvent::Confirmed);
            let evicted = tables.events.borrow().contains_key(&SessionEvent::Evicted);
            assert!(confirmed != evicted, "{:?}", tables.events.borrow());
            let alice = tables.session_of(&key_of(ALICE));
            if confirmed {
                let (key, session) = alice.expect("what was established stays");
                assert_eq!((key, session.state.phase()), (kept(), Phase::Live));
            }
        },
    );
}

#[test]
fn promotion_against_both_sides_packets_and_a_sweep() {
    in_all_ways(
        || Interleaved::new().after(&[syn(ALICE), syn_ack()]),
        [
            |tables| drop(tables.run(&ack(ALICE))),
            |tables| drop(tables.run(&syn_ack())),
            |tables| _ = sweep(tables, &kept(), SweepMode::EXPIRED),
        ],
        |tables| {
            let (_, session) = tables.session_of(&key_of(ALICE)).expect("it is not expired");
            assert!(session.state.any(State::REPLIED));
        },
    );
}

/// All ports that a flow would try are held; the only session that may be evicted is promoted, or swept, meanwhile.
#[test]
fn eviction_by_port() {
    in_all_ways(
        crowded,
        [
            |tables| drop(tables.run(&syn(BOB))),
            |tables| {
                tables.run(&ack(ALICE));
            },
        ],
        |tables| {
            if tables.events.borrow().contains_key(&SessionEvent::Confirmed) {
                let (key, session) = tables.session_of(&key_of(ALICE)).expect("what was established stays");
                assert_eq!((key, session.state.phase()), (kept(), Phase::Live));
            }
        },
    );
    in_all_ways(
        crowded,
        [
            |tables| drop(tables.run(&syn(BOB))),
            |tables| {
                sweep(tables, &kept(), SweepMode::ALL);
                tables.run(&syn(CAROL));
            },
        ],
        |_| {},
    );
}

/// Alice's answered session has the port that Bob wants, and established sessions have all others that he would try.
fn crowded() -> Interleaved {
    let tables = Interleaved::new().after(&[syn(ALICE), syn_ack()]);
    for (slot, &key) in (1_000..).zip(PROBED.iter()) {
        tables.hold(key, Phase::Live, NOW, slot);
        tables.quiet.borrow_mut().insert(key);
    }
    tables
}

/// The ports that Bob tries after his own: what he gets when the ones before are taken.
static PROBED: LazyLock<Vec<ReverseKey>> = LazyLock::new(|| {
    let host = host();
    let mut probed = Vec::new();
    host.sessions.now.set(NOW);
    loop {
        host.run(&syn(BOB));
        let sessions = &host.sessions;
        let Some(entry) = sessions.forward.borrow_mut().remove(&key_of(BOB)) else { break };
        let key = entry.reverse_key(&key_of(BOB));
        let session = sessions.reverse.borrow()[&key].get();
        sessions
            .reverse
            .borrow_mut()
            .insert(key, Rc::new(Shared::new(Reverse { state: State::new(Phase::Live), ..session })));
        sessions.slots.borrow_mut().clear();
        probed.push(key);
    }
    assert_eq!(probed.remove(0), kept());
    probed
});

#[test]
fn a_packet_against_the_sweep_of_its_expired_session() {
    in_all_ways(
        || {
            let tables = Interleaved::new().after(&[syn(ALICE), syn_ack(), ack(ALICE)]);
            let (key, _) = tables.session_of(&key_of(ALICE)).unwrap();
            let long_ago = NOW - Timeouts::DEFAULT.tcp_established - 1;
            tables.reverse.get(&key).unwrap().set_seen(long_ago);
            tables.forward.get(&key_of(ALICE)).unwrap().set_seen(long_ago);
            tables
        },
        [
            |tables| drop(tables.run(&ack(ALICE))),
            |tables| _ = sweep(tables, &kept(), SweepMode::EXPIRED),
            |tables| drop(tables.run(&syn(BOB))),
        ],
        |_| {},
    );
}

#[test]
fn a_flow_that_goes_on_while_its_session_is_flushed() {
    in_all_ways(
        || Interleaved::new().after(&[syn(ALICE), syn_ack()]),
        [
            |tables| drop(tables.run(&syn(ALICE))),
            |tables| _ = sweep(tables, &kept(), SweepMode::ALL),
            |tables| drop(tables.run(&syn(ALICE))),
        ],
        |_| {},
    );
}

#[test]
fn two_sweeps_of_one_session() {
    in_all_ways(
        || Interleaved::new().after(&[syn(ALICE)]),
        [
            |tables| _ = sweep(tables, &kept(), SweepMode::ALL),
            |tables| _ = sweep(tables, &kept(), SweepMode::ALL),
            |tables| drop(tables.run(&syn(BOB))),
        ],
        |_| {},
    );
}

/// An entry that is written to after it was recycled: what was its session's is put right by the next packet of the
/// session that has it now.
#[test]
fn a_client_that_moves_while_its_session_becomes_another_flows() {
    in_all_ways(
        || Interleaved::new().after(&[syn(ALICE), syn_ack()]),
        [
            |tables| drop(tables.run(&by_way_of(OTHER_ROUTER, &ack(ALICE)))),
            |tables| {
                sweep(tables, &kept(), SweepMode::ALL);
                tables.run(&syn(CAROL));
            },
        ],
        |tables| {
            tables.run(&syn(CAROL));
            tables.run(&ack(CAROL));
            let (_, session) = tables.session_of(&key_of(CAROL)).expect("a session");
            assert_eq!(session.last_hop.mac, Mac::new(CLIENT_NIC));
            let forward = tables.forward.get(&key_of(CAROL)).unwrap().get();
            assert_eq!(forward.last_hop, session.last_hop);
            assert!(forward.confirmed == 0 || session.state.phase() == Phase::Live, "{session:?}");
        },
    );
}

#[test]
fn a_pod_that_moves_while_its_session_becomes_another_flows() {
    in_all_ways(
        || {
            let tables = Interleaved::new().after(&[syn(ALICE), syn_ack()]);
            let alice = tables.forward.get(&key_of(ALICE)).unwrap();
            alice.set_vtep(OTHER_ID);
            alice.set_generation(0);
            tables
        },
        [
            |tables| drop(tables.run(&ack(ALICE))),
            |tables| {
                sweep(tables, &kept(), SweepMode::ALL);
                tables.run(&to_other_pod());
            },
        ],
        |tables| {
            tables.run(&to_other_pod());
            let key = ForwardKey { destination: Ipv4::new(OTHER_POD), ..key_of(CAROL) };
            let (_, session) = tables.session_of(&key).expect("a session");
            let forward = tables.forward.get(&key).unwrap().get();
            assert_eq!((forward.vtep, forward.generation), (OTHER_ID, 1));
            assert_eq!(session.vtep, OTHER_ID);
        },
    );
}

const OTHER_ROUTER: [u8; 6] = [0x52, 0x54, 0, 0, 0, 0x99];

/// The same frame from another station.
fn by_way_of(station: [u8; 6], frame: &[u8]) -> Vec<u8> {
    let mut frame = frame.to_vec();
    frame[6..12].copy_from_slice(&station);
    frame
}

fn to_other_pod() -> Vec<u8> {
    ethernet(NIC, CLIENT_NIC, 0x0800, &packet(CAROL, OTHER_POD, (PORT, SERVICE), SYN, (100, 0)))
}
