//! Builds the gateway; its build script compiles the BPF object that the binary embeds.

use anyhow::Result;

use crate::{
    process::{cargo, run as execute},
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
