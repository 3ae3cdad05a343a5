//! What connections do at their beginning and end.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, Shutdown, SocketAddrV4, TcpStream},
    os::fd::AsFd as _,
    thread,
    time::Duration,
};

use gateway_tests::lab::{
    outside::{AUTOMAP, GUEST},
    wait_until,
};
use nix::sys::socket::{setsockopt, sockopt};

use crate::{
    rig::{ONE, Rig, SOON},
    serve::body,
};

const PORT: u16 = 8000;
const LIMIT: Duration = Duration::from_secs(5);

fn pod() -> SocketAddrV4 {
    SocketAddrV4::new(ONE.pod_address(1), PORT)
}

fn guest(port: u16) -> SocketAddrV4 {
    SocketAddrV4::new(GUEST, port)
}

fn patient(stream: TcpStream) -> TcpStream {
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream
}

/// A connection: the client's end and the pod's.
fn connection(rig: &Rig, listener: &std::net::TcpListener, port: u16) -> [TcpStream; 2] {
    let client = rig.guest().connect(guest(port), pod()).unwrap();
    let (server, from) = listener.accept().unwrap();
    assert_eq!(from.ip(), AUTOMAP);
    [client, server].map(patient)
}

/// Closing sends RST.
fn reset(stream: TcpStream) {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    setsockopt(&stream.as_fd(), sockopt::Linger, &linger).unwrap();
    drop(stream);
}

fn state(rig: &Rig, port: u16) -> Option<String> {
    let found = rig.sessions(&["--protocol", "tcp", "--client", "192.0.2.10", "--port", &port.to_string()]);
    Some(found.first()?["state"].as_str()?.to_owned())
}

fn wait_state(rig: &Rig, port: u16, expected: Option<&str>) {
    wait_until(&format!("the session of port {port} is {expected:?}"), SOON * 2, || {
        Ok((state(rig, port).as_deref() == expected).then_some(()))
    })
    .unwrap();
}

#[test]
fn half_closed_connections_go_on_in_the_other_direction() {
    let rig = Rig::start("half-close");
    let listener = rig.pod(1).listen(Ipv4Addr::UNSPECIFIED, PORT).unwrap();
    for (port, client_first) in [(4001, true), (4002, false)] {
        let [client, server] = connection(&rig, &listener, port);
        let [mut first, mut second] = if client_first { [client, server] } else { [server, client] };
        first.shutdown(Shutdown::Write).unwrap();
        assert_eq!(second.read(&mut [0; 8]).unwrap(), 0);
        assert_eq!(state(&rig, port).as_deref(), Some("established"), "half closed is established");
        let sent = body("half", u64::from(port), 300_000);
        let copy = sent.clone();
        let writer = thread::spawn(move || {
            second.write_all(&copy).unwrap();
            second.shutdown(Shutdown::Write).unwrap();
            second
        });
        let mut received = Vec::new();
        first.read_to_end(&mut received).unwrap();
        assert!(received == sent);
        drop(writer.join().unwrap());
        wait_state(&rig, port, Some("closing"));
    }
    rig.finish();
}

/// RST in any state: to a port that nobody listens at, established, half closed, closed; by either side. What is reset is
/// soon forgotten.
#[test]
fn resets_come_through_and_end_the_session() {
    let rig = Rig::configured("resets", "[snat.timeouts]\ntcp_reset = 1\n", &[AUTOMAP]);
    let refused = rig.guest().connect(guest(4100), pod());
    assert!(format!("{:#}", refused.unwrap_err()).contains("refused"));
    let listener = rig.pod(1).listen(Ipv4Addr::UNSPECIFIED, PORT).unwrap();
    for (port, client_resets, half_closed) in
        [(4101, true, false), (4102, false, false), (4103, true, true), (4104, false, true)]
    {
        let [client, server] = connection(&rig, &listener, port);
        let [resetting, mut other] = if client_resets { [client, server] } else { [server, client] };
        if half_closed {
            other.shutdown(Shutdown::Write).unwrap();
        }
        reset(resetting);
        let error = other.read(&mut [0; 8]).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{port}");
    }
    for port in 4100..=4104 {
        wait_state(&rig, port, None);
    }
    rig.finish();
}

/// The pod closes first and keeps TIME_WAIT; the client comes again from the same port.
#[test]
fn a_port_is_used_again_within_time_wait() {
    let rig = Rig::start("time-wait");
    let listener = rig.pod(1).listen(Ipv4Addr::UNSPECIFIED, PORT).unwrap();
    for round in 0..5_u8 {
        let [mut client, mut server] = connection(&rig, &listener, 4200);
        client.write_all(&[round]).unwrap();
        let mut seen = [0];
        server.read_exact(&mut seen).unwrap();
        assert_eq!(seen, [round]);
        drop(server);
        assert_eq!(client.read(&mut seen).unwrap(), 0);
        drop(client);
        wait_state(&rig, 4200, Some("closing"));
        let waiting = rig.pod(1).run(&["ss", "-Htn", "state", "time-wait", "sport", "=", ":8000"]).unwrap();
        assert!(waiting.contains(&format!("{AUTOMAP}:4200")), "{waiting}");
    }
    rig.finish();
}

/// Both ends connect, nobody listens. The pod's SYN finds no session until the client has sent its own.
#[test]
fn simultaneous_open() {
    let rig = Rig::start("simultaneous");
    let (port, seen) = (4300, SocketAddrV4::new(AUTOMAP, 4300));
    let [mut client, mut server] = thread::scope(|scope| {
        let server = scope.spawn(|| rig.pod(1).connect(pod(), seen).unwrap());
        thread::sleep(Duration::from_millis(100));
        let client = rig.guest().connect(guest(port), pod()).unwrap();
        [client, server.join().unwrap()].map(patient)
    });
    let mut buffer = [0; 4];
    client.write_all(b"ping").unwrap();
    server.read_exact(&mut buffer).unwrap();
    assert_eq!(&buffer, b"ping");
    server.write_all(b"pong").unwrap();
    client.read_exact(&mut buffer).unwrap();
    assert_eq!(&buffer, b"pong");
    assert_eq!(state(&rig, port).as_deref(), Some("established"));
    rig.finish();
}
