//! From pods: out of the tunnel, and plain from direct nodes.

use proptest::prelude::*;
use rstest::rstest;

use super::{encapsulation::fix, fixture::*};
use crate::{
    abi::{Egress, Outcome, OverlayFlags, Roles, VtepFlags},
    engine::{Action, Fib},
    model::{FibEntry, HostTables},
    wire::{Ipv4, Mac},
};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn the_client_gets_the_inner_packet_one_hop_older(
        ttl in 2u8..,
        dscp in 0u8..64,
        data in proptest::collection::vec(any::<u8>(), 0..1300),
    ) {
        let (outcome, action, after) = run(&gateway(), &pod_udp(0, ttl, dscp << 2, &data));
        prop_assert_eq!((outcome, action), (Outcome::Decap, Action::Redirect(OUTSIDE)));
        let expected = udp(POD, CLIENT, ttl - 1, dscp << 2, (80, 5555), &data);
        prop_assert_eq!(after, ethernet(CLIENT_NIC, NIC, 0x0800, &expected));
    }
}

/// RFC 6040 figure 4 as Linux implements it: rows inner, columns outer (Not-ECT, ECT(1), ECT(0), CE).
#[rstest]
#[case(0b00, [Some(0b00), Some(0b00), Some(0b00), None])]
#[case(0b10, [Some(0b10), Some(0b01), Some(0b10), Some(0b11)])]
#[case(0b01, [Some(0b01), Some(0b01), Some(0b01), Some(0b11)])]
#[case(0b11, [Some(0b11), Some(0b11), Some(0b11), Some(0b11)])]
fn ecn(#[case] inner: u8, #[case] row: [Option<u8>; 4]) {
    for (outer, expected) in (0u8..).zip(row) {
        let (outcome, _, after) = run(&gateway(), &pod_udp(outer, 64, 0b1010_0000 | inner, b"x"));
        match expected {
            None => assert_eq!(outcome, Outcome::EcnIllegal),
            Some(ecn) => {
                assert_eq!(outcome, Outcome::Decap);
                let expected = udp(POD, CLIENT, 63, 0b1010_0000 | ecn, (80, 5555), b"x");
                assert_eq!(after[14..], expected[..], "inner {inner:02b} outer {outer:02b}");
            }
        }
    }
}

/// One bit of the tunnel headers is flipped. Only these may be anything: outer MAC source, DSCP and ECN bits that the
/// table allows, identification, reserved flag, DF, TTL, the header checksum (which the kernel's drivers check or a
/// router before us), UDP source port and checksum, inner MAC source.
#[test]
fn every_single_bit() {
    let tables = gateway();
    let frame = pod_udp(0, 64, 0, b"payload");
    for bit in 0..64 * 8 {
        let mut flipped = frame.clone();
        flipped[bit / 8] ^= 0x80 >> (bit % 8);
        let accepted = outcome(&tables, &flipped) == Outcome::Decap;
        let free = match bit / 8 {
            6..=11 | 18..=19 | 22 | 24..=25 | 34..=35 | 40..=41 | 57..=61 => true,
            15 => bit % 8 < 6 || flipped[15] & 3 != 3,
            20 => bit % 8 <= 1,
            // The group bit makes it no station.
            56 => bit % 8 != 7,
            _ => false,
        };
        assert_eq!(accepted, free, "bit {} of byte {}", bit % 8, bit / 8);
    }
}

#[test]
fn cut_at_every_byte() {
    let tables = gateway();
    let frame = pod_udp(0, 64, 0, b"payload");
    for length in 14..frame.len() {
        let result = outcome(&tables, &frame[..length]);
        let expected = if length < 34 { Outcome::Ipv4Malformed } else { Outcome::OuterMalformed };
        assert_eq!(result, expected, "{length} bytes");
    }
}

