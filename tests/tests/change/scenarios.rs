//! Single changes, one after the other; all the time what they do not concern must stay.

use std::{fs, net::Ipv4Addr};

use gateway_common::wire::Mac;
use gateway_tests::lab::{Flannel, Gateway};
use ipnet::Ipv4Net;

use crate::{
    cluster::{Cluster, Node},
    stream::Stream,
    tables::{Content, Watcher},
};

/// The lab with a gateway, and the cluster as it was at the start.
pub(crate) fn start(label: &str) -> (Gateway, Flannel, Cluster) {
    let lab = Flannel::start(label).unwrap();
    let gateway = Gateway::start(&lab).unwrap();
    gateway.wait_ready(&lab).unwrap();
    let cluster = Cluster::of(&lab);
    Content::wait(&lab, &cluster, "the cluster as it begins");
    (gateway, lab, cluster)
}

/// Traffic between the second client and the first node's first pod, both ways.
pub(crate) fn streams(lab: &Flannel) -> [Stream; 2] {
    let node = gateway_tests::lab::flannel::Node::new(1);
    let (client, pod) = (lab.client(2), lab.pod(node, 1));
    let client_address = client.address(gateway_tests::lab::flannel::NIC).unwrap();
    [Stream::start(client, pod, node.pod_address(1), 7001), Stream::start(pod, client, client_address, 7002)]
}

fn net(third: u8) -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::new(10, 244, third, 0), 24)
}

#[test]
fn tables_follow_every_change_and_nothing_else_moves() {
    let (_gateway, lab, mut cluster) = start("change");
    let watcher = Watcher::start(&lab, &cluster);
    let streams = streams(&lab);
    let wait = |cluster: &Cluster, what: &str| Content::wait(&lab, cluster, what);

    let (a, b) = (Node::paper(1), Node::paper(2));
    cluster.put_node("a", a);
    cluster.put_node("b", b);
    cluster.put_pod("p", "a", Ipv4Addr::new(10, 244, 101, 5));
    cluster.put_pod("q", "b", Ipv4Addr::new(10, 244, 102, 5));
    wait(&cluster, "two nodes and two pods come");

    cluster.put_node("a", Node { mac: Mac::new([0x0a, 0, 0, 0, 1, 1]), ..a });
    wait(&cluster, "VtepMAC changes");
    cluster.put_node("a", Node { endpoint: Ipv4Addr::new(172, 16, 2, 150), ..a });
    wait(&cluster, "public-ip changes, and the MAC address back");
    cluster.put_node("a", Node { cidr: net(110), ..a });
    wait(&cluster, "podCIDR changes, and public-ip back");
    cluster.put_node(
        "a",
        Node { endpoint: Ipv4Addr::new(172, 16, 2, 151), mac: Mac::new([10, 0, 0, 0, 1, 2]), cidr: net(111) },
    );
    wait(&cluster, "all of them change");

    cluster.remove_node("a");
    wait(&cluster, "a node goes, its pods stay behind");
    cluster.put_node("b", Node { cidr: net(111), ..b });
    wait(&cluster, "the other node gets the podCIDR that became free");
    cluster.put_node("a", Node { cidr: b.cidr, ..a });
    wait(&cluster, "the node comes back with the other's former podCIDR");
    // Two steps, and between them both nodes claim the same: whoever has it meanwhile, the end is clear.
    cluster.put_node("b", b);
    cluster.put_node("a", a);
    wait(&cluster, "both get back what they had");

    cluster.put_pod("p", "b", Ipv4Addr::new(10, 244, 101, 5));
    wait(&cluster, "a pod moves and keeps its address");
    cluster.put_pod("p", "a", Ipv4Addr::new(10, 244, 101, 9));
    wait(&cluster, "it moves back and gets another one");
    cluster.put_pod("p", "b", Ipv4Addr::new(10, 244, 102, 5));
    cluster.put_pod("q", "a", Ipv4Addr::new(10, 244, 101, 9));
    wait(&cluster, "two pods change places");

    for name in ["p", "q"] {
        cluster.remove_pod(name);
    }
    for name in ["a", "b"] {
        cluster.remove_node(name);
    }
    wait(&cluster, "everything goes");
    let looks = watcher.stop();
    let sent = streams.map(Stream::stop);
    println!("constant entries seen in {looks} looks; datagrams sent and received: {sent:?}");
    assert!(looks > 1000 && sent.iter().all(|sent| *sent > 1000));
}

/// A successor gets the address of a pod that ends; what is told first is chance.
#[test]
fn an_address_is_reused_in_any_order_of_events() {
    const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 77);
    type Step = fn(&mut Cluster, &str, &str);
    let (_gateway, lab, mut cluster) = start("reuse");
    let finish: Step = |cluster, old, _| {
        let mut object = cluster.pod_object(old, &cluster.pods[old].clone());
        object["status"]["phase"] = "Succeeded".into();
        gateway_tests::lab::manifest::write(cluster.directory(), &object).unwrap();
    };
    let terminate: Step = |cluster, old, _| {
        let mut object = cluster.pod_object(old, &cluster.pods[old].clone());
        object["metadata"]["deletionTimestamp"] = "2026-01-15T12:00:00Z".into();
        gateway_tests::lab::manifest::write(cluster.directory(), &object).unwrap();
    };
    let succeed: Step = |cluster, _, new| {
        let pod = crate::cluster::Pod { node: "node2".to_owned(), address: ADDRESS };
        let mut object = cluster.pod_object(new, &pod);
        object["metadata"]["creationTimestamp"] = "2026-01-15T12:00:01Z".into();
        gateway_tests::lab::manifest::write(cluster.directory(), &object).unwrap();
    };
    let delete: Step = |cluster, old, _| {
        fs::remove_file(cluster.directory().join(format!("pod-{old}.yaml"))).unwrap();
    };
    let orders: [&[Step]; 7] = [
        &[succeed, delete],
        &[delete, succeed],
        &[succeed, terminate],
        &[terminate, succeed],
        &[finish, succeed, delete],
        &[succeed, finish],
        &[terminate, delete, succeed],
    ];
    // Each order twice: with a pause in which the daemon sees every step, and all at once.
    for (number, order) in orders.iter().chain(&orders).enumerate() {
        let (old, new) = (format!("old{number}"), format!("new{number}"));
        cluster.put_pod(&old, "node1", ADDRESS);
        Content::wait(&lab, &cluster, "the first pod has the address");
        for step in *order {
            step(&mut cluster, &old, &new);
            if number < orders.len() {
                std::thread::sleep(std::time::Duration::from_millis(150));
            }
        }
        let before = cluster.pods.remove(&old).unwrap();
        cluster.pods.insert(new.clone(), crate::cluster::Pod { node: "node2".to_owned(), ..before });
        Content::wait(&lab, &cluster, &format!("the successor has the address, order {number}"));
        cluster.remove_pod(&new);
        // Not in every order is the old one gone by now.
        let _ = fs::remove_file(cluster.directory().join(format!("pod-{old}.yaml")));
        Content::wait(&lab, &cluster, "nobody has the address");
    }
}
