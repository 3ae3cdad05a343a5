//! The nodes of one overlay, and which of them are VTEPs.
//!
//! Nodes that claim the same MAC address, the same endpoint or overlapping pod CIDRs cannot all be VTEPs. Nodes are
//! ranked by age, then by name, and taken in that order unless they clash with one that is taken already. So the
//! result does not depend on the order of events, and a node that lost takes over when the winner goes. A node whose
//! podCIDR overlaps a LAN of this host is never taken: the gateway would answer ARP for the hosts there.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::Ipv4Addr,
    sync::{Arc, OnceLock},
};

use gateway_common::wire::Mac;
use ipnet::Ipv4Net;
use k8s_openapi::jiff::Timestamp;

use super::{Lan, VtepSpec, nets::NetIndex, planner::source};
use crate::{
    cluster::{
        flannel::{BACKEND_DATA, NodeFacts, NodeReading, NodeSkip, POD_CIDR, PUBLIC_IP},
        problem::Problem,
    },
    config::{Overlay, SourceCheck},
};

/// Order of precedence: the oldest first; a node that does not tell its age comes after those that do.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
    ageless: bool,
    created: Option<Timestamp>,
    name: Arc<str>,
}

/// How good a claim to an outer source address is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum SourceClaim {
    Endpoint,
    Configured,
    NodeAddress,
}

#[derive(Debug)]
struct Record {
    reading: NodeReading,
    vtep: bool,
}

/// What an update may have changed: the keys to compute again.
#[derive(Debug, Default)]
pub(super) struct Touched {
    pub(super) vteps: BTreeSet<Arc<str>>,
    pub(super) prefixes: BTreeSet<Ipv4Net>,
    pub(super) sources: BTreeSet<Ipv4Addr>,
}

/// Whether pods of a node belong to the overlay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Membership {
    /// Not of this overlay, or not known.
    None,
    /// Of this overlay, but it lost against another node.
    Unreachable,
    /// A VTEP.
    Vtep,
}

#[derive(Debug)]
pub(super) struct Nodes {
    overlay: Arc<Overlay>,
    records: BTreeMap<Arc<str>, Record>,
    macs: HashMap<Mac, BTreeSet<Rank>>,
    endpoints: HashMap<Ipv4Addr, BTreeSet<Rank>>,
    cidrs: NetIndex<Rank>,
    sources: HashMap<Ipv4Addr, BTreeSet<(SourceClaim, Rank)>>,
    /// Where no pods can be.
    lans: BTreeSet<Lan>,
    /// What is wrong, once somebody asked; forgotten when a node changes.
    problems: OnceLock<Vec<Problem>>,
    revision: u64,
}

impl Nodes {
    pub(super) fn new(overlay: Arc<Overlay>) -> Self {
        Self {
            overlay,
            records: BTreeMap::new(),
            macs: HashMap::new(),
            endpoints: HashMap::new(),
            cidrs: NetIndex::default(),
            sources: HashMap::new(),
            lans: BTreeSet::new(),
            problems: OnceLock::new(),
            revision: 0,
        }
    }

    /// Rises with everything that is known.
    pub(super) fn revision(&self) -> u64 {
        self.revision
    }

    /// Replaces what is known about a node; `None` if it is gone.
    pub(super) fn set(&mut self, name: &Arc<str>, reading: Option<NodeReading>) -> Touched {
        let mut touched = Touched::default();
        if self.records.get(name).map(|record| &record.reading) == reading.as_ref() {
            return touched;
        }
        self.revision += 1;
        self.problems.take();
        let mut queue = BTreeSet::new();
        if let Some(old) = self.records.remove(name)
            && let NodeReading::Vtep(facts, _) = old.reading
        {
            let rank = rank(name, &facts);
            self.unindex(&rank, &facts);
            queue.extend(self.rivals(&facts).cloned());
            self.touch(name, &facts, &mut touched);
        }
        if let Some(reading) = reading {
            if let NodeReading::Vtep(facts, _) = &reading {
                let rank = rank(name, facts);
                queue.extend(self.rivals(facts).cloned());
                self.index(&rank, facts);
                self.touch(name, facts, &mut touched);
                queue.insert(rank);
            }
            self.records.insert(name.clone(), Record { reading, vtep: false });
        }
        self.decide(queue, &mut touched);
        touched
    }

