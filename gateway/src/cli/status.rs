//! `gateway status`: is it running, attached, synchronised, and are the nodes reachable?

use std::{collections::BTreeMap, fmt::Write as _, process::ExitCode};

use clap::Args as ClapArgs;
use gateway_common::abi::{Roles, VtepFlags, VtepSlot};
use serde::Serialize;

use super::{
    FOUND,
    output::{age, json, lines, table},
    runtime,
};
use crate::{
    cluster::kubernetes::Freshness,
    config::{Config, Location, XdpMode, snat::session_memory},
    daemon::report::{Report, SourceReport, VtepReport, now},
    dataplane::{
        load::program_name,
        pins::{InstanceLock, PinError, Pins},
        tables::Tables,
    },
    kernel::{
        firewall::{self, FirewallStatus},
        host::Host,
        netlink,
        sysctl::{Change, Key, Settings},
    },
    modes::{Lack, OFF},
    sessions::census::{Busiest, Census, PORTS, Sessions},
};

/// Arguments of `status`.
#[derive(ClapArgs, Debug)]
pub struct Args {
    #[command(flatten)]
    location: Location,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Everything that `status` knows.
#[derive(Debug, Serialize)]
struct Status {
    /// Nothing needs attention.
    healthy: bool,
    /// Name of the instance.
    instance: String,
    /// The daemon, if it runs.
    daemon: Option<DaemonStatus>,
    /// Interfaces of the configuration.
    interfaces: Vec<InterfaceStatus>,
    /// Tables; empty if nothing is pinned.
    tables: Vec<TableStatus>,
    /// How the daemon attaches programs, or `off`; without a daemon, how the configuration says.
    xdp_mode: XdpMode,
    /// What the kernel alone does differently; empty unless the mode is `off`.
    differences: &'static [Lack],
    /// The firewall's table; absent if there is none.
    firewall: Option<FirewallStatus>,
    /// Translated connections; absent if nothing is pinned.
    sessions: Option<SessionStatus>,
    /// Kernel settings that this gateway changed.
    settings: BTreeMap<Key, Change>,
    /// VTEPs that are ready for traffic, from the tables.
    vteps_ready: usize,
    /// VTEPs that are not.
    vteps_unresolved: usize,
    /// Nodes that cannot be reached, and why; known while the daemon runs.
    unresolved: Vec<VtepReport>,
    /// What needs attention.
    problems: Vec<Attention>,
}

/// Translated connections.
#[derive(Debug, Serialize)]
struct SessionStatus {
    /// What was counted.
    #[serde(flatten)]
    census: Sessions,
    /// Ports that an address has towards every port of a pod.
    ports: u32,
    /// Kernel memory of the tables.
    memory_bytes: u64,
    /// What became of sessions since the tables were made.
    events: BTreeMap<&'static str, u64>,
}

/// Something that needs attention.
#[derive(Debug, Serialize)]
struct Attention {
    /// What, for people.
    text: String,
    /// When the daemon saw it first, seconds since 1970; absent if only this verb sees it.
    since: Option<u64>,
}

/// A running daemon.
#[derive(Debug, Serialize)]
struct DaemonStatus {
    /// Process id.
    pid: u32,
    /// Seconds since its start.
    uptime_seconds: u64,
    /// Where cluster objects come from.
    source: SourceReport,
}

/// An (interface, VLAN) with roles.
#[derive(Debug, Serialize)]
struct InterfaceStatus {
    /// Network device.
    name: String,
    /// VLAN id.
    vlan: Option<u16>,
    /// `underlay`, `external`, or both.
    roles: Vec<&'static str>,
    /// Index; absent if the device is.
    ifindex: Option<u32>,
    /// Whether the device is up.
    up: bool,
    /// `driver`, `generic`, …, as the kernel tells it; absent without a program.
    mode: Option<&'static str>,
    /// Id of the program.
    program: Option<u32>,
    /// Name of the program, where it may be read.
    program_name: Option<String>,
    /// The program is there by our pinned link.
    ours: bool,
}

/// How full a table is.
#[derive(Debug, Serialize)]
struct TableStatus {
    /// Name of the map.
    name: &'static str,
    /// Entries in it.
    entries: usize,
    /// Entries that fit.
    capacity: u32,
}

/// Prints the state; exits with 1 if something needs attention.
///
/// # Errors
///
/// The configuration is invalid, or the kernel does not answer.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let config = args.location.load()?;
    let status = collect(&config)?;
    if args.json {
        json(&status)?;
    } else {
        print(&status)?;
    }
    Ok(if status.healthy { ExitCode::SUCCESS } else { ExitCode::from(FOUND) })
}

