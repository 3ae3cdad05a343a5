//! `gateway show sessions` and `gateway sessions flush`: the tables of sessions, one batch at a time, so that a million of
//! them take no more memory than ten. Both work while no daemon runs.

use std::{
    collections::BTreeMap,
    io::{self, BufWriter, Write as _},
    process::ExitCode,
};

use anyhow::bail;
use clap::{Args as ClapArgs, Subcommand};
use gateway_common::abi::{ReverseKey, SweepMode};
use serde::Serialize;

use super::output::lines;
use crate::{
    config::{Config, Location},
    dataplane::{
        constants::{Sessions, common},
        load::Loader,
        pins::Pins,
        sessions::{SessionTables, now},
        tables::Tables,
    },
    kernel::host::Host,
    sessions::{Session, filter::Filter},
};

/// Arguments of `sessions`.
#[derive(ClapArgs, Debug)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
    #[command(flatten)]
    location: Location,
}

#[derive(Subcommand, Debug)]
enum Verb {
    /// End connections: their next packets find none, and clients have to connect anew
    Flush {
        #[command(flatten)]
        filter: Filter,
        /// End all of them
        #[arg(long)]
        all: bool,
    },
}

/// A session with the names that its numbers stand for.
#[derive(Serialize)]
struct Row<'a> {
    #[serde(flatten)]
    session: Session,
    /// Name of the overlay.
    overlay_name: Option<&'a str>,
    /// Name of the interface that the client is behind.
    interface_name: Option<&'a str>,
    /// Name of the pod's node, if the daemon told it.
    node: Option<&'a str>,
}

/// Prints sessions as they are read.
pub(super) fn show(
    config: &Config,
    tables: &Tables,
    nodes: &BTreeMap<u32, String>,
    filter: &Filter,
    as_json: bool,
) -> anyhow::Result<()> {
    let devices = config.devices();
    let mut out = BufWriter::new(io::stdout().lock());
    if !as_json {
        let titles = ["PROTO", "STATE", "CLIENT", "POD", "SNAT", "IDLE", "LEFT", "NODE"];
        line(&mut out, &titles.map(str::to_owned))?;
    }
    let SessionTables { forward, reverse, .. } = &tables.sessions;
    reverse.each_batch(|keys, values| -> anyhow::Result<()> {
        let now = now();
        for (key, value) in keys.iter().zip(values).filter(|(key, value)| filter.matches(key, value)) {
            let partner = forward.get(&value.forward_key(key))?;
            let timeouts = &config.snat.timeouts;
            let Some(session) = Session::new(key, value, partner.as_ref(), timeouts, now) else { continue };
            let node = nodes.get(&session.vtep).map(String::as_str);
            if as_json {
                let overlay = config.overlays.get(usize::from(session.overlay));
                let row = Row {
                    overlay_name: overlay.map(|overlay| overlay.name.as_str()),
                    interface_name: devices.get(usize::from(session.interface)).copied(),
                    node,
                    session,
                };
                serde_json::to_writer(&mut out, &row).map_err(io::Error::from)?;
                writeln!(out)?;
            } else {
                let columns = [
                    session.protocol.label().to_owned(),
                    session.state.label().to_owned(),
                    format!("{}:{}", session.client, session.client_port),
                    format!("{}:{}", session.pod, session.pod_port),
                    format!("{}:{}", session.snat_address, session.snat_port),
                    format!("{} s", session.idle_seconds),
                    format!("{} s", session.expires_seconds),
                    node.unwrap_or("-").to_owned(),
                ];
                line(&mut out, &columns)?;
            }
        }
        Ok(())
    })?;
    Ok(out.flush()?)
}

/// Columns of fixed widths: what is not read yet cannot be measured.
fn line(out: &mut impl io::Write, columns: &[String; 8]) -> io::Result<()> {
    let [protocol, state, client, pod, snat, idle, left, node] = columns;
    writeln!(
        out,
        "{protocol:<5}  {state:<11}  {client:<21}  {pod:<21}  {snat:<21}  {idle:>7}  {left:>7}  {node}"
    )
}

/// Ends sessions.
///
/// # Errors
///
/// Nothing says which, the tables are not there, or the program cannot be run.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let Verb::Flush { filter, all } = &args.verb;
    match (filter.is_empty(), all) {
        (true, false) => bail!(
            "say which sessions are to end (--client, --pod, --snat-address, --protocol, --state, --port), or --all"
        ),
        (false, true) => bail!("--all is all of them: leave out either it or the others"),
        _ => {}
    }
    let config = args.location.load()?;
    let pins = Pins::new(&config.datapath.bpffs, &config.instance);
    // First of all: loading would make tables that are not there.
    let tables = Tables::open(&pins)?.sessions;
    let slots = tables.slots.capacity();
    let constants = common(&config, &Host::default(), &Sessions { slots, ..Sessions::default() })?;
    let sweeper = Loader::of(pins, &config, slots).sweeper(&constants)?;
    let mut ended = 0;
    tables.reverse.each_batch(|keys, values| -> anyhow::Result<()> {
        let meant = keys.iter().zip(values).filter(|(key, value)| filter.matches(key, value));
        let meant: Vec<ReverseKey> = meant.map(|(key, _)| *key).collect();
        ended += sweeper.remove(&meant, SweepMode::ALL)?;
        Ok(())
    })?;
    lines(&format!("sessions ended: {ended}"))?;
    Ok(ExitCode::SUCCESS)
}
