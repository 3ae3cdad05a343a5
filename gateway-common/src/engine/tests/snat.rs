//! Translated connections, packet by packet. Expected packets are made by etherparse from new addresses and ports:
//! checksums that were updated must equal those that are computed.

use etherparse::{
    IcmpEchoHeader, Icmpv4Header, Icmpv4Type, IpNumber, Ipv4Header, PacketBuilder, SlicedPacket,
    TransportSlice,
};
use proptest::prelude::*;

use super::fixture::*;
use crate::{
    abi::{LocalAddress, Outcome, Phase, Port, SessionEvent, SnatRule, State, Timeouts, ticks},
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
        prop_assume!(!tables.config.is_own(Ipv4::new(client)));
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
