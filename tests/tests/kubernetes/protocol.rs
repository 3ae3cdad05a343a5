//! The test server speaks the protocol: what a client of Kubernetes may rely on.

use std::collections::BTreeSet;

use futures::{StreamExt as _, TryStreamExt as _};
use k8s_openapi::api::{coordination::v1::Lease, core::v1::Node};
use kube::{
    Api, Error,
    api::{DeleteParams, ListParams, Patch, PatchParams, PostParams, Preconditions, WatchEvent, WatchParams},
};
use serde_json::{Value, json};

use crate::{
    objects::{LABEL, address, node, node_name, on, running},
    subject::{RUNTIME, Subject},
};

fn ours(subject: &Subject) -> ListParams {
    ListParams::default().labels(&format!("{LABEL}={}", subject.run))
}

pub(crate) fn status(error: Error) -> (u16, String, String) {
    match error {
        Error::Api(status) => (status.code, status.reason, status.message),
        other => panic!("{other}"),
    }
}

#[test]
fn lists_are_paged_at_one_revision() {
    let subject = Subject::start();
    for number in 1..=7 {
        subject.create_node(&node(&subject.run, number));
    }
    RUNTIME.block_on(async {
        let mut parameters = ours(&subject).limit(3);
        let mut names = BTreeSet::new();
        let mut revisions = BTreeSet::new();
        loop {
            let page = subject.nodes().list(&parameters).await.unwrap();
            names.extend(page.items.iter().map(|node| node.metadata.name.clone().unwrap()));
            revisions.insert(page.metadata.resource_version.clone());
            match page.metadata.continue_.clone().filter(|token| !token.is_empty()) {
                Some(token) => parameters.continue_token = Some(token),
                None => break,
            }
            // What happens between pages is not in them.
            let name = node_name(&subject.run, 7);
            if page.items.iter().all(|node| node.metadata.name.as_ref() != Some(&name)) {
                let _ = subject.nodes().delete(&name, &DeleteParams::default()).await;
            }
        }
        assert_eq!(names.len(), 7);
        assert_eq!(revisions.len(), 1);
    });
}

#[test]
fn watches_go_on_from_a_revision_with_bookmarks() {
    let subject = Subject::start();
    RUNTIME.block_on(async {
        let version = subject.nodes().list(&ours(&subject)).await.unwrap().metadata.resource_version.unwrap();
        let parameters = WatchParams::default().labels(&format!("{LABEL}={}", subject.run)).timeout(10);
        let watch = subject.nodes().watch(&parameters, &version).await.unwrap().boxed();
        let mut node: Node = serde_json::from_value(node(&subject.run, 1)).unwrap();
        node.metadata.labels = Some([(LABEL.to_owned(), subject.run.clone())].into());
        let made = subject.nodes().create(&PostParams::default(), &node).await.unwrap();
        let patch = json!({ "metadata": { "annotations": { "x": "y" } } });
        let name = node_name(&subject.run, 1);
        subject.nodes().patch(&name, &PatchParams::default(), &Patch::Merge(&patch)).await.unwrap();
        subject.nodes().delete(&name, &DeleteParams::default()).await.unwrap();
        let mut seen = Vec::new();
        let mut watch = watch;
        while seen.last().is_none_or(|(word, _)| *word != "deleted") {
            match watch.try_next().await.unwrap().expect("the watch lasts") {
                WatchEvent::Added(node) => seen.push(("added", node.metadata.uid)),
                WatchEvent::Modified(node) => seen.push(("modified", node.metadata.uid)),
                WatchEvent::Deleted(node) => seen.push(("deleted", node.metadata.uid)),
                WatchEvent::Bookmark(bookmark) => assert!(!bookmark.metadata.resource_version.is_empty()),
                WatchEvent::Error(status) => panic!("{status:?}"),
            }
        }
        // Controllers may have changed it, too.
        seen.dedup();
        let uid = made.metadata.uid;
        assert_eq!(seen, [("added", uid.clone()), ("modified", uid.clone()), ("deleted", uid)]);
    });
}

/// flannel-relevant rules of Nodes, as a real server has them.
#[test]
fn pod_cidrs_are_filled_in_checked_and_never_change() {
    let subject = Subject::start();
    subject.create_node(&node(&subject.run, 1));
    RUNTIME.block_on(async {
        let name = node_name(&subject.run, 1);
        let spec = subject.nodes().get(&name).await.unwrap().spec.unwrap();
        assert_eq!(spec.pod_cidrs, Some(vec!["198.18.1.0/24".to_owned()]), "filled in from podCIDR");
        let patch = json!({ "spec": { "podCIDR": "198.18.77.0/24", "podCIDRs": ["198.18.77.0/24"] } });
        let changed = subject.nodes().patch(&name, &PatchParams::default(), &Patch::Merge(&patch)).await;
        assert_eq!(status(changed.unwrap_err()).0, 422);
        // Servers differ in what they think of host bits.
        let mut wrong = node(&subject.run, 2);
        wrong["spec"]["podCIDR"] = json!("198.18.2.0");
        let wrong: Node = serde_json::from_value(wrong).unwrap();
        let refused = subject.nodes().create(&PostParams::default(), &wrong).await.unwrap_err();
        assert_eq!(status(refused).0, 422, "no length");
    });
}