/// The same, but with outer lengths that agree with the cut: only the inner headers contradict.
#[test]
fn inner_cut_at_every_byte() {
    let tables = gateway();
    let inner = ethernet(VTEP, NODE_VTEP, 0x0800, &udp(POD, CLIENT, 64, 0, (80, 5555), b"payload"));
    for length in 0..inner.len() {
        let result = outcome(&tables, &tunnel(NODE, 0, VNI_1, &inner[..length]));
        let expected = match length {
            0..14 => Outcome::OuterUdpLength,
            14..34 => Outcome::InnerTruncated,
            _ => Outcome::InnerMalformed,
        };
        assert_eq!(result, expected, "{length} inner bytes");
    }
}

#[rstest]
#[case::no_i_bit([0, 0, 0, 0, 0, 0, 1, 0], Outcome::VxlanFlags)]
#[case::reserved_flag([0x0a, 0, 0, 0, 0, 0, 1, 0], Outcome::VxlanFlags)]
#[case::gbp_not_allowed([0x88, 0, 0, 7, 0, 0, 1, 0], Outcome::VxlanFlags)]
#[case::gpe([0x0c, 0, 0, 3, 0, 0, 1, 0], Outcome::VxlanFlags)]
#[case::reserved_1([8, 1, 0, 0, 0, 0, 1, 0], Outcome::VxlanReserved)]
#[case::reserved_3([8, 0, 0, 1, 0, 0, 1, 0], Outcome::VxlanReserved)]
#[case::reserved_7([8, 0, 0, 0, 0, 0, 1, 1], Outcome::VxlanReserved)]
#[case::other_vni([8, 0, 0, 0, 0, 0, 2, 0], Outcome::VniUnknown)]
#[case::vni_zero([8, 0, 0, 0, 0, 0, 0, 0], Outcome::VniUnknown)]
fn vxlan_header(#[case] header: [u8; 8], #[case] expected: Outcome) {
    let inner = ethernet(VTEP, NODE_VTEP, 0x0800, &udp(POD, CLIENT, 64, 0, (80, 5555), b""));
    assert_eq!(outcome(&gateway(), &tunnel(NODE, 0, header, &inner)), expected);
}

#[rstest]
#[case::policy([0x88, 0, 0x12, 0x34, 0, 0, 1, 0], Outcome::Decap)]
#[case::policy_applied([0x88, 0x08, 0x12, 0x34, 0, 0, 1, 0], Outcome::Decap)]
#[case::other_flag_too([0x8c, 0, 0, 1, 0, 0, 1, 0], Outcome::VxlanFlags)]
#[case::unassigned_bit([0x88, 1, 0, 1, 0, 0, 1, 0], Outcome::VxlanReserved)]
#[case::policy_without_g([8, 0, 0, 1, 0, 0, 1, 0], Outcome::VxlanReserved)]
fn gbp_tolerated(#[case] header: [u8; 8], #[case] expected: Outcome) {
    let mut tables = gateway();
    tables.config.overlays[0].flags = OverlayFlags::SOURCE_CHECK.with(OverlayFlags::ALLOW_GBP);
    let inner = ethernet(VTEP, NODE_VTEP, 0x0800, &udp(POD, CLIENT, 64, 0, (80, 5555), b""));
    assert_eq!(outcome(&tables, &tunnel(NODE, 0, header, &inner)), expected);
}

#[test]
fn vni_zero_is_a_vni() {
    let mut tables = gateway();
    tables.config.overlays[0].vni = crate::wire::Vni::new(0).unwrap();
    let inner = ethernet(VTEP, NODE_VTEP, 0x0800, &udp(POD, CLIENT, 64, 0, (80, 5555), b""));
    let frame = tunnel(NODE, 0, [8, 0, 0, 0, 0, 0, 0, 0], &inner);
    assert_eq!(outcome(&tables, &frame), Outcome::Decap);
}

