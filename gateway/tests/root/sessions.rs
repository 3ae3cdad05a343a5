//! Session tables: their memory, and how they move while the program works on them.

use std::{
    os::fd::{AsFd as _, AsRawFd as _},
    path::Path,
};

use aya::maps::MapInfo;
use gateway::{
    config::{Config, snat::session_memory},
    dataplane::{
        load::Programs,
        pins::{Pins, SESSION_TABLES},
        sessions::{SessionTables, now},
    },
};
use gateway_common::{
    abi::{Forward, ForwardKey, Phase, Reverse, ReverseKey, Slot, State, ticks},
    wire::{Be16, Ipv4},
};

use crate::sandbox::{config, isolated, sh};

fn pins(bpffs: &Path) -> Pins {
    Pins::new(bpffs, "test")
}

fn programs(config: &Config) -> Programs {
    Programs::prepare(pins(&config.datapath.bpffs), config).unwrap()
}

fn open(bpffs: &Path) -> SessionTables {
    SessionTables::open(&pins(bpffs)).unwrap()
}

/// Both halves of the session of a client's port.
fn session(port: u16, state: State) -> (ForwardKey, Forward, ReverseKey, Reverse) {
    let (client, pod) = (Ipv4::new([192, 0, 2, 7]), Ipv4::new([10, 244, 1, 2]));
    let (address, http) = (Ipv4::new([10, 244, 30, 254]), Be16::new(80));
    let created = now();
    let forward_key = ForwardKey {
        client,
        destination: pod,
        client_port: Be16::new(port),
        destination_port: http,
        protocol: 6,
        ..ForwardKey::default()
    };
    let forward = Forward {
        source: address,
        source_port: Be16::new(port),
        destination: pod,
        destination_port: http,
        seen: created,
        created,
        ..Forward::default()
    };
    let reverse = Reverse {
        state,
        client,
        client_port: Be16::new(port),
        destination: pod,
        destination_port: http,
        slot: u32::from(port),
        seen: created,
        created,
        ..Reverse::default()
    };
    (forward_key, forward, forward.reverse_key(&forward_key), reverse)
}

/// As the program opens one.
fn add(tables: &SessionTables, port: u16, state: State) -> ReverseKey {
    let (forward_key, forward, key, reverse) = session(port, state);
    assert!(tables.reverse.insert(&key, &reverse).unwrap());
    assert!(tables.forward.insert(&forward_key, &forward).unwrap());
    tables.slots.replace(&reverse.slot, &Slot { session: key }).unwrap();
    key
}

fn remove(tables: &SessionTables, key: &ReverseKey) {
    let reverse = tables.reverse.get(key).unwrap().unwrap();
    tables.forward.delete(&[reverse.forward_key(key)]).unwrap();
    tables.reverse.delete(&[*key]).unwrap();
}

/// Every session is whole: both halves, and a slot that is its alone.
fn check(tables: &SessionTables, expected: &[u16]) {
    let mut ports = Vec::new();
    tables
        .each(|key, reverse| {
            let forward = tables.forward.get(&reverse.forward_key(key)).unwrap().expect("a forward entry");
            assert_eq!(forward.reverse_key(&reverse.forward_key(key)), *key);
            let slot = tables.slots.get(&reverse.slot).unwrap().expect("a slot of the table");
            assert_eq!(slot.session, *key, "slot {}", reverse.slot);
            ports.push(key.port.get());
        })
        .unwrap();
    ports.sort_unstable();
    assert_eq!(ports, expected);
    let mut forward = 0;
    tables
        .forward
        .each_batch(|keys, _| {
            forward += keys.len();
            Ok::<_, gateway::dataplane::tables::TableError>(())
        })
        .unwrap();
    assert_eq!(forward, expected.len());
}

fn live() -> State {
    State::new(Phase::Live).with(State::REPLIED)
}

