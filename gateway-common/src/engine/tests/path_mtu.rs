//! What is too large for the path, and the MSS that keeps it from happening.

use etherparse::{
    IcmpEchoHeader, Icmpv4Type, Ipv4HeaderSlice, NetSlice, PacketBuilder, SlicedPacket, TcpOptionElement,
    TransportSlice,
    icmpv4::{DestUnreachableHeader, TimeExceededCode},
};
use rstest::rstest;

use super::{encapsulation::fix, fixture::*};
use crate::{
    abi::{Outcome, OverlayFlags, Roles, VlanPort, VtepFlags},
    engine::Action,
    model::HostTables,
    wire::Ipv4,
};

const MTU: usize = 1450;

/// A client's packet of `size` bytes in all, with DF.
fn sized(size: usize) -> Vec<u8> {
    client_udp(64, 0, (1, 2), &vec![0xab; size - 28])
}

#[test]
fn around_the_edge() {
    let tables = gateway();
    for size in 28..=1514 {
        let expected = if size <= MTU { Outcome::Encap } else { Outcome::TooBigReply };
        assert_eq!(outcome(&tables, &sized(size)), expected, "{size} bytes");
    }
}

#[test]
fn the_client_is_told() {
    let frame = sized(1500);
    let (outcome, action, after) = run(&gateway(), &frame);
    assert_eq!((outcome, action), (Outcome::TooBigReply, Action::Transmit));
    assert_eq!(after[..14], ethernet(CLIENT_NIC, NIC, 0x0800, &[]));
    check_error(&after[14..], &frame[14..]);
}

/// The error as a host reads it, against the packet that it sent.
fn check_error(error: &[u8], sent: &[u8]) {
    let sliced = SlicedPacket::from_ip(error).unwrap();
    let Some(NetSlice::Ipv4(ip)) = sliced.net else { panic!("no IPv4") };
    assert_eq!((ip.header().source(), ip.header().destination()), (ADDRESS, CLIENT));
    assert_eq!(ip.header().header_checksum(), ip.header().to_header().calc_header_checksum());
    assert_eq!(usize::from(ip.header().total_len()), error.len());
    let Some(TransportSlice::Icmpv4(icmp)) = sliced.transport else { panic!("no ICMP") };
    let needed =
        Icmpv4Type::DestinationUnreachable(DestUnreachableHeader::FragmentationNeeded { next_hop_mtu: 1450 });
    assert_eq!(icmp.icmp_type(), needed);
    assert_eq!(icmp.payload(), &sent[..28], "the packet is quoted as the client sent it");
    assert_eq!(icmp.checksum(), needed.calc_checksum(icmp.payload()));
}

#[test]
fn a_tagged_client_gets_a_tagged_answer() {
    let mut tables = gateway();
    tables.config.roles = Roles::NONE;
    tables.config.vlan_count = 1;
    tables.config.vlans[0] = VlanPort { vlan: 100, roles: Roles::EXTERNAL };
    let plain = sized(1500);
    let tag = [0x60, 100, 0x08, 0x00];
    let frame = ethernet(NIC, CLIENT_NIC, 0x8100, &[&tag[..], &plain[14..]].concat());
    let (outcome, _, after) = run(&tables, &frame);
    assert_eq!(outcome, Outcome::TooBigReply);
    assert_eq!(after[..18], ethernet(CLIENT_NIC, NIC, 0x8100, &tag));
    check_error(&after[18..], &plain[14..]);
}

#[test]
fn without_df_the_kernel_fragments() {
    let mut frame = sized(1500);
    frame[20] = 0;
    fix(&mut frame[14..]);
    assert_eq!(outcome(&gateway(), &frame), Outcome::Oversize);
}

#[test]
fn without_an_address_the_kernel_answers() {
    let mut tables = gateway();
    tables.config.address = Ipv4::UNSPECIFIED;
    assert_eq!(outcome(&tables, &sized(1500)), Outcome::Oversize);
}

