//! Source translation: the section `[snat]`.
//!
//! Automap is a pool like any other: one address of each overlay's subnet. The mode is the last rule.

use std::{collections::BTreeMap, fmt, net::Ipv4Addr};

use gateway_common::abi::{MAX_SNAT_ADDRESSES, MAX_SNAT_RULES, Timeouts, ticks};
use ipnet::{Ipv4AddrRange, Ipv4Net};
use toml::de::DeValue;

use super::{
    XdpMode,
    parse::{IPV4, Optional, OverlayDraft, TABLE_SIZE, integer, read_optional, read_or, text},
    reader::{Located, Parse, Report, Section, convert, kind},
    validate::{UNKNOWN_SUBNET, WRITE_SUBNET},
};

/// Entries that the session tables have for sessions that end while others begin.
pub const SPARE_SESSIONS: u32 = 1024;
/// Slots where nothing is translated: the tables are there, and small.
const UNUSED_SESSIONS: u32 = 64;
const DEFAULT_MAX_SESSIONS: u32 = 262_144;
/// Name of the pool that has automap's addresses.
pub const AUTOMAP: &str = "automap";
/// The longest idle time, a month: what is longer is a slip of the pen.
const LONGEST_TIMEOUT: i64 = 31 * 24 * 3600;

/// Source translation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snat {
    /// Addresses by name. Every pool is used.
    pub pools: Vec<SnatPool>,
    /// The first one that matches counts. Clients of an overlay's own subnet are routed to it before any rule is asked,
    /// and clients that none matches are refused.
    pub rules: Vec<SnatRule>,
    /// How long sessions may be idle.
    pub timeouts: Timeouts,
    /// How many sessions there may be.
    pub max_sessions: u32,
}

/// A set of SNAT addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnatPool {
    /// Name.
    pub name: String,
    /// Addresses, each in the subnet of an overlay, for which alone it serves.
    pub addresses: Vec<Ipv4Addr>,
}

/// What happens to some clients' packets to some pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnatRule {
    /// Clients.
    pub clients: Ipv4Net,
    /// Pods.
    pub destinations: Ipv4Net,
    /// What happens.
    pub action: SnatAction,
}

/// What a rule does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SnatAction {
    /// Routes without translation.
    Route,
    /// Translates to an address of the pool with this index.
    Pool(usize),
}

impl Snat {
    /// Whether any client is translated.
    pub fn is_on(&self) -> bool {
        self.rules.iter().any(|rule| matches!(rule.action, SnatAction::Pool(_)))
    }

    /// How many sessions the tables are made for.
    pub fn slots(&self) -> u32 {
        if self.is_on() { self.max_sessions } else { UNUSED_SESSIONS.min(self.max_sessions) }
    }

    /// Whether a rule counts for the overlay with this subnet: a pool serves the overlays that it has addresses of.
    pub fn applies(&self, rule: &SnatRule, subnet: Ipv4Net) -> bool {
        match rule.action {
            SnatAction::Route => true,
            SnatAction::Pool(index) => has_address(&self.pools[index], subnet),
        }
    }

    /// Every configured SNAT address.
    pub fn addresses(&self) -> impl Iterator<Item = Ipv4Addr> {
        self.pools.iter().flat_map(|pool| &pool.addresses).copied()
    }

    /// Name of the pool of an address.
    pub fn pool_of(&self, address: Ipv4Addr) -> Option<&str> {
        self.pools.iter().find(|pool| pool.addresses.contains(&address)).map(|pool| pool.name.as_str())
    }
}

/// Bytes of kernel memory that session tables of `slots` sessions take: two hash tables, whose elements are allocated at
/// once (48 bytes of the kernel's, a key of 16, a value of 64) and whose buckets (16 bytes) are as many as the next power
/// of two, and an array of 16 bytes a slot.
pub fn session_memory(slots: u32) -> u64 {
    let entries = u64::from(slots) + u64::from(SPARE_SESSIONS);
    2 * (entries * (48 + 16 + 64) + entries.next_power_of_two() * 16) + u64::from(slots) * 16
}

