//! A Kubernetes API server for tests: the real list, watch and write protocols over TLS, with faults on demand.
//!
//! It has Nodes, Pods, Leases, ConfigMaps and Namespaces, and nothing that acts on them: no scheduler, and of controllers
//! only what they do to every new Node.
//! What it fills in, refuses and answers is what `kube-apiserver` does for these, as it was compared with version 1.20.2.
//! Its controls lie under `/control`, for the administrator:
//!
//! | request | effect |
//! |---|---|
//! | `POST /control/faults` | adds one or several [`faults::Fault`]s |
//! | `DELETE /control/faults` | takes all of them back |
//! | `POST /control/compact` | forgets the history: what goes on from it gets 410 |
//! | `POST /control/disconnect` | ends all connections |
//! | `GET`, `DELETE /control/requests` | what was asked for, by whom, how often |
//!
//! It ends with its standard input, and with SIGTERM; the next run in the same directory goes on from there.

mod access;
mod failure;
mod faults;
mod fields;
mod http;
mod objects;
mod resource;
mod sample;
mod store;
mod watch;

use std::{
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use clap::Parser;
use hyper::service::service_fn;
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use serde_json::json;
use tokio::{
    net::{TcpListener, TcpStream},
    signal::unix::{SignalKind, signal},
    sync::oneshot,
};
use tokio_rustls::TlsAcceptor;

use crate::{
    access::User,
    http::Shared,
    resource::{Key, Resource},
    store::Store,
};

/// Kubernetes API server for tests
#[derive(Parser, Debug)]
struct Arguments {
    /// Where certificates, kubeconfigs and the state are kept
    #[arg(long)]
    directory: PathBuf,
    /// Address to listen at
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// RBAC manifests whose rules hold for the service account `gateway` of kube-system [default: all is allowed]
    #[arg(long)]
    rbac: Option<PathBuf>,
    /// Milliseconds between bookmarks of a watch
    #[arg(long, default_value_t = 1000)]
    bookmark_ms: u64,
    /// Do not tell status from the rest in what a field manager owns, as servers before 1.22
    #[arg(long)]
    one_owner: bool,
    /// Begin with so many nodes
    #[arg(long, default_value_t = 0)]
    nodes: u32,
    /// And so many pods on them
    #[arg(long, default_value_t = 0)]
    pods: u32,
}

#[tokio::main]
async fn main() -> Result<()> {
    let arguments = Arguments::parse();
    fs::create_dir_all(&arguments.directory)
        .with_context(|| format!("cannot create {}", arguments.directory.display()))?;
    let directory = fs::canonicalize(&arguments.directory)?;
    let listener = TcpListener::bind(arguments.listen)
        .await
        .with_context(|| format!("cannot listen at {}", arguments.listen))?;
    let address = listener.local_addr()?;
    let (mut access, tls) = access::set_up(&directory, address.ip(), address.port())?;
    if let Some(path) = &arguments.rbac {
        access.read_rules(path)?;
    }
    let state = directory.join("state.json");
    let mut store = restore(&state)?.unwrap_or_else(|| {
        let mut store = Store::new();
        for namespace in ["default", "kube-system", "kube-node-lease", "kube-flannel"] {
            let object = json!({
                "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": namespace }, "status": { "phase": "Active" },
            });
            store.put(Resource::Namespace, Key::new("", namespace), object);
        }
        store
    });
    if arguments.nodes > 0 {
        sample::fill(&mut store, arguments.nodes, arguments.pods)?;
    }
    let bookmark_interval = Duration::from_millis(arguments.bookmark_ms);
    let shared = Arc::new(Shared::new(access, store, bookmark_interval, arguments.one_owner));
    // Whoever started it waits for this line.
    println!("{}", json!({ "address": address, "directory": directory }));

    let mut terminate = signal(SignalKind::terminate())?;
    let mut abandoned = end_of_input();
    let acceptor = TlsAcceptor::from(tls);
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let Ok((stream, _)) = accepted else { continue };
                tokio::spawn(connection(acceptor.clone(), stream, shared.clone()));
            }
            _ = terminate.recv() => break,
            _ = &mut abandoned => break,
        }
    }
    if arguments.nodes == 0 {
        let dump = shared.store().dump().to_string();
        fs::write(&state, dump).with_context(|| format!("cannot write {}", state.display()))?;
    }
    Ok(())
}

/// Tells when standard input ends: when whoever started this is gone.
fn end_of_input() -> oneshot::Receiver<()> {
    let (sender, receiver) = oneshot::channel();
    // A thread of its own: the runtime would wait for one of its own at the end.
    thread::spawn(move || {
        let _ = io::copy(&mut io::stdin(), &mut io::sink());
        let _ = sender.send(());
    });
    receiver
}

fn restore(state: &Path) -> Result<Option<Store>> {
    if !state.exists() {
        return Ok(None);
    }
    let text = fs::read(state).with_context(|| format!("cannot read {}", state.display()))?;
    let dump = serde_json::from_slice(&text)?;
    Ok(Some(
        Store::restore(&dump).with_context(|| format!("{} is no state of this server", state.display()))?,
    ))
}

async fn connection(acceptor: TlsAcceptor, stream: TcpStream, shared: Arc<Shared>) {
    let _ = stream.set_nodelay(true);
    let Ok(stream) = acceptor.accept(stream).await else { return };
    let user: Option<User> = stream
        .get_ref()
        .1
        .peer_certificates()
        .and_then(|chain| chain.first())
        .and_then(|certificate| shared.access.certificate(certificate));
    let mut disconnect = shared.disconnect.subscribe();
    let service = service_fn(move |request| http::answer(shared.clone(), user.clone(), request));
    let builder = auto::Builder::new(TokioExecutor::new());
    tokio::select! {
        // A connection that breaks is its client's affair.
        _ = builder.serve_connection(TokioIo::new(stream), service) => {}
        _ = disconnect.changed() => {}
    }
}