#[test]
fn the_rate_is_limited() {
    let tables = gateway();
    tables.icmp_allowance.set(2);
    let results: Vec<Outcome> = (0..4).map(|_| outcome(&tables, &sized(1500))).collect();
    let (told, silent) = (Outcome::TooBigReply, Outcome::TooBigLimited);
    assert_eq!(results, [told, told, silent, silent]);
}

/// RFC 1122 section 3.2.2: no error about an error, none about a later fragment.
#[rstest]
#[case::echo(Icmpv4Type::EchoRequest(IcmpEchoHeader { id: 1, seq: 1 }), 0, Outcome::TooBigReply)]
#[case::echo_reply(Icmpv4Type::EchoReply(IcmpEchoHeader { id: 1, seq: 1 }), 0, Outcome::TooBigReply)]
#[case::error(Icmpv4Type::TimeExceeded(TimeExceededCode::TtlExceededInTransit), 0, Outcome::TooBigSilent)]
#[case::later_fragment(Icmpv4Type::EchoRequest(IcmpEchoHeader { id: 1, seq: 1 }), 1, Outcome::TooBigSilent)]
fn no_error_about(#[case] kind: Icmpv4Type, #[case] offset: u8, #[case] expected: Outcome) {
    let mut packet = Vec::new();
    PacketBuilder::ipv4(CLIENT, POD, 64).icmpv4(kind).write(&mut packet, &[0; 1472]).unwrap();
    packet[6..8].copy_from_slice(&[0x40, offset]);
    fix(&mut packet);
    assert_eq!(outcome(&gateway(), &ethernet(NIC, CLIENT_NIC, 0x0800, &packet)), expected);
}

use TcpOptionElement::{MaximumSegmentSize as Mss, Noop, SelectiveAcknowledgementPermitted, WindowScale};

fn clamping() -> HostTables {
    let mut tables = gateway();
    tables.config.overlays[0].flags = OverlayFlags::SOURCE_CHECK.with(OverlayFlags::CLAMP_MSS);
    tables
}

fn segment(source: [u8; 4], destination: [u8; 4], syn: bool, options: &[TcpOptionElement]) -> Vec<u8> {
    let builder = PacketBuilder::ipv4(source, destination, 64).tcp(40_000, 80, 7, 64_000);
    let builder = if syn { builder.syn() } else { builder.ack(9) };
    let mut packet = Vec::new();
    builder.options(options).unwrap().write(&mut packet, b"").unwrap();
    packet
}

/// The MSS of the TCP segment in `packet`, whose checksums must be right.
fn mss(packet: &[u8]) -> Option<u16> {
    let ip = Ipv4HeaderSlice::from_slice(packet).unwrap();
    let sliced = SlicedPacket::from_ip(packet).unwrap();
    let Some(TransportSlice::Tcp(tcp)) = sliced.transport else { panic!("no TCP") };
    let checksum = tcp.calc_checksum_ipv4(ip.source(), ip.destination()).unwrap();
    assert_eq!(tcp.checksum(), checksum, "TCP checksum");
    tcp.options_iterator().find_map(|option| match option {
        Ok(Mss(size)) => Some(size),
        _ => None,
    })
}

#[rstest]
#[case::as_linux_sends_it(&[Mss(1460), SelectiveAcknowledgementPermitted, Noop, WindowScale(7)], Some(1410))]
#[case::fits_exactly(&[Mss(1410)], Some(1410))]
#[case::one_more(&[Mss(1411)], Some(1410))]
#[case::smaller(&[Mss(536)], Some(536))]
#[case::jumbo(&[Mss(8960)], Some(1410))]
#[case::at_an_odd_offset(&[Noop, Mss(1460)], Some(1410))]
#[case::behind_others(&[Noop, Noop, WindowScale(7), Mss(1460)], Some(1410))]
#[case::without(&[WindowScale(7)], None)]
fn syn_from_a_client(#[case] options: &[TcpOptionElement], #[case] expected: Option<u16>) {
    let packet = segment(CLIENT, POD, true, options);
    let (outcome, _, after) = run(&clamping(), &ethernet(NIC, CLIENT_NIC, 0x0800, &packet));
    assert_eq!(outcome, Outcome::Encap);
    assert_eq!(mss(&after[64..]), expected);
    // Nothing but value and checksum changes.
    assert_eq!(after[64..].len(), packet.len());
}

