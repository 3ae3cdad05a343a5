//! The configuration file as a person meets it.

use gateway_common::abi::{Timeouts, ticks};
use proptest::prelude::*;
use rstest::rstest;

use super::*;
use crate::cluster::{
    announce::Announcement,
    flannel::{NodeReading, NodeSkip, read_node},
};

/// The documented sample that is installed.
const SAMPLE: &str = include_str!("../../gateway.toml");

const MINIMAL: &str = r#"
[source]
kind = "files"
path = "/m"
[[interface]]
name = "eth0"
roles = ["external", "underlay"]
[[overlay]]
name = "flannel"
local = "172.16.2.200"
mac = "0e:11:22:33:44:55"
subnet = "10.244.30.0/24"
"#;

fn parse(text: &str) -> Result<Config, Problems> {
    Config::parse(text, "gateway.toml", &Overrides::default())
}

/// Line, key and text of each problem.
fn problems(text: &str) -> Vec<(usize, String, String)> {
    match parse(text) {
        Ok(config) => panic!("accepted: {config:?}"),
        Err(problems) => problems.0.into_iter().map(|p| (p.line, p.key.clone(), p.to_string())).collect(),
    }
}

#[test]
fn the_sample_is_valid_and_means_what_it_says() {
    let config = parse(SAMPLE).unwrap();
    assert_eq!(
        config,
        Config {
            instance: "default".into(),
            source: Source::Files { path: "/etc/gateway/manifests".into() },
            interfaces: vec![
                Interface { name: "eth0".into(), vlan: None, roles: Roles::EXTERNAL },
                Interface { name: "eth1".into(), vlan: None, roles: Roles::UNDERLAY },
            ],
            overlays: vec![Overlay {
                name: "flannel".into(),
                vni: Vni::new(1).unwrap(),
                port: 8472,
                local: Ipv4Addr::new(172, 16, 2, 200),
                mac: Mac::new([0x0e, 0x11, 0x22, 0x33, 0x44, 0x55]),
                subnet: "10.244.30.0/24".parse().unwrap(),
                address: Ipv4Addr::new(10, 244, 30, 0),
                network: None,
                direct_routing: false,
                source_check: SourceCheck::Node,
                extra_sources: vec![],
                dont_fragment: DontFragment::Unset,
                ttl: 64,
                dscp: 0,
                allow_gbp: false,
                mss_clamp: true,
                annotation_prefix: "flannel.alpha.coreos.com/".into(),
            }],
            snat: Snat {
                pools: vec![SnatPool {
                    name: "automap".into(),
                    addresses: vec![Ipv4Addr::new(10, 244, 30, 254)],
                }],
                rules: vec![SnatRule {
                    clients: "0.0.0.0/0".parse().unwrap(),
                    destinations: "0.0.0.0/0".parse().unwrap(),
                    action: SnatAction::Pool(0),
                }],
                timeouts: Timeouts::DEFAULT,
                max_sessions: 262_144,
            },
            datapath: Datapath {
                xdp_mode: XdpMode::Driver,
                log: DatapathLog::Off,
                bpffs: "/sys/fs/bpf".into(),
                max_pods: 262_144,
                max_prefixes: 16_384,
                max_vteps: 8_192,
                max_sources: 32_768,
            },
            flannel: FlannelSettings { register: false, heartbeat: false, node: "gateway".into() },
            host: HostSettings { manage_sysctl: true },
            metrics: MetricsSettings { listen: None },
        }
    );
}

/// Without the program nobody is there to do what these keys ask for.
#[test]
fn off_refuses_what_only_the_program_can_do() {
    let keys = "df = \"set\"\nttl = 9\ndscp = 8\nallow_gbp = true\n";
    let off = format!("{MINIMAL}{keys}[datapath]\nxdp_mode = \"off\"\n[snat]\nmode = \"none\"\n");
    let found: Vec<String> = problems(&off).into_iter().map(|(_, key, _)| key).collect();
    assert_eq!(found, ["df", "ttl", "dscp", "allow_gbp"].map(|key| format!("overlay[0].{key}")));
    let off = off.replace(keys, "");
    parse(&off).unwrap();
    // Translation is the program's, also where it is not asked for by name.
    for translating in [off.replace("[snat]\nmode = \"none\"\n", ""), off.replace("none", "automap")] {
        let found = problems(&translating);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].1 == "snat.mode" && found[0].2.contains("mode = \"none\""), "{found:?}");
    }
    parse(&off.replace("\"off\"", "\"driver\"")).unwrap();
}

