//! Objects and routes that claim addresses which are not the cluster's: the gateway must take nobody off the network.

use std::{fs, net::Ipv4Addr, time::Duration};

use gateway_common::{abi::Outcome, wire::Mac};
use gateway_tests::lab::{
    Flannel, Gateway,
    flannel::{EXTERNAL, NIC, Node, PORT, VNI},
    frames::{self, Datagram},
    manifest::{self, NodeFacts, PodFacts},
    traffic, wait_until,
};

const SOON: Duration = Duration::from_secs(5);
/// A second network of the client LAN: the gateway's, and those of two hosts.
const LAN: &str = "192.0.2.0/24";
const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const HOSTS: [Ipv4Addr; 2] = [Ipv4Addr::new(192, 0, 2, 10), Ipv4Addr::new(192, 0, 2, 11)];
/// The host's own, by a local route.
const LOCAL: &str = "198.51.100.0/24";
const OWN: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);

struct Rig {
    gateway: Gateway,
    lab: Flannel,
}

impl Rig {
    /// A gateway whose configuration does not bound the cluster's network.
    fn start(label: &str) -> Self {
        let lab = Flannel::start(label).unwrap();
        let text = fs::read_to_string(lab.config()).unwrap();
        let unbounded: Vec<&str> = text.lines().filter(|line| !line.starts_with("network")).collect();
        fs::write(lab.config(), unbounded.join("\n")).unwrap();
        for (host, interface, address) in [
            (lab.gateway(), EXTERNAL, GATEWAY),
            (lab.client(1), NIC, HOSTS[0]),
            (lab.client(2), NIC, HOSTS[1]),
        ] {
            host.run(&["ip", "address", "add", &format!("{address}/24"), "dev", interface]).unwrap();
        }
        let mut gateway = Gateway::start(&lab).unwrap();
        gateway.wait_ready(&lab).unwrap();
        gateway.wait_settled(lab.gateway()).unwrap();
        Self { gateway, lab }
    }

    fn node(&self, name: &str, number: u8, cidr: &str) {
        let facts = NodeFacts {
            name,
            address: Ipv4Addr::new(172, 16, 2, number),
            pod_cidr: cidr.parse().unwrap(),
            vni: VNI,
            mac: Mac::new([0x0a, 0, 0, 0, 0, number]),
        };
        manifest::write(&self.lab.manifests(), &manifest::node(&facts)).unwrap();
    }

    fn pod(&self, name: &str, node: Node, ip: Ipv4Addr) {
        let facts = PodFacts { name, node: &node.name(), host_ip: node.endpoint(), ip };
        manifest::write(&self.lab.manifests(), &manifest::pod(&facts)).unwrap();
    }

    /// Waits until the problem is told, by its place and a part of what it says.
    fn wait_told(&self, place: &str, what: &str) {
        wait_until(&format!("{place}: {what}"), SOON, || {
            let shown = self.gateway.output(self.lab.gateway(), &["show", "problems"])?;
            let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
            Ok(shown.lines().any(|line| line.contains(place) && line.contains(what)).then_some(()))
        })
        .unwrap();
    }

    fn table(&self, verb: &str) -> String {
        self.gateway.text(self.lab.gateway(), &["show", verb]).unwrap()
    }

    fn counter(&self, outcome: Outcome) -> u64 {
        let label = Outcome::by_number(outcome.number()).unwrap().label;
        self.gateway.counters(self.lab.gateway()).unwrap()[label]
    }

    /// The second host asks for the first one anew, and gets to it.
    fn assert_neighbours(&self) {
        let [first, second] = [1, 2].map(|number| self.lab.client(number));
        let before = self.counter(Outcome::ArpReply);
        for _ in 0..3 {
            second.run(&["ip", "neigh", "flush", "to", LAN]).unwrap();
            assert!(traffic::reaches(second, HOSTS[0]).unwrap());
            let found = second.run(&["ip", "neigh", "show", &HOSTS[0].to_string()]).unwrap();
            let mac = first.mac(NIC).unwrap().to_string();
            assert!(found.contains(&mac), "{mac}: {found}");
        }
        assert_eq!(self.counter(Outcome::ArpReply), before, "the gateway answered for a host of the LAN");
    }
}