fn collect(config: &Config) -> anyhow::Result<Status> {
    let pins = Pins::new(&config.datapath.bpffs, &config.instance);
    let host = runtime()?.block_on(async { anyhow::Ok(Host::read(&netlink::connect()?).await?) })?;
    let mut problems = Vec::new();
    let firewall = runtime()?.block_on(firewall::status(&config.instance)).unwrap_or_else(|error| {
        problems.push(error.to_string());
        None
    });
    if firewall.is_none() {
        problems.push("there is no firewall: `gateway run` makes it".to_owned());
    }
    let settings = Settings::open(&config.instance)?.changed().clone();
    let report = running_report(config, &mut problems);
    // The file may have been edited since the daemon read it.
    let xdp_mode = report.as_ref().map_or(config.datapath.xdp_mode, |report| report.xdp_mode);
    if xdp_mode != config.datapath.xdp_mode {
        problems.push("the configuration has another xdp_mode: restart the daemon to apply it".to_owned());
    }
    let interfaces = interfaces(config, xdp_mode, &host, &pins, &mut problems)?;
    let mut status = Status {
        healthy: false,
        instance: config.instance.clone(),
        daemon: None,
        interfaces,
        tables: Vec::new(),
        xdp_mode,
        differences: if xdp_mode == XdpMode::Off { OFF } else { &[] },
        firewall,
        sessions: None,
        settings,
        vteps_ready: 0,
        vteps_unresolved: 0,
        unresolved: Vec::new(),
        problems: Vec::new(),
    };
    match Tables::open(&pins) {
        Ok(tables) => fill(&mut status, config, &tables)?,
        Err(error) => problems.push(error.to_string()),
    }
    let mut attention = Vec::new();
    if report.is_none() {
        // A daemon that runs has said so itself.
        problems.extend(status.sessions.iter().flat_map(|sessions| sessions.census.problems()));
        problems.extend(host.misused(&config.snat).map(|(_, text)| text));
    }
    if let Some(report) = report {
        if !report.source.synchronised {
            problems.push(format!("the source {} is not synchronised yet", report.source.location));
        }
        if let Some(freshness) = report.source.freshness.filter(|freshness| !freshness.connected) {
            problems.push(format!(
                "the source {} is not connected: {}; what is known goes on being forwarded",
                report.source.location,
                knowledge(&freshness)
            ));
        }
        attention.extend(
            report
                .problems
                .iter()
                .map(|report| Attention { text: report.problem.to_string(), since: Some(report.since) }),
        );
        status.unresolved = report.vteps.into_iter().filter(|vtep| vtep.unresolved.is_some()).collect();
        status.daemon = Some(DaemonStatus {
            pid: report.pid,
            uptime_seconds: now().saturating_sub(report.started),
            source: report.source,
        });
    }
    status.problems =
        problems.into_iter().map(|text| Attention { text, since: None }).chain(attention).collect();
    status.healthy = status.problems.is_empty() && status.vteps_unresolved == 0 && status.daemon.is_some();
    Ok(status)
}

/// The daemon's report if it runs, which the lock tells.
fn running_report(config: &Config, problems: &mut Vec<String>) -> Option<Report> {
    let holder = match InstanceLock::holder(&config.instance) {
        Ok(Some(holder)) => holder,
        Ok(None) => {
            let remedy = "tables are no longer updated; start it with `gateway run`";
            problems.push(format!("the gateway is not running: {remedy}"));
            return None;
        }
        Err(error) => {
            problems.push(error.to_string());
            return None;
        }
    };
    match Report::read(&config.instance) {
        Ok(Some(report)) if report.pid == holder => Some(report),
        // None yet, or that of the daemon before.
        Ok(_) => {
            problems.push("the gateway is starting: it has not published its state yet".to_owned());
            None
        }
        Err(error) => {
            problems.push(format!("{error:#}"));
            None
        }
    }
}

