//! The suite `vm`: the gateway on other kernels, in QEMU, with two network interfaces whose driver runs XDP itself.
//!
//! - [`kernel`]: where kernels come from.
//! - [`image`], [`modules`]: what the guest has.
//! - [`machine`]: how it is run, and how it tells what it did.
//!
//! Guests run the same programs as this machine, as they were built here: the object is loaded with full configurations,
//! a choice of the program suite, and the tests of the target `vm` of the tests crate, which are made for guests.

mod image;
mod kernel;
mod machine;
mod modules;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::Value;

pub(crate) use self::machine::PROGRAM;
use self::{image::Image, kernel::Kernel, machine::Machine};
use crate::process::{capture, cargo, workspace};

/// The kernels that the gateway is made for, oldest first. The first is the oldest that it supports.
pub(crate) const KERNELS: [&str; 4] = ["6.1", "6.12", "6.18", "7.2"];

/// Drivers and protocols that lab and gateway use. The guest has no program that would load them on demand.
const MODULES: [&str; 10] = [
    "virtio_pci",
    "virtio_net",
    "veth",
    "bridge",
    "vxlan",
    "8021q",
    "af_packet",
    "nf_tables",
    "nft_objref",
    "pktgen",
];
/// Programs of this machine that the lab uses.
const TOOLS: [&str; 7] = ["bridge", "ethtool", "ip", "nft", "ping", "sysctl", "tcpdump"];
/// Programs of the workspace that guests run, beside tests.
const PROGRAMS: [&str; 2] = ["gateway", "inspect-object"];
/// Tests of the program suite that depend on the kernel, and do not take minutes under emulation.
const PROGRAM_TESTS: [&str; 4] = [
    "agreement::program_and_host_engine_agree",
    "golden::every_frame_ends_as_written",
    "limits::frames_larger_than_a_page",
    "live::redirected_frames_leave_by_the_interface_that_was_meant",
];
/// Where the programs lie in the guest, as they do here, for those that look for one another.
const PLACE: &str = "target/debug";
/// Some minutes on a machine that has nothing else to do.
const LIMIT: Duration = Duration::from_mins(30);

/// What the guests need of this build.
pub(crate) struct Vm {
    image: Image,
    jobs: Vec<Job>,
    cache: PathBuf,
}

/// Something that the guest runs.
struct Job {
    name: &'static str,
    command: String,
    /// Tests that must pass in it; none if it is no test program.
    tests: Option<usize>,
}

impl Vm {
    /// Builds what guests run.
    pub(crate) fn prepare() -> Result<Self> {
        let programs = build()?;
        let program = |name: &str| {
            programs.get(name).with_context(|| format!("cargo did not tell where it built {name}"))
        };
        let cache = workspace().join("target/vm");
        fs::create_dir_all(&cache).with_context(|| format!("cannot create {}", cache.display()))?;
        let mut image = Image::default();
        for name in PROGRAMS {
            image.add_program(program(name)?, Path::new(PLACE).join(name), &cache)?;
        }
        image.add_program(program("vm-guest")?, "init", &cache)?;
        for name in TOOLS {
            image.add_tool(name, &cache)?;
        }
        // tcpdump looks up who it is to become.
        image.add("etc/passwd", b"root:x:0:0:root:/:/bin/sh\n".to_vec());
        let object = |name: &str| {
            let path = workspace().join("target/bpf").join(name);
            let bytes = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
            anyhow::Ok((path, bytes))
        };
        image.add("gateway.bpf.o", object("gateway.bpf.o")?.1);
        // Tests look for it where it was built.
        let (path, bytes) = object("reference.bpf.o")?;
        image.add(path.strip_prefix("/")?, bytes);

        let load = format!("/{PLACE}/inspect-object /gateway.bpf.o");
        let mut jobs = vec![Job { name: "load", command: load, tests: None }];
        for (name, choice) in [("program", &PROGRAM_TESTS[..]), ("vm", &[])] {
            let test = program(name)?;
            image.add_program(test, Path::new(PLACE).join("deps").join(name), &cache)?;
            let words = [&["--include-ignored", "--test-threads=1", "--exact"], choice].concat().join(" ");
            let count = capture(Command::new(test).args(words.split(' ')).arg("--list"))?
                .lines()
                .filter(|line| line.ends_with(": test"))
                .count();
            ensure!(
                count > 0 && (choice.is_empty() || count == choice.len()),
                "{name} has not all of {choice:?}"
            );
            jobs.push(Job { name, command: format!("/{PLACE}/deps/{name} {words}"), tests: Some(count) });
        }
        let list: Vec<String> = jobs.iter().map(|job| format!("{} {}\n", job.name, job.command)).collect();
        image.add("jobs", list.concat().into_bytes());
        Ok(Self { image, jobs, cache })
    }

    /// Runs everything on one kernel, and tells about it in a line.
    pub(crate) fn run(&self, series: &str) -> Result<()> {
        let kernel = Kernel::provide(series, &self.cache)?;
        let logs = self.cache.join("logs").join(series);
        fs::create_dir_all(&logs).with_context(|| format!("cannot create {}", logs.display()))?;
        let mut image = self.image.clone();
        image.add_modules(modules::collect(&kernel.modules, &MODULES)?);
        let path = logs.join("image.cpio");
        image.write(&path)?;
        let start = Instant::now();
        let told = Machine { kernel: &kernel.image, image: &path, logs: &logs }.run(LIMIT)?;
        let parts =
            self.judge(&told).with_context(|| format!("on {}; see {}", kernel.release, logs.display()))?;
        println!("{}: {} ({:.0} s)", kernel.release, parts.join(", "), start.elapsed().as_secs_f64());
        Ok(())
    }

