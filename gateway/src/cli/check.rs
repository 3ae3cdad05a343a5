//! `gateway check`: whether configuration, manifests and host are fit to run a gateway.

mod ethtool;
mod host;
mod slow_path;
mod system;

use std::{fmt::Write as _, process::ExitCode, time::Duration};

use clap::Args as ClapArgs;
use serde::Serialize;

use super::{FOUND, output, runtime};
use crate::{
    cluster::{
        files::Directory,
        flannel::NodeSkip,
        model::Event,
        problem::{Problem, ProblemList, Severity},
    },
    config::{Config, Options, Source},
    kernel::{host::Host, netlink},
    plan::Planner,
};

/// Arguments of `check`.
#[derive(ClapArgs, Debug)]
pub struct Args {
    #[command(flatten)]
    options: Options,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// How a finding stands to running.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum Level {
    /// As it should be.
    Ok,
    /// It runs, but not as well as it could, or not for everybody.
    Warn,
    /// It does not run, or an object of the cluster is left out.
    Fail,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Finding {
    level: Level,
    /// What was looked at.
    subject: String,
    /// What was seen.
    what: String,
    /// What to do about it; empty if nothing.
    advice: String,
}

impl Finding {
    fn ok(subject: impl Into<String>, what: impl Into<String>) -> Self {
        Self { level: Level::Ok, subject: subject.into(), what: what.into(), advice: String::new() }
    }

    fn warn(subject: impl Into<String>, what: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { level: Level::Warn, subject: subject.into(), what: what.into(), advice: advice.into() }
    }

    fn fail(subject: impl Into<String>, what: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { level: Level::Fail, subject: subject.into(), what: what.into(), advice: advice.into() }
    }
}

impl From<Problem> for Finding {
    fn from(problem: Problem) -> Self {
        let Problem { severity, place, what, remedy } = problem;
        match severity {
            Severity::Warning => Self::warn(place, what, remedy),
            Severity::Error => Self::fail(place, what, remedy),
        }
    }
}

/// Looks at everything and changes nothing. The exit code is 1 if something does not fit; warnings alone are success.
///
/// # Errors
///
/// The kernel cannot be asked.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let Args { options, json } = args;
    let mut findings = Vec::new();
    match options.load() {
        Ok(config) => {
            findings.push(Finding::ok(
                options.location.config.display().to_string(),
                format!("valid; instance {}", config.instance),
            ));
            findings.extend(manifests(&config));
            findings.extend(system::findings(Some(&config)));
            let runtime = runtime()?;
            let host = runtime.block_on(async { anyhow::Ok(Host::read(&netlink::connect()?).await?) })?;
            findings.extend(host::findings(&config, &host));
            findings.extend(runtime.block_on(slow_path::findings(&config, &host)));
        }
        Err(problems) => {
            findings.extend(problems.0.into_iter().map(|problem| {
                let place = if problem.line > 0 {
                    format!("{}:{}:{}", problem.file, problem.line, problem.column)
                } else {
                    problem.file
                };
                let subject = if problem.key.is_empty() { place } else { format!("{place} {}", problem.key) };
                Finding::fail(subject, problem.what, problem.remedy)
            }));
            findings.extend(system::findings(None));
        }
    }
    if json {
        output::json(&findings)?;
    } else {
        output::lines(&report(&findings))?;
    }
    let fit = findings.iter().all(|finding| finding.level < Level::Fail);
    Ok(if fit { ExitCode::SUCCESS } else { ExitCode::from(FOUND) })
}

/// The findings for people: one line each, advice below.
fn report(findings: &[Finding]) -> String {
    let mut text = String::new();
    for Finding { level, subject, what, advice } in findings {
        let label = match level {
            Level::Ok => "ok  ",
            Level::Warn => "warn",
            Level::Fail => "FAIL",
        };
        let _ = writeln!(text, "{label}  {subject}: {what}");
        if !advice.is_empty() {
            let _ = writeln!(text, "        {advice}");
        }
    }
    let count = |level| findings.iter().filter(|finding| finding.level == level).count();
    let _ = write!(
        text,
        "ok: {}, warnings: {}, failures: {}",
        count(Level::Ok),
        count(Level::Warn),
        count(Level::Fail)
    );
    text
}

/// Reads the manifests once, and plans them as the daemon would.
fn manifests(config: &Config) -> Vec<Finding> {
    let Source::Files { path } = &config.source;
    let problems = ProblemList::default();
    let mut directory = Directory::new(path, problems.clone(), Duration::ZERO);
    let mut planner = Planner::new(&config.overlays);
    let found = directory.rescan();
    let mut findings: Vec<Finding> = problems.all().into_iter().map(Finding::from).collect();
    let Some(found) = found else { return findings };
    for event in found.events.iter().chain([&Event::Synced]) {
        planner.apply(event);
    }
    findings.extend(planner.problems().into_iter().map(Finding::from));

    let desired = planner.desired();
    let skipped = planner.skipped_nodes().filter(|(_, _, reason)| *reason == NodeSkip::NotFlannel).count();
    let mut summary = format!(
        "VTEPs: {}, pods: {}, pod CIDRs: {}",
        desired.vteps.len(),
        desired.pods.len(),
        desired.prefixes.len()
    );
    if skipped > 0 {
        let _ = write!(summary, "; nodes that are not flannel's: {skipped}");
    }
    for (reason, count) in planner.skipped_pods() {
        let _ = write!(summary, "; pods left out ({reason}): {count}");
    }
    if directory.ignored() > 0 {
        let _ = write!(summary, "; objects of other kinds: {}", directory.ignored());
    }
    findings.push(Finding::ok(path.display().to_string(), summary));

    for (id, overlay) in (0..).zip(&config.overlays) {
        let own = planner.skipped_nodes().find(|(of, _, reason)| *of == id && *reason == NodeSkip::Own);
        findings.push(match own {
            Some((_, name, _)) => {
                Finding::ok(format!("overlay {}", overlay.name), format!("Node {name} announces this gateway"))
            }
            None => Finding::warn(
                format!("overlay {}", overlay.name),
                format!("no Node in the manifests announces this gateway ({}, {})", overlay.local, overlay.mac),
                format!(
                    "pods can answer only if the cluster has a Node with public-ip {}, VtepMAC {} and podCIDR {}",
                    overlay.local, overlay.mac, overlay.subnet
                ),
            ),
        });
    }
    findings
}

#[cfg(test)]
mod tests;
