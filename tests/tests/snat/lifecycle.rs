//! How sessions end, and how they go on.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddrV4},
    thread,
    time::Duration,
};

use gateway_tests::lab::{
    flannel::Node,
    outside::{AUTOMAP, GUEST},
    wait_until,
};

use crate::{
    rig::{ONE, Rig, SOON},
    serve::{BodyServer, fetch},
};

const HTTP: u16 = 80;

fn to(pod: Ipv4Addr) -> SocketAddrV4 {
    SocketAddrV4::new(pod, HTTP)
}

fn event(rig: &Rig, name: &str) -> u64 {
    rig.status()["sessions"]["events"][name].as_u64().unwrap()
}

/// Sends a datagram from this port of the guest; whether it came to the pod.
fn knock(rig: &Rig, server: &std::net::UdpSocket, port: u16) -> bool {
    let client = rig.guest().udp(GUEST, port).unwrap();
    client.connect(SocketAddrV4::new(ONE.pod_address(1), 9)).unwrap();
    client.send(&port.to_be_bytes()).unwrap();
    let mut buffer = [0; 8];
    server.recv_from(&mut buffer).is_ok_and(|(length, _)| buffer[..length] == port.to_be_bytes())
}

#[test]
fn sessions_of_a_pod_that_vanished_end() {
    let mut rig = Rig::start("vanished");
    let _servers = [BodyServer::start(rig.pod(1), HTTP), BodyServer::start(rig.pod(2), HTTP)];
    let streams = [1, 2].map(|pod| {
        let stream = rig.guest().connect(SocketAddrV4::new(GUEST, 0), to(ONE.pod_address(pod))).unwrap();
        fetch(&stream, &ONE.pod(pod), 1, 1000).unwrap();
        stream
    });
    assert_eq!(rig.sessions(&["--protocol", "tcp"]).len(), 2);
    rig.lab.remove_pod(ONE, 2).unwrap();
    wait_until("its session ends", SOON, || {
        let pod = ONE.pod_address(2).to_string();
        Ok(rig.sessions(&["--pod", &pod]).is_empty().then_some(()))
    })
    .unwrap();
    assert_eq!(event(&rig, "flushed"), 1);
    fetch(&streams[0], &ONE.pod(1), 2, 1000).unwrap();
    rig.finish();
}

/// The same connection, from one node to another and back to traffic.
#[test]
fn a_pod_that_moves_keeps_its_sessions() {
    let mut rig = Rig::start("moves");
    let _server = BodyServer::start(rig.pod(1), HTTP);
    let stream = rig.guest().connect(SocketAddrV4::new(GUEST, 0), to(ONE.pod_address(1))).unwrap();
    fetch(&stream, &ONE.pod(1), 1, 100_000).unwrap();
    let node = |rig: &Rig| rig.sessions(&["--protocol", "tcp"])[0]["node"].clone();
    assert_eq!(node(&rig), "node1");
    rig.lab.move_pod(ONE, 1, Node::new(2)).unwrap();
    fetch(&stream, &ONE.pod(1), 2, 100_000).unwrap();
    assert_eq!(node(&rig), "node2");
    assert_eq!(rig.sessions(&["--protocol", "tcp"]).len(), 1);
    rig.finish();
}

const SHORT: &str = "[snat.timeouts]\nudp_opening = 1\nudp = 2\nicmp = 1\ntcp_reset = 1\n";

/// The daemon ends what is idle; without it the program does so where it needs room.
#[test]
fn idle_sessions_end_with_the_daemon_and_without() {
    let keys = format!("[snat]\nmax_sessions = 8\n{SHORT}");
    let mut rig = Rig::configured("idle", &keys, &[AUTOMAP]);
    let server = rig.pod(1).udp(Ipv4Addr::UNSPECIFIED, 9).unwrap();
    server.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
    for port in 5000..5004 {
        assert!(knock(&rig, &server, port), "{port}");
    }
    wait_until("all expire", SOON * 2, || Ok(rig.sessions(&[]).is_empty().then_some(()))).unwrap();
    assert!(event(&rig, "expired") >= 4);

    rig.gateway.kill().unwrap();
    for round in 0..3 {
        for port in 0..8 {
            assert!(knock(&rig, &server, 6000 + round * 100 + port), "{round} {port}");
        }
        thread::sleep(Duration::from_millis(1500));
    }
    assert!(event(&rig, "reclaimed") >= 8, "{}", rig.status()["sessions"]);
    rig.finish();
}

/// `show` and `flush` while nobody runs.
#[test]
fn sessions_are_shown_and_flushed_without_the_daemon() {
    let mut rig = Rig::start("flush");
    let _server = BodyServer::start(rig.pod(1), HTTP);
    let mut stream = rig.guest().connect(SocketAddrV4::new(GUEST, 4711), to(ONE.pod_address(1))).unwrap();
    fetch(&stream, &ONE.pod(1), 1, 1000).unwrap();
    rig.assert_reaches_all(rig.lab.remote());
    rig.gateway.kill().unwrap();

    let count = |arguments: &[&str]| rig.sessions(arguments).len();
    assert_eq!(count(&["--protocol", "icmp"]), 3);
    assert_eq!(count(&["--port", "4711"]), 1);
    assert_eq!(count(&["--client", "198.51.100.0/24"]), 3);
    let table = rig.gateway.text(rig.host(), &["show", "sessions", "--protocol", "tcp"]).unwrap();
    assert!(table.contains("192.0.2.10:4711") && table.contains("established"), "{table}");

    let refused = rig.gateway.output(rig.host(), &["sessions", "flush"]).unwrap();
    assert_eq!(refused.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("--all"), "{refused:?}");
    let flush = |arguments: &[&str]| {
        rig.gateway.text(rig.host(), &[&["sessions", "flush"], arguments].concat()).unwrap()
    };
    assert_eq!(flush(&["--protocol", "icmp", "--client", "198.51.100.10"]).trim(), "sessions ended: 3");
    assert_eq!(count(&[]), 1);
    fetch(&stream, &ONE.pod(1), 2, 1000).unwrap();
    assert_eq!(flush(&["--all"]).trim(), "sessions ended: 1");
    assert_eq!(count(&[]), 0);
    assert_eq!(event(&rig, "flushed"), 4);
    // What comes of it is no session, and says nothing to anybody.
    stream.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    stream.write_all(b"GET /3/10 HTTP/1.1\r\n\r\n").unwrap();
    let _ = stream.read(&mut [0; 100]);
    rig.finish();
}
