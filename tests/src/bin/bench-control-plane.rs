//! How fast a gateway follows a large cluster, and what that costs: the daemon as users run it, against the test API
//! server with objects like those of real clusters.
//!
//! All nodes lie behind one router, so the machine's limits on neighbours play no part. Each change is written by an
//! ordinary client; its time counts from just before the write until the pinned table says so.

use std::{
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use aya::maps::{HashMap, Map, MapData};
use clap::Parser;
use gateway_common::abi::{OverlayAddress, Route, map};
use gateway_tests::{
    api::{self, ApiServer, Options},
    lab::{
        Host, Process, Role, gateway,
        netns::Namespace,
        registry,
        wiring::{self, End, Via},
    },
};
use ipnet::Ipv4Net;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::{
    Api, Client,
    api::{DeleteParams, ListParams, Patch, PatchParams, PostParams},
};
use serde_json::{Value, json};

/// How a gateway follows a large cluster
#[derive(Parser, Debug)]
struct Arguments {
    /// Nodes
    #[arg(long, default_value_t = 5_000)]
    nodes: u32,
    /// Pods
    #[arg(long, default_value_t = 150_000)]
    pods: u32,
    /// Seconds of churn
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Write the result here as well
    #[arg(long)]
    json: Option<PathBuf>,
}

/// Between two events: 100 a second.
const PACE: Duration = Duration::from_millis(10);
/// Patience with the whole list, and with one event.
const SYNC: Duration = Duration::from_mins(2);
const EVENT: Duration = Duration::from_secs(5);

const HERE: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 1);
const ROUTER: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 2);

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    ensure!(arguments.nodes >= 4 && arguments.pods >= arguments.nodes, "at least 4 nodes, and a pod on each");
    let claim = registry::Claim::transient()?;
    let bench = Bench::new(claim.id(), &arguments)?;
    let result = bench.run(&arguments)?;
    let text = serde_json::to_string_pretty(&result)?;
    println!("{text}");
    if let Some(path) = &arguments.json {
        fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

struct Bench {
    host: Host,
    _router: Namespace,
    directory: tempfile::TempDir,
    instance: String,
    server: ApiServer,
}

impl Bench {
    fn new(id: &str, arguments: &Arguments) -> Result<Self> {
        let space = Namespace::create(&registry::namespace_of(id, "gateway"))?;
        let router = Namespace::create(&registry::namespace_of(id, "router"))?;
        let directory = tempfile::tempdir()?;
        wiring::up(&space, "lo")?;
        wiring::veth(
            End { namespace: &space, name: "eth0", mac: None, mtu: 1500 },
            End { namespace: &router, name: "eth0", mac: None, mtu: 1500 },
        )?;
        wiring::address(&space, "eth0", Ipv4Net::new(HERE, 30)?)?;
        wiring::address(&router, "eth0", Ipv4Net::new(ROUTER, 30)?)?;
        wiring::route(&space, Ipv4Net::default(), Via::Router(ROUTER))?;
        let options = Options { sample: (arguments.nodes, arguments.pods), ..Options::default() };
        let server = ApiServer::start_in(&space, &directory.path().join("api"), options)?;
        let instance = registry::instance(id);
        let host = Host::new("gateway", Role::Gateway, space, directory.path());
        Ok(Self { host, _router: router, directory, instance, server })
    }

    fn config(&self) -> Result<PathBuf> {
        let path = self.directory.path().join("gateway.toml");
        let text = format!(
            r#"instance = "{}"
[source]
kind = "kubernetes"
kubeconfig = "{}"
[[interface]]
name = "eth0"
roles = ["underlay", "external"]
[[overlay]]
name = "flannel"
local = "{HERE}"
mac = "0e:ff:00:00:00:01"
subnet = "192.168.200.0/24"
"#,
            self.instance,
            self.server.kubeconfig("gateway").display()
        );
        fs::write(&path, text)?;
        Ok(path)
    }

    fn run(&self, arguments: &Arguments) -> Result<Value> {
        let config = self.config()?;
        let program = gateway::program()?;
        let words = gateway::command(&program, &config, &["run", "--log", "info,gateway::daemon=debug"])?;
        let start = Instant::now();
        let mut daemon = self.host.spawn(&words)?;
        let table = self.synchronised(&mut daemon, arguments)?;
        let full_sync = start.elapsed();
        let after_sync = resident(&daemon)?;
        // What the first pass leaves behind is no part of the churn.
        thread::sleep(Duration::from_secs(3));
        let before = writes(&daemon)?;
        let kubeconfig = self.server.kubeconfig("admin");
        let churned = self.host.namespace().enter(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async { churn(&api::client(&kubeconfig).await?, &table, arguments).await })
        })?;
        thread::sleep(Duration::from_secs(1));
        let map_writes = writes(&daemon)? - before;
        let rss = resident(&daemon)?;
        let mut times = churned.times;
        times.sort();
        let at = |share: usize| times.get((times.len() * share / 100).min(times.len().saturating_sub(1)));
        let milliseconds = |time: Option<&Duration>| time.map_or(0.0, |time| time.as_secs_f64() * 1000.0);
        Ok(json!({
            "nodes": arguments.nodes,
            "pods": arguments.pods,
            "pod_bytes": churned.pod_bytes,
            "node_bytes": churned.node_bytes,
            "full_sync_s": full_sync.as_secs_f64(),
            "rss_after_sync_mb": after_sync,
            "rss_mb": rss,
            "events": churned.events,
            "events_per_second": churned.rate,
            "event_to_map_p50_ms": milliseconds(at(50)),
            "event_to_map_p99_ms": milliseconds(at(99)),
            "map_writes": map_writes,
            "changes": churned.changes,
        }))
    }

    /// Waits until the table of pods is complete.
    fn synchronised(&self, daemon: &mut Process, arguments: &Arguments) -> Result<PodTable> {
        let begin = Instant::now();
        // On the first nodes and the last, the first pods and the last.
        let probes: Vec<Ipv4Addr> = (0..200)
            .map(|step| u64::from(arguments.pods - 1) * step / 199)
            .map(|number| {
                let number = u32::try_from(number).expect("below the number of pods");
                pod_address(number % arguments.nodes, number / arguments.nodes)
            })
            .collect();
        loop {
            if let Some(status) = daemon.ended()? {
                bail!("the gateway ended ({status}):\n{}", daemon.output()?);
            }
            ensure!(begin.elapsed() < SYNC, "not synchronised within {SYNC:?}:\n{}", daemon.output()?);
            if let Some(table) = PodTable::open(&self.instance)
                && probes.iter().all(|address| table.vtep(*address).is_some())
            {
                return Ok(table);
            }
            thread::sleep(Duration::from_millis(5));
        }
    }
}

