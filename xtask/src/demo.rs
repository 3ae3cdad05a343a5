//! Shows the gateway at work: runs the `demo` program of the tests crate.

use std::{os::unix::process::CommandExt, path::PathBuf};

use anyhow::{Result, anyhow};

use crate::{
    build,
    process::{cargo, run as execute},
    setup,
};

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Where the cluster's objects are kept
    #[arg(long, default_value = "files")]
    source: Source,
    /// An API server for `--source kubernetes`, instead of the test server: an administrator's kubeconfig
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Source {
    /// Manifest files
    Files,
    /// An API server: the gateway joins by its own Node, as nodes of flannel learn of it
    Kubernetes,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    setup::run(&setup::Need::ALL)?;
    build::run(&build::Options { release: false })?;
    let mut command = cargo();
    command.args(["run", "--quiet", "--package", "gateway-tests", "--bin", "demo", "--"]);
    if let Source::Kubernetes = options.source {
        execute(cargo().args(["build", "--quiet", "--package", "gateway-tests", "--bin", "apiserver"]))?;
        command.args(["--source", "kubernetes"]);
    }
    if let Some(path) = &options.kubeconfig {
        command.arg("--kubeconfig").arg(std::path::absolute(path)?);
    }
    // Takes our place, so that Ctrl-C reaches the program alone: it cleans up.
    let error = command.exec();
    Err(anyhow!("cannot start cargo: {error}"))
}
