//! What is measured: which frames go to which program, and what must become of them.

use gateway_common::{
    abi::Outcome,
    wire::{Ipv4, Mac},
};

use crate::{
    bench::{
        driver::{self, Feed, Shape},
        flow::{
            CLIENT_MAC, Flow, Kind, POD, ROUTER_MAC, UNKNOWN_POD, cidr, endpoint, node_mac, own_client,
            plain, plain_out, tunnelled, tunnelled_from, tunnelled_out,
        },
        place::{Place, Side},
    },
    packet::{ARP, Arp, Ip, Link},
};

/// What XDP programs return (Linux `include/uapi/linux/bpf.h`, `enum xdp_action`).
pub(super) const XDP_DROP: u32 = 1;
const XDP_TX: u32 = 3;
const XDP_REDIRECT: u32 = 4;

/// Ports of flows that are there from the beginning, and of those that are opened by `program.snat.new`.
const FIRST_PORT: u16 = 16_384;
const FIRST_NEW_PORT: u16 = 32_768;
/// How many sessions `program.snat.new` opens at most in one run.
pub(super) const NEW_FLOWS: u32 = 65_536;

/// Which program, and how it shows that it did its work.
#[derive(Clone, Copy, Debug)]
pub(super) enum Subject {
    /// The gateway's: every packet is counted under this outcome.
    Gateway(Side, Outcome),
    /// A reference, by its name in the object.
    Reference(&'static str),
}

/// One row of the result.
pub(super) struct Case {
    pub(super) name: &'static str,
    pub(super) reference: &'static str,
    pub(super) subject: Subject,
    pub(super) returned: u32,
    pub(super) feed: fn(&Place) -> Feed,
    /// What must become of the frame of a flow, given what became of it: the UDP source port is the program's choice.
    pub(super) output: fn(&Place, Flow, &[u8]) -> Vec<u8>,
}

impl Case {
    /// Whether every packet opens a session, which must be ended before the next run.
    pub(super) fn opens_sessions(&self) -> bool {
        matches!(self.subject, Subject::Gateway(_, Outcome::SnatNew))
    }

