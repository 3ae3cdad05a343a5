//! What is decided about the gateway's Node, without a server.

use k8s_openapi::api::core::v1::Node;
use rstest::rstest;
use serde_json::{Value, json};

use super::node::{Action, Announcement, OWNER_LABEL, free_subnet};
use crate::config::{Config, Overrides};

const CONFIG: &str = r#"
[source]
kind = "kubernetes"
[flannel]
register = true
[[interface]]
name = "lo"
roles = ["external", "underlay"]
[[overlay]]
name = "flannel"
local = "172.16.2.200"
mac = "0e:11:22:33:44:55"
subnet = "10.244.30.0/24"
network = "10.244.0.0/16"
"#;

fn announcement() -> Announcement {
    let config = Config::parse(CONFIG, "t", &Overrides::default()).unwrap();
    Announcement::all(&config).remove(0)
}

fn live(change: impl FnOnce(&mut Value)) -> Node {
    let mut node = announcement().render();
    change(&mut node);
    serde_json::from_value(node).unwrap()
}

const DATA: &str = "flannel.alpha.coreos.com/backend-data";

fn applied(node: &Node) -> Value {
    match announcement().action(Some(node)) {
        Action::Apply(object) => object,
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_is_as_it_should_be_is_left_alone() {
    assert_eq!(announcement().action(Some(&live(|_| {}))), Action::Nothing);
    // The other spelling, after a nudge.
    let nudged = live(|node| {
        node["metadata"]["annotations"][DATA] = json!(r#"{"VNI":1, "VtepMAC":"0e:11:22:33:44:55"}"#);
    });
    assert_eq!(announcement().action(Some(&nudged)), Action::Nothing);
}

#[test]
fn what_is_missing_or_changed_is_written() {
    let changed =
        live(|node| node["metadata"]["annotations"]["flannel.alpha.coreos.com/public-ip"] = json!("1.2.3.4"));
    let object = applied(&changed);
    assert_eq!(object["metadata"]["annotations"][DATA], r#"{"VNI":1,"VtepMAC":"0e:11:22:33:44:55"}"#);
    assert_eq!(announcement().action(None), Action::Apply(announcement().render()));
}

/// flannel looks again only if one of three annotations changes: so one of them is spelled in another way.
#[rstest]
#[case::pod_cidr(|node: &mut Value| {
    node["spec"].as_object_mut().unwrap().retain(|key, _| !key.starts_with("podCIDR"));
})]
#[case::manager(|node: &mut Value| {
    node["metadata"]["annotations"]["flannel.alpha.coreos.com/kube-subnet-manager"] = json!("false");
})]
fn what_flannel_would_not_see_is_nudged(#[case] spoil: fn(&mut Value)) {
    let object = applied(&live(spoil));
    assert_eq!(object["metadata"]["annotations"][DATA], r#"{"VNI":1, "VtepMAC":"0e:11:22:33:44:55"}"#);
    assert_eq!(object["spec"]["podCIDR"], "10.244.30.0/24");
}

#[rstest]
#[case::subnet(|node: &mut Value| { node["spec"] = json!({ "podCIDR": "10.244.31.0/24" }) }, "podCIDR")]
#[case::mac(|node: &mut Value| {
    node["metadata"]["annotations"][DATA] = json!(r#"{"VtepMAC":"0e:00:00:00:00:01"}"#);
}, "VtepMAC is 0e:00:00:00:00:01")]
fn what_cannot_change_in_place_is_replaced(#[case] spoil: fn(&mut Value), #[case] why: &str) {
    match announcement().action(Some(&live(spoil))) {
        Action::Replace(reason) => assert!(reason.contains(why), "{reason}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn another_s_node_is_refused_and_an_equal_one_adopted() {
    let foreign = live(|node| {
        node["metadata"]["labels"] = json!({});
        node["spec"] = json!({ "podCIDR": "10.244.31.0/24" });
    });
    assert!(matches!(announcement().action(Some(&foreign)), Action::Refuse(_)));
    let by_hand = live(|node| node["metadata"]["labels"] = json!({}));
    assert_eq!(applied(&by_hand)["metadata"]["labels"][OWNER_LABEL], "default");
}

#[test]
fn taints_of_others_stay() {
    let node = live(|node| node["spec"]["taints"] = json!([{ "key": "theirs", "effect": "NoSchedule" }]));
    let patch = Announcement::taints(&node).unwrap();
    assert_eq!(patch["spec"]["taints"].as_array().unwrap().len(), 3);
    let done = live(|node| node["spec"]["taints"] = patch["spec"]["taints"].clone());
    assert_eq!(Announcement::taints(&done), None);
}

#[rstest]
#[case::pod_cidr("10.244.30.0/24", "0e:00:00:00:00:01", "172.16.2.11", "podCIDR 10.244.30.0/24 overlaps")]
#[case::wider("10.244.0.0/17", "0e:00:00:00:00:01", "172.16.2.11", "overlaps 10.244.0.0/17 of Node other")]
#[case::mac(
    "10.244.1.0/24",
    "0E-11-22-33-44-55",
    "172.16.2.11",
    "VtepMAC 0e:11:22:33:44:55 is that of Node other"
)]
#[case::endpoint(
    "10.244.1.0/24",
    "0e:00:00:00:00:01",
    "172.16.2.200",
    "public-ip 172.16.2.200 is that of Node other"
)]
fn collisions_name_the_owner(
    #[case] cidr: &str,
    #[case] mac: &str,
    #[case] public_ip: &str,
    #[case] told: &str,
) {
    let other = live(|node| {
        node["metadata"]["name"] = json!("other");
        node["metadata"]["annotations"][DATA] = json!(json!({ "vtepmac": mac }).to_string());
        node["metadata"]["annotations"]["flannel.alpha.coreos.com/public-ip"] = json!(public_ip);
        node["spec"] = json!({ "podCIDR": cidr, "podCIDRs": [cidr] });
    });
    let problems = announcement().collisions(&[other]);
    assert_eq!(problems.len(), 1, "{problems:#?}");
    assert!(problems[0].what.contains(told), "{problems:#?}");
    assert!(announcement().collisions(&[live(|_| {})]).is_empty(), "it is its own");
}

#[test]
fn a_free_subnet_is_one_that_no_node_has() {
    let node = |cidr: &str| live(|node| node["spec"] = json!({ "podCIDR": cidr, "podCIDRs": [cidr] }));
    let network = "10.244.0.0/22".parse().unwrap();
    let nodes = [node("10.244.3.0/24"), node("10.244.2.128/25")];
    assert_eq!(free_subnet(network, 24, &nodes, &[]), Some("10.244.1.0/24".parse().unwrap()));
    let others = ["10.244.1.0/25".parse().unwrap()];
    assert_eq!(free_subnet(network, 24, &nodes, &others), Some("10.244.0.0/24".parse().unwrap()));
    assert_eq!(free_subnet(network, 24, &[node("10.244.0.0/16")], &[]), None);
}
