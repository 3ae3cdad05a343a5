//! Traffic that people know: ping, iperf3, HTTP; with results as values.

use std::{
    fmt,
    io::{BufRead, BufReader, Write},
    net::{Ipv4Addr, Shutdown, TcpListener, TcpStream},
    os::fd::AsRawFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::socket;
use serde_json::Value;

use super::{
    flannel::{Flannel, NIC},
    host::Host,
    process::Process,
    wait_until,
};

/// Result of pings.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pings {
    /// Requests sent.
    pub sent: u32,
    /// Answers received.
    pub received: u32,
    /// Mean time to the answer, in milliseconds; `None` without answers.
    pub mean: Option<f64>,
}

/// Sends `count` echo requests 20 ms apart and waits at most a second for answers.
/// `options` go to ping: `["-s", "1400"]`.
pub fn ping(from: &Host, to: Ipv4Addr, count: u32, options: &[&str]) -> Result<Pings> {
    let (count, to) = (count.to_string(), to.to_string());
    let call = [&["ping", "-n", "-q", "-i", "0.02", "-W", "1", "-c", &count], options, &[&to]].concat();
    let output = from.output(&call)?;
    let text = String::from_utf8_lossy(&output.stdout);
    // 1 means that answers are missing, 2 that ping could not do its work.
    if !matches!(output.status.code(), Some(0 | 1)) {
        bail!("{}: ping {to}: {}{text}", from.name(), String::from_utf8_lossy(&output.stderr));
    }
    parse_ping(&text).with_context(|| format!("ping printed something unexpected:\n{text}"))
}

/// Whether one echo request is answered.
pub fn reaches(from: &Host, to: Ipv4Addr) -> Result<bool> {
    Ok(ping(from, to, 1, &["-w", "1"])?.received == 1)
}

/// Waits until echo requests are answered, or are not any more.
pub fn wait_reachable(from: &Host, to: Ipv4Addr, expected: bool, limit: Duration) -> Result<()> {
    let verb = if expected { "reaches" } else { "no longer reaches" };
    wait_until(&format!("{} {verb} {to}", from.name()), limit, || {
        let answered = ping(from, to, 1, &["-W", "0.2"])?.received == 1;
        Ok((answered == expected).then_some(()))
    })
}

fn parse_ping(text: &str) -> Option<Pings> {
    let counts = text.lines().find(|line| line.contains("packets transmitted"))?;
    let mut counts = counts.split(", ").filter_map(|part| part.split(' ').next()?.parse().ok());
    let (sent, received) = (counts.next()?, counts.next()?);
    // "rtt min/avg/max/mdev = 0.041/0.045/0.052/0.004 ms"
    let mean = text
        .lines()
        .find(|line| line.starts_with("rtt"))
        .and_then(|line| line.split('/').nth(4)?.parse().ok());
    Some(Pings { sent, received, mean })
}

/// Transport of an iperf3 run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// As fast as it goes.
    Tcp,
    /// At a fixed rate, in megabits per second.
    Udp {
        /// The rate.
        megabits: u32,
    },
}

/// Result of an iperf3 run, as the receiver saw it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Throughput {
    /// Bits per second.
    pub bits: f64,
    /// Datagrams lost, in percent; `None` for TCP.
    pub lost: Option<f64>,
}

/// Runs iperf3 for a second with the server on `to`. `options` go to the client: `["-P", "8"]`.
pub fn iperf(
    from: &Host,
    to: &Host,
    address: Ipv4Addr,
    transport: Transport,
    options: &[&str],
) -> Result<Throughput> {
    let mut server = to.spawn(&["iperf3", "--server", "--one-off", "--forceflush", "--port", IPERF])?;
    wait_listening(&mut server)?;
    let address = address.to_string();
    let rate;
    let mut call = vec![
        "iperf3",
        "--json",
        "--connect-timeout",
        "3000",
        "--port",
        IPERF,
        "--time",
        "1",
        "--client",
        &address,
    ];
    if let Transport::Udp { megabits } = transport {
        rate = format!("{megabits}M");
        call.extend(["--udp", "--length", "1200", "--bitrate", &rate]);
    }
    call.extend(options);
    let output = from.output(&call)?;
    let report: Value = serde_json::from_slice(&output.stdout)
        .with_context(|| format!("iperf3 printed no JSON: {}", String::from_utf8_lossy(&output.stderr)))?;
    if let Some(error) = report["error"].as_str() {
        bail!("iperf3 from {} to {} {address}: {error}", from.name(), to.name());
    }
    server.wait(Duration::from_secs(5))?;
    let sum = &report["end"][if transport == Transport::Tcp { "sum_received" } else { "sum" }];
    let bits = sum["bits_per_second"].as_f64().context("iperf3 reports no throughput")?;
    Ok(Throughput { bits, lost: sum["lost_percent"].as_f64() })
}