/// Session memory for people.
pub fn session_memory_text(slots: u32) -> String {
    let bytes = session_memory(slots);
    format!(
        "{slots} sessions, {} MiB of kernel memory ({} bytes each)",
        bytes.div_ceil(1 << 20),
        bytes / u64::from(slots)
    )
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Automap,
    Pool,
    None,
}

/// What a rule asks for; pools by name.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Wish {
    Route,
    Automap,
    Pool(String),
}

impl fmt::Display for Wish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Route => f.write_str("route"),
            Self::Automap => f.write_str(AUTOMAP),
            Self::Pool(name) => write!(f, "pool {name}"),
        }
    }
}

struct PoolDraft {
    at: usize,
    key: String,
    name: Option<Located<String>>,
    addresses: Option<Vec<Located<Vec<Ipv4Addr>>>>,
}

struct RuleDraft {
    at: usize,
    key: String,
    clients: Option<Located<Ipv4Net>>,
    destinations: Option<Located<Ipv4Net>>,
    wish: Option<Located<Wish>>,
}

/// The section as far as it could be read.
pub(super) struct SnatDraft {
    mode: Option<Located<Mode>>,
    address: Optional<Ipv4Addr>,
    default_pool: Optional<String>,
    pools: Option<Vec<PoolDraft>>,
    rules: Option<Vec<RuleDraft>>,
    timeouts: Option<Timeouts>,
    max_sessions: Option<Located<u32>>,
}

pub(super) fn read(mut section: Section<'_>, report: &Report<'_>) -> SnatDraft {
    let draft = SnatDraft {
        mode: read_or(&mut section, "mode", MODE, Mode::Automap),
        address: read_optional(&mut section, "address", IPV4),
        default_pool: read_optional(&mut section, "default_pool", POOL_NAME),
        max_sessions: read_or(&mut section, "max_sessions", TABLE_SIZE, DEFAULT_MAX_SESSIONS),
        pools: section
            .sections("pool")
            .map(|pools| pools.into_iter().map(|pool| read_pool(pool, report)).collect()),
        rules: section
            .sections("rule")
            .map(|rules| rules.into_iter().map(|rule| read_rule(rule, report)).collect()),
        timeouts: read_timeouts(section.section("timeouts")),
    };
    section.finish();
    draft
}

fn read_timeouts(mut section: Section<'_>) -> Option<Timeouts> {
    let mut read =
        |key, default| read_optional(&mut section, key, TIMEOUT).settle(|given| given.unwrap_or(default));
    let default = Timeouts::DEFAULT;
    let found = [
        read("tcp_opening", default.tcp_opening),
        read("tcp_established", default.tcp_established),
        read("tcp_closing", default.tcp_closing),
        read("tcp_reset", default.tcp_reset),
        read("udp_opening", default.udp_opening),
        read("udp", default.udp),
        read("icmp", default.icmp),
    ];
    section.finish();
    let [tcp_opening, tcp_established, tcp_closing, tcp_reset, udp_opening, udp, icmp] = found;
    Some(Timeouts {
        tcp_opening: tcp_opening?,
        tcp_established: tcp_established?,
        tcp_closing: tcp_closing?,
        tcp_reset: tcp_reset?,
        udp_opening: udp_opening?,
        udp: udp?,
        icmp: icmp?,
    })
}

