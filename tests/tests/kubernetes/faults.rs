//! Everything that can go wrong between the source and the API server; on the test server, which does it on demand.

use std::{
    fs, thread,
    time::{Duration, Instant},
};

use futures::{StreamExt as _, TryStreamExt as _};
use gateway::cluster::kubernetes::{Access, Link};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::{
    Api,
    api::{DeleteParams, ListParams, Patch, PatchParams, WatchEvent, WatchParams},
};
use rstest::rstest;
use serde_json::{Value, json};

use crate::{
    announce::{Scene, refused},
    objects::{address, node, node_name, on, running},
    observer::{Observer, TIMING},
    protocol::status,
    subject::{RUNTIME, Subject},
};

/// A cluster of three nodes with two pods each: several pages.
fn cluster() -> Subject {
    let subject = Subject::start();
    for number in 1..=3 {
        subject.create_node(&node(&subject.run, number));
        for pod in [2, 3] {
            let name = format!("pod-{number}-{pod}");
            subject.create_pod(&name, &on(&subject.run, number), &running(address(number, pod)));
        }
    }
    subject
}

/// Makes changes of every kind that leave `pod-1-2` and its node as they are.
fn change(subject: &Subject, round: u8) {
    subject.create_pod(&format!("new-{round}"), &on(&subject.run, 2), &running(address(2, 100 + round)));
    if round > 0 {
        subject.delete_pod(&format!("new-{}", round - 1), 0);
    }
}

#[rstest]
#[case::internal(json!({ "kind": "status", "code": 500 }))]
#[case::busy(json!({ "kind": "status", "code": 429, "retry_after": 0 }))]
#[case::gone(json!({ "kind": "status", "code": 410 }))]
#[case::gone_event(json!({ "kind": "watch-error", "code": 410 }))]
#[case::error_event(json!({ "kind": "watch-error", "code": 500 }))]
#[case::cut_at_once(json!({ "kind": "cut", "bytes": 0 }))]
#[case::cut(json!({ "kind": "cut", "bytes": 700 }))]
#[case::slow(json!({ "kind": "slow", "bytes": 400, "pause_ms": 10 }))]
#[case::garbage(json!({ "kind": "garbage" }))]
#[case::repeat(json!({ "kind": "repeat", "events": 20 }))]
#[case::stall(json!({ "kind": "stall" }))]
fn a_fault_takes_nothing_away_and_passes(#[case] fault: Value) {
    let subject = cluster();
    // From the first list on.
    subject.fault(&json!({ "fault": fault, "times": 3 }));
    let observer = Observer::start(&subject);
    observer.converge(&subject);
    for round in 0..3 {
        subject.fault(&json!({ "fault": fault, "times": 4 }));
        subject.disconnect();
        observer.release(|steady| {
            steady.pods.retain(|(_, address), _| address.octets()[3] < 100);
        });
        change(&subject, round);
        observer.converge(&subject);
    }
    subject.heal();
    observer.wait_healthy();
    observer.assert_steady();
}

/// The history is gone while the connection is: what still exists stays, what was deleted meanwhile goes.
#[test]
fn after_compaction_only_what_is_gone_goes() {
    let subject = cluster();
    let observer = Observer::start(&subject);
    observer.converge(&subject);
    subject.fault(&json!({ "fault": { "kind": "status", "code": 503 } }));
    subject.disconnect();
    observer.wait("the source notices", |observer| !observer.health.freshness().connected);
    observer.release(|steady| {
        steady.pods.remove(&(0, address(3, 2)));
    });
    subject.delete_pod("pod-3-2", 0);
    subject.create_pod("late", &on(&subject.run, 1), &running(address(1, 77)));
    subject.compact();
    subject.heal();
    observer.converge(&subject);
    observer.wait_healthy();
}

/// The server is away, not only its answers: nothing changes, its age is told, and what happened meanwhile is applied.
#[test]
fn while_the_server_is_away_everything_stays() {
    let mut subject = cluster();
    let observer = Observer::start(&subject);
    observer.converge(&subject);
    let before = observer.table();
    subject.stop_server();
    let problem = observer.wait_problem(|problem| problem.what.contains("cannot be reached"));
    assert!(problem.what.contains("refused"), "{problem}");
    thread::sleep(Duration::from_secs(1));
    let freshness = observer.health.freshness();
    assert!(!freshness.connected && freshness.heard.is_some());
    assert_eq!(observer.table(), before);
    observer.release(|steady| {
        steady.pods.remove(&(0, address(2, 2)));
    });
    subject.restart_server();
    subject.delete_pod("pod-2-2", 0);
    observer.converge(&subject);
    observer.wait_healthy();
}

