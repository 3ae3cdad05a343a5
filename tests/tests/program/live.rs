//! Redirects with live frames: the kernel's ordinary test run does not tell which interface was meant, so here the
//! frames really leave, and are seen at the other end.

use std::{
    os::fd::{AsRawFd as _, OwnedFd},
    time::{Duration, Instant},
};

use gateway_common::model::HostTables;
use nix::{
    errno::Errno,
    sys::{
        socket::{
            AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, recvfrom, setsockopt, socket,
            sockopt::ReceiveTimeout,
        },
        time::TimeVal,
    },
};

use crate::{
    case::FromNode,
    evidence,
    packet::{Ip, Link},
    rig::{self, CLIENT},
    subject::Subject,
    world::{CILIUM, DIRECT_TAGGED, PLAIN, TAGGED, World, pod},
};

const PATIENCE: Duration = Duration::from_secs(5);

#[test]
fn redirected_frames_leave_by_the_interface_that_was_meant() {
    rig::inside(|ports| {
        let world = World::new(ports);
        let subject = Subject::load(&world.tables);
        // A veth end takes redirected frames only if its peer polls, as with a program that passes everything.
        let mut passer = Subject::load(&HostTables::default());
        let others = [ports.second, ports.vlan, ports.foreign, ports.inside, ports.tunnel, ports.still];
        for port in others {
            passer.attach(port.peer);
        }
        let tap = tap();

        let back = |to| Ip::udp(pod(PLAIN), to, (80, 4000), b"answer");
        let from_node = |to| FromNode::new(&world, PLAIN, &back(to)).bytes();
        let out = |client, id| world.client_link().ip(&Ip::udp(client, pod(id), (4000, 80), b"question"));
        let vlan_link = Link::new(rig::CLIENT_IN_VLAN_MAC, ports.vlan.mac);
        let frames: [(&str, Vec<u8>, Matcher<'_>); 6] = [
            ("encap", out([10, 0, 1, 77], CILIUM), Box::new(|frame| tunnelled_by(&world, CILIUM, frame))),
            ("encap-tagged", out(CLIENT, TAGGED), Box::new(|frame| tunnelled_by(&world, TAGGED, frame))),
            ("direct-tagged", out(CLIENT, DIRECT_TAGGED), {
                let packet = Ip::udp(CLIENT, pod(DIRECT_TAGGED), (4000, 80), b"question");
                let untagged = Link { vlan: None, ..world.nodes[&DIRECT_TAGGED].link };
                equals(untagged.ip(&packet.hop()))
            }),
            ("decap", from_node(CLIENT), equals(world.to_client().ip(&back(CLIENT).hop()))),
            (
                "decap-router",
                from_node(rig::FAR_AWAY),
                equals(world.to_client().ip(&back(rig::FAR_AWAY).hop())),
            ),
            // Out of the parent of the VLAN device that the FIB names.
            (
                "decap-vlan",
                from_node(rig::CLIENT_IN_VLAN),
                equals(vlan_link.ip(&back(rig::CLIENT_IN_VLAN).hop())),
            ),
        ];
        for (name, input, expected) in frames {
            subject.run_live(&input);
            let (arrived, frame) = wait_for(&tap, &expected).unwrap_or_else(|seen| {
                panic!("live-{name}: {} other frames, see {}", seen.len(), keep(name, &seen))
            });
            assert_eq!(arrived, ports.second.peer, "live-{name}: {}", keep(name, &[frame]));
        }
    });
}

type Matcher<'a> = Box<dyn Fn(&[u8]) -> bool + 'a>;

fn equals<'a>(expected: Vec<u8>) -> Matcher<'a> {
    Box::new(move |frame| frame == expected)
}

/// Whether a frame, whose tag the kernel took off, goes from our VTEP to the endpoint of node `id`.
fn tunnelled_by(world: &World, id: u32, frame: &[u8]) -> bool {
    let endpoint = world.nodes[&id].endpoint;
    frame.get(26..34).is_some_and(|addresses| addresses == [rig::UNDERLAY, endpoint].concat())
}

fn keep(name: &str, frames: &[Vec<u8>]) -> String {
    let frames: Vec<&[u8]> = frames.iter().map(Vec::as_slice).collect();
    evidence::keep(&format!("live-{name}"), &frames)
}

/// A socket that sees every frame of every interface in the namespace.
fn tap() -> OwnedFd {
    let tap =
        socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll).unwrap();
    setsockopt(&tap, ReceiveTimeout, &TimeVal::new(0, 100_000)).unwrap();
    tap
}

/// The first frame that matches, with the index of the interface where it was seen; or all others. The kernel's own
/// neighbour discovery is among them.
fn wait_for(tap: &OwnedFd, expected: &Matcher<'_>) -> Result<(u32, Vec<u8>), Vec<Vec<u8>>> {
    let end = Instant::now() + PATIENCE;
    let mut others = Vec::new();
    let mut buffer = [0; 2048];
    while Instant::now() < end {
        match recvfrom::<LinkAddr>(tap.as_raw_fd(), &mut buffer) {
            Ok((length, Some(address))) if expected(&buffer[..length]) => {
                return Ok((u32::try_from(address.ifindex()).unwrap(), buffer[..length].to_vec()));
            }
            Ok((length, _)) => others.push(buffer[..length].to_vec()),
            Err(Errno::EAGAIN) => {}
            Err(errno) => panic!("packet socket: {errno}"),
        }
    }
    Err(others)
}
