//! End to end: the gateway joins a flannel cluster by its API server alone. On the nodes a stand-in for flanneld programs what it
//! learns there, as flannel was seen to do.

use std::{fs, thread, time::Duration};

use gateway_tests::lab::{
    Cluster, Flannel, Gateway,
    flannel::{FLANNEL, GATEWAY, GATEWAY_ENDPOINT, GATEWAY_SUBNET, GATEWAY_VTEP, NETWORK, NIC, Node},
    stream::Stream,
    traffic::{self, WebServer},
    wait_until,
};
use ipnet::Ipv4Net;
use k8s_openapi::jiff::Timestamp;
use serde_json::json;

const SOON: Duration = Duration::from_secs(20);
const PORT: u16 = 7000;

struct Rig {
    gateway: Gateway,
    lab: Flannel,
    _state: tempfile::TempDir,
}

impl Rig {
    fn start(label: &str) -> Self {
        let rig = Self::with(label, |config| config);
        rig.gateway.wait_ready(&rig.lab).unwrap();
        rig
    }

    /// With another configuration.
    fn with(label: &str, change: impl FnOnce(String) -> String) -> Self {
        let state = tempfile::tempdir().unwrap();
        let cluster = Cluster::start(state.path()).unwrap();
        let mut lab = Flannel::start_on(&format!("joined-{label}"), cluster).unwrap();
        lab.add_outside().unwrap();
        let config = fs::read_to_string(lab.config()).unwrap();
        fs::write(lab.config(), change(config)).unwrap();
        let gateway = Gateway::start(&lab).unwrap();
        Self { gateway, lab, _state: state }
    }

    fn wait_reachable(&self) {
        for node in self.lab.nodes() {
            traffic::wait_reachable(self.lab.client(2), node.pod_address(1), true, SOON).unwrap();
        }
    }

    /// What a node has for the gateway with that subnet: route, neighbour and FDB entry.
    fn entries(&self, node: Node, subnet: Ipv4Net) -> Vec<String> {
        let show = |words: &[&str]| self.lab.node(node).run(words).unwrap();
        let text = [
            show(&["ip", "route", "show", "dev", FLANNEL]),
            show(&["ip", "neigh", "show", "dev", FLANNEL]),
            show(&["bridge", "fdb", "show", "dev", FLANNEL]),
        ]
        .concat();
        let (network, mac) = (subnet.network().to_string(), GATEWAY_VTEP.to_string());
        let ours = |line: &&str| line.contains(&network) || line.contains(&mac);
        text.lines().filter(ours).map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect()
    }

    fn wait_entries(&self, subnet: Ipv4Net, count: usize) {
        for node in self.lab.nodes() {
            wait_until("flanneld has programmed the gateway", SOON, || {
                Ok((self.entries(node, subnet).len() == count).then_some(()))
            })
            .unwrap();
        }
    }

    fn verb(&self, words: &[&str]) -> String {
        let output = self.gateway.output(self.lab.gateway(), words).unwrap();
        String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
    }
}

/// The Node that the daemon makes is all that nodes need; who deletes or spoils it does not keep them apart for long.
#[test]
fn nodes_learn_the_gateway_from_its_node() {
    let rig = Rig::start("node");
    let cluster = rig.lab.cluster();
    let (network, overlay) = (GATEWAY_SUBNET, GATEWAY_SUBNET.network());
    assert_eq!(
        rig.entries(Node::new(1), network),
        [
            format!("{network} via {overlay} onlink"),
            format!("{overlay} lladdr {GATEWAY_VTEP} PERMANENT"),
            format!("{GATEWAY_VTEP} dst {GATEWAY_ENDPOINT} self permanent"),
        ]
    );

    let first = cluster.node(GATEWAY).unwrap().unwrap();
    cluster.delete_node(GATEWAY).unwrap();
    wait_until("the Node is made again", SOON, || {
        let node = cluster.node(GATEWAY)?;
        Ok(node.filter(|node| node.metadata.uid != first.metadata.uid).map(drop))
    })
    .unwrap();
    rig.wait_reachable();

    // flannel follows the endpoint wherever it is said to be; the gateway puts it right.
    cluster
        .patch_node(
            GATEWAY,
            &json!({ "metadata": { "annotations": {
            "flannel.alpha.coreos.com/public-ip": "172.16.2.99",
        } } }),
        )
        .unwrap();
    wait_until("the Node is put right", SOON, || {
        let annotations =
            cluster.node(GATEWAY)?.and_then(|node| node.metadata.annotations).unwrap_or_default();
        let there = annotations.get("flannel.alpha.coreos.com/public-ip").map(String::as_str);
        Ok((there == Some("172.16.2.200")).then_some(()))
    })
    .unwrap();
    rig.wait_reachable();
}

/// As a kubelet would: Ready, and a lease that is renewed.
#[test]
fn the_node_stays_ready() {
    let rig = Rig::start("ready");
    let cluster = rig.lab.cluster();
    let renewed = || -> Option<Timestamp> { Some(cluster.lease(GATEWAY).unwrap()?.spec?.renew_time?.0) };
    let first = wait_until("there is a lease", SOON, || Ok(renewed())).unwrap();
    let node = cluster.node(GATEWAY).unwrap().unwrap();
    let conditions = node.status.and_then(|status| status.conditions).unwrap_or_default();
    assert!(conditions.iter().any(|c| c.type_ == "Ready" && c.status == "True"), "{conditions:?}");
    wait_until("the lease is renewed", SOON, || Ok(renewed().filter(|time| *time > first))).unwrap();
}

