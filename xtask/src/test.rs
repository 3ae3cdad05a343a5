//! Runs the test suites, each after what it needs, and tells how long each took.

use std::{
    env, fs,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

use crate::{
    build,
    process::{cargo, run as execute, workspace},
    setup,
    vm::{self, Vm},
};

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Long runs as well: more random frames, longer traffic, ignored tests
    #[arg(long)]
    full: bool,
    /// Only these [default: all but vm]
    #[arg(value_enum)]
    suites: Vec<Suite>,
    /// Kernels for the suite `vm`, such as 6.12 [default: the oldest that is supported; with --full all that are]
    #[arg(long, value_delimiter = ',')]
    kernel: Vec<String>,
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
    /// The source `kubernetes` against the test API server, or, if named here, against that of `KUBECONFIG`
    Kubernetes,
    /// Other kernels, in virtual machines; it was not seen to pass whole yet
    Vm,
}

impl Suite {
    const ALL: [Self; 5] = [Self::Unit, Self::Kubernetes, Self::Program, Self::E2e, Self::Vm];

    /// The suite of an integration test: those of the daemon and of the tests crate use the machine's kernel.
    fn of_target(target: &Target) -> Self {
        match (target.package, target.name.as_str()) {
            ("gateway-tests", "program") => Self::Program,
            ("gateway-tests", "kubernetes") => Self::Kubernetes,
            ("gateway-tests", "vm") => Self::Vm,
            _ => Self::E2e,
        }
    }

    fn needs(self) -> &'static [setup::Need] {
        match self {
            Self::Unit | Self::Kubernetes => &[setup::Need::Bpf],
            Self::Program | Self::E2e => &setup::Need::ALL,
            Self::Vm => &[setup::Need::Bpf, setup::Need::Programs, setup::Need::Emulator],
        }
    }
}

impl Options {
    /// Other kernels take longer than this machine's, so they are left to those who ask for them.
    fn chosen(&self) -> Vec<Suite> {
        if !self.suites.is_empty() {
            return self.suites.clone();
        }
        Suite::ALL.into_iter().filter(|suite| *suite != Suite::Vm).collect()
    }
}

/// A file of integration tests.
struct Target {
    package: &'static str,
    name: String,
}

/// Modules of the suite `kubernetes` that need the test server: they make faults, write flannel's own objects, or look at
/// what was asked for.
const NEED_TEST_SERVER: [&str; 3] = ["access", "faults", "rights"];

/// One `cargo test`.
struct Run {
    suite: Suite,
    name: String,
    arguments: Vec<String>,
    /// Words for the test harness.
    harness: Vec<String>,
    /// Whether `--full` adds the ignored tests. An ignored example in documentation is not meant to run.
    has_long: bool,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let suites = options.chosen();
    for need in suites.iter().map(|suite| suite.needs()) {
        setup::run(need)?;
    }
    build::run(&build::Options { release: false })?;
    // For upgrades to another object.
    let variant = if options.full && suites.contains(&Suite::E2e) { Some(build::variant()?) } else { None };

    // Whoever only has a KUBECONFIG lying around does not mean it for tests.
    let real = options.suites.contains(&Suite::Kubernetes) && env::var_os("KUBECONFIG").is_some();
    let mut times: Vec<Time> = Vec::new();
    for run in runs(&suites, &targets()?, real) {
        println!("── {} ──", run.name);
        if real && run.suite == Suite::Kubernetes {
            println!(
                "On the server of KUBECONFIG. NOT RUN, for they need the test server: the tests of {}. Convergence runs \
                 without faults.",
                NEED_TEST_SERVER.join(", ")
            );
        }
        let start = Instant::now();
        let mut command = run.command(options.full);
        if let Some(variant) = &variant {
            command.env("GATEWAY_VARIANT_BIN", variant);
        }
        if real {
            command.env("GATEWAY_TEST_API", "real");
        }
        let result = execute(&mut command);
        times.push((run.name, start.elapsed(), result.is_ok()));
        if let Err(error) = result {
            report(&times);
            return Err(error);
        }
    }
    let result = if suites.contains(&Suite::Vm) { kernels(options, &mut times) } else { Ok(()) };
    report(&times);
    result
}

/// The suite `vm`: all chosen kernels, whatever becomes of the others.
fn kernels(options: &Options, times: &mut Vec<Time>) -> Result<()> {
    let chosen: Vec<&str> = match (options.kernel.as_slice(), options.full) {
        ([], false) => vec![vm::KERNELS[0]],
        ([], true) => vm::KERNELS.to_vec(),
        (chosen, _) => chosen.iter().map(String::as_str).collect(),
    };
    println!("── vm ──");
    let vm = Vm::prepare()?;
    let mut failed = Vec::new();
    for kernel in chosen {
        let start = Instant::now();
        let result = vm.run(kernel);
        times.push((format!("vm: {kernel}"), start.elapsed(), result.is_ok()));
        if let Err(error) = result {
            println!("{kernel}: FAILED {error:#}");
            failed.push(kernel);
        }
    }
    ensure!(failed.is_empty(), "the suite vm failed on {}", failed.join(", "));
    Ok(())
}

