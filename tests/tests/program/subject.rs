//! The program under test: the object, loaded with its own maps.

use std::{collections::BTreeMap, ops::Sub};

use aya::{
    Ebpf, EbpfLoader, VerifierLogLevel,
    maps::{
        self, Array, HashMap, MapData, PerCpuArray, PerCpuValues, ProgramArray,
        lpm_trie::{Key, LpmTrie},
    },
    programs::{TestRun as _, TestRunAttrs, TestRunOptions, Xdp, XdpMode},
    util::nr_cpus,
};
use gateway::dataplane::{batch::Map, load::OBJECT};
use gateway_common::{
    abi::{
        CONFIG_SYMBOL, Counter, OUTCOME_CAPACITY, PROGRAM, PrefixKey, Route, SWEEP_PROGRAM, SessionEvent,
        Sweep, Vtep, map,
    },
    model::HostTables,
};
use gateway_tests::bench::reference_object;

/// Entries of each table but the counters: small, because every test loads its own.
pub(crate) const TABLE_SIZE: u32 = 64;

/// What XDP programs return (Linux `include/uapi/linux/bpf.h`, `enum xdp_action`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Returned {
    Drop,
    Pass,
    Transmit,
    Redirect,
}

impl Returned {
    fn from_code(code: u32) -> Self {
        match code {
            1 => Self::Drop,
            2 => Self::Pass,
            3 => Self::Transmit,
            4 => Self::Redirect,
            other => panic!("the program returned {other}, which aborts the frame"),
        }
    }
}

/// Bytes by which a frame may grow.
const ROOM: usize = 128;

/// Gives a program a frame; tells what it returned and what became of the frame, of which there is room for so many bytes.
fn run(program: &Xdp, frame: &[u8], room: usize) -> (Returned, Vec<u8>) {
    let mut output = vec![0; room];
    let options =
        TestRunOptions { data_in: Some(frame), data_out: Some(&mut output), ..TestRunOptions::default() };
    let result = program
        .test_run(options)
        .unwrap_or_else(|error| panic!("test run of {} bytes: {error:?}", frame.len()));
    output.truncate(usize::try_from(result.data_size_out).unwrap());
    (Returned::from_code(result.return_value), output)
}

/// Counters by outcome number; zero ones are left out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counters(pub(crate) BTreeMap<u32, (u64, u64)>);

impl Sub for &Counters {
    type Output = Counters;

    fn sub(self, earlier: &Counters) -> Counters {
        let grown = self.0.iter().filter_map(|(&number, &(packets, bytes))| {
            let (old_packets, old_bytes) = earlier.0.get(&number).copied().unwrap_or_default();
            let difference = (packets - old_packets, bytes - old_bytes);
            (difference != (0, 0)).then_some((number, difference))
        });
        Counters(grown.collect())
    }
}

/// The loaded program.
pub(crate) struct Subject {
    ebpf: Ebpf,
    /// Frames since ICMP errors were allowed anew.
    since_renewal: u32,
}

impl Subject {
    /// Loads the object with the constants and tables of `tables`. Sessions there are not copied.
    pub(crate) fn load(tables: &HostTables) -> Self {
        let mut loader = EbpfLoader::new();
        loader.verifier_log_level(VerifierLogLevel::DISABLE);
        loader.override_global(CONFIG_SYMBOL, &tables.config, true);
        loader.override_global("AYA_LOG_LEVEL", &0u8, true);
        for name in [map::PODS, map::PREFIXES, map::VTEPS, map::SOURCES, map::ADDRESSES, map::EGRESS] {
            loader.map_max_entries(name, TABLE_SIZE);
        }
        let sessions = tables.sessions.capacity.map_or(1, |capacity| u32::try_from(capacity).unwrap());
        loader.map_max_entries(map::FORWARD, sessions).map_max_entries(map::REVERSE, sessions);
        loader.map_max_entries(map::SLOTS, tables.config.session_slots.max(1));
        let mut ebpf = loader.load(OBJECT).expect("the object does not load; are you root?");
        for name in [PROGRAM, SWEEP_PROGRAM] {
            let program: &mut Xdp = ebpf.program_mut(name).unwrap().try_into().unwrap();
            program.load().unwrap();
        }
        let mut subject = Self { ebpf, since_renewal: 0 };
        subject.fill(tables);
        subject
    }

