//! What a gateway and its cluster look like, as plain values: for the kernel's tables, and for the engine on the host.

use std::{collections::BTreeMap, path::Path};

use anyhow::{Context as _, Result, anyhow, ensure};
use bytemuck::Zeroable as _;
use gateway::{
    config::{Config, Overrides},
    dataplane::{
        constants::{Sessions, constants},
        template,
    },
    kernel::{
        host::{Host, Kind as DeviceKind, Link, XdpState},
        underlay::{NextHop, ReadyHop},
    },
    plan::VtepSpec,
};
use gateway_common::{
    abi::{self, OverlayAddress, Route, Vtep},
    model::HostTables,
    wire::{Ipv4, Mac},
};

use super::flow::{
    CLIENTS, EXTERNAL, Flow, Kind, LOCAL, POD, ROUTER_MAC, UNDERLAY, VTEP_MAC, cidr, endpoint, node_mac,
    plain,
};

/// SNAT addresses of the gateway: as many as there are clients, so that each has one of its own.
const POOL: [u8; 4] = [10, 244, 30, 128];

/// How large a cluster is, and how many flows take turns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Scale {
    pub(super) pods: u32,
    pub(super) nodes: u32,
    /// A power of two.
    pub(super) flows: u32,
}

/// Which of the two programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    /// Of the interface that faces the clients.
    External,
    /// Of the interface that faces the nodes.
    Underlay,
}

/// What frames depend on.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub(super) scale: Scale,
    pub(super) external_mac: Mac,
    pub(super) underlay_mac: Mac,
    /// Clients that are translated, and to what: each to another address.
    pub(super) clients: [Ipv4; CLIENTS],
    pub(super) snat: [Ipv4; CLIENTS],
}

impl Place {
    /// Nobody is translated yet.
    pub(super) fn new(scale: Scale, host: &Host) -> Result<Self> {
        let mac = |name| -> Result<Mac> { Ok(link(host, name)?.mac.unwrap_or_default()) };
        Ok(Self {
            scale,
            external_mac: mac(EXTERNAL)?,
            underlay_mac: mac(UNDERLAY)?,
            clients: [Ipv4::UNSPECIFIED; CLIENTS],
            snat: [Ipv4::UNSPECIFIED; CLIENTS],
        })
    }

    /// Finds a client for each SNAT address; `ask` gives what the program makes of a frame from outside.
    pub(super) fn choose_clients(&mut self, mut ask: impl FnMut(&[u8]) -> Result<Vec<u8>>) -> Result<()> {
        let mut found: BTreeMap<Ipv4, Ipv4> = BTreeMap::new();
        for candidate in 0..10_000_u32 {
            let client = Ipv4::new((0xc612_0001 + candidate).to_be_bytes());
            let syn = Flow::new(0, POD, 1024).upstream(client, Kind::Syn);
            let output = ask(&plain(self.external_mac, &syn))?;
            let source = output.get(76..80).context("the program did not encapsulate a client's SYN")?;
            found.entry(Ipv4::new(source.try_into()?)).or_insert(client);
            if found.len() == CLIENTS {
                break;
            }
        }
        ensure!(found.len() == CLIENTS, "the pool's addresses are not all used: {found:?}");
        for (index, (snat, client)) in found.into_iter().enumerate() {
            (self.clients[index], self.snat[index]) = (client, snat);
        }
        Ok(())
    }
}

/// A device of the host.
pub(super) fn link<'a>(host: &'a Host, name: &str) -> Result<&'a Link> {
    host.by_name(name).with_context(|| format!("the benchmark's network has no {name}"))
}

/// Constants of the program on that side.
pub(super) fn program_constants(config: &Config, host: &Host, side: Side, slots: u32) -> Result<abi::Config> {
    let name = match side {
        Side::External => EXTERNAL,
        Side::Underlay => UNDERLAY,
    };
    let sessions = Sessions { slots, ..Sessions::default() };
    Ok(constants(config, host, link(host, name)?, &sessions)?)
}

