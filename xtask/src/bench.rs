//! Measures: `control-plane` runs the program of that name of the tests crate on release builds.

use std::path::PathBuf;

use anyhow::Result;

use crate::{
    build,
    process::{cargo, run as execute},
    setup,
};

#[derive(clap::Args)]
pub(crate) struct Options {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    /// 5,000 nodes and 150,000 pods: full sync, memory, and a minute of 100 events a second
    ControlPlane {
        /// Write the result here as well
        #[arg(long)]
        json: Option<PathBuf>,
    },
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let What::ControlPlane { json } = &options.what;
    setup::run(&setup::Need::ALL)?;
    build::run(&build::Options { release: true })?;
    execute(cargo().args(["build", "--release", "--package", "gateway-tests", "--bins"]))?;
    let mut command = cargo();
    command.args([
        "run",
        "--quiet",
        "--release",
        "--package",
        "gateway-tests",
        "--bin",
        "bench-control-plane",
        "--",
    ]);
    if let Some(path) = json {
        command.arg("--json").arg(std::path::absolute(path)?);
    }
    execute(&mut command)
}