    fn fill(&mut self, tables: &HostTables) {
        self.fill_hash(map::PODS, &tables.pods);
        self.fill_hash(map::SOURCES, &tables.sources);
        self.fill_hash(map::ADDRESSES, &tables.addresses);
        self.fill_hash(map::EGRESS, &tables.egress);
        let mut prefixes: LpmTrie<_, PrefixKey, Route> = self.map(map::PREFIXES).try_into().unwrap();
        for (&(overlay, length, address), route) in &tables.prefixes {
            let key = Key::new(PrefixKey::OVERLAY_BITS + u32::from(length), PrefixKey { overlay, address });
            prefixes.insert(&key, route, 0).unwrap();
        }
        for (&id, vtep) in &tables.vteps {
            self.set_vtep(id, *vtep);
        }
    }

    fn map(&mut self, name: &str) -> &mut maps::Map {
        self.ebpf.map_mut(name).unwrap_or_else(|| panic!("the object has no map {name}"))
    }

    fn fill_hash<K: aya::Pod, V: aya::Pod>(&mut self, name: &str, entries: &BTreeMap<K, V>) {
        let mut hash: HashMap<&mut MapData, K, V> = self.map(name).try_into().unwrap();
        for (key, value) in entries {
            hash.insert(key, value, 0).unwrap();
        }
    }

    /// Operations on one of the session tables.
    pub(crate) fn table<K: bytemuck::Pod, V: bytemuck::Pod>(&self, name: &str) -> Map<K, V> {
        let data = match self.ebpf.map(name) {
            Some(maps::Map::HashMap(data) | maps::Map::Array(data)) => data,
            other => panic!("{name} is {other:?}"),
        };
        Map::new(MapData::from_id(data.info().unwrap().id()).unwrap()).unwrap()
    }

    /// Overwrites an entry of the VTEP table.
    pub(crate) fn set_vtep(&mut self, id: u32, vtep: Vtep) {
        let mut vteps: Array<_, Vtep> = self.map(map::VTEPS).try_into().unwrap();
        vteps.set(id, vtep, 0).unwrap();
    }

    /// Pins every table under `directory`, as the daemon names them.
    pub(crate) fn pin(&self, directory: &std::path::Path) {
        for name in map::ALL {
            self.ebpf.map(name).unwrap().pin(directory.join(name)).unwrap();
        }
    }

    /// Runs the program on a frame, in the network namespace of the calling thread. The frame may be larger than a
    /// page: it then arrives in fragments.
    pub(crate) fn run(&self, frame: &[u8]) -> (Returned, Vec<u8>) {
        run(self.program(), frame, frame.len() + ROOM)
    }

    /// As [`run`](Self::run) for what it does to the tables: nobody looks at the frame afterwards, which saves time.
    pub(crate) fn feed(&self, frame: &[u8]) {
        self.program()
            .test_run(TestRunOptions { data_in: Some(frame), ..TestRunOptions::default() })
            .unwrap();
    }

    /// As [`run`](Self::run), with hardly any headroom in front of the frame, whose payload must begin with zeros.
    ///
    /// The kernel gets what is left of the frame without its beginning. The benchmark's driver moves the front into the
    /// headroom, where all is 0, writes the headers, and tail-calls the program. Metadata would take from the headroom as
    /// well, but no more than 32 bytes on old kernels.
    pub(crate) fn run_cramped(&self, frame: &[u8]) -> (Returned, Vec<u8>) {
        /// Of 256 bytes, of which the kernel needs 40 itself.
        const TAKEN: usize = 200;
        /// As the driver's `TEMPLATE`, and what it writes of it.
        const TEMPLATE: usize = 128;
        const WRITTEN: usize = 54;
        assert!(frame[WRITTEN..TAKEN].iter().all(|byte| *byte == 0), "the payload does not begin with zeros");
        let forward = -i32::try_from(TAKEN).unwrap();
        let mut ebpf = EbpfLoader::new()
            .verifier_log_level(VerifierLogLevel::DISABLE)
            .override_global("TEMPLATE", &frame[..TEMPLATE], true)
            .override_global("UNDO_HEAD", &forward, true)
            .load(reference_object().unwrap())
            .unwrap();
        let mut driven: ProgramArray<&mut MapData> = ebpf.map_mut("DRIVEN").unwrap().try_into().unwrap();
        driven.set(0, self.program().fd().unwrap(), 0).unwrap();
        let driver: &mut Xdp = ebpf.program_mut("drive_still").unwrap().try_into().unwrap();
        driver.load().unwrap();
        run(driver, &frame[TAKEN..], frame.len() + ROOM)
    }

