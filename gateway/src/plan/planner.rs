//! Keeps [`Desired`] up to date, one event at a time.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    net::Ipv4Addr,
    sync::Arc,
};

use ipnet::Ipv4Net;

use super::{
    Changes, Desired, Lan, OverlayId, Surroundings, VtepKey,
    nodes::{Membership, Nodes, Touched},
    pods::{Claimant, Pods},
};
use crate::{
    cluster::{
        flannel::{NodeSkip, PodFacts, PodReading, PodSkip, read_node},
        model::{Event, Object, ObjectRef, PodRef},
        problem::{Origin, Problem, Severity},
    },
    config::Overlay,
};

/// From events to tables.
#[derive(Debug)]
pub struct Planner {
    overlays: Vec<Arc<Overlay>>,
    nodes: Vec<Nodes>,
    pods: Pods,
    /// Pods whose address is not one that their node's flannel gives out.
    misplaced: BTreeSet<PodRef>,
    surroundings: Surroundings,
    desired: Desired,
    /// What the listing under way has named so far.
    listed: Option<HashSet<ObjectRef>>,
    synced: bool,
    /// What could be read of the source has been seen.
    seen: bool,
    /// And pods are among it.
    pods_seen: bool,
}

impl Planner {
    /// A planner that knows no object yet. The index of an overlay is its id.
    pub fn new(overlays: &[Overlay]) -> Self {
        let overlays: Vec<Arc<Overlay>> = overlays.iter().cloned().map(Arc::new).collect();
        Self {
            nodes: overlays.iter().cloned().map(Nodes::new).collect(),
            overlays,
            pods: Pods::default(),
            misplaced: BTreeSet::new(),
            surroundings: Surroundings::default(),
            desired: Desired::default(),
            listed: None,
            synced: false,
            seen: false,
            pods_seen: false,
        }
    }

    /// Takes an event; returns exactly the keys whose goal is another one now.
    pub fn apply(&mut self, event: &Event) -> Changes {
        match event {
            Event::Listing => {
                self.listed = Some(HashSet::new());
                Changes::default()
            }
            Event::Apply(object) => {
                if let Some(listed) = &mut self.listed {
                    listed.insert(object.reference());
                }
                self.put(object)
            }
            Event::Delete(reference) => {
                if let Some(listed) = &mut self.listed {
                    listed.remove(reference);
                }
                self.delete(reference)
            }
            Event::Listed { pods } => {
                self.seen = true;
                self.pods_seen |= pods;
                Changes::default()
            }
            Event::Synced => self.end_listing(),
        }
    }

    /// Takes what this host is connected to; returns the keys whose goal is another one now. Costs work in proportion to
    /// the pods if that changed.
    pub fn set_surroundings(&mut self, now: Surroundings) -> Changes {
        if self.surroundings == now {
            return Changes::default();
        }
        let before = std::mem::replace(&mut self.surroundings, now);
        let now = &self.surroundings;
        let lans: Vec<Ipv4Net> = before.lans.symmetric_difference(&now.lans).map(|lan| lan.network).collect();
        let own: BTreeSet<Ipv4Addr> = before.own.symmetric_difference(&now.own).copied().collect();
        let mut changes = Changes::default();
        for index in 0..self.nodes.len() {
            let touched = self.nodes[index].set_lans(&self.surroundings.lans);
            changes.merge(self.update_nodes(index, touched));
        }
        let concerned =
            |address: &Ipv4Addr| own.contains(address) || lans.iter().any(|lan| lan.contains(address));
        let addresses: Vec<Ipv4Addr> = self.pods.addresses().filter(concerned).collect();
        for address in addresses {
            let pods: Vec<PodRef> = self.pods.claimants(address).map(|claim| claim.pod.clone()).collect();
            for pod in &pods {
                self.update_misplaced(pod);
            }
            self.update_address(address, &mut changes);
        }
        changes
    }

    /// The goal.
    pub fn desired(&self) -> &Desired {
        &self.desired
    }

    /// Whether the source has named all that can be read of it. Before that there is no goal yet.
    pub fn is_listed(&self) -> bool {
        self.seen || self.synced
    }

