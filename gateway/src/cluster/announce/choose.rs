//! The gateway's own subnet, where the configuration leaves it to the gateway.
//!
//! It is the podCIDR of the gateway's Node once that exists; else what was chosen before, as long as no node has it; else
//! the last free one of flannel's network, as the controller manager gives out from the beginning. Whoever else is given
//! the same one at that very moment is found before the Node is written: that is refused then, and the next start chooses
//! another one.

use ipnet::{IpNet, Ipv4Net};
use k8s_openapi::api::core::v1::Node;
use tracing::warn;

use super::{
    keep::list,
    node::{OWNER_LABEL, free_subnet, overlap, pod_cidrs, vtep_mac},
};
use crate::{
    cluster::{
        flannel::{BACKEND_DATA, PUBLIC_IP},
        kubernetes::{Failure, Link, NetConf, Timing, is_of_flannel, read_net_conf},
        problem::Problem,
    },
    config::{Open, OpenOverlay, open::remembered},
};

/// Prefix length of a node's subnet where flannel's configuration cannot be read: flannel's default.
const LENGTH: u8 = 24;

/// The subnet of an overlay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settled {
    /// Name of the overlay.
    pub overlay: String,
    /// Its subnet.
    pub subnet: Ipv4Net,
    /// Why this one, for people.
    pub reason: String,
}

/// What the cluster says about who has what.
struct Cluster {
    nodes: Vec<Node>,
    conf: Option<NetConf>,
}

/// Finds the subnets that a configuration leaves open. New ones are chosen only if `may_choose`.
///
/// # Errors
///
/// One cannot be found.
pub async fn settle(
    link: &Link,
    open: &Open,
    may_choose: bool,
    timing: &Timing,
) -> Result<Vec<Settled>, Vec<Problem>> {
    let before = remembered(&open.instance);
    let (server, cluster) = match link.get().await {
        Ok(linked) => {
            let cluster = async {
                let nodes = list(&linked, timing).await?;
                let conf = read_net_conf(&linked, timing).await?.and_then(Result::ok);
                Ok::<_, Failure>(Cluster { nodes, conf })
            };
            (linked.server.clone(), cluster.await)
        }
        Err(failure) => ("the API server".to_owned(), Err(failure)),
    };
    let mut settled: Vec<Settled> = Vec::new();
    let mut problems = Vec::new();
    for overlay in &open.overlays {
        let earlier = before.get(&overlay.name).copied();
        let mut taken = open.taken.clone();
        taken.extend(settled.iter().map(|settled| settled.subnet));
        let found = match &cluster {
            Ok(cluster) => cluster.subnet(overlay, &open.instance, earlier, &taken, may_choose),
            Err(failure) => without_cluster(overlay, earlier, failure, &server),
        };
        match found {
            Ok((subnet, reason)) => settled.push(Settled { overlay: overlay.name.clone(), subnet, reason }),
            Err(problem) => problems.push(problem),
        }
    }
    if problems.is_empty() { Ok(settled) } else { Err(problems) }
}

fn place(overlay: &OpenOverlay) -> String {
    format!("overlay {:?}, subnet", overlay.name)
}

/// While nobody can be asked, nothing changes.
fn without_cluster(
    overlay: &OpenOverlay,
    earlier: Option<Ipv4Net>,
    failure: &Failure,
    server: &str,
) -> Result<(Ipv4Net, String), Problem> {
    let problem = failure.problem(&place(overlay), server);
    match earlier {
        Some(subnet) => {
            warn!("{problem}");
            Ok((subnet, "as before: the API server cannot be asked".to_owned()))
        }
        None => Err(Problem::error(
            problem.place,
            format!("is left to the gateway, which has not chosen one yet, and {}", problem.what),
            format!("{}, or write subnet in the [[overlay]]", problem.remedy),
        )),
    }
}