/// Every commented key of the sample is a key, and shows the default: writing it out changes nothing.
#[test]
fn the_sample_documents_the_defaults() {
    let written_out: String = SAMPLE
        .lines()
        .map(|line| match line.strip_prefix('#') {
            Some(key) if key.starts_with(|c: char| c.is_ascii_lowercase()) && key.contains(" = ") => key,
            _ => line,
        })
        .flat_map(|line| [line, "\n"])
        .collect();
    let mut expected = parse(SAMPLE).unwrap();
    // The keys of which the sample says that they have no default.
    expected.interfaces[1].vlan = Some(100);
    expected.overlays[0].network = Some("10.244.0.0/16".parse().unwrap());
    expected.metrics.listen = Some("127.0.0.1:9472".parse().unwrap());
    assert_eq!(parse(&written_out).unwrap(), expected);
}

#[test]
fn everything_is_reported_at_once() {
    let text = r#"instanc = "a"
colour = true
[source]
kind = "etcd"
path = 5
[[interface]]
name = "a-name-that-is-too-long"
roles = ["underlay", "inside"]
vlan = 4095
[[interface]]
name = "eth1"
roles = []
[[overlay]]
name = "Flannel"
vni = 16777216
port = 0
local = "172.16.2.200/24"
mac = "01:00:5e:00:00:01"
subnet = "10.244.30.1/24"
ttl = 0
dscp = 64
df = "maybe"
source_check = "no"
direct_routing = "yes"
extra_sources = [{ node = "n1", adress = "10.0.0.1" }]
[datapath]
max_pods = -1
bpffs = "relative"
"#;
    let found = problems(text);
    let places: Vec<(usize, &str)> = found.iter().map(|(line, key, _)| (*line, key.as_str())).collect();
    assert_eq!(
        places,
        [
            (1, "instanc"),
            (2, "colour"),
            (4, "source.kind"),
            (5, "source.path"),
            (7, "interface[0].name"),
            (8, "interface[0].roles[1]"),
            (9, "interface[0].vlan"),
            (12, "interface[1].roles"),
            (14, "overlay[0].name"),
            (15, "overlay[0].vni"),
            (16, "overlay[0].port"),
            (17, "overlay[0].local"),
            (18, "overlay[0].mac"),
            (19, "overlay[0].subnet"),
            (20, "overlay[0].ttl"),
            (21, "overlay[0].dscp"),
            (22, "overlay[0].df"),
            (23, "overlay[0].source_check"),
            (24, "overlay[0].direct_routing"),
            (25, "overlay[0].extra_sources[0].address"),
            (25, "overlay[0].extra_sources[0].adress"),
            (27, "datapath.max_pods"),
            (28, "datapath.bpffs"),
        ],
        "{found:#?}"
    );
    assert_eq!(
        found[0].2,
        "gateway.toml:1:1: instanc: is no key of the configuration; did you mean \"instance\"?"
    );
    assert!(found[13].2.contains("the network is 10.244.30.0/24"), "{}", found[13].2);
}

