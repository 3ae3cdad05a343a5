//! The kernel's packet generator against the gateway on virtio: whatever it sends arrives.

use std::{collections::BTreeMap, net::Ipv4Addr, time::Duration};

use gateway_common::abi::Outcome;
use gateway_tests::{
    lab::{
        Host,
        flannel::{FLANNEL, GATEWAY_VTEP, NIC, Node, UNDERLAY},
        wait_until,
    },
    pktgen::Load,
};

use crate::{rig::Rig, virtio::lab};

/// Frames a second. The emulator may have to wait for a CPU for tenths of a second, and meanwhile no queue may overflow.
const RATE: u64 = 500;
const COUNT: u64 = 2000;
/// Nobody answers this port, and nobody complains about it either: a socket is there that nobody reads.
const DISCARD: u16 = 9;
const SOON: Duration = Duration::from_secs(10);

#[test]
fn nothing_is_lost_on_the_way_to_a_pod() {
    let rig = Rig::start(lab("virtio-load-in", UNDERLAY));
    let (client, node) = (rig.lab.client(1), Node::new(1));
    let pod = rig.lab.pod(node, 1);
    let load = Load {
        interface: NIC.to_owned(),
        to: rig.lab.gateway().mac("ext0").unwrap(),
        source: client.address(NIC).unwrap(),
        destinations: node.pod_address(1)..=node.pod_address(1),
        ..plain()
    };
    send(&rig, client, &load, Outcome::Encap, (rig.lab.node(node), FLANNEL), pod);
}

#[test]
fn nothing_is_lost_on_the_way_to_a_client() {
    let rig = Rig::start(lab("virtio-load-out", UNDERLAY));
    let (client, node) = (rig.lab.client(1), Node::new(1));
    let address = client.address(NIC).unwrap();
    let load = Load {
        interface: FLANNEL.to_owned(),
        to: GATEWAY_VTEP,
        source: node.pod_address(1),
        destinations: address..=address,
        ..plain()
    };
    send(&rig, rig.lab.node(node), &load, Outcome::Decap, (client, NIC), client);
}

fn plain() -> Load {
    Load {
        interface: String::new(),
        to: GATEWAY_VTEP,
        source: Ipv4Addr::UNSPECIFIED,
        destinations: Ipv4Addr::UNSPECIFIED..=Ipv4Addr::UNSPECIFIED,
        source_ports: 10_000..=10_999,
        port: DISCARD,
        size: 60,
        count: COUNT,
        rate: Some(RATE),
        burst: 1,
        cpus: vec![0],
    }
}

/// Sends a load, and compares what was sent with what the gateway and the sink have counted.
fn send(
    rig: &Rig,
    from: &Host,
    load: &Load,
    outcome: Outcome,
    (sink, interface): (&Host, &str),
    last: &Host,
) {
    let _socket = last.udp(Ipv4Addr::UNSPECIFIED, DISCARD).unwrap();
    let received = || sink.statistic(interface, "rx_packets").unwrap();
    let (counters, before) = (rig.counters(), received());
    let sent = from.namespace().enter(|| load.send()).unwrap();
    println!("{sent:?}");
    assert_eq!(sent.iter().map(|sent| sent.frames).sum::<u64>(), COUNT);
    // It is about what is missing, so a wait that is in vain is not the end.
    let _ = wait_until("all of it arrives", SOON, || Ok((received() - before >= COUNT).then_some(())));
    let grown: BTreeMap<String, u64> = rig
        .counters()
        .into_iter()
        .map(|(label, packets)| (label.clone(), packets - counters[&label]))
        .filter(|(_, packets)| *packets > 0)
        .collect();
    println!("{} arrived; {grown:?}", received() - before);
    assert!(received() - before >= COUNT, "{} arrived; {grown:?}", received() - before);
    assert_eq!(rig.since(&counters, outcome), COUNT);
    rig.assert_nothing_dropped(&counters);
}
