//! What the gateway's Node says, and what to do about the one that is there.

use std::net::Ipv4Addr;

use ipnet::{IpNet, Ipv4Net};
use k8s_openapi::api::core::v1::Node;
use serde_json::{Value, json};

use crate::{
    cluster::{
        flannel::{NodeReading, NodeSkip, read_node},
        problem::Problem,
    },
    config::{Config, Overlay},
};

/// Marks what a gateway made; its value is the instance.
pub(super) const OWNER_LABEL: &str = "xdp-gateway/instance";
/// Keeps pods away, also those that tolerate a node without a kubelet.
pub(super) const TAINT: &str = "xdp-gateway/external";
/// Prefix of the field manager's name.
const MANAGER: &str = "xdp-gateway";

/// How a gateway is announced in one overlay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Announcement {
    /// Name of the Node.
    pub name: String,
    /// Instance of the gateway: the owner.
    pub instance: String,
    /// What is announced.
    pub overlay: Overlay,
}

/// What to do about the Node.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Action {
    /// It is as it should be.
    Nothing,
    /// Apply this; the object is made if it is not there.
    Apply(Value),
    /// What cannot be changed, or must not be changed in place, differs: remove it first.
    Replace(String),
    /// It is somebody else's.
    Refuse(Problem),
}

impl Announcement {
    /// All that a configuration asks for: one for each overlay.
    pub fn all(config: &Config) -> Vec<Self> {
        let count = config.overlays.len();
        config
            .overlays
            .iter()
            .map(|overlay| Self {
                name: config.flannel.node_of(&overlay.name, count),
                instance: config.instance.clone(),
                overlay: overlay.clone(),
            })
            .collect()
    }

    /// Field manager of everything that is applied.
    pub(super) fn manager(&self) -> String {
        format!("{MANAGER}-{}", self.instance)
    }

    /// Field manager of the Node's status. Servers before 1.22 do not tell status from the rest in what a manager owns: by
    /// the same name the status would take the place of annotations and labels.
    pub(super) fn status_manager(&self) -> String {
        format!("{}-status", self.manager())
    }

    /// The Node, without its taint: that list belongs to nobody alone.
    pub fn render(&self) -> Value {
        self.rendered(&self.backend_data(false))
    }

    fn rendered(&self, backend_data: &str) -> Value {
        let Overlay { local, subnet, annotation_prefix, .. } = &self.overlay;
        let key = |suffix: &str| format!("{annotation_prefix}{suffix}");
        json!({
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {
                "name": self.name,
                "labels": {
                    OWNER_LABEL: self.instance,
                    "node.kubernetes.io/exclude-from-external-load-balancers": "true",
                },
                "annotations": {
                    key("kube-subnet-manager"): "true",
                    key("backend-type"): "vxlan",
                    key("backend-data"): backend_data,
                    key("public-ip"): local.to_string(),
                },
            },
            "spec": {
                "podCIDR": subnet.to_string(),
                "podCIDRs": [subnet.to_string()],
                "unschedulable": true,
                // Cloud controllers leave alone what is of a provider that they do not know.
                "providerID": format!("external://{}", self.name),
            },
        })
    }

