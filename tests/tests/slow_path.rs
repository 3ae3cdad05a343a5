//! The kernel's side of the gateway, with the XDP program in front of it and alone (`xdp_mode = "off"`): the same must work,
//! and the same must not pass.

use std::{
    collections::BTreeMap,
    fs::{self, OpenOptions},
    io::Write as _,
    net::Ipv4Addr,
    path::Path,
    time::Duration,
};

use gateway_common::{
    abi::{Class, Outcome},
    wire::Mac,
};
use gateway_tests::lab::{
    Flannel, Gateway, Host,
    flannel::{
        EXTERNAL, GATEWAY_ENDPOINT, GATEWAY_ROUTER, GATEWAY_SUBNET, INNER_MTU, MTU, NIC, Node, PORT, UNDERLAY,
    },
    frames::{self, Datagram, IP},
    gateway::{OFF, UNTRANSLATED, attached},
    traffic::{self, Transport},
    wait_until,
    wiring::{self, End},
};
use rstest::rstest;
use serde_json::Value;

const SOON: Duration = Duration::from_secs(5);
/// UDP port of datagrams built by hand.
const MARK: u16 = 9999;
/// The gateway host in the overlay: the first address of its subnet, as flannel's nodes have it.
const OVERLAY: Ipv4Addr = GATEWAY_SUBNET.addr();
/// An interface of the gateway host that the configuration does not name, its far end, and their addresses.
const SPARE: &str = "spare0";
const SPARE_FAR: &str = "spare1";
const SPARE_ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const STRANGER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);

/// Who forwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Driver,
    Off,
}

struct Rig {
    gateway: Gateway,
    lab: Flannel,
    mode: Mode,
}

fn prepare(label: &str, mode: Mode) -> Flannel {
    let lab = Flannel::start(&format!("{label}-{mode:?}").to_lowercase()).unwrap();
    if mode == Mode::Off {
        configure(&lab, OFF);
    }
    lab
}

/// Adds to the end of the configuration.
fn configure(lab: &Flannel, keys: &str) {
    let mut config = OpenOptions::new().append(true).open(lab.config()).unwrap();
    config.write_all(keys.as_bytes()).unwrap();
}

impl Rig {
    fn start(label: &str, mode: Mode) -> Self {
        Self::over(prepare(label, mode), mode)
    }

    fn over(lab: Flannel, mode: Mode) -> Self {
        let gateway = Gateway::start(&lab).unwrap();
        gateway.wait_ready(&lab).unwrap();
        for interface in [EXTERNAL, UNDERLAY] {
            assert_eq!(attached(lab.gateway(), interface).unwrap(), mode == Mode::Driver, "{interface}");
        }
        Self { gateway, lab, mode }
    }

    fn host(&self) -> &Host {
        self.lab.gateway()
    }

    /// Drops of both planes by name; those of the program only, if there is one.
    fn drops(&self) -> BTreeMap<String, u64> {
        let counters = self.gateway.counters(self.host()).unwrap();
        let program = Outcome::TABLE.iter().filter(|row| row.class == Class::Drop);
        let mut drops: BTreeMap<String, u64> =
            program.map(|row| (row.label.to_owned(), counters[row.label])).collect();
        let firewall = &self.status()["firewall"]["dropped"];
        for (counter, dropped) in firewall.as_object().expect("the firewall's counters") {
            drops.insert(format!("firewall {counter}"), dropped["packets"].as_u64().unwrap());
        }
        drops
    }

    fn drops_since(&self, before: &BTreeMap<String, u64>) -> BTreeMap<String, u64> {
        let now = self.drops().into_iter();
        now.map(|(name, count)| (name.clone(), count - before[&name]))
            .filter(|(_, count)| *count > 0)
            .collect()
    }

    /// `gateway status --json`, healthy or not.
    fn status(&self) -> Value {
        let call = gateway_tests::lab::gateway::command(
            &gateway_tests::lab::gateway::program().unwrap(),
            &self.lab.config(),
            &["status", "--json"],
        );
        let output = self.host().output(&call.unwrap()).unwrap();
        serde_json::from_slice(&output.stdout).unwrap()
    }

    fn outcome(&self, outcome: Outcome) -> u64 {
        let label = Outcome::by_number(outcome.number()).unwrap().label;
        self.gateway.counters(self.host()).unwrap()[label]
    }

    /// That the program counted under `outcome` since it stood at `before`, if there is one.
    fn assert_passed_up(&self, outcome: Outcome, before: u64) {
        let grown = self.outcome(outcome) - before;
        assert_eq!(grown > 0, self.mode == Mode::Driver, "{outcome:?}: {grown}");
    }

