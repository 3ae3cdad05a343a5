//! flannel's DirectRouting: nodes on the gateway's link exchange plain packets with it, without a tunnel.

use std::{fs, net::Ipv4Addr, time::Duration};

use etherparse::{Ethernet2Header, Ipv4Header, SlicedPacket};
use gateway_common::abi::{Class, Outcome};
use gateway_tests::lab::{
    Flannel, Gateway,
    flannel::{
        EXTERNAL, FLANNEL, GATEWAY_ENDPOINT, GATEWAY_SUBNET, GATEWAY_VTEP, MTU, NIC, Node, PORT, UNDERLAY,
    },
    frames::{self, Datagram},
    traffic, wait_until,
    wiring::{self, Via},
};

const SOON: Duration = Duration::from_secs(5);
/// UDP port of datagrams built by hand.
const MARK: u16 = 9999;

/// The flannel lab with DirectRouting between gateway and nodes.
fn start(label: &str) -> (Gateway, Flannel) {
    let lab = Flannel::start(label).unwrap();
    for node in lab.nodes() {
        // flanneld has either the entries of a tunnel or a plain route.
        let namespace = lab.node(node).namespace();
        let overlay = GATEWAY_SUBNET.network();
        wiring::delete_route(namespace, GATEWAY_SUBNET, Via::Onlink(FLANNEL, overlay)).unwrap();
        wiring::delete_fdb(namespace, FLANNEL, GATEWAY_VTEP, GATEWAY_ENDPOINT).unwrap();
        wiring::delete_neighbour(namespace, FLANNEL, overlay).unwrap();
        wiring::route(namespace, GATEWAY_SUBNET, Via::Router(GATEWAY_ENDPOINT)).unwrap();
    }
    let mut config = fs::read_to_string(lab.config()).unwrap();
    assert!(config.contains("[[overlay]]") && !config.contains("direct_routing"), "{config}");
    config = config.replace("[[overlay]]\n", "[[overlay]]\ndirect_routing = true\n");
    fs::write(lab.config(), config).unwrap();

    let gateway = Gateway::start(&lab).unwrap();
    gateway.wait_ready(&lab).unwrap();
    (gateway, lab)
}

#[test]
fn plain_packets_serve_every_client_and_node() {
    let (gateway, lab) = start("direct-routing");
    let before = gateway.counters(lab.gateway()).unwrap();
    traffic::exchange(&lab).unwrap();
    let after = gateway.counters(lab.gateway()).unwrap();
    for row in Outcome::TABLE {
        let packets = after[row.label] - before[row.label];
        match row.outcome {
            Outcome::RouteDirect | Outcome::DirectIn => {
                assert!(packets > 10_000, "{}: only {packets}", row.label);
            }
            Outcome::Encap | Outcome::Decap => assert_eq!(packets, 0, "{}", row.label),
            _ if row.class == Class::Drop => assert_eq!(packets, 0, "{}", row.label),
            _ => {}
        }
    }
}