/// Nothing happens, and the server does not say so: that is no fault, and what happens then is followed.
#[test]
fn silence_is_no_fault() {
    let subject = cluster();
    let observer = Observer::start(&subject);
    observer.converge(&subject);
    let begin = Instant::now();
    while begin.elapsed() < 3 * TIMING.idle {
        assert!(observer.problems.all().is_empty(), "{:?}", observer.problems.all());
        assert!(observer.health.freshness().connected);
        thread::sleep(Duration::from_millis(10));
    }
    change(&subject, 0);
    observer.converge(&subject);
    observer.assert_steady();
}

/// A backup counts its revisions from where it was made, and a watch from beyond that says nothing.
#[test]
fn a_server_that_was_restored_from_a_backup_is_followed() {
    let mut subject = cluster();
    subject.stop_server();
    let state = subject.directory().join("state.json");
    let backup = fs::read(&state).unwrap();
    subject.restart_server();
    let observer = Observer::start(&subject);
    observer.converge(&subject);
    observer.release(|steady| {
        steady.pods.remove(&(0, address(3, 2)));
    });
    subject.delete_pod("pod-3-2", 0);
    change(&subject, 0);
    observer.converge(&subject);

    observer.release(|steady| {
        steady.pods.remove(&(0, address(2, 100)));
    });
    subject.stop_server();
    fs::write(&state, backup).unwrap();
    subject.restart_server();
    observer.converge(&subject);
    assert!(observer.table().pods.contains_key(&(0, address(3, 2))));
    observer.wait_healthy();
}

/// The daemon starts while the API is away: what the tables hold from before stays.
#[test]
fn a_restart_without_a_server_takes_nothing_away() {
    let mut subject = cluster();
    let mut observer = Observer::start(&subject);
    observer.converge(&subject);
    let before = observer.table();
    subject.stop_server();
    observer.restart(&subject);
    observer.wait_problem(|problem| problem.what.contains("cannot be reached"));
    assert_eq!(observer.table(), before);
    assert!(!observer.is_listed());
    subject.restart_server();
    observer.converge(&subject);
}

/// One object that makes no sense costs nobody else anything, and is named until it is mended.
#[test]
fn a_malformed_object_holds_up_nobody() {
    let subject = cluster();
    subject.fault(&json!({ "fault": { "kind": "malformed-object", "name": "pod-2-2" }, "resource": "pods" }));
    let observer = Observer::start(&subject);
    let problem = observer.wait_problem(|problem| problem.place.contains("pod-2-2"));
    assert!(problem.place.ends_with(", spec"), "{problem}");
    observer.wait("all others are there", |observer| observer.table().pods.len() == 5);
    assert!(
        observer.is_listed() && !observer.is_synced(),
        "what is not understood may be in the tables already"
    );
    subject.heal();
    subject.disconnect();
    subject.patch_pod_status("pod-2-2", &json!({ "hostIP": "198.19.0.2" }));
    observer.converge(&subject);
    observer.wait_healthy();

    // What was understood once stays as it was.
    subject.fault(&json!({ "fault": { "kind": "malformed-object", "name": "pod-2-2" }, "resource": "pods" }));
    subject.disconnect();
    observer.wait("the source is back", |observer| observer.health.freshness().connected);
    subject.patch_pod_status("pod-2-2", &json!({ "hostIP": "198.19.0.3" }));
    observer.wait_problem(|problem| problem.place.contains("pod-2-2"));
    observer.converge(&subject);
}