    fn client_address(&self, number: u8) -> Ipv4Addr {
        self.lab.client(number).address(NIC).unwrap()
    }
}

fn assert_answered(from: &Host, to: Ipv4Addr, options: &[&str]) {
    let pings = traffic::ping(from, to, 3, options).unwrap();
    assert_eq!(pings.received, 3, "{} to {to} {options:?}: {pings:?}", from.name());
}

#[rstest]
fn everybody_reaches_everybody(#[values(Mode::Driver, Mode::Off)] mode: Mode) {
    let rig = Rig::start("slow-path", mode);
    let before = rig.drops();
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
        }

        // The gateway host itself: its programs reach pods, as the overlay's address; pods and nodes reach that.
        let _pods = traffic::WebServer::start(pod, 8080).unwrap();
        let body = traffic::fetch(client, pod_address, 8080).unwrap();
        assert_eq!(body, format!("hello from {}, you are {client_address}\n", pod.name()));
        let body = traffic::fetch(rig.host(), pod_address, 8080).unwrap();
        assert_eq!(body, format!("hello from {}, you are {OVERLAY}\n", pod.name()));
        assert_answered(rig.host(), node.pod_address(2), &["-s", &(INNER_MTU - 28).to_string(), "-M", "do"]);
        let _gateway = traffic::WebServer::start(rig.host(), 8081).unwrap();
        let body = traffic::fetch(pod, OVERLAY, 8081).unwrap();
        assert_eq!(body, format!("hello from gateway, you are {pod_address}\n"));
        assert_answered(rig.lab.pod(node, 2), OVERLAY, &[]);
        assert_answered(rig.lab.node(node), OVERLAY, &[]);
    }
    assert_eq!(rig.drops_since(&before), BTreeMap::new());
}

/// Addresses that answered, hop by hop.
fn trace(from: &Host, to: Ipv4Addr) -> Vec<String> {
    // One probe at a time: traceroute gives up on a hop soon after later ones have answered.
    let call = ["traceroute", "-n", "-q", "1", "-N", "1", "-w", "2", "-m", "6", &to.to_string()];
    let text = from.run(&call).unwrap();
    // " 1  10.244.30.1  0.041 ms", after one line of titles.
    text.lines().skip(1).filter_map(|line| line.split_whitespace().nth(1)).map(str::to_owned).collect()
}

#[rstest]
fn what_only_the_kernel_does_is_done(#[values(Mode::Driver, Mode::Off)] mode: Mode) {
    let rig = Rig::start("router", mode);
    let (client, node) = (rig.lab.client(2), Node::new(1));
    let (pod, address) = (rig.lab.pod(node, 1), node.pod_address(1));

    // What it said while the gateway started counts for the limit of one message a second and host.
    wiring::sysctl(rig.host().namespace(), "ipv4/icmp_ratelimit", "0").unwrap();

    // Expiring TTL, both ways: the gateway is a hop that says its name.
    let (expired, out_expired) = (rig.outcome(Outcome::TtlExpired), rig.outcome(Outcome::OutTtlExpired));
    let hops = trace(client, address);
    assert_eq!((hops.len(), hops[0].as_str()), (3, &*GATEWAY_ROUTER.to_string()), "{hops:?}");
    assert_eq!(hops[2], address.to_string(), "{hops:?}");
    let hops = trace(pod, rig.client_address(2));
    let expected = [node.pod_address(0), OVERLAY, rig.client_address(2)].map(|hop| hop.to_string());
    assert_eq!(hops, expected);
    rig.assert_passed_up(Outcome::TtlExpired, expired);
    rig.assert_passed_up(Outcome::OutTtlExpired, out_expired);

    // Options: every router on the way there and back writes itself down.
    let (options, out_options) = (rig.outcome(Outcome::IpOptions), rig.outcome(Outcome::OutIpOptions));
    let text = client.run(&["ping", "-n", "-c", "1", "-W", "2", "-R", &address.to_string()]).unwrap();
    let route: Vec<&str> = text.lines().skip_while(|line| !line.starts_with("RR:")).map(str::trim).collect();
    for hop in [OVERLAY, address, GATEWAY_ROUTER] {
        assert!(
            route.iter().any(|line| line.trim_start_matches("RR:").trim() == hop.to_string()),
            "{hop} in {text}"
        );
    }
    rig.assert_passed_up(Outcome::IpOptions, options);
    rig.assert_passed_up(Outcome::OutIpOptions, out_options);

    // Larger than the tunnel takes, and allowed to be fragmented: datagrams arrive whole.
    let oversize = rig.outcome(Outcome::Oversize);
    let receiver = pod.udp(address, MARK).unwrap();
    receiver.set_read_timeout(Some(SOON)).unwrap();
    // Sockets are made without the don't-fragment bit.
    wiring::sysctl(client.namespace(), "ipv4/ip_no_pmtu_disc", "1").unwrap();
    let sender = client.udp(rig.client_address(2), MARK).unwrap();
    let largest = usize::try_from(MTU).unwrap() - 28;
    for size in [usize::try_from(INNER_MTU).unwrap() - 27, largest, largest + 1, 4000, 20_000] {
        let sent: Vec<u8> = (0..size).map(|at| u8::try_from(at % 251).unwrap()).collect();
        sender.send_to(&sent, (address, MARK)).unwrap();
        let mut received = vec![0; size + 1];
        let (length, from) = receiver.recv_from(&mut received).unwrap();
        assert_eq!((length, from.ip()), (size, rig.client_address(2).into()));
        assert!(received[..length] == sent, "{size} bytes arrived changed");
    }
    assert_answered(client, address, &["-M", "dont", "-s", &largest.to_string()]);
    rig.assert_passed_up(Outcome::Oversize, oversize);

    // And not allowed to be: the client is told what fits.
    wiring::sysctl(client.namespace(), "ipv4/ip_no_pmtu_disc", "0").unwrap();
    let refused =
        client.output(&["ping", "-n", "-c", "1", "-W", "2", "-M", "do", "-s", "1472", &address.to_string()]);
    let refused = String::from_utf8_lossy(&refused.unwrap().stdout).into_owned();
    assert!(refused.contains(&format!("mtu = {INNER_MTU}")), "{refused}");
}

