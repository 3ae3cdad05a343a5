//! The keys of the configuration file, their defaults, and what each of them may be.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
};

use clap::ValueEnum;
use gateway_common::{
    abi::Roles,
    wire::{Mac, Vni},
};
use ipnet::Ipv4Net;
use toml::de::{DeTable, DeValue};

use super::{
    Config, Datapath, DatapathLog, DontFragment, ExtraSource, FlannelSettings, HostSettings, Interface,
    MetricsSettings, Open, OpenOverlay, Overlay, Overrides, Problems, Reading, Source, SourceCheck, Subnets,
    XdpMode,
    reader::{Located, Parse, Report, Section, convert, kind},
    snat, validate,
};
use crate::cluster::kubernetes::Access;

const DEFAULT_INSTANCE: &str = "default";
const DEFAULT_NODE: &str = "gateway";
const DEFAULT_VNI: u32 = 1;
const DEFAULT_PORT: u16 = 8472;
pub(super) const DEFAULT_TTL: u8 = 64;
const DEFAULT_ANNOTATION_PREFIX: &str = "flannel.alpha.coreos.com/";
/// Where the bpffs is by convention.
pub const DEFAULT_BPFFS: &str = "/sys/fs/bpf";
const DEFAULT_MAX_PODS: u32 = 262_144;
const DEFAULT_MAX_PREFIXES: u32 = 16_384;
const DEFAULT_MAX_VTEPS: u32 = 8_192;
const DEFAULT_MAX_SOURCES: u32 = 32_768;
/// Larger tables are a slip of the pen: the largest clusters have 150,000 pods.
const LARGEST_TABLE: u32 = 1 << 24;

/// A key without a default that need not be there.
pub(super) enum Optional<T> {
    Absent,
    Wrong,
    Given(Located<T>),
}

impl<T> Optional<T> {
    /// The value, if there is one that could be read.
    pub(super) fn given(&self) -> Option<&Located<T>> {
        match self {
            Self::Given(found) => Some(found),
            Self::Absent | Self::Wrong => None,
        }
    }

    /// `None` if it is wrong, else what `then` makes of the value or its absence.
    pub(super) fn settle<U>(self, then: impl FnOnce(Option<T>) -> U) -> Option<U> {
        match self {
            Self::Absent => Some(then(None)),
            Self::Wrong => None,
            Self::Given(found) => Some(then(Some(found.value))),
        }
    }
}

/// An interface entry as far as it could be read.
pub(super) struct InterfaceDraft {
    pub(super) name: Option<Located<String>>,
    pub(super) vlan: Optional<u16>,
    pub(super) roles: Option<Located<Roles>>,
}

/// An overlay entry as far as it could be read.
pub(super) struct OverlayDraft {
    pub(super) at: usize,
    pub(super) name: Option<Located<String>>,
    pub(super) vni: Option<Located<Vni>>,
    pub(super) port: Option<Located<u16>>,
    pub(super) local: Option<Located<Ipv4Addr>>,
    pub(super) mac: Option<Located<Mac>>,
    pub(super) subnet: Option<Located<Ipv4Net>>,
    /// Path of the key `subnet`, if choosing it is left to the gateway.
    pub(super) open: Option<String>,
    pub(super) address: Optional<Ipv4Addr>,
    pub(super) network: Optional<Ipv4Net>,
    pub(super) direct_routing: Option<Located<bool>>,
    pub(super) source_check: Option<Located<SourceCheck>>,
    pub(super) extra_sources: Option<Vec<Located<ExtraSource>>>,
    pub(super) dont_fragment: Option<Located<DontFragment>>,
    pub(super) ttl: Option<Located<u8>>,
    pub(super) dscp: Option<Located<u8>>,
    pub(super) allow_gbp: Option<Located<bool>>,
    pub(super) mss_clamp: Option<Located<bool>>,
    pub(super) annotation_prefix: Option<Located<String>>,
}

