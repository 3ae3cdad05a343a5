//! Objects of the tests, in networks that no cluster uses (RFC 2544).

use std::net::Ipv4Addr;

use gateway::{
    cluster::kubernetes::Access,
    config::{Config, Overrides, Source},
};
use serde_json::{Value, json};

/// Key of the label of everything that tests make.
pub(crate) const LABEL: &str = "gateway-test";

/// A gateway of the tests' network, with another prefix of annotations, so that real nodes are none of its business.
pub(crate) const PREFIX: &str = "test.gateway.example/";

pub(crate) fn config(access: Access) -> Config {
    let text = format!(
        r#"
[source]
kind = "files"
path = "/nonexistent"

[[interface]]
name = "eth0"
roles = ["underlay", "external"]

[[overlay]]
name = "flannel"
local = "198.19.255.254"
mac = "0e:ff:00:00:00:01"
subnet = "198.18.255.0/24"
network = "198.18.0.0/16"
annotation_prefix = "{PREFIX}"
"#
    );
    let config = Config::parse(&text, "test", &Overrides::default()).unwrap();
    Config { source: Source::Kubernetes(access), ..config }
}

/// Name of a node.
pub(crate) fn node_name(run: &str, number: u8) -> String {
    format!("{run}-n{number}")
}

/// A Node as flannel annotates it.
pub(crate) fn node(run: &str, number: u8) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {
            "name": node_name(run, number),
            "annotations": {
                format!("{PREFIX}kube-subnet-manager"): "true",
                format!("{PREFIX}backend-type"): "vxlan",
                format!("{PREFIX}backend-data"): format!(r#"{{"VNI":1,"VtepMAC":"0e:ff:00:01:00:{number:02x}"}}"#),
                format!("{PREFIX}public-ip"): endpoint(number).to_string(),
            },
        },
        "spec": { "podCIDR": format!("198.18.{number}.0/24") },
    })
}

/// A node's endpoint.
pub(crate) fn endpoint(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(198, 19, 0, number)
}

/// A pod's address.
pub(crate) fn address(node: u8, pod: u8) -> Ipv4Addr {
    Ipv4Addr::new(198, 18, node, pod)
}

/// Spec of a pod on a node.
pub(crate) fn on(run: &str, node: u8) -> Value {
    json!({ "nodeName": node_name(run, node), "terminationGracePeriodSeconds": 30 })
}

/// Status of a running pod.
pub(crate) fn running(address: Ipv4Addr) -> Value {
    let address = address.to_string();
    json!({ "phase": "Running", "podIP": address, "podIPs": [{ "ip": address }] })
}
