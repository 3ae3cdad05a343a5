//! End to end: clients and the pods of a flannel cluster, through the gateway that users run. What arrives is looked at on
//! the wire at the far end.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::Ipv4Addr,
    path::PathBuf,
    time::Duration,
};

use etherparse::{Ethernet2Header, Ipv4Header};
use gateway_common::{
    abi::{Class, Outcome, VERSION, map},
    wire::Mac,
};
use gateway_tests::lab::{
    Flannel, Gateway, Host, capture,
    flannel::{
        EXTERNAL, GATEWAY_ENDPOINT, GATEWAY_ROUTER, GATEWAY_VTEP, INNER_MTU, NIC, Node, PORT, UNDERLAY,
    },
    frames::{self, Datagram, INNER, INNER_IP, IP, TUNNEL, UDP},
    gateway::UNTRANSLATED,
    traffic::{self, Transport},
    wait_until,
};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(5);
/// UDP port of datagrams built by hand.
const MARK: u16 = 9999;

/// The lab with a gateway that reaches all nodes.
struct Rig {
    gateway: Gateway,
    lab: Flannel,
}

impl Rig {
    fn start(label: &str) -> Self {
        Self::configured(label, "")
    }

    /// With keys at the end of the configuration.
    fn configured(label: &str, keys: &str) -> Self {
        let lab = Flannel::start(label).unwrap();
        let configuration = fs::read_to_string(lab.config()).unwrap();
        fs::write(lab.config(), configuration + keys).unwrap();
        let gateway = Gateway::start(&lab).unwrap();
        gateway.wait_ready(&lab).unwrap();
        Self { gateway, lab }
    }

    fn counters(&self) -> BTreeMap<String, u64> {
        self.gateway.counters(self.lab.gateway()).unwrap()
    }

    fn counter(&self, outcome: Outcome) -> u64 {
        self.counters()[label(outcome)]
    }

    /// Drops since `before`, by label.
    fn drops_since(&self, before: &BTreeMap<String, u64>) -> BTreeMap<String, u64> {
        let now = self.counters();
        let drops = Outcome::TABLE.iter().filter(|row| row.class == Class::Drop);
        drops
            .map(|row| (row.label.to_owned(), now[row.label] - before.get(row.label).copied().unwrap_or(0)))
            .filter(|(_, count)| *count > 0)
            .collect()
    }

    fn client_address(&self, number: u8) -> Ipv4Addr {
        self.lab.client(number).address(NIC).unwrap()
    }

    /// What `node`'s first pod sends to the first client, in the tunnel.
    fn to_client(&self, node: Node) -> Vec<u8> {
        let packet = Datagram {
            from: (node.pod_address(1), 4000),
            to: (self.client_address(1), MARK),
            ttl: 63,
            ecn: 0,
            payload: b"from a pod".to_vec(),
        };
        frames::tunnelled(node, self.lab.gateway().mac(UNDERLAY).unwrap(), 0, &packet.packet().unwrap())
            .unwrap()
    }

    /// What a client sends to a pod, on the client LAN.
    fn to_pod(&self, client: u8, packet: &Datagram) -> Vec<u8> {
        let source = self.lab.client(client).mac(NIC).unwrap();
        frames::ethernet(
            source,
            self.lab.gateway().mac(EXTERNAL).unwrap(),
            frames::IPV4,
            &packet.packet().unwrap(),
        )
    }
}

fn label(outcome: Outcome) -> &'static str {
    Outcome::by_number(outcome.number()).unwrap().label
}

fn assert_answered(from: &Host, to: Ipv4Addr, options: &[&str]) {
    let pings = traffic::ping(from, to, 5, options).unwrap();
    assert_eq!(pings.received, 5, "{} to {to}: {pings:?}", from.name());
}

fn ipv4_of(frame: &[u8]) -> (Ethernet2Header, Ipv4Header, Vec<u8>) {
    let (ethernet, rest) = Ethernet2Header::from_slice(frame).unwrap();
    let (ip, payload) = Ipv4Header::from_slice(rest).unwrap();
    (ethernet, ip, payload.to_vec())
}

