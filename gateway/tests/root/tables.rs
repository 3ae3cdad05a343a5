//! Batches, pins and the reconciler on real maps.

use std::{collections::BTreeMap, net::Ipv4Addr, path::Path, sync::Arc};

use aya::maps::MapInfo;
use gateway::{
    config::Config,
    dataplane::{
        load::{LoadError, Programs},
        pins::{InstanceLock, PinError, Pins, run_directory},
        reconcile::{Reconciler, Scope},
        tables::{Tables, TrieKey},
        template,
    },
    kernel::underlay::{NextHop, ReadyHop},
    plan::{Changes, Desired, VtepKey, VtepSpec},
};
use gateway_common::{
    abi::{OverlayAddress, PrefixKey, Route, Vtep, VtepFlags, VtepSlot},
    wire::Mac,
};

use crate::sandbox::{config, isolated, sh};

pub(crate) fn prepare(config: &Config) -> Tables {
    let mut programs =
        Programs::prepare(Pins::new(&config.datapath.bpffs, &config.instance), config).unwrap();
    programs.create_tables().unwrap();
    Tables::open(programs.pins()).unwrap()
}

fn pod(number: u32) -> OverlayAddress {
    OverlayAddress { overlay: 0, address: Ipv4Addr::from(0x0af4_0000 + number).into() }
}

#[test]
fn hash_batches_write_read_and_delete() {
    isolated(async |bpffs: &Path| {
        let tables = prepare(&config(bpffs));
        // More than two chunks.
        let entries: Vec<_> = (0..10_000).map(|n| (pod(n), Route::to(n))).collect();
        tables.pods.write(&entries).unwrap();
        assert_eq!(tables.pods.read().unwrap(), entries.iter().copied().collect());

        // Absent keys in the middle of a batch do not stop it.
        let mut keys: Vec<_> = (0..5000).map(pod).collect();
        keys.insert(2500, pod(999_999));
        keys.insert(10, pod(999_998));
        tables.pods.delete(&keys).unwrap();
        assert_eq!(tables.pods.read().unwrap(), entries[5000..].iter().copied().collect());
    });
}

#[test]
fn trie_batches_write_read_and_delete() {
    isolated(async |bpffs: &Path| {
        let tables = prepare(&config(bpffs));
        let key = |n: u32| TrieKey {
            length: PrefixKey::OVERLAY_BITS + 24,
            data: PrefixKey { overlay: 1, address: Ipv4Addr::from(n << 8).into() },
        };
        let entries: BTreeMap<_, _> = (0..6000).map(|n| (key(n), Route::to(n))).collect();
        tables.prefixes.write(&entries.clone().into_iter().collect::<Vec<_>>()).unwrap();
        assert_eq!(tables.prefixes.read().unwrap(), entries);
        tables.prefixes.delete(&(0..6000).map(key).collect::<Vec<_>>()).unwrap();
        assert!(tables.prefixes.read().unwrap().is_empty());
    });
}

#[test]
fn a_full_table_tells_how_far_it_came() {
    isolated(async |bpffs: &Path| {
        let tables = prepare(&config(bpffs));
        let entries: Vec<_> = (0..1500).map(|n| (pod(n), Route::to(n))).collect();
        let (done, error) = tables.sources.write(&entries).unwrap_err();
        assert_eq!(done, 1000);
        assert!(error.to_string().contains("table SOURCES") && error.to_string().contains("full"), "{error}");
        assert_eq!(tables.sources.read().unwrap().len(), 1000);
    });
}

#[test]
fn arrays_are_read_whole() {
    isolated(async |bpffs: &Path| {
        let tables = prepare(&config(bpffs));
        assert_eq!(tables.vteps.read().unwrap().len(), 64);
        let counters = tables.counters.read().unwrap();
        assert!(counters.len() > 40 && counters.iter().all(|(_, counter)| counter.packets == 0));
    });
}

/// What the loader makes is what the daemon expects, also the second time.
#[test]
fn pins_are_compared_before_they_are_used() {
    isolated(async |bpffs: &Path| {
        let config = config(bpffs);
        prepare(&config);
        let id = || MapInfo::from_pin(Pins::new(bpffs, "test").map("PODS")).unwrap().id();
        let before = id();
        prepare(&config);
        assert_eq!(id(), before, "the second load adopts the maps");

        let pins = || Pins::new(bpffs, "test");
        // Another type under the right name.
        let pods = pins().map("PODS");
        std::fs::remove_file(&pods).unwrap();
        sh(&format!(
            "bpftool map create {} type array key 4 value 8 entries 20000 name PODS",
            pods.display()
        ));
        let error = Programs::prepare(pins(), &config).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, LoadError::Pin(PinError::Mismatch { .. })), "{text}");
        for word in ["/v1/maps/PODS", "Array", "Hash", "gateway detach"] {
            assert!(text.contains(word), "{word} in: {text}");
        }
        assert!(matches!(Tables::open(&pins()), Err(PinError::Mismatch { .. })));

        assert!(pins().remove().unwrap());
        assert!(!pins().directory().exists());
        assert!(!pins().remove().unwrap());
    });
}

