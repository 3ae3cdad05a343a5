//! End to end: next hops and interfaces that change, go and come back.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use gateway::dataplane::{pins::Pins, tables::Tables};
use gateway_common::{
    abi::{VtepFlags, VtepSlot},
    wire::{Ipv4, Mac},
};
use gateway_tests::lab::{
    Flannel, Gateway,
    flannel::{EXTERNAL, GATEWAY_ENDPOINT, GATEWAY_ROUTER, MTU, NIC, Node, UNDERLAY},
    gateway::{attached, command, program},
    pass, traffic, wait_until,
    wiring::{self, End},
};
use ipnet::Ipv4Net;

const SOON: Duration = Duration::from_secs(5);
/// From before the command that makes the change to the entry in the table.
const PROMPT: Duration = Duration::from_millis(100);

type Wanted<'a> = Box<dyn Fn(&VtepSlot) -> bool + 'a>;

struct Rig {
    _gateway: Gateway,
    lab: Flannel,
    tables: Tables,
}

impl Rig {
    fn start(label: &str) -> Self {
        Self::over(Flannel::start(label).unwrap())
    }

    fn over(lab: Flannel) -> Self {
        let gateway = Gateway::start(&lab).unwrap();
        gateway.wait_ready(&lab).unwrap();
        let tables = Tables::open(&Pins::new(Path::new("/sys/fs/bpf"), &lab.instance())).unwrap();
        Self { _gateway: gateway, lab, tables }
    }

    /// The valid slot of a node.
    fn slot(&self, node: Node) -> VtepSlot {
        let endpoint = Ipv4::from(node.endpoint());
        let entries = self.tables.vteps.read().unwrap();
        let mut slots = entries.values().map(|entry| *entry.slot());
        slots
            .find(|slot| slot.flags.has(VtepFlags::USED) && slot.endpoint == endpoint)
            .expect("the node's entry")
    }

    /// Runs `ip` on the gateway host, and tells how long it took until the node's entry was as wanted.
    fn time(&self, ip: &str, node: Node, wanted: impl Fn(&VtepSlot) -> bool) -> Duration {
        assert!(!wanted(&self.slot(node)), "before `ip {ip}`: {:?}", self.slot(node));
        let start = Instant::now();
        self.ip(ip);
        while !wanted(&self.slot(node)) {
            assert!(start.elapsed() < SOON, "`ip {ip}`: {:?}", self.slot(node));
        }
        start.elapsed()
    }

    fn ip(&self, words: &str) {
        let command: Vec<&str> = ["ip"].into_iter().chain(words.split_whitespace()).collect();
        self.lab.gateway().run(&command).unwrap();
    }

    fn assert_reachable(&self, node: Node) {
        for client in [1, 2] {
            traffic::wait_reachable(self.lab.client(client), node.pod_address(1), true, SOON).unwrap();
        }
    }
}