#[test]
fn every_client_and_every_node_reach_each_other() {
    let rig = Rig::start("traffic");
    let before = rig.counters();
    for node in rig.lab.nodes() {
        for client in [1, 2] {
            for pod in [1, 2] {
                assert_answered(rig.lab.client(client), node.pod_address(pod), &[]);
                assert_answered(rig.lab.pod(node, pod), rig.client_address(client), &[]);
            }
        }
        let (client, pod) = (rig.lab.client(2), rig.lab.pod(node, 1));
        let (client_address, pod_address) = (rig.client_address(2), node.pod_address(1));
        for (from, to, address) in [(client, pod, pod_address), (pod, client, client_address)] {
            let tcp = traffic::iperf(from, to, address, Transport::Tcp, &[]).unwrap();
            assert!(tcp.bits > 50e6, "{} to {}: {tcp:?}", from.name(), to.name());
            let udp = traffic::iperf(from, to, address, Transport::Udp { megabits: 10 }, &[]).unwrap();
            // A busy machine may lose some in the queues of veth devices.
            assert!(udp.lost.is_some_and(|lost| lost < 5.0), "{} to {}: {udp:?}", from.name(), to.name());
        }
        let _server = traffic::WebServer::start(pod, 8080).unwrap();
        let body = traffic::fetch(client, pod_address, 8080).unwrap();
        assert_eq!(body, format!("hello from {}, you are {client_address}\n", pod.name()));
    }
    // It was the fast path that did it.
    for outcome in [Outcome::Encap, Outcome::Decap] {
        let packets = rig.counter(outcome) - before[label(outcome)];
        assert!(packets > 10_000, "{}: only {packets}", label(outcome));
    }
    assert_eq!(rig.drops_since(&before), BTreeMap::new());
}

#[test]
fn encapsulation_as_the_node_sees_it() {
    let rig = Rig::start("encapsulation");
    let (node, gateway) = (Node::new(2), rig.lab.gateway());
    let filter = format!("udp port {PORT} and src host {GATEWAY_ENDPOINT}");
    let capture = rig.lab.node(node).capture(NIC, &filter).unwrap();
    // Inner ECN to outer ECN: copied, but CE becomes ECT(0) (Linux INET_ECN_encapsulate).
    let expected = [(0, 0), (1, 1), (2, 2), (3, 2)];
    for (ecn, _) in expected {
        let packet = Datagram {
            from: (rig.client_address(1), 4000),
            to: (node.pod_address(1), MARK),
            ttl: 17,
            ecn,
            payload: vec![0xa5; 100],
        };
        rig.lab.client(1).inject(NIC, &rig.to_pod(1, &packet)).unwrap();
    }
    capture.wait_for(expected.len(), SOON).unwrap();
    let seen = capture.stop().unwrap();
    assert_eq!(seen.len(), expected.len());
    for (frame, (inner, outer)) in seen.iter().zip(expected) {
        let seen = frames::read(frame).unwrap();
        assert_eq!(seen.ethernet.source, gateway.mac(UNDERLAY).unwrap().octets);
        assert_eq!(seen.ethernet.destination, node.mac().octets);
        assert_eq!(seen.ip.source, GATEWAY_ENDPOINT.octets());
        assert_eq!(seen.ip.destination, node.endpoint().octets());
        assert_eq!(seen.ip.header_checksum, seen.ip.calc_header_checksum());
        assert_eq!((seen.ip.time_to_live, seen.ip.dont_fragment, seen.ip.more_fragments), (64, false, false));
        assert_eq!((seen.ip.dscp.value(), seen.ip.ecn.value()), (0, outer));
        assert_eq!(usize::from(seen.ip.total_len), frame.len() - IP);
        assert_eq!(usize::from(seen.udp.length), frame.len() - UDP);
        assert_eq!((seen.udp.destination_port, seen.udp.checksum), (PORT, 0));
        assert!(seen.udp.source_port >= 49152, "RFC 7348 section 5 wants 49152 to 65535");
        assert_eq!(seen.vxlan, frames::VXLAN);
        assert_eq!(seen.inner_ethernet.source, GATEWAY_VTEP.octets);
        assert_eq!(seen.inner_ethernet.destination, node.vtep().octets);
        assert_eq!(seen.inner_ip.time_to_live, 16, "decremented once");
        assert_eq!(seen.inner_ip.ecn.value(), inner);
        assert_eq!(seen.inner_ip.header_checksum, seen.inner_ip.calc_header_checksum());
        assert_eq!(seen.inner_payload[8..], [0xa5; 100]);
    }
}