    /// Whether pods are among what has been named. Before that there is no goal for them.
    pub fn has_pods(&self) -> bool {
        self.pods_seen || self.synced
    }

    /// Whether a full listing has been seen. Before that an absent key means nothing.
    pub fn is_synced(&self) -> bool {
        self.synced
    }

    /// Rises when something changed that [`Self::problems`] may tell of.
    pub fn revision(&self) -> u64 {
        self.nodes.iter().map(Nodes::revision).sum::<u64>() + self.pods.revision()
    }

    /// Everything that is wrong now: with single objects, and between them. Costs work in proportion to what is wrong,
    /// and, if a node changed since the last time, to the nodes.
    pub fn problems(&self) -> Vec<Problem> {
        let mut problems: Vec<Problem> = self.nodes.iter().flat_map(Nodes::problems).cloned().collect();
        problems.extend(self.pods.rejected().cloned());
        for address in self.pods.contested() {
            let owner = (0..self.nodes.len()).find_map(|index| self.owner(index, address));
            let Some(owner) = owner.or_else(|| self.pods.claimants(address).next()) else { continue };
            let owner_origin = source(self.pods.origin(owner.pod));
            // Those that cannot have it at all are told below.
            let losers = self.pods.claimants(address).filter(|claim| {
                let refused = |problem: &Problem| problem.severity == Severity::Error;
                claim.pod != owner.pod && !self.misplacements(claim.pod).iter().any(refused)
            });
            problems.extend(losers.map(|Claimant { pod: loser, .. }| {
                Problem::error(
                    format!("{loser}, status.podIP"),
                    format!(
                        "{address} is also that of {}{owner_origin}, which has precedence (not terminating, in its node's \
                         podCIDR, newer)",
                        owner.pod
                    ),
                    "delete the stale Pod if it does not go away by itself",
                )
                .located(self.pods.origin(loser))
            }));
        }
        problems.extend(self.misplaced.iter().flat_map(|pod| self.misplacements(pod)));
        problems
    }

    /// Nodes that an overlay leaves out although nothing is wrong with them.
    pub fn skipped_nodes(&self) -> impl Iterator<Item = (OverlayId, &str, NodeSkip)> {
        (0..).zip(&self.nodes).flat_map(|(overlay, nodes)| {
            nodes.skipped().map(move |(name, reason)| (overlay, name.as_ref(), reason))
        })
    }

    /// How many pods are left out for each reason although nothing is wrong with them.
    pub fn skipped_pods(&self) -> BTreeMap<PodSkip, usize> {
        self.pods.skipped()
    }

    fn put(&mut self, object: &Object) -> Changes {
        match object {
            Object::Node(node, origin) => {
                let name: Arc<str> = node.metadata.name.as_deref().unwrap_or_default().into();
                let mut changes = Changes::default();
                for index in 0..self.nodes.len() {
                    let origin = Some(origin).filter(|origin| !origin.is_empty()).cloned();
                    let reading = read_node(node, &self.overlays[index]).located(&origin);
                    let touched = self.nodes[index].set(&name, Some(reading));
                    changes.merge(self.update_nodes(index, touched));
                }
                changes
            }
            Object::Pod(pod, reading) => self.set_pod(pod, Some(reading.clone())),
        }
    }

    fn delete(&mut self, reference: &ObjectRef) -> Changes {
        match reference {
            ObjectRef::Node(name) => {
                let mut changes = Changes::default();
                for index in 0..self.nodes.len() {
                    let touched = self.nodes[index].set(name, None);
                    changes.merge(self.update_nodes(index, touched));
                }
                changes
            }
            ObjectRef::Pod(pod) => self.set_pod(pod, None),
        }
    }

    fn end_listing(&mut self) -> Changes {
        self.synced = true;
        let Some(listed) = self.listed.take() else { return Changes::default() };
        let nodes: BTreeSet<&Arc<str>> = self.nodes.iter().flat_map(Nodes::names).collect();
        let gone: Vec<ObjectRef> = nodes
            .into_iter()
            .cloned()
            .map(ObjectRef::Node)
            .chain(self.pods.names().cloned().map(ObjectRef::Pod))
            .filter(|known| !listed.contains(known))
            .collect();
        let before = self.desired.clone();
        let mut changes = Changes::default();
        for reference in gone {
            changes.merge(self.delete(&reference));
        }
        // One deletion may undo what another one did, as when a node loses to one that goes next.
        changes.vteps.retain(|key| before.vteps.get(key) != self.desired.vteps.get(key));
        changes.pods.retain(|key| before.pods.get(key) != self.desired.pods.get(key));
        changes.prefixes.retain(|key| before.prefixes.get(key) != self.desired.prefixes.get(key));
        changes.sources.retain(|key| before.sources.get(key) != self.desired.sources.get(key));
        changes
    }

