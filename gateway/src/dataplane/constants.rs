//! The constants of a load: what one interface's program knows of itself, of the overlays and of source translation.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
};

use bytemuck::Zeroable;
use gateway_common::{
    abi::{
        self, MAX_LOCAL_PREFIXES, MAX_OVERLAYS, MAX_PORTS, MAX_SNAT_ADDRESSES, MAX_SNAT_RULES, MAX_VLANS,
        OverlayFlags, Port, Prefix, VlanPort,
    },
    wire::{Be16, Ipv4},
};
use ipnet::Ipv4Net;

use crate::{
    config::{Config, DontFragment, Overlay, SnatAction, SourceCheck},
    kernel::host::{Host, Link},
};

/// The configuration asks for more than the program has room for.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TooMany {
    /// Overlays.
    #[error(
        "{0} overlays are configured, but one gateway serves at most {MAX_OVERLAYS}: remove some [[overlay]]"
    )]
    Overlays(usize),
    /// VLANs of an interface.
    #[error(
        "{0} VLANs of interface {1} have roles, but at most {MAX_VLANS} can: remove some [[interface]] entries"
    )]
    Vlans(usize, String),
    /// Interfaces.
    #[error(
        "{0} devices are configured, but one gateway drives at most {MAX_PORTS}: remove some [[interface]]"
    )]
    Ports(usize),
    /// SNAT rules.
    #[error(
        "{0} SNAT rules (each counts once for every overlay), but at most {MAX_SNAT_RULES} fit: join prefixes"
    )]
    SnatRules(usize),
    /// SNAT addresses.
    #[error(
        "{0} SNAT addresses are configured, but at most {MAX_SNAT_ADDRESSES} fit: make the pools smaller"
    )]
    SnatAddresses(usize),
}

/// What source translation needs besides the configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sessions {
    /// How many sessions the tables have room for.
    pub slots: u32,
    /// Addresses that sessions still use although the configuration does not name them any more.
    pub draining: BTreeSet<Ipv4Addr>,
}

/// Constants for the program on the device `link` of this host.
///
/// # Errors
///
/// [`TooMany`]: the configuration does not fit.
pub fn constants(
    config: &Config,
    host: &Host,
    link: &Link,
    sessions: &Sessions,
) -> Result<abi::Config, TooMany> {
    let mut constants = common(config, host, sessions)?;
    constants.ifindex = link.index;
    constants.mac = link.mac.unwrap_or_default();
    constants.address = host.client_address(config, link).map(Into::into).unwrap_or_default();
    let port = config.devices().iter().position(|name| *name == link.name).unwrap_or_default();
    constants.port = count(port);

    let mut vlans = Vec::new();
    for interface in config.interfaces.iter().filter(|interface| interface.name == link.name) {
        match interface.vlan {
            None => constants.roles = interface.roles,
            Some(vlan) => vlans.push(VlanPort { vlan, roles: interface.roles }),
        }
    }
    constants.vlan_count =
        fill(&mut constants.vlans, &vlans).ok_or_else(|| TooMany::Vlans(vlans.len(), link.name.clone()))?;
    Ok(constants)
}

/// What all programs have in common, also the one that removes sessions.
///
/// # Errors
///
/// [`TooMany`]: the configuration does not fit.
pub fn common(config: &Config, host: &Host, sessions: &Sessions) -> Result<abi::Config, TooMany> {
    let mut constants = abi::Config::zeroed();
    let overlays: Vec<_> = config
        .overlays
        .iter()
        .map(|overlay| {
            let all = config.snat.addresses().chain(sessions.draining.iter().copied());
            self::overlay(overlay, all)
        })
        .collect();
    constants.overlay_count =
        fill(&mut constants.overlays, &overlays).ok_or(TooMany::Overlays(overlays.len()))?;

    let ports: Vec<Port> =
        config.devices().iter().map(|name| host.by_name(name).map(port).unwrap_or_default()).collect();
    fill(&mut constants.ports, &ports).ok_or(TooMany::Ports(ports.len()))?;

    let known: Vec<Prefix> = host.local_prefixes().into_iter().take(MAX_LOCAL_PREFIXES).map(prefix).collect();
    constants.local_prefix_count = fill(&mut constants.local_prefixes, &known).unwrap_or_default();

    let Translation { rules, addresses } = translation(config, |address| host.owner(*address).is_some());
    constants.snat_rule_count =
        fill(&mut constants.snat_rules, &rules).ok_or(TooMany::SnatRules(rules.len()))?;
    fill(&mut constants.snat_addresses, &addresses).ok_or(TooMany::SnatAddresses(addresses.len()))?;
    constants.session_slots = sessions.slots;
    constants.timeouts = config.snat.timeouts;
    Ok(constants)
}