#[test]
fn writes_have_preconditions() {
    let subject = Subject::start();
    subject.create_node(&node(&subject.run, 1));
    RUNTIME.block_on(async {
        let name = node_name(&subject.run, 1);
        let old = subject.nodes().get(&name).await.unwrap();
        let again = serde_json::from_value(node(&subject.run, 1)).unwrap();
        let again = subject.nodes().create(&PostParams::default(), &again).await;
        assert_eq!(status(again.unwrap_err()).1, "AlreadyExists");
        let patch = json!({ "metadata": { "annotations": { "x": "1" } } });
        subject.nodes().patch(&name, &PatchParams::default(), &Patch::Merge(&patch)).await.unwrap();
        let mut stale = old.clone();
        stale.metadata.annotations.get_or_insert_default().insert("x".into(), "2".into());
        let refused = subject.nodes().replace(&name, &PostParams::default(), &stale).await.unwrap_err();
        assert_eq!(status(refused).1, "Conflict");
        let preconditions = Preconditions { uid: Some("other".into()), resource_version: None };
        let delete = DeleteParams { preconditions: Some(preconditions), ..DeleteParams::default() };
        assert_eq!(status(subject.nodes().delete(&name, &delete).await.unwrap_err()).0, 409);
    });
}

/// Server-side apply: fields have owners, others' are not taken without force, and what is left out goes.
#[test]
fn applied_fields_have_owners() {
    let subject = Subject::start();
    RUNTIME.block_on(async {
        let name = node_name(&subject.run, 1);
        let apply = |manager: &str, annotations: Value| {
            let object = json!({
                "apiVersion": "v1", "kind": "Node",
                "metadata": { "name": name, "labels": { LABEL: subject.run }, "annotations": annotations },
            });
            let nodes = subject.nodes();
            let (manager, name) = (manager.to_owned(), name.clone());
            async move {
                let parameters = PatchParams { field_manager: Some(manager), ..PatchParams::default() };
                nodes.patch(&name, &parameters, &Patch::Apply(&object)).await
            }
        };
        let made = apply("one", json!({ "a": "1", "b": "1" })).await.unwrap();
        let managers = |node: &Node| -> BTreeSet<String> {
            let entries = node.metadata.managed_fields.clone().unwrap_or_default();
            entries
                .into_iter()
                .filter(|entry| entry.operation.as_deref() == Some("Apply"))
                .filter_map(|entry| entry.manager)
                .collect()
        };
        assert_eq!(managers(&made), ["one".to_owned()].into());
        let (code, reason, message) = status(apply("two", json!({ "a": "2" })).await.unwrap_err());
        assert_eq!((code, reason.as_str()), (409, "Conflict"));
        assert!(message.contains("\"one\"") && message.contains(".metadata.annotations.a"), "{message}");
        // The same value is shared.
        apply("two", json!({ "a": "1", "c": "1" })).await.unwrap();
        let left = apply("one", json!({ "b": "1" })).await.unwrap();
        let annotations = left.metadata.annotations.unwrap();
        assert!(["a", "b", "c"].iter().all(|key| annotations.contains_key(*key)), "two still wants a");
        let left = apply("two", json!({ "c": "1" })).await.unwrap();
        assert!(!left.metadata.annotations.unwrap().contains_key("a"), "nobody wants a");
        // Nothing changes, so there is no new version.
        let version = subject.nodes().get(&name).await.unwrap().metadata.resource_version;
        let same = apply("two", json!({ "c": "1" })).await.unwrap();
        assert_eq!(same.metadata.resource_version, version);
        subject.nodes().delete(&name, &DeleteParams::default()).await.unwrap();
    });
}

#[test]
fn status_is_written_by_itself() {
    let subject = Subject::start();
    subject.create_node(&node(&subject.run, 1));
    subject.create_pod("a", &on(&subject.run, 1), &running(address(1, 2)));
    RUNTIME.block_on(async {
        let patch = json!({ "status": { "phase": "Failed" } });
        subject.pods().patch("a", &PatchParams::default(), &Patch::Merge(&patch)).await.unwrap();
        let phase = subject.pods().get("a").await.unwrap().status.unwrap().phase;
        assert_eq!(phase.as_deref(), Some("Running"), "not by this path");
        let condition = |status: &str| json!({ "type": "Ready", "status": status });
        let name = node_name(&subject.run, 1);
        for conditions in
            [json!([condition("False"), { "type": "Other", "status": "True" }]), json!([condition("True")])]
        {
            let patch = json!({ "status": { "conditions": conditions } });
            subject
                .nodes()
                .patch_status(&name, &PatchParams::default(), &Patch::Strategic(&patch))
                .await
                .unwrap();
        }
        let conditions = subject.nodes().get(&name).await.unwrap().status.unwrap().conditions.unwrap();
        assert_eq!(conditions.len(), 2, "merged by type");
    });
}

#[test]
fn leases_are_kept() {
    let subject = Subject::start();
    RUNTIME.block_on(async {
        let leases: Api<Lease> = Api::namespaced(subject.client(), &subject.run);
        let lease = json!({
            "apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
            "metadata": { "name": "l", "labels": { LABEL: subject.run } },
            "spec": { "holderIdentity": "me", "leaseDurationSeconds": 40 },
        });
        let parameters = PatchParams::apply("test").force();
        let made = leases.patch("l", &parameters, &Patch::Apply(&lease)).await.unwrap();
        assert_eq!(made.spec.unwrap().holder_identity.as_deref(), Some("me"));
        leases.delete("l", &DeleteParams::default()).await.unwrap();
    });
}