    /// The annotation; both spellings say the same.
    fn backend_data(&self, other: bool) -> String {
        let space = if other { " " } else { "" };
        format!(r#"{{"VNI":{},{space}"VtepMAC":"{}"}}"#, self.overlay.vni.get(), self.overlay.mac)
    }

    /// Whether a Node was made by this gateway.
    pub(super) fn owns(&self, node: &Node) -> bool {
        node.metadata.labels.as_ref().and_then(|labels| labels.get(OWNER_LABEL)) == Some(&self.instance)
    }

    /// Whether a Node stands for this gateway, whoever made it.
    pub(super) fn speaks_for(&self, node: &Node) -> bool {
        self.owns(node) || read_node(node, &self.overlay) == NodeReading::Skipped(NodeSkip::Own)
    }

    /// Why the Node of this name, if it exists, is not kept Ready.
    pub(super) fn no_heart(&self, exists: bool) -> Problem {
        let place = format!("Node {}", self.name);
        if exists {
            Problem::error(
                place,
                "does not stand for this gateway, so heartbeat leaves it alone",
                "choose another name: node under [flannel]",
            )
        } else {
            Problem::error(
                place,
                "does not exist, so there is nothing that heartbeat could keep Ready",
                "set register = true under [flannel], or run `gateway node apply`",
            )
        }
    }

    /// What is to be done about the Node of this name, as it is now.
    pub(super) fn action(&self, node: Option<&Node>) -> Action {
        let Some(node) = node else { return Action::Apply(self.render()) };
        if !self.speaks_for(node) {
            return Action::Refuse(Problem::error(
                format!("Node {}", self.name),
                format!("exists, and was not made by gateway instance {:?}", self.instance),
                "choose another name by flannel.node, or delete that Node if nobody needs it",
            ));
        }
        let annotation = |suffix: &str| {
            let key = format!("{}{suffix}", self.overlay.annotation_prefix);
            node.metadata.annotations.as_ref()?.get(&key).map(String::as_str)
        };
        let cidrs = pod_cidrs(node);
        let subnet = IpNet::V4(self.overlay.subnet);
        if cidrs.first().is_some_and(|cidr| *cidr != subnet) || cidrs.len() > 1 {
            return Action::Replace(format!("its podCIDR is not {subnet}, and cannot be changed"));
        }
        let data = annotation("backend-data");
        let spellings = [self.backend_data(false), self.backend_data(true)];
        let fits = data.is_some_and(|data| spellings.iter().any(|spelling| spelling == data));
        if let Some(mac) = data.and_then(vtep_mac)
            && mac != self.overlay.mac.to_string()
        {
            // In place, flannel would leave the old MAC address in the nodes' FDB for ever.
            return Action::Replace(format!("its VtepMAC is {mac}, not {}", self.overlay.mac));
        }
        // flannel looks at a Node again only if one of three annotations changes.
        let unseen = cidrs.is_empty() || annotation("kube-subnet-manager") != Some("true");
        let spelling = match data {
            Some(data) if fits => {
                let other = usize::from(data == spellings[0]);
                if unseen { spellings[other].as_str() } else { data }
            }
            _ => spellings[0].as_str(),
        };
        let wanted = self.rendered(spelling);
        let live = serde_json::to_value(node).unwrap_or_default();
        if contains(&live, &wanted) { Action::Nothing } else { Action::Apply(wanted) }
    }

    /// The taints that the Node should have; `None` if it has them.
    pub(super) fn taints(node: &Node) -> Option<Value> {
        let mut taints = node.spec.as_ref().and_then(|spec| spec.taints.clone()).unwrap_or_default();
        let before = taints.len();
        for effect in ["NoSchedule", "NoExecute"] {
            if !taints.iter().any(|taint| taint.key == TAINT && taint.effect == effect) {
                taints.push(k8s_openapi::api::core::v1::Taint {
                    key: TAINT.to_owned(),
                    effect: effect.to_owned(),
                    ..Default::default()
                });
            }
        }
        // If somebody else changes the list meanwhile, this write must fail.
        let version = node.metadata.resource_version.as_deref();
        (taints.len() > before)
            .then(|| json!({ "metadata": { "resourceVersion": version }, "spec": { "taints": taints } }))
    }

    /// What others have of what the Node would claim: writing it would take them off the network.
    pub fn collisions(&self, nodes: &[Node]) -> Vec<Problem> {
        let Overlay { local, mac, subnet, annotation_prefix, .. } = &self.overlay;
        let mut problems = Vec::new();
        for node in nodes {
            let owner = node.metadata.name.as_deref().unwrap_or_default();
            if owner == self.name {
                continue;
            }
            let annotation = |suffix: &str| {
                node.metadata.annotations.as_ref()?.get(&format!("{annotation_prefix}{suffix}"))
            };
            let mut clash = |what: String, remedy: String| {
                problems.push(Problem::error(format!("Node {}", self.name), what, remedy));
            };
            for cidr in pod_cidrs(node) {
                let IpNet::V4(cidr) = cidr else { continue };
                if overlap(cidr, *subnet) {
                    let network = self.overlay.network;
                    let free =
                        network.and_then(|network| free_subnet(network, subnet.prefix_len(), nodes, &[]));
                    let free = free.map_or_else(String::new, |free| format!(", such as {free}"));
                    clash(
                        format!(
                            "its podCIDR {subnet} overlaps {cidr} of Node {owner}: that node would lose its route"
                        ),
                        format!(
                            "write a subnet that no node has{free}, or leave the key out and start the gateway again: it \
                             chooses one"
                        ),
                    );
                }
            }
            let data = annotation("backend-data").and_then(|data| vtep_mac(data));
            if data.is_some_and(|theirs| theirs == mac.to_string()) {
                clash(
                    format!(
                        "its VtepMAC {mac} is that of Node {owner}: one of them would get both nodes' packets"
                    ),
                    "choose another locally administered MAC address".to_owned(),
                );
            }
            let theirs = annotation("public-ip").and_then(|address| address.parse::<Ipv4Addr>().ok());
            if theirs == Some(*local) {
                clash(
                    format!("its public-ip {local} is that of Node {owner}"),
                    "write this host's own underlay address".to_owned(),
                );
            }
        }
        problems
    }
}

/// The last subnet of the network that no node has, nor anybody else.
pub(super) fn free_subnet(
    network: Ipv4Net,
    length: u8,
    nodes: &[Node],
    others: &[Ipv4Net],
) -> Option<Ipv4Net> {
    let mut taken = others.to_vec();
    taken.extend(nodes.iter().flat_map(pod_cidrs).filter_map(|cidr| match cidr {
        IpNet::V4(cidr) => Some(cidr),
        IpNet::V6(_) => None,
    }));
    // From the end: the controller manager gives out from the beginning.
    let subnets: Vec<Ipv4Net> = network.subnets(length).ok()?.take(1 << 16).collect();
    subnets.into_iter().rev().find(|free| !taken.iter().any(|cidr| overlap(*cidr, *free)))
}

pub(super) fn overlap(a: Ipv4Net, b: Ipv4Net) -> bool {
    a.contains(&b) || b.contains(&a)
}

pub(super) fn pod_cidrs(node: &Node) -> Vec<IpNet> {
    let Some(spec) = &node.spec else { return Vec::new() };
    let list = spec.pod_cidrs.iter().flatten();
    let list: Vec<IpNet> = list.filter_map(|cidr| cidr.parse().ok()).collect();
    if list.is_empty() { spec.pod_cidr.iter().filter_map(|cidr| cidr.parse().ok()).collect() } else { list }
}

/// The MAC address in the annotation, in one spelling.
pub(super) fn vtep_mac(data: &str) -> Option<String> {
    let data: Value = serde_json::from_str(data).ok()?;
    let fields = data.as_object()?;
    let (_, mac) = fields.iter().find(|(key, _)| key.eq_ignore_ascii_case("VtepMAC"))?;
    Some(mac.as_str()?.parse::<gateway_common::wire::Mac>().ok()?.to_string())
}

/// Whether an object says everything that is wanted.
fn contains(live: &Value, wanted: &Value) -> bool {
    match wanted {
        Value::Object(fields) => {
            fields.iter().all(|(key, value)| live.get(key).is_some_and(|live| contains(live, value)))
        }
        other => live == other,
    }
}
