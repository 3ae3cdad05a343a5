//! How many sessions there are, and where addresses get scarce.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::Ipv4Addr,
};

use gateway_common::{
    abi::{Reverse, ReverseKey},
    wire::Be16,
};
use serde::{Deserialize, Serialize};

use super::{Protocol, Stage};
use crate::config::Snat;

/// Ports of an address towards one port of a pod: all but the system ports, which a client may bring but the program does
/// not choose.
pub const PORTS: u32 = 65_536 - 1024;
/// From this part on (in percent) something is said.
const SCARCE: u64 = 80;

/// Counts one session after the other.
#[derive(Debug, Default)]
pub struct Census {
    kinds: BTreeMap<(Protocol, Stage), u64>,
    addresses: BTreeMap<Ipv4Addr, u64>,
    /// Sessions of an address to one port of a pod; the key's own port is 0.
    towards: HashMap<ReverseKey, u32>,
}

impl Census {
    /// Counts a session.
    pub fn add(&mut self, key: &ReverseKey, reverse: &Reverse) {
        let Some(protocol) = Protocol::of(key.protocol) else { return };
        *self.kinds.entry((protocol, Stage::of(protocol, reverse.state))).or_default() += 1;
        *self.addresses.entry(key.address.into()).or_default() += 1;
        *self.towards.entry(ReverseKey { port: Be16::default(), ..*key }).or_default() += 1;
    }

    /// The result.
    pub fn finish(self, slots: u32, snat: &Snat) -> Sessions {
        let mut busiest: BTreeMap<Ipv4Addr, Busiest> = BTreeMap::new();
        for (key, used) in self.towards {
            let Some(protocol) = Protocol::of(key.protocol) else { continue };
            let found = Busiest { pod: key.pod.into(), port: key.pod_port.get(), protocol, used };
            let most = busiest.entry(key.address.into()).or_insert(found);
            // Of equals the lowest, so that the result is the same every time.
            if (found.used, most.pod, most.port) > (most.used, found.pod, found.port) {
                *most = found;
            }
        }
        let configured: BTreeSet<Ipv4Addr> = snat.addresses().collect();
        let addresses = configured
            .iter()
            .chain(self.addresses.keys())
            .collect::<BTreeSet<_>>()
            .into_iter()
            .map(|address| AddressUse {
                address: *address,
                pool: snat.pool_of(*address).map(str::to_owned),
                sessions: self.addresses.get(address).copied().unwrap_or_default(),
                busiest: busiest.get(address).copied(),
            })
            .collect();
        let kinds: Vec<KindCount> = self
            .kinds
            .into_iter()
            .map(|((protocol, state), sessions)| KindCount { protocol, state, sessions })
            .collect();
        Sessions { slots, sessions: kinds.iter().map(|kind| kind.sessions).sum(), kinds, addresses }
    }
}

/// How many sessions of a kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KindCount {
    /// What is translated.
    pub protocol: Protocol,
    /// How far.
    pub state: Stage,
    /// How many.
    pub sessions: u64,
}

/// How much an address is used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddressUse {
    /// The SNAT address.
    pub address: Ipv4Addr,
    /// Its pool; absent if the configuration does not name the address any more, and it only drains.
    pub pool: Option<String>,
    /// Sessions.
    pub sessions: u64,
    /// Where it is used most.
    pub busiest: Option<Busiest>,
}

/// The port of a pod towards which most ports of an address are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Busiest {
    /// The pod.
    pub pod: Ipv4Addr,
    /// Its port; 0 for ICMP echo.
    pub port: u16,
    /// What is translated.
    pub protocol: Protocol,
    /// Ports that are used, of [`PORTS`].
    pub used: u32,
}

/// What was counted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sessions {
    /// How many there can be.
    pub slots: u32,
    /// How many there are.
    pub sessions: u64,
    /// By protocol and state.
    pub kinds: Vec<KindCount>,
    /// By SNAT address.
    pub addresses: Vec<AddressUse>,
}

impl Sessions {
    /// Addresses that sessions use although the configuration does not name them.
    pub fn draining(&self) -> BTreeSet<Ipv4Addr> {
        self.addresses.iter().filter(|use_| use_.pool.is_none()).map(|use_| use_.address).collect()
    }

