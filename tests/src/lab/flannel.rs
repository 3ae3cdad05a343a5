//! The topology of the main job: clients, the gateway, and a cluster that flannel made.
//!
//! ```text
//!  client1 10.244.30.10 ─┐                    ┌─ gateway ─┐                        ┌─ node1 172.16.2.11 ── cni0 ── pods 10.244.1.2, .3
//!  client2 10.244.30.11 ─┴─ lan ── 10.244.30.1│ext0   und0│172.16.2.200 ─ underlay ┼─ node2 172.16.2.12 ── cni0 ── pods 10.244.2.2, .3
//!                                             └───────────┘                        └─ node3 172.16.2.13 ── cni0 ── pods 10.244.3.2, .3
//! ```
//!
//! The clients have addresses of the gateway's own podCIDR. `client1` takes the whole pod network to be on its link and
//! asks for pods by ARP; `client2` uses the gateway as its router. Each node has what flanneld programs: the device
//! `flannel.1` (no learning, MTU 1450, address `10.244.N.0/32`), and for every other node and the gateway a route by way of
//! the other's overlay address, a permanent neighbour and a permanent forwarding entry. Nothing learns, floods or asks.
//!
//! The cluster's objects are manifest files, and the lab programs the nodes by itself; or they are kept by an API server
//! ([`Cluster`]), and on every node a stand-in for flanneld programs what it learns there. The gateway's Node is then for the
//! gateway to make.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use gateway_common::wire::Mac;
use ipnet::Ipv4Net;
use serde_json::Value;

use super::{
    cluster::Cluster,
    evidence_directory,
    flanneld::Flanneld,
    host::{Host, Role},
    manifest::{self, NodeFacts, PodFacts},
    netns::{self, Namespace},
    pass,
    registry::{self, Claim},
    wiring::{self, End, Via, Vxlan},
};

/// VXLAN network identifier, flannel's default.
pub const VNI: u32 = 1;
/// UDP port of the tunnel, flannel's default.
pub const PORT: u16 = 8472;
/// The cluster's pod network.
pub const NETWORK: Ipv4Net = net(Ipv4Addr::new(10, 244, 0, 0), 16);
/// The gateway's own subnet: its podCIDR.
pub const GATEWAY_SUBNET: Ipv4Net = net(Ipv4Addr::new(10, 244, 30, 0), 24);
/// The gateway's address among the clients.
pub const GATEWAY_ROUTER: Ipv4Addr = Ipv4Addr::new(10, 244, 30, 1);
/// The gateway's tunnel endpoint.
pub const GATEWAY_ENDPOINT: Ipv4Addr = Ipv4Addr::new(172, 16, 2, 200);
/// MAC address of the gateway's VTEP.
pub const GATEWAY_VTEP: Mac = Mac::new([0x0e, 0x11, 0x22, 0x33, 0x44, 0x55]);
/// Interface of the gateway host that faces the clients.
pub const EXTERNAL: &str = "ext0";
/// Interface of the gateway host that faces the nodes.
pub const UNDERLAY: &str = "und0";
/// What the gateway's configuration says of both. Tests with other wires replace it.
pub const INTERFACES: &str = r#"[[interface]]
name = "ext0"
roles = ["external"]

[[interface]]
name = "und0"
roles = ["underlay"]
"#;
/// The only interface of clients, pods and nodes towards their switch.
pub const NIC: &str = "eth0";
/// flannel's device for [`VNI`] 1.
pub const FLANNEL: &str = "flannel.1";
/// The bridge of a node's pods.
pub const CNI: &str = "cni0";
/// MTU of the underlay and the client LAN.
pub const MTU: u32 = 1500;
/// MTU inside the tunnel: 50 bytes less (protocol overhead over IPv4).
pub const INNER_MTU: u32 = MTU - 50;

