//! The command line: one file for each verb.
//!
//! Manners: stdout is data, stderr is talk; a closed pipe is success. Exit codes: 0 all is well, 1 something was found
//! (not running, not reachable, not valid), 2 wrong usage or failure.

pub mod check;
pub mod detach;
pub mod node;
mod output;
pub mod run;
pub mod sessions;
mod settle;
pub mod show;
pub mod status;

use std::{io, process::ExitCode};

use clap::{Parser, Subcommand};

/// Something was found that a person should look at.
const FOUND: u8 = 1;
/// The verb could not do its work.
const FAILED: u8 = 2;

/// XDP gateway into Kubernetes pod networks
#[derive(Parser, Debug)]
#[command(name = "gateway", version, about, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand, Debug)]
enum Verb {
    /// Run the gateway: load, attach, and keep tables equal to the cluster
    Run(run::Args),
    /// Tell whether configuration and host are fit to run
    Check(check::Args),
    /// Show how a gateway is doing; works from the pins alone while none runs
    Status(status::Args),
    /// Show tables and counters, from the pins
    Show(show::Args),
    /// End translated connections
    Sessions(sessions::Args),
    /// Make the gateway known to flannel by a Node of its own, or take that back
    Node(node::Args),
    /// Take the gateway off this host: programs, tables, kernel devices
    Detach(detach::Args),
}

/// Parses the command line and does what it says.
pub fn main() -> ExitCode {
    let result = match Cli::parse().verb {
        Verb::Run(args) => run::run(&args),
        Verb::Check(args) => check::run(args),
        Verb::Status(args) => status::run(&args),
        Verb::Show(args) => show::run(&args),
        Verb::Sessions(args) => sessions::run(&args),
        Verb::Node(args) => node::run(&args),
        Verb::Detach(args) => detach::run(&args),
    };
    result.unwrap_or_else(|error| {
        if is_closed_pipe(&error) {
            return ExitCode::SUCCESS;
        }
        eprintln!("gateway: {}", explain(&error));
        ExitCode::from(FAILED)
    })
}

fn is_closed_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
    })
}

/// The error and its causes, unless the text has them already, and what to do about missing rights.
fn explain(error: &anyhow::Error) -> String {
    let text = error.chain().skip(1).fold(error.to_string(), |text, cause| {
        let cause = cause.to_string();
        if text.contains(&cause) { text } else { format!("{text}: {cause}") }
    });
    if nix::unistd::geteuid().is_root() || !text.to_lowercase().contains("permission denied") {
        return text;
    }
    format!("{text}: run it as root, or with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON")
}

/// An async runtime for verbs that talk netlink.
fn runtime() -> io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}

#[cfg(test)]
mod tests {
    use anyhow::Context as _;
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn causes_are_told_once() {
        let broken = || io::Error::from(io::ErrorKind::BrokenPipe);
        let told = anyhow::Error::from(broken()).context(format!("writing: {}", broken()));
        assert_eq!(explain(&told), "writing: broken pipe");
        let untold = Err::<(), _>(broken()).context("writing").unwrap_err();
        assert_eq!(explain(&untold), "writing: broken pipe");
        assert!(is_closed_pipe(&untold));
    }
}
