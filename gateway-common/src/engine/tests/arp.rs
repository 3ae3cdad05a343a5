//! ARP outside and in the tunnel.

use rstest::rstest;

use super::{encapsulation::fix, fixture::*};
use crate::{
    abi::{Outcome, Overlay, Roles},
    engine::Action,
    wire::{Ipv4, Mac, Vni},
};

const GATEWAY_ADDRESS: [u8; 4] = OVERLAY_ADDRESS;

fn packet(operation: u8, sha: [u8; 6], spa: [u8; 4], tha: [u8; 6], tpa: [u8; 4]) -> Vec<u8> {
    let mut bytes = vec![0, 1, 8, 0, 6, 4, 0, operation];
    bytes.extend(sha);
    bytes.extend(spa);
    bytes.extend(tha);
    bytes.extend(tpa);
    bytes
}

fn request(target: [u8; 4]) -> Vec<u8> {
    ethernet([0xff; 6], CLIENT_NIC, 0x0806, &packet(1, CLIENT_NIC, CLIENT, [0; 6], target))
}

#[rstest]
#[case::pod(POD)]
#[case::address_in_a_pod_prefix(UNLISTED_POD)]
fn answered(#[case] target: [u8; 4]) {
    let (outcome, action, after) = run(&gateway(), &request(target));
    assert_eq!((outcome, action), (Outcome::ArpReply, Action::Transmit));
    // RFC 826: the reply swaps the fields and fills in the address that was asked for.
    assert_eq!(after, ethernet(CLIENT_NIC, NIC, 0x0806, &packet(2, NIC, target, CLIENT_NIC, CLIENT)));
}

/// A cache refresh asks by unicast.
#[test]
fn unicast_request() {
    let mut frame = request(POD);
    frame[..6].copy_from_slice(&NIC);
    assert_eq!(outcome(&gateway(), &frame), Outcome::ArpReply);
}

/// RFC 5227: a probe has no sender address, and must learn that the address is taken.
#[test]
fn probe() {
    let frame = ethernet([0xff; 6], CLIENT_NIC, 0x0806, &packet(1, CLIENT_NIC, [0; 4], [0; 6], POD));
    let (outcome, _, after) = run(&gateway(), &frame);
    assert_eq!(outcome, Outcome::ArpReply);
    assert_eq!(after, ethernet(CLIENT_NIC, NIC, 0x0806, &packet(2, NIC, POD, CLIENT_NIC, [0; 4])));
}

#[rstest]
#[case::client_of_our_subnet([10, 244, 30, 99])]
#[case::kernel_local(LOCAL)]
#[case::our_overlay_address(GATEWAY_ADDRESS)]
#[case::no_table([192, 0, 2, 1])]
fn left_alone(#[case] target: [u8; 4]) {
    assert_eq!(outcome(&gateway(), &request(target)), Outcome::ArpOther);
}

/// A kernel-local address is the kernel's even inside somebody's pod prefix.
#[test]
fn kernel_local_in_a_pod_prefix() {
    let mut tables = gateway();
    let local = crate::abi::LocalAddress { kind: crate::abi::LocalAddress::KERNEL, ifindex: 1 };
    tables.addresses.insert(Ipv4::new(UNLISTED_POD), local);
    assert_eq!(outcome(&tables, &request(UNLISTED_POD)), Outcome::ArpOther);
}

/// So is a prefix that the kernel takes for itself.
#[test]
fn local_prefix_in_a_pod_prefix() {
    let mut tables = gateway();
    set_local_prefix(&mut tables, [10, 244, 1, 192], 26);
    assert_eq!(outcome(&tables, &request(UNLISTED_POD)), Outcome::ArpOther);
    assert_eq!(outcome(&tables, &request([10, 244, 1, 191])), Outcome::ArpReply);
}

/// A route into our own subnet, from a Node that claims it, must not take over our clients.
#[test]
fn a_prefix_over_our_subnet() {
    let mut tables = gateway();
    tables.prefixes.insert((0, 16, Ipv4::new([10, 244, 0, 0])), crate::abi::Route::to(NODE_ID));
    assert_eq!(outcome(&tables, &request(CLIENT)), Outcome::ArpOther);
    assert_eq!(outcome(&tables, &request([10, 244, 77, 1])), Outcome::ArpReply);
}

#[rstest]
#[case::announcement(1, POD, POD)]
#[case::reply(2, CLIENT, POD)]
#[case::reverse_arp(3, CLIENT, POD)]
fn not_questions(#[case] operation: u8, #[case] sender: [u8; 4], #[case] target: [u8; 4]) {
    let body = packet(operation, CLIENT_NIC, sender, [0; 6], target);
    assert_eq!(outcome(&gateway(), &ethernet([0xff; 6], CLIENT_NIC, 0x0806, &body)), Outcome::ArpOther);
}

#[rstest]
#[case::hardware_type(1, 6)]
#[case::protocol_type(3, 6)]
#[case::hardware_length(4, 8)]
#[case::protocol_length(5, 16)]
fn malformed_fields(#[case] offset: usize, #[case] value: u8) {
    let mut frame = request(POD);
    frame[14 + offset] = value;
    assert_eq!(outcome(&gateway(), &frame), Outcome::ArpMalformed);
}

