//! The first process of a guest of `cargo xtask test vm`: makes of a kernel and an archive a system in which tests run.
//!
//! It mounts what they expect, loads the modules in `/modules` in the order of their names, and runs the jobs of `/jobs`:
//! lines of a name, a program and its arguments. What is told goes to the second serial port, as
//! `xtask/src/vm/machine.rs` describes it.

use std::{
    fs::{self, File},
    os::unix::fs::symlink,
    path::PathBuf,
    process::Command,
};

use anyhow::{Context, Result};
use gateway_tests::lab::PATIENCE_VARIABLE;
use nix::{
    kmod::{ModuleInitFlags, finit_module},
    mount::{MsFlags, mount},
    sys::{
        reboot::{RebootMode, reboot},
        wait::{WaitStatus, wait},
    },
    unistd::{Pid, dup2_stderr, dup2_stdout},
};

const PORT: &str = "/dev/ttyS1";
/// How many times as long things may take here as on a machine that is not emulated.
const PATIENCE: &str = "6";
/// Random frames for the program, instead of a hundred thousand.
const FRAMES: &str = "10000";
const MOUNTS: [(&str, &str); 6] = [
    ("proc", "/proc"),
    ("sysfs", "/sys"),
    ("devtmpfs", "/dev"),
    ("tmpfs", "/run"),
    ("tmpfs", "/tmp"),
    ("bpf", "/sys/fs/bpf"),
];

fn main() {
    let result = run();
    if let Err(error) = result {
        println!("@guest failed: {error:#}");
    }
    // Only a failure returns. When the first process ends, the kernel stops with a message that says so.
    let Err(errno) = reboot(RebootMode::RB_POWER_OFF);
    println!("@guest cannot power off: {errno}");
}

fn run() -> Result<()> {
    for (kind, place) in MOUNTS {
        fs::create_dir_all(place).with_context(|| format!("cannot create {place}"))?;
        mount(Some(kind), place, Some(kind), MsFlags::empty(), None::<&str>)
            .with_context(|| format!("cannot mount {place}"))?;
    }
    // What is a device elsewhere; nft reads its input by this name.
    symlink("/proc/self/fd/0", "/dev/stdin").context("cannot create /dev/stdin")?;
    let port = File::options().write(true).open(PORT).with_context(|| format!("cannot open {PORT}"))?;
    dup2_stdout(&port)?;
    dup2_stderr(&port)?;
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").context("no release")?;
    println!("@guest up {}", release.trim());

    for module in sorted("/modules")? {
        let file = File::open(&module)?;
        finit_module(&file, c"", ModuleInitFlags::empty())
            .with_context(|| format!("cannot load {}", module.display()))?;
    }
    let jobs = fs::read_to_string("/jobs").context("cannot read /jobs")?;
    for line in jobs.lines() {
        let mut words = line.split(' ');
        let (name, program) = words.next().zip(words.next()).with_context(|| format!("no job: {line}"))?;
        println!("@guest begin {name}");
        let status = job(Command::new(program).args(words)).with_context(|| format!("cannot run {name}"))?;
        println!("\n@guest end {name} {status}");
    }
    println!("@guest over");
    Ok(())
}

fn sorted(directory: &str) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(directory).with_context(|| format!("cannot list {directory}"))?;
    let mut paths = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    paths.sort();
    Ok(paths)
}

/// Runs a job to its end; gives its exit code, or what ended it.
fn job(command: &mut Command) -> Result<String> {
    command.current_dir("/tmp").env("PATH", "/usr/bin").env("RUST_BACKTRACE", "1");
    let child = command.env(PATIENCE_VARIABLE, PATIENCE).env("GATEWAY_TEST_FRAMES", FRAMES).spawn()?;
    let child = Pid::from_raw(i32::try_from(child.id())?);
    // Orphans become children of the first process, which has to bury them.
    loop {
        match wait()? {
            WaitStatus::Exited(pid, code) if pid == child => return Ok(code.to_string()),
            WaitStatus::Signaled(pid, signal, _) if pid == child => return Ok(signal.to_string()),
            _ => {}
        }
    }
}