    /// What gets scarce, for people. The texts are the same as long as the problem is.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if self.sessions * 100 > u64::from(self.slots) * SCARCE {
            problems.push(format!(
                "more than {SCARCE} % of the {} sessions that there is room for are open: raise max_sessions under [snat]; \
                 when all are established, new clients are dropped (snat_table_full)",
                self.slots
            ));
        }
        for AddressUse { address, pool, busiest, .. } in &self.addresses {
            let Some(Busiest { pod, port, protocol, used }) = busiest else { continue };
            if pool.is_some() && u64::from(*used) * 100 > u64::from(PORTS) * SCARCE {
                problems.push(format!(
                    "more than {SCARCE} % of the ports of SNAT address {address} are used towards {} {pod} port {port}: \
                     add addresses to its pool; when all are used, new clients are dropped (snat_ports_exhausted)",
                    protocol.label()
                ));
            }
        }
        problems
    }
}

#[cfg(test)]
mod tests {
    use gateway_common::{
        abi::{Phase, State, Timeouts},
        wire::Ipv4,
    };

    use super::*;
    use crate::config::SnatPool;

    fn snat(addresses: &[u8]) -> Snat {
        let addresses = addresses.iter().map(|last| Ipv4Addr::new(10, 244, 30, *last)).collect();
        Snat {
            pools: vec![SnatPool { name: "web".to_owned(), addresses }],
            rules: Vec::new(),
            timeouts: Timeouts::DEFAULT,
            max_sessions: 10,
        }
    }

    fn key(last: u8, pod: u8, pod_port: u16, port: u16) -> ReverseKey {
        ReverseKey {
            pod: Ipv4::new([10, 244, 1, pod]),
            address: Ipv4::new([10, 244, 30, last]),
            pod_port: Be16::new(pod_port),
            port: Be16::new(port),
            protocol: 6,
            ..ReverseKey::default()
        }
    }

    fn live() -> Reverse {
        Reverse { state: State::new(Phase::Live), ..Reverse::default() }
    }

    #[test]
    fn every_session_is_counted_once_by_kind_and_by_address() {
        let mut census = Census::default();
        for port in 1..=3 {
            census.add(&key(16, 2, 80, port), &live());
        }
        census.add(&key(16, 3, 80, 1), &live());
        census.add(&key(99, 3, 443, 1), &Reverse::default());
        census.add(&ReverseKey::default(), &live());
        let found = census.finish(10, &snat(&[16, 17]));
        assert_eq!((found.sessions, found.slots), (5, 10));
        let kinds: Vec<_> = found.kinds.iter().map(|kind| (kind.state, kind.sessions)).collect();
        assert_eq!(kinds, [(Stage::Established, 4), (Stage::Ending, 1)]);
        let uses: Vec<_> =
            found.addresses.iter().map(|found| (found.address.octets()[3], found.sessions)).collect();
        assert_eq!(uses, [(16, 4), (17, 0), (99, 1)], "also those that nobody uses or that drain");
        let busiest = found.addresses[0].busiest.unwrap();
        assert_eq!((busiest.pod.octets()[3], busiest.port, busiest.used), (2, 80, 3));
        assert_eq!(found.draining(), [Ipv4Addr::new(10, 244, 30, 99)].into());
        assert!(found.problems().is_empty());
    }

    #[test]
    fn what_gets_scarce_is_said_before_it_is_gone() {
        let mut census = Census::default();
        for port in 0..52_000 {
            census.add(&key(16, 2, 80, port), &live());
        }
        let found = census.finish(60_000, &snat(&[16]));
        let problems = found.problems();
        assert_eq!(problems.len(), 2, "{problems:?}");
        assert!(problems[0].contains("max_sessions under [snat]"), "{problems:?}");
        assert!(problems[1].contains("10.244.30.16") && problems[1].contains("port 80"), "{problems:?}");
        // What drains gets no new sessions.
        let drained = Sessions { slots: 100_000, ..Census::default().finish(1, &snat(&[])) };
        assert!(drained.problems().is_empty());
    }
}
