//! Processes that run beside a test.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, ExitStatus},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::patient;

/// A process of the lab, with what it writes kept in a file. It is killed when this value is dropped.
#[derive(Debug)]
pub struct Process {
    command: String,
    child: Child,
    log: PathBuf,
    keep: bool,
}

impl Process {
    pub(super) fn new(command: String, child: Child, log: PathBuf) -> Self {
        Self { command, child, log, keep: false }
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The file that holds its standard output and standard error.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// What it wrote so far.
    pub fn output(&self) -> Result<String> {
        fs::read_to_string(&self.log).with_context(|| format!("cannot read {}", self.log.display()))
    }

    /// The exit status if it has ended.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        self.child.try_wait().with_context(|| format!("cannot wait for `{}`", self.command))
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(self.pid()?, signal).with_context(|| format!("cannot send {signal} to `{}`", self.command))
    }

    /// Waits until it ends.
    ///
    /// # Errors
    /// When it still runs after `limit`; it is left running.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + patient(limit);
        loop {
            if let Some(status) = self.ended()? {
                return Ok(status);
            }
            if Instant::now() > deadline {
                bail!("`{}` still runs after {limit:?}; see {}", self.command, self.log.display());
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Sends a signal and waits until it ends, at most `limit`.
    pub fn stop(&mut self, signal: Signal, limit: Duration) -> Result<ExitStatus> {
        if self.ended()?.is_none() {
            self.signal(signal)?;
        }
        self.wait(limit)
    }

    /// Leaves it running when this value is dropped.
    pub fn keep(mut self) {
        self.keep = true;
    }

    fn pid(&self) -> Result<Pid> {
        Ok(Pid::from_raw(i32::try_from(self.child.id())?))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.keep {
            // Fails when it has ended, which is as well.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
