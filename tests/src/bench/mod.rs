//! What the XDP program costs: measured beside references in the same run, and checked while it is measured.
//!
//! - [`program`]: rounds of `BPF_PROG_TEST_RUN`, each on a fresh frame.
//! - [`live`]: frames that really arrive and leave, beside the kernel's own VXLAN.
//! - [`place`], [`flow`]: the gateway, its cluster, and the frames that go between them.
//! - [`driver`]: the reference object, which also makes the fresh frames.
//! - [`report`], [`plot`]: the result, as JSON, as a table and as pictures.
//! - [`machine`]: where it was measured.

mod driver;
mod flow;
pub mod live;
pub mod machine;
mod place;
pub mod plot;
pub mod program;
pub mod report;

use anyhow::{Context as _, Result};
use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};

pub use self::driver::reference_object;

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Rounds in which every case is measured once.
    pub rounds: usize,
    /// Test runs of a case in a round. The kernel tells whole nanoseconds; their mean tells more.
    pub calls: u32,
    /// Packets in a test run.
    pub packets: u32,
    /// What is measured at all.
    pub extent: Extent,
}

/// Which sizes of tables, and how many flows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// All of them.
    Full,
    /// The smallest, to see whether everything works.
    Smoke,
}

impl Effort {
    /// For figures.
    pub const MEASURE: Self = Self { rounds: 9, calls: 3, packets: 100_000, extent: Extent::Full };
    /// For tests: figures of this are worth nothing.
    pub const SMOKE: Self = Self { rounds: 2, calls: 1, packets: 1000, extent: Extent::Smoke };
}

/// Keeps the calling thread on the last of the CPUs that it may use, which has the fewest interrupts on most machines.
fn stay_on_one_cpu() -> Result<()> {
    let own = Pid::from_raw(0);
    let allowed = sched_getaffinity(own).context("cannot tell which CPUs may be used")?;
    let last = (0..CpuSet::count()).rev().find(|cpu| allowed.is_set(*cpu).unwrap_or(false));
    let mut one = CpuSet::new();
    one.set(last.context("no CPU may be used")?)?;
    sched_setaffinity(own, &one).context("cannot stay on one CPU")
}

/// The middle of the values; of an even number the mean of the two in the middle. 0 if there are none.
fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match (sorted.get(middle), sorted.get(middle.wrapping_sub(1))) {
        (Some(upper), Some(lower)) if sorted.len().is_multiple_of(2) => f64::midpoint(*lower, *upper),
        (Some(upper), _) => *upper,
        (None, _) => 0.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&[3.0, 1.0, 2.0]).total_cmp(&2.0), std::cmp::Ordering::Equal);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]).total_cmp(&2.5), std::cmp::Ordering::Equal);
        assert_eq!(median(&[]).total_cmp(&0.0), std::cmp::Ordering::Equal);
    }
}