/// Tunnel packets from where no node is, and to where the tunnel does not end.
#[rstest]
fn nobody_else_gets_into_the_tunnel(#[values(Mode::Driver, Mode::Off)] mode: Mode) {
    let rig = Rig::start("strangers", mode);
    let (lab, host, node) = (&rig.lab, rig.host(), Node::new(1));
    wiring::veth(
        End { namespace: host.namespace(), name: SPARE, mac: None, mtu: MTU },
        End { namespace: lab.client(2).namespace(), name: SPARE_FAR, mac: None, mtu: MTU },
    )
    .unwrap();
    wiring::address(host.namespace(), SPARE, ipnet::Ipv4Net::new(SPARE_ADDRESS, 24).unwrap()).unwrap();

    let inner = Datagram {
        from: (node.pod_address(1), 4000),
        to: (rig.client_address(1), MARK),
        ttl: 63,
        ecn: 0,
        payload: b"from a stranger".to_vec(),
    };
    let [underlay, external, spare] = [UNDERLAY, EXTERNAL, SPARE].map(|name| host.mac(name).unwrap());
    let good = frames::tunnelled(node, underlay, 0, &inner.packet().unwrap()).unwrap();
    let readdressed = |mac: Mac, from: Ipv4Addr, to: Ipv4Addr| {
        let mut frame = good.clone();
        frame[..6].copy_from_slice(&mac.octets);
        frame[IP + 12..IP + 16].copy_from_slice(&from.octets());
        frame[IP + 16..IP + 20].copy_from_slice(&to.octets());
        frames::mend_checksum(&mut frame, IP).unwrap();
        frame
    };
    let known = node.endpoint();
    let unknown = Ipv4Addr::new(172, 16, 2, 99);
    let all_systems = (Mac::new([1, 0, 0x5e, 0, 0, 1]), Ipv4Addr::new(224, 0, 0, 1));
    let (lan, link) = ((lab.client(2), NIC), (lab.node(node), NIC));
    let nowhere = (lab.client(2), SPARE_FAR);
    let cases = [
        ("client LAN, to the VTEP", lan, readdressed(external, known, GATEWAY_ENDPOINT)),
        (
            "client LAN, to the router's address",
            lan,
            readdressed(external, rig.client_address(2), GATEWAY_ROUTER),
        ),
        ("client LAN, to the overlay's address", lan, readdressed(external, rig.client_address(2), OVERLAY)),
        (
            "client LAN, broadcast",
            lan,
            readdressed(Mac::BROADCAST, rig.client_address(2), Ipv4Addr::BROADCAST),
        ),
        ("client LAN, multicast", lan, readdressed(all_systems.0, rig.client_address(2), all_systems.1)),
        ("unknown host, to the VTEP", link, readdressed(underlay, unknown, GATEWAY_ENDPOINT)),
        ("unknown host, to another address", link, readdressed(underlay, unknown, GATEWAY_ROUTER)),
        ("known node, to the router's address", link, readdressed(underlay, known, GATEWAY_ROUTER)),
        ("known node, to the overlay's address", link, readdressed(underlay, known, OVERLAY)),
        ("known node, broadcast", link, readdressed(Mac::BROADCAST, known, Ipv4Addr::new(172, 16, 2, 255))),
        ("known node, to all", link, readdressed(Mac::BROADCAST, known, Ipv4Addr::BROADCAST)),
        ("known node, multicast", link, readdressed(all_systems.0, known, all_systems.1)),
        ("interface without a role, to the VTEP", nowhere, readdressed(spare, known, GATEWAY_ENDPOINT)),
        ("interface without a role, to its address", nowhere, readdressed(spare, STRANGER, SPARE_ADDRESS)),
        (
            "interface without a role, broadcast",
            nowhere,
            readdressed(Mac::BROADCAST, STRANGER, Ipv4Addr::BROADCAST),
        ),
        ("interface without a role, multicast", nowhere, readdressed(all_systems.0, STRANGER, all_systems.1)),
    ];
    let capture = lab.client(1).capture(NIC, &format!("udp port {MARK}")).unwrap();
    let received = || host.statistic("gw-flannel", "rx_packets").unwrap();
    let begin = received();
    let mut wrong = Vec::new();
    for (what, (from, interface), frame) in &cases {
        let before = rig.drops();
        from.inject(interface, frame).unwrap();
        let drops = wait_until(what, Duration::from_millis(500), || {
            let drops = rig.drops_since(&before);
            Ok((!drops.is_empty()).then_some(drops))
        });
        match drops {
            Ok(drops) if drops.values().sum::<u64>() == 1 => {}
            other => wrong.push(format!("{what}: {other:?}")),
        }
    }
    // By itself: the host's own programs are not a node either.
    let before = rig.drops();
    let socket = host.udp(GATEWAY_ENDPOINT, 0).unwrap();
    socket.send_to(&good[frames::TUNNEL..], (GATEWAY_ENDPOINT, PORT)).unwrap();
    let drops = rig.drops_since(&before);
    assert_eq!(drops, BTreeMap::from([("firewall tunnel_refused".to_owned(), 1)]));
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!(received(), begin, "the tunnel's device got a packet");

    // The frame that all of them were made from does pass, so the capture would have seen them.
    lab.node(node).inject(NIC, &good).unwrap();
    capture.wait_for(1, SOON).unwrap();
    assert_eq!(capture.stop().unwrap().len(), 1);
}