#[test]
fn one_daemon_for_each_instance() {
    let name = format!("test-lock-{}", std::process::id());
    let lock = InstanceLock::take(&name).unwrap();
    assert_eq!(InstanceLock::holder(&name).unwrap(), Some(std::process::id()));
    let error = InstanceLock::take(&name).unwrap_err().to_string();
    assert!(error.contains(&format!("process {}", std::process::id())), "{error}");
    drop(lock);
    assert_eq!(InstanceLock::holder(&name).unwrap(), None);
    assert!(run_directory(&name).join("lock").exists());
    InstanceLock::take(&name).unwrap().remove().unwrap();
    assert!(!run_directory(&name).exists());
}

pub(crate) fn key(node: &str) -> VtepKey {
    VtepKey { overlay: 0, node: Arc::from(node) }
}

fn spec(octet: u8) -> VtepSpec {
    VtepSpec {
        endpoint: Ipv4Addr::new(172, 16, 2, octet),
        mac: Mac::new([2, 0, 0, 0, 0, octet]),
        direct: false,
    }
}

/// Nodes with one pod and one prefix each.
pub(crate) fn cluster(nodes: &[(&str, u8)]) -> Desired {
    let mut desired = Desired::default();
    for (name, octet) in nodes {
        desired.vteps.insert(key(name), spec(*octet));
        desired.pods.insert((0, Ipv4Addr::new(10, 244, *octet, 2)), key(name));
        desired.prefixes.insert((0, format!("10.244.{octet}.0/24").parse().unwrap()), key(name));
        desired.sources.insert((0, spec(*octet).endpoint), key(name));
    }
    desired
}

pub(crate) fn slots(config: &Config, desired: &Desired, hop: &NextHop) -> BTreeMap<VtepKey, VtepSlot> {
    let slot =
        |(key, vtep): (&VtepKey, &VtepSpec)| (key.clone(), template::slot(0, &config.overlays[0], vtep, hop));
    desired.vteps.iter().map(slot).collect()
}

pub(crate) fn hop(octet: u8) -> NextHop {
    NextHop::Ready(ReadyHop {
        ifindex: 2,
        vlan: None,
        source: Mac::new([2, 1, 0, 0, 0, 1]),
        destination: Mac::new([2, 2, 0, 0, 0, octet]),
        mtu: 1500,
        on_link: true,
    })
}

fn used(vteps: &BTreeMap<u32, Vtep>) -> Vec<u32> {
    vteps.iter().filter(|(_, vtep)| vtep.slot().flags.has(VtepFlags::USED)).map(|(id, _)| *id).collect()
}