    fn update_nodes(&mut self, index: usize, touched: Touched) -> Changes {
        let Touched { vteps, prefixes, sources } = touched;
        let overlay = overlay_id(index);
        let mut changes = Changes::default();
        let mut addresses = BTreeSet::new();
        for node in vteps {
            let pods: Vec<(Ipv4Addr, PodRef)> = self.pods.on(&node).cloned().collect();
            for (address, pod) in pods {
                addresses.insert(address);
                self.update_misplaced(&pod);
            }
            let goal = self.nodes[index].vtep(&node);
            set(&mut self.desired.vteps, VtepKey { overlay, node }, goal, &mut changes.vteps);
        }
        for cidr in prefixes {
            let goal = self.nodes[index].prefix(cidr).map(|node| VtepKey { overlay, node });
            set(&mut self.desired.prefixes, (overlay, cidr), goal, &mut changes.prefixes);
        }
        for address in sources {
            let goal = self.nodes[index].source(address).map(|node| VtepKey { overlay, node });
            set(&mut self.desired.sources, (overlay, address), goal, &mut changes.sources);
        }
        for address in addresses {
            let goal = self.pod_goal(index, address);
            set(&mut self.desired.pods, (overlay, address), goal, &mut changes.pods);
        }
        changes
    }

    fn set_pod(&mut self, pod: &PodRef, reading: Option<PodReading>) -> Changes {
        let mut changes = Changes::default();
        let touched = self.pods.set(pod, reading);
        if !touched.is_empty() {
            self.update_misplaced(pod);
        }
        for address in touched {
            self.update_address(address, &mut changes);
        }
        changes
    }

    fn update_address(&mut self, address: Ipv4Addr, changes: &mut Changes) {
        for index in 0..self.nodes.len() {
            let goal = self.pod_goal(index, address);
            set(&mut self.desired.pods, (overlay_id(index), address), goal, &mut changes.pods);
        }
    }

    /// Where an address is. If the owner's node lost against another one, it is nowhere.
    fn pod_goal(&self, index: usize, address: Ipv4Addr) -> Option<VtepKey> {
        let node = self.owner(index, address)?.node;
        let reached = self.nodes[index].membership(node) == Membership::Vtep;
        reached.then(|| VtepKey { overlay: overlay_id(index), node: node.clone() })
    }

