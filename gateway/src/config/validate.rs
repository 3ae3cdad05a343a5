//! What must hold between keys of the configuration file.
//!
//! Entries that could not be read whole take part with what could be read of them, so that one problem does not hide
//! another.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
};

use gateway_common::abi::{MAX_OVERLAYS, MAX_PORTS, MAX_VLANS, Roles};
use ipnet::Ipv4Net;

use super::{
    DontFragment, Source, XdpMode,
    parse::{DEFAULT_TTL, InterfaceDraft, Optional, OverlayDraft},
    reader::{Located, Report},
};

pub(super) fn interfaces(report: &Report<'_>, interfaces: Option<&[InterfaceDraft]>) {
    // Without the list there is nothing to say; that it is wrong has been said.
    let Some(interfaces) = interfaces else { return };
    let mut entries = BTreeSet::new();
    let mut vlans: BTreeMap<&str, usize> = BTreeMap::new();
    let mut devices = BTreeSet::new();
    for interface in interfaces {
        if let Some(name) = &interface.name
            && devices.insert(name.value.as_str())
            && devices.len() == MAX_PORTS + 1
        {
            name.note(
                report,
                format!("is the device number {}", devices.len()),
                format!("{MAX_PORTS} are the most that one gateway drives: run another gateway for the rest"),
            );
        }
        let (Some(name), Optional::Absent | Optional::Given(_)) = (&interface.name, &interface.vlan) else {
            continue;
        };
        let vlan = interface.vlan.given().map(|vlan| vlan.value);
        let tag = vlan.map_or("untagged frames".to_owned(), |vlan| format!("VLAN {vlan}"));
        if !entries.insert((name.value.as_str(), vlan)) {
            name.note(
                report,
                format!("{} has an entry for {tag} already", name.value),
                "write one entry with all roles",
            );
        } else if vlan.is_some() {
            let count = vlans.entry(&name.value).or_default();
            *count += 1;
            if *count == MAX_VLANS + 1 {
                name.note(
                    report,
                    format!("{} has more than {MAX_VLANS} VLANs", name.value),
                    "remove the others: that is all that one interface can have",
                );
            }
        }
    }
    // A role may be meant by an entry that could not be read.
    if interfaces.iter().all(|interface| interface.roles.is_some()) {
        for (role, name, need) in [
            (Roles::UNDERLAY, "underlay", "the nodes' tunnel packets arrive there"),
            (Roles::EXTERNAL, "external", "the clients are there"),
        ] {
            let given =
                interfaces.iter().flat_map(|interface| &interface.roles).any(|roles| roles.value.has(role));
            if !given {
                report.missing(
                    0,
                    "interface",
                    format!("no interface has the role \"{name}\""),
                    format!("add an [[interface]] with roles = [\"{name}\"]: {need}"),
                );
            }
        }
    }
}

pub(super) fn overlays(report: &Report<'_>, overlays: Option<&[OverlayDraft]>) {
    let Some(overlays) = overlays else { return };
    if overlays.is_empty() {
        report.missing(0, "overlay", "there is no overlay", "add an [[overlay]]");
    }
    if let Some(overlay) = overlays.get(MAX_OVERLAYS) {
        report.note(
            overlay.at,
            "overlay",
            format!("there are {} overlays", overlays.len()),
            format!("{MAX_OVERLAYS} are the most that one gateway serves: run another gateway for the rest"),
        );
    }
    for (index, overlay) in overlays.iter().enumerate() {
        within(report, overlay);
        for earlier in &overlays[..index] {
            between(report, earlier, overlay);
        }
    }
}

/// Within one overlay.
fn within(report: &Report<'_>, overlay: &OverlayDraft) {
    if let (Some(address), Some(subnet)) = (overlay.address.given(), &overlay.subnet) {
        let usable = subnet.value.contains(&address.value)
            && (subnet.value.prefix_len() >= 31 || address.value != subnet.value.broadcast());
        if !usable {
            address.note(
                report,
                format!("{} is no address of a host in the subnet {}", address.value, subnet.value),
                "choose one in the subnet, or leave the key out for the network address, as flannel's nodes have it",
            );
        }
    }
    if let (Some(network), Some(subnet)) = (overlay.network.given(), &overlay.subnet)
        && !network.value.contains(&subnet.value)
    {
        subnet.note(
            report,
            format!("{} is outside of network {}", subnet.value, network.value),
            "choose a subnet in flannel's Network: only that is exempt from masquerading on the nodes",
        );
    }
    if let (Some(local), Some(subnet)) = (&overlay.local, &overlay.subnet)
        && subnet.value.contains(&local.value)
    {
        local.note(
            report,
            format!("{} is in the overlay's subnet {}", local.value, subnet.value),
            "the tunnel's endpoint must be outside of the tunnel: write this host's underlay address",
        );
    }
    if let Some(extra) = &overlay.extra_sources {
        let mut seen: BTreeMap<Ipv4Addr, &str> = BTreeMap::new();
        for entry in extra {
            let address = entry.value.address;
            if let Some(other) = seen.insert(address, &entry.value.node) {
                entry.note(
                    report,
                    format!("{address} is given to node {other} already"),
                    "an outer source belongs to one node; if several share it, set source_check = \"off\"",
                );
            }
            if overlay.local.as_ref().is_some_and(|local| local.value == address) {
                entry.note(
                    report,
                    format!("{address} is the gateway's own address"),
                    "write the address that the node's packets come from",
                );
            }
        }
    }
}

