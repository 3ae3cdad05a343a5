//! Directories of manifests as people and kubelets write them.

use std::{fmt::Write as _, fs, net::Ipv4Addr, os::unix::fs::symlink, path::Path, time::Duration};

use rstest::rstest;
use tokio::{sync::mpsc, time::timeout};

use super::*;
use crate::cluster::{
    flannel::PodReading,
    model::{Event, Object, ObjectRef},
    problem::{Problem, ProblemList},
};

/// As `kubectl get nodes,pods -A -o yaml` prints it, shortened.
const KUBECTL_LIST: &str = r#"apiVersion: v1
items:
- apiVersion: v1
  kind: Node
  metadata:
    annotations:
      flannel.alpha.coreos.com/backend-data: '{"VNI":1,"VtepMAC":"76:5d:ef:ee:c6:86"}'
      flannel.alpha.coreos.com/backend-type: vxlan
      flannel.alpha.coreos.com/kube-subnet-manager: "true"
      flannel.alpha.coreos.com/public-ip: 172.31.7.11
      volumes.kubernetes.io/controller-managed-attach-detach: "true"
    creationTimestamp: "2026-08-01T10:00:00Z"
    labels:
      kubernetes.io/hostname: node-1
    name: node-1
    resourceVersion: "4711"
    uid: 6b3a1f0e-8c4e-4b37-9d5d-0f2f1a0f7f10
  spec:
    podCIDR: 10.244.1.0/24
    podCIDRs:
    - 10.244.1.0/24
  status:
    addresses:
    - address: 172.31.7.11
      type: InternalIP
    - address: node-1
      type: Hostname
    capacity:
      cpu: "2"
      memory: 4018576Ki
- apiVersion: v1
  kind: Pod
  metadata:
    creationTimestamp: "2026-08-01T10:05:00Z"
    name: web-0
    namespace: shop
  spec:
    containers:
    - image: nginx
      name: nginx
    nodeName: node-1
  status:
    phase: Running
    podIP: 10.244.1.5
    podIPs:
    - ip: 10.244.1.5
kind: List
metadata:
  resourceVersion: ""
"#;

fn node(name: &str) -> String {
    format!("apiVersion: v1\nkind: Node\nmetadata:\n  name: {name}\n")
}

struct Fixture {
    root: tempfile::TempDir,
    problems: ProblemList,
    directory: Directory,
}

impl Fixture {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let problems = ProblemList::default();
        let directory = Directory::new(root.path(), problems.clone(), Duration::ZERO);
        Self { root, problems, directory }
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.root.path().join(name), text).unwrap();
    }

    /// What changed: `+` applied, `-` deleted.
    fn scan(&mut self) -> Vec<String> {
        self.directory.rescan().expect("the directory is there").events.iter().map(describe).collect()
    }

    fn places(&self) -> Vec<String> {
        self.problems.all().into_iter().map(|problem: Problem| problem.place).collect()
    }
}

fn describe(event: &Event) -> String {
    match event {
        Event::Listing => "listing".into(),
        Event::Apply(object) => format!("+{}", object.reference()),
        Event::Delete(reference) => format!("-{reference}"),
        Event::Synced => "synced".into(),
        Event::Listed { .. } => "listed".into(),
    }
}

