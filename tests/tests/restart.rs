//! End to end: whatever happens to the daemon, packets do not notice.

use std::{
    collections::BTreeMap,
    env, fs,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use gateway_common::abi::{Class, Outcome};
use gateway_tests::lab::{
    Flannel, Gateway,
    flannel::{EXTERNAL, NIC, Node, UNDERLAY},
    gateway::attached_program,
    stream::{Account, Stream},
    traced::{End, run_until},
    traffic, wait_until,
};

/// Datagrams per second and direction.
const RATE: u32 = 53_000;
/// What a run must have had in flight, datagrams per second and direction: all of it proves nothing without traffic.
const FULL_LOAD: f64 = 50_000.0;
/// The same for the short run, on a machine that may not grant precedence to the streams.
const SOME_LOAD: f64 = 10_000.0;
const PORT: u16 = 7000;
/// A gateway with another BPF object, for upgrades; `cargo xtask test --full` builds it.
const VARIANT: &str = "GATEWAY_VARIANT_BIN";
const SOON: Duration = Duration::from_secs(5);
/// Time between two interruptions, in which the datapath is alone.
const PAUSE: Duration = Duration::from_millis(50);

fn full() -> bool {
    env::var_os("GATEWAY_TEST_FULL").is_some()
}

fn label(outcome: Outcome) -> &'static str {
    Outcome::by_number(outcome.number()).unwrap().label
}

/// The lab with a gateway that reaches all nodes.
struct Rig {
    gateway: Gateway,
    lab: Flannel,
    configuration: String,
}

impl Rig {
    fn start(label: &str) -> Self {
        let lab = Flannel::start(label).unwrap();
        let mut gateway = Gateway::start(&lab).unwrap();
        gateway.wait_ready(&lab).unwrap();
        gateway.wait_settled(lab.gateway()).unwrap();
        let configuration = fs::read_to_string(lab.config()).unwrap();
        Self { gateway, lab, configuration }
    }

    fn counters(&self) -> BTreeMap<String, u64> {
        self.gateway.counters(self.lab.gateway()).unwrap()
    }

    fn programs(&self) -> [u64; 2] {
        [EXTERNAL, UNDERLAY].map(|interface| attached_program(self.lab.gateway(), interface).unwrap())
    }

    /// Starts the daemon after an interruption, and checks that it swapped its programs in.
    fn come_back(&mut self) {
        let before = self.programs();
        self.gateway.restart(self.lab.gateway()).unwrap();
        self.gateway.wait_settled(self.lab.gateway()).unwrap();
        let after = self.programs();
        assert!(before.iter().zip(after).all(|(before, after)| *before != after), "{before:?} {after:?}");
    }

    /// Writes the configuration: `overlay` follows the keys of the overlay, then comes `rest`.
    fn configure(&self, overlay: &str, rest: &str) {
        fs::write(self.lab.config(), format!("{}{overlay}\n{rest}", self.configuration)).unwrap();
    }