#[test]
fn sessions_move_to_another_size_while_they_change() {
    isolated(async |bpffs: &Path| {
        let mut config = config(bpffs);
        programs(&config).create_tables().unwrap();
        let old = open(bpffs);
        let stays = add(&old, 11, live());
        let opening = add(&old, 12, State::new(Phase::Opening).expecting(77));
        let ends = add(&old, 13, live());
        for size in [5000, 100] {
            config.snat.max_sessions = size;
            let mut programs = programs(&config);
            assert_eq!(programs.session_slots(), size);
            programs.create_tables().unwrap();
            assert_ne!(open(bpffs).slots.capacity(), size, "until every program uses the new tables");
            programs.settle_tables().unwrap();
            assert_eq!(open(bpffs).slots.capacity(), size);
            check(&open(bpffs), &[11, 12, 13]);
        }

        config.snat.max_sessions = 2000;
        let mut programs = programs(&config);
        programs.create_tables().unwrap();
        let (old, new) = (open(bpffs), SessionTables::open(programs.pins()).unwrap());
        check(&new, &[11, 12, 13]);
        // Programs that are not swapped yet work on the old tables: one connection is opened, one is established, one is
        // half closed. Those that are swapped work on the new ones: one is opened, one ends, one is closed from the other
        // side.
        let confirmed = Reverse { state: live(), ..old.reverse.get(&opening).unwrap().unwrap() };
        old.reverse.replace(&opening, &confirmed).unwrap();
        let later = now() + ticks(1);
        let closed_by = |tables: &SessionTables, flag, seen| {
            let entry = tables.reverse.get(&stays).unwrap().unwrap();
            tables
                .reverse
                .replace(&stays, &Reverse { state: entry.state.with(flag), seen, ..entry })
                .unwrap();
        };
        closed_by(&old, State::FIN_CLIENT, later);
        closed_by(&new, State::FIN_POD, later - 1);
        add(&old, 14, live());
        add(&new, 15, live());
        remove(&new, &ends);
        programs.settle_tables().unwrap();

        let tables = open(bpffs);
        check(&tables, &[11, 12, 14, 15]);
        let entry = tables.reverse.get(&stays).unwrap().unwrap();
        assert!(entry.state.all(State::FIN_CLIENT | State::FIN_POD), "{:?}", entry.state);
        assert_eq!(entry.seen, later);
        assert_eq!(tables.reverse.get(&opening).unwrap().unwrap().state.phase(), Phase::Live);
    });
}

#[test]
fn a_port_that_was_given_away_meanwhile_is_its_new_owners() {
    isolated(async |bpffs: &Path| {
        let mut config = config(bpffs);
        programs(&config).create_tables().unwrap();
        let old = open(bpffs);
        let key = add(&old, 11, live());
        config.snat.max_sessions = 2000;
        let mut programs = programs(&config);
        programs.create_tables().unwrap();
        // In the old tables the session ended, and another client got its port.
        let before = old.reverse.get(&key).unwrap().unwrap();
        remove(&old, &key);
        let (mut forward_key, mut forward, _, mut reverse) = session(11, live());
        let other = Ipv4::new([192, 0, 2, 99]);
        (forward_key.client, reverse.client) = (other, other);
        let later = before.created + ticks(1);
        (forward.created, reverse.created) = (later, later);
        old.reverse.insert(&key, &reverse).unwrap();
        old.forward.insert(&forward_key, &forward).unwrap();
        programs.settle_tables().unwrap();
        let tables = open(bpffs);
        check(&tables, &[11]);
        assert_eq!(tables.reverse.get(&key).unwrap().unwrap().client, other);
    });
}

#[test]
fn sessions_of_a_start_that_was_cut_off_are_taken_over() {
    isolated(async |bpffs: &Path| {
        let config = config(bpffs);
        programs(&config).create_tables().unwrap();
        add(&open(bpffs), 11, live());
        let mut larger = config.clone();
        larger.snat.max_sessions = 2000;
        let mut cut_off = programs(&larger);
        cut_off.create_tables().unwrap();
        // A program was swapped already, and a client came.
        add(&SessionTables::open(cut_off.pins()).unwrap(), 12, live());
        drop(cut_off);

        for (config, size) in [(&config, 1000), (&larger, 2000)] {
            let mut again = programs(config);
            again.create_tables().unwrap();
            check(&SessionTables::open(again.pins()).unwrap(), &[11, 12]);
            again.settle_tables().unwrap();
            assert_eq!(open(bpffs).slots.capacity(), size);
            check(&open(bpffs), &[11, 12]);
        }
    });
}

