//! A small stand-in for flanneld on a node of the lab: follows the cluster's Nodes as flannel's kube subnet manager does,
//! and programs what its vxlan backend programs.
//!
//! What it does and leaves undone is what was observed with flannel 0.20 and 0.28:
//!
//! | event | effect |
//! |---|---|
//! | a Node with `kube-subnet-manager: "true"`, a podCIDR and sound annotations appears | neighbour, FDB entry, route |
//! | its backend-data, backend-type or public-ip changes | all three again; what the old ones said stays |
//! | anything else of it changes, a podCIDR that comes later included | nothing |
//! | it goes | the three that its last version names are removed |
//! | somebody else removes an entry | nothing: there is no repair |

use std::{
    collections::BTreeMap,
    fs::OpenOptions,
    io::Write as _,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, anyhow};
use futures::{StreamExt as _, pin_mut};
use gateway_common::wire::Mac;
use ipnet::Ipv4Net;
use k8s_openapi::api::core::v1::Node;
use kube::{
    Api, Client,
    api::{ListParams, WatchEvent, WatchParams},
};
use serde_json::Value;
use tokio::{
    runtime::Handle,
    task::{JoinHandle, spawn_blocking},
    time::sleep,
};

use super::{
    flannel::FLANNEL,
    netns::Namespace,
    wiring::{self, Via},
};

/// Between two attempts to reach the API server.
const PAUSE: Duration = Duration::from_millis(200);

/// What a Node says about its VTEP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Lease {
    subnet: Ipv4Net,
    endpoint: Ipv4Addr,
    mac: Mac,
}

/// What is done about an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Add(Lease),
    Remove(Lease),
}

/// Whose Nodes count, and which annotations.
#[derive(Clone, Debug)]
pub(super) struct View {
    /// Name of the node's own Node.
    pub(super) own: String,
    /// What stands before flannel's annotations.
    pub(super) prefix: String,
}

impl View {
    fn annotation<'n>(&self, node: &'n Node, suffix: &str) -> Option<&'n str> {
        node.metadata.annotations.as_ref()?.get(&format!("{}{suffix}", self.prefix)).map(String::as_str)
    }

    fn is_managed(&self, node: &Node) -> bool {
        self.annotation(node, "kube-subnet-manager") == Some("true")
    }

    /// What the vxlan backend takes from a Node; `None` is logged there, and ignored.
    fn lease(&self, node: &Node) -> Option<Lease> {
        let spec = node.spec.as_ref()?;
        let cidrs = spec.pod_cidrs.as_deref().unwrap_or_default();
        let subnet = cidrs.first().or(spec.pod_cidr.as_ref())?.parse().ok()?;
        let endpoint = self.annotation(node, "public-ip")?.parse().ok()?;
        if self.annotation(node, "backend-type") != Some("vxlan") {
            return None;
        }
        // Go does not mind the case of keys, but a number must be one.
        let data: Value = serde_json::from_str(self.annotation(node, "backend-data")?).ok()?;
        let field = |name: &str| {
            data.as_object()?.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value)
        };
        if field("VNI").is_some_and(|vni| !vni.is_u64()) {
            return None;
        }
        let mac = field("VtepMAC")?.as_str()?.parse().ok()?;
        Some(Lease { subnet, endpoint, mac })
    }

    /// What is done when a Node was one thing and is another.
    fn step(&self, before: Option<&Node>, after: Option<&Node>) -> Option<Step> {
        let managed = |node: &&Node| self.is_managed(node) && node.metadata.name.as_ref() != Some(&self.own);
        match (before, after.filter(managed)) {
            (Some(before), Some(after)) => {
                let triggers = ["backend-data", "backend-type", "public-ip"];
                let changed =
                    triggers.iter().any(|key| self.annotation(before, key) != self.annotation(after, key));
                if changed { self.lease(after).map(Step::Add) } else { None }
            }
            (None, Some(after)) => self.lease(after).map(Step::Add),
            (Some(before), None) if after.is_none() && managed(&before) => {
                self.lease(before).map(Step::Remove)
            }
            _ => None,
        }
    }
}

