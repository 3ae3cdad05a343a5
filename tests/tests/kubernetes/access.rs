//! How the gateway finds the API server: as kubectl does. What comes from the environment is tried with the program itself.

use std::{
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use gateway::cluster::kubernetes::{Access, Link};
use gateway_tests::lab::gateway::program;
use nix::unistd::geteuid;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional},
    net::{TcpListener, TcpStream},
};

use crate::{
    objects::{PREFIX, node},
    observer::{Observer, TIMING},
    subject::{RUNTIME, Subject},
};

/// A test server with one node.
fn subject() -> Subject {
    let subject = Subject::start();
    subject.create_node(&node(&subject.run, 1));
    subject
}

/// The gateway's kubeconfig as a value.
fn kubeconfig(subject: &Subject) -> Value {
    let path = subject.server.as_ref().unwrap().kubeconfig("gateway-token");
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn write(path: &Path, config: &Value) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, config.to_string()).unwrap();
}

/// The same configuration where another context is the current one, which leads nowhere.
fn with_two_contexts(mut config: Value) -> Value {
    config["clusters"]
        .as_array_mut()
        .unwrap()
        .push(json!({ "name": "away", "cluster": { "server": "https://127.0.0.1:1" } }));
    config["contexts"]
        .as_array_mut()
        .unwrap()
        .push(json!({ "name": "away", "context": { "cluster": "away", "user": "user" } }));
    config["current-context"] = json!("away");
    config
}

#[test]
fn a_context_is_chosen_by_name() {
    let subject = subject();
    let path = subject.directory().join("two.kubeconfig");
    write(&path, &with_two_contexts(kubeconfig(&subject)));
    let link = |context: Option<&str>| {
        Link::new(Access { kubeconfig: Some(path.clone()), context: context.map(str::to_owned) })
    };
    Observer::with(&subject, link(Some("test")), TIMING).converge(&subject);
    let away = Observer::with(&subject, link(None), TIMING);
    away.wait_problem(|problem| {
        problem.what.contains("127.0.0.1:1") && problem.what.contains("cannot be reached")
    });
    let unknown = Observer::with(&subject, link(Some("other")), TIMING);
    unknown
        .wait_problem(|problem| problem.what.contains("other") && problem.remedy.contains("source.context"));
}

/// What `gateway check` says about the source, with nothing but this in its environment.
fn check(directory: &Path, keys: &str, environment: &[(&str, &str)], inside: Option<&str>) -> String {
    let config = directory.join("gateway.toml");
    let text = format!(
        r#"
[source]
kind = "kubernetes"
{keys}
[[interface]]
name = "lo"
roles = ["underlay", "external"]
[[overlay]]
name = "flannel"
local = "198.19.255.254"
mac = "0e:ff:00:00:00:01"
subnet = "198.18.255.0/24"
annotation_prefix = "{PREFIX}"
"#
    );
    fs::write(&config, text).unwrap();
    let program = program().unwrap();
    let words = [program.to_str().unwrap(), "check", "--config", config.to_str().unwrap()];
    let mut command = match inside {
        None => Command::new(words[0]),
        Some(preparation) => {
            // A mount namespace of its own, for files that lie where they must.
            let mut command = Command::new("unshare");
            if !geteuid().is_root() {
                command.args(["--user", "--map-root-user"]);
            }
            command
                .args(["--mount", "sh", "-ec", &format!("{preparation}\nexec \"$@\""), "sh"])
                .arg(words[0]);
            command
        }
    };
    command.args(&words[1..]).env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    let output = command.envs(environment.iter().copied()).output().unwrap();
    String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
}

const FOUND: &str = "ok    kubernetes (kubeconfig of the environment): VTEPs: 1";