/// The pinned table of pods.
struct PodTable(HashMap<MapData, OverlayAddress, Route>);

impl PodTable {
    fn open(instance: &str) -> Option<Self> {
        let versions = fs::read_dir(Path::new("/sys/fs/bpf/gateway").join(instance)).ok()?;
        let pin = versions
            .flatten()
            .map(|version| version.path().join("maps").join(map::PODS))
            .find(|pin| pin.exists())?;
        Map::HashMap(MapData::from_pin(pin).ok()?).try_into().ok().map(Self)
    }

    /// Where an address leads.
    fn vtep(&self, address: Ipv4Addr) -> Option<u32> {
        let key = OverlayAddress { overlay: 0, address: address.into() };
        self.0.get(&key, 0).ok().map(|route| route.vtep)
    }
}

/// Address of a node's pod in the server's sample.
fn pod_address(node: u32, index: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(0x0a00_0000 | (node << 8) | (2 + index))
}

/// Megabytes in memory.
fn resident(daemon: &Process) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.id()))?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).context("no VmRSS")?;
    let kilobytes: u64 = line.split_whitespace().nth(1).context("no size")?.parse()?;
    Ok(kilobytes / 1024)
}

/// Entries that the daemon has written and deleted, by its log.
fn writes(daemon: &Process) -> Result<u64> {
    let log = daemon.output()?;
    let sum = log
        .lines()
        .filter(|line| line.contains("tables changed"))
        .flat_map(str::split_whitespace)
        .filter_map(|word| word.strip_prefix("written=").or_else(|| word.strip_prefix("deleted=")))
        .filter_map(|number| number.parse::<u64>().ok())
        .sum();
    Ok(sum)
}

