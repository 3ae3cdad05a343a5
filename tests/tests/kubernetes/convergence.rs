//! After any sequence of changes, faults and restarts the tables equal the plan of the final state, and nothing that was
//! right all the time was ever absent.

use std::{collections::BTreeMap, env, thread, time::Duration};

use proptest::{
    prelude::*,
    test_runner::{Config, TestRunner},
};
use serde_json::json;

use crate::{
    objects::{PREFIX, address, endpoint, node, node_name, on, running},
    observer::Observer,
    subject::Subject,
};

/// A step; what does not fit the cluster at that moment does nothing.
#[derive(Clone, Debug)]
enum Step {
    AddNode(u8),
    RemoveNode(u8),
    /// Another public-ip.
    MoveNode(u8),
    NotReady(u8),
    /// A pod on a node with an address that others may have, too.
    AddPod {
        name: u8,
        node: u8,
        address: u8,
    },
    Finish(u8),
    Terminate(u8),
    RemovePod(u8),
    /// Many requests fail in a way.
    Fault(Fault),
    Compact,
    Disconnect,
    /// The daemon starts anew.
    Restart,
    /// The API server does.
    RestartServer,
    Settle,
    Pause(u8),
}

#[derive(Clone, Copy, Debug)]
enum Fault {
    Internal,
    Busy,
    Gone,
    GoneEvent,
    Cut(u16),
    Slow,
    Garbage,
    Repeat(u8),
}