/// Each change of the minimal configuration, and a part of the one problem that it must cause.
#[rstest]
#[case::no_interface(
    "[[interface]]\nname = \"eth0\"\nroles = [\"external\", \"underlay\"]\n",
    "",
    "no interface has the role \"underlay\""
)]
#[case::no_external("\"external\", ", "", "no interface has the role \"external\"")]
#[case::no_overlay_key("mac = \"0e:11:22:33:44:55\"\n", "", "overlay[0].mac: is missing")]
#[case::no_source("[source]\nkind = \"files\"\n", "[source]\n", "source.kind: is missing")]
#[case::table_for_array("[[overlay]]", "[overlay]", "overlay: is a table")]
#[case::same_interface(
    "[[overlay]]",
    "[[interface]]\nname = \"eth0\"\nroles = [\"external\"]\n[[overlay]]",
    "untagged frames already"
)]
#[case::address_outside(
    "ttl",
    "address = \"10.244.31.1\"",
    "no address of a host in the subnet 10.244.30.0/24"
)]
#[case::address_broadcast("ttl", "address = \"10.244.30.255\"", "no address of a host")]
#[case::network_elsewhere("ttl", "network = \"10.245.0.0/16\"", "outside of network 10.245.0.0/16")]
#[case::local_inside("172.16.2.200", "10.244.30.1", "in the overlay's subnet")]
#[case::local_multicast("172.16.2.200", "224.0.0.1", "is 224.0.0.1; write the IPv4 address of a host")]
#[case::local_loopback("172.16.2.200", "127.0.0.1", "is 127.0.0.1")]
#[case::zero_mac("0e:11:22:33:44:55", "00:00:00:00:00:00", "zero or a group address")]
#[case::prefix_too_short("10.244.30.0/24", "0.0.0.0/0", "overlay[0].subnet: is 0.0.0.0/0")]
#[case::instance("[source]", "instance = \"../x\"\n[source]", "instance: is \"../x\"")]
#[case::annotation_prefix("ttl", "annotation_prefix = \"flannel.alpha.coreos.com\"", "/ or - at the end")]
#[case::extra_twice(
    "ttl",
    "extra_sources = [{node=\"a\",address=\"10.0.0.1\"},{node=\"b\",address=\"10.0.0.1\"}]",
    "given to node a already"
)]
#[case::extra_ourselves(
    "ttl",
    "extra_sources = [{node=\"a\",address=\"172.16.2.200\"}]",
    "the gateway's own address"
)]
#[case::hexadecimal_vni_too_large("ttl", "vni = 0x1000000", "is the number 0x1000000")]
#[case::number_beyond_64_bits("ttl", "vni = 99999999999999999999", "99999999999999999999")]
#[case::metrics_nowhere(
    "ttl",
    "[metrics]\nlisten = \"9472\"",
    "is \"9472\"; write an address of this host and a port"
)]
#[case::metrics_anywhere("ttl", "[metrics]\nlisten = \"127.0.0.1:0\"", "is \"127.0.0.1:0\"")]
fn what_is_wrong_is_said(#[case] from: &str, #[case] to: &str, #[case] expected: &str) {
    // A key to add stands for the end of the overlay's table.
    let text = if from == "ttl" { format!("{MINIMAL}{to}\n") } else { MINIMAL.replacen(from, to, 1) };
    assert_ne!(text, MINIMAL);
    let found = problems(&text);
    assert!(found.iter().any(|(_, _, text)| text.contains(expected)), "{found:#?}");
    assert!(found.len() == 1 || from.contains("[[interface]]"), "{found:#?}");
}

#[rstest]
#[case::vni_zero("vni = 0")]
#[case::vni_largest("vni = 0xffffff")]
#[case::site_prefix("annotation_prefix = \"example.org/site-\"")]
#[case::foreign_mac_kind("network = \"10.244.0.0/16\"")]
#[case::address_of_the_network("address = \"10.244.30.0\"")]
fn what_is_right_is_accepted(#[case] line: &str) {
    parse(&format!("{MINIMAL}{line}\n")).unwrap();
}

#[test]
fn overlays_are_compared() {
    let second = r#"
[[overlay]]
name = "flannel"
local = "172.16.2.200"
mac = "0e:11:22:33:44:56"
subnet = "10.244.0.0/16"
"#;
    let found = problems(&format!("{MINIMAL}{second}"));
    let keys: Vec<&str> = found.iter().map(|(_, key, _)| key.as_str()).collect();
    for key in ["overlay[1].name", "overlay[1].subnet", "overlay[1].vni", "overlay[1].annotation_prefix"] {
        assert!(keys.contains(&key), "{key} not in {found:#?}");
    }
    assert_eq!(found.len(), 4);
}

#[test]
fn capacities_of_the_program_are_kept() {
    let overlay = |i: usize| {
        format!(
            "[[overlay]]\nname = \"o{i}\"\nlocal = \"172.16.2.200\"\nmac = \"0e:11:22:33:44:55\"\nsubnet = \"10.{i}.0.0/16\"\nvni = {i}\nannotation_prefix = \"o{i}.example/\"\n"
        )
    };
    let vlan = |i: usize| format!("[[interface]]\nname = \"eth0\"\nvlan = {i}\nroles = [\"external\"]\n");
    let base = MINIMAL.split("[[overlay]]").next().unwrap().to_owned();
    let text = |overlays: usize, vlans: usize| {
        base.clone()
            + &(1..=vlans).map(vlan).collect::<String>()
            + &(1..=overlays).map(overlay).collect::<String>()
    };
    parse(&text(4, 8)).unwrap();
    let found = problems(&text(5, 9));
    assert_eq!(found.len(), 2, "{found:#?}");
    assert!(found[0].2.contains("more than 8 VLANs"), "{found:#?}");
    assert!(found[1].2.contains("there are 5 overlays"), "{found:#?}");
}

