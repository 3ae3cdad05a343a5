//! The one configuration file, validated as a whole.
//!
//! - [`Location`], [`Options`]: the command line arguments that find the file, and override single settings.
//! - [`open`]: what a file may leave to the gateway.
//! - `reader`: a typed walk over the TOML document that goes on after a problem, so that all are reported at once.
//! - `parse`: the keys, their defaults and what each of them may be.
//! - [`snat`]: the section on source translation.
//! - `validate`: what must hold between keys.

pub mod open;
mod options;
mod parse;
mod problem;
mod reader;
pub mod snat;
mod validate;

use std::{
    fmt, fs,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
};

use clap::ValueEnum;
use gateway_common::{
    abi::Roles,
    wire::{Mac, Vni},
};
use ipnet::Ipv4Net;

use crate::cluster::kubernetes::Access;

pub use open::{Open, OpenOverlay, Reading, Subnets};
pub use options::{Location, Options, Overrides};
pub use parse::DEFAULT_BPFFS;
pub use problem::{Problem, Problems};
pub use snat::{Snat, SnatAction, SnatPool, SnatRule};

/// The validated configuration: every field has its final value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Name of this gateway on the host; part of the bpffs path.
    pub instance: String,
    /// Where cluster objects come from.
    pub source: Source,
    /// Interfaces with roles; several entries may name one interface with different VLANs.
    pub interfaces: Vec<Interface>,
    /// Overlays; the index is the overlay id.
    pub overlays: Vec<Overlay>,
    /// Source translation.
    pub snat: Snat,
    /// Settings of the BPF program and its tables.
    pub datapath: Datapath,
    /// How the gateway is made known to flannel.
    pub flannel: FlannelSettings,
    /// What may be changed on this host besides what is the gateway's own.
    pub host: HostSettings,
    /// What is told to Prometheus.
    pub metrics: MetricsSettings,
}

/// Where cluster objects come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A directory of Kubernetes manifests.
    Files {
        /// The directory.
        path: PathBuf,
    },
    /// The Kubernetes API.
    Kubernetes(Access),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Files { path } => path.display().fmt(f),
            Self::Kubernetes(access) => f.write_str(&access.describe()),
        }
    }
}

/// Roles of an (interface, VLAN).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Name of the network device that the program is attached to.
    pub name: String,
    /// VLAN id on that device, `None` for untagged frames.
    pub vlan: Option<u16>,
    /// What it may do.
    pub roles: Roles,
}

/// How strictly outer and inner sources of tunnel packets are checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceCheck {
    /// The outer source must be the node's endpoint or an extra source.
    Strict,
    /// The outer source may be any address of the node.
    Node,
    /// Neither the outer nor the inner source is checked.
    Off,
}

/// The outer header's don't-fragment bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DontFragment {
    /// 0, as Linux' vxlan devices send by default.
    Unset,
    /// 1.
    Set,
    /// A copy of the inner bit.
    Inherit,
}

/// One overlay network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Overlay {
    /// Name; the kernel device is `gw-<name>`.
    pub name: String,
    /// VXLAN network identifier.
    pub vni: Vni,
    /// UDP port of the tunnel.
    pub port: u16,
    /// Underlay address of our VTEP: outer source of what we send, the Node's `public-ip`.
    pub local: Ipv4Addr,
    /// MAC address of our VTEP: the Node's `VtepMAC`.
    pub mac: Mac,
    /// Our own subnet: the Node's podCIDR.
    pub subnet: Ipv4Net,
    /// Our address in the overlay; by default the subnet's network address, as flannel nodes have it.
    pub address: Ipv4Addr,
    /// The cluster's pod network (flannel's `Network`), if configured: used to warn of podCIDRs outside.
    pub network: Option<Ipv4Net>,
    /// flannel's `DirectRouting`.
    pub direct_routing: bool,
    /// Source checks on decapsulation.
    pub source_check: SourceCheck,
    /// Outer sources to accept besides the nodes' own, by node name.
    pub extra_sources: Vec<ExtraSource>,
    /// Outer DF.
    pub dont_fragment: DontFragment,
    /// Outer TTL.
    pub ttl: u8,
    /// Outer DSCP, 0 to 63.
    pub dscp: u8,
    /// Tolerate VXLAN group policy bits.
    pub allow_gbp: bool,
    /// Lower the MSS in TCP SYNs to what the path takes.
    pub mss_clamp: bool,
    /// Prefix of flannel's annotation keys.
    pub annotation_prefix: String,
}

