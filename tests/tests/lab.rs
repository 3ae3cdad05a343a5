//! The lab by itself, without the gateway: what it plays, it must play truly. A kernel VXLAN device, set up by hand on the
//! gateway host, takes the gateway's part.

use std::{net::Ipv4Addr, time::Duration};

use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use gateway_tests::lab::{
    Flannel, Host,
    flannel::{
        EXTERNAL, FLANNEL, GATEWAY_ENDPOINT, GATEWAY_ROUTER, GATEWAY_SUBNET, GATEWAY_VTEP, INNER_MTU, NIC,
        Node, PORT, UNDERLAY, VNI,
    },
    netns, registry, traffic,
    wiring::{self, Via, Vxlan},
};
use ipnet::Ipv4Net;
use rstest::rstest;

const DEVICE: &str = "by-hand";

/// Gives the gateway host a VTEP as flanneld would.
fn vtep_by_hand(lab: &Flannel) {
    let gateway = lab.gateway().namespace();
    let device = Vxlan {
        name: DEVICE,
        vni: VNI,
        port: PORT,
        underlay: UNDERLAY,
        local: GATEWAY_ENDPOINT,
        mac: GATEWAY_VTEP,
        mtu: INNER_MTU,
    };
    wiring::vxlan(gateway, device).unwrap();
    wiring::address(gateway, DEVICE, Ipv4Net::new(GATEWAY_SUBNET.network(), 32).unwrap()).unwrap();
    for node in lab.nodes() {
        let overlay = node.subnet().network();
        wiring::neighbour(gateway, DEVICE, overlay, node.vtep()).unwrap();
        wiring::fdb(gateway, DEVICE, node.vtep(), node.endpoint()).unwrap();
        wiring::route(gateway, node.subnet(), Via::Onlink(DEVICE, overlay)).unwrap();
    }
    // For the client that asks for pods by ARP.
    wiring::sysctl(gateway, "ipv4/conf/ext0/proxy_arp", "1").unwrap();
}

fn assert_answered(from: &Host, to: Ipv4Addr) {
    let pings = traffic::ping(from, to, 3, &[]).unwrap();
    assert_eq!(pings.received, 3, "{} to {to}: {pings:?}", from.name());
}

#[test]
fn pods_reach_one_another_through_the_nodes_own_vxlan() {
    let lab = Flannel::start("pods-reach-pods").unwrap();
    for from in lab.nodes() {
        for to in lab.nodes() {
            assert_answered(lab.pod(from, 1), to.pod_address(2));
        }
    }
    // Nothing answers for the gateway while it does not run.
    assert!(!traffic::reaches(lab.client(1), Node::new(1).pod_address(1)).unwrap());
    assert!(!traffic::reaches(lab.client(2), Node::new(1).pod_address(1)).unwrap());
}

#[test]
fn a_kernel_vtep_in_the_gateways_place_reaches_pods_and_is_reached() {
    let lab = Flannel::start("kernel-vtep").unwrap();
    vtep_by_hand(&lab);
    let node = Node::new(2);
    for number in [1, 2] {
        let client = lab.client(number);
        assert_answered(client, node.pod_address(1));
        assert_answered(lab.pod(node, 1), client.address(NIC).unwrap());
        // The largest packet that fits: 20 bytes of IPv4 and 8 of ICMP.
        let size = (INNER_MTU - 28).to_string();
        let pings = traffic::ping(client, node.pod_address(1), 3, &["-M", "do", "-s", &size]).unwrap();
        assert_eq!(pings.received, 3);
    }
    let (client, pod) = (lab.client(1), lab.pod(node, 2));
    let tcp = traffic::iperf(client, pod, node.pod_address(2), traffic::Transport::Tcp, &[]).unwrap();
    assert!(tcp.bits > 1e6, "{tcp:?}");
    let udp = traffic::Transport::Udp { megabits: 20 };
    let udp = traffic::iperf(pod, client, client.address(NIC).unwrap(), udp, &[]).unwrap();
    assert!(udp.lost.is_some_and(|lost| lost < 5.0), "{udp:?}");
    let _server = traffic::WebServer::start(pod, 8080).unwrap();
    let body = traffic::fetch(client, node.pod_address(2), 8080).unwrap();
    assert_eq!(body, "hello from pod2-2, you are 10.244.30.10\n");
}

#[test]
fn nodes_have_what_flanneld_programs() {
    let lab = Flannel::start("flannel-entries").unwrap();
    let host = lab.node(Node::new(1));
    let routes = host.run(&["ip", "route"]).unwrap();
    assert!(routes.contains("10.244.30.0/24 via 10.244.30.0 dev flannel.1 onlink"), "{routes}");
    assert!(routes.contains("10.244.3.0/24 via 10.244.3.0 dev flannel.1 onlink"), "{routes}");
    let neighbours = host.run(&["ip", "neigh", "show", "dev", FLANNEL]).unwrap();
    assert!(neighbours.contains("10.244.30.0 lladdr 0e:11:22:33:44:55 PERMANENT"), "{neighbours}");
    let fdb = host.run(&["bridge", "fdb", "show", "dev", FLANNEL]).unwrap();
    assert!(fdb.contains("0e:11:22:33:44:55 dst 172.16.2.200 self permanent"), "{fdb}");
    let device = host.run(&["ip", "-details", "link", "show", "dev", FLANNEL]).unwrap();
    for word in [
        "mtu 1450",
        "vxlan id 1 local 172.16.2.11 dev eth0",
        "dstport 8472",
        "nolearning",
        "76:5d:ef:00:00:01",
    ] {
        assert!(device.contains(word), "no {word:?} in {device}");
    }
}

