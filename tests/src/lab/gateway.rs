//! The gateway under test: the program that users run, on the lab's gateway host.

use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf},
    process::{ExitStatus, Output},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;

use super::{
    flannel::{EXTERNAL, Flannel, UNDERLAY},
    host::Host,
    process::Process,
    profile_directory, traffic, wait_until,
};

/// Names the gateway's program when it is not the one that lies beside this.
pub const PROGRAM_VARIABLE: &str = "GATEWAY_BIN";

/// For a machine that is busy with other things, or with a stream at full load.
const START: Duration = Duration::from_mins(1);
const READY: Duration = Duration::from_secs(5);

/// A gateway that runs.
#[derive(Debug)]
pub struct Gateway {
    program: PathBuf,
    config: PathBuf,
    process: Process,
}

impl Gateway {
    /// Starts the gateway of a lab and waits until its program is attached to the interfaces that face clients and nodes.
    pub fn start(lab: &Flannel) -> Result<Self> {
        let program = program()?;
        let config = lab.config();
        let process = lab.gateway().spawn(&command(&program, &config, &["run"])?)?;
        let mut gateway = Self { program, config, process };
        gateway.wait_attached(lab.gateway())?;
        Ok(gateway)
    }

    /// Waits until every node's first pod answers both clients.
    pub fn wait_ready(&self, lab: &Flannel) -> Result<()> {
        // The client with a router first: one that asks by ARP too early asks again only after a second.
        for client in [2, 1] {
            for node in lab.nodes() {
                traffic::wait_reachable(lab.client(client), node.pod_address(1), true, READY)
                    .with_context(|| format!("log: {}", self.process.log().display()))?;
            }
        }
        Ok(())
    }

    /// The daemon.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// What `gateway <verb>` prints for people.
    pub fn text(&self, host: &Host, verb: &[&str]) -> Result<String> {
        host.run(&command(&self.program, &self.config, verb)?)
    }

    /// What `gateway <verb>` does, also if it does not end well.
    pub fn output(&self, host: &Host, verb: &[&str]) -> Result<Output> {
        host.output(&command(&self.program, &self.config, verb)?)
    }

    /// What `gateway <verb> --json` prints.
    pub fn json(&self, host: &Host, verb: &[&str]) -> Result<Value> {
        let text = self.text(host, &[verb, &["--json"]].concat())?;
        serde_json::from_str(&text)
            .with_context(|| format!("`gateway {}` printed no JSON: {text}", verb.join(" ")))
    }

    /// Packets of every outcome, by label.
    pub fn counters(&self, host: &Host) -> Result<BTreeMap<String, u64>> {
        let shown = self.json(host, &["show", "counters"])?;
        let rows =
            shown.as_array().or_else(|| shown["counters"].as_array()).context("no list of counters")?;
        rows.iter()
            .map(|row| {
                let label = row["outcome"].as_str().context("a counter without a name")?;
                let packets = row["packets"].as_u64().with_context(|| format!("{label} without packets"))?;
                Ok((label.to_owned(), packets))
            })
            .collect()
    }

    /// Ends the daemon as a service manager does. The datapath keeps forwarding.
    pub fn stop(&mut self) -> Result<ExitStatus> {
        self.process.stop(Signal::SIGTERM, Duration::from_secs(5))
    }

