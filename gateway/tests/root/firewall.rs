//! The firewall's table, looked at with nft.

use std::{collections::BTreeMap, net::Ipv4Addr, path::Path, time::Duration};

use gateway::{
    config::{Config, SnatAction, SnatRule, SourceCheck},
    kernel::{
        firewall::{self, Firewall, Goal},
        host::Host,
        netlink,
        sysctl::{self, Settings},
    },
};

use crate::sandbox::{config, isolated, sh};

const TABLE: &str = "inet gateway_test";

fn goal(underlay: &[&str], nodes: &[u8]) -> Goal {
    let local = Ipv4Addr::new(172, 16, 2, 200);
    Goal {
        underlay: underlay.iter().map(|&name| name.to_owned()).collect(),
        nodes: Some(nodes.iter().map(|last| (local, 8472, Ipv4Addr::new(172, 16, 2, *last))).collect()),
        partial: false,
    }
}

fn list() -> String {
    sh(&format!("nft list table {TABLE}"))
}

/// The list without what the kernel counts.
fn rules() -> Vec<String> {
    let text = sh("nft list ruleset");
    text.lines().filter(|line| !line.contains("packets")).map(str::to_owned).collect()
}

#[test]
fn the_table_is_made_and_follows_the_goal() {
    isolated(async |directory: &Path| {
        let mut firewall = Firewall::new(&config(directory));
        firewall.repair(&goal(&["und"], &[11, 12])).await.unwrap();
        let text = list();
        for line in [
            "type filter hook input priority filter - 10; policy accept;",
            "type filter hook forward priority filter - 10; policy accept;",
            "udp dport 8472 jump tunnel",
            "iifname @underlay ip daddr . udp dport . ip saddr @nodes accept",
            "counter name \"tunnel_refused\" drop",
            "oifname \"gw-flannel\" ip saddr != 10.244.30.0/24 counter name \"client_foreign\" drop",
            "172.16.2.200 . 8472 . 172.16.2.11",
        ] {
            assert!(text.contains(line), "{line} in {text}");
        }
        let before = list();
        firewall.repair(&goal(&["und"], &[11, 12])).await.unwrap();
        assert_eq!(list(), before);

        // While nodes are not known, those of an earlier run stay; interfaces are known at once.
        let mut restarted = Firewall::new(&config(directory));
        restarted.repair(&Goal { nodes: None, ..goal(&["und", "und2"], &[]) }).await.unwrap();
        let text = list();
        assert!(text.contains("\"und2\"") && text.contains("172.16.2.12"), "{text}");

        restarted.update(&goal(&["und"], &[12, 13])).await.unwrap();
        let text = list();
        assert!(!text.contains("172.16.2.11") && !text.contains("und2"), "{text}");
        assert!(text.contains("172.16.2.12") && text.contains("172.16.2.13"), "{text}");

        assert!(firewall::remove("test").await.unwrap());
        assert_eq!(sh("nft list tables"), "");
        assert!(!firewall::remove("test").await.unwrap());
    });
}

/// A change of the cluster touches the elements that changed, and nothing else.
#[test]
fn right_elements_are_never_touched() {
    isolated(async |directory: &Path| {
        let mut firewall = Firewall::new(&config(directory));
        firewall.repair(&goal(&["und"], &[11, 12])).await.unwrap();
        let log = directory.join("monitor");
        let mut monitor = std::process::Command::new("nft")
            .args(["monitor"])
            .stdout(std::fs::File::create(&log).unwrap())
            .spawn()
            .unwrap();
        tokio::time::sleep(Duration::from_millis(300)).await;
        firewall.update(&goal(&["und"], &[12, 13])).await.unwrap();
        // Somebody's rule in between: chains are written anew, elements are not.
        sh(&format!("nft add rule {TABLE} input accept"));
        firewall.repair(&goal(&["und"], &[12, 13])).await.unwrap();
        tokio::time::sleep(Duration::from_millis(300)).await;
        monitor.kill().unwrap();
        monitor.wait().unwrap();
        let seen = std::fs::read_to_string(&log).unwrap();
        let elements: Vec<&str> =
            seen.lines().filter(|line| line.contains("element") && line.contains("nodes")).collect();
        assert_eq!(elements.len(), 2, "{seen}");
        assert!(elements[0].starts_with("add element") && elements[0].contains("172.16.2.13"), "{seen}");
        assert!(elements[1].starts_with("delete element") && elements[1].contains("172.16.2.11"), "{seen}");
    });
}