#[rstest]
#[case::not_our_mac([2, 2, 2, 2, 2, 2], NODE_VTEP, 0x0800, Outcome::InnerDestinationMac)]
#[case::multicast([1, 0, 0x5e, 0, 0, 1], NODE_VTEP, 0x0800, Outcome::InnerDestinationMac)]
#[case::broadcast_ip([0xff; 6], NODE_VTEP, 0x0800, Outcome::InnerBroadcast)]
#[case::our_own_source(VTEP, VTEP, 0x0800, Outcome::InnerLoop)]
#[case::zero_source(VTEP, [0; 6], 0x0800, Outcome::InnerSourceMac)]
#[case::group_source(VTEP, [1, 2, 3, 4, 5, 6], 0x0800, Outcome::InnerSourceMac)]
#[case::vlan(VTEP, NODE_VTEP, 0x8100, Outcome::InnerVlan)]
#[case::service_vlan(VTEP, NODE_VTEP, 0x88a8, Outcome::InnerVlan)]
#[case::ipv6(VTEP, NODE_VTEP, 0x86dd, Outcome::InnerIpv6)]
#[case::lldp(VTEP, NODE_VTEP, 0x88cc, Outcome::InnerEtherType)]
fn inner_ethernet(
    #[case] destination: [u8; 6],
    #[case] source: [u8; 6],
    #[case] kind: u16,
    #[case] expected: Outcome,
) {
    let inner = ethernet(destination, source, kind, &udp(POD, CLIENT, 64, 0, (80, 5555), b""));
    assert_eq!(outcome(&gateway(), &tunnel(NODE, 0, VNI_1, &inner)), expected);
}

#[rstest]
#[case::unknown_node([172, 16, 2, 99], POD, Outcome::OuterSource)]
#[case::own_pod(NODE, POD, Outcome::Decap)]
#[case::own_prefix(NODE, UNLISTED_POD, Outcome::Decap)]
#[case::pod_of_another_node(NODE, OTHER_POD, Outcome::InnerSource)]
#[case::client_spoofed(NODE, CLIENT, Outcome::InnerSource)]
#[case::outside_spoofed(NODE, [198, 51, 100, 7], Outcome::InnerSource)]
#[case::node_address(NODE, NODE, Outcome::InnerSource)]
fn sources(#[case] node: [u8; 4], #[case] pod: [u8; 4], #[case] expected: Outcome) {
    let inner = ethernet(VTEP, NODE_VTEP, 0x0800, &udp(pod, CLIENT, 64, 0, (80, 5555), b""));
    assert_eq!(outcome(&gateway(), &tunnel(node, 0, VNI_1, &inner)), expected);
}

#[test]
fn source_check_off() {
    let mut tables = gateway();
    tables.config.overlays[0].flags = OverlayFlags::NONE;
    tables.sources.clear();
    let inner = ethernet(VTEP, NODE_VTEP, 0x0800, &udp([198, 51, 100, 7], CLIENT, 64, 0, (80, 5555), b""));
    assert_eq!(outcome(&tables, &tunnel([172, 16, 2, 99], 0, VNI_1, &inner)), Outcome::Decap);
}

#[rstest]
#[case::first([0x20, 0], Outcome::OuterFragment)]
// A later fragment carries no port; the kernel cannot complete the datagram, because the first one is dropped.
#[case::later([0x20, 1], Outcome::NoRoute)]
#[case::dont_fragment([0x40, 0], Outcome::Decap)]
fn outer_fragments(#[case] fragment: [u8; 2], #[case] expected: Outcome) {
    let mut frame = pod_udp(0, 64, 0, b"");
    frame[20..22].copy_from_slice(&fragment);
    fix(&mut frame[14..]);
    assert_eq!(outcome(&gateway(), &frame), expected);
}

