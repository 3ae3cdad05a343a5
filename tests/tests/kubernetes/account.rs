//! A service account on a real server, with the rights that are shipped and no others.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use gateway::cluster::kubernetes::{Request, Right};
use gateway_tests::api;
use k8s_openapi::api::{
    authentication::v1::TokenRequest, authorization::v1::SelfSubjectAccessReview, core::v1::ServiceAccount,
};
use kube::{
    Api, Client, Error,
    api::{DeleteParams, ListParams, PostParams},
    config::Kubeconfig,
    core::{ApiResource, DynamicObject, GroupVersionKind, TypeMeta},
};
use serde_json::{Value, json};

use crate::objects::LABEL;

/// Name of the account in the namespace of its run.
const NAME: &str = "gateway";
/// The authorizer learns of new roles by and by.
const PATIENCE: Duration = Duration::from_secs(20);

/// Makes the account in the namespace `run`, binds everything of `deploy/rbac.yaml` to it, and writes its kubeconfig.
pub(crate) async fn make(client: &Client, run: &str, admin: &Path, directory: &Path) -> PathBuf {
    for document in manifest() {
        create(client, run, document).await;
    }
    let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), run);
    let asked = TokenRequest::default();
    let token = accounts.create_token_request(NAME, &PostParams::default(), &asked).await.unwrap();
    let token = token.status.expect("a token").token;

    let mut config = serde_json::to_value(Kubeconfig::read_from(admin).unwrap()).unwrap();
    let current = config["current-context"].clone();
    for context in config["contexts"].as_array_mut().unwrap() {
        if context["name"] == current {
            context["context"]["user"] = json!(NAME);
        }
    }
    config["users"] = json!([{ "name": NAME, "user": { "token": token } }]);
    let path = directory.join("gateway.kubeconfig");
    fs::write(&path, config.to_string()).unwrap();
    wait_for_rights(&path).await;
    path
}

/// Removes what [`make`] made outside of the namespace; what was not made is not there.
pub(crate) async fn remove(client: &Client, run: &str) {
    let ours = ListParams::default().labels(&format!("{LABEL}={run}"));
    for document in manifest() {
        let api = api_of(client, run, &document);
        let _ = api.delete_collection(&DeleteParams::default(), &ours).await;
    }
}

fn manifest() -> Vec<Value> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/rbac.yaml");
    serde_saphyr::from_multiple(&fs::read_to_string(path).unwrap()).unwrap()
}

/// Where an object of the manifest goes: the account into the namespace of the run, the others where they belong.
fn api_of(client: &Client, run: &str, document: &Value) -> Api<DynamicObject> {
    let types: TypeMeta = serde_json::from_value(document.clone()).unwrap();
    let resource = ApiResource::from_gvk(&GroupVersionKind::try_from(types).unwrap());
    match document["metadata"]["namespace"].as_str() {
        Some(_) if resource.kind == "ServiceAccount" => Api::namespaced_with(client.clone(), run, &resource),
        Some(namespace) => Api::namespaced_with(client.clone(), namespace, &resource),
        None => Api::all_with(client.clone(), &resource),
    }
}

/// Creates an object of the manifest under a name of the run.
async fn create(client: &Client, run: &str, mut document: Value) {
    let api = api_of(client, run, &document);
    let ours = |name: &Value| json!(format!("{run}-{}", name.as_str().unwrap()));
    document["metadata"]["labels"] = json!({ LABEL: run });
    if document["kind"] == "ServiceAccount" {
        document["metadata"]["name"] = json!(NAME);
        document["metadata"]["namespace"] = json!(run);
    } else {
        document["metadata"]["name"] = ours(&document["metadata"]["name"]);
    }
    if document["roleRef"].is_object() {
        document["roleRef"]["name"] = ours(&document["roleRef"]["name"]);
        document["subjects"] = json!([{ "kind": "ServiceAccount", "name": NAME, "namespace": run }]);
    }
    let object: DynamicObject = serde_json::from_value(document).unwrap();
    match api.create(&PostParams::default(), &object).await {
        Ok(_) => {}
        // flannel is in one of two namespaces; the other one need not be there.
        Err(Error::Api(status)) if status.code == 404 => {}
        Err(error) => panic!("{error}"),
    }
}

/// Waits until the server grants everything that a gateway asks for.
async fn wait_for_rights(kubeconfig: &Path) {
    let reviews: Api<SelfSubjectAccessReview> = Api::all(api::client(kubeconfig).await.unwrap());
    let begin = Instant::now();
    for right in Request::all().map(Request::right).filter(|right| right.resource != "configmaps") {
        while !is_granted(&reviews, right).await {
            assert!(begin.elapsed() < PATIENCE, "not granted: {right}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

async fn is_granted(reviews: &Api<SelfSubjectAccessReview>, right: Right) -> bool {
    let (resource, subresource) = right.resource.split_once('/').unwrap_or((right.resource, ""));
    let review = json!({
        "apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview",
        "spec": { "resourceAttributes": {
            "verb": right.verb, "group": right.group, "resource": resource, "subresource": subresource,
            "namespace": right.namespace.unwrap_or_default(),
        } },
    });
    let review = serde_json::from_value(review).unwrap();
    let answer = reviews.create(&PostParams::default(), &review).await.unwrap();
    answer.status.is_some_and(|status| status.allowed)
}