    /// The pod of an overlay that has an address: one that stays before one that is being deleted, then one in its
    /// node's podCIDR before one that is not, then the best claim.
    fn owner(&self, index: usize, address: Ipv4Addr) -> Option<Claimant<'_>> {
        let claims = self.pods.claimants(address).filter_map(|claim| {
            let place = self.place(index, claim.node, address);
            matches!(place, Place::InCidr | Place::Elsewhere).then_some((claim, place))
        });
        // Of equal ones the first, which is the best.
        claims
            .min_by_key(|(claim, place)| (claim.terminating, *place == Place::Elsewhere))
            .map(|(claim, _)| claim)
    }

    /// What an address is to an overlay, as that of a pod on a node. A pod may move with its address to another node, so
    /// within the configured network it need not be in that node's podCIDR; but nobody's word is taken for a host that is
    /// no pod.
    fn place(&self, index: usize, node: &str, address: Ipv4Addr) -> Place<'_> {
        let (overlay, nodes) = (&self.overlays[index], &self.nodes[index]);
        let Some(cidr) = nodes.cidr(node) else { return Place::Foreign };
        let lan = nodes.lan(Ipv4Net::from(address));
        match overlay.network {
            _ if overlay.subnet.contains(&address) => Place::Own,
            _ if self.surroundings.own.contains(&address) => Place::Host,
            Some(network) if !network.contains(&address) => Place::Outside(network),
            _ if cidr.contains(&address) => Place::InCidr,
            _ if lan.is_some() => lan.map_or(Place::Foreign, Place::Lan),
            Some(_) => Place::Elsewhere,
            None => Place::Unbounded,
        }
    }

    fn update_misplaced(&mut self, pod: &PodRef) {
        if self.misplacements(pod).is_empty() {
            self.misplaced.remove(pod);
        } else {
            self.misplaced.insert(pod.clone());
        }
    }

    /// What is wrong with a pod's address in view of its node; one for each overlay at most.
    fn misplacements(&self, pod: &PodRef) -> Vec<Problem> {
        let Some(facts) = self.pods.placed(pod) else { return Vec::new() };
        let PodFacts { address, node, origin, .. } = facts;
        let places = self.overlays.iter().enumerate().map(|(index, overlay)| {
            let cidr = self.nodes[index].cidr(node);
            (overlay, cidr, self.place(index, node, *address))
        });
        places
            .filter_map(|(overlay, cidr, place)| {
                let field = format!("{pod}, status.podIP");
                let outside =
                    || cidr.map(|cidr| format!("{address} is outside of {cidr}, the podCIDR of Node {node}"));
                Some(match place {
                    Place::InCidr | Place::Foreign => return None,
                    Place::Own => Problem::error(
                        field,
                        format!("{address} is in the gateway's own subnet {}", overlay.subnet),
                        "the subnet must not be given to a node: check the allocation of pod CIDRs",
                    ),
                    Place::Host => Problem::error(
                        field,
                        format!("{address} is an address of this host"),
                        "take it off the host's device, or find out who gave it to the pod; until then the pod is not \
                         reached",
                    ),
                    Place::Outside(network) => Problem::error(
                        field,
                        format!("{address} is outside of {network}, the network of overlay {:?}", overlay.name),
                        "widen the overlay's network if the address is the cluster's",
                    ),
                    Place::Lan(lan) => Problem::error(
                        field,
                        format!(
                            "{}, but in {}, the network of this host's interface {}",
                            outside()?,
                            lan.network,
                            lan.interface
                        ),
                        "delete the Pod, or find out who wrote its status: a host of that network is no pod",
                    ),
                    Place::Unbounded => Problem::error(
                        field,
                        outside()?,
                        format!(
                            "if pods move between nodes with their addresses, set network of overlay {:?} (flannel's \
                             Network): within it they are believed",
                            overlay.name
                        ),
                    ),
                    Place::Elsewhere => Problem::warning(
                        field,
                        outside()?,
                        "if another network plugin gave the address, the node may not deliver it",
                    ),
                })
            })
            .map(|problem| problem.located(origin))
            .collect()
    }
}

/// What an address is to an overlay, as that of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place<'a> {
    /// The node is not of this overlay.
    Foreign,
    /// In the node's podCIDR.
    InCidr,
    /// Not there, but in the overlay's configured network.
    Elsewhere,
    /// In the gateway's own subnet.
    Own,
    /// The kernel of this host takes it for itself.
    Host,
    /// Not in the overlay's network.
    Outside(Ipv4Net),
    /// Not in the node's podCIDR, but on a LAN of this host.
    Lan(&'a Lan),
    /// Not in the node's podCIDR, and nothing else says where pods can be.
    Unbounded,
}

/// The file that an object comes from, behind its name.
pub(super) fn source(origin: &Origin) -> String {
    origin.as_ref().map(|origin| format!(" ({origin})")).unwrap_or_default()
}

fn overlay_id(index: usize) -> OverlayId {
    OverlayId::try_from(index).expect("the configuration allows a handful of overlays")
}

/// Sets or removes a goal, and notes the key if that changes anything.
fn set<K: Ord + Clone, V: PartialEq>(
    table: &mut BTreeMap<K, V>,
    key: K,
    goal: Option<V>,
    changed: &mut BTreeSet<K>,
) {
    if table.get(&key) == goal.as_ref() {
        return;
    }
    match goal {
        Some(goal) => table.insert(key.clone(), goal),
        None => table.remove(&key),
    };
    changed.insert(key);
}
