//! What flannel's annotations say about a Node, and where a Pod is.
//!
//! The rules are those of flannel's own readers (`pkg/subnet/kube`, `pkg/backend/vxlan`): a Node that flannel nodes
//! would ignore is ignored here, and what they accept is accepted.

use std::{collections::BTreeMap, fmt, net::Ipv4Addr, sync::Arc};

use gateway_common::wire::Mac;
use ipnet::{IpNet, Ipv4Net};
use k8s_openapi::{
    api::core::v1::{Node, Pod},
    apimachinery::pkg::apis::meta::v1::Time,
    jiff::Timestamp,
};
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};

use crate::{
    cluster::{
        model::PodRef,
        problem::{Origin, Problem},
    },
    config::Overlay,
};

const KUBE_SUBNET_MANAGER: &str = "kube-subnet-manager";
const BACKEND_TYPE: &str = "backend-type";
pub(crate) const BACKEND_DATA: &str = "backend-data";
pub(crate) const PUBLIC_IP: &str = "public-ip";

/// A node as VTEP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeFacts {
    /// When the Node was created; hand-written Nodes may not say.
    pub created: Option<Timestamp>,
    /// Tunnel endpoint: `public-ip`. Never the Node's InternalIP, which may differ.
    pub endpoint: Ipv4Addr,
    /// MAC address of its VTEP.
    pub mac: Mac,
    /// Its pods' range.
    pub cidr: Ipv4Net,
    /// The Node's InternalIP and ExternalIP addresses: it may send from them.
    pub addresses: Vec<Ipv4Addr>,
    /// Where the source has it from.
    pub origin: Origin,
}

/// Why a Node is no VTEP although nothing is wrong with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeSkip {
    /// `kube-subnet-manager` is not `true`: flannel ignores it too.
    NotFlannel,
    /// It is the Node that announces this gateway.
    Own,
}

impl fmt::Display for NodeSkip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotFlannel => "not flannel's (no annotation kube-subnet-manager: \"true\")",
            Self::Own => "this gateway",
        })
    }
}

/// What an overlay makes of a Node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NodeReading {
    /// A VTEP, with what is odd about it.
    Vtep(NodeFacts, Vec<Problem>),
    /// Nothing to do with it.
    Skipped(NodeSkip),
    /// It should be a VTEP, but cannot.
    Rejected(Vec<Problem>),
}

impl NodeReading {
    /// The same, with its problems placed where the source has the Node from.
    pub fn located(mut self, origin: &Origin) -> Self {
        if let Self::Vtep(facts, _) = &mut self {
            facts.origin.clone_from(origin);
        }
        if let Self::Vtep(_, problems) | Self::Rejected(problems) = &mut self {
            for problem in problems {
                problem.locate(origin);
            }
        }
        self
    }
}

