//! From clients to pods.

use etherparse::{Ipv4HeaderSlice, Ipv4Slice, NetSlice, SlicedPacket, TransportSlice};
use proptest::prelude::*;
use rstest::rstest;

use super::fixture::*;
use crate::{
    abi::{Outcome, OverlayAddress, OverlayFlags, Roles, Route, VlanPort, VtepFlags},
    engine::{Action, Frame as _, process},
    model::{HostFrame, HostTables},
    wire::{Ipv4, Mac},
};

/// The encapsulation vector of the project's protocol sheet, recorded from a VTEP that works with flannel: an ICMP
/// echo of 100 bytes in all. Its UDP source port is that sender's own choice.
const VECTOR: &str = "52540000000a5254000000010800450000560000000040111da5ac1002c8ac10020ad2342118004200000800000000000100\
                      de70bcb6ca8d0e1122334455080045000024000100003f0146e00af41e0f0af4010208007c0e1234000167772d70726f6265";

fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter_map(|c| char::from(c).to_digit(16)).map(|d| d as u8).collect();
    digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect()
}

#[test]
fn golden_vector() {
    let expected = hex(VECTOR);
    // What the client sent: the inner packet one hop earlier, TTL 64, with the checksum that goes with it.
    let mut ip = Ipv4HeaderSlice::from_slice(&expected[64..]).unwrap().to_header();
    ip.time_to_live = 64;
    ip.header_checksum = ip.calc_header_checksum();
    let mut packet = ip.to_bytes().to_vec();
    packet.extend(&expected[84..]);
    let (outcome, action, after) = run(&gateway(), &ethernet(NIC, CLIENT_NIC, 0x0800, &packet));
    assert_eq!((outcome, action), (Outcome::Encap, Action::Transmit));
    let port = u16::from_be_bytes([after[34], after[35]]);
    assert!(port >= 49_152, "source port {port}");
    let mut same = after.clone();
    same[34..36].copy_from_slice(&expected[34..36]);
    assert_eq!(same, expected);
}

/// Outer and inner packet of an encapsulated frame, checksums checked by etherparse.
fn opened(frame: &[u8]) -> (Ipv4Slice<'_>, u16, &[u8]) {
    let sliced = SlicedPacket::from_ethernet(frame).unwrap();
    let Some(NetSlice::Ipv4(outer)) = sliced.net else { panic!("no outer IPv4") };
    assert_eq!(outer.header().header_checksum(), outer.header().to_header().calc_header_checksum());
    let Some(TransportSlice::Udp(udp)) = sliced.transport else { panic!("no outer UDP") };
    assert_eq!((udp.destination_port(), udp.checksum()), (PORT, 0));
    assert_eq!(usize::from(udp.length()), frame.len() - 34);
    assert_eq!(udp.payload()[..8], VNI_1);
    (outer, udp.source_port(), &frame[50..])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn outer_is_right_and_inner_is_one_hop_older(
        ttl in 2u8..,
        tos: u8,
        ports: (u16, u16),
        data in proptest::collection::vec(any::<u8>(), 0..1300),
        template_dscp in 0u8..64,
    ) {
        let mut tables = gateway();
        tables.vteps.insert(NODE_ID, vtep(slot(NODE, template_dscp << 2, false)));
        let frame = client_udp(ttl, tos, ports, &data);
        let (outcome, action, after) = run(&tables, &frame);
        prop_assert_eq!((outcome, action), (Outcome::Encap, Action::Transmit));
        let (outer, port, inner) = opened(&after);
        prop_assert!(port >= 49_152);
        prop_assert_eq!(outer.header().source(), LOCAL);
        prop_assert_eq!(outer.header().destination(), NODE);
        prop_assert_eq!(outer.header().ttl(), 64);
        prop_assert_eq!(outer.header().dcp().value(), template_dscp);
        // RFC 6040 with Linux' choice: CE shows as ECT(0) outside.
        prop_assert_eq!(outer.header().ecn().value(), [0, 1, 2, 2][usize::from(tos & 3)]);
        prop_assert!(!outer.header().dont_fragment() && !outer.header().is_fragmenting_payload());
        let expected = ethernet(NODE_VTEP, VTEP, 0x0800, &udp(CLIENT, POD, ttl - 1, tos, ports, &data));
        prop_assert_eq!(inner, &expected[..]);
    }

    #[test]
    fn a_flow_keeps_its_source_port(ports: (u16, u16), a in 2u8.., b in 2u8.., length in 0usize..100) {
        let tables = gateway();
        let first = run(&tables, &client_udp(a, 0, ports, &[1])).2;
        let second = run(&tables, &client_udp(b, 0, ports, &vec![7; length])).2;
        prop_assert_eq!(opened(&first).1, opened(&second).1);
    }
}

