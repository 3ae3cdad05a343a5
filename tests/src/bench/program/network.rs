//! The gateway host of the benchmark: two interfaces, forwarding on, clients' MAC addresses known, as the FIB sees it.

use std::{fmt::Write as _, panic, path::Path, process::Command, thread};

use anyhow::{Context as _, Result, ensure};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};

use crate::bench::flow::{CLIENT_MAC, CLIENTS, EXTERNAL, LOCAL, UNDERLAY, own_client};

/// Runs `work` on a thread with its own network, and its own mounts for a bpffs that ends with it: the path that it gets.
pub(super) fn isolated<T: Send>(work: impl FnOnce(&Path) -> Result<T> + Send) -> Result<T> {
    let directory = tempfile::tempdir().context("no temporary directory")?;
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS)
                .context("cannot make namespaces: run as root")?;
            let none = None::<&str>;
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context("private mounts")?;
            wire()?;
            work(directory.path())
        });
        thread.join().unwrap_or_else(|payload| panic::resume_unwind(payload))
    })
}

fn wire() -> Result<()> {
    let mut script = format!(
        "ip link set lo up
         ip link add {EXTERNAL} type veth peer name clients
         ip link add {UNDERLAY} type veth peer name nodes
         for device in {EXTERNAL} {UNDERLAY} clients nodes; do ip link set $device up; done
         ip address add 10.244.30.1/24 dev {EXTERNAL}
         ip address add {LOCAL}/24 dev {UNDERLAY}
         sysctl -qw net.ipv4.ip_forward=1\n"
    );
    for client in (0..CLIENTS).map(own_client) {
        writeln!(script, "ip neigh add {client} lladdr {CLIENT_MAC} dev {EXTERNAL} nud permanent")?;
    }
    let output = Command::new("sh").args(["-ec", &script]).output().context("no shell")?;
    ensure!(
        output.status.success(),
        "cannot set up the network: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}
