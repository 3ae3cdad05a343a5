//! Kubernetes manifests and the gateway's configuration, as they describe the lab.

use std::{fs, net::Ipv4Addr, path::Path};

use anyhow::{Context, Result};
use gateway_common::wire::Mac;
use ipnet::Ipv4Net;
use serde_json::{Value, json};

/// What a Node object of a flannel cluster says.
#[derive(Clone, Debug)]
pub struct NodeFacts<'a> {
    /// Name.
    pub name: &'a str,
    /// The node's address in the underlay.
    pub address: Ipv4Addr,
    /// Its pods' network.
    pub pod_cidr: Ipv4Net,
    /// VXLAN network identifier.
    pub vni: u32,
    /// MAC address of its VTEP.
    pub mac: Mac,
}

/// What a Pod object of a running pod says.
#[derive(Clone, Debug)]
pub struct PodFacts<'a> {
    /// Name.
    pub name: &'a str,
    /// Node that runs it.
    pub node: &'a str,
    /// The node's address.
    pub host_ip: Ipv4Addr,
    /// Its address.
    pub ip: Ipv4Addr,
}

/// A Node as `kubectl get node -o yaml` prints it after flanneld has written its annotations.
pub fn node(facts: &NodeFacts<'_>) -> Value {
    let cidr = facts.pod_cidr.to_string();
    let backend = json!({ "VNI": facts.vni, "VtepMAC": facts.mac.to_string() }).to_string();
    json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": facts.name,
            "creationTimestamp": "2026-01-15T10:00:00Z",
            "uid": uid(0, facts.address),
            "resourceVersion": "1207",
            "labels": { "kubernetes.io/arch": "amd64", "kubernetes.io/hostname": facts.name, "kubernetes.io/os": "linux" },
            "annotations": {
                "flannel.alpha.coreos.com/backend-data": backend,
                "flannel.alpha.coreos.com/backend-type": "vxlan",
                "flannel.alpha.coreos.com/kube-subnet-manager": "true",
                "flannel.alpha.coreos.com/public-ip": facts.address.to_string(),
                "node.alpha.kubernetes.io/ttl": "0",
            },
        },
        "spec": { "podCIDR": cidr, "podCIDRs": [cidr] },
        "status": {
            "addresses": [
                { "type": "InternalIP", "address": facts.address.to_string() },
                { "type": "Hostname", "address": facts.name },
            ],
            "conditions": [
                {
                    "type": "NetworkUnavailable", "status": "False", "reason": "FlannelIsUp",
                    "message": "Flannel is running on this node",
                    "lastHeartbeatTime": "2026-01-15T10:00:20Z", "lastTransitionTime": "2026-01-15T10:00:20Z",
                },
                {
                    "type": "Ready", "status": "True", "reason": "KubeletReady",
                    "message": "kubelet is posting ready status",
                    "lastHeartbeatTime": "2026-01-15T10:05:00Z", "lastTransitionTime": "2026-01-15T10:00:30Z",
                },
            ],
        },
    })
}

/// A running Pod as `kubectl get pod -o yaml` prints it.
pub fn pod(facts: &PodFacts<'_>) -> Value {
    let ip = facts.ip.to_string();
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": facts.name,
            "namespace": "default",
            "creationTimestamp": "2026-01-15T11:00:00Z",
            "uid": uid(1, facts.ip),
            "resourceVersion": "1311",
        },
        "spec": {
            "nodeName": facts.node,
            "restartPolicy": "Always",
            "containers": [{ "name": "main", "image": "registry.example/web:1" }],
        },
        "status": {
            "phase": "Running",
            "hostIP": facts.host_ip.to_string(),
            "hostIPs": [{ "ip": facts.host_ip.to_string() }],
            "podIP": ip,
            "podIPs": [{ "ip": ip }],
            "startTime": "2026-01-15T11:00:00Z",
        },
    })
}

/// Writes an object as YAML, in one step: readers see the old file or the new one.
pub fn write(directory: &Path, object: &Value) -> Result<()> {
    let name = file_name(
        object["kind"].as_str().unwrap_or("object"),
        object["metadata"]["name"].as_str().unwrap_or(""),
    );
    let path = directory.join(&name);
    let draft = directory.join(format!(".{name}.draft"));
    let text = serde_saphyr::to_string(object).with_context(|| format!("cannot write {name} as YAML"))?;
    fs::write(&draft, text).with_context(|| format!("cannot write {}", draft.display()))?;
    fs::rename(&draft, &path).with_context(|| format!("cannot rename to {}", path.display()))
}

/// Removes the file of an object.
pub fn remove(directory: &Path, kind: &str, name: &str) -> Result<()> {
    let path = directory.join(file_name(kind, name));
    fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))
}

fn file_name(kind: &str, name: &str) -> String {
    format!("{}-{name}.yaml", kind.to_lowercase())
}

/// A unique id that depends on the address only, so that manifests are the same in every run.
fn uid(kind: u8, address: Ipv4Addr) -> String {
    format!("00000000-0000-4000-8000-{kind:04x}{:08x}", address.to_bits())
}