    /// Streams in both directions between a client and a pod.
    fn streams(&self, rate: u32) -> [Stream; 2] {
        let (client, pod) = (self.lab.client(1), self.lab.pod(Node::new(1), 1));
        let start = |from, to, port| Stream::start(from, to, NIC, port, rate).unwrap();
        [start(client, pod, PORT), start(pod, client, PORT + 1)]
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Interruption {
    Killed,
    Stopped,
    Upgraded,
    Reconfigured,
    Resized,
}

impl Interruption {
    const ALL: [Self; 5] = [Self::Killed, Self::Stopped, Self::Upgraded, Self::Reconfigured, Self::Resized];

    /// `round` counts how often this one was made.
    fn make(self, rig: &mut Rig, round: usize, programs: &[PathBuf]) {
        let odd = round % 2 == 1;
        match self {
            Self::Killed => drop(rig.gateway.kill().unwrap()),
            _ => assert!(rig.gateway.stop().unwrap().success()),
        }
        thread::sleep(PAUSE);
        match self {
            Self::Killed | Self::Stopped => {}
            Self::Upgraded => rig.gateway.set_program(&programs[(round + 1) % programs.len()]),
            Self::Reconfigured => {
                rig.configure(if odd { "" } else { "allow_gbp = true\ndscp = 10\nttl = 33\n" }, "");
            }
            Self::Resized => {
                let sizes = "max_pods = 1000\nmax_prefixes = 500\nmax_vteps = 64\nmax_sources = 300\n";
                rig.configure("", &if odd { String::new() } else { format!("[datapath]\n{sizes}") });
            }
        }
        rig.come_back();
    }
}

/// Programs to change between: this build, and the variant if there is one.
fn programs() -> Vec<PathBuf> {
    let own = gateway_tests::lab::gateway::program().unwrap();
    let variant = env::var_os(VARIANT).map(PathBuf::from);
    assert!(!full() || variant.is_some(), "run `cargo xtask test --full`, which builds {VARIANT}");
    [own].into_iter().chain(variant).collect()
}

fn check(name: &str, account: Account) {
    println!(
        "{name}: {} datagrams at {:.0} a second, {} lost, {} duplicated, {} overtaken",
        account.sent,
        account.rate(),
        account.lost(),
        account.duplicated,
        account.overtaken
    );
    assert_eq!((account.lost(), account.duplicated), (0, 0), "{name}: {account:?}");
}

#[test]
fn no_interruption_loses_a_packet() {
    let rounds = if full() { 20 } else { 2 };
    let programs = programs();
    let mut rig = Rig::start("interruptions");
    let begin = rig.counters();
    let [up, down] = rig.streams(RATE);
    let mut before = begin.clone();
    for round in 0..rounds {
        for interruption in Interruption::ALL {
            let start = Instant::now();
            interruption.make(&mut rig, round, &programs);
            let now = rig.counters();
            for (outcome, packets) in &before {
                assert!(now[outcome] >= *packets, "{outcome} went from {packets} to {}", now[outcome]);
            }
            println!(
                "{interruption:?} {round}: settled after {:?}; sent {} and {}",
                start.elapsed(),
                up.sent(),
                down.sent()
            );
            before = now;
        }
    }
    let (up, down) = (up.finish().unwrap(), down.finish().unwrap());
    let now = rig.counters();
    let since = |outcome: Outcome| now[label(outcome)] - begin[label(outcome)];
    println!("counted: {} up, {} down", since(Outcome::Encap), since(Outcome::Decap));
    let load = if full() { FULL_LOAD } else { SOME_LOAD };
    for (name, account) in [("to the pod", up), ("to the client", down)] {
        check(name, account);
        assert!(
            account.rate() >= load,
            "{name}: too few datagrams in flight, {:.0} a second",
            account.rate()
        );
    }
    assert_eq!((since(Outcome::Encap), since(Outcome::Decap)), (up.sent, down.sent));
    for row in Outcome::TABLE.iter().filter(|row| row.class == Class::Drop) {
        assert_eq!(since(row.outcome), 0, "{}", row.label);
    }
}

/// Datagrams per second and direction while the mode changes.
const MEASURED: u32 = 10_000;
/// The longest gap that a change of mode may leave, in datagrams of that stream: a tenth of a second.
const GAP: u64 = 1000;

/// The kernel takes no two modes on one device at a time, so this change alone is not atomic. In the gap the slow path
/// forwards; what it costs is counted.
#[test]
fn a_change_of_mode_has_a_short_gap() {
    let mut rig = Rig::start("mode-change");
    for mode in ["generic", "driver"].iter().cycle().take(6) {
        let [up, down] = rig.streams(MEASURED);
        assert!(rig.gateway.stop().unwrap().success());
        rig.configure("", &format!("[datapath]\nxdp_mode = \"{mode}\"\n"));
        rig.come_back();
        for (name, stream) in [("to the pod", up), ("to the client", down)] {
            let account = stream.finish().unwrap();
            let (lost, rate) = (account.lost(), account.rate());
            println!("to {mode}, {name}: {lost} of {} datagrams lost at {rate:.0} a second", account.sent);
            assert!(lost <= GAP && account.duplicated == 0, "{account:?}");
        }
    }
}

/// What a start that is to be cut off finds, and what the next one has to make of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Start {
    /// Nothing was there.
    First,
    /// A datapath is at work.
    Adopting,
    /// The same, with tables of another size.
    Resizing,
}

/// Long enough for the slowest start under ptrace.
const CUT_OFF_LIMIT: Duration = Duration::from_secs(4);
/// Datagrams per second while starts are cut off.
const LIGHT: u32 = 2000;

impl Rig {
    fn command(&self) -> Vec<String> {
        let program = gateway_tests::lab::gateway::program().unwrap();
        gateway_tests::lab::gateway::command(&program, &self.lab.config(), &["run"]).unwrap()
    }

