//! `cargo xtask demo`: the main job on real packets through the real kernel, on one screen.

mod join;
mod screen;

use std::{
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use gateway_tests::lab::{
    Cluster, Flannel, Gateway, evidence_directory,
    flannel::{EXTERNAL, NIC, Node, PORT, UNDERLAY},
    frames,
    outside::{AUTOMAP, GUEST, REMOTE, Watch},
    traffic::{self, Throughput, Transport, WebServer},
    wait_until,
};
use screen::{Screen, milliseconds, rate};

/// The gateway at work
#[derive(Parser, Debug)]
struct Arguments {
    /// Where the cluster's objects are kept
    #[arg(long, default_value = "files")]
    source: Source,
    /// An API server for `--source kubernetes`, instead of the test server: an administrator's kubeconfig
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Source {
    /// Manifest files
    Files,
    /// An API server
    Kubernetes,
}

const LABEL: &str = "demo";
const SOON: Duration = Duration::from_secs(5);

const PICTURE: &str = "\
\x20    client1, 2 ─┐              ┌─ gateway ─┐                      ╔═ node1 ── pods 10.244.1.2, .3
     guest1 ─────┼─ 10.244.30.1 │ext0   und0│ 172.16.2.200 ═VXLAN══╬═ node2 ── pods 10.244.2.2, .3
     remote1 ────┘ by a router  └─── XDP ───┘                      ╚═ node3 ── pods 10.244.3.2, .3";

fn main() -> ExitCode {
    match demo(&Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether everything shown works.
fn demo(arguments: &Arguments) -> Result<bool> {
    let joined = arguments.source == Source::Kubernetes;
    ensure!(joined || arguments.kubeconfig.is_none(), "--kubeconfig is for --source kubernetes");
    let mut screen = Screen::new();
    let evidence = evidence_directory(LABEL)?;
    let evidence = evidence.strip_prefix(std::env::current_dir()?).unwrap_or(&evidence).display().to_string();
    screen.heading(
        "Clients reach the pods of a flannel cluster through the gateway; nodes are kernel VXLAN devices",
    )?;
    screen::text(PICTURE)?;
    let state = tempfile::tempdir()?;
    let lab = screen.check("lab", || {
        let mut lab = match (joined, &arguments.kubeconfig) {
            (false, _) => Flannel::start(LABEL)?,
            (true, None) => Flannel::start_on(LABEL, Cluster::start(state.path())?)?,
            (true, Some(kubeconfig)) => Flannel::start_on(LABEL, Cluster::real(kubeconfig)?)?,
        };
        lab.add_outside()?;
        Ok((format!("{} network namespaces, set up as flannel sets up its nodes", lab.hosts().count()), lab))
    })?;
    let Some(mut lab) = lab else { return screen.finish(&evidence) };
    let from = if joined { "the API server" } else { "manifests" };
    let gateway = screen.check("gateway", || start(&lab, from))?;
    if let Some(mut gateway) = gateway {
        if joined {
            join::node(&mut screen, &lab)?;
        }
        traffic(&mut screen, &lab)?;
        translation(&mut screen, &lab, &gateway)?;
        changes(&mut screen, &mut lab, &gateway)?;
        if joined {
            join::absence(&mut screen, &mut lab, &gateway)?;
        }
        tables(&screen, &lab, &gateway)?;
        if joined {
            join::leave(&mut screen, &lab, &mut gateway)?;
        }
    }
    screen.finish(&evidence)
}

fn start(lab: &Flannel, source: &str) -> Result<(String, Gateway)> {
    let gateway = Gateway::start(lab)?;
    gateway.wait_ready(lab)?;
    Ok((format!("`gateway run`: XDP on {EXTERNAL} and {UNDERLAY}, three nodes from {source}"), gateway))
}

fn traffic(screen: &mut Screen, lab: &Flannel) -> Result<()> {
    let (client, other) = (lab.client(1), lab.client(2));
    let (address, other_address) = (client.address(NIC)?, other.address(NIC)?);

    screen.check("ARP", || {
        let pod = Node::new(1).pod_address(1);
        client.run(&["ip", "neigh", "flush", "dev", NIC])?;
        ensure!(traffic::reaches(client, pod)?, "client1 does not reach {pod}");
        let mac = lab.gateway().mac(EXTERNAL)?.to_string();
        let neighbour = client.run(&["ip", "neigh", "show", &pod.to_string()])?;
        ensure!(neighbour.contains(&mac), "the neighbour is not the gateway: {neighbour}");
        Ok((format!("client1 asks who has {pod}: at {mac}, the gateway's {EXTERNAL}"), ()))
    })?;
    screen.check("ping", || {
        let (mut sent, mut received, mut mean) = (0, 0, 0.0);
        for node in lab.nodes() {
            let there = traffic::ping(client, node.pod_address(1), 10, &[])?;
            let back = traffic::ping(lab.pod(node, 2), other_address, 10, &[])?;
            for pings in [there, back] {
                sent += pings.sent;
                received += pings.received;
                mean += pings.mean.unwrap_or_default() / 6.0;
            }
        }
        ensure!(sent == received, "only {received} of {sent} answered");
        Ok((
            format!("client1 → pods and pods → client2, all nodes: {received} of {sent}, mean {mean:.2} ms"),
            (),
        ))
    })?;
    screen.check("TCP", || {
        let node = Node::new(2);
        let there = traffic::iperf(client, lab.pod(node, 1), node.pod_address(1), Transport::Tcp, &[])?;
        let back = traffic::iperf(lab.pod(node, 1), client, address, Transport::Tcp, &[])?;
        Ok((format!("client1 → pod2-1 {}; back {}", rate(there.bits), rate(back.bits)), ()))
    })?;
    screen.check("UDP", || {
        let (node, udp) = (Node::new(3), Transport::Udp { megabits: 50 });
        let there = traffic::iperf(other, lab.pod(node, 1), node.pod_address(1), udp, &[])?;
        let back = traffic::iperf(lab.pod(node, 1), other, other_address, udp, &[])?;
        Ok((format!("client2 → pod3-1 {}; back {}", datagrams(there)?, datagrams(back)?), ()))
    })?;
    screen.check("HTTP", || {
        let node = Node::new(1);
        let pod = lab.pod(node, 2);
        let (_pod_server, _client_server) = (WebServer::start(pod, 80)?, WebServer::start(other, 80)?);
        let there = traffic::fetch(other, node.pod_address(2), 80)?;
        let back = traffic::fetch(pod, other_address, 80)?;
        ensure!(there.contains("from pod1-2, you are 10.244.30.11"), "unexpected answer: {there}");
        ensure!(back.contains("from client2, you are 10.244.1.3"), "unexpected answer: {back}");
        Ok((format!("client2 ← \"{}\"; pod1-2 ← client2 too", there.trim()), ()))
    })?;
    let wire = screen.check("wire", || {
        let node = Node::new(1);
        let capture =
            lab.node(node).capture(NIC, &format!("udp port {PORT} and dst host {}", node.endpoint()))?;
        ensure!(traffic::reaches(client, node.pod_address(1))?, "no answer");
        let frame = capture.wait_for(1, SOON)?.swap_remove(0);
        let path = capture.path().to_owned();
        capture.stop()?;
        let seen = frames::read(&frame)?;
        ensure!(seen.vxlan == frames::VXLAN, "VXLAN header {:02x?}", seen.vxlan);
        ensure!(seen.udp.checksum == 0 && seen.udp.source_port >= 49152, "{:?}", seen.udp);
        ensure!(seen.inner_ip.time_to_live == 63, "inner TTL {}", seen.inner_ip.time_to_live);
        let path = path.to_str().context("path is not UTF-8")?;
        let line = lab.gateway().run(&["tcpdump", "-n", "-t", "-c", "1", "-r", path])?;
        Ok(("at node1: VNI 1, no UDP checksum, source port from the flow, TTL 64 → 63".to_owned(), line))
    })?;
    for line in wire.unwrap_or_default().lines() {
        screen::text(&format!("             {}", line.trim()))?;
    }
    Ok(())
}

/// Clients whose addresses pods cannot answer.
fn translation(screen: &mut Screen, lab: &Flannel, gateway: &Gateway) -> Result<()> {
    let node = Node::new(1);
    let (pod, address) = (lab.pod(node, 1), node.pod_address(1));
    let watch = Watch::start(lab, &[AUTOMAP])?;
    screen.check("SNAT", || {
        let _server = WebServer::start(pod, 80)?;
        for client in [lab.guest(), lab.remote()] {
            let answer = traffic::fetch(client, address, 80)?;
            ensure!(answer.contains(&format!("you are {AUTOMAP}")), "unexpected answer: {answer}");
        }
        Ok((format!("guest1 {GUEST}, and {REMOTE} behind a router: pods see {AUTOMAP}"), ()))
    })?;
    screen.check("SNAT TCP", || {
        let there = traffic::iperf(lab.guest(), pod, address, Transport::Tcp, &[])?;
        let back = traffic::iperf(lab.guest(), pod, address, Transport::Tcp, &["--reverse"])?;
        Ok((format!("guest1 → pod1-1 {}; back {}", rate(there.bits), rate(back.bits)), ()))
    })?;
    screen.check("trace", || {
        let text = lab.remote().run(&["traceroute", "-n", "-q", "1", "-w", "1", &address.to_string()])?;
        let hops: Vec<&str> =
            text.lines().skip(1).filter_map(|line| line.split_whitespace().nth(1)).collect();
        ensure!(hops.last() == Some(&address.to_string().as_str()), "the trace does not arrive: {text}");
        Ok((format!("remote1 sees {}", hops.join(" → ")), ()))
    })?;
    let shown = gateway.text(lab.gateway(), &["show", "sessions", "--state", "closing"])?;
    screen.check("unseen", || {
        watch.finish()?;
        Ok(("on neither wire was there an address of the other side".to_owned(), ()))
    })?;
    screen.heading("$ gateway show sessions --state closing")?;
    screen::text(&shown)
}

/// A UDP result that is good enough to be shown as one.
fn datagrams(result: Throughput) -> Result<String> {
    let lost = result.lost.context("iperf3 does not tell what was lost")?;
    ensure!(lost < 5.0, "{lost:.1} % of the datagrams lost");
    Ok(format!("{} ({lost:.1} % lost)", rate(result.bits)))
}

fn changes(screen: &mut Screen, lab: &mut Flannel, gateway: &Gateway) -> Result<()> {
    let (one, four) = (Node::new(1), Node::new(4));
    let shown = |lab: &Flannel, table: &str, what: &str, expected: bool| {
        let start = Instant::now();
        wait_until(&format!("`gateway show {table}` and {what}"), SOON, || {
            let text = gateway.text(lab.gateway(), &["show", table])?;
            Ok((text.contains(what) == expected).then_some(()))
        })?;
        Ok::<_, anyhow::Error>(milliseconds(start.elapsed()))
    };
    screen.check("node +", || {
        lab.add_node(four)?;
        let start = Instant::now();
        traffic::wait_reachable(lab.client(2), four.pod_address(1), true, SOON)?;
        let time = milliseconds(start.elapsed());
        ensure!(traffic::reaches(lab.client(1), four.pod_address(1))?, "client1 does not reach its pod");
        Ok((format!("node4 joins: clients reach its pod {} after {time}", four.pod_address(1)), ()))
    })?;
    screen.check("node −", || {
        lab.remove_node(four)?;
        let time = shown(lab, "vteps", &four.endpoint().to_string(), false)?;
        let reached = traffic::reaches(lab.client(1), four.pod_address(1))?;
        ensure!(!reached, "{} still answers", four.pod_address(1));
        Ok((format!("node4 leaves: out of the tables after {time}, its pod unreachable"), ()))
    })?;
    screen.check("pod ±", || {
        let address = one.pod_address(3);
        lab.add_pod(one, 3)?;
        let added = shown(lab, "pods", &address.to_string(), true)?;
        ensure!(traffic::reaches(lab.client(2), address)?, "client2 does not reach {address}");
        lab.remove_pod(one, 3)?;
        let removed = shown(lab, "pods", &address.to_string(), false)?;
        ensure!(!traffic::reaches(lab.client(2), address)?, "{address} still answers");
        Ok((format!("pod1-3 starts: in the table after {added}, reached; ends: out after {removed}"), ()))
    })?;
    Ok(())
}

fn tables(screen: &Screen, lab: &Flannel, gateway: &Gateway) -> Result<()> {
    for verb in [&["show", "vteps"][..], &["show", "counters"], &["status"]] {
        screen.heading(&format!("$ gateway {}", verb.join(" ")))?;
        screen::text(&gateway.text(lab.gateway(), verb)?)?;
    }
    Ok(())
}
