//! End to end: packets that do not fit the path. What clients are told, what they make of it, and what is on the wire.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::Ipv4Addr,
    time::Duration,
};

use etherparse::{
    Icmpv4Type, IpNumber, Ipv4Header, NetSlice, SlicedPacket, TcpOptionElement, TransportSlice,
    icmpv4::DestUnreachableHeader,
};
use gateway_common::abi::Outcome;
use gateway_tests::lab::{
    Flannel, Gateway, Host,
    flannel::{EXTERNAL, FLANNEL, GATEWAY_ROUTER, INNER_MTU, NIC, Node, PORT, UNDERLAY},
    frames,
    traffic::{self, Transport},
    wait_until,
};

const SOON: Duration = Duration::from_secs(5);
/// Kernels are asked every other second what they learnt.
const LEARNT: Duration = Duration::from_secs(6);

struct Rig {
    gateway: Gateway,
    lab: Flannel,
}

impl Rig {
    /// A lab whose overlay has these further keys, and whose devices have this MTU.
    fn start(label: &str, keys: &str, mtu: Option<u32>) -> Self {
        let lab = Flannel::start(label).unwrap();
        let text = fs::read_to_string(lab.config()).unwrap();
        fs::write(lab.config(), format!("{text}{keys}\n")).unwrap();
        if let Some(mtu) = mtu {
            enlarge(&lab, mtu);
        }
        let gateway = Gateway::start(&lab).unwrap();
        gateway.wait_ready(&lab).unwrap();
        Self { gateway, lab }
    }

    fn counters(&self) -> BTreeMap<String, u64> {
        self.gateway.counters(self.lab.gateway()).unwrap()
    }

    fn counted(&self, outcome: Outcome) -> u64 {
        self.counters()[Outcome::by_number(outcome.number()).unwrap().label]
    }

    fn client(&self) -> Ipv4Addr {
        self.lab.client(1).address(NIC).unwrap()
    }
}

/// Gives every wire of the lab this MTU, and what lies inside the tunnel 50 bytes less.
fn enlarge(lab: &Flannel, mtu: u32) {
    for host in lab.hosts() {
        for interface in host.interfaces().unwrap() {
            let name = interface.name.as_str();
            let inside = name == FLANNEL
                || name.starts_with("cni")
                || name.starts_with("veth")
                || host.name().starts_with("pod");
            let mtu = if inside { mtu - 50 } else { mtu };
            host.run(&["ip", "link", "set", "dev", name, "mtu", &mtu.to_string()]).unwrap();
        }
    }
}

/// Pings once with DF; what ping says.
fn ping(from: &Host, to: Ipv4Addr, packet: u32) -> String {
    let size = (packet - 28).to_string();
    let command = ["ping", "-n", "-c", "1", "-W", "1", "-M", "do", "-s", &size, &to.to_string()];
    let output = from.output(&command).unwrap();
    [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat()
}

fn answered(from: &Host, to: Ipv4Addr, packet: u32) -> bool {
    ping(from, to, packet).contains("1 received")
}

/// The MTU that a host has learnt for an address.
fn learnt(host: &Host, address: Ipv4Addr) -> Option<u32> {
    let text = host.run(&["ip", "route", "get", &address.to_string()]).unwrap();
    let mut words = text.split_whitespace();
    words.find(|word| *word == "mtu")?;
    words.next()?.parse().ok()
}

/// Forbids a UDP socket to fragment (`IP_PMTUDISC_DO`).
fn forbid_fragments(socket: &impl std::os::fd::AsRawFd) {
    let value = libc::IP_PMTUDISC_DO;
    // SAFETY: the option is an integer, and its size is told.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IP,
            libc::IP_MTU_DISCOVER,
            (&raw const value).cast(),
            u32::try_from(size_of_val(&value)).unwrap(),
        )
    };
    assert_eq!(result, 0);
}