#[test]
fn outer_options_are_skipped() {
    let frame = pod_udp(0, 64, 0, b"data");
    let mut ip = etherparse::Ipv4HeaderSlice::from_slice(&frame[14..]).unwrap().to_header();
    let payload = &frame[34..];
    ip.options = [1u8; 40].into();
    ip.set_payload_len(payload.len()).unwrap();
    ip.header_checksum = ip.calc_header_checksum();
    let mut longer = frame[..14].to_vec();
    longer.extend(ip.to_bytes());
    longer.extend(payload);
    let (outcome, _, after) = run(&gateway(), &longer);
    assert_eq!(outcome, Outcome::Decap);
    assert_eq!(after, run(&gateway(), &frame).2);
}

#[test]
fn a_trailer_behind_the_datagram_is_tolerated() {
    let mut frame = pod_udp(0, 64, 0, b"data");
    frame.extend([0; 6]);
    assert_eq!(outcome(&gateway(), &frame), Outcome::Decap);
}

#[rstest]
#[case::longer(1)]
#[case::shorter(-1)]
fn outer_udp_length(#[case] by: i16) {
    let mut frame = pod_udp(0, 64, 0, b"data");
    let length = u16::from_be_bytes([frame[38], frame[39]]).wrapping_add_signed(by);
    frame[38..40].copy_from_slice(&length.to_be_bytes());
    assert_eq!(outcome(&gateway(), &frame), Outcome::OuterUdpLength);
}

#[rstest]
#[case(Fib::NotForwarded, Outcome::OutLocal)]
#[case(Fib::NoNeighbour, Outcome::OutNoNeighbour)]
#[case(Fib::Refused, Outcome::OutRefused)]
#[case(Fib::TooBig, Outcome::OutOversize)]
#[case(Fib::Forward { ifindex: 55, source: Mac::ZERO, next_hop: Mac::ZERO, mtu: 1500 }, Outcome::OutOtherInterface)]
#[case(Fib::Forward { ifindex: 66, source: Mac::ZERO, next_hop: Mac::ZERO, mtu: 1500 }, Outcome::TunnelToTunnel)]
#[case(Fib::Forward { ifindex: 77, source: Mac::ZERO, next_hop: Mac::ZERO, mtu: 1500 }, Outcome::OutOtherInterface)]
fn what_the_fib_says(#[case] answer: Fib, #[case] expected: Outcome) {
    let mut tables = gateway();
    tables.fib.insert(Ipv4::new(CLIENT), FibEntry { answer, mtu: 1500 });
    tables.egress.insert(66, Egress { ifindex: 66, vlan: 0, kind: Egress::TUNNEL });
    tables.egress.insert(77, Egress { ifindex: 77, vlan: 0, kind: 0 });
    assert_eq!(outcome(&tables, &pod_udp(0, 64, 0, b"")), expected);
}

/// The FIB's answer serves that flow for the rest of the tick, and nobody else.
#[test]
fn the_way_out_is_remembered() {
    let mut tables = gateway();
    let other = Mac::new([2, 0, 0, 0, 9, 9]);
    let next_hop = |tables: &HostTables, frame: &[u8]| {
        let (outcome, _, after) = run(tables, frame);
        assert_eq!(outcome, Outcome::Decap);
        Mac::new(after[..6].try_into().unwrap())
    };
    let frame = pod_udp(0, 64, 0, b"data");
    assert_eq!(next_hop(&tables, &frame), Mac::new(CLIENT_NIC));
    let answer = Fib::Forward { ifindex: OUTSIDE, source: Mac::new(NIC), next_hop: other, mtu: 600 };
    tables.fib.insert(Ipv4::new(CLIENT), FibEntry { answer, mtu: 600 });
    assert_eq!(next_hop(&tables, &frame), Mac::new(CLIENT_NIC));
    assert_eq!(next_hop(&tables, &pod_udp(0, 64, 4, b"data")), other, "another type of service");
    assert_eq!(
        outcome(&tables, &pod_udp(0, 64, 4, &[0; 700])),
        Outcome::OutOversize,
        "larger than remembered"
    );
    assert_eq!(next_hop(&tables, &frame), other, "another flow took the place");

    tables.fib.clear();
    assert_eq!(outcome(&tables, &pod_udp(0, 1, 0, b"data")), Outcome::OutTtlExpired);
    tables.sessions.now.set(1);
    assert_eq!(outcome(&tables, &frame), Outcome::OutLocal, "the next tick");
}

