//! What becomes of a frame.

use crate::abi::{Config, Outcome};

/// What the driver is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// To the kernel.
    Pass,
    /// Ends here.
    Drop,
    /// Out of the interface it came in by.
    Transmit,
    /// Out of the interface with this index.
    Redirect(u32),
}

/// The action, and the outcome that is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Where the packet is counted.
    pub outcome: Outcome,
    /// What happens to the frame.
    pub action: Action,
}

impl Verdict {
    /// The kernel gets the frame as it came.
    #[inline(always)]
    pub const fn pass(outcome: Outcome) -> Self {
        Self { outcome, action: Action::Pass }
    }

    /// The frame ends here.
    #[inline(always)]
    pub const fn drop(outcome: Outcome) -> Self {
        Self { outcome, action: Action::Drop }
    }

    /// The frame leaves by interface `ifindex`.
    #[inline(always)]
    pub const fn send(outcome: Outcome, ifindex: u32, config: &Config) -> Self {
        let action = if ifindex == config.ifindex { Action::Transmit } else { Action::Redirect(ifindex) };
        Self { outcome, action }
    }
}