pub(super) fn parse(text: &str, file: &str, overrides: &Overrides) -> Result<Reading, Problems> {
    let report = Report::new(file, text);
    let (document, errors) = DeTable::parse_recoverable(text);
    for error in &errors {
        let at = error.span().map_or(0, |span| span.start);
        report.syntax(at, error.message());
    }
    let mut root = Section::new(&report, String::new(), 0, document.into_inner());

    let instance = match &overrides.instance {
        Some(instance) => {
            root.take("instance");
            Some(instance.clone())
        }
        None => value(read_or(&mut root, "instance", INSTANCE, DEFAULT_INSTANCE.to_owned())),
    };
    let source = read_source(root.section("source"), overrides);
    let interfaces: Option<Vec<InterfaceDraft>> = root
        .sections("interface")
        .map(|sections| sections.into_iter().map(|s| read_interface(s, &report)).collect());
    let read_overlay = |section| read_overlay(section, &overrides.subnets);
    let overlays: Option<Vec<OverlayDraft>> =
        root.sections("overlay").map(|sections| sections.into_iter().map(read_overlay).collect());
    let snat = snat::read(root.section("snat"), &report);
    let datapath = read_datapath(root.section("datapath"), overrides);
    let flannel = read_flannel(root.section("flannel"), source.as_ref(), &report);
    let host = read_host(root.section("host"));
    let metrics = read_metrics(root.section("metrics"));
    root.finish();

    validate::interfaces(&report, interfaces.as_deref());
    validate::overlays(&report, overlays.as_deref());
    validate::open(&report, source.as_ref(), overlays.as_deref());
    let xdp_mode = datapath.as_ref().map(|datapath| datapath.xdp_mode);
    validate::mode(&report, xdp_mode, overlays.as_deref());
    let snat = snat.finish(&report, overlays.as_deref(), xdp_mode);
    if report.is_empty()
        && let Some(open) = open(instance.as_deref(), source.as_ref(), flannel.as_ref(), overlays.as_deref())
    {
        for overlay in overlays.iter().flatten() {
            validate::unchosen(&report, overlay);
        }
        return Ok(Reading::Open(Open { problems: Problems(report.into_problems()), ..open }));
    }
    let config = (|| {
        Some(Config {
            instance: instance?,
            source: source?,
            interfaces: interfaces?.into_iter().map(InterfaceDraft::finish).collect::<Option<_>>()?,
            overlays: overlays?.into_iter().map(OverlayDraft::finish).collect::<Option<_>>()?,
            snat: snat?,
            datapath: datapath?,
            flannel: flannel?,
            host: host?,
            metrics: metrics?,
        })
    })();
    match config {
        Some(config) if report.is_empty() => Ok(Reading::Complete(Box::new(config))),
        _ => Err(Problems(report.into_problems())),
    }
}

/// What is left to the gateway; `None` if nothing is, or if it cannot be told.
fn open(
    instance: Option<&str>,
    source: Option<&Source>,
    flannel: Option<&FlannelSettings>,
    overlays: Option<&[OverlayDraft]>,
) -> Option<Open> {
    let Source::Kubernetes(access) = source? else { return None };
    let (instance, flannel, drafts) = (instance?.to_owned(), flannel?, overlays?);
    let overlays: Vec<OpenOverlay> = drafts
        .iter()
        .filter(|draft| draft.open.is_some())
        .map(|draft| {
            let name = draft.name.as_ref()?.value.clone();
            Some(OpenOverlay {
                node: flannel.node_of(&name, drafts.len()),
                name,
                local: draft.local.as_ref()?.value,
                mac: draft.mac.as_ref()?.value,
                network: draft.network.given().map(|network| network.value),
                annotation_prefix: draft.annotation_prefix.as_ref()?.value.clone(),
            })
        })
        .collect::<Option<_>>()?;
    let taken = drafts.iter().filter_map(|draft| draft.subnet.as_ref()).map(|subnet| subnet.value).collect();
    (!overlays.is_empty()).then(|| Open {
        instance,
        access: access.clone(),
        register: flannel.register,
        overlays,
        taken,
        problems: Problems(Vec::new()),
    })
}