/// A packet for the gateway itself may use up its TTL on the way here; one to be routed may not.
#[test]
fn ttl_counts_only_when_routed() {
    let mut tables = gateway();
    assert_eq!(outcome(&tables, &pod_udp(0, 1, 0, b"")), Outcome::OutTtlExpired);
    tables.fib.clear();
    tables.sessions.now.set(1);
    assert_eq!(outcome(&tables, &pod_udp(0, 1, 0, b"")), Outcome::OutLocal);
}

#[test]
fn out_through_a_vlan_device() {
    let mut tables = gateway();
    tables.egress.insert(OUTSIDE, Egress { ifindex: IFINDEX, vlan: 300, kind: Egress::EXTERNAL });
    let (outcome, action, after) = run(&tables, &pod_udp(0, 64, 0, b"data"));
    assert_eq!((outcome, action), (Outcome::Decap, Action::Transmit));
    let mut expected = ethernet(CLIENT_NIC, NIC, 0x8100, &[0x01, 0x2c, 0x08, 0x00]);
    expected.extend(udp(POD, CLIENT, 63, 0, (80, 5555), b"data"));
    assert_eq!(after, expected);
}

#[test]
fn tunnel_packets_belong_on_the_underlay() {
    let mut tables = gateway();
    tables.config.roles = Roles::EXTERNAL;
    assert_eq!(outcome(&tables, &pod_udp(0, 64, 0, b"")), Outcome::TunnelPortExternal);
}

/// The kernel's socket listens on every address, and on broadcast: what XDP does not take must not get there.
#[rstest]
#[case::other_local_address(OVERLAY_ADDRESS, NIC, Outcome::TunnelAddress)]
#[case::local_prefix([198, 51, 100, 200], NIC, Outcome::TunnelAddress)]
#[case::broadcast([255; 4], [0xff; 6], Outcome::TunnelAddress)]
#[case::multicast([224, 0, 0, 1], [1, 0, 0x5e, 0, 0, 1], Outcome::TunnelAddress)]
#[case::broadcast_by_unicast([255; 4], NIC, Outcome::TunnelAddress)]
#[case::old_broadcast_by_unicast([0; 4], NIC, Outcome::TunnelAddress)]
#[case::multicast_by_unicast([224, 0, 0, 1], NIC, Outcome::TunnelAddress)]
#[case::stacked_device(LOCAL, [2; 6], Outcome::TunnelAddress)]
#[case::routed_elsewhere([203, 0, 113, 1], NIC, Outcome::NoRoute)]
#[case::another_host([203, 0, 113, 1], [2; 6], Outcome::NotForUs)]
fn the_tunnel_port_elsewhere(#[case] to: [u8; 4], #[case] mac: [u8; 6], #[case] expected: Outcome) {
    let mut tables = gateway();
    set_local_prefix(&mut tables, [198, 51, 100, 0], 24);
    let frame = ethernet(mac, NODE_NIC, 0x0800, &udp(NODE, to, 64, 0, (1, PORT), &VNI_1));
    assert_eq!(outcome(&tables, &frame), expected);
}

/// VLANs without a role are no way round.
#[rstest]
#[case::vtep_address(LOCAL, NIC, Outcome::TunnelPortExternal)]
#[case::other_local_address(OVERLAY_ADDRESS, NIC, Outcome::TunnelPortExternal)]
#[case::broadcast([255; 4], [0xff; 6], Outcome::TunnelPortExternal)]
#[case::routed_elsewhere([203, 0, 113, 1], NIC, Outcome::NoRole)]
fn the_tunnel_port_without_a_role(#[case] to: [u8; 4], #[case] mac: [u8; 6], #[case] expected: Outcome) {
    let mut tables = gateway();
    tables.config.roles = Roles::NONE;
    let frame = ethernet(mac, NODE_NIC, 0x0800, &udp(NODE, to, 64, 0, (1, PORT), &VNI_1));
    assert_eq!(outcome(&tables, &frame), expected);
}