    /// What each job achieved; an error if one did not do all of its work.
    fn judge(&self, told: &str) -> Result<Vec<String>> {
        let mut parts = Vec::new();
        for job in &self.jobs {
            let output = machine::output_of(told, job.name)?;
            parts.push(match job.tests {
                None => loads(output)?,
                Some(wanted) => {
                    let passed = passed(output);
                    ensure!(
                        passed == Some(wanted),
                        "{}: {wanted} tests were to pass, and {passed:?} did",
                        job.name
                    );
                    format!("{wanted} tests of {}", job.name)
                }
            });
        }
        ensure!(machine::is_over(told), "the guest did not come to its end");
        Ok(parts)
    }
}

/// Builds programs and tests; gives their paths by name.
fn build() -> Result<BTreeMap<String, PathBuf>> {
    let mut programs = BTreeMap::new();
    for words in [
        // As before the other suites: with other packages in the call, cargo might build their dependencies anew.
        &["build", "--package", "gateway"][..],
        // Builds the programs of the package as well.
        &["test", "--no-run", "--package", "gateway-tests", "--test", "program", "--test", "vm"],
    ] {
        let text = capture(cargo().args(words).args(["--quiet", "--message-format", "json"]))?;
        programs.extend(text.lines().filter_map(executable));
    }
    Ok(programs)
}

/// Name and path of a program in a line of cargo's JSON.
fn executable(line: &str) -> Option<(String, PathBuf)> {
    let message: Value = serde_json::from_str(line).ok()?;
    let name = message["target"]["name"].as_str()?;
    Some((name.to_owned(), message["executable"].as_str()?.into()))
}

/// How many tests passed in a test program's output.
fn passed(output: &str) -> Option<usize> {
    let line = output.lines().find_map(|line| line.strip_prefix("test result: ok. "))?;
    line.split(' ').next()?.parse().ok()
}

/// What the kernel's verifier said.
fn loads(output: &str) -> Result<String> {
    #[derive(Deserialize)]
    struct Inspection {
        loads: BTreeMap<String, Load>,
    }
    #[derive(Deserialize)]
    struct Load {
        verified_instructions: u64,
    }
    let Inspection { loads } =
        serde_json::from_str(output).context("inspect-object did not print what was expected")?;
    let Some((name, most)) = loads.iter().max_by_key(|(_, load)| load.verified_instructions) else {
        bail!("nothing was loaded");
    };
    Ok(format!("{} loads, {} instructions verified for {name}", loads.len(), most.verified_instructions))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vm(tests: usize) -> Vm {
        let job = |name, tests| Job { name, command: String::new(), tests };
        Vm {
            image: Image::default(),
            jobs: vec![job("load", None), job("vm", Some(tests))],
            cache: PathBuf::new(),
        }
    }

    const TOLD: &str = "@guest up\n@guest begin load\n{\"loads\": {\"a\": {\"verified_instructions\": 7}}}\n\
                        @guest end load 0\n@guest begin vm\nrunning 2 tests\n\
                        test result: ok. 2 passed; 0 failed; 0 ignored\n@guest end vm 0\n@guest over\n";

    #[test]
    fn a_run_passes_when_all_of_it_was_done() {
        let parts = vm(2).judge(TOLD).unwrap();
        assert_eq!(parts, ["1 loads, 7 instructions verified for a", "2 tests of vm"]);
    }

    #[test]
    fn a_run_that_left_something_out_fails() {
        assert!(vm(3).judge(TOLD).unwrap_err().to_string().contains("3 tests were to pass, and Some(2) did"));
        assert!(vm(2).judge(&TOLD.replace("@guest over\n", "")).is_err());
        assert!(vm(2).judge(&TOLD.replace("vm 0", "vm 101")).is_err());
        assert!(vm(2).judge("").is_err());
    }

    /// What the README promises, and what `gateway check` demands.
    #[test]
    fn the_oldest_kernel_is_the_one_that_is_promised() {
        let oldest = KERNELS[0];
        let text = |path: &str| fs::read_to_string(workspace().join(path)).unwrap();
        assert!(text("README.md").contains(&format!("Linux {oldest} or newer")));
        let demanded = format!("const MIN_KERNEL: (u32, u32) = ({});", oldest.replace('.', ", "));
        assert!(text("gateway/src/cli/check/system.rs").contains(&demanded));
    }

    #[test]
    fn finds_programs_in_what_cargo_prints() {
        let line = r#"{"reason":"compiler-artifact","target":{"name":"vm"},"executable":"/t/vm-1"}"#;
        assert_eq!(executable(line), Some(("vm".to_owned(), "/t/vm-1".into())));
        assert_eq!(executable(r#"{"target":{"name":"lib"},"executable":null}"#), None);
        assert_eq!(executable("not JSON"), None);
    }
}