    fn resize(&self, round: usize) {
        let size = if round % 2 == 1 { 262_144 } else { 2000 };
        let tables = format!("[datapath]\nmax_pods = {size}\nmax_vteps = {}\n", size / 20);
        self.configure("", &format!("{tables}[snat]\nmax_sessions = {size}\n"));
    }

    /// Runs a start up to its `last`-th changing call.
    fn cut_off(&self, last: usize) -> End {
        run_until(self.lab.gateway(), &self.command(), last, CUT_OFF_LIMIT).unwrap()
    }

    /// What the tables say, without what differs from run to run.
    fn tables(&self) -> Vec<String> {
        ["vteps", "pods", "routes"]
            .map(|table| self.gateway.text(self.lab.gateway(), &["show", table]).unwrap())
            .into()
    }

    fn pinned(&self) -> Vec<String> {
        let directory = format!("/sys/fs/bpf/gateway/{}", self.lab.instance());
        let listing = self.lab.gateway().run(&["find", &directory, "-mindepth", "1", "-printf", "%P\n"]);
        let mut names: Vec<String> = listing.unwrap().lines().map(str::to_owned).collect();
        names.sort();
        names
    }
}

impl Start {
    /// Every call of such a start is followed by a power failure once (in the normal run: some of them), and each time
    /// the next start makes everything right. Where a datapath was at work, it never stops.
    fn is_made_good_by_the_next(self, label: &str) {
        let samples = if full() { usize::MAX } else { 5 };
        let mut rig = Rig::start(label);
        let (tables, pinned) = (rig.tables(), rig.pinned());
        let streams = (self != Self::First).then(|| rig.streams(LIGHT));
        // A rehearsal tells how many calls there are.
        self.prepare(&mut rig, 0);
        let calls = rig.cut_off(usize::MAX).calls;
        rig.gateway.restart(rig.lab.gateway()).unwrap();
        assert!(calls > 50, "only {calls} calls");
        let step = (calls / samples).max(1);
        let mut kinds: BTreeMap<&str, usize> = BTreeMap::new();
        for (round, last) in (1..=calls).step_by(step).enumerate() {
            self.prepare(&mut rig, round + 1);
            let end = rig.cut_off(last);
            *kinds.entry(end.instead_of.unwrap_or("none")).or_default() += 1;
            rig.gateway.restart(rig.lab.gateway()).unwrap();
            rig.gateway.wait_settled(rig.lab.gateway()).unwrap();
            assert_eq!(rig.tables(), tables, "cut off at call {last} ({end:?})");
            assert_eq!(rig.pinned(), pinned, "cut off at call {last} ({end:?})");
            if self == Self::First {
                rig.gateway.wait_ready(&rig.lab).unwrap();
            }
        }
        println!("{self:?}: {calls} calls, cut off at {kinds:?}");
        for stream in streams.into_iter().flatten() {
            check("beside the starts", stream.finish().unwrap());
        }
    }