#[test]
fn a_pod_in_no_table_is_reached_by_its_prefix() {
    let frame = ethernet(NIC, CLIENT_NIC, 0x0800, &udp(CLIENT, UNLISTED_POD, 64, 0, (1, 2), b"x"));
    let (outcome, _, after) = run(&gateway(), &frame);
    assert_eq!(outcome, Outcome::Encap);
    assert_eq!(opened(&after).0.header().destination(), NODE);
}

#[test]
fn the_exact_pod_wins_over_the_prefix() {
    let mut tables = gateway();
    let moved = OverlayAddress { overlay: 0, address: Ipv4::new(UNLISTED_POD) };
    tables.pods.insert(moved, Route::to(OTHER_ID));
    let frame = ethernet(NIC, CLIENT_NIC, 0x0800, &udp(CLIENT, UNLISTED_POD, 64, 0, (1, 2), b"x"));
    assert_eq!(opened(&run(&tables, &frame).2).0.header().destination(), OTHER_NODE);
}

/// All fragments of a datagram take the same path, also the first one, which has ports.
#[test]
fn fragments_share_a_source_port() {
    let tables = gateway();
    let mut ports = Vec::new();
    for fragment in [[0x20, 0], [0x20, 100], [0, 200]] {
        let mut packet = udp(CLIENT, POD, 64, 0, (1234, 80), &[5; 64]);
        packet[6..8].copy_from_slice(&fragment);
        fix(&mut packet);
        let (outcome, _, after) = run(&tables, &ethernet(NIC, CLIENT_NIC, 0x0800, &packet));
        assert_eq!(outcome, Outcome::Encap);
        ports.push(opened(&after).1);
    }
    assert!(ports.iter().all(|port| *port == ports[0]), "{ports:?}");
}

/// ICMP echo has its identifier for ports: pings of two processes may take two paths, one ping takes one.
#[test]
fn echo_identifiers_tell_flows_apart() {
    let tables = gateway();
    let port = |id: [u8; 2], sequence: u8| {
        let mut bytes = Vec::new();
        etherparse::PacketBuilder::ipv4(CLIENT, POD, 64)
            .icmpv4_echo_request(u16::from_be_bytes(id), u16::from(sequence))
            .write(&mut bytes, b"ping")
            .unwrap();
        opened(&run(&tables, &ethernet(NIC, CLIENT_NIC, 0x0800, &bytes)).2).1
    };
    assert_eq!(port([1, 1], 1), port([1, 1], 2));
    let distinct: std::collections::BTreeSet<u16> = (0..64).map(|id| port([3, id], 1)).collect();
    assert!(distinct.len() > 50, "{}", distinct.len());
}

/// Recomputes the checksum of an IPv4 header in place.
pub(super) fn fix(packet: &mut [u8]) {
    let mut header = Ipv4HeaderSlice::from_slice(packet).unwrap().to_header();
    header.header_checksum = header.calc_header_checksum();
    packet[10..12].copy_from_slice(&header.header_checksum.to_be_bytes());
}

#[rstest]
#[case::expired(0, Outcome::TtlExpired)]
#[case::last_hop(1, Outcome::TtlExpired)]
#[case::two_left(2, Outcome::Encap)]
fn ttl_as_a_router(#[case] ttl: u8, #[case] expected: Outcome) {
    assert_eq!(outcome(&gateway(), &client_udp(ttl, 0, (1, 2), b"")), expected);
}

#[test]
fn size_against_the_path() {
    let tables = gateway();
    assert_eq!(outcome(&tables, &client_udp(9, 0, (1, 2), &[0; 1450 - 28])), Outcome::Encap);
    assert_eq!(outcome(&tables, &client_udp(9, 0, (1, 2), &[0; 1451 - 28])), Outcome::TooBigReply);
}

#[test]
fn clients_outside_the_subnet_are_dropped() {
    let frame = ethernet(NIC, CLIENT_NIC, 0x0800, &udp([198, 51, 100, 7], POD, 64, 0, (1, 2), b""));
    assert_eq!(outcome(&gateway(), &frame), Outcome::ClientForeign);
}

#[test]
fn options_go_to_the_kernel() {
    let mut ip = etherparse::Ipv4Header::new(8, 64, etherparse::IpNumber::UDP, CLIENT, POD).unwrap();
    ip.options = [1u8, 1, 1, 0].into();
    let mut packet = ip.to_bytes().to_vec();
    packet.extend([0, 1, 0, 2, 0, 8, 0, 0]);
    assert_eq!(outcome(&gateway(), &ethernet(NIC, CLIENT_NIC, 0x0800, &packet)), Outcome::IpOptions);
}

