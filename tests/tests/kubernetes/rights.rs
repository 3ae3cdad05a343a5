//! The rights that are shipped are those that are used.

use std::{collections::BTreeSet, path::Path};

use gateway_tests::api::Options;
use serde_json::{Value, json};

use crate::{
    objects::{address, node, on, running},
    observer::{Observer, SOON},
    subject::{RUNTIME, Subject},
};

pub(crate) fn asked(subject: &Subject) -> BTreeSet<(String, String)> {
    let requests = RUNTIME.block_on(subject.controls().unwrap().requests()).unwrap();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    requests
        .iter()
        .filter(|request| request["user"] != "admin")
        .map(|request| (text(&request["verb"]), text(&request["resource"])))
        .collect()
}

/// The server enforces `deploy/rbac.yaml`: the source asks for all of its rights, and for nothing else.
#[test]
fn the_source_works_with_the_shipped_rights_and_needs_all_of_them() {
    let rbac = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/rbac.yaml");
    let subject = Subject::with(Options { rbac: Some(rbac), ..Options::default() });
    subject.create_node(&node(&subject.run, 1));
    subject.create_pod("a", &on(&subject.run, 1), &running(address(1, 2)));
    let observer = Observer::start(&subject);
    observer.converge(&subject);
    let pair = |(verb, resource): (&str, &str)| (verb.to_owned(), resource.to_owned());
    let used =
        [("list", "nodes"), ("watch", "nodes"), ("list", "pods"), ("watch", "pods"), ("get", "configmaps")];
    let used: BTreeSet<_> = used.map(pair).into();
    observer.wait("everything has been asked for", |_| asked(&subject) == used);
    observer.wait_healthy();
    assert!(observer.problems.all().is_empty(), "{SOON:?}");
}

/// Somebody without any right is told what to ask for.
#[test]
fn without_rights_every_missing_one_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let rbac = directory.path().join("none.yaml");
    std::fs::write(&rbac, json!({ "apiVersion": "v1", "kind": "ServiceAccount" }).to_string()).unwrap();
    let subject = Subject::with(Options { rbac: Some(rbac), ..Options::default() });
    let observer = Observer::start(&subject);
    for resource in ["nodes", "pods"] {
        let problem = observer.wait_problem(|problem| problem.place.ends_with(resource));
        assert!(problem.what.contains(&format!("may not list {resource}")), "{problem}");
    }
}
