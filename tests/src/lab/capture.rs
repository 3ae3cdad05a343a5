//! Frames seen on an interface, kept as a pcap file.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result};
use nix::sys::signal::Signal;
use pcap_file::pcap::PcapReader;

use super::{host::Host, process::Process, wait_until};

/// A capture that runs. tcpdump does the work: its filters are the ones people know, and its files open in Wireshark.
#[derive(Debug)]
pub struct Capture {
    process: Process,
    path: PathBuf,
}

impl Capture {
    pub(super) fn start(host: &Host, interface: &str, filter: &str, path: PathBuf) -> Result<Self> {
        let file = path.to_str().context("the path of the capture is not UTF-8")?;
        // `-Z root`: Debian's tcpdump otherwise becomes a user who may not write here.
        let mut process = host.spawn(&[
            "tcpdump",
            "--immediate-mode",
            "-U",
            "-n",
            "-s",
            "0",
            "-Z",
            "root",
            "-i",
            interface,
            "-w",
            file,
            filter,
        ])?;
        wait_until("tcpdump listens", Duration::from_secs(5), || {
            let output = process.output()?;
            if process.ended()?.is_some() {
                anyhow::bail!("tcpdump on {} of {} ended: {output}", interface, host.name());
            }
            Ok(output.contains("listening on").then_some(()))
        })?;
        Ok(Self { process, path })
    }

    /// The pcap file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Frames so far, from the Ethernet header on.
    pub fn frames(&self) -> Result<Vec<Vec<u8>>> {
        read(&self.path)
    }

    /// Waits until at least `count` frames were seen.
    pub fn wait_for(&self, count: usize, limit: Duration) -> Result<Vec<Vec<u8>>> {
        wait_until(&format!("{count} frames in {}", self.path.display()), limit, || {
            let frames = self.frames()?;
            Ok((frames.len() >= count).then_some(frames))
        })
    }

    /// Ends the capture.
    pub fn stop(mut self) -> Result<Vec<Vec<u8>>> {
        self.process.stop(Signal::SIGINT, Duration::from_secs(5))?;
        self.frames()
    }
}

/// Frames of a pcap file. A record that is being written at this moment is left out.
pub fn read(path: &Path) -> Result<Vec<Vec<u8>>> {
    if fs::metadata(path).map_or(0, |meta| meta.len()) < PCAP_HEADER {
        return Ok(Vec::new());
    }
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let mut reader = PcapReader::new(file).with_context(|| format!("{} is no pcap file", path.display()))?;
    let mut frames = Vec::new();
    while let Some(Ok(packet)) = reader.next_packet() {
        frames.push(packet.data.into_owned());
    }
    Ok(frames)
}

/// Length of a pcap file without records.
const PCAP_HEADER: u64 = 24;