#[test]
fn hosts_of_the_lan_are_no_pods() {
    let rig = Rig::start("impostors-lan");
    let tables = ["routes", "pods"].map(|verb| rig.table(verb));
    rig.node("covers", 150, LAN);
    rig.node("within", 151, "192.0.2.0/28");
    rig.node("around", 152, "192.0.0.0/16");
    rig.pod("impostor", Node::new(1), HOSTS[0]);
    for name in ["covers", "within", "around"] {
        rig.wait_told(&format!("Node {name}, spec.podCIDR"), "the network of this host's interface ext0");
    }
    rig.wait_told("Pod default/impostor, status.podIP", "outside of 10.244.1.0/24");
    assert_eq!(["routes", "pods"].map(|verb| rig.table(verb)), tables);
    rig.assert_neighbours();

    // The interface gives up the network: then a podCIDR may have it; and gets it back.
    let gateway = rig.lab.gateway();
    let address = format!("{GATEWAY}/24");
    gateway.run(&["ip", "address", "del", &address, "dev", EXTERNAL]).unwrap();
    wait_until("the oldest by name is a node", SOON, || {
        Ok(rig.table("routes").contains("192.0.0.0/16").then_some(()))
    })
    .unwrap();
    gateway.run(&["ip", "address", "add", &address, "dev", EXTERNAL]).unwrap();
    wait_until("it is none", SOON, || Ok((rig.table("routes") == tables[0]).then_some(()))).unwrap();
    rig.assert_neighbours();
}

#[test]
fn what_the_host_takes_by_a_local_route_is_its_own() {
    let rig = Rig::start("impostors-local");
    let (gateway, client) = (rig.lab.gateway(), rig.lab.client(1));
    gateway.run(&["ip", "route", "add", "local", LOCAL, "dev", "lo"]).unwrap();
    client.run(&["ip", "route", "add", LOCAL, "via", "10.244.30.1"]).unwrap();
    assert!(traffic::reaches(client, OWN).unwrap());
    // The constants take a moment; until then the firewall alone keeps strangers away.
    let intrusion =
        Datagram { from: (HOSTS[0], 4000), to: (OWN, PORT), ttl: 64, ecn: 0, payload: frames::VXLAN.into() };
    let [own, router] = [client.mac(NIC).unwrap(), gateway.mac(EXTERNAL).unwrap()];
    let frame = frames::ethernet(own, router, frames::IPV4, &intrusion.packet().unwrap());
    wait_until("the program drops what is for the tunnel there", SOON, || {
        let before = rig.counter(Outcome::TunnelPortExternal);
        client.inject(NIC, &frame)?;
        Ok((rig.counter(Outcome::TunnelPortExternal) > before).then_some(()))
    })
    .unwrap();

    // A node claims a part of it; another part is that node's.
    rig.node("greedy", 150, "198.51.0.0/16");
    wait_until("the node's route", SOON, || Ok(rig.table("routes").contains("198.51.0.0/16").then_some(())))
        .unwrap();
    assert!(traffic::reaches(client, OWN).unwrap());
    client.run(&["ip", "route", "add", "198.51.99.0/24", "dev", NIC]).unwrap();
    client.run(&["ip", "route", "add", "198.51.100.128/25", "dev", NIC]).unwrap();
    let asks = |target: [u8; 4]| {
        let before = rig.counter(Outcome::ArpReply);
        client.inject(NIC, &frames::arp_request(own, client.address(NIC).unwrap(), target.into())).unwrap();
        std::thread::sleep(Duration::from_millis(100));
        rig.counter(Outcome::ArpReply) - before
    };
    assert_eq!((asks([198, 51, 99, 1]), asks([198, 51, 100, 200])), (1, 0));

    // The route goes, and what it held is the node's.
    gateway.run(&["ip", "route", "del", "local", LOCAL, "dev", "lo"]).unwrap();
    wait_until("the gateway answers for it", SOON, || Ok((asks([198, 51, 100, 200]) == 1).then_some(())))
        .unwrap();
}
