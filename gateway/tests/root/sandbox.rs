//! Namespaces for a test.

use std::{net::Ipv4Addr, path::Path, process::Command};

use gateway::config::{
    Config, Datapath, DatapathLog, DontFragment, FlannelSettings, HostSettings, Interface, MetricsSettings,
    Overlay, Snat, SnatAction, SnatPool, SnatRule, Source, SourceCheck, XdpMode,
};
use gateway_common::{
    abi::{Roles, Timeouts},
    wire::Vni,
};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};

/// Runs a test on a thread with its own network and mount namespaces and an empty bpffs at the given path.
pub(crate) fn isolated(test: impl AsyncFnOnce(&Path) + Send) {
    let directory = tempfile::tempdir().expect("a temporary directory");
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS)
                .expect("new namespaces (these tests need root)");
            mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
                .expect("private mounts");
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(test(directory.path()));
        });
        if let Err(panic) = thread.join() {
            std::panic::resume_unwind(panic);
        }
    });
}

/// Runs a command of the system in the test's namespaces; its output.
pub(crate) fn sh(line: &str) -> String {
    let output = Command::new("sh").args(["-ec", line]).output().expect("a shell");
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

/// A small gateway with the interfaces `ext` and `und`.
pub(crate) fn config(bpffs: &Path) -> Config {
    let interface = |name: &str, roles| Interface { name: name.to_owned(), vlan: None, roles };
    Config {
        instance: "test".to_owned(),
        source: Source::Files { path: "/nonexistent".into() },
        interfaces: vec![interface("ext", Roles::EXTERNAL), interface("und", Roles::UNDERLAY)],
        overlays: vec![overlay()],
        snat: Snat {
            pools: vec![SnatPool {
                name: "automap".to_owned(),
                addresses: vec![Ipv4Addr::new(10, 244, 30, 254)],
            }],
            rules: vec![SnatRule {
                clients: "0.0.0.0/0".parse().expect("a prefix"),
                destinations: "0.0.0.0/0".parse().expect("a prefix"),
                action: SnatAction::Pool(0),
            }],
            timeouts: Timeouts::DEFAULT,
            max_sessions: 1000,
        },
        datapath: Datapath {
            xdp_mode: XdpMode::Driver,
            log: DatapathLog::Off,
            bpffs: bpffs.to_owned(),
            max_pods: 20_000,
            max_prefixes: 10_000,
            max_vteps: 64,
            max_sources: 1000,
        },
        flannel: FlannelSettings { register: false, heartbeat: false, node: "gateway".into() },
        host: HostSettings { manage_sysctl: true },
        metrics: MetricsSettings { listen: None },
    }
}

/// flannel's defaults.
pub(crate) fn overlay() -> Overlay {
    Overlay {
        name: "flannel".to_owned(),
        vni: Vni::new(1).expect("in range"),
        port: 8472,
        local: Ipv4Addr::new(172, 16, 2, 200),
        mac: "0e:11:22:33:44:55".parse().expect("a MAC address"),
        subnet: "10.244.30.0/24".parse().expect("a subnet"),
        address: Ipv4Addr::new(10, 244, 30, 0),
        network: None,
        direct_routing: false,
        source_check: SourceCheck::Node,
        extra_sources: Vec::new(),
        dont_fragment: DontFragment::Unset,
        ttl: 64,
        dscp: 0,
        allow_gbp: false,
        mss_clamp: true,
        annotation_prefix: "flannel.alpha.coreos.com/".to_owned(),
    }
}