/// Nodes alone forward by their prefixes.
#[test]
fn without_the_right_to_pods_nodes_are_used() {
    let subject = cluster();
    subject.fault(&json!({ "fault": { "kind": "status", "code": 403 }, "resource": "pods" }));
    let observer = Observer::start(&subject);
    let problem = observer.wait_problem(|problem| problem.what.contains("403"));
    assert!(problem.what.contains("may not list pods"), "{problem}");
    assert!(problem.what.contains(r#"cannot list resource "pods""#), "{problem}");
    assert!(problem.remedy.contains("deploy/rbac.yaml"), "{problem}");
    observer
        .wait("the nodes are there", |observer| observer.is_listed() && observer.table().prefixes.len() == 3);
    assert!(!observer.is_synced());
    subject.heal();
    observer.converge(&subject);
}

/// The server is left alone as long as it wishes.
#[test]
fn retry_after_is_honoured() {
    let subject = cluster();
    subject.fault(&json!({ "fault": { "kind": "status", "code": 429, "retry_after": 2 }, "resource": "nodes", "times": 1 }));
    let begin = Instant::now();
    let observer = Observer::start(&subject);
    let problem = observer.wait_problem(|problem| problem.what.contains("429"));
    assert!(problem.what.contains("Too many requests"), "{problem}");
    observer.converge(&subject);
    assert!(begin.elapsed() > Duration::from_secs(2));
}

#[rstest]
#[case::token("gateway-token")]
#[case::certificate("gateway")]
fn credentials_work(#[case] who: &str) {
    let subject = cluster();
    let kubeconfig = subject.server.as_ref().unwrap().kubeconfig(who);
    let link = Link::new(Access { kubeconfig: Some(kubeconfig), context: None });
    Observer::with(&subject, link, TIMING).converge(&subject);
}

/// A kubeconfig like the gateway's, changed.
fn kubeconfig(subject: &Subject, change: impl FnOnce(&mut Value)) -> Link {
    let server = subject.server.as_ref().unwrap();
    let text = fs::read(server.kubeconfig("gateway-token")).unwrap();
    let mut value: Value = serde_json::from_slice(&text).unwrap();
    change(&mut value);
    let path = subject.directory().join("changed.kubeconfig");
    fs::write(&path, value.to_string()).unwrap();
    Link::new(Access { kubeconfig: Some(path), context: None })
}

/// May be in a kubeconfig, and in no message.
const SECRET: &str = "hunter2";

#[rstest]
#[case::wrong_token(|config: &mut Value| config["users"][0]["user"]["token"] = json!("wrong"), "(401)")]
#[case::nobody(|config: &mut Value| config["users"][0]["user"] = json!({}), "for nobody")]
#[case::stranger(|config: &mut Value| {
    config["clusters"][0]["cluster"].as_object_mut().unwrap().remove("certificate-authority");
}, "not trusted")]
#[case::no_plugin(|config: &mut Value| config["users"][0]["user"] = json!({ "exec": {
    "apiVersion": "client.authentication.k8s.io/v1", "command": "/nonexistent/plugin", "interactiveMode": "Never",
} }), "credentials")]
#[case::plugin_fails(|config: &mut Value| config["users"][0]["user"] = json!({ "exec": {
    "apiVersion": "client.authentication.k8s.io/v1", "command": "sh", "interactiveMode": "Never",
    "args": ["-c", format!("echo {SECRET}; echo log in again >&2; false")], "env": [{ "name": "KEY", "value": SECRET }],
} }), "log in again")]
#[case::proxy_of_another_kind(|config: &mut Value| {
    config["clusters"][0]["cluster"]["proxy-url"] = json!(format!("ftp://bob:{SECRET}@127.0.0.1"));
}, "\"ftp\"")]
#[case::proxy_without_a_url(|config: &mut Value| {
    config["clusters"][0]["cluster"]["proxy-url"] = json!(format!("http://bob:{SECRET}@ 127.0.0.1"));
}, "proxy url")]
#[case::other_port(|config: &mut Value| config["clusters"][0]["cluster"]["server"] = json!("https://127.0.0.1:1"), "cannot be reached")]
#[case::no_name(|config: &mut Value| config["clusters"][0]["cluster"]["server"] = json!("https://api.invalid:6443"), "cannot be reached")]
#[case::no_tls(|config: &mut Value| {
    let server = config["clusters"][0]["cluster"]["server"].as_str().unwrap().replace("https", "http");
    config["clusters"][0]["cluster"]["server"] = json!(server);
}, "invalid HTTP version")]
#[case::no_authority(|config: &mut Value| {
    config["clusters"][0]["cluster"]["certificate-authority"] = json!("/nonexistent/ca.pem");
}, "/nonexistent/ca.pem")]
#[case::no_context(|config: &mut Value| config["current-context"] = json!("other"), "other")]
#[case::socks(|config: &mut Value| config["clusters"][0]["cluster"]["proxy-url"] = json!("http://127.0.0.1:1"), "cannot be reached")]
fn every_way_to_fail_is_told(#[case] spoil: fn(&mut Value), #[case] told: &str) {
    let subject = cluster();
    let observer = Observer::with(&subject, kubeconfig(&subject, spoil), TIMING);
    let problem = observer.wait_problem(|problem| problem.place.contains("nodes"));
    assert!(problem.what.contains(told) && !problem.to_string().contains(SECRET), "{problem}");
    assert!(!problem.remedy.is_empty());
    // Mended in place, it is taken up without a restart.
    kubeconfig(&subject, |_| {});
    observer.converge(&subject);
    observer.wait_healthy();
}

