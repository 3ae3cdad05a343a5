//! The lab that is kept standing for people, and the file in which it describes itself.

use std::{fs, io::ErrorKind, path::PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use nix::{sys::signal::kill, unistd::Pid};
use serde::{Deserialize, Serialize};

use super::{
    evidence_directory,
    flannel::Flannel,
    gateway::Gateway,
    host::{Host, Role},
    netns::Namespace,
    registry::{self, Claim, STANDING},
};

/// The standing lab, as its state file tells.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Standing {
    /// Logs, manifests and configuration.
    pub directory: PathBuf,
    /// The gateway's configuration file.
    pub config: PathBuf,
    /// Process id of the gateway's daemon.
    pub gateway: u32,
    /// The hosts.
    pub hosts: Vec<Place>,
}

/// A host of the standing lab.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Place {
    /// Name of the host.
    pub name: String,
    /// Its part.
    pub role: Role,
    /// Name of its network namespace.
    pub namespace: String,
}

impl Standing {
    /// Builds the lab, starts its gateway and waits until it reaches the pods.
    ///
    /// # Errors
    /// When it stands already, or something cannot be made; then what was made is removed.
    pub fn up() -> Result<Self> {
        // A state file without namespaces is what a reboot or an interrupted `down` leaves.
        if Self::find()?.is_some() && registry::exists(STANDING)? {
            bail!("the lab is up already; `cargo xtask lab status` shows it, `cargo xtask lab down` ends it");
        }
        registry::remove(STANDING)?;
        let mut lab = Flannel::build(Claim::standing()?, &evidence_directory(STANDING)?, None)?;
        lab.add_outside()?;
        let gateway = Gateway::start(&lab)?;
        gateway.wait_ready(&lab)?;
        let hosts = lab
            .hosts()
            .map(|host| Place {
                name: host.name().to_owned(),
                role: host.role(),
                namespace: host.namespace().name().to_owned(),
            })
            .collect();
        let standing = Self {
            directory: lab.directory().to_owned(),
            config: lab.config(),
            gateway: gateway.process_id(),
            hosts,
        };
        let path = registry::state_path();
        fs::write(&path, serde_json::to_string_pretty(&standing)?)
            .with_context(|| format!("cannot write {}", path.display()))?;
        gateway.keep();
        lab.keep();
        Ok(standing)
    }

    /// The standing lab, if there is one.
    pub fn find() -> Result<Option<Self>> {
        let path = registry::state_path();
        match fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).map(Some).with_context(|| {
                format!("{} is damaged; `cargo xtask lab down` removes the lab all the same", path.display())
            }),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
        }
    }

    /// The standing lab; an error that tells how to get one, if there is none.
    pub fn get() -> Result<Self> {
        Self::find()?.ok_or_else(|| anyhow!("no lab is up; `cargo xtask lab up` builds one"))
    }

    /// Removes the standing lab.
    pub fn down() -> Result<()> {
        let path = registry::state_path();
        if !path.exists() {
            bail!("no lab is up; nothing to take down");
        }
        registry::remove(STANDING)?;
        fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))
    }

    /// Whether the gateway's daemon lives.
    pub fn gateway_running(&self) -> bool {
        i32::try_from(self.gateway).is_ok_and(|pid| kill(Pid::from_raw(pid), None).is_ok())
    }

    /// The host of that name.
    pub fn host(&self, name: &str) -> Result<Host> {
        let place = self.hosts.iter().find(|place| place.name == name).ok_or_else(|| {
            let known: Vec<_> = self.hosts.iter().map(|place| place.name.as_str()).collect();
            anyhow!("no host {name}; there are {}", known.join(", "))
        })?;
        self.open(place)
    }

    /// Opens a host of the lab.
    pub fn open(&self, place: &Place) -> Result<Host> {
        Ok(Host::new(&place.name, place.role, Namespace::open(&place.namespace)?, &self.directory))
    }
}