fn read_pool(mut section: Section<'_>, report: &Report<'_>) -> PoolDraft {
    let (at, key) = (section.at(), section.path("addresses"));
    let name = section.require("name", POOL_NAME, "name the pool, such as name = \"web\"");
    let example = "write addresses = [\"10.244.30.16-10.244.30.31\", \"10.244.30.40\"], or a prefix";
    let addresses = match section.take("addresses") {
        None => {
            section.missing("addresses", example);
            None
        }
        Some(Located { value: DeValue::Array(array), at, key }) => {
            if array.is_empty() {
                report.note(at, key.as_str(), "is empty", example);
            }
            let items: Vec<Option<_>> = (0..)
                .zip(array)
                .map(|(index, item): (usize, _)| {
                    let at = item.span().start;
                    let item = Located { value: item.into_inner(), at, key: format!("{key}[{index}]") };
                    convert(report, &item, ADDRESSES)
                })
                .collect();
            items.into_iter().collect()
        }
        Some(found) => {
            found.note(report, format!("is {}", kind(&found.value)), example);
            None
        }
    };
    section.finish();
    PoolDraft { at, key, name, addresses }
}

fn read_rule(mut section: Section<'_>, report: &Report<'_>) -> RuleDraft {
    let (at, key) = (section.at(), section.path("clients"));
    let clients = read_or(&mut section, "clients", PREFIX, Ipv4Net::default());
    let destinations = read_or(&mut section, "destinations", PREFIX, Ipv4Net::default());
    let choices = "write pool = \"<name>\", action = \"automap\" or action = \"route\"";
    let (pool, action) =
        (read_optional(&mut section, "pool", POOL_NAME), read_optional(&mut section, "action", ACTION));
    let wish = match (pool, action) {
        (Optional::Given(pool), Optional::Given(_)) => {
            pool.note(report, "is there together with an action", "write one of the two");
            None
        }
        (Optional::Given(pool), Optional::Absent) => {
            Some(Located { value: Wish::Pool(pool.value), at: pool.at, key: pool.key })
        }
        (Optional::Absent, Optional::Given(action)) => Some(action),
        (Optional::Absent, Optional::Absent) => {
            section.missing("action", choices);
            None
        }
        _ => None,
    };
    section.finish();
    RuleDraft { at, key, clients, destinations, wish }
}

impl SnatDraft {
    /// What must hold within the section and towards overlays and mode of the datapath; the result, if all could be
    /// read. What is wrong is noted.
    pub(super) fn finish(
        self,
        report: &Report<'_>,
        overlays: Option<&[OverlayDraft]>,
        xdp_mode: Option<XdpMode>,
    ) -> Option<Snat> {
        let overlays = overlays?;
        let (mode, pools, rules) = (self.mode.as_ref()?, self.pools.as_ref()?, self.rules.as_ref()?);
        within_pools(report, pools, overlays);
        let default = self.default_pool(report, mode, pools)?;
        let mut wishes: Vec<&Wish> =
            rules.iter().filter_map(|rule| rule.wish.as_ref()).map(|wish| &wish.value).collect();
        wishes.extend(&default);
        self.known_and_used(report, pools, rules, &wishes);
        let automap = self.automap(report, overlays, pools, wishes.contains(&&Wish::Automap));

        // From here on there must be no gaps.
        let subnets: Vec<Ipv4Net> =
            overlays.iter().map(|overlay| Some(overlay.subnet.as_ref()?.value)).collect::<Option<_>>()?;
        let mut named: Vec<SnatPool> = pools.iter().map(PoolDraft::finish).collect::<Option<_>>()?;
        if wishes.contains(&&Wish::Automap) {
            named.push(SnatPool { name: AUTOMAP.to_owned(), addresses: automap? });
        }
        let action = |wish: &Wish| match wish {
            Wish::Route => Some(SnatAction::Route),
            Wish::Automap => index(&named, AUTOMAP),
            Wish::Pool(name) => index(&named, name),
        };
        let mut finished: Vec<SnatRule> = rules
            .iter()
            .map(|rule| {
                Some(SnatRule {
                    clients: rule.clients.as_ref()?.value,
                    destinations: rule.destinations.as_ref()?.value,
                    action: action(&rule.wish.as_ref()?.value)?,
                })
            })
            .collect::<Option<_>>()?;
        for (at, rule) in rules.iter().enumerate() {
            alive(report, rule, &finished[..=at], &named, &subnets);
            routable(report, rule, &finished[at], overlays);
        }
        if let Some(wish) = &default {
            finished.push(SnatRule {
                clients: Ipv4Net::default(),
                destinations: Ipv4Net::default(),
                action: action(wish)?,
            });
            self.serves_every_overlay(report, wish, overlays, &named, &subnets);
        }
        let snat = Snat {
            pools: named,
            rules: finished,
            timeouts: self.timeouts?,
            max_sessions: self.max_sessions?.value,
        };
        fits(report, &snat, mode, &subnets);
        if xdp_mode == Some(XdpMode::Off) && snat.is_on() {
            mode.note(
                report,
                "clients are translated by the XDP program, but xdp_mode is \"off\"",
                "set mode = \"none\" under [snat] without rules that translate (clients outside of the overlays' \
                 subnets are then refused), or set xdp_mode = \"driver\" under [datapath]",
            );
        }
        Some(snat)
    }

