//! A host of the lab: a network namespace with a name and a part to play.

use std::{
    ffi::OsStr,
    fmt,
    fs::{self, File},
    net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream, UdpSocket},
    os::{fd::AsRawFd, unix::process::CommandExt},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use gateway_common::wire::Mac;
use ipnet::Ipv4Net;
use nix::{
    ifaddrs::getifaddrs,
    sys::{
        socket::{
            AddressFamily, LinkAddr, MsgFlags, SockFlag, SockType, SockaddrIn, SockaddrLike, bind, connect,
            sendto, setsockopt, socket, sockopt,
        },
        time::{TimeVal, TimeValLike as _},
    },
};
use serde::{Deserialize, Serialize};

use super::{capture::Capture, netns::Namespace, process::Process};

/// Seconds until a connection attempt is given up.
const CONNECT_LIMIT: i64 = 10;

/// Frames sent at once.
const BURST: usize = 32;

/// What a host stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Sends to pods from outside.
    Client,
    /// Runs the gateway.
    Gateway,
    /// A Kubernetes node.
    Node,
    /// A pod on a node.
    Pod,
    /// An Ethernet switch.
    Switch,
    /// Joins networks outside of the cluster.
    Router,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Client => "client",
            Self::Gateway => "gateway",
            Self::Node => "node",
            Self::Pod => "pod",
            Self::Switch => "switch",
            Self::Router => "router",
        })
    }
}

/// An interface with its addresses, as the kernel tells now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Interface {
    /// Name.
    pub name: String,
    /// MAC address, as text.
    pub mac: String,
    /// IPv4 addresses with their prefix lengths.
    pub addresses: Vec<Ipv4Net>,
}

/// A host.
#[derive(Debug)]
pub struct Host {
    name: String,
    role: Role,
    namespace: Namespace,
    evidence: PathBuf,
    files: AtomicU32,
}

impl Host {
    /// A host that lives in `namespace` and keeps logs and captures in the directory `evidence`.
    pub fn new(name: &str, role: Role, namespace: Namespace, evidence: &Path) -> Self {
        let evidence = evidence.to_owned();
        Self { name: name.to_owned(), role, namespace, evidence, files: AtomicU32::new(0) }
    }

    /// Its name in the topology.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its part.
    pub fn role(&self) -> Role {
        self.role
    }

    /// Its network namespace.
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// Runs a command on the host, to its end.
    pub fn output<S: AsRef<OsStr> + Sync>(&self, command: &[S]) -> Result<Output> {
        self.namespace.enter(|| {
            command_of(command)?
                .stdin(Stdio::null())
                .output()
                .with_context(|| format!("{}: cannot run `{}`", self.name, shown(command)))
        })
    }