/// Only the link's header, TTL and checksum change, and no byte is lost to a tunnel.
#[test]
fn nothing_but_the_link_header_is_new_on_the_wire() {
    let (_gateway, lab) = start("direct-routing-wire");
    let (client, node) = (lab.client(2), Node::new(2));
    let (client_address, pod_address) = (client.address(NIC).unwrap(), node.pod_address(1));
    let tunnel = lab.node(node).capture(NIC, &format!("udp port {PORT}")).unwrap();
    let at_node =
        lab.node(node).capture(NIC, &format!("udp port {MARK} and dst host {pod_address}")).unwrap();
    let at_client = client.capture(NIC, &format!("udp port {MARK} and src host {pod_address}")).unwrap();
    let (client_mac, underlay) = (client.mac(NIC).unwrap(), lab.gateway().mac(UNDERLAY).unwrap());
    let external = lab.gateway().mac(EXTERNAL).unwrap();
    let full = usize::try_from(MTU).unwrap() - 28;

    let there = Datagram {
        from: (client_address, 4000),
        to: (pod_address, MARK),
        ttl: 17,
        ecn: 3,
        payload: vec![0xa5; full],
    };
    let back = Datagram { from: (pod_address, 4000), to: (client_address, MARK), ..there.clone() };
    let sent = [&there, &back].map(|datagram| datagram.packet().unwrap());
    client.inject(NIC, &frames::ethernet(client_mac, external, frames::IPV4, &sent[0])).unwrap();
    lab.node(node).inject(NIC, &frames::ethernet(node.mac(), underlay, frames::IPV4, &sent[1])).unwrap();

    for (capture, packet, from, to) in
        [(&at_node, &sent[0], underlay, node.mac()), (&at_client, &sent[1], external, client_mac)]
    {
        let frames = capture.wait_for(1, SOON).unwrap();
        let (ethernet, rest) = Ethernet2Header::from_slice(&frames[0]).unwrap();
        assert_eq!((ethernet.source, ethernet.destination), (from.octets, to.octets));
        let (ip, payload) = Ipv4Header::from_slice(rest).unwrap();
        let (mut expected, expected_payload) = Ipv4Header::from_slice(packet).unwrap();
        expected.time_to_live -= 1;
        expected.header_checksum = expected.calc_header_checksum();
        assert_eq!((ip, payload), (expected, expected_payload));
        assert!(SlicedPacket::from_ethernet(&frames[0]).unwrap().vlan().is_none());
    }
    assert_eq!(tunnel.stop().unwrap(), Vec::<Vec<u8>>::new());
}

/// `show`, the kernel's routes and the tables tell the same story.
#[test]
fn tables_and_kernel_routes_say_that_nodes_are_direct() {
    let (gateway, lab) = start("direct-routing-tables");
    let host = lab.gateway();
    let vteps = gateway.json(host, &["show", "vteps"]).unwrap();
    let vteps = vteps.as_array().unwrap();
    assert_eq!(vteps.len(), lab.nodes().count());
    for vtep in vteps {
        assert_eq!(
            (vtep["state"].as_str(), vtep["mtu"].as_u64()),
            (Some("direct"), Some(MTU.into())),
            "{vtep}"
        );
    }
    let routes = host.run(&["ip", "route", "show", "dev", UNDERLAY]).unwrap();
    for node in lab.nodes() {
        let expected = format!("{} via {} ", node.subnet(), node.endpoint());
        assert!(routes.lines().any(|route| route.starts_with(&expected)), "no {expected} in\n{routes}");
        // The host's own programs reach pods that way, too.
        assert_eq!(traffic::ping(host, node.pod_address(1), 3, &[]).unwrap().received, 3, "{}", node.name());
    }
}

/// Only pods of direct nodes are taken for the fast path; whether the rest may pass is the kernel's affair, as on any router.
#[test]
fn a_plain_packet_of_no_pod_is_left_to_the_kernel() {
    let (gateway, lab) = start("direct-routing-unknown");
    let (client, node) = (lab.client(1), Node::new(1));
    let underlay = lab.gateway().mac(UNDERLAY).unwrap();
    let pod = node.pod_address(1);
    for (source, expected) in [(Ipv4Addr::new(10, 244, 9, 9), Outcome::NoRoute), (pod, Outcome::DirectIn)] {
        let datagram = Datagram {
            from: (source, 4000),
            to: (client.address(NIC).unwrap(), MARK),
            ttl: 63,
            ecn: 0,
            payload: b"to a client".to_vec(),
        };
        let label = Outcome::by_number(expected.number()).unwrap().label;
        let before = gateway.counters(lab.gateway()).unwrap()[label];
        let frame = frames::ethernet(node.mac(), underlay, frames::IPV4, &datagram.packet().unwrap());
        lab.node(node).inject(NIC, &frame).unwrap();
        wait_until(&format!("{source} is counted as {label}"), SOON, || {
            Ok((gateway.counters(lab.gateway())?[label] == before + 1).then_some(()))
        })
        .unwrap();
    }
}