    /// What the mode asks for; `None` if that is not known.
    #[expect(clippy::option_option, reason = "an unknown wish and the mode \"none\" are not the same")]
    fn default_pool(
        &self,
        report: &Report<'_>,
        mode: &Located<Mode>,
        pools: &[PoolDraft],
    ) -> Option<Option<Wish>> {
        if mode.value != Mode::Pool {
            if let Some(given) = self.default_pool.given() {
                given.note(
                    report,
                    "is only for mode = \"pool\"",
                    "leave the key out, or set mode = \"pool\" under [snat]",
                );
            }
            return Some((mode.value == Mode::Automap).then_some(Wish::Automap));
        }
        match (&self.default_pool, pools) {
            (Optional::Given(name), _) => Some(Some(Wish::Pool(name.value.clone()))),
            (Optional::Wrong, _) => None,
            (Optional::Absent, [only]) => Some(Some(Wish::Pool(only.name.as_ref()?.value.clone()))),
            (Optional::Absent, []) => {
                mode.note(report, "is \"pool\", but there is none", "add a [[snat.pool]]");
                None
            }
            (Optional::Absent, _) => {
                mode.note(
                    report,
                    "is \"pool\", but there are several",
                    "write default_pool = \"<name>\" under [snat]: the pool of clients that no rule names",
                );
                None
            }
        }
    }

    /// Every pool that is named exists, and every one that exists is named.
    fn known_and_used(
        &self,
        report: &Report<'_>,
        pools: &[PoolDraft],
        rules: &[RuleDraft],
        wishes: &[&Wish],
    ) {
        let names: Vec<&str> =
            pools.iter().filter_map(|pool| pool.name.as_ref()).map(|name| name.value.as_str()).collect();
        let default = self.default_pool.given();
        // A pool whose name cannot be read may be the one that is meant, and a name that is wrong may mean a pool here.
        let mut certain = rules.iter().all(|rule| rule.wish.is_some())
            && default.is_none_or(|name| wishes.contains(&&Wish::Pool(name.value.clone())));
        if names.len() == pools.len() {
            let known = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
            let unknown = |name: &str| !names.contains(&name);
            let remedy = || format!("pools here: {known}; add a [[snat.pool]] or correct the name");
            for wish in rules.iter().filter_map(|rule| rule.wish.as_ref()) {
                if let Wish::Pool(name) = &wish.value
                    && unknown(name)
                {
                    certain = false;
                    wish.note(report, format!("there is no pool {name:?}"), remedy());
                }
            }
            if let Some(name) = default
                && unknown(&name.value)
            {
                certain = false;
                name.note(report, format!("there is no pool {:?}", name.value), remedy());
            }
        }
        if certain {
            for name in pools.iter().filter_map(|pool| pool.name.as_ref()) {
                if !wishes.contains(&&Wish::Pool(name.value.clone())) {
                    name.note(
                        report,
                        format!("nobody uses the pool {:?}", name.value),
                        "set mode = \"pool\" under [snat], name it in a [[snat.rule]], or remove it",
                    );
                }
            }
        }
    }