#[test]
fn whatever_somebody_does_to_the_table_is_repaired() {
    isolated(async |directory: &Path| {
        let mut firewall = Firewall::new(&config(directory));
        let goal = goal(&["und"], &[11, 12]);
        firewall.repair(&goal).await.unwrap();
        let right = rules();
        let element = "{ 172.16.2.200 . 8472 . 172.16.2.66 }";
        let wrongs = [
            format!("nft delete table {TABLE}"),
            format!("nft flush table {TABLE}"),
            format!("nft flush chain {TABLE} tunnel"),
            format!("nft insert rule {TABLE} tunnel accept"),
            format!("nft flush set {TABLE} nodes"),
            format!("nft add element {TABLE} nodes '{element}'"),
            format!("nft add element {TABLE} underlay '{{ ext }}'"),
            format!("nft add element {TABLE} open '{{ 172.16.2.200 . 8472 }}'"),
            format!("nft add chain {TABLE} other '{{ type filter hook input priority -20; }}'"),
            format!("nft add chain {TABLE} input '{{ policy drop; }}'"),
            format!("nft add set {TABLE} strange '{{ type ipv4_addr; }}'"),
            format!(
                "nft delete table {TABLE}; nft add table {TABLE}; nft add set {TABLE} nodes '{{ type ipv4_addr; }}'"
            ),
        ];
        for wrong in wrongs {
            sh(&wrong);
            assert_ne!(rules(), right, "{wrong}");
            firewall.repair(&goal).await.unwrap_or_else(|error| panic!("{wrong}: {error}"));
            assert_eq!(rules(), right, "{wrong}");
        }
    });
}

#[test]
fn other_tables_are_left_alone_and_not_listened_to() {
    isolated(async |directory: &Path| {
        sh("nft add table inet gateway_test2; nft add table inet mine");
        let mut events = firewall::watch::watch(&firewall::table_name("test")).unwrap();
        Firewall::new(&config(directory)).repair(&goal(&["und"], &[])).await.unwrap();
        let soon = Duration::from_secs(2);
        tokio::time::timeout(soon, events.recv()).await.expect("an event of our own change");
        // What is left of that change.
        while tokio::time::timeout(Duration::from_millis(600), events.recv()).await.is_ok() {}
        sh("nft add chain inet gateway_test2 c; nft add chain inet mine c");
        assert!(tokio::time::timeout(Duration::from_millis(600), events.recv()).await.is_err());
        sh(&format!("nft flush chain {TABLE} tunnel"));
        tokio::time::timeout(soon, events.recv()).await.expect("an event");
        firewall::remove("test").await.unwrap();
        assert!(sh("nft list tables").contains("table inet mine"));
    });
}

#[test]
fn an_overlay_without_source_checks_is_open_on_its_underlay() {
    isolated(async |directory: &Path| {
        let mut config = config(directory);
        config.overlays[0].source_check = SourceCheck::Off;
        Firewall::new(&config).repair(&goal(&["und"], &[11])).await.unwrap();
        let text = list();
        assert!(text.contains("elements = { 172.16.2.200 . 8472 }"), "{text}");
        // Checks again after a restart with another configuration.
        config.overlays[0].source_check = SourceCheck::Node;
        Firewall::new(&config).repair(&goal(&["und"], &[11])).await.unwrap();
        let text = list();
        assert!(!text.contains("elements = { 172.16.2.200 . 8472 }"), "{text}");
    });
}

#[test]
fn a_probe_changes_nothing() {
    isolated(async |directory: &Path| {
        let host = Host::read(&netlink::connect().unwrap()).await.unwrap();
        let version = firewall::probe(&config(directory), &host).await.unwrap();
        assert!(version.starts_with("nftables"), "{version}");
        assert_eq!(sh("nft list tables"), "");
    });
}

fn value(key: &str) -> String {
    std::fs::read_to_string(Path::new("/proc/sys/net/ipv4").join(key)).unwrap().trim().to_owned()
}

