//! Atomic operations on map values. `core::sync::atomic` has none that give a result on this target, so these are the
//! compiler's own.

use core::intrinsics::{AtomicOrdering, atomic_cxchg, atomic_xadd};

use gateway_common::{
    abi::{Reverse, State},
    engine::session::Shared,
};

const ORDER: AtomicOrdering = AtomicOrdering::SeqCst;

/// Compare-and-swap of a session's state; whether it was `old`.
#[inline(always)]
pub(crate) fn exchange(session: &Shared<Reverse>, old: State, new: State) -> bool {
    // SAFETY: a field of an entry in its map; aligned, as map values are.
    unsafe { atomic_cxchg::<u64, ORDER, ORDER>(session.state_word(), old.word, new.word) }.1
}

/// Adds to a counter; what it was.
#[inline(always)]
pub(crate) fn add(counter: *mut u64, by: u64) -> u64 {
    // SAFETY: a value of an array, aligned.
    unsafe { atomic_xadd::<u64, u64, ORDER>(counter, by) }
}
