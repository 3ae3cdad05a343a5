//! A constant stream of numbered datagrams, and an account of every one of them.
//!
//! The sender keeps a rate and hardly hurries to catch up: what a busy machine makes it miss is not sent. A veth device
//! with an XDP program queues 256 frames, so a burst would be lost in the lab itself. The receiver has room for
//! several seconds of the stream and notes each number. Both hand the kernel many datagrams at once and go before
//! everything else on the machine, so that the rate holds whoever else wants a CPU. The kernel cuts what was handed
//! over into single packets before they meet the gateway (UDP segmentation offload). Before Linux 6.11 it does so only for
//! interfaces with checksum offload, which the lab's have not; there each datagram costs a system call.

use std::{
    io::{IoSlice, IoSliceMut},
    net::{SocketAddrV4, UdpSocket},
    os::fd::AsRawFd,
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};
use nix::{
    errno::Errno,
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    sys::socket::{
        ControlMessage, MsgFlags, MultiHeaders, SockaddrIn, recvmmsg, send as send_one, sendmsg, setsockopt,
        sockopt,
    },
    unistd::{Pid, gettid},
};

use super::host::Host;

/// Datagrams sent in a row at most.
const BURST: usize = 32;
/// Datagrams taken from the kernel at once.
const CATCH: usize = 256;
/// Time between two looks of the sender.
const SENDER_TICK: Duration = Duration::from_micros(200);
/// Time between two looks of the receiver.
const RECEIVER_TICK: Duration = Duration::from_millis(1);
/// How far the sender may fall behind before it gives up what it missed.
const LAG: Duration = Duration::from_millis(2);
/// Bytes of a datagram, the number in front.
const PAYLOAD: usize = 32;
const RECEIVE_BUFFER: usize = 256 << 20;
/// After so long without a datagram the rest is lost.
const SILENCE: Duration = Duration::from_secs(1);

/// What became of a stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Account {
    /// Datagrams sent.
    pub sent: u64,
    /// Different datagrams received.
    pub received: u64,
    /// Datagrams received again.
    pub duplicated: u64,
    /// Datagrams received after one with a higher number.
    pub overtaken: u64,
    /// Time from the first to the last one sent.
    pub duration: Duration,
}

impl Account {
    /// Datagrams sent and never received.
    pub fn lost(&self) -> u64 {
        self.sent - self.received
    }

    /// Datagrams per second.
    pub fn rate(&self) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "far fewer than 2^52 datagrams")]
        let sent = self.sent as f64;
        sent / self.duration.as_secs_f64().max(f64::EPSILON)
    }
}

/// A stream that runs until [`Self::finish`].
#[derive(Debug)]
pub struct Stream {
    /// Nothing more is to be sent.
    over: Arc<AtomicBool>,
    /// Nothing more is being sent.
    complete: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    sender: JoinHandle<Result<Duration>>,
    receiver: JoinHandle<Result<Received>>,
}

impl Stream {
    /// Sends `rate` datagrams per second from `port` at one host to the same port at the other one.
    pub fn start(from: &Host, to: &Host, interface: &str, port: u16, rate: u32) -> Result<Self> {
        let (source, destination) = (from.address(interface)?, to.address(interface)?);
        let outlet = from.udp(source, port)?;
        outlet.connect(SocketAddrV4::new(destination, port))?;
        let inlet = to.udp(destination, port)?;
        inlet.connect(SocketAddrV4::new(source, port))?;
        Self::between(outlet, inlet, rate)
    }

    /// Sends `rate` datagrams per second from one connected socket to another.
    pub fn between(outlet: UdpSocket, inlet: UdpSocket, rate: u32) -> Result<Self> {
        inlet.set_nonblocking(true)?;
        setsockopt(&inlet, sockopt::RcvBufForce, &RECEIVE_BUFFER)
            .context("cannot enlarge a socket buffer")?;
        let (over, sent) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (ended, count) = (Arc::clone(&over), Arc::clone(&sent));
        let sender = thread::spawn(move || send(&outlet, rate, &ended, &count));
        let complete = Arc::new(AtomicBool::new(false));
        let (ended, count) = (Arc::clone(&complete), Arc::clone(&sent));
        let receiver = thread::spawn(move || receive(&inlet, &ended, &count));
        Ok(Self { over, complete, sent, sender, receiver })
    }

    /// Datagrams sent so far.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Acquire)
    }

    /// Ends the stream, and waits for what is under way.
    pub fn finish(self) -> Result<Account> {
        self.over.store(true, Ordering::Release);
        let join = |_| anyhow!("a thread of the stream panicked");
        let duration = self.sender.join().map_err(join)??;
        self.complete.store(true, Ordering::Release);
        let received = self.receiver.join().map_err(join)??;
        Ok(Account {
            sent: self.sent.load(Ordering::Acquire),
            received: received.different,
            duplicated: received.duplicated,
            overtaken: received.overtaken,
            duration,
        })
    }
}

/// Gives the calling thread precedence before all ordinary ones. Niceness would not do: the kernel gives every session
/// its share of the CPUs first (`sched_autogroup_enabled`). Where it is refused, only the rate suffers.
fn hurry() {
    let _ = Command::new("chrt")
        .args(["--rr", "--pid", "1", &gettid().to_string()])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
}

