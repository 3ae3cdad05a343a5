//! The configuration file as a person meets it.

use proptest::prelude::*;
use rstest::rstest;

use super::*;
use crate::cluster::flannel::{NodeReading, NodeSkip, read_node};

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
        }
    );
}

/// Without the program nobody is there to do what these keys ask for.
#[test]
fn off_refuses_what_only_the_program_can_do() {
    let keys = "df = \"set\"\nttl = 9\ndscp = 8\nallow_gbp = true\n";
    let off = format!("{MINIMAL}{keys}[datapath]\nxdp_mode = \"off\"\n");
    let found: Vec<String> = problems(&off).into_iter().map(|(_, key, _)| key).collect();
    assert_eq!(found, ["df", "ttl", "dscp", "allow_gbp"].map(|key| format!("overlay[0].{key}")));
    parse(&off.replace(keys, "")).unwrap();
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
    // The two keys of which the sample says that they have no default.
    expected.interfaces[1].vlan = Some(100);
    expected.overlays[0].network = Some("10.244.0.0/16".parse().unwrap());
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
    let config = cli.options.load().unwrap();
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

/// The README's configuration is valid, and its Node is what flannel's rules take for the gateway that it configures.
#[test]
fn the_readme_is_true() {
    const README: &str = include_str!("../../../README.md");

    let block = |language: &str| {
        let (_, rest) = README.split_once(&format!("```{language}\n")).expect("the README has the block");
        let (block, _) = rest.split_once("```").expect("the block ends");
        block.lines().map(|line| line.strip_prefix("   ").unwrap_or(line)).collect::<Vec<_>>().join("\n")
    };
    let config = parse(&block("toml")).unwrap();
    let node: k8s_openapi::api::core::v1::Node = serde_saphyr::from_str(&block("yaml")).unwrap();
    let reading = read_node(&node, &config.overlays[0]);
    assert!(matches!(reading, NodeReading::Skipped(NodeSkip::Own)), "{reading:?}");
}
