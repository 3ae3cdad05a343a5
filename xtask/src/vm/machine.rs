//! QEMU, and what the guest tells.
//!
//! QEMU's exit status says nothing about the guest, so the guest prints what it does on its second serial port:
//! `@guest up`, then `@guest begin JOB` and `@guest end JOB STATUS` for each job with the job's output in between, and
//! `@guest over`. The first port is the kernel's console.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

/// The program.
pub(crate) const PROGRAM: &str = "qemu-system-x86_64";
/// A kernel that boots says so within seconds, on a busy machine within tens of seconds.
const BOOT: Duration = Duration::from_mins(2);
const TICK: Duration = Duration::from_millis(100);
/// Begins what the guest says of itself.
const MARK: &str = "@guest ";

/// Hardware is emulated: it works on every machine, also inside of virtual ones. `max` has all instructions that QEMU
/// can emulate. On a busy machine the emulated timer is late, and kernels give up on it unless told not to look.
const MACHINE: [&str; 19] = [
    "-machine",
    "q35",
    "-accel",
    "tcg,thread=multi",
    "-cpu",
    "max",
    "-smp",
    "2",
    "-m",
    "2G",
    "-nodefaults",
    "-no-user-config",
    "-display",
    "none",
    "-no-reboot",
    "-append",
    "console=ttyS0 quiet panic=-1 no_timer_check",
    "-netdev",
    "hubport,id=near,hubid=0",
];
/// Two network interfaces, joined by a wire. The guest's tests know their addresses.
const WIRE: [&str; 6] = [
    "-netdev",
    "hubport,id=far,hubid=0",
    "-device",
    "virtio-net-pci,netdev=near,mac=52:54:00:00:02:c8",
    "-device",
    "virtio-net-pci,netdev=far,mac=52:54:00:00:02:c9",
];

/// A guest to be run once.
pub(super) struct Machine<'a> {
    pub(super) kernel: &'a Path,
    pub(super) image: &'a Path,
    /// Directory for what it prints: `console.log` is the kernel's, `jobs.log` that of the jobs.
    pub(super) logs: &'a Path,
}

impl Machine<'_> {
    /// Runs the guest to its end; gives what its jobs printed. A guest that does not even come up gets a second chance:
    /// that is the emulator's fault.
    pub(super) fn run(&self, limit: Duration) -> Result<String> {
        match self.attempt(limit)? {
            Some(text) => Ok(text),
            None => self
                .attempt(limit)?
                .with_context(|| format!("the guest did not come up, twice; see {}", self.logs.display())),
        }
    }

    fn attempt(&self, limit: Duration) -> Result<Option<String>> {
        let [console, jobs, errors] =
            ["console.log", "jobs.log", "qemu.log"].map(|name| self.logs.join(name));
        let mut command = Command::new(PROGRAM);
        command
            .args(MACHINE)
            .args(WIRE)
            .arg("-kernel")
            .arg(self.kernel)
            .arg("-initrd")
            .arg(self.image)
            .args(
                [&console, &jobs]
                    .map(|path| ["-serial".to_owned(), format!("file:{}", path.display())])
                    .as_flattened(),
            )
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&errors).with_context(|| format!("cannot create {}", errors.display()))?);
        fs::write(&jobs, "").with_context(|| format!("cannot write {}", jobs.display()))?;
        let mut guest =
            Guest { child: command.spawn().with_context(|| format!("cannot start {PROGRAM}"))?, jobs };
        let start = Instant::now();
        let mut is_up = false;
        while guest.child.try_wait()?.is_none() {
            is_up = is_up || guest.told()?.lines().any(|line| line.starts_with(MARK));
            if !is_up && start.elapsed() > BOOT {
                break;
            }
            if start.elapsed() > limit {
                bail!("the guest was not done after {limit:?}; see {}", self.logs.display());
            }
            thread::sleep(TICK);
        }
        let told = guest.told()?;
        Ok(told.lines().any(|line| line.starts_with(MARK)).then_some(told))
    }
}

/// QEMU at work; it ends with this value.
struct Guest {
    child: Child,
    jobs: PathBuf,
}

impl Guest {
    fn told(&self) -> Result<String> {
        let bytes = fs::read(&self.jobs).with_context(|| format!("cannot read {}", self.jobs.display()))?;
        Ok(String::from_utf8_lossy(&bytes).replace('\r', ""))
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Fails when it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a job printed, and how long it took, if it ended well; an error that tells the end of it otherwise.
pub(super) fn output_of<'a>(told: &'a str, job: &str) -> Result<&'a str> {
    let begin = format!("{MARK}begin {job}\n");
    let start = told.find(&begin).with_context(|| format!("{job} was not begun"))? + begin.len();
    let rest = &told[start..];
    let end = format!("{MARK}end {job} ");
    let Some(at) = rest.find(&end) else { bail!("{job} did not end:\n{}", last_lines(rest)) };
    let (output, status) = (&rest[..at], rest[at + end.len()..].lines().next().unwrap_or_default());
    if status != "0" {
        bail!("{job} ended with {status}:\n{}", last_lines(output));
    }
    Ok(output)
}

/// Whether the guest came to its end.
pub(super) fn is_over(told: &str) -> bool {
    told.lines().last().is_some_and(|line| line.strip_prefix(MARK) == Some("over"))
}

fn last_lines(text: &str) -> String {
    const ENOUGH: usize = 40;
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(ENOUGH)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOLD: &str = "@guest up 6.1\n@guest begin one\nhello\n@guest end one 0\n@guest begin two\nbad\n@guest end two 101\n\
                        @guest begin three\nhangs\n";

    #[test]
    fn only_a_job_that_ended_well_counts() {
        assert_eq!(output_of(TOLD, "one").unwrap(), "hello\n");
        let error = |job| output_of(TOLD, job).unwrap_err().to_string();
        assert_eq!(error("two"), "two ended with 101:\nbad");
        assert_eq!(error("three"), "three did not end:\nhangs");
        assert_eq!(error("four"), "four was not begun");
    }

    #[test]
    fn the_last_line_tells_that_it_is_over() {
        assert!(!is_over(TOLD));
        assert!(!is_over(""));
        assert!(is_over(&format!("{TOLD}@guest over\n")));
    }
}