#[test]
fn decapsulation_as_the_client_sees_it() {
    let rig = Rig::start("decapsulation");
    let (node, client) = (Node::new(3), rig.lab.client(1));
    let capture = client.capture(NIC, &format!("udp port {MARK}")).unwrap();
    // (inner, outer) to what arrives, by RFC 6040 section 4.2; the illegal combination is a case of its own.
    let cases =
        [(0, 0, 0), (0, 1, 0), (0, 2, 0), (1, 3, 3), (2, 0, 2), (2, 1, 1), (2, 2, 2), (2, 3, 3), (3, 0, 3)];
    let gateway = rig.lab.gateway().mac(UNDERLAY).unwrap();
    for (inner, outer, _) in cases {
        let packet = Datagram {
            from: (node.pod_address(2), 4000),
            to: (rig.client_address(1), MARK),
            ttl: 63,
            ecn: inner,
            payload: vec![0x5a; 33],
        };
        let frame = frames::tunnelled(node, gateway, outer, &packet.packet().unwrap()).unwrap();
        rig.lab.node(node).inject(NIC, &frame).unwrap();
    }
    capture.wait_for(cases.len(), SOON).unwrap();
    let seen = capture.stop().unwrap();
    assert_eq!(seen.len(), cases.len());
    for (frame, (inner, outer, expected)) in seen.iter().zip(cases) {
        let (ethernet, ip, payload) = ipv4_of(frame);
        assert_eq!(ethernet.source, rig.lab.gateway().mac(EXTERNAL).unwrap().octets);
        assert_eq!(ethernet.destination, client.mac(NIC).unwrap().octets);
        assert_eq!(ip.time_to_live, 62, "decremented once");
        assert_eq!(ip.ecn.value(), expected, "inner {inner}, outer {outer}");
        assert_eq!(ip.header_checksum, ip.calc_header_checksum());
        assert_eq!(payload[8..], [0x5a; 33]);
    }
}

#[test]
fn flows_spread_over_source_ports_and_one_flow_keeps_its_port() {
    const FLOWS: u16 = 256;
    let rig = Rig::start("entropy");
    let node = Node::new(1);
    let capture =
        rig.lab.node(node).capture(NIC, &format!("udp port {PORT} and src host {GATEWAY_ENDPOINT}")).unwrap();
    let flow = |port: u16| {
        let (from, to) = ((rig.client_address(2), port), (node.pod_address(2), MARK));
        rig.to_pod(2, &Datagram { from, to, ttl: 64, ecn: 0, payload: vec![0; 18] })
    };
    // Every flow twice.
    let all: Vec<Vec<u8>> =
        (0..FLOWS).chain(0..FLOWS).map(|flow_number| flow(40_000 + flow_number)).collect();
    rig.lab.client(2).inject_all(NIC, all.iter().map(Vec::as_slice)).unwrap();
    capture.wait_for(all.len(), SOON).unwrap();
    let mut ports: BTreeMap<[u8; 2], BTreeSet<u16>> = BTreeMap::new();
    for frame in capture.stop().unwrap() {
        let seen = frames::read(&frame).unwrap();
        let inner_source = [seen.inner_payload[0], seen.inner_payload[1]];
        ports.entry(inner_source).or_default().insert(seen.udp.source_port);
    }
    assert_eq!(ports.len(), usize::from(FLOWS));
    assert!(ports.values().all(|ports| ports.len() == 1), "a flow changed its port");
    // 256 balls in 16,384 bins meet about twice.
    let distinct: BTreeSet<u16> = ports.into_values().flatten().collect();
    assert!(distinct.len() > 240, "{} ports for {FLOWS} flows", distinct.len());
}

