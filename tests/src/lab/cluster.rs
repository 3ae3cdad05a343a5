//! An API server that keeps the cluster's objects, in the place of manifest files: the test server, or a real one, on which
//! only what the lab made is touched.

use std::{
    fs,
    path::{Path, PathBuf},
    process,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use ipnet::Ipv4Net;
use k8s_openapi::api::{
    coordination::v1::Lease,
    core::v1::{Namespace as KubeNamespace, Node as KubeNode, Pod as KubePod},
};
use kube::{
    Api, Client,
    api::{DeleteParams, ListParams, Patch, PatchParams},
    config::Kubeconfig,
};
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use super::{
    flannel::{GATEWAY, GATEWAY_SUBNET, Node},
    flanneld::{Flanneld, View},
    netns::Namespace,
    relay::Relay,
};
use crate::api::{self, ApiServer, Options};

/// Label of everything that a lab makes.
const LABEL: &str = "gateway-lab";
/// Field manager of everything that a lab writes.
const MANAGER: &str = "gateway-lab";
/// What stands before flannel's annotations.
const FLANNEL_PREFIX: &str = "flannel.alpha.coreos.com/";
/// The same on a real server: its own flannel is to take no notice.
const LAB_PREFIX: &str = "lab.gateway.example/";
/// A namespace needs its service account before it takes pods.
const SETTLE: Duration = Duration::from_secs(20);

/// The cluster of a lab on an API server.
pub struct Cluster {
    runtime: Runtime,
    client: Client,
    /// An administrator's.
    admin: PathBuf,
    /// The test server; absent if it is a real one.
    server: Option<ApiServer>,
    /// As whom the gateway asks.
    kubeconfig: PathBuf,
    /// Value of the label; on a real server also the namespace of the pods.
    run: String,
    relay: Option<Relay>,
}

impl std::fmt::Debug for Cluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cluster")
            .field("server", &self.server)
            .field("run", &self.run)
            .finish_non_exhaustive()
    }
}

impl Cluster {
    /// On a test server of its own with the rights of `deploy/rbac.yaml`, which keeps its state in `directory`.
    pub fn start(directory: &Path) -> Result<Self> {
        let rbac = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/rbac.yaml");
        let server = ApiServer::start(directory, Options { rbac: Some(rbac), ..Options::default() })?;
        let (admin, gateway) = (server.kubeconfig("admin"), server.kubeconfig("gateway"));
        Self::new(&admin, gateway, Some(server))
    }