    fn program(&self) -> &Xdp {
        self.ebpf.program(PROGRAM).unwrap().try_into().unwrap()
    }

    /// Lets the program decide about frames that arrive at the interface.
    pub(crate) fn attach(&mut self, ifindex: u32) {
        let program: &mut Xdp = self.ebpf.program_mut(PROGRAM).unwrap().try_into().unwrap();
        program.attach_to_if_index(ifindex, XdpMode::Driver).unwrap();
    }

    /// Runs the program on a frame and does what it says: a redirected frame leaves.
    pub(crate) fn run_live(&self, frame: &[u8]) {
        let options = TestRunOptions {
            data_in: Some(frame),
            attrs: TestRunAttrs::new().xdp_live_frames(1),
            ..TestRunOptions::default()
        };
        self.program().test_run(options).unwrap();
    }

    /// What became of sessions, summed over CPUs; zero ones are left out.
    pub(crate) fn events(&self) -> BTreeMap<SessionEvent, u64> {
        let table: PerCpuArray<_, u64> = self.ebpf.map(map::EVENTS).unwrap().try_into().unwrap();
        let count = |event: SessionEvent| table.get(&(event as u32), 0).unwrap().iter().sum();
        SessionEvent::ALL
            .map(|(event, _)| (event, count(event)))
            .into_iter()
            .filter(|(_, n)| *n != 0)
            .collect()
    }

    /// Runs the program that removes sessions.
    pub(crate) fn sweep(&self, input: &Sweep) -> Sweep {
        let program: &Xdp = self.ebpf.program(SWEEP_PROGRAM).unwrap().try_into().unwrap();
        let mut output = *input;
        let result = program.test_run(TestRunOptions {
            data_in: Some(bytemuck::bytes_of(input)),
            data_out: Some(bytemuck::bytes_of_mut(&mut output)),
            ..TestRunOptions::default()
        });
        assert_eq!(Returned::from_code(result.unwrap().return_value), Returned::Pass);
        output
    }

    /// Lets the program send ICMP errors again, after so many frames that it might have stopped.
    pub(crate) fn renew_allowance_if_needed(&mut self) {
        /// Fewer than a CPU may send in a period.
        const OFTEN: u32 = 50;
        self.since_renewal += 1;
        if self.since_renewal == OFTEN {
            self.since_renewal = 0;
            self.renew_allowance();
        }
    }

    /// Lets the program send ICMP errors again.
    pub(crate) fn renew_allowance(&mut self) {
        // How many, and since when: long ago.
        let mut limit: PerCpuArray<_, [u64; 2]> = self.map("ICMP_LIMIT").try_into().unwrap();
        let cpus = nr_cpus().unwrap();
        limit.set(0, PerCpuValues::try_from(vec![[0; 2]; cpus]).unwrap(), 0).unwrap();
    }

    /// The whole counter table, summed over CPUs.
    pub(crate) fn counters(&self) -> Counters {
        let present = (0..OUTCOME_CAPACITY).map(|number| (number, self.counter(number)));
        Counters(present.filter(|(_, counted)| *counted != (0, 0)).collect())
    }

    /// Packets and bytes of one outcome.
    pub(crate) fn counter(&self, number: u32) -> (u64, u64) {
        let table: PerCpuArray<_, Counter> = self.ebpf.map(map::COUNTERS).unwrap().try_into().unwrap();
        let values = table.get(&number, 0).unwrap();
        values.iter().fold((0, 0), |(packets, bytes), value| (packets + value.packets, bytes + value.bytes))
    }
}