/// What must not come out of the tunnel, and where it must be counted.
#[test]
fn what_must_not_pass_is_dropped_under_its_own_counter() {
    type Edit = fn(&mut Vec<u8>);
    let mut cases: Vec<(String, Outcome, Vec<u8>)> = Vec::new();
    let rig = Rig::start("must-not-pass");
    let node = Node::new(1);
    let good = rig.to_client(node);
    let edits: [(&str, Outcome, Edit); 21] = [
        ("unknown VTEP", Outcome::OuterSource, |f| f[IP + 12..IP + 16].copy_from_slice(&[172, 16, 2, 99])),
        ("VNI 2", Outcome::VniUnknown, |f| f[TUNNEL + 6] = 2),
        ("VNI 0", Outcome::VniUnknown, |f| f[TUNNEL + 6] = 0),
        ("VNI 0x010001", Outcome::VniUnknown, |f| f[TUNNEL + 4] = 1),
        ("another node's pod", Outcome::InnerSource, |f| f[INNER_IP + 14] = 2),
        ("a client's address", Outcome::InnerSource, |f| f[INNER_IP + 14] = 30),
        ("an address outside the pod network", Outcome::InnerSource, |f| f[INNER_IP + 12] = 8),
        ("first outer fragment", Outcome::OuterFragment, |f| f[IP + 6] = 0x20),
        ("UDP longer than IP", Outcome::OuterUdpLength, |f| f[UDP + 5] += 1),
        ("UDP shorter than IP", Outcome::OuterUdpLength, |f| f[UDP + 5] -= 1),
        ("our own MAC: a loop", Outcome::InnerLoop, |f| {
            f[INNER + 6..INNER + 12].copy_from_slice(&GATEWAY_VTEP.octets);
        }),
        ("source MAC zero", Outcome::InnerSourceMac, |f| f[INNER + 6..INNER + 12].fill(0)),
        ("source MAC a group", Outcome::InnerSourceMac, |f| f[INNER + 6] |= 1),
        ("another VTEP's MAC", Outcome::InnerDestinationMac, |f| f[INNER + 5] ^= 1),
        ("broadcast", Outcome::InnerBroadcast, |f| f[INNER..INNER + 6].fill(0xff)),
        ("VLAN tag", Outcome::InnerVlan, |f| f[INNER + 12..INNER + 14].copy_from_slice(&[0x81, 0])),
        ("LLDP", Outcome::InnerEtherType, |f| f[INNER + 12..INNER + 14].copy_from_slice(&[0x88, 0xcc])),
        ("IPv6", Outcome::InnerIpv6, |f| f[INNER + 12..INNER + 14].copy_from_slice(&[0x86, 0xdd])),
        ("inner version 6", Outcome::InnerMalformed, |f| f[INNER_IP] = 0x65),
        ("congestion that the inner packet cannot tell", Outcome::EcnIllegal, |f| f[IP + 1] |= 3),
        ("back into the tunnel", Outcome::TunnelToTunnel, |f| {
            f[INNER_IP + 16..INNER_IP + 20].copy_from_slice(&[10, 244, 2, 2]);
        }),
    ];
    for (what, outcome, edit) in edits {
        let mut frame = good.clone();
        edit(&mut frame);
        frames::mend_checksum(&mut frame, IP).unwrap();
        if frame[INNER_IP] == 0x45 {
            frames::mend_checksum(&mut frame, INNER_IP).unwrap();
        }
        cases.push((what.to_owned(), outcome, frame));
    }
    for bit in 0..8 {
        let mut frame = good.clone();
        frame[TUNNEL] ^= 1 << bit;
        cases.push((format!("flag bit {bit}"), Outcome::VxlanFlags, frame));
    }
    for (byte, bit) in [1, 2, 3, 7].into_iter().flat_map(|byte| (0..8).map(move |bit| (byte, bit))) {
        let mut frame = good.clone();
        frame[TUNNEL + byte] ^= 1 << bit;
        cases.push((format!("reserved byte {byte}, bit {bit}"), Outcome::VxlanReserved, frame));
    }

    let capture = rig.lab.client(1).capture(NIC, &format!("udp port {MARK}")).unwrap();
    let mut wrong = Vec::new();
    for (what, outcome, frame) in &cases {
        let before = rig.counters();
        rig.lab.node(node).inject(NIC, frame).unwrap();
        let expected = BTreeMap::from([(label(*outcome).to_owned(), 1)]);
        let drops = wait_until(what, Duration::from_millis(300), || {
            let drops = rig.drops_since(&before);
            Ok((!drops.is_empty()).then_some(drops))
        });
        match drops {
            Ok(drops) if drops == expected => {}
            other => wrong.push(format!("{what}: expected {expected:?}, found {other:?}")),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));

    // The frame that all of them were made from does pass, so the capture would have seen them.
    rig.lab.node(node).inject(NIC, &good).unwrap();
    capture.wait_for(1, SOON).unwrap();
    assert_eq!(capture.stop().unwrap().len(), 1);
}