/// What is carried out in the kernel. Each part is tried, whatever becomes of the others.
fn carry_out(namespace: &Namespace, step: Step) -> Vec<Result<()>> {
    let (Step::Add(Lease { subnet, endpoint, mac }) | Step::Remove(Lease { subnet, endpoint, mac })) = step;
    let overlay = subnet.network();
    let via = Via::Onlink(FLANNEL, overlay);
    match step {
        Step::Add(_) => vec![
            wiring::neighbour(namespace, FLANNEL, overlay, mac),
            wiring::fdb(namespace, FLANNEL, mac, endpoint),
            wiring::route(namespace, subnet, via),
        ],
        Step::Remove(_) => vec![
            wiring::delete_neighbour(namespace, FLANNEL, overlay),
            wiring::delete_fdb(namespace, FLANNEL, mac, endpoint),
            wiring::delete_route(namespace, subnet, via),
        ],
    }
}

/// A flanneld that runs until it is dropped. What it programmed stays then.
#[derive(Debug)]
pub(super) struct Flanneld {
    task: JoinHandle<()>,
}

impl Flanneld {
    /// Starts it on the host that lives in `namespace`; it writes down what it does.
    pub(super) fn start(
        runtime: &Handle,
        client: Client,
        namespace: Namespace,
        view: View,
        log: &Path,
    ) -> Self {
        let worker = Worker {
            nodes: Api::all(client),
            namespace: Arc::new(namespace),
            view,
            log: log.to_owned(),
            known: BTreeMap::new(),
        };
        Self { task: runtime.spawn(worker.run()) }
    }
}

impl Drop for Flanneld {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Worker {
    nodes: Api<Node>,
    namespace: Arc<Namespace>,
    view: View,
    log: PathBuf,
    /// As an informer's store.
    known: BTreeMap<String, Node>,
}

impl Worker {
    async fn run(mut self) {
        loop {
            if let Err(error) = self.follow().await {
                self.note(&format!("{error:#}"));
            }
            sleep(PAUSE).await;
        }
    }

    /// Lists, then watches until the connection ends.
    async fn follow(&mut self) -> Result<()> {
        let list = self.nodes.list(&ListParams::default()).await?;
        let version = list.metadata.resource_version.clone().context("a list without a version")?;
        let mut gone: Vec<String> = self.known.keys().cloned().collect();
        for node in list {
            gone.retain(|name| node.metadata.name.as_ref() != Some(name));
            self.put(node).await;
        }
        for name in gone {
            self.remove(&name).await;
        }
        let events = self.nodes.watch(&WatchParams::default(), &version).await?;
        pin_mut!(events);
        while let Some(event) = events.next().await {
            match event? {
                WatchEvent::Added(node) | WatchEvent::Modified(node) => self.put(node).await,
                WatchEvent::Deleted(node) => {
                    self.remove(node.metadata.name.as_deref().unwrap_or_default()).await;
                }
                WatchEvent::Bookmark(_) => {}
                WatchEvent::Error(status) => return Err(anyhow!("{}", status.message)),
            }
        }
        Ok(())
    }

    async fn put(&mut self, node: Node) {
        let name = node.metadata.name.clone().unwrap_or_default();
        let before = self.known.insert(name.clone(), node);
        let step = self.view.step(before.as_ref(), self.known.get(&name));
        self.take(&name, step).await;
    }

    async fn remove(&mut self, name: &str) {
        let before = self.known.remove(name);
        let step = self.view.step(before.as_ref(), None);
        self.take(name, step).await;
    }

    async fn take(&self, name: &str, step: Option<Step>) {
        let Some(step) = step else { return };
        let namespace = self.namespace.clone();
        let results = spawn_blocking(move || carry_out(&namespace, step)).await.unwrap_or_default();
        self.note(&format!("Node {name}: {step:?}"));
        for error in results.into_iter().filter_map(Result::err) {
            self.note(&format!("Node {name}: {error:#}"));
        }
    }

