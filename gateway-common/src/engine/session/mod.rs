//! Source translation: clients whose addresses pods cannot answer get one of ours.
//!
//! A translated packet needs one lookup: its session's entry says what to rewrite, where to send it, and how the
//! checksums change. Nothing is ever passed on untranslated: what cannot be translated is dropped and counted.
//!
//! - [`tuple`]: what tells a packet's session.
//! - [`forward`], [`reverse`]: the way of a client's and of a pod's packet.
//! - [`store`]: opening and ending sessions.
//! - [`track`]: a session's life.
//! - [`translate`]: the edits.
//! - [`sweep`]: what the daemon asks to be removed.

mod forward;
mod reverse;
mod shared;
mod store;
mod sweep;
mod track;
mod translate;
mod tuple;

pub(super) use forward::from_client;
pub(super) use reverse::from_pod;
pub use shared::Shared;
pub use store::Opening;
pub use sweep::sweep;
pub(super) use translate::{End, Rewrite, apply};

use super::{Inserted, classify};
use crate::abi::{Ticks, ticks};

/// IP protocol numbers as they stand in keys.
const ICMP: u16 = classify::ICMP as u16;
const TCP: u16 = classify::TCP as u16;
const UDP: u16 = classify::UDP as u16;

/// How often a hit writes when it was.
const TOUCH: Ticks = ticks(1);

/// Whether a time stamp is to be renewed.
#[inline(always)]
const fn is_stale(seen: Ticks, now: Ticks) -> bool {
    now.wrapping_sub(seen) >= TOUCH
}
