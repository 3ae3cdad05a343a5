//! What needs no server: reading what one sends, comparing configurations, rights.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
};

use proptest::prelude::*;
use rstest::rstest;
use serde_json::{Value, json};

use super::{
    netconf::{NetConf, compare},
    request::Request,
    wire::{Decoder, Item, ListMeta, WatchEvent},
    *,
};
use crate::{
    cluster::{
        flannel::PodReading,
        model::{Object, ObjectRef},
    },
    config::{Overlay, Overrides},
};

fn decoder(kind: Kind) -> Decoder {
    Decoder::new(kind, vec!["flannel.alpha.coreos.com/".to_owned()].into())
}

fn pod(name: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": name, "namespace": "shop", "creationTimestamp": "2026-01-15T11:00:00Z", "resourceVersion": "7",
            "managedFields": [{ "manager": "kubelet", "fieldsV1": { "f:status": {} } }],
        },
        "spec": { "nodeName": "node-1", "containers": [{ "name": "main", "image": "web" }], "hostNetwork": null },
        "status": { "phase": "Running", "podIP": "10.244.1.5", "podIPs": [{ "ip": "10.244.1.5" }] },
    })
}

fn read(kind: Kind, page: &Value) -> (Vec<Item>, ListMeta) {
    let mut head = None;
    let page = decoder(kind).page(page.to_string().as_bytes(), |found| head = Some(found)).unwrap();
    (page.items, head.expect("metadata"))
}

#[test]
fn pages_are_cut_down_to_facts() {
    let page = json!({
        "kind": "PodList", "apiVersion": "v1", "metadata": { "resourceVersion": "12", "continue": "abc" },
        "items": [pod("web-0")],
    });
    let (items, head) = read(Kind::Pod, &page);
    assert_eq!(head, ListMeta { resource_version: "12".into(), token: Some("abc".into()) });
    let [Item::Good(reference, object)] = &items[..] else { panic!("{items:?}") };
    assert_eq!(*reference, ObjectRef::pod("shop", "web-0"));
    let Object::Pod(_, PodReading::Placed(facts)) = &**object else { panic!("{object:?}") };
    assert_eq!((facts.node.as_ref(), facts.address), ("node-1", Ipv4Addr::new(10, 244, 1, 5)));
    assert_eq!(facts.created.unwrap().to_string(), "2026-01-15T11:00:00Z");
}

#[test]
fn an_empty_list_may_be_null() {
    let page = json!({ "metadata": { "resourceVersion": "3" }, "items": null });
    assert!(read(Kind::Node, &page).0.is_empty());
}

#[test]
fn a_node_keeps_the_annotations_that_matter() {
    let page = json!({ "metadata": { "resourceVersion": "3" }, "items": [{
        "metadata": { "name": "n", "annotations": { "flannel.alpha.coreos.com/public-ip": "1.2.3.4", "other": "x" } },
        "spec": { "podCIDR": "10.244.1.0/24", "taints": [{ "key": "k" }] },
        "status": { "addresses": [{ "type": "InternalIP", "address": "1.2.3.4" }], "images": [{ "names": ["a"] }] },
    }] });
    let (items, _) = read(Kind::Node, &page);
    let [Item::Good(_, object)] = &items[..] else { panic!("{items:?}") };
    let Object::Node(node, _) = &**object else { panic!("{object:?}") };
    assert_eq!(node.metadata.annotations.as_ref().unwrap().len(), 1);
    assert_eq!(node.spec.as_ref().unwrap().pod_cidr.as_deref(), Some("10.244.1.0/24"));
    assert_eq!(node.status.as_ref().unwrap().addresses.as_ref().unwrap().len(), 1);
}

#[test]
fn one_bad_item_costs_nobody_else_anything() {
    let mut bad = pod("bad");
    bad["status"]["podIP"] = json!(7);
    let page =
        json!({ "metadata": { "resourceVersion": "3" }, "items": [pod("a"), bad, "nonsense", pod("b")] });
    let (items, _) = read(Kind::Pod, &page);
    let [Item::Good(..), Item::Bad(Some(reference), problem), Item::Bad(None, _), Item::Good(..)] =
        &items[..]
    else {
        panic!("{items:?}")
    };
    assert_eq!(*reference, ObjectRef::pod("shop", "bad"));
    assert_eq!(problem.place, "Pod shop/bad, status.podIP");
}

#[rstest]
#[case::no_json("{")]
#[case::no_list("{}")]
#[case::some_other_object(r#"{"metadata":{"resourceVersion":"3"},"status":"ok"}"#)]
#[case::items_that_are_none(r#"{"metadata":{"resourceVersion":"3"},"items":"many"}"#)]
#[case::text("\"hello\"")]
#[case::page_of_a_proxy("<html>")]
fn what_is_no_page_is_refused(#[case] text: &str) {
    assert!(decoder(Kind::Pod).page(text.as_bytes(), |_| {}).is_err());
}

#[test]
fn lines_of_a_watch_are_read() {
    let mut decoder = decoder(Kind::Pod);
    let mut line = |kind: &str, object: Value| {
        decoder.line(json!({ "type": kind, "object": object }).to_string().as_bytes())
    };
    assert!(
        matches!(line("ADDED", pod("a")), Ok((WatchEvent::Put(Item::Good(..)), Some(version))) if version == "7")
    );
    assert!(matches!(line("DELETED", pod("a")), Ok((WatchEvent::Gone(Some(_)), _))));
    let bookmark =
        json!({ "kind": "Pod", "metadata": { "resourceVersion": "9", "creationTimestamp": null } });
    assert!(
        matches!(line("BOOKMARK", bookmark), Ok((WatchEvent::Bookmark, Some(version))) if version == "9")
    );
    let status = json!({ "kind": "Status", "code": 410, "message": "too old", "status": "Failure" });
    assert!(matches!(line("ERROR", status), Ok((WatchEvent::Error(410, _), None))));
    let mut bad = pod("a");
    bad["spec"] = json!(1);
    let read = line("MODIFIED", bad).unwrap();
    assert!(matches!(read, (WatchEvent::Put(Item::Bad(Some(_), _)), Some(version)) if version == "7"));
    assert!(line("OTHER", pod("a")).is_err());
}

