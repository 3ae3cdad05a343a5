//! An index of pod CIDRs that answers "which ones overlap this one?" without looking at all of them.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
};

use ipnet::Ipv4Net;

/// Values by CIDR; a CIDR may have several.
#[derive(Debug)]
pub(super) struct NetIndex<V> {
    by_net: BTreeMap<(Ipv4Addr, u8), BTreeSet<V>>,
}

impl<V> Default for NetIndex<V> {
    fn default() -> Self {
        Self { by_net: BTreeMap::new() }
    }
}

impl<V: Ord> NetIndex<V> {
    pub(super) fn insert(&mut self, net: Ipv4Net, value: V) {
        self.by_net.entry((net.network(), net.prefix_len())).or_default().insert(value);
    }

    pub(super) fn remove(&mut self, net: Ipv4Net, value: &V) {
        let key = (net.network(), net.prefix_len());
        if let Some(values) = self.by_net.get_mut(&key) {
            values.remove(value);
            if values.is_empty() {
                self.by_net.remove(&key);
            }
        }
    }

    /// Values of exactly this CIDR, in order.
    pub(super) fn exactly(&self, net: Ipv4Net) -> impl Iterator<Item = &V> {
        self.by_net.get(&(net.network(), net.prefix_len())).into_iter().flatten()
    }

    /// Values of every CIDR that shares an address with `net`: two CIDRs do only if one contains the other.
    pub(super) fn overlapping(&self, net: Ipv4Net) -> impl Iterator<Item = &V> {
        let around = (0..net.prefix_len()).filter_map(move |length| {
            let wider = Ipv4Net::new_assert(net.network(), length).network();
            self.by_net.get(&(wider, length))
        });
        // A wider CIDR may start at the same address, so those are left out of the range by their length.
        let inside = self
            .by_net
            .range((net.network(), net.prefix_len())..=(net.broadcast(), 32))
            .filter(move |((_, length), _)| *length >= net.prefix_len())
            .map(|(_, values)| values);
        around.chain(inside).flatten()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn net() -> impl Strategy<Value = Ipv4Net> {
        // Few addresses and all lengths, so that nets often contain one another.
        (any::<[bool; 4]>(), 0..=32u8).prop_map(|(bits, length)| {
            let [a, b, c, d] = bits.map(u8::from);
            Ipv4Net::new_assert(Ipv4Addr::new(10 + 128 * a, 64 * b, 16 * c, d), length).trunc()
        })
    }

    proptest! {
        #[test]
        fn agrees_with_comparing_all(nets in proptest::collection::vec(net(), 0..20), removed in 0..5usize, probe in net()) {
            let mut index = NetIndex::default();
            for (id, net) in nets.iter().enumerate() {
                index.insert(*net, id);
            }
            for (id, net) in nets.iter().enumerate().take(removed) {
                index.remove(*net, &id);
            }
            let expected: BTreeSet<usize> = nets
                .iter()
                .enumerate()
                .skip(removed)
                .filter(|(_, net)| {
                    net.network() <= probe.broadcast() && probe.network() <= net.broadcast()
                })
                .map(|(id, _)| id)
                .collect();
            let found: Vec<usize> = index.overlapping(probe).copied().collect();
            prop_assert_eq!(found.len(), expected.len(), "each once");
            prop_assert_eq!(found.into_iter().collect::<BTreeSet<_>>(), expected);
        }
    }
}