#[test]
fn tables_that_are_too_small_for_what_is_open_keep_their_size() {
    isolated(async |bpffs: &Path| {
        let mut config = config(bpffs);
        programs(&config).create_tables().unwrap();
        for port in 1..=3 {
            add(&open(bpffs), port, live());
        }
        config.snat.max_sessions = 2;
        let mut smaller = programs(&config);
        assert_eq!(smaller.session_slots(), 1000);
        smaller.create_tables().unwrap();
        smaller.settle_tables().unwrap();
        assert_eq!(open(bpffs).slots.capacity(), 1000);
        check(&open(bpffs), &[1, 2, 3]);
        config.snat.max_sessions = 3;
        let mut fits = programs(&config);
        fits.create_tables().unwrap();
        fits.settle_tables().unwrap();
        check(&open(bpffs), &[1, 2, 3]);
        assert_eq!(open(bpffs).slots.capacity(), 3);
    });
}

/// What `check` and the log say is what the kernel allocates.
#[test]
fn memory_is_what_is_said() {
    isolated(async |bpffs: &Path| {
        let mut config = config(bpffs);
        config.snat.max_sessions = 50_000;
        programs(&config).create_tables().unwrap();
        let bytes: u64 = SESSION_TABLES
            .iter()
            .map(|name| {
                let info = MapInfo::from_pin(pins(bpffs).map(name)).unwrap();
                let map = info.fd().unwrap();
                let number = map.as_fd().as_raw_fd();
                let text = std::fs::read_to_string(format!("/proc/thread-self/fdinfo/{number}")).unwrap();
                let line = text.lines().find_map(|line| line.strip_prefix("memlock:")).unwrap();
                line.trim().parse::<u64>().unwrap()
            })
            .sum();
        let said = session_memory(50_000);
        assert!(said.abs_diff(bytes) < said / 50, "said {said}, allocated {bytes}");
    });
}

/// `gateway show sessions` prints as it reads: a million sessions in a quarter of a gigabyte of addresses, everything
/// included, and a reader that has seen enough is no failure. (In the normal run a tenth of that.)
#[test]
fn many_sessions_are_shown_in_little_memory() {
    let full = std::env::var_os("GATEWAY_TEST_FULL").is_some();
    let count: u32 = if full { 1_000_000 } else { 100_000 };
    isolated(async |bpffs: &Path| {
        let mut config = config(bpffs);
        config.snat.max_sessions = count;
        programs(&config).create_tables().unwrap();
        let tables = open(bpffs);
        let (_, _, key, reverse) = session(0, live());
        let entries: Vec<(ReverseKey, Reverse)> = (0..count)
            .map(|number| {
                let pod = Ipv4::new((0x0af4_0000 + number / 1000).to_be_bytes());
                let port = Be16::new(u16::try_from(number % 1000).unwrap());
                (ReverseKey { pod, port, ..key }, Reverse { client_port: port, destination: pod, ..reverse })
            })
            .collect();
        tables.reverse.write(&entries).unwrap();

        let file = tempfile::NamedTempFile::new().unwrap();
        let text = format!(
            "instance = \"test\"\n[source]\nkind = \"files\"\npath = \"/m\"\n[[interface]]\nname = \"ext\"\n\
             roles = [\"external\", \"underlay\"]\n[[overlay]]\nname = \"flannel\"\nlocal = \"172.16.2.200\"\n\
             mac = \"0e:11:22:33:44:55\"\nsubnet = \"10.244.30.0/24\"\n[datapath]\nbpffs = \"{}\"\n",
            bpffs.display()
        );
        std::fs::write(file.path(), text).unwrap();
        let gateway = env!("CARGO_BIN_EXE_gateway");
        let show = format!("{gateway} show sessions --config {}", file.path().display());
        let lines = |rest: &str| {
            let printed = sh(&format!("ulimit -v 262144; {show} {rest} | wc -l"));
            printed.trim().parse::<u32>().unwrap()
        };
        assert_eq!(lines("--json"), count);
        assert_eq!(lines(""), count + 1, "and a line of titles");
        assert_eq!(lines("--json --port 7"), count / 1000);
        assert_eq!(lines("--json --protocol udp"), 0);
        let first = sh(&format!("bash -o pipefail -c '{show} --json | head -n 1'"));
        assert!(first.starts_with('{') && first.trim_end().ends_with('}'), "{first}");
    });
}
