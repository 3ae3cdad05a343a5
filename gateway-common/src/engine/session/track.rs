//! The life of a session, packet by packet: pure functions from state to state.
//!
//! A session is established when its client has proved to be there: TCP by acknowledging what the pod sent, UDP by
//! going on after an answer. Whoever only forges sources cannot do the first, and so never holds a slot. The second
//! proves little, so UDP holds its slot only while it goes on ([`store`](super::store)). Echo proves nothing and loses
//! nothing: the next request opens a session like the last one.

use super::{TCP, UDP, tuple::Segment};
use crate::abi::{Phase, State};

/// After a packet of the client.
#[inline(always)]
pub(super) const fn by_client(state: State, protocol: u16, segment: &Segment) -> State {
    if protocol != TCP {
        return if protocol == UDP && state.any(State::REPLIED) { established(state) } else { state };
    }
    if segment.any(Segment::RST) {
        return state.with(State::RESET_CLIENT);
    }
    if segment.flags & (Segment::SYN | Segment::ACK) == Segment::SYN {
        let over = state.any(State::RESET_CLIENT | State::RESET_POD)
            || state.all(State::FIN_CLIENT | State::FIN_POD);
        // The port is used again (RFC 9293 section 3.6.1, TIME-WAIT): a handshake begins.
        return if over { State::new(Phase::Opening).expecting(state.acknowledgement()) } else { state };
    }
    let state = state.without(State::RESET_CLIENT);
    let state = if segment.any(Segment::FIN) { state.with(State::FIN_CLIENT) } else { state };
    let acknowledges = segment.any(Segment::ACK)
        && state.any(State::REPLIED)
        && segment.acknowledgement == state.acknowledgement();
    if acknowledges { established(state) } else { state }
}

/// After a packet of the pod.
#[inline(always)]
pub(super) const fn by_pod(state: State, protocol: u16, segment: &Segment) -> State {
    // Whoever claims or removes it relies on the word. A pod that answers before it was asked means a session before.
    if matches!(state.phase(), Phase::Claimed | Phase::Dead) {
        return state;
    }
    if protocol != TCP {
        return state.with(State::REPLIED);
    }
    if segment.any(Segment::RST) {
        return state.with(State::RESET_POD);
    }
    let state = state.without(State::RESET_POD);
    let state = if segment.any(Segment::FIN) { state.with(State::FIN_POD) } else { state };
    match state.phase() {
        // Also in the middle of a connection whose session was lost.
        Phase::Opening => state.with(State::REPLIED).expecting(segment.end()),
        _ => state,
    }
}

#[inline(always)]
const fn established(state: State) -> State {
    match state.phase() {
        Phase::Opening => state.in_phase(Phase::Live),
        _ => state,
    }
}