#[test]
fn a_client_obeys() {
    let rig = Rig::start("too-big", "", None);
    let (client, pod) = (rig.lab.client(1), Node::new(1).pod_address(1));
    let before = rig.counted(Outcome::TooBigReply);
    // The first is answered by the gateway, from its address on the client's link; the second by the client's own kernel.
    let first = ping(client, pod, 1500);
    assert!(first.contains(&format!("From {GATEWAY_ROUTER}")) && first.contains("mtu = 1450"), "{first}");
    assert_eq!(learnt(client, pod), Some(INNER_MTU));
    let second = ping(client, pod, INNER_MTU + 1);
    assert!(second.contains("message too long") && second.contains("mtu=1450"), "{second}");
    assert!(answered(client, pod, INNER_MTU));
    assert_eq!(rig.counted(Outcome::TooBigReply) - before, 1);

    // UDP: a connected socket is told by the next call that fails, then knows the limit.
    let (client, pod) = (rig.lab.client(2), Node::new(2).pod_address(1));
    let socket = client.udp(Ipv4Addr::UNSPECIFIED, 0).unwrap();
    socket.connect((pod, 9)).unwrap();
    forbid_fragments(&socket);
    socket.send(&[0; 1472]).unwrap();
    wait_until("the sender learns the MTU", SOON, || {
        Ok((learnt(client, pod) == Some(INNER_MTU)).then_some(()))
    })
    .unwrap();
    // The error that arrived meanwhile is told once.
    let _ = socket.send(&[0; 100]);
    let error = socket.send(&vec![0; INNER_MTU as usize - 28 + 1]).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EMSGSIZE), "{error}");
}

/// MSS of the SYNs in a capture, by the address of who sent them.
fn segment_sizes(frames: &[Vec<u8>]) -> BTreeMap<Ipv4Addr, BTreeSet<u16>> {
    let mut sizes: BTreeMap<Ipv4Addr, BTreeSet<u16>> = BTreeMap::new();
    for frame in frames {
        let packet = SlicedPacket::from_ethernet(frame).unwrap();
        let (Some(NetSlice::Ipv4(ip)), Some(TransportSlice::Tcp(tcp))) = (&packet.net, &packet.transport)
        else {
            continue;
        };
        let header = tcp.to_header();
        assert_eq!(
            Some(header.checksum),
            header.calc_checksum_ipv4(&ip.header().to_header(), tcp.payload()).ok()
        );
        for option in tcp.options_iterator().flatten() {
            if let TcpOptionElement::MaximumSegmentSize(mss) = option {
                sizes.entry(ip.header().source_addr()).or_default().insert(mss);
            }
        }
    }
    sizes
}

/// Captures the SYNs at both ends of a connection from client to pod, and tells how fast it was.
fn connect(rig: &Rig) -> [BTreeMap<Ipv4Addr, BTreeSet<u16>>; 2] {
    let (client, pod, address) =
        (rig.lab.client(1), rig.lab.pod(Node::new(1), 1), Node::new(1).pod_address(1));
    let filter = "tcp[tcpflags] & tcp-syn != 0";
    let captures = [client, pod].map(|host| host.capture(NIC, filter).unwrap());
    let speed = traffic::iperf(client, pod, address, Transport::Tcp, &[]).unwrap();
    assert!(speed.bits > 20e6, "{speed:?}");
    // iperf3 opens two connections.
    captures.map(|capture| {
        capture.wait_for(4, SOON).unwrap();
        segment_sizes(&capture.stop().unwrap())
    })
}

#[test]
fn handshakes_announce_what_fits_in_both_directions() {
    // A pod of MTU 1450 announces what fits; one that does not shows that the gateway lowers it.
    let rig = Rig::start("mss-clamp", "", None);
    let (client, pod) = (rig.client(), Node::new(1).pod_address(1));
    rig.lab.pod(Node::new(1), 1).run(&["ip", "link", "set", "dev", NIC, "mtu", "1500"]).unwrap();
    let before = rig.counted(Outcome::TooBigReply);
    let [at_client, at_pod] = connect(&rig);
    assert_eq!(at_client[&client], BTreeSet::from([1460]), "as the client sent it");
    assert_eq!(at_pod[&client], BTreeSet::from([1410]), "as the pod received it");
    assert_eq!(at_pod[&pod], BTreeSet::from([1460]), "as the pod sent it");
    assert_eq!(at_client[&pod], BTreeSet::from([1410]), "as the client received it");
    assert_eq!(rig.counted(Outcome::TooBigReply), before, "nothing was too large");
}