    /// Ends the daemon as a crash does.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        self.process.stop(Signal::SIGKILL, Duration::from_secs(5))
    }

    /// Starts the daemon again after [`Self::stop`] or [`Self::kill`].
    pub fn restart(&mut self, host: &Host) -> Result<()> {
        self.process = host.spawn(&command(&self.program, &self.config, &["run"])?)?;
        self.wait_attached(host)
    }

    /// From the next start on the daemon is this program.
    pub fn set_program(&mut self, program: &Path) {
        program.clone_into(&mut self.program);
    }

    /// Waits until the running daemon has brought everything up to date: its own programs are attached, the source has
    /// been read, every node is reached.
    pub fn wait_settled(&mut self, host: &Host) -> Result<()> {
        wait_until("the gateway settles", START, || {
            if let Some(status) = self.process.ended()? {
                bail!("the gateway ended ({status}):\n{}", self.process.output()?);
            }
            let settled = is_settled(host, &self.program, &self.config, self.process.id())?;
            Ok(settled.then_some(()))
        })
        .with_context(|| format!("log: {}", self.process.log().display()))
    }

    /// Process id of the daemon.
    pub fn process_id(&self) -> u32 {
        self.process.id()
    }

    /// Leaves the daemon running when this process ends.
    pub fn keep(self) {
        self.process.keep();
    }

    /// Whether the configuration is for the kernel alone.
    fn is_off(&self) -> Result<bool> {
        let text = fs::read_to_string(&self.config)
            .with_context(|| format!("cannot read {}", self.config.display()))?;
        Ok(text.ends_with(OFF))
    }

    /// Whether this very daemon has told its state.
    fn is_published(&self, host: &Host) -> Result<bool> {
        let shown = host.output(&command(&self.program, &self.config, &["status", "--json"])?)?;
        let shown: Value = serde_json::from_slice(&shown.stdout)
            .with_context(|| format!("no status: {}", String::from_utf8_lossy(&shown.stderr)))?;
        Ok(shown["daemon"]["pid"] == self.process.id())
    }

    fn wait_attached(&mut self, host: &Host) -> Result<()> {
        wait_until("the gateway attaches its program", START, || {
            if let Some(status) = self.process.ended()? {
                bail!("the gateway ended ({status}):\n{}", self.process.output()?);
            }
            if self.is_off()? {
                return Ok(self.is_published(host)?.then_some(()));
            }
            for interface in host.interfaces()? {
                // A one-armed gateway has no interface of its own for clients.
                if [EXTERNAL, UNDERLAY].contains(&interface.name.as_str())
                    && !attached(host, &interface.name)?
                {
                    return Ok(None);
                }
            }
            Ok(Some(()))
        })
        .with_context(|| format!("log: {}", self.process.log().display()))
    }
}

/// Keys without which clients from outside are translated: for the end of a configuration.
pub const UNTRANSLATED: &str = "[snat]\nmode = \"none\"\n";

/// Keys that leave everything to the kernel: for the end of a configuration.
pub const OFF: &str = "[snat]\nmode = \"none\"\n[datapath]\nxdp_mode = \"off\"\n";

/// The gateway's program: `GATEWAY_BIN`, else the one that was built with this.
pub fn program() -> Result<PathBuf> {
    if let Some(path) = env::var_os(PROGRAM_VARIABLE) {
        let path = PathBuf::from(path);
        ensure!(path.is_file(), "{PROGRAM_VARIABLE} names {}, which is no file", path.display());
        return Ok(path);
    }
    let path = profile_directory()?.join("gateway");
    ensure!(path.is_file(), "{} is missing: run `cargo build -p gateway`", path.display());
    Ok(path)
}

/// Whether an XDP program is attached to the interface.
pub fn attached(host: &Host, interface: &str) -> Result<bool> {
    let links: Value = serde_json::from_str(&host.run(&["ip", "-json", "link", "show", "dev", interface])?)?;
    Ok(links[0].get("xdp").is_some())
}

/// Id of the XDP program on the interface.
pub fn attached_program(host: &Host, interface: &str) -> Result<u64> {
    let links: Value = serde_json::from_str(&host.run(&["ip", "-json", "link", "show", "dev", interface])?)?;
    links[0]["xdp"]["prog"]["id"].as_u64().with_context(|| format!("no XDP program on {interface}"))
}

/// Whether the daemon with this process id has read its source and reaches every node.
pub fn is_settled(host: &Host, program: &Path, config: &Path, id: u32) -> Result<bool> {
    let output = host.output(&command(program, config, &["status", "--json"])?)?;
    let status: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    let daemon = &status["daemon"];
    Ok(daemon["pid"] == id && daemon["source"]["synchronised"] == true && status["vteps_unresolved"] == 0)
}

/// The words of a call of the gateway.
pub fn command(program: &Path, config: &Path, verb: &[&str]) -> Result<Vec<String>> {
    let words = [program.to_str(), config.to_str()];
    let [Some(program), Some(config)] = words else { bail!("a path is not UTF-8: {words:?}") };
    let words = [&[program], verb, &["--config", config]].concat();
    Ok(words.into_iter().map(str::to_owned).collect())
}