/// The integration tests of the daemon and of the tests crate, sorted.
fn targets() -> Result<Vec<Target>> {
    let mut targets = Vec::new();
    for (package, directory) in [("gateway", "gateway/tests"), ("gateway-tests", "tests/tests")] {
        let directory = workspace().join(directory);
        if !directory.exists() {
            continue;
        }
        let mut names = Vec::new();
        for entry in
            fs::read_dir(&directory).with_context(|| format!("cannot read {}", directory.display()))?
        {
            let path = entry?.path();
            let is_target =
                path.extension().is_some_and(|extension| extension == "rs") || path.join("main.rs").is_file();
            if is_target && let Some(name) = path.file_stem() {
                names.push(name.to_string_lossy().into_owned());
            }
        }
        names.sort();
        targets.extend(names.into_iter().map(|name| Target { package, name }));
    }
    Ok(targets)
}

/// `real` leaves out what a real API server cannot be used for.
fn runs(suites: &[Suite], targets: &[Target], real: bool) -> Vec<Run> {
    const HOST: [&str; 8] = [
        "--package",
        "gateway",
        "--package",
        "gateway-common",
        "--package",
        "gateway-tests",
        "--package",
        "xtask",
    ];
    let strings = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect::<Vec<_>>();
    let mut runs = Vec::new();
    if suites.contains(&Suite::Unit) {
        let arguments = [strings(&HOST), strings(&["--lib", "--bins"])].concat();
        runs.push(Run {
            suite: Suite::Unit,
            name: "unit".to_owned(),
            arguments,
            harness: Vec::new(),
            has_long: true,
        });
        let arguments = strings(&["--package", "gateway", "--package", "gateway-common", "--doc"]);
        runs.push(Run {
            suite: Suite::Unit,
            name: "documentation".to_owned(),
            arguments,
            harness: Vec::new(),
            has_long: false,
        });
    }
    for target in targets
        .iter()
        .filter(|target| suites.contains(&Suite::Kubernetes) && Suite::of_target(target) == Suite::Kubernetes)
    {
        let left_out =
            NEED_TEST_SERVER.iter().flat_map(|module| ["--skip".to_owned(), format!("{module}::")]);
        // Whatever one of them makes, all others see.
        let harness =
            if real { left_out.chain(["--test-threads=1".to_owned()]).collect() } else { Vec::new() };
        runs.push(Run {
            suite: Suite::Kubernetes,
            name: target.name.clone(),
            arguments: strings(&["--package", target.package, "--test", &target.name]),
            harness,
            has_long: true,
        });
    }
    for suite in [Suite::Program, Suite::E2e] {
        for target in
            targets.iter().filter(|target| suites.contains(&suite) && Suite::of_target(target) == suite)
        {
            runs.push(Run {
                suite,
                name: format!("{}: {}", target.package, target.name),
                arguments: strings(&["--package", target.package, "--test", &target.name]),
                // They share the machine's network and bpffs.
                harness: strings(&["--test-threads=1"]),
                has_long: true,
            });
        }
    }
    runs
}

impl Run {
    fn command(&self, full: bool) -> Command {
        let mut command = cargo();
        command.arg("test").args(&self.arguments).arg("--").args(&self.harness);
        if full {
            command.env("GATEWAY_TEST_FULL", "1");
            if self.has_long {
                command.arg("--include-ignored");
            }
        }
        command
    }
}

/// Name of a run, how long it took, and whether it passed.
type Time = (String, Duration, bool);

fn report(times: &[Time]) {
    println!("── durations ──");
    for (name, time, passed) in times {
        println!("{:>8.1} s  {name}{}", time.as_secs_f64(), if *passed { "" } else { "  FAILED" });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn some_targets() -> Vec<Target> {
        [
            ("gateway", "next_hops"),
            ("gateway-tests", "flannel"),
            ("gateway-tests", "kubernetes"),
            ("gateway-tests", "program"),
            ("gateway-tests", "vm"),
        ]
        .map(|(package, name)| Target { package, name: name.to_owned() })
        .into()
    }

    fn names(suites: &[Suite]) -> Vec<String> {
        runs(suites, &some_targets(), false).into_iter().map(|run| run.name).collect()
    }

    #[test]
    fn every_target_belongs_to_one_suite() {
        let e2e = ["gateway: next_hops", "gateway-tests: flannel"];
        assert_eq!(names(&[Suite::Unit]), ["unit", "documentation"]);
        assert_eq!(names(&[Suite::Program]), ["gateway-tests: program"]);
        assert_eq!(names(&[Suite::E2e]), e2e);
        assert_eq!(names(&[Suite::Kubernetes]), ["kubernetes"]);
        assert_eq!(names(&Suite::ALL).len(), 6);
    }

    #[test]
    fn suites_that_share_the_machine_run_serially() {
        for run in runs(&Suite::ALL, &some_targets(), false) {
            let serial = run.command(false).get_args().any(|word| word == "--test-threads=1");
            assert_eq!(serial, run.name.contains(':'), "{}", run.name);
        }
    }

    #[test]
    fn a_real_server_is_spared_what_needs_the_test_server() {
        for (real, skips) in [(false, 0), (true, NEED_TEST_SERVER.len())] {
            for run in runs(&Suite::ALL, &some_targets(), real) {
                let skipped = run.command(false).get_args().filter(|word| *word == "--skip").count();
                let expected = if run.suite == Suite::Kubernetes { skips } else { 0 };
                assert_eq!(skipped, expected, "{}", run.name);
            }
        }
    }

    #[test]
    fn full_reaches_the_tests() {
        let all = runs(&Suite::ALL, &some_targets(), false);
        for run in &all {
            let full = run.command(true);
            assert!(full.get_envs().any(|(name, value)| name == "GATEWAY_TEST_FULL" && value.is_some()));
            assert_eq!(full.get_args().any(|word| word == "--include-ignored"), run.name != "documentation");
            assert!(!run.command(false).get_args().any(|word| word == "--include-ignored"));
        }
    }
}
