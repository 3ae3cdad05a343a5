//! What the daemon asks to be removed. Userspace has no compare-and-swap on table entries, so it lists sessions, and
//! this removes them.

use super::store;
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
    let peer = session.forward_key(key);
    let idle = store::idle(tables, &session, state, &peer, tables.ticks());
    let event = if idle > tables.config().timeouts.of(key.protocol, state) {
        SessionEvent::Expired
    } else if mode == SweepMode::ALL && matches!(state.phase(), Phase::Opening | Phase::Live) {
        SessionEvent::Flushed
    } else {
        return false;
    };
    store::remove(tables, key, &peer, &session, state, event)
}
