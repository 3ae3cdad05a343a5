//! What becomes of a frame.

use core::fmt;

use crate::abi::{Config, OUTCOME_CAPACITY, Outcome, OutcomeInfo};

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

/// The action, and the number of the outcome that is counted.
///
/// One machine word: it travels through every early return, and as a structure it would lie on the stack, where the
/// verifier refuses the unaligned copies that the compiler makes of it.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Verdict {
    /// Interface index (32 bits), MTU to which SYNs are held (16 bits, 0 for none), whether it leaves in the tunnel
    /// (1 bit), action (7 bits), outcome number (8 bits).
    word: u64,
}

const PASS: u64 = 0;
const DROP: u64 = 1;
const TRANSMIT: u64 = 2;
const TUNNELLED: u64 = 1 << 15;

impl Verdict {
    #[inline(always)]
    const fn new(outcome: Outcome, action: u64, ifindex: u32) -> Self {
        Self { word: (ifindex as u64) << 32 | action << 8 | outcome.number() as u64 }
    }

    /// The kernel gets the frame as it came.
    #[inline(always)]
    pub const fn pass(outcome: Outcome) -> Self {
        Self::new(outcome, PASS, 0)
    }

    /// The frame ends here.
    #[inline(always)]
    pub const fn drop(outcome: Outcome) -> Self {
        Self::new(outcome, DROP, 0)
    }

    /// The frame ends here, for an outcome that is known by its number.
    #[inline(always)]
    pub(super) const fn drop_numbered(number: u64) -> Self {
        Self { word: DROP << 8 | number & 0xff }
    }

    /// The frame leaves by interface `ifindex`.
    #[inline(always)]
    pub const fn send(outcome: Outcome, ifindex: u32, config: &Config) -> Self {
        if ifindex == config.ifindex {
            Self::new(outcome, TRANSMIT, 0)
        } else {
            Self::new(outcome, TRANSMIT, ifindex)
        }
    }

    /// The same for a frame whose TCP SYN is held to `mtu` bytes, unless that is 0.
    #[inline(always)]
    pub(super) const fn clamping(self, mtu: u16) -> Self {
        Self { word: self.word | (mtu as u64) << 16 }
    }

    /// What [`clamping`](Self::clamping) said.
    #[inline(always)]
    pub(super) const fn mtu(self) -> u16 {
        (self.word >> 16) as u16
    }

    /// The same for a frame that got tunnel headers.
    #[inline(always)]
    pub(super) const fn tunnelled(self, is: bool) -> Self {
        Self { word: if is { self.word | TUNNELLED } else { self.word } }
    }

    /// What [`tunnelled`](Self::tunnelled) said.
    #[inline(always)]
    pub(super) const fn is_tunnelled(self) -> bool {
        self.word & TUNNELLED != 0
    }

    /// The same, but what the kernel would get ends here as `outcome`: under translation nothing passes untranslated.
    #[inline(always)]
    pub(super) const fn or_drop(self, outcome: Outcome) -> Self {
        if self.word >> 8 & 0x7f == PASS { Self::drop(outcome) } else { self }
    }

    /// Number of the outcome: index of its counter.
    #[inline(always)]
    pub const fn number(self) -> u32 {
        (self.word & 0xff) as u32
    }

    /// What happens to the frame.
    #[inline(always)]
    pub const fn action(self) -> Action {
        match (self.word >> 8) & 0x7f {
            PASS => Action::Pass,
            DROP => Action::Drop,
            _ => match (self.word >> 32) as u32 {
                0 => Action::Transmit,
                ifindex => Action::Redirect(ifindex),
            },
        }
    }

    /// The row of the outcome; `None` for a number that no outcome has, which no constructor makes.
    pub fn info(self) -> Option<&'static OutcomeInfo> {
        Outcome::by_number(self.number())
    }
}

impl fmt::Debug for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let label = self.info().map_or("?", |row| row.label);
        write!(f, "{label} ({:?})", self.action())
    }
}

const _: () = assert!(OUTCOME_CAPACITY <= 1 << 8);
