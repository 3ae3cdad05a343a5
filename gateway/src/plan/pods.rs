//! Pods, and who has which address.
//!
//! Addresses are given to new pods when old ones end, and a listing may still show both. A pod that is not being
//! deleted goes before one that is, then the newest, then the first by name.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, HashMap},
    net::Ipv4Addr,
    sync::Arc,
};

use k8s_openapi::jiff::Timestamp;

use crate::cluster::{
    flannel::{PodFacts, PodReading, PodSkip},
    model::PodRef,
    problem::{Origin, Problem},
};

/// Order of precedence among pods with the same address.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
    terminating: bool,
    created: Reverse<Option<Timestamp>>,
    pod: PodRef,
}

/// Pods with the same address, best first, and their nodes. Nearly always one, so the room for it is all that is taken.
type Claims = Vec<(Rank, Arc<str>)>;

/// A pod that claims an address.
#[derive(Clone, Copy, Debug)]
pub(super) struct Claimant<'a> {
    pub(super) pod: &'a PodRef,
    pub(super) node: &'a Arc<str>,
    pub(super) terminating: bool,
}

#[derive(Debug, Default)]
pub(super) struct Pods {
    readings: HashMap<PodRef, PodReading>,
    claims: HashMap<Ipv4Addr, Claims>,
    by_node: HashMap<Arc<str>, BTreeSet<(Ipv4Addr, PodRef)>>,
    contested: BTreeSet<Ipv4Addr>,
    rejected: BTreeSet<PodRef>,
    revision: u64,
}

impl Pods {
    /// Rises with everything that is known.
    pub(super) fn revision(&self) -> u64 {
        self.revision
    }

    /// Replaces what is known about a pod, `None` if it is gone; returns the addresses whose claims changed.
    pub(super) fn set(&mut self, pod: &PodRef, reading: Option<PodReading>) -> BTreeSet<Ipv4Addr> {
        let mut touched = BTreeSet::new();
        if self.readings.get(pod) == reading.as_ref() {
            return touched;
        }
        self.revision += 1;
        self.rejected.remove(pod);
        if let Some(PodReading::Placed(facts)) = self.readings.remove(pod) {
            self.unindex(pod, &facts);
            touched.insert(facts.address);
        }
        match &reading {
            Some(PodReading::Placed(facts)) => {
                self.index(pod, facts);
                touched.insert(facts.address);
            }
            Some(PodReading::Rejected(_)) => {
                self.rejected.insert(pod.clone());
            }
            Some(PodReading::Skipped(_)) | None => {}
        }
        if let Some(reading) = reading {
            self.readings.insert(pod.clone(), reading);
        }
        touched
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &PodRef> {
        self.readings.keys()
    }

    /// Pods that claim an address, best claim first.
    pub(super) fn claimants(&self, address: Ipv4Addr) -> impl Iterator<Item = Claimant<'_>> {
        let claims = self.claims.get(&address).into_iter().flatten();
        claims.map(|(rank, node)| Claimant { pod: &rank.pod, node, terminating: rank.terminating })
    }

    /// Addresses that are claimed.
    pub(super) fn addresses(&self) -> impl Iterator<Item = Ipv4Addr> {
        self.claims.keys().copied()
    }

    /// A node's pods and their addresses.
    pub(super) fn on(&self, node: &str) -> impl Iterator<Item = &(Ipv4Addr, PodRef)> {
        self.by_node.get(node).into_iter().flatten()
    }

    /// Where a pod is, if it has an address.
    pub(super) fn placed(&self, pod: &PodRef) -> Option<&PodFacts> {
        match self.readings.get(pod)? {
            PodReading::Placed(facts) => Some(facts),
            _ => None,
        }
    }

    /// Where the source has a pod from.
    pub(super) fn origin(&self, pod: &PodRef) -> &Origin {
        self.placed(pod).map_or(&None, |facts| &facts.origin)
    }

    /// Addresses that several pods claim.
    pub(super) fn contested(&self) -> impl Iterator<Item = Ipv4Addr> {
        self.contested.iter().copied()
    }

    pub(super) fn rejected(&self) -> impl Iterator<Item = &Problem> {
        self.rejected.iter().filter_map(|pod| match self.readings.get(pod) {
            Some(PodReading::Rejected(problem)) => Some(problem),
            _ => None,
        })
    }

    /// How many pods are left out for each reason.
    pub(super) fn skipped(&self) -> BTreeMap<PodSkip, usize> {
        let mut counts = BTreeMap::new();
        for reading in self.readings.values() {
            if let PodReading::Skipped(reason) = reading {
                *counts.entry(*reason).or_default() += 1;
            }
        }
        counts
    }

    fn index(&mut self, pod: &PodRef, facts: &PodFacts) {
        let node = self.by_node.get_key_value(&facts.node).map_or(&facts.node, |(node, _)| node).clone();
        self.by_node.entry(node.clone()).or_default().insert((facts.address, pod.clone()));
        let claims = self.claims.entry(facts.address).or_insert_with(|| Vec::with_capacity(1));
        let rank = rank(pod, facts);
        let place = claims.partition_point(|(other, _)| *other < rank);
        claims.insert(place, (rank, node));
        if claims.len() > 1 {
            self.contested.insert(facts.address);
        }
    }

    fn unindex(&mut self, pod: &PodRef, facts: &PodFacts) {
        if let Some(pods) = self.by_node.get_mut(&facts.node) {
            pods.remove(&(facts.address, pod.clone()));
            if pods.is_empty() {
                self.by_node.remove(&facts.node);
            }
        }
        if let Some(claims) = self.claims.get_mut(&facts.address) {
            claims.retain(|(rank, _)| rank.pod != *pod);
            if claims.len() < 2 {
                self.contested.remove(&facts.address);
            }
            if claims.is_empty() {
                self.claims.remove(&facts.address);
            }
        }
    }
}

fn rank(pod: &PodRef, facts: &PodFacts) -> Rank {
    Rank { terminating: facts.terminating, created: Reverse(facts.created), pod: pod.clone() }
}
