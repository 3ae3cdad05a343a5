//! Frame and tables of the host: the engine runs on them under `cargo test`, and program tests compare the loaded
//! object with them.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    rc::Rc,
};

use crate::{
    abi::{
        Config, Counter, Egress, Forward, ForwardKey, LocalAddress, OverlayAddress, PrefixKey, Reverse,
        ReverseKey, Route, SessionEvent, State, Ticks, Vtep,
    },
    engine::{
        Fib, FibQuery, Frame, Inserted, Sessions, Tables, Verdict, WayOut, process,
        session::{Opening, Shared},
    },
    wire::{Ipv4, Wire, view},
};

/// Bytes in front of a frame, as the kernel has them (`XDP_PACKET_HEADROOM`).
pub const HEADROOM: usize = 256;

/// A frame in a vector.
#[derive(Clone, Debug)]
pub struct HostFrame {
    buffer: Vec<u8>,
    start: usize,
    /// Bytes at the end that are counted only after [`Frame::measure`].
    unseen: usize,
}

impl HostFrame {
    /// A frame of these bytes with the usual headroom.
    pub fn new(bytes: &[u8]) -> Self {
        Self::with_headroom(bytes, HEADROOM)
    }

    /// A frame of these bytes with this many bytes in front.
    pub fn with_headroom(bytes: &[u8], headroom: usize) -> Self {
        let mut buffer = vec![0; headroom];
        buffer.extend_from_slice(bytes);
        Self { buffer, start: headroom, unseen: 0 }
    }

    /// The same frame, of which the last `bytes` bytes are in fragments of their own, as cards leave them that split
    /// headers off.
    #[must_use]
    pub fn split(self, bytes: usize) -> Self {
        Self { unseen: bytes, ..self }
    }

    /// The frame's bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.buffer[self.start..]
    }
}

/// Linux keeps room for its `struct xdp_frame` at the start of the headroom.
const RESERVED: usize = 40;

impl Frame for HostFrame {
    fn len(&self) -> u32 {
        u32::try_from(self.bytes().len() - self.unseen).unwrap_or(u32::MAX)
    }

    fn measure(&mut self) {
        self.unseen = 0;
    }

    fn read<T: Wire>(&self, offset: usize) -> Option<&T> {
        view::at(self.bytes(), offset)
    }

    fn write<T: Wire>(&mut self, offset: usize) -> Option<&mut T> {
        view::at_mut(&mut self.buffer[self.start..], offset)
    }

    fn grow_front(&mut self, by: i32) -> bool {
        let start = i64::try_from(self.start).unwrap_or(i64::MAX) - i64::from(by);
        // As bpf_xdp_adjust_head: at least an Ethernet header must be left.
        match usize::try_from(start) {
            Ok(start) if start >= RESERVED && start + 14 <= self.buffer.len() => {
                self.start = start;
                true
            }
            _ => false,
        }
    }

    fn truncate(&mut self, len: u32) -> bool {
        let end = self.start + len as usize;
        let possible = end <= self.buffer.len();
        self.buffer.truncate(end);
        possible
    }
}

/// Tables in ordinary maps.
#[derive(Clone, Debug, Default)]
pub struct HostTables {
    /// Constants.
    pub config: Config,
    /// Exact pods.
    pub pods: BTreeMap<OverlayAddress, Route>,
    /// Prefixes: (overlay, length of the CIDR, network address).
    pub prefixes: BTreeMap<(u32, u8, Ipv4), Route>,
    /// VTEPs by id.
    pub vteps: BTreeMap<u32, Vtep>,
    /// Outer sources.
    pub sources: BTreeMap<OverlayAddress, Route>,
    /// Addresses of the host.
    pub addresses: BTreeMap<Ipv4, LocalAddress>,
    /// Ways out.
    pub egress: BTreeMap<u32, Egress>,
    /// The FIB's answers by destination; all others are not forwarded.
    pub fib: BTreeMap<Ipv4, FibEntry>,
    /// The way out that is remembered: of one flow at a time.
    pub way_out: RefCell<WayOut>,
    /// How many more ICMP errors may be sent.
    pub icmp_allowance: Cell<u32>,
    /// What was counted.
    pub counters: RefCell<BTreeMap<u32, Counter>>,
    /// Sessions.
    pub sessions: HostSessions,
}

/// The tables of sessions in ordinary maps. A clone shares them.
#[derive(Clone, Debug, Default)]
pub struct HostSessions {
    /// The time.
    pub now: Rc<Cell<Ticks>>,
    /// By the client's side.
    pub forward: Rc<RefCell<BTreeMap<ForwardKey, Rc<Shared<Forward>>>>>,
    /// By the pod's side.
    pub reverse: Rc<RefCell<BTreeMap<ReverseKey, Rc<Shared<Reverse>>>>>,
    /// Holders of slots.
    pub slots: Rc<RefCell<BTreeMap<u32, ReverseKey>>>,
    /// Where the search for a slot begins.
    pub hand: Rc<Cell<u32>>,
    /// What became of sessions.
    pub events: Rc<RefCell<BTreeMap<SessionEvent, u64>>>,
    /// How many entries each of the two tables takes.
    pub capacity: Option<usize>,
}