#[test]
fn frames_cut_at_every_byte_do_not_pass() {
    let rig = Rig::start("truncation");
    let node = Node::new(1);
    let good = rig.to_client(node);
    let capture = rig.lab.client(1).capture(NIC, &format!("udp port {MARK}")).unwrap();
    let before = rig.counters();

    // Cut by the wire: the outer header promises more than there is.
    let cut: Vec<&[u8]> = (IP..good.len()).map(|length| &good[..length]).collect();
    rig.lab.node(node).inject_all(NIC, cut.iter().copied()).unwrap();
    // Cut by the sender: outer lengths agree with the frame, the inner packet is incomplete.
    let mut consistent = Vec::new();
    for length in TUNNEL..good.len() {
        let mut frame = good[..length].to_vec();
        let lengths = [(IP + 2, length - IP), (UDP + 4, length - UDP)];
        for (at, value) in lengths {
            frame[at..at + 2].copy_from_slice(&u16::try_from(value).unwrap().to_be_bytes());
        }
        frames::mend_checksum(&mut frame, IP).unwrap();
        consistent.push(frame);
    }
    rig.lab.node(node).inject_all(NIC, consistent.iter().map(Vec::as_slice)).unwrap();

    let count = |range: std::ops::Range<usize>| u64::try_from(range.len()).unwrap();
    let expected = BTreeMap::from([
        // The IP header itself is cut.
        (label(Outcome::Ipv4Malformed).to_owned(), count(IP..UDP)),
        (label(Outcome::OuterMalformed).to_owned(), count(UDP..good.len())),
        // No room for an inner Ethernet header, for an inner IP header, for the inner packet.
        (label(Outcome::OuterUdpLength).to_owned(), count(TUNNEL..INNER_IP)),
        (label(Outcome::InnerTruncated).to_owned(), 20),
        (label(Outcome::InnerMalformed).to_owned(), count(INNER_IP + 20..good.len())),
    ]);
    let total: u64 = expected.values().sum();
    let drops = wait_until("all cut frames are counted", SOON, || {
        let drops = rig.drops_since(&before);
        Ok((drops.values().sum::<u64>() >= total).then_some(drops))
    });
    assert_eq!(drops.unwrap_or_else(|_| rig.drops_since(&before)), expected);

    rig.lab.node(node).inject(NIC, &good).unwrap();
    capture.wait_for(1, SOON).unwrap();
    assert_eq!(capture.stop().unwrap().len(), 1);
}

#[test]
fn a_fragmented_tunnel_packet_does_not_pass() {
    let rig = Rig::start("outer-fragments");
    let node = Node::new(1);
    let good = rig.to_client(node);
    let capture = rig.lab.client(1).capture(NIC, &format!("udp port {MARK}")).unwrap();
    // Offsets count in eights.
    let split = UDP + 48;
    let mut first = good[..split].to_vec();
    first[IP + 6] = 0x20;
    let mut second = [&good[..UDP], &good[split..]].concat();
    second[IP + 7] = 48 / 8;
    for frame in [&mut first, &mut second] {
        let length = u16::try_from(frame.len() - IP).unwrap();
        frame[IP + 2..IP + 4].copy_from_slice(&length.to_be_bytes());
        frames::mend_checksum(frame, IP).unwrap();
    }
    let before = rig.counters();
    rig.lab.node(node).inject_all(NIC, [&first[..], &second[..], &good[..]]).unwrap();
    // The whole one passes, and it was the last.
    capture.wait_for(1, SOON).unwrap();
    assert_eq!(capture.stop().unwrap().len(), 1);
    assert_eq!(rig.drops_since(&before), BTreeMap::from([(label(Outcome::OuterFragment).to_owned(), 1)]));
}

