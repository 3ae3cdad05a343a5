//! What the XDP program costs: for `cargo xtask bench`.

use std::{fs, path::PathBuf};

use anyhow::{Context as _, Result};
use clap::Parser;
use gateway_tests::bench::{
    Effort,
    live::{self, throughput},
    machine::Machine,
    plot, program,
    report::{Report, compare},
};

/// What the XDP program costs
#[derive(Parser, Debug)]
struct Arguments {
    /// What to measure
    #[arg(value_enum)]
    what: What,
    /// Write the result here as well
    #[arg(long)]
    json: Option<PathBuf>,
    /// Draw the result into this directory, as SVG
    #[arg(long)]
    plot: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum What {
    /// The program alone
    Program,
    /// Frames that really arrive and leave
    Live,
    /// Both
    All,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let machine = Machine::here();
    let mut samples = Vec::new();
    if arguments.what != What::Live {
        samples.extend(program::run(Effort::MEASURE)?);
    }
    if arguments.what != What::Program {
        samples.extend(live::run(Effort::MEASURE)?);
    }
    let report = Report { machine, cases: compare(&samples) };
    print!("{report}");
    if let Some(path) = &arguments.json {
        let text = serde_json::to_string_pretty(&report)?;
        fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))?;
    }
    if let Some(directory) = &arguments.plot {
        for path in plot::draw(directory, &report)? {
            println!("{}", path.display());
        }
    }
    if arguments.what != What::Program {
        let figures = throughput::run(3)?;
        println!("\n{}", throughput::EXPLANATION);
        println!("XDP: {:.1} Gbit/s; xdp_mode = \"off\": {:.1} Gbit/s", figures.program, figures.kernel);
    }
    Ok(())
}
