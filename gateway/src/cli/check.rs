//! `gateway check`

use std::process::ExitCode;

use clap::Args as ClapArgs;

use super::output::lines;
use crate::config::Options;

/// Arguments of `check`.
#[derive(ClapArgs, Debug)]
pub struct Args {
    #[command(flatten)]
    options: Options,
}

/// Validates the configuration.
///
/// # Errors
///
/// The configuration is invalid.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let config = args.options.load()?;
    lines(&format!("{}: valid, instance {}", args.options.config.display(), config.instance))?;
    Ok(ExitCode::SUCCESS)
}
