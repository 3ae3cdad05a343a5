//! Throughput tools, counted datagrams, many short exchanges.

use std::{
    net::{Ipv4Addr, SocketAddrV4, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use gateway_tests::lab::{
    Host,
    outside::{AUTOMAP, GUEST},
    stream::{Account, Stream},
    traffic::{self, Transport},
};

use crate::rig::{ONE, Rig};

const PORT: u16 = 7000;
const RATE: u32 = 5000;

/// A connected socket of the guest and one of the pod that meet in one session; the session is open.
pub(crate) fn pair(rig: &Rig, pod: &Host, address: Ipv4Addr, port: u16, seen: Ipv4Addr) -> [UdpSocket; 2] {
    let client = rig.guest().udp(GUEST, port).unwrap();
    client.connect(SocketAddrV4::new(address, port)).unwrap();
    let server = pod.udp(address, port).unwrap();
    server.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    client.send(b"hello").unwrap();
    let mut buffer = [0; 16];
    let (_, from) = server.recv_from(&mut buffer).unwrap();
    assert_eq!(from.to_string(), format!("{seen}:{port}"), "the client's port is free, so it is kept");
    server.connect(from).unwrap();
    [client, server]
}

/// Streams in both directions of one session.
pub(crate) fn streams([client, server]: [UdpSocket; 2], rate: u32) -> [Stream; 2] {
    let [up, down] = [(&client, &server), (&server, &client)];
    [up, down]
        .map(|(from, to)| Stream::between(from.try_clone().unwrap(), to.try_clone().unwrap(), rate).unwrap())
}

pub(crate) fn assert_complete(name: &str, account: Account) {
    println!(
        "{name}: {} datagrams at {:.0} a second, {} lost, {} duplicated",
        account.sent,
        account.rate(),
        account.lost(),
        account.duplicated
    );
    assert_eq!((account.lost(), account.duplicated), (0, 0), "{name}: {account:?}");
}

#[test]
fn iperf_in_both_directions_at_once() {
    let rig = Rig::start("iperf");
    let (pod, address) = (rig.pod(1), ONE.pod_address(1));
    for (transport, options) in [
        (Transport::Tcp, &["--bidir"][..]),
        (Transport::Tcp, &["--reverse"]),
        (Transport::Udp { megabits: 20 }, &["--bidir"]),
    ] {
        let result = traffic::iperf(rig.guest(), pod, address, transport, options).unwrap();
        println!("{transport:?} {options:?}: {:.0} Mbit/s, lost {:?}", result.bits / 1e6, result.lost);
        assert!(result.bits > 5e6, "{transport:?} {options:?}: {result:?}");
        assert!(result.lost.is_none_or(|lost| lost < 1.0), "{transport:?} {options:?}: {result:?}");
    }
    rig.finish();
}

#[test]
fn datagrams_are_all_accounted_for() {
    let rig = Rig::start("datagrams");
    let streams = streams(pair(&rig, rig.pod(1), ONE.pod_address(1), PORT, AUTOMAP), RATE);
    thread::sleep(Duration::from_secs(2));
    for (name, stream) in ["to the pod", "to the client"].into_iter().zip(streams) {
        assert_complete(name, stream.finish().unwrap());
    }
    rig.finish();
}

/// As resolvers do it: every question from another port, one answer.
#[test]
fn short_exchanges() {
    const EXCHANGES: u16 = 3000;
    let rig = Rig::start("short");
    let server = rig.pod(2).udp(Ipv4Addr::UNSPECIFIED, 53).unwrap();
    server.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    let over = Arc::new(AtomicBool::new(false));
    let ended = Arc::clone(&over);
    let answering = thread::spawn(move || {
        let mut buffer = [0; 64];
        while !ended.load(Ordering::Relaxed) {
            if let Ok((length, from)) = server.recv_from(&mut buffer) {
                assert_eq!(from.ip(), AUTOMAP);
                buffer[..length].reverse();
                server.send_to(&buffer[..length], from).unwrap();
            }
        }
    });
    let mut lost = 0;
    for number in 0..EXCHANGES {
        let client = rig.guest().udp(GUEST, 20_000 + number).unwrap();
        client.connect(SocketAddrV4::new(ONE.pod_address(2), 53)).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
        let question = [number.to_be_bytes(), [1, 2]].concat();
        client.send(&question).unwrap();
        let mut answer = [0; 64];
        match client.recv(&mut answer) {
            Ok(length) => assert!(answer[..length].iter().rev().eq(&question)),
            Err(_) => lost += 1,
        }
    }
    over.store(true, Ordering::Relaxed);
    answering.join().unwrap();
    assert_eq!(lost, 0, "of {EXCHANGES}");
    // None was taken up again by the client, so none is established.
    let open = rig.sessions(&["--protocol", "udp", "--pod-port", "53"]);
    assert!(open.len() > usize::from(EXCHANGES) / 2, "{}", open.len());
    assert!(open.iter().all(|session| session["state"] == "opening"), "{:?}", open[0]);
    rig.finish();
}
