//! Load for a gateway on real network cards: runs the `pktgen` program of the tests crate.

use std::os::unix::process::CommandExt;

use anyhow::{Result, anyhow};

use crate::process::cargo;

#[derive(clap::Args)]
#[command(disable_help_flag = true)]
pub(crate) struct Options {
    /// As `cargo xtask pktgen --help` explains them
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<String>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let error = cargo()
        .args(["run", "--quiet", "--package", "gateway-tests", "--bin", "pktgen", "--"])
        .args(&options.arguments)
        .exec();
    Err(anyhow!("cannot start cargo: {error}"))
}
