//! Manifests that are wrong in every way: each is named with file, object, field and remedy until it is mended, and
//! costs nobody else anything.

use std::{
    fs,
    net::Ipv4Addr,
    path::PathBuf,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use gateway_tests::lab::{Flannel, Gateway, Host, flannel::Node as LabNode, traffic, wait_until};
use serde_json::{Value, json};

use crate::{
    cluster::{Cluster, Node, Pod},
    scenarios::{start, streams},
    stream::Stream,
    tables::{Content, Watcher},
};

const SOON: Duration = Duration::from_secs(10);

/// A manifest that is wrong.
struct Case {
    file: String,
    text: Vec<u8>,
    /// What the place must name besides the file: object and field.
    names: Vec<String>,
    /// It is wrong only in view of other objects, so no file is to blame.
    relation: bool,
}

/// Cases made by one change of a good object each.
struct Maker<'a> {
    cluster: &'a Cluster,
    cases: Vec<Case>,
}

impl Maker<'_> {
    fn add(&mut self, extension: &str, text: impl Into<Vec<u8>>, names: &[&str]) {
        let file = format!("bad{:02}.{extension}", self.cases.len());
        let names = names.iter().map(|name| (*name).to_owned()).collect();
        self.cases.push(Case { file, text: text.into(), names, relation: false });
    }

    fn node(&mut self, pointer: &str, value: Option<Value>, field: &str) {
        let number = u8::try_from(self.cases.len()).unwrap();
        let name = format!("bad-node{number}");
        let object = edited(Node::paper(number).object(&name), pointer, value);
        self.add("json", object.to_string(), &[&format!("Node {name}"), field]);
    }

    fn pod(&mut self, pointer: &str, value: Option<Value>, field: &str) {
        let name = format!("bad-pod{}", self.cases.len());
        let pod = Pod { node: "node1".to_owned(), address: Ipv4Addr::new(10, 244, 1, 99) };
        let object = edited(self.cluster.pod_object(&name, &pod), pointer, value);
        self.add("json", object.to_string(), &[&format!("Pod default/{name}"), field]);
    }
}

/// The object with one field replaced, or removed.
fn edited(mut object: Value, pointer: &str, value: Option<Value>) -> Value {
    let (parent, key) = pointer.rsplit_once('/').unwrap();
    let key = key.replace("~1", "/");
    let parent = object.pointer_mut(parent).unwrap();
    match value {
        Some(value) => {
            if let Some(list) = parent.as_array_mut() {
                list[key.parse::<usize>().unwrap()] = value;
            } else {
                parent[key.as_str()] = value;
            }
        }
        None => {
            parent.as_object_mut().unwrap().remove(&key).unwrap();
        }
    }
    object
}

