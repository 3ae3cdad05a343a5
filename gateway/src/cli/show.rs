//! `gateway show`: the tables as they are in the kernel, and what the daemon finds wrong.

use std::{collections::BTreeMap, net::Ipv4Addr, process::ExitCode};

use anyhow::bail;
use clap::{Args as ClapArgs, ValueEnum};
use gateway_common::abi::{PrefixKey, Route, Vtep, VtepFlags};
use serde::Serialize;

use super::{
    FOUND,
    output::{age, json, lines, table},
    sessions,
};
use crate::{
    cluster::problem::Problem,
    config::{Config, Location},
    daemon::{
        ProblemReport,
        report::{Report, now},
    },
    dataplane::{
        pins::{InstanceLock, Pins},
        tables::{Tables, TrieKey},
    },
    sessions::filter::Filter,
};

/// Arguments of `show`.
#[derive(ClapArgs, Debug)]
pub struct Args {
    /// What to show
    what: What,
    /// Also counters that are zero (JSON has them anyway)
    #[arg(long)]
    all: bool,
    /// Print JSON; of sessions one object on each line
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    filter: Filter,
    #[command(flatten)]
    location: Location,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum What {
    /// Nodes: how each is reached
    Vteps,
    /// Pods: exact addresses and their node
    Pods,
    /// Pod CIDRs and their node
    Routes,
    /// Translated connections
    Sessions,
    /// What became of every packet
    Counters,
    /// What is wrong with cluster objects and tables, as the running daemon sees it
    Problems,
}

/// A row of `show vteps`.
#[derive(Debug, Serialize)]
struct VtepRow {
    /// Index in the table.
    id: u32,
    /// Name of the overlay.
    overlay: String,
    /// Name of the node, if the daemon told it.
    node: Option<String>,
    /// Tunnel endpoint, or plain next hop.
    endpoint: Ipv4Addr,
    /// VTEP MAC address; absent without a tunnel.
    mac: Option<String>,
    /// `tunnel`, `direct` or `unresolved`.
    state: &'static str,
    /// MAC address of the next hop.
    next_hop: Option<String>,
    /// Index of the interface to send by.
    ifindex: Option<u32>,
    /// Largest inner packet, bytes.
    mtu: Option<u16>,
    /// Rises when the entry changes its owner.
    generation: u32,
}

/// A row of `show pods` and `show routes`.
#[derive(Debug, Serialize)]
struct RouteRow {
    /// Name of the overlay.
    overlay: String,
    /// Address or CIDR.
    destination: String,
    /// Index of the VTEP.
    vtep: u32,
    /// Its endpoint.
    endpoint: Option<Ipv4Addr>,
    /// Name of the node, if the daemon told it.
    node: Option<String>,
}

/// A row of `show counters`.
#[derive(Debug, Serialize)]
struct CounterRow {
    /// Stable number.
    number: u32,
    /// Stable name.
    outcome: &'static str,
    /// `forward`, `pass` or `drop`.
    class: &'static str,
    /// `normal`, `notice`, `fault` or `suspect`.
    severity: &'static str,
    /// Packets since the tables were made.
    packets: u64,
    /// Their bytes as they arrived.
    bytes: u64,
    /// What it means.
    help: &'static str,
}

/// Prints a table. With [`What::Problems`] the exit code is 1 if there are any.
///
/// # Errors
///
/// The tables are not there, or not readable; or no daemon runs whose problems could be shown.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let config = args.location.load()?;
    if !args.filter.is_empty() && args.what != What::Sessions {
        bail!("--client, --pod and the like say which sessions to show: `gateway show sessions`");
    }
    if args.what == What::Problems {
        return problems(&config, args.json);
    }
    let tables = Tables::open(&Pins::new(&config.datapath.bpffs, &config.instance))?;
    let names = || Names::new(&config, &tables);
    match args.what {
        What::Vteps => vteps(&names()?, args.json)?,
        What::Pods => routes(pods(&tables, &names()?)?, "ADDRESS", args.json)?,
        What::Routes => routes(prefixes(&tables, &names()?)?, "CIDR", args.json)?,
        What::Sessions => sessions::show(&config, &tables, &names()?.nodes, &args.filter, args.json)?,
        What::Counters => counters(&tables, args.all, args.json)?,
        What::Problems => {}
    }
    Ok(ExitCode::SUCCESS)
}

/// What numbers in the tables mean.
struct Names {
    overlays: Vec<String>,
    nodes: BTreeMap<u32, String>,
    vteps: BTreeMap<u32, Vtep>,
}

impl Names {
    fn new(config: &Config, tables: &Tables) -> anyhow::Result<Self> {
        // Names of nodes are a courtesy: without them the tables still say everything that the datapath knows.
        let report = Report::read(&config.instance).ok().flatten();
        let nodes =
            report.into_iter().flat_map(|report| report.vteps).filter_map(|vtep| Some((vtep.id?, vtep.node)));
        let mut vteps = tables.vteps.read()?;
        vteps.retain(|_, vtep| vtep.slot().flags.has(VtepFlags::USED));
        Ok(Self {
            overlays: config.overlays.iter().map(|overlay| overlay.name.clone()).collect(),
            nodes: nodes.collect(),
            vteps,
        })
    }

    fn overlay(&self, id: u32) -> String {
        self.overlays.get(id as usize).cloned().unwrap_or_else(|| id.to_string())
    }

