//! The gateway's own Node on an API server.

use std::{
    collections::BTreeSet,
    path::Path,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use gateway::{
    cluster::{
        announce::{self, Announcement, Done, Refusal},
        kubernetes::{Link, Linked},
        problem::ProblemList,
    },
    config::Config,
};
use gateway_tests::api::Options;
use k8s_openapi::api::{coordination::v1::Lease, core::v1::Node};
use kube::{
    Api,
    api::{DeleteParams, Patch, PatchParams},
};
use rstest::rstest;
use serde_json::{Value, json};
use tokio::{sync::Notify, task::JoinHandle};

use crate::{
    objects::{PREFIX, config, node, node_name},
    observer::{SOON, TIMING},
    rights::asked,
    subject::{RUNTIME, Subject},
};

pub(crate) struct Scene {
    pub(crate) subject: Subject,
    config: Config,
    linked: Linked,
}

impl Scene {
    pub(crate) fn new() -> Self {
        Self::with(false)
    }

    /// On a test server with the shipped rights, which if `one_owner` tells field managers apart as before 1.22.
    fn with(one_owner: bool) -> Self {
        let rbac = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/rbac.yaml");
        let subject = Subject::with(Options {
            rbac: Some(rbac),
            bookmarks: Duration::from_millis(100),
            one_owner,
            ..Options::default()
        });
        let mut config = config(subject.access());
        config.flannel.node = format!("{}-gw", subject.run);
        config.flannel.register = true;
        let linked = RUNTIME.block_on(Link::new(subject.access()).get()).unwrap();
        Self { subject, config, linked }
    }

    fn announcement(&self) -> Announcement {
        Announcement::all(&self.config).remove(0)
    }

    fn name(&self) -> &str {
        &self.config.flannel.node
    }

    pub(crate) fn apply(&self) -> Result<Done, Refusal> {
        RUNTIME.block_on(announce::apply(&self.linked, &self.announcement(), &TIMING))
    }

    fn remove(&self) -> Result<Done, Refusal> {
        RUNTIME.block_on(announce::remove(&self.linked, &self.announcement(), &TIMING))
    }

    pub(crate) fn node(&self) -> Option<Node> {
        RUNTIME.block_on(self.subject.nodes().get_opt(self.name())).unwrap()
    }

    fn patch(&self, patch: &Value) {
        self.subject.patch_node(self.name(), patch);
    }

    fn keep(&self) -> (JoinHandle<()>, Arc<Notify>, ProblemList) {
        let (changed, problems) = (Arc::new(Notify::new()), ProblemList::default());
        let link = Arc::new(Link::new(self.subject.access()));
        let keep = announce::keep(link, self.config.clone(), TIMING, changed.clone(), problems.clone());
        (RUNTIME.spawn(keep), changed, problems)
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        // On a real server it must not stay, whatever became of it; elsewhere nobody minds.
        let _ = self.remove();
        if self.subject.server.is_none() {
            let now = DeleteParams::default();
            let leases: Api<Lease> = Api::namespaced(self.subject.client(), "kube-node-lease");
            let _ = RUNTIME.block_on(self.subject.nodes().delete(self.name(), &now));
            let _ = RUNTIME.block_on(leases.delete(self.name(), &now));
        }
    }
}

fn wait(what: &str, holds: impl Fn() -> bool) {
    let begin = Instant::now();
    while !holds() {
        assert!(begin.elapsed() < SOON, "not within {SOON:?}: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

pub(crate) fn refused(result: Result<Done, Refusal>) -> String {
    match result {
        Err(Refusal::Problems(problems)) => {
            problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_node_is_made_left_alone_repaired_and_removed() {
    let scene = Scene::new();
    assert_eq!(scene.apply().unwrap(), Done::Made);
    let node = scene.node().unwrap();
    let spec = node.spec.clone().unwrap();
    assert_eq!(spec.pod_cidr.as_deref(), Some("198.18.255.0/24"));
    assert_eq!(spec.unschedulable, Some(true));
    assert_eq!(own_taints(&node), 2);
    let annotations = node.metadata.annotations.clone().unwrap();
    assert_eq!(annotations[&format!("{PREFIX}public-ip")], "198.19.255.254");
    let managers: BTreeSet<_> =
        node.metadata.managed_fields.unwrap().into_iter().filter_map(|entry| entry.manager).collect();
    assert!(managers.contains("xdp-gateway-default"), "{managers:?}");
    assert_eq!(scene.apply().unwrap(), Done::Nothing);

    // Somebody else takes a field, and our taints; others' taints stay.
    scene.patch(&json!({ "metadata": { "annotations": { format!("{PREFIX}public-ip"): "198.19.0.1" } } }));
    scene.patch(&json!({ "spec": { "taints": [{ "key": "theirs", "effect": "NoSchedule" }] } }));
    assert_eq!(scene.apply().unwrap(), Done::Changed);
    let node = scene.node().unwrap();
    assert_eq!(node.metadata.annotations.as_ref().unwrap()[&format!("{PREFIX}public-ip")], "198.19.255.254");
    assert_eq!(own_taints(&node), 2);
    assert!(node.spec.unwrap().taints.unwrap().iter().any(|taint| taint.key == "theirs"));

    assert_eq!(scene.remove().unwrap(), Done::Removed);
    assert!(scene.node().is_none());
    assert_eq!(scene.remove().unwrap(), Done::Nothing);
}

/// How many taints are the gateway's. A server adds its own, that the node is not ready.
fn own_taints(node: &Node) -> usize {
    let taints = node.spec.as_ref().and_then(|spec| spec.taints.as_ref());
    taints.into_iter().flatten().filter(|taint| taint.key == "xdp-gateway/external").count()
}

/// podCIDR and VtepMAC never change in place.
#[test]
fn another_identity_is_another_node() {
    let mut scene = Scene::new();
    scene.apply().unwrap();
    let before = scene.node().unwrap().metadata.uid;
    scene.config.overlays[0].subnet = "198.18.254.0/24".parse().unwrap();
    scene.config.overlays[0].address = "198.18.254.0".parse().unwrap();
    assert_eq!(scene.apply().unwrap(), Done::Replaced);
    let node = scene.node().unwrap();
    assert_ne!(node.metadata.uid, before);
    assert_eq!(node.spec.unwrap().pod_cidr.as_deref(), Some("198.18.254.0/24"));
}

/// What would take another node off the network is not written, and its owner is named.
#[test]
fn collisions_are_refused_before_anything_is_written() {
    let scene = Scene::new();
    let mut twin = node(&scene.subject.run, 1);
    twin["spec"]["podCIDR"] = json!("198.18.255.0/24");
    scene.subject.create_node(&twin);
    let told = refused(scene.apply());
    let owner = node_name(&scene.subject.run, 1);
    assert!(told.contains("overlaps 198.18.255.0/24") && told.contains(&owner), "{told}");
    assert!(scene.node().is_none());
}

#[test]
fn what_is_somebody_else_s_is_left_alone() {
    let scene = Scene::new();
    let mut foreign = node(&scene.subject.run, 1);
    foreign["metadata"]["name"] = json!(scene.name());
    scene.subject.create_node(&foreign);
    assert!(refused(scene.apply()).contains("was not made by gateway"));
    assert!(refused(scene.remove()).contains("was not made by gateway"));
    assert!(scene.node().is_some());
    scene.subject.delete_node(scene.name());
}

/// The daemon's part: made, kept alive, made again when somebody deletes it; with the shipped rights, all of them.
///
/// Where a manager's fields are one set, what tells that the Node is ready must not take the place of all else.
#[rstest]
#[case::now(false)]
#[case::before_1_22(true)]
fn the_node_is_kept(#[case] one_owner: bool) {
    let mut scene = Scene::with(one_owner);
    scene.config.flannel.heartbeat = true;
    let (task, changed, problems) = scene.keep();
    let leases: Api<Lease> = Api::namespaced(scene.subject.client(), "kube-node-lease");
    let lease = || RUNTIME.block_on(leases.get_opt(scene.name())).unwrap();
    let ready = || {
        let conditions = scene.node().and_then(|node| node.status?.conditions);
        conditions
            .into_iter()
            .flatten()
            .any(|condition| condition.type_ == "Ready" && condition.status == "True")
    };
    wait("the node is ready", || ready() && lease().is_some());
    let node = scene.node().unwrap();
    assert!(node.metadata.annotations.unwrap().contains_key(&format!("{PREFIX}public-ip")));
    assert!(
        node.status.unwrap().capacity.is_none_or(|capacity| capacity.is_empty()),
        "it claims no capacity"
    );
    let renewed = lease().unwrap().spec.unwrap().renew_time;
    assert!(problems.all().is_empty(), "{:?}", problems.all());

    RUNTIME.block_on(scene.subject.nodes().delete(scene.name(), &DeleteParams::default())).unwrap();
    // As the daemon does when the source tells of it.
    changed.notify_one();
    wait("the node is there again", ready);
    wait("the lease is renewed", || lease().unwrap().spec.unwrap().renew_time > renewed);

    // The controller manager thinks it dead.
    let patch = json!({ "status": { "conditions": [{ "type": "Ready", "status": "Unknown", "reason": "NodeStatusUnknown" }] } });
    let parameters =
        PatchParams { field_manager: Some("node-lifecycle".to_owned()), ..PatchParams::default() };
    RUNTIME
        .block_on(scene.subject.nodes().patch_status(scene.name(), &parameters, &Patch::Strategic(&patch)))
        .unwrap();
    task.abort();
    assert_eq!(scene.remove().unwrap(), Done::Removed);
    assert!(scene.node().is_none() && lease().is_none());

    // A real server does not tell.
    if scene.subject.server.is_none() {
        return;
    }
    let used: BTreeSet<(String, String)> = asked(&scene.subject);
    let wanted = [
        ("get", "nodes"),
        ("create", "nodes"),
        ("patch", "nodes"),
        ("delete", "nodes"),
        ("list", "nodes"),
        ("patch", "nodes/status"),
        ("create", "leases"),
        ("patch", "leases"),
        ("delete", "leases"),
        ("get", "configmaps"),
    ];
    let wanted: BTreeSet<_> =
        wanted.into_iter().map(|(verb, resource)| (verb.to_owned(), resource.to_owned())).collect();
    assert_eq!(used, wanted);
}
