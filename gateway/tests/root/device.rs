//! The kernel's tunnel device, looked at with iproute2.

use std::{net::Ipv4Addr, path::Path};

use gateway::{
    config::Overlay,
    kernel::{
        device::{self, Device, Goal, Way},
        host::Host,
        netlink,
    },
};
use gateway_common::wire::{Mac, Vni};

use crate::sandbox::{isolated, overlay, sh};

async fn apply(goal: &Goal) -> Vec<String> {
    let handle = netlink::connect().unwrap();
    let host = Host::read(&handle).await.unwrap();
    Device::new(handle, "test", &overlay()).apply(goal, &host, 1500).await
}

fn goal(octets: &[u8]) -> Goal {
    let mut goal = Goal::default();
    for octet in octets {
        let network = Ipv4Addr::new(10, 244, *octet, 0);
        let mac = Mac::new([2, 0, 0, 0, 0, *octet]);
        goal.neighbours.insert(network, mac);
        goal.forwarding.insert(mac, Ipv4Addr::new(172, 16, 2, *octet));
        goal.routes.insert(format!("{network}/24").parse().unwrap(), Way::Tunnel);
    }
    goal
}

fn lines(text: &str) -> Vec<String> {
    let mut lines: Vec<String> =
        text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    lines.sort();
    lines
}

