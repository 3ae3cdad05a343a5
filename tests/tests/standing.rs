//! The verbs of `cargo xtask lab`, as people use them. There is one standing lab on a machine: take yours down before.

use std::process::{Command, Output};

use serde_json::Value;

fn lab(words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_lab")).args(words).output().unwrap()
}

fn succeeds(words: &[&str]) -> String {
    let output = lab(words);
    assert!(output.status.success(), "lab {words:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn fails(words: &[&str]) -> String {
    let output = lab(words);
    assert_eq!(output.status.code(), Some(1), "lab {words:?}: {output:?}");
    assert!(output.stdout.is_empty(), "{output:?}");
    String::from_utf8(output.stderr).unwrap()
}

/// Takes the lab down whatever happens.
struct Down;

impl Drop for Down {
    fn drop(&mut self) {
        lab(&["down"]);
    }
}

#[test]
fn the_lab_stands_between_commands() {
    assert!(
        fails(&["status"]).contains("no lab is up"),
        "take the standing lab down before: cargo xtask lab down"
    );
    assert!(fails(&["down"]).contains("nothing to take down"));
    assert!(fails(&["exec", "client1", "--", "true"]).contains("cargo xtask lab up"));

    let down = Down;
    assert!(succeeds(&["up"]).contains("The lab is up"));
    assert!(fails(&["up"]).contains("up already"));

    let pings = succeeds(&["exec", "client1", "--", "ping", "-c", "2", "-W", "1", "10.244.2.2"]);
    assert!(pings.contains("2 received"), "{pings}");
    assert_eq!(lab(&["exec", "pod1-1", "--", "sh", "-c", "exit 7"]).status.code(), Some(7));
    assert_eq!(lab(&["exec", "pod1-1", "--", "sh", "-c", "kill -9 $$"]).status.code(), Some(128 + 9));
    let unknown = fails(&["exec", "client9", "--", "true"]);
    assert!(unknown.contains("client9") && unknown.contains("client1, client2, gateway"), "{unknown}");

    let status: Value = serde_json::from_str(&succeeds(&["status", "--json"])).unwrap();
    assert_eq!(status["gateway"]["running"], true);
    let hosts = status["hosts"].as_array().unwrap();
    assert_eq!(hosts.len(), 17);
    let gateway = hosts.iter().find(|host| host["name"] == "gateway").unwrap();
    assert_eq!(gateway["role"], "gateway");
    let namespace = gateway["namespace"].as_str().unwrap();
    assert!(std::path::Path::new("/run/netns").join(namespace).exists());
    let interfaces = gateway["interfaces"].as_array().unwrap();
    let external = interfaces.iter().find(|interface| interface["name"] == "ext0").unwrap();
    assert_eq!(external["addresses"][0], "10.244.30.1/24");
    assert_eq!(external["mac"], "52:54:00:00:01:c8");
    assert!(succeeds(&["status"]).contains("pod3-2"));

    assert!(succeeds(&["down"]).contains("gone"));
    assert!(!std::path::Path::new("/run/netns").join(namespace).exists());
    assert!(fails(&["down"]).contains("nothing to take down"));
    // Nothing is in the way of the next one.
    succeeds(&["up"]);
    drop(down);
    assert!(fails(&["status"]).contains("no lab is up"));
}
