//! The planner against a plain account of what it should do, for every order of events.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
};

use k8s_openapi::{
    api::core::v1::{Node, NodeAddress, NodeSpec, NodeStatus, Pod, PodSpec, PodStatus},
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time},
    jiff::Timestamp,
};
use proptest::prelude::*;

use super::*;
use crate::{
    cluster::{
        flannel::{NodeFacts, NodeReading, PodReading, read_node},
        model::{Event, Object, ObjectRef},
        problem::{Problem, Severity},
    },
    config::{DontFragment, ExtraSource, Overlay, SourceCheck},
};

fn overlay(name: &str, prefix: &str, third: u8, source_check: SourceCheck) -> Overlay {
    Overlay {
        name: name.into(),
        vni: gateway_common::wire::Vni::new(1).unwrap(),
        port: 8472,
        local: Ipv4Addr::new(172, 16, 2, 200),
        mac: Mac::new([0x0e, 0, 0, 0, 0, 0xff]),
        subnet: Ipv4Net::new(Ipv4Addr::new(10, 244, third, 0), 24).unwrap(),
        address: Ipv4Addr::new(10, 244, third, 0),
        network: None,
        direct_routing: third == 31,
        source_check,
        extra_sources: vec![ExtraSource { node: "n1".into(), address: Ipv4Addr::new(192, 0, 2, 1) }],
        dont_fragment: DontFragment::Unset,
        ttl: 64,
        dscp: 0,
        allow_gbp: false,
        mss_clamp: true,
        annotation_prefix: prefix.into(),
    }
}

fn overlays() -> Vec<Overlay> {
    vec![
        Overlay {
            network: Some("10.244.0.0/16".parse().unwrap()),
            ..overlay("a", "a.example/", 30, SourceCheck::Node)
        },
        overlay("b", "b.example/", 31, SourceCheck::Strict),
        overlay("c", "a.example/", 32, SourceCheck::Off),
    ]
}

fn time(second: Option<i64>) -> Option<Time> {
    second.map(|second| Time(Timestamp::from_second(second).unwrap()))
}

/// A Node as a test describes it.
#[derive(Clone, Debug)]
struct NodeText {
    name: String,
    created: Option<i64>,
    prefix: &'static str,
    mac: u8,
    endpoint: u8,
    cidr: &'static str,
    internal: u8,
}

fn node_text(name: &str, number: u8, cidr: &'static str) -> NodeText {
    NodeText {
        name: name.into(),
        created: Some(i64::from(number)),
        prefix: "a.example/",
        mac: number,
        endpoint: number,
        cidr,
        internal: number,
    }
}