    /// Evidence for people; a log that cannot be written is missed by nobody else.
    fn note(&self, text: &str) {
        if let Ok(mut file) = OpenOptions::new().create(true).append(true).open(&self.log) {
            let _ = writeln!(file, "{text}");
        }
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::json;

    use super::*;

    const PREFIX: &str = "flannel.alpha.coreos.com/";

    fn view() -> View {
        View { own: "node1".to_owned(), prefix: PREFIX.to_owned() }
    }

    /// The gateway's Node as flannel was shown it.
    fn gateway(change: impl FnOnce(&mut Value)) -> Node {
        let mut node = json!({
            "metadata": {
                "name": "gateway",
                "annotations": {
                    format!("{PREFIX}kube-subnet-manager"): "true",
                    format!("{PREFIX}backend-type"): "vxlan",
                    format!("{PREFIX}backend-data"): r#"{"VNI":1,"VtepMAC":"00:50:56:bb:70:8b"}"#,
                    format!("{PREFIX}public-ip"): "172.31.7.100",
                },
            },
            "spec": { "podCIDR": "10.244.20.0/24", "podCIDRs": ["10.244.20.0/24"] },
        });
        change(&mut node);
        serde_json::from_value(node).unwrap()
    }

    fn annotate(node: &mut Value, suffix: &str, value: &str) {
        node["metadata"]["annotations"][format!("{PREFIX}{suffix}")] = json!(value);
    }

    fn lease() -> Lease {
        Lease {
            subnet: "10.244.20.0/24".parse().unwrap(),
            endpoint: Ipv4Addr::new(172, 31, 7, 100),
            mac: Mac::new([0x00, 0x50, 0x56, 0xbb, 0x70, 0x8b]),
        }
    }

    #[test]
    fn a_node_comes_and_goes() {
        let node = gateway(|_| {});
        assert_eq!(view().step(None, Some(&node)), Some(Step::Add(lease())));
        assert_eq!(view().step(Some(&node), Some(&node)), None);
        assert_eq!(view().step(Some(&node), None), Some(Step::Remove(lease())));
        let own = View { own: "gateway".to_owned(), ..view() };
        assert_eq!(own.step(None, Some(&node)), None);
        assert_eq!(own.step(Some(&node), None), None);
    }

    #[rstest]
    #[case::missing_vni("backend-data", r#"{"VtepMAC":"00:50:56:bb:70:8b"}"#, true)]
    #[case::other_vni("backend-data", r#"{"VNI":7,"VtepMAC":"00:50:56:bb:70:8b"}"#, true)]
    #[case::dashes("backend-data", r#"{"VNI":1,"vtepmac":"00-50-56-bb-70-8b"}"#, true)]
    #[case::vni_as_text("backend-data", r#"{"VNI":"1","VtepMAC":"00:50:56:bb:70:8b"}"#, false)]
    #[case::bad_mac("backend-data", r#"{"VNI":1,"VtepMAC":"00:50:56:bb:70"}"#, false)]
    #[case::empty("backend-data", "{}", false)]
    #[case::null("backend-data", "null", false)]
    #[case::type_misspelt("backend-type", "VXLAN", false)]
    #[case::prefix_length("public-ip", "172.31.7.100/24", false)]
    #[case::not_managed("kube-subnet-manager", "yes", false)]
    fn annotations_are_read_as_flannel_reads_them(
        #[case] suffix: &str,
        #[case] value: &str,
        #[case] taken: bool,
    ) {
        let node = gateway(|node| annotate(node, suffix, value));
        assert_eq!(view().step(None, Some(&node)), taken.then(|| Step::Add(lease())));
    }

    /// Only three annotations make flannel look at a Node again.
    #[test]
    fn only_the_triggers_trigger() {
        let node = gateway(|_| {});
        let bare = gateway(|node| node["spec"] = json!({}));
        assert_eq!(view().step(None, Some(&bare)), None, "no podCIDR, not programmed");
        assert_eq!(view().step(Some(&bare), Some(&node)), None, "a podCIDR that comes later is not seen");
        let nudged = gateway(|node| {
            annotate(node, "backend-data", r#"{"VNI":1, "VtepMAC":"00:50:56:bb:70:8b"}"#);
        });
        assert_eq!(view().step(Some(&bare), Some(&nudged)), Some(Step::Add(lease())));
        let unmanaged = gateway(|node| annotate(node, "kube-subnet-manager", "false"));
        assert_eq!(view().step(Some(&unmanaged), Some(&node)), None);
        // Whoever removes the annotation before the Node leaves the entries behind.
        assert_eq!(view().step(Some(&node), Some(&unmanaged)), None);
        assert_eq!(view().step(Some(&unmanaged), None), None);
        let moved = gateway(|node| annotate(node, "public-ip", "172.31.7.101"));
        let there = Lease { endpoint: Ipv4Addr::new(172, 31, 7, 101), ..lease() };
        assert_eq!(view().step(Some(&node), Some(&moved)), Some(Step::Add(there)));
    }
}