/// Name of a switch's bridge.
pub const SWITCH: &str = "br0";
/// The switch of clients and gateway.
pub const LAN: &str = "lan";
/// The switch of gateway and nodes.
pub const UNDERLAY_SWITCH: &str = "underlay";
/// Name of the gateway host.
pub const GATEWAY: &str = "gateway";
const PODS_PER_NODE: u8 = 2;

const fn net(address: Ipv4Addr, length: u8) -> Ipv4Net {
    Ipv4Net::new_assert(address, length)
}

/// What the other VTEPs of the cluster know about one.
#[derive(Clone, Copy, Debug)]
struct Vtep {
    endpoint: Ipv4Addr,
    subnet: Ipv4Net,
    mac: Mac,
}

impl Vtep {
    const GATEWAY: Self = Self { endpoint: GATEWAY_ENDPOINT, subnet: GATEWAY_SUBNET, mac: GATEWAY_VTEP };
}

/// A node by its number, which gives it all its names and addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Node {
    number: u8,
}

impl Node {
    /// Node `number`, 1 to 29.
    pub const fn new(number: u8) -> Self {
        assert!(number >= 1 && number < 30, "the gateway's subnet is 30");
        Self { number }
    }

    /// Its name in Kubernetes and in the lab.
    pub fn name(self) -> String {
        format!("node{}", self.number)
    }

    /// Its address in the underlay, its tunnel endpoint.
    pub const fn endpoint(self) -> Ipv4Addr {
        Ipv4Addr::new(172, 16, 2, 10 + self.number)
    }

    /// Its podCIDR.
    pub const fn subnet(self) -> Ipv4Net {
        net(Ipv4Addr::new(10, 244, self.number, 0), 24)
    }

    /// MAC address of its VTEP.
    pub const fn vtep(self) -> Mac {
        Mac::new([0x76, 0x5d, 0xef, 0, 0, self.number])
    }

    /// MAC address of its underlay interface.
    pub const fn mac(self) -> Mac {
        Mac::new([0x52, 0x54, 0, 0, 2, self.number])
    }

    /// Name of its pod `number`, counted from 1.
    pub fn pod(self, number: u8) -> String {
        format!("pod{}-{number}", self.number)
    }

    /// Address of its pod `number`. The first address of the subnet is the bridge's.
    pub const fn pod_address(self, number: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 244, self.number, 1 + number)
    }

    const fn as_vtep(self) -> Vtep {
        Vtep { endpoint: self.endpoint(), subnet: self.subnet(), mac: self.vtep() }
    }
}

/// The topology, standing.
#[derive(Debug)]
pub struct Flannel {
    // First: what works in the namespaces.
    flannelds: BTreeMap<Node, Flanneld>,
    cluster: Option<Cluster>,
    hosts: BTreeMap<String, Host>,
    nodes: BTreeSet<Node>,
    directory: PathBuf,
    // Last: the namespaces go when nothing uses them any more.
    claim: Claim,
}

impl Flannel {
    /// Builds the lab with three nodes of two pods each. It ends when the value is dropped; its evidence stays in
    /// `target/lab/<label>`.
    pub fn start(label: &str) -> Result<Self> {
        Self::build(Claim::transient()?, &evidence_directory(label)?, None)
    }

    /// The same with the cluster's objects on an API server.
    pub fn start_on(label: &str, cluster: Cluster) -> Result<Self> {
        Self::build(Claim::transient()?, &evidence_directory(label)?, Some(cluster))
    }

    /// Builds the lab under a claim, with evidence, manifests and configuration in `directory`, which is emptied first.
    pub fn build(claim: Claim, directory: &Path, cluster: Option<Cluster>) -> Result<Self> {
        Host::fresh_directory(directory)?;
        let mut lab = Self {
            flannelds: BTreeMap::new(),
            cluster,
            hosts: BTreeMap::new(),
            nodes: BTreeSet::new(),
            directory: directory.to_owned(),
            claim,
        };
        fs::create_dir_all(lab.manifests())
            .with_context(|| format!("cannot create {}", lab.manifests().display()))?;
        lab.add_switch(LAN)?;
        lab.add_switch(UNDERLAY_SWITCH)?;
        lab.add_gateway()?;
        lab.add_client(1)?;
        lab.add_client(2)?;
        for number in 1..=3 {
            lab.add_node(Node::new(number))?;
        }
        Ok(lab)
    }