const IPERF: &str = "5201";

fn wait_listening(server: &mut Process) -> Result<()> {
    wait_until("iperf3 listens", Duration::from_secs(5), || {
        ensure!(server.ended()?.is_none(), "the iperf3 server ended: {}", server.output()?);
        Ok(server.output()?.contains("Server listening").then_some(()))
    })
}

/// A web server on a host: answers every request with the host's name and the client's address.
#[derive(Debug)]
pub struct WebServer {
    port: u16,
    listener: TcpListener,
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl WebServer {
    /// Starts on all addresses of the host.
    pub fn start(host: &Host, port: u16) -> Result<Self> {
        let listener = host.listen(Ipv4Addr::UNSPECIFIED, port)?;
        let over = Arc::new(AtomicBool::new(false));
        let (accepting, ended, name) = (listener.try_clone()?, Arc::clone(&over), host.name().to_owned());
        let thread = thread::spawn(move || {
            while !ended.load(Ordering::Relaxed) {
                // A client that goes away is its own affair.
                if let Ok((stream, _)) = accepting.accept() {
                    let _ = answer(&stream, &name);
                }
            }
        });
        Ok(Self { port, listener, over, thread: Some(thread) })
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        self.port
    }
}

impl Drop for WebServer {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        // Wakes the thread out of its wait: `accept` fails on a socket that was shut down.
        let _ = socket::shutdown(self.listener.as_raw_fd(), socket::Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn answer(mut stream: &TcpStream, name: &str) -> Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(2)))?;
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    while reader.read_line(&mut line)? > 2 {
        line.clear();
    }
    let body = greeting(name, stream.peer_addr()?.ip());
    write!(
        stream,
        "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )?;
    Ok(stream.shutdown(Shutdown::Both)?)
}

/// Fetches `http://address:port/` with curl; gives the body.
pub fn fetch(from: &Host, address: Ipv4Addr, port: u16) -> Result<String> {
    let url = format!("http://{address}:{port}/");
    from.run(&["curl", "--silent", "--show-error", "--fail", "--max-time", "3", &url])
}

/// Each client with a pod of its own on every node: pings and TCP in both directions, and a web page.
///
/// # Errors
///
/// The first thing that does not work.
pub fn exchange(lab: &Flannel) -> Result<()> {
    for node in lab.nodes() {
        for number in [1, 2] {
            let (client, pod) = (lab.client(number), lab.pod(node, number));
            let (client_address, pod_address) = (client.address(NIC)?, node.pod_address(number));
            for (from, to, address) in [(client, pod, pod_address), (pod, client, client_address)] {
                let pings = ping(from, address, 5, &[])?;
                ensure!(pings.received == 5, "{} to {address}: {pings:?}", from.name());
                let tcp = iperf(from, to, address, Transport::Tcp, &[])?;
                ensure!(tcp.bits > 50e6, "{} to {}: {tcp:?}", from.name(), to.name());
            }
            let _server = WebServer::start(pod, 8080)?;
            let (body, expected) = (fetch(client, pod_address, 8080)?, greeting(pod.name(), client_address));
            ensure!(body == expected, "{} answers {body:?} instead of {expected:?}", pod.name());
        }
    }
    Ok(())
}

/// What a [`WebServer`] tells its client.
fn greeting(server: &str, client: impl fmt::Display) -> String {
    format!("hello from {server}, you are {client}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_ping_prints() {
        let text = "PING 10.244.1.2 (10.244.1.2) 56(84) bytes of data.\n\n--- 10.244.1.2 ping statistics ---\n\
                    3 packets transmitted, 2 received, 33.3333% packet loss, time 40ms\n\
                    rtt min/avg/max/mdev = 0.041/0.045/0.052/0.004 ms\n";
        assert_eq!(parse_ping(text), Some(Pings { sent: 3, received: 2, mean: Some(0.045) }));
        let errors = "2 packets transmitted, 0 received, +2 errors, 100% packet loss, time 20ms\n";
        assert_eq!(parse_ping(errors), Some(Pings { sent: 2, received: 0, mean: None }));
        assert_eq!(parse_ping("ping: unknown host"), None);
    }
}
