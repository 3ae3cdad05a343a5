//! The standing lab: `cargo xtask lab`.

use std::{
    io::{self, Write},
    os::unix::process::ExitStatusExt,
    path::PathBuf,
    process::{Command, ExitCode},
    thread,
};

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};
use gateway_tests::lab::{
    Flannel,
    host::Interface,
    standing::{Place, Standing},
};
use serde::Serialize;

/// A flannel cluster, clients and a running gateway, in network namespaces.
#[derive(Parser)]
#[command(name = "cargo xtask lab", bin_name = "cargo xtask lab")]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Build the lab and start its gateway.
    Up,
    /// Remove the lab.
    Down,
    /// Show hosts, namespaces, roles, interfaces and addresses.
    Status {
        /// For programs.
        #[arg(long)]
        json: bool,
    },
    /// Run a command on a host.
    Exec {
        /// Name of the host, as `status` shows it.
        host: String,
        /// The command and its arguments.
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Build a lab of one's own and wait: for tests of how labs end.
    #[command(hide = true)]
    Hold,
}

fn main() -> ExitCode {
    match run(Cli::parse().verb) {
        Ok(code) => code,
        Err(error)
            if error.downcast_ref::<io::Error>().is_some_and(|io| io.kind() == io::ErrorKind::BrokenPipe) =>
        {
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(verb: Verb) -> Result<ExitCode> {
    match verb {
        Verb::Up => up()?,
        Verb::Down => {
            Standing::down()?;
            writeln!(io::stdout(), "The lab is gone.")?;
        }
        Verb::Status { json } => status(json)?,
        Verb::Exec { host, command } => return exec(&host, &command),
        Verb::Hold => hold()?,
    }
    Ok(ExitCode::SUCCESS)
}

fn up() -> Result<()> {
    let standing = Standing::up()?;
    let mut out = io::stdout().lock();
    writeln!(
        out,
        "The lab is up: {} hosts, the gateway runs as process {}.",
        standing.hosts.len(),
        standing.gateway
    )?;
    writeln!(out, "  manifests, configuration, logs   {}", standing.directory.display())?;
    writeln!(out, "  look around                      cargo xtask lab status")?;
    writeln!(out, "  try it                           cargo xtask lab exec client1 -- ping -c 3 10.244.1.2")?;
    writeln!(out, "  take it down                     cargo xtask lab down")?;
    Ok(())
}

#[derive(Serialize)]
struct Status {
    directory: PathBuf,
    config: PathBuf,
    gateway: GatewayStatus,
    hosts: Vec<HostStatus>,
}

#[derive(Serialize)]
struct GatewayStatus {
    pid: u32,
    running: bool,
}

#[derive(Serialize)]
struct HostStatus {
    #[serde(flatten)]
    place: Place,
    interfaces: Vec<Interface>,
}

fn status(json: bool) -> Result<()> {
    let standing = Standing::get()?;
    let mut hosts = Vec::new();
    for place in &standing.hosts {
        hosts.push(HostStatus { interfaces: standing.open(place)?.interfaces()?, place: place.clone() });
    }
    let gateway = GatewayStatus { pid: standing.gateway, running: standing.gateway_running() };
    let mut out = io::stdout().lock();
    if json {
        let status = Status { directory: standing.directory, config: standing.config, gateway, hosts };
        serde_json::to_writer_pretty(&mut out, &status).map_err(io::Error::from)?;
        writeln!(out)?;
        return Ok(());
    }
    let state = if gateway.running { "runs" } else { "has ended; its tables still forward" };
    writeln!(out, "gateway   process {} {state}", gateway.pid)?;
    writeln!(out, "config    {}", standing.config.display())?;
    writeln!(
        out,
        "{:<10} {:<8} {:<22} {:<12} {:<18} addresses",
        "host", "role", "namespace", "interface", "MAC"
    )?;
    for HostStatus { place, interfaces } in &hosts {
        let (mut name, mut role, mut namespace) =
            (place.name.as_str(), place.role.to_string(), place.namespace.as_str());
        for interface in interfaces {
            let addresses: Vec<_> = interface.addresses.iter().map(ToString::to_string).collect();
            let (device, mac) = (&interface.name, &interface.mac);
            writeln!(
                out,
                "{name:<10} {role:<8} {namespace:<22} {device:<12} {mac:<18} {}",
                addresses.join(" ")
            )?;
            (name, role, namespace) = ("", String::new(), "");
        }
    }
    Ok(())
}

/// Like the command itself: terminal, standard streams and exit code are its own.
fn exec(host: &str, command: &[String]) -> Result<ExitCode> {
    let host = Standing::get()?.host(host)?;
    let Some((program, arguments)) = command.split_first() else { bail!("no command") };
    let status = host.namespace().enter(|| {
        Command::new(program).args(arguments).status().with_context(|| format!("cannot run `{program}`"))
    })?;
    // As a shell tells of signals.
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(1);
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(1)))
}

fn hold() -> Result<()> {
    let _lab = Flannel::start("held")?;
    println!("standing");
    loop {
        thread::park();
    }
}