fn count(number: usize) -> u32 {
    u32::try_from(number).expect("a handful")
}

/// Puts `items` at the front of an array; how many they are, `None` if they do not fit.
fn fill<T: Copy>(array: &mut [T], items: &[T]) -> Option<u32> {
    array.get_mut(..items.len())?.copy_from_slice(items);
    u32::try_from(items.len()).ok()
}

/// Local prefixes that the program has no room for, for people.
pub fn local_prefix_problem(host: &Host) -> Option<String> {
    let prefixes = host.local_prefixes();
    let unknown = prefixes.get(MAX_LOCAL_PREFIXES..).filter(|unknown| !unknown.is_empty())?;
    let unknown: Vec<String> = unknown.iter().map(ToString::to_string).collect();
    Some(format!(
        "this host has more local prefixes than the {MAX_LOCAL_PREFIXES} that the program knows (ip route show table \
         local): in {} a podCIDR would go before this host; remove or join some of these routes",
        unknown.join(", ")
    ))
}

fn prefix(net: Ipv4Net) -> Prefix {
    Prefix { network: net.network().into(), mask: net.netmask().into() }
}

fn port(link: &Link) -> Port {
    Port {
        ifindex: link.index,
        mac: link.mac.unwrap_or_default(),
        mtu: u16::try_from(link.mtu).unwrap_or(u16::MAX),
    }
}

fn overlay(overlay: &Overlay, snat: impl Iterator<Item = Ipv4Addr>) -> abi::Overlay {
    let switches = [
        (overlay.source_check != SourceCheck::Off, OverlayFlags::SOURCE_CHECK),
        (overlay.allow_gbp, OverlayFlags::ALLOW_GBP),
        (overlay.dont_fragment == DontFragment::Inherit, OverlayFlags::DF_INHERIT),
        (overlay.mss_clamp, OverlayFlags::CLAMP_MSS),
    ];
    let flags = switches
        .into_iter()
        .filter(|(on, _)| *on)
        .fold(OverlayFlags::NONE, |flags, (_, flag)| flags.with(flag));
    let snat: BTreeSet<u32> =
        snat.filter(|address| overlay.subnet.contains(address)).map(u32::from).collect();
    let (first, span) = match (snat.first(), snat.last()) {
        (Some(first), Some(last)) => (*first, last - first + 1),
        _ => (0, 0),
    };
    abi::Overlay {
        local: overlay.local.into(),
        port: Be16::new(overlay.port),
        mac: overlay.mac,
        vni: overlay.vni,
        subnet: overlay.subnet.network().into(),
        mask: overlay.subnet.netmask().into(),
        flags,
        snat_first: first,
        snat_span: span,
        ..abi::Overlay::zeroed()
    }
}

/// The rules as the program has them: one for each overlay, with a range of the addresses.
#[derive(Debug, Default, PartialEq, Eq)]
struct Translation {
    rules: Vec<abi::SnatRule>,
    addresses: Vec<Ipv4>,
}

