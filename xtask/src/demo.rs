//! Shows the gateway at work: runs the `demo` program of the tests crate.

use std::os::unix::process::CommandExt;

use anyhow::{Result, anyhow};

use crate::{build, process::cargo, setup};

pub(crate) fn run() -> Result<()> {
    setup::run(&setup::Need::ALL)?;
    build::run(&build::Options { release: false })?;
    // Takes our place, so that Ctrl-C reaches the program alone: it cleans up.
    let error = cargo().args(["run", "--quiet", "--package", "gateway-tests", "--bin", "demo"]).exec();
    Err(anyhow!("cannot start cargo: {error}"))
}
