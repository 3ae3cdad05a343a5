//! A thousand changes a second.

use std::{
    collections::BTreeMap,
    env, fs,
    net::Ipv4Addr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use gateway_common::wire::Mac;
use gateway_tests::lab::manifest;
use ipnet::Ipv4Net;
use rand::{RngExt as _, SeedableRng as _, rngs::SmallRng, seq::SliceRandom as _};

use crate::{
    cluster::{Cluster, Node, Pod},
    scenarios::{start, streams},
    stream::Stream,
    tables::{Content, Probe, Watcher},
};

/// Files that are rewritten in turn, each with all its pods changed.
const FILES: u8 = 10;
const PODS_PER_FILE: usize = 98;
const NODES: u8 = 20;
/// One file and two nodes are rewritten in each step: 100 changes.
const STEP: Duration = Duration::from_millis(100);
const NODES_PER_STEP: u8 = 2;

struct Churn {
    cluster: Cluster,
    random: SmallRng,
    changes: usize,
}

impl Churn {
    fn node(&mut self, number: u8) {
        let paper = Node::paper(number);
        let variant = self.random.random_range(0..4_u8);
        let node = Node {
            mac: Mac::new([0x0a, 0, 0, 0, variant, number]),
            endpoint: if variant & 1 == 0 { paper.endpoint } else { Ipv4Addr::new(172, 16, 3, number + 1) },
            cidr: if variant & 2 == 0 {
                paper.cidr
            } else {
                Ipv4Net::new_assert(Ipv4Addr::new(10, 244, 150 + number, 0), 24)
            },
        };
        self.cluster.put_node(&format!("churn{number}"), node);
        self.changes += 1;
    }

    /// Every pod of a file gets another node and another address.
    fn file(&mut self, file: u8) {
        let mut last: Vec<u8> = (1..=200).collect();
        last.shuffle(&mut self.random);
        let mut objects = Vec::new();
        for (number, last) in last.into_iter().take(PODS_PER_FILE).enumerate() {
            let name = format!("churn{file}-{number}");
            let node = format!("churn{}", self.random.random_range(0..NODES));
            let pod = Pod { node, address: Ipv4Addr::new(10, 244, 200 + file, last) };
            objects.push(self.cluster.pod_object(&name, &pod));
            self.changes += usize::from(self.cluster.pods.insert(name, pod.clone()) != Some(pod));
        }
        self.cluster.write_list(&format!("churn{file}.json"), &objects);
    }
}

/// Moves a pod of its own between two nodes, and takes the time until the table follows.
fn measure(cluster: &Cluster, probe: &Probe, over: &AtomicBool) -> Vec<Duration> {
    let address = Ipv4Addr::new(10, 244, 250, 1);
    let mut times = Vec::new();
    for node in ["node1", "node2"].iter().cycle() {
        if over.load(Ordering::Relaxed) {
            break;
        }
        let object = cluster.pod_object("probe", &Pod { node: (*node).to_owned(), address });
        let endpoint = cluster.nodes[*node].endpoint;
        manifest::write(cluster.directory(), &object).unwrap();
        let begin = Instant::now();
        while probe.pod(address) != Some(endpoint) {
            assert!(begin.elapsed() < Duration::from_secs(10), "the pod is not where it moved to after 10 s");
            thread::sleep(Duration::from_millis(1));
        }
        times.push(begin.elapsed());
        thread::sleep(Duration::from_millis(37));
    }
    manifest::remove(cluster.directory(), "Pod", "probe").unwrap();
    times.sort_unstable();
    times
}

/// CPU time in clock ticks, and resident memory now and at most, in KiB.
fn usage(process: u32) -> (u64, u64, u64) {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap();
    // Fields 14 and 15, counted behind the name, which may have spaces.
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    let ticks = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let kib = |key: &str| {
        let line = status.lines().find(|line| line.starts_with(key)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    (ticks, kib("VmRSS:"), kib("VmHWM:"))
}

#[test]
fn a_thousand_changes_a_second_reach_the_tables_and_disturb_nobody() {
    let full = env::var_os("GATEWAY_TEST_FULL").is_some();
    let length = Duration::from_secs(if full { 60 } else { 10 });
    let (gateway, lab, constant) = start("churn");
    let cluster = constant.clone();
    let mut churn = Churn { cluster, random: SmallRng::seed_from_u64(3), changes: 0 };
    (0..NODES).for_each(|number| churn.node(number));
    (0..FILES).for_each(|file| churn.file(file));
    Content::wait(&lab, &churn.cluster, "the churning cluster as it begins");

    let watcher = Watcher::start(&lab, &constant);
    let streams = streams(&lab);
    let over = Arc::new(AtomicBool::new(false));
    let (probe, ended, constant) = (Probe::open(&lab), Arc::clone(&over), constant);
    let meter = thread::spawn(move || measure(&constant, &probe, &ended));
    let (ticks, ..) = usage(gateway.process_id());
    churn.changes = 0;

    let begin = Instant::now();
    let mut node = (0..NODES).cycle();
    for (number, file) in (0..FILES).cycle().enumerate() {
        let due = begin + STEP * u32::try_from(number).unwrap();
        thread::sleep(due.saturating_duration_since(Instant::now()));
        if begin.elapsed() >= length {
            break;
        }
        churn.file(file);
        node.by_ref().take(NODES_PER_STEP.into()).for_each(|number| churn.node(number));
    }
    let took = begin.elapsed();
    let (ticks_after, resident, peak) = usage(gateway.process_id());
    over.store(true, Ordering::Relaxed);
    let times = meter.join().unwrap();
    Content::wait(&lab, &churn.cluster, "the cluster after the churn");

    let looks = watcher.stop();
    let sent = streams.map(Stream::stop);
    #[expect(clippy::cast_precision_loss, reason = "for people")]
    let (rate, cpu) = (
        churn.changes as f64 / took.as_secs_f64(),
        // A tick is 10 ms (USER_HZ is 100 on every architecture that Linux' user space sees).
        (ticks_after - ticks) as f64 / took.as_secs_f64(),
    );
    let quantile = |percent: usize| times[(times.len() - 1) * percent / 100];
    println!(
        "{} changes, {rate:.0} a second; file to table: {} samples, p50 {:?}, p99 {:?}; daemon: {cpu:.0} % of a CPU, \
         {resident} KiB resident, {peak} KiB at most; constant entries seen in {looks} looks; datagrams sent and \
         received: {sent:?}",
        churn.changes,
        times.len(),
        quantile(50),
        quantile(99),
    );
    assert!(rate > 900.0, "only {rate:.0} changes a second");
    let expected: BTreeMap<_, _> = churn.cluster.tables().pods;
    assert!(expected.len() > usize::from(FILES) * PODS_PER_FILE && looks > 1000);
    assert!(sent.iter().all(|sent| *sent > 5000));
}