#[test]
fn nodes_and_pods_come_and_go() {
    let mut lab = Flannel::start("come-and-go").unwrap();
    let (one, four) = (Node::new(1), Node::new(4));
    lab.add_node(four).unwrap();
    assert_answered(lab.pod(one, 1), four.pod_address(1));
    lab.add_pod(four, 3).unwrap();
    assert_answered(lab.pod(one, 1), four.pod_address(3));
    let manifest = lab.manifests().join("pod-pod4-3.yaml");
    assert!(std::fs::read_to_string(&manifest).unwrap().contains("10.244.4.4"));
    lab.remove_pod(four, 3).unwrap();
    assert!(!manifest.exists());
    assert!(!traffic::reaches(lab.pod(one, 1), four.pod_address(3)).unwrap());

    lab.remove_node(four).unwrap();
    let routes = lab.node(one).run(&["ip", "route"]).unwrap();
    assert!(!routes.contains("10.244.4.0/24"), "{routes}");
    assert!(!lab.manifests().join("node-node4.yaml").exists());
    lab.add_node(four).unwrap();
    assert_answered(lab.pod(one, 1), four.pod_address(1));
}

#[test]
fn captures_see_the_tunnel_and_injected_frames_arrive() {
    let lab = Flannel::start("capture").unwrap();
    let (one, two) = (Node::new(1), Node::new(2));
    let capture = lab.node(two).capture(NIC, "udp port 8472").unwrap();
    assert_answered(lab.pod(one, 1), two.pod_address(1));
    let frames = capture.wait_for(6, Duration::from_secs(3)).unwrap();
    let outer = SlicedPacket::from_ethernet(&frames[0]).unwrap();
    let Some(NetSlice::Ipv4(ip)) = outer.net else { panic!("{outer:?}") };
    assert_eq!(ip.header().source_addr(), one.endpoint());
    let Some(TransportSlice::Udp(udp)) = outer.transport else { panic!("no UDP") };
    assert_eq!(udp.payload()[..8], [8, 0, 0, 0, 0, 0, 1, 0]);

    // The same frame once more, by hand: the node decapsulates it and the pod answers it.
    let answers = lab.pod(two, 1).capture(NIC, "icmp[icmptype] == icmp-echoreply").unwrap();
    lab.node(one).inject(NIC, &frames[0]).unwrap();
    answers.wait_for(1, Duration::from_secs(3)).unwrap();
}

#[test]
fn hosts_tell_their_addresses() {
    let lab = Flannel::start("addresses").unwrap();
    let gateway = lab.gateway();
    assert_eq!(gateway.address(EXTERNAL).unwrap(), GATEWAY_ROUTER);
    assert_eq!(gateway.mac(UNDERLAY).unwrap().to_string(), "52:54:00:00:02:c8");
    let error = lab.host("client9").unwrap_err().to_string();
    assert!(error.contains("client9") && error.contains("client2"), "{error}");
    let before = lab.client(1).statistic(NIC, "tx_packets").unwrap();
    traffic::reaches(lab.client(1), GATEWAY_ROUTER).unwrap();
    assert!(lab.client(1).statistic(NIC, "tx_packets").unwrap() > before);
}

#[test]
fn a_dropped_lab_leaves_nothing() {
    let lab = Flannel::start("dropped").unwrap();
    let prefix = registry::namespace_of(lab.id(), "");
    let mut sleeper = lab.client(1).spawn(&["sleep", "1000"]).unwrap();
    assert!(netns::list(&prefix).unwrap().len() > 10);
    drop(lab);
    assert_eq!(netns::list(&prefix).unwrap(), Vec::<String>::new());
    assert!(sleeper.ended().unwrap().is_some(), "a process outlives its host");
}

/// The lab of another process ends with that process: by a signal at once, after a crash at the next start.
#[rstest]
#[case::interrupted("INT")]
#[case::terminated("TERM")]
#[case::crashed("KILL")]
fn a_lab_ends_with_its_owner(#[case] signal: &str) {
    let lab = Flannel::start(&format!("owner-{signal}")).unwrap();
    // Runs on a client only so that it is ended in any case.
    let mut owner = lab.client(1).spawn(&[env!("CARGO_BIN_EXE_lab"), "hold"]).unwrap();
    let prefix = registry::namespace_of(&format!("{}-0", owner.id()), "");
    gateway_tests::lab::wait_until("the other lab stands", Duration::from_secs(20), || {
        Ok(owner.output()?.contains("standing").then_some(()))
    })
    .unwrap();
    assert!(netns::list(&prefix).unwrap().len() > 10);
    lab.client(1).run(&["kill", "-s", signal, &owner.id().to_string()]).unwrap();
    owner.wait(Duration::from_secs(10)).unwrap();
    if signal == "KILL" {
        assert!(netns::list(&prefix).unwrap().len() > 10, "who removed it?");
        drop(Flannel::start("after-crash").unwrap());
    }
    assert_eq!(netns::list(&prefix).unwrap(), Vec::<String>::new());
}