#[test]
fn errors_of_syntax_come_with_those_of_meaning() {
    let found = problems(
        &MINIMAL.replace("path = \"/m\"", "path = ").replace("[\"external\", \"underlay\"]", "[\"out\"]"),
    );
    let lines: Vec<usize> = found.iter().map(|(line, ..)| *line).collect();
    assert_eq!(lines, [4, 7], "{found:#?}");
}

#[test]
fn overrides_go_before_the_file() {
    let overrides = Overrides {
        instance: Some("lab".into()),
        source_path: Some("/elsewhere".into()),
        xdp_mode: Some(XdpMode::Generic),
        datapath_log: Some(DatapathLog::Debug),
        ..Overrides::default()
    };
    // The file's own path is missing: the override mends that.
    let config = Config::parse(&MINIMAL.replace("path = \"/m\"\n", ""), "f", &overrides).unwrap();
    assert_eq!(config.instance, "lab");
    assert_eq!(config.source, Source::Files { path: "/elsewhere".into() });
    assert_eq!(config.datapath.xdp_mode, XdpMode::Generic);
    assert_eq!(config.datapath.log, DatapathLog::Debug);
}

#[test]
fn command_line_and_file_meet() {
    #[derive(clap::Parser)]
    struct Cli {
        #[command(flatten)]
        options: Options,
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("g.toml");
    fs::write(&path, MINIMAL).unwrap();
    let arguments = ["x", "--config", path.to_str().unwrap(), "--xdp-mode", "generic", "--instance", "two"];
    let cli = <Cli as clap::Parser>::try_parse_from(arguments).unwrap();
    let config = Config::load(&cli.options.location.config, &cli.options.overrides()).unwrap();
    assert_eq!((config.instance.as_str(), config.datapath.xdp_mode), ("two", XdpMode::Generic));

    let wrong = <Cli as clap::Parser>::try_parse_from(["x", "--instance", "a/b"]);
    assert!(wrong.is_err_and(|error| error.to_string().contains("letters, digits")));

    let missing = Config::load(&directory.path().join("none"), &Overrides::default()).unwrap_err();
    assert!(missing.to_string().contains("cannot be read"), "{missing}");
}

proptest! {
    #[test]
    fn any_text_is_answered(text in "\\PC*") {
        if let Err(problems) = parse(&text) {
            prop_assert!(!problems.0.is_empty());
        }
    }

    /// Cuts, repeats and replaces pieces of the sample: what a slip of the editor makes of it.
    #[test]
    fn mutated_samples_are_answered(
        edits in proptest::collection::vec((any::<prop::sample::Index>(), 0..40usize, "[\\[\\]{}\"'=#.,a-z0-9\n-]{0,6}"), 1..6),
    ) {
        let mut text: Vec<char> = SAMPLE.replace("\n#", "\n").chars().collect();
        for (at, length, insert) in edits {
            let start = at.index(text.len() + 1).min(text.len());
            let end = (start + length).min(text.len());
            text.splice(start..end, insert.chars());
        }
        let text: String = text.into_iter().collect();
        let lines = text.lines().count();
        if let Err(problems) = parse(&text) {
            prop_assert!(!problems.0.is_empty());
            for problem in problems.0 {
                prop_assert!((1..=lines + 1).contains(&problem.line), "{problem}");
            }
        }
    }
}

#[test]
fn remedies_are_toml() {
    let nested = problems(&format!("{MINIMAL}extra_sources = 7\n"));
    assert!(nested[0].2.contains("extra_sources = [{ … }]"), "{nested:?}");
    let top = problems("interface = 7\n");
    assert!(top.iter().any(|(_, _, text)| text.contains("[[interface]]")), "{top:?}");
}

/// The README's configuration is valid, and the Node that it makes is what flannel's rules take for that gateway.
#[test]
fn the_readme_is_true() {
    const README: &str = include_str!("../../../README.md");

    let (_, rest) = README.split_once("```toml\n").expect("the README has the block");
    let (block, _) = rest.split_once("```").expect("the block ends");
    let block: Vec<_> = block.lines().map(|line| line.strip_prefix("   ").unwrap_or(line)).collect();
    let config = parse(&block.join("\n")).unwrap();
    let [announcement] = &Announcement::all(&config)[..] else { panic!("one overlay, one Node") };
    let node: k8s_openapi::api::core::v1::Node = serde_json::from_value(announcement.render()).unwrap();
    let reading = read_node(&node, &config.overlays[0]);
    assert!(matches!(reading, NodeReading::Skipped(NodeSkip::Own)), "{reading:?}");
}

const POOLS: &str = r#"
[snat]
mode = "pool"
default_pool = "web"
[[snat.pool]]
name = "web"
addresses = ["10.244.30.16-10.244.30.19", "10.244.30.40"]
[[snat.pool]]
name = "block"
addresses = ["10.244.30.64/28"]
[[snat.rule]]
clients = "192.0.2.0/25"
destinations = "10.244.1.0/24"
pool = "block"
[[snat.rule]]
clients = "198.51.100.0/24"
action = "route"
[snat.timeouts]
udp = 90
"#;

#[test]
fn pools_rules_and_timeouts_are_read() {
    let snat = parse(&format!("{MINIMAL}{POOLS}")).unwrap().snat;
    let pools: Vec<_> = snat.pools.iter().map(|pool| (pool.name.as_str(), pool.addresses.len())).collect();
    assert_eq!(pools, [("web", 5), ("block", 16)]);
    assert_eq!(snat.pools[0].addresses[4], Ipv4Addr::new(10, 244, 30, 40));
    let rules: Vec<_> = snat
        .rules
        .iter()
        .map(|rule| (rule.clients.to_string(), rule.destinations.to_string(), rule.action))
        .collect();
    let any = || "0.0.0.0/0".to_owned();
    assert_eq!(
        rules,
        [
            ("192.0.2.0/25".to_owned(), "10.244.1.0/24".to_owned(), SnatAction::Pool(1)),
            ("198.51.100.0/24".to_owned(), any(), SnatAction::Route),
            (any(), any(), SnatAction::Pool(0)),
        ]
    );
    assert_eq!(snat.timeouts, Timeouts { udp: ticks(90), ..Timeouts::DEFAULT });
    assert!(snat.is_on() && snat.slots() == 262_144);
}

#[test]
fn automap_takes_the_last_address_that_is_free() {
    let address = |text: &str| parse(text).unwrap().snat.pools[0].addresses[0].to_string();
    assert_eq!(address(&format!("{MINIMAL}address = \"10.244.30.254\"\n")), "10.244.30.253");
    assert_eq!(address(&format!("{MINIMAL}[snat]\naddress = \"10.244.30.9\"\n")), "10.244.30.9");
    assert_eq!(address(&MINIMAL.replace("30.0/24", "30.0/31")), "10.244.30.1");
}

/// Each change of the configuration with pools, and a part of the one problem that it must cause.
#[rstest]
#[case::unknown_pool("pool = \"block\"", "pool = \"blok\"", "there is no pool \"blok\"")]
#[case::unknown_default("default_pool = \"web\"", "default_pool = \"wob\"", "there is no pool \"wob\"")]
#[case::several_and_no_default("default_pool = \"web\"\n", "", "there are several")]
#[case::unused("pool = \"block\"", "pool = \"web\"", "nobody uses the pool \"block\"")]
#[case::default_without_pool_mode("mode = \"pool\"", "mode = \"automap\"", "only for mode = \"pool\"")]
#[case::outside("10.244.30.40", "10.244.31.40", "10.244.31.40 is in no overlay's subnet")]
#[case::broadcast("10.244.30.40", "10.244.30.255", "the network or broadcast address")]
#[case::own("10.244.30.40", "10.244.30.0", "the gateway's own address in the overlay")]
#[case::twice("10.244.30.40", "10.244.30.17", "10.244.30.17 is in the pool \"web\" already")]
#[case::overlap("10.244.30.40", "10.244.30.70", "already")]
#[case::backwards("30.16-10.244.30.19", "30.16-10.244.30.15", "ends before it begins")]
#[case::too_large("10.244.30.64/28", "10.244.0.0/16", "which has 65536 addresses (at most 256)")]
#[case::host_bits("10.244.30.64/28", "10.244.30.65/28", "the network is 10.244.30.64/28")]
#[case::empty("[\"10.244.30.64/28\"]", "[]", "is empty")]
#[case::same_name("name = \"block\"", "name = \"web\"", "the name of another pool")]
#[case::reserved_name("block", "automap", "automap is a pool by itself")]
#[case::no_action("pool = \"block\"\n[[snat.rule]]", "[[snat.rule]]", "snat.rule[0].action: is missing")]
#[case::two_actions("action = \"route\"", "action = \"route\"\npool = \"web\"", "write one of the two")]
#[case::shadowed(
    "198.51.100.0/24\"\naction = \"route\"",
    "192.0.2.0/26\"\ndestinations = \"10.244.1.128/25\"\npool = \"web\"",
    "can never match: earlier ones"
)]
#[case::at_home("192.0.2.0/25", "10.244.30.0/25", "clients in 10.244.30.0/25 are always routed")]
#[case::route_everybody("clients = \"198.51.100.0/24\"\n", "", "routes without translation")]
#[case::route_the_subnet("198.51.100.0/24", "10.244.0.0/16", "the gateway's own subnet")]
#[case::timeout("udp = 90", "udp = 0", "seconds, 1 to 2678400")]
#[case::unknown_timeout("udp = 90", "udpp = 90", "did you mean \"udp\"?")]
fn what_is_wrong_with_translation_is_said(#[case] from: &str, #[case] to: &str, #[case] expected: &str) {
    let text = format!("{MINIMAL}{POOLS}");
    let changed = text.replacen(from, to, 1);
    assert_ne!(text, changed);
    let found = problems(&changed);
    assert!(found.iter().any(|(_, _, text)| text.contains(expected)), "{found:#?}");
    assert!(found.len() == 1 || to.contains("name = ") || from == "block", "{found:#?}");
}