#[test]
fn without_clamping_path_mtu_discovery_does_it() {
    let rig = Rig::start("mss-off", "mss_clamp = false", None);
    // A pod that announces more than fits.
    rig.lab.pod(Node::new(1), 1).run(&["ip", "link", "set", "dev", NIC, "mtu", "1500"]).unwrap();
    let client = rig.client();
    let before = rig.counted(Outcome::TooBigReply);
    let [_, at_pod] = connect(&rig);
    assert_eq!(at_pod[&client], BTreeSet::from([1460]), "untouched");
    assert!(rig.counted(Outcome::TooBigReply) > before);
    assert_eq!(learnt(rig.lab.client(1), Node::new(1).pod_address(1)), Some(INNER_MTU));
}

/// An echo request of `length` bytes as client 1 sends it to a pod by way of the gateway.
fn echo(rig: &Rig, length: u16, dont_fragment: bool) -> Vec<u8> {
    let mut message = vec![8, 0, 0, 0, 0x51, 0x2e];
    message.extend(length.to_be_bytes());
    message.resize(usize::from(length.saturating_sub(20)).max(8), 0xa5);
    let sum = etherparse::checksum::Sum16BitWords::new().add_slice(&message).ones_complement().to_ne_bytes();
    message[2..4].copy_from_slice(&sum);
    let (client, pod) = (rig.client(), Node::new(1).pod_address(1));
    let size = u16::try_from(message.len()).unwrap();
    let mut ip = Ipv4Header::new(size, 64, IpNumber::ICMP, client.octets(), pod.octets()).unwrap();
    ip.dont_fragment = dont_fragment;
    ip.header_checksum = ip.calc_header_checksum();
    let packet = [ip.to_bytes().as_slice(), &message].concat();
    let source = rig.lab.client(1).mac(NIC).unwrap();
    frames::ethernet(source, rig.lab.gateway().mac(EXTERNAL).unwrap(), frames::IPV4, &packet)
}

/// Sends echo requests of these total lengths; gives the lengths that were answered, and those of which an error told
/// that they do not fit, with the MTU it named.
fn sweep(rig: &Rig, lengths: impl Iterator<Item = u16>) -> (BTreeSet<u16>, BTreeSet<(u16, u16)>) {
    let client = rig.lab.client(1);
    let requests: Vec<Vec<u8>> = lengths.map(|length| echo(rig, length, true)).collect();
    let filter = format!("icmp and dst host {} and (icmp[0] == 0 or icmp[0] == 3)", rig.client());
    let capture = client.capture(NIC, &filter).unwrap();
    client.inject_all(NIC, requests.iter().map(Vec::as_slice)).unwrap();
    capture.wait_for(requests.len(), SOON).unwrap();
    let (mut answers, mut errors) = (BTreeSet::new(), BTreeSet::new());
    for frame in capture.stop().unwrap() {
        let packet = SlicedPacket::from_ethernet(&frame).unwrap();
        let (Some(NetSlice::Ipv4(ip)), Some(TransportSlice::Icmpv4(icmp))) = (&packet.net, &packet.transport)
        else {
            panic!("the filter takes nothing else")
        };
        match icmp.icmp_type() {
            Icmpv4Type::EchoReply(header) => {
                assert_eq!(header.seq, ip.header().total_len(), "all of it comes back");
                answers.insert(header.seq);
            }
            Icmpv4Type::DestinationUnreachable(DestUnreachableHeader::FragmentationNeeded {
                next_hop_mtu,
            }) => {
                assert_eq!(ip.header().source_addr(), GATEWAY_ROUTER);
                let quoted = Ipv4Header::from_slice(icmp.payload()).unwrap().0;
                assert_eq!(quoted.header_checksum, quoted.calc_header_checksum(), "as the client sent it");
                errors.insert((quoted.total_len, next_hop_mtu));
            }
            other => panic!("{other:?}"),
        }
    }
    (answers, errors)
}

