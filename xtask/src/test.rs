//! Runs the test suites, each after what it needs, and tells how long each took.

use std::{
    fs,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};

use crate::{
    build,
    process::{cargo, run as execute, workspace},
    setup,
};

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Long runs as well: more random frames, longer traffic, ignored tests
    #[arg(long)]
    full: bool,
    /// Only these [default: all]
    #[arg(value_enum)]
    suites: Vec<Suite>,
}

/// Which tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Suite {
    /// Of all host crates, beside the code; needs no privileges
    Unit,
    /// The loaded XDP program under `BPF_PROG_TEST_RUN`; needs root
    Program,
    /// Networks of namespaces; needs root
    E2e,
}

impl Suite {
    const ALL: [Self; 3] = [Self::Unit, Self::Program, Self::E2e];

    /// The suite of the test target `name` of the tests crate.
    fn of_target(name: &str) -> Self {
        if name == "program" { Self::Program } else { Self::E2e }
    }

    fn needs(self) -> &'static [setup::Need] {
        match self {
            Self::Unit => &[setup::Need::Bpf],
            Self::Program | Self::E2e => &setup::Need::ALL,
        }
    }
}

/// One `cargo test`.
struct Run {
    name: String,
    arguments: Vec<String>,
    /// Tests share the machine's network and bpffs, so they run one after another.
    serial: bool,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let suites = if options.suites.is_empty() { Suite::ALL.to_vec() } else { options.suites.clone() };
    for need in suites.iter().map(|suite| suite.needs()) {
        setup::run(need)?;
    }
    build::run(&build::Options { release: false })?;

    let mut times = Vec::new();
    for run in runs(&suites, &targets()?) {
        println!("── {} ──", run.name);
        let start = Instant::now();
        let result = execute(&mut run.command(options.full));
        times.push((run.name, start.elapsed(), result.is_ok()));
        if let Err(error) = result {
            report(&times);
            return Err(error);
        }
    }
    report(&times);
    Ok(())
}

/// Names of the test targets of the tests crate, sorted.
fn targets() -> Result<Vec<String>> {
    let directory = workspace().join("tests/tests");
    let mut names = Vec::new();
    for entry in fs::read_dir(&directory).with_context(|| format!("cannot read {}", directory.display()))? {
        let path = entry?.path();
        let is_target =
            path.extension().is_some_and(|extension| extension == "rs") || path.join("main.rs").is_file();
        if is_target && let Some(name) = path.file_stem() {
            names.push(name.to_string_lossy().into_owned());
        }
    }
    names.sort();
    Ok(names)
}

fn runs(suites: &[Suite], targets: &[String]) -> Vec<Run> {
    let strings = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect();
    let mut runs = Vec::new();
    if suites.contains(&Suite::Unit) {
        runs.push(Run {
            name: "unit".to_owned(),
            arguments: strings(&[
                "--package",
                "gateway",
                "--package",
                "gateway-common",
                "--package",
                "xtask",
            ]),
            serial: false,
        });
        runs.push(Run {
            name: "unit: tests crate".to_owned(),
            arguments: strings(&["--package", "gateway-tests", "--lib", "--bins"]),
            serial: false,
        });
    }
    for suite in [Suite::Program, Suite::E2e] {
        for target in
            targets.iter().filter(|target| suites.contains(&suite) && Suite::of_target(target) == suite)
        {
            runs.push(Run {
                name: target.clone(),
                arguments: strings(&["--package", "gateway-tests", "--test", target]),
                serial: true,
            });
        }
    }
    runs
}

impl Run {
    fn command(&self, full: bool) -> Command {
        let mut command = cargo();
        command.arg("test").args(&self.arguments).arg("--");
        if self.serial {
            command.arg("--test-threads=1");
        }
        if full {
            command.env("GATEWAY_TEST_FULL", "1").arg("--include-ignored");
        }
        command
    }
}

fn report(times: &[(String, Duration, bool)]) {
    println!("── durations ──");
    for (name, time, passed) in times {
        println!("{:>8.1} s  {name}{}", time.as_secs_f64(), if *passed { "" } else { "  FAILED" });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(suites: &[Suite]) -> Vec<String> {
        let targets = ["flannel", "program", "routes"].map(str::to_owned);
        runs(suites, &targets).into_iter().map(|run| run.name).collect()
    }

    #[test]
    fn every_target_belongs_to_one_suite() {
        assert_eq!(names(&Suite::ALL), ["unit", "unit: tests crate", "program", "flannel", "routes"]);
        assert_eq!(names(&[Suite::Program]), ["program"]);
        assert_eq!(names(&[Suite::E2e]), ["flannel", "routes"]);
    }

    #[test]
    fn suites_that_share_the_machine_run_serially() {
        for run in runs(&Suite::ALL, &["flannel".to_owned()]) {
            let serial = run.command(false).get_args().any(|word| word == "--test-threads=1");
            assert_eq!(serial, run.name == "flannel", "{}", run.name);
        }
    }

    #[test]
    fn full_reaches_the_tests() {
        let run = &runs(&[Suite::Unit], &[])[0];
        let with = run.command(true);
        assert!(with.get_envs().any(|(name, value)| name == "GATEWAY_TEST_FULL" && value.is_some()));
        assert!(with.get_args().any(|word| word == "--include-ignored"));
        assert!(!run.command(false).get_args().any(|word| word == "--include-ignored"));
    }
}