impl NodeText {
    fn object(&self) -> Object {
        let annotations = [
            ("kube-subnet-manager", "true".to_owned()),
            ("backend-type", "vxlan".to_owned()),
            ("backend-data", format!(r#"{{"VNI":1,"VtepMAC":"0e:00:00:00:00:{:02x}"}}"#, self.mac)),
            ("public-ip", format!("172.16.2.{}", self.endpoint)),
        ];
        let node = Node {
            metadata: ObjectMeta {
                name: Some(self.name.clone()),
                creation_timestamp: time(self.created),
                annotations: Some(
                    annotations.map(|(key, value)| (format!("{}{key}", self.prefix), value)).into(),
                ),
                ..ObjectMeta::default()
            },
            spec: Some(NodeSpec {
                pod_cidr: Some(self.cidr.to_owned()).filter(|cidr| !cidr.is_empty()),
                ..NodeSpec::default()
            }),
            status: Some(NodeStatus {
                addresses: Some(vec![NodeAddress {
                    type_: "InternalIP".into(),
                    address: format!("172.16.2.{}", self.internal),
                }]),
                ..NodeStatus::default()
            }),
        };
        Object::Node(Box::new(node), "".into())
    }
}

fn pod(
    name: &str,
    node: &str,
    address: &str,
    created: Option<i64>,
    terminating: bool,
    phase: &str,
) -> Object {
    Object::pod(&Pod {
        metadata: ObjectMeta {
            name: Some(name.into()),
            namespace: Some("default".into()),
            creation_timestamp: time(created),
            deletion_timestamp: time(terminating.then_some(9)),
            ..ObjectMeta::default()
        },
        spec: Some(PodSpec { node_name: Some(node.into()), ..PodSpec::default() }),
        status: Some(PodStatus {
            phase: Some(phase.into()),
            pod_ip: Some(address.into()),
            ..PodStatus::default()
        }),
    })
}

fn running(name: &str, node: &str, address: &str) -> Object {
    pod(name, node, address, Some(1), false, "Running")
}

fn apply(object: Object) -> Event {
    Event::Apply(Arc::new(object))
}

fn lan(network: &str) -> Lan {
    Lan { network: network.parse().unwrap(), interface: "eth0".into() }
}

fn on<const N: usize>(lans: [Lan; N]) -> Surroundings {
    Surroundings { lans: lans.into(), ..Surroundings::default() }
}

/// What the tables should say, worked out from all objects at once without any index.
fn afresh(objects: &BTreeMap<ObjectRef, Object>, overlays: &[Overlay], host: &Surroundings) -> Desired {
    let mut desired = Desired::default();
    let mut claims: BTreeMap<Ipv4Addr, Vec<_>> = BTreeMap::new();
    for object in objects.values() {
        if let Object::Pod(pod, PodReading::Placed(facts)) = object {
            let order = (facts.terminating, Reverse(facts.created), pod.clone());
            claims.entry(facts.address).or_default().push((order, facts.node.clone()));
        }
    }
    for (id, overlay) in (0..).zip(overlays) {
        let mut members: Vec<(_, Arc<str>, NodeFacts)> = Vec::new();
        for (reference, object) in objects {
            if let (Object::Node(node, _), ObjectRef::Node(name)) = (object, reference)
                && let NodeReading::Vtep(facts, _) = read_node(node, overlay)
            {
                members.push(((facts.created.is_none(), facts.created), name.clone(), facts));
            }
        }
        members.sort_by(|a, b| (a.0, &a.1).cmp(&(b.0, &b.1)));
        let lans: Vec<Ipv4Net> = host
            .lans
            .iter()
            .map(|lan| lan.network)
            .filter(|lan| !overlay.network.is_some_and(|network| lan.contains(&network)))
            .collect();
        let mut taken: Vec<&(_, Arc<str>, NodeFacts)> = Vec::new();
        for member in &members {
            let facts = &member.2;
            let clash = taken.iter().any(|(_, _, other)| {
                other.mac == facts.mac
                    || other.endpoint == facts.endpoint
                    || other.cidr.contains(&facts.cidr)
                    || facts.cidr.contains(&other.cidr)
            });
            let on_link = lans.iter().any(|lan| lan.contains(&facts.cidr) || facts.cidr.contains(lan));
            if !clash && !on_link {
                taken.push(member);
            }
        }
        let key = |node: &Arc<str>| VtepKey { overlay: id, node: node.clone() };
        for (_, name, facts) in &taken {
            let spec = VtepSpec { endpoint: facts.endpoint, mac: facts.mac, direct: overlay.direct_routing };
            desired.vteps.insert(key(name), spec);
            desired.prefixes.insert((id, facts.cidr), key(name));
        }
        // Weaker claims are overwritten by stronger ones, and of equal ones those of better-ranked nodes come last.
        let mut source = |name: &Arc<str>, address: Ipv4Addr| {
            if address != overlay.local {
                desired.sources.insert((id, address), key(name));
            }
        };
        if overlay.source_check == SourceCheck::Node {
            for (_, name, facts) in taken.iter().rev() {
                facts.addresses.iter().for_each(|address| source(name, *address));
            }
        }
        if overlay.source_check != SourceCheck::Off {
            for (_, name, _) in taken.iter().rev() {
                let extra = overlay.extra_sources.iter().filter(|extra| *extra.node == **name);
                extra.for_each(|extra| source(name, extra.address));
            }
            for (_, name, facts) in taken.iter().rev() {
                source(name, facts.endpoint);
            }
        }
        for (address, claimants) in &claims {
            let bounded = overlay.network.is_some_and(|network| {
                network.contains(address) && !lans.iter().any(|lan| lan.contains(address))
            });
            let mut believed = Vec::new();
            for ((terminating, age, pod), node) in claimants {
                let Some((_, _, facts)) = members.iter().find(|(_, name, _)| name == node) else { continue };
                let at_home = facts.cidr.contains(address);
                if at_home || bounded {
                    believed.push(((*terminating, !at_home, *age, pod.clone()), node));
                }
            }
            believed.sort();
            if let Some((_, node)) = believed.first()
                && taken.iter().any(|(_, name, _)| name == *node)
                && !overlay.subnet.contains(address)
                && !host.own.contains(address)
                && overlay.network.is_none_or(|network| network.contains(address))
            {
                desired.pods.insert((id, *address), key(node));
            }
        }
    }
    desired
}

fn differing<K: Ord + Clone, V: PartialEq>(a: &BTreeMap<K, V>, b: &BTreeMap<K, V>) -> BTreeSet<K> {
    a.keys().chain(b.keys()).filter(|key| a.get(key) != b.get(key)).cloned().collect()
}

fn differences(a: &Desired, b: &Desired) -> Changes {
    Changes {
        vteps: differing(&a.vteps, &b.vteps),
        pods: differing(&a.pods, &b.pods),
        prefixes: differing(&a.prefixes, &b.prefixes),
        sources: differing(&a.sources, &b.sources),
    }
}

fn covers(changes: &Changes, differ: &Changes) -> bool {
    changes.vteps.is_superset(&differ.vteps)
        && changes.pods.is_superset(&differ.pods)
        && changes.prefixes.is_superset(&differ.prefixes)
        && changes.sources.is_superset(&differ.sources)
}

/// What the cluster holds, by the rules of the event model.
#[derive(Default)]
struct Cluster {
    objects: BTreeMap<ObjectRef, Object>,
    listed: Option<BTreeSet<ObjectRef>>,
}

impl Cluster {
    fn apply(&mut self, event: &Event) {
        match event {
            Event::Listing => self.listed = Some(BTreeSet::new()),
            Event::Apply(object) => {
                self.objects.insert(object.reference(), (**object).clone());
                self.listed.iter_mut().for_each(|listed| {
                    listed.insert(object.reference());
                });
            }
            Event::Delete(reference) => {
                self.objects.remove(reference);
            }
            Event::Listed { .. } => {}
            Event::Synced => {
                if let Some(listed) = self.listed.take() {
                    self.objects.retain(|reference, _| listed.contains(reference));
                }
            }
        }
    }
}

// Few values of everything, so that objects clash all the time.
fn any_node() -> impl Strategy<Value = Object> {
    let cidrs = prop::sample::select(vec![
        "10.244.1.0/24",
        "10.244.2.0/24",
        "10.244.2.0/23",
        "10.244.3.0/25",
        "10.244.30.0/24",
        "10.244.31.128/25",
        "",
    ]);
    let prefix = prop::sample::select(vec!["a.example/", "a.example/", "b.example/", "c.example/"]);
    let last = prop::sample::select(vec![1u8, 2, 3, 4, 255, 200]);
    (0..6u8, prop::option::of(0..3i64), prefix, last.clone(), last.clone(), cidrs, last).prop_map(
        |(name, created, prefix, mac, endpoint, cidr, internal)| {
            NodeText { name: format!("n{name}"), created, prefix, mac, endpoint, cidr, internal }.object()
        },
    )
}

fn any_pod() -> impl Strategy<Value = Object> {
    let address = prop::sample::select(vec![
        "10.244.1.2",
        "10.244.2.2",
        "10.244.3.2",
        "10.244.3.200",
        "10.244.30.2",
        "192.0.2.1",
        "no",
    ]);
    let phase = prop::sample::select(vec!["Running", "Running", "Pending", "Succeeded", "Failed"]);
    (0..6u8, 0..7u8, address, prop::option::of(0..3i64), any::<bool>(), phase).prop_map(
        |(name, node, address, created, terminating, phase)| {
            pod(&format!("p{name}"), &format!("n{node}"), address, created, terminating, phase)
        },
    )
}

/// What happens to a planner.
#[derive(Clone, Debug)]
enum Step {
    Event(Event),
    Host(Surroundings),
}

fn any_step() -> impl Strategy<Value = Step> {
    let lans = prop::sample::subsequence(
        vec!["10.244.2.0/25", "10.244.3.0/24", "10.0.0.0/8", "10.244.1.0/24", "10.244.30.0/24"],
        0..3,
    );
    prop_oneof![
        9 => any_event().prop_map(Step::Event),
        1 => (lans, prop::sample::subsequence(vec!["10.244.1.2", "10.244.3.200", "192.0.2.1"], 0..3)).prop_map(|(lans, own)| {
            let own = own.into_iter().map(|address| address.parse().unwrap()).collect();
            Step::Host(Surroundings { lans: lans.into_iter().map(lan).collect(), own })
        }),
    ]
}

fn any_event() -> impl Strategy<Value = Event> {
    prop_oneof![
        6 => any_node().prop_map(apply),
        6 => any_pod().prop_map(apply),
        2 => any_node().prop_map(|object| Event::Delete(object.reference())),
        2 => any_pod().prop_map(|object| Event::Delete(object.reference())),
        1 => Just(Event::Listing),
        1 => Just(Event::Synced),
        1 => any::<bool>().prop_map(|pods| Event::Listed { pods }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn after_any_steps_the_plan_is_the_one_made_afresh(steps in prop::collection::vec(any_step(), 0..40)) {
        let overlays = overlays();
        let mut planner = Planner::new(&overlays);
        let mut cluster = Cluster::default();
        let mut host = Surroundings::default();
        for step in &steps {
            let before = planner.desired().clone();
            let changes = match step {
                Step::Event(event) => {
                    cluster.apply(event);
                    planner.apply(event)
                }
                Step::Host(now) => {
                    host.clone_from(now);
                    planner.set_surroundings(now.clone())
                }
            };
            prop_assert_eq!(planner.desired(), &afresh(&cluster.objects, &overlays, &host), "after {:?}", step);
            let differ = differences(&before, planner.desired());
            match step {
                Step::Event(_) => prop_assert_eq!(changes, differ, "after {:?}", step),
                // A key may be named that changed twice.
                Step::Host(_) => prop_assert!(covers(&changes, &differ), "after {:?}: {:?}", step, changes),
            }
        }
        // The way there does not matter, and neither do the problems that were.
        let mut again = Planner::new(&overlays);
        again.set_surroundings(host.clone());
        for object in cluster.objects.values().rev() {
            again.apply(&apply(object.clone()));
        }
        let sorted = |mut problems: Vec<Problem>| {
            problems.sort();
            problems
        };
        prop_assert_eq!(again.desired(), planner.desired());
        prop_assert_eq!(sorted(again.problems()), sorted(planner.problems()));
    }
}

fn planner(objects: impl IntoIterator<Item = Object>) -> Planner {
    let overlay = Overlay { extra_sources: vec![], ..overlays().remove(0) };
    let mut planner = Planner::new(&[overlay]);
    for object in objects {
        planner.apply(&apply(object));
    }
    planner
}

fn vteps(planner: &Planner) -> Vec<&str> {
    planner.desired().vteps.keys().map(|key| key.node.as_ref()).collect()
}

fn address(text: &str) -> (OverlayId, Ipv4Addr) {
    (0, text.parse().unwrap())
}

/// The trap of flannel-observed: two Nodes with one podCIDR; deleting one of them must not take the other's route.
#[test]
fn the_older_node_keeps_its_cidr_and_the_younger_takes_over() {
    let old = node_text("z-old", 1, "10.244.1.0/24");
    let young = node_text("a-young", 2, "10.244.1.0/24");
    let mut planner = planner([young.object(), old.object(), running("p", "a-young", "10.244.1.5")]);
    assert_eq!(vteps(&planner), ["z-old"]);
    assert!(planner.desired().pods.is_empty(), "its node is no VTEP");
    let problems = planner.problems();
    assert_eq!(problems.len(), 1, "{problems:#?}");
    assert_eq!(problems[0].severity, Severity::Error);
    assert_eq!(problems[0].place, "Node a-young, spec.podCIDR");
    assert!(
        problems[0].what.contains("podCIDR 10.244.1.0/24 is also that of Node z-old"),
        "{}",
        problems[0].what
    );

    let changes = planner.apply(&Event::Delete(ObjectRef::node("z-old")));
    assert_eq!(vteps(&planner), ["a-young"]);
    let cidr = (0, "10.244.1.0/24".parse().unwrap());
    assert_eq!(planner.desired().prefixes[&cidr].node.as_ref(), "a-young");
    assert_eq!(planner.desired().pods[&address("10.244.1.5")].node.as_ref(), "a-young");
    assert!(changes.prefixes.contains(&cidr) && changes.pods.contains(&address("10.244.1.5")));
    assert_eq!(planner.problems(), []);
}

#[test]
fn a_pod_waits_for_its_node() {
    let mut planner = planner([running("p", "n1", "10.244.1.5")]);
    assert!(planner.desired().pods.is_empty());
    let changes = planner.apply(&apply(node_text("n1", 1, "10.244.1.0/24").object()));
    assert_eq!(changes.pods, BTreeSet::from([address("10.244.1.5")]));
    planner.apply(&Event::Delete(ObjectRef::node("n1")));
    assert_eq!(planner.desired(), &Desired::default());
}

#[test]
fn an_address_goes_to_the_newest_pod_that_stays() {
    let nodes = [node_text("n1", 1, "10.244.1.0/24").object(), node_text("n2", 2, "10.244.2.0/24").object()];
    let mut planner = planner(nodes);
    planner.apply(&apply(pod("old", "n1", "10.244.9.5", Some(1), false, "Running")));
    planner.apply(&apply(pod("new", "n2", "10.244.9.5", Some(2), false, "Running")));
    assert_eq!(planner.desired().pods[&address("10.244.9.5")].node.as_ref(), "n2");
    assert!(planner.problems().iter().any(|problem| problem.place == "Pod default/old, status.podIP"));
    planner.apply(&apply(pod("new", "n2", "10.244.9.5", Some(2), true, "Running")));
    assert_eq!(planner.desired().pods[&address("10.244.9.5")].node.as_ref(), "n1");
    planner.apply(&Event::Delete(ObjectRef::pod("default", "old")));
    assert_eq!(planner.desired().pods[&address("10.244.9.5")].node.as_ref(), "n2");
}

#[test]
fn a_node_that_changes_keeps_its_other_entries() {
    let mut planner =
        planner([node_text("n1", 1, "10.244.1.0/24").object(), running("p", "n1", "10.244.1.5")]);
    let changed = NodeText { mac: 9, ..node_text("n1", 1, "10.244.1.0/24") };
    let changes = planner.apply(&apply(changed.object()));
    let key = VtepKey { overlay: 0, node: "n1".into() };
    assert_eq!(changes, Changes { vteps: BTreeSet::from([key.clone()]), ..Changes::default() });
    assert_eq!(planner.desired().vteps[&key].mac.octets[5], 9);
    assert!(planner.apply(&apply(changed.object())).is_empty(), "the same again is no change");
}

#[test]
fn a_new_listing_removes_what_it_does_not_name_and_nothing_before_its_end() {
    let kept = node_text("n1", 1, "10.244.1.0/24");
    let mut planner = planner([kept.object(), node_text("n2", 2, "10.244.2.0/24").object()]);
    assert!(planner.apply(&Event::Listing).is_empty());
    assert!(planner.apply(&apply(kept.object())).is_empty());
    assert_eq!(vteps(&planner), ["n1", "n2"]);
    assert!(!planner.is_synced());
    let changes = planner.apply(&Event::Synced);
    assert_eq!(vteps(&planner), ["n1"]);
    assert_eq!(changes.vteps, BTreeSet::from([VtepKey { overlay: 0, node: "n2".into() }]));
    assert!(planner.is_synced());
}

/// A NAT in front of two nodes: the address can belong to one only, and the user hears of it.
#[test]
fn a_shared_outer_source_is_reported() {
    let first = NodeText { internal: 77, ..node_text("n1", 1, "10.244.1.0/24") };
    let second = NodeText { internal: 77, ..node_text("n2", 2, "10.244.2.0/24") };
    let planner = planner([second.object(), first.object()]);
    assert_eq!(planner.desired().sources[&address("172.16.2.77")].node.as_ref(), "n1");
    let problems = planner.problems();
    assert_eq!(problems.len(), 1, "{problems:#?}");
    let place = "Node n2, status.addresses";
    assert_eq!((problems[0].severity, problems[0].place.as_str()), (Severity::Warning, place));
}

#[test]
fn a_pod_in_the_gateways_subnet_takes_nobodys_address() {
    let planner = planner([node_text("n1", 1, "10.244.1.0/24").object(), running("p", "n1", "10.244.30.9")]);
    assert!(planner.desired().pods.is_empty());
    assert!(planner.problems()[0].what.contains("the gateway's own subnet"), "{:?}", planner.problems());
}

/// A pod that claims somebody else's address must not make the gateway answer ARP for it.
#[test]
fn a_pod_outside_of_the_network_takes_nobodys_address() {
    let mut planner = Planner::new(&overlays()[..1]);
    let node = node_text("n1", 1, "10.244.1.0/24").object();
    for object in [node, running("good", "n1", "10.244.9.5"), running("bad", "n1", "192.168.1.1")] {
        planner.apply(&apply(object));
    }
    assert_eq!(planner.desired().pods.keys().collect::<Vec<_>>(), [&address("10.244.9.5")]);
    let problems = planner.problems();
    let found = problems.iter().find(|problem| problem.place == "Pod default/bad, status.podIP").unwrap();
    assert!(
        found.severity == Severity::Error && found.what.contains("outside of 10.244.0.0/16"),
        "{found:?}"
    );
}

/// Without a network that bounds it, flannel gives out addresses of the node's podCIDR only.
#[test]
fn without_a_network_a_pod_is_in_its_nodes_cidr() {
    let mut planner = Planner::new(&overlays()[2..]);
    let node = node_text("n1", 1, "10.244.1.0/24").object();
    for object in [node, running("good", "n1", "10.244.1.5"), running("bad", "n1", "192.168.1.1")] {
        planner.apply(&apply(object));
    }
    assert_eq!(planner.desired().pods.keys().collect::<Vec<_>>(), [&address("10.244.1.5")]);
    let [problem] = &planner.problems()[..] else { panic!("{:?}", planner.problems()) };
    assert_eq!(
        (problem.severity, problem.place.as_str()),
        (Severity::Error, "Pod default/bad, status.podIP")
    );
    assert!(problem.remedy.contains("set network of overlay"), "{problem:?}");
}

/// A node's word takes no address from a pod that is where its podCIDR is.
#[test]
fn a_stray_pod_takes_no_address_from_one_that_is_at_home() {
    let nodes = [node_text("n1", 1, "10.244.1.0/24").object(), node_text("n2", 2, "10.244.2.0/24").object()];
    let mut planner = planner(nodes);
    planner.apply(&apply(pod("home", "n1", "10.244.1.5", Some(1), false, "Running")));
    planner.apply(&apply(pod("stray", "n2", "10.244.1.5", Some(2), false, "Running")));
    assert_eq!(planner.desired().pods[&address("10.244.1.5")].node.as_ref(), "n1");
    let told = |planner: &Planner, what: &str| {
        let told = planner
            .problems()
            .iter()
            .any(|problem| problem.place == "Pod default/stray, status.podIP" && problem.what.contains(what));
        assert!(told, "{what}: {:#?}", planner.problems());
    };
    told(&planner, "also that of Pod default/home");
    planner.apply(&Event::Delete(ObjectRef::pod("default", "home")));
    assert_eq!(planner.desired().pods[&address("10.244.1.5")].node.as_ref(), "n2", "it has moved");
    told(&planner, "outside of 10.244.2.0/24");
}

/// The gateway would answer ARP for the hosts of its own LAN, and send what is theirs into the tunnel.
#[test]
fn pods_are_not_on_the_lans_of_this_host() {
    let node = node_text("n1", 1, "10.244.1.0/24").object();
    let objects = [node, running("p", "n1", "10.244.1.5"), running("stray", "n1", "10.244.9.5")];
    let told = |planner: &Planner, place: &str, what: &str| {
        let found = planner.problems().into_iter().find(|problem| problem.place == place);
        let found = found.unwrap_or_else(|| panic!("{place}: {:#?}", planner.problems()));
        assert!(found.severity == Severity::Error && found.what.contains(what), "{found:?}");
    };
    // With a network: a LAN in it is none of the cluster's, however the two lie in each other.
    let mut planner = planner(objects.clone());
    let whole = planner.desired().clone();
    for lan in ["10.244.1.0/24", "10.244.1.64/26", "10.244.0.0/20"].map(lan) {
        let changes = planner.set_surroundings(on([lan.clone()]));
        assert!(
            vteps(&planner).is_empty() && changes.vteps.len() == 1 && !changes.pods.is_empty(),
            "{lan:?}"
        );
        told(&planner, "Node n1, spec.podCIDR", &format!("overlaps {}, the network", lan.network));
        planner.set_surroundings(Surroundings::default());
        assert_eq!(planner.desired(), &whole);
    }
    planner.set_surroundings(on([lan("10.244.9.0/24")]));
    assert_eq!(planner.desired().pods.keys().collect::<Vec<_>>(), [&address("10.244.1.5")]);
    told(&planner, "Pod default/stray, status.podIP", "in 10.244.9.0/24");
    // Stations that have the pod network on their link ask for pods by ARP.
    for around in ["10.244.0.0/16", "10.0.0.0/8"] {
        planner.set_surroundings(on([lan(around)]));
        assert_eq!(planner.desired(), &whole, "{around}");
    }
    // Without a network nobody says so.
    let mut planner = Planner::new(&overlays()[2..]);
    planner.set_surroundings(on([lan("10.0.0.0/8")]));
    for object in objects {
        planner.apply(&apply(object));
    }
    assert_eq!(planner.desired().vteps.len(), 0);
    let place = "Node n1, spec.podCIDR";
    told(&planner, place, "overlaps 10.0.0.0/8");
    let remedies: Vec<String> = planner.problems().into_iter().map(|problem| problem.remedy).collect();
    assert!(remedies.iter().any(|remedy| remedy.contains("set the overlay's network")), "{remedies:?}");
    planner.set_surroundings(Surroundings::default());
    assert_eq!(vteps(&planner), ["n1"]);
}

/// The XDP program does not ask whose an address is that the pod table has.
#[test]
fn no_pod_has_an_address_of_this_host() {
    let node = node_text("n1", 1, "10.244.1.0/24").object();
    let mut planner = planner([node, running("p", "n1", "10.244.1.5"), running("q", "n1", "10.244.1.6")]);
    let whole = planner.desired().clone();
    let own = [Ipv4Addr::new(10, 244, 1, 5)].into();
    let changes = planner.set_surroundings(Surroundings { own, ..Surroundings::default() });
    assert_eq!(changes.pods.into_iter().collect::<Vec<_>>(), [address("10.244.1.5")]);
    assert_eq!(planner.desired().pods.keys().collect::<Vec<_>>(), [&address("10.244.1.6")]);
    let problems = planner.problems();
    assert!(problems.iter().any(|found| found.place == "Pod default/p, status.podIP"), "{problems:#?}");
    planner.set_surroundings(Surroundings::default());
    assert_eq!(planner.desired(), &whole);
}

/// The size that the design aims for, in an order that makes every pod wait for its node.
#[test]
fn five_thousand_nodes_and_their_pods() {
    const NODES: u32 = 5_000;
    const PODS_PER_NODE: u32 = 30;
    let mut planner = Planner::new(&overlays()[2..]);
    let at = |index: u32, host: u32| Ipv4Addr::from(0x0a80_0000 + (index << 8) + host);
    for index in 0..NODES {
        for host in 2..PODS_PER_NODE + 2 {
            let name = format!("p{index}-{host}");
            planner.apply(&apply(running(&name, &format!("n{index}"), &at(index, host).to_string())));
        }
    }
    for index in 0..NODES {
        let mut node = node_text("", 1, "");
        node.name = format!("n{index}");
        let Object::Node(mut object, origin) = node.object() else { unreachable!() };
        let annotations = object.metadata.annotations.as_mut().unwrap();
        let [_, _, c, d] = index.to_be_bytes();
        annotations.insert("a.example/public-ip".into(), format!("172.20.{c}.{d}"));
        let mac = format!(r#"{{"VtepMAC":"0e:00:00:01:{c:02x}:{d:02x}"}}"#);
        annotations.insert("a.example/backend-data".into(), mac);
        object.spec.as_mut().unwrap().pod_cidr = Some(format!("{}/24", at(index, 0)));
        let changes = planner.apply(&apply(Object::Node(object, origin)));
        assert_eq!(changes.pods.len(), PODS_PER_NODE as usize);
    }
    assert_eq!(planner.desired().vteps.len(), NODES as usize);
    assert_eq!(planner.desired().pods.len(), (NODES * PODS_PER_NODE) as usize);
    let changes = planner.apply(&Event::Delete(ObjectRef::node("n17")));
    assert_eq!(
        (changes.vteps.len(), changes.prefixes.len(), changes.pods.len()),
        (1, 1, PODS_PER_NODE as usize)
    );
}
