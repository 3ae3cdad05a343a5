//! Translated connections, packet by packet. Expected packets are made by etherparse from new addresses and ports:
//! checksums that were updated must equal those that are computed.

use etherparse::{
    IcmpEchoHeader, Icmpv4Header, Icmpv4Type, IpFragOffset, IpNumber, Ipv4Header, PacketBuilder,
    SlicedPacket, TransportSlice,
};
use proptest::prelude::*;

use super::fixture::*;
use crate::{
    abi::{
        LastHop, LocalAddress, Outcome, Phase, Port, ReverseKey, Route, SessionEvent, SnatRule, State,
        SweepMode, Ticks, Timeouts, ticks,
    },
    engine::{Action, session::sweep},
    model::HostTables,
    wire::{Ipv4, Mac},
};

const FOREIGN: [u8; 4] = [198, 51, 100, 7];
const SNAT: [u8; 4] = [10, 244, 30, 200];
const SNAT_OTHER: [u8; 4] = [10, 244, 30, 201];
const ROUTER: [u8; 4] = [192, 0, 2, 1];

/// The fixture with translation of all foreign clients to one address.
fn tables() -> HostTables {
    let mut tables = gateway();
    let config = &mut tables.config;
    config.snat_rule_count = 1;
    config.snat_rules[0] = SnatRule { first: 0, count: 1, ..SnatRule::default() };
    config.snat_addresses[0] = Ipv4::new(SNAT);
    config.snat_addresses[1] = Ipv4::new(SNAT_OTHER);
    config.overlays[0].snat_first = u32::from_be_bytes(SNAT);
    config.overlays[0].snat_span = 2;
    config.ports[3] = Port { ifindex: IFINDEX, mac: Mac::new(NIC), mtu: 1500 };
    config.port = 3;
    config.session_slots = 64;
    config.timeouts = Timeouts::DEFAULT;
    for address in [SNAT, SNAT_OTHER] {
        let kind = LocalAddress::SNAT | LocalAddress::OVERLAY;
        tables.addresses.insert(Ipv4::new(address), LocalAddress { kind, ifindex: 0 });
    }
    tables.sessions.now.set(ticks(1000));
    tables
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Transport {
    Udp(u16, u16),
    UdpUnchecked(u16, u16),
    /// Ports, flags, sequence, acknowledgement.
    Tcp(u16, u16, u8, u32, u32),
    EchoRequest(u16),
    EchoReply(u16),
}

const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;
const FIN: u8 = 1;

fn packet(source: [u8; 4], destination: [u8; 4], ttl: u8, transport: Transport, data: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let builder = PacketBuilder::ipv4(source, destination, ttl);
    match transport {
        Transport::Udp(a, b) => builder.udp(a, b).write(&mut bytes, data).unwrap(),
        Transport::UdpUnchecked(a, b) => {
            builder.udp(a, b).write(&mut bytes, data).unwrap();
            bytes[26..28].fill(0);
        }
        Transport::Tcp(a, b, flags, sequence, acknowledgement) => {
            let mut tcp = etherparse::TcpHeader::new(a, b, sequence, 4096);
            tcp.acknowledgment_number = acknowledgement;
            (tcp.syn, tcp.fin, tcp.rst, tcp.ack) =
                (flags & SYN != 0, flags & FIN != 0, flags & RST != 0, flags & ACK != 0);
            builder.tcp_header(tcp).write(&mut bytes, data).unwrap();
        }
        Transport::EchoRequest(id) => builder
            .icmpv4(Icmpv4Type::EchoRequest(IcmpEchoHeader { id, seq: 1 }))
            .write(&mut bytes, data)
            .unwrap(),
        Transport::EchoReply(id) => builder
            .icmpv4(Icmpv4Type::EchoReply(IcmpEchoHeader { id, seq: 1 }))
            .write(&mut bytes, data)
            .unwrap(),
    }
    bytes
}

/// An ICMP error as a router or host sends it.
fn error(source: [u8; 4], destination: [u8; 4], ttl: u8, kind: Icmpv4Type, quoted: &[u8]) -> Vec<u8> {
    let header = Icmpv4Header::with_checksum(kind, quoted);
    let mut bytes = Vec::new();
    let len = u16::try_from(header.header_len() + quoted.len()).unwrap();
    Ipv4Header::new(len, ttl, IpNumber::ICMP, source, destination).unwrap().write(&mut bytes).unwrap();
    header.write(&mut bytes).unwrap();
    bytes.extend(quoted);
    bytes
}

fn from_client(packet: &[u8]) -> Vec<u8> {
    ethernet(NIC, CLIENT_NIC, 0x0800, packet)
}

fn from_pod(node: [u8; 4], packet: &[u8]) -> Vec<u8> {
    tunnel(node, 0, VNI_1, &ethernet(VTEP, NODE_VTEP, 0x0800, packet))
}

/// Runs a frame that must be sent with this outcome; the IP packet inside what leaves.
fn sent(tables: &HostTables, frame: &[u8], expected: Outcome) -> Vec<u8> {
    let (outcome, action, after) = run(tables, frame);
    assert_eq!(outcome, expected);
    assert_eq!(action, Action::Transmit);
    match expected {
        Outcome::SnatNew | Outcome::SnatForward | Outcome::SnatErrorForward => {
            assert_eq!(after[..14], slot(NODE, 0, false).header[..14]);
            after[64..].to_vec()
        }
        _ => {
            assert_eq!(after[..14], ethernet(CLIENT_NIC, NIC, 0x0800, &[])[..]);
            after[14..].to_vec()
        }
    }
}

/// Source port and address of a packet that left.
fn source_of(packet: &[u8]) -> ([u8; 4], u16) {
    let sliced = SlicedPacket::from_ip(packet).unwrap();
    let ip = sliced.net.unwrap().ipv4_ref().unwrap().header().source();
    let port = match sliced.transport.unwrap() {
        TransportSlice::Udp(udp) => udp.source_port(),
        TransportSlice::Tcp(tcp) => tcp.source_port(),
        TransportSlice::Icmpv4(icmp) => match icmp.icmp_type() {
            Icmpv4Type::EchoRequest(echo) => echo.id,
            other => panic!("{other:?}"),
        },
        other => panic!("{other:?}"),
    };
    (ip, port)
}

fn phase(tables: &HostTables) -> Phase {
    let sessions = tables.sessions.reverse.borrow();
    let [session] = sessions.values().collect::<Vec<_>>()[..] else { panic!("{} sessions", sessions.len()) };
    session.state().phase()
}

fn state(tables: &HostTables) -> State {
    tables.sessions.reverse.borrow().values().next().unwrap().state()
}

fn events(tables: &HostTables, event: SessionEvent) -> u64 {
    tables.sessions.events.borrow().get(&event).copied().unwrap_or(0)
}

/// Both tables and the slots tell the same sessions.
fn assert_consistent(tables: &HostTables) {
    let sessions = &tables.sessions;
    let (forward, reverse) = (sessions.forward.borrow(), sessions.reverse.borrow());
    assert_eq!(forward.len(), reverse.len());
    for (key, entry) in reverse.iter() {
        let entry = entry.get();
        let peer = forward.get(&entry.forward_key(key)).expect("the forward entry").get();
        assert_eq!(peer.reverse_key(&entry.forward_key(key)), *key);
        assert_eq!(sessions.slots.borrow()[&entry.slot], *key);
    }
}

/// A connection there and back, with the client's port kept: every byte.
#[rstest::rstest]
#[case(Transport::Udp(5555, 53), Transport::Udp(53, 5555))]
#[case(Transport::UdpUnchecked(5555, 53), Transport::UdpUnchecked(53, 5555))]
#[case(Transport::Tcp(5555, 80, SYN, 1000, 0), Transport::Tcp(80, 5555, SYN | ACK, 7, 1001))]
#[case(Transport::EchoRequest(77), Transport::EchoReply(77))]
fn there_and_back(#[case] request: Transport, #[case] reply: Transport) {
    let tables = tables();
    for (outcome, data) in [(Outcome::SnatNew, &b"first"[..]), (Outcome::SnatForward, b"second one")] {
        let there = sent(&tables, &from_client(&packet(FOREIGN, POD, 64, request, data)), outcome);
        assert_eq!(there, packet(SNAT, POD, 63, request, data));
        let back = from_pod(NODE, &packet(POD, SNAT, 64, reply, data));
        let back = sent(&tables, &back, Outcome::SnatReply);
        assert_eq!(back, packet(POD, FOREIGN, 63, reply, data));
    }
    assert_consistent(&tables);
}

#[test]
fn a_port_that_is_taken_is_replaced_both_ways() {
    let tables = tables();
    let first = from_client(&packet(FOREIGN, POD, 64, Transport::Udp(5555, 53), b"a"));
    sent(&tables, &first, Outcome::SnatNew);
    let other = [198, 51, 100, 8];
    let second = from_client(&packet(other, POD, 64, Transport::Udp(5555, 53), b"b"));
    let there = sent(&tables, &second, Outcome::SnatNew);
    let (address, port) = source_of(&there);
    assert_eq!(address, SNAT);
    assert!(port != 5555 && port >= 1024);
    assert_eq!(there, packet(SNAT, POD, 63, Transport::Udp(port, 53), b"b"));
    let back = from_pod(NODE, &packet(POD, SNAT, 64, Transport::Udp(53, port), b"c"));
    assert_eq!(
        sent(&tables, &back, Outcome::SnatReply),
        packet(POD, other, 63, Transport::Udp(53, 5555), b"c")
    );
    // Towards another pod port the same port is free.
    let third = from_client(&packet(other, POD, 64, Transport::Udp(5555, 54), b"b"));
    assert_eq!(source_of(&sent(&tables, &third, Outcome::SnatNew)), (SNAT, 5555));
    assert_consistent(&tables);
}

proptest! {
    /// Any addresses, ports and data: updated checksums equal computed ones.
    #[test]
    fn checksums(
        client in (1u8..=223, any::<[u8; 3]>()),
        ports in (1u16.., any::<u16>()),
        data in proptest::collection::vec(any::<u8>(), 0..64),
        which in 0..3,
    ) {
        let [b, c, d] = client.1;
        let client = [client.0, b, c, d];
        let tables = tables();
        prop_assume!(!tables.config.is_own(Ipv4::new(client)) && Ipv4::new(client).is_source());
        // So that a port is taken, and both address and port change.
        for source in [[203, 0, 113, 99], client] {
            let (request, reply): (Transport, fn(u16, u16) -> Transport) = match which {
                0 => (Transport::Udp(ports.0, ports.1), |a, b| Transport::Udp(b, a)),
                1 => (Transport::Tcp(ports.0, ports.1, SYN, 1, 2), |a, b| Transport::Tcp(b, a, ACK, 3, 4)),
                _ => (Transport::EchoRequest(ports.0), |a, _| Transport::EchoReply(a)),
            };
            let frame = from_client(&packet(source, POD, 64, request, &data));
            let there = sent(&tables, &frame, Outcome::SnatNew);
            let (address, port) = source_of(&there);
            let translated = match request {
                Transport::Udp(_, b) => Transport::Udp(port, b),
                Transport::Tcp(_, b, flags, seq, ack) => Transport::Tcp(port, b, flags, seq, ack),
                _ => Transport::EchoRequest(port),
            };
            prop_assert_eq!(&there, &packet(address, POD, 63, translated, &data));
            let back = from_pod(NODE, &packet(POD, SNAT, 64, reply(port, ports.1), &data));
            let back = sent(&tables, &back, Outcome::SnatReply);
            prop_assert_eq!(back, packet(POD, source, 63, reply(ports.0, ports.1), &data));
        }
    }

    /// ICMP errors about both directions, from both ends and from routers on the way.
    #[test]
    fn errors_are_translated_with_what_they_quote(
        which in 0..3,
        by_router: bool,
        quoted_len in 28usize..80,
        code in 0u8..=15,
    ) {
        let tables = tables();
        let (request, reply) = match which {
            0 => (Transport::Udp(5555, 53), Transport::Udp(53, 5555)),
            1 => (Transport::Tcp(5555, 80, SYN, 1, 0), Transport::Tcp(80, 5555, ACK, 1, 2)),
            _ => (Transport::EchoRequest(9), Transport::EchoReply(9)),
        };
        let data = [0x5a; 40];
        // Another client holds the port, so that it changes.
        sent(&tables, &from_client(&packet([203, 0, 113, 99], POD, 64, request, &data)), Outcome::SnatNew);
        let there = sent(&tables, &from_client(&packet(FOREIGN, POD, 64, request, &data)), Outcome::SnatNew);
        let (_, port) = source_of(&there);
        let outside = match request {
            Transport::Udp(_, b) => Transport::Udp(port, b),
            Transport::Tcp(_, b, flags, seq, ack) => Transport::Tcp(port, b, flags, seq, ack),
            _ => Transport::EchoRequest(port),
        };
        let kind = Icmpv4Type::Unknown { type_u8: 3, code_u8: code, bytes5to8: [0, 0, 5, 0x78] };

        // About the client's packet, which the pod's side saw with the SNAT address. TCP's checksum is left in the
        // quotation as it was.
        let tcp_len = if which == 1 { 28 + 8 } else { usize::MAX };
        let quote = |packet: Vec<u8>| packet[..quoted_len.min(tcp_len).min(packet.len())].to_vec();
        let from = if by_router { [10, 244, 1, 1] } else { POD };
        let seen = quote(packet(SNAT, POD, 63, outside, &data));
        let frame = from_pod(NODE, &error(from, SNAT, 64, kind.clone(), &seen));
        let expected = error(from, FOREIGN, 63, kind.clone(), &quote(packet(FOREIGN, POD, 63, request, &data)));
        prop_assert_eq!(sent(&tables, &frame, Outcome::SnatErrorReply), expected);

        // About the pod's packet, which the client's side saw with the client's address.
        let from = if by_router { ROUTER } else { FOREIGN };
        let seen = quote(packet(POD, FOREIGN, 63, reply, &data));
        let frame = from_client(&error(from, POD, 64, kind.clone(), &seen));
        let inside = match reply {
            Transport::Udp(b, _) => Transport::Udp(b, port),
            Transport::Tcp(b, _, flags, seq, ack) => Transport::Tcp(b, port, flags, seq, ack),
            _ => Transport::EchoReply(port),
        };
        let expected = error(SNAT, POD, 63, kind, &quote(packet(POD, SNAT, 63, inside, &data)));
        prop_assert_eq!(sent(&tables, &frame, Outcome::SnatErrorForward), expected);
    }
}

/// Advances the time.
fn wait(tables: &HostTables, by: Ticks) {
    tables.sessions.now.set(tables.sessions.now.get() + by);
}

fn tcp(client: [u8; 4], port: u16, flags: u8, sequence: u32, acknowledgement: u32) -> Vec<u8> {
    from_client(&packet(client, POD, 64, Transport::Tcp(port, 80, flags, sequence, acknowledgement), b""))
}

fn tcp_reply(port: u16, flags: u8, sequence: u32, acknowledgement: u32) -> Vec<u8> {
    from_pod(NODE, &packet(POD, SNAT, 64, Transport::Tcp(80, port, flags, sequence, acknowledgement), b""))
}

/// Opens a TCP connection whose port is kept.
fn connect(tables: &HostTables, client: [u8; 4], port: u16) {
    sent(tables, &tcp(client, port, SYN, 100, 0), Outcome::SnatNew);
    sent(tables, &tcp_reply(port, SYN | ACK, 500, 101), Outcome::SnatReply);
    sent(tables, &tcp(client, port, ACK, 101, 501), Outcome::SnatForward);
}

/// Every session of every client, by its port.
fn client(number: u8) -> [u8; 4] {
    [203, 0, 113, number]
}

#[test]
fn a_connection_lives_from_the_matching_acknowledgement_to_both_fins() {
    let tables = tables();
    sent(&tables, &tcp(FOREIGN, 5555, SYN, 100, 0), Outcome::SnatNew);
    sent(&tables, &tcp_reply(5555, SYN | ACK, 500, 101), Outcome::SnatReply);
    sent(&tables, &tcp(FOREIGN, 5555, ACK, 101, 999), Outcome::SnatForward);
    assert_eq!(phase(&tables), Phase::Opening, "a blind acknowledgement");
    sent(&tables, &tcp(FOREIGN, 5555, ACK, 101, 501), Outcome::SnatForward);
    assert_eq!(phase(&tables), Phase::Live);
    assert_eq!(events(&tables, SessionEvent::Confirmed), 1);
    sent(&tables, &tcp_reply(5555, FIN | ACK, 501, 101), Outcome::SnatReply);
    sent(&tables, &tcp(FOREIGN, 5555, FIN | ACK, 101, 502), Outcome::SnatForward);
    assert!(state(&tables).all(State::FIN_CLIENT | State::FIN_POD));
    // The same port again, within TIME-WAIT.
    sent(&tables, &tcp(FOREIGN, 5555, SYN, 9000, 0), Outcome::SnatForward);
    let again = state(&tables);
    assert_eq!(again, State::new(Phase::Opening).expecting(again.acknowledgement()));
    sent(&tables, &tcp_reply(5555, SYN | ACK, 700, 9001), Outcome::SnatReply);
    sent(&tables, &tcp(FOREIGN, 5555, ACK, 9001, 701), Outcome::SnatForward);
    assert_eq!(phase(&tables), Phase::Live);
    assert_consistent(&tables);
}

#[rstest::rstest]
#[case::sctp(132, Outcome::SnatProtocol)]
#[case::esp(50, Outcome::SnatProtocol)]
fn what_has_no_ports_is_refused(#[case] protocol: u8, #[case] expected: Outcome) {
    let tables = tables();
    let mut bytes = Vec::new();
    Ipv4Header::new(20, 64, protocol.into(), FOREIGN, POD).unwrap().write(&mut bytes).unwrap();
    bytes.extend([0; 20]);
    assert_eq!(outcome(&tables, &from_client(&bytes)), expected);
    let mut bytes = Vec::new();
    Ipv4Header::new(20, 64, protocol.into(), POD, SNAT).unwrap().write(&mut bytes).unwrap();
    bytes.extend([0; 20]);
    assert_eq!(outcome(&tables, &from_pod(NODE, &bytes)), expected);
}

/// Changes a header and its checksum.
fn with_ip(packet: &[u8], change: impl FnOnce(&mut Ipv4Header)) -> Vec<u8> {
    let (mut ip, rest) = Ipv4Header::from_slice(packet).unwrap();
    change(&mut ip);
    let mut bytes = Vec::new();
    ip.write(&mut bytes).unwrap();
    bytes.extend(rest);
    bytes
}

#[test]
fn fragments_are_dropped_under_their_own_counter() {
    let tables = tables();
    let whole = packet(FOREIGN, POD, 64, Transport::Udp(5555, 53), &[7; 64]);
    let first = with_ip(&whole, |ip| ip.more_fragments = true);
    let later = with_ip(&whole, |ip| ip.fragment_offset = IpFragOffset::try_new(8).unwrap());
    for fragment in [first, later] {
        assert_eq!(outcome(&tables, &from_client(&fragment)), Outcome::SnatFragment);
    }
    sent(&tables, &from_client(&whole), Outcome::SnatNew);
    let reply = packet(POD, SNAT, 64, Transport::Udp(53, 5555), &[7; 64]);
    let first = with_ip(&reply, |ip| ip.more_fragments = true);
    assert_eq!(outcome(&tables, &from_pod(NODE, &first)), Outcome::SnatFragment);
}

#[test]
fn truncated_transport_headers_are_dropped() {
    let tables = tables();
    for transport in [Transport::Udp(1, 2), Transport::Tcp(1, 2, SYN, 0, 0), Transport::EchoRequest(1)] {
        let whole = packet(FOREIGN, POD, 64, transport, b"");
        let short = with_ip(&whole[..whole.len() - 1], |ip| ip.total_len -= 1);
        // Ethernet may pad; what the IP header does not count does not count.
        for padding in [0, 40] {
            let mut frame = from_client(&short);
            frame.extend(vec![0; padding]);
            assert_eq!(outcome(&tables, &frame), Outcome::SnatMalformed, "{transport:?}");
        }
    }
    let tcp = packet(FOREIGN, POD, 64, Transport::Tcp(1, 2, SYN, 0, 0), b"");
    for offset in [0, 4, 15] {
        let mut bytes = tcp.clone();
        bytes[32] = offset << 4;
        assert_eq!(outcome(&tables, &from_client(&bytes)), Outcome::SnatMalformed, "data offset {offset}");
    }
}

#[test]
fn what_does_not_fit_is_answered_or_dropped_but_never_passed() {
    let tables = tables();
    let large = packet(FOREIGN, POD, 64, Transport::Udp(5555, 53), &[7; 1430]);
    let unset = with_ip(&large, |ip| ip.dont_fragment = false);
    assert_eq!(outcome(&tables, &from_client(&unset)), Outcome::SnatOversize);
    let set = with_ip(&large, |ip| ip.dont_fragment = true);
    let (outcome, _, answer) = run(&tables, &from_client(&set));
    assert_eq!(outcome, Outcome::TooBigReply);
    // It quotes the packet as the client sent it.
    assert_eq!(answer[14 + 28..], set[..28]);
    // Without an address to answer from.
    let mut config = tables.config;
    config.address = Ipv4::UNSPECIFIED;
    let mute = HostTables { config, ..tables };
    assert_eq!(fixture_outcome(&mute, &from_client(&set)), Outcome::SnatOversize);
}

#[test]
fn a_pod_is_told_that_the_clients_link_is_narrow() {
    let mut tables = tables();
    let request = packet(FOREIGN, POD, 64, Transport::Udp(5555, 53), b"");
    sent(&tables, &from_client(&request), Outcome::SnatNew);
    tables.config.ports[3].mtu = 1000;
    let reply = packet(POD, SNAT, 64, Transport::Udp(53, 5555), &[7; 972]);
    sent(&tables, &from_pod(NODE, &reply), Outcome::SnatReply);
    let reply = packet(POD, SNAT, 64, Transport::Udp(53, 5555), &[7; 973]);
    let unset = with_ip(&reply, |ip| ip.dont_fragment = false);
    assert_eq!(outcome(&tables, &from_pod(NODE, &unset)), Outcome::SnatReplyOversize);
    let set = with_ip(&reply, |ip| ip.dont_fragment = true);
    let (outcome, action, after) = run(&tables, &from_pod(NODE, &set));
    assert_eq!((outcome, action), (Outcome::SnatTooBigReply, Action::Transmit));
    let needed =
        Icmpv4Type::DestinationUnreachable(etherparse::icmpv4::DestUnreachableHeader::FragmentationNeeded {
            next_hop_mtu: 1000,
        });
    let mut expected = error(SNAT, POD, 64, needed, &set[..28]);
    expected = with_ip(&expected, |ip| {
        ip.dscp = 48.try_into().unwrap();
        ip.dont_fragment = false;
    });
    assert_eq!(after[64..], expected);
    assert_eq!(after[..34], slot_frame(NODE, &after)[..34]);
    assert_eq!(u16::from_be_bytes([after[16], after[17]]), 20 + 30 + 56);
    tables.icmp_allowance.set(0);
    assert_eq!(fixture_outcome(&tables, &from_pod(NODE, &set)), Outcome::TooBigLimited);
}

use super::fixture::outcome as fixture_outcome;

#[test]
fn an_expiring_ttl_is_the_kernels_to_answer() {
    let tables = tables();
    let last = packet(FOREIGN, POD, 1, Transport::Udp(5555, 53), b"");
    assert_eq!(outcome(&tables, &from_client(&last)), Outcome::TtlExpired);
}

#[test]
fn to_a_snat_address_without_a_session() {
    let tables = tables();
    let stray = packet(POD, SNAT, 64, Transport::Udp(53, 5555), b"");
    assert_eq!(outcome(&tables, &from_pod(NODE, &stray)), Outcome::SnatNoSession);
    let error = error(
        POD,
        SNAT,
        64,
        Icmpv4Type::DestinationUnreachable(etherparse::icmpv4::DestUnreachableHeader::Port),
        &packet(SNAT, POD, 63, Transport::Udp(1, 2), b"")[..28],
    );
    assert_eq!(outcome(&tables, &from_pod(NODE, &error)), Outcome::SnatErrorUnrelated);
    let ping = packet(POD, SNAT, 64, Transport::EchoRequest(1), b"");
    assert_eq!(outcome(&tables, &from_pod(NODE, &ping)), Outcome::SnatProtocol);
    // A client of ours beside the SNAT addresses is routed as ever.
    let mut tables = tables;
    tables.config.overlays[0].snat_first = u32::from_be_bytes(CLIENT);
    tables.config.overlays[0].snat_span = 200;
    let reply = packet(POD, CLIENT, 64, Transport::Udp(53, 5555), b"");
    assert_eq!(outcome(&tables, &from_pod(NODE, &reply)), Outcome::Decap);
    let fragment = with_ip(&reply, |ip| ip.more_fragments = true);
    assert_eq!(outcome(&tables, &from_pod(NODE, &fragment)), Outcome::Decap);
}

#[test]
fn own_clients_and_those_of_route_rules_are_routed() {
    let mut tables = tables();
    let own = client_udp(64, 0, (5555, 53), b"hello");
    assert_eq!(outcome(&tables, &own), Outcome::Encap);
    tables.config.snat_rule_count = 2;
    tables.config.snat_rules[1] = tables.config.snat_rules[0];
    tables.config.snat_rules[0] = SnatRule {
        client: Ipv4::new([198, 51, 100, 0]),
        client_mask: Ipv4::new([255, 255, 255, 0]),
        destination: Ipv4::new([10, 244, 1, 0]),
        destination_mask: Ipv4::new([255, 255, 255, 0]),
        ..SnatRule::default()
    };
    let frame = from_client(&packet(FOREIGN, POD, 64, Transport::Udp(5555, 53), b"hello"));
    let (outcome, _, after) = run(&tables, &frame);
    assert_eq!(outcome, Outcome::Encap);
    assert_eq!(after[64..], packet(FOREIGN, POD, 63, Transport::Udp(5555, 53), b"hello"));
    // Another destination, another client: the next rule.
    let frame = from_client(&packet(FOREIGN, OTHER_POD, 64, Transport::Udp(5555, 53), b"hello"));
    assert_eq!(fixture_outcome(&tables, &frame), Outcome::SnatNew);
    let frame = from_client(&packet(client(1), POD, 64, Transport::Udp(5555, 53), b"hello"));
    assert_eq!(fixture_outcome(&tables, &frame), Outcome::SnatNew);
    // No rule at all.
    tables.config.snat_rule_count = 1;
    let frame = from_client(&packet(client(2), POD, 64, Transport::Udp(5555, 53), b"hello"));
    assert_eq!(fixture_outcome(&tables, &frame), Outcome::ClientForeign);
}

#[test]
fn a_reset_opens_nothing() {
    let tables = tables();
    assert_eq!(outcome(&tables, &tcp(FOREIGN, 5555, RST, 1, 0)), Outcome::SnatNoSession);
    assert!(tables.sessions.reverse.borrow().is_empty());
}

#[test]
fn established_sessions_are_never_evicted_and_others_are() {
    let mut tables = tables();
    tables.config.session_slots = 8;
    for number in 0..6 {
        connect(&tables, client(number), 1000 + u16::from(number));
    }
    // Far more half-open ones than slots: each takes the place of an earlier one.
    for number in 0..200 {
        wait(&tables, 1);
        let frame = tcp(client(100), 2000 + number, SYN, 1, 0);
        let outcome = outcome(&tables, &frame);
        assert_eq!(outcome, Outcome::SnatNew, "{number}");
        assert!(tables.sessions.reverse.borrow().len() <= 8);
    }
    assert!(events(&tables, SessionEvent::Evicted) >= 190);
    for number in 0..6 {
        sent(&tables, &tcp(client(number), 1000 + u16::from(number), ACK, 101, 501), Outcome::SnatForward);
    }
    assert_consistent(&tables);
    // All established: there is no room.
    for number in 6..8 {
        connect(&tables, client(number), 1000 + u16::from(number));
    }
    assert_eq!(outcome(&tables, &tcp(client(9), 4000, SYN, 1, 0)), Outcome::SnatTableFull);
    // Until they expire, and nobody removed them.
    wait(&tables, ticks(7441));
    sent(&tables, &tcp(client(9), 4000, SYN, 1, 0), Outcome::SnatNew);
    assert_eq!(events(&tables, SessionEvent::Reclaimed), 1);
    assert_consistent(&tables);
}

#[test]
fn the_oldest_half_open_session_goes_first() {
    let mut tables = tables();
    tables.config.session_slots = 7;
    for number in 0..7 {
        wait(&tables, ticks(1));
        sent(&tables, &tcp(client(number), 1000 + u16::from(number), SYN, 1, 0), Outcome::SnatNew);
    }
    wait(&tables, ticks(1));
    // The first sends its SYN again; the second is the oldest now.
    sent(&tables, &tcp(client(0), 1000, SYN, 1, 0), Outcome::SnatForward);
    sent(&tables, &tcp(client(50), 5000, SYN, 1, 0), Outcome::SnatNew);
    let clients: Vec<_> = tables.sessions.forward.borrow().keys().map(|key| key.client.octets[3]).collect();
    assert_eq!(clients, [0, 2, 3, 4, 5, 6, 50]);
    assert_consistent(&tables);
}

/// One address, one pod port: 65,536 ports are too many for a test, so the candidates of one tuple are filled.
#[test]
fn a_port_is_taken_from_the_expired_then_from_the_half_open_never_from_the_living() {
    let tables = tables();
    // As many clients as find candidates, all with the same port.
    connect(&tables, client(1), 5555);
    wait(&tables, ticks(7441));
    let there = sent(&tables, &tcp(client(2), 5555, SYN, 1, 0), Outcome::SnatNew);
    assert_eq!(source_of(&there), (SNAT, 5555), "the port of the expired session");
    assert_eq!(events(&tables, SessionEvent::Reclaimed), 1);
    let there = sent(&tables, &tcp(client(3), 5555, SYN, 1, 0), Outcome::SnatNew);
    assert_ne!(source_of(&there).1, 5555, "a half-open session keeps its port while others are free");
    assert_consistent(&tables);
}

#[test]
fn pools_spread_clients_over_addresses_and_keep_them_there() {
    let mut tables = tables();
    tables.config.snat_rules[0].count = 2;
    let mut used = std::collections::BTreeSet::new();
    for number in 0..32 {
        let mut addresses = std::collections::BTreeSet::new();
        for port in 0..2 {
            let request = Transport::Udp(7000 + u16::from(number) * 10 + port, 53);
            let frame = from_client(&packet(client(number), POD, 64, request, b""));
            addresses.insert(source_of(&sent(&tables, &frame, Outcome::SnatNew)).0);
        }
        assert_eq!(addresses.len(), 1, "a client keeps its address");
        used.extend(addresses);
    }
    assert_eq!(used, [SNAT, SNAT_OTHER].into());
}

#[test]
fn a_pod_that_moves_keeps_its_sessions() {
    let mut tables = tables();
    connect(&tables, FOREIGN, 5555);
    // As the daemon does it: the pod's entry, then the generation of the VTEP that it left.
    let key = crate::abi::OverlayAddress { overlay: 0, address: Ipv4::new(POD) };
    tables.pods.insert(key, Route::to(OTHER_ID));
    tables.vteps.get_mut(&NODE_ID).unwrap().generation += 1;
    let (outcome, _, after) = run(&tables, &tcp(FOREIGN, 5555, ACK, 101, 501));
    assert_eq!(outcome, Outcome::SnatForward);
    assert_eq!(after[..34], slot_frame(OTHER_NODE, &after)[..34]);
    let reply = packet(POD, SNAT, 64, Transport::Tcp(80, 5555, ACK, 501, 101), b"");
    assert_eq!(fixture_outcome(&tables, &from_pod(NODE, &reply)), Outcome::SnatReplySource);
    sent(&tables, &from_pod(OTHER_NODE, &reply), Outcome::SnatReply);
    assert_eq!(phase(&tables), Phase::Live);
    assert_consistent(&tables);
}

/// The outer headers to this node, with the length and checksum of `frame`.
fn slot_frame(node: [u8; 4], frame: &[u8]) -> Vec<u8> {
    let mut header = slot(node, 0, false).header.to_vec();
    header[16..18].copy_from_slice(&frame[16..18]);
    let sum = crate::checksum::Sum::of(&header[14..34]).checksum();
    header[24..26].copy_from_slice(&sum);
    header
}

/// The pod answers first from its new node.
#[test]
fn a_reply_from_the_pods_new_node_is_believed_if_the_tables_say_so() {
    let mut tables = tables();
    connect(&tables, FOREIGN, 5555);
    let reply = packet(POD, SNAT, 64, Transport::Tcp(80, 5555, ACK, 501, 101), b"");
    assert_eq!(outcome(&tables, &from_pod(OTHER_NODE, &reply)), Outcome::SnatReplySource);
    let key = crate::abi::OverlayAddress { overlay: 0, address: Ipv4::new(POD) };
    tables.pods.insert(key, Route::to(OTHER_ID));
    sent(&tables, &from_pod(OTHER_NODE, &reply), Outcome::SnatReply);
}

#[test]
fn a_session_whose_pod_is_gone_ends() {
    let mut tables = tables();
    connect(&tables, FOREIGN, 5555);
    tables.pods.clear();
    tables.prefixes.clear();
    tables.vteps.get_mut(&NODE_ID).unwrap().generation += 1;
    assert_eq!(outcome(&tables, &tcp(FOREIGN, 5555, ACK, 101, 501)), Outcome::SnatPodGone);
    assert!(tables.sessions.reverse.borrow().is_empty() && tables.sessions.forward.borrow().is_empty());
    assert_eq!(events(&tables, SessionEvent::Flushed), 1);
}

#[test]
fn answers_follow_the_client_to_another_router() {
    let tables = tables();
    connect(&tables, FOREIGN, 5555);
    let other = [0x52, 0x54, 0, 0, 0, 0x99];
    let mut frame = ethernet(NIC, other, 0x8100, &[0, 42, 8, 0]);
    let mut config = tables.config;
    config.vlan_count = 1;
    config.vlans[0] = crate::abi::VlanPort { vlan: 42, roles: crate::abi::Roles::EXTERNAL };
    let tables = HostTables { config, ..tables };
    frame.extend(packet(FOREIGN, POD, 64, Transport::Tcp(5555, 80, ACK, 101, 501), b""));
    assert_eq!(outcome(&tables, &frame), Outcome::SnatForward);
    let (outcome, _, after) = run(&tables, &tcp_reply(5555, ACK, 501, 101));
    assert_eq!(outcome, Outcome::SnatReply);
    assert_eq!(after[..18], ethernet(other, NIC, 0x8100, &[0, 42, 8, 0])[..]);
    let hop = tables.sessions.reverse.borrow().values().next().unwrap().last_hop();
    assert_eq!(hop, LastHop::new(Mac::new(other), 3, 42));
}

#[test]
fn the_clients_interface_is_gone() {
    let mut tables = tables();
    connect(&tables, FOREIGN, 5555);
    tables.config.ports[3].ifindex = 0;
    assert_eq!(outcome(&tables, &tcp_reply(5555, ACK, 501, 101)), Outcome::SnatNoPort);
}

#[test]
fn the_sweep_removes_what_is_expired_or_all() {
    let tables = tables();
    connect(&tables, client(1), 1001);
    sent(&tables, &tcp(client(2), 1002, SYN, 1, 0), Outcome::SnatNew);
    let keys: Vec<ReverseKey> = tables.sessions.reverse.borrow().keys().copied().collect();
    let swept = |mode| keys.iter().filter(|key| sweep(&tables, key, mode)).count();
    assert_eq!(swept(SweepMode::EXPIRED), 0);
    // Exactly at its timeout a session still lives.
    wait(&tables, ticks(60));
    assert_eq!(swept(SweepMode::EXPIRED), 0);
    wait(&tables, 1);
    assert_eq!(swept(SweepMode::EXPIRED), 1);
    assert_eq!(phase(&tables), Phase::Live);
    // The later packet of either side counts.
    wait(&tables, ticks(7000));
    sent(&tables, &tcp_reply(1001, ACK, 501, 101), Outcome::SnatReply);
    wait(&tables, ticks(7000));
    assert_eq!(swept(SweepMode::EXPIRED), 0);
    assert_eq!(swept(SweepMode::ALL), 1);
    assert!(tables.sessions.reverse.borrow().is_empty() && tables.sessions.forward.borrow().is_empty());
    assert_eq!(events(&tables, SessionEvent::Expired), 1);
    assert_eq!(events(&tables, SessionEvent::Flushed), 1);
}

#[test]
fn a_session_that_got_stuck_half_made_is_removed_after_a_while() {
    let tables = tables();
    sent(&tables, &tcp(client(1), 1001, SYN, 1, 0), Outcome::SnatNew);
    for phase in [Phase::Claimed, Phase::Dead] {
        sent(&tables, &tcp(client(2), 1002, SYN, 1, 0), Outcome::SnatNew);
        let (key, stuck) = tables
            .sessions
            .reverse
            .borrow()
            .iter()
            .find(|(key, _)| key.port.get() == 1002)
            .map(|(key, entry)| (*key, entry.clone()))
            .unwrap();
        let since = State::new(phase).expecting(tables.sessions.now.get());
        assert!(stuck.exchange(stuck.state(), since));
        assert!(!sweep(&tables, &key, SweepMode::ALL), "somebody is at work on it");
        wait(&tables, ticks(6));
        assert!(sweep(&tables, &key, SweepMode::EXPIRED));
        assert_eq!(tables.sessions.reverse.borrow().len(), 1);
    }
}

/// From outside a SNAT address is taken, and nobody is there.
#[test]
fn snat_addresses_seen_from_outside() {
    let tables = tables();
    for source in [FOREIGN, CLIENT] {
        let ping = packet(source, SNAT, 64, Transport::EchoRequest(1), b"");
        assert_eq!(outcome(&tables, &from_client(&ping)), Outcome::SnatNoSession);
    }
    let arp = |target: [u8; 4]| {
        let mut bytes = vec![0, 1, 8, 0, 6, 4, 0, 1];
        bytes.extend(CLIENT_NIC);
        bytes.extend([CLIENT, [0; 4]].concat());
        bytes.extend([0; 2]);
        bytes.extend(target);
        ethernet([0xff; 6], CLIENT_NIC, 0x0806, &bytes)
    };
    assert_eq!(outcome(&tables, &arp(SNAT)), Outcome::ArpReply);
    assert_eq!(outcome(&tables, &arp(CLIENT)), Outcome::ArpOther);
}

/// RFC 1812 section 5.3.7: such packets are forged, and their answers would reach others.
#[rstest::rstest]
#[case::this_network([0, 1, 2, 3])]
#[case::loopback([127, 0, 0, 1])]
#[case::multicast([224, 0, 0, 1])]
#[case::broadcast([255; 4])]
fn a_source_that_no_host_has_opens_nothing(#[case] source: [u8; 4]) {
    let tables = tables();
    for transport in
        [Transport::Udp(5555, 53), Transport::Tcp(5555, 80, SYN, 1, 0), Transport::EchoRequest(1)]
    {
        let frame = from_client(&packet(source, POD, 64, transport, b""));
        assert_eq!(outcome(&tables, &frame), Outcome::SnatSource);
    }
    assert!(tables.sessions.reverse.borrow().is_empty());
}

/// Whoever sends with a SNAT address would speak for the client that has its port.
#[test]
fn a_snat_address_sends_nothing_from_outside() {
    let tables = tables();
    connect(&tables, FOREIGN, 5555);
    let forged = packet(SNAT, POD, 64, Transport::Tcp(5555, 80, RST, 101, 501), b"");
    assert_eq!(outcome(&tables, &from_client(&forged)), Outcome::SnatSource);
    // Also where nobody is translated any more, and a session drains.
    let mut tables = tables;
    tables.config.snat_rule_count = 0;
    assert_eq!(fixture_outcome(&tables, &from_client(&forged)), Outcome::SnatSource);
    // Beside them there are clients.
    let own = packet(CLIENT, POD, 64, Transport::Udp(1, 2), b"");
    assert_eq!(fixture_outcome(&tables, &from_client(&own)), Outcome::Encap);
}

/// Answers are sent to one station.
#[test]
fn a_group_as_last_hop_is_refused() {
    let tables = tables();
    let syn = packet(FOREIGN, POD, 64, Transport::Tcp(5555, 80, SYN, 1, 0), b"");
    for group in [[0xff; 6], [1, 0, 0x5e, 0, 0, 1]] {
        let frame = ethernet(NIC, group, 0x0800, &syn);
        assert_eq!(outcome(&tables, &frame), Outcome::SnatSource, "it opens no session");
    }
    sent(&tables, &from_client(&syn), Outcome::SnatNew);
    let frame = ethernet(NIC, [0xff; 6], 0x0800, &syn);
    assert_eq!(outcome(&tables, &frame), Outcome::SnatSource, "nor does a session move there");
    sent(&tables, &tcp_reply(5555, SYN | ACK, 500, 2), Outcome::SnatReply);
}

/// A pod elsewhere knows, or guesses, addresses and ports of a session.
#[test]
fn errors_about_a_session_come_from_its_pods_node() {
    let tables = tables();
    connect(&tables, FOREIGN, 5555);
    let about = packet(SNAT, POD, 63, Transport::Tcp(5555, 80, ACK, 101, 501), b"");
    let kind = Icmpv4Type::DestinationUnreachable(etherparse::icmpv4::DestUnreachableHeader::Port);
    let by = |source| error(source, SNAT, 64, kind.clone(), &about[..28]);
    for source in [OTHER_POD, POD] {
        assert_eq!(outcome(&tables, &from_pod(OTHER_NODE, &by(source))), Outcome::SnatReplySource);
    }
    sent(&tables, &from_pod(NODE, &by(POD)), Outcome::SnatErrorReply);
}

/// Whoever forges sources can go on after an answer that he never sees.
#[test]
fn echo_never_keeps_a_new_client_out() {
    let mut tables = tables();
    tables.config.session_slots = 8;
    for id in 1..=200 {
        wait(&tables, 1);
        let request = from_client(&packet(client(7), POD, 64, Transport::EchoRequest(id), b""));
        sent(&tables, &request, Outcome::SnatNew);
        sent(
            &tables,
            &from_pod(NODE, &packet(POD, SNAT, 64, Transport::EchoReply(id), b"")),
            Outcome::SnatReply,
        );
        sent(&tables, &request, Outcome::SnatForward);
    }
    assert!(events(&tables, SessionEvent::Evicted) >= 192);
    assert_consistent(&tables);
}

/// Opens a UDP session whose port is kept, and goes on after an answer.
fn converse(tables: &HostTables, client: [u8; 4], port: u16) {
    let request = from_client(&packet(client, POD, 64, Transport::Udp(port, 53), b"q"));
    let reply = from_pod(NODE, &packet(POD, SNAT, 64, Transport::Udp(53, port), b"a"));
    sent(tables, &request, Outcome::SnatNew);
    sent(tables, &reply, Outcome::SnatReply);
    sent(tables, &request, Outcome::SnatForward);
}

#[test]
fn quiet_udp_gives_way_when_nothing_else_can() {
    let mut tables = tables();
    tables.config.session_slots = 7;
    connect(&tables, client(1), 1001);
    for number in 2..8 {
        converse(&tables, client(number), 1000 + u16::from(number));
    }
    wait(&tables, ticks(30));
    assert_eq!(outcome(&tables, &tcp(client(20), 4000, SYN, 1, 0)), Outcome::SnatTableFull);
    wait(&tables, 1);
    // One goes on, one half-open session comes in the place of another: that is taken before any UDP.
    let going_on = from_client(&packet(client(2), POD, 64, Transport::Udp(1002, 53), b"q"));
    sent(&tables, &going_on, Outcome::SnatForward);
    sent(&tables, &tcp(client(20), 4000, SYN, 1, 0), Outcome::SnatNew);
    wait(&tables, 1);
    sent(&tables, &tcp(client(21), 4001, SYN, 1, 0), Outcome::SnatNew);
    let clients: Vec<_> = tables.sessions.forward.borrow().keys().map(|key| key.client.octets[3]).collect();
    assert_eq!(clients.len(), 7);
    assert!(clients.contains(&1) && clients.contains(&2) && clients.contains(&21), "{clients:?}");
    assert!(!clients.contains(&20), "{clients:?}");
    assert_consistent(&tables);
}

/// All ports that a flow would try are taken; a second later it tries others.
#[test]
fn who_finds_no_port_tries_others_when_he_sends_again() {
    let mut tables = tables();
    tables.config.session_slots = 1 << 10;
    let syn = tcp(FOREIGN, 5555, SYN, 1, 0);
    let mut taken = 0;
    while outcome(&tables, &syn) == Outcome::SnatNew {
        taken += 1;
        // Somebody else's from now on, and established.
        let sessions = &tables.sessions;
        sessions.forward.borrow_mut().clear();
        for (key, entry) in sessions.reverse.borrow().iter() {
            assert!(
                entry.state().phase() == Phase::Live
                    || entry.exchange(entry.state(), State::new(Phase::Live))
            );
            assert_eq!(key.address, Ipv4::new(SNAT));
        }
    }
    assert_eq!(taken, 17, "the client's own port and 16 more");
    assert_eq!(outcome(&tables, &syn), Outcome::SnatPortsExhausted);
    wait(&tables, ticks(2));
    sent(&tables, &syn, Outcome::SnatNew);
}