    /// Id of the lab.
    pub fn id(&self) -> &str {
        self.claim.id()
    }

    /// Directory of logs, captures, manifests and configuration.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Directory of the Kubernetes manifests.
    pub fn manifests(&self) -> PathBuf {
        self.directory.join("manifests")
    }

    /// The API server that keeps the cluster's objects.
    ///
    /// # Panics
    /// When they are manifest files.
    pub fn cluster(&self) -> &Cluster {
        self.cluster.as_ref().expect("the lab was started on an API server")
    }

    /// The same, to be stopped and started.
    ///
    /// # Panics
    /// Likewise.
    pub fn cluster_mut(&mut self) -> &mut Cluster {
        self.cluster.as_mut().expect("the lab was started on an API server")
    }

    /// The gateway's configuration.
    pub fn config(&self) -> PathBuf {
        self.directory.join("gateway.toml")
    }

    /// Name of the gateway instance: the directory of its tables under `/sys/fs/bpf/gateway`.
    pub fn instance(&self) -> String {
        registry::instance(self.id())
    }

    /// All hosts, by name.
    pub fn hosts(&self) -> impl Iterator<Item = &Host> {
        self.hosts.values()
    }

    /// The host of that name.
    pub fn host(&self, name: &str) -> Result<&Host> {
        self.hosts.get(name).with_context(|| {
            let known: Vec<_> = self.hosts.keys().map(String::as_str).collect();
            format!("no host {name}; there are {}", known.join(", "))
        })
    }

    /// The host of that name, which must exist.
    ///
    /// # Panics
    /// When there is no such host; likewise below.
    pub fn named(&self, name: &str) -> &Host {
        &self.hosts[name]
    }

    /// Client `number`: 1 asks by ARP, 2 uses the gateway as router.
    pub fn client(&self, number: u8) -> &Host {
        &self.hosts[&format!("client{number}")]
    }

    /// The gateway host.
    pub fn gateway(&self) -> &Host {
        &self.hosts[GATEWAY]
    }

    /// A node's host.
    pub fn node(&self, node: Node) -> &Host {
        &self.hosts[&node.name()]
    }

    /// A pod's host.
    pub fn pod(&self, node: Node, number: u8) -> &Host {
        &self.hosts[&node.pod(number)]
    }

    /// The nodes, by number.
    pub fn nodes(&self) -> impl Iterator<Item = Node> {
        self.nodes.iter().copied()
    }

    /// Leaves the lab standing when this process ends.
    pub fn keep(self) {
        self.claim.keep();
    }