    /// On the server of a kubeconfig, which must be an administrator's.
    ///
    /// # Errors
    /// When a Node of the cluster has a podCIDR that the lab uses: when the lab's Nodes go, the controller manager would
    /// give it to somebody else.
    pub fn real(kubeconfig: &Path) -> Result<Self> {
        let cluster = Self::new(kubeconfig, kubeconfig.to_owned(), None)?;
        let nodes = cluster.runtime.block_on(cluster.nodes().list(&ListParams::default()))?;
        let ours: Vec<Ipv4Net> =
            (1..=4).map(|number| Node::new(number).subnet()).chain([GATEWAY_SUBNET]).collect();
        for node in nodes {
            let cidr = node.spec.unwrap_or_default().pod_cidr.and_then(|cidr| cidr.parse::<Ipv4Net>().ok());
            if let Some(cidr) = cidr
                && ours.iter().any(|net| net.contains(&cidr) || cidr.contains(net))
            {
                let name = node.metadata.name.unwrap_or_default();
                bail!("Node {name} has podCIDR {cidr}, which the lab uses: take another cluster");
            }
        }
        let namespace = json!({
            "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": cluster.run, "labels": { LABEL: cluster.run } },
        });
        let namespaces: Api<KubeNamespace> = Api::all(cluster.client.clone());
        let parameters = PatchParams::apply(MANAGER);
        cluster
            .runtime
            .block_on(namespaces.patch(&cluster.run, &parameters, &Patch::Apply(&namespace)))
            .context("cannot make a namespace for the lab's pods")?;
        Ok(cluster)
    }

    fn new(admin: &Path, kubeconfig: PathBuf, server: Option<ApiServer>) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let client = runtime.block_on(api::client(admin))?;
        let run = format!("gateway-lab-{}", process::id());
        Ok(Self { runtime, client, admin: admin.to_owned(), server, kubeconfig, run, relay: None })
    }

    /// What stands before flannel's annotations.
    pub fn annotation_prefix(&self) -> &'static str {
        if self.server.is_some() { FLANNEL_PREFIX } else { LAB_PREFIX }
    }

    /// Name of the Node of a host; a real cluster may have a node of the host's name.
    pub fn node_name(&self, host: &str) -> String {
        if self.server.is_some() { host.to_owned() } else { format!("{}-{host}", self.run) }
    }

    fn namespace(&self) -> &str {
        if self.server.is_some() { "default" } else { &self.run }
    }

    fn nodes(&self) -> Api<KubeNode> {
        Api::all(self.client.clone())
    }

    fn pods(&self) -> Api<KubePod> {
        Api::namespaced(self.client.clone(), self.namespace())
    }

    fn leases(&self) -> Api<Lease> {
        Api::namespaced(self.client.clone(), "kube-node-lease")
    }

    /// The Node of a host.
    pub fn node(&self, host: &str) -> Result<Option<KubeNode>> {
        Ok(self.runtime.block_on(self.nodes().get_opt(&self.node_name(host)))?)
    }

    /// The lease of a host's Node.
    pub fn lease(&self, host: &str) -> Result<Option<Lease>> {
        Ok(self.runtime.block_on(self.leases().get_opt(&self.node_name(host)))?)
    }

    /// Changes the Node of a host.
    pub fn patch_node(&self, host: &str, patch: &Value) -> Result<()> {
        let name = self.node_name(host);
        let patch = Patch::Merge(patch);
        self.runtime.block_on(self.nodes().patch(&name, &PatchParams::default(), &patch))?;
        Ok(())
    }

    /// Removes the Node of a host.
    pub fn delete_node(&self, host: &str) -> Result<()> {
        let name = self.node_name(host);
        self.runtime.block_on(self.nodes().delete(&name, &DeleteParams::default()))?;
        Ok(())
    }

    /// Writes an object of [`manifest`](super::manifest) as flanneld and kubelet would.
    pub(super) fn put(&self, object: &Value) -> Result<()> {
        let name = object["metadata"]["name"].as_str().context("an object without a name")?;
        match object["kind"].as_str() {
            Some("Node") => self.put_node(name, object),
            Some("Pod") => self.put_pod(name, object),
            other => bail!("no objects of kind {other:?} here"),
        }
    }

    fn put_node(&self, host: &str, object: &Value) -> Result<()> {
        let name = self.node_name(host);
        let annotations: serde_json::Map<String, Value> = object["metadata"]["annotations"]
            .as_object()
            .into_iter()
            .flatten()
            .map(|(key, value)| (key.replace(FLANNEL_PREFIX, self.annotation_prefix()), value.clone()))
            .collect();
        let node = json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": { "name": name, "labels": { LABEL: self.run }, "annotations": annotations },
            "spec": object["spec"],
        });
        let status = json!({ "status": object["status"] });
        self.runtime.block_on(async {
            let parameters = PatchParams::apply(MANAGER).force();
            self.nodes().patch(&name, &parameters, &Patch::Apply(&node)).await?;
            self.nodes().patch_status(&name, &PatchParams::default(), &Patch::Merge(&status)).await?;
            Ok(())
        })
    }

    fn put_pod(&self, name: &str, object: &Value) -> Result<()> {
        let mut spec = object["spec"].clone();
        spec["nodeName"] = json!(self.node_name(spec["nodeName"].as_str().unwrap_or_default()));
        spec["automountServiceAccountToken"] = json!(false);
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": { "name": name, "namespace": self.namespace(), "labels": { LABEL: self.run } },
            "spec": spec,
        });
        let status = json!({ "status": object["status"] });
        self.runtime.block_on(async {
            // A pod never changes its node: one that moves is another pod.
            if let Some(there) = self.pods().get_opt(name).await?
                && there.spec.and_then(|spec| spec.node_name).as_deref() != pod["spec"]["nodeName"].as_str()
            {
                self.pods().delete(name, &now()).await?;
            }
            let parameters = PatchParams::apply(MANAGER).force();
            let begin = Instant::now();
            while let Err(error) = self.pods().patch(name, &parameters, &Patch::Apply(&pod)).await {
                ensure!(begin.elapsed() < SETTLE, "cannot make pod {name}: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            self.pods().patch_status(name, &PatchParams::default(), &Patch::Merge(&status)).await?;
            Ok(())
        })
    }

    /// Removes the object of a host.
    pub(super) fn remove(&self, kind: &str, host: &str) -> Result<()> {
        if kind == "Node" {
            return self.delete_node(host);
        }
        self.runtime.block_on(self.pods().delete(host, &now()))?;
        Ok(())
    }

    /// Starts a flanneld for a node.
    pub(super) fn flanneld(&self, host: &str, namespace: &Namespace, log: &Path) -> Result<Flanneld> {
        let view = View { own: self.node_name(host), prefix: self.annotation_prefix().to_owned() };
        let namespace = Namespace::open(namespace.name())?;
        Ok(Flanneld::start(self.runtime.handle(), self.client.clone(), namespace, view, log))
    }

    /// Makes the server reachable from the gateway's namespace, and writes the gateway's kubeconfig.
    pub(super) fn connect(&mut self, gateway: &Namespace, kubeconfig: &Path) -> Result<()> {
        let mut config = Kubeconfig::read_from(&self.kubeconfig)?;
        let context = config.current_context.as_deref().context("the kubeconfig has no current context")?;
        let context = config
            .contexts
            .iter()
            .find(|entry| entry.name == context)
            .and_then(|entry| entry.context.as_ref())
            .with_context(|| format!("the kubeconfig has no context {context}"))?;
        let cluster = config
            .clusters
            .iter_mut()
            .find(|entry| entry.name == context.cluster)
            .and_then(|entry| entry.cluster.as_mut())
            .context("the kubeconfig's context has no cluster")?;
        let url: http::Uri = cluster.server.as_deref().context("no server in the kubeconfig")?.parse()?;
        let host = url.host().context("no host in the server's URL")?;
        let port = url.port_u16().unwrap_or(443);
        let relay = Relay::start(gateway, format!("{host}:{port}"))?;
        cluster.server = Some(format!("https://{}", relay.address()));
        cluster.tls_server_name.get_or_insert_with(|| host.trim_matches(['[', ']']).to_owned());
        self.relay = Some(relay);
        let text = serde_json::to_string_pretty(&config)?;
        fs::write(kubeconfig, text).with_context(|| format!("cannot write {}", kubeconfig.display()))
    }

    /// Whether it is a test server, which can be stopped.
    pub fn can_stop(&self) -> bool {
        self.server.is_some()
    }

    /// Stops the test server.
    pub fn stop(&mut self) -> Result<()> {
        self.server.as_mut().context("a real server is not ours to stop")?.stop()
    }

    /// Starts the test server again.
    pub fn restart(&mut self) -> Result<()> {
        self.server.as_mut().context("a real server is not ours to start")?.restart()?;
        // Our own connections are gone as well; the next request must not find that out.
        self.client = self.runtime.block_on(api::client(&self.admin))?;
        Ok(())
    }
}

fn now() -> DeleteParams {
    DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if self.server.is_some() {
            return;
        }
        // Whatever is there carries the label; what fails has no better remedy than doing it by hand.
        let ours = ListParams::default().labels(&format!("{LABEL}={}", self.run));
        self.runtime.block_on(async {
            let _ = self.pods().delete_collection(&now(), &ours).await;
            let _ = self.nodes().delete_collection(&now(), &ours).await;
            let gateway = self.node_name(GATEWAY);
            let _ = self.nodes().delete(&gateway, &now()).await;
            let _ = self.leases().delete(&gateway, &now()).await;
            let namespaces: Api<KubeNamespace> = Api::all(self.client.clone());
            let _ = namespaces.delete(&self.run, &DeleteParams::default()).await;
        });
    }
}