async fn settings_of(config: &Config) -> BTreeMap<String, String> {
    let host = Host::read(&netlink::connect().unwrap()).await.unwrap();
    let mut settings = Settings::open(&config.instance).unwrap();
    let (done, errors) = settings.apply(config, &host);
    assert!(errors.is_empty(), "{errors:?}");
    assert_eq!(sysctl::deviations(config, &host), []);
    done.into_iter()
        .map(|(key, change)| (key.to_string(), format!("{} {}", change.old, change.new)))
        .collect()
}

/// Set, remembered over a restart, and put back unless somebody else meant something else.
#[test]
fn settings_are_set_and_restored() {
    isolated(async |directory: &Path| {
        sh("ip link add ext type veth peer name e; ip link add und type veth peer name u
            sysctl -qw net.ipv4.ip_forward=0");
        let mut config = config(directory);
        config.instance = format!("test-{}", std::process::id());
        std::fs::create_dir_all(format!("/run/gateway/{}", config.instance)).unwrap();
        let done = settings_of(&config).await;
        let expected =
            ["ext", "und"].map(|name| (format!("net.ipv4.conf.{name}.forwarding"), "0 1".to_owned()));
        assert_eq!(done, expected.into());
        assert_eq!(value("ip_forward"), "0", "is nobody's business here");
        assert!(settings_of(&config).await.is_empty(), "nothing to do twice");

        // A switch to the kernel alone, then somebody who knows better, and one that undoes ours.
        config.datapath.xdp_mode = gateway::config::XdpMode::Off;
        let done = settings_of(&config).await;
        assert_eq!(
            done.keys().map(String::as_str).collect::<Vec<_>>(),
            ["net.ipv4.conf.ext.proxy_arp", "net.ipv4.neigh.ext.proxy_delay"]
        );
        sh("sysctl -qw net.ipv4.conf.und.forwarding=0");
        assert_eq!(settings_of(&config).await.len(), 1);
        let delay = value("neigh/e/proxy_delay");
        sh("sysctl -qw net.ipv4.neigh.ext.proxy_delay=20");
        let restored = Settings::open(&config.instance).unwrap().restore().unwrap();
        assert_eq!(restored.len(), 3, "{restored:?}");
        let now =
            ["conf/ext/forwarding", "conf/und/forwarding", "conf/ext/proxy_arp", "neigh/ext/proxy_delay"];
        assert_eq!(now.map(value), ["0", "0", "0", "20"]);
        assert_ne!(delay, "0", "the kernel's default is another than what is set");
        assert!(Settings::open(&config.instance).unwrap().changed().is_empty());
        std::fs::remove_dir(format!("/run/gateway/{}", config.instance)).unwrap();
    });
}

/// The kernel forwards what a rule routes, and nothing that an earlier rule translates.
#[test]
fn routed_clients_are_admitted_in_the_order_of_the_rules() {
    isolated(async |directory: &Path| {
        let mut config = config(directory);
        let rule = |clients: &str, destinations: &str, action| SnatRule {
            clients: clients.parse().unwrap(),
            destinations: destinations.parse().unwrap(),
            action,
        };
        let default = config.snat.rules.remove(0);
        config.snat.rules = vec![
            rule("192.0.2.0/25", "0.0.0.0/0", default.action),
            rule("192.0.2.0/24", "10.244.1.0/24", SnatAction::Route),
            rule("198.51.100.7/32", "0.0.0.0/0", default.action),
            default,
        ];
        Firewall::new(&config).repair(&goal(&["und"], &[])).await.unwrap();
        let text = list();
        let foreign = "oifname \"gw-flannel\" ip saddr != 10.244.30.0/24";
        let forward: Vec<&str> =
            text.lines().map(str::trim).filter(|line| line.starts_with("oifname \"gw-flannel\"")).collect();
        assert_eq!(
            forward,
            [
                format!("{foreign} ip saddr 192.0.2.0/25 counter name \"client_foreign\" drop"),
                format!("{foreign} ip saddr 192.0.2.0/24 ip daddr 10.244.1.0/24 accept"),
                format!("{foreign} counter name \"client_foreign\" drop"),
            ]
        );
        // Written again, it is the same.
        Firewall::new(&config).repair(&goal(&["und"], &[])).await.unwrap();
        assert_eq!(list(), text);
    });
}
