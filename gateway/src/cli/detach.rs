//! `gateway detach`

use std::{collections::BTreeSet, path::PathBuf, process::ExitCode};

use anyhow::Context as _;
use clap::Args as ClapArgs;

use super::{output::lines, runtime};
use crate::{
    config::{Config, DEFAULT_BPFFS, Location, Overlay, open::forget},
    daemon::report::Report,
    dataplane::pins::{InstanceLock, Pins},
    kernel::{
        device::{self, Device},
        firewall::{self, table_name},
        host::Host,
        netlink,
        sysctl::Settings,
        underlay,
    },
};

/// Arguments of `detach`.
#[derive(ClapArgs, Debug)]
pub struct Args {
    #[command(flatten)]
    location: Location,
    /// Root of the bpffs, instead of the configuration's `datapath.bpffs`
    #[arg(long, env = "GATEWAY_BPFFS", value_name = "DIRECTORY")]
    bpffs: Option<PathBuf>,
}

/// What to look for.
struct Target {
    instance: String,
    bpffs: PathBuf,
    overlays: Vec<Overlay>,
    interfaces: BTreeSet<String>,
}

impl Target {
    /// By the configuration; where it cannot be read, by the name of the instance and what its daemon left written.
    fn of(args: &Args) -> anyhow::Result<Self> {
        let mut target = match (args.location.load(), &args.location.instance) {
            (Ok(Config { instance, overlays, datapath, interfaces, .. }), _) => Self {
                instance,
                bpffs: datapath.bpffs,
                overlays,
                interfaces: interfaces.into_iter().map(|interface| interface.name).collect(),
            },
            (Err(_), Some(instance)) => Self {
                instance: instance.clone(),
                bpffs: DEFAULT_BPFFS.into(),
                overlays: Vec::new(),
                interfaces: BTreeSet::new(),
            },
            (Err(problems), None) => {
                return Err(problems)
                    .context("without a valid configuration, name the gateway with --instance");
            }
        };
        if let Some(bpffs) = &args.bpffs {
            target.bpffs.clone_from(bpffs);
        }
        Ok(target)
    }
}

/// Removes the programs, the tables, the kernel devices and the firewall of an instance that does not run, and puts
/// kernel settings back. A configuration that is
/// absent or invalid is in nobody's way if the instance is named.
///
/// # Errors
///
/// A daemon runs, the instance is not known, or something cannot be removed.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let target = Target::of(args)?;
    let lock = InstanceLock::take(&target.instance)?;
    let pins = Pins::new(&target.bpffs, &target.instance);
    let interfaces = pins.linked_interfaces()?;
    // A device of an overlay that is not in the configuration is known by what the daemon left written.
    let left = Report::read(&target.instance).ok().flatten().map(|report| report.devices).unwrap_or_default();
    let removed = pins.remove()?;
    let (mut devices, mut firewall) = (0, false);
    runtime()?.block_on(async {
        let handle = netlink::connect()?;
        for overlay in &target.overlays {
            devices += usize::from(Device::new(handle.clone(), &target.instance, overlay).remove().await?);
        }
        for name in &left {
            devices += usize::from(device::remove(&handle, &target.instance, name).await?);
        }
        let names: BTreeSet<String> = target.interfaces.iter().chain(&interfaces).cloned().collect();
        underlay::release(&handle, &Host::read(&handle).await?, &names).await?;
        // Last: until here it protects what is there.
        firewall = firewall::remove(&target.instance).await?;
        anyhow::Ok(())
    })?;
    let restored = Settings::open(&target.instance)?.restore()?;
    Report::remove(&target.instance)?;
    forget(&target.instance).context("cannot forget the choice of a subnet")?;
    lock.remove()?;
    for (key, change) in &restored {
        lines(&format!("{key} restored from {} to {}", change.new, change.old))?;
    }
    if removed || devices > 0 || firewall || !restored.is_empty() {
        let names = if interfaces.is_empty() { "no interface".to_owned() } else { interfaces.join(", ") };
        lines(&format!("detached from {names}; tables removed; {devices} kernel devices removed"))?;
        if firewall {
            lines(&format!("nftables table inet {} removed", table_name(&target.instance)))?;
        }
    } else {
        lines("nothing to remove")?;
    }
    Ok(ExitCode::SUCCESS)
}
