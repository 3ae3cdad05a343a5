//! Hosts that do not fit, made of values.

use std::net::Ipv4Addr;

use super::*;
use crate::{
    cli::check::Level,
    config::Overrides,
    kernel::host::{Vxlan, XdpState},
};

fn config() -> Config {
    let text = r#"
[source]
kind = "files"
path = "/m"
[[interface]]
name = "ext0"
roles = ["external"]
[[interface]]
name = "und0"
vlan = 7
roles = ["underlay"]
[[overlay]]
name = "flannel"
local = "172.16.2.200"
mac = "0e:11:22:33:44:55"
subnet = "10.244.30.0/24"
"#;
    Config::parse(text, "gateway.toml", &Overrides::default()).unwrap()
}

fn link(index: u32, name: &str, mtu: u32, kind: Kind) -> Link {
    let mac = Some(gateway_common::wire::Mac::new([2, 0, 0, 0, 0, 1]));
    Link { index, name: name.into(), mac, mtu, up: true, kind, alias: None, xdp: XdpState::default() }
}

fn host(links: impl IntoIterator<Item = Link>) -> Host {
    Host { links: links.into_iter().map(|link| (link.index, link)).collect(), ..Host::default() }
}

fn vxlan(index: u32, name: &str, vni: u32, port: u16) -> Link {
    link(index, name, 1450, Kind::Vxlan(Vxlan { vni, port, ..Vxlan::default() }))
}

#[test]
fn interfaces_that_cannot_serve() {
    let down = Link { up: false, ..link(901, "ext0", 1500, Kind::Other) };
    let vlan = link(902, "und0", 1500, Kind::Vlan { parent: 1, id: 7 });
    let whats: Vec<String> =
        interfaces(&config(), &host([down, vlan])).into_iter().map(|finding| finding.what).collect();
    assert!(
        whats.contains(&"is down".to_owned()) && whats.contains(&"is a VLAN device".to_owned()),
        "{whats:?}"
    );
    let none = interfaces(&config(), &host([link(1, "eno1", 1500, Kind::Other)]));
    assert!(
        none.iter().all(|finding| finding.level == Level::Fail && finding.advice.contains("eno1")),
        "{none:#?}"
    );
}

/// 50 bytes of VXLAN over IPv4: protocol facts, MTU table.
#[test]
fn the_tunnel_takes_fifty_bytes() {
    let with = |underlay| host([link(1, "ext0", 1500, Kind::Other), link(2, "und0", underlay, Kind::Other)]);
    assert_eq!(mtu(&config(), &with(1550)).unwrap().level, Level::Ok);
    let tight = mtu(&config(), &with(1500)).unwrap();
    assert_eq!(tight.level, Level::Warn);
    assert!(tight.what.contains("1450") && tight.advice.contains("1550"), "{tight:?}");
}

#[test]
fn the_local_address_is_looked_for() {
    let config = config();
    let overlay = &config.overlays[0];
    let links = [
        link(1, "ext0", 1500, Kind::Other),
        link(2, "und0", 1500, Kind::Other),
        link(3, "und0.7", 1500, Kind::Vlan { parent: 2, id: 7 }),
    ];
    let mut host = host(links);
    let level = |host: &Host| local_address(&config, host, overlay).level;
    assert_eq!(level(&host), Level::Fail);
    let local = Ipv4Addr::new(172, 16, 2, 200);
    host.addresses = [(local, 1)].into();
    assert_eq!(level(&host), Level::Warn, "on the external interface");
    host.addresses = [(local, 2)].into();
    assert_eq!(level(&host), Level::Warn, "untagged, but the role is VLAN 7's");
    host.addresses = [(local, 3)].into();
    assert_eq!(level(&host), Level::Ok);
}

#[test]
fn tunnels_of_others_are_seen() {
    let config = config();
    let levels = |host: &Host| -> Vec<Level> {
        other_tunnels(&config, host, &config.overlays[0]).into_iter().map(|finding| finding.level).collect()
    };
    assert_eq!(levels(&host([vxlan(1, "gw-flannel", 1, 8472), vxlan(2, "vxlan.calico", 1, 4789)])), []);
    assert_eq!(levels(&host([vxlan(1, "flannel.1", 1, 8472)])), [Level::Fail]);
    assert_eq!(levels(&host([vxlan(1, "flannel.2", 2, 8472)])), [Level::Warn]);
}

#[test]
fn sockets_of_programs_are_seen() {
    let config = config();
    let overlay = &config.overlays[0];
    // 8472 is 0x2118.
    let table = "   sl  local_address rem_address   st\n  321: 00000000:2118 00000000:0000 07\n";
    assert_eq!(foreign_socket(&host([]), overlay, table).unwrap().level, Level::Fail);
    assert_eq!(foreign_socket(&host([vxlan(1, "gw-flannel", 1, 8472)]), overlay, table), None);
    assert_eq!(foreign_socket(&host([]), overlay, &table.replace(":2118", ":2119")), None);
}

#[test]
fn offloads_that_spoil_frames() {
    assert_eq!(offloads("e", true, false, false), []);
    assert_eq!(offloads("e", true, false, true).len(), 1);
    assert_eq!(offloads("e", true, true, true).len(), 2);
}

/// The real driver of a device that every Linux has, and of one that does not exist.
#[test]
fn ethtool_answers() {
    let ethtool = Ethtool::open().unwrap();
    let (_, merges) = ethtool.offloads("lo").unwrap();
    assert!(!merges, "loopback has no LRO");
    assert!(ethtool.driver("no-such-device").is_err());
    assert!(ethtool.offloads("a-name-that-is-far-too-long").is_err());
}