/// Clients that pods could not answer, wherever they come from.
#[rstest]
fn foreign_clients_are_not_forwarded(#[values(Mode::Driver, Mode::Off)] mode: Mode) {
    let lab = prepare("foreign", mode);
    if mode == Mode::Driver {
        configure(&lab, UNTRANSLATED);
    }
    let rig = Rig::over(lab, mode);
    let (host, node, client) = (rig.host(), Node::new(1), rig.lab.client(2));
    wiring::veth(
        End { namespace: host.namespace(), name: SPARE, mac: None, mtu: MTU },
        End { namespace: client.namespace(), name: SPARE_FAR, mac: None, mtu: MTU },
    )
    .unwrap();
    wiring::address(host.namespace(), SPARE, ipnet::Ipv4Net::new(SPARE_ADDRESS, 24).unwrap()).unwrap();
    let capture = rig.lab.pod(node, 1).capture(NIC, &format!("udp port {MARK}")).unwrap();
    let frame = |interface: &str, from: Ipv4Addr| {
        let (from, to) = ((from, 4000), (node.pod_address(1), MARK));
        let packet = Datagram { from, to, ttl: 64, ecn: 0, payload: vec![1; 20] };
        let source = client.mac(NIC).unwrap();
        frames::ethernet(source, host.mac(interface).unwrap(), frames::IPV4, &packet.packet().unwrap())
    };
    let program = if mode == Mode::Driver { "client_foreign" } else { "firewall client_foreign" };
    for (interface, near, source, counter) in [
        // An address that the gateway host has a route to: even loose rp_filter drops others.
        (NIC, EXTERNAL, Ipv4Addr::new(172, 16, 2, 77), program),
        (NIC, EXTERNAL, Node::new(2).pod_address(1), program),
        // Not the program's business; loose rp_filter lets it in.
        (SPARE_FAR, SPARE, STRANGER, "firewall client_foreign"),
    ] {
        let before = rig.drops();
        client.inject(interface, &frame(near, source)).unwrap();
        let drops = wait_until(&format!("{source} is counted"), SOON, || {
            let drops = rig.drops_since(&before);
            Ok((!drops.is_empty()).then_some(drops))
        });
        assert_eq!(drops.unwrap(), BTreeMap::from([(counter.to_owned(), 1)]), "{source}");
    }
    client.inject(NIC, &frame(EXTERNAL, rig.client_address(2))).unwrap();
    capture.wait_for(1, SOON).unwrap();
    assert_eq!(capture.stop().unwrap().len(), 1);
}