fn read_source(mut section: Section<'_>, overrides: &Overrides) -> Option<Source> {
    let kind = match &overrides.source_path {
        // A directory on the command line goes before whatever the file says.
        Some(path) => {
            for key in ["kind", "path", "kubeconfig", "context"] {
                section.take(key);
            }
            section.finish();
            return Some(Source::Files { path: path.clone() });
        }
        None => {
            value(section.require("kind", SOURCE_KIND, "write kind = \"kubernetes\" or kind = \"files\""))
        }
    };
    let source = match kind {
        Some(SourceKind::Files) => {
            value(section.require("path", PATH, "name the directory of Kubernetes manifests"))
                .map(|path| Source::Files { path })
        }
        Some(SourceKind::Kubernetes) => {
            let kubeconfig = read_optional(&mut section, "kubeconfig", PATH).settle(|path| path);
            let context = read_optional(&mut section, "context", CONTEXT).settle(|context| context);
            match (kubeconfig, context) {
                (Some(kubeconfig), Some(context)) => Some(Source::Kubernetes(Access { kubeconfig, context })),
                _ => None,
            }
        }
        None => {
            // Which keys fit is not known, but each can be wrong by itself.
            read_optional(&mut section, "path", PATH);
            read_optional(&mut section, "kubeconfig", PATH);
            read_optional(&mut section, "context", CONTEXT);
            None
        }
    };
    section.finish();
    source
}

const ROLES: &str = "write roles = [\"underlay\"], [\"external\"] or both";

fn read_interface(mut section: Section<'_>, report: &Report<'_>) -> InterfaceDraft {
    let name = section.require("name", INTERFACE_NAME, "name the network device, such as name = \"eth0\"");
    let vlan = read_optional(&mut section, "vlan", VLAN);
    let roles = match section.take("roles") {
        None => {
            section.missing("roles", ROLES);
            None
        }
        Some(Located { value: DeValue::Array(array), at, key }) => {
            let mut roles = Some(Roles::NONE);
            for (index, item) in array.into_iter().enumerate() {
                let item_at = item.span().start;
                let item = Located { value: item.into_inner(), at: item_at, key: format!("{key}[{index}]") };
                roles = match (roles, convert(report, &item, ROLE)) {
                    (Some(roles), Some(role)) => Some(roles.with(role.value)),
                    _ => None,
                };
            }
            let found = Located { value: (), at, key };
            match roles {
                Some(Roles::NONE) => {
                    found.note(report, "is empty", ROLES);
                    None
                }
                Some(roles) => Some(Located { value: roles, at: found.at, key: found.key }),
                None => None,
            }
        }
        Some(found) => {
            found.note(report, format!("is {}", kind(&found.value)), ROLES);
            None
        }
    };
    section.finish();
    InterfaceDraft { name, vlan, roles }
}

impl InterfaceDraft {
    fn finish(self) -> Option<Interface> {
        Some(Interface {
            name: self.name?.value,
            vlan: self.vlan.settle(|vlan| vlan)?,
            roles: self.roles?.value,
        })
    }
}

fn read_overlay(mut section: Section<'_>, chosen: &Subnets) -> OverlayDraft {
    let name = section.require("name", OVERLAY_NAME, "name the overlay, such as name = \"flannel\"");
    let (subnet, open) = read_subnet(&mut section, name.as_ref(), chosen);
    let draft = OverlayDraft {
        at: section.at(),
        name,
        vni: read_or(&mut section, "vni", VNI, Vni::new(DEFAULT_VNI).expect("fits 24 bits")),
        port: read_or(&mut section, "port", PORT, DEFAULT_PORT),
        local: section.require(
            "local",
            HOST_ADDRESS,
            "write this host's underlay address, the public-ip of the gateway's Node",
        ),
        mac: section.require(
            "mac",
            STATION_MAC,
            "write the VtepMAC of the gateway's Node, such as mac = \"0e:11:22:33:44:55\"",
        ),
        subnet,
        open,
        address: read_optional(&mut section, "address", IPV4),
        network: read_optional(&mut section, "network", SUBNET),
        direct_routing: read_or(&mut section, "direct_routing", BOOLEAN, false),
        source_check: read_or(&mut section, "source_check", SOURCE_CHECK, SourceCheck::Node),
        extra_sources: read_extra_sources(&mut section),
        dont_fragment: read_or(&mut section, "df", DONT_FRAGMENT, DontFragment::Unset),
        ttl: read_or(&mut section, "ttl", TTL, DEFAULT_TTL),
        dscp: read_or(&mut section, "dscp", DSCP, 0),
        allow_gbp: read_or(&mut section, "allow_gbp", BOOLEAN, false),
        mss_clamp: read_or(&mut section, "mss_clamp", BOOLEAN, true),
        annotation_prefix: read_or(
            &mut section,
            "annotation_prefix",
            ANNOTATION_PREFIX,
            DEFAULT_ANNOTATION_PREFIX.to_owned(),
        ),
    };
    section.finish();
    draft
}