/// A modelled answer of the FIB.
#[derive(Clone, Copy, Debug)]
pub struct FibEntry {
    /// The answer.
    pub answer: Fib,
    /// MTU of the way, which the kernel looks at before the neighbour; larger packets are [`Fib::TooBig`].
    pub mtu: u16,
}

impl HostTables {
    /// Runs the engine on a frame, counts it, and gives the verdict and the frame after it.
    pub fn run(&self, bytes: &[u8]) -> (Verdict, Vec<u8>) {
        let mut frame = HostFrame::new(bytes);
        let verdict = process(&mut frame, self);
        let mut counters = self.counters.borrow_mut();
        let counter = counters.entry(verdict.number()).or_default();
        counter.packets += 1;
        counter.bytes += bytes.len() as u64;
        (verdict, frame.bytes().to_vec())
    }
}

/// The network address of `address` under a prefix of `length` bits.
fn network(address: Ipv4, length: u8) -> Ipv4 {
    let mask = u32::MAX.checked_shl(32 - u32::from(length)).unwrap_or(0);
    Ipv4::new((u32::from_be_bytes(address.octets) & mask).to_be_bytes())
}

impl HostSessions {
    fn insert<K: Ord + Copy, V>(
        &self,
        table: &RefCell<BTreeMap<K, Rc<Shared<V>>>>,
        key: &K,
        value: impl FnOnce() -> V,
    ) -> Inserted {
        let mut table = table.borrow_mut();
        if table.contains_key(key) {
            return Inserted::Exists;
        }
        if self.capacity.is_some_and(|capacity| table.len() >= capacity) {
            return Inserted::Full;
        }
        table.insert(*key, Rc::new(Shared::new(value())));
        Inserted::Done
    }
}

impl Sessions for HostTables {
    type Forward<'a> = Rc<Shared<Forward>>;
    type Reverse<'a> = Rc<Shared<Reverse>>;

    fn ticks(&self) -> Ticks {
        self.sessions.now.get()
    }

    fn forward(&self, key: &ForwardKey) -> Option<Self::Forward<'_>> {
        self.sessions.forward.borrow().get(key).cloned()
    }

    fn reverse(&self, key: &ReverseKey) -> Option<Self::Reverse<'_>> {
        self.sessions.reverse.borrow().get(key).cloned()
    }

    fn insert_forward(&self, key: &ForwardKey, value: impl FnOnce() -> Forward) -> Inserted {
        self.sessions.insert(&self.sessions.forward, key, value)
    }

    fn insert_reverse(&self, key: &ReverseKey, value: impl FnOnce() -> Reverse) -> Inserted {
        self.sessions.insert(&self.sessions.reverse, key, value)
    }

    fn remove_forward(&self, key: &ForwardKey) {
        self.sessions.forward.borrow_mut().remove(key);
    }

    fn remove_reverse(&self, key: &ReverseKey) {
        self.sessions.reverse.borrow_mut().remove(key);
    }

    fn exchange(&self, session: &Shared<Reverse>, old: State, new: State) -> bool {
        session.exchange(old, new)
    }

    fn advance_hand(&self, by: u32) -> u32 {
        self.sessions.hand.replace(self.sessions.hand.get().wrapping_add(by))
    }

    fn slot(&self, index: u32) -> ReverseKey {
        self.sessions.slots.borrow().get(&index).copied().unwrap_or_default()
    }

    fn set_slot(&self, index: u32, session: &ReverseKey) {
        self.sessions.slots.borrow_mut().insert(index, *session);
    }

    fn note(&self, event: SessionEvent) {
        *self.sessions.events.borrow_mut().entry(event).or_default() += 1;
    }

    fn with_opening(&self, work: impl FnOnce(&mut Opening) -> u64) -> u64 {
        work(&mut Opening::default())
    }

    fn repeat(&self, count: u32, step: impl FnMut(u32) -> bool) {
        let _ = (0..count).any(step);
    }
}

impl Tables for HostTables {
    fn config(&self) -> &Config {
        &self.config
    }

    fn pod(&self, key: &OverlayAddress) -> Option<Route> {
        self.pods.get(key).copied()
    }

    fn prefix(&self, key: PrefixKey) -> Option<Route> {
        (0..=32).rev().find_map(|length| {
            self.prefixes.get(&(key.overlay, length, network(key.address, length))).copied()
        })
    }

    fn vtep(&self, id: u32) -> Option<&Vtep> {
        self.vteps.get(&id)
    }

    fn source(&self, key: &OverlayAddress) -> Option<Route> {
        self.sources.get(key).copied()
    }

    fn address(&self, address: Ipv4) -> Option<LocalAddress> {
        self.addresses.get(&address).copied()
    }

    fn egress(&self, ifindex: u32) -> Option<Egress> {
        self.egress.get(&ifindex).copied()
    }

    fn may_answer(&self) -> bool {
        let allowance = self.icmp_allowance.get();
        self.icmp_allowance.set(allowance.saturating_sub(1));
        allowance > 0
    }

    fn fib(&self, query: &FibQuery) -> Fib {
        match self.fib.get(&query.destination) {
            Some(entry) if query.total_length > entry.mtu => Fib::TooBig,
            Some(entry) => entry.answer,
            None => Fib::NotForwarded,
        }
    }

    fn with_way_out<R>(&self, _: &FibQuery, work: impl FnOnce(&mut WayOut) -> R) -> Option<R> {
        Some(work(&mut self.way_out.borrow_mut()))
    }
}
