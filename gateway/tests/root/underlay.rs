//! Next hops as the kernel resolves and changes them.

use std::{net::Ipv4Addr, path::Path as FilePath, time::Duration};

use gateway::{
    config::Config,
    kernel::{
        host::Host,
        netlink::{self, Event},
        underlay::{NextHop, Path, ReadyHop, Underlay},
    },
};
use gateway_common::wire::Mac;
use tokio::{sync::mpsc::Receiver, time::timeout};

use crate::sandbox::{config, isolated, sh};

const NODE: Path = Path { local: Ipv4Addr::new(172, 16, 2, 200), endpoint: Ipv4Addr::new(172, 16, 2, 10) };
const FAR: Path = Path { local: NODE.local, endpoint: Ipv4Addr::new(203, 0, 113, 9) };

struct Rig {
    config: Config,
    underlay: Underlay,
    events: Receiver<Event>,
    handle: rtnetlink::Handle,
}

impl Rig {
    async fn new(config: Config) -> Self {
        let handle = netlink::connect().unwrap();
        let events = netlink::subscribe().unwrap().events;
        let mut underlay = Underlay::new(handle.clone());
        underlay.resync().await.unwrap();
        underlay.track(&[NODE, FAR].into()).await;
        Self { config, underlay, events, handle }
    }

    async fn hop(&self, path: Path) -> NextHop {
        let host = Host::read(&self.handle).await.unwrap();
        self.underlay.next_hop(path, &host, &self.config)
    }

    /// Takes neighbour events until the next hop is as wanted.
    async fn until(&mut self, path: Path, wanted: impl Fn(&NextHop) -> bool) -> NextHop {
        let wait = async {
            loop {
                let hop = self.hop(path).await;
                if wanted(&hop) {
                    return hop;
                }
                let moved = match self.events.recv().await.expect("events") {
                    Event::Neighbour(message) => self.underlay.neighbour_event(&message, false),
                    Event::NeighbourGone(message) => self.underlay.neighbour_event(&message, true),
                    _ => false,
                };
                if moved {
                    self.underlay.resolve().await;
                }
            }
        };
        let Ok(hop) = timeout(Duration::from_secs(5), wait).await else {
            panic!("still {:?}", self.hop(path).await)
        };
        hop
    }
}

fn ready(hop: &NextHop) -> ReadyHop {
    match hop {
        NextHop::Ready(hop) => *hop,
        other => panic!("not ready: {other:?}"),
    }
}

fn reason(hop: &NextHop) -> &str {
    hop.obstacle().unwrap_or_else(|| panic!("{hop:?}"))
}

/// A node in another namespace behind `und`.
const NODE_SIDE: &str = "
    unshare --net sleep 60 & echo $! > $PIDFILE; sleep 0.3
    ip link add und address 02:00:00:00:00:01 type veth peer name far address 02:00:00:00:00:10
    ip link set far netns $(cat $PIDFILE)
    ip addr add 172.16.2.200/24 dev und; ip link set und up
    nsenter --net=/proc/$(cat $PIDFILE)/ns/net sh -ec 'ip addr add 172.16.2.10/24 dev far; ip link set far up'
";

#[test]
fn neighbours_are_resolved_without_traffic_and_followed() {
    isolated(async |directory: &FilePath| {
        let pidfile = directory.join("pid");
        sh(&format!("exec > /dev/null 2>&1; PIDFILE={}; {NODE_SIDE}", pidfile.display()));
        let mut rig = Rig::new(config(directory)).await;
        let hop = ready(&rig.until(NODE, |hop| matches!(hop, NextHop::Ready(_))).await);
        assert_eq!(hop.source, Mac::new([2, 0, 0, 0, 0, 1]));
        assert_eq!(hop.destination, Mac::new([2, 0, 0, 0, 0, 0x10]));
        assert_eq!((hop.mtu, hop.on_link, hop.vlan), (1500, true, None));
        assert!(sh("ip neigh show 172.16.2.10").contains("managed"));

        // Somebody deletes the entry: it is asked for again, and nothing says that it is unreachable.
        sh("ip neigh del 172.16.2.10 dev und");
        rig.until(NODE, |hop| matches!(hop, NextHop::Pending { .. })).await;
        rig.until(NODE, |hop| matches!(hop, NextHop::Ready(_))).await;

        // The node's address moves to another card.
        sh("ip neigh replace 172.16.2.10 dev und lladdr 02:00:00:00:00:11 nud reachable");
        let wanted = Mac::new([2, 0, 0, 0, 0, 0x11]);
        rig.until(NODE, |hop| matches!(hop, NextHop::Ready(hop) if hop.destination == wanted)).await;

        // Behind a router, with a smaller path MTU.
        assert_eq!(reason(&rig.hop(FAR).await), "no route to 203.0.113.9");
        sh("ip route add 203.0.113.0/24 via 172.16.2.10 mtu 1400");
        rig.underlay.reroute().await;
        let hop = ready(&rig.hop(FAR).await);
        assert_eq!((hop.mtu, hop.on_link, hop.destination), (1400, false, wanted));
        sh(&format!("kill $(cat {})", pidfile.display()));
    });
}

#[test]
fn reasons_name_what_is_missing() {
    isolated(async |directory: &FilePath| {
        sh("ip link set lo up; ip link add und type veth peer name far; ip link add plain type bridge
            ip addr add 172.16.2.200/24 dev und; ip link set und up; ip link set far up; ip link set plain up");
        let mut rig = Rig::new(config(directory)).await;
        let hop = rig.until(NODE, |hop| reason(hop).contains("does not answer")).await;
        assert_eq!(reason(&hop), "node 172.16.2.10 does not answer ARP on und");

        sh("ip route add 203.0.113.0/24 dev plain");
        rig.underlay.reroute().await;
        assert!(reason(&rig.hop(FAR).await).contains("interface plain, which has no underlay role"));

        sh("ip addr add 203.0.113.9/32 dev plain");
        rig.underlay.reroute().await;
        assert_eq!(reason(&rig.hop(FAR).await), "203.0.113.9 is an address of this host");

        sh("ip link set und down");
        rig.underlay.reroute().await;
        assert!(!reason(&rig.hop(NODE).await).is_empty());
    });
}
