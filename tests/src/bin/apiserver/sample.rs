//! A cluster of any size, with objects like those of real ones.

use std::net::Ipv4Addr;

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use crate::{
    resource::{Key, Resource},
    store::Store,
};

/// The most nodes: each has a /24 of 10.0.0.0/8 and an address of 172.16.0.0/12.
const MOST_NODES: u32 = 60_000;
/// The most pods of a node: a /24 holds no more.
const MOST_PODS: u32 = 250;

/// Fills a store.
pub(crate) fn fill(store: &mut Store, nodes: u32, pods: u32) -> Result<()> {
    ensure!(nodes <= MOST_NODES, "at most {MOST_NODES} nodes");
    ensure!(pods <= nodes * MOST_PODS, "at most {MOST_PODS} pods on a node");
    for number in 0..nodes {
        store.put(Resource::Node, Key::new("", &node_name(number)), node(number));
    }
    for number in 0..pods {
        let pod = pod(number % nodes, number / nodes, number);
        let metadata = &pod["metadata"];
        let key = Key::new(
            metadata["namespace"].as_str().unwrap_or_default(),
            metadata["name"].as_str().unwrap_or_default(),
        );
        store.put(Resource::Pod, key, pod);
    }
    // Nobody has seen how it came about.
    store.compact();
    Ok(())
}

fn node_name(number: u32) -> String {
    format!("node-{number:05}")
}

fn node(number: u32) -> Value {
    let name = node_name(number);
    let cidr = format!("{}/24", Ipv4Addr::from_bits(0x0a00_0000 | (number << 8)));
    let address = Ipv4Addr::from_bits(0xac10_0001 + number).to_string();
    let [_, _, high, low] = number.to_be_bytes();
    let backend = format!(r#"{{"VNI":1,"VtepMAC":"0e:00:00:01:{high:02x}:{low:02x}"}}"#);
    let condition = |kind: &str, status: &str, reason: &str, message: &str| {
        json!({
            "type": kind, "status": status, "reason": reason, "message": message,
            "lastHeartbeatTime": "2026-01-15T10:05:00Z", "lastTransitionTime": "2026-01-15T10:00:30Z",
        })
    };
    let images: Vec<Value> = (0..10)
        .map(|image| {
            json!({
                "names": [
                    format!("registry.example/team/service-{image}@sha256:{:064x}", u64::from(number) * 31 + image),
                    format!("registry.example/team/service-{image}:1.{image}.0"),
                ],
                "sizeBytes": 100_000_000 + image * 4096,
            })
        })
        .collect();
    let resources = json!({
        "cpu": "16", "ephemeral-storage": "205374420Ki", "hugepages-1Gi": "0", "hugepages-2Mi": "0",
        "memory": "65803308Ki", "pods": "110",
    });
    json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": name,
            "uid": format!("00000000-0000-4000-8000-0000{number:08x}"),
            "creationTimestamp": "2026-01-15T10:00:00Z",
            "labels": {
                "beta.kubernetes.io/arch": "amd64", "beta.kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64",
                "kubernetes.io/hostname": name, "kubernetes.io/os": "linux",
                "topology.kubernetes.io/zone": format!("zone-{}", number % 3),
            },
            "annotations": {
                "flannel.alpha.coreos.com/backend-data": backend,
                "flannel.alpha.coreos.com/backend-type": "vxlan",
                "flannel.alpha.coreos.com/kube-subnet-manager": "true",
                "flannel.alpha.coreos.com/public-ip": address,
                "node.alpha.kubernetes.io/ttl": "0",
                "volumes.kubernetes.io/controller-managed-attach-detach": "true",
            },
        },
        "spec": { "podCIDR": cidr, "podCIDRs": [cidr] },
        "status": {
            "addresses": [{ "type": "InternalIP", "address": address }, { "type": "Hostname", "address": name }],
            "allocatable": resources,
            "capacity": resources,
            "conditions": [
                condition("NetworkUnavailable", "False", "FlannelIsUp", "Flannel is running on this node"),
                condition("MemoryPressure", "False", "KubeletHasSufficientMemory", "kubelet has sufficient memory available"),
                condition("DiskPressure", "False", "KubeletHasNoDiskPressure", "kubelet has no disk pressure"),
                condition("PIDPressure", "False", "KubeletHasSufficientPID", "kubelet has sufficient PID available"),
                condition("Ready", "True", "KubeletReady", "kubelet is posting ready status"),
            ],
            "daemonEndpoints": { "kubeletEndpoint": { "Port": 10250 } },
            "images": images,
            "nodeInfo": {
                "architecture": "amd64", "bootID": "0d8e4bfa-4d6d-4a0b-9b6a-1a43a9ef52a1",
                "containerRuntimeVersion": "containerd://2.1.4", "kernelVersion": "6.12.48", "kubeletVersion": "v1.36.0",
                "machineID": "5f2cf4f1c3fb4f0f9a5f5c52e8f3a001", "operatingSystem": "linux", "osImage": "Debian GNU/Linux 13",
                "systemUUID": "4c4c4544-0033-3510-8050-b7c04f563532",
            },
        },
    })
}

