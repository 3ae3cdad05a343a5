//! Many clients, many pods, at the same time.

use std::{net::SocketAddrV4, sync::Barrier, thread};

use gateway_tests::lab::flannel::Node;

use crate::{
    rig::Rig,
    serve::{BodyServer, fetch},
};

const CLIENTS: u8 = 50;
const PODS: u8 = 20;
const PORT: u16 = 80;
const BODY: usize = 20_000;

/// 1,000 connections at once from 50 addresses to 20 pods on three nodes, bodies compared byte by byte.
#[test]
fn a_thousand_connections_at_once() {
    let mut rig = Rig::start("thousand");
    let pods: Vec<(Node, u8)> = (0..PODS).map(|index| (Node::new(index % 3 + 1), index / 3 + 1)).collect();
    for (node, number) in pods.iter().filter(|(_, number)| *number > 2) {
        rig.lab.add_pod(*node, *number).unwrap();
    }
    let addresses = rig.lab.add_guest_addresses(CLIENTS).unwrap();
    let _servers: Vec<BodyServer> =
        pods.iter().map(|(node, number)| BodyServer::start(rig.lab.pod(*node, *number), PORT)).collect();
    rig.gateway.wait_settled(rig.lab.gateway()).unwrap();
    let before = rig.counters();

    let open = Barrier::new(usize::from(CLIENTS) + 1);
    let fetched = Barrier::new(usize::from(CLIENTS) + 1);
    thread::scope(|scope| {
        for (index, address) in (0_u64..).zip(&addresses) {
            let (rig, pods, open, fetched) = (&rig, &pods, &open, &fetched);
            scope.spawn(move || {
                let connections: Vec<_> = pods
                    .iter()
                    .map(|(node, number)| {
                        let to = SocketAddrV4::new(node.pod_address(*number), PORT);
                        (node.pod(*number), rig.guest().connect(SocketAddrV4::new(*address, 0), to).unwrap())
                    })
                    .collect();
                open.wait();
                for round in 0..2 {
                    for (name, stream) in &connections {
                        fetch(stream, name, index * 1000 + round, BODY).unwrap();
                    }
                }
                fetched.wait();
            });
        }
        open.wait();
        let established = rig.sessions(&["--protocol", "tcp", "--state", "established"]);
        assert_eq!(established.len(), usize::from(CLIENTS) * usize::from(PODS));
        fetched.wait();
    });
    let opened = rig.since(&before, "snat_new");
    assert!(opened >= 1000, "{opened}");
    println!(
        "{opened} sessions opened, {} packets to pods, {} back",
        rig.since(&before, "snat_forward"),
        rig.since(&before, "snat_reply")
    );
    rig.finish();
}
