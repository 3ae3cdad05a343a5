//! A client, a forwarder and a node in a row, each in a network namespace.
//!
//! ```text
//!   client eth0 ──── eth0 forwarder eth1 ──── eth0 node
//! ```

use std::{
    fs,
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow};
use aya::Ebpf;
use gateway_common::{
    abi::VtepSlot,
    wire::{Ipv4, Mac},
};
use ipnet::Ipv4Net;
use nix::net::if_::if_nametoindex;

use super::sink::{Place as SinkPlace, Sink};
use crate::{
    bench::{
        driver::{self, Driver, Feed, Shape},
        flow::{
            CLIENT_MAC, CLIENTS, EXTERNAL, Flow, LOCAL, POD, ROUTER_MAC, UNDERLAY, cidr, endpoint, node_mac,
            own_client, plain, tunnelled,
        },
        place::{self, Scale},
    },
    lab::{
        Host, Process, Role, gateway,
        manifest::{self, NodeFacts, PodFacts},
        netns::Namespace,
        registry::{self, Claim},
        wait_until,
        wiring::{self, End, Via},
    },
    packet::{Ip, UDP},
};

/// Pods and nodes of the cluster.
pub(super) const PODS: u32 = 8;
pub(super) const NODES: u32 = 2;

/// The MAC addresses of [`place::host`].
const EXTERNAL_MAC: Mac = Mac::new([0x52, 0x54, 0, 0, 0, 0x01]);
const UNDERLAY_MAC: Mac = Mac::new([0x52, 0x54, 0, 0, 0, 0x02]);
const ROUTER: Ipv4Addr = Ipv4Addr::new(172, 16, 2, 1);
/// The only interface of client and node.
const NIC: &str = "eth0";
/// Bytes that the tunnel adds.
const OVERHEAD: usize = 50;
const START: Duration = Duration::from_mins(1);
/// How long the last frames of a run may take.
const REST: Duration = Duration::from_millis(50);

/// Who forwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Forwarder {
    /// Nobody: the frame ends at the first interface.
    Drop,
    /// A program that sends every frame on.
    Redirect,
    /// The reference programs.
    Reference,
    /// The gateway by its XDP program.
    Program,
    /// The gateway with `xdp_mode = "off"`: the kernel, with its VXLAN device.
    Kernel,
}

impl Forwarder {
    pub(super) const ALL: [Self; 5] =
        [Self::Drop, Self::Redirect, Self::Reference, Self::Program, Self::Kernel];
}

/// From the client to the node, or back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    Inward,
    Outward,
}

/// A forwarder with its network. Fields are dropped in this order: the network goes last.
pub(super) struct Lane {
    forwarder: Forwarder,
    inward: Sink,
    outward: Sink,
    /// Stay attached as long as they live.
    _programs: Vec<Ebpf>,
    _daemon: Option<Process>,
    client: Host,
    node: Host,
    _gateway: Host,
    _directory: tempfile::TempDir,
    _claim: Claim,
}

/// A lane in one direction, with frames of one length.
pub(super) struct Track<'a> {
    source: &'a Namespace,
    sink: &'a Sink,
    generator: Driver,
    frame_bytes: usize,
    arriving_bytes: usize,
}

