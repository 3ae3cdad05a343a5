//! Builds the gateway; its build script compiles the BPF object that the binary embeds.

use std::path::PathBuf;

use anyhow::Result;

use crate::{
    process::{cargo, run as execute, workspace},
    setup,
};

#[derive(clap::Args)]
pub(crate) struct Options {
    /// With optimisations
    #[arg(long)]
    pub(crate) release: bool,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    setup::run(&[setup::Need::Bpf])?;
    let mut command = cargo();
    command.args(["build", "--package", "gateway"]);
    if options.release {
        command.arg("--release");
    }
    execute(&mut command)
}

/// Builds a gateway with another BPF object inside, out of the way of the ordinary one; gives its path.
pub(crate) fn variant() -> Result<PathBuf> {
    let directory = workspace().join("target/variant");
    let mut command = cargo();
    command.args(["build", "--package", "gateway", "--target-dir"]).arg(&directory);
    command.env("GATEWAY_BPF_PROFILE", "portable");
    execute(&mut command)?;
    Ok(directory.join("debug/gateway"))
}