#[test]
fn tables_follow_the_plan_and_survive_a_restart() {
    isolated(async |bpffs: &Path| {
        let config = config(bpffs);
        let mut reconciler = Reconciler::adopt(prepare(&config)).unwrap();
        let look = Tables::open(&Pins::new(bpffs, "test")).unwrap();

        let two = cluster(&[("b", 11), ("c", 12)]);
        let pass = reconciler.apply(&two, &slots(&config, &two, &hop(1)), Scope::Everything);
        assert_eq!((pass.written, pass.deleted, pass.problems.len()), (8, 0, 0));
        let id_b = reconciler.vtep_id(&key("b")).unwrap();
        let first = look.vteps.read().unwrap()[&id_b];
        assert_eq!(first.slot(), &slots(&config, &two, &hop(1))[&key("b")]);
        assert_eq!(look.pods.read().unwrap().len(), 2);

        // A next hop that moves flips the slot; the old one stays as it was for those that still read it.
        let moved = Changes { vteps: two.vteps.keys().cloned().collect(), ..Changes::default() };
        reconciler.apply(&two, &slots(&config, &two, &hop(2)), Scope::Only(&moved));
        let second = look.vteps.read().unwrap()[&id_b];
        assert_eq!(second.active, 1 - first.active);
        assert_eq!(second.slots[first.active as usize], *first.slot());
        assert_eq!(second.slot().next_hop, Mac::new([2, 2, 0, 0, 0, 2]));
        assert_eq!(second.generation, first.generation);

        // Nothing to do is nothing done.
        let pass = reconciler.apply(&two, &slots(&config, &two, &hop(2)), Scope::Everything);
        assert_eq!((pass.written, pass.deleted), (0, 0));

        // A new daemon, and a node that sorts first: the old ones keep their ids.
        let mut restarted = Reconciler::adopt(Tables::open(&Pins::new(bpffs, "test")).unwrap()).unwrap();
        let three = cluster(&[("a", 10), ("b", 11), ("c", 12)]);
        let pass = restarted.apply(&three, &slots(&config, &three, &hop(2)), Scope::Everything);
        assert_eq!((pass.written, pass.deleted), (4, 0));
        assert_eq!(restarted.vtep_id(&key("b")), Some(id_b));
        assert_eq!(used(&look.vteps.read().unwrap()).len(), 3);

        // One event touches its keys only, and takes the node's entry with it.
        let without = cluster(&[("a", 10), ("c", 12)]);
        let changes = Changes {
            vteps: [key("b")].into(),
            pods: [(0, Ipv4Addr::new(10, 244, 11, 2))].into(),
            prefixes: ["10.244.11.0/24".parse().map(|net| (0, net)).unwrap()].into(),
            sources: [(0, spec(11).endpoint)].into(),
        };
        let pass = restarted.apply(&without, &slots(&config, &without, &hop(2)), Scope::Only(&changes));
        assert_eq!((pass.written, pass.deleted), (0, 4));
        let vteps = look.vteps.read().unwrap();
        assert!(!used(&vteps).contains(&id_b));
        assert!(vteps[&id_b].generation > second.generation);
        assert_eq!(look.pods.read().unwrap().len(), 2);
    });
}

#[test]
fn an_id_waits_for_its_last_reference() {
    isolated(async |bpffs: &Path| {
        let config = config(bpffs);
        let mut reconciler = Reconciler::adopt(prepare(&config)).unwrap();
        let one = cluster(&[("a", 10)]);
        reconciler.apply(&one, &slots(&config, &one, &hop(1)), Scope::Everything);
        let id = reconciler.vtep_id(&key("a")).unwrap();

        // The pod still names the node when it goes: its event comes later.
        let mut next = cluster(&[("z", 20)]);
        let pod = *one.pods.keys().next().unwrap();
        next.pods.insert(pod, key("a"));
        let mut changes = Changes { vteps: [key("a"), key("z")].into(), ..Changes::default() };
        changes.prefixes = one.prefixes.keys().chain(next.prefixes.keys()).copied().collect();
        changes.sources = one.sources.keys().chain(next.sources.keys()).copied().collect();
        reconciler.apply(&next, &slots(&config, &next, &hop(1)), Scope::Only(&changes));
        assert_ne!(reconciler.vtep_id(&key("z")), Some(id));

        next.pods.remove(&pod);
        let changes = Changes { pods: [pod].into(), ..Changes::default() };
        reconciler.apply(&next, &slots(&config, &next, &hop(1)), Scope::Only(&changes));
        let look = Tables::open(&Pins::new(bpffs, "test")).unwrap();
        assert!(!used(&look.vteps.read().unwrap()).contains(&id));
    });
}

#[test]
fn a_full_pass_mends_what_somebody_changed() {
    isolated(async |bpffs: &Path| {
        let config = config(bpffs);
        let mut reconciler = Reconciler::adopt(prepare(&config)).unwrap();
        let goal = cluster(&[("a", 10), ("b", 11)]);
        let slots = slots(&config, &goal, &hop(1));
        reconciler.apply(&goal, &slots, Scope::Everything);
        let look = Tables::open(&Pins::new(bpffs, "test")).unwrap();
        let good = (look.pods.read().unwrap(), look.vteps.read().unwrap());

        let pods: Vec<_> = good.0.keys().copied().collect();
        look.pods.delete(&pods[..1]).unwrap();
        look.pods.write(&[(pod(77), Route::to(5)), (pods[1], Route::to(63))]).unwrap();
        reconciler.reread().unwrap();
        let pass = reconciler.apply(&goal, &slots, Scope::Everything);
        assert_eq!((pass.written, pass.deleted), (2, 1));
        assert_eq!((look.pods.read().unwrap(), look.vteps.read().unwrap()), good);
    });
}

