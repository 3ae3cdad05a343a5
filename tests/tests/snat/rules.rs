//! Which clients are translated, and to what.

use std::net::{Ipv4Addr, SocketAddrV4};

use gateway_tests::lab::{
    flannel::{GATEWAY_SUBNET, NIC},
    outside::{AUTOMAP, GUEST, GUESTS, REMOTE, REMOTES},
    traffic::{self, WebServer},
    wait_until,
    wiring::{self, Via},
};

use crate::rig::{ONE, Rig, SOON};

/// Without any configuration clients from outside reach pods; clients of the gateway's subnet are seen as they are.
#[test]
fn any_client_reaches_pods_by_automap() {
    let rig = Rig::start("automap");
    for client in [rig.guest(), rig.lab.remote()] {
        rig.assert_reaches_all(client);
    }
    let server = WebServer::start(rig.pod(1), 80).unwrap();
    let address = ONE.pod_address(1);
    for (client, seen) in [
        (rig.guest(), AUTOMAP.to_string()),
        (rig.lab.remote(), AUTOMAP.to_string()),
        (rig.lab.client(2), rig.lab.client(2).address(NIC).unwrap().to_string()),
    ] {
        let answer = traffic::fetch(client, address, server.port()).unwrap();
        assert!(answer.contains(&format!("you are {seen}\n")), "{}: {answer}", client.name());
    }
    let found = rig.sessions(&["--protocol", "tcp", "--client", &GUEST.to_string()]);
    assert_eq!(found.len(), 1, "{found:?}");
    let session = &found[0];
    assert_eq!(session["snat_address"], AUTOMAP.to_string());
    assert_eq!(session["client_port"], session["snat_port"], "the client's port is kept if it is free");
    assert_eq!(session["state"], "closing", "{session}");
    assert_eq!((&session["node"], &session["interface_name"]), (&"node1".into(), &"ext0".into()));
    // The router's address is the last hop of clients behind it.
    let remote = &rig.sessions(&["--client", &REMOTES.to_string(), "--protocol", "tcp"])[0];
    assert_eq!(remote["client_mac"], rig.lab.named("router").mac(NIC).unwrap().to_string());
    rig.finish();
}

const POOLS: &str = r#"
[snat]
mode = "pool"
default_pool = "rest"
[[snat.pool]]
name = "remotes"
addresses = ["10.244.30.16-10.244.30.17"]
[[snat.pool]]
name = "rest"
addresses = ["10.244.30.40"]
[[snat.rule]]
clients = "198.51.100.0/24"
destinations = "10.244.1.0/24"
pool = "remotes"
"#;

#[test]
fn pools_serve_the_clients_and_pods_of_their_rules() {
    let addresses = [16, 17, 40].map(|last| Ipv4Addr::new(10, 244, 30, last));
    let rig = Rig::configured("pools", POOLS, &addresses);
    for client in [rig.guest(), rig.lab.remote()] {
        rig.assert_reaches_all(client);
    }
    for session in rig.sessions(&["--protocol", "icmp"]) {
        let text = |key: &str| session[key].as_str().unwrap().to_owned();
        let special = REMOTES.contains(&text("client").parse::<Ipv4Addr>().unwrap())
            && text("pod").starts_with("10.244.1.");
        let pool: &[&str] = if special { &["10.244.30.16", "10.244.30.17"] } else { &["10.244.30.40"] };
        assert!(pool.contains(&text("snat_address").as_str()), "{session}");
    }
    rig.finish();
}

/// A rule that routes: pods see the client, if the cluster has a route to it. And the watch of all these tests does see what
/// is not translated.
#[test]
fn routed_clients_are_seen_as_they_are_and_the_watch_is_not_blind() {
    let keys =
        format!("[snat]\nmode = \"none\"\n[[snat.rule]]\nclients = \"{GUESTS}\"\naction = \"route\"\n");
    let mut rig = Rig::configured("routed", &keys, &[GUEST]);
    let watch = rig.take_watch();
    // What makes the guest's network reachable through the gateway on a node, as a route of the administrator's.
    let overlay = GATEWAY_SUBNET.network();
    wiring::route(
        rig.lab.node(ONE).namespace(),
        GUESTS,
        Via::Onlink(gateway_tests::lab::flannel::FLANNEL, overlay),
    )
    .unwrap();
    let server = WebServer::start(rig.pod(1), 80).unwrap();
    let answer = traffic::fetch(rig.guest(), ONE.pod_address(1), server.port()).unwrap();
    assert!(answer.contains(&format!("you are {GUEST}\n")), "{answer}");
    watch.wait_seen(SOON).unwrap();
    // Others are refused, by the program and by the kernel's firewall.
    let before = rig.counters();
    assert!(!traffic::reaches(rig.lab.remote(), ONE.pod_address(1)).unwrap());
    assert!(rig.since(&before, "client_foreign") > 0);
    assert!(rig.sessions(&[]).is_empty());
    // The kernel answers for routed clients, too.
    let hops = rig
        .guest()
        .run(&["traceroute", "-n", "-q", "1", "-w", "1", &ONE.pod_address(1).to_string()])
        .unwrap();
    assert!(hops.lines().any(|line| line.contains("192.0.2.1 ")), "{hops}");
}

#[test]
fn without_translation_clients_from_outside_are_refused() {
    let rig = Rig::configured("none", "[snat]\nmode = \"none\"\n", &[AUTOMAP]);
    let before = rig.counters();
    for client in [rig.guest(), rig.lab.remote()] {
        assert!(!traffic::reaches(client, ONE.pod_address(1)).unwrap());
    }
    assert!(rig.since(&before, "client_foreign") >= 2);
    rig.finish();
}

/// An address that somebody gives to the host is not used any more, and said; it comes back.
#[test]
fn an_address_that_the_kernel_owns_is_not_used() {
    let rig = Rig::start("kernel-local");
    assert!(traffic::reaches(rig.guest(), ONE.pod_address(1)).unwrap());
    rig.host().run(&["ip", "address", "add", "10.244.30.254/32", "dev", "ext0"]).unwrap();
    let told = |expected: bool| {
        wait_until(&format!("the problem is told: {expected}"), SOON, || {
            let output = rig.gateway.output(rig.host(), &["show", "problems"])?;
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            Ok((text.contains("SNAT address 10.244.30.254 is an address of this host (on ext0)") == expected)
                .then_some(()))
        })
        .unwrap();
    };
    told(true);
    let check = rig.gateway.output(rig.host(), &["check"]).unwrap();
    assert!(String::from_utf8_lossy(&check.stdout).contains("10.244.30.254"), "{check:?}");
    let before = rig.counters();
    let refused = rig.guest().connect(SocketAddrV4::new(GUEST, 0), SocketAddrV4::new(ONE.pod_address(1), 81));
    assert!(refused.is_err());
    rig.wait_count(&before, "client_foreign", 1);
    rig.host().run(&["ip", "address", "del", "10.244.30.254/32", "dev", "ext0"]).unwrap();
    told(false);
    assert!(traffic::reaches(rig.guest(), ONE.pod_address(1)).unwrap());
    assert!(traffic::reaches(rig.lab.remote(), ONE.pod_address(1)).unwrap(), "{REMOTE}");
    rig.finish();
}
