//! Keeps the test network standing: runs the `lab` program of the tests crate.

use std::os::unix::process::CommandExt;

use anyhow::{Result, anyhow};

use crate::{build, process::cargo, setup};

#[derive(clap::Args)]
#[command(override_usage = "cargo xtask lab up | down | status [--json] | exec HOST -- COMMAND")]
pub(crate) struct Options {
    /// `up`, `down`, `status [--json]` or `exec HOST -- COMMAND`
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
    arguments: Vec<String>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    setup::run(&setup::Need::ALL)?;
    if options.arguments.first().is_some_and(|verb| verb == "up") {
        build::run(&build::Options { release: false })?;
    }
    // Takes our place, so that exit code and signals are the program's: `exec` is to behave like its command.
    let error = cargo()
        .args(["run", "--quiet", "--package", "gateway-tests", "--bin", "lab", "--"])
        .args(&options.arguments)
        .exec();
    Err(anyhow!("cannot start cargo: {error}"))
}