    /// Automap's addresses, one of each overlay; `None` if one is wrong or not known.
    fn automap(
        &self,
        report: &Report<'_>,
        overlays: &[OverlayDraft],
        pools: &[PoolDraft],
        used: bool,
    ) -> Option<Vec<Ipv4Addr>> {
        let given = self.address.given();
        if !used {
            if let Some(address) = given {
                address.note(
                    report,
                    "nobody uses automap",
                    "leave the key out, or set mode = \"automap\" under [snat]",
                );
            }
            return None;
        }
        if matches!(self.address, Optional::Wrong) {
            return None;
        }
        if let Some(address) = given {
            let inside = |overlay: &OverlayDraft| {
                overlay.subnet.as_ref().is_none_or(|subnet| subnet.value.contains(&address.value))
            };
            match overlays.iter().find(|overlay| inside(overlay)) {
                Some(overlay) => usable(report, address, address.value, overlay),
                None => address.note(
                    report,
                    format!("{} is in no overlay's subnet", address.value),
                    "choose an address of the subnet that no host has, or leave the key out for the subnet's last one",
                ),
            }
        }
        let written = |address: Ipv4Addr| {
            let mut subnets = overlays.iter().filter_map(|overlay| overlay.subnet.as_ref());
            subnets.any(|subnet| subnet.value.contains(&address))
        };
        if let Some(address) = given.filter(|address| !written(address.value))
            && overlays.iter().any(|overlay| overlay.open.is_some())
        {
            address.note(report, UNKNOWN_SUBNET, WRITE_SUBNET);
        }
        let mut addresses = Vec::new();
        for overlay in overlays {
            let subnet = overlay.subnet.as_ref()?;
            let own = match &overlay.address {
                Optional::Given(address) => address.value,
                Optional::Absent => subnet.value.network(),
                Optional::Wrong => return None,
            };
            let chosen = given.map(|given| given.value).filter(|address| subnet.value.contains(address));
            let Some(address) = chosen.or_else(|| last_host(subnet.value, own)) else {
                subnet.note(
                    report,
                    format!(
                        "{} has no address for clients from outside (snat.mode is \"automap\")",
                        subnet.value
                    ),
                    "choose a larger subnet, or set mode = \"none\" under [snat]",
                );
                return None;
            };
            addresses.push(address);
        }
        for entry in pools.iter().filter_map(|pool| pool.addresses.as_ref()).flatten() {
            if let Some(address) = entry.value.iter().find(|address| addresses.contains(address)) {
                entry.note(
                    report,
                    format!("{address} is automap's address"),
                    "take it out of the pool, or set address under [snat] to another one",
                );
            }
        }
        Some(addresses)
    }

    /// Clients that no rule names come to every overlay.
    fn serves_every_overlay(
        &self,
        report: &Report<'_>,
        wish: &Wish,
        overlays: &[OverlayDraft],
        pools: &[SnatPool],
        subnets: &[Ipv4Net],
    ) {
        let Wish::Pool(name) = wish else { return };
        let Some(pool) = pools.iter().find(|pool| pool.name == *name) else { return };
        let at = self.default_pool.given().map(|name| (name.at, name.key.as_str()));
        let Some((at, key)) = at.or_else(|| self.mode.as_ref().map(|mode| (mode.at, mode.key.as_str())))
        else {
            return;
        };
        for (overlay, subnet) in overlays.iter().zip(subnets) {
            if !has_address(pool, *subnet) {
                let overlay = overlay.name.as_ref().map_or("", |name| name.value.as_str());
                report.note(
                    at,
                    key,
                    format!("the pool {name:?} has no address in {subnet}, the subnet of overlay {overlay}"),
                    "add one: pods answer only addresses of their overlay's subnet",
                );
            }
        }
    }
}

