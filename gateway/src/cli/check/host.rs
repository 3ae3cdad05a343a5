//! Whether the host's interfaces and addresses fit the configuration.

use std::{collections::BTreeMap, fs};

use gateway_common::abi::Roles;

use super::{Finding, ethtool::Ethtool};
use crate::{
    config::{Config, Interface, Overlay, snat::session_memory_text},
    dataplane::template::VXLAN_OVERHEAD,
    kernel::{
        device::device_name,
        host::{Host, Kind, Link},
    },
};

pub(super) fn findings(config: &Config, host: &Host) -> Vec<Finding> {
    let mut findings = interfaces(config, host);
    findings.extend(mtu(config, host));
    findings.extend(translation(config, host));
    for overlay in &config.overlays {
        findings.push(local_address(config, host, overlay));
        findings.extend(other_tunnels(config, host, overlay));
        findings.extend(foreign_socket(
            host,
            overlay,
            &fs::read_to_string("/proc/net/udp").unwrap_or_default(),
        ));
    }
    findings
}

/// Each configured device once, with what the kernel and its driver say of it.
fn interfaces(config: &Config, host: &Host) -> Vec<Finding> {
    let mut entries: BTreeMap<&str, Vec<&Interface>> = BTreeMap::new();
    for interface in &config.interfaces {
        entries.entry(&interface.name).or_default().push(interface);
    }
    let ethtool = Ethtool::open().ok();
    let mut findings = Vec::new();
    for (name, entries) in entries {
        let subject = format!("interface {name}");
        let Some(link) = host.by_name(name) else {
            let known: Vec<&str> = host.links.values().map(|link| link.name.as_str()).collect();
            findings.push(Finding::fail(
                subject,
                "does not exist",
                format!("devices of this host: {}", known.join(", ")),
            ));
            continue;
        };
        let driver = ethtool.as_ref().and_then(|ethtool| ethtool.driver(name).ok());
        let driver = driver.map_or(String::new(), |driver| format!(", driver {driver}"));
        findings.push(if !link.up {
            Finding::fail(&*subject, "is down", format!("ip link set {name} up"))
        } else if matches!(link.kind, Kind::Vlan { .. }) {
            Finding::fail(
                &*subject,
                "is a VLAN device",
                "name the device below it, and write the VLAN id as vlan: the program sees frames with their tags",
            )
        } else if link.mac.is_none() {
            Finding::fail(&*subject, "is no Ethernet device", "choose one with a MAC address")
        } else {
            Finding::ok(&*subject, format!("up, MTU {}{driver}", link.mtu))
        });
        if let Some((strips, merges)) = ethtool.as_ref().and_then(|ethtool| ethtool.offloads(name).ok()) {
            findings.extend(offloads(name, strips, merges, entries.iter().any(|entry| entry.vlan.is_some())));
        }
        let strict = |of: &str| {
            let path = format!("/proc/sys/net/ipv4/conf/{of}/rp_filter");
            fs::read_to_string(path).is_ok_and(|value| value.trim() == "1")
        };
        let loose = fs::read_to_string("/proc/sys/net/ipv4/conf/all/rp_filter")
            .is_ok_and(|value| value.trim() == "2");
        if !loose && (strict(name) || strict("all")) {
            findings.push(Finding::warn(
                subject,
                "rp_filter is strict",
                format!("if replies to clients take another way: sysctl -w net.ipv4.conf.{name}.rp_filter=2"),
            ));
        }
    }
    findings
}

fn offloads(name: &str, strips_tags: bool, merges: bool, vlans: bool) -> Vec<Finding> {
    let mut findings = Vec::new();
    if strips_tags && vlans {
        findings.push(Finding::warn(
            format!("interface {name}"),
            "takes VLAN tags out of frames (rx-vlan-offload)",
            format!("ethtool -K {name} rxvlan off, or the program takes tagged frames for untagged ones"),
        ));
    }
    if merges {
        findings.push(Finding::warn(
            format!("interface {name}"),
            "merges packets (large-receive-offload)",
            format!("ethtool -K {name} lro off: merged packets cannot be forwarded"),
        ));
    }
    findings
}

fn with_role<'a>(config: &'a Config, host: &'a Host, role: Roles) -> impl Iterator<Item = &'a Link> {
    let named = config.interfaces.iter().filter(move |interface| interface.roles.has(role));
    named.filter_map(|interface| host.by_name(&interface.name))
}