#[test]
fn the_tunnel_has_no_back_doors() {
    let rig = Rig::configured("back-doors", UNTRANSLATED);
    let (node, gateway) = (Node::new(1), rig.lab.gateway());
    let good = rig.to_client(node);
    let capture = rig.lab.client(1).capture(NIC, &format!("udp port {MARK}")).unwrap();
    let readdressed = |destination: Mac, address: Ipv4Addr| {
        let mut frame = good.clone();
        frame[..6].copy_from_slice(&destination.octets);
        frame[IP + 16..IP + 20].copy_from_slice(&address.octets());
        frames::mend_checksum(&mut frame, IP).unwrap();
        frame
    };
    let external = gateway.mac(EXTERNAL).unwrap();
    let underlay = gateway.mac(UNDERLAY).unwrap();
    let cases = [
        ("from the client LAN", 1, readdressed(external, GATEWAY_ENDPOINT), Outcome::TunnelPortExternal),
        ("to the LAN's address", 1, readdressed(external, GATEWAY_ROUTER), Outcome::TunnelPortExternal),
        ("to another address", 0, readdressed(underlay, GATEWAY_ROUTER), Outcome::TunnelAddress),
        ("broadcast", 0, readdressed(Mac::BROADCAST, Ipv4Addr::new(172, 16, 2, 255)), Outcome::TunnelAddress),
    ];
    for (what, client, frame, outcome) in cases {
        let before = rig.counters();
        let from = if client == 1 { rig.lab.client(2) } else { rig.lab.node(node) };
        from.inject(NIC, &frame).unwrap();
        let drops = wait_until(what, SOON, || {
            let drops = rig.drops_since(&before);
            Ok((!drops.is_empty()).then_some(drops))
        })
        .unwrap();
        assert_eq!(drops, BTreeMap::from([(label(outcome).to_owned(), 1)]), "{what}");
    }
    // A client that pods could not answer.
    let before = rig.counters();
    let foreign = Datagram {
        from: (Ipv4Addr::new(198, 51, 100, 7), 4000),
        to: (node.pod_address(1), MARK),
        ttl: 64,
        ecn: 0,
        payload: Vec::new(),
    };
    rig.lab.client(1).inject(NIC, &rig.to_pod(1, &foreign)).unwrap();
    let drops = wait_until("the foreign client is counted", SOON, || {
        let drops = rig.drops_since(&before);
        Ok((!drops.is_empty()).then_some(drops))
    })
    .unwrap();
    assert_eq!(drops, BTreeMap::from([(label(Outcome::ClientForeign).to_owned(), 1)]));

    rig.lab.node(node).inject(NIC, &good).unwrap();
    let seen = capture.wait_for(2, SOON).unwrap();
    // The foreign client's own packet, on its way out, and the good one.
    assert_eq!(seen.len(), 2);
    assert_eq!(ipv4_of(&seen[1]).1.source, node.pod_address(1).octets());
}

#[test]
fn arp_is_answered_for_pods_and_for_nobody_else() {
    let rig = Rig::start("arp");
    let (client, node) = (rig.lab.client(1), Node::new(1));
    let (mac, address) = (client.mac(NIC).unwrap(), rig.client_address(1));
    let gateway = rig.lab.gateway().mac(EXTERNAL).unwrap();
    let other_client = rig.lab.client(2).mac(NIC).unwrap();

    // As the client's kernel sees it, after the pings of the start.
    let neighbours = client.run(&["ip", "neigh", "show", &node.pod_address(1).to_string()]).unwrap();
    assert!(neighbours.contains(&gateway.to_string()), "{neighbours}");

    let unspecified = Ipv4Addr::UNSPECIFIED;
    // What is asked, as whom, who answers, and whether it is the gateway's program that does.
    let cases = [
        ("a pod", address, node.pod_address(2), Some(gateway), true),
        ("an address of a podCIDR without a pod", address, node.pod_address(200), Some(gateway), true),
        ("a probe for a pod (RFC 5227)", unspecified, node.pod_address(1), Some(gateway), true),
        ("a client of our own subnet", address, rig.client_address(2), Some(other_client), false),
        (
            "an address of our own subnet that nobody has",
            address,
            Ipv4Addr::new(10, 244, 30, 77),
            None,
            false,
        ),
        ("the gateway on the client LAN", address, GATEWAY_ROUTER, Some(gateway), false),
        ("the gateway on the underlay", address, GATEWAY_ENDPOINT, Some(gateway), false),
        ("the pod network where no node is", address, Ipv4Addr::new(10, 244, 77, 2), None, false),
        ("an announcement of a pod's address", node.pod_address(1), node.pod_address(1), None, false),
    ];
    for (what, sender, target, answer, ours) in cases {
        let before = rig.counter(Outcome::ArpReply);
        let filter = format!("arp[6:2] == 2 and ether dst {mac}");
        let capture = client.capture(NIC, &filter).unwrap();
        client.inject(NIC, &frames::arp_request(mac, sender, target)).unwrap();
        // Long enough for a kernel on this machine; nobody else could answer later.
        std::thread::sleep(Duration::from_millis(200));
        let replies = capture.stop().unwrap();
        let senders: Vec<Mac> =
            replies.iter().map(|frame| Mac::new(frame[22..28].try_into().unwrap())).collect();
        assert_eq!(senders, answer.into_iter().collect::<Vec<_>>(), "{what}");
        assert_eq!(rig.counter(Outcome::ArpReply) - before, u64::from(ours), "{what}");
        if let Some(reply) = replies.first() {
            assert_eq!(reply[28..32], target.octets(), "{what}: sender address");
            assert_eq!(reply[32..42], [&mac.octets[..], &sender.octets()].concat(), "{what}: target");
        }
    }
    let before = rig.counter(Outcome::ArpMalformed);
    let mut malformed = frames::arp_request(mac, address, node.pod_address(1));
    malformed[IP + 5] = 6; // length of a protocol address
    client.inject(NIC, &malformed).unwrap();
    wait_until("the malformed request is counted", SOON, || {
        Ok((rig.counter(Outcome::ArpMalformed) == before + 1).then_some(()))
    })
    .unwrap();
}

