//! The configuration, with the subnets that it leaves to the gateway.

use std::path::Path;

use anyhow::{Context as _, bail};
use tracing::info;

use crate::{
    cluster::{
        announce::settle,
        kubernetes::{Link, Timing},
    },
    config::{Config, Overrides, Reading, Subnets, open::remember},
};

/// What a verb does about subnets that are open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Choice {
    /// Chooses them if the daemon makes the Node, and keeps to them.
    Daemon,
    /// Chooses them, and keeps to them.
    Apply,
    /// Finds out which they are.
    Remove,
}

/// Reads and validates the configuration, and finds the subnets that it leaves open.
pub(super) async fn settled(file: &Path, overrides: &Overrides, choice: Choice) -> anyhow::Result<Config> {
    let open = match Config::read(file, overrides)? {
        Reading::Complete(config) => return Ok(*config),
        Reading::Open(open) => open,
    };
    let may_choose = choice != Choice::Daemon || open.register;
    let link = Link::new(open.access.clone());
    let settled = match settle(&link, &open, may_choose, &Timing::default()).await {
        Ok(settled) => settled,
        Err(problems) => {
            let problems: Vec<String> = problems.iter().map(ToString::to_string).collect();
            bail!("{}", problems.join("\n"));
        }
    };
    for found in &settled {
        info!("overlay {}: subnet {}: {}", found.overlay, found.subnet, found.reason);
    }
    let subnets: Subnets = settled.into_iter().map(|found| (found.overlay, found.subnet)).collect();
    let config = Config::load_with(file, overrides, subnets.clone())?;
    if choice != Choice::Remove {
        remember(&open.instance, &subnets).context("cannot keep the choice of a subnet")?;
    }
    Ok(config)
}
