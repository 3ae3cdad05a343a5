//! What a new daemon does with what the last one left.

use std::path::Path;

use aya::maps::MapInfo;
use gateway::{
    config::Config,
    dataplane::{
        load::{LoadError, Programs},
        pins::Pins,
        reconcile::{Reconciler, Scope},
        tables::{MoveError, Tables},
        template,
    },
    kernel::underlay::NextHop,
    plan::Changes,
};
use gateway_common::abi::{VtepFlags, map};

use crate::{
    sandbox::{config, isolated, sh},
    tables::{cluster, hop, key, prepare, slots},
};

fn pins(bpffs: &Path) -> Pins {
    Pins::new(bpffs, "test")
}

fn programs(config: &Config) -> Programs {
    Programs::prepare(pins(&config.datapath.bpffs), config).unwrap()
}

fn capacities(bpffs: &Path) -> [u32; 4] {
    [map::PODS, map::PREFIXES, map::VTEPS, map::SOURCES]
        .map(|name| MapInfo::from_pin(pins(bpffs).map(name)).unwrap().max_entries())
}

/// Makes tables with three nodes in them.
fn populate(config: &Config) {
    let nodes = cluster(&[("a", 10), ("b", 11), ("c", 12)]);
    let mut reconciler = Reconciler::adopt(prepare(config)).unwrap();
    reconciler.apply(&nodes, &slots(config, &nodes, &hop(1)), Scope::Everything);
}

fn contents(tables: &Tables) -> impl PartialEq + std::fmt::Debug + use<> {
    let used: Vec<_> =
        tables.vteps.read().unwrap().into_iter().filter(|(_, vtep)| vtep.generation > 0).collect();
    (tables.pods.read().unwrap(), tables.prefixes.read().unwrap(), tables.sources.read().unwrap(), used)
}

#[test]
fn tables_move_to_another_size_with_all_they_hold() {
    isolated(async |bpffs: &Path| {
        let mut config = config(bpffs);
        populate(&config);
        let before = contents(&Tables::open(&pins(bpffs)).unwrap());
        let counters = MapInfo::from_pin(pins(bpffs).map(map::COUNTERS)).unwrap().id();
        for sizes in [[40_000, 20_000, 128, 2000], [3, 3, 3, 3]] {
            [
                config.datapath.max_pods,
                config.datapath.max_prefixes,
                config.datapath.max_vteps,
                config.datapath.max_sources,
            ] = sizes;
            let mut programs = programs(&config);
            programs.create_tables().unwrap();
            // Until every program uses them, the instance is known by the old ones.
            assert_ne!(capacities(bpffs), sizes);
            assert_eq!(contents(&Tables::open(programs.pins()).unwrap()), before);
            programs.settle_tables().unwrap();
            assert_eq!(capacities(bpffs), sizes);
            assert_eq!(contents(&Tables::open(&pins(bpffs)).unwrap()), before);
        }
        assert_eq!(MapInfo::from_pin(pins(bpffs).map(map::COUNTERS)).unwrap().id(), counters);
        assert_eq!(sh(&format!("ls {}/gateway/test/v1", bpffs.display())), "links\nmaps\n");
    });
}

#[test]
fn a_move_that_was_cut_off_begins_again() {
    isolated(async |bpffs: &Path| {
        let config = config(bpffs);
        populate(&config);
        let before = contents(&Tables::open(&pins(bpffs)).unwrap());
        let mut larger = config.clone();
        larger.datapath.max_pods = 30_000;
        let mut cut_off = programs(&larger);
        cut_off.create_tables().unwrap();
        let successor = cut_off.pins().map(map::PODS);
        drop(cut_off);
        assert!(successor.exists());

        // The old size again, or the new one: what was begun is of no consequence.
        programs(&config).create_tables().unwrap();
        assert!(!successor.exists());
        assert_eq!(capacities(bpffs)[0], 20_000);
        assert_eq!(contents(&Tables::open(&pins(bpffs)).unwrap()), before);
        let mut again = programs(&larger);
        again.create_tables().unwrap();
        again.settle_tables().unwrap();
        assert_eq!(capacities(bpffs)[0], 30_000);
        assert_eq!(contents(&Tables::open(&pins(bpffs)).unwrap()), before);
    });
}

#[test]
fn a_size_that_is_too_small_changes_nothing() {
    isolated(async |bpffs: &Path| {
        let config = config(bpffs);
        populate(&config);
        let before = (capacities(bpffs), contents(&Tables::open(&pins(bpffs)).unwrap()));
        for (name, shrink) in [
            (map::PODS, (|config: &mut Config| config.datapath.max_pods = 2) as fn(&mut Config)),
            (map::VTEPS, |config| config.datapath.max_vteps = 2),
        ] {
            let mut smaller = config.clone();
            shrink(&mut smaller);
            let error = programs(&smaller).create_tables().unwrap_err();
            let text = error.to_string();
            assert!(
                matches!(error, LoadError::Move(MoveError::TooSmall { table, needed: 3, capacity: 2 }) if table == name),
                "{text}"
            );
            assert!(text.contains(name) && text.contains("[datapath]"), "{text}");
            assert_eq!((capacities(bpffs), contents(&Tables::open(&pins(bpffs)).unwrap())), before);
        }
    });
}

