//! What there is to see on an API server: how the gateway joins the cluster, and how it leaves.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use gateway_tests::lab::{
    Flannel, Gateway,
    flannel::{FLANNEL, GATEWAY, GATEWAY_SUBNET, GATEWAY_VTEP, Node},
    traffic, wait_until,
};

use crate::screen::{self, Screen, milliseconds};

const SOON: Duration = Duration::from_secs(20);
/// How long the API is away.
const AWAY: Duration = Duration::from_secs(3);

/// Entries of the gateway on a node, as the kernel shows them.
fn entries(lab: &Flannel, node: Node) -> Result<Vec<String>> {
    let host = lab.node(node);
    let subnet = GATEWAY_SUBNET.network().to_string();
    let mut lines = Vec::new();
    for words in [
        &["ip", "route", "show", "dev", FLANNEL][..],
        &["ip", "neigh", "show", "dev", FLANNEL],
        &["bridge", "fdb", "show", "dev", FLANNEL],
    ] {
        lines.extend(host.run(words)?.lines().map(|line| line.trim().to_owned()));
    }
    let mac = GATEWAY_VTEP.to_string();
    lines.retain(|line| line.contains(&subnet) || line.contains(&mac));
    Ok(lines)
}

/// The gateway's own Node, and what it does when somebody deletes it.
pub(crate) fn node(screen: &mut Screen, lab: &Flannel) -> Result<()> {
    let one = Node::new(1);
    let shown = screen.check("join", || {
        let node = lab.cluster().node(GATEWAY)?.context("the gateway made no Node")?;
        let status = node.status.unwrap_or_default();
        let ready = status.conditions.iter().flatten().any(|c| c.type_ == "Ready" && c.status == "True");
        ensure!(ready, "the Node is not Ready");
        lab.cluster().lease(GATEWAY)?.context("the Node has no lease")?;
        let entries = entries(lab, one)?;
        ensure!(entries.len() == 3, "node1 has {entries:?}");
        let cidr = node.spec.unwrap_or_default().pod_cidr.unwrap_or_default();
        Ok((format!("its Node: podCIDR {cidr}, Ready, with a lease; flanneld on node1:"), entries))
    })?;
    for line in shown.unwrap_or_default() {
        screen::text(&format!("             {line}"))?;
    }
    screen.check("Node −", || {
        let before = lab.cluster().node(GATEWAY)?.and_then(|node| node.metadata.uid);
        let start = Instant::now();
        lab.cluster().delete_node(GATEWAY)?;
        wait_until("the gateway makes its Node again", SOON, || {
            let node = lab.cluster().node(GATEWAY)?;
            Ok(node.filter(|node| node.metadata.uid != before).map(drop))
        })?;
        for node in lab.nodes() {
            traffic::wait_reachable(lab.client(2), node.pod_address(1), true, SOON)?;
        }
        let time = milliseconds(start.elapsed());
        Ok((format!("somebody deletes it: made again, all nodes answer again after {time}"), ()))
    })?;
    Ok(())
}

/// The API server goes away and comes back.
pub(crate) fn absence(screen: &mut Screen, lab: &mut Flannel, gateway: &Gateway) -> Result<()> {
    if !lab.cluster().can_stop() {
        return screen::text(" – API away  not shown: a real server is not the demo's to stop");
    }
    let one = Node::new(1);
    screen.check("API away", || {
        lab.cluster_mut().stop()?;
        let told = wait_until("`gateway status` tells", SOON, || {
            let output = gateway.output(lab.gateway(), &["status"])?;
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            Ok(text.contains("is not connected").then_some(text))
        })?;
        ensure!(told.contains("what is known goes on being forwarded"), "{told}");
        thread::sleep(AWAY);
        let pings = traffic::ping(lab.client(2), one.pod_address(1), 10, &[])?;
        ensure!(pings.received == pings.sent, "only {} of {} answered", pings.received, pings.sent);
        lab.cluster_mut().restart()?;
        // An address that no host has an old neighbour entry for.
        lab.add_pod(one, 4)?;
        traffic::wait_reachable(lab.client(2), one.pod_address(4), true, SOON)?;
        lab.remove_pod(one, 4)?;
        wait_until("`gateway status` has nothing to say", SOON, || {
            Ok(gateway.output(lab.gateway(), &["status"])?.status.success().then_some(()))
        })?;
        Ok((format!("{} pings answered, status tells; back again a new pod is reached", pings.sent), ()))
    })?;
    Ok(())
}

/// The gateway leaves the cluster.
pub(crate) fn leave(screen: &mut Screen, lab: &Flannel, gateway: &mut Gateway) -> Result<()> {
    screen.check("leave", || {
        gateway.stop()?;
        let said = gateway.text(lab.gateway(), &["node", "remove"])?;
        ensure!(said.contains("removed"), "{said}");
        ensure!(lab.cluster().node(GATEWAY)?.is_none(), "the Node is still there");
        ensure!(lab.cluster().lease(GATEWAY)?.is_none(), "the lease is still there");
        for node in lab.nodes() {
            wait_until("flanneld removes what it programmed", SOON, || {
                Ok(entries(lab, node)?.is_empty().then_some(()))
            })?;
        }
        Ok(("`gateway node remove`: no Node, no lease, and no entry on any node".to_owned(), ()))
    })?;
    Ok(())
}
