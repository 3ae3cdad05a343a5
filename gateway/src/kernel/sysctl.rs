//! What forwarding needs of the kernel's settings (Documentation/networking/ip-sysctl.rst).
//!
//! Whether a packet may be forwarded is asked of the interface that it arrives on, by the kernel's own forwarding and by
//! the FIB lookup of the XDP program alike. So the interfaces of the configuration and the tunnel devices get
//! `forwarding`; `ip_forward`, which makes a router of every interface, is left alone.
//!
//! Old values are written down before anything is changed, so that `detach` can put them back also after a crash.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use gateway_common::abi::Roles;
use serde::{Deserialize, Serialize};

use super::{device::device_name, host::Host};
use crate::{
    config::{Config, XdpMode},
    dataplane::pins::run_directory,
};

const ROOT: &str = "/proc/sys/net/ipv4";
const FILE: &str = "sysctl.json";

/// A setting below `net.ipv4`, its parts separated by `/`: names of interfaces may contain dots.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Key(String);

impl From<Key> for String {
    fn from(Key(key): Key) -> Self {
        key
    }
}

/// What is restored is written as root, so it must be a setting.
impl TryFrom<String> for Key {
    type Error = String;

    fn try_from(key: String) -> Result<Self, String> {
        match key.split('/').collect::<Vec<_>>()[..] {
            ["conf" | "neigh", interface, setting]
                if ![interface, setting].iter().any(|part| ["", ".", ".."].contains(part)) =>
            {
                Ok(Self(key))
            }
            _ => Err(format!("{key:?} is no setting of an interface")),
        }
    }
}

impl Key {
    /// A setting of an interface.
    fn of(interface: &str, setting: &str) -> Self {
        Self(format!("conf/{interface}/{setting}"))
    }

    fn path(&self) -> PathBuf {
        Path::new(ROOT).join(&self.0)
    }

    /// Its value now; `None` if there is no such setting, as there is no such interface.
    pub fn read(&self) -> Option<String> {
        fs::read_to_string(self.path()).ok().map(|text| text.trim().to_owned())
    }

    fn write(&self, value: &str) -> io::Result<()> {
        fs::write(self.path(), value)
    }

    /// The arguments of `sysctl -w` that set it.
    pub fn assignment(&self, value: &str) -> String {
        // sysctl(8) takes either separator, but all of one kind if a part contains the other.
        format!("net/ipv4/{}={value}", self.0)
    }
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let dotted: Vec<&str> = self.0.split('/').collect();
        write!(f, "net.ipv4.{}", dotted.join("."))
    }
}

/// What was there, and what was set instead.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// Before the gateway.
    pub old: String,
    /// By the gateway.
    pub new: String,
}

/// What a configuration needs on this host. Interfaces that are absent are in it too.
pub fn needed(config: &Config, host: &Host) -> BTreeMap<Key, &'static str> {
    let mut needed = BTreeMap::new();
    for link in host.links.values() {
        let roles = host.roles(config, link);
        if roles == Roles::NONE {
            continue;
        }
        needed.insert(Key::of(&link.name, "forwarding"), "1");
        if config.datapath.xdp_mode == XdpMode::Off && roles.has(Roles::EXTERNAL) {
            needed.insert(Key::of(&link.name, "proxy_arp"), "1");
            // Without it the kernel answers for others only after up to 0.8 s.
            needed.insert(Key(format!("neigh/{}/proxy_delay", link.name)), "0");
        }
    }
    for overlay in &config.overlays {
        let device = device_name(overlay);
        needed.insert(Key::of(&device, "forwarding"), "1");
        // Strict: who sends through the tunnel must be where the tunnel leads. Nodes that are reached directly may
        // use the tunnel nevertheless, and the way back to them is another.
        let filter = if overlay.direct_routing { "2" } else { "1" };
        needed.insert(Key::of(&device, "rp_filter"), filter);
    }
    needed
}

/// Settings that are not as needed, with their present values.
pub fn deviations(config: &Config, host: &Host) -> Vec<(Key, String, &'static str)> {
    let needed = needed(config, host).into_iter();
    needed
        .filter_map(|(key, want)| {
            let have = key.read()?;
            (have != want).then_some((key, have, want))
        })
        .collect()
}