/// Reads a Node as flannel's kube subnet manager and vxlan backend do.
pub fn read_node(node: &Node, overlay: &Overlay) -> NodeReading {
    let empty = BTreeMap::new();
    let annotations = node.metadata.annotations.as_ref().unwrap_or(&empty);
    let name = node.metadata.name.as_deref().unwrap_or_default();
    let annotation =
        |suffix: &str| annotations.get(&format!("{}{suffix}", overlay.annotation_prefix)).map(String::as_str);
    if annotation(KUBE_SUBNET_MANAGER) != Some("true") {
        return NodeReading::Skipped(NodeSkip::NotFlannel);
    }

    let place = |field: &str| format!("Node {name}, {field}");
    let annotated = |suffix: &str| place(&format!("annotation {}{suffix}", overlay.annotation_prefix));
    let mut problems = Vec::new();
    let mut warnings = Vec::new();

    match annotation(BACKEND_TYPE) {
        Some("vxlan") => {}
        other => problems.push(Problem::error(
            annotated(BACKEND_TYPE),
            match other {
                Some(other) => format!("is {other:?}"),
                None => "is missing".to_owned(),
            },
            "this gateway reaches nodes of flannel's vxlan backend only: the value must be \"vxlan\"",
        )),
    }

    let endpoint = match annotation(PUBLIC_IP).map(read_public_ip) {
        Some(Ok(endpoint)) => Some(endpoint),
        Some(Err(what)) => {
            problems.push(Problem::error(
                annotated(PUBLIC_IP),
                what,
                "write the node's underlay IPv4 address without prefix length, such as 172.16.2.11",
            ));
            None
        }
        None => {
            problems.push(Problem::error(
                annotated(PUBLIC_IP),
                "is missing",
                "flanneld writes it when it starts: look at flanneld's log on that node",
            ));
            None
        }
    };

    let mac = match annotation(BACKEND_DATA).map(read_backend_data) {
        Some(Ok(data)) => {
            if let Some(vni) = data.vni.filter(|vni| *vni != u64::from(overlay.vni.get())) {
                warnings.push(Problem::warning(
                    annotated(BACKEND_DATA),
                    format!("says VNI {vni}, but overlay {:?} has VNI {}", overlay.name, overlay.vni.get()),
                    "set the overlay's vni to the VNI of flannel's net-conf.json, or the node drops every packet",
                ));
            }
            Some(data.mac)
        }
        Some(Err(what)) => {
            problems.push(Problem::error(
                annotated(BACKEND_DATA),
                what,
                r#"it must look like {"VNI":1,"VtepMAC":"0e:11:22:33:44:55"}, with a unicast MAC address"#,
            ));
            None
        }
        None => {
            problems.push(Problem::error(
                annotated(BACKEND_DATA),
                "is missing",
                "flanneld writes it when it starts: look at flanneld's log on that node",
            ));
            None
        }
    };

    let cidr = match read_pod_cidr(node) {
        Ok(cidr) => Some(cidr),
        Err((field, what, remedy)) => {
            problems.push(Problem::error(place(field), what, remedy));
            None
        }
    };

    // ARP for the pods of such a node would be answered for hosts of the underlay.
    let underlay = [Some(overlay.local), endpoint];
    if let Some(cidr) = cidr
        && let Some(inside) = underlay.into_iter().flatten().find(|address| cidr.contains(address))
    {
        problems.push(Problem::error(
            place(POD_CIDR),
            format!("{cidr} holds {inside}, which is an address of the underlay"),
            "pods and nodes need different networks: give the node a podCIDR in flannel's Network",
        ));
    }

    let (Some(endpoint), Some(mac), Some(cidr), true) = (endpoint, mac, cidr, problems.is_empty()) else {
        return NodeReading::Rejected(problems);
    };

    let facts = NodeFacts {
        created: timestamp(node.metadata.creation_timestamp.as_ref()),
        endpoint,
        mac,
        cidr,
        addresses: node_addresses(node),
        origin: None,
    };
    match compare_with_ourselves(&facts, overlay) {
        Ourselves::Stranger => {}
        Ourselves::Own => return NodeReading::Skipped(NodeSkip::Own),
        Ourselves::Clash(fields) => {
            problems.extend(fields.into_iter().map(|(field, what, remedy)| {
                let place = if field == POD_CIDR { place(field) } else { annotated(field) };
                Problem::error(place, what, remedy)
            }));
            return NodeReading::Rejected(problems);
        }
    }
    if let Some(network) = overlay.network.filter(|network| !network.contains(&cidr)) {
        // The gateway answers ARP for what a node has, so the overlay's network bounds what a Node can take.
        return NodeReading::Rejected(vec![Problem::error(
            place(POD_CIDR),
            format!("{cidr} is outside of {network}, the network of overlay {:?}", overlay.name),
            "check the overlay's network and the cluster's allocation of pod CIDRs",
        )]);
    }
    NodeReading::Vtep(facts, warnings)
}

pub(crate) const POD_CIDR: &str = "spec.podCIDR";

