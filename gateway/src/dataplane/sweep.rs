//! Removes sessions.
//!
//! Userspace cannot compare-and-swap on entries of a table, and a session that is removed while a packet takes it up again
//! would break a connection. So userspace lists sessions, and a program of the object, which is attached nowhere, judges and
//! removes them (`BPF_PROG_TEST_RUN`).

use aya::{
    Ebpf,
    programs::{ProgramError, TestRun as _, TestRunOptions, Xdp},
};
use bytemuck::Zeroable as _;
use gateway_common::abi::{ReverseKey, SWEEP_CAPACITY, SWEEP_PROGRAM, Sweep, SweepMode};

/// Sessions cannot be removed.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot run the program {SWEEP_PROGRAM}: {0} (root, or CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON, is needed)"
)]
pub struct SweepError(#[from] ProgramError);

/// The loaded program, on the pinned tables; see [`Loader::sweeper`](super::load::Loader::sweeper).
#[derive(Debug)]
pub struct Sweeper {
    object: Ebpf,
}

impl Sweeper {
    /// Of a load that has the program.
    pub(super) fn new(object: Ebpf) -> Self {
        Self { object }
    }

    /// Removes those of the sessions to which `mode` applies; how many that were.
    ///
    /// # Errors
    ///
    /// The program cannot be run.
    pub fn remove(&self, sessions: &[ReverseKey], mode: SweepMode) -> Result<usize, SweepError> {
        let mut removed = 0;
        for chunk in sessions.chunks(SWEEP_CAPACITY) {
            removed += self.run(chunk, mode)?;
        }
        Ok(removed)
    }

    fn run(&self, sessions: &[ReverseKey], mode: SweepMode) -> Result<usize, ProgramError> {
        let program: &Xdp = self
            .object
            .program(SWEEP_PROGRAM)
            .and_then(|program| program.try_into().ok())
            .ok_or(ProgramError::NotLoaded)?;
        let mut input = Sweep { mode, ..Sweep::zeroed() };
        input.sessions[..sessions.len()].copy_from_slice(sessions);
        let mut output = Sweep::zeroed();
        program.test_run(TestRunOptions {
            data_in: Some(bytemuck::bytes_of(&input)),
            data_out: Some(bytemuck::bytes_of_mut(&mut output)),
            ..TestRunOptions::default()
        })?;
        Ok(output.sessions[..sessions.len()].iter().filter(|session| session.protocol == 0).count())
    }
}
