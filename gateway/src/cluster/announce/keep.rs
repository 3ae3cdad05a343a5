//! Carries out what the Node needs.

use std::{sync::Arc, time::Duration};

use k8s_openapi::{
    api::{coordination::v1::Lease, core::v1::Node},
    apimachinery::pkg::apis::meta::v1::MicroTime,
    jiff::Timestamp,
};
use kube::core::{
    ObjectList,
    params::{DeleteParams, GetParams, ListParams, Patch, PatchParams, Preconditions},
};
use serde_json::{Value, json};
use tokio::{
    sync::Notify,
    time::{Instant, sleep},
};
use tracing::{info, warn};

use super::node::{Action, Announcement};
use crate::{
    cluster::{
        kubernetes::{
            Failure, Kind, LEASE_NAMESPACE, Link, Linked, Request, Timing, exchange, read_net_conf,
        },
        problem::{Problem, ProblemList},
    },
    config::Config,
};

/// How often the lease is renewed, as kubelets do.
const BEAT: Duration = Duration::from_secs(10);
/// How long a lease lasts.
const LEASE_SECONDS: i32 = 40;
/// How often the Node's conditions are written.
const STATUS: Duration = Duration::from_mins(1);
/// How often a Node that nothing was heard of is looked at.
const LOOK: Duration = Duration::from_mins(1);
/// A Node that somebody changes all the time is put right so often at most.
const REST: Duration = Duration::from_secs(1);

/// How often the list of taints, which has no owner, is read and written anew because somebody else changes the Node.
const TAINT_TRIES: u32 = 5;

/// Why something was not done.
#[derive(Clone, Debug)]
pub enum Refusal {
    /// It would do harm.
    Problems(Vec<Problem>),
    /// The server did not let it happen.
    Failure(Failure),
}

impl From<Failure> for Refusal {
    fn from(failure: Failure) -> Self {
        Self::Failure(failure)
    }
}

impl Refusal {
    /// For people.
    pub fn problems(&self, place: &str, server: &str) -> Vec<Problem> {
        match self {
            Self::Problems(problems) => problems.clone(),
            Self::Failure(failure) => vec![failure.problem(place, server)],
        }
    }
}

/// What was done to a Node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Done {
    /// Nothing: it is as it should be.
    Nothing,
    /// It was made.
    Made,
    /// It was changed.
    Changed,
    /// It was removed and made again.
    Replaced,
    /// It was removed.
    Removed,
}

fn nodes() -> kube::core::Request {
    kube::core::Request::new("/api/v1/nodes")
}

fn leases() -> kube::core::Request {
    kube::core::Request::new(format!("/apis/coordination.k8s.io/v1/namespaces/{LEASE_NAMESPACE}/leases"))
}

/// All Nodes of the cluster.
pub(super) async fn list(linked: &Linked, timing: &Timing) -> Result<Vec<Node>, Failure> {
    let right = Request::List(Kind::Node).right();
    let all: ObjectList<Node> =
        exchange::fetch(linked, right, nodes().list(&ListParams::default()), timing.idle).await?;
    Ok(all.items)
}

async fn get(linked: &Linked, name: &str, timing: &Timing) -> Result<Option<Node>, Failure> {
    let request = nodes().get(name, &GetParams::default());
    found(exchange::fetch(linked, Request::GetNode.right(), request, timing.idle).await)
}

/// `None` for what is not there.
fn found<T>(result: Result<T, Failure>) -> Result<Option<T>, Failure> {
    match result {
        Ok(object) => Ok(Some(object)),
        Err(Failure::Status { code: 404, .. }) => Ok(None),
        Err(failure) => Err(failure),
    }
}

/// Makes the Node what it should be.
///
/// # Errors
///
/// It would do harm to others, or the server does not let it happen.
pub async fn apply(linked: &Linked, announcement: &Announcement, timing: &Timing) -> Result<Done, Refusal> {
    let name = &announcement.name;
    let mut node = get(linked, name, timing).await?;
    let mut action = announcement.action(node.as_ref());
    if let Action::Refuse(problem) = action {
        return Err(Refusal::Problems(vec![problem]));
    }
    let mut done = Done::Nothing;
    if action != Action::Nothing {
        refuse_harm(linked, announcement, timing).await?;
    }
    if let (Action::Replace(why), Some(old)) = (&action, &node) {
        warn!("Node {name} is replaced: {why}");
        delete(linked, old, timing).await?;
        done = Done::Replaced;
        node = None;
        action = announcement.action(None);
    }
    if let Action::Apply(object) = &action {
        if done == Done::Nothing {
            done = if node.is_some() { Done::Changed } else { Done::Made };
        }
        node = Some(write(linked, announcement, object, timing).await?);
    }
    if let Some(node) = node
        && taint(linked, announcement, node, timing).await?
        && done == Done::Nothing
    {
        done = Done::Changed;
    }
    Ok(done)
}

