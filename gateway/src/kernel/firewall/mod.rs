//! The gateway's own nftables table, `inet gateway_<instance>`.
//!
//! The kernel's VXLAN socket listens on every address and asks nobody where a packet comes from, and the kernel forwards
//! into the tunnel whatever has a route. The XDP program keeps strangers away from both, but only on interfaces
//! that it is on. This table does so for the whole host:
//!
//! - `input`: UDP to a tunnel port of ours goes to `tunnel`, which accepts it on underlay interfaces, to an
//!   overlay's address, from a known node. What remains is counted as `tunnel_refused` and dropped.
//! - `forward`: into a tunnel device only from the overlay's own subnet, and from clients that a rule of `[snat]` routes;
//!   the rest is counted as `client_foreign` and dropped. Clients that are translated never come this way: the program
//!   translates their packets or drops them, and what it passes up (an expiring TTL) the kernel answers before it forwards.
//!   The host's own packets do not come this way either.
//!
//! Priority -10 is just before the host's own filters (0). In nftables a drop is final and an acceptance is not, so the
//! order decides only who counts: a stranger's packet here, whatever the host's rules make of it. At the input
//! hook packets are as the socket gets them, after reassembly and destination NAT.
//!
//! - `nft`: runs the program `nft` with JSON.
//! - `ruleset`: the table as objects, and the difference between two of them: pure.
//! - [`watch`]: tells when somebody changes the table.
//!
//! nft's own JSON is written directly: there are six kinds of objects here, which are compared with what nft lists, and a
//! transaction of nft is all or nothing.

mod nft;
mod ruleset;
pub mod watch;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
};

use gateway_common::abi::Roles;
use serde_json::Value;

pub use self::nft::NftError;
use self::ruleset::{Admission, Elements, Found};
use super::{device::device_name, host::Host};
use crate::{
    config::{Config, Overlay, SnatAction, SourceCheck},
    plan::Desired,
};

/// Name of an instance's table, in family `inet`.
pub fn table_name(instance: &str) -> String {
    format!("gateway_{instance}")
}

/// What the sets should hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Goal {
    /// Names of the interfaces where tunnel packets may arrive.
    pub underlay: BTreeSet<String>,
    /// Local address, port and source of admitted tunnel packets. `None` while the nodes are not known: what the set
    /// holds from an earlier run stays.
    pub nodes: Option<BTreeSet<(Ipv4Addr, u16, Ipv4Addr)>>,
    /// There may be more nodes than are named: none is removed.
    pub partial: bool,
}

impl Goal {
    /// The goal of a configuration on this host; `desired` has the nodes, once they are known.
    pub fn new(config: &Config, host: &Host, desired: Option<&Desired>) -> Self {
        let underlay = host.links.values().filter(|link| host.roles(config, link).has(Roles::UNDERLAY));
        // An interface that comes back must not wait for its rule.
        let configured = config
            .interfaces
            .iter()
            .filter(|interface| interface.vlan.is_none() && interface.roles.has(Roles::UNDERLAY));
        let nodes = desired.map(|desired| {
            let sources = desired.sources.keys().filter_map(|(overlay, source)| {
                let overlay = config.overlays.get(*overlay as usize)?;
                Some((overlay.local, overlay.port, *source))
            });
            sources.collect()
        });
        Self {
            underlay: underlay
                .map(|link| link.name.clone())
                .chain(configured.map(|interface| interface.name.clone()))
                .collect(),
            nodes,
            partial: false,
        }
    }
}

/// Packets and bytes of a counter of the table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Dropped {
    /// Packets.
    pub packets: u64,
    /// Bytes of their IP packets.
    pub bytes: u64,
}

/// What `status` shows of the table.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct FirewallStatus {
    /// Name of the table, in family `inet`.
    pub table: String,
    /// Sources from which tunnel packets are admitted.
    pub nodes: usize,
    /// What was dropped, by counter.
    pub dropped: BTreeMap<String, Dropped>,
}

/// Reads the state of an instance's table; `None` if there is none.
///
/// # Errors
///
/// nft cannot be run, or refuses.
pub async fn status(instance: &str) -> Result<Option<FirewallStatus>, NftError> {
    let table = table_name(instance);
    let Some(found) = Found::read(&table).await? else { return Ok(None) };
    Ok(Some(FirewallStatus { table, nodes: found.nodes.len(), dropped: found.dropped }))
}