#[test]
fn an_exec_plugin_gives_credentials() {
    let subject = cluster();
    let script = subject.directory().join("plugin.sh");
    let credential = json!({
        "apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": { "token": "token-of-gateway" },
    });
    fs::write(&script, format!("echo '{credential}'\n")).unwrap();
    let link = kubeconfig(&subject, |config| {
        config["users"][0]["user"] = json!({ "exec": {
            "apiVersion": "client.authentication.k8s.io/v1", "command": "sh", "args": [script], "interactiveMode": "Never",
        } });
    });
    Observer::with(&subject, link, TIMING).converge(&subject);
}

/// flannel's configuration is read where it may be, and compared.
#[test]
fn flannel_s_configuration_is_compared() {
    let subject = cluster();
    let observer = Observer::of_flannel(&subject);
    let maps: Api<ConfigMap> = Api::namespaced(subject.client(), "kube-flannel");
    let write = |conf: Value| {
        let map = json!({
            "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": "kube-flannel-cfg" },
            "data": { "net-conf.json": conf.to_string() },
        });
        let parameters = PatchParams::apply("test").force();
        RUNTIME.block_on(maps.patch("kube-flannel-cfg", &parameters, &Patch::Apply(&map))).unwrap();
    };
    write(json!({ "Network": "198.18.0.0/15", "Backend": { "Type": "vxlan", "VNI": 4096 } }));
    let problem = observer.wait_problem(|problem| problem.what.contains("Backend.VNI"));
    assert!(
        problem.place.contains("kube-flannel/kube-flannel-cfg") && problem.remedy.contains("vni = 4096"),
        "{problem}"
    );
    write(json!({ "Network": "198.18.0.0/15", "EnableIPv6": true, "Backend": { "Type": "vxlan" } }));
    observer.wait_problem(|problem| problem.what.contains("dual-stack"));
    write(json!({ "Network": "198.18.0.0/15", "Backend": { "Type": "vxlan" } }));
    observer.wait_healthy();
}

/// In a dual-stack network flannel would not program the Node: better none than one that does nothing.
#[test]
fn a_dual_stack_network_is_refused() {
    let scene = Scene::new();
    let map = json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": "kube-flannel-cfg" },
        "data": { "net-conf.json": r#"{"Network":"198.18.0.0/15","EnableIPv6":true,"Backend":{"Type":"vxlan"}}"# },
    });
    let maps: Api<ConfigMap> = Api::namespaced(scene.subject.client(), "kube-flannel");
    let patch = Patch::Apply(&map);
    RUNTIME.block_on(maps.patch("kube-flannel-cfg", &PatchParams::apply("test"), &patch)).unwrap();
    assert!(refused(scene.apply()).contains("dual-stack"));
    assert!(scene.node().is_none());
}

/// What a client of the protocol sees of a compaction.
#[test]
fn what_is_forgotten_is_gone() {
    let subject = Subject::start();
    for number in 1..=5 {
        subject.create_node(&node(&subject.run, number));
    }
    RUNTIME.block_on(async {
        let page = subject.nodes().list(&ListParams::default().limit(2)).await.unwrap();
        subject.nodes().delete(&node_name(&subject.run, 5), &DeleteParams::default()).await.unwrap();
        subject.controls().unwrap().compact().await.unwrap();
        let next = ListParams { continue_token: page.metadata.continue_, ..ListParams::default().limit(2) };
        let (code, reason, _) = status(subject.nodes().list(&next).await.unwrap_err());
        assert_eq!((code, reason.as_str()), (410, "Expired"));
        let mut watch = subject.nodes().watch(&WatchParams::default(), "1").await.unwrap().boxed();
        match watch.try_next().await {
            Ok(Some(WatchEvent::Error(status))) => assert_eq!(status.code, 410),
            other => panic!("{other:?}"),
        }
    });
}
