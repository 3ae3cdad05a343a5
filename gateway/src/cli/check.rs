//! `gateway check`: whether configuration, cluster and host are fit to run a gateway.

mod ethtool;
mod host;
mod slow_path;
mod source;
mod system;

use std::{fmt::Write as _, process::ExitCode};

use clap::Args as ClapArgs;
use serde::Serialize;

use super::{FOUND, output, runtime};
use crate::{
    cluster::{
        announce,
        kubernetes::{Link, Timing},
        problem::{Problem, Severity},
    },
    config::{Config, Options, Problems, Reading},
    kernel::{host::Host, netlink},
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
    let runtime = runtime()?;
    match runtime.block_on(load(&options, &mut findings)) {
        Ok(Some(config)) => {
            findings.push(Finding::ok(
                options.location.config.display().to_string(),
                format!("valid; instance {}", config.instance),
            ));
            let host = runtime.block_on(async { anyhow::Ok(Host::read(&netlink::connect()?).await?) })?;
            findings.extend(runtime.block_on(source::findings(&config, &host)));
            findings.extend(system::findings(Some(&config)));
            findings.extend(host::findings(&config, &host));
            findings.extend(runtime.block_on(slow_path::findings(&config, &host)));
        }
        Ok(None) => findings.extend(system::findings(None)),
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

/// The configuration, with the subnets that the daemon would choose; `None` if there are none to choose.
async fn load(options: &Options, findings: &mut Vec<Finding>) -> Result<Option<Config>, Problems> {
    let (file, overrides) = (&options.location.config, options.overrides());
    let open = match Config::read(file, &overrides)? {
        Reading::Complete(config) => return Ok(Some(*config)),
        Reading::Open(open) => open,
    };
    let link = Link::new(open.access.clone());
    let settled = match announce::settle(&link, &open, open.register, &Timing::default()).await {
        Ok(settled) => settled,
        Err(problems) => {
            findings.extend(problems.into_iter().map(Finding::from));
            return Ok(None);
        }
    };
    findings.extend(settled.iter().map(|found| {
        let what = format!("subnet {}: {}", found.subnet, found.reason);
        Finding::ok(format!("overlay {}", found.overlay), what)
    }));
    let subnets = settled.into_iter().map(|found| (found.overlay, found.subnet)).collect();
    Config::load_with(file, &overrides, subnets).map(Some)
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

#[cfg(test)]
mod tests;
