//! `gateway node`: makes the gateway known to flannel, or takes that back.

use std::process::ExitCode;

use anyhow::{Context as _, bail};
use clap::{Args as ClapArgs, Subcommand};

use super::{
    FOUND, output, runtime,
    settle::{Choice, settled},
};
use crate::{
    cluster::{
        announce::{self, Announcement, Done},
        kubernetes::{Link, Timing},
    },
    config::{Config, Location, Source},
};

/// Arguments of `node`.
#[derive(ClapArgs, Debug)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand, Debug)]
enum Verb {
    /// Print the Node as YAML; asks nobody
    Render(Location),
    /// Make the Node, or make it what it should be; refuses what would take another node off the network
    Apply(Location),
    /// Remove the Node and its lease, if this gateway made them
    Remove(Location),
}

/// Does what the verb says. The exit code is 1 if it was refused.
///
/// # Errors
///
/// The configuration is invalid, or there is no API server to ask.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    match &args.verb {
        Verb::Render(location) => render(&location.load()?),
        Verb::Apply(location) => runtime()?.block_on(carry_out(location, true)),
        Verb::Remove(location) => runtime()?.block_on(carry_out(location, false)),
    }
}

fn render(config: &Config) -> anyhow::Result<ExitCode> {
    let documents: Vec<String> = Announcement::all(config)
        .iter()
        .map(|announcement| serde_saphyr::to_string(&announcement.render()).context("cannot write YAML"))
        .collect::<anyhow::Result<_>>()?;
    output::lines(documents.join("---\n").trim_end())?;
    Ok(ExitCode::SUCCESS)
}

async fn carry_out(location: &Location, apply: bool) -> anyhow::Result<ExitCode> {
    let choice = if apply { Choice::Apply } else { Choice::Remove };
    let config = settled(&location.config, &location.overrides(), choice).await?;
    let Source::Kubernetes(access) = &config.source else {
        bail!(
            "source.kind is \"files\": there is no API server to write to; `gateway node render` prints the Node"
        );
    };
    let link = Link::new(access.clone());
    let timing = Timing::default();
    let mut code = ExitCode::SUCCESS;
    for announcement in &Announcement::all(&config) {
        let place = format!("Node {}", announcement.name);
        let (server, result) = match link.get().await {
            Ok(linked) if apply => {
                let done = announce::apply(&linked, announcement, &timing).await;
                (linked.server, done)
            }
            Ok(linked) => {
                let done = announce::remove(&linked, announcement, &timing).await;
                (linked.server, done)
            }
            Err(failure) => ("the API server".to_owned(), Err(failure.into())),
        };
        match result {
            Ok(done) => output::lines(&format!("{place}: {}", describe(done)))?,
            Err(refusal) => {
                for problem in refusal.problems(&place, &server) {
                    eprintln!("gateway: {problem}");
                }
                code = ExitCode::from(FOUND);
            }
        }
    }
    Ok(code)
}

fn describe(done: Done) -> &'static str {
    match done {
        Done::Nothing => "nothing to do",
        Done::Made => "made",
        Done::Changed => "changed",
        Done::Replaced => "removed and made anew",
        Done::Removed => "removed",
    }
}