impl PoolDraft {
    fn finish(&self) -> Option<SnatPool> {
        let addresses = self.addresses.as_ref()?.iter().flat_map(|entry| entry.value.clone()).collect();
        Some(SnatPool { name: self.name.as_ref()?.value.clone(), addresses })
    }
}

fn has_address(pool: &SnatPool, subnet: Ipv4Net) -> bool {
    pool.addresses.iter().any(|address| subnet.contains(address))
}

fn index(pools: &[SnatPool], name: &str) -> Option<SnatAction> {
    pools.iter().position(|pool| pool.name == name).map(SnatAction::Pool)
}

/// The last address that a host may have and the gateway itself has not.
fn last_host(subnet: Ipv4Net, own: Ipv4Addr) -> Option<Ipv4Addr> {
    let last = u32::from(subnet.broadcast()) - u32::from(subnet.prefix_len() < 31);
    let free = |number: &u32| Ipv4Addr::from(*number) != own && *number > u32::from(subnet.network());
    [last, last.saturating_sub(1)].into_iter().find(free).map(Ipv4Addr::from)
}

/// Whether the gateway may take an address of the overlay's subnet for its clients.
fn usable(report: &Report<'_>, place: &Located<impl Sized>, address: Ipv4Addr, overlay: &OverlayDraft) {
    let Some(subnet) = overlay.subnet.as_ref().map(|subnet| subnet.value) else { return };
    let own = match &overlay.address {
        Optional::Given(address) => Some(address.value),
        Optional::Absent => Some(subnet.network()),
        Optional::Wrong => None,
    };
    let edge = subnet.prefix_len() < 31 && (address == subnet.network() || address == subnet.broadcast());
    let what = if Some(address) == own {
        "the gateway's own address in the overlay"
    } else if edge {
        "the network or broadcast address of its subnet"
    } else {
        return;
    };
    place.note(
        report,
        format!("{address} is {what}"),
        format!("choose other addresses of {subnet}: clients need an address that no host has"),
    );
}

/// Addresses are usable, and each is in one pool.
fn within_pools(report: &Report<'_>, pools: &[PoolDraft], overlays: &[OverlayDraft]) {
    let mut owners: BTreeMap<Ipv4Addr, &str> = BTreeMap::new();
    let mut names: BTreeMap<&str, usize> = BTreeMap::new();
    let complete = overlays.iter().all(|overlay| overlay.subnet.is_some());
    for pool in pools {
        let name = pool.name.as_ref().map_or("", |name| name.value.as_str());
        if let Some(place) = &pool.name {
            if names.insert(name, pool.at).is_some() {
                place.note(
                    report,
                    format!("{name:?} is the name of another pool"),
                    "give each pool its own name",
                );
            } else if name == AUTOMAP {
                place.note(report, "is taken", "automap is a pool by itself: choose another name");
            }
        }
        for entry in pool.addresses.iter().flatten() {
            let taken = entry.value.iter().find_map(|address| Some((*address, *owners.get(address)?)));
            if let Some((address, owner)) = taken {
                entry.note(
                    report,
                    format!("{address} is in the pool {owner:?} already"),
                    "give each address to one pool, once; several rules may name the same pool",
                );
            }
            owners.extend(entry.value.iter().map(|address| (*address, name)));
            for address in &entry.value {
                let home = overlays.iter().find(|overlay| {
                    overlay.subnet.as_ref().is_some_and(|subnet| subnet.value.contains(address))
                });
                match home {
                    Some(overlay) => usable(report, entry, *address, overlay),
                    None if complete => {
                        entry.note(
                            report,
                            format!("{address} is in no overlay's subnet"),
                            "pods answer only addresses of the gateway's subnet: choose addresses there",
                        );
                        // One is enough: a range that lies elsewhere does so with all that it has.
                        break;
                    }
                    None if overlays.iter().any(|overlay| overlay.open.is_some()) => {
                        entry.note(report, UNKNOWN_SUBNET, WRITE_SUBNET);
                        break;
                    }
                    None => {}
                }
            }
        }
    }
    let count: usize =
        pools.iter().filter_map(|pool| pool.addresses.as_ref()).flatten().map(|e| e.value.len()).sum();
    if count > MAX_SNAT_ADDRESSES
        && let Some(last) = pools.last()
    {
        report.note(
            last.at,
            last.key.as_str(),
            format!("the pools have {count} addresses together"),
            format!(
                "{MAX_SNAT_ADDRESSES} are the most; each serves 64,000 connections to every port of every pod"
            ),
        );
    }
}