impl Lane {
    pub(super) fn new(forwarder: Forwarder) -> Result<Self> {
        let claim = Claim::transient()?;
        let directory = tempfile::tempdir()?;
        let host = |name, role| -> Result<Host> {
            let namespace = Namespace::create(&registry::namespace_of(claim.id(), name))?;
            wiring::up(&namespace, "lo")?;
            wiring::sysctl(&namespace, "ipv6/conf/all/disable_ipv6", "1")?;
            Ok(Host::new(name, role, namespace, directory.path()))
        };
        let client = host("client", Role::Client)?;
        let gateway = host("gateway", Role::Gateway)?;
        let node = host("node", Role::Node)?;
        wire(&client, &gateway, &node)?;
        let mut programs = Vec::new();
        let mut daemon = None;
        match forwarder {
            Forwarder::Drop => {}
            Forwarder::Redirect => {
                let object = driver::load(index(&gateway, UNDERLAY)?, &[], 1)?;
                programs.push(attach(&gateway, EXTERNAL, object, driver::REDIRECT)?);
            }
            Forwarder::Reference => {
                let object = driver::load(index(&gateway, UNDERLAY)?, &headers()?, PODS)?;
                programs.push(attach(&gateway, EXTERNAL, object, driver::ENCAP)?);
                let object = driver::load(index(&gateway, EXTERNAL)?, &[], 1)?;
                programs.push(attach(&gateway, UNDERLAY, object, driver::DECAP)?);
            }
            Forwarder::Program => daemon = Some(start(&gateway, &claim, directory.path(), "")?),
            Forwarder::Kernel => {
                // A veth end takes the generator's frames only if it polls.
                for interface in [EXTERNAL, UNDERLAY] {
                    gateway.offload(interface, &["gro", "on"])?;
                }
                daemon = Some(start(&gateway, &claim, directory.path(), gateway::OFF)?);
            }
        }
        let place = if forwarder == Forwarder::Kernel { SinkPlace::Kernel } else { SinkPlace::Driver };
        let inward = match forwarder {
            Forwarder::Drop => Sink::attach(&gateway, EXTERNAL, place)?,
            _ => Sink::attach(&node, NIC, place)?,
        };
        let outward = Sink::attach(&client, NIC, place)?;
        Ok(Self {
            forwarder,
            inward,
            outward,
            _programs: programs,
            _daemon: daemon,
            client,
            node,
            _gateway: gateway,
            _directory: directory,
            _claim: claim,
        })
    }

    pub(super) fn forwarder(&self) -> Forwarder {
        self.forwarder
    }

    /// Frames with packets that take `length` bytes with a plain link header.
    pub(super) fn track(&self, direction: Direction, length: usize) -> Result<Track<'_>> {
        let flow = Flow::new(0, POD, PORT);
        let client = own_client(flow.client);
        let (source, sink, shape, frame) = match direction {
            Direction::Inward => {
                let packet = datagram(client, Ipv4::new(flow.pod), (flow.port, 80), length);
                (&self.client, &self.inward, Shape::Client, plain(EXTERNAL_MAC, &packet))
            }
            Direction::Outward => {
                let packet = datagram(Ipv4::new(flow.pod), client, (80, flow.port), length);
                (&self.node, &self.outward, Shape::Node, tunnelled(UNDERLAY_MAC, 0, &packet))
            }
        };
        let [a, b, c, _] = cidr(0).octets;
        let feed = Feed {
            shape,
            frame: frame.clone(),
            undo: (0, 0),
            flows: 1,
            clients: std::array::from_fn(own_client),
            first_port: PORT,
            pod: Ipv4::new([a, b, c, POD]),
            nodes: [0, 1].map(|node| (endpoint(node), node_mac(node))),
        };
        let mut object = driver::load(index(source, NIC)?, &[], 1)?;
        let generator = Driver::new(&feed, driver::program(&mut object, driver::REDIRECT)?.fd()?)?;
        let arriving_bytes = match (self.forwarder, direction) {
            (Forwarder::Drop | Forwarder::Redirect, _) => frame.len(),
            (_, Direction::Inward) => frame.len() + OVERHEAD,
            (_, Direction::Outward) => frame.len() - OVERHEAD,
        };
        Ok(Track { source: source.namespace(), sink, generator, frame_bytes: frame.len(), arriving_bytes })
    }
}

impl Track<'_> {
    pub(super) fn frame_bytes(&self) -> usize {
        self.frame_bytes
    }

    /// Sends so many frames; how long that took, and how many arrived as they should.
    pub(super) fn run(&self, packets: u32) -> Result<(Duration, u64)> {
        self.sink.expect(u32::try_from(self.arriving_bytes)?)?;
        let before = self.sink.arrived()?;
        let took = self.source.enter(|| {
            let start = Instant::now();
            self.generator.send(packets)?;
            Ok(start.elapsed())
        })?;
        let end = Instant::now() + REST;
        loop {
            let arrived = self.sink.arrived()? - before;
            if arrived >= u64::from(packets) || Instant::now() > end {
                return Ok((took, arrived));
            }
        }
    }
}

/// The client's port.
const PORT: u16 = 16_384;

/// A datagram without checksum that takes `length` bytes with an Ethernet header.
fn datagram(source: Ipv4, destination: Ipv4, ports: (u16, u16), length: usize) -> Ip {
    let mut payload = vec![0; length - 14 - 20];
    let bytes = u16::try_from(payload.len()).expect("fits a frame");
    for (at, word) in [(0, ports.0), (2, ports.1), (4, bytes)] {
        payload[at..at + 2].copy_from_slice(&word.to_be_bytes());
    }
    Ip::new(source.octets, destination.octets, UDP, payload)
}