fn interfaces(
    config: &Config,
    xdp_mode: XdpMode,
    host: &Host,
    pins: &Pins,
    problems: &mut Vec<String>,
) -> Result<Vec<InterfaceStatus>, PinError> {
    let linked = pins.linked_interfaces()?;
    let mut rows = Vec::new();
    for interface in &config.interfaces {
        let link = host.by_name(&interface.name);
        let program = link.and_then(|link| link.xdp.program);
        let ours = program.is_some() && linked.contains(&interface.name);
        match link {
            // A daemon that waits for it has said so already, unless this is another network namespace.
            None if problems.iter().any(|problem| problem.contains(&interface.name)) => {}
            None => problems.push(format!("interface {} does not exist here", interface.name)),
            Some(link) if !link.up => problems.push(format!("interface {} is down", interface.name)),
            Some(_) if !ours && xdp_mode != XdpMode::Off => {
                problems.push(format!("no program of this gateway is on interface {}", interface.name));
            }
            Some(_) => {}
        }
        let names = [(Roles::UNDERLAY, "underlay"), (Roles::EXTERNAL, "external")];
        rows.push(InterfaceStatus {
            name: interface.name.clone(),
            vlan: interface.vlan,
            roles: names
                .into_iter()
                .filter(|(role, _)| interface.roles.has(*role))
                .map(|(_, name)| name)
                .collect(),
            ifindex: link.map(|link| link.index),
            up: link.is_some_and(|link| link.up),
            mode: link.and_then(|link| link.xdp.mode).map(crate::kernel::host::AttachMode::label),
            program,
            program_name: program.and_then(program_name),
            ours,
        });
    }
    Ok(rows)
}

fn fill(status: &mut Status, config: &Config, tables: &Tables) -> anyhow::Result<()> {
    let slots = tables.sessions.slots.capacity();
    let mut census = Census::default();
    tables.sessions.each(|key, value| census.add(key, value))?;
    let census = census.finish(slots, &config.snat);
    let open = usize::try_from(census.sessions).unwrap_or(usize::MAX);
    status.sessions = Some(SessionStatus {
        census,
        ports: PORTS,
        memory_bytes: session_memory(slots),
        events: tables.events.read()?.into_iter().collect(),
    });
    let vteps = tables.vteps.read()?;
    let used = vteps.values().map(|vtep| *vtep.slot()).filter(|slot| slot.flags.has(VtepFlags::USED));
    let (ready, unresolved): (Vec<VtepSlot>, Vec<VtepSlot>) =
        used.partition(|slot| slot.flags.has(VtepFlags::READY));
    status.vteps_ready = ready.len();
    status.vteps_unresolved = unresolved.len();
    let row = |name, entries, capacity| TableStatus { name, entries, capacity };
    status.tables = vec![
        row(tables.pods.name(), tables.pods.read()?.len(), tables.pods.capacity()),
        row(tables.prefixes.name(), tables.prefixes.read()?.len(), tables.prefixes.capacity()),
        row(tables.vteps.name(), ready.len() + unresolved.len(), tables.vteps.capacity()),
        row(tables.sources.name(), tables.sources.read()?.len(), tables.sources.capacity()),
        row(tables.addresses.name(), tables.addresses.read()?.len(), tables.addresses.capacity()),
        row(tables.egress.name(), tables.egress.read()?.len(), tables.egress.capacity()),
        row(tables.sessions.reverse.name(), open, slots),
    ];
    Ok(())
}

/// How old what is known of the cluster is.
fn knowledge(freshness: &Freshness) -> String {
    freshness.heard.map_or_else(
        || "nothing is known yet".to_owned(),
        |heard| format!("the knowledge is {} old", age(now().saturating_sub(heard))),
    )
}