/// The subnet: what the file says, else what was chosen, else the key's path.
fn read_subnet(
    section: &mut Section<'_>,
    overlay: Option<&Located<String>>,
    chosen: &Subnets,
) -> (Option<Located<Ipv4Net>>, Option<String>) {
    match read_optional(section, "subnet", SUBNET) {
        Optional::Given(subnet) => (Some(subnet), None),
        Optional::Wrong => (None, None),
        Optional::Absent => {
            let key = section.path("subnet");
            match overlay.and_then(|name| chosen.get(&name.value)) {
                Some(subnet) => (Some(Located { value: *subnet, at: section.at(), key }), None),
                None => (None, Some(key)),
            }
        }
    }
}

impl OverlayDraft {
    fn finish(self) -> Option<Overlay> {
        let subnet = self.subnet?.value;
        Some(Overlay {
            name: self.name?.value,
            vni: self.vni?.value,
            port: self.port?.value,
            local: self.local?.value,
            mac: self.mac?.value,
            subnet,
            address: self.address.settle(|address| address.unwrap_or(subnet.network()))?,
            network: self.network.settle(|network| network)?,
            direct_routing: self.direct_routing?.value,
            source_check: self.source_check?.value,
            extra_sources: self.extra_sources?.into_iter().map(|extra| extra.value).collect(),
            dont_fragment: self.dont_fragment?.value,
            ttl: self.ttl?.value,
            dscp: self.dscp?.value,
            allow_gbp: self.allow_gbp?.value,
            mss_clamp: self.mss_clamp?.value,
            annotation_prefix: self.annotation_prefix?.value,
        })
    }
}

fn read_extra_sources(section: &mut Section<'_>) -> Option<Vec<Located<ExtraSource>>> {
    let entries = section.sections("extra_sources")?;
    let mut sources = Some(Vec::new());
    for mut entry in entries {
        let node = entry.require("node", NODE_NAME, "name the node");
        let address = entry.require("address", HOST_ADDRESS, "write the address that its packets come from");
        let at = entry.at();
        entry.finish();
        sources = match (sources, node, address) {
            (Some(mut sources), Some(node), Some(address)) => {
                let value = ExtraSource { node: node.value, address: address.value };
                sources.push(Located { value, at, key: address.key });
                Some(sources)
            }
            _ => None,
        };
    }
    sources
}

fn read_datapath(mut section: Section<'_>, overrides: &Overrides) -> Option<Datapath> {
    let xdp_mode = match overrides.xdp_mode {
        Some(mode) => {
            section.take("xdp_mode");
            Some(mode)
        }
        None => value(read_or(&mut section, "xdp_mode", XDP_MODE, XdpMode::Driver)),
    };
    let log = match overrides.datapath_log {
        Some(log) => {
            section.take("log");
            Some(log)
        }
        None => value(read_or(&mut section, "log", DATAPATH_LOG, DatapathLog::Off)),
    };
    let bpffs = read_or(&mut section, "bpffs", ABSOLUTE_PATH, PathBuf::from(DEFAULT_BPFFS));
    let max_pods = read_or(&mut section, "max_pods", TABLE_SIZE, DEFAULT_MAX_PODS);
    let max_prefixes = read_or(&mut section, "max_prefixes", TABLE_SIZE, DEFAULT_MAX_PREFIXES);
    let max_vteps = read_or(&mut section, "max_vteps", TABLE_SIZE, DEFAULT_MAX_VTEPS);
    let max_sources = read_or(&mut section, "max_sources", TABLE_SIZE, DEFAULT_MAX_SOURCES);
    section.finish();
    Some(Datapath {
        xdp_mode: xdp_mode?,
        log: log?,
        bpffs: bpffs?.value,
        max_pods: max_pods?.value,
        max_prefixes: max_prefixes?.value,
        max_vteps: max_vteps?.value,
        max_sources: max_sources?.value,
    })
}