/// Removal is complete, and only of what is ours.
#[test]
fn the_gateway_leaves_nothing_behind() {
    let mut rig = Rig::start("leave");
    rig.gateway.stop().unwrap();
    assert!(rig.verb(&["node", "remove"]).contains("Node gateway: removed"));
    rig.wait_entries(GATEWAY_SUBNET, 0);
    let cluster = rig.lab.cluster();
    assert!(cluster.node(GATEWAY).unwrap().is_none() && cluster.lease(GATEWAY).unwrap().is_none());
    assert!(cluster.node("node1").unwrap().is_some());
    assert!(rig.verb(&["node", "remove"]).contains("nothing to do"));
    // The verb alone makes it, too.
    assert!(rig.verb(&["node", "apply"]).contains("Node gateway: made"));
    rig.wait_entries(GATEWAY_SUBNET, 3);
}

/// While the API server is away packets do not notice, `status` tells, and what happened meanwhile is made up for.
#[test]
fn while_the_api_is_away_nothing_is_lost() {
    let mut rig = Rig::start("away");
    let one = Node::new(1);
    let (client, pod) = (rig.lab.client(2), rig.lab.pod(one, 1));
    let streams = [
        Stream::start(client, pod, NIC, PORT, 2000).unwrap(),
        Stream::start(pod, client, NIC, PORT + 1, 2000).unwrap(),
    ];
    rig.lab.cluster_mut().stop().unwrap();
    let told = wait_until("status tells", SOON, || {
        let text = rig.verb(&["status"]);
        Ok(text.contains("is not connected").then_some(text))
    })
    .unwrap();
    assert!(told.contains("what is known goes on being forwarded"), "{told}");
    let age = |text: &str| -> u64 {
        let text = text.split_once("the knowledge is ").unwrap_or_else(|| panic!("no age: {text}")).1;
        text.split_once(" s old").unwrap_or_else(|| panic!("no seconds: {text}")).0.parse().unwrap()
    };
    let before = age(&told);
    thread::sleep(Duration::from_secs(5));
    let told = rig.verb(&["status"]);
    assert!(age(&told) >= before + 5, "it was {before} s old: {told}");
    // A daemon that starts without the API takes nothing away either.
    rig.gateway.stop().unwrap();
    rig.gateway.restart(rig.lab.gateway()).unwrap();
    thread::sleep(Duration::from_secs(2));
    rig.lab.cluster_mut().restart().unwrap();
    rig.lab.add_pod(one, 3).unwrap();
    traffic::wait_reachable(rig.lab.client(2), one.pod_address(3), true, SOON).unwrap();
    for stream in streams {
        let account = stream.finish().unwrap();
        println!("{account:?}");
        assert_eq!((account.lost(), account.duplicated), (0, 0), "{account:?}");
    }
    wait_until("status has nothing to say", SOON, || {
        let output = rig.gateway.output(rig.lab.gateway(), &["status"])?;
        Ok(output.status.success().then_some(()))
    })
    .unwrap();
}

/// Without `subnet` the gateway takes one that no node has, and keeps it whatever happens.
#[test]
fn the_gateway_chooses_its_own_subnet() {
    let without = |config: String| config.replace(&format!("subnet = \"{GATEWAY_SUBNET}\"\n"), "");
    let mut rig = Rig::with("choice", without);
    let last: Ipv4Net = "10.244.255.0/24".parse().unwrap();
    assert!(NETWORK.contains(&last));
    rig.wait_entries(last, 3);
    let answer = |rig: &Rig| {
        let pod = Node::new(1).pod_address(1);
        wait_until("the guest is answered", SOON, || Ok(traffic::fetch(rig.lab.guest(), pod, 80).ok()))
            .unwrap()
    };
    let server = WebServer::start(rig.lab.pod(Node::new(1), 1), 80).unwrap();
    assert!(answer(&rig).contains("you are 10.244.255.254"), "the last address of the subnet");

    // It is known without the API, and while the daemon is down.
    rig.gateway.stop().unwrap();
    rig.lab.cluster_mut().stop().unwrap();
    assert!(rig.verb(&["node", "render"]).contains("podCIDR: 10.244.255.0/24"));
    rig.gateway.restart(rig.lab.gateway()).unwrap();
    assert!(answer(&rig).contains("you are 10.244.255.254"));
    rig.lab.cluster_mut().restart().unwrap();

    // Whoever forgets what was chosen asks the Node.
    rig.gateway.stop().unwrap();
    rig.verb(&["detach"]);
    let told = rig.verb(&["show", "vteps"]);
    assert!(
        told.contains("overlay[0].subnet: is left to the gateway, which has not chosen one yet"),
        "{told}"
    );
    assert!(rig.verb(&["check"]).contains("subnet 10.244.255.0/24: the podCIDR of Node gateway"));
    rig.gateway.restart(rig.lab.gateway()).unwrap();
    assert!(answer(&rig).contains("you are 10.244.255.254"));
    drop(server);

    // Nothing is known and nobody can be asked: it says so, and does not start.
    rig.gateway.stop().unwrap();
    rig.verb(&["detach"]);
    rig.lab.cluster_mut().stop().unwrap();
    let told = rig.verb(&["run"]);
    assert!(told.contains("has not chosen one yet, and the connection to https://127.0.0.1"), "{told}");
}