/// How a Node relates to this gateway's own announcement.
enum Ourselves {
    /// Nothing in common.
    Stranger,
    /// MAC address, endpoint and subnet are ours.
    Own,
    /// Something is ours, but not all: field, what, remedy.
    Clash(Vec<(&'static str, String, String)>),
}

fn compare_with_ourselves(facts: &NodeFacts, overlay: &Overlay) -> Ourselves {
    let mac = facts.mac == overlay.mac;
    let endpoint = facts.endpoint == overlay.local;
    let subnet = facts.cidr == overlay.subnet;
    let overlap = facts.cidr.contains(&overlay.subnet) || overlay.subnet.contains(&facts.cidr);
    if mac && endpoint && subnet {
        return Ourselves::Own;
    }
    if !(mac || endpoint || overlap) {
        return Ourselves::Stranger;
    }
    let remedy = |key: &str| {
        format!(
            "if this Node announces the gateway, make it equal to {key} of overlay {:?}; if not, give one of them another value",
            overlay.name
        )
    };
    let mut fields = Vec::new();
    let state = |same: bool| if same { "is the gateway's own" } else { "differs from the gateway's" };
    let mut field = |name, same, theirs: String, ours: String, key| {
        let what = if same {
            format!("{theirs} {}", state(same))
        } else {
            format!("{theirs} {} {ours}, although other fields are the gateway's", state(same))
        };
        fields.push((name, what, remedy(key)));
    };
    field(BACKEND_DATA, mac, format!("VtepMAC {}", facts.mac), overlay.mac.to_string(), "mac");
    field(PUBLIC_IP, endpoint, facts.endpoint.to_string(), overlay.local.to_string(), "local");
    if overlap && !subnet {
        fields.push((
            POD_CIDR,
            format!("{} overlaps the gateway's own subnet {}", facts.cidr, overlay.subnet),
            remedy("subnet"),
        ));
    } else {
        field(POD_CIDR, subnet, facts.cidr.to_string(), overlay.subnet.to_string(), "subnet");
    }
    Ourselves::Clash(fields)
}

fn read_public_ip(text: &str) -> Result<Ipv4Addr, String> {
    let address: Ipv4Addr = text.parse().map_err(|_| format!("{text:?} is not an IPv4 address"))?;
    if is_host_address(address) {
        Ok(address)
    } else {
        Err(format!("{address} is not the address of a host"))
    }
}

/// Whether a host can have the address: neither unspecified, loopback, multicast nor reserved.
fn is_host_address(address: Ipv4Addr) -> bool {
    let [first, ..] = address.octets();
    first != 0 && first < 224 && !address.is_loopback()
}

struct BackendData {
    vni: Option<u64>,
    mac: Mac,
}

fn read_backend_data(text: &str) -> Result<BackendData, String> {
    let raw: RawBackendData =
        serde_json::from_str(text).map_err(|error| format!("{text:?} cannot be read: {error}"))?;
    let mac = raw.mac.ok_or_else(|| format!("{text:?} has no VtepMAC"))?;
    let mac: Mac = mac.parse().map_err(|error| format!("VtepMAC {mac:?}: {error}"))?;
    if mac.is_station() {
        Ok(BackendData { vni: raw.vni, mac })
    } else {
        Err(format!("VtepMAC {mac} is zero or a group address"))
    }
}

/// The JSON as Go's decoder reads it into flannel's structure: keys in any case, the last one counts, unknown ones
/// are ignored.
#[derive(Default)]
struct RawBackendData {
    vni: Option<u64>,
    mac: Option<String>,
}

impl<'de> Deserialize<'de> for RawBackendData {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;

        impl<'de> Visitor<'de> for Fields {
            type Value = RawBackendData;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object with VtepMAC")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut data = RawBackendData::default();
                while let Some(key) = map.next_key::<String>()? {
                    if key.eq_ignore_ascii_case("VNI") {
                        data.vni = map.next_value()?;
                    } else if key.eq_ignore_ascii_case("VtepMAC") {
                        data.mac = map.next_value()?;
                    } else {
                        map.next_value::<IgnoredAny>()?;
                    }
                }
                Ok(data)
            }
        }

        deserializer.deserialize_map(Fields)
    }
}

/// `podCIDRs` (one, or one for each family); `podCIDR` only if that list is empty.
fn read_pod_cidr(node: &Node) -> Result<Ipv4Net, (&'static str, String, &'static str)> {
    const MISSING: &str =
        "the controller manager allocates it (--allocate-node-cidrs), or set spec.podCIDR by hand";
    const FORM: &str = "write a network address with its prefix length, such as 10.244.1.0/24";
    const LIST: &str = "spec.podCIDRs";

    let spec = node.spec.as_ref();
    let list: &[String] = spec.and_then(|spec| spec.pod_cidrs.as_deref()).unwrap_or_default();
    let single = spec.and_then(|spec| spec.pod_cidr.as_ref()).filter(|cidr| !cidr.is_empty());
    let (field, texts) = match list {
        [] => (POD_CIDR, single.map(std::slice::from_ref).unwrap_or_default()),
        list => (LIST, list),
    };
    if texts.is_empty() {
        return Err((field, "is missing: flannel has no subnet for this node".to_owned(), MISSING));
    }
    if texts.len() > 2 {
        return Err((
            field,
            format!("has {} entries", texts.len()),
            "at most one for each address family is allowed",
        ));
    }
    let mut ipv4 = None;
    for text in texts {
        let net: IpNet = text.parse().map_err(|_| (field, format!("{text:?} is not a CIDR"), FORM))?;
        if net.addr() != net.network() {
            return Err((field, format!("{net} has host bits set"), FORM));
        }
        if let IpNet::V4(net) = net
            && ipv4.replace(net).is_some()
        {
            return Err((
                field,
                "has two IPv4 entries".to_owned(),
                "at most one for each address family is allowed",
            ));
        }
    }
    ipv4.ok_or_else(|| {
        (field, "has no IPv4 entry".to_owned(), "this gateway carries IPv4; give the node an IPv4 podCIDR")
    })
}