#[test]
fn nodes_and_pods_come_and_go_live() {
    let mut rig = Rig::start("live");
    let (four, one) = (Node::new(4), Node::new(1));
    let shows = |rig: &Rig, table: &str, what: &str| {
        rig.gateway.text(rig.lab.gateway(), &["show", table]).unwrap().contains(what)
    };
    let wait_shows = |rig: &Rig, table: &str, what: &str, expected: bool| {
        wait_until(&format!("{table} and {what}: {expected}"), SOON, || {
            Ok((shows(rig, table, what) == expected).then_some(()))
        })
        .unwrap();
    };
    let address = four.pod_address(1);
    assert!(!traffic::reaches(rig.lab.client(2), address).unwrap());
    rig.lab.add_node(four).unwrap();
    traffic::wait_reachable(rig.lab.client(2), address, true, SOON).unwrap();
    assert_answered(rig.lab.client(1), address, &[]);
    assert_answered(rig.lab.pod(four, 1), rig.client_address(1), &[]);
    wait_shows(&rig, "vteps", "172.16.2.14", true);
    wait_shows(&rig, "pods", "10.244.4.2", true);

    rig.lab.remove_node(four).unwrap();
    wait_shows(&rig, "vteps", "172.16.2.14", false);
    wait_shows(&rig, "pods", "10.244.4.2", false);
    assert!(!traffic::reaches(rig.lab.client(2), address).unwrap());

    rig.lab.add_pod(one, 3).unwrap();
    wait_shows(&rig, "pods", "10.244.1.4", true);
    assert_answered(rig.lab.client(1), one.pod_address(3), &[]);
    rig.lab.remove_pod(one, 3).unwrap();
    wait_shows(&rig, "pods", "10.244.1.4", false);
    // The others never noticed.
    assert_answered(rig.lab.client(1), one.pod_address(1), &[]);
}

#[test]
fn a_router_towards_clients() {
    let rig = Rig::start("router");
    let (client, pod) = (rig.lab.client(1), Node::new(1).pod_address(1));
    // TTL 1 ends at the gateway, which says so from its address on the client's link.
    let expired = client.output(&["ping", "-n", "-c", "1", "-W", "1", "-t", "1", &pod.to_string()]).unwrap();
    let expired = String::from_utf8_lossy(&expired.stdout).into_owned();
    assert!(
        expired.contains(&format!("From {GATEWAY_ROUTER}")) && expired.contains("Time to live"),
        "{expired}"
    );
    // TTL 2 ends at the node.
    let expired = client.output(&["ping", "-n", "-c", "1", "-W", "1", "-t", "2", &pod.to_string()]).unwrap();
    let expired = String::from_utf8_lossy(&expired.stdout).into_owned();
    assert!(expired.contains("Time to live") && !expired.contains(&GATEWAY_ROUTER.to_string()), "{expired}");
    assert_answered(client, pod, &["-t", "3"]);
    // The largest packet that fits the tunnel, which may not be fragmented.
    assert_answered(client, pod, &["-M", "do", "-s", &(INNER_MTU - 28).to_string()]);
    // Fragments of what the client may send: each is routed by its addresses.
    assert_answered(client, pod, &["-M", "dont", "-s", "4000"]);
}