fn wire(client: &Host, gateway: &Host, node: &Host) -> Result<()> {
    let [client, gateway, node] = [client, gateway, node].map(Host::namespace);
    let end = |namespace, name, mac| End { namespace, name, mac: Some(mac), mtu: 1500 };
    wiring::veth(end(client, NIC, CLIENT_MAC), end(gateway, EXTERNAL, EXTERNAL_MAC))?;
    wiring::veth(end(gateway, UNDERLAY, UNDERLAY_MAC), end(node, NIC, ROUTER_MAC))?;
    wiring::address(gateway, EXTERNAL, Ipv4Net::new([10, 244, 30, 1].into(), 24)?)?;
    wiring::address(gateway, UNDERLAY, Ipv4Net::new(LOCAL.into(), 24)?)?;
    wiring::neighbour(gateway, UNDERLAY, ROUTER, ROUTER_MAC)?;
    for client in (0..CLIENTS).map(own_client) {
        wiring::neighbour(gateway, EXTERNAL, client.into(), CLIENT_MAC)?;
    }
    wiring::route(gateway, Ipv4Net::new([172, 20, 0, 0].into(), 16)?, Via::Router(ROUTER))?;
    wiring::sysctl(gateway, "ipv4/ip_forward", "1")
}

fn index(host: &Host, interface: &str) -> Result<u32> {
    let found = || if_nametoindex(interface).map_err(|errno| anyhow!("interface {interface}: {errno}"));
    host.namespace().enter(found)
}

/// Puts a program on an interface.
fn attach(host: &Host, interface: &str, mut object: Ebpf, name: &str) -> Result<Ebpf> {
    let index = index(host, interface)?;
    host.namespace().enter(|| {
        driver::program(&mut object, name)?.attach_to_if_index(index, aya::programs::XdpMode::Driver)?;
        Ok(())
    })?;
    Ok(object)
}

/// The headers that lead to the pods.
fn headers() -> Result<Vec<(Ipv4, VtepSlot)>> {
    let scale = Scale { pods: PODS, nodes: NODES, flows: 1 };
    let host = place::host();
    let tables = place::tables(&place::config("/sys/fs/bpf".as_ref(), "headers", scale)?, &host, scale)?;
    let header = |vtep| tables.vteps.get(&vtep).map(|vtep| *vtep.slot()).context("a pod on no node");
    tables.pods.iter().map(|(pod, route)| Ok((pod.address, header(route.vtep)?))).collect()
}

/// Starts the gateway and waits until it forwards.
fn start(host: &Host, claim: &Claim, directory: &std::path::Path, settings: &str) -> Result<Process> {
    let manifests = directory.join("manifests");
    fs::create_dir(&manifests)?;
    for number in 0..NODES {
        let name = format!("node{number}");
        let node = NodeFacts {
            name: &name,
            address: endpoint(number).into(),
            pod_cidr: Ipv4Net::new(cidr(number).into(), 24)?,
            vni: 1,
            mac: node_mac(number),
        };
        manifest::write(&manifests, &manifest::node(&node))?;
        for host in 0..PODS / NODES {
            let [a, b, c, _] = cidr(number).octets;
            let pod = PodFacts {
                name: &format!("pod{number}-{host}"),
                node: &name,
                host_ip: endpoint(number).into(),
                ip: [a, b, c, POD + u8::try_from(host)?].into(),
            };
            manifest::write(&manifests, &manifest::pod(&pod))?;
        }
    }
    let config = directory.join("gateway.toml");
    let instance = registry::instance(claim.id());
    let manifests = manifests.to_str().context("a path is not UTF-8")?;
    fs::write(&config, place::configuration(&instance, manifests, settings))?;
    let program = gateway::program()?;
    let mut daemon = host.spawn(&gateway::command(&program, &config, &["run"])?)?;
    wait_until("the gateway settles", START, || {
        anyhow::ensure!(daemon.ended()?.is_none(), "the gateway ended:\n{}", daemon.output()?);
        Ok(gateway::is_settled(host, &program, &config, daemon.id())?.then_some(()))
    })?;
    Ok(daemon)
}