#[test]
fn every_size_up_to_the_mtu_passes_and_one_more_does_not() {
    let rig = Rig::start("sizes", "", None);
    let mtu = u16::try_from(INNER_MTU).unwrap();
    let (answers, errors) = sweep(&rig, 28..=mtu + 1);
    assert_eq!(answers, (28..=mtu).collect());
    assert_eq!(errors, BTreeSet::from([(mtu + 1, mtu)]));
}

#[test]
fn a_jumbo_underlay() {
    let rig = Rig::start("jumbo", "", Some(9000));
    // Around every edge: a page with and without the tunnel's header, the old MTU, and the new one.
    let edges = [(1440, 1520), (3400, 3700), (3990, 4140), (8150, 8240), (8930, 8958)];
    for (first, last) in edges {
        let (answers, errors) = sweep(&rig, first..=last);
        assert_eq!(answers, (first..=last.min(8950)).collect(), "{first} to {last}");
        assert_eq!(errors, (8951..=last).map(|size| (size, 8950)).collect(), "{first} to {last}");
    }
    let [at_client, at_pod] = connect(&rig);
    assert_eq!(at_client[&rig.client()], BTreeSet::from([8960]));
    assert_eq!(at_pod[&rig.client()], BTreeSet::from([8910]));
}

#[test]
fn a_smaller_path_behind_a_router_is_learnt() {
    const SMALL: u32 = 1300;
    let rig = Rig::start("smaller-path", "df = \"inherit\"", None);
    let (client, near, far) = (rig.lab.client(1), Node::new(1), Node::new(2));
    let pod = far.pod_address(1);
    // Node 1 becomes the router to node 2, over a link that takes less.
    let router = rig.lab.node(near);
    let (far_endpoint, near_endpoint) = (far.endpoint().to_string(), near.endpoint().to_string());
    let small = SMALL.to_string();
    router
        .run(&["sysctl", "-qw", "net.ipv4.conf.all.send_redirects=0", "net.ipv4.conf.eth0.send_redirects=0"])
        .unwrap();
    router.run(&["ip", "route", "add", &far_endpoint, "dev", NIC, "mtu", "lock", &small]).unwrap();
    rig.lab
        .gateway()
        .run(&["ip", "route", "add", &far_endpoint, "via", &near_endpoint, "dev", UNDERLAY])
        .unwrap();
    wait_until("the way over the router", SOON, || {
        let capture = router.capture(NIC, &format!("udp port {PORT} and dst host {far_endpoint}"))?;
        let through = traffic::reaches(client, pod)? && !capture.stop()?.is_empty();
        Ok(through.then_some(()))
    })
    .unwrap();
    assert!(!answered(client, pod, INNER_MTU), "too large for the router, and the gateway does not know yet");
    wait_until("the client is told what fits behind the router", LEARNT, || {
        let _ = ping(client, pod, INNER_MTU);
        Ok((learnt(client, pod) == Some(SMALL - 50)).then_some(()))
    })
    .unwrap();
    assert!(answered(client, pod, SMALL - 50));
    // Others are not affected.
    assert!(answered(client, near.pod_address(1), INNER_MTU));
    let [_, at_pod] = {
        let filter = "tcp[tcpflags] & tcp-syn != 0";
        let pod_host = rig.lab.pod(far, 1);
        let captures = [client, pod_host].map(|host| host.capture(NIC, filter).unwrap());
        traffic::iperf(client, pod_host, pod, Transport::Tcp, &[]).unwrap();
        captures.map(|capture| {
            capture.wait_for(4, SOON).unwrap();
            segment_sizes(&capture.stop().unwrap())
        })
    };
    assert_eq!(at_pod[&rig.client()], BTreeSet::from([u16::try_from(SMALL).unwrap() - 90]));

    // The way is the old one again: so is its MTU.
    rig.lab.gateway().run(&["ip", "route", "del", &far_endpoint]).unwrap();
    wait_until("the whole MTU again", LEARNT, || {
        client.run(&["ip", "route", "flush", "cache"])?;
        Ok(answered(client, pod, INNER_MTU).then_some(()))
    })
    .unwrap();
}