#[rstest]
#[case::list_yaml("a.yaml", KUBECTL_LIST.to_owned(), &["+Node node-1", "+Pod shop/web-0"])]
#[case::documents("a.yml", format!("---\n{}---\n# nothing here\n---\n{}", node("a"), node("b")), &["+Node a", "+Node b"])]
#[case::json_object("a.json", r#"{"apiVersion":"v1","kind":"Pod","metadata":{"name":"p"}}"#.to_owned(), &["+Pod default/p"])]
#[case::typed_list_without_kinds("a.json", r#"{"apiVersion":"v1","kind":"NodeList","items":[{"metadata":{"name":"n"}}]}"#.to_owned(), &["+Node n"])]
#[case::empty_list("a.json", r#"{"apiVersion":"v1","kind":"PodList","items":null}"#.to_owned(), &[])]
#[case::other_kinds("a.yaml", format!("apiVersion: v1\nkind: Service\nmetadata: {{name: s}}\n---\napiVersion: example.org/v1\nkind: Node\nmetadata: {{name: x}}\n---\n{}", node("n")), &["+Node n"])]
#[case::anchors("a.yaml", "apiVersion: v1\nkind: List\nitems:\n- &n {apiVersion: v1, kind: Node, metadata: {name: n}}\n- {<<: *n, metadata: {name: m}}\n".to_owned(), &["+Node m", "+Node n"])]
fn every_form_is_read(#[case] name: &str, #[case] text: String, #[case] expected: &[&str]) {
    let mut fixture = Fixture::new();
    fixture.write(name, &text);
    fixture.write("notes.txt", "not a manifest");
    fixture.write(".hidden.yaml", &node("hidden"));
    fixture.write("saved.yaml~", &node("backup"));
    assert_eq!(fixture.scan(), expected);
    assert_eq!(fixture.problems.all(), []);
    assert_eq!(fixture.scan(), Vec::<String>::new(), "nothing changed");
}

#[test]
fn values_arrive_as_they_were_written() {
    let mut fixture = Fixture::new();
    fixture.write("a.yaml", KUBECTL_LIST);
    let events = fixture.directory.rescan().unwrap().events;
    let [Event::Apply(node), Event::Apply(pod)] = &events[..] else { panic!("{events:?}") };
    let (Object::Node(node, _), Object::Pod(_, PodReading::Placed(pod))) = (&**node, &**pod) else {
        panic!("{events:?}")
    };
    let annotations = node.metadata.annotations.as_ref().unwrap();
    assert_eq!(annotations["flannel.alpha.coreos.com/kube-subnet-manager"], "true");
    assert_eq!(annotations["flannel.alpha.coreos.com/public-ip"], "172.31.7.11");
    assert_eq!(node.metadata.creation_timestamp.as_ref().unwrap().0.as_second(), 1_785_578_400);
    assert_eq!((pod.node.as_ref(), pod.address), ("node-1", Ipv4Addr::new(10, 244, 1, 5)));
}

#[test]
fn other_kinds_are_counted() {
    let mut fixture = Fixture::new();
    fixture.write("a.yaml", "apiVersion: v1\nkind: Service\n---\napiVersion: v1\nkind: Secret\n");
    fixture.scan();
    assert_eq!(fixture.directory.ignored(), 2);
}

/// A bad item is named with its field, and costs nobody else anything.
#[test]
fn one_bad_object_blocks_nobody() {
    let mut fixture = Fixture::new();
    let bad = KUBECTL_LIST.replace("podCIDRs:\n    - 10.244.1.0/24", "podCIDRs: 10.244.1.0/24");
    fixture.write("a.yaml", &bad);
    assert_eq!(fixture.scan(), ["+Pod shop/web-0"]);
    assert_eq!(fixture.places(), ["a.yaml, document 1, item 1, Node node-1, spec.podCIDRs"]);
    fixture.write("a.yaml", KUBECTL_LIST);
    assert_eq!(fixture.scan(), ["+Node node-1"]);
    assert_eq!(fixture.problems.all(), []);
    // What was good once stays while it is bad.
    fixture.write("a.yaml", &bad);
    assert_eq!(fixture.scan(), Vec::<String>::new());
    assert_eq!(fixture.problems.all().len(), 1);
}

