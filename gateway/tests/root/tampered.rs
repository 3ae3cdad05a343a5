//! Pins that somebody else put there, and a bpffs that cannot be written: refused with the remedy, which works.

use std::{fs, path::Path};

use gateway::{
    config::Config,
    dataplane::{
        load::{LoadError, Programs},
        pins::Pins,
    },
};
use gateway_common::abi::{self, map};

use crate::{
    programs::{attach, link, programs, wait_detached},
    sandbox::{config, isolated, sh},
    tables::prepare,
};

/// Some program of ours, as a shell finds it.
const PROGRAM: &str = r"$(bpftool prog show name gateway | sed -n 's/^\([0-9]*\): .*/\1/p' | tail -n 1)";

fn start(config: &Config) -> Result<(), LoadError> {
    Programs::prepare(Pins::new(&config.datapath.bpffs, "test"), config)?.create_tables()
}

#[test]
fn what_is_no_table_of_ours_is_refused_until_it_is_removed() {
    isolated(async |bpffs: &Path| {
        let config = config(bpffs);
        let pins = || Pins::new(bpffs, "test");
        let map = |name: &str, words: &str| {
            format!("bpftool map create {} {words} name {name}", pins().map(name).display())
        };
        let pods = pins().map(map::PODS).display().to_string();
        let cases = [
            ("key", map::PODS, map(map::PODS, "type hash key 4 value 8 entries 20000"), "keys of 4 bytes"),
            (
                "value",
                map::PODS,
                map(map::PODS, "type hash key 8 value 16 entries 20000"),
                "values of 16 bytes",
            ),
            (
                "flags",
                map::PODS,
                map(map::PODS, "type hash key 8 value 8 entries 20000 flags 1"),
                "flags 0x1",
            ),
            (
                "type",
                map::VTEPS,
                map(map::VTEPS, "type percpu_array key 4 value 248 entries 64"),
                "PerCpuArray",
            ),
            (
                "capacity of counters",
                map::COUNTERS,
                map(map::COUNTERS, "type percpu_array key 4 value 16 entries 4"),
                "4 entries",
            ),
            ("directory", map::PODS, format!("mkdir {pods}"), "cannot open the pinned map"),
            ("program", map::PODS, format!("bpftool prog pin id {PROGRAM} {pods}"), "is no map"),
            (
                "another table",
                map::PODS,
                format!("ln -s {} {pods}", pins().map(map::EGRESS).display()),
                "keys of 4 bytes",
            ),
        ];
        for (what, table, tamper, told) in cases {
            prepare(&config);
            let _loaded = programs(&config).loader().load("any", &abi::Config::UNSET).unwrap();
            fs::remove_file(pins().map(table)).unwrap();
            sh(&tamper);
            let error = start(&config).unwrap_err().to_string();
            for word in [told, pins().map(table).to_str().unwrap(), "gateway detach"] {
                assert!(error.contains(word), "{what}: {word} in: {error}");
            }
            assert!(pins().remove().unwrap(), "{what}");
            start(&config).unwrap_or_else(|error| panic!("{what}: {error}"));
        }
    });
}

/// A link is recognised by what is on the interface: what somebody put in its place leads nowhere, and goes.
#[test]
fn what_is_no_attachment_of_ours_is_replaced() {
    isolated(async |bpffs: &Path| {
        sh("ip link add und type veth peer name far; ip link set und up; ip link set far up");
        let config = config(bpffs);
        prepare(&config);
        let path = Pins::new(bpffs, "test").link("und");
        let shown = path.display();
        for tamper in [
            format!("bpftool map create {shown} type array key 4 value 8 entries 1 name x"),
            format!("ln -s {} {shown}", Pins::new(bpffs, "test").map(map::PODS).display()),
        ] {
            sh(&tamper);
            attach(&mut programs(&config), &config, "und").await.unwrap();
            assert!(link("und").await.xdp.program.is_some(), "{tamper}");
            fs::remove_file(&path).unwrap();
            wait_detached("und").await;
        }
        fs::create_dir(&path).unwrap();
        let error = attach(&mut programs(&config), &config, "und").await.unwrap_err().to_string();
        assert!(error.contains("gateway detach") && error.contains("interface und"), "{error}");
        assert!(Pins::new(bpffs, "test").remove().unwrap());
        prepare(&config);
        attach(&mut programs(&config), &config, "und").await.unwrap();
    });
}

#[test]
fn a_bpffs_that_cannot_be_written_is_told() {
    isolated(async |bpffs: &Path| {
        let config = config(bpffs);
        prepare(&config);
        sh(&format!("mount -o remount,ro {}", bpffs.display()));
        let error = start(&config).unwrap_err().to_string();
        assert!(error.contains("gateway/test") && error.contains("Read-only"), "{error}");
        sh(&format!("mount -o remount,rw {}", bpffs.display()));
        start(&config).unwrap();
        Pins::new(bpffs, "test").remove().unwrap();
        sh(&format!("mount -o remount,ro {}", bpffs.display()));
        let error = start(&config).unwrap_err().to_string();
        assert!(error.contains("gateway/test") && error.contains("Read-only"), "{error}");
        sh(&format!("mount -o remount,rw {}", bpffs.display()));
        start(&config).unwrap();
    });
}

/// Whoever owns a directory on the way decides what lies behind it.
#[test]
fn directories_of_others_are_refused() {
    isolated(async |bpffs: &Path| {
        let config = config(bpffs);
        prepare(&config);
        let directory = Pins::new(bpffs, "test").directory();
        for (spoil, told, mend) in [
            ("chmod 777", "may be written by others (mode 777)", "chmod 755"),
            ("chown 1000", "belongs to user 1000", "chown root"),
        ] {
            sh(&format!("{spoil} {}", directory.display()));
            let error = start(&config).unwrap_err().to_string();
            let remedy = format!("{mend} {}", directory.display());
            assert!(error.contains(told) && error.contains(&remedy), "{error}");
            sh(&remedy);
            start(&config).unwrap();
        }
    });
}