/// Puts the taints on the Node; false if they are there.
async fn taint(
    linked: &Linked,
    announcement: &Announcement,
    mut node: Node,
    timing: &Timing,
) -> Result<bool, Failure> {
    let name = &announcement.name;
    let parameters = PatchParams { field_manager: Some(announcement.manager()), ..PatchParams::default() };
    let mut tries = 0;
    while let Some(taints) = Announcement::taints(&node) {
        let request = nodes().patch(name, &parameters, &Patch::Merge(&taints));
        tries += 1;
        match exchange::fetch::<Node>(linked, Request::PatchNode.right(), request, timing.idle).await {
            Ok(_) => return Ok(true),
            // Controllers write to every Node that is new.
            Err(Failure::Status { code: 409, .. }) if tries < TAINT_TRIES => {}
            Err(failure) => return Err(failure),
        }
        let Some(newer) = get(linked, name, timing).await? else { return Ok(false) };
        node = newer;
    }
    Ok(false)
}

/// Whether the Node may be written.
async fn refuse_harm(linked: &Linked, announcement: &Announcement, timing: &Timing) -> Result<(), Refusal> {
    let mut problems = announcement.collisions(&list(linked, timing).await?);
    if let Some(Ok(conf)) = read_net_conf(linked, timing).await?
        && conf.ipv6
    {
        problems.push(Problem::error(
            conf.place,
            "EnableIPv6 is true: in a dual-stack network flannel does not program a Node that has IPv4 only",
            "run flannel with EnableIPv6 false: this gateway carries IPv4 only",
        ));
    }
    if problems.is_empty() { Ok(()) } else { Err(Refusal::Problems(problems)) }
}

/// Applies the Node. What others have taken is taken back, but not silently.
async fn write(
    linked: &Linked,
    announcement: &Announcement,
    object: &Value,
    timing: &Timing,
) -> Result<Node, Failure> {
    let right = Request::PatchNode.right();
    let parameters = PatchParams { field_manager: Some(announcement.manager()), ..PatchParams::default() };
    let send = |parameters: PatchParams| {
        let request = nodes().patch(&announcement.name, &parameters, &Patch::Apply(object));
        async move { exchange::fetch::<Node>(linked, right, request, timing.idle).await }
    };
    match send(parameters.clone()).await {
        Err(Failure::Status { code: 409, message, .. }) => {
            warn!("Node {}: {}; taken back", announcement.name, message.replace('\n', " "));
            send(parameters.force()).await
        }
        other => other,
    }
}

async fn delete(linked: &Linked, node: &Node, timing: &Timing) -> Result<(), Failure> {
    let preconditions = Preconditions { uid: node.metadata.uid.clone(), resource_version: None };
    let parameters = DeleteParams { preconditions: Some(preconditions), ..DeleteParams::default() };
    let name = node.metadata.name.as_deref().unwrap_or_default();
    let request = nodes().delete(name, &parameters);
    found(exchange::fetch::<Value>(linked, Request::DeleteNode.right(), request, timing.idle).await).map(drop)
}

/// Removes the Node and its lease, if they are this gateway's.
///
/// # Errors
///
/// They are somebody else's, or the server does not let it happen.
pub async fn remove(linked: &Linked, announcement: &Announcement, timing: &Timing) -> Result<Done, Refusal> {
    let node = get(linked, &announcement.name, timing).await?;
    if let Some(node) = &node {
        if !announcement.owns(node) {
            return Err(Refusal::Problems(vec![Problem::error(
                format!("Node {}", announcement.name),
                format!("was not made by gateway instance {:?}", announcement.instance),
                "it is left alone: delete it by kubectl if nobody needs it",
            )]));
        }
        delete(linked, node, timing).await?;
    }
    let request = leases().delete(&announcement.name, &DeleteParams::default());
    let lease = exchange::fetch::<Value>(linked, Request::DeleteLease.right(), request, timing.idle).await;
    let lease = found(lease)?;
    Ok(if node.is_some() || lease.is_some() { Done::Removed } else { Done::Nothing })
}