#[rstest]
#[case::no_name("apiVersion: v1\nkind: Node\nmetadata: {}\n", "Node, metadata.name")]
#[case::no_version("kind: Node\nmetadata: {name: n}\n", "document 1")]
#[case::no_object("- 1\n", "document 1")]
#[case::no_kind("apiVersion: v1\nmetadata: {name: n}\n", "document 1")]
#[case::text("word\n", "document 1")]
#[case::items("apiVersion: v1\nkind: List\nitems: 5\n", "items")]
#[case::twice(
    "apiVersion: v1\nkind: Node\nmetadata: {name: n}\n---\napiVersion: v1\nkind: Node\nmetadata: {name: n}\n",
    "document 2, Node n"
)]
#[case::number_as_name("apiVersion: v1\nkind: Node\nmetadata: {name: 7}\n", "metadata.name")]
#[case::metadata("apiVersion: v1\nkind: Node\nmetadata: 7\n", "metadata.name")]
#[case::status("apiVersion: v1\nkind: Node\nmetadata: {name: n}\nstatus: []\n", "Node n, status")]
#[case::yes_is_no_boolean(
    "apiVersion: v1\nkind: Pod\nmetadata: {name: p}\nspec: {hostNetwork: yes}\n",
    "spec.hostNetwork"
)]
#[case::duplicate_key("apiVersion: v1\nkind: Node\nkind: Pod\n", "document 1")]
#[case::empty("", "a.yaml")]
fn what_is_wrong_is_placed(#[case] text: &str, #[case] place: &str) {
    let mut fixture = Fixture::new();
    fixture.write("a.yaml", text);
    fixture.scan();
    let places = fixture.places();
    assert_eq!(places.len(), 1, "{:#?}", fixture.problems.all());
    assert!(places[0].ends_with(place), "{places:?}");
}

/// A writer that has not finished: cut anywhere, nothing that was known goes away unless the rest is well-formed
/// YAML that no longer names it.
#[test]
fn a_half_written_file_keeps_what_it_said() {
    let mut fixture = Fixture::new();
    fixture.write("a.yaml", &format!("{}---\n{}", node("a"), node("b")));
    fixture.scan();
    fixture.write("a.yaml", &format!("{}---\napiVersion: v1\nkind: [", node("a")));
    assert_eq!(fixture.scan(), Vec::<String>::new());
    assert_eq!(fixture.places(), ["a.yaml, document 2"]);
    fixture.write("a.yaml", "");
    assert_eq!(fixture.scan(), Vec::<String>::new());
    // Documents before the error count even if they are new.
    fixture.write("a.yaml", &format!("{}---\n{{", node("c")));
    assert_eq!(fixture.scan(), ["+Node c"]);
    fixture.write("a.yaml", &node("b"));
    // It stands elsewhere in the file now, which its problems would name.
    assert_eq!(fixture.scan(), ["+Node b", "-Node a", "-Node c"]);
    assert_eq!(fixture.problems.all(), []);
}

/// kubectl writes the kind of a list behind its items, so a prefix of it is well-formed YAML that says nothing.
#[test]
fn a_list_cut_at_any_byte_takes_nothing_away() {
    let mut fixture = Fixture::new();
    fixture.write("a.yaml", KUBECTL_LIST);
    fixture.scan();
    for end in 0..KUBECTL_LIST.len() {
        fixture.write("a.yaml", &KUBECTL_LIST[..end]);
        assert_eq!(fixture.scan(), Vec::<String>::new(), "cut at {end}");
    }
}

#[test]
fn a_file_is_read_when_its_writer_has_paused() {
    const QUIET: Duration = Duration::from_millis(200);
    let root = tempfile::tempdir().unwrap();
    let mut directory = Directory::new(root.path(), ProblemList::default(), QUIET);
    fs::write(root.path().join("a.yaml"), node("a")).unwrap();
    let look = directory.rescan().unwrap();
    assert!(look.unsettled && look.events.is_empty(), "{look:?}");
    std::thread::sleep(QUIET);
    let look = directory.rescan().unwrap();
    assert!(!look.unsettled && look.events.len() == 1, "{look:?}");
}

#[test]
fn the_first_file_by_name_has_an_object() {
    let mut fixture = Fixture::new();
    let second = "apiVersion: v1\nkind: Node\nmetadata:\n  name: n\nspec:\n  podCIDR: 10.244.2.0/24\n";
    fixture.write("b.yaml", second);
    assert_eq!(fixture.scan(), ["+Node n"]);
    fixture.write("a.yaml", &node("n"));
    assert_eq!(fixture.scan(), ["+Node n"]);
    let problems = fixture.problems.all();
    assert_eq!(problems.len(), 1);
    assert!(problems[0].place == "b.yaml, Node n" && problems[0].what.contains("a.yaml"), "{problems:?}");
    // The other one takes over in the same step, and the Node is never gone.
    fs::remove_file(fixture.root.path().join("a.yaml")).unwrap();
    assert_eq!(fixture.scan(), ["+Node n"]);
    assert_eq!(fixture.problems.all(), []);
    fs::remove_file(fixture.root.path().join("b.yaml")).unwrap();
    assert_eq!(fixture.scan(), ["-Node n"]);
}