/// Clients' packets of full size should fit the tunnel.
fn mtu(config: &Config, host: &Host) -> Option<Finding> {
    let underlay = with_role(config, host, Roles::UNDERLAY).map(|link| link.mtu).min()?;
    let external = with_role(config, host, Roles::EXTERNAL).map(|link| link.mtu).max()?;
    let inner = underlay.saturating_sub(VXLAN_OVERHEAD);
    Some(if inner >= external {
        Finding::ok("MTU", format!("{external} outside fits {inner} in the tunnel"))
    } else {
        Finding::warn(
            "MTU",
            format!("{external} outside, but {inner} in the tunnel"),
            format!(
                "raise the underlay's MTU to {} on all of its hosts, or clients have to learn {inner} by path MTU discovery",
                external + VXLAN_OVERHEAD
            ),
        )
    })
}

/// Source translation: what it takes, and whether the kernel is in its way.
fn translation(config: &Config, host: &Host) -> Vec<Finding> {
    let subject = "source translation";
    if !config.snat.is_on() {
        return vec![Finding::ok(
            subject,
            "off: clients outside of the overlays' subnets are refused, unless a rule routes them",
        )];
    }
    let mut findings: Vec<Finding> = host
        .misused(&config.snat)
        .map(|(address, text)| {
            let advice = "the address is left out until then; a rule without any address refuses its clients";
            Finding::fail(format!("{subject}, {address}"), text, advice)
        })
        .collect();
    let addresses = config.snat.addresses().count();
    findings.push(Finding::ok(
        subject,
        format!("SNAT addresses: {addresses}; room for {}", session_memory_text(config.snat.slots())),
    ));
    findings
}

fn local_address(config: &Config, host: &Host, overlay: &Overlay) -> Finding {
    let subject = format!("overlay {}, local {}", overlay.name, overlay.local);
    let Some((_, index)) = host.addresses.iter().find(|(address, _)| *address == overlay.local) else {
        return Finding::fail(
            subject,
            "is no address of this host",
            format!("ip address add {}/PREFIX dev UNDERLAY, or correct the overlay's local", overlay.local),
        );
    };
    let Some(link) = host.links.get(index) else { return Finding::ok(subject, "is an address of this host") };
    if host.roles(config, link).has(Roles::UNDERLAY) {
        Finding::ok(subject, format!("is on {}", link.name))
    } else {
        Finding::warn(
            subject,
            format!("is on {}, which is not underlay", link.name),
            "fine for an address that is routed to this host; if not, give that interface the role \"underlay\"",
        )
    }
}

/// VXLAN devices of others at the overlay's port.
fn other_tunnels(config: &Config, host: &Host, overlay: &Overlay) -> Vec<Finding> {
    let ours = |name: &str| config.overlays.iter().any(|overlay| device_name(overlay) == name);
    host.links
        .values()
        .filter(|link| !ours(&link.name))
        .filter_map(|link| match &link.kind {
            Kind::Vxlan(vxlan) if vxlan.port == overlay.port => Some((link, vxlan)),
            _ => None,
        })
        .map(|(link, vxlan)| {
            let subject = format!("overlay {}, port {}", overlay.name, overlay.port);
            if vxlan.metadata || vxlan.vni == overlay.vni.get() {
                Finding::fail(
                    subject,
                    format!("{} takes VNI {} at the same port", link.name, overlay.vni.get()),
                    format!("the gateway cannot run on a node of the cluster; if {0} is a leftover: ip link delete {0}", link.name),
                )
            } else {
                Finding::warn(
                    subject,
                    format!("{} uses it for VNI {}", link.name, vxlan.vni),
                    "tunnel packets of that VNI to the overlay's local address are dropped: use another address or port",
                )
            }
        })
        .collect()
}

/// A program that holds the port. The kernel's tunnels hold it too, so a socket is foreign only if there is no tunnel.
fn foreign_socket(host: &Host, overlay: &Overlay, sockets: &str) -> Option<Finding> {
    let tunnel = host
        .links
        .values()
        .any(|link| matches!(&link.kind, Kind::Vxlan(vxlan) if vxlan.port == overlay.port));
    // "  sl  local_address ...": addresses and ports in hexadecimal, after one line of titles.
    let bound = sockets.lines().skip(1).any(|line| {
        let port = line.split_whitespace().nth(1).and_then(|local| local.rsplit(':').next());
        port.and_then(|port| u16::from_str_radix(port, 16).ok()) == Some(overlay.port)
    });
    (bound && !tunnel).then(|| {
        Finding::fail(
            format!("overlay {}, port {}", overlay.name, overlay.port),
            "a program has bound it",
            format!("find it with ss -ulpn 'sport = :{}', and stop it or choose another port", overlay.port),
        )
    })
}

#[cfg(test)]
mod tests;