#[rstest]
#[case::absent(None, Outcome::VtepMissing)]
#[case::free(Some(VtepFlags::default()), Outcome::VtepMissing)]
#[case::unresolved(Some(VtepFlags::USED), Outcome::VtepUnresolved)]
fn without_a_next_hop(#[case] flags: Option<VtepFlags>, #[case] expected: Outcome) {
    let mut tables = gateway();
    tables.vteps.remove(&NODE_ID);
    if let Some(flags) = flags {
        let mut entry = vtep(slot(NODE, 0, false));
        entry.slots[0].flags = flags;
        tables.vteps.insert(NODE_ID, entry);
    }
    assert_eq!(outcome(&tables, &client_udp(64, 0, (1, 2), b"")), expected);
}

#[rstest]
#[case::wrong_version(0x55)]
#[case::short_header(0x44)]
fn impossible_headers(#[case] first: u8) {
    let mut frame = client_udp(64, 0, (1, 2), b"");
    frame[14] = first;
    assert_eq!(outcome(&gateway(), &frame), Outcome::Ipv4Malformed);
}

#[test]
fn total_length_beyond_the_frame() {
    let mut frame = client_udp(64, 0, (1, 2), b"abc");
    frame.pop();
    assert_eq!(outcome(&gateway(), &frame), Outcome::Ipv4Malformed);
}

/// Ethernet padding of short frames is carried, and counted in the outer lengths.
#[test]
fn padding_is_carried() {
    let mut frame = client_udp(64, 0, (1, 2), b"");
    frame.resize(60, 0);
    let (outcome, _, after) = run(&gateway(), &frame);
    assert_eq!((outcome, after.len()), (Outcome::Encap, 110));
    opened(&after);
}

#[rstest]
#[case::unset(false, OverlayFlags::NONE, true, false)]
#[case::set(true, OverlayFlags::NONE, false, true)]
#[case::inherit_df(false, OverlayFlags::DF_INHERIT, true, true)]
#[case::inherit_no_df(false, OverlayFlags::DF_INHERIT, false, false)]
fn outer_df(#[case] template: bool, #[case] flags: OverlayFlags, #[case] inner: bool, #[case] outer: bool) {
    let mut tables = gateway();
    tables.config.overlays[0].flags = OverlayFlags::SOURCE_CHECK.with(flags);
    tables.vteps.insert(NODE_ID, vtep(slot(NODE, 0, template)));
    let mut packet = udp(CLIENT, POD, 64, 0, (1, 2), b"");
    packet[6] = if inner { 0x40 } else { 0 };
    fix(&mut packet);
    let after = run(&tables, &ethernet(NIC, CLIENT_NIC, 0x0800, &packet)).2;
    assert_eq!(opened(&after).0.header().dont_fragment(), outer);
}

/// A plain next hop: link addresses and TTL change, nothing else.
#[test]
fn direct_next_hop() {
    let mut tables = gateway();
    let mut entry = slot(NODE, 0, false);
    entry.header_len = 14;
    entry.flags = entry.flags.with(VtepFlags::DIRECT);
    entry.ifindex = OUTSIDE;
    tables.vteps.insert(NODE_ID, vtep(entry));
    let (outcome, action, after) = run(&tables, &client_udp(64, 3, (7, 8), b"hello"));
    assert_eq!((outcome, action), (Outcome::RouteDirect, Action::Redirect(OUTSIDE)));
    assert_eq!(after, ethernet(NODE_NIC, NIC, 0x0800, &udp(CLIENT, POD, 63, 3, (7, 8), b"hello")));
}

fn tagged(frame: &[u8], vlan: u16) -> Vec<u8> {
    let mut bytes = frame[..12].to_vec();
    bytes.extend([0x81, 0]);
    bytes.extend(vlan.to_be_bytes());
    bytes.extend(&frame[12..]);
    bytes
}

fn with_vlan(vlan: u16, roles: Roles) -> HostTables {
    let mut tables = gateway();
    tables.config.roles = Roles::NONE;
    tables.config.vlan_count = 2;
    tables.config.vlans[0] = VlanPort { vlan: 4000, roles: Roles::NONE };
    tables.config.vlans[1] = VlanPort { vlan, roles };
    tables
}

#[test]
fn tagged_client_untagged_underlay() {
    let plain = client_udp(64, 0, (1, 2), b"data");
    let (outcome, _, after) = run(&with_vlan(100, Roles::EXTERNAL), &tagged(&plain, 100));
    assert_eq!(outcome, Outcome::Encap);
    assert_eq!(after, run(&gateway(), &plain).2);
}