fn pod(node: u32, index: u32, number: u32) -> Value {
    let ip = Ipv4Addr::from_bits(0x0a00_0000 | (node << 8) | (2 + index)).to_string();
    let host = Ipv4Addr::from_bits(0xac10_0001 + node).to_string();
    let application = format!("service-{:03}", number % 500);
    let name = format!("{application}-{:08x}-{number:05x}", number / 500 * 7919);
    let condition = |kind: &str| {
        json!({
            "type": kind, "status": "True", "observedGeneration": 1,
            "lastProbeTime": null, "lastTransitionTime": "2026-01-15T11:00:05Z",
        })
    };
    let container = |container: &str, port: u32| {
        json!({
            "name": container,
            "image": format!("registry.example/team/{application}/{container}:1.14.2"),
            "imagePullPolicy": "IfNotPresent",
            "ports": [{ "containerPort": port, "name": "http", "protocol": "TCP" }],
            "env": [
                { "name": "POD_NAME", "valueFrom": { "fieldRef": { "apiVersion": "v1", "fieldPath": "metadata.name" } } },
                { "name": "DATABASE_URL", "valueFrom": { "secretKeyRef": { "key": "url", "name": "database" } } },
                { "name": "LOG_LEVEL", "value": "info" },
            ],
            "resources": { "limits": { "cpu": "1", "memory": "512Mi" }, "requests": { "cpu": "100m", "memory": "256Mi" } },
            "livenessProbe": {
                "failureThreshold": 3, "httpGet": { "path": "/healthz", "port": "http", "scheme": "HTTP" },
                "periodSeconds": 10, "successThreshold": 1, "timeoutSeconds": 1,
            },
            "terminationMessagePath": "/dev/termination-log", "terminationMessagePolicy": "File",
            "volumeMounts": [
                { "mountPath": "/etc/config", "name": "config", "readOnly": true },
                { "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount", "name": "kube-api-access-x7k2p", "readOnly": true },
            ],
        })
    };
    let state = |container: &str| {
        json!({
            "containerID": format!("containerd://{:064x}", u64::from(number) * 2_654_435_761),
            "image": format!("registry.example/team/{application}/{container}:1.14.2"),
            "imageID": format!("registry.example/team/{application}/{container}@sha256:{:064x}", u64::from(number) % 500),
            "lastState": {}, "name": container, "ready": true, "restartCount": 0, "started": true,
            "state": { "running": { "startedAt": "2026-01-15T11:00:04Z" } },
        })
    };
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "generateName": format!("{application}-"),
            "namespace": format!("team-{:02}", number % 50),
            "uid": format!("00000000-0000-4000-9000-0000{number:08x}"),
            "creationTimestamp": "2026-01-15T11:00:00Z",
            "labels": { "app": application, "pod-template-hash": "7d4b9c6f5b", "tier": "backend" },
            "ownerReferences": [{
                "apiVersion": "apps/v1", "blockOwnerDeletion": true, "controller": true, "kind": "ReplicaSet",
                "name": format!("{application}-7d4b9c6f5b"), "uid": "3f2a9c1e-1111-4222-8333-444455556666",
            }],
        },
        "spec": {
            "containers": [container("main", 8080), container("proxy", 15001)],
            "dnsPolicy": "ClusterFirst", "enableServiceLinks": true, "nodeName": node_name(node),
            "preemptionPolicy": "PreemptLowerPriority", "priority": 0, "restartPolicy": "Always",
            "schedulerName": "default-scheduler", "securityContext": {}, "serviceAccount": "default",
            "serviceAccountName": "default", "terminationGracePeriodSeconds": 30,
            "tolerations": [
                { "effect": "NoExecute", "key": "node.kubernetes.io/not-ready", "operator": "Exists", "tolerationSeconds": 300 },
                { "effect": "NoExecute", "key": "node.kubernetes.io/unreachable", "operator": "Exists", "tolerationSeconds": 300 },
            ],
            "volumes": [
                { "configMap": { "defaultMode": 420, "name": application }, "name": "config" },
                { "name": "kube-api-access-x7k2p", "projected": { "defaultMode": 420, "sources": [
                    { "serviceAccountToken": { "expirationSeconds": 3607, "path": "token" } },
                    { "configMap": { "items": [{ "key": "ca.crt", "path": "ca.crt" }], "name": "kube-root-ca.crt" } },
                ] } },
            ],
        },
        "status": {
            "conditions": [
                condition("PodReadyToStartContainers"), condition("Initialized"), condition("Ready"),
                condition("ContainersReady"), condition("PodScheduled"),
            ],
            "containerStatuses": [state("main"), state("proxy")],
            "hostIP": host, "hostIPs": [{ "ip": host }], "phase": "Running", "podIP": ip, "podIPs": [{ "ip": ip }],
            "qosClass": "Burstable", "startTime": "2026-01-15T11:00:00Z",
        },
    })
}
