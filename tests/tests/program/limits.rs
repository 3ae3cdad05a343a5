//! Frames at the edges: cut at every byte, larger than a page; and the two slots of a VTEP.

use std::collections::BTreeMap;

use gateway_common::abi::{Class, Outcome, Vtep};

use crate::{
    case::{Case, FromNode, check_all},
    packet::{Ip, Link},
    rig::{self, CLIENT},
    subject::{Returned, Subject},
    world::{PLAIN, TAGGED, VLAN_BOTH, World, pod},
};

/// Whole frames of 128 bytes: everything shorter contradicts its own length fields.
fn whole_frames(world: &World) -> Vec<(&'static str, Vec<u8>)> {
    let client = |length| Ip::udp(CLIENT, pod(PLAIN), (1, 2), &vec![0x11; length]);
    let node =
        |length| FromNode::new(world, PLAIN, &Ip::udp(pod(PLAIN), CLIENT, (1, 2), &vec![0x11; length]));
    let tagged = |from: FromNode| from.with(|p| p.link = p.link.tagged(VLAN_BOTH)).bytes();
    vec![
        ("client", world.client_link().ip(&client(86))),
        ("client-tagged", world.client_link().tagged(VLAN_BOTH).ip(&client(82))),
        ("node", node(36).bytes()),
        ("node-tagged", tagged(node(32))),
    ]
}

/// RFC 791: a datagram that ends before its total length says is no datagram.
#[test]
fn truncated_frames_are_never_forwarded() {
    rig::inside(|ports| {
        let world = World::new(ports);
        let subject = Subject::load(&world.tables);
        for (name, frame) in whole_frames(&world) {
            assert_eq!(frame.len(), 128, "{name}");
            for length in 14..=frame.len() {
                let cut = &frame[..length];
                let before = subject.counters();
                let (returned, output) = subject.run(cut);
                let counted = (&subject.counters() - &before).0;
                let (number, once) = counted.first_key_value().expect("nothing was counted");
                let class = Outcome::by_number(*number).expect("an outcome has a row").class;
                let place = format!("{name}, {length} of {} bytes, outcome {number}", frame.len());
                assert_eq!((counted.len(), *once), (1, (1, length as u64)), "{place}");
                if length == frame.len() {
                    assert_eq!(class, Class::Forward, "{place}");
                } else {
                    let expected = if class == Class::Drop { Returned::Drop } else { Returned::Pass };
                    assert_eq!(returned, expected, "{place}");
                    assert_ne!(class, Class::Forward, "{place}");
                    assert_eq!(output, cut, "{place}: edited");
                }
            }
        }
    });
}

/// The inner packet cut at every byte while the outer lengths stay true.
#[test]
fn truncated_inner_packets_are_dropped() {
    rig::inside(|ports| {
        let world = World::new(ports);
        let subject = Subject::load(&world.tables);
        let from = FromNode::new(&world, PLAIN, &Ip::udp(pod(PLAIN), CLIENT, (1, 2), &[0x11; 36]));
        let cases: Vec<Case> = (0..from.inner.len())
            .map(|length| {
                // Without an IP header it is truncated, with one it contradicts its total length.
                let outcome = if length < 20 { Outcome::InnerTruncated } else { Outcome::InnerMalformed };
                Case::drop(
                    format!("inner-cut-{length}"),
                    outcome,
                    from.with(|p| p.inner.truncate(length)).bytes(),
                )
            })
            .collect();
        check_all(&subject, &cases);
    });
}

/// The kernel hands such frames to the program in fragments; the headers are in the first.
#[test]
fn frames_larger_than_a_page() {
    rig::inside(|ports| {
        let world = World::new(ports);
        let subject = Subject::load(&world.tables);
        let same = |packet: &Ip| Link::new(rig::CLIENT_SAME_PORT_MAC, ports.own.mac).ip(&packet.hop());
        let mut cases = Vec::new();
        for length in [3000, 3500, 4096, 6000, 8900] {
            let data: Vec<u8> = (0..length).map(|i: u32| (i % 251) as u8).collect();
            let out = Ip::udp(CLIENT, pod(TAGGED), (1, 2), &data);
            let back = Ip::udp(pod(PLAIN), rig::CLIENT_SAME_PORT, (2, 1), &data);
            cases.extend([
                Case::encap(format!("jumbo-encap-{length}"), &world, TAGGED, world.client_link(), &out),
                Case::transmit(
                    format!("jumbo-decap-{length}"),
                    Outcome::Decap,
                    FromNode::new(&world, PLAIN, &back).bytes(),
                    same(&back),
                ),
                Case::pass(
                    format!("jumbo-oversize-{length}"),
                    Outcome::Oversize,
                    world.client_link().ip(&Ip { destination: pod(PLAIN), ..out }),
                ),
            ]);
        }
        check_all(&subject, &cases);
    });
}

/// The daemon writes the slot that is not active, then flips: the program uses the active one alone.
#[test]
fn only_the_active_slot_counts() {
    rig::inside(|ports| {
        let world = World::new(ports);
        let mut subject = Subject::load(&world.tables);
        let old = world.nodes[&PLAIN].clone();
        let mut new = world.nodes[&TAGGED].clone();
        new.endpoint = [172, 16, 2, 111];
        let packet = Ip::udp(CLIENT, pod(PLAIN), (1, 2), b"data");
        let slots = [old.slot(world.config()), new.slot(world.config())];
        for (step, active) in [0, 1, 0, 1].into_iter().enumerate() {
            subject.set_vtep(PLAIN, Vtep { active, generation: 1, slots });
            let mut after = world.clone();
            after.nodes = BTreeMap::from([(PLAIN, [&old, &new][active as usize].clone())]);
            let name = format!("slot-{active}-step-{step}");
            check_all(&subject, [&Case::encap(name, &after, PLAIN, world.client_link(), &packet)]);
        }
    });
}
