//! What the daemon asks to be removed. Userspace has no compare-and-swap on table entries, so it lists sessions, and
//! this removes them.

use super::{
    store::{self, Judgement},
};
use crate::{
    abi::{Phase, ReverseKey, SessionEvent, SweepMode},
    engine::Tables,
};

/// Removes one session, if `mode` still applies; whether it did.
#[inline(always)]
pub fn sweep<T: Tables>(tables: &T, key: &ReverseKey, mode: SweepMode) -> bool {
    let Some(session) = tables.reverse(key) else {
        return false;
    };
    let state = session.state();
    match (store::judge(tables, key, &session, tables.ticks()), mode) {
        (Judgement::Expired(state), _) => {
            store::remove(tables, key, &session, state, SessionEvent::Expired)
        }
        (_, SweepMode::ALL) if matches!(state.phase(), Phase::Opening | Phase::Live) => {
            store::remove(tables, key, &session, state, SessionEvent::Flushed)
        }
        _ => false,
    }
}
