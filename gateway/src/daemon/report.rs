//! What the daemon tells `status`: a file that is replaced as a whole.

use std::{
    fs, io,
    net::Ipv4Addr,
    path::PathBuf,
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

use super::problems::ProblemReport;
use crate::{cluster::kubernetes::Freshness, config::XdpMode, dataplane::pins::run_directory};

/// State of a running daemon. Times are seconds since 1970.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Name of the instance.
    pub instance: String,
    /// Process id.
    pub pid: u32,
    /// When it started.
    pub started: u64,
    /// When this was written.
    pub written: u64,
    /// How its programs are attached.
    pub xdp_mode: XdpMode,
    /// Where cluster objects come from.
    pub source: SourceReport,
    /// Nodes.
    pub vteps: Vec<VtepReport>,
    /// What is wrong.
    pub problems: Vec<ProblemReport>,
    /// Kernel devices of the slow path; `detach` removes them without a configuration.
    pub devices: Vec<String>,
}

/// State of the source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceReport {
    /// Directory, or kubeconfig.
    pub location: String,
    /// A complete listing was seen.
    pub synchronised: bool,
    /// When something was last heard of it.
    pub last_event: Option<u64>,
    /// How fresh its knowledge is; absent for a directory, which is always as fresh as its files.
    pub freshness: Option<Freshness>,
}

/// A node as VTEP.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VtepReport {
    /// Overlay id.
    pub overlay: u32,
    /// Name of the node.
    pub node: String,
    /// Its id in the tables; absent if the table is full.
    pub id: Option<u32>,
    /// Its tunnel endpoint.
    pub endpoint: Ipv4Addr,
    /// It is reached without a tunnel.
    pub direct: bool,
    /// Why it cannot be reached; absent if it can.
    pub unresolved: Option<String>,
}

/// Seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs())
}

fn path(instance: &str) -> PathBuf {
    run_directory(instance).join("status.json")
}

impl Report {
    /// Replaces the file; readers see the old or the new one.
    ///
    /// # Errors
    ///
    /// The file cannot be written.
    pub fn write(&self) -> anyhow::Result<()> {
        let path = path(&self.instance);
        let scratch = path.with_extension("json.new");
        let text = serde_json::to_vec(self)?;
        fs::write(&scratch, text)
            .and_then(|()| fs::rename(&scratch, &path))
            .with_context(|| format!("cannot write the state to {}", path.display()))
    }

    /// The last state that was written; `None` if there never was one. It may be that of a daemon that is gone.
    ///
    /// # Errors
    ///
    /// The file cannot be read, or is of another version.
    pub fn read(instance: &str) -> anyhow::Result<Option<Self>> {
        let path = path(instance);
        let context = || format!("cannot read the daemon's state {}", path.display());
        match fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).map(Some).with_context(context),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(context),
        }
    }

    /// Removes the file.
    ///
    /// # Errors
    ///
    /// It cannot be removed.
    pub fn remove(instance: &str) -> io::Result<()> {
        match fs::remove_file(path(instance)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}
