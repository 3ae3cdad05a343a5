//! One interface for both sides: clients, nodes and the gateway share a link, and the gateway's only interface is underlay
//! and external at once. What it forwards leaves where it came in.

use std::{fs, time::Duration};

use gateway_common::abi::{Class, Outcome};
use gateway_tests::lab::{
    Flannel, Gateway,
    flannel::{
        EXTERNAL, GATEWAY_ENDPOINT, GATEWAY_ROUTER, GATEWAY_SUBNET, INTERFACES, LAN, MTU, NIC, Node, PORT,
        SWITCH, UNDERLAY, UNDERLAY_SWITCH,
    },
    frames::{self, Datagram, IP},
    traffic,
    wiring::{self, End},
};
use ipnet::Ipv4Net;
use serde_json::json;

const SOON: Duration = Duration::from_secs(5);
const TRUNK: &str = "trunk";
const ONE_ARM: &str = r#"[[interface]]
name = "und0"
roles = ["underlay", "external"]
"#;

/// The flannel lab on a single link, and a gateway with a single interface.
fn start(label: &str) -> (Gateway, Flannel) {
    let lab = Flannel::start(label).unwrap();
    let switches = [LAN, UNDERLAY_SWITCH].map(|name| lab.host(name).unwrap().namespace());
    let [lan, underlay] = switches.map(|namespace| End { namespace, name: TRUNK, mac: None, mtu: MTU });
    wiring::veth(lan, underlay).unwrap();
    for namespace in switches {
        wiring::enslave(namespace, TRUNK, SWITCH).unwrap();
    }
    let host = lab.gateway().namespace();
    wiring::delete(host, EXTERNAL).unwrap();
    let router = Ipv4Net::new(GATEWAY_ROUTER, GATEWAY_SUBNET.prefix_len()).unwrap();
    wiring::address(host, UNDERLAY, router).unwrap();

    let two_armed = fs::read_to_string(lab.config()).unwrap();
    assert!(two_armed.contains(INTERFACES), "the lab's configuration has changed:\n{two_armed}");
    fs::write(lab.config(), two_armed.replace(INTERFACES, ONE_ARM)).unwrap();

    let gateway = Gateway::start(&lab).unwrap();
    gateway.wait_ready(&lab).unwrap();
    (gateway, lab)
}

#[test]
fn one_interface_serves_clients_and_nodes() {
    let (gateway, lab) = start("one-armed");
    let before = gateway.counters(lab.gateway()).unwrap();
    traffic::exchange(&lab).unwrap();
    // It was the fast path, and nothing was dropped.
    let after = gateway.counters(lab.gateway()).unwrap();
    for row in Outcome::TABLE {
        let packets = after[row.label] - before[row.label];
        match row.outcome {
            Outcome::Encap | Outcome::Decap => assert!(packets > 10_000, "{}: only {packets}", row.label),
            _ if row.class == Class::Drop => assert_eq!(packets, 0, "{}", row.label),
            _ => {}
        }
    }
    let status = gateway.json(lab.gateway(), &["status"]).unwrap();
    assert_eq!(status["interfaces"].as_array().unwrap().len(), 1);
    assert_eq!(status["interfaces"][0]["roles"], json!(["underlay", "external"]));
    assert_eq!(status["healthy"], true, "{status:#}");
}

/// On a shared link clients can reach the tunnel's port; only nodes may use it.
#[test]
fn a_client_on_the_nodes_link_is_no_node() {
    let (gateway, lab) = start("one-armed-spoof");
    let (client, node) = (lab.client(1), Node::new(1));
    let packet = Datagram {
        from: (node.pod_address(1), 4000),
        to: (lab.client(2).address(NIC).unwrap(), 9999),
        ttl: 63,
        ecn: 0,
        payload: b"not from a pod".to_vec(),
    };
    let underlay = lab.gateway().mac(UNDERLAY).unwrap();
    let mut frame = frames::tunnelled(node, underlay, 0, &packet.packet().unwrap()).unwrap();
    // Correct in all but where it comes from: the client's own address.
    frame[IP + 12..IP + 16].copy_from_slice(&client.address(NIC).unwrap().octets());
    frames::mend_checksum(&mut frame, IP).unwrap();

    let label = Outcome::by_number(Outcome::OuterSource.number()).unwrap().label;
    let before = gateway.counters(lab.gateway()).unwrap();
    let arrived = lab.client(2).capture(NIC, "udp port 9999").unwrap();
    client.inject(NIC, &frame).unwrap();
    // A good one after it: when that has arrived, the bad one would have.
    let good = frames::tunnelled(node, underlay, 0, &packet.packet().unwrap()).unwrap();
    lab.node(node).inject(NIC, &good).unwrap();
    arrived.wait_for(1, SOON).unwrap();
    assert_eq!(arrived.stop().unwrap().len(), 1);
    assert_eq!(gateway.counters(lab.gateway()).unwrap()[label], before[label] + 1);
}

/// The tunnel packet goes back out of the interface that the client's frame came in by.
#[test]
fn the_way_out_is_the_way_in() {
    let (_gateway, lab) = start("one-armed-wire");
    let (client, node) = (lab.client(2), Node::new(3));
    let own = lab.gateway().mac(UNDERLAY).unwrap();
    let tunnel =
        lab.node(node).capture(NIC, &format!("udp port {PORT} and src host {GATEWAY_ENDPOINT}")).unwrap();
    let plain = client.capture(NIC, "icmp[icmptype] = icmp-echoreply").unwrap();
    assert_eq!(traffic::ping(client, node.pod_address(1), 3, &[]).unwrap().received, 3);
    for frame in tunnel.wait_for(3, SOON).unwrap() {
        let seen = frames::read(&frame).unwrap();
        assert_eq!((seen.ethernet.source, seen.ethernet.destination), (own.octets, node.mac().octets));
        assert_eq!(seen.inner_ip.source, client.address(NIC).unwrap().octets());
        assert_eq!(seen.inner_ip.time_to_live, 63, "decremented once");
    }
    for frame in plain.wait_for(3, SOON).unwrap() {
        assert_eq!(frame[..6], client.mac(NIC).unwrap().octets);
        assert_eq!(frame[6..12], own.octets);
        // 64, less one for the pod's node and one for the gateway.
        assert_eq!(frame[IP + 8], 62);
    }
}
