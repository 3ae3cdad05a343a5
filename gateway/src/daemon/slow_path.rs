//! What the daemon keeps of the kernel besides devices: the firewall and the settings of its interfaces.

use tokio::sync::mpsc;
use tracing::info;

use crate::{
    config::Config,
    kernel::{
        firewall::{self, Firewall, Goal},
        host::Host,
        sysctl::Settings,
    },
    plan::Desired,
};

/// Firewall and settings of an instance.
#[derive(Debug)]
pub(super) struct SlowPath {
    firewall: Firewall,
    settings: Settings,
}

/// How much of the firewall to look at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Look {
    /// The cluster changed; the table is as it was left.
    Goal,
    /// The table may have been changed.
    Table,
}

impl SlowPath {
    /// Puts the firewall in place before anything is attached or detached, and sets what forwarding needs.
    pub(super) async fn start(config: &Config, host: &Host) -> anyhow::Result<Self> {
        let mut firewall = Firewall::new(config);
        firewall.repair(&Goal::new(config, host, None)).await?;
        let mut slow_path = Self { firewall, settings: Settings::open(&config.instance)? };
        slow_path.set(config, host);
        Ok(slow_path)
    }

    /// Events of the firewall's table.
    pub(super) fn watch(config: &Config) -> std::io::Result<mpsc::Receiver<()>> {
        firewall::watch::watch(&firewall::table_name(&config.instance))
    }

    /// Makes the firewall what it should be; what could not be done, for people. With `partial` there may be nodes
    /// that `desired` does not name.
    pub(super) async fn protect(
        &mut self,
        config: &Config,
        host: &Host,
        desired: Option<&Desired>,
        partial: bool,
        look: Look,
    ) -> Option<String> {
        let goal = Goal { partial, ..Goal::new(config, host, desired) };
        let result = match look {
            Look::Goal => self.firewall.update(&goal).await,
            Look::Table => self.firewall.repair(&goal).await,
        };
        result.err().map(|error| format!("firewall {}: {error}", firewall::table_name(&config.instance)))
    }

    /// Sets what forwarding needs; what could not be done, for people.
    pub(super) fn set(&mut self, config: &Config, host: &Host) -> Vec<String> {
        if !config.host.manage_sysctl {
            return Vec::new();
        }
        let (done, errors) = self.settings.apply(config, host);
        for (key, change) in done {
            info!("{key} set from {} to {}; `gateway detach` restores it", change.old, change.new);
        }
        errors.iter().map(ToString::to_string).collect()
    }
}
