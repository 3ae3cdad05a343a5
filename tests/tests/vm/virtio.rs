//! One of the gateway's interfaces is virtio, the other one end of a veth pair: what it forwards is redirected from one
//! driver to the other.

use std::{path::Path, thread, time::Duration};

use gateway_common::abi::Outcome;
use gateway_tests::lab::{
    Flannel,
    flannel::{EXTERNAL, GATEWAY_ENDPOINT, GATEWAY_ROUTER, LAN, NIC, Node, UNDERLAY, UNDERLAY_SWITCH},
    gateway::{attached, attached_program},
    stream::Stream,
    traffic, wiring,
};
use ipnet::Ipv4Net;
use serde_json::Value;

use crate::{
    cable,
    rig::{Rig, converse},
};

/// Datagrams per second and direction. Emulation carries several times as many.
const RATE: u32 = 500;
const PAUSE: Duration = Duration::from_millis(300);

/// The lab with the cable at the gateway's interface.
pub(crate) fn lab(label: &str, interface: &str) -> Flannel {
    let lab = Flannel::start(label).unwrap();
    let (switch, address) = match interface {
        UNDERLAY => (UNDERLAY_SWITCH, GATEWAY_ENDPOINT),
        _ => (LAN, GATEWAY_ROUTER),
    };
    cable::replace(lab.gateway(), interface, lab.host(switch).unwrap()).unwrap();
    wiring::address(lab.gateway().namespace(), interface, Ipv4Net::new(address, 24).unwrap()).unwrap();
    let shown = lab.gateway().run(&["ethtool", "-i", interface]).unwrap();
    assert!(shown.contains("driver: virtio_net"), "{shown}");
    lab
}

#[test]
fn towards_the_nodes() {
    let rig = Rig::start(lab("virtio-underlay", UNDERLAY));
    let output = rig.gateway.output(rig.lab.gateway(), &["check", "--json"]).unwrap();
    let findings: Value = serde_json::from_slice(&output.stdout).unwrap();
    let finding = |subject: &str| {
        let mut findings = findings.as_array().unwrap().iter();
        findings.find(|finding| finding["subject"] == subject).unwrap()
    };
    assert_eq!(finding("kernel")["level"], "ok", "{findings:#}");
    assert!(
        finding(&format!("interface {UNDERLAY}"))["what"].as_str().unwrap().contains("virtio_net"),
        "{findings:#}"
    );
    rig.assert_native(&[EXTERNAL, UNDERLAY]);
    rig.exchange();
}

#[test]
fn towards_the_clients() {
    let rig = Rig::start(lab("virtio-external", EXTERNAL));
    rig.assert_native(&[EXTERNAL, UNDERLAY]);
    rig.exchange();
}

#[test]
fn clients_from_outside_are_translated() {
    let mut lab = lab("virtio-snat", UNDERLAY);
    lab.add_outside().unwrap();
    let rig = Rig::start(lab);
    let before = rig.counters();
    for client in [rig.lab.guest(), rig.lab.remote()] {
        for node in rig.lab.nodes() {
            converse(client, rig.lab.pod(node, 1), node.pod_address(1));
        }
    }
    let (new, there, back) = (
        rig.since(&before, Outcome::SnatNew),
        rig.since(&before, Outcome::SnatForward),
        rig.since(&before, Outcome::SnatReply),
    );
    println!("{new} sessions, {there} packets to pods, {back} from pods");
    // An echo and a TCP session for each of two clients and three nodes.
    assert!(new >= 12 && there > 500 && back > 500, "{new} {there} {back}");
    rig.assert_nothing_dropped(&before);
}

#[test]
fn the_daemon_comes_and_goes() {
    let mut rig = Rig::start(lab("virtio-restart", UNDERLAY));
    let host = rig.lab.gateway();
    let (client, pod) = (rig.lab.client(1), rig.lab.pod(Node::new(1), 1));
    let streams = [(client, pod, 7000), (pod, client, 7001)]
        .map(|(from, to, port)| Stream::start(from, to, NIC, port, RATE).unwrap());
    for kill in [true, false] {
        let before = attached_program(host, UNDERLAY).unwrap();
        if kill {
            rig.gateway.kill().unwrap();
        } else {
            assert!(rig.gateway.stop().unwrap().success());
        }
        thread::sleep(PAUSE);
        rig.gateway.restart(host).unwrap();
        rig.gateway.wait_settled(host).unwrap();
        assert_ne!(attached_program(host, UNDERLAY).unwrap(), before, "the program was swapped");
        thread::sleep(PAUSE);
    }
    for stream in streams {
        let account = stream.finish().unwrap();
        println!("{account:?}");
        assert!(account.sent > 500 && account.lost() == 0 && account.duplicated == 0, "{account:?}");
    }

    rig.gateway.stop().unwrap();
    rig.gateway.text(host, &["detach"]).unwrap();
    for interface in [EXTERNAL, UNDERLAY] {
        assert!(!attached(host, interface).unwrap(), "{interface}");
    }
    assert!(!Path::new("/sys/fs/bpf/gateway").join(rig.lab.instance()).exists());
    let links = host.run(&["ip", "-brief", "link"]).unwrap();
    assert!(!links.contains("gw-flannel"), "{links}");
    assert!(!traffic::reaches(client, Node::new(1).pod_address(1)).unwrap());
}