/// Tells the version of nft, and whether it and the kernel can do what is needed; changes nothing.
///
/// # Errors
///
/// They cannot, and why.
pub async fn probe(config: &Config, host: &Host) -> Result<String, NftError> {
    let version = nft::version().await?;
    let firewall = Firewall::new(config);
    let objects = firewall.frame.build(&Elements::default(), &Goal::new(config, host, None));
    nft::run(&["--check"], &objects).await?;
    Ok(version)
}

/// Removes an instance's table; tells whether there was one.
///
/// # Errors
///
/// nft cannot be run, or refuses.
pub async fn remove(instance: &str) -> Result<bool, NftError> {
    let table = table_name(instance);
    if Found::read(&table).await?.is_none() {
        return Ok(false);
    }
    nft::run(&[], &[ruleset::delete_table(&table)]).await?;
    Ok(true)
}

/// Keeps the table of an instance.
#[derive(Debug)]
pub struct Firewall {
    frame: ruleset::Frame,
    /// Chains and rules as nft listed them after they were written. Every version of nft may print them in its own way,
    /// so they are compared with themselves.
    written: Option<Vec<Value>>,
    elements: Elements,
}

impl Firewall {
    /// Changes nothing yet.
    pub fn new(config: &Config) -> Self {
        let ports: BTreeSet<u16> = config.overlays.iter().map(|overlay| overlay.port).collect();
        let open = config
            .overlays
            .iter()
            .filter(|overlay| overlay.source_check == SourceCheck::Off)
            .map(|overlay| (overlay.local, overlay.port))
            .collect();
        let admission = |overlay: &Overlay| Admission {
            subnet: overlay.subnet,
            rules: config
                .snat
                .rules
                .iter()
                .filter(|rule| config.snat.applies(rule, overlay.subnet))
                .map(|rule| (rule.clients, rule.destinations, rule.action == SnatAction::Route))
                .collect(),
        };
        let tunnels =
            config.overlays.iter().map(|overlay| (device_name(overlay), admission(overlay))).collect();
        let table = table_name(&config.instance);
        Self {
            frame: ruleset::Frame { table, ports, open, tunnels },
            written: None,
            elements: Elements::default(),
        }
    }

    /// Makes the table what it should be: reads what is there and applies the difference in one transaction. Chains and
    /// rules are written anew only if they changed, and never the elements that are right.
    ///
    /// # Errors
    ///
    /// nft cannot be run, or refuses; what was there before is still there.
    pub async fn repair(&mut self, goal: &Goal) -> Result<(), NftError> {
        let found = Found::read(&self.frame.table).await?;
        let intact = found.as_ref().is_some_and(|found| self.written.as_ref() == Some(&found.frame));
        self.elements = found.as_ref().map(Found::elements).unwrap_or_default();
        if intact {
            return self.update(goal).await;
        }
        let stale = found.map(|found| found.stale(&self.frame.table)).unwrap_or_default();
        let objects = [stale, self.frame.build(&self.elements, goal)].concat();
        if let Err(NftError::Refused(_)) = nft::run(&[], &objects).await {
            // Something of ours was made anew as something else, such as a set of another type.
            let table = [self.frame.empty_table(), vec![ruleset::delete_table(&self.frame.table)]].concat();
            let objects = [table, self.frame.build(&Elements::default(), goal)].concat();
            nft::run(&[], &objects).await?;
        }
        let found = Found::read(&self.frame.table).await?;
        self.elements = found.as_ref().map(Found::elements).unwrap_or_default();
        self.written = found.map(|found| found.frame);
        Ok(())
    }

    /// As [`Self::repair`], but takes the table to be as it was left.
    ///
    /// # Errors
    ///
    /// As there.
    pub async fn update(&mut self, goal: &Goal) -> Result<(), NftError> {
        let objects = self.elements.change(&self.frame.table, goal);
        if objects.is_empty() {
            return Ok(());
        }
        nft::run(&[], &objects).await?;
        self.elements.settle(goal);
        Ok(())
    }
}
