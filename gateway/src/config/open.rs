//! What a configuration file leaves to the gateway: the subnets of overlays without the key `subnet`. What was chosen is
//! kept beside the instance's other runtime files, so that it is the same after a restart, also while the API is away.
//! A reboot forgets it, but then the API must be there anyway, and knows it from the gateway's Node.

use std::{collections::BTreeMap, fs, io, net::Ipv4Addr, path::PathBuf};

use gateway_common::wire::Mac;
use ipnet::Ipv4Net;

use super::{Config, Problems};
use crate::{cluster::kubernetes::Access, dataplane::pins::run_directory};

/// Subnets that the gateway has chosen, by the name of the overlay.
pub type Subnets = BTreeMap<String, Ipv4Net>;

/// What a configuration file says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reading {
    /// Everything.
    Complete(Box<Config>),
    /// Everything but some subnets.
    Open(Open),
}

/// What choosing subnets takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Open {
    /// Name of the gateway on the host.
    pub instance: String,
    /// The API server, which knows what is taken.
    pub access: Access,
    /// The daemon makes the gateway's Node, and so may choose.
    pub register: bool,
    /// The overlays without a subnet.
    pub overlays: Vec<OpenOverlay>,
    /// Subnets of the others.
    pub taken: Vec<Ipv4Net>,
    /// What is to be said if nobody chooses.
    pub problems: Problems,
}

/// An overlay without a subnet. The fields are those of [`Overlay`](super::Overlay).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenOverlay {
    /// Name.
    pub name: String,
    /// Name of the gateway's Node in it.
    pub node: String,
    /// Underlay address of our VTEP.
    pub local: Ipv4Addr,
    /// MAC address of our VTEP.
    pub mac: Mac,
    /// The cluster's pod network, if configured.
    pub network: Option<Ipv4Net>,
    /// Prefix of flannel's annotation keys.
    pub annotation_prefix: String,
}

impl Reading {
    /// The configuration, if nothing is left open.
    ///
    /// # Errors
    ///
    /// A subnet is.
    pub fn complete(self) -> Result<Config, Problems> {
        match self {
            Self::Complete(config) => Ok(*config),
            Self::Open(open) => Err(open.problems),
        }
    }
}

fn path(instance: &str) -> PathBuf {
    run_directory(instance).join("subnets.json")
}

/// What was chosen before. A file that cannot be read is as good as none: the gateway's Node tells the same.
pub fn remembered(instance: &str) -> Subnets {
    fs::read(path(instance)).ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default()
}

/// Keeps what was chosen.
///
/// # Errors
///
/// The file cannot be written.
pub fn remember(instance: &str, subnets: &Subnets) -> io::Result<()> {
    let path = path(instance);
    let scratch = path.with_extension("json.new");
    fs::create_dir_all(run_directory(instance))?;
    fs::write(&scratch, serde_json::to_vec(subnets)?)?;
    fs::rename(&scratch, &path)
}

/// Forgets what was chosen.
///
/// # Errors
///
/// The file cannot be removed.
pub fn forget(instance: &str) -> io::Result<()> {
    match fs::remove_file(path(instance)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