#[test]
fn syn_from_a_pod() {
    let mut tables = clamping();
    let mut entry = slot(NODE, 0, false);
    entry.mtu = 1350;
    tables.vteps.insert(NODE_ID, vtep(entry));
    let inner = ethernet(VTEP, NODE_VTEP, 0x0800, &segment(POD, CLIENT, true, &[Mss(1410)]));
    let (outcome, _, after) = run(&tables, &tunnel(NODE, 0, VNI_1, &inner));
    assert_eq!(outcome, Outcome::Decap);
    assert_eq!(mss(&after[14..]), Some(1310));
}

#[test]
fn direct_node() {
    let mut tables = clamping();
    let mut entry = slot(NODE, 0, false);
    entry.header_len = 14;
    entry.flags = entry.flags.with(VtepFlags::DIRECT);
    entry.mtu = 1400;
    tables.vteps.insert(NODE_ID, vtep(entry));
    let there = ethernet(NIC, CLIENT_NIC, 0x0800, &segment(CLIENT, POD, true, &[Mss(1460)]));
    let (outcome, _, after) = run(&tables, &there);
    assert_eq!((outcome, mss(&after[14..])), (Outcome::RouteDirect, Some(1360)));
    let back = ethernet(NIC, NODE_NIC, 0x0800, &segment(POD, CLIENT, true, &[Mss(1460)]));
    let (outcome, _, after) = run(&tables, &back);
    assert_eq!((outcome, mss(&after[14..])), (Outcome::DirectIn, Some(1360)));
}

#[test]
fn only_syn_and_only_if_switched_on() {
    let data = ethernet(NIC, CLIENT_NIC, 0x0800, &segment(CLIENT, POD, false, &[Mss(1460)]));
    assert_eq!(mss(&run(&clamping(), &data).2[64..]), Some(1460));
    let syn = ethernet(NIC, CLIENT_NIC, 0x0800, &segment(CLIENT, POD, true, &[Mss(1460)]));
    assert_eq!(mss(&run(&gateway(), &syn).2[64..]), Some(1460));
}

/// Options that lie about their length, or end where the segment does: forwarded, unchanged but for the hop.
#[rstest]
#[case::zero_length(&[3, 0, 0, 0])]
#[case::length_one(&[3, 1, 0, 0])]
#[case::beyond_the_header(&[3, 40, 2, 4])]
#[case::mss_of_another_length(&[2, 3, 255, 255])]
#[case::end_first(&[0, 2, 4, 255])]
fn lying_options(#[case] options: &[u8; 4]) {
    let mut packet = segment(CLIENT, POD, true, &[Mss(1460)]);
    packet[40..44].copy_from_slice(options);
    let (outcome, _, after) = run(&clamping(), &ethernet(NIC, CLIENT_NIC, 0x0800, &packet));
    assert_eq!(outcome, Outcome::Encap);
    assert_eq!(after[84..], packet[20..]);
}

#[test]
fn every_data_offset_and_cut() {
    let tables = clamping();
    let whole = segment(CLIENT, POD, true, &[Mss(1460), Noop, Noop, Noop, Noop]);
    for offset in 0..16u8 {
        for length in 20..=whole.len() {
            let mut packet = whole[..length].to_vec();
            if let Some(byte) = packet.get_mut(32) {
                *byte = offset << 4;
            }
            packet[2..4].copy_from_slice(&u16::try_from(length).unwrap().to_be_bytes());
            fix(&mut packet);
            let (outcome, _, after) = run(&tables, &ethernet(NIC, CLIENT_NIC, 0x0800, &packet));
            assert_eq!((outcome, after.len()), (Outcome::Encap, length + 64));
        }
    }
}