#[rstest]
#[case::zero([0; 6])]
#[case::broadcast([0xff; 6])]
#[case::multicast([1, 0, 0x5e, 0, 0, 1])]
fn impossible_senders(#[case] sha: [u8; 6]) {
    let frame = ethernet([0xff; 6], CLIENT_NIC, 0x0806, &packet(1, sha, CLIENT, [0; 6], POD));
    assert_eq!(outcome(&gateway(), &frame), Outcome::ArpMalformed);
}

#[test]
fn cut_at_every_byte() {
    let frame = request(POD);
    for length in 14..frame.len() {
        assert_eq!(outcome(&gateway(), &frame[..length]), Outcome::ArpMalformed, "{length} bytes");
    }
}

#[test]
fn underlay_is_no_place_for_the_proxy() {
    let mut tables = gateway();
    tables.config.roles = Roles::UNDERLAY;
    assert_eq!(outcome(&tables, &request(POD)), Outcome::ArpOther);
}

#[test]
fn tagged_request_gets_a_tagged_answer() {
    let mut tables = gateway();
    tables.config.roles = Roles::NONE;
    tables.config.vlan_count = 1;
    tables.config.vlans[0] = crate::abi::VlanPort { vlan: 100, roles: Roles::EXTERNAL };
    let tag = [0x60, 100, 0x08, 0x06];
    let body = |arp: Vec<u8>| [&tag[..], &arp].concat();
    let asked = ethernet([0xff; 6], CLIENT_NIC, 0x8100, &body(packet(1, CLIENT_NIC, CLIENT, [0; 6], POD)));
    let (outcome, _, after) = run(&tables, &asked);
    assert_eq!(outcome, Outcome::ArpReply);
    assert_eq!(after, ethernet(CLIENT_NIC, NIC, 0x8100, &body(packet(2, NIC, POD, CLIENT_NIC, CLIENT))));
}

/// The ARP vectors of the protocol sheet: what a VTEP and a Cilium node say to one another, here with the roles
/// turned round: the node asks for our overlay address.
#[test]
fn in_the_tunnel() {
    const NODE_MAC: [u8; 6] = [0x82, 0x36, 0x4c, 0x98, 0x2e, 0x56];
    const OUR_MAC: [u8; 6] = [0xa6, 0x6e, 0xb5, 0x69, 0x2c, 0x08];
    let asking = [10, 1, 1, 0xec];
    let asked = [10, 0, 1, 1];
    let mut tables = gateway();
    let overlay: &mut Overlay = &mut tables.config.overlays[0];
    overlay.vni = Vni::new(2).unwrap();
    overlay.mac = Mac::new(OUR_MAC);
    overlay.subnet = Ipv4::new([10, 0, 1, 0]);
    let own = crate::abi::LocalAddress { kind: crate::abi::LocalAddress::OVERLAY, ifindex: 0 };
    tables.addresses.insert(Ipv4::new(asked), own);
    let mut entry = slot(NODE, 0, false);
    entry.header[46..49].copy_from_slice(&[0, 0, 2]);
    entry.header[56..62].copy_from_slice(&OUR_MAC);
    tables.vteps.insert(NODE_ID, vtep(entry));

    let vni = [8, 0, 0, 0, 0, 0, 2, 0];
    let question = ethernet([0xff; 6], NODE_MAC, 0x0806, &packet(1, NODE_MAC, asking, [0; 6], asked));
    let (outcome, action, after) = run(&tables, &tunnel(NODE, 0, vni, &question));
    assert_eq!((outcome, action), (Outcome::ArpReplyTunnel, Action::Transmit));
    let mut payload = vni.to_vec();
    payload.extend(ethernet(NODE_MAC, OUR_MAC, 0x0806, &packet(2, OUR_MAC, asked, NODE_MAC, asking)));
    let port = u16::from_be_bytes([after[34], after[35]]);
    let mut expected = ethernet(NODE_NIC, NIC, 0x0800, &udp(LOCAL, NODE, 64, 0, (port, PORT), &payload));
    // etherparse sets DF and computes the UDP checksum; the template sends neither.
    expected[20..22].fill(0);
    fix(&mut expected[14..]);
    expected[40..42].fill(0);
    assert_eq!(after, expected);
}

#[rstest]
#[case::somebody_elses_address(POD, Outcome::TunnelArp)]
#[case::client_of_ours(CLIENT, Outcome::TunnelArp)]
#[case::our_address(OVERLAY_ADDRESS, Outcome::ArpReplyTunnel)]
fn tunnel_targets(#[case] target: [u8; 4], #[case] expected: Outcome) {
    let question = ethernet([0xff; 6], NODE_VTEP, 0x0806, &packet(1, NODE_VTEP, POD, [0; 6], target));
    assert_eq!(outcome(&gateway(), &tunnel(NODE, 0, VNI_1, &question)), expected);
}

#[test]
fn tunnel_cut_at_every_byte() {
    let question =
        ethernet([0xff; 6], NODE_VTEP, 0x0806, &packet(1, NODE_VTEP, POD, [0; 6], OVERLAY_ADDRESS));
    for length in 14..question.len() {
        let result = outcome(&gateway(), &tunnel(NODE, 0, VNI_1, &question[..length]));
        assert_eq!(result, Outcome::InnerTruncated, "{length} inner bytes");
    }
}