#[test]
fn an_unreadable_file_or_directory_keeps_what_it_said() {
    let mut fixture = Fixture::new();
    fixture.write("a.yaml", &node("n"));
    fixture.scan();
    let path = fixture.root.path().join("a.yaml");
    fs::remove_file(&path).unwrap();
    symlink("/nonexistent/target", &path).unwrap();
    assert_eq!(fixture.scan(), Vec::<String>::new());
    assert_eq!(fixture.places(), ["a.yaml"]);

    let elsewhere = fixture.root.path().with_extension("away");
    fs::rename(fixture.root.path(), &elsewhere).unwrap();
    assert!(fixture.directory.rescan().is_none());
    assert!(fixture.problems.all().iter().any(|problem| problem.what.contains("cannot be read")));
    fs::rename(&elsewhere, fixture.root.path()).unwrap();
    fs::remove_file(&path).unwrap();
    assert_eq!(fixture.scan(), ["-Node n"]);
}

/// Nine levels of nine aliases: 9^9 nodes if it were expanded.
/// Whatever else lies there costs a line among the problems, and never a wait.
#[test]
fn special_files_are_told_and_passed_over() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    fs::write(at("good.yaml"), node("n1")).unwrap();
    nix::unistd::mkfifo(&at("fifo.yaml"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    symlink("/dev/zero", at("device.yaml")).unwrap();
    symlink("loop.yaml", at("loop.yaml")).unwrap();
    symlink("nowhere", at("dangling.json")).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(at("socket.yaml")).unwrap();
    fs::create_dir(at("directory.yaml")).unwrap();
    fs::write(at("\u{202e}\u{1b}[31m.yaml"), "[").unwrap();
    let problems = ProblemList::default();
    let look = Directory::new(directory.path(), problems.clone(), Duration::ZERO).rescan().unwrap();
    assert_eq!(look.events.iter().map(describe).collect::<Vec<_>>(), ["+Node n1"]);
    let places: Vec<String> = problems.all().into_iter().map(|problem| problem.place).collect();
    let expected = ["dangling.json", "device.yaml", "fifo.yaml", "loop.yaml", "socket.yaml"];
    assert_eq!(places[..5], expected, "{places:?}");
    assert_eq!(places.len(), 6);
}

#[test]
fn an_alias_bomb_is_refused() {
    let mut text = String::from("a0: &a0 [x,x,x,x,x,x,x,x,x]\n");
    for level in 1..9 {
        let below = format!("*a{},", level - 1).repeat(9);
        writeln!(text, "a{level}: &a{level} [{}]", below.trim_end_matches(',')).unwrap();
    }
    let mut fixture = Fixture::new();
    fixture.write("a.yaml", &text);
    assert_eq!(fixture.scan(), Vec::<String>::new());
    assert_eq!(fixture.places(), ["a.yaml, document 1"]);
}

#[test]
fn a_huge_file_is_refused_unread() {
    let mut fixture = Fixture::new();
    let file = fs::File::create(fixture.root.path().join("a.yaml")).unwrap();
    file.set_len(65 << 20).unwrap();
    fixture.scan();
    assert!(fixture.problems.all()[0].what.contains("larger than 64 MiB"), "{:?}", fixture.problems.all());
}

async fn next(events: &mut mpsc::Receiver<Event>) -> String {
    // Longer than inotify and the pause take, shorter than polling twice.
    let event = timeout(Duration::from_secs(3), events.recv()).await.expect("an event in time");
    describe(&event.expect("the source is running"))
}

fn watched(path: &Path) -> (mpsc::Receiver<Event>, ProblemList) {
    let (sender, receiver) = mpsc::channel(16);
    let problems = ProblemList::default();
    tokio::spawn(watch(path.to_owned(), sender, problems.clone()));
    (receiver, problems)
}

#[tokio::test]
async fn changes_arrive_while_watching() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path();
    fs::write(path.join("a.yaml"), node("a")).unwrap();
    let (mut events, problems) = watched(path);
    for expected in ["listing", "+Node a", "synced"] {
        assert_eq!(next(&mut events).await, expected);
    }
    // In place.
    fs::write(path.join("b.json"), r#"{"apiVersion":"v1","kind":"Node","metadata":{"name":"b"}}"#).unwrap();
    assert_eq!(next(&mut events).await, "+Node b");
    // As editors do: a new file renamed over the old one.
    fs::write(path.join(".a.yaml.swp"), node("c")).unwrap();
    fs::rename(path.join(".a.yaml.swp"), path.join("a.yaml")).unwrap();
    assert_eq!(next(&mut events).await, "+Node c");
    assert_eq!(next(&mut events).await, "-Node a");
    fs::remove_file(path.join("b.json")).unwrap();
    assert_eq!(next(&mut events).await, "-Node b");
    assert_eq!(problems.all(), []);
}

/// The kubelet's way of updating a mounted ConfigMap: the files are links through `..data`, which is replaced.
#[tokio::test]
async fn a_config_map_mount_is_followed() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path();
    for (version, name) in [("..1", "a"), ("..2", "b")] {
        fs::create_dir(path.join(version)).unwrap();
        fs::write(path.join(version).join("n.yaml"), node(name)).unwrap();
    }
    symlink("..1", path.join("..data")).unwrap();
    symlink("..data/n.yaml", path.join("n.yaml")).unwrap();
    let (mut events, _) = watched(path);
    for expected in ["listing", "+Node a", "synced"] {
        assert_eq!(next(&mut events).await, expected);
    }
    symlink("..2", path.join("..data_tmp")).unwrap();
    fs::rename(path.join("..data_tmp"), path.join("..data")).unwrap();
    assert_eq!(next(&mut events).await, "+Node b");
    assert_eq!(next(&mut events).await, "-Node a");
}

