//! flannel's own configuration, as far as the gateway may read it, and whether it agrees with ours.

use std::{collections::BTreeMap, fs, sync::Arc};

use ipnet::Ipv4Net;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::core::params::GetParams;
use serde::Deserialize;
use tokio::time::sleep;

use super::{
    Timing,
    access::{Link, Linked},
    exchange,
    failure::Failure,
    pause::Pause,
    request::{FLANNEL_CONFIG, FLANNEL_NAMESPACES, Request},
};
use crate::{
    cluster::problem::{Problem, ProblemList},
    config::{Interface, Overlay},
};

/// What flannel does if the key is not there.
const DEFAULT_VNI: u32 = 1;
const DEFAULT_PORT: u16 = 8472;
const DEFAULT_SUBNET_LENGTH: u8 = 24;
/// What VXLAN takes of the underlay's MTU.
const OVERHEAD: u32 = 50;
/// The overlay that `kube-flannel-cfg` is about has flannel's own annotations.
const OWN_PREFIX: &str = "flannel.alpha.coreos.com/";

/// Whether flannel's configuration is about the overlay with these annotations.
pub fn is_of_flannel(annotation_prefix: &str) -> bool {
    annotation_prefix == OWN_PREFIX
}

/// flannel's `net-conf.json`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetConf {
    /// Where it stands, for people.
    pub place: String,
    /// The pods' network.
    pub network: Option<Ipv4Net>,
    /// Prefix length of a node's subnet.
    pub subnet_length: u8,
    /// Nodes without IPv6 are not programmed.
    pub ipv6: bool,
    /// Backend type.
    pub backend: String,
    /// VXLAN network identifier.
    pub vni: u32,
    /// UDP port.
    pub port: u16,
    /// Nodes on one link speak without a tunnel.
    pub direct_routing: bool,
    /// MTU of the underlay as flannel takes it; `None` takes that of the interface.
    pub mtu: Option<u32>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct RawNetConf {
    network: Option<String>,
    subnet_len: Option<u8>,
    #[serde(rename = "EnableIPv6")]
    enable_ipv6: Option<bool>,
    backend: Option<RawBackend>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct RawBackend {
    #[serde(rename = "Type")]
    kind: Option<String>,
    #[serde(rename = "VNI")]
    vni: Option<u32>,
    port: Option<u16>,
    direct_routing: Option<bool>,
    #[serde(rename = "MTU")]
    mtu: Option<u32>,
}

impl NetConf {
    /// Reads the JSON; `place` is where it stands.
    ///
    /// # Errors
    ///
    /// flannel could not read it either.
    pub fn parse(text: &str, place: &str) -> Result<Self, Problem> {
        let wrong = |what: String| {
            Problem::warning(
                place,
                what,
                "mend it: flanneld will not start with it; until then it is not compared",
            )
        };
        let raw: RawNetConf =
            serde_json::from_str(text).map_err(|error| wrong(format!("cannot be read: {error}")))?;
        let network = match raw.network.as_deref().filter(|network| !network.is_empty()) {
            Some(network) => {
                Some(network.parse().map_err(|_| wrong(format!("Network {network:?} is no IPv4 network")))?)
            }
            None => None,
        };
        let backend = raw.backend.unwrap_or_default();
        Ok(Self {
            place: place.to_owned(),
            network,
            subnet_length: raw.subnet_len.unwrap_or(DEFAULT_SUBNET_LENGTH),
            ipv6: raw.enable_ipv6.unwrap_or(false),
            // What flannel's code does, whatever its documentation says.
            backend: backend.kind.unwrap_or_else(|| "udp".to_owned()),
            vni: backend.vni.unwrap_or(DEFAULT_VNI),
            port: backend.port.filter(|port| *port != 0).unwrap_or(DEFAULT_PORT),
            direct_routing: backend.direct_routing.unwrap_or(false),
            mtu: backend.mtu.filter(|mtu| *mtu != 0),
        })
    }
}

/// Where an overlay differs from flannel's configuration. `underlay` is our interface and its MTU.
pub fn compare(conf: &NetConf, overlay: &Overlay, underlay: Option<(&str, u32)>) -> Vec<Problem> {
    let mut problems = Vec::new();
    let name = &overlay.name;
    if conf.backend != "vxlan" {
        problems.push(Problem::error(
            conf.place.as_str(),
            format!("Backend.Type is {:?}: the nodes have no VXLAN tunnel", conf.backend),
            "this gateway reaches nodes of flannel's vxlan backend only: set Backend.Type to \"vxlan\"",
        ));
        return problems;
    }
    if conf.ipv6 {
        problems.push(Problem::error(
            conf.place.as_str(),
            "EnableIPv6 is true: in a dual-stack network flannel does not program a Node that has IPv4 only",
            "this gateway carries IPv4 only, so pods cannot answer it: run flannel with EnableIPv6 false",
        ));
    }
    let mut differ = |field: &str, theirs: String, key: &str, ours: String, effect: &str| {
        problems.push(Problem::error(
            conf.place.as_str(),
            format!("{field} is {theirs}, but overlay {name:?} has {key} = {ours}: {effect}"),
            format!("set {key} = {theirs} in the overlay, or change flannel's configuration"),
        ));
    };
    let vni = overlay.vni.get();
    if conf.vni != vni {
        differ("Backend.VNI", conf.vni.to_string(), "vni", vni.to_string(), "nodes drop every packet");
    }
    if conf.port != overlay.port {
        let effect = "packets reach nobody in either direction";
        differ("Backend.Port", conf.port.to_string(), "port", overlay.port.to_string(), effect);
    }
    if conf.direct_routing != overlay.direct_routing {
        let effect = "nodes on the gateway's link answer in the other form";
        let ours = overlay.direct_routing.to_string();
        differ("Backend.DirectRouting", conf.direct_routing.to_string(), "direct_routing", ours, effect);
    }
    if let Some(network) = conf.network {
        if let Some(ours) = overlay.network.filter(|ours| *ours != network) {
            let effect = "nodes may be taken for strangers, or strangers for nodes";
            differ("Network", format!("\"{network}\""), "network", format!("\"{ours}\""), effect);
        }
        if !network.contains(&overlay.subnet) {
            problems.push(Problem::error(
                conf.place.as_str(),
                format!("Network {network} does not hold {}, the subnet of overlay {name:?}", overlay.subnet),
                "choose a subnet in it: nodes masquerade what pods send elsewhere",
            ));
        }
    }
    if let (Some(theirs), Some((interface, ours))) = (conf.mtu, underlay)
        && theirs != ours
    {
        problems.push(Problem::warning(
            conf.place.as_str(),
            format!(
                "Backend.MTU is {theirs}, so pods send and take packets of {} bytes, but {interface} has MTU {ours}, \
                 which makes {}",
                theirs.saturating_sub(OVERHEAD),
                ours.saturating_sub(OVERHEAD)
            ),
            format!("ip link set {interface} mtu {theirs}, if the network carries it; else lower Backend.MTU"),
        ));
    }
    problems
}

/// Reads flannel's configuration: `None` if it is not where it usually is, or may not be read.
///
/// # Errors
///
/// The server cannot be asked.
pub async fn read_net_conf(
    linked: &Linked,
    timing: &Timing,
) -> Result<Option<Result<NetConf, Problem>>, Failure> {
    for namespace in FLANNEL_NAMESPACES {
        let path = format!("/api/v1/namespaces/{namespace}/configmaps");
        let request = kube::core::Request::new(path).get(FLANNEL_CONFIG, &GetParams::default());
        let right = Request::NetConf(namespace).right();
        let map: ConfigMap = match exchange::fetch(linked, right, request, timing.idle).await {
            Ok(map) => map,
            Err(Failure::Forbidden(..) | Failure::Status { code: 404, .. }) => continue,
            Err(failure) => return Err(failure),
        };
        let place = format!("ConfigMap {namespace}/{FLANNEL_CONFIG}, net-conf.json");
        let data: BTreeMap<String, String> = map.data.unwrap_or_default();
        if let Some(text) = data.get("net-conf.json") {
            return Ok(Some(NetConf::parse(text, &place)));
        }
    }
    Ok(None)
}

/// The underlay interface with the smallest MTU.
fn underlay(interfaces: &[Interface]) -> Option<(&str, u32)> {
    interfaces
        .iter()
        .filter(|interface| interface.roles.has(gateway_common::abi::Roles::UNDERLAY))
        .filter_map(|interface| {
            let text = fs::read_to_string(format!("/sys/class/net/{}/mtu", interface.name)).ok()?;
            Some((interface.name.as_str(), text.trim().parse().ok()?))
        })
        .min_by_key(|(_, mtu)| *mtu)
}

/// What is wrong between flannel's configuration and that of the gateway.
pub fn findings(
    conf: &Result<NetConf, Problem>,
    overlays: &[Overlay],
    interfaces: &[Interface],
) -> Vec<Problem> {
    let conf = match conf {
        Ok(conf) => conf,
        Err(problem) => return vec![problem.clone()],
    };
    let underlay = underlay(interfaces);
    overlays
        .iter()
        .filter(|overlay| is_of_flannel(&overlay.annotation_prefix))
        .flat_map(|overlay| compare(conf, overlay, underlay))
        .collect()
}

/// Looks at flannel's configuration from time to time.
pub(super) async fn follow(
    link: Arc<Link>,
    overlays: Vec<Overlay>,
    interfaces: Vec<Interface>,
    timing: Timing,
    problems: ProblemList,
) {
    let mut pause = Pause::new(timing.first_pause, timing.net_conf);
    loop {
        let read = match link.get().await {
            Ok(linked) => read_net_conf(&linked, &timing).await,
            Err(failure) => Err(failure),
        };
        match read {
            Ok(conf) => {
                let found = conf.map(|conf| findings(&conf, &overlays, &interfaces)).unwrap_or_default();
                problems.set("flannel's configuration", found);
                pause.reset();
                sleep(timing.net_conf).await;
            }
            // Those who follow the objects have the same trouble, and tell of it.
            Err(failure) => sleep(pause.next(failure.retry_after())).await,
        }
    }
}