/// What `gateway status` prints, whatever its exit code says.
fn status(lab: &Flannel) -> anyhow::Result<String> {
    let output = lab.gateway().output(&command(&program()?, &lab.config(), &["status"])?)?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn ready(slot: &VtepSlot) -> bool {
    slot.flags.has(VtepFlags::READY)
}

#[test]
fn entries_follow_within_a_tenth_of_a_second() {
    const ROUNDS: usize = 5;
    let rig = Rig::start("follow");
    let (one, two) = (Node::new(1), Node::new(2));
    let (far, near) = (two.endpoint(), one.endpoint());
    let moved = Mac::new([0x52, 0x54, 0, 0, 2, 0x77]);
    let (own, other) = (rig.lab.gateway().mac(UNDERLAY).unwrap(), Mac::new([0x52, 0x54, 0, 0, 2, 0xc9]));
    let from =
        |mac: Mac| -> Wanted<'_> { Box::new(move |slot| ready(slot) && slot.header[6..12] == mac.octets) };
    let changes: [(&str, String, Wanted<'_>); 9] = [
        (
            "neighbour's MAC",
            format!("neigh replace {far} dev {UNDERLAY} lladdr {moved} nud reachable"),
            Box::new(|slot| slot.next_hop == moved && slot.header[..6] == moved.octets),
        ),
        (
            "and back",
            format!("neigh replace {far} dev {UNDERLAY} lladdr {} nud reachable", two.mac()),
            Box::new(|slot| slot.next_hop == two.mac()),
        ),
        (
            "route through a router",
            format!("route add {far} via {near} dev {UNDERLAY}"),
            Box::new(|slot| slot.next_hop == one.mac()),
        ),
        (
            "path MTU of the route",
            format!("route replace {far} via {near} dev {UNDERLAY} mtu 1400"),
            Box::new(|slot| slot.mtu == 1350),
        ),
        (
            "route removed",
            format!("route del {far}"),
            Box::new(|slot| slot.next_hop == two.mac() && slot.mtu == 1450),
        ),
        ("MTU of the interface", format!("link set {UNDERLAY} mtu 1420"), Box::new(|slot| slot.mtu == 1370)),
        ("and back", format!("link set {UNDERLAY} mtu 1500"), Box::new(|slot| slot.mtu == 1450)),
        ("MAC address of the interface", format!("link set {UNDERLAY} address {other}"), from(other)),
        ("and back", format!("link set {UNDERLAY} address {own}"), from(own)),
    ];
    let mut late = Vec::new();
    for round in 1..=ROUNDS {
        for (what, command, wanted) in &changes {
            let time = rig.time(command, two, wanted);
            println!("round {round}: {what}: {time:?}");
            if time > PROMPT {
                late.push(format!("round {round}: {what}: {time:?}"));
            }
        }
    }
    // A machine that is busy with other things makes one wait now and then.
    assert!(late.len() <= ROUNDS, "{}", late.join("\n"));
    rig.assert_reachable(two);
}

#[test]
fn interfaces_and_addresses_that_go_and_return() {
    let rig = Rig::start("go-and-return");
    let node = Node::new(1);
    let down = rig.time(&format!("link set {UNDERLAY} down"), node, |slot| !ready(slot));
    let up = rig.time(&format!("link set {UNDERLAY} up"), node, ready);
    println!("down: {down:?}, up: {up:?}");
    rig.assert_reachable(node);

    let address = format!("{GATEWAY_ENDPOINT}/24 dev {UNDERLAY}");
    let gone = rig.time(&format!("address del {address}"), node, |slot| !ready(slot));
    let back = rig.time(&format!("address add {address}"), node, ready);
    println!("address gone: {gone:?}, back: {back:?}");
    rig.assert_reachable(node);

    for (interface, switch, address) in
        [(UNDERLAY, "underlay", GATEWAY_ENDPOINT), (EXTERNAL, "lan", GATEWAY_ROUTER)]
    {
        let (host, switch) = (rig.lab.gateway(), rig.lab.host(switch).unwrap());
        let mac = host.mac(interface).unwrap();
        wiring::delete(host.namespace(), interface).unwrap();
        wait_until("status tells of the interface", SOON, || {
            let status = status(&rig.lab)?;
            Ok(status.contains(&format!("{interface} does not exist")).then_some(()))
        })
        .unwrap();
        wiring::veth(
            End { namespace: host.namespace(), name: interface, mac: Some(mac), mtu: MTU },
            End { namespace: switch.namespace(), name: host.name(), mac: None, mtu: MTU },
        )
        .unwrap();
        wiring::enslave(switch.namespace(), host.name(), "br0").unwrap();
        host.offload(interface, &["tx", "off"]).unwrap();
        pass::attach(switch.namespace(), host.name()).unwrap();
        wiring::address(host.namespace(), interface, Ipv4Net::new(address, 24).unwrap()).unwrap();
        let start = Instant::now();
        wait_until("the program is attached again", SOON, || Ok(attached(host, interface)?.then_some(())))
            .unwrap();
        println!("{interface} attached again after {:?}", start.elapsed());
        rig.assert_reachable(node);
    }
}

/// A node whose card was exchanged and that says nothing. The kernel believes a neighbour for 15 to 45 seconds
/// (`base_reachable_time_ms`), looks at managed ones every 5 seconds (`interval_probe_time_ms`), waits 5 seconds more
/// (`delay_first_probe_time`) and asks three times, a second apart, before it asks everybody.
#[test]
#[ignore = "takes up to a minute and a half"]
fn a_silent_change_of_a_nodes_mac_is_found() {
    let settings = ["base_reachable_time_ms=5000", "delay_first_probe_time=1", "ucast_solicit=1"];
    for (label, settings, limit) in
        [("silent-change", &[][..], 65), ("silent-change-tuned", &settings[..], 25)]
    {
        let lab = Flannel::start(label).unwrap();
        for setting in settings {
            let setting = format!("net.ipv4.neigh.{UNDERLAY}.{setting}");
            lab.gateway().run(&["sysctl", "-qw", &setting]).unwrap();
        }
        let (rig, node) = (Rig::over(lab), Node::new(1));
        let moved = Mac::new([0x52, 0x54, 0, 0, 2, 0x78]);
        let start = Instant::now();
        rig.lab.node(node).run(&["ip", "link", "set", "dev", NIC, "address", &moved.to_string()]).unwrap();
        wait_until("the new address is found", Duration::from_secs(limit), || {
            Ok((rig.slot(node).next_hop == moved).then_some(()))
        })
        .unwrap();
        println!("{label}: found after {:?}", start.elapsed());
        rig.assert_reachable(node);
    }
}

#[test]
fn several_ways_to_a_node() {
    let rig = Rig::start("ecmp");
    let (one, two, three) = (Node::new(1), Node::new(2), Node::new(3));
    for router in [one, three] {
        let off = "net.ipv4.conf.eth0.send_redirects=0";
        rig.lab.node(router).run(&["sysctl", "-qw", "net.ipv4.conf.all.send_redirects=0", off]).unwrap();
    }
    let (far, first, second) = (two.endpoint(), one.endpoint(), three.endpoint());
    rig.ip(&format!(
        "route add {far} nexthop via {first} dev {UNDERLAY} nexthop via {second} dev {UNDERLAY}"
    ));
    wait_until("one of the routers is used", SOON, || {
        Ok([one.mac(), three.mac()].contains(&rig.slot(two).next_hop).then_some(()))
    })
    .unwrap();
    rig.assert_reachable(two);
    // The one that is used goes away.
    let other = if rig.slot(two).next_hop == one.mac() { three } else { one };
    let route = format!("route replace {far} via {} dev {UNDERLAY}", other.endpoint());
    let time = rig.time(&route, two, |slot| slot.next_hop == other.mac());
    println!("the other router after {time:?}");
    rig.assert_reachable(two);
}

#[test]
fn a_foreign_program_is_told_and_left_alone() {
    let lab = Flannel::start("foreign-program").unwrap();
    pass::attach(lab.gateway().namespace(), EXTERNAL).unwrap();
    let error = format!("{:#}", Gateway::start(&lab).unwrap_err());
    for part in [EXTERNAL, "lab_pass", "left alone", "ip link set dev ext0 xdp off"] {
        assert!(error.contains(part), "{error}");
    }
    let shown = lab.gateway().run(&["ip", "-d", "link", "show", "dev", EXTERNAL]).unwrap();
    assert!(shown.contains("lab_pass"), "{shown}");
    // The firewall of a gateway that does not run would be in the way of others.
    assert_eq!(lab.gateway().run(&["nft", "list", "tables"]).unwrap(), "");
    // The remedy works.
    lab.gateway().run(&["ip", "link", "set", "dev", EXTERNAL, "xdp", "off"]).unwrap();
    Gateway::start(&lab).unwrap().wait_ready(&lab).unwrap();
}

#[test]
fn generic_mode_only_when_asked_for() {
    let lab = Flannel::start("modes").unwrap();
    let text = fs::read_to_string(lab.config()).unwrap();
    for (setting, mode) in [("", "driver"), ("\n[datapath]\nxdp_mode = \"generic\"\n", "generic")] {
        fs::write(lab.config(), format!("{text}{setting}")).unwrap();
        let mut gateway = Gateway::start(&lab).unwrap();
        gateway.wait_ready(&lab).unwrap();
        // What ran before runs until it is replaced.
        wait_until(&format!("status shows the mode {mode}"), SOON, || {
            let status = status(&lab)?;
            let shown =
                |interface| status.lines().any(|line| line.starts_with(interface) && line.contains(mode));
            Ok((shown(EXTERNAL) && shown(UNDERLAY)).then_some(()))
        })
        .unwrap();
        gateway.stop().unwrap();
    }
}