/// Whether the rule, the last of `rules`, can match anything in some overlay.
fn alive(
    report: &Report<'_>,
    draft: &RuleDraft,
    rules: &[SnatRule],
    pools: &[SnatPool],
    subnets: &[Ipv4Net],
) {
    let Some((rule, earlier)) = rules.split_last() else { return };
    let applies = |rule: &SnatRule, subnet: &Ipv4Net| match rule.action {
        SnatAction::Route => true,
        SnatAction::Pool(index) => has_address(&pools[index], *subnet),
    };
    let own: Vec<&Ipv4Net> = subnets.iter().filter(|subnet| applies(rule, subnet)).collect();
    if own.is_empty() {
        // What is wrong with the pool has been noted.
        return;
    }
    let at_home = |subnet: &Ipv4Net| subnet.contains(&rule.clients);
    let covered = |subnet: &Ipv4Net| {
        let before: Vec<SnatRule> = earlier.iter().filter(|rule| applies(rule, subnet)).copied().collect();
        is_covered(rule.clients, rule.destinations, &before)
    };
    if own.iter().all(|subnet| at_home(subnet)) {
        report.note(
            draft.at,
            draft.key.as_str(),
            format!(
                "the rule can never match: clients in {} are always routed without translation",
                rule.clients
            ),
            "remove it",
        );
    } else if own.iter().all(|subnet| at_home(subnet) || covered(subnet)) {
        report.note(
            draft.at,
            draft.key.as_str(),
            format!(
                "the rule can never match: earlier ones take all clients in {} to {}",
                rule.clients, rule.destinations
            ),
            "move it before them, or remove it",
        );
    }
}

/// Whether the rules together take everything of `clients` to `destinations`: where one takes a part, the rest is
/// halved until it is inside or outside.
fn is_covered(clients: Ipv4Net, destinations: Ipv4Net, rules: &[SnatRule]) -> bool {
    let touching: Vec<SnatRule> = rules
        .iter()
        .filter(|rule| overlap(rule.clients, clients) && overlap(rule.destinations, destinations))
        .copied()
        .collect();
    let Some(first) = touching.first() else { return false };
    if touching
        .iter()
        .any(|rule| rule.clients.contains(&clients) && rule.destinations.contains(&destinations))
    {
        return true;
    }
    let halves = |net: Ipv4Net| net.subnets(net.prefix_len() + 1).into_iter().flatten();
    if first.clients.contains(&clients) {
        halves(destinations).all(|half| is_covered(clients, half, &touching))
    } else {
        halves(clients).all(|half| is_covered(half, destinations, &touching))
    }
}

/// Packets that claim to come from the pod network must not be routed into it.
fn routable(report: &Report<'_>, draft: &RuleDraft, rule: &SnatRule, overlays: &[OverlayDraft]) {
    if rule.action != SnatAction::Route {
        return;
    }
    for overlay in overlays {
        let network = overlay.network.given().map(|network| (network.value, "the pod network"));
        let subnet = overlay.subnet.as_ref().map(|subnet| (subnet.value, "the gateway's own subnet"));
        if let Some((net, what)) =
            network.into_iter().chain(subnet).find(|(net, _)| overlap(*net, rule.clients))
        {
            let (at, key) = draft
                .clients
                .as_ref()
                .map_or((draft.at, draft.key.as_str()), |clients| (clients.at, clients.key.as_str()));
            report.note(
                at,
                key,
                format!("{} overlaps {net}, {what}, and the rule routes without translation", rule.clients),
                "name the prefix of clients that the cluster has a route to through this gateway",
            );
            return;
        }
    }
}

