//! `gateway run`

use std::{
    io::{self, IsTerminal as _},
    process::ExitCode,
};

use anyhow::Context as _;
use clap::{Args as ClapArgs, ValueEnum};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::info;
use tracing_subscriber::EnvFilter;

use super::settle::{Choice, settled};
use crate::{config::Options, daemon::Daemon};

/// Form of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum LogFormat {
    /// For people.
    Text,
    /// For programs: one object per line.
    Json,
}

/// Arguments of `run`.
#[derive(ClapArgs, Debug)]
pub struct Args {
    #[command(flatten)]
    options: Options,
    /// What to log: a level, or levels by module
    #[arg(long, env = "GATEWAY_LOG", value_name = "FILTER", default_value = "info")]
    log: String,
    /// Form of the log
    #[arg(long, env = "GATEWAY_LOG_FORMAT", value_name = "FORMAT", default_value = "text")]
    log_format: LogFormat,
}

/// Runs until SIGTERM or SIGINT. The datapath stays attached.
///
/// # Errors
///
/// The configuration is invalid, or the datapath cannot run.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    start_log(args)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let options = &args.options;
    let config = runtime.block_on(settled(&options.location.config, &options.overrides(), Choice::Daemon))?;
    runtime.block_on(async {
        let cancel = CancellationToken::new();
        cancel_on_signal(&cancel)?;
        info!(version = env!("CARGO_PKG_VERSION"), instance = config.instance, "starting");
        Box::pin(Daemon::start(config).await?.run(cancel)).await
    })?;
    // A scan of the source directory may still be under way on a blocking thread; nobody needs its result.
    runtime.shutdown_background();
    Ok(ExitCode::SUCCESS)
}

fn start_log(args: &Args) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&args.log).with_context(|| {
        format!("the log filter {:?} is invalid: use a level such as info, or module=level,…", args.log)
    })?;
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        // Colours in a file or a journal are noise.
        .with_ansi(io::stderr().is_terminal());
    match args.log_format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().init(),
    }
    Ok(())
}

fn cancel_on_signal(cancel: &CancellationToken) -> io::Result<()> {
    for kind in [SignalKind::terminate(), SignalKind::interrupt()] {
        let mut signals = signal(kind)?;
        let cancel = cancel.clone();
        tokio::spawn(async move {
            signals.recv().await;
            cancel.cancel();
        });
    }
    Ok(())
}