fn read_flannel(
    mut section: Section<'_>,
    source: Option<&Source>,
    report: &Report<'_>,
) -> Option<FlannelSettings> {
    let register = read_or(&mut section, "register", BOOLEAN, false);
    let heartbeat = read_or(&mut section, "heartbeat", BOOLEAN, false);
    let node = read_or(&mut section, "node", NODE_NAME, DEFAULT_NODE.to_owned());
    section.finish();
    if let Some(Source::Files { .. }) = source {
        for wish in [&register, &heartbeat].into_iter().flatten().filter(|wish| wish.value) {
            wish.note(report, "needs an API server to write to", "set kind = \"kubernetes\" under [source]");
        }
    }
    Some(FlannelSettings { register: register?.value, heartbeat: heartbeat?.value, node: node?.value })
}

fn read_host(mut section: Section<'_>) -> Option<HostSettings> {
    let manage_sysctl = read_or(&mut section, "manage_sysctl", BOOLEAN, true);
    section.finish();
    Some(HostSettings { manage_sysctl: manage_sysctl?.value })
}

fn read_metrics(mut section: Section<'_>) -> Option<MetricsSettings> {
    let listen = read_optional(&mut section, "listen", LISTEN);
    section.finish();
    Some(MetricsSettings { listen: listen.settle(|listen| listen)? })
}

/// An absent key has its default. `None` if it is wrong.
pub(super) fn read_or<T>(
    section: &mut Section<'_>,
    key: &'static str,
    parse: Parse<T>,
    default: T,
) -> Option<Located<T>> {
    let absent = Located { value: default, at: section.at(), key: section.path(key) };
    match read_optional(section, key, parse) {
        Optional::Absent => Some(absent),
        Optional::Wrong => None,
        Optional::Given(found) => Some(found),
    }
}

pub(super) fn read_optional<T>(section: &mut Section<'_>, key: &'static str, parse: Parse<T>) -> Optional<T> {
    let present = section.has(key);
    match section.read(key, parse) {
        Some(found) => Optional::Given(found),
        None if present => Optional::Wrong,
        None => Optional::Absent,
    }
}

fn value<T>(found: Option<Located<T>>) -> Option<T> {
    found.map(|found| found.value)
}

pub(super) fn text<'v>(value: &'v DeValue<'_>) -> Result<&'v str, String> {
    value.as_str().ok_or_else(|| format!("is {}", kind(value)))
}

pub(super) fn integer<T: TryFrom<i64>>(value: &DeValue<'_>, min: i64, max: i64) -> Result<T, String> {
    let wrong = || format!("is {}", kind(value));
    let number = value.as_integer().ok_or_else(wrong)?;
    let number = i64::from_str_radix(number.as_str(), number.radix()).map_err(|_| wrong())?;
    if (min..=max).contains(&number) { T::try_from(number).map_err(|_| wrong()) } else { Err(wrong()) }
}

const BOOLEAN: Parse<bool> = Parse {
    expected: "true or false",
    parse: |value| value.as_bool().ok_or_else(|| format!("is {}", kind(value))),
};

const LISTEN: Parse<SocketAddr> = Parse {
    expected: "an address of this host and a port, such as \"127.0.0.1:9472\"",
    parse: |value| {
        let text = text(value)?;
        let wrong = || format!("is {text:?}");
        let listen: SocketAddr = text.parse().map_err(|_| wrong())?;
        if listen.port() == 0 { Err(wrong()) } else { Ok(listen) }
    },
};

const INSTANCE: Parse<String> = Parse {
    expected: INSTANCE_FORM,
    parse: |value| {
        let text = text(value)?;
        check_instance(text).map(|()| text.to_owned()).map_err(|(what, _)| what)
    },
};
const INSTANCE_FORM: &str = "1 to 63 letters, digits, - and _, beginning with a letter or digit";

