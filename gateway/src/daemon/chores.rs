//! What follows from the tables and takes its time, one thing after the other.

use std::collections::BTreeSet;

use super::slow_path::Look;

/// A piece of work that packets of the fast path do not wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Chore {
    /// Programs on the interfaces, with the constants that they should have.
    Programs,
    /// The firewall's table.
    Firewall(Look),
    /// Settings of the kernel.
    Settings,
    /// The kernel's tunnel devices.
    Devices,
}

/// Chores to do, each at most once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Chores(BTreeSet<Chore>);

impl Chores {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn add(&mut self, chore: Chore) {
        self.0.insert(chore);
    }

    /// The next one, in the order in which they stand above.
    pub(super) fn take(&mut self) -> Option<Chore> {
        self.0.pop_first()
    }
}
