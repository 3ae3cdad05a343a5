//! `gateway check` on what people get wrong.

use std::{fs, path::Path};

use super::*;
use crate::config::{Config, Overrides};

const CONFIG: &str = r#"
[source]
kind = "files"
path = "PATH"
[[interface]]
name = "lo"
roles = ["external", "underlay"]
[[overlay]]
name = "flannel"
local = "172.16.2.200"
mac = "0e:11:22:33:44:55"
subnet = "10.244.30.0/24"
"#;

fn config(path: &Path) -> Config {
    let text = CONFIG.replace("PATH", path.to_str().unwrap());
    Config::parse(&text, "gateway.toml", &Overrides::default()).unwrap()
}

fn node(name: &str, mac: &str, public_ip: &str, cidr: &str) -> String {
    format!(
        r#"---
apiVersion: v1
kind: Node
metadata:
  name: {name}
  annotations:
    flannel.alpha.coreos.com/kube-subnet-manager: "true"
    flannel.alpha.coreos.com/backend-type: vxlan
    flannel.alpha.coreos.com/backend-data: '{{"VtepMAC":"{mac}"}}'
    flannel.alpha.coreos.com/public-ip: {public_ip}
spec:
  podCIDR: {cidr}
"#
    )
}

#[tokio::test]
async fn manifests_are_planned() {
    let directory = tempfile::tempdir().unwrap();
    let good = node("n1", "0e:00:00:00:00:01", "172.16.2.11", "10.244.1.0/24");
    let twin = node("n2", "0e:00:00:00:00:02", "172.16.2.12", "10.244.1.0/24");
    fs::write(directory.path().join("a.yaml"), format!("{good}{twin}---\nkind: Node\n")).unwrap();
    let findings = source::findings(&config(directory.path()), &Host::default()).await;
    let levels: Vec<Level> = findings.iter().map(|finding| finding.level).collect();
    assert_eq!(levels, [Level::Fail, Level::Fail, Level::Ok, Level::Warn], "{findings:#?}");
    assert!(findings[0].subject.contains("a.yaml, document 3"), "{findings:#?}");
    assert_eq!(findings[1].subject, "a.yaml, document 2, Node n2, spec.podCIDR");
    assert!(findings[1].what.contains("of Node n1 (a.yaml, document 1)"), "{findings:#?}");
    assert_eq!(findings[2].what, "VTEPs: 1, pods: 0, pod CIDRs: 1");
    assert!(findings[3].what.contains("announces this gateway (172.16.2.200, 0e:11:22:33:44:55)"));

    let own = node("gw", "0e:11:22:33:44:55", "172.16.2.200", "10.244.30.0/24");
    fs::write(directory.path().join("a.yaml"), good + &own).unwrap();
    let findings = source::findings(&config(directory.path()), &Host::default()).await;
    assert!(findings.iter().all(|finding| finding.level == Level::Ok), "{findings:#?}");
    assert!(report(&findings).ends_with("ok: 2, warnings: 0, failures: 0"), "{}", report(&findings));
}

#[tokio::test]
async fn a_missing_directory_fails() {
    let findings = source::findings(&config(Path::new("/nonexistent/manifests")), &Host::default()).await;
    assert_eq!(findings.len(), 1);
    assert_eq!(findings[0].level, Level::Fail);
}