/// The Node's IPv4 addresses in the order in which they stand there, each once.
fn node_addresses(node: &Node) -> Vec<Ipv4Addr> {
    let listed = node.status.as_ref().and_then(|status| status.addresses.as_deref()).unwrap_or_default();
    let mut addresses = Vec::new();
    for entry in listed.iter().filter(|entry| matches!(entry.type_.as_str(), "InternalIP" | "ExternalIP")) {
        if let Ok(address) = entry.address.parse::<Ipv4Addr>()
            && is_host_address(address)
            && !addresses.contains(&address)
        {
            addresses.push(address);
        }
    }
    addresses
}

/// Where a Pod is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodFacts {
    /// When it was created; hand-written Pods may not say.
    pub created: Option<Timestamp>,
    /// It is being deleted.
    pub terminating: bool,
    /// Name of its node.
    pub node: Arc<str>,
    /// Its address.
    pub address: Ipv4Addr,
    /// Where the source has it from.
    pub origin: Origin,
}

/// Why a Pod has no address of its own in the overlay although nothing is wrong with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum PodSkip {
    /// It has the node's address.
    HostNetwork,
    /// Succeeded or Failed: its address may have been given to another Pod.
    Finished,
    /// No node or no address yet.
    Pending,
    /// IPv6 only.
    NoIpv4,
}

impl fmt::Display for PodSkip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::HostNetwork => "uses the host's network",
            Self::Finished => "finished",
            Self::Pending => "has no node or address yet",
            Self::NoIpv4 => "has no IPv4 address",
        })
    }
}

/// What there is to a Pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PodReading {
    /// It is on a node and has an address.
    Placed(PodFacts),
    /// Nothing to do with it.
    Skipped(PodSkip),
    /// Its status makes no sense.
    Rejected(Problem),
}

/// Reads where a Pod is.
pub fn read_pod(pod: &Pod, reference: &PodRef) -> PodReading {
    let spec = pod.spec.as_ref();
    let status = pod.status.as_ref();
    if spec.and_then(|spec| spec.host_network) == Some(true) {
        return PodReading::Skipped(PodSkip::HostNetwork);
    }
    if matches!(status.and_then(|status| status.phase.as_deref()), Some("Succeeded" | "Failed")) {
        return PodReading::Skipped(PodSkip::Finished);
    }
    let node = spec.and_then(|spec| spec.node_name.as_deref()).filter(|node| !node.is_empty());
    let listed = status.and_then(|status| status.pod_ips.as_deref()).unwrap_or_default();
    let single = status.and_then(|status| status.pod_ip.as_deref());
    let mut addresses =
        listed.iter().map(|entry| entry.ip.as_str()).chain(single.filter(|_| listed.is_empty()));
    let mut addresses = addresses.by_ref().filter(|address| !address.is_empty()).peekable();
    let (Some(node), Some(_)) = (node, addresses.peek()) else {
        return PodReading::Skipped(PodSkip::Pending);
    };
    for text in addresses {
        let wrong = |what| {
            PodReading::Rejected(Problem::error(
                format!("{reference}, status.podIP"),
                what,
                "the kubelet writes it: look at the Pod's sandbox on its node",
            ))
        };
        match text.parse() {
            Ok(std::net::IpAddr::V4(address)) if is_host_address(address) => {
                return PodReading::Placed(PodFacts {
                    created: timestamp(pod.metadata.creation_timestamp.as_ref()),
                    terminating: pod.metadata.deletion_timestamp.is_some(),
                    node: node.into(),
                    address,
                    origin: None,
                });
            }
            Ok(std::net::IpAddr::V4(address)) => {
                return wrong(format!("{address} is not the address of a host"));
            }
            Ok(std::net::IpAddr::V6(_)) => {}
            Err(_) => return wrong(format!("{text:?} is not an IP address")),
        }
    }
    PodReading::Skipped(PodSkip::NoIpv4)
}

fn timestamp(time: Option<&Time>) -> Option<Timestamp> {
    time.map(|time| time.0)
}

#[cfg(test)]
mod tests;