#[test]
fn what_several_rules_take_together_is_gone() {
    let rule = |clients: &str| format!("[[snat.rule]]\nclients = \"{clients}\"\naction = \"automap\"\n");
    let halves = rule("192.0.2.0/25") + &rule("192.0.2.128/25");
    parse(&format!("{MINIMAL}{}", rule("192.0.2.0/25") + &rule("192.0.2.0/24"))).unwrap();
    let found = problems(&format!("{MINIMAL}{}", halves + &rule("192.0.2.0/24")));
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!(found[0].1, "snat.rule[2].clients");
}

#[test]
fn automap_needs_room_and_belongs_to_nobody_else() {
    let tight = problems(&MINIMAL.replace("30.0/24", "30.0/32"));
    assert!(tight.len() == 1 && tight[0].2.contains("has no address for clients from outside"), "{tight:?}");
    let pool = "[[snat.pool]]\nname = \"p\"\naddresses = [\"10.244.30.254\"]\n[[snat.rule]]\nclients = \"192.0.2.0/24\"\npool = \"p\"\n";
    let shared = problems(&format!("{MINIMAL}{pool}"));
    assert!(shared.len() == 1 && shared[0].2.contains("automap's address"), "{shared:?}");
    let outside = problems(&format!("{MINIMAL}[snat]\naddress = \"10.9.9.9\"\n"));
    assert!(outside.len() == 1 && outside[0].2.contains("in no overlay's subnet"), "{outside:?}");
    let unused = problems(&format!("{MINIMAL}[snat]\nmode = \"none\"\naddress = \"10.244.30.9\"\n"));
    assert!(unused.len() == 1 && unused[0].2.contains("nobody uses automap"), "{unused:?}");
}