#[test]
fn forwarding_outlives_the_daemon_and_a_restart_loses_nothing() {
    let mut rig = Rig::start("restart");
    let (client, pod) = (rig.lab.client(1), Node::new(1).pod_address(1));
    let mut pings =
        client.spawn(&["ping", "-n", "-q", "-i", "0.01", "-c", "400", "-W", "1", &pod.to_string()]).unwrap();
    let status = rig.gateway.stop().unwrap();
    assert!(status.success(), "{status}");
    assert_answered(rig.lab.pod(Node::new(2), 1), rig.client_address(1), &[]);
    rig.gateway.restart(rig.lab.gateway()).unwrap();
    assert!(pings.ended().unwrap().is_none(), "the pings were over before the restart");
    pings.wait(Duration::from_secs(20)).unwrap();
    let result = pings.output().unwrap();
    assert!(result.contains("400 packets transmitted, 400 received"), "{result}");
}

/// A person with bpftool must be able to read every table.
#[test]
fn bpftool_shows_every_table_with_named_fields() {
    let rig = Rig::start("bpftool");
    let directory = PathBuf::from(format!("/sys/fs/bpf/gateway/{}/v{VERSION}/maps", rig.lab.instance()));
    let pinned: BTreeSet<String> = fs::read_dir(&directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(pinned, map::ALL.map(str::to_owned).into());
    // A word of each key and value, as the table's type names its fields.
    let fields: [(&str, &[&str], &[&str]); 7] = [
        (map::PODS, &["overlay", "address"], &["vtep"]),
        (map::PREFIXES, &["prefix_len", "overlay", "address"], &["vtep"]),
        (map::VTEPS, &[], &["active", "slots", "endpoint", "next_hop", "mtu"]),
        (map::SOURCES, &["overlay", "address"], &["vtep"]),
        (map::ADDRESSES, &["octets"], &["kind", "ifindex"]),
        (map::EGRESS, &[], &["ifindex", "vlan", "kind"]),
        (map::COUNTERS, &[], &["packets", "bytes"]),
    ];
    for (name, keys, values) in fields {
        let path = directory.join(name);
        let text = rig
            .lab
            .gateway()
            .run(&["bpftool", "--json", "map", "dump", "pinned", path.to_str().unwrap()])
            .unwrap();
        let dump: Value = serde_json::from_str(&text).unwrap();
        let entries = dump.as_array().unwrap();
        assert!(!entries.is_empty(), "{name} is empty");
        let formatted = &entries[0]["formatted"];
        for (part, words) in [("key", keys), ("value", values)] {
            let shown = if formatted[part].is_null() { &formatted["values"] } else { &formatted[part] };
            let names = names_in(shown);
            for word in words {
                assert!(names.contains(*word), "{name}: no field {word} in {shown}");
            }
        }
    }
}

/// Names of all fields, at any depth.
fn names_in(value: &Value) -> BTreeSet<String> {
    match value {
        Value::Object(fields) => fields
            .iter()
            .flat_map(|(name, value)| names_in(value).into_iter().chain([name.clone()]))
            .collect(),
        Value::Array(values) => values.iter().flat_map(names_in).collect(),
        _ => BTreeSet::new(),
    }
}

#[test]
fn detach_leaves_a_host_without_the_gateway() {
    let mut rig = Rig::start("detach");
    let host = rig.lab.gateway();
    rig.gateway.stop().unwrap();
    rig.gateway.text(host, &["detach"]).unwrap();
    for interface in [EXTERNAL, UNDERLAY] {
        assert!(!gateway_tests::lab::gateway::attached(host, interface).unwrap(), "{interface}");
    }
    assert!(!PathBuf::from(format!("/sys/fs/bpf/gateway/{}", rig.lab.instance())).exists());
    let links = host.run(&["ip", "-brief", "link"]).unwrap();
    assert!(!links.contains("gw-flannel"), "{links}");
    assert!(!traffic::reaches(rig.lab.client(1), Node::new(1).pod_address(1)).unwrap());
    // And it can come back.
    rig.gateway.restart(host).unwrap();
    traffic::wait_reachable(rig.lab.client(1), Node::new(1).pod_address(1), true, SOON).unwrap();
}

/// Captures of a test are evidence that stays.
#[test]
fn evidence_is_kept() {
    let rig = Rig::start("evidence");
    let capture = rig.lab.node(Node::new(1)).capture(NIC, &format!("udp port {PORT}")).unwrap();
    assert_answered(rig.lab.client(1), Node::new(1).pod_address(1), &[]);
    let path = capture.path().to_owned();
    let count = capture.wait_for(10, SOON).unwrap().len();
    capture.stop().unwrap();
    drop(rig);
    assert!(capture::read(&path).unwrap().len() >= count);
}
