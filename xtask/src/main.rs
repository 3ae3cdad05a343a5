//! The project's own tools: `cargo xtask <verb>`. One file for each verb; `setup` is called by those that need it.

mod apt;
mod bench;
mod build;
mod demo;
mod lab;
mod lint;
mod object;
mod pktgen;
mod process;
mod setup;
mod test;
mod verify;
mod vm;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(
    name = "cargo xtask",
    about = "Set-up, build, checks, tests, measurements, lab and demo of the gateway"
)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Install what build, lab and tests need; silent when nothing is missing
    Setup,
    /// Build the gateway with the BPF object inside
    Build(build::Options),
    /// Check the BPF object: forbidden symbols, stack, names, budget of instructions
    Verify(verify::Options),
    /// Check format and lints of all crates, host and BPF
    Lint,
    /// Run the tests
    Test(test::Options),
    /// Show the gateway at work on real packets, then clean up
    Demo(demo::Options),
    /// Measure
    Bench(bench::Options),
    /// Send packets to a gateway on real network cards, and count what arrives
    Pktgen(pktgen::Options),
    /// Keep the test network standing to play with
    Lab(lab::Options),
}

fn main() -> ExitCode {
    let result = match Cli::parse().verb {
        Verb::Setup => setup::run(&setup::Need::ALL),
        Verb::Build(options) => build::run(&options),
        Verb::Verify(options) => verify::run(&options),
        Verb::Lint => lint::run(),
        Verb::Test(options) => test::run(&options),
        Verb::Demo(options) => demo::run(&options),
        Verb::Bench(options) => bench::run(&options),
        Verb::Pktgen(options) => pktgen::run(&options),
        Verb::Lab(options) => lab::run(&options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
