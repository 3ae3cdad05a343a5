//! Clients whose addresses pods cannot answer, so that the gateway must translate them.
//!
//! ```text
//!                 guest1 192.0.2.10 ──────────────┐
//!  remote1 198.51.100.10 ── router 192.0.2.254 ──┴─ lan ── 192.0.2.1 ext0 gateway
//! ```
//!
//! `guest1` is on the clients' LAN with a subnet of its own, `remote1` behind a router. For both the gateway is the way to
//! the pod network.

use std::{net::Ipv4Addr, time::Duration};

use anyhow::{Result, ensure};
use gateway_common::wire::Mac;
use ipnet::Ipv4Net;

use super::{
    capture::Capture,
    flannel::{
        EXTERNAL, Flannel, GATEWAY_ENDPOINT, GATEWAY_SUBNET, LAN, MTU, NETWORK, NIC, PORT, UNDERLAY_SWITCH,
    },
    host::{Host, Role},
    wait_until,
    wiring::{self, End, Via},
};

/// The subnet of guests.
pub const GUESTS: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(192, 0, 2, 0), 24);
/// The gateway's address among them.
pub const GUEST_ROUTER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
/// The guest.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 10);
/// The network behind the router.
pub const REMOTES: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(198, 51, 100, 0), 24);
/// The client there.
pub const REMOTE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 10);
/// The address to which clients are translated where nothing else is configured: the last of the gateway's subnet.
pub const AUTOMAP: Ipv4Addr = Ipv4Addr::new(10, 244, 30, 254);

const ROUTER: &str = "router";
const ROUTER_ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 254);
const ROUTER_INSIDE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
/// The router's interface towards the remote network.
const INSIDE: &str = "eth1";

impl Flannel {
    /// Adds the guest, the router and the remote client.
    pub fn add_outside(&mut self) -> Result<()> {
        let net = |address, length| Ipv4Net::new_assert(address, length);
        let mac = |last| Some(Mac::new([0x52, 0x54, 0, 0, 1, last]));
        let gateway = self.gateway().namespace();
        wiring::address(gateway, EXTERNAL, net(GUEST_ROUTER, 24))?;
        wiring::route(gateway, REMOTES, Via::Router(ROUTER_ADDRESS))?;

        self.add_host("guest1", Role::Client)?;
        let guest = self.named("guest1");
        self.plug(guest, NIC, LAN, mac(110))?;
        wiring::address(guest.namespace(), NIC, net(GUEST, 24))?;
        wiring::route(guest.namespace(), NETWORK, Via::Router(GUEST_ROUTER))?;

        self.add_host(ROUTER, Role::Router)?;
        self.add_host("remote1", Role::Client)?;
        let (router, remote) = (self.named(ROUTER), self.named("remote1"));
        self.plug(router, NIC, LAN, mac(154))?;
        wiring::address(router.namespace(), NIC, net(ROUTER_ADDRESS, 24))?;
        wiring::veth(
            End { namespace: router.namespace(), name: INSIDE, mac: None, mtu: MTU },
            End { namespace: remote.namespace(), name: NIC, mac: None, mtu: MTU },
        )?;
        router.offload(INSIDE, &["tx", "off"])?;
        remote.offload(NIC, &["tx", "off"])?;
        wiring::address(router.namespace(), INSIDE, net(ROUTER_INSIDE, 24))?;
        wiring::address(remote.namespace(), NIC, net(REMOTE, 24))?;
        wiring::sysctl(router.namespace(), "ipv4/ip_forward", "1")?;
        wiring::route(router.namespace(), NETWORK, Via::Router(GUEST_ROUTER))?;
        wiring::route(remote.namespace(), Ipv4Net::default(), Via::Router(ROUTER_INSIDE))
    }

    /// The client on the LAN that has a subnet of its own.
    pub fn guest(&self) -> &Host {
        self.named("guest1")
    }

    /// The client behind a router.
    pub fn remote(&self) -> &Host {
        self.named("remote1")
    }

    /// Gives the guest more addresses: `count` of them from [`GUEST`] on.
    pub fn add_guest_addresses(&self, count: u8) -> Result<Vec<Ipv4Addr>> {
        let addresses: Vec<Ipv4Addr> =
            (0..count).map(|number| Ipv4Addr::from(u32::from(GUEST) + u32::from(number))).collect();
        for address in &addresses[1..] {
            wiring::address(self.guest().namespace(), NIC, Ipv4Net::new_assert(*address, 24))?;
        }
        Ok(addresses)
    }
}