/// Addresses that the kernel owns are left out. A rule that loses all of its addresses is left out with every later one
/// that would take a part of its clients: they are refused rather than treated in another way than was configured.
fn translation(config: &Config, is_kernels: impl Fn(&Ipv4Addr) -> bool) -> Translation {
    let mut translation = Translation::default();
    let mut segments: BTreeMap<(usize, usize), (u16, u16)> = BTreeMap::new();
    for (pool, addresses) in config.snat.pools.iter().map(|pool| &pool.addresses).enumerate() {
        for (id, overlay) in config.overlays.iter().enumerate() {
            let first = translation.addresses.len();
            let own = addresses.iter().filter(|address| overlay.subnet.contains(*address));
            let usable = own.filter(|address| !is_kernels(address));
            translation.addresses.extend(usable.map(|address| Ipv4::from(*address)));
            let segment = (first, translation.addresses.len() - first);
            let [first, count] = [segment.0, segment.1].map(|n| u16::try_from(n).unwrap_or(u16::MAX));
            segments.insert((pool, id), (first, count));
        }
    }
    let mut lost: Vec<(usize, Ipv4Net, Ipv4Net)> = Vec::new();
    for rule in &config.snat.rules {
        for (id, overlay) in config.overlays.iter().enumerate() {
            let (first, count) = match rule.action {
                SnatAction::Route => (0, 0),
                SnatAction::Pool(pool) => {
                    let segment = segments[&(pool, id)];
                    if segment.1 == 0 && config.snat.applies(rule, overlay.subnet) {
                        lost.push((id, rule.clients, rule.destinations));
                    }
                    if segment.1 == 0 {
                        continue;
                    }
                    segment
                }
            };
            if lost.iter().any(|(other, clients, destinations)| {
                *other == id && overlap(*clients, rule.clients) && overlap(*destinations, rule.destinations)
            }) {
                continue;
            }
            translation.rules.push(abi::SnatRule {
                client: rule.clients.network().into(),
                client_mask: rule.clients.netmask().into(),
                destination: rule.destinations.network().into(),
                destination_mask: rule.destinations.netmask().into(),
                overlay: u16::try_from(id).unwrap_or(u16::MAX),
                pad: 0,
                first,
                count,
            });
        }
    }
    translation
}