#[test]
fn rules_and_ports_fit_the_program() {
    let rule = |i: usize| format!("[[snat.rule]]\nclients = \"192.0.{i}.0/24\"\naction = \"route\"\n");
    let text = |rules: usize| format!("{MINIMAL}{}", (0..rules).map(rule).collect::<String>());
    parse(&text(31)).unwrap();
    let found = problems(&text(32));
    assert!(found.len() == 1 && found[0].2.contains("there are 33 rules"), "{found:?}");

    let device = |i: usize| format!("[[interface]]\nname = \"eth{i}\"\nroles = [\"external\"]\n");
    let text = |count: usize| format!("{MINIMAL}{}", (1..=count).map(device).collect::<String>());
    parse(&text(15)).unwrap();
    let found = problems(&text(16));
    assert!(found.len() == 1 && found[0].2.contains("device number 17"), "{found:?}");
}

/// The memory in docs/snat.md is what [`snat::session_memory`] says, which a root test compares with the kernel.
#[test]
fn the_document_tells_the_memory() {
    const DOCUMENT: &str = include_str!("../../../docs/snat.md");

    let (_, rest) =
        DOCUMENT.split_once("| `max_sessions` | kernel memory |\n|---|---|\n").expect("the table");
    let number = |text: &str| text.replace(',', "").trim().parse::<u64>().unwrap();
    let rows: Vec<(u64, u64)> = rest
        .lines()
        .map_while(|line| line.strip_prefix("| ")?.strip_suffix(" MiB |")?.split_once(" | "))
        .map(|(sessions, memory)| (number(sessions), number(memory)))
        .collect();
    assert_eq!(rows.len(), 4);
    for (sessions, memory) in rows {
        let bytes = snat::session_memory(u32::try_from(sessions).unwrap());
        assert_eq!(memory, bytes.div_ceil(1 << 20), "{sessions}");
    }
}