fn und() {
    sh("ip link add und type veth peer name far; ip addr add 172.16.2.200/24 dev und
        ip link set und up; ip link set far up");
}

#[test]
fn the_device_is_what_flannel_makes() {
    isolated(async |_: &Path| {
        und();
        assert_eq!(apply(&goal(&[1, 2])).await, Vec::<String>::new());
        let link = sh("ip -d link show gw-flannel");
        for word in [
            "mtu 1450",
            "0e:11:22:33:44:55",
            "vxlan id 1 local 172.16.2.200",
            "dstport 8472",
            "nolearning",
            "UP",
        ] {
            assert!(link.contains(word), "{word} in: {link}");
        }
        assert!(sh("ip -4 addr show gw-flannel").contains("inet 10.244.30.0/32"));
        let routes = || lines(&sh("ip route show dev gw-flannel"));
        let neighbours = || lines(&sh("ip neigh show dev gw-flannel"));
        let forwarding = || lines(&sh("bridge fdb show dev gw-flannel"));
        assert_eq!(
            routes(),
            [
                "10.244.1.0/24 via 10.244.1.0 proto 103 src 10.244.30.0 onlink",
                "10.244.2.0/24 via 10.244.2.0 proto 103 src 10.244.30.0 onlink",
            ]
        );
        assert_eq!(
            neighbours(),
            [
                "10.244.1.0 lladdr 02:00:00:00:00:01 PERMANENT proto 103",
                "10.244.2.0 lladdr 02:00:00:00:00:02 PERMANENT proto 103",
            ]
        );
        assert_eq!(
            forwarding(),
            [
                "02:00:00:00:00:01 dst 172.16.2.1 self permanent",
                "02:00:00:00:00:02 dst 172.16.2.2 self permanent",
            ]
        );

        // Somebody's own route stays, what was taken away comes back, a node goes, a MAC address moves.
        sh("ip route add 198.51.100.0/24 via 172.16.2.77; ip route del 10.244.2.0/24
            bridge fdb del 02:00:00:00:00:02 dev gw-flannel; ip link set gw-flannel mtu 1300");
        let mut next = goal(&[2]);
        let moved = Mac::new([2, 0, 0, 0, 0, 0x22]);
        next.neighbours.insert(Ipv4Addr::new(10, 244, 2, 0), moved);
        next.forwarding = [(moved, Ipv4Addr::new(172, 16, 2, 22))].into();
        assert_eq!(apply(&next).await, Vec::<String>::new());
        assert_eq!(routes(), ["10.244.2.0/24 via 10.244.2.0 proto 103 src 10.244.30.0 onlink"]);
        assert_eq!(neighbours(), ["10.244.2.0 lladdr 02:00:00:00:00:22 PERMANENT proto 103"]);
        assert_eq!(forwarding(), ["02:00:00:00:00:22 dst 172.16.2.22 self permanent"]);
        assert!(sh("ip link show gw-flannel").contains("mtu 1450"));
        assert!(sh("ip route show 198.51.100.0/24").contains("172.16.2.77"));

        // A node that is on-link and direct needs no tunnel.
        let ifindex = Host::read(&netlink::connect().unwrap()).await.unwrap().by_name("und").unwrap().index;
        let mut direct = Goal::default();
        let gateway = Ipv4Addr::new(172, 16, 2, 22);
        direct.routes.insert("10.244.2.0/24".parse().unwrap(), Way::Direct { gateway, ifindex });
        assert_eq!(apply(&direct).await, Vec::<String>::new());
        assert_eq!(
            lines(&sh("ip route show 10.244.2.0/24")),
            ["10.244.2.0/24 via 172.16.2.22 dev und proto 103 src 10.244.30.0"]
        );
        assert_eq!((neighbours().len(), forwarding().len()), (0, 0));

        let removed = Device::new(netlink::connect().unwrap(), "test", &overlay()).remove().await.unwrap();
        assert!(removed);
        assert_eq!(sh("ip route show proto 103"), "");
        assert_eq!(sh("ip link show type vxlan"), "");
        assert!(sh("ip route show 198.51.100.0/24").contains("172.16.2.77"));
    });
}

#[test]
fn outdated_settings_make_a_new_device() {
    isolated(async |_: &Path| {
        und();
        // Of a version that noted nothing.
        sh("ip link add gw-flannel type vxlan id 1 dstport 8472 local 172.16.2.200 nolearning");
        assert_eq!(apply(&goal(&[1])).await, Vec::<String>::new());
        assert!(sh("ip link show gw-flannel").contains("alias gateway instance test"));

        let handle = netlink::connect().unwrap();
        let host = Host::read(&handle).await.unwrap();
        let other = Overlay { vni: Vni::new(9).unwrap(), ..overlay() };
        let device = Device::new(handle, "test", &other);
        assert_eq!(device.apply(&goal(&[1]), &host, 1500).await, Vec::<String>::new());
        let shown = sh("ip -d link show gw-flannel");
        assert!(shown.contains("vxlan id 9 ") && shown.contains("alias gateway instance test"), "{shown}");
        assert!(device.remove().await.unwrap());
    });
}

/// A device of our name that is another instance's, or an administrator's.
#[test]
fn a_device_of_somebody_else_is_left_alone() {
    const BY_HAND: &str = "ip link add gw-flannel type vxlan id 9 dstport 4789 local 172.16.2.200";
    isolated(async |_: &Path| {
        und();
        let handle = || netlink::connect().unwrap();
        let host = Host::read(&handle()).await.unwrap();
        let theirs = Device::new(handle(), "other", &Overlay { vni: Vni::new(9).unwrap(), ..overlay() });
        for by_hand in [false, true] {
            if by_hand {
                sh(BY_HAND);
            } else {
                assert_eq!(theirs.apply(&Goal::default(), &host, 1500).await, Vec::<String>::new());
            }
            let before = sh("ip -d link show gw-flannel");
            let problems = apply(&goal(&[1])).await;
            assert!(problems.len() == 1 && problems[0].contains("is not of this gateway"), "{problems:?}");
            assert_eq!(problems[0].contains("(gateway instance other)"), !by_hand, "{problems:?}");
            assert!(!Device::new(handle(), "test", &overlay()).remove().await.unwrap());
            assert!(!device::remove(&handle(), "test", "gw-flannel").await.unwrap());
            assert_eq!(sh("ip -d link show gw-flannel"), before);
            sh("ip link delete gw-flannel");
        }
    });
}

#[test]
fn a_rival_is_named_and_left_alone() {
    isolated(async |_: &Path| {
        und();
        sh("ip link add flannel.1 type vxlan id 1 dstport 8472 local 172.16.2.200 nolearning");
        let problems = apply(&goal(&[1])).await;
        assert_eq!(problems.len(), 1);
        assert!(problems[0].contains("device flannel.1 already uses VNI 1 on UDP port 8472"), "{problems:?}");
        assert!(sh("ip link show flannel.1").contains("flannel.1"));

        sh("ip link del flannel.1; ip link add gw-flannel type bridge");
        let problems = apply(&goal(&[1])).await;
        assert!(problems[0].contains("is not of this gateway"), "{problems:?}");
    });
}
