//! The API server that a test runs against.

use std::{
    env,
    path::{Path, PathBuf},
    process,
    sync::{
        LazyLock, OnceLock, RwLock,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use gateway::cluster::{
    kubernetes::Access,
    model::{Event, Object},
};
use gateway::plan::{Desired, Planner};
use gateway_tests::api::{self, ApiServer, Controls, Options};
use k8s_openapi::api::core::v1::{Namespace, Node, Pod};
use kube::{
    Api, Client,
    api::{DeleteParams, ListParams, Patch, PatchParams, PostParams},
};
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::{
    account,
    objects::{LABEL, config},
};

/// What the tests' own requests run on.
pub(crate) static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| Runtime::new().expect("a runtime"));

/// An API server and an administrator of it.
pub(crate) struct Subject {
    /// Absent if it is a real one.
    pub(crate) server: Option<ApiServer>,
    kubeconfig: PathBuf,
    client: RwLock<Client>,
    /// Value of the label of everything that this test makes; also the namespace of its pods.
    pub(crate) run: String,
    /// On a real server: the kubeconfig of an account with the least rights.
    account: OnceLock<PathBuf>,
    directory: tempfile::TempDir,
}

/// Whether the tests run against a real server.
pub(crate) fn is_real() -> bool {
    env::var("GATEWAY_TEST_API").is_ok_and(|api| api == "real")
}

impl Subject {
    pub(crate) fn start() -> Self {
        Self::with(Options { bookmarks: Duration::from_millis(100), ..Options::default() })
    }

    /// A test server with these options; a real server has its own.
    pub(crate) fn with(options: Options) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let directory = tempfile::tempdir().unwrap();
        let (server, kubeconfig) = if is_real() {
            let path = env::var("KUBECONFIG").expect("KUBECONFIG names a kubeconfig");
            (None, PathBuf::from(path))
        } else {
            let server = ApiServer::start(directory.path(), options).unwrap();
            let kubeconfig = server.kubeconfig("admin");
            (Some(server), kubeconfig)
        };
        let client = RUNTIME.block_on(api::client(&kubeconfig)).unwrap();
        let run = format!("gateway-test-{}-{}", process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let client = RwLock::new(client);
        let subject = Self { server, kubeconfig, client, run, account: OnceLock::new(), directory };
        let namespace = json!({
            "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": subject.run, "labels": { LABEL: subject.run } },
        });
        let namespace: Namespace = serde_json::from_value(namespace).unwrap();
        RUNTIME.block_on(Api::all(subject.client()).create(&PostParams::default(), &namespace)).unwrap();
        subject
    }

    /// As whom the source asks: somebody with the rights of `deploy/rbac.yaml`, where the server has rights at all.
    pub(crate) fn access(&self) -> Access {
        let kubeconfig = match &self.server {
            Some(server) => server.kubeconfig("gateway"),
            None => self.account.get_or_init(|| self.make_account()).clone(),
        };
        Access { kubeconfig: Some(kubeconfig), context: None }
    }

    fn make_account(&self) -> PathBuf {
        let client = self.client();
        let made = account::make(&client, &self.run, &self.kubeconfig, self.directory.path());
        RUNTIME.block_on(made)
    }

    pub(crate) fn directory(&self) -> &Path {
        self.server.as_ref().expect("a test server").directory()
    }

    /// The controls; a real server has none.
    pub(crate) fn controls(&self) -> Option<Controls> {
        self.server.as_ref().map(|_| Controls(self.client()))
    }

    /// Adds a fault to a test server.
    pub(crate) fn fault(&self, fault: &Value) {
        RUNTIME.block_on(self.controls().expect("a test server").fault(fault)).unwrap();
    }

    pub(crate) fn heal(&self) {
        RUNTIME.block_on(self.controls().expect("a test server").heal()).unwrap();
    }

    pub(crate) fn compact(&self) {
        RUNTIME.block_on(self.controls().expect("a test server").compact()).unwrap();
    }

    pub(crate) fn disconnect(&self) {
        RUNTIME.block_on(self.controls().expect("a test server").disconnect()).unwrap();
        self.renew();
    }

    pub(crate) fn stop_server(&mut self) {
        self.server.as_mut().expect("a test server").stop().unwrap();
    }

    pub(crate) fn restart_server(&mut self) {
        self.server.as_mut().expect("a test server").restart().unwrap();
        self.renew();
    }

    pub(crate) fn client(&self) -> Client {
        self.client.read().unwrap().clone()
    }

    /// Our own connections are gone as well; the next request must not find that out.
    fn renew(&self) {
        *self.client.write().unwrap() = RUNTIME.block_on(api::client(&self.kubeconfig)).unwrap();
    }

    pub(crate) fn nodes(&self) -> Api<Node> {
        Api::all(self.client())
    }

    pub(crate) fn pods(&self) -> Api<Pod> {
        Api::namespaced(self.client(), &self.run)
    }

    /// Creates a Node, with its status.
    pub(crate) fn create_node(&self, node: &Value) {
        let mut node = node.clone();
        node["metadata"]["labels"] = json!({ LABEL: self.run });
        let typed: Node = serde_json::from_value(node).unwrap();
        RUNTIME.block_on(self.nodes().create(&PostParams::default(), &typed)).unwrap();
    }

    pub(crate) fn patch_node(&self, name: &str, patch: &Value) {
        let patch = Patch::Merge(patch);
        RUNTIME.block_on(self.nodes().patch(name, &PatchParams::default(), &patch)).unwrap();
    }

    pub(crate) fn patch_node_status(&self, name: &str, patch: &Value) {
        let patch = Patch::Merge(patch);
        RUNTIME.block_on(self.nodes().patch_status(name, &PatchParams::default(), &patch)).unwrap();
    }

    pub(crate) fn delete_node(&self, name: &str) {
        RUNTIME.block_on(self.nodes().delete(name, &DeleteParams::default())).unwrap();
    }

    /// Creates a Pod on a node, and says what its kubelet would.
    pub(crate) fn create_pod(&self, name: &str, spec: &Value, status: &Value) {
        let mut spec = spec.clone();
        spec["containers"] = json!([{ "name": "main", "image": "registry.example/none:1" }]);
        spec["automountServiceAccountToken"] = json!(false);
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": { "name": name, "namespace": self.run, "labels": { LABEL: self.run } },
            "spec": spec,
        });
        let pod: Pod = serde_json::from_value(pod).unwrap();
        let begin = Instant::now();
        // A real server wants the namespace's default service account, which a controller makes.
        while let Err(error) = RUNTIME.block_on(self.pods().create(&PostParams::default(), &pod)) {
            assert!(begin.elapsed() < Duration::from_secs(20), "{error}");
            std::thread::sleep(Duration::from_millis(100));
        }
        self.patch_pod_status(name, status);
    }

    pub(crate) fn patch_pod_status(&self, name: &str, status: &Value) {
        let patch = json!({ "status": status });
        let patch = Patch::Merge(&patch);
        RUNTIME.block_on(self.pods().patch_status(name, &PatchParams::default(), &patch)).unwrap();
    }

    /// Deletes a Pod; with grace it stays as terminating.
    pub(crate) fn delete_pod(&self, name: &str, grace: u32) {
        let parameters = DeleteParams { grace_period_seconds: Some(grace), ..DeleteParams::default() };
        RUNTIME.block_on(self.pods().delete(name, &parameters)).unwrap();
    }

    /// What the tables should say of everything that the server has now.
    pub(crate) fn expected(&self) -> Desired {
        let all = ListParams::default();
        let (nodes, pods) = RUNTIME.block_on(async {
            let pods: Api<Pod> = Api::all(self.client());
            (self.nodes().list(&all).await.unwrap(), pods.list(&all).await.unwrap())
        });
        let mut planner = Planner::new(&config(self.access()).overlays);
        planner.apply(&Event::Listing);
        for node in nodes {
            planner.apply(&Event::Apply(Object::Node(Box::new(node), "".into()).into()));
        }
        for pod in pods {
            planner.apply(&Event::Apply(Object::pod(&pod).into()));
        }
        planner.apply(&Event::Synced);
        planner.desired().clone()
    }
}

impl Drop for Subject {
    fn drop(&mut self) {
        if self.server.is_some() {
            return;
        }
        // Whatever is there carries the label; what fails has no better remedy than the next run's.
        let ours = ListParams::default().labels(&format!("{LABEL}={}", self.run));
        let now = DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() };
        RUNTIME.block_on(async {
            let _ = self.pods().delete_collection(&now, &ours).await;
            let _ = self.nodes().delete_collection(&now, &ours).await;
            if self.account.get().is_some() {
                account::remove(&self.client(), &self.run).await;
            }
            let namespaces: Api<Namespace> = Api::all(self.client());
            let _ = namespaces.delete(&self.run, &DeleteParams::default()).await;
        });
    }
}