    /// Replaces the networks on this host's links. One that holds the whole network of the overlay is no hindrance: its
    /// stations ask for pods by ARP.
    pub(super) fn set_lans(&mut self, lans: &BTreeSet<Lan>) -> Touched {
        let network = self.overlay.network;
        let holds = |lan: &&Lan| !network.is_some_and(|network| lan.network.contains(&network));
        let lans: BTreeSet<Lan> = lans.iter().filter(holds).cloned().collect();
        let mut touched = Touched::default();
        if self.lans == lans {
            return touched;
        }
        self.revision += 1;
        self.problems.take();
        let changed = self.lans.symmetric_difference(&lans);
        let queue = changed.flat_map(|lan| self.cidrs.overlapping(lan.network)).cloned().collect();
        self.lans = lans;
        self.decide(queue, &mut touched);
        touched
    }

    /// The LAN of this host that shares an address with a network.
    pub(super) fn lan(&self, net: Ipv4Net) -> Option<&Lan> {
        self.lans.iter().find(|lan| lan.overlaps(net))
    }

    /// Decides anew which of these nodes are VTEPs, and which others by that.
    fn decide(&mut self, mut queue: BTreeSet<Rank>, touched: &mut Touched) {
        // In order of rank: a decision depends on better ranks only, so what is popped is final.
        while let Some(rank) = queue.pop_first() {
            let Some(facts) = self.facts(&rank.name) else { continue };
            let vtep = self.lan(facts.cidr).is_none()
                && !self.rivals(facts).any(|rival| *rival < rank && self.is_vtep(&rival.name));
            if vtep == self.is_vtep(&rank.name) {
                continue;
            }
            self.touch(&rank.name, facts, touched);
            queue.extend(self.rivals(facts).filter(|rival| **rival > rank).cloned());
            if let Some(record) = self.records.get_mut(&rank.name) {
                record.vtep = vtep;
            }
        }
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &Arc<str>> {
        self.records.keys()
    }

    pub(super) fn membership(&self, name: &str) -> Membership {
        match self.records.get(name) {
            Some(Record { vtep: true, .. }) => Membership::Vtep,
            Some(Record { reading: NodeReading::Vtep(..), .. }) => Membership::Unreachable,
            _ => Membership::None,
        }
    }

    pub(super) fn vtep(&self, name: &str) -> Option<VtepSpec> {
        let facts = self.facts(name).filter(|_| self.is_vtep(name))?;
        Some(VtepSpec { endpoint: facts.endpoint, mac: facts.mac, direct: self.overlay.direct_routing })
    }

    pub(super) fn prefix(&self, cidr: Ipv4Net) -> Option<Arc<str>> {
        self.cidrs.exactly(cidr).find(|rank| self.is_vtep(&rank.name)).map(|rank| rank.name.clone())
    }

    pub(super) fn source(&self, address: Ipv4Addr) -> Option<Arc<str>> {
        let claims = self.sources.get(&address)?;
        claims.iter().find(|(_, rank)| self.is_vtep(&rank.name)).map(|(_, rank)| rank.name.clone())
    }

    /// Pod CIDR of a node of this overlay.
    pub(super) fn cidr(&self, name: &str) -> Option<Ipv4Net> {
        self.facts(name).map(|facts| facts.cidr)
    }

    pub(super) fn skipped(&self) -> impl Iterator<Item = (&Arc<str>, NodeSkip)> {
        self.records.iter().filter_map(|(name, record)| match record.reading {
            NodeReading::Skipped(reason) => Some((name, reason)),
            _ => None,
        })
    }

    /// What is wrong. Costs work in proportion to the nodes if one changed since the last time.
    pub(super) fn problems(&self) -> &[Problem] {
        self.problems.get_or_init(|| self.find_problems())
    }

    fn find_problems(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        for (name, record) in &self.records {
            match &record.reading {
                NodeReading::Skipped(_) => {}
                NodeReading::Rejected(found) => problems.extend(found.iter().cloned()),
                NodeReading::Vtep(facts, warnings) => {
                    problems.extend(warnings.iter().cloned());
                    if record.vtep {
                        problems.extend(self.shared_sources(name, facts));
                    } else {
                        problems.extend(self.lost(name, facts));
                    }
                }
            }
        }
        for extra in &self.overlay.extra_sources {
            if !self.is_vtep(&extra.node) {
                problems.push(Problem::warning(
                    format!("Overlay {}, extra_sources, node {}", self.overlay.name, extra.node),
                    format!("{} is accepted from no node: there is no VTEP of that name", extra.address),
                    "check the node's name, or remove the entry",
                ));
            }
        }
        problems
    }

    /// Why a node is no VTEP: a LAN of this host, or the better-ranked VTEPs that it clashes with.
    fn lost(&self, name: &Arc<str>, facts: &NodeFacts) -> Vec<Problem> {
        let own = rank(name, facts);
        if let Some(lan) = self.lan(facts.cidr) {
            let problem = Problem::error(
                self.place(name, POD_CIDR),
                format!(
                    "{} overlaps {}, the network of this host's interface {}, whose hosts are no pods",
                    facts.cidr, lan.network, lan.interface
                ),
                match self.overlay.network {
                    Some(_) => "give the node another podCIDR, or the interface another network".to_owned(),
                    None => format!(
                        "give the node another podCIDR; if stations on {} ask for pods by ARP, set the overlay's \
                         network (flannel's Network)",
                        lan.interface
                    ),
                },
            );
            return vec![problem.located(&facts.origin)];
        }
        let winners: BTreeSet<&Rank> =
            self.rivals(facts).filter(|rival| **rival < own && self.is_vtep(&rival.name)).collect();
        let mut problems = Vec::new();
        for winner in winners {
            let Some(theirs) = self.facts(&winner.name) else { continue };
            let origin = source(&theirs.origin);
            problems.extend(clashes(facts, theirs).into_iter().map(|(field, what)| {
                Problem::error(
                    self.place(name, field),
                    format!(
                        "{what} Node {}{origin}, which has precedence (older, or first by name)",
                        winner.name
                    ),
                    "give each node its own, or delete the stale Node; until then no traffic goes to this one",
                )
                .located(&facts.origin)
            }));
        }
        problems
    }

    /// A field of a node; flannel's annotations by the part of their name that follows the overlay's prefix.
    fn place(&self, name: &str, field: &str) -> String {
        match field {
            BACKEND_DATA | PUBLIC_IP => {
                format!("Node {name}, annotation {}{field}", self.overlay.annotation_prefix)
            }
            _ => format!("Node {name}, {field}"),
        }
    }

    /// Addresses of a VTEP whose packets count as another node's.
    fn shared_sources(&self, name: &Arc<str>, facts: &NodeFacts) -> Vec<Problem> {
        self.claims(name, facts)
            .into_iter()
            .filter_map(|(claim, address)| {
                let owner = self.source(address).filter(|owner| owner != name)?;
                let origin = source(&self.facts(&owner)?.origin);
                let problem = Problem::warning(
                    match claim {
                        SourceClaim::Endpoint => self.place(name, PUBLIC_IP),
                        SourceClaim::NodeAddress => self.place(name, "status.addresses"),
                        SourceClaim::Configured => {
                            format!("Overlay {}, extra_sources, node {name}", self.overlay.name)
                        }
                    },
                    format!("{address} counts as the outer source of Node {owner}{origin}"),
                    "packets from there are checked against that node; if the nodes are behind one NAT, set source_check = \"off\"",
                );
                Some(if claim == SourceClaim::Configured { problem } else { problem.located(&facts.origin) })
            })
            .collect()
    }

    fn facts(&self, name: &str) -> Option<&NodeFacts> {
        match &self.records.get(name)?.reading {
            NodeReading::Vtep(facts, _) => Some(facts),
            _ => None,
        }
    }

    fn is_vtep(&self, name: &str) -> bool {
        self.records.get(name).is_some_and(|record| record.vtep)
    }

    /// Every indexed node that claims something of `facts`, the node itself included if it is indexed; a node may
    /// come several times.
    fn rivals(&self, facts: &NodeFacts) -> impl Iterator<Item = &Rank> {
        let macs = self.macs.get(&facts.mac).into_iter().flatten();
        let endpoints = self.endpoints.get(&facts.endpoint).into_iter().flatten();
        macs.chain(endpoints).chain(self.cidrs.overlapping(facts.cidr))
    }

    /// Outer sources that a node claims.
    fn claims(&self, name: &str, facts: &NodeFacts) -> Vec<(SourceClaim, Ipv4Addr)> {
        if self.overlay.source_check == SourceCheck::Off {
            return Vec::new();
        }
        let configured = self.overlay.extra_sources.iter().filter(|extra| extra.node == name);
        let mut claims = vec![(SourceClaim::Endpoint, facts.endpoint)];
        claims.extend(configured.map(|extra| (SourceClaim::Configured, extra.address)));
        if self.overlay.source_check == SourceCheck::Node {
            claims.extend(facts.addresses.iter().map(|address| (SourceClaim::NodeAddress, *address)));
        }
        // What comes from our own address is a loop, whoever claims it.
        claims.retain(|(_, address)| *address != self.overlay.local);
        claims
    }

    fn touch(&self, name: &Arc<str>, facts: &NodeFacts, touched: &mut Touched) {
        touched.vteps.insert(name.clone());
        touched.prefixes.insert(facts.cidr);
        touched.sources.extend(self.claims(name, facts).into_iter().map(|(_, address)| address));
    }

    fn index(&mut self, rank: &Rank, facts: &NodeFacts) {
        self.macs.entry(facts.mac).or_default().insert(rank.clone());
        self.endpoints.entry(facts.endpoint).or_default().insert(rank.clone());
        self.cidrs.insert(facts.cidr, rank.clone());
        for (claim, address) in self.claims(&rank.name, facts) {
            self.sources.entry(address).or_default().insert((claim, rank.clone()));
        }
    }

    fn unindex(&mut self, rank: &Rank, facts: &NodeFacts) {
        take(&mut self.macs, &facts.mac, rank);
        take(&mut self.endpoints, &facts.endpoint, rank);
        self.cidrs.remove(facts.cidr, rank);
        for (claim, address) in self.claims(&rank.name, facts) {
            take(&mut self.sources, &address, &(claim, rank.clone()));
        }
    }
}

fn rank(name: &Arc<str>, facts: &NodeFacts) -> Rank {
    Rank { ageless: facts.created.is_none(), created: facts.created, name: name.clone() }
}

/// Removes a value from a set in a map, and the set when it is empty.
fn take<K: std::hash::Hash + Eq, V: Ord>(map: &mut HashMap<K, BTreeSet<V>>, key: &K, value: &V) {
    if let Some(values) = map.get_mut(key) {
        values.remove(value);
        if values.is_empty() {
            map.remove(key);
        }
    }
}

/// What two nodes both claim: the field, and a sentence that lacks the other one's name.
fn clashes(ours: &NodeFacts, theirs: &NodeFacts) -> Vec<(&'static str, String)> {
    let mut clashes = Vec::new();
    if ours.mac == theirs.mac {
        clashes.push((BACKEND_DATA, format!("VtepMAC {} is also that of", ours.mac)));
    }
    if ours.endpoint == theirs.endpoint {
        clashes.push((PUBLIC_IP, format!("public-ip {} is also that of", ours.endpoint)));
    }
    if ours.cidr == theirs.cidr {
        clashes.push((POD_CIDR, format!("podCIDR {} is also that of", ours.cidr)));
    } else if ours.cidr.contains(&theirs.cidr) || theirs.cidr.contains(&ours.cidr) {
        clashes.push((POD_CIDR, format!("podCIDR {} overlaps {} of", ours.cidr, theirs.cidr)));
    }
    clashes
}