fn fault() -> impl Strategy<Value = Fault> {
    prop_oneof![
        Just(Fault::Internal),
        Just(Fault::Busy),
        Just(Fault::Gone),
        Just(Fault::GoneEvent),
        (0..3000u16).prop_map(Fault::Cut),
        Just(Fault::Slow),
        Just(Fault::Garbage),
        (1..20u8).prop_map(Fault::Repeat),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let (node, pod) = (1..5u8, 0..8u8);
    prop_oneof![
        3 => node.clone().prop_map(Step::AddNode),
        1 => node.clone().prop_map(Step::RemoveNode),
        1 => node.clone().prop_map(Step::MoveNode),
        1 => node.clone().prop_map(Step::NotReady),
        6 => (pod.clone(), node, 2..6u8).prop_map(|(name, node, address)| Step::AddPod { name, node, address }),
        1 => pod.clone().prop_map(Step::Finish),
        1 => pod.clone().prop_map(Step::Terminate),
        3 => pod.prop_map(Step::RemovePod),
        3 => fault().prop_map(Step::Fault),
        1 => Just(Step::Compact),
        2 => Just(Step::Disconnect),
        1 => Just(Step::Restart),
        1 => Just(Step::RestartServer),
        1 => Just(Step::Settle),
        1 => (0..30u8).prop_map(Step::Pause),
    ]
}

struct Scene {
    subject: Subject,
    observer: Observer,
    nodes: BTreeMap<u8, u8>,
    pods: BTreeMap<u8, (u8, u8)>,
}

impl Scene {
    fn new() -> Self {
        let subject = Subject::start();
        // Nobody touches these: they must be there all the time.
        subject.create_node(&node(&subject.run, 9));
        subject.create_pod("steady", &on(&subject.run, 9), &running(address(9, 9)));
        let observer = Observer::start(&subject);
        observer.converge(&subject);
        Self { subject, observer, nodes: BTreeMap::new(), pods: BTreeMap::new() }
    }

    /// What a node's change may change.
    fn release_node(&self, number: u8) {
        let name = node_name(&self.subject.run, number);
        self.observer.release(|steady| {
            steady.vteps.retain(|key, _| *key.node != *name);
            steady.pods.retain(|_, key| *key.node != *name);
            steady.prefixes.retain(|_, key| *key.node != *name);
            steady.sources.retain(|_, key| *key.node != *name);
        });
    }

    fn release_pod(&self, (node, number): (u8, u8)) {
        self.observer.release(|steady| {
            steady.pods.remove(&(0, address(node, number)));
        });
    }

    fn take(&mut self, step: &Step) {
        let subject = &self.subject;
        match step {
            Step::AddNode(number) => {
                if self.nodes.insert(*number, 0).is_none() {
                    self.release_node(*number);
                    subject.create_node(&node(&subject.run, *number));
                }
            }
            Step::RemoveNode(number) => {
                if self.nodes.remove(number).is_some() {
                    self.release_node(*number);
                    subject.delete_node(&node_name(&subject.run, *number));
                }
            }
            Step::MoveNode(number) => {
                if let Some(moves) = self.nodes.get_mut(number) {
                    *moves += 1;
                    let to = endpoint(number + 10 * (*moves % 20)).to_string();
                    self.release_node(*number);
                    let patch =
                        json!({ "metadata": { "annotations": { format!("{PREFIX}public-ip"): to } } });
                    subject.patch_node(&node_name(&subject.run, *number), &patch);
                }
            }
            Step::NotReady(number) => {
                if self.nodes.contains_key(number) {
                    let condition =
                        json!({ "type": "Ready", "status": "Unknown", "reason": "NodeStatusUnknown" });
                    let patch = json!({ "status": { "conditions": [condition] } });
                    subject.patch_node_status(&node_name(&subject.run, *number), &patch);
                }
            }
            Step::AddPod { name, node, address: number } => {
                if !self.pods.contains_key(name) && self.nodes.contains_key(node) {
                    self.pods.insert(*name, (1, *number));
                    self.release_pod((1, *number));
                    let status = running(address(1, *number));
                    subject.create_pod(&format!("pod-{name}"), &on(&subject.run, *node), &status);
                }
            }
            Step::Finish(name) => {
                if let Some(place) = self.pods.get(name) {
                    self.release_pod(*place);
                    subject.patch_pod_status(&format!("pod-{name}"), &json!({ "phase": "Succeeded" }));
                }
            }
            Step::Terminate(name) => {
                if let Some(place) = self.pods.get(name) {
                    self.release_pod(*place);
                    // One that is finished goes at once.
                    subject.patch_pod_status(&format!("pod-{name}"), &json!({ "phase": "Running" }));
                    subject.delete_pod(&format!("pod-{name}"), 30);
                }
            }
            Step::RemovePod(name) => {
                if let Some(place) = self.pods.remove(name) {
                    self.release_pod(place);
                    subject.delete_pod(&format!("pod-{name}"), 0);
                }
            }
            Step::Settle => self.observer.converge(subject),
            Step::Pause(milliseconds) => thread::sleep(Duration::from_millis((*milliseconds).into())),
            Step::Restart => self.observer.restart(&self.subject),
            Step::Fault(_) | Step::Compact | Step::Disconnect | Step::RestartServer => self.disturb(step),
        }
    }

    /// What only a test server does.
    fn disturb(&mut self, step: &Step) {
        if self.subject.server.is_none() {
            return;
        }
        match step {
            Step::Compact => self.subject.compact(),
            Step::Disconnect => self.subject.disconnect(),
            Step::RestartServer => {
                self.subject.stop_server();
                self.subject.restart_server();
            }
            Step::Fault(fault) => {
                let fault = match fault {
                    Fault::Internal => json!({ "kind": "status", "code": 500 }),
                    Fault::Busy => json!({ "kind": "status", "code": 429, "retry_after": 0 }),
                    Fault::Gone => json!({ "kind": "status", "code": 410 }),
                    Fault::GoneEvent => json!({ "kind": "watch-error", "code": 410 }),
                    Fault::Cut(bytes) => json!({ "kind": "cut", "bytes": bytes }),
                    Fault::Slow => json!({ "kind": "slow", "bytes": 300, "pause_ms": 5 }),
                    Fault::Garbage => json!({ "kind": "garbage" }),
                    Fault::Repeat(events) => json!({ "kind": "repeat", "events": events }),
                };
                self.subject.fault(&json!({ "fault": fault, "times": 4 }));
            }
            _ => {}
        }
    }
}

#[test]
fn tables_converge_and_nothing_right_is_ever_absent() {
    let full = env::var_os("GATEWAY_TEST_FULL").is_some();
    let cases = if full { 150 } else { 15 };
    let config = Config { cases, max_shrink_iters: 60, failure_persistence: None, ..Config::default() };
    TestRunner::new(config)
        .run(&proptest::collection::vec(step(), 5..40), |steps| {
            let mut scene = Scene::new();
            for step in &steps {
                scene.take(step);
            }
            scene.observer.converge(&scene.subject);
            scene.observer.assert_steady();
            Ok(())
        })
        .unwrap_or_else(|error| panic!("{error}"));
}