impl Cluster {
    /// The subnet of an overlay, and why this one. `taken` are those of the gateway's other overlays.
    fn subnet(
        &self,
        overlay: &OpenOverlay,
        instance: &str,
        earlier: Option<Ipv4Net>,
        taken: &[Ipv4Net],
        may_choose: bool,
    ) -> Result<(Ipv4Net, String), Problem> {
        let own = self.nodes.iter().find(|node| node.metadata.name.as_deref() == Some(overlay.node.as_str()));
        if let Some(node) = own
            && is_ours(node, overlay, instance)
            && let Some(IpNet::V4(cidr)) = pod_cidrs(node).first()
        {
            return Ok((*cidr, format!("the podCIDR of Node {}", overlay.node)));
        }
        let conf = self.conf.as_ref().filter(|_| is_of_flannel(&overlay.annotation_prefix));
        let network = overlay.network.or(conf.and_then(|conf| conf.network));
        let is_free = |subnet: &Ipv4Net| {
            network.is_none_or(|network| network.contains(subnet))
                && !taken.iter().any(|other| overlap(*other, *subnet))
                && !self.nodes.iter().flat_map(pod_cidrs).any(|cidr| match cidr {
                    IpNet::V4(cidr) => overlap(cidr, *subnet),
                    IpNet::V6(_) => false,
                })
        };
        if let Some(subnet) = earlier.filter(is_free) {
            return Ok((subnet, "as chosen before".to_owned()));
        }
        let problem = |what: String, remedy: &str| Problem::error(place(overlay), what, remedy);
        if !may_choose {
            return Err(problem(
                format!("is left to the gateway, and there is no Node {} that would tell it", overlay.node),
                "set register = true under [flannel] or run `gateway node apply`: then the gateway chooses one; or \
                 write it in the [[overlay]]",
            ));
        }
        let Some(network) = network else {
            return Err(problem(
                "cannot be chosen: flannel's network is not known".to_owned(),
                "write network in the [[overlay]] (Network of flannel's net-conf.json), or let the gateway read \
                 ConfigMap kube-flannel-cfg (deploy/rbac.yaml)",
            ));
        };
        let length = conf.map_or(LENGTH, |conf| conf.subnet_length);
        free_subnet(network, length, &self.nodes, taken)
            .map(|subnet| (subnet, format!("chosen: the last of {network} that no node has")))
            .ok_or_else(|| {
                problem(
                    format!("cannot be chosen: every /{length} of {network} is taken"),
                    "write a smaller one that no node has in the [[overlay]], or extend flannel's network",
                )
            })
    }
}