/// Whether a text can name a gateway: it becomes a directory of the bpffs. What is wrong, and what would be right.
pub(super) fn check_instance(text: &str) -> Result<(), (String, String)> {
    let fits = (1..=63).contains(&text.len())
        && text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'));
    if fits { Ok(()) } else { Err((format!("is {text:?}"), format!("write {INSTANCE_FORM}"))) }
}

const OVERLAY_NAME: Parse<String> = Parse {
    expected: "1 to 12 lower-case letters, digits and -, beginning with a letter or digit: the kernel device is gw-<name>, of at most 15 characters",
    parse: |value| {
        let text = text(value)?;
        let fits = (1..=12).contains(&text.len())
            && !text.starts_with('-')
            && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-');
        if fits { Ok(text.to_owned()) } else { Err(format!("is {text:?}")) }
    },
};

/// What the kernel takes as the name of a device (`dev_valid_name`).
const INTERFACE_NAME: Parse<String> = Parse {
    expected: "the name of a network device, as ip link shows it: 1 to 15 characters without space, / and :",
    parse: |value| {
        let text = text(value)?;
        let fits = (1..=15).contains(&text.len())
            && !matches!(text, "." | "..")
            && !text.contains(|c: char| c.is_whitespace() || c.is_control() || matches!(c, '/' | ':'));
        if fits { Ok(text.to_owned()) } else { Err(format!("is {text:?}")) }
    },
};

const NODE_NAME: Parse<String> = Parse {
    expected: "the name of a Node, as kubectl get nodes shows it",
    parse: |value| {
        let text = text(value)?;
        let fits = (1..=253).contains(&text.len())
            && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'.'));
        if fits { Ok(text.to_owned()) } else { Err(format!("is {text:?}")) }
    },
};

#[derive(Clone, Copy)]
enum SourceKind {
    Files,
    Kubernetes,
}

const SOURCE_KIND: Parse<SourceKind> = Parse {
    expected: "\"kubernetes\" (the API server of a kubeconfig) or \"files\" (a directory of manifests)",
    parse: |value| match text(value)? {
        "files" => Ok(SourceKind::Files),
        "kubernetes" => Ok(SourceKind::Kubernetes),
        other => Err(format!("is {other:?}")),
    },
};

const CONTEXT: Parse<String> = Parse {
    expected: "the name of a context, as kubectl config get-contexts shows it",
    parse: |value| match text(value)? {
        "" => Err("is empty".to_owned()),
        context => Ok(context.to_owned()),
    },
};

const PATH: Parse<PathBuf> = Parse {
    expected: "a path",
    parse: |value| match text(value)? {
        "" => Err("is empty".to_owned()),
        path => Ok(PathBuf::from(path)),
    },
};

const ABSOLUTE_PATH: Parse<PathBuf> = Parse {
    expected: "an absolute path",
    parse: |value| {
        let path = PathBuf::from(text(value)?);
        if path.is_absolute() { Ok(path) } else { Err(format!("is {:?}", path.display().to_string())) }
    },
};

const VLAN: Parse<u16> = Parse {
    expected: "a VLAN id, 1 to 4094, or leave the key out for untagged frames",
    parse: |value| integer(value, 1, 4094),
};

const ROLE: Parse<Roles> = Parse {
    expected: "\"underlay\" or \"external\"",
    parse: |value| match text(value)? {
        "underlay" => Ok(Roles::UNDERLAY),
        "external" => Ok(Roles::EXTERNAL),
        other => Err(format!("is {other:?}")),
    },
};

const VNI: Parse<Vni> = Parse {
    expected: "a network identifier of 24 bits, 0 to 16777215",
    parse: |value| {
        let number = integer(value, 0, i64::from(Vni::MAX))?;
        Vni::new(number).ok_or_else(|| format!("is {number}"))
    },
};

const PORT: Parse<u16> =
    Parse { expected: "a UDP port, 1 to 65535", parse: |value| integer(value, 1, i64::from(u16::MAX)) };

const TTL: Parse<u8> = Parse { expected: "a TTL, 1 to 255", parse: |value| integer(value, 1, 255) };

