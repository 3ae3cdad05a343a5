//! From cluster objects to the tables that should be: pure, keyed, and without knowledge of BPF or netlink.
//!
//! - [`Desired`] is the goal: what the VTEP, pod, prefix and source tables should say, by name.
//! - [`Planner`] keeps it, one object at a time: an event costs work in proportion to that object. A property test
//!   equates it with planning everything afresh.
//! - [`Changes`] names the keys whose goal changed; appliers look the new goal up in [`Desired`].

mod nets;
mod nodes;
mod planner;
mod pods;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    sync::Arc,
};

use gateway_common::wire::Mac;
use ipnet::Ipv4Net;
pub use planner::Planner;

/// Index of an overlay in the configuration, and its id in every table.
pub type OverlayId = u32;

/// A node as VTEP of an overlay.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VtepKey {
    /// Overlay.
    pub overlay: OverlayId,
    /// Name of the node.
    pub node: Arc<str>,
}

/// A network on the link of one of this host's interfaces.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Lan {
    /// The network.
    pub network: Ipv4Net,
    /// Name of the interface.
    pub interface: Arc<str>,
}

impl Lan {
    /// Whether any address is in both.
    fn overlaps(&self, net: Ipv4Net) -> bool {
        self.network.contains(&net) || net.contains(&self.network)
    }
}

/// What of this host the plan depends on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Surroundings {
    /// Networks on the links of its interfaces.
    pub lans: BTreeSet<Lan>,
    /// Addresses that its kernel takes for itself: no pods, whatever is said of them. The XDP program relies on that for
    /// exact pods.
    pub own: BTreeSet<Ipv4Addr>,
}

/// How a node is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VtepSpec {
    /// Tunnel endpoint in the underlay (flannel's `public-ip`); the plain next hop if `direct`.
    pub endpoint: Ipv4Addr,
    /// MAC address of its VTEP.
    pub mac: Mac,
    /// DirectRouting is on for the overlay: if the endpoint is on-link, packets go there without a tunnel.
    pub direct: bool,
}

/// What the tables should say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Desired {
    /// Nodes.
    pub vteps: BTreeMap<VtepKey, VtepSpec>,
    /// Exact pods: where an address is.
    pub pods: BTreeMap<(OverlayId, Ipv4Addr), VtepKey>,
    /// Pod CIDRs.
    pub prefixes: BTreeMap<(OverlayId, Ipv4Net), VtepKey>,
    /// Outer source addresses and the node they belong to.
    pub sources: BTreeMap<(OverlayId, Ipv4Addr), VtepKey>,
}

/// Keys whose goal changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Nodes.
    pub vteps: BTreeSet<VtepKey>,
    /// Exact pods.
    pub pods: BTreeSet<(OverlayId, Ipv4Addr)>,
    /// Pod CIDRs.
    pub prefixes: BTreeSet<(OverlayId, Ipv4Net)>,
    /// Outer sources.
    pub sources: BTreeSet<(OverlayId, Ipv4Addr)>,
}

impl Changes {
    /// Whether nothing changed.
    pub fn is_empty(&self) -> bool {
        self.vteps.is_empty() && self.pods.is_empty() && self.prefixes.is_empty() && self.sources.is_empty()
    }

    /// Adds the keys of `other`.
    pub fn merge(&mut self, other: Self) {
        self.vteps.extend(other.vteps);
        self.pods.extend(other.pods);
        self.prefixes.extend(other.prefixes);
        self.sources.extend(other.sources);
    }
}

#[cfg(test)]
mod tests;