    fn route(&self, overlay: u32, destination: String, route: Route) -> RouteRow {
        RouteRow {
            overlay: self.overlay(overlay),
            destination,
            vtep: route.vtep,
            endpoint: self.vteps.get(&route.vtep).map(|vtep| vtep.slot().endpoint.into()),
            node: self.nodes.get(&route.vtep).cloned(),
        }
    }
}

fn or_dash<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

fn vteps(names: &Names, as_json: bool) -> anyhow::Result<()> {
    let rows = names.vteps.iter().map(|(id, vtep)| {
        let slot = vtep.slot();
        let ready = slot.flags.has(VtepFlags::READY);
        let direct = slot.flags.has(VtepFlags::DIRECT);
        VtepRow {
            id: *id,
            overlay: names.overlay(slot.overlay.into()),
            node: names.nodes.get(id).cloned(),
            endpoint: slot.endpoint.into(),
            mac: slot.mac.is_station().then(|| slot.mac.to_string()),
            state: match (ready, direct) {
                (false, _) => "unresolved",
                (true, true) => "direct",
                (true, false) => "tunnel",
            },
            next_hop: ready.then(|| slot.next_hop.to_string()),
            ifindex: ready.then_some(slot.ifindex),
            mtu: ready.then_some(slot.mtu),
            generation: vtep.generation,
        }
    });
    if as_json {
        return Ok(json(&rows.collect::<Vec<_>>())?);
    }
    let headers = ["ID", "OVERLAY", "NODE", "ENDPOINT", "MAC", "STATE", "NEXT HOP", "IFINDEX", "MTU"];
    let rows = rows.map(|row| {
        [
            row.id.to_string(),
            row.overlay,
            or_dash(row.node),
            row.endpoint.to_string(),
            or_dash(row.mac),
            row.state.to_owned(),
            or_dash(row.next_hop),
            or_dash(row.ifindex),
            or_dash(row.mtu),
        ]
    });
    Ok(table(&headers, rows)?)
}

fn pods(tables: &Tables, names: &Names) -> anyhow::Result<Vec<RouteRow>> {
    let entries = tables.pods.read()?;
    Ok(entries
        .into_iter()
        .map(|(key, route)| names.route(key.overlay, key.address.to_string(), route))
        .collect())
}

fn prefixes(tables: &Tables, names: &Names) -> anyhow::Result<Vec<RouteRow>> {
    let entries = tables.prefixes.read()?;
    let mut rows: Vec<_> = entries.into_iter().collect();
    rows.sort_by_key(|(key, _)| (key.data, key.length));
    let cidr = |key: &TrieKey| {
        format!("{}/{}", key.data.address, key.length.saturating_sub(PrefixKey::OVERLAY_BITS))
    };
    Ok(rows.into_iter().map(|(key, route)| names.route(key.data.overlay, cidr(&key), route)).collect())
}

fn routes(rows: Vec<RouteRow>, destination: &str, as_json: bool) -> anyhow::Result<()> {
    if as_json {
        return Ok(json(&rows)?);
    }
    let rows = rows.into_iter().map(|row| {
        [row.overlay, row.destination, or_dash(row.node), or_dash(row.endpoint), row.vtep.to_string()]
    });
    Ok(table(&["OVERLAY", destination, "NODE", "ENDPOINT", "VTEP"], rows)?)
}

fn problems(config: &Config, as_json: bool) -> anyhow::Result<ExitCode> {
    let Some(holder) = InstanceLock::holder(&config.instance)? else {
        bail!(
            "the gateway {} is not running, so nobody looks for problems: start it with `gateway run`, or look at the \
             manifests with `gateway check`",
            config.instance
        );
    };
    let Some(report) = Report::read(&config.instance)?.filter(|report| report.pid == holder) else {
        bail!(
            "the gateway {} is starting and has not published its state yet: try again in a moment",
            config.instance
        );
    };
    let found = if report.problems.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(FOUND) };
    if as_json {
        json(&report.problems)?;
    } else if report.problems.is_empty() {
        lines("no problems")?;
    } else {
        let now = now();
        let rows = report.problems.into_iter().map(|ProblemReport { problem, since }| {
            let Problem { severity, place, what, remedy } = problem;
            [severity.label().to_owned(), age(now.saturating_sub(since)), place, what, remedy]
        });
        table(&["SEVERITY", "SINCE", "WHERE", "WHAT", "REMEDY"], rows)?;
    }
    Ok(found)
}

fn counters(tables: &Tables, all: bool, as_json: bool) -> anyhow::Result<()> {
    let rows = tables.counters.read()?.into_iter().map(|(info, counter)| CounterRow {
        number: info.outcome.number(),
        outcome: info.label,
        class: info.class.label(),
        severity: info.severity.label(),
        packets: counter.packets,
        bytes: counter.bytes,
        help: info.help,
    });
    if as_json {
        return Ok(json(&rows.collect::<Vec<_>>())?);
    }
    let headers = ["OUTCOME", "CLASS", "SEVERITY", "PACKETS", "BYTES", "MEANING"];
    let rows = rows.filter(|row| all || row.packets > 0).map(|row| {
        [
            row.outcome.to_owned(),
            row.class.to_owned(),
            row.severity.to_owned(),
            row.packets.to_string(),
            row.bytes.to_string(),
            row.help.to_owned(),
        ]
    });
    Ok(table(&headers, rows)?)
}