    /// Joins a node to the cluster, with two pods: devices, what flanneld programs on it and on all others, manifests.
    pub fn add_node(&mut self, node: Node) -> Result<()> {
        let name = node.name();
        self.add_host(&name, Role::Node)?;
        let host = self.node(node);
        let namespace = host.namespace();
        self.plug(host, NIC, UNDERLAY_SWITCH, Some(node.mac()))?;
        wiring::address(namespace, NIC, net(node.endpoint(), 24))?;
        wiring::sysctl(namespace, "ipv4/ip_forward", "1")?;
        // Strict, as many distributions have it: what a node takes from the tunnel must also go back there.
        wiring::sysctl(namespace, "ipv4/conf/all/rp_filter", "1")?;

        let device = Vxlan {
            name: FLANNEL,
            vni: VNI,
            port: PORT,
            underlay: NIC,
            local: node.endpoint(),
            mac: node.vtep(),
            mtu: INNER_MTU,
        };
        wiring::vxlan(namespace, device)?;
        wiring::address(namespace, FLANNEL, net(node.subnet().network(), 32))?;

        wiring::bridge(namespace, CNI, INNER_MTU)?;
        wiring::address(namespace, CNI, net(node.pod_address(0), 24))?;

        if let Some(cluster) = &self.cluster {
            let log = host.evidence_file("flanneld.log");
            let flanneld = cluster.flanneld(&name, namespace, &log)?;
            self.flannelds.insert(node, flanneld);
        } else {
            learn(namespace, Vtep::GATEWAY)?;
            for other in self.nodes() {
                learn(namespace, other.as_vtep())?;
                learn(self.node(other).namespace(), node.as_vtep())?;
            }
        }
        self.nodes.insert(node);
        for number in 1..=PODS_PER_NODE {
            self.add_pod(node, number)?;
        }
        self.write_node(&name, node.as_vtep())
    }

    /// Takes a node out of the cluster, with its pods: manifests, what flanneld programmed for it, the host itself.
    pub fn remove_node(&mut self, node: Node) -> Result<()> {
        ensure!(self.nodes.remove(&node), "no node {}", node.name());
        self.flannelds.remove(&node);
        self.withdraw("Node", &node.name())?;
        let prefix = format!("pod{}-", node.number);
        let pods: Vec<String> = self.hosts.keys().filter(|name| name.starts_with(&prefix)).cloned().collect();
        for pod in pods {
            self.withdraw("Pod", &pod)?;
            self.remove_host(&pod)?;
        }
        if self.cluster.is_none() {
            for other in self.nodes() {
                forget(self.node(other).namespace(), node.as_vtep())?;
            }
        }
        self.remove_host(&node.name())
    }

    /// Starts pod `number` on a node, and writes its manifest.
    pub fn add_pod(&mut self, node: Node, number: u8) -> Result<()> {
        let name = node.pod(number);
        self.add_host(&name, Role::Pod)?;
        let pod = self.pod(node, number).namespace();
        let host = self.node(node).namespace();
        let port = format!("veth{}-{number}", node.number);
        wiring::veth(
            End { namespace: pod, name: NIC, mac: None, mtu: INNER_MTU },
            End { namespace: host, name: &port, mac: None, mtu: INNER_MTU },
        )?;
        wiring::enslave(host, &port, CNI)?;
        wiring::address(pod, NIC, net(node.pod_address(number), 24))?;
        wiring::route(pod, Ipv4Net::default(), Via::Router(node.pod_address(0)))?;
        self.pod(node, number).offload(NIC, &["tx", "off"])?;
        let facts = PodFacts {
            name: &name,
            node: &node.name(),
            host_ip: node.endpoint(),
            ip: node.pod_address(number),
        };
        self.declare(&manifest::pod(&facts))
    }

    /// Moves a pod to another node with its address and all its connections: its interface is plugged in there, the node
    /// routes its address to it and answers for its router, and its manifest names the node.
    pub fn move_pod(&mut self, from: Node, number: u8, to: Node) -> Result<()> {
        let (name, address) = (from.pod(number), from.pod_address(number));
        let port = format!("veth{}-{number}", from.number);
        let old = self.node(from);
        old.run(&["ip", "link", "set", &port, "netns", self.node(to).namespace().name()])?;
        let new = self.node(to);
        wiring::up(new.namespace(), &port)?;
        wiring::route(new.namespace(), net(address, 32), Via::Link(&port))?;
        wiring::sysctl(new.namespace(), &format!("ipv4/conf/{port}/proxy_arp"), "1")?;
        wiring::sysctl(new.namespace(), &format!("ipv4/neigh/{port}/proxy_delay"), "0")?;
        // Its router is another host now.
        self.pod(from, number).run(&["ip", "neigh", "flush", "dev", NIC])?;
        let facts = PodFacts { name: &name, node: &to.name(), host_ip: to.endpoint(), ip: address };
        self.declare(&manifest::pod(&facts))
    }

