//! flannel's formats and what its nodes make of them, as observed with flannel 0.20.2 and 0.28.9.

use std::collections::BTreeMap;

use k8s_openapi::{
    api::core::v1::{NodeAddress, NodeSpec, NodeStatus, PodIP, PodSpec, PodStatus},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use rstest::rstest;

use super::*;
use crate::{
    cluster::problem::Severity,
    config::{Config, Overrides},
};

fn overlay(extra: &str) -> Overlay {
    let text = format!(
        r#"
[source]
kind = "files"
path = "/m"
[[interface]]
name = "eth0"
roles = ["external", "underlay"]
[[overlay]]
name = "flannel"
local = "172.31.7.100"
mac = "00:50:56:bb:70:8b"
subnet = "10.244.20.0/24"
{extra}
"#
    );
    Config::parse(&text, "gateway.toml", &Overrides::default()).unwrap().overlays.remove(0)
}

/// A Node as flannel 0.28.9 annotates it.
fn node() -> Node {
    let annotations = [
        ("backend-data", r#"{"VNI":1,"VtepMAC":"76:5d:ef:ee:c6:86"}"#),
        ("backend-type", "vxlan"),
        ("kube-subnet-manager", "true"),
        ("public-ip", "172.31.7.11"),
    ];
    Node {
        metadata: ObjectMeta {
            name: Some("node-1".into()),
            annotations: Some(
                annotations
                    .map(|(key, value)| (format!("flannel.alpha.coreos.com/{key}"), value.into()))
                    .into(),
            ),
            ..ObjectMeta::default()
        },
        spec: Some(NodeSpec {
            pod_cidr: Some("10.244.1.0/24".into()),
            pod_cidrs: Some(vec!["10.244.1.0/24".into()]),
            ..NodeSpec::default()
        }),
        status: Some(NodeStatus {
            addresses: Some(
                [
                    ("InternalIP", "10.0.0.11"),
                    ("InternalIP", "fd00::11"),
                    ("ExternalIP", "198.51.100.11"),
                    ("Hostname", "node-1"),
                    ("InternalIP", "10.0.0.11"),
                ]
                .map(|(type_, address)| NodeAddress { type_: type_.into(), address: address.into() })
                .into(),
            ),
            ..NodeStatus::default()
        }),
    }
}

fn annotate(node: &mut Node, key: &str, value: Option<&str>) {
    let annotations: &mut BTreeMap<String, String> = node.metadata.annotations.as_mut().unwrap();
    let key = format!("flannel.alpha.coreos.com/{key}");
    match value {
        Some(value) => annotations.insert(key, value.into()),
        None => annotations.remove(&key),
    };
}

fn facts() -> NodeFacts {
    NodeFacts {
        created: None,
        endpoint: Ipv4Addr::new(172, 31, 7, 11),
        mac: Mac::new([0x76, 0x5d, 0xef, 0xee, 0xc6, 0x86]),
        cidr: "10.244.1.0/24".parse().unwrap(),
        addresses: vec![Ipv4Addr::new(10, 0, 0, 11), Ipv4Addr::new(198, 51, 100, 11)],
        origin: None,
    }
}

fn rejected(node: &Node) -> Vec<Problem> {
    match read_node(node, &overlay("")) {
        NodeReading::Rejected(problems) => problems,
        other => panic!("{other:?}"),
    }
}

/// The endpoint is `public-ip`; the InternalIP, which differs, is only an address that the node may send from.
#[test]
fn a_node_as_flannel_writes_it() {
    assert_eq!(read_node(&node(), &overlay("")), NodeReading::Vtep(facts(), vec![]));
}

#[rstest]
#[case::vni_missing(r#"{"VtepMAC":"76:5d:ef:ee:c6:86"}"#)]
#[case::dashes(r#"{"VNI":1,"VtepMAC":"76-5D-EF-EE-C6-86"}"#)]
#[case::key_in_lower_case(r#"{"vni":1,"vtepmac":"76:5d:ef:ee:c6:86"}"#)]
#[case::the_last_key_counts(r#"{"VtepMAC":"00:00:00:00:00:01","vtepMac":"76:5d:ef:ee:c6:86"}"#)]
#[case::unknown_keys(r#"{"VtepMAC":"76:5d:ef:ee:c6:86","Site":{"x":[1]},"VNI":null}"#)]
fn backend_data_that_nodes_accept(#[case] data: &str) {
    let mut node = node();
    annotate(&mut node, "backend-data", Some(data));
    assert_eq!(read_node(&node, &overlay("")), NodeReading::Vtep(facts(), vec![]));
}

#[rstest]
#[case::vni_as_text("backend-data", Some(r#"{"VNI":"1","VtepMAC":"76:5d:ef:ee:c6:86"}"#))]
#[case::null("backend-data", Some("null"))]
#[case::empty("backend-data", Some("{}"))]
#[case::no_json("backend-data", Some("VtepMAC=76:5d:ef:ee:c6:86"))]
#[case::bad_mac("backend-data", Some(r#"{"VtepMAC":"76:5d:ef:ee:c6"}"#))]
#[case::group_mac("backend-data", Some(r#"{"VtepMAC":"01:00:5e:00:00:01"}"#))]
#[case::zero_mac("backend-data", Some(r#"{"VtepMAC":"00:00:00:00:00:00"}"#))]
#[case::no_data("backend-data", None)]
#[case::no_type("backend-type", None)]
#[case::type_wrongly_spelled("backend-type", Some("VXLAN"))]
#[case::host_gw("backend-type", Some("host-gw"))]
#[case::prefix_length("public-ip", Some("172.31.7.11/24"))]
#[case::ipv6("public-ip", Some("fd00::11"))]
#[case::loopback("public-ip", Some("127.0.0.1"))]
#[case::unspecified("public-ip", Some("0.0.0.0"))]
#[case::broadcast("public-ip", Some("255.255.255.255"))]
#[case::no_public_ip("public-ip", None)]
fn annotations_that_nodes_ignore(#[case] key: &str, #[case] value: Option<&str>) {
    let mut node = node();
    annotate(&mut node, key, value);
    let problems = rejected(&node);
    assert_eq!(problems.len(), 1, "{problems:#?}");
    assert_eq!(problems[0].severity, Severity::Error);
    assert_eq!(problems[0].place, format!("Node node-1, annotation flannel.alpha.coreos.com/{key}"));
}

#[test]
fn everything_wrong_with_a_node_is_reported() {
    let mut node = node();
    annotate(&mut node, "backend-type", Some("udp"));
    annotate(&mut node, "backend-data", Some("null"));
    annotate(&mut node, "public-ip", Some("here"));
    node.spec = None;
    assert_eq!(rejected(&node).len(), 4);
}

/// A Node that flannel's own nodes ignore is no problem, whatever else is on it.
#[rstest]
#[case(None)]
#[case(Some("True"))]
#[case(Some("false"))]
fn nodes_of_others_are_left_out(#[case] value: Option<&str>) {
    let mut node = node();
    annotate(&mut node, "kube-subnet-manager", value);
    annotate(&mut node, "public-ip", Some("nonsense"));
    assert_eq!(read_node(&node, &overlay("")), NodeReading::Skipped(NodeSkip::NotFlannel));
}

/// Inputs of the node's own flanneld, which nobody else reads.
#[test]
fn overwrite_annotations_are_not_read() {
    let mut node = node();
    for key in ["public-ip-overwrite", "node-public-ip", "backend-v6-data", "public-ipv6"] {
        annotate(&mut node, key, Some("192.0.2.99"));
    }
    assert_eq!(read_node(&node, &overlay("")), NodeReading::Vtep(facts(), vec![]));
}

#[test]
fn another_prefix_is_another_flannel() {
    let overlay = overlay("annotation_prefix = \"example.org/site-\"");
    let mut node = node();
    assert_eq!(read_node(&node, &overlay), NodeReading::Skipped(NodeSkip::NotFlannel));
    let renamed = node.metadata.annotations.take().unwrap().into_iter();
    let renamed =
        renamed.map(|(key, value)| (key.replace("flannel.alpha.coreos.com/", "example.org/site-"), value));
    node.metadata.annotations = Some(renamed.collect());
    assert_eq!(read_node(&node, &overlay), NodeReading::Vtep(facts(), vec![]));
}

#[test]
fn an_unexpected_vni_is_a_warning() {
    let NodeReading::Vtep(read, warnings) = read_node(&node(), &overlay("vni = 2")) else {
        panic!("programmed nevertheless, as flannel's nodes do")
    };
    assert_eq!(read, facts());
    assert_eq!(warnings.len(), 1, "{warnings:#?}");
    assert_eq!(warnings[0].severity, Severity::Warning);
    assert!(warnings[0].what.contains("says VNI 1, but overlay \"flannel\" has VNI 2"), "{warnings:#?}");
}

/// Or the gateway would answer ARP for whatever a Node claims.
#[test]
fn the_network_bounds_what_a_node_can_take() {
    let NodeReading::Rejected(problems) = read_node(&node(), &overlay("network = \"10.244.16.0/20\"")) else {
        panic!("outside of the network")
    };
    assert_eq!(problems.len(), 1, "{problems:#?}");
    assert!(problems[0].what.contains("10.244.1.0/24 is outside of 10.244.16.0/20"), "{problems:#?}");
}

#[rstest]
#[case::list_first(&["10.244.1.0/24"], "10.244.9.0/24", Ok("10.244.1.0/24"))]
#[case::single_if_the_list_is_empty(&[], "10.244.9.0/24", Ok("10.244.9.0/24"))]
#[case::dual_stack(&["fd00:1::/64", "10.244.1.0/24"], "fd00:1::/64", Ok("10.244.1.0/24"))]
#[case::none(&[], "", Err("is missing"))]
#[case::ipv6_only(&["fd00:1::/64"], "", Err("no IPv4"))]
#[case::three(&["10.244.1.0/24", "fd00:1::/64", "10.244.2.0/24"], "", Err("3 entries"))]
#[case::two_of_a_family(&["10.244.1.0/24", "10.244.2.0/24"], "", Err("two IPv4"))]
#[case::host_bits(&["10.244.1.1/24"], "", Err("host bits"))]
#[case::no_length(&["10.244.1.0"], "", Err("not a CIDR"))]
fn pod_cidrs(#[case] list: &[&str], #[case] single: &str, #[case] expected: Result<&str, &str>) {
    let mut node = node();
    node.spec = Some(NodeSpec {
        pod_cidr: Some(single.into()),
        pod_cidrs: Some(list.iter().map(|cidr| (*cidr).into()).collect()),
        ..NodeSpec::default()
    });
    match (read_node(&node, &overlay("")), expected) {
        (NodeReading::Vtep(facts, _), Ok(cidr)) => assert_eq!(facts.cidr.to_string(), cidr),
        (NodeReading::Rejected(problems), Err(what)) => {
            assert!(problems[0].what.contains(what), "{problems:?}");
        }
        other => panic!("{other:?}"),
    }
}

/// Our own Node, as every other node's neighbour: MAC, endpoint, podCIDR; any two of them are a mistake.
#[rstest]
#[case::own("00:50:56:bb:70:8b", "172.31.7.100", "10.244.20.0/24", None)]
#[case::stale_mac("00:50:56:bb:70:8c", "172.31.7.100", "10.244.20.0/24", Some(3))]
#[case::other_endpoint("00:50:56:bb:70:8b", "172.31.7.101", "10.244.20.0/24", Some(3))]
#[case::our_cidr_only("00:50:56:bb:70:8c", "172.31.7.101", "10.244.20.0/24", Some(3))]
#[case::part_of_our_cidr("00:50:56:bb:70:8c", "172.31.7.101", "10.244.20.128/25", Some(3))]
#[case::around_our_cidr("00:50:56:bb:70:8c", "172.31.7.101", "10.244.0.0/16", Some(3))]
#[case::our_mac_only("00:50:56:bb:70:8b", "172.31.7.101", "10.244.21.0/24", Some(3))]
fn our_own_node(
    #[case] mac: &str,
    #[case] endpoint: &str,
    #[case] cidr: &str,
    #[case] problems: Option<usize>,
) {
    let mut node = node();
    annotate(&mut node, "backend-data", Some(&format!(r#"{{"VNI":1,"VtepMAC":"{mac}"}}"#)));
    annotate(&mut node, "public-ip", Some(endpoint));
    node.spec = Some(NodeSpec { pod_cidr: Some(cidr.into()), ..NodeSpec::default() });
    match problems {
        None => assert_eq!(read_node(&node, &overlay("")), NodeReading::Skipped(NodeSkip::Own)),
        Some(count) => {
            assert_eq!(rejected(&node).len(), count, "one line for each field, so that they can be compared");
        }
    }
}

fn pod(change: impl FnOnce(&mut PodSpec, &mut PodStatus)) -> PodReading {
    let mut spec = PodSpec { node_name: Some("node-1".into()), ..PodSpec::default() };
    let mut status = PodStatus {
        phase: Some("Running".into()),
        pod_ip: Some("10.244.1.5".into()),
        pod_ips: Some(vec![PodIP { ip: "10.244.1.5".into() }]),
        ..PodStatus::default()
    };
    change(&mut spec, &mut status);
    let pod = Pod { metadata: ObjectMeta::default(), spec: Some(spec), status: Some(status) };
    read_pod(&pod, &PodRef { namespace: "default".into(), name: "p".into() })
}

fn placed(address: [u8; 4]) -> PodReading {
    PodReading::Placed(PodFacts {
        created: None,
        terminating: false,
        node: "node-1".into(),
        address: address.into(),
        origin: None,
    })
}

fn ips(texts: &[&str]) -> Vec<PodIP> {
    texts.iter().map(|ip| PodIP { ip: (*ip).into() }).collect()
}

#[test]
fn pods_are_read_from_their_status() {
    assert_eq!(pod(|_, _| ()), placed([10, 244, 1, 5]));
    assert_eq!(
        pod(|_, status| status.pod_ips = Some(ips(&["fd00::5", "10.244.1.6"]))),
        placed([10, 244, 1, 6])
    );
    assert_eq!(pod(|_, status| status.pod_ips = None), placed([10, 244, 1, 5]));
    assert_eq!(pod(|_, status| status.phase = Some("Pending".into())), placed([10, 244, 1, 5]));
}

#[test]
fn pods_without_an_address_of_their_own_are_left_out() {
    use PodSkip::{Finished, HostNetwork, NoIpv4, Pending};
    let skipped = PodReading::Skipped;
    assert_eq!(pod(|spec, _| spec.host_network = Some(true)), skipped(HostNetwork));
    assert_eq!(pod(|_, status| status.phase = Some("Succeeded".into())), skipped(Finished));
    assert_eq!(pod(|_, status| status.phase = Some("Failed".into())), skipped(Finished));
    assert_eq!(pod(|spec, _| spec.node_name = None), skipped(Pending));
    assert_eq!(pod(|_, status| *status = PodStatus::default()), skipped(Pending));
    assert_eq!(pod(|_, status| status.pod_ips = Some(ips(&["fd00::5"]))), skipped(NoIpv4));
}

#[rstest]
#[case("10.244.1.5/24")]
#[case("10.244.1.256")]
#[case("127.0.0.1")]
#[case("239.0.0.1")]
fn addresses_that_no_pod_has(#[case] address: &str) {
    let PodReading::Rejected(problem) = pod(|_, status| status.pod_ips = Some(ips(&[address]))) else {
        panic!()
    };
    assert_eq!(problem.place, "Pod default/p, status.podIP");
}

/// A podCIDR over the underlay would have the gateway answer ARP for nodes, and for itself.
#[rstest]
#[case::holds_the_gateway("172.31.7.0/25")]
#[case::holds_the_node("172.31.7.11/32")]
#[case::holds_both("172.16.0.0/12")]
fn pod_cidrs_over_the_underlay(#[case] cidr: &str) {
    let mut node = node();
    let spec = node.spec.as_mut().unwrap();
    (spec.pod_cidr, spec.pod_cidrs) = (Some(cidr.into()), Some(vec![cidr.into()]));
    let NodeReading::Rejected(problems) = read_node(&node, &overlay("")) else {
        panic!("{cidr} is accepted")
    };
    assert_eq!(problems.len(), 1, "{problems:?}");
    assert!(problems[0].to_string().contains("is an address of the underlay"), "{}", problems[0]);
}