#[tokio::test]
async fn a_directory_may_come_later() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("later");
    let (mut events, problems) = watched(&path);
    timeout(Duration::from_secs(3), async {
        while problems.all().is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .expect("the missing directory is reported");
    assert!(events.try_recv().is_err(), "nothing is synced before it is there");
    fs::create_dir(&path).unwrap();
    fs::write(path.join("a.yaml"), node("a")).unwrap();
    for expected in ["listing", "+Node a", "synced"] {
        assert_eq!(next(&mut events).await, expected);
    }
    assert_eq!(problems.all(), []);
}

#[test]
fn a_reference_names_the_object() {
    assert_eq!(ObjectRef::pod("shop", "web-0").to_string(), "Pod shop/web-0");
}

#[test]
fn a_file_that_was_never_understood_leaves_the_listing_partial() {
    let mut fixture = Fixture::new();
    let partial = |fixture: &mut Fixture| fixture.directory.rescan().unwrap().partial;
    fixture.write("a.yaml", &node("a"));
    fixture.write("b.yaml", "[");
    assert!(partial(&mut fixture));
    fixture.write("b.yaml", "apiVersion: v1\nkind: Node\nmetadata: {name: b}\nspec: 7\n");
    assert!(partial(&mut fixture), "the file ends, but one of its objects cannot be read");
    fixture.write("b.yaml", &node("b"));
    assert!(!partial(&mut fixture));
    // From now on what it said before is known.
    fixture.write("b.yaml", "[ [");
    assert!(!partial(&mut fixture));
    // And a file that goes takes its doubt along.
    fixture.write("c.yaml", "{");
    assert!(partial(&mut fixture));
    fs::remove_file(fixture.root.path().join("c.yaml")).unwrap();
    assert!(!partial(&mut fixture));
}