/// The tables as the daemon fills them; FIB, constants and sessions are left empty.
pub(super) fn tables(config: &Config, host: &Host, scale: Scale) -> Result<HostTables> {
    let overlay = config.overlays.first().context("no overlay")?;
    let underlay = link(host, UNDERLAY)?;
    let hop = NextHop::Ready(ReadyHop {
        ifindex: underlay.index,
        vlan: None,
        source: underlay.mac.unwrap_or_default(),
        destination: ROUTER_MAC,
        mtu: underlay.mtu,
        on_link: false,
    });
    let vtep = |node| {
        let spec = VtepSpec { endpoint: endpoint(node).into(), mac: node_mac(node), direct: false };
        let mut vtep = Vtep { generation: 1, ..Vtep::zeroed() };
        vtep.slots[0] = template::slot(0, overlay, &spec, &hop);
        vtep
    };
    let key = |address| OverlayAddress { overlay: 0, address };
    Ok(HostTables {
        vteps: nodes(scale).map(|node| (node, vtep(node))).collect(),
        pods: pods(scale).map(|(pod, node)| (key(pod), Route::to(node))).collect(),
        sources: nodes(scale).map(|node| (key(endpoint(node)), Route::to(node))).collect(),
        prefixes: nodes(scale).map(|node| ((0, 24, cidr(node)), Route::to(node))).collect(),
        addresses: host.address_table(config, &Sessions::default().draining),
        egress: host.egress_table(config, |_| false),
        ..HostTables::default()
    })
}

fn nodes(scale: Scale) -> std::ops::Range<u32> {
    0..scale.nodes
}

/// Every pod with its node. The first five of nodes 0 and 1 are there at every size: the flows use four of them.
fn pods(scale: Scale) -> impl Iterator<Item = (Ipv4, u32)> {
    const ALWAYS: u32 = 10;
    (0..scale.pods).map(move |number| {
        let (node, host) = match number.checked_sub(ALWAYS) {
            None => (number & 1, number >> 1),
            Some(rest) => (2 + rest % (scale.nodes - 2), rest / (scale.nodes - 2)),
        };
        let [a, b, c, _] = cidr(node).octets;
        (Ipv4::new([a, b, c, POD + u8::try_from(host).expect("a /24 holds a node's pods")]), node)
    })
}

/// The host that the frames are for: two interfaces, forwarding between clients and the underlay.
pub(super) fn host() -> Host {
    let link = |index, name: &str, last| Link {
        index,
        name: name.to_owned(),
        mac: Some(Mac::new([0x52, 0x54, 0, 0, 0, last])),
        mtu: 1500,
        up: true,
        kind: DeviceKind::Other,
        alias: None,
        xdp: XdpState::default(),
    };
    let addresses = [([10, 244, 30, 1].into(), 2), (LOCAL.into(), 3)];
    Host {
        links: BTreeMap::from([(2, link(2, EXTERNAL, 1)), (3, link(3, UNDERLAY, 2))]),
        addresses: addresses.into(),
        primary: addresses.into_iter().map(|(address, index)| (index, address)).collect(),
        broadcasts: [([10, 244, 30, 255].into(), 2)].into(),
        ..Host::default()
    }
}

/// The configuration of README.md, for objects in the directory `manifests`, with these settings at the end.
pub(super) fn configuration(instance: &str, manifests: &str, settings: &str) -> String {
    format!(
        r#"
instance = "{instance}"
[source]
kind = "files"
path = "{manifests}"
[[interface]]
name = "{EXTERNAL}"
roles = ["external"]
[[interface]]
name = "{UNDERLAY}"
roles = ["underlay"]
[[overlay]]
name = "flannel"
vni = 1
port = 8472
local = "{LOCAL}"
mac = "{VTEP_MAC}"
subnet = "10.244.30.0/24"
{settings}"#
    )
}

/// The same with a pool for clients from outside.
pub(super) fn config(bpffs: &Path, instance: &str, scale: Scale) -> Result<Config> {
    /// Sessions that are opened besides those of the flows.
    const MORE: u32 = 262_144;
    let [a, b, c, first] = POOL;
    let last = first + 15;
    let settings = format!(
        r#"
[snat]
mode = "pool"
max_sessions = {sessions}
[[snat.pool]]
name = "all"
addresses = ["{a}.{b}.{c}.{first}-{a}.{b}.{c}.{last}"]
[datapath]
bpffs = "{bpffs}"
"#,
        sessions = scale.flows + MORE,
        bpffs = bpffs.display(),
    );
    let text = configuration(instance, "/nonexistent", &settings);
    Config::parse(&text, "the benchmark's configuration", &Overrides::default())
        .map_err(|problems| anyhow!("{problems}"))
}