/// The defaults in docs/snat.md and their sources are those of the program.
#[test]
fn the_document_tells_the_timeouts() {
    const DOCUMENT: &str = include_str!("../../../docs/snat.md");

    let default = Timeouts::DEFAULT;
    for (key, value) in [
        ("tcp_opening", default.tcp_opening),
        ("tcp_established", default.tcp_established),
        ("tcp_closing", default.tcp_closing),
        ("tcp_reset", default.tcp_reset),
        ("udp_opening", default.udp_opening),
        ("udp", default.udp),
        ("icmp", default.icmp),
    ] {
        let line = DOCUMENT.lines().find(|line| line.starts_with(&format!("| `{key}` | "))).expect(key);
        let seconds: u32 = line.split('|').nth(2).unwrap().trim().parse().unwrap();
        assert_eq!(ticks(seconds), value, "{key}");
    }
}

/// What was chosen stands in for the key; without it everything else is checked all the same.
#[test]
fn a_subnet_may_be_left_to_the_gateway() {
    let open = MINIMAL
        .replace("kind = \"files\"\npath = \"/m\"", "kind = \"kubernetes\"")
        .replace("subnet = \"10.244.30.0/24\"\n", "network = \"10.244.0.0/16\"\n");
    let found = problems(&open);
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].1 == "overlay[0].subnet" && found[0].2.contains("has not chosen one yet"), "{found:?}");

    let with = |text: &str, subnet: &str| {
        let subnets = [("flannel".to_owned(), subnet.parse().unwrap())].into();
        Config::parse(text, "gateway.toml", &Overrides { subnets, ..Overrides::default() })
    };
    let config = with(&open, "10.244.255.0/24").unwrap();
    assert_eq!(config.overlays[0].address, Ipv4Addr::new(10, 244, 255, 0));
    assert_eq!(config.snat.pools[0].addresses, [Ipv4Addr::new(10, 244, 255, 254)]);
    let problems = with(&open, "10.245.0.0/24").unwrap_err();
    assert!(problems.to_string().contains("overlay[0].subnet: 10.245.0.0/24 is outside"), "{problems}");
    let written = open.replace("network =", "subnet = \"10.244.30.0/24\"\nnetwork =");
    let config = with(&written, "10.244.255.0/24").unwrap();
    assert_eq!(config.overlays[0].subnet, "10.244.30.0/24".parse().unwrap(), "the file goes first");
}

/// Addresses in a subnet that nobody knows yet cannot be right.
#[rstest]
#[case::files("", "kind = \"files\"\npath = \"/m\"", "only with kind = \"kubernetes\"")]
#[case::address("address = \"10.244.30.1\"", "kind = \"kubernetes\"", "overlay[0].address: must lie in")]
#[case::automap("[snat]\naddress = \"10.244.30.9\"", "kind = \"kubernetes\"", "snat.address: must lie in")]
#[case::pool(
    "[snat]\nmode = \"pool\"\n[[snat.pool]]\nname = \"a\"\naddresses = [\"10.244.30.9\", \"10.244.30.10-10.244.30.12\"]",
    "kind = \"kubernetes\"",
    "snat.pool[0].addresses[0]: must lie in"
)]
fn an_open_subnet_has_no_addresses_yet(#[case] more: &str, #[case] source: &str, #[case] told: &str) {
    let text = MINIMAL
        .replace("kind = \"files\"\npath = \"/m\"", source)
        .replace("subnet = \"10.244.30.0/24\"", more);
    let found = problems(&text);
    assert!(found.iter().any(|(_, _, text)| text.contains(told)), "{found:#?}");
}
