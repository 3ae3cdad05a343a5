//! A constant stream of numbered datagrams.

use std::{
    net::{Ipv4Addr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use gateway_tests::lab::Host;

/// Between two datagrams.
const PERIOD: Duration = Duration::from_millis(1);
/// How long the last datagrams may be under way.
const TAIL: Duration = Duration::from_millis(500);

/// One direction of traffic.
pub(crate) struct Stream {
    over: Arc<AtomicBool>,
    sender: JoinHandle<u64>,
    receiver: JoinHandle<Vec<u64>>,
}

impl Stream {
    pub(crate) fn start(from: &Host, to: &Host, address: Ipv4Addr, port: u16) -> Self {
        let target = to.udp(Ipv4Addr::UNSPECIFIED, port).unwrap();
        let source = from.udp(Ipv4Addr::UNSPECIFIED, 0).unwrap();
        source.connect((address, port)).unwrap();
        let over = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&over);
        let sender = thread::spawn(move || send(&source, &ended));
        let receiver = thread::spawn(move || receive(&target));
        Self { over, sender, receiver }
    }

    /// How many datagrams were sent; panics unless each arrived once.
    pub(crate) fn stop(self) -> u64 {
        self.over.store(true, Ordering::Relaxed);
        let sent = self.sender.join().unwrap();
        let mut seen = self.receiver.join().unwrap();
        let received = seen.len();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), received, "some arrived twice");
        let first_lost =
            (0..sent).zip(&seen).find(|(wanted, found)| wanted != *found).map(|(wanted, _)| wanted);
        assert_eq!(received as u64, sent, "lost, the first being {first_lost:?}");
        sent
    }
}

fn send(socket: &UdpSocket, over: &AtomicBool) -> u64 {
    let begin = Instant::now();
    let mut number = 0_u64;
    while !over.load(Ordering::Relaxed) {
        socket.send(&number.to_be_bytes()).unwrap();
        number += 1;
        let next = begin + PERIOD * u32::try_from(number).unwrap();
        thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    // Tells the receiver that it is over, often enough for it to be heard.
    for _ in 0..3 {
        thread::sleep(TAIL / 3);
        // Refused once the receiver has heard it.
        let _ = socket.send(&u64::MAX.to_be_bytes());
    }
    number
}

fn receive(socket: &UdpSocket) -> Vec<u64> {
    socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let mut seen = Vec::new();
    let mut buffer = [0; 8];
    while let Ok(8) = socket.recv(&mut buffer) {
        match u64::from_be_bytes(buffer) {
            u64::MAX => break,
            number => seen.push(number),
        }
    }
    seen
}