    /// Ends a pod and removes its manifest.
    pub fn remove_pod(&mut self, node: Node, number: u8) -> Result<()> {
        let name = node.pod(number);
        self.withdraw("Pod", &name)?;
        self.remove_host(&name)
    }

    /// Writes an object of the cluster.
    fn declare(&self, object: &Value) -> Result<()> {
        match &self.cluster {
            Some(cluster) => cluster.put(object),
            None => manifest::write(&self.manifests(), object),
        }
    }

    /// Removes an object of the cluster.
    fn withdraw(&self, kind: &str, name: &str) -> Result<()> {
        match &self.cluster {
            Some(cluster) => cluster.remove(kind, name),
            None => manifest::remove(&self.manifests(), kind, name),
        }
    }

    fn add_switch(&mut self, name: &str) -> Result<()> {
        self.add_host(name, Role::Switch)?;
        let namespace = self.host(name)?.namespace();
        wiring::bridge(namespace, SWITCH, MTU)
    }

    fn add_client(&mut self, number: u8) -> Result<()> {
        let name = format!("client{number}");
        self.add_host(&name, Role::Client)?;
        let host = self.client(number);
        self.plug(host, NIC, LAN, Some(Mac::new([0x52, 0x54, 0, 0, 1, number])))?;
        let address = Ipv4Addr::new(10, 244, 30, 9 + number);
        wiring::address(host.namespace(), NIC, net(address, 24))?;
        if number == 1 {
            wiring::route(host.namespace(), NETWORK, Via::Link(NIC))
        } else {
            wiring::route(host.namespace(), Ipv4Net::default(), Via::Router(GATEWAY_ROUTER))
        }
    }

    fn add_gateway(&mut self) -> Result<()> {
        self.add_host(GATEWAY, Role::Gateway)?;
        let host = self.gateway();
        self.plug(host, EXTERNAL, LAN, Some(Mac::new([0x52, 0x54, 0, 0, 1, 200])))?;
        self.plug(host, UNDERLAY, UNDERLAY_SWITCH, Some(Mac::new([0x52, 0x54, 0, 0, 2, 200])))?;
        wiring::address(host.namespace(), EXTERNAL, net(GATEWAY_ROUTER, 24))?;
        wiring::address(host.namespace(), UNDERLAY, net(GATEWAY_ENDPOINT, 24))?;
        wiring::sysctl(host.namespace(), "ipv4/ip_forward", "1")?;
        wiring::sysctl(host.namespace(), "ipv4/conf/all/rp_filter", "2")?;
        let kubeconfig = self.directory.join("kubeconfig");
        if let Some(cluster) = &mut self.cluster {
            cluster.connect(self.hosts[GATEWAY].namespace(), &kubeconfig)?;
        }
        fs::write(self.config(), self.configuration())
            .with_context(|| format!("cannot write {}", self.config().display()))?;
        if self.cluster.is_some() {
            return Ok(());
        }
        // Its Node object is what made the nodes learn it; the gateway must know itself in it.
        self.write_node(GATEWAY, Vtep::GATEWAY)
    }

    fn configuration(&self) -> String {
        let (source, prefix) = match &self.cluster {
            None => (
                format!("[source]\nkind = \"files\"\npath = \"{}\"", self.manifests().display()),
                String::new(),
            ),
            Some(cluster) => (
                format!(
                    r#"[source]
kind = "kubernetes"
kubeconfig = "{kubeconfig}"

[flannel]
register = true
heartbeat = true
node = "{node}""#,
                    kubeconfig = self.directory.join("kubeconfig").display(),
                    node = cluster.node_name(GATEWAY),
                ),
                format!("annotation_prefix = \"{}\"\n", cluster.annotation_prefix()),
            ),
        };
        format!(
            r#"instance = "{instance}"

{source}

{INTERFACES}
[[overlay]]
name = "flannel"
vni = {VNI}
port = {PORT}
local = "{GATEWAY_ENDPOINT}"
mac = "{GATEWAY_VTEP}"
subnet = "{GATEWAY_SUBNET}"
network = "{NETWORK}"
{prefix}"#,
            instance = self.instance(),
        )
    }

