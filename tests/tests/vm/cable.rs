//! The wire between the machine's two network interfaces, as a wire of the lab.

use std::{fs, process::Command, time::Duration};

use anyhow::{Context as _, Result, ensure};
use gateway_tests::lab::{Host, flannel::SWITCH, wait_until, wiring};

/// Addresses of the interfaces, as xtask gives them to QEMU.
const NEAR: &str = "52:54:00:00:02:c8";
const FAR: &str = "52:54:00:00:02:c9";
/// After the end of a lab the kernel takes a moment to bring interfaces home.
const HOMECOMING: Duration = Duration::from_secs(20);

/// Puts the cable in the place of the veth pair between an interface of a host and its switch. The interface keeps its
/// name, and loses its addresses.
pub(crate) fn replace(host: &Host, interface: &str, switch: &Host) -> Result<()> {
    wiring::delete(host.namespace(), interface)?;
    plug(NEAR, host, interface)?;
    plug(FAR, switch, host.name())?;
    wiring::enslave(switch.namespace(), host.name(), SWITCH)
}

/// Moves an interface of the machine to a host, where it gets this name.
fn plug(mac: &str, host: &Host, name: &str) -> Result<()> {
    let device = wait_until(&format!("the interface {mac} is there"), HOMECOMING, || device(mac))?;
    ip(&["link", "set", "dev", &device, "down"])?;
    ip(&["link", "set", "dev", &device, "netns", host.namespace().name(), "name", name])?;
    wiring::up(host.namespace(), name)
}

/// The name of the machine's interface with that address, if it is in the machine's own namespace.
fn device(mac: &str) -> Result<Option<String>> {
    let directory = "/sys/class/net";
    for entry in fs::read_dir(directory).with_context(|| format!("cannot list {directory}"))? {
        let entry = entry?;
        // It may be on its way in or out.
        let address = fs::read_to_string(entry.path().join("address")).unwrap_or_default();
        if address.trim() == mac {
            return Ok(Some(entry.file_name().to_string_lossy().into_owned()));
        }
    }
    Ok(None)
}

fn ip(words: &[&str]) -> Result<()> {
    let output = Command::new("ip").args(words).output().context("cannot run ip")?;
    ensure!(
        output.status.success(),
        "`ip {}` failed: {}",
        words.join(" "),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}
