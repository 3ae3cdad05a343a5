//! The test API server (`apiserver`, a process of its own), and clients for it or for a real one.

use std::{
    io::{BufRead as _, BufReader},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use http::{Method, Request};
use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use crate::lab::{netns::Namespace, profile_directory};

/// How a server is started.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where it listens; port 0 is any.
    pub listen: SocketAddr,
    /// RBAC manifests that hold for the service account `gateway` in kube-system; everything is allowed without.
    pub rbac: Option<PathBuf>,
    /// Between bookmarks of a watch.
    pub bookmarks: Duration,
    /// Field managers own status and the rest as one, as on servers before 1.22.
    pub one_owner: bool,
    /// Nodes and pods that it begins with.
    pub sample: (u32, u32),
}

impl Default for Options {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            rbac: None,
            bookmarks: Duration::from_secs(1),
            one_owner: false,
            sample: (0, 0),
        }
    }
}

/// A test API server that runs. It ends when this value is dropped.
#[derive(Debug)]
pub struct ApiServer {
    directory: PathBuf,
    options: Options,
    child: Child,
    address: SocketAddr,
}

impl ApiServer {
    /// Starts a server that keeps its state in `directory`, and goes on with what is there.
    pub fn start(directory: &Path, options: Options) -> Result<Self> {
        let (child, address) = launch(directory, &options)?;
        Ok(Self { directory: directory.to_owned(), options, child, address })
    }

    /// The same inside a network namespace.
    pub fn start_in(namespace: &Namespace, directory: &Path, options: Options) -> Result<Self> {
        namespace.enter(|| Self::start(directory, options))
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its process id.
    pub fn process_id(&self) -> u32 {
        self.child.id()
    }

    /// A kubeconfig: `admin` and `gateway` have certificates, `admin-token` and `gateway-token` tokens.
    pub fn kubeconfig(&self, who: &str) -> PathBuf {
        self.directory.join(format!("{who}.kubeconfig"))
    }

    /// Where its certificates and tokens are.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Ends it; it keeps its state.
    pub fn stop(&mut self) -> Result<()> {
        kill(Pid::from_raw(i32::try_from(self.child.id())?), Signal::SIGTERM)?;
        self.child.wait()?;
        Ok(())
    }

    /// Starts it again at the same address after [`Self::stop`].
    pub fn restart(&mut self) -> Result<()> {
        let options = Options { listen: self.address, ..self.options.clone() };
        (self.child, self.address) = launch(&self.directory, &options)?;
        Ok(())
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        // Fails when it has ended, which is as well.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn launch(directory: &Path, options: &Options) -> Result<(Child, SocketAddr)> {
    let program = profile_directory()?.join("apiserver");
    ensure!(program.is_file(), "{} is missing: run `cargo build -p gateway-tests`", program.display());
    let mut command = Command::new(&program);
    command
        .arg("--directory")
        .arg(directory)
        .args(["--listen", &options.listen.to_string()])
        .args(["--bookmark-ms", &options.bookmarks.as_millis().to_string()])
        .args(["--nodes", &options.sample.0.to_string()])
        .args(["--pods", &options.sample.1.to_string()])
        // It ends with its input, so it does not outlive us.
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    if options.one_owner {
        command.arg("--one-owner");
    }
    if let Some(rbac) = &options.rbac {
        command.arg("--rbac").arg(rbac);
    }
    let mut child = command.spawn().with_context(|| format!("cannot start {}", program.display()))?;
    let mut line = String::new();
    let output = child.stdout.as_mut().context("no output of apiserver")?;
    BufReader::new(output).read_line(&mut line)?;
    let started: Value =
        serde_json::from_str(&line).with_context(|| format!("apiserver did not start: {line:?}"))?;
    let address = started["address"].as_str().context("no address")?.parse()?;
    Ok((child, address))
}

/// A client by a kubeconfig.
pub async fn client(kubeconfig: &Path) -> Result<Client> {
    let kubeconfig = Kubeconfig::read_from(kubeconfig)?;
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
    Ok(Client::try_from(config)?)
}

/// The controls of a test API server, by a client of its administrator.
#[derive(Clone)]
pub struct Controls(pub Client);

impl Controls {
    /// Adds a fault, or a list of them, as the server's `faults::Fault` describes it.
    pub async fn fault(&self, fault: &Value) -> Result<()> {
        self.send(Method::POST, "faults", fault).await.map(drop)
    }

    /// Takes back all faults.
    pub async fn heal(&self) -> Result<()> {
        self.send(Method::DELETE, "faults", &Value::Null).await.map(drop)
    }

    /// Makes the server forget its history.
    pub async fn compact(&self) -> Result<()> {
        self.send(Method::POST, "compact", &Value::Null).await.map(drop)
    }

    /// Ends all connections.
    pub async fn disconnect(&self) -> Result<()> {
        // Also this one, perhaps before its answer is read.
        let _ = self.send(Method::POST, "disconnect", &Value::Null).await;
        Ok(())
    }

    /// What was asked for, by whom.
    pub async fn requests(&self) -> Result<Vec<Value>> {
        let list = self.send(Method::GET, "requests", &Value::Null).await?;
        Ok(list.as_array().cloned().unwrap_or_default())
    }

    /// Forgets what was asked for.
    pub async fn forget_requests(&self) -> Result<()> {
        self.send(Method::DELETE, "requests", &Value::Null).await.map(drop)
    }

    async fn send(&self, method: Method, what: &str, body: &Value) -> Result<Value> {
        let body = if body.is_null() { Vec::new() } else { serde_json::to_vec(body)? };
        let request = Request::builder().method(method).uri(format!("/control/{what}")).body(body)?;
        Ok(self.0.request(request).await?)
    }
}
