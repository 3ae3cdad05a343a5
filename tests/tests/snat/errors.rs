//! What does not fit, expires or cannot be translated.

use std::net::{Ipv4Addr, SocketAddrV4};

use gateway_tests::lab::{
    flannel::{EXTERNAL, NIC},
    frames,
    outside::{GUEST, GUEST_ROUTER, REMOTE},
    traffic,
};

use crate::{
    rig::{ONE, Rig},
    serve::{BodyServer, fetch},
};

const HTTP: u16 = 80;
/// As TCP does without a lowered segment size.
const UNCLAMPED: &str = "mss_clamp = false\n";

fn connect(rig: &Rig, from: &gateway_tests::lab::Host, address: Ipv4Addr) -> std::net::TcpStream {
    let to = SocketAddrV4::new(ONE.pod_address(1), HTTP);
    let _ = rig;
    from.connect(SocketAddrV4::new(address, 0), to).unwrap()
}

/// A client that sends more than fits the tunnel is told so, quoting its own packet.
#[test]
fn clients_learn_the_path_to_the_pod() {
    let rig = Rig::start("pmtu-in");
    let output = rig
        .guest()
        .output(&[
            "ping",
            "-n",
            "-c",
            "2",
            "-i",
            "0.2",
            "-W",
            "1",
            "-M",
            "do",
            "-s",
            "1460",
            &ONE.pod_address(1).to_string(),
        ])
        .unwrap();
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("mtu = 1450") || text.contains("mtu=1450"), "{text}");
    let fits = traffic::ping(rig.guest(), ONE.pod_address(1), 3, &["-M", "do", "-s", "1422"]).unwrap();
    assert_eq!(fits.received, 3);
    rig.finish();
}

/// Behind the client's router packets must be smaller than at both ends: the router tells the pod, through the translation.
#[test]
fn pods_learn_the_path_to_the_client() {
    let rig = Rig::configured("pmtu-out", UNCLAMPED, &[gateway_tests::lab::outside::AUTOMAP]);
    let router = rig.lab.named("router");
    router.run(&["ip", "link", "set", "eth1", "mtu", "1200"]).unwrap();
    let _server = BodyServer::start(rig.pod(1), HTTP);
    let before = rig.counters();
    let stream = connect(&rig, rig.lab.remote(), REMOTE);
    fetch(&stream, &ONE.pod(1), 1, 500_000).unwrap();
    assert!(rig.since(&before, "snat_error_forward") > 0);
    let learnt = rig.pod(1).run(&["ip", "route", "get", "10.244.30.254"]).unwrap();
    assert!(learnt.contains("mtu 1200"), "{learnt}");
    rig.finish();
}

/// Full-size uploads without a lowered segment size.
#[test]
fn uploads_find_their_size() {
    use std::io::{Read as _, Write as _};
    let rig = Rig::configured("pmtu-upload", UNCLAMPED, &[gateway_tests::lab::outside::AUTOMAP]);
    let listener = rig.pod(1).listen(Ipv4Addr::UNSPECIFIED, HTTP).unwrap();
    let sent = crate::serve::body("upload", 1, 500_000);
    let mut client = connect(&rig, rig.guest(), GUEST);
    let (mut server, _) = listener.accept().unwrap();
    let copy = sent.clone();
    let writer = std::thread::spawn(move || client.write_all(&copy).unwrap());
    let mut received = vec![0; sent.len()];
    server.set_read_timeout(Some(std::time::Duration::from_secs(10))).unwrap();
    server.read_exact(&mut received).unwrap();
    assert!(received == sent);
    writer.join().unwrap();
    rig.finish();
}

/// The hops of a trace, by what answered.
fn hops(text: &str) -> Vec<String> {
    text.lines().skip(1).filter_map(|line| line.split_whitespace().nth(1)).map(str::to_owned).collect()
}

#[test]
fn traceroute_from_outside() {
    let rig = Rig::start("trace-in");
    let pod = ONE.pod_address(1).to_string();
    for (kind, options) in [("UDP", &["-U"][..]), ("TCP", &["-T", "-p", "80"]), ("ICMP", &["-I"])] {
        let call = [&["traceroute", "-n", "-q", "1", "-w", "2", "-m", "6"], options, &[&pod]].concat();
        let text = rig.guest().run(&call).unwrap();
        let hops = hops(&text);
        assert_eq!(hops.first(), Some(&GUEST_ROUTER.to_string()), "{kind}: {text}");
        // The node, by an address of its own in the overlay.
        assert!(hops.len() == 3 && hops[1].starts_with("10.244.1."), "{kind}: {text}");
        assert_eq!(hops[2], pod, "{kind}: {text}");
    }
    rig.finish();
}

/// A pod traces the way of its answers: the node, the gateway, the client's router, the client.
#[test]
fn traceroute_from_a_pod_along_a_session() {
    let rig = Rig::start("trace-out");
    let (client_port, pod_port) = (4400, 4401);
    // The client opens the session and goes: its host refuses what comes then.
    let client = rig.lab.remote().udp(REMOTE, client_port).unwrap();
    client.connect(SocketAddrV4::new(ONE.pod_address(1), pod_port)).unwrap();
    let server = rig.pod(1).udp(Ipv4Addr::UNSPECIFIED, pod_port).unwrap();
    client.send(b"open").unwrap();
    server.recv_from(&mut [0; 8]).unwrap();
    drop((client, server));
    let (port, source) = (client_port.to_string(), format!("--sport={pod_port}"));
    let call =
        ["traceroute", "-n", "-U", "-q", "1", "-w", "2", "-m", "6", "-p", &port, &source, "10.244.30.254"];
    let text = rig.pod(1).run(&call).unwrap();
    let hops = hops(&text);
    assert_eq!(hops.first().map(String::as_str), Some("10.244.1.1"), "{text}");
    assert!(hops.len() == 4, "{text}");
    assert_eq!(hops.last().map(String::as_str), Some("10.244.30.254"), "{text}");
    rig.finish();
}

/// What cannot be translated is dropped under its own counter.
#[test]
fn what_cannot_be_translated_is_refused() {
    let rig = Rig::start("refused");
    let pod = ONE.pod_address(1);
    let before = rig.counters();
    // SCTP: an INIT.
    let header = etherparse::PacketBuilder::ipv4(GUEST.octets(), pod.octets(), 64);
    let mut packet = Vec::new();
    header
        .write(
            &mut packet,
            etherparse::IpNumber::SCTP,
            &[0x0f, 0xa0, 0x0f, 0xa1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 20],
        )
        .unwrap();
    let (source, destination) = (rig.guest().mac(NIC).unwrap(), rig.host().mac(EXTERNAL).unwrap());
    rig.guest().inject(NIC, &frames::ethernet(source, destination, frames::IPV4, &packet)).unwrap();
    rig.wait_count(&before, "snat_protocol", 1);

    let answered = |options: &[&str]| traffic::ping(rig.guest(), pod, 2, options).unwrap().received;
    // Fragments of the sender's, and what would have to be cut here.
    assert_eq!(answered(&["-s", "3000"]), 0);
    rig.wait_count(&before, "snat_fragment", 2);
    assert_eq!(answered(&["-M", "dont", "-s", "1460"]), 0);
    rig.wait_count(&before, "snat_oversize", 2);
    // IP options: the route that is recorded would tell addresses of both sides.
    assert_eq!(answered(&["-R"]), 0);
    rig.wait_count(&before, "snat_options", 2);
    assert_eq!(answered(&[]), 2);
    rig.finish();
}