/// Whether a Node of the gateway's name was made by it, or by hand for it.
fn is_ours(node: &Node, overlay: &OpenOverlay, instance: &str) -> bool {
    let label = node.metadata.labels.as_ref().and_then(|labels| labels.get(OWNER_LABEL));
    let annotation = |suffix: &str| {
        node.metadata.annotations.as_ref()?.get(&format!("{}{suffix}", overlay.annotation_prefix))
    };
    label.is_some_and(|owner| owner == instance)
        || (annotation(PUBLIC_IP).is_some_and(|address| *address == overlay.local.to_string())
            && annotation(BACKEND_DATA).and_then(|data| vtep_mac(data)) == Some(overlay.mac.to_string()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn overlay() -> OpenOverlay {
        OpenOverlay {
            name: "flannel".to_owned(),
            node: "gw".to_owned(),
            local: [172, 16, 2, 200].into(),
            mac: "0e:11:22:33:44:55".parse().unwrap(),
            network: Some("10.244.0.0/16".parse().unwrap()),
            annotation_prefix: "flannel.alpha.coreos.com/".to_owned(),
        }
    }

    fn node(name: &str, owner: &str, cidr: &str) -> Node {
        serde_json::from_value(json!({
            "metadata": { "name": name, "labels": { OWNER_LABEL: owner } },
            "spec": { "podCIDR": cidr, "podCIDRs": [cidr] },
        }))
        .unwrap()
    }

    fn cluster(nodes: Vec<Node>) -> Cluster {
        Cluster { nodes, conf: None }
    }

    fn net(text: &str) -> Ipv4Net {
        text.parse().unwrap()
    }

    #[test]
    fn the_gateway_s_node_tells_whatever_was_chosen_before() {
        let cluster = cluster(vec![node("gw", "default", "10.244.77.0/24")]);
        let found = cluster.subnet(&overlay(), "default", Some(net("10.244.255.0/24")), &[], false).unwrap();
        assert_eq!(found, (net("10.244.77.0/24"), "the podCIDR of Node gw".to_owned()));
    }

    /// Somebody else's Node of that name tells nothing, one that was made by hand does.
    #[test]
    fn a_node_of_that_name_must_be_ours() {
        let mut by_hand = node("gw", "other", "10.244.77.0/24");
        let found = cluster(vec![by_hand.clone()]).subnet(&overlay(), "default", None, &[], true).unwrap();
        assert_eq!(found.0, net("10.244.255.0/24"));
        by_hand.metadata.annotations = Some(
            [("public-ip", "172.16.2.200"), ("backend-data", r#"{"VtepMAC":"0E:11:22:33:44:55"}"#)]
                .map(|(key, value)| (format!("flannel.alpha.coreos.com/{key}"), value.to_owned()))
                .into(),
        );
        let found = cluster(vec![by_hand]).subnet(&overlay(), "default", None, &[], true).unwrap();
        assert_eq!(found.0, net("10.244.77.0/24"));
    }

    #[test]
    fn what_was_chosen_before_stays_while_it_is_free() {
        let before = Some(net("10.244.40.0/24"));
        let subnet = |nodes, taken: &[Ipv4Net]| {
            cluster(nodes).subnet(&overlay(), "default", before, taken, true).unwrap().0
        };
        assert_eq!(subnet(vec![node("a", "", "10.244.1.0/24")], &[]), net("10.244.40.0/24"));
        let last = net("10.244.255.0/24");
        assert_eq!(subnet(vec![node("a", "", "10.244.40.128/25")], &[]), last, "a node has it");
        assert_eq!(subnet(vec![], &[net("10.244.40.0/25")]), last, "another overlay has it");
        let narrow = OpenOverlay { network: Some(net("10.245.0.0/16")), ..overlay() };
        let found = cluster(vec![]).subnet(&narrow, "default", before, &[], true).unwrap();
        assert_eq!(found.0, net("10.245.255.0/24"), "flannel has another network now");
    }

    #[test]
    fn flannel_s_own_configuration_tells_network_and_size() {
        let conf = NetConf::parse(r#"{"Network":"10.200.0.0/16","SubnetLen":26}"#, "conf").unwrap();
        let mut overlay = OpenOverlay { network: None, ..overlay() };
        let mut cluster = Cluster { nodes: vec![], conf: Some(conf) };
        assert_eq!(cluster.subnet(&overlay, "default", None, &[], true).unwrap().0, net("10.200.255.192/26"));
        // It is about the overlay with flannel's own annotations.
        "site.example/".clone_into(&mut overlay.annotation_prefix);
        let problem = cluster.subnet(&overlay, "default", None, &[], true).unwrap_err();
        assert!(problem.what.contains("network is not known"), "{problem}");
        overlay.network = Some(net("10.200.0.0/24"));
        cluster.nodes = vec![node("a", "", "10.200.0.0/24")];
        let problem = cluster.subnet(&overlay, "default", None, &[], true).unwrap_err();
        assert!(problem.what.contains("every /24 of 10.200.0.0/24 is taken"), "{problem}");
    }

    #[test]
    fn nothing_is_chosen_for_those_who_do_not_announce_it() {
        let problem = cluster(vec![]).subnet(&overlay(), "default", None, &[], false).unwrap_err();
        assert!(problem.remedy.contains("register = true"), "{problem}");
    }

    #[test]
    fn without_the_api_only_what_was_chosen_before_is_known() {
        let away = Failure::Unreachable("connection refused".to_owned());
        let before = net("10.244.40.0/24");
        assert_eq!(without_cluster(&overlay(), Some(before), &away, "https://api").unwrap().0, before);
        let problem = without_cluster(&overlay(), None, &away, "https://api").unwrap_err();
        assert!(
            problem.what.contains("has not chosen one yet") && problem.what.contains("refused"),
            "{problem}"
        );
    }
}
