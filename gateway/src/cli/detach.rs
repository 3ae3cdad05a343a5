//! `gateway detach`

use std::process::ExitCode;

use clap::Args as ClapArgs;

use super::{output::lines, runtime};
use crate::{
    config::Options,
    daemon::report::Report,
    dataplane::pins::{InstanceLock, Pins},
    kernel::{device::Device, host::Host, netlink, underlay},
};

/// Arguments of `detach`.
#[derive(ClapArgs, Debug)]
pub struct Args {
    #[command(flatten)]
    options: Options,
}

/// Removes the programs, the tables and the kernel devices of an instance that does not run.
///
/// # Errors
///
/// A daemon runs, or something cannot be removed.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let config = args.options.load()?;
    let _lock = InstanceLock::take(&config.instance)?;
    let pins = Pins::new(&config.datapath.bpffs, &config.instance);
    let interfaces = pins.linked_interfaces()?;
    let removed = pins.remove()?;
    let mut devices = 0;
    runtime()?.block_on(async {
        let handle = netlink::connect()?;
        for overlay in &config.overlays {
            devices += usize::from(Device::new(handle.clone(), overlay).remove().await?);
        }
        underlay::release(&handle, &Host::read(&handle).await?, &config).await?;
        anyhow::Ok(())
    })?;
    Report::remove(&config.instance)?;
    if removed || devices > 0 {
        let names = if interfaces.is_empty() { "no interface".to_owned() } else { interfaces.join(", ") };
        lines(&format!("detached from {names}; tables removed; {devices} kernel devices removed"))?;
    } else {
        lines("nothing to remove")?;
    }
    Ok(ExitCode::SUCCESS)
}