    /// Whether every packet is answered by an ICMP error, of which a CPU may send but a few.
    pub(super) fn sends_errors(&self) -> bool {
        matches!(self.subject, Subject::Gateway(_, Outcome::TooBigReply))
    }
}

const REFERENCE_DROP: &str = "program.reference.drop";
const REFERENCE_TX: &str = "program.reference.tx";
const REFERENCE_ENCAP: &str = "program.reference.encap";
const REFERENCE_DECAP: &str = "program.reference.decap";

/// The reference that is called without a driver: see [`driver::Reference::floor`].
pub(super) const FLOOR: &str = REFERENCE_DROP;

/// Every case, but the floor.
pub(super) const CASES: [Case; 19] = [
    Case {
        name: REFERENCE_TX,
        reference: REFERENCE_DROP,
        subject: Subject::Reference(driver::TX),
        returned: XDP_TX,
        feed: routed,
        output: |place, flow, _| swapped(&plain(place.external_mac, &routed_packet(flow))),
    },
    Case {
        name: REFERENCE_ENCAP,
        reference: REFERENCE_DROP,
        subject: Subject::Reference(driver::ENCAP),
        returned: XDP_REDIRECT,
        feed: routed,
        output: |place, flow, output| {
            tunnelled_out(place.underlay_mac, flow.node, &routed_packet(flow), source_port(output))
        },
    },
    Case {
        name: REFERENCE_DECAP,
        reference: REFERENCE_DROP,
        subject: Subject::Reference(driver::DECAP),
        returned: XDP_REDIRECT,
        feed: returning,
        output: |place, flow, _| Link::new(ROUTER_MAC, place.underlay_mac).ip(&returning_packet(flow)),
    },
    piece("program.piece.redirect", driver::REDIRECT, XDP_REDIRECT),
    piece("program.piece.head", driver::HEAD, XDP_DROP),
    piece("program.piece.hash", driver::HASH, XDP_DROP),
    piece("program.piece.time", driver::TIME, XDP_DROP),
    piece("program.piece.length", driver::LENGTH, XDP_DROP),
    piece("program.piece.fib", driver::FIB, XDP_DROP),
    Case {
        name: "program.arp",
        reference: REFERENCE_TX,
        subject: Subject::Gateway(Side::External, Outcome::ArpReply),
        returned: XDP_TX,
        feed: |place| still(place, arp(Link::new(Mac::BROADCAST, CLIENT_MAC), arp_request()), (0, 0)),
        output: |place, _, _| {
            let link = Link::new(CLIENT_MAC, place.external_mac);
            arp(link, arp_request().answered(place.external_mac))
        },
    },
    Case {
        name: "program.encap.pod",
        reference: REFERENCE_ENCAP,
        subject: Subject::Gateway(Side::External, Outcome::Encap),
        returned: XDP_REDIRECT,
        feed: routed,
        output: encapsulated,
    },
    Case {
        name: "program.encap.prefix",
        reference: REFERENCE_ENCAP,
        subject: Subject::Gateway(Side::External, Outcome::Encap),
        returned: XDP_REDIRECT,
        feed: |place| {
            let flow = Flow::new(0, UNKNOWN_POD, FIRST_PORT);
            let frame = plain(place.external_mac, &routed_packet(flow));
            Feed { pod: Ipv4::new(flow.pod), frame, ..routed(place) }
        },
        output: encapsulated,
    },
    Case {
        name: "program.decap",
        reference: REFERENCE_DECAP,
        subject: Subject::Gateway(Side::Underlay, Outcome::Decap),
        returned: XDP_REDIRECT,
        feed: returning,
        output: |place, flow, _| plain_out(place.external_mac, &returning_packet(flow).hop()),
    },
    Case {
        name: "program.snat.new",
        reference: REFERENCE_ENCAP,
        subject: Subject::Gateway(Side::External, Outcome::SnatNew),
        returned: XDP_REDIRECT,
        feed: |place| Feed { flows: NEW_FLOWS, ..segment(place, Kind::Syn, FIRST_NEW_PORT) },
        output: |place, flow, output| translated(place, flow, Kind::Syn, output),
    },
    Case {
        name: "program.snat.established",
        reference: REFERENCE_ENCAP,
        subject: Subject::Gateway(Side::External, Outcome::SnatForward),
        returned: XDP_REDIRECT,
        feed: |place| segment(place, Kind::Data, FIRST_PORT),
        output: |place, flow, output| translated(place, flow, Kind::Data, output),
    },
    Case {
        name: "program.snat.reply",
        reference: REFERENCE_DECAP,
        subject: Subject::Gateway(Side::Underlay, Outcome::SnatReply),
        returned: XDP_REDIRECT,
        feed: |place| answer(place, Kind::Data),
        output: |place, flow, _| {
            plain_out(place.external_mac, &flow.downstream(place.clients[flow.client], Kind::Data).hop())
        },
    },
    Case {
        name: "program.too-big",
        reference: REFERENCE_TX,
        subject: Subject::Gateway(Side::External, Outcome::TooBigReply),
        returned: XDP_TX,
        feed: |place| {
            let frame = plain(place.external_mac, &oversize());
            // 28 bytes in front, and 42 of the frame are left.
            let tail = i32::try_from(frame.len()).expect("a frame") - 42;
            still(place, frame, (28, tail))
        },
        output: |place, _, _| {
            let reply = Ip::too_big([10, 244, 30, 1], &oversize(), 1450);
            plain_out(place.external_mac, &reply)
        },
    },
    Case {
        name: "program.drop.unknown-vtep",
        reference: REFERENCE_DROP,
        subject: Subject::Gateway(Side::Underlay, Outcome::OuterSource),
        returned: XDP_DROP,
        feed: |place| still(place, from_stranger(place), (0, 0)),
        output: |place, _, _| from_stranger(place),
    },
    Case {
        name: "program.drop.no-session",
        reference: REFERENCE_DROP,
        subject: Subject::Gateway(Side::Underlay, Outcome::SnatNoSession),
        returned: XDP_DROP,
        feed: |place| still(place, without_session(place), (0, 0)),
        output: |place, _, _| without_session(place),
    },
];

/// A program of the reference object that does one thing and leaves the frame as it is.
const fn piece(name: &'static str, program: &'static str, returned: u32) -> Case {
    Case {
        name,
        reference: REFERENCE_DROP,
        subject: Subject::Reference(program),
        returned,
        feed: routed,
        output: |place, flow, _| plain(place.external_mac, &routed_packet(flow)),
    }
}

/// The flow with this number of a case.
pub(super) fn flow(feed: &Feed, number: u32) -> Flow {
    Flow::new(number, feed.pod.octets[3], feed.first_port)
}

fn feed(place: &Place, shape: Shape, frame: Vec<u8>) -> Feed {
    let [a, b, c, _] = cidr(0).octets;
    Feed {
        shape,
        frame,
        undo: match shape {
            Shape::Still => (0, 0),
            Shape::Client => (50, 0),
            Shape::Node => (-50, 0),
        },
        flows: if shape == Shape::Still { 1 } else { place.scale.flows },
        clients: std::array::from_fn(own_client),
        first_port: FIRST_PORT,
        pod: Ipv4::new([a, b, c, POD]),
        nodes: [0, 1].map(|node| (endpoint(node), node_mac(node))),
    }
}

fn still(place: &Place, frame: Vec<u8>, undo: (i32, i32)) -> Feed {
    Feed { undo, ..feed(place, Shape::Still, frame) }
}

/// Segments of clients that pods can answer.
fn routed(place: &Place) -> Feed {
    let packet = routed_packet(Flow::new(0, POD, FIRST_PORT));
    feed(place, Shape::Client, plain(place.external_mac, &packet))
}

/// What the gateway makes of them.
fn encapsulated(place: &Place, flow: Flow, output: &[u8]) -> Vec<u8> {
    tunnelled_out(place.underlay_mac, flow.node, &routed_packet(flow).hop(), source_port(output))
}

fn routed_packet(flow: Flow) -> Ip {
    flow.upstream(own_client(flow.client), Kind::Data)
}

/// Segments of pods to clients that they can answer.
fn returning(place: &Place) -> Feed {
    let packet = returning_packet(Flow::new(0, POD, FIRST_PORT));
    feed(place, Shape::Node, tunnelled(place.underlay_mac, 0, &packet))
}

fn returning_packet(flow: Flow) -> Ip {
    flow.downstream(own_client(flow.client), Kind::Data)
}

/// Segments of clients that are translated.
pub(super) fn segment(place: &Place, kind: Kind, first_port: u16) -> Feed {
    let flow = Flow::new(0, POD, first_port);
    let packet = flow.upstream(place.clients[flow.client], kind);
    let frame = plain(place.external_mac, &packet);
    Feed { clients: place.clients, first_port, ..feed(place, Shape::Client, frame) }
}

/// Segments of pods to SNAT addresses.
pub(super) fn answer(place: &Place, kind: Kind) -> Feed {
    let flow = Flow::new(0, POD, FIRST_PORT);
    let packet = flow.downstream(place.snat[flow.client], kind);
    let frame = tunnelled(place.underlay_mac, 0, &packet);
    Feed { clients: place.snat, ..feed(place, Shape::Node, frame) }
}

/// Segments by which the sessions of a world are opened and confirmed, in this order.
pub(super) fn handshake(place: &Place) -> [(Side, Outcome, Feed); 3] {
    [
        (Side::External, Outcome::SnatNew, segment(place, Kind::Syn, FIRST_PORT)),
        (Side::Underlay, Outcome::SnatReply, answer(place, Kind::Syn)),
        (Side::External, Outcome::SnatForward, segment(place, Kind::Ack, FIRST_PORT)),
    ]
}

fn translated(place: &Place, flow: Flow, kind: Kind, output: &[u8]) -> Vec<u8> {
    let packet = flow.upstream(place.snat[flow.client], kind).hop();
    tunnelled_out(place.underlay_mac, flow.node, &packet, source_port(output))
}

fn arp_request() -> Arp {
    Arp::request(CLIENT_MAC, own_client(0).octets, Flow::new(0, POD, FIRST_PORT).pod)
}

/// Padded to the least that Ethernet carries.
fn arp(link: Link, packet: Arp) -> Vec<u8> {
    link.frame(ARP, &[packet.bytes(), vec![0; 18]].concat())
}

/// A datagram that fills the client's link, which is too much for the tunnel.
fn oversize() -> Ip {
    let flow = Flow::new(0, POD, FIRST_PORT);
    let data = [0; 1500 - 28];
    let packet = Ip::udp(own_client(0).octets, flow.pod, (flow.port, 80), &data);
    Ip { dont_fragment: true, ..packet }
}

/// From an address that is no node's.
fn from_stranger(place: &Place) -> Vec<u8> {
    let packet = returning_packet(Flow::new(0, POD, FIRST_PORT));
    tunnelled_from(place.underlay_mac, Ipv4::new([203, 0, 113, 9]), node_mac(0), &packet)
}

/// To a SNAT address, from a port that nobody asked.
fn without_session(place: &Place) -> Vec<u8> {
    let flow = Flow::new(0, POD, 1);
    tunnelled(place.underlay_mac, 0, &flow.downstream(place.snat[0], Kind::Data))
}

/// What `XDP_TX` with swapped MAC addresses gives.
fn swapped(frame: &[u8]) -> Vec<u8> {
    [&frame[6..12], &frame[..6], &frame[12..]].concat()
}

/// The outer UDP source port of a frame, if RFC 7348 section 5 recommends it; else 0, which is in no frame.
fn source_port(output: &[u8]) -> u16 {
    match output.get(34..36) {
        Some(&[high, low]) if high >= 0xc0 => u16::from_be_bytes([high, low]),
        _ => 0,
    }
}