/// Binds the calling thread to a CPU, each caller to the next one: most of a packet's way through the lab is worked off
/// in its sender's system call, and senders that share a CPU halve each other's rate.
fn take_turn() -> Result<()> {
    static TURN: AtomicUsize = AtomicUsize::new(0);
    let this = Pid::from_raw(0);
    let allowed = sched_getaffinity(this)?;
    let cpus: Vec<usize> = (0..CpuSet::count()).filter(|cpu| allowed.is_set(*cpu) == Ok(true)).collect();
    let mut own = CpuSet::new();
    own.set(cpus[TURN.fetch_add(1, Ordering::Relaxed) % cpus.len()])?;
    sched_setaffinity(this, &own).context("cannot bind a stream to a CPU")
}

fn send(socket: &UdpSocket, rate: u32, over: &AtomicBool, sent: &AtomicU64) -> Result<Duration> {
    hurry();
    take_turn()?;
    let interval = Duration::from_secs(1) / rate;
    let mut payloads = [[0; PAYLOAD]; BURST];
    let size = u16::try_from(PAYLOAD)?;
    let mut cuts = true;
    let start = Instant::now();
    let mut due = start;
    let mut number = 0_u64;
    while !over.load(Ordering::Acquire) {
        let now = Instant::now();
        due = due.max(now.checked_sub(LAG).unwrap_or(now));
        let mut burst = 0;
        while due <= now && burst < BURST {
            payloads[burst][..8].copy_from_slice(&(number + burst as u64).to_be_bytes());
            burst += 1;
            due += interval;
        }
        if burst > 0 {
            let handed = if cuts {
                send_burst(socket, size, &payloads[..burst])
            } else {
                send_singly(socket, &payloads[..burst])
            };
            match handed {
                Ok(datagrams) => number += datagrams,
                // A socket that also receives does not wait.
                Err(Errno::EAGAIN) => {}
                Err(Errno::EIO) if cuts => cuts = false,
                Err(error) => return Err(error).context("cannot send datagrams of the stream"),
            }
        }
        sent.store(number, Ordering::Release);
        if due > now {
            thread::sleep(SENDER_TICK);
        }
    }
    Ok(start.elapsed())
}

/// Hands over all of it at once, to be cut into datagrams of that size; gives how many they are.
fn send_burst(socket: &UdpSocket, size: u16, payloads: &[[u8; PAYLOAD]]) -> nix::Result<u64> {
    let bytes = [IoSlice::new(payloads.as_flattened())];
    let cut = [ControlMessage::UdpGsoSegments(&size)];
    sendmsg::<SockaddrIn>(socket.as_raw_fd(), &bytes, &cut, MsgFlags::empty(), None)?;
    Ok(payloads.len() as u64)
}

/// Hands over one after the other; gives how many of them the kernel took.
fn send_singly(socket: &UdpSocket, payloads: &[[u8; PAYLOAD]]) -> nix::Result<u64> {
    for (sent, payload) in payloads.iter().enumerate() {
        match send_one(socket.as_raw_fd(), payload, MsgFlags::empty()) {
            Ok(_) => {}
            Err(Errno::EAGAIN) => return Ok(sent as u64),
            Err(error) => return Err(error),
        }
    }
    Ok(payloads.len() as u64)
}

#[derive(Debug, Default)]
struct Received {
    seen: Vec<u64>,
    highest: Option<u64>,
    different: u64,
    duplicated: u64,
    overtaken: u64,
}

impl Received {
    fn take(&mut self, number: u64) -> Result<()> {
        let (word, bit) = (usize::try_from(number / 64)?, 1 << (number % 64));
        if word >= self.seen.len() {
            self.seen.resize(word + 1, 0);
        }
        if self.seen[word] & bit != 0 {
            self.duplicated += 1;
            return Ok(());
        }
        self.seen[word] |= bit;
        self.different += 1;
        if self.highest.is_some_and(|highest| number < highest) {
            self.overtaken += 1;
        } else {
            self.highest = Some(number);
        }
        Ok(())
    }
}

fn receive(socket: &UdpSocket, complete: &AtomicBool, sent: &AtomicU64) -> Result<Received> {
    hurry();
    let mut received = Received::default();
    let mut payloads = [[0; PAYLOAD]; CATCH];
    let mut headers = MultiHeaders::<SockaddrIn>::preallocate(CATCH, None);
    let mut last = Instant::now();
    loop {
        let mut slices: Vec<_> = payloads.iter_mut().map(|payload| [IoSliceMut::new(payload)]).collect();
        match recvmmsg(socket.as_raw_fd(), &mut headers, &mut slices, MsgFlags::MSG_DONTWAIT, None) {
            Ok(datagrams) => {
                for datagram in datagrams {
                    ensure!(
                        datagram.bytes == PAYLOAD,
                        "the stream carries a datagram of {} bytes",
                        datagram.bytes
                    );
                    let payload = datagram.iovs().next().context("a datagram without bytes")?;
                    received.take(payload[..8].try_into().map(u64::from_be_bytes)?)?;
                }
                last = Instant::now();
            }
            Err(Errno::EAGAIN) => {
                let all = || received.different == sent.load(Ordering::Acquire);
                if complete.load(Ordering::Acquire) && (all() || last.elapsed() > SILENCE) {
                    return Ok(received);
                }
                thread::sleep(RECEIVER_TICK);
            }
            Err(error) => return Err(error).context("cannot receive the stream"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accounts_for_every_number() {
        let mut received = Received::default();
        for number in [0, 1, 3, 2, 3, 200] {
            received.take(number).unwrap();
        }
        assert_eq!((received.different, received.duplicated, received.overtaken), (5, 1, 1));
        let account = Account { sent: 201, received: received.different, ..Account::default() };
        assert_eq!(account.lost(), 196);
    }
}