/// What the program has room for.
fn fits(report: &Report<'_>, snat: &Snat, mode: &Located<Mode>, subnets: &[Ipv4Net]) {
    let rows: usize = snat
        .rules
        .iter()
        .map(|rule| subnets.iter().filter(|subnet| snat.applies(rule, **subnet)).count())
        .sum();
    if rows > MAX_SNAT_RULES {
        mode.note(
            report,
            format!("there are {rows} rules, counting each once for every overlay and the mode as the last"),
            format!("{MAX_SNAT_RULES} are the most: join prefixes"),
        );
    }
}

fn overlap(a: Ipv4Net, b: Ipv4Net) -> bool {
    a.contains(&b) || b.contains(&a)
}

const MODE: Parse<Mode> = Parse {
    expected: "\"automap\", \"pool\" or \"none\"",
    parse: |value| match text(value)? {
        "automap" => Ok(Mode::Automap),
        "pool" => Ok(Mode::Pool),
        "none" => Ok(Mode::None),
        other => Err(format!("is {other:?}")),
    },
};

const ACTION: Parse<Wish> = Parse {
    expected: "\"automap\" or \"route\", or instead of action the key pool",
    parse: |value| match text(value)? {
        "automap" => Ok(Wish::Automap),
        "route" => Ok(Wish::Route),
        other => Err(format!("is {other:?}")),
    },
};

const POOL_NAME: Parse<String> = Parse {
    expected: "the name of a pool: 1 to 32 letters, digits, - and _",
    parse: |value| {
        let text = text(value)?;
        let fits = (1..=32).contains(&text.len())
            && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'));
        if fits { Ok(text.to_owned()) } else { Err(format!("is {text:?}")) }
    },
};

const PREFIX: Parse<Ipv4Net> = Parse {
    expected: "an IPv4 prefix, such as \"192.0.2.0/24\"",
    parse: |value| {
        let text = text(value)?;
        let net: Ipv4Net = match text.parse::<Ipv4Addr>() {
            Ok(address) => address.into(),
            Err(_) => text.parse().map_err(|_| format!("is {text:?}"))?,
        };
        if net.addr() == net.network() {
            Ok(net)
        } else {
            Err(format!("is {net}, which has host bits: the network is {}", net.trunc()))
        }
    },
};

const ADDRESSES: Parse<Vec<Ipv4Addr>> = Parse {
    expected: "an address, a range \"10.244.30.16-10.244.30.31\" or a prefix \"10.244.30.64/28\"",
    parse: |value| {
        let text = text(value)?;
        let wrong = || format!("is {text:?}");
        let (first, last) = if let Some((first, last)) = text.split_once('-') {
            let parse = |text: &str| text.trim().parse::<Ipv4Addr>().map_err(|_| wrong());
            (parse(first)?, parse(last)?)
        } else {
            let net = (PREFIX.parse)(value)?;
            (net.network(), net.broadcast())
        };
        if last < first {
            return Err(format!("is {text:?}, which ends before it begins"));
        }
        let count = u64::from(u32::from(last) - u32::from(first)) + 1;
        if count > MAX_SNAT_ADDRESSES as u64 {
            return Err(format!("is {text:?}, which has {count} addresses (at most {MAX_SNAT_ADDRESSES})"));
        }
        Ok(Ipv4AddrRange::new(first, last).collect())
    },
};

const TIMEOUT: Parse<u32> = Parse {
    expected: "seconds, 1 to 2678400 (31 days)",
    parse: |value| integer::<u32>(value, 1, LONGEST_TIMEOUT).map(ticks),
};