fn overlap(a: Ipv4Net, b: Ipv4Net) -> bool {
    a.contains(&b) || b.contains(&a)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Overrides;

    const BASE: &str = r#"
[source]
kind = "files"
path = "/m"
[[interface]]
name = "eth0"
roles = ["external"]
[[interface]]
name = "eth0"
vlan = 7
roles = ["external"]
[[interface]]
name = "eth1"
roles = ["underlay"]
[[overlay]]
name = "flannel"
local = "172.16.2.200"
mac = "0e:11:22:33:44:55"
subnet = "10.244.30.0/24"
[[overlay]]
name = "second"
local = "172.16.2.200"
mac = "0e:11:22:33:44:56"
vni = 2
subnet = "10.245.30.0/24"
annotation_prefix = "second.example/"
"#;

    fn config(snat: &str) -> Config {
        Config::parse(&format!("{BASE}{snat}"), "g", &Overrides::default()).unwrap()
    }

    fn address(text: &str) -> Ipv4Addr {
        text.parse().unwrap()
    }

    fn compact(translation: &Translation) -> Vec<String> {
        let rule = |rule: &abi::SnatRule| {
            let addresses = translation.addresses.iter().skip(rule.first.into()).take(rule.count.into());
            let addresses: Vec<String> = addresses.map(ToString::to_string).collect();
            format!("{} {}/{} {}", rule.overlay, rule.client, rule.client_mask, addresses.join(","))
        };
        translation.rules.iter().map(rule).collect()
    }

    #[test]
    fn automap_is_one_address_of_each_overlay() {
        let found = translation(&config(""), |_| false);
        assert_eq!(compact(&found), ["0 0.0.0.0/0.0.0.0 10.244.30.254", "1 0.0.0.0/0.0.0.0 10.245.30.254"]);
        let off = config("[snat]\nmode = \"none\"\n");
        assert_eq!(translation(&off, |_| false), Translation::default());
        assert!(!off.snat.is_on());
    }

    const POOLS: &str = r#"
[snat]
mode = "none"
[[snat.pool]]
name = "both"
addresses = ["10.244.30.16-10.244.30.17", "10.245.30.16"]
[[snat.pool]]
name = "one"
addresses = ["10.244.30.40"]
[[snat.rule]]
clients = "192.0.2.0/25"
pool = "both"
[[snat.rule]]
clients = "192.0.2.0/24"
pool = "one"
[[snat.rule]]
clients = "198.51.100.0/24"
action = "route"
"#;

    #[test]
    fn a_pool_serves_the_overlays_that_it_has_addresses_of() {
        let found = translation(&config(POOLS), |_| false);
        assert_eq!(
            compact(&found),
            [
                "0 192.0.2.0/255.255.255.128 10.244.30.16,10.244.30.17",
                "1 192.0.2.0/255.255.255.128 10.245.30.16",
                "0 192.0.2.0/255.255.255.0 10.244.30.40",
                "0 198.51.100.0/255.255.255.0 ",
                "1 198.51.100.0/255.255.255.0 ",
            ]
        );
    }

    #[test]
    fn the_kernels_addresses_are_left_out_and_nobody_falls_through() {
        let config = config(POOLS);
        let some = translation(&config, |found| *found == address("10.244.30.16"));
        assert_eq!(compact(&some)[0], "0 192.0.2.0/255.255.255.128 10.244.30.17");
        let all = translation(&config, |found| ["10.244.30.16", "10.244.30.17"].map(address).contains(found));
        assert_eq!(
            compact(&all),
            [
                "1 192.0.2.0/255.255.255.128 10.245.30.16",
                "0 198.51.100.0/255.255.255.0 ",
                "1 198.51.100.0/255.255.255.0 ",
            ],
            "the /24 would take the clients of the /25"
        );
    }

    #[test]
    fn ports_are_devices_in_the_order_of_the_configuration() {
        let config = config(POOLS);
        let mut host = Host::default();
        let link = |index, name: &str, mtu| Link {
            index,
            name: name.to_owned(),
            mac: Some("02:00:00:00:00:01".parse().unwrap()),
            mtu,
            up: true,
            kind: crate::kernel::host::Kind::Other,
            alias: None,
            xdp: crate::kernel::host::XdpState::default(),
        };
        host.links.insert(9, link(9, "eth1", 70_000));
        for third in 0..=MAX_LOCAL_PREFIXES {
            let net = Ipv4Net::new_assert(Ipv4Addr::new(198, 51, u8::try_from(third).unwrap(), 0), 25);
            host.locals.insert((net, 1));
        }
        let sessions =
            Sessions { slots: 5, draining: [address("10.244.30.99"), address("10.244.99.1")].into() };
        let found = constants(&config, &host, &host.links[&9], &sessions).unwrap();
        assert_eq!((found.port, found.session_slots), (1, 5));
        assert_eq!(found.ports[0], Port::default(), "an absent device keeps its place");
        assert_eq!((found.ports[1].ifindex, found.ports[1].mtu), (9, u16::MAX));
        assert_eq!(found.ports[2], Port::default());
        let range = |overlay: &abi::Overlay| {
            let ends = [overlay.snat_first, overlay.snat_first + overlay.snat_span.saturating_sub(1)];
            ends.map(|number| Ipv4Addr::from(number).to_string())
        };
        assert_eq!(
            range(&found.overlays[0]),
            ["10.244.30.16", "10.244.30.99"],
            "what drains is in the range"
        );
        assert_eq!(range(&found.overlays[1]), ["10.245.30.16", "10.245.30.16"]);
        assert_eq!(found.timeouts, abi::Timeouts::DEFAULT);

        assert_eq!(found.local_prefix_count as usize, MAX_LOCAL_PREFIXES);
        for (of, is_local) in [("198.51.0.127", true), ("198.51.0.128", false), ("198.51.8.1", false)] {
            assert_eq!(found.is_in_local_prefix(address(of).into()), is_local, "{of}");
        }
        let problem = local_prefix_problem(&host).unwrap();
        assert!(problem.contains("in 198.51.8.0/25 a podCIDR"), "{problem}");
        host.locals.pop_first();
        assert_eq!(local_prefix_problem(&host), None);
    }
}