fn cases(cluster: &Cluster) -> Vec<Case> {
    const ANNOTATIONS: &str = "/metadata/annotations";
    let mut maker = Maker { cluster, cases: Vec::new() };
    let huge = || Value::from("x".repeat(1 << 20));
    let annotation = |name: &str| format!("{ANNOTATIONS}/flannel.alpha.coreos.com~1{name}");

    // Values that are missing, wrong or huge.
    for value in [None, Some(json!("host-gw")), Some(json!("")), Some(huge())] {
        maker.node(&annotation("backend-type"), value, "backend-type");
    }
    for value in
        [None, Some(json!("172.16.2.11/24")), Some(json!("239.1.2.3")), Some(json!("fd00::1")), Some(huge())]
    {
        maker.node(&annotation("public-ip"), value, "public-ip");
    }
    for value in [
        None,
        Some(json!("{")),
        Some(json!("{}")),
        Some(json!(r#"{"VNI":1,"VtepMAC":7}"#)),
        Some(json!(r#"{"VNI":1,"VtepMAC":"0a:00:00:00:00"}"#)),
        Some(json!(r#"{"VNI":1,"VtepMAC":"01:00:5e:00:00:01"}"#)),
        Some(json!(r#"{"VNI":-1,"VtepMAC":"0a:00:00:00:09:01"}"#)),
        Some(json!(r#"{"VNI":7,"VtepMAC":"0a:00:00:00:09:02"}"#)),
        Some(huge()),
    ] {
        maker.node(&annotation("backend-data"), value, "backend-data");
    }
    for value in [
        json!([]),
        json!(["10.244.9.1/24"]),
        json!(["ten"]),
        json!(["fd00::/64"]),
        json!(["10.1.1.0/24", "10.1.2.0/24"]),
        json!(["10.244.9.0/24", "fd00::/64", "fd01::/64"]),
    ] {
        // Without the list the single field counts, so it must not save the object.
        let number = u8::try_from(maker.cases.len()).unwrap();
        let name = format!("bad-node{number}");
        let object = edited(Node::paper(number).object(&name), "/spec/podCIDR", None);
        let object = edited(object, "/spec/podCIDRs", Some(value));
        maker.add("json", object.to_string(), &[&format!("Node {name}"), "spec.podCIDR"]);
    }
    maker.node("/spec", Some(json!({})), "spec.podCIDR");

    // Types: every field that is read.
    for (pointer, value, field) in [
        ("/metadata/creationTimestamp", json!("yesterday"), "metadata.creationTimestamp"),
        ("/metadata/creationTimestamp", json!(7), "metadata.creationTimestamp"),
        ("/metadata/annotations", json!("text"), "metadata.annotations"),
        (
            "/metadata/annotations",
            json!({ "flannel.alpha.coreos.com/kube-subnet-manager": true }),
            "metadata.annotations",
        ),
        ("/spec", json!([]), "spec"),
        ("/spec/podCIDR", json!(10), "spec.podCIDR"),
        ("/spec/podCIDRs", json!("10.244.1.0/24"), "spec.podCIDRs"),
        ("/status", json!("Ready"), "status"),
        ("/status/addresses", json!({}), "status.addresses"),
        ("/status/addresses/0", json!("172.16.2.11"), "status.addresses"),
    ] {
        maker.node(pointer, Some(value), field);
    }
    for (pointer, value, field) in [
        ("/metadata/creationTimestamp", json!([]), "metadata.creationTimestamp"),
        ("/metadata/deletionTimestamp", json!("soon"), "metadata.deletionTimestamp"),
        ("/spec", json!("none"), "spec"),
        ("/spec/nodeName", json!(["node1"]), "spec.nodeName"),
        ("/spec/hostNetwork", json!("yes"), "spec.hostNetwork"),
        ("/status", json!(0), "status"),
        ("/status/phase", json!(1), "status.phase"),
        ("/status/podIP", json!(167_772_161), "status.podIP"),
        ("/status/podIPs", json!("10.244.1.5"), "status.podIPs"),
        ("/status/podIPs/0", json!({ "ip": "ten" }), "status.podIP"),
        ("/status/podIPs/0", json!({ "ip": "127.0.0.1" }), "status.podIP"),
    ] {
        maker.pod(pointer, Some(value), field);
    }
    for address in ["10.244.30.7", "10.9.9.9"] {
        maker.pod("/status/podIPs/0", Some(json!({ "ip": address })), "status.podIP");
        maker.cases.last_mut().unwrap().relation = true;
    }
    let name = |value| edited(Node::paper(99).object("x"), "/metadata/name", value).to_string();
    maker.add("json", name(None), &["Node", "metadata.name"]);
    maker.add("json", name(Some(json!(7))), &["Node", "metadata.name"]);
    maker.add("json", name(Some(json!(""))), &["Node", "metadata.name"]);

    // Files.
    let good = Node::paper(98).object("bad-cut").to_string();
    maker.add("json", &good[..good.len() / 2], &["document 1"]);
    maker.add("yaml", "", &[]);
    maker.add("yaml", "kind: [", &["document 1"]);
    maker.add("yaml", "apiVersion: v1\nitems:\n- apiVersion: v1\n  kind: Node\n", &["document 1"]);
    maker.add("yaml", "apiVersion: v1\nkind: List\nitems: all\n", &["document 1", "items"]);
    maker.add("yaml", "kind: Node\nmetadata: {name: n}\n", &["document 1"]);
    maker.add("yaml", "- kind: Node\n", &["document 1"]);
    maker.add("yaml", [0xff, 0xfe, 0, 1], &[]);
    maker.add("json", vec![b' '; (64 << 20) + 1], &[]);
    maker.cases
}

fn problems(gateway: &Gateway, host: &Host) -> Vec<Value> {
    // The exit code is 1 while there are any.
    let output = gateway.output(host, &["show", "problems", "--json"]).unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    serde_json::from_str(&text)
        .unwrap_or_else(|error| panic!("{error}: {text}{}", String::from_utf8_lossy(&output.stderr)))
}

fn matching<'a>(problems: &'a [Value], case: &Case) -> Option<&'a Value> {
    problems.iter().find(|problem| {
        let place = problem["place"].as_str().unwrap();
        (case.relation || place.contains(&case.file)) && case.names.iter().all(|name| place.contains(name))
    })
}

fn path(lab: &Flannel, case: &Case) -> PathBuf {
    lab.manifests().join(&case.file)
}

#[test]
fn whatever_is_wrong_is_named_until_it_is_mended() {
    let (mut gateway, lab, cluster) = start("problems");
    let host = lab.gateway();
    assert_eq!(problems(&gateway, host), Vec::<Value>::new());
    assert_eq!(gateway.text(host, &["show", "problems"]).unwrap(), "no problems\n");

    let watcher = Watcher::start(&lab, &cluster);
    let streams = streams(&lab);
    let cases = cases(&cluster);
    let begin = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    for case in &cases {
        // Whole at once: half of a large file is another problem, and has a beginning of its own.
        let half = lab.manifests().join(".half");
        fs::write(&half, &case.text).unwrap();
        fs::rename(&half, path(&lab, case)).unwrap();
    }
    let listed = wait_until("every problem is listed", SOON, || {
        let listed = problems(&gateway, host);
        Ok(cases.iter().all(|case| matching(&listed, case).is_some()).then_some(listed))
    });
    let listed = listed.unwrap_or_else(|error| {
        let listed = problems(&gateway, host);
        let missing: Vec<_> = cases
            .iter()
            .filter(|case| matching(&listed, case).is_none())
            .map(|case| format!("{} {:?}", case.file, case.names))
            .collect();
        panic!("{error:#}: {missing:#?}\n{listed:#?}")
    });
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    for problem in &listed {
        let text = |key: &str| problem[key].as_str().unwrap().to_owned();
        assert!(!text("what").is_empty() && !text("remedy").is_empty(), "{problem}");
        assert!(["error", "warning"].contains(&text("severity").as_str()), "{problem}");
        assert!((begin..=now).contains(&problem["since"].as_u64().unwrap()), "{problem}");
        assert!(problem.to_string().len() < 3000, "{} bytes", problem.to_string().len());
    }
    println!("{} wrong manifests, {} problems listed", cases.len(), listed.len());

    // `status` lists the same, and says so by its exit code.
    let status = gateway.output(host, &["status"]).unwrap();
    let shown = String::from_utf8(status.stdout).unwrap();
    assert_eq!(status.status.code(), Some(1));
    for problem in &listed {
        assert!(shown.contains(problem["place"].as_str().unwrap()), "{problem} is not in\n{shown}");
    }
    assert!(traffic::reaches(lab.client(1), LabNode::new(2).pod_address(2)).unwrap());

    // Half of them are mended: those are gone, the others keep their beginning.
    let (mended, left) = cases.split_at(cases.len() / 2);
    for case in mended {
        fs::remove_file(path(&lab, case)).unwrap();
    }
    wait_until("what is mended is no longer listed", SOON, || {
        let listed = problems(&gateway, host);
        Ok(mended.iter().all(|case| matching(&listed, case).is_none()).then_some(()))
    })
    .unwrap();
    let still = problems(&gateway, host);
    for case in left {
        let problem = matching(&still, case).unwrap_or_else(|| panic!("{} is not listed", case.file));
        assert!(listed.contains(problem), "another beginning: {problem}");
    }
    for case in left {
        fs::remove_file(path(&lab, case)).unwrap();
    }
    wait_until("everything is mended", SOON, || Ok(problems(&gateway, host).is_empty().then_some(())))
        .unwrap();
    Content::wait(&lab, &cluster, "the cluster as it was");
    let (looks, sent) = (watcher.stop(), streams.map(Stream::stop));
    println!("constant entries seen in {looks} looks; datagrams sent and received: {sent:?}");

    gateway.stop().unwrap();
    let output = gateway.output(host, &["show", "problems"]).unwrap();
    assert_eq!(output.status.code(), Some(2));
    let message = String::from_utf8(output.stderr).unwrap();
    assert!(message.contains("is not running") && message.contains("gateway check"), "{message}");
}

/// `detach` needs no configuration if the instance is named.
#[test]
fn detach_works_without_a_valid_configuration() {
    let (mut gateway, lab, _) = start("detach-broken");
    let host = lab.gateway();
    gateway.stop().unwrap();
    fs::write(lab.config(), "overlay = 7\n").unwrap();
    let output = gateway.output(host, &["detach"]).unwrap();
    assert_eq!(output.status.code(), Some(2), "nobody says which instance");
    assert!(String::from_utf8(output.stderr).unwrap().contains("--instance"));
    gateway.text(host, &["detach", "--instance", &lab.instance()]).unwrap();
    assert!(!PathBuf::from(format!("/sys/fs/bpf/gateway/{}", lab.instance())).exists());
    let links = host.run(&["ip", "-brief", "link"]).unwrap();
    assert!(!links.contains("gw-flannel"), "{links}");
}