/// Watches both sides of the gateway for what must never be there: addresses of outside clients inside the tunnel or on the
/// underlay, SNAT addresses outside; in packets, and in what ICMP errors quote.
#[derive(Debug)]
pub struct Watch {
    inside: Capture,
    outside: Capture,
}

/// Offsets from the UDP header of a tunnel packet.
const INNER_TYPE: u8 = 28;
const INNER_SOURCE: u8 = 42;
const INNER_DESTINATION: u8 = 46;
const INNER_PROTOCOL: u8 = 39;
const INNER_ICMP: u8 = 50;
const QUOTED_SOURCE: u8 = 70;
const QUOTED_DESTINATION: u8 = 74;

/// As long as a frame may be under way to a capture.
const LINGER: Duration = Duration::from_millis(200);

impl Watch {
    /// Begins to watch; SNAT addresses are those of `addresses`.
    pub fn start(lab: &Flannel, addresses: &[Ipv4Addr]) -> Result<Self> {
        let bits = |net: Ipv4Net| (u32::from(net.netmask()), u32::from(net.network()));
        let within = |field: &str, net| {
            let (mask, network) = bits(net);
            format!("({field} & {mask:#x} = {network:#x})")
        };
        let udp = |offset: u8| format!("udp[{offset}:4]");
        let foreign = |offset: u8| [GUESTS, REMOTES].map(|net| within(&udp(offset), net)).join(" or ");
        let own = within(&udp(INNER_SOURCE), GATEWAY_SUBNET);
        let error = format!(
            "udp[{INNER_PROTOCOL}] = 1 and (udp[{INNER_ICMP}] = 3 or udp[{INNER_ICMP}] = 11) and ({} or {})",
            foreign(QUOTED_SOURCE),
            foreign(QUOTED_DESTINATION)
        );
        // What the gateway puts into the tunnel comes from its own subnet, and nothing there is about outside clients.
        let tunnel = format!(
            "udp dst port {PORT} and src host {GATEWAY_ENDPOINT} and udp[{INNER_TYPE}:2] = 0x800 and \
             (not {own} or {} or ({error}))",
            foreign(INNER_DESTINATION)
        );
        let inside = format!("(({tunnel}) or net {GUESTS} or net {REMOTES})");

        let numbers: Vec<u32> = addresses.iter().map(|address| u32::from(*address)).collect();
        let hosts =
            addresses.iter().map(|address| format!("host {address}")).collect::<Vec<_>>().join(" or ");
        let quoted = numbers
            .iter()
            .flat_map(|number| [20, 24].map(|offset| format!("icmp[{offset}:4] = {number:#x}")))
            .collect::<Vec<_>>()
            .join(" or ");
        // On the LAN: no SNAT address but in ARP, where nobody asks for one either.
        let outside = format!("ip and ({hosts} or (icmp and (icmp[0] = 3 or icmp[0] = 11) and ({quoted})))");
        Ok(Self {
            inside: lab.host(UNDERLAY_SWITCH)?.capture("gateway", &inside)?,
            outside: lab.host(LAN)?.capture("gateway", &outside)?,
        })
    }

    /// How many frames were seen inside and outside that must not be there, so far.
    pub fn seen(&self) -> Result<[usize; 2]> {
        Ok([self.inside.frames()?.len(), self.outside.frames()?.len()])
    }

    /// Waits until both watches have seen such a frame: they are not blind.
    pub fn wait_seen(&self, limit: Duration) -> Result<()> {
        wait_until("the watch sees what must not be there", limit, || {
            Ok(self.seen()?.iter().all(|count| *count > 0).then_some(()))
        })
    }

    /// Ends the watch; an error if there was anything.
    pub fn finish(self) -> Result<()> {
        std::thread::sleep(LINGER);
        let paths = [self.inside.path().to_owned(), self.outside.path().to_owned()];
        let (inside, outside) = (self.inside.stop()?.len(), self.outside.stop()?.len());
        ensure!(inside == 0, "{inside} untranslated frames on the underlay: {}", paths[0].display());
        ensure!(outside == 0, "{outside} untranslated frames on the LAN: {}", paths[1].display());
        Ok(())
    }
}
