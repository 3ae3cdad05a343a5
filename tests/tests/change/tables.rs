//! The tables as they are pinned, and a thread that looks whether what should be there is there all the time.

use std::{
    collections::BTreeMap,
    net::Ipv4Addr,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use aya::maps::{
    Array, HashMap, Map, MapData,
    lpm_trie::{Key, LpmTrie},
};
use gateway::dataplane::{pins::Pins, tables::Tables};
use gateway_common::{
    abi::{OverlayAddress, PrefixKey, Route, Vtep, VtepFlags, map},
    wire::Mac,
};
use gateway_tests::lab::{Flannel, wait_until};
use ipnet::Ipv4Net;

use crate::cluster::Cluster;

const BPFFS: &str = "/sys/fs/bpf";

/// Where each address and prefix leads: the VTEP's endpoint and MAC address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Content {
    pub(crate) pods: BTreeMap<Ipv4Addr, (Ipv4Addr, Mac)>,
    pub(crate) prefixes: BTreeMap<Ipv4Net, (Ipv4Addr, Mac)>,
    pub(crate) sources: BTreeMap<Ipv4Addr, Ipv4Addr>,
    pub(crate) vteps: usize,
}

impl Content {
    /// Reads the pinned tables.
    pub(crate) fn read(lab: &Flannel) -> Self {
        let tables = Tables::open(&Pins::new(Path::new(BPFFS), &lab.instance())).unwrap();
        let (pods, prefixes, sources) =
            (tables.pods.read().unwrap(), tables.prefixes.read().unwrap(), tables.sources.read().unwrap());
        // Last: an entry is there for longer than what refers to it.
        let vteps = tables.vteps.read().unwrap();
        let at = |route: Route| {
            let slot = vteps[&route.vtep].slot();
            (Ipv4Addr::from(slot.endpoint), slot.mac)
        };
        Self {
            pods: pods.into_iter().map(|(key, route)| (key.address.into(), at(route))).collect(),
            prefixes: prefixes
                .into_iter()
                .map(|(key, route)| {
                    let length = u8::try_from(key.length - PrefixKey::OVERLAY_BITS).unwrap();
                    (Ipv4Net::new_assert(key.data.address.into(), length), at(route))
                })
                .collect(),
            sources: sources.into_iter().map(|(key, route)| (key.address.into(), at(route).0)).collect(),
            vteps: vteps.values().filter(|vtep| vtep.slot().flags.has(VtepFlags::USED)).count(),
        }
    }

    /// Waits until the tables say what the cluster asks for.
    pub(crate) fn wait(lab: &Flannel, cluster: &Cluster, what: &str) {
        let expected = cluster.tables();
        let reached =
            wait_until(what, Duration::from_secs(10), || Ok((Self::read(lab) == expected).then_some(())));
        if let Err(error) = reached {
            let found = Self::read(lab);
            panic!("{error:#}\nexpected {expected:#?}\nfound {found:#?}");
        }
    }
}

/// Single entries of the pinned tables.
pub(crate) struct Probe {
    pods: HashMap<MapData, OverlayAddress, Route>,
    prefixes: LpmTrie<MapData, PrefixKey, Route>,
    sources: HashMap<MapData, OverlayAddress, Route>,
    vteps: Array<MapData, Vtep>,
}

impl Probe {
    pub(crate) fn open(lab: &Flannel) -> Self {
        let pins = Pins::new(Path::new(BPFFS), &lab.instance());
        let open = |name: &str| MapData::from_pin(pins.map(name)).unwrap();
        Self {
            pods: Map::HashMap(open(map::PODS)).try_into().unwrap(),
            prefixes: Map::LpmTrie(open(map::PREFIXES)).try_into().unwrap(),
            sources: Map::HashMap(open(map::SOURCES)).try_into().unwrap(),
            vteps: Map::Array(open(map::VTEPS)).try_into().unwrap(),
        }
    }

    /// Where a pod's address leads.
    pub(crate) fn pod(&self, address: Ipv4Addr) -> Option<Ipv4Addr> {
        let route = self.pods.get(&exact(address), 0).ok()?;
        Some(self.vteps.get(&route.vtep, 0).ok()?.slot().endpoint.into())
    }

    /// What is missing or wrong of a cluster whose nodes are all resolved.
    fn faults(&self, cluster: &Cluster) -> Option<String> {
        let leads = |route: Result<Route, _>, to: Ipv4Addr| {
            let vtep = route.ok().and_then(|route: Route| self.vteps.get(&route.vtep, 0).ok());
            vtep.is_some_and(|vtep: Vtep| {
                let slot = vtep.slot();
                slot.flags.has(VtepFlags::USED.with(VtepFlags::READY)) && Ipv4Addr::from(slot.endpoint) == to
            })
        };
        for (name, pod) in &cluster.pods {
            if !leads(self.pods.get(&exact(pod.address), 0), cluster.nodes[&pod.node].endpoint) {
                return Some(format!("pod {name}"));
            }
        }
        for (name, node) in &cluster.nodes {
            let data = PrefixKey { overlay: 0, address: node.cidr.network().into() };
            let key = Key::new(PrefixKey::OVERLAY_BITS + u32::from(node.cidr.prefix_len()), data);
            if !leads(self.prefixes.get(&key, 0), node.endpoint) {
                return Some(format!("prefix of {name}"));
            }
            if !leads(self.sources.get(&exact(node.endpoint), 0), node.endpoint) {
                return Some(format!("source of {name}"));
            }
        }
        None
    }
}

fn exact(address: Ipv4Addr) -> OverlayAddress {
    OverlayAddress { overlay: 0, address: address.into() }
}

/// Looks as fast as it can whether everything that a cluster asks for is in the tables.
pub(crate) struct Watcher {
    over: Arc<AtomicBool>,
    thread: JoinHandle<(u64, Vec<String>)>,
}

impl Watcher {
    pub(crate) fn start(lab: &Flannel, constant: &Cluster) -> Self {
        let (probe, cluster) = (Probe::open(lab), constant.clone());
        let over = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&over);
        let thread = thread::spawn(move || {
            let (mut looks, mut faults) = (0, Vec::new());
            while !ended.load(Ordering::Relaxed) {
                faults.extend(probe.faults(&cluster).map(|fault| format!("look {looks}: {fault}")));
                looks += 1;
                // The daemon needs a CPU too.
                thread::sleep(Duration::from_micros(100));
            }
            (looks, faults)
        });
        Self { over, thread }
    }

    /// How many looks there were; panics if something was absent in any of them.
    pub(crate) fn stop(self) -> u64 {
        self.over.store(true, Ordering::Relaxed);
        let (looks, faults) = self.thread.join().unwrap();
        assert!(
            faults.is_empty(),
            "{} of {looks} looks failed: {:#?}",
            faults.len(),
            &faults[..faults.len().min(10)]
        );
        looks
    }
}
