//! Measures, on release builds: programs of the tests crate do the work.

use std::path::PathBuf;

use anyhow::{Result, bail};

use crate::{
    build,
    process::{cargo, run as execute},
    setup,
};

#[derive(clap::Args)]
pub(crate) struct Options {
    /// What to measure
    #[arg(value_enum, default_value_t = What::All)]
    what: What,
    /// Write the result here as well (docs/performance.md has the fields)
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw the result into this directory, as SVG
    #[arg(long, value_name = "DIR")]
    plot: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum What {
    /// The XDP program by itself, beside references
    Program,
    /// Frames that really arrive and leave, beside the kernel's own VXLAN
    Live,
    /// Both
    All,
    /// 5,000 nodes and 150,000 pods: full sync, memory, and a minute of 100 events a second
    ControlPlane,
}

impl What {
    /// The program of the tests crate, and its words.
    const fn program(self) -> (&'static str, Option<&'static str>) {
        match self {
            Self::Program => ("bench", Some("program")),
            Self::Live => ("bench", Some("live")),
            Self::All => ("bench", Some("all")),
            Self::ControlPlane => ("bench-control-plane", None),
        }
    }
}

pub(crate) fn run(options: &Options) -> Result<()> {
    if options.what == What::ControlPlane && options.plot.is_some() {
        bail!("nothing is drawn of the control plane: leave out --plot");
    }
    setup::run(&setup::Need::ALL)?;
    build::run(&build::Options { release: true })?;
    execute(cargo().args(["build", "--release", "--package", "gateway-tests", "--bins"]))?;
    let (program, word) = options.what.program();
    let mut command = cargo();
    command.args(["run", "--quiet", "--release", "--package", "gateway-tests", "--bin", program, "--"]);
    command.args(word);
    for (name, path) in [("--json", &options.json), ("--plot", &options.plot)] {
        if let Some(path) = path {
            command.arg(name).arg(std::path::absolute(path)?);
        }
    }
    execute(&mut command)
}