#[derive(Default)]
struct Churned {
    times: Vec<Duration>,
    events: u64,
    changes: u64,
    rate: f64,
    pod_bytes: usize,
    node_bytes: usize,
}

/// Rolling deployments: a new pod on another node, then the old one goes, and its address is given to the next; now and
/// then a node is cordoned.
async fn churn(client: &Client, table: &PodTable, arguments: &Arguments) -> Result<Churned> {
    let mut churned = Churned::default();
    let all: Api<Pod> = Api::all(client.clone());
    let nodes: Api<Node> = Api::all(client.clone());
    let some = all.list(&ListParams::default().limit(500)).await?.items;
    churned.pod_bytes =
        some.iter().map(|pod| serde_json::to_string(pod).map_or(0, |t| t.len())).sum::<usize>() / some.len();
    let list = nodes.list(&ListParams::default().limit(100)).await?.items;
    churned.node_bytes =
        list.iter().map(|node| serde_json::to_string(node).map_or(0, |t| t.len())).sum::<usize>()
            / list.len();
    let template = some.first().context("no pod")?;
    let pods: Api<Pod> = Api::namespaced(client.clone(), "default");
    let begin = Instant::now();
    let mut next = begin;
    let mut pace = async || {
        next += PACE;
        tokio::time::sleep_until(next.into()).await;
    };
    let mut old: Option<(String, Ipv4Addr)> = None;
    let mut round = 0_u32;
    while begin.elapsed() < Duration::from_secs(arguments.seconds) {
        let node = round % arguments.nodes;
        // Every other pod gets the address that has just become free, on whatever node it is.
        let address = Ipv4Addr::from_bits(0x0a00_0000 | (node << 8) | (100 + round % 100));
        let name = format!("churn-{round}");
        let mut pod = template.clone();
        pod.metadata = serde_json::from_value(json!({ "name": name, "namespace": "default" }))?;
        if let Some(spec) = &mut pod.spec {
            spec.node_name = Some(format!("node-{node:05}"));
        }
        pace().await;
        pods.create(&PostParams::default(), &pod).await?;
        churned.events += 1;

        pace().await;
        let status =
            json!({ "status": { "phase": "Running", "podIP": address, "podIPs": [{ "ip": address }] } });
        let start = Instant::now();
        pods.patch_status(&name, &PatchParams::default(), &Patch::Merge(&status)).await?;
        seen(|| table.vtep(address).is_some(), start).await.map(|time| churned.times.push(time))?;
        churned.events += 1;
        churned.changes += 1;

        if let Some((name, address)) = old.replace((name, address)) {
            pace().await;
            let start = Instant::now();
            let now = DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() };
            pods.delete(&name, &now).await?;
            seen(|| table.vtep(address).is_none(), start).await.map(|time| churned.times.push(time))?;
            churned.events += 1;
            churned.changes += 1;
        }
        if round % 10 == 9 {
            pace().await;
            let cordon = json!({ "spec": { "unschedulable": round % 20 == 9 } });
            nodes
                .patch(&format!("node-{:05}", round % 7), &PatchParams::default(), &Patch::Merge(&cordon))
                .await?;
            churned.events += 1;
        }
        round += 1;
    }
    churned.rate = f64::from(u32::try_from(churned.events)?) / begin.elapsed().as_secs_f64();
    Ok(churned)
}

/// Waits until the table says so; tells how long after `start`.
async fn seen(holds: impl Fn() -> bool, start: Instant) -> Result<Duration> {
    while !holds() {
        ensure!(start.elapsed() < EVENT, "an event did not arrive within {EVENT:?}");
        tokio::time::sleep(Duration::from_micros(100)).await;
    }
    Ok(start.elapsed())
}