#[test]
fn another_abi_is_left_alone_and_goes_with_detach() {
    isolated(async |bpffs: &Path| {
        let config = config(bpffs);
        prepare(&config);
        let other = pins(bpffs).directory().join("v999");
        sh(&format!(
            "mkdir -p {0}/maps && bpftool map create {0}/maps/PODS type array key 4 value 8 entries 1 name PODS",
            other.display()
        ));
        assert_eq!(pins(bpffs).other_versions().unwrap(), std::slice::from_ref(&other));
        prepare(&config);
        assert!(other.join("maps/PODS").exists());
        assert!(pins(bpffs).remove().unwrap());
        assert!(!other.exists());
    });
}

#[test]
fn a_next_hop_that_is_not_known_yet_takes_nothing_away() {
    isolated(async |bpffs: &Path| {
        let config = config(bpffs);
        populate(&config);
        let reconciler = Reconciler::adopt(Tables::open(&pins(bpffs)).unwrap()).unwrap();
        assert_eq!(reconciler.adopted().count(), 3);
        let nodes = cluster(&[("b", 11)]);
        let pending = NextHop::Pending { reason: "not looked up yet".to_owned(), way: None };
        let spec = nodes.vteps[&key("b")];
        let unresolved = template::slot(0, &config.overlays[0], &spec, &pending);
        assert!(!unresolved.flags.has(VtepFlags::READY));
        let standing = reconciler.standing(&key("b"), &unresolved).unwrap();
        assert_eq!(*standing, slots(&config, &nodes, &hop(1))[&key("b")]);

        // Another node of that address is not that node.
        let mut stranger = spec;
        stranger.mac = "02:00:00:00:00:99".parse().unwrap();
        let slot = template::slot(0, &config.overlays[0], &stranger, &pending);
        assert_eq!(reconciler.standing(&key("b"), &slot), None);
    });
}

/// Some of the pods say nothing without the others.
#[test]
fn pods_wait_until_all_are_known() {
    isolated(async |bpffs: &Path| {
        let config = config(bpffs);
        populate(&config);
        let mut reconciler = Reconciler::adopt(Tables::open(&pins(bpffs)).unwrap()).unwrap();
        let look = Tables::open(&pins(bpffs)).unwrap();
        let before = look.pods.read().unwrap();
        reconciler.hold_removals(true);
        reconciler.hold_pods(true);
        let part = cluster(&[("d", 13)]);
        let changes = Changes { pods: part.pods.keys().copied().collect(), ..Changes::default() };
        let slots = slots(&config, &part, &hop(1));
        let pass = reconciler.apply(&part, &slots, Scope::Everything);
        assert_eq!((pass.written, pass.deleted), (3, 0), "the node, its prefix and its source");
        reconciler.apply(&part, &slots, Scope::Only(&changes));
        assert_eq!(look.pods.read().unwrap(), before);
        reconciler.hold_pods(false);
        reconciler.apply(&part, &slots, Scope::Everything);
        assert_eq!(look.pods.read().unwrap().len(), before.len() + 1);
    });
}

#[test]
fn removals_wait_until_the_source_is_complete() {
    isolated(async |bpffs: &Path| {
        let config = config(bpffs);
        populate(&config);
        let mut reconciler = Reconciler::adopt(Tables::open(&pins(bpffs)).unwrap()).unwrap();
        let look = Tables::open(&pins(bpffs)).unwrap();
        let used = || {
            let vteps = look.vteps.read().unwrap();
            vteps.values().filter(|vtep| vtep.slot().flags.has(VtepFlags::USED)).count()
        };
        reconciler.hold_removals(true);
        // The file with a and c is broken, d is new.
        let part = cluster(&[("b", 11), ("d", 13)]);
        let pass = reconciler.apply(&part, &slots(&config, &part, &hop(1)), Scope::Everything);
        assert_eq!((pass.written, pass.deleted), (4, 0));
        assert_eq!((look.pods.read().unwrap().len(), used()), (4, 4));

        // d goes again: that is known.
        let goes = cluster(&[("d", 13)]);
        let changes = Changes {
            vteps: [key("d")].into(),
            pods: goes.pods.keys().copied().collect(),
            prefixes: goes.prefixes.keys().copied().collect(),
            sources: goes.sources.keys().copied().collect(),
        };
        let part = cluster(&[("b", 11)]);
        let pass = reconciler.apply(&part, &slots(&config, &part, &hop(1)), Scope::Only(&changes));
        assert_eq!((pass.written, pass.deleted), (0, 4));
        assert_eq!((look.pods.read().unwrap().len(), used()), (3, 3));

        reconciler.hold_removals(false);
        let pass = reconciler.apply(&part, &slots(&config, &part, &hop(1)), Scope::Everything);
        assert_eq!((pass.written, pass.deleted), (0, 8));
        assert_eq!((look.pods.read().unwrap().len(), used()), (1, 1));
    });
}
