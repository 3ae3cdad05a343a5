//! How many operations on tables a packet costs, by case: exact, and the same on every machine.
//!
//! Counted is what the engine asks of its tables when it runs on the host on a case's frame, the second of its flow. The loaded program runs the same
//! engine, where each of these is one call of a helper (or, for arrays, its inlined equivalent). Not counted are the
//! counters and scratch space of the CPU, which are arrays with one address.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    path::Path,
};

use anyhow::{Context as _, Result, ensure};
use gateway::kernel::host::Host;
use gateway_common::{
    abi::{
        Config, Egress, Forward, ForwardKey, LocalAddress, OverlayAddress, PrefixKey, Reverse, ReverseKey,
        Route, SessionEvent, State, Ticks, Vtep, map,
    },
    engine::{
        Fib, FibQuery, Inserted, Sessions, Tables, WayOut, process,
        session::{Opening, Shared},
    },
    model::{FibEntry, HostFrame, HostTables},
    wire::Ipv4,
};

use super::cases::{self, CASES, Subject};
use crate::bench::{
    flow::{CLIENT_MAC, CLIENTS, EXTERNAL, own_client},
    place::{self, Place, Scale, Side},
};

/// The kernel's FIB, among the tables.
const FIB: &str = "FIB";
/// The program's own table of the FIB's answers.
const WAY_OUT: &str = "WAY_OUT";
/// The program's own table of ICMP errors.
const ICMP_LIMIT: &str = "ICMP_LIMIT";

/// Operations on each table for the packet of each case.
pub type Counts = BTreeMap<&'static str, BTreeMap<&'static str, u32>>;

/// Counts them.
///
/// # Errors
/// When a packet has another outcome than was meant.
pub fn count() -> Result<Counts> {
    let scale = Scale { pods: 10, nodes: 2, flows: 1 };
    let host = place::host();
    let config = place::config(Path::new("/sys/fs/bpf"), "count", scale)?;
    let side = |side| -> Result<HostTables> {
        Ok(HostTables {
            config: place::program_constants(&config, &host, side, config.snat.slots())?,
            fib: fib(&host)?,
            icmp_allowance: Cell::new(u32::MAX),
            ..place::tables(&config, &host, scale)?
        })
    };
    let mut place = Place::new(scale, &host)?;
    let asked = side(Side::External)?;
    place.choose_clients(|frame| Ok(asked.run(frame).1))?;

    let mut counts = Counts::new();
    for case in &CASES {
        let Subject::Gateway(of, outcome) = case.subject else { continue };
        // Sessions are shared by the programs of both sides, and are anew in each case.
        let external = side(Side::External)?;
        let underlay = HostTables { sessions: external.sessions.clone(), ..side(Side::Underlay)? };
        let tables = |side| match side {
            Side::External => &external,
            Side::Underlay => &underlay,
        };
        for (side, outcome, feed) in cases::handshake(&place) {
            let (verdict, _) = tables(side).run(&feed.frame);
            ensure!(verdict.number() == outcome.number(), "{verdict:?} instead of {outcome:?}");
        }
        let frame = (case.feed)(&place).frame;
        if !case.opens_sessions() {
            // What a flow's first packet has to find out for those that follow.
            tables(of).run(&frame);
        }
        let counting = Counting { tables: tables(of), counts: RefCell::default() };
        let verdict = process(&mut HostFrame::new(&frame), &counting);
        ensure!(verdict.number() == outcome.number(), "{}: {verdict:?} instead of {outcome:?}", case.name);
        counts.insert(case.name, counting.counts.into_inner());
    }
    Ok(counts)
}

/// What its FIB says of the clients that are routed.
fn fib(host: &Host) -> Result<BTreeMap<Ipv4, FibEntry>> {
    let link = place::link(host, EXTERNAL)?;
    let source = link.mac.context("no MAC address")?;
    let answer = Fib::Forward { ifindex: link.index, source, next_hop: CLIENT_MAC, mtu: 1500 };
    Ok((0..CLIENTS).map(|client| (own_client(client), FibEntry { answer, mtu: 1500 })).collect())
}

/// Tables that count how often each of them is asked or changed.
struct Counting<'a> {
    tables: &'a HostTables,
    counts: RefCell<BTreeMap<&'static str, u32>>,
}