const DSCP: Parse<u8> = Parse { expected: "a DSCP, 0 to 63", parse: |value| integer(value, 0, 63) };

pub(super) const TABLE_SIZE: Parse<u32> = Parse {
    expected: "a number of entries, 1 to 16777216",
    parse: |value| integer(value, 1, i64::from(LARGEST_TABLE)),
};

pub(super) const IPV4: Parse<Ipv4Addr> = Parse {
    expected: "an IPv4 address, such as 10.244.30.1",
    parse: |value| {
        let text = text(value)?;
        text.parse().map_err(|_| format!("is {text:?}"))
    },
};

const HOST_ADDRESS: Parse<Ipv4Addr> = Parse {
    expected: "the IPv4 address of a host, such as 172.16.2.200: unicast, not loopback",
    parse: |value| {
        let address = (IPV4.parse)(value)?;
        let [first, ..] = address.octets();
        if first != 0 && first < 224 && !address.is_loopback() {
            Ok(address)
        } else {
            Err(format!("is {address}"))
        }
    },
};

const STATION_MAC: Parse<Mac> = Parse {
    expected: "a unicast MAC address that no other VTEP has, such as 0e:11:22:33:44:55",
    parse: |value| {
        let text = text(value)?;
        match text.parse::<Mac>() {
            Ok(mac) if mac.is_station() => Ok(mac),
            Ok(mac) => Err(format!("is {mac}, which is zero or a group address")),
            Err(_) => Err(format!("is {text:?}")),
        }
    },
};

const SUBNET: Parse<Ipv4Net> = Parse {
    expected: "a unicast network with a prefix length of 8 to 32 and without host bits, such as 10.244.30.0/24",
    parse: |value| {
        let text = text(value)?;
        let net: Ipv4Net = text.parse().map_err(|_| format!("is {text:?}"))?;
        let [first, ..] = net.network().octets();
        if net.addr() != net.network() {
            Err(format!("is {net}, which has host bits: the network is {}", net.trunc()))
        } else if net.prefix_len() < 8 || first == 0 || first == 127 || first >= 224 {
            Err(format!("is {net}"))
        } else {
            Ok(net)
        }
    },
};

const SOURCE_CHECK: Parse<SourceCheck> = Parse {
    expected: "\"strict\" (the node's endpoint only), \"node\" (any address of the node) or \"off\"",
    parse: |value| match text(value)? {
        "strict" => Ok(SourceCheck::Strict),
        "node" => Ok(SourceCheck::Node),
        "off" => Ok(SourceCheck::Off),
        other => Err(format!("is {other:?}")),
    },
};

const DONT_FRAGMENT: Parse<DontFragment> = Parse {
    expected: "\"unset\", \"set\" or \"inherit\"",
    parse: |value| match text(value)? {
        "unset" => Ok(DontFragment::Unset),
        "set" => Ok(DontFragment::Set),
        "inherit" => Ok(DontFragment::Inherit),
        other => Err(format!("is {other:?}")),
    },
};

/// flanneld's `--kube-annotation-prefix` allows one slash; it appends `/`, or `-` if the option has a slash already.
const ANNOTATION_PREFIX: Parse<String> = Parse {
    expected: "what stands before kube-subnet-manager in the Nodes' annotations: one slash, and / or - at the end",
    parse: |value| {
        let text = text(value)?;
        let fits = text.matches('/').count() == 1
            && text.len() > 1
            && text.ends_with(['/', '-'])
            && !text.starts_with('/');
        if fits { Ok(text.to_owned()) } else { Err(format!("is {text:?}")) }
    },
};

const XDP_MODE: Parse<XdpMode> = Parse {
    expected: "\"driver\", \"generic\" or \"off\"",
    parse: |value| {
        let text = text(value)?;
        XdpMode::from_str(text, false).map_err(|_| format!("is {text:?}"))
    },
};

const DATAPATH_LOG: Parse<DatapathLog> = Parse {
    expected: "\"off\" or \"debug\"",
    parse: |value| {
        let text = text(value)?;
        DatapathLog::from_str(text, false).map_err(|_| format!("is {text:?}"))
    },
};