/// The kernel takes off any number of priority tags (`__netif_receive_skb_core`), so none may hide a tunnel packet.
#[rstest]
#[case::service(&[(0x88a8, 0)], Outcome::TunnelAddress)]
#[case::two_priority(&[(0x8100, 0), (0x8100, 0)], Outcome::TunnelAddress)]
#[case::service_and_priority(&[(0x88a8, 0), (0x8100, 0)], Outcome::TunnelAddress)]
#[case::three(&[(0x8100, 0), (0x88a8, 0), (0x8100, 0)], Outcome::TunnelAddress)]
#[case::vlan_and_priority(&[(0x8100, 5), (0x8100, 0)], Outcome::TunnelPortExternal)]
#[case::four(&[(0x8100, 0), (0x8100, 0), (0x8100, 0), (0x8100, 0)], Outcome::VlanDepth)]
fn the_tunnel_port_behind_tags(#[case] tags: &[(u16, u16)], #[case] expected: Outcome) {
    let untagged = tunnel(NODE, 0, VNI_1, &[0; 60]);
    let mut frame = untagged[..12].to_vec();
    for (kind, vlan) in tags {
        frame.extend(kind.to_be_bytes());
        frame.extend(vlan.to_be_bytes());
    }
    frame.extend(&untagged[12..]);
    assert_eq!(outcome(&gateway(), &frame), expected);
}

#[test]
fn other_ports_of_the_vtep_address_are_the_kernels() {
    let frame = ethernet(NIC, NODE_NIC, 0x0800, &udp(NODE, LOCAL, 64, 0, (1, 53), b"query"));
    assert_eq!(outcome(&gateway(), &frame), Outcome::NoRoute);
}

/// flannel's DirectRouting: pods of on-link nodes answer with plain IP.
/// Another host of the underlay pretends to be a pod.
#[test]
fn plain_from_somebody_else() {
    let mut tables = gateway();
    let mut entry = slot(NODE, 0, false);
    entry.flags = entry.flags.with(VtepFlags::DIRECT);
    tables.vteps.insert(NODE_ID, vtep(entry));
    let frame =
        ethernet(NIC, [0x52, 0x54, 0, 0, 0, 0x66], 0x0800, &udp(POD, CLIENT, 64, 0, (80, 5555), b"plain"));
    assert_eq!(outcome(&tables, &frame), Outcome::DirectSource);
    tables.config.overlays[0].flags = OverlayFlags::NONE;
    assert_eq!(outcome(&tables, &frame), Outcome::DirectIn);
}

#[rstest]
#[case::direct_node(VtepFlags::DIRECT, POD, Outcome::DirectIn)]
#[case::tunnelled_node(VtepFlags::default(), POD, Outcome::NoRoute)]
#[case::no_pod(VtepFlags::DIRECT, [10, 9, 9, 9], Outcome::NoRoute)]
fn plain_from_a_node(#[case] flags: VtepFlags, #[case] source: [u8; 4], #[case] expected: Outcome) {
    let mut tables = gateway();
    tables.config.roles = Roles::UNDERLAY;
    let mut entry = slot(NODE, 0, false);
    entry.flags = entry.flags.with(flags);
    tables.vteps.insert(NODE_ID, vtep(entry));
    let frame = ethernet(NIC, NODE_NIC, 0x0800, &udp(source, CLIENT, 64, 0, (80, 5555), b"plain"));
    let (outcome, _, after) = run(&tables, &frame);
    assert_eq!(outcome, expected);
    if expected == Outcome::DirectIn {
        assert_eq!(after, ethernet(CLIENT_NIC, NIC, 0x0800, &udp(POD, CLIENT, 63, 0, (80, 5555), b"plain")));
    }
}