/// The firewall follows the cluster, heals, outlives the daemon, and goes with `detach`; so do the kernel's settings.
#[rstest]
fn firewall_and_settings_are_kept(#[values(Mode::Driver, Mode::Off)] mode: Mode) {
    let lab = prepare("kept", mode);
    for key in ["ipv4/ip_forward", "ipv4/conf/ext0/forwarding", "ipv4/conf/und0/forwarding"] {
        wiring::sysctl(lab.gateway().namespace(), key, "0").unwrap();
    }
    let gateway = Gateway::start(&lab).unwrap();
    gateway.wait_ready(&lab).unwrap();
    let mut rig = Rig { gateway, lab, mode };
    let table = format!("gateway_{}", rig.lab.instance());
    let list = |rig: &Rig| rig.host().run(&["nft", "list", "ruleset"]).unwrap();
    let wait = |rig: &Rig, what: &str, expected: bool| {
        wait_until(&format!("{what}: {expected}"), SOON, || {
            Ok((list(rig).contains(what) == expected).then_some(()))
        })
        .unwrap();
    };
    let setting = |rig: &Rig, key: &str| rig.host().run(&["sysctl", "-n", key]).unwrap().trim().to_owned();
    let forwarding = |rig: &Rig| {
        [EXTERNAL, UNDERLAY].map(|name| setting(rig, &format!("net.ipv4.conf.{name}.forwarding")))
    };
    assert_eq!(forwarding(&rig), ["1", "1"]);
    assert_eq!(setting(&rig, "net.ipv4.ip_forward"), "0", "not needed, so left alone");
    assert_eq!(rig.status()["settings"]["conf/ext0/forwarding"]["old"], "0");

    // It follows the cluster.
    let four = Node::new(4);
    rig.lab.add_node(four).unwrap();
    wait(&rig, "172.16.2.14", true);
    rig.lab.remove_node(four).unwrap();
    wait(&rig, "172.16.2.14", false);
    // Somebody changes it.
    for wrong in [vec!["delete", "table", "inet", &table], vec!["flush", "set", "inet", &table, "nodes"]] {
        rig.host().run(&[&["nft"], &wrong[..]].concat()).unwrap();
        wait(&rig, "172.16.2.11", true);
        wait(&rig, "@nodes accept", true);
    }
    assert_answered(rig.lab.client(2), Node::new(1).pod_address(1), &[]);

    // The daemon goes, everything else stays.
    rig.gateway.stop().unwrap();
    let kept = list(&rig);
    assert!(kept.contains("172.16.2.11"), "{kept}");
    assert_answered(rig.lab.client(2), Node::new(1).pod_address(1), &[]);
    rig.gateway.restart(rig.lab.gateway()).unwrap();
    assert_answered(rig.lab.client(2), Node::new(1).pod_address(1), &[]);
    wait(&rig, "172.16.2.11", true);

    rig.gateway.stop().unwrap();
    let told = rig.gateway.text(rig.host(), &["detach"]).unwrap();
    assert!(told.contains("net.ipv4.conf.ext0.forwarding restored from 1 to 0"), "{told}");
    assert_eq!(list(&rig), "");
    assert_eq!(forwarding(&rig), ["0", "0"]);
    assert!(!Path::new(&format!("/run/gateway/{}/sysctl.json", rig.lab.instance())).exists());
}

