//! Carries TCP connections from inside a network namespace to an address outside, for the one thing that a lab needs from
//! there: its API server.

use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener},
    time::Duration,
};

use anyhow::{Context, Result};
use tokio::{
    io::copy_bidirectional,
    net::{TcpStream, lookup_host},
    runtime::Runtime,
};

use super::netns::Namespace;

/// A relay that works until it is dropped.
#[derive(Debug)]
pub struct Relay {
    address: SocketAddr,
    /// `None` only while it is dropped.
    runtime: Option<Runtime>,
}

impl Relay {
    /// Listens at a port of the namespace's loopback, and carries what comes to `target`, a host and a port.
    pub fn start(namespace: &Namespace, target: String) -> Result<Self> {
        let listener = namespace.enter(|| Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?))?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let listener = {
            let _guard = runtime.enter();
            tokio::net::TcpListener::from_std(listener)?
        };
        runtime.spawn(async move {
            while let Ok((inside, _)) = listener.accept().await {
                let target = target.clone();
                tokio::spawn(async move {
                    // Who cannot be connected to is told by the end of the connection, as is its end.
                    if let Ok(outside) = connect(&target).await {
                        let _ = carry(inside, outside).await;
                    }
                });
            }
        });
        Ok(Self { address, runtime: Some(runtime) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

async fn connect(target: &str) -> Result<TcpStream> {
    let address = lookup_host(target).await?.next().with_context(|| format!("{target} has no address"))?;
    Ok(TcpStream::connect(address).await?)
}

async fn carry(mut inside: TcpStream, mut outside: TcpStream) -> Result<()> {
    inside.set_nodelay(true)?;
    outside.set_nodelay(true)?;
    copy_bidirectional(&mut inside, &mut outside).await?;
    Ok(())
}

impl Drop for Relay {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(Duration::from_secs(1));
        }
    }
}