/// Whether a subnet may be left out: somebody must be there who knows what is taken.
pub(super) fn open(report: &Report<'_>, source: Option<&Source>, overlays: Option<&[OverlayDraft]>) {
    for overlay in overlays.unwrap_or_default() {
        let Some(key) = &overlay.open else { continue };
        if let Some(Source::Files { .. }) = source {
            report.missing(
                overlay.at,
                key.as_str(),
                "is missing",
                "write the podCIDR of the gateway's Node, such as subnet = \"10.244.30.0/24\"; the gateway chooses one \
                 by itself only with kind = \"kubernetes\" under [source]",
            );
        }
        if let Some(address) = overlay.address.given() {
            address.note(report, UNKNOWN_SUBNET, WRITE_SUBNET);
        }
    }
}

/// An address was written for a subnet that was not.
pub(super) const UNKNOWN_SUBNET: &str = "must lie in the overlay's subnet, which is left to the gateway";
pub(super) const WRITE_SUBNET: &str = "write subnet in the [[overlay]] as well, or leave this key out";

/// Notes that nobody has chosen the subnet that is left to the gateway.
pub(super) fn unchosen(report: &Report<'_>, overlay: &OverlayDraft) {
    if let Some(key) = &overlay.open {
        report.missing(
            overlay.at,
            key.as_str(),
            "is left to the gateway, which has not chosen one yet",
            "`gateway run` with register = true under [flannel], or `gateway node apply`, chooses one that no node \
             has; or write it here",
        );
    }
}

/// What the kernel's tunnel device is not told, so it cannot do without the program.
pub(super) fn mode(report: &Report<'_>, mode: Option<XdpMode>, overlays: Option<&[OverlayDraft]>) {
    if mode != Some(XdpMode::Off) {
        return;
    }
    let remedy = "leave the key out, or set xdp_mode = \"driver\" under [datapath]";
    for overlay in overlays.unwrap_or_default() {
        let wishes = [
            overlay.allow_gbp.as_ref().filter(|found| found.value).map(|found| (found.at, &found.key)),
            overlay
                .dont_fragment
                .as_ref()
                .filter(|found| found.value != DontFragment::Unset)
                .map(|found| (found.at, &found.key)),
            overlay
                .ttl
                .as_ref()
                .filter(|found| found.value != DEFAULT_TTL)
                .map(|found| (found.at, &found.key)),
            overlay.dscp.as_ref().filter(|found| found.value != 0).map(|found| (found.at, &found.key)),
        ];
        for (at, key) in wishes.into_iter().flatten() {
            report.note(at, key.as_str(), "needs the XDP program, but xdp_mode is \"off\"", remedy);
        }
    }
}

/// Between two overlays.
fn between(report: &Report<'_>, earlier: &OverlayDraft, later: &OverlayDraft) {
    if let (Some(a), Some(b)) = (&earlier.name, &later.name)
        && a.value == b.value
    {
        b.note(
            report,
            format!("{:?} is the name of another overlay", b.value),
            "give each overlay its own name",
        );
    }
    if let (Some(a), Some(b)) = (&earlier.subnet, &later.subnet)
        && overlap(a.value, b.value)
    {
        b.note(
            report,
            format!("{} overlaps {}, the subnet of another overlay", b.value, a.value),
            "clients are told apart by the subnet they are in: choose another one",
        );
    }
    if let (Some(a), Some(b)) = (&earlier.annotation_prefix, &later.annotation_prefix)
        && a.value == b.value
    {
        b.note(
            report,
            format!("{:?} is the prefix of another overlay: every node would be in both", b.value),
            "write the --kube-annotation-prefix of this overlay's flanneld",
        );
    }
    let tunnel = |draft: &OverlayDraft| {
        let local: &Located<Ipv4Addr> = draft.local.as_ref()?;
        Some((local.value, draft.port.as_ref()?.value, draft.vni.as_ref()?.value))
    };
    if let (Some(a), Some(b), Some(vni)) = (tunnel(earlier), tunnel(later), &later.vni)
        && a == b
    {
        vni.note(
            report,
            format!("{} is the VNI of another overlay at {}, port {}", b.2.get(), b.0, b.1),
            "two overlays at one address and port need different VNIs",
        );
    }
}

fn overlap(a: Ipv4Net, b: Ipv4Net) -> bool {
    a.contains(&b) || b.contains(&a)
}