/// An outer source that belongs to a node although no object says so (NAT, a second address).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExtraSource {
    /// Name of the node.
    pub node: String,
    /// The address its tunnel packets come from.
    pub address: Ipv4Addr,
}

/// Whether there is a program on the interfaces, and how it is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum XdpMode {
    /// In the driver.
    Driver,
    /// In the kernel's generic hook: slow, for drivers without XDP.
    Generic,
    /// Not at all: the kernel alone forwards, with what [`crate::modes::OFF`] says.
    Off,
}

/// Verbosity of the datapath's own log (aya-log), for debugging only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DatapathLog {
    /// Compiled away by the verifier.
    Off,
    /// One record for each packet.
    Debug,
}

/// Settings of the BPF program and its tables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Datapath {
    /// Attach mode.
    pub xdp_mode: XdpMode,
    /// Per-packet log.
    pub log: DatapathLog,
    /// Root of the bpffs.
    pub bpffs: PathBuf,
    /// Entries of the pod table.
    pub max_pods: u32,
    /// Entries of the prefix table.
    pub max_prefixes: u32,
    /// Entries of the VTEP table.
    pub max_vteps: u32,
    /// Entries of the outer source table.
    pub max_sources: u32,
}

/// What may be changed on this host besides what is the gateway's own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostSettings {
    /// The daemon sets the kernel settings of its interfaces that forwarding needs.
    pub manage_sysctl: bool,
}

/// What is told to Prometheus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MetricsSettings {
    /// Where; `None` for nowhere.
    pub listen: Option<SocketAddr>,
}

/// How the gateway is made known to flannel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlannelSettings {
    /// The daemon makes the gateway's Node, and keeps it as it should be.
    pub register: bool,
    /// The daemon keeps the Node's lease and its Ready condition fresh, as a kubelet would.
    pub heartbeat: bool,
    /// Name of the Node; with several overlays each has its own, with the overlay's name behind it.
    pub node: String,
}

impl FlannelSettings {
    /// Name of the Node of an overlay, of which there are `count`.
    pub fn node_of(&self, overlay: &str, count: usize) -> String {
        if count > 1 { format!("{}-{overlay}", self.node) } else { self.node.clone() }
    }
}

impl Config {
    /// The network devices that the configuration names, each once, in its order.
    pub fn devices(&self) -> Vec<&str> {
        let mut names: Vec<&str> = Vec::new();
        for interface in &self.interfaces {
            if !names.contains(&interface.name.as_str()) {
                names.push(&interface.name);
            }
        }
        names
    }

    /// Reads and validates a configuration file. Everything that is wrong is reported, not only what comes first.
    pub fn read(path: &Path, overrides: &Overrides) -> Result<Reading, Problems> {
        let file = path.display().to_string();
        match fs::read_to_string(path) {
            Ok(text) => parse::parse(&text, &file, overrides),
            Err(error) => Err(Problems::unreadable(&file, &error)),
        }
    }

    /// The same, with the subnets that the gateway has chosen before where the file has none.
    pub fn load(path: &Path, overrides: &Overrides) -> Result<Self, Problems> {
        match Self::read(path, overrides)? {
            Reading::Complete(config) => Ok(*config),
            Reading::Open(open) => Self::load_with(path, overrides, open::remembered(&open.instance)),
        }
    }

    /// The same, with these subnets where the file has none.
    pub fn load_with(path: &Path, overrides: &Overrides, subnets: Subnets) -> Result<Self, Problems> {
        Self::read(path, &Overrides { subnets, ..overrides.clone() })?.complete()
    }

    /// Validates the text of a configuration file; `file` is its name in problems.
    pub fn parse(text: &str, file: &str, overrides: &Overrides) -> Result<Self, Problems> {
        parse::parse(text, file, overrides)?.complete()
    }
}

#[cfg(test)]
mod tests;
