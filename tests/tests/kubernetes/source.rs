//! What becomes of Nodes and Pods, on any API server.

use gateway::plan::VtepKey;
use serde_json::json;

use crate::{
    objects::{address, endpoint, node, node_name, on, running},
    observer::Observer,
    subject::Subject,
};

fn leads(observer: &Observer, subject: &Subject, (node, pod): (u8, u8), to: Option<u8>) -> bool {
    let to = to.map(|to| VtepKey { overlay: 0, node: node_name(&subject.run, to).into() });
    observer.table().pods.get(&(0, address(node, pod))) == to.as_ref()
}

#[test]
fn nodes_and_pods_become_tables_and_are_followed() {
    let subject = Subject::start();
    subject.create_node(&node(&subject.run, 1));
    subject.create_pod("a", &on(&subject.run, 1), &running(address(1, 2)));
    let observer = Observer::start(&subject);
    observer.converge(&subject);
    assert!(leads(&observer, &subject, (1, 2), Some(1)));

    subject.create_node(&node(&subject.run, 2));
    subject.create_pod("b", &on(&subject.run, 2), &running(address(2, 2)));
    observer.converge(&subject);
    assert!(leads(&observer, &subject, (2, 2), Some(2)));
    assert_eq!(observer.table().vteps.len(), 2);

    // flannel restarts with another MAC address and public-ip.
    observer.release(|steady| {
        steady.vteps.clear();
        steady.sources.clear();
    });
    subject.patch_node(
        &node_name(&subject.run, 2),
        &json!({ "metadata": { "annotations": {
            "test.gateway.example/backend-data": r#"{"VNI":1,"VtepMAC":"0e:ff:00:02:00:02"}"#,
            "test.gateway.example/public-ip": endpoint(22).to_string(),
        } } }),
    );
    observer.wait("the node's endpoint is followed", |observer| {
        observer.table().vteps.values().any(|vtep| vtep.endpoint == endpoint(22))
    });
    observer.converge(&subject);

    observer.release(|steady| *steady = gateway::plan::Desired::default());
    subject.delete_pod("b", 0);
    subject.delete_node(&node_name(&subject.run, 2));
    observer.wait("what was deleted is gone", |observer| observer.table().vteps.len() == 1);
    observer.converge(&subject);
    observer.wait_healthy();
}

/// Opinions of the control plane about a node do not touch forwarding.
#[test]
fn nodes_that_are_not_ready_cordoned_or_tainted_go_on() {
    let subject = Subject::start();
    let name = node_name(&subject.run, 1);
    subject.create_node(&node(&subject.run, 1));
    subject.create_pod("a", &on(&subject.run, 1), &running(address(1, 2)));
    let observer = Observer::start(&subject);
    observer.converge(&subject);
    let before = observer.events();
    subject.patch_node_status(
        &name,
        &json!({ "status": { "conditions": [{
            "type": "Ready", "status": "Unknown", "reason": "NodeStatusUnknown", "message": "Kubelet stopped posting node status.",
        }] } }),
    );
    subject.patch_node(&name, &json!({ "spec": { "unschedulable": true } }));
    subject.patch_node(
        &name,
        &json!({ "spec": { "taints": [{ "key": "node.kubernetes.io/unreachable", "effect": "NoSchedule" }] } }),
    );
    observer.wait("all three are seen", |observer| observer.events() >= before + 3);
    observer.converge(&subject);
    assert!(leads(&observer, &subject, (1, 2), Some(1)));
}

#[test]
fn pods_stay_until_they_are_gone_and_go_when_they_are_finished() {
    let subject = Subject::start();
    subject.create_node(&node(&subject.run, 1));
    for (name, number) in [("done", 2), ("failed", 3), ("leaving", 4), ("stays", 5)] {
        subject.create_pod(name, &on(&subject.run, 1), &running(address(1, number)));
    }
    let observer = Observer::start(&subject);
    observer.converge(&subject);
    observer.release(|steady| {
        for number in [2, 3] {
            steady.pods.remove(&(0, address(1, number)));
        }
    });
    // Finished pods keep their podIP.
    subject.patch_pod_status("done", &json!({ "phase": "Succeeded" }));
    subject.patch_pod_status("failed", &json!({ "phase": "Failed" }));
    subject.delete_pod("leaving", 30);
    observer.wait("finished pods go", |observer| {
        leads(observer, &subject, (1, 2), None) && leads(observer, &subject, (1, 3), None)
    });
    observer.converge(&subject);
    assert!(leads(&observer, &subject, (1, 4), Some(1)), "a terminating pod has connections to finish");
    observer.release(|steady| {
        steady.pods.remove(&(0, address(1, 4)));
    });
    subject.delete_pod("leaving", 0);
    observer.wait("the pod goes with its object", |observer| leads(observer, &subject, (1, 4), None));
    observer.converge(&subject);
    assert!(leads(&observer, &subject, (1, 5), Some(1)));
}

/// An address that is given to another pod, on another node, whichever event comes first.
#[test]
fn a_reused_address_leads_to_the_pod_that_has_it_now() {
    let subject = Subject::start();
    for number in [1, 2] {
        subject.create_node(&node(&subject.run, number));
    }
    let observer = Observer::start(&subject);
    observer.converge(&subject);
    let reused = address(1, 9);
    let leads_to = |to| leads(&observer, &subject, (1, 9), to);

    // The old one finishes first, and its object stays.
    subject.create_pod("first", &on(&subject.run, 1), &running(reused));
    observer.wait("the first", |_| leads_to(Some(1)));
    subject.patch_pod_status("first", &json!({ "phase": "Succeeded" }));
    subject.create_pod("second", &on(&subject.run, 2), &running(reused));
    observer.wait("the second", |_| leads_to(Some(2)));
    subject.delete_pod("first", 0);
    observer.converge(&subject);
    assert!(leads_to(Some(2)));

    // The new one is there before the old one is gone.
    subject.delete_pod("second", 30);
    observer.release(|steady| steady.pods.clear());
    subject.create_pod("third", &on(&subject.run, 1), &running(reused));
    observer.wait("the third goes before one that ends", |_| leads_to(Some(1)));
    subject.delete_pod("second", 0);
    observer.converge(&subject);
    assert!(leads_to(Some(1)));
}

#[test]
fn what_flannel_does_not_know_is_left_out() {
    let subject = Subject::start();
    let mut stranger = node(&subject.run, 1);
    // flannel's own prefix, which is not that of this gateway's overlay.
    stranger["metadata"]["annotations"] = json!({
        "flannel.alpha.coreos.com/kube-subnet-manager": "true",
        "flannel.alpha.coreos.com/backend-type": "vxlan",
        "flannel.alpha.coreos.com/backend-data": r#"{"VNI":1,"VtepMAC":"0e:ff:00:01:00:01"}"#,
        "flannel.alpha.coreos.com/public-ip": endpoint(1).to_string(),
    });
    subject.create_node(&stranger);
    subject.create_node(&node(&subject.run, 2));
    let mut host = on(&subject.run, 2);
    host["hostNetwork"] = json!(true);
    subject.create_pod("host", &host, &running(endpoint(2)));
    let observer = Observer::start(&subject);
    observer.converge(&subject);
    let table = observer.table();
    assert_eq!(table.vteps.len(), 1);
    assert!(table.pods.is_empty());
}