#[test]
fn tagged_underlay() {
    let mut tables = gateway();
    let mut entry = slot(NODE, 0, false);
    let header = tagged(&entry.header[..64], 200);
    entry.header[..68].copy_from_slice(&header);
    entry.header_len = 68;
    entry.ip_offset = 18;
    tables.vteps.insert(NODE_ID, vtep(entry));
    let plain = client_udp(64, 1, (1, 2), b"data");
    let after = run(&tables, &plain).2;
    assert_eq!(after, tagged(&run(&gateway(), &plain).2, 200));
}

#[rstest]
#[case::other_vlan(101, Outcome::NoRole)]
#[case::known_without_role(4000, Outcome::NoRole)]
#[case::priority_tag_is_untagged(0, Outcome::NoRole)]
#[case::priority_bits_do_not_matter(0xe064, Outcome::Encap)]
fn vlan_roles(#[case] tci: u16, #[case] expected: Outcome) {
    let frame = tagged(&client_udp(64, 0, (1, 2), b""), tci);
    assert_eq!(outcome(&with_vlan(100, Roles::EXTERNAL), &frame), expected);
}

#[test]
fn an_underlay_only_interface_does_not_route_clients() {
    let mut tables = gateway();
    tables.config.roles = Roles::UNDERLAY;
    assert_eq!(outcome(&tables, &client_udp(64, 0, (1, 2), b"")), Outcome::NoRoute);
}

#[rstest]
#[case::other_host([2, 2, 2, 2, 2, 2])]
#[case::broadcast([0xff; 6])]
fn frames_for_others(#[case] destination: [u8; 6]) {
    let mut frame = client_udp(64, 0, (1, 2), b"");
    frame[..6].copy_from_slice(&destination);
    assert_eq!(outcome(&gateway(), &frame), Outcome::NotForUs);
}

#[test]
fn the_active_slot_counts() {
    let mut tables = gateway();
    let mut entry = vtep(slot(OTHER_NODE, 0, false));
    entry.slots[1] = slot(NODE, 0, false);
    entry.active = 1;
    tables.vteps.insert(NODE_ID, entry);
    let after = run(&tables, &client_udp(64, 0, (1, 2), b"")).2;
    assert_eq!(opened(&after).0.header().destination(), NODE);
}

/// Cards that split headers off leave the payload in a fragment, however short it is.
#[test]
fn a_payload_in_a_fragment_is_part_of_the_packet() {
    let tables = gateway();
    let frame = client_udp(64, 0, (40_000, 53), &[0x55; 200]);
    let mut split = HostFrame::new(&frame).split(200);
    assert_eq!(split.len(), 42);
    let verdict = process(&mut split, &tables);
    assert_eq!((verdict.info().unwrap().outcome, verdict.action()), (Outcome::Encap, Action::Transmit));
    assert_eq!(split.bytes(), run(&tables, &frame).2);
}

#[test]
fn no_headroom_leaves_the_frame_alone() {
    // A link header of 14 bytes cannot grow by 50 in a frame whose template wants an interface that is not ours.
    let mut tables = gateway();
    tables.config.mac = Mac::new(NIC);
    let frame = client_udp(64, 0, (1, 2), b"");
    let mut tight = HostFrame::with_headroom(&frame, 80);
    let verdict = process(&mut tight, &tables);
    assert_eq!(verdict.info().unwrap().outcome, Outcome::NoHeadroom);
    assert_eq!(tight.bytes(), frame);
}

/// A Node that claims an address of the gateway takes nothing from it. (A Pod that does never gets into the table.)
#[rstest]
#[case::client(CLIENT)]
#[case::stranger([198, 51, 100, 7])]
fn what_the_kernel_owns_is_no_pod(#[case] source: [u8; 4]) {
    let mut tables = gateway();
    tables.prefixes.insert((0, 16, Ipv4::new([172, 16, 0, 0])), Route::to(NODE_ID));
    let frame = ethernet(NIC, CLIENT_NIC, 0x0800, &udp(source, LOCAL, 64, 0, (5555, 22), b"x"));
    assert_eq!(outcome(&tables, &frame), Outcome::NoRoute);
}

#[test]
fn what_lies_in_a_local_prefix_is_no_pod() {
    let mut tables = gateway();
    set_local_prefix(&mut tables, [10, 244, 1, 192], 26);
    let to = |address| ethernet(NIC, CLIENT_NIC, 0x0800, &udp(CLIENT, address, 64, 0, (5555, 22), b"x"));
    assert_eq!(outcome(&tables, &to(UNLISTED_POD)), Outcome::NoRoute);
    assert_eq!(outcome(&tables, &to([10, 244, 1, 191])), Outcome::Encap);
}