    /// Runs a command that must succeed, and gives what it printed.
    pub fn run<S: AsRef<OsStr> + Sync>(&self, command: &[S]) -> Result<String> {
        let output = self.output(command)?;
        let stdout = String::from_utf8_lossy(&output.stdout);
        ensure!(
            output.status.success(),
            "{}: `{}` failed ({})\n{stdout}{}",
            self.name,
            shown(command),
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(stdout.into_owned())
    }

    /// Starts a command that runs beside the test, in a process group of its own.
    pub fn spawn<S: AsRef<OsStr> + Sync>(&self, command: &[S]) -> Result<Process> {
        let program = Path::new(command.first().context("empty command")?).file_name().unwrap_or_default();
        let log = self.evidence_file(&format!("{}.log", program.to_string_lossy()));
        let file = File::create(&log).with_context(|| format!("cannot create {}", log.display()))?;
        let child = self.namespace.enter(|| {
            command_of(command)?
                .stdin(Stdio::null())
                .stdout(file.try_clone()?)
                .stderr(file)
                .process_group(0)
                .spawn()
                .with_context(|| format!("{}: cannot run `{}`", self.name, shown(command)))
        })?;
        Ok(Process::new(format!("{}: {}", self.name, shown(command)), child, log))
    }

    /// Starts to capture frames that match the pcap filter, in both directions; returns when the capture runs.
    pub fn capture(&self, interface: &str, filter: &str) -> Result<Capture> {
        Capture::start(self, interface, filter, self.evidence_file(&format!("{interface}.pcap")))
    }

    /// Sends a frame out of an interface as it stands, from the Ethernet header on, by a packet socket.
    pub fn inject(&self, interface: &str, frame: &[u8]) -> Result<()> {
        self.inject_all(interface, [frame])
    }

    /// Sends frames as [`Self::inject`] does, in order and in small bursts.
    pub fn inject_all<'a>(
        &self,
        interface: &str,
        frames: impl IntoIterator<Item = &'a [u8]> + Send,
    ) -> Result<()> {
        self.namespace.enter(|| {
            let address = link_address(interface).with_context(|| self.name.clone())?;
            let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None)
                .with_context(|| format!("{}: cannot open a packet socket", self.name))?;
            for (number, frame) in frames.into_iter().enumerate() {
                // A veth device with an XDP program queues 256 frames (VETH_RING_SIZE) and drops the rest.
                if number % BURST == BURST - 1 {
                    thread::sleep(Duration::from_millis(5));
                }
                sendto(socket.as_raw_fd(), frame, &address, MsgFlags::empty()).with_context(|| {
                    format!("{}: cannot send {} bytes out of {interface}", self.name, frame.len())
                })?;
            }
            Ok(())
        })
    }

    /// Opens a TCP listener on the host; it may be used from any thread.
    pub fn listen(&self, address: Ipv4Addr, port: u16) -> Result<TcpListener> {
        self.namespace.enter(|| {
            TcpListener::bind((address, port))
                .with_context(|| format!("{}: cannot listen on {port}", self.name))
        })
    }

    /// Connects from an address of the host; port 0 is any.
    pub fn connect(&self, from: SocketAddrV4, to: SocketAddrV4) -> Result<TcpStream> {
        let made = || -> Result<TcpStream> {
            let socket = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
            setsockopt(&socket, sockopt::ReuseAddr, &true)?;
            // connect(2) gives up after so long.
            setsockopt(&socket, sockopt::SendTimeout, &TimeVal::seconds(CONNECT_LIMIT))?;
            bind(socket.as_raw_fd(), &SockaddrIn::from(from))?;
            connect(socket.as_raw_fd(), &SockaddrIn::from(to))?;
            let stream = TcpStream::from(socket);
            stream.set_write_timeout(None)?;
            Ok(stream)
        };
        self.namespace
            .enter(made)
            .with_context(|| format!("{}: cannot connect from {from} to {to}", self.name))
    }

    /// Opens a UDP socket on the host; it may be used from any thread.
    pub fn udp(&self, address: Ipv4Addr, port: u16) -> Result<UdpSocket> {
        self.namespace.enter(|| {
            UdpSocket::bind((address, port))
                .with_context(|| format!("{}: cannot bind UDP {address}:{port}", self.name))
        })
    }

    /// Interfaces other than loopback.
    pub fn interfaces(&self) -> Result<Vec<Interface>> {
        self.namespace.enter(|| {
            let mut interfaces: Vec<Interface> = Vec::new();
            for entry in getifaddrs().with_context(|| format!("{}: cannot list interfaces", self.name))? {
                let Some(address) = entry.address else { continue };
                let position = interfaces.iter().position(|known| known.name == entry.interface_name);
                if let Some(link) = address.as_link_addr() {
                    if entry.interface_name != "lo" {
                        let mac = Mac::new(link.addr().unwrap_or_default()).to_string();
                        interfaces.push(Interface { name: entry.interface_name, mac, addresses: Vec::new() });
                    }
                } else if let (Some(position), Some(address), Some(mask)) = (
                    position,
                    address.as_sockaddr_in(),
                    entry.netmask.as_ref().and_then(|mask| mask.as_sockaddr_in()),
                ) {
                    interfaces[position].addresses.push(Ipv4Net::with_netmask(address.ip(), mask.ip())?);
                }
            }
            Ok(interfaces)
        })
    }

    /// The first IPv4 address of an interface.
    pub fn address(&self, interface: &str) -> Result<Ipv4Addr> {
        let interface = self.interface(interface)?;
        let first = interface.addresses.first();
        Ok(first.ok_or_else(|| anyhow!("{}: {} has no IPv4 address", self.name, interface.name))?.addr())
    }

    /// The MAC address of an interface.
    pub fn mac(&self, interface: &str) -> Result<Mac> {
        Ok(self.interface(interface)?.mac.parse()?)
    }

    /// Reads a counter such as `rx_packets` of an interface.
    pub fn statistic(&self, interface: &str, counter: &str) -> Result<u64> {
        let shown = self.run(&["ip", "-json", "-stats", "link", "show", "dev", interface])?;
        let links: serde_json::Value = serde_json::from_str(&shown)?;
        let (direction, name) = counter.split_once('_').context("counters are called rx_NAME or tx_NAME")?;
        links[0]["stats64"][direction][name]
            .as_u64()
            .with_context(|| format!("{}: no counter {counter} on {interface}", self.name))
    }

    /// A new file for evidence; its name begins with the host's.
    pub(super) fn evidence_file(&self, name: &str) -> PathBuf {
        let number = self.files.fetch_add(1, Ordering::Relaxed);
        self.evidence.join(format!("{}-{number}-{name}", self.name))
    }

    fn interface(&self, name: &str) -> Result<Interface> {
        let found = self.interfaces()?.into_iter().find(|interface| interface.name == name);
        found.ok_or_else(|| anyhow!("{} has no interface {name}", self.name))
    }

    /// Switches offloads with ethtool, in one call: `&["tx", "off"]`.
    pub fn offload(&self, interface: &str, features: &[&str]) -> Result<()> {
        self.run(&[&["ethtool", "-K", interface], features].concat()).map(drop)
    }

    /// Removes captures and logs of earlier runs.
    pub(super) fn fresh_directory(path: &Path) -> Result<()> {
        if path.exists() {
            fs::remove_dir_all(path).with_context(|| format!("cannot empty {}", path.display()))?;
        }
        fs::create_dir_all(path).with_context(|| format!("cannot create {}", path.display()))
    }
}

fn command_of<S: AsRef<OsStr>>(command: &[S]) -> Result<Command> {
    let Some((program, arguments)) = command.split_first() else { bail!("empty command") };
    let mut command = Command::new(program);
    command.args(arguments);
    Ok(command)
}

fn shown<S: AsRef<OsStr>>(command: &[S]) -> String {
    command.iter().map(|word| word.as_ref().to_string_lossy()).collect::<Vec<_>>().join(" ")
}

/// The packet socket address of an interface of the calling thread's namespace.
fn link_address(interface: &str) -> Result<LinkAddr> {
    getifaddrs()?
        .filter(|entry| entry.interface_name == interface)
        .find_map(|entry| entry.address?.as_link_addr().copied())
        .filter(|address| address.family() == Some(AddressFamily::Packet))
        .ok_or_else(|| anyhow!("no interface {interface}"))
}
