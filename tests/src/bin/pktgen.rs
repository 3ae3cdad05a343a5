//! Load for a gateway on real network cards: `cargo xtask pktgen`, explained in `docs/load-testing.md`.

use std::{
    fs,
    net::Ipv4Addr,
    ops::RangeInclusive,
    path::Path,
    process::ExitCode,
    str::FromStr,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow};
use clap::Parser;
use gateway_common::wire::Mac;
use gateway_tests::pktgen::{Load, Sent};
use serde_json::json;

/// Sends UDP packets to pods as fast as the driver takes them, or at a rate, and counts what arrives.
#[derive(Parser)]
#[command(name = "cargo xtask pktgen", bin_name = "cargo xtask pktgen")]
struct Cli {
    /// Interface that sends
    #[arg(long)]
    interface: String,
    /// MAC address of the gateway's external interface; from a tunnel device: that of its VTEP
    #[arg(long)]
    to: Mac,
    /// Source address of all packets
    #[arg(long)]
    source: Ipv4Addr,
    /// Destinations: a pod's address, or a range such as 10.244.1.2-10.244.1.200
    #[arg(long)]
    destinations: String,
    /// UDP source ports: more of them are more flows
    #[arg(long, default_value = "10000-19999")]
    source_ports: String,
    /// UDP destination port
    #[arg(long, default_value_t = 9)]
    port: u16,
    /// Bytes of a frame without its checksum: 60 are 64 on the wire
    #[arg(long, default_value_t = 60)]
    size: u16,
    /// Frames
    #[arg(long, default_value_t = 10_000_000)]
    count: u64,
    /// Frames a second [default: as many as possible]
    #[arg(long)]
    rate: Option<u64>,
    /// Frames handed to the driver at once; 1 for virtual devices
    #[arg(long, default_value_t = 32)]
    burst: u32,
    /// CPUs that send, such as 0-3
    #[arg(long, default_value = "0")]
    cpus: String,
    /// Interface of this host where the packets arrive behind the gateway; its counter is compared
    #[arg(long)]
    sink: Option<String>,
    /// For programs
    #[arg(long)]
    json: bool,
}

/// For as long as packets may be under way.
const QUIET: Duration = Duration::from_millis(500);

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("pktgen: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<ExitCode> {
    let load = Load {
        interface: cli.interface.clone(),
        to: cli.to,
        source: cli.source,
        destinations: range(&cli.destinations).context("--destinations")?,
        source_ports: range(&cli.source_ports).context("--source-ports")?,
        port: cli.port,
        size: cli.size,
        count: cli.count,
        rate: cli.rate,
        burst: cli.burst,
        cpus: range::<usize>(&cli.cpus).context("--cpus")?.collect(),
    };
    let before = cli.sink.as_deref().map(received).transpose()?;
    let sent = load.send()?;
    let arrived = match (cli.sink.as_deref(), before) {
        (Some(sink), Some(before)) => Some(settled(sink)?.saturating_sub(before)),
        _ => None,
    };
    report(cli, &sent, arrived);
    let total: u64 = sent.iter().map(|sent| sent.frames).sum();
    Ok(if arrived.is_some_and(|arrived| arrived < total) { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// `1-3`, or `1` alone.
fn range<T: FromStr + Copy + PartialOrd>(text: &str) -> Result<RangeInclusive<T>> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let parse = |part: &str| part.parse().map_err(|_| anyhow!("{part:?} in {text:?} is not valid"));
    let (first, last): (T, T) = (parse(first)?, parse(last)?);
    anyhow::ensure!(first <= last, "{text:?} ends before it begins");
    Ok(first..=last)
}

/// Packets that an interface has received, as its driver counts them.
fn received(interface: &str) -> Result<u64> {
    let path = Path::new("/sys/class/net").join(interface).join("statistics/rx_packets");
    let text = fs::read_to_string(&path).with_context(|| format!("there is no interface {interface}"))?;
    Ok(text.trim().parse()?)
}

/// The same when nothing arrives any more.
fn settled(interface: &str) -> Result<u64> {
    let (mut last, mut since) = (received(interface)?, Instant::now());
    while since.elapsed() < QUIET {
        thread::sleep(QUIET / 10);
        let now = received(interface)?;
        if now != last {
            (last, since) = (now, Instant::now());
        }
    }
    Ok(last)
}

#[expect(clippy::cast_precision_loss, reason = "figures for people")]
fn report(cli: &Cli, sent: &[Sent], arrived: Option<u64>) {
    let total: u64 = sent.iter().map(|sent| sent.frames).sum();
    let errors: u64 = sent.iter().map(|sent| sent.errors).sum();
    let longest = sent.iter().map(|sent| sent.duration).max().unwrap_or_default();
    let rate = total as f64 / longest.as_secs_f64().max(f64::EPSILON);
    if cli.json {
        let report = json!({
            "frame_bytes": cli.size, "sent": total, "errors": errors, "seconds": longest.as_secs_f64(),
            "frames_per_second": rate, "received": arrived,
        });
        println!("{report:#}");
        return;
    }
    for Sent { cpu, frames, errors, duration } in sent {
        println!("CPU {cpu}: {frames} frames in {:.2} s, {errors} errors", duration.as_secs_f64());
    }
    println!("sent: {total} frames of {} bytes, {:.3} Mpps", cli.size, rate / 1e6);
    if let Some(arrived) = arrived {
        let lost = total.saturating_sub(arrived);
        let percent = lost as f64 * 100.0 / (total as f64).max(1.0);
        println!("received: {arrived} frames, lost: {lost} ({percent:.4} %)");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_has_one_or_two_ends() {
        assert_eq!(range::<u16>("7").unwrap(), 7..=7);
        assert_eq!(range::<u16>("7-9").unwrap(), 7..=9);
        let (first, last) = (Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 9));
        assert_eq!(range::<Ipv4Addr>("10.0.0.1-10.0.0.9").unwrap(), first..=last);
        for text in ["9-7", "x", "1-", "70000"] {
            assert!(range::<u16>(text).is_err(), "{text}");
        }
    }
}
