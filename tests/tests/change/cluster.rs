//! The cluster as the test means it: every change is made here and in the manifests, and the tables that should follow
//! are worked out from it without the planner.

use std::{
    collections::BTreeMap,
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
};

use gateway_common::wire::Mac;
use gateway_tests::lab::{
    Flannel,
    flannel::{Node as LabNode, VNI},
    manifest::{self, NodeFacts, PodFacts},
};
use ipnet::Ipv4Net;
use serde_json::{Value, json};

use crate::tables::Content;

/// A Node of the test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Node {
    pub(crate) endpoint: Ipv4Addr,
    pub(crate) mac: Mac,
    pub(crate) cidr: Ipv4Net,
}

/// A Pod of the test.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Pod {
    pub(crate) node: String,
    pub(crate) address: Ipv4Addr,
}

/// What the manifests say.
#[derive(Clone, Debug)]
pub(crate) struct Cluster {
    directory: PathBuf,
    pub(crate) nodes: BTreeMap<String, Node>,
    pub(crate) pods: BTreeMap<String, Pod>,
}

impl Cluster {
    /// What the lab wrote: its nodes and pods.
    pub(crate) fn of(lab: &Flannel) -> Self {
        let mut cluster = Self { directory: lab.manifests(), nodes: BTreeMap::new(), pods: BTreeMap::new() };
        for node in lab.nodes() {
            cluster.nodes.insert(node.name(), Node::of(node));
            for number in [1, 2] {
                let pod = Pod { node: node.name(), address: node.pod_address(number) };
                cluster.pods.insert(node.pod(number), pod);
            }
        }
        cluster
    }

    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    pub(crate) fn put_node(&mut self, name: &str, node: Node) {
        manifest::write(&self.directory, &node.object(name)).unwrap();
        self.nodes.insert(name.to_owned(), node);
    }

    pub(crate) fn remove_node(&mut self, name: &str) {
        manifest::remove(&self.directory, "Node", name).unwrap();
        self.nodes.remove(name).unwrap();
    }

    pub(crate) fn put_pod(&mut self, name: &str, node: &str, address: Ipv4Addr) {
        let pod = Pod { node: node.to_owned(), address };
        manifest::write(&self.directory, &self.pod_object(name, &pod)).unwrap();
        self.pods.insert(name.to_owned(), pod);
    }

    pub(crate) fn remove_pod(&mut self, name: &str) {
        manifest::remove(&self.directory, "Pod", name).unwrap();
        self.pods.remove(name);
    }

    /// Writes several objects as one file, in one step.
    pub(crate) fn write_list(&self, file: &str, objects: &[Value]) {
        let draft = self.directory.join(format!(".{file}.draft"));
        let list = json!({ "apiVersion": "v1", "kind": "List", "items": objects });
        fs::write(&draft, serde_json::to_vec(&list).unwrap()).unwrap();
        fs::rename(&draft, self.directory.join(file)).unwrap();
    }

    pub(crate) fn pod_object(&self, name: &str, pod: &Pod) -> Value {
        let host_ip = self.nodes.get(&pod.node).map_or(Ipv4Addr::UNSPECIFIED, |node| node.endpoint);
        manifest::pod(&PodFacts { name, node: &pod.node, host_ip, ip: pod.address })
    }

    /// The tables that should be. No two objects of the test claim the same.
    pub(crate) fn tables(&self) -> Content {
        let mut content = Content::default();
        for node in self.nodes.values() {
            content.prefixes.insert(node.cidr, (node.endpoint, node.mac));
            content.sources.insert(node.endpoint, node.endpoint);
        }
        for pod in self.pods.values() {
            if let Some(node) = self.nodes.get(&pod.node) {
                content.pods.insert(pod.address, (node.endpoint, node.mac));
            }
        }
        content.vteps = self.nodes.len();
        content
    }
}

impl Node {
    pub(crate) fn of(node: LabNode) -> Self {
        Self { endpoint: node.endpoint(), mac: node.vtep(), cidr: node.subnet() }
    }

    pub(crate) fn object(self, name: &str) -> Value {
        let Self { endpoint: address, mac, cidr: pod_cidr } = self;
        manifest::node(&NodeFacts { name, address, pod_cidr, vni: VNI, mac })
    }

    /// A node that exists on paper only: nobody answers at its endpoint.
    pub(crate) fn paper(number: u8) -> Self {
        Self {
            endpoint: Ipv4Addr::new(172, 16, 2, 100 + number),
            mac: Mac::new([0x0a, 0, 0, 0, 0, number]),
            cidr: Ipv4Net::new_assert(Ipv4Addr::new(10, 244, 100 + number, 0), 24),
        }
    }
}