#[test]
fn the_environment_names_kubeconfigs() {
    let subject = subject();
    let directory = tempfile::tempdir().unwrap();
    let (whole, home) = (directory.path().join("whole"), directory.path().join("home"));
    let config = kubeconfig(&subject);
    write(&whole, &config);
    let whole = whole.to_str().unwrap();
    let told = check(directory.path(), "", &[("KUBECONFIG", whole)], None);
    assert!(told.contains(FOUND), "{told}");

    // Several files are one; the first that has something counts, and one that is absent does not matter.
    let (users, clusters) = (directory.path().join("users"), directory.path().join("clusters"));
    write(&users, &json!({ "apiVersion": "v1", "kind": "Config", "users": config["users"] }));
    let mut rest = config.clone();
    rest["users"] = json!([]);
    write(&clusters, &rest);
    let list = format!("{}:{}", users.display(), clusters.display());
    let told = check(directory.path(), "", &[("KUBECONFIG", &list)], None);
    assert!(told.contains(FOUND), "{told}");

    // Without the variable it is the one at home.
    write(&home.join(".kube/config"), &with_two_contexts(config));
    let home = home.to_str().unwrap();
    let told = check(directory.path(), "context = \"test\"", &[("HOME", home)], None);
    assert!(
        told.contains("ok    kubernetes (kubeconfig of the environment, context test): VTEPs: 1"),
        "{told}"
    );
    // The configuration goes before the environment.
    let keys = format!("kubeconfig = \"{whole}\"");
    let told = check(directory.path(), &keys, &[("HOME", home), ("KUBECONFIG", "/nonexistent")], None);
    assert!(told.contains(&format!("ok    kubernetes ({whole}): VTEPs: 1")), "{told}");
    let told = check(directory.path(), "", &[("KUBECONFIG", "/nonexistent")], None);
    assert!(told.contains("/nonexistent") && told.contains("FAIL"), "{told}");
    let nobody = directory.path().to_str().unwrap();
    let told = check(directory.path(), "", &[("HOME", nobody)], None);
    assert!(told.contains("there is no kubeconfig") && told.contains("no pod of the cluster"), "{told}");
}

/// In a pod the service account and two variables are all there is.
#[test]
fn a_pod_of_the_cluster_needs_no_kubeconfig() {
    let subject = subject();
    let directory = tempfile::tempdir().unwrap();
    let server = subject.server.as_ref().unwrap();
    let account = "/run/secrets/kubernetes.io/serviceaccount";
    let source = subject.directory();
    let files = directory.path().join("files");
    fs::create_dir(&files).unwrap();
    fs::copy(source.join("ca.pem"), files.join("ca.crt")).unwrap();
    fs::copy(source.join("gateway.token"), files.join("token")).unwrap();
    fs::write(files.join("namespace"), "kube-system").unwrap();
    let preparation = format!(
        "mount -t tmpfs none /run\nmkdir -p {account}\ncp {0}/ca.crt {0}/token {0}/namespace {account}",
        files.display()
    );
    let port = server.address().port().to_string();
    let environment = [
        ("HOME", directory.path().to_str().unwrap()),
        ("KUBERNETES_SERVICE_HOST", "127.0.0.1"),
        ("KUBERNETES_SERVICE_PORT", &port),
    ];
    let told = check(directory.path(), "", &environment, Some(&preparation));
    assert!(told.contains(FOUND), "{told}");
}

/// A proxy that knows CONNECT alone; counts its connections.
fn proxy() -> (u16, Arc<AtomicUsize>) {
    let listener = RUNTIME.block_on(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))).unwrap();
    let port = listener.local_addr().unwrap().port();
    let count = Arc::new(AtomicUsize::new(0));
    let counter = count.clone();
    RUNTIME.spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let counter = counter.clone();
            tokio::spawn(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    head.push(client.read_u8().await.unwrap());
                }
                let head = String::from_utf8(head).unwrap();
                let target = head.strip_prefix("CONNECT ").unwrap().split(' ').next().unwrap();
                let mut server = TcpStream::connect(target).await.unwrap();
                client.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
                counter.fetch_add(1, Ordering::Relaxed);
                // However it ends, it ends.
                let _ = copy_bidirectional(&mut client, &mut server).await;
            });
        }
    });
    (port, count)
}

#[test]
fn a_proxy_is_used() {
    let subject = subject();
    let (port, count) = proxy();
    let url = format!("http://127.0.0.1:{port}");
    let mut config = kubeconfig(&subject);
    config["clusters"][0]["cluster"]["proxy-url"] = json!(url);
    let path: PathBuf = subject.directory().join("proxy.kubeconfig");
    write(&path, &config);
    let link = Link::new(Access { kubeconfig: Some(path), context: None });
    Observer::with(&subject, link, TIMING).converge(&subject);
    assert!(count.load(Ordering::Relaxed) > 0);

    // By the environment, and not for those whom it exempts.
    let directory = tempfile::tempdir().unwrap();
    let server = subject.server.as_ref().unwrap().kubeconfig("gateway");
    let kubeconfig = ("KUBECONFIG", server.to_str().unwrap());
    let before = count.load(Ordering::Relaxed);
    let told = check(directory.path(), "", &[kubeconfig, ("HTTPS_PROXY", &url)], None);
    assert!(told.contains(FOUND), "{told}");
    let with_proxy = count.load(Ordering::Relaxed);
    assert!(with_proxy > before);
    let exempt = [kubeconfig, ("HTTPS_PROXY", url.as_str()), ("NO_PROXY", "127.0.0.1")];
    let told = check(directory.path(), "", &exempt, None);
    assert!(told.contains(FOUND), "{told}");
    assert_eq!(count.load(Ordering::Relaxed), with_proxy);
}