/// Whether ordinary packets of the client leave the state as it is.
#[inline(always)]
pub(super) const fn is_settled(state: State) -> bool {
    matches!(state.phase(), Phase::Live) && !state.any(State::RESET_CLIENT)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::session::ICMP;

    const OPENING: State = State::new(Phase::Opening);

    fn segment(flags: u8, sequence: u32, acknowledgement: u32, len: u32) -> Segment {
        Segment { flags, sequence, acknowledgement, len }
    }

    fn syn() -> Segment {
        segment(Segment::SYN, 1000, 0, 0)
    }

    fn syn_ack() -> Segment {
        segment(Segment::SYN | Segment::ACK, u32::MAX, 1001, 0)
    }

    fn ack(number: u32) -> Segment {
        segment(Segment::ACK, 1001, number, 0)
    }

    fn live() -> State {
        let state = by_pod(by_client(OPENING, TCP, &syn()), TCP, &syn_ack());
        by_client(state, TCP, &ack(0))
    }

    #[test]
    fn the_handshake_is_confirmed_by_the_matching_acknowledgement_alone() {
        let answered = by_pod(OPENING, TCP, &syn_ack());
        assert_eq!(answered.phase(), Phase::Opening);
        // The pod's SYN counts one, and its sequence number wraps.
        assert_eq!(by_client(answered, TCP, &ack(1)).phase(), Phase::Opening);
        assert_eq!(by_client(answered, TCP, &ack(u32::MAX)).phase(), Phase::Opening);
        assert_eq!(by_client(answered, TCP, &ack(0)).phase(), Phase::Live);
    }

    #[test]
    fn an_acknowledgement_before_any_answer_confirms_nothing() {
        assert_eq!(by_client(OPENING, TCP, &ack(0)), OPENING);
    }

    #[test]
    fn simultaneous_open() {
        let crossed = by_pod(OPENING, TCP, &segment(Segment::SYN, 7000, 0, 0));
        assert_eq!(
            by_client(crossed, TCP, &segment(Segment::SYN | Segment::ACK, 1000, 7001, 0)).phase(),
            Phase::Live
        );
    }

    #[test]
    fn fast_open_data_in_the_answer_counts() {
        let answered = by_pod(OPENING, TCP, &segment(Segment::SYN | Segment::ACK, 100, 1001, 50));
        assert_eq!(by_client(answered, TCP, &ack(151)).phase(), Phase::Live);
    }

    #[test]
    fn a_reset_is_taken_back_by_the_same_side_only() {
        let reset = by_client(live(), TCP, &segment(Segment::RST, 1, 0, 0));
        assert!(reset.any(State::RESET_CLIENT));
        assert!(by_pod(reset, TCP, &segment(Segment::ACK, 5, 5, 100)).any(State::RESET_CLIENT));
        assert!(!by_client(reset, TCP, &ack(77)).any(State::RESET_CLIENT));
        let reset = by_pod(live(), TCP, &segment(Segment::RST | Segment::ACK, 1, 0, 0));
        assert!(by_client(reset, TCP, &ack(77)).any(State::RESET_POD));
        assert!(!by_pod(reset, TCP, &segment(Segment::ACK, 5, 5, 100)).any(State::RESET_POD));
    }

    #[test]
    fn half_closed_is_not_closed() {
        let half = by_client(live(), TCP, &segment(Segment::FIN | Segment::ACK, 1, 0, 0));
        assert_eq!(by_client(half, TCP, &syn()), half);
        let closed = by_pod(half, TCP, &segment(Segment::FIN | Segment::ACK, 1, 0, 0));
        assert!(closed.all(State::FIN_CLIENT | State::FIN_POD));
        assert_eq!(by_client(closed, TCP, &syn()), OPENING);
    }

    #[test]
    fn a_syn_on_a_living_connection_changes_nothing() {
        assert_eq!(by_client(live(), TCP, &syn()), live());
    }

    #[test]
    fn udp_is_confirmed_by_going_on_after_an_answer() {
        let none = Segment::default();
        assert_eq!(by_client(OPENING, UDP, &none), OPENING);
        let answered = by_pod(OPENING, UDP, &none);
        assert_eq!(answered.phase(), Phase::Opening);
        assert_eq!(by_client(answered, UDP, &none).phase(), Phase::Live);
    }

    #[test]
    fn echo_is_never_confirmed() {
        let answered = by_pod(OPENING, ICMP, &Segment::default());
        assert_eq!(by_client(answered, ICMP, &Segment::default()), answered);
    }

    #[test]
    fn nobody_interferes_with_a_claim() {
        let claimed = State::of_flow(Phase::Claimed, 7);
        assert_eq!(by_pod(claimed, UDP, &Segment::default()), claimed);
        assert_eq!(by_pod(claimed, TCP, &syn_ack()), claimed);
    }

    #[test]
    fn a_settled_state_needs_no_look() {
        assert!(!is_settled(OPENING));
        assert!(is_settled(live()));
        assert!(!is_settled(live().with(State::RESET_CLIENT)));
    }
}