impl Counting<'_> {
    fn touch(&self, table: &'static str) -> &HostTables {
        *self.counts.borrow_mut().entry(table).or_default() += 1;
        self.tables
    }
}

impl Sessions for Counting<'_> {
    type Forward<'a>
        = <HostTables as Sessions>::Forward<'a>
    where
        Self: 'a;
    type Reverse<'a>
        = <HostTables as Sessions>::Reverse<'a>
    where
        Self: 'a;

    fn ticks(&self) -> Ticks {
        self.tables.ticks()
    }

    fn forward(&self, key: &ForwardKey) -> Option<Self::Forward<'_>> {
        self.touch(map::FORWARD).forward(key)
    }

    fn reverse(&self, key: &ReverseKey) -> Option<Self::Reverse<'_>> {
        self.touch(map::REVERSE).reverse(key)
    }

    fn insert_forward(&self, key: &ForwardKey, value: impl FnOnce() -> Forward) -> Inserted {
        self.touch(map::FORWARD).insert_forward(key, value)
    }

    fn insert_reverse(&self, key: &ReverseKey, value: impl FnOnce() -> Reverse) -> Inserted {
        self.touch(map::REVERSE).insert_reverse(key, value)
    }

    fn remove_forward(&self, key: &ForwardKey) {
        self.touch(map::FORWARD).remove_forward(key);
    }

    fn remove_reverse(&self, key: &ReverseKey) {
        self.touch(map::REVERSE).remove_reverse(key);
    }

    fn exchange(&self, session: &Shared<Reverse>, old: State, new: State) -> bool {
        self.tables.exchange(session, old, new)
    }

    fn advance_hand(&self, by: u32) -> u32 {
        self.touch(map::HAND).advance_hand(by)
    }

    fn slot(&self, index: u32) -> ReverseKey {
        self.touch(map::SLOTS).slot(index)
    }

    fn set_slot(&self, index: u32, session: &ReverseKey) {
        self.touch(map::SLOTS).set_slot(index, session);
    }

    fn note(&self, event: SessionEvent) {
        self.tables.note(event);
    }

    fn with_opening(&self, work: impl FnOnce(&mut Opening) -> u64) -> u64 {
        self.tables.with_opening(work)
    }

    fn repeat(&self, count: u32, step: impl FnMut(u32) -> bool) {
        self.tables.repeat(count, step);
    }
}

impl Tables for Counting<'_> {
    fn config(&self) -> &Config {
        self.tables.config()
    }

    fn pod(&self, key: &OverlayAddress) -> Option<Route> {
        self.touch(map::PODS).pod(key)
    }

    fn prefix(&self, key: PrefixKey) -> Option<Route> {
        self.touch(map::PREFIXES).prefix(key)
    }

    fn vtep(&self, id: u32) -> Option<&Vtep> {
        self.touch(map::VTEPS).vtep(id)
    }

    fn source(&self, key: &OverlayAddress) -> Option<Route> {
        self.touch(map::SOURCES).source(key)
    }

    fn address(&self, address: Ipv4) -> Option<LocalAddress> {
        self.touch(map::ADDRESSES).address(address)
    }

    fn egress(&self, ifindex: u32) -> Option<Egress> {
        self.touch(map::EGRESS).egress(ifindex)
    }

    fn fib(&self, query: &FibQuery) -> Fib {
        self.touch(FIB).fib(query)
    }

    fn with_way_out<R>(&self, query: &FibQuery, work: impl FnOnce(&mut WayOut) -> R) -> Option<R> {
        self.touch(WAY_OUT).with_way_out(query, work)
    }

    fn may_answer(&self) -> bool {
        self.touch(ICMP_LIMIT).may_answer()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Design: one look-up serves a session's packet completely, and says how to reach its pod.
    #[test]
    fn a_packet_of_a_session_is_looked_up_once() {
        let counts = count().unwrap();
        assert_eq!(counts["program.snat.established"][map::FORWARD], 1);
        assert_eq!(counts["program.snat.established"].get(map::PODS), None);
        assert_eq!(counts["program.snat.reply"][map::REVERSE], 1);
    }

    /// An exact pod costs no search in the trie.
    #[test]
    fn prefixes_are_searched_only_for_unknown_pods() {
        let counts = count().unwrap();
        assert_eq!(counts["program.encap.pod"].get(map::PREFIXES), None);
        assert_eq!(counts["program.encap.prefix"][map::PREFIXES], 1);
    }
}