#[test]
fn more_nodes_than_entries_is_a_problem_of_those_nodes_only() {
    isolated(async |bpffs: &Path| {
        let config = config(bpffs);
        let mut reconciler = Reconciler::adopt(prepare(&config)).unwrap();
        let names: Vec<String> = (0..70).map(|n| format!("n{n:02}")).collect();
        let nodes: Vec<(&str, u8)> = names.iter().map(String::as_str).zip(1..).collect();
        let goal = cluster(&nodes);
        let pass = reconciler.apply(&goal, &slots(&config, &goal, &hop(1)), Scope::Everything);
        assert_eq!(pass.problems.len(), 1);
        assert!(
            pass.problems[0].contains("6 nodes") && pass.problems[0].contains("max_vteps"),
            "{:?}",
            pass.problems
        );
        let look = Tables::open(&Pins::new(bpffs, "test")).unwrap();
        assert_eq!((used(&look.vteps.read().unwrap()).len(), look.pods.read().unwrap().len()), (64, 64));
        let reached = |name: &str| reconciler_has(&reconciler, name);
        assert!(reached("n63") && !reached("n64"), "the first by name");

        // Three go, and in the next full pass three of those that wait have their place.
        let rest = cluster(&nodes[3..]);
        let gone = goal.vteps.keys().filter(|key| !rest.vteps.contains_key(*key)).cloned().collect();
        let changes = Changes {
            vteps: gone,
            pods: goal.pods.keys().filter(|key| !rest.pods.contains_key(*key)).copied().collect(),
            prefixes: goal.prefixes.keys().filter(|key| !rest.prefixes.contains_key(*key)).copied().collect(),
            sources: goal.sources.keys().filter(|key| !rest.sources.contains_key(*key)).copied().collect(),
        };
        let slots = slots(&config, &rest, &hop(1));
        reconciler.apply(&rest, &slots, Scope::Only(&changes));
        let pass = reconciler.apply(&rest, &slots, Scope::Everything);
        assert!(pass.problems.len() == 1 && pass.problems[0].contains("3 nodes"), "{:?}", pass.problems);
        let reached = |name: &str| reconciler_has(&reconciler, name);
        assert!(reached("n66") && !reached("n67"));
        assert_eq!((used(&look.vteps.read().unwrap()).len(), look.pods.read().unwrap().len()), (64, 64));
    });
}

fn reconciler_has(reconciler: &Reconciler, node: &str) -> bool {
    reconciler.vtep_id(&key(node)).is_some()
}

/// Sessions look for their pod again when the generation of the entry by which it was reached rises; those of pods that are
/// gone are ended by name.
#[test]
fn pods_that_leave_a_node_raise_its_generation() {
    isolated(async |bpffs: &Path| {
        let config = config(bpffs);
        let mut nodes = cluster(&[("a", 10), ("b", 11)]);
        let mut reconciler = Reconciler::adopt(prepare(&config)).unwrap();
        let tables = Tables::open(&Pins::new(bpffs, "test")).unwrap();
        let slots = slots(&config, &nodes, &hop(1));
        reconciler.apply(&nodes, &slots, Scope::Everything);
        let ids = ["a", "b"].map(|name| reconciler.vtep_id(&key(name)).unwrap());
        let generations = || ids.map(|id| tables.vteps.get(&id).unwrap().unwrap().generation);
        let (pod, cidr) = ((0, Ipv4Addr::new(10, 244, 10, 2)), (0, "10.244.10.0/24".parse().unwrap()));
        let pods = Changes { pods: [pod].into(), ..Changes::default() };
        let prefixes = Changes { prefixes: [cidr].into(), ..Changes::default() };
        let [a, b] = generations();
        assert_eq!(reconciler.apply(&nodes, &slots, Scope::Everything).gone_pods, []);
        assert_eq!(generations(), [a, b], "nothing moved");

        nodes.pods.insert(pod, key("b"));
        assert_eq!(reconciler.apply(&nodes, &slots, Scope::Only(&pods)).gone_pods, []);
        assert_eq!(generations(), [a + 1, b], "it left a");
        // Without an entry of its own it is where its prefix is.
        nodes.pods.remove(&pod);
        let gone = reconciler.apply(&nodes, &slots, Scope::Only(&pods)).gone_pods;
        assert_eq!(gone, [OverlayAddress { overlay: 0, address: pod.1.into() }]);
        assert_eq!(generations(), [a + 1, b + 1]);
        nodes.pods.insert(pod, key("b"));
        reconciler.apply(&nodes, &slots, Scope::Only(&pods));
        assert_eq!(generations(), [a + 2, b + 1], "it left the prefix");
        nodes.prefixes.insert(cidr, key("b"));
        reconciler.apply(&nodes, &slots, Scope::Only(&prefixes));
        assert_eq!(generations(), [a + 3, b + 1], "so did all others there");
        nodes.prefixes.remove(&cidr);
        reconciler.apply(&nodes, &slots, Scope::Only(&prefixes));
        assert_eq!(generations(), [a + 3, b + 2]);
    });
}
