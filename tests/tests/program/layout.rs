//! `bpftool map dump` of every table names the fields, so that a person can read it.

use std::{path::Path, process::Command};

use gateway_common::abi::{Outcome, map};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use serde_json::{Value, json};

use crate::{
    packet::{Ip, hex},
    rig::{self, CLIENT},
    subject::Subject,
    world::{MOVED_POD, PLAIN, TAGGED, World, pod},
};

const BPFFS: &str = "/sys/fs/bpf";

#[test]
fn bpftool_names_the_fields_of_every_table() {
    rig::inside(|ports| {
        // A bpffs that this thread alone sees, and that ends with it.
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
        mount(None::<&str>, BPFFS, Some("bpf"), MsFlags::empty(), None::<&str>).unwrap();

        let world = World::new(ports);
        let subject = Subject::load(&world.tables);
        subject.pin(Path::new(BPFFS));
        let frame = world.client_link().ip(&Ip::udp(CLIENT, pod(PLAIN), (1, 2), b"data"));
        subject.run(&frame);

        let address = |octets: [u8; 4]| json!({ "octets": octets });
        let overlay_address =
            |overlay: u32, octets| json!({ "overlay": overlay, "address": address(octets) });
        let route = |vtep: u32| json!({ "vtep": vtep, "reserved": 0 });
        let own = ports.own.index;
        let trie = json!({ "prefix_len": 32 + 24, "data": overlay_address(0, [10, 244, 1, 0]) });
        let expected = [
            (map::PODS, overlay_address(0, MOVED_POD), route(TAGGED)),
            (map::PREFIXES, trie, route(PLAIN)),
            (map::SOURCES, overlay_address(0, world.nodes[&PLAIN].endpoint), route(PLAIN)),
            (map::ADDRESSES, address(rig::UNDERLAY), json!({ "kind": 1, "ifindex": own })),
            (
                map::EGRESS,
                json!(ports.vlan.index),
                json!({ "ifindex": ports.second.index, "vlan": 77, "kind": 1 }),
            ),
        ];
        for (name, key, value) in expected {
            let entries = dump(name);
            let found = entries.iter().find(|entry| entry["key"] == key);
            let found = found.unwrap_or_else(|| panic!("{name} has no {key} in {}", json!(entries)));
            assert_eq!(found["value"], value, "{name}");
        }

        let vteps = dump(map::VTEPS);
        let vtep = &vteps[PLAIN as usize]["value"];
        assert_eq!((&vtep["active"], &vtep["generation"]), (&json!(0), &json!(1)));
        let slot = &vtep["slots"][0];
        let node = &world.nodes[&PLAIN];
        let mut readable = slot.clone();
        let header = readable.as_object_mut().unwrap().remove("header").unwrap();
        assert_eq!(
            header.as_array().unwrap()[..6],
            hex("52540000000a").iter().map(|byte| json!(byte)).collect::<Vec<_>>()
        );
        let expected = node.slot(world.config());
        assert_eq!(
            readable,
            json!({
                "overlay": 0, "flags": { "bits": 3 }, "ifindex": own, "header_len": 64, "mtu": 1450,
                "checksum_base": expected.checksum_base, "ip_offset": 14,
                "endpoint": address(node.endpoint), "mac": { "octets": node.mac.octets },
                "next_hop": { "octets": node.link.destination.octets },
            })
        );

        let counters = dump(map::COUNTERS);
        let encap = counters.iter().find(|entry| entry["key"] == json!(Outcome::Encap.number())).unwrap();
        let values: Vec<&Value> =
            encap["values"].as_array().unwrap().iter().map(|cpu| &cpu["value"]).collect();
        let sum = |field: &str| values.iter().map(|value| value[field].as_u64().unwrap()).sum::<u64>();
        assert_eq!((sum("packets"), sum("bytes")), (1, frame.len() as u64));
    });
}

/// What bpftool prints for a person, as JSON: with BTF it has names, without it is a list of bytes.
fn dump(name: &str) -> Vec<Value> {
    let output = Command::new("bpftool")
        .args(["--json", "map", "dump", "pinned"])
        .arg(Path::new(BPFFS).join(name))
        .output()
        .expect("bpftool does not run; `cargo xtask setup` installs it");
    assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
    let entries: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
    entries.into_iter().map(|mut entry| entry["formatted"].take()).collect()
}