/// Routes, neighbours, forwarding entries, device and address: put right at once, not when everything is looked at again
/// (30 seconds). What is not the gateway's stays.
#[test]
fn what_somebody_else_does_to_the_device_is_put_right() {
    const AT_ONCE: Duration = Duration::from_secs(5);
    const DEVICE: &str = "gw-flannel";
    let rig = Rig::start("put-right", Mode::Driver);
    let node = Node::new(1);
    let (subnet, mac) = (node.subnet(), node.vtep());
    let network = subnet.network();
    let state = || {
        let calls: [&[&str]; 4] = [
            &["ip", "route", "show", "dev", DEVICE],
            &["ip", "neigh", "show", "dev", DEVICE, "nud", "permanent"],
            &["bridge", "fdb", "show", "dev", DEVICE],
            &["ip", "-4", "-o", "address", "show", "dev", DEVICE, "scope", "global"],
        ];
        calls.map(|call| {
            // The device may be absent for a moment. Its index tells nothing.
            let text = rig.host().run(call).unwrap_or_default();
            let mut lines: Vec<String> = text
                .lines()
                .map(|line| line.split_once(": ").map_or(line, |(_, rest)| rest).trim().to_owned())
                .collect();
            lines.sort();
            lines
        })
    };
    wait_until("the daemon is calm", SOON, || Ok((state()[0].len() == 3).then_some(()))).unwrap();
    let right = state();
    for change in [
        format!("ip route del {subnet} dev {DEVICE}"),
        format!(
            "ip route replace {subnet} via {} dev {DEVICE} onlink proto 103 src {OVERLAY}",
            Ipv4Addr::new(10, 244, 9, 0)
        ),
        format!("ip neigh del {network} dev {DEVICE}"),
        format!("ip neigh replace {network} lladdr 02:00:00:00:00:99 dev {DEVICE} nud permanent"),
        format!("bridge fdb del {mac} dev {DEVICE}"),
        format!("bridge fdb replace {mac} dev {DEVICE} dst 172.16.2.99"),
        format!("bridge fdb add 02:00:00:00:00:98 dev {DEVICE} dst 172.16.2.98"),
        format!("ip address del {OVERLAY}/32 dev {DEVICE}"),
        format!("ip link set {DEVICE} address 02:00:00:00:00:97"),
        format!("ip link set {DEVICE} down"),
        format!("ip link del {DEVICE}"),
    ] {
        let start = std::time::Instant::now();
        let words: Vec<&str> = change.split(' ').collect();
        rig.host().run(&words).unwrap();
        wait_until(&change, AT_ONCE, || Ok((state() == right).then_some(()))).unwrap();
        println!("{change}: put right after {:?}", start.elapsed());
        assert_answered(rig.host(), node.pod_address(1), &[]);
    }
    rig.host().run(&["ip", "route", "add", "203.0.113.0/24", "dev", DEVICE]).unwrap();
    rig.host().run(&["ip", "route", "del", &subnet.to_string(), "dev", DEVICE]).unwrap();
    wait_until("the route is back", AT_ONCE, || {
        Ok(state()[0].iter().any(|line| line.starts_with(&subnet.to_string())).then_some(()))
    })
    .unwrap();
    assert!(state()[0].iter().any(|line| line.starts_with("203.0.113.0/24")));
}

/// From the program to the kernel alone and back, by the configuration.
#[test]
fn the_mode_can_be_changed() {
    let mut rig = Rig::start("mode", Mode::Driver);
    let with_program = fs::read_to_string(rig.lab.config()).unwrap();
    let (client, pod) = (1, Node::new(2).pod_address(1));
    for (text, expected) in [(with_program.clone() + OFF, false), (with_program, true)] {
        rig.gateway.stop().unwrap();
        fs::write(rig.lab.config(), text).unwrap();
        rig.gateway.restart(rig.lab.gateway()).unwrap();
        for interface in [EXTERNAL, UNDERLAY] {
            assert_eq!(attached(rig.host(), interface).unwrap(), expected, "{interface}");
        }
        assert_answered(rig.lab.client(client), pod, &[]);
        assert_answered(rig.host(), pod, &[]);
        // Healthy or not: the source may still be on its way.
        let say = |verb: &str| {
            let program = gateway_tests::lab::gateway::program().unwrap();
            let call = gateway_tests::lab::gateway::command(&program, &rig.lab.config(), &[verb]).unwrap();
            String::from_utf8_lossy(&rig.host().output(&call).unwrap().stdout).into_owned()
        };
        let (shown, checked) = (say("status"), say("check"));
        assert_eq!(shown.contains("the kernel alone forwards"), !expected, "{shown}");
        assert_eq!(checked.contains("xdp_mode off, inner source"), !expected, "{checked}");
        assert!(checked.contains("ok    firewall: nftables"), "{checked}");
    }
}