fn print(status: &Status) -> anyhow::Result<()> {
    let mut head = format!("instance {}: ", status.instance);
    match &status.daemon {
        Some(daemon) => {
            let heard = daemon.source.last_event.map_or_else(
                || "nothing heard yet".to_owned(),
                |at| format!("last event {} ago", age(now().saturating_sub(at))),
            );
            let state = if daemon.source.synchronised { "synchronised" } else { "not synchronised" };
            writeln!(head, "running as process {} for {}", daemon.pid, age(daemon.uptime_seconds))?;
            write!(head, "source {}: {state}, {heard}", daemon.source.location)?;
            if let Some(freshness) = &daemon.source.freshness {
                let connection = if freshness.connected { "connected" } else { "not connected" };
                write!(head, "; {connection}, {}", knowledge(freshness))?;
            }
        }
        None => head.push_str("not running"),
    }
    writeln!(head, "\nnodes: {} ready, {} unresolved", status.vteps_ready, status.vteps_unresolved)?;
    lines(&head)?;

    let dash = || "-".to_owned();
    table(
        &["INTERFACE", "VLAN", "ROLES", "MODE", "PROGRAM", "STATE"],
        status.interfaces.iter().map(|row| {
            [
                row.name.clone(),
                row.vlan.map_or_else(dash, |vlan| vlan.to_string()),
                row.roles.join(", "),
                row.mode.unwrap_or("-").to_owned(),
                row.program.map_or_else(dash, |id| {
                    format!("{id} {}", row.program_name.as_deref().unwrap_or_default()).trim_end().to_owned()
                }),
                match (row.ifindex, row.up, row.ours) {
                    (None, ..) => "absent",
                    (_, false, _) => "down",
                    (_, _, false) if status.xdp_mode == XdpMode::Off => "kernel",
                    (_, _, false) => "not attached",
                    _ => "attached",
                }
                .to_owned(),
            ]
        }),
    )?;
    lines("")?;
    table(
        &["TABLE", "ENTRIES", "CAPACITY"],
        status
            .tables
            .iter()
            .map(|row| [row.name.to_owned(), row.entries.to_string(), row.capacity.to_string()]),
    )?;
    if let Some(sessions) = &status.sessions {
        print_sessions(sessions)?;
    }
    print_slow_path(status)?;
    for vtep in &status.unresolved {
        let reason = vtep.unresolved.as_deref().unwrap_or_default();
        lines(&format!("\nnode {} ({}) cannot be reached: {reason}", vtep.node, vtep.endpoint))?;
    }
    if !status.problems.is_empty() {
        lines("\nproblems:")?;
        for Attention { text, since } in &status.problems {
            let age = since.map(|since| format!(" (for {})", age(now().saturating_sub(since))));
            lines(&format!("- {text}{}", age.unwrap_or_default()))?;
        }
    }
    Ok(())
}

/// Translated connections by kind and address; nothing where nothing is translated.
fn print_sessions(status: &SessionStatus) -> anyhow::Result<()> {
    let SessionStatus { census, events, .. } = status;
    if census.addresses.is_empty() {
        return Ok(());
    }
    let share = |part: u64, whole: u64| part * 100 / whole.max(1);
    lines(&format!(
        "\nsessions: {} of {} ({} %), tables of {} MiB; {}",
        census.sessions,
        census.slots,
        share(census.sessions, census.slots.into()),
        status.memory_bytes.div_ceil(1 << 20),
        events.iter().map(|(event, count)| format!("{event} {count}")).collect::<Vec<_>>().join(", ")
    ))?;
    if !census.kinds.is_empty() {
        let rows = census.kinds.iter();
        table(
            &["PROTOCOL", "STATE", "SESSIONS"],
            rows.map(|kind| {
                [kind.protocol.label().to_owned(), kind.state.label().to_owned(), kind.sessions.to_string()]
            }),
        )?;
    }
    lines("")?;
    table(
        &["SNAT ADDRESS", "POOL", "SESSIONS", "MOST PORTS USED", "TOWARDS"],
        census.addresses.iter().map(|row| {
            let (used, towards) = row.busiest.map_or_else(
                || ("-".to_owned(), "-".to_owned()),
                |Busiest { pod, port, protocol, used }| {
                    (
                        format!("{used} ({} %)", share(used.into(), PORTS.into())),
                        format!("{} {pod}:{port}", protocol.label()),
                    )
                },
            );
            let pool = row.pool.clone().unwrap_or_else(|| "(draining)".to_owned());
            [row.address.to_string(), pool, row.sessions.to_string(), used, towards]
        }),
    )?;
    Ok(())
}

/// Firewall, settings, and what the kernel alone does differently.
fn print_slow_path(status: &Status) -> anyhow::Result<()> {
    if let Some(firewall) = &status.firewall {
        let dropped =
            firewall.dropped.iter().map(|(counter, dropped)| format!(", {counter} {}", dropped.packets));
        lines(&format!(
            "\nfirewall inet {}: admits {} sources{}",
            firewall.table,
            firewall.nodes,
            dropped.collect::<String>()
        ))?;
    }
    for (key, change) in &status.settings {
        lines(&format!("{key} is {} instead of {} (until `gateway detach`)", change.new, change.old))?;
    }
    if !status.differences.is_empty() {
        lines("\nxdp_mode is off: the kernel alone forwards")?;
        let rows = status.differences.iter();
        table(
            &["WHAT", "WITH THE PROGRAM", "OFF"],
            rows.map(|row| [row.what.to_owned(), row.with_program.to_owned(), row.off.to_owned()]),
        )?;
    }
    Ok(())
}
