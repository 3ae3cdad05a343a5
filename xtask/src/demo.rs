//! Runs the `demo` program of the tests crate.

use anyhow::Result;

use crate::{
    build,
    process::{cargo, run as execute},
    setup,
};

#[derive(clap::Args)]
pub(crate) struct Options {
    /// What the program is told
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<String>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    setup::run(&setup::Need::ALL)?;
    build::run(&build::Options { release: false })?;
    execute(
        cargo()
            .args(["run", "--quiet", "--package", "gateway-tests", "--bin", "demo", "--"])
            .args(&options.arguments),
    )
}