/// A setting cannot be changed, or the old values cannot be kept.
#[derive(Debug, thiserror::Error)]
pub enum SysctlError {
    /// The kernel refuses.
    #[error("cannot set {key} to {value}: {source} (root is needed, and /proc/sys must be writable)")]
    Write {
        /// Setting.
        key: Key,
        /// Value.
        value: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The file of old values.
    #[error("cannot {verb} the old values of kernel settings in {}: {source}", path.display())]
    File {
        /// `read`, `keep` or `remove`.
        verb: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: io::Error,
    },
}

/// The settings that an instance changed.
#[derive(Debug)]
pub struct Settings {
    file: PathBuf,
    changed: BTreeMap<Key, Change>,
}

impl Settings {
    /// Reads what an instance changed so far.
    ///
    /// # Errors
    ///
    /// The file of old values is there but cannot be read.
    pub fn open(instance: &str) -> Result<Self, SysctlError> {
        Self::at(run_directory(instance).join(FILE))
    }

    fn at(file: PathBuf) -> Result<Self, SysctlError> {
        let changed = match fs::read(&file) {
            Ok(text) => serde_json::from_slice(&text).map_err(io::Error::from),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(BTreeMap::new()),
            Err(error) => Err(error),
        };
        match changed {
            Ok(changed) => Ok(Self { file, changed }),
            Err(source) => Err(SysctlError::File { verb: "read", path: file, source }),
        }
    }

    /// What is changed.
    pub fn changed(&self) -> &BTreeMap<Key, Change> {
        &self.changed
    }

    /// Sets what is not as needed; tells what it set. One that cannot be set does not keep the others.
    pub fn apply(&mut self, config: &Config, host: &Host) -> (Vec<(Key, Change)>, Vec<SysctlError>) {
        let (mut done, mut errors) = (Vec::new(), Vec::new());
        for (key, old, want) in deviations(config, host) {
            let change = Change { old, new: want.to_owned() };
            match self.set(&key, &change) {
                Ok(()) => done.push((key, change)),
                Err(error) => errors.push(error),
            }
        }
        (done, errors)
    }

    fn set(&mut self, key: &Key, change: &Change) -> Result<(), SysctlError> {
        // What was there first is what `detach` restores.
        let old = self.changed.get(key).map_or(&change.old, |earlier| &earlier.old).clone();
        self.changed.insert(key.clone(), Change { old, new: change.new.clone() });
        self.keep()?;
        let fault = |source| SysctlError::Write { key: key.clone(), value: change.new.clone(), source };
        key.write(&change.new).map_err(fault)
    }

    fn keep(&self) -> Result<(), SysctlError> {
        let scratch = self.file.with_extension("json.new");
        let text = serde_json::to_vec_pretty(&self.changed).map_err(io::Error::from);
        text.and_then(|text| fs::write(&scratch, text))
            .and_then(|()| fs::rename(&scratch, &self.file))
            .map_err(|source| SysctlError::File { verb: "keep", path: self.file.clone(), source })
    }

    /// Puts the old values back, unless somebody else has set another one meanwhile; tells what it did.
    ///
    /// # Errors
    ///
    /// A setting that cannot be changed; it stays written down.
    pub fn restore(mut self) -> Result<Vec<(Key, Change)>, SysctlError> {
        let mut restored = Vec::new();
        while let Some((key, change)) = self.changed.pop_first() {
            if key.read().is_some_and(|value| value == change.new) {
                if let Err(source) = key.write(&change.old) {
                    let value = change.old.clone();
                    self.changed.insert(key.clone(), change);
                    self.keep()?;
                    return Err(SysctlError::Write { key, value, source });
                }
                restored.push((key, change));
            }
        }
        match fs::remove_file(&self.file) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(SysctlError::File { verb: "remove", path: self.file, source })
            }
            _ => Ok(restored),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The file of old values is read as root, and what stands there is written.
    #[test]
    fn only_settings_of_interfaces_are_restored() {
        let read = |key: &str| serde_json::from_value::<Key>(key.into());
        for key in ["conf/eth0/forwarding", "conf/eth0.5/rp_filter", "neigh/ext0/proxy_delay"] {
            let found = read(key).unwrap();
            assert_eq!((serde_json::to_value(&found).unwrap(), found.0.as_str()), (key.into(), key));
        }
        for key in
            ["conf/../forwarding", "conf/eth0/..", "../../../etc/passwd", "tcp_mem", "conf//x", "a/b/c", ""]
        {
            assert!(read(key).is_err(), "{key}");
        }
    }
}