/// Renews the lease, as a kubelet does.
async fn beat(linked: &Linked, announcement: &Announcement, timing: &Timing) -> Result<(), Failure> {
    let name = &announcement.name;
    let lease = json!({
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": { "name": name, "namespace": LEASE_NAMESPACE },
        "spec": {
            "holderIdentity": name,
            "leaseDurationSeconds": LEASE_SECONDS,
            "renewTime": MicroTime(Timestamp::now()),
        },
    });
    let parameters = PatchParams::apply(&announcement.manager()).force();
    let request = leases().patch(name, &parameters, &Patch::Apply(&lease));
    exchange::fetch::<Lease>(linked, Request::PatchLease.right(), request, timing.idle).await.map(drop)
}

/// Says that the Node is ready. It has no capacity, so nothing is put on it.
async fn tell_ready(linked: &Linked, announcement: &Announcement, timing: &Timing) -> Result<(), Failure> {
    let now = format!("{}Z", Timestamp::now().strftime("%Y-%m-%dT%H:%M:%S"));
    let condition = |kind: &str, status: &str, message: &str| {
        json!({
            "type": kind, "status": status, "reason": "GatewayRunning", "message": message, "lastHeartbeatTime": now,
        })
    };
    let status = json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": { "name": announcement.name },
        "status": {
            "addresses": [{ "type": "InternalIP", "address": announcement.overlay.local.to_string() }],
            "conditions": [
                condition("Ready", "True", "the gateway is running"),
                condition("NetworkUnavailable", "False", "the gateway forwards by itself"),
            ],
        },
    });
    let parameters = PatchParams::apply(&announcement.status_manager()).force();
    let request =
        nodes().patch_subresource("status", &announcement.name, &parameters, &Patch::Apply(&status));
    exchange::fetch::<Node>(linked, Request::PatchNodeStatus.right(), request, timing.idle).await.map(drop)
}

/// Keeps all Nodes of a gateway as they should be, for ever. `changed` tells that one of them may have changed.
pub async fn keep(
    link: Arc<Link>,
    config: Config,
    timing: Timing,
    changed: Arc<Notify>,
    problems: ProblemList,
) {
    // A dead connection must not outlast the lease.
    let timing = Timing { idle: timing.idle.min(BEAT), ..timing };
    let mut status_at = Instant::now();
    loop {
        let mut failed = false;
        for announcement in &Announcement::all(&config) {
            let place = format!("Node {}", announcement.name);
            let due = Instant::now() >= status_at;
            let found = match link.get().await {
                Ok(linked) => {
                    let result = attend(&linked, announcement, &config, &timing, due).await;
                    result.err().map(|refusal| refusal.problems(&place, &linked.server))
                }
                Err(failure) => Some(vec![failure.problem(&place, "the API server")]),
            };
            failed |= found.is_some();
            problems.set(&place, found.unwrap_or_default());
        }
        if Instant::now() >= status_at && !failed {
            status_at = Instant::now() + STATUS;
        }
        sleep(REST).await;
        let pause = if config.flannel.heartbeat || failed { BEAT } else { LOOK };
        tokio::select! {
            () = sleep(pause.saturating_sub(REST)) => {}
            () = changed.notified() => {}
        }
    }
}

/// Everything that one Node needs now.
async fn attend(
    linked: &Linked,
    announcement: &Announcement,
    config: &Config,
    timing: &Timing,
    due: bool,
) -> Result<(), Refusal> {
    let applied =
        if config.flannel.register { apply(linked, announcement, timing).await } else { Ok(Done::Nothing) };
    let (done, refused) = match applied {
        Ok(done) => (done, None),
        // The heart goes on.
        Err(refusal) => (Done::Nothing, Some(refusal)),
    };
    if done != Done::Nothing {
        info!("Node {}: {done:?}", announcement.name);
    }
    if config.flannel.heartbeat {
        // Somebody else's Node has its own kubelet, or is dead and must look it.
        let node = get(linked, &announcement.name, timing).await?;
        if !node.as_ref().is_some_and(|node| announcement.speaks_for(node)) {
            let problem = || Refusal::Problems(vec![announcement.no_heart(node.is_some())]);
            return Err(refused.unwrap_or_else(problem));
        }
        beat(linked, announcement, timing).await?;
        if due || done != Done::Nothing {
            tell_ready(linked, announcement, timing).await?;
        }
    }
    refused.map_or(Ok(()), Err)
}
