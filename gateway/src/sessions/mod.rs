//! Translated connections as people see them.
//!
//! - [`Session`]: one connection, from its two entries.
//! - [`filter`]: which of them are meant.
//! - [`census`]: how many there are, of what kind, and where addresses get scarce.

pub mod census;
pub mod filter;

use std::net::Ipv4Addr;

use clap::ValueEnum;
use gateway_common::abi::{Forward, Phase, Reverse, ReverseKey, State, Ticks, Timeouts};
use serde::{Deserialize, Serialize};

use crate::dataplane::sessions::{elapsed, seconds};

/// What is translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// ICMP echo.
    Icmp,
}

impl Protocol {
    /// By its IP protocol number.
    pub const fn of(number: u16) -> Option<Self> {
        match number {
            6 => Some(Self::Tcp),
            17 => Some(Self::Udp),
            1 => Some(Self::Icmp),
            _ => None,
        }
    }

    /// Its name.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Icmp => "icmp",
        }
    }
}

/// How far a session is: each has a timeout of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// Half-open TCP; UDP or echo that the client has not taken up again after an answer.
    Opening,
    /// In both directions.
    Established,
    /// TCP after a FIN of both sides.
    Closing,
    /// TCP after RST.
    Reset,
    /// Being removed.
    Ending,
}

impl Stage {
    /// By the state word of a session of this protocol.
    pub fn of(protocol: Protocol, state: State) -> Self {
        let tcp = protocol == Protocol::Tcp;
        match state.phase() {
            Phase::Dead => Self::Ending,
            _ if tcp && state.any(State::RESET_CLIENT | State::RESET_POD) => Self::Reset,
            Phase::Claimed | Phase::Opening => Self::Opening,
            Phase::Live if tcp && state.all(State::FIN_CLIENT | State::FIN_POD) => Self::Closing,
            Phase::Live => Self::Established,
        }
    }

    /// Its name.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Opening => "opening",
            Self::Established => "established",
            Self::Closing => "closing",
            Self::Reset => "reset",
            Self::Ending => "ending",
        }
    }
}

/// A translated connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Session {
    /// What is translated.
    pub protocol: Protocol,
    /// How far it is.
    pub state: Stage,
    /// Overlay id.
    pub overlay: u16,
    /// The client.
    pub client: Ipv4Addr,
    /// Its port; for ICMP echo its identifier.
    pub client_port: u16,
    /// The pod.
    pub pod: Ipv4Addr,
    /// Its port; 0 for ICMP echo.
    pub pod_port: u16,
    /// What the pod takes for the client.
    pub snat_address: Ipv4Addr,
    /// The port there; for ICMP echo the identifier.
    pub snat_port: u16,
    /// Id of the VTEP of the pod's node.
    pub vtep: u32,
    /// Index of the interface that the client is behind, among those of the configuration.
    pub interface: u16,
    /// VLAN there, 0 for none.
    pub vlan: u16,
    /// MAC address of the client, or of the router before it.
    pub client_mac: String,
    /// Seconds since it was opened.
    pub age_seconds: u64,
    /// Seconds since its last packet, by at most one too many.
    pub idle_seconds: u64,
    /// Seconds of idleness until it ends.
    pub expires_seconds: u64,
}

impl Session {
    /// From an entry of the reverse table, and that of the forward table if there is one. `None` for what no program
    /// writes.
    pub fn new(
        key: &ReverseKey,
        reverse: &Reverse,
        forward: Option<&Forward>,
        timeouts: &Timeouts,
        now: Ticks,
    ) -> Option<Self> {
        let protocol = Protocol::of(key.protocol)?;
        let idle = idle(reverse, forward, now);
        let limit = timeouts.of(key.protocol, reverse.state);
        Some(Self {
            protocol,
            state: Stage::of(protocol, reverse.state),
            overlay: key.overlay,
            client: reverse.client.into(),
            client_port: reverse.client_port.get(),
            pod: key.pod.into(),
            pod_port: key.pod_port.get(),
            snat_address: key.address.into(),
            snat_port: key.port.get(),
            vtep: reverse.vtep,
            interface: reverse.last_hop.port(),
            vlan: reverse.last_hop.vlan(),
            client_mac: reverse.last_hop.mac.to_string(),
            age_seconds: seconds(elapsed(reverse.created, now)),
            idle_seconds: seconds(idle),
            expires_seconds: seconds(limit.saturating_sub(idle)),
        })
    }
}

/// How long no packet came in either direction.
pub fn idle(reverse: &Reverse, forward: Option<&Forward>, now: Ticks) -> Ticks {
    let reply = elapsed(reverse.seen, now);
    forward.map_or(reply, |forward| reply.min(elapsed(forward.seen, now)))
}

#[cfg(test)]
mod tests {
    use gateway_common::abi::ticks;
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case(6, Phase::Claimed, 0, Stage::Opening)]
    #[case(6, Phase::Opening, State::REPLIED, Stage::Opening)]
    #[case(6, Phase::Live, State::REPLIED | State::FIN_POD, Stage::Established)]
    #[case(6, Phase::Live, State::FIN_CLIENT | State::FIN_POD, Stage::Closing)]
    #[case(6, Phase::Live, State::RESET_POD, Stage::Reset)]
    #[case(6, Phase::Opening, State::RESET_POD, Stage::Reset)]
    #[case(17, Phase::Live, State::RESET_POD, Stage::Established)]
    #[case(1, Phase::Opening, 0, Stage::Opening)]
    #[case(6, Phase::Dead, State::RESET_POD, Stage::Ending)]
    fn stages(#[case] protocol: u16, #[case] phase: Phase, #[case] flags: u32, #[case] expected: Stage) {
        let protocol = Protocol::of(protocol).unwrap();
        assert_eq!(Stage::of(protocol, State::new(phase).with(flags)), expected);
    }

    #[test]
    fn a_session_is_as_young_as_its_younger_half() {
        let now: Ticks = 5;
        let reverse = Reverse { seen: now.wrapping_sub(ticks(20)), ..Reverse::default() };
        let forward = Forward { seen: now.wrapping_sub(ticks(3)), ..Forward::default() };
        let key = ReverseKey { protocol: 17, ..ReverseKey::default() };
        let session = |reverse: &Reverse, forward| {
            let live = Reverse { state: State::new(Phase::Live), ..*reverse };
            Session::new(&key, &live, forward, &Timeouts::DEFAULT, now).unwrap()
        };
        let both = session(&reverse, Some(&forward));
        assert_eq!((both.idle_seconds, both.expires_seconds), (3, 297));
        assert_eq!(session(&reverse, None).idle_seconds, 20);
        assert_eq!(Session::new(&ReverseKey::default(), &reverse, None, &Timeouts::DEFAULT, now), None);
    }
}