proptest! {
    #[test]
    fn whatever_comes_is_read_or_refused(text in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = decoder(Kind::Pod).page(&text, |_| {});
        let _ = decoder(Kind::Node).line(&text);
    }

    #[test]
    fn a_page_cut_anywhere_is_refused(cut in 0..400_usize) {
        let page = json!({ "metadata": { "resourceVersion": "3" }, "items": [pod("a"), pod("b")] }).to_string();
        prop_assume!(cut < page.len());
        let refused = decoder(Kind::Pod).page(&page.as_bytes()[..cut], drop).is_err();
        prop_assert!(refused);
    }
}

fn overlay() -> Overlay {
    let text = r#"
[source]
kind = "files"
path = "x"
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
    Config::parse(text, "t", &Overrides::default()).unwrap().overlays.remove(0)
}

#[rstest]
#[case::same(r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#, None)]
#[case::all_said(r#"{"Network":"10.244.0.0/16","EnableIPv6":false,"Backend":{"Type":"vxlan","VNI":1,"Port":8472,"MTU":1500}}"#, None)]
#[case::vni(
    r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","VNI":4096}}"#,
    Some("Backend.VNI is 4096")
)]
#[case::port(
    r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","Port":4789}}"#,
    Some("Backend.Port is 4789")
)]
#[case::network(
    r#"{"Network":"10.240.0.0/12","Backend":{"Type":"vxlan"}}"#,
    Some("Network is \"10.240.0.0/12\"")
)]
#[case::outside(
    r#"{"Network":"10.42.0.0/16","Backend":{"Type":"vxlan"}}"#,
    Some("does not hold 10.244.30.0/24")
)]
#[case::direct(
    r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","DirectRouting":true}}"#,
    Some("Backend.DirectRouting is true")
)]
#[case::backend(
    r#"{"Network":"10.244.0.0/16","Backend":{"Type":"host-gw"}}"#,
    Some("Backend.Type is \"host-gw\"")
)]
#[case::no_backend(r#"{"Network":"10.244.0.0/16"}"#, Some("Backend.Type is \"udp\""))]
#[case::dual_stack(r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"2001:db8::/56","Backend":{"Type":"vxlan"}}"#, Some("EnableIPv6"))]
#[case::mtu(
    r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","MTU":9000}}"#,
    Some("Backend.MTU is 9000")
)]
fn flannel_s_configuration_is_compared(#[case] text: &str, #[case] told: Option<&str>) {
    let conf = NetConf::parse(text, "net-conf.json").unwrap();
    let problems = compare(&conf, &overlay(), Some(("eth1", 1500)));
    match told {
        None => assert_eq!(problems, []),
        Some(told) => {
            assert!(problems.iter().any(|problem| problem.what.contains(told)), "{problems:#?}");
            assert!(problems.iter().all(|problem| !problem.remedy.is_empty()), "{problems:#?}");
        }
    }
}

#[rstest]
#[case("")]
#[case("[]")]
#[case(r#"{"Network":"10.244.0.0"}"#)]
fn a_broken_configuration_is_named(#[case] text: &str) {
    assert!(NetConf::parse(text, "net-conf.json").unwrap_err().place.contains("net-conf.json"));
}

/// What `deploy/rbac.yaml` allows: verb, group, resource, and the namespace if it is but one.
fn allowed() -> BTreeSet<(String, String, String, Option<String>)> {
    let text = include_str!("../../../../deploy/rbac.yaml");
    let documents: Vec<Value> = serde_saphyr::from_multiple(text).unwrap();
    let roles: BTreeMap<&str, &Value> = documents
        .iter()
        .filter(|document| document["kind"].as_str().is_some_and(|kind| kind.ends_with("Role")))
        .map(|role| (role["metadata"]["name"].as_str().unwrap(), &role["rules"]))
        .collect();
    let mut allowed = BTreeSet::new();
    for binding in documents.iter().filter(|document| document["kind"].as_str().unwrap().ends_with("Binding"))
    {
        let namespace = binding["metadata"]["namespace"].as_str().map(str::to_owned);
        let rules = roles[binding["roleRef"]["name"].as_str().unwrap()];
        let texts = |list: &Value| -> Vec<String> {
            list.as_array().unwrap().iter().map(|text| text.as_str().unwrap().to_owned()).collect()
        };
        for rule in rules.as_array().unwrap() {
            for verb in texts(&rule["verbs"]) {
                for group in texts(&rule["apiGroups"]) {
                    for resource in texts(&rule["resources"]) {
                        allowed.insert((verb.clone(), group.clone(), resource, namespace.clone()));
                    }
                }
            }
        }
    }
    allowed
}

#[test]
fn the_shipped_rights_are_those_of_the_requests() {
    let used: BTreeSet<_> = Request::all()
        .map(|request| {
            let Right { verb, group, resource, namespace } = request.right();
            (verb.to_owned(), group.to_owned(), resource.to_owned(), namespace.map(str::to_owned))
        })
        .collect();
    assert_eq!(used, allowed());
}