    fn prepare(self, rig: &mut Rig, round: usize) {
        rig.gateway.stop().unwrap();
        match self {
            Self::First => drop(rig.gateway.text(rig.lab.gateway(), &["detach"]).unwrap()),
            Self::Adopting => {}
            Self::Resizing => rig.resize(round),
        }
    }
}

#[test]
fn a_first_start_that_is_cut_off_anywhere_is_made_good_by_the_next() {
    Start::First.is_made_good_by_the_next("cut-off-first");
}

#[test]
fn an_adopting_start_that_is_cut_off_anywhere_is_made_good_by_the_next() {
    Start::Adopting.is_made_good_by_the_next("cut-off-adopting");
}

#[test]
fn a_resizing_start_that_is_cut_off_anywhere_is_made_good_by_the_next() {
    Start::Resizing.is_made_good_by_the_next("cut-off-resizing");
}

/// What a file contributed to the tables outlives its being broken when the daemon starts.
#[test]
fn a_file_that_is_broken_at_the_start_takes_nothing_away() {
    let mut rig = Rig::start("broken-at-start");
    let (tables, devices) = (rig.tables(), rig.slow_path());
    rig.gateway.stop().unwrap();
    let good = ["node-node2.yaml", "pod-pod2-1.yaml"].map(|name| {
        let path = rig.lab.manifests().join(name);
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, format!("[{text}")).unwrap();
        (path, text)
    });
    rig.gateway.restart(rig.lab.gateway()).unwrap();

    // The others go on: what is new is programmed.
    rig.lab.add_pod(Node::new(1), 3).unwrap();
    traffic::wait_reachable(rig.lab.client(1), Node::new(1).pod_address(3), true, SOON).unwrap();
    for node in rig.lab.nodes() {
        for pod in [1, 2] {
            assert!(traffic::reaches(rig.lab.client(2), node.pod_address(pod)).unwrap(), "{node:?} {pod}");
        }
    }
    assert_eq!(rig.slow_path(), devices);
    wait_until("status names both files", SOON, || {
        let status = rig.lab.gateway().output(&rig.status())?;
        let status = String::from_utf8_lossy(&status.stdout).into_owned();
        let named = good
            .iter()
            .all(|(path, _)| path.file_name().unwrap().to_str().is_some_and(|name| status.contains(name)));
        Ok(named.then_some(()))
    })
    .unwrap();

    // What is removed from a good file is gone for sure; what nobody names waits.
    rig.lab.remove_pod(Node::new(1), 3).unwrap();
    // The name of a node is known from its manifest alone.
    let nameless: Vec<String> = tables.iter().map(|table| table.replace("node2", "-    ")).collect();
    wait_until("the removed pod is gone", SOON, || Ok((rig.tables() == nameless).then_some(()))).unwrap();
    for (path, text) in good {
        fs::write(path, text).unwrap();
    }
    rig.gateway.wait_settled(rig.lab.gateway()).unwrap();
    assert_eq!((rig.tables(), rig.slow_path()), (tables, devices));
}

impl Rig {
    fn status(&self) -> Vec<String> {
        let program = gateway_tests::lab::gateway::program().unwrap();
        gateway_tests::lab::gateway::command(&program, &self.lab.config(), &["status", "--json"]).unwrap()
    }

    /// Routes, neighbours and forwarding entries of the kernel's tunnel device, and the nodes that the firewall admits.
    fn slow_path(&self) -> Vec<String> {
        let device = "gw-flannel";
        let table = format!("gateway_{}", self.lab.instance());
        let calls: [&[&str]; 4] = [
            &["ip", "route", "show", "dev", device],
            &["ip", "neigh", "show", "dev", device, "nud", "permanent"],
            &["bridge", "fdb", "show", "dev", device],
            &["nft", "list", "set", "inet", &table, "nodes"],
        ];
        let mut lines: Vec<String> = calls
            .iter()
            .flat_map(|call| {
                let text = self.lab.gateway().run(call).unwrap();
                text.lines().map(str::to_owned).collect::<Vec<_>>()
            })
            .collect();
        lines.sort();
        lines
    }
}