    fn write_node(&self, name: &str, vtep: Vtep) -> Result<()> {
        let facts =
            NodeFacts { name, address: vtep.endpoint, pod_cidr: vtep.subnet, vni: VNI, mac: vtep.mac };
        self.declare(&manifest::node(&facts))
    }

    /// Makes an empty host.
    pub(super) fn add_host(&mut self, name: &str, role: Role) -> Result<()> {
        if self.hosts.contains_key(name) {
            bail!("there is a host {name} already");
        }
        let namespace = Namespace::create(&registry::namespace_of(self.id(), name))?;
        wiring::up(&namespace, "lo")?;
        // Router solicitations and the like would only blur captures and counters.
        wiring::sysctl(&namespace, "ipv6/conf/all/disable_ipv6", "1")?;
        wiring::sysctl(&namespace, "ipv6/conf/default/disable_ipv6", "1")?;
        // A switch looks at no IP header, but with br_netfilter in the kernel Linux' bridge would: it drops malformed
        // packets, and takes an eighth of the time that a packet needs through the lab.
        for family in ["ip", "ip6", "arp"] {
            let key = format!("bridge/bridge-nf-call-{family}tables");
            if wiring::has_sysctl(&namespace, &key)? {
                wiring::sysctl(&namespace, &key, "0")?;
            }
        }
        self.hosts.insert(name.to_owned(), Host::new(name, role, namespace, &self.directory));
        Ok(())
    }

    fn remove_host(&mut self, name: &str) -> Result<()> {
        let host = self.hosts.remove(name).with_context(|| format!("no host {name}"))?;
        // The namespace lives on for a moment after its name is gone; its wire should not.
        if host.role() != Role::Switch {
            wiring::delete(host.namespace(), NIC)?;
        }
        netns::remove(&[host.namespace().name().to_owned()])
    }

    /// Joins an interface of a host to a switch.
    pub(super) fn plug(&self, host: &Host, interface: &str, switch: &str, mac: Option<Mac>) -> Result<()> {
        let switch = self.host(switch)?;
        wiring::veth(
            End { namespace: host.namespace(), name: interface, mac, mtu: MTU },
            End { namespace: switch.namespace(), name: host.name(), mac: None, mtu: MTU },
        )?;
        wiring::enslave(switch.namespace(), host.name(), SWITCH)?;
        host.offload(interface, &["tx", "off"])?;
        if host.role() == Role::Gateway {
            pass::attach(switch.namespace(), host.name())?;
        }
        Ok(())
    }
}

/// What flanneld programs on a node for another VTEP of the cluster.
fn learn(node: &Namespace, peer: Vtep) -> Result<()> {
    let overlay = peer.subnet.network();
    wiring::neighbour(node, FLANNEL, overlay, peer.mac)?;
    wiring::fdb(node, FLANNEL, peer.mac, peer.endpoint)?;
    wiring::route(node, peer.subnet, Via::Onlink(FLANNEL, overlay))
}

/// What flanneld removes on a node when another VTEP leaves the cluster.
fn forget(node: &Namespace, peer: Vtep) -> Result<()> {
    let overlay = peer.subnet.network();
    wiring::delete_route(node, peer.subnet, Via::Onlink(FLANNEL, overlay))?;
    wiring::delete_fdb(node, FLANNEL, peer.mac, peer.endpoint)?;
    wiring::delete_neighbour(node, FLANNEL, overlay)
}
