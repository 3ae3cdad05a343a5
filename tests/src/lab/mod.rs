//! Topologies of network namespaces.
//!
//! - [`Flannel`]: the topology of the main job.
//! - [`outside`]: clients whose addresses pods cannot answer, and a watch over the wires on which they meet.
//! - [`Host`]: what one can do on a host: run commands, capture, inject frames, open sockets.
//! - [`traffic`]: ping, iperf3, HTTP and their results.
//! - [`stream`]: numbered datagrams at a constant rate, each accounted for.
//! - [`traced`]: a program that dies between two of its system calls.
//! - [`frames`]: frames built by hand, right and wrong.
//! - [`Gateway`]: the gateway under test.
//! - [`Cluster`]: an API server that keeps the cluster's objects; its nodes learn of one another as flannel's do.
//! - [`registry`]: how labs end.
//!
//! Two properties of veth devices shape the wiring. Packets that the kernel itself sends carry unfinished checksums,
//! so senders have transmit checksum offload off (an XDP program would freeze what is unfinished). And what XDP sends
//! out of a veth device arrives only if the far end polls, so the switch ports that face the gateway have an XDP program
//! that passes everything ([`pass`]).

pub mod capture;
pub mod cluster;
pub mod flannel;
mod flanneld;
pub mod frames;
pub mod gateway;
pub mod host;
pub mod manifest;
pub mod netns;
pub mod outside;
pub mod pass;
pub mod process;
pub mod registry;
pub mod relay;
pub mod standing;
pub mod stream;
pub mod traced;
pub mod traffic;
pub mod wiring;

use std::{
    env,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

pub use self::{
    capture::Capture,
    cluster::Cluster,
    flannel::Flannel,
    gateway::Gateway,
    host::{Host, Role},
    process::Process,
};

/// Says how many times as long as usual the lab waits for what it expects: for emulated machines.
pub const PATIENCE_VARIABLE: &str = "GATEWAY_TEST_PATIENCE";

/// `limit`, or longer where patience is asked for.
fn patient(limit: Duration) -> Duration {
    let factor = env::var(PATIENCE_VARIABLE).ok().and_then(|text| text.parse().ok());
    limit * factor.unwrap_or(1)
}

/// Tries until `attempt` gives a value, and gives that.
///
/// # Errors
/// When `attempt` fails, and when it has given nothing for `limit`; the error names `what`.
pub fn wait_until<T>(
    what: &str,
    limit: Duration,
    mut attempt: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let (start, limit) = (Instant::now(), patient(limit));
    loop {
        if let Some(value) = attempt().with_context(|| format!("while waiting: {what}"))? {
            return Ok(value);
        }
        if start.elapsed() > limit {
            bail!("not within {limit:?}: {what}");
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// Where Cargo puts what this program was built with: the directory of the profile, such as `target/debug`.
pub fn profile_directory() -> Result<PathBuf> {
    let program = env::current_exe().context("cannot tell where this program lies")?;
    let mut directory = program.parent().context("this program lies nowhere")?;
    // Test programs lie one level deeper than binaries.
    if directory.ends_with("deps") {
        directory = directory.parent().context("no directory above deps")?;
    }
    Ok(directory.to_owned())
}

/// The directory for logs and captures of the lab called `label`: `target/lab/<label>`.
pub fn evidence_directory(label: &str) -> Result<PathBuf> {
    let profile = profile_directory()?;
    Ok(profile.parent().context("no target directory")?.join("lab").join(label))
}
