//! The table as objects of nft's JSON, and what changes one into another.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
};

use ipnet::Ipv4Net;
use serde_json::{Value, json};

use super::{Dropped, Goal, nft, nft::NftError};

const FAMILY: &str = "inet";
const PRIORITY: i32 = -10;
/// Set of interface names.
const UNDERLAY: &str = "underlay";
/// Set of local address, port, source.
const NODES: &str = "nodes";
/// Set of local address, port.
const OPEN: &str = "open";
const REFUSED: &str = "tunnel_refused";
const FOREIGN: &str = "client_foreign";

/// What follows from the configuration alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Frame {
    pub(super) table: String,
    /// Tunnel ports.
    pub(super) ports: BTreeSet<u16>,
    /// Local address and port of overlays that check no sources.
    pub(super) open: BTreeSet<(Ipv4Addr, u16)>,
    /// Tunnel devices, and what may be forwarded into them.
    pub(super) tunnels: BTreeMap<String, Admission>,
}

/// What may be forwarded into a tunnel device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Admission {
    /// Sources that may, in any case.
    pub(super) subnet: Ipv4Net,
    /// The rules of source translation, in order: clients, destinations, and whether they are routed. Whom none names is
    /// refused.
    pub(super) rules: Vec<(Ipv4Net, Ipv4Net, bool)>,
}

impl Frame {
    /// Everything that a table with `elements` but without chains needs.
    pub(super) fn build(&self, elements: &Elements, goal: &Goal) -> Vec<Value> {
        let table = &self.table;
        let mut objects = self.empty_table();
        for name in [REFUSED, FOREIGN] {
            objects.push(add("counter", &self.named(name)));
        }
        for (name, kind) in [
            (UNDERLAY, json!("ifname")),
            (NODES, json!(["ipv4_addr", "inet_service", "ipv4_addr"])),
            (OPEN, json!(["ipv4_addr", "inet_service"])),
        ] {
            let mut set = self.named(name);
            set["type"] = kind;
            objects.push(add("set", &set));
        }
        // `open` is the configuration's, so it is written whole: a moment of emptiness is inside of the transaction.
        objects.push(json!({ "flush": { "set": self.named(OPEN) } }));
        let open = self.open.iter().map(|(local, port)| json!({ "concat": [local, port] })).collect();
        objects.extend(element("add", table, OPEN, open));
        objects.extend(elements.change(table, goal));

        for (name, hook) in [("input", Some("input")), ("tunnel", None), ("forward", Some("forward"))] {
            let mut chain = self.named(name);
            if let Some(hook) = hook {
                chain["type"] = json!("filter");
                chain["hook"] = json!(hook);
                chain["prio"] = json!(PRIORITY);
                chain["policy"] = json!("accept");
            }
            objects.push(add("chain", &chain));
        }
        for port in &self.ports {
            objects.push(self.rule(
                "input",
                &[equal(&udp_port(), &json!(port)), json!({ "jump": { "target": "tunnel" } })],
            ));
        }
        let arrival = equal(&json!({ "meta": { "key": "iifname" } }), &json!(format!("@{UNDERLAY}")));
        let to = [ip("daddr"), udp_port()];
        let known = json!({ "concat": [ip("daddr"), udp_port(), ip("saddr")] });
        let accept = json!({ "accept": null });
        objects.push(
            self.rule(
                "tunnel",
                &[arrival.clone(), equal(&known, &json!(format!("@{NODES}"))), accept.clone()],
            ),
        );
        objects.push(
            self.rule(
                "tunnel",
                &[arrival, equal(&json!({ "concat": to }), &json!(format!("@{OPEN}"))), accept],
            ),
        );
        objects.push(self.rule("tunnel", &drop_as(REFUSED)));
        for (device, Admission { subnet, rules }) in &self.tunnels {
            let device = equal(&json!({ "meta": { "key": "oifname" } }), &json!(device));
            let foreign = json!({ "match": { "op": "!=", "left": ip("saddr"), "right": prefix(*subnet) } });
            // After the last rule that routes, all are refused alike.
            let count = rules.iter().rposition(|(.., routed)| *routed).map_or(0, |last| last + 1);
            for (clients, destinations, routed) in &rules[..count] {
                let mut expression = vec![device.clone(), foreign.clone()];
                for (field, net) in [("saddr", clients), ("daddr", destinations)] {
                    if net.prefix_len() > 0 {
                        expression.push(equal(&ip(field), &prefix(*net)));
                    }
                }
                if *routed {
                    expression.push(json!({ "accept": null }));
                } else {
                    expression.extend(drop_as(FOREIGN));
                }
                objects.push(self.rule("forward", &expression));
            }
            objects.push(self.rule("forward", &[&[device, foreign], &drop_as(FOREIGN)[..]].concat()));
        }
        objects
    }

    /// Makes the table if there is none.
    pub(super) fn empty_table(&self) -> Vec<Value> {
        vec![add("table", &json!({ "family": FAMILY, "name": self.table }))]
    }

    fn named(&self, name: &str) -> Value {
        named(&self.table, name)
    }

    fn rule(&self, chain: &str, expression: &[Value]) -> Value {
        add("rule", &json!({ "family": FAMILY, "table": self.table, "chain": chain, "expr": expression }))
    }
}

fn named(table: &str, name: &str) -> Value {
    json!({ "family": FAMILY, "table": table, "name": name })
}

fn add(kind: &str, object: &Value) -> Value {
    json!({ "add": { kind: object } })
}

fn equal(left: &Value, right: &Value) -> Value {
    json!({ "match": { "op": "==", "left": left, "right": right } })
}

fn prefix(net: Ipv4Net) -> Value {
    if net.prefix_len() == 32 {
        return json!(net.addr());
    }
    json!({ "prefix": { "addr": net.network(), "len": net.prefix_len() } })
}

fn ip(field: &str) -> Value {
    json!({ "payload": { "protocol": "ip", "field": field } })
}

fn udp_port() -> Value {
    json!({ "payload": { "protocol": "udp", "field": "dport" } })
}

fn drop_as(counter: &str) -> [Value; 2] {
    [json!({ "counter": counter }), json!({ "drop": null })]
}

/// Adds or deletes elements of a set; nothing if there are none.
fn element(verb: &str, table: &str, set: &str, elements: Vec<Value>) -> Option<Value> {
    let mut object = named(table, set);
    (!elements.is_empty()).then(|| {
        object["elem"] = Value::Array(elements);
        json!({ verb: { "element": object } })
    })
}

pub(super) fn delete_table(table: &str) -> Value {
    json!({ "delete": { "table": { "family": FAMILY, "name": table } } })
}

/// Elements of the sets that follow cluster and host, as nft writes them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Elements {
    underlay: Vec<Value>,
    nodes: Vec<Value>,
}

impl Elements {
    /// What makes the sets those of the goal.
    pub(super) fn change(&self, table: &str, goal: &Goal) -> Vec<Value> {
        let mut objects = difference(table, UNDERLAY, &self.underlay, &underlay(goal));
        if let Some(nodes) = self.wanted(goal) {
            objects.extend(difference(table, NODES, &self.nodes, &nodes));
        }
        objects
    }

    /// Notes that they are those of the goal.
    pub(super) fn settle(&mut self, goal: &Goal) {
        self.underlay = underlay(goal);
        if let Some(nodes) = self.wanted(goal) {
            self.nodes = nodes;
        }
    }

    /// The nodes that the set is to hold.
    fn wanted(&self, goal: &Goal) -> Option<Vec<Value>> {
        let mut wanted = nodes(goal)?;
        if goal.partial {
            let more = self.nodes.iter().filter(|node| !wanted.contains(node)).cloned();
            wanted.extend(more.collect::<Vec<_>>());
        }
        Some(wanted)
    }
}

fn underlay(goal: &Goal) -> Vec<Value> {
    goal.underlay.iter().map(|name| json!(name)).collect()
}

fn nodes(goal: &Goal) -> Option<Vec<Value>> {
    let nodes = goal.nodes.as_ref()?.iter();
    Some(nodes.map(|(local, port, source)| json!({ "concat": [local, port, source] })).collect())
}

/// First what is new, then what is not wanted.
fn difference(table: &str, set: &str, have: &[Value], want: &[Value]) -> Vec<Value> {
    // Values of JSON have no order, their texts do.
    let index = |values: &[Value]| -> BTreeMap<String, Value> {
        values.iter().map(|value| (value.to_string(), value.clone())).collect()
    };
    let (have, want) = (index(have), index(want));
    let without = |a: &BTreeMap<String, Value>, b: &BTreeMap<String, Value>| {
        a.iter().filter(|(key, _)| !b.contains_key(*key)).map(|(_, value)| value.clone()).collect()
    };
    let added = element("add", table, set, without(&want, &have));
    let gone = element("delete", table, set, without(&have, &want));
    added.into_iter().chain(gone).collect()
}

/// A table as it is.
#[derive(Clone, Debug, Default)]
pub(super) struct Found {
    /// Chains, rules and sets without their elements, handles and counts, in the order of the list.
    pub(super) frame: Vec<Value>,
    pub(super) nodes: Vec<Value>,
    underlay: Vec<Value>,
    pub(super) dropped: BTreeMap<String, Dropped>,
}

impl Found {
    /// Reads a table; `None` if there is none.
    pub(super) async fn read(table: &str) -> Result<Option<Self>, NftError> {
        Ok(nft::list(table).await?.map(Self::new))
    }

    fn new(listed: Vec<Value>) -> Self {
        let mut found = Self::default();
        for mut object in listed {
            let Some((kind, body)) = object.as_object_mut().and_then(|object| object.iter_mut().next())
            else {
                continue;
            };
            let Some(body) = body.as_object_mut() else { continue };
            if kind == "metainfo" {
                continue;
            }
            body.remove("handle");
            let name = body.get("name").and_then(Value::as_str).unwrap_or_default().to_owned();
            let mut elements = || match body.remove("elem") {
                Some(Value::Array(elements)) => elements,
                _ => Vec::new(),
            };
            match (kind.as_str(), name.as_str()) {
                ("set", NODES) => found.nodes = elements(),
                ("set", UNDERLAY) => found.underlay = elements(),
                ("counter", _) => {
                    let mut count =
                        |key| body.remove(key).and_then(|count| count.as_u64()).unwrap_or_default();
                    let dropped = Dropped { packets: count("packets"), bytes: count("bytes") };
                    found.dropped.insert(name, dropped);
                }
                _ => {}
            }
            found.frame.push(object);
        }
        found
    }

    pub(super) fn elements(&self) -> Elements {
        Elements { underlay: self.underlay.clone(), nodes: self.nodes.clone() }
    }

    /// What removes all chains, and what is not ours, so that the frame can be built around the sets.
    pub(super) fn stale(&self, table: &str) -> Vec<Value> {
        let names = |kind: &str| -> Vec<&str> {
            self.frame.iter().filter_map(|object| object.get(kind)?.get("name")?.as_str()).collect()
        };
        let chains = names("chain");
        // A chain can go only when no rule jumps to it.
        let flush = chains.iter().map(|name| json!({ "flush": { "chain": named(table, name) } }));
        let delete = chains.iter().map(|name| json!({ "delete": { "chain": named(table, name) } }));
        let strange = ["set", "map", "counter"].into_iter().flat_map(|kind| {
            let strange = names(kind)
                .into_iter()
                .filter(|name| ![UNDERLAY, NODES, OPEN, REFUSED, FOREIGN].contains(name));
            strange.map(|name| json!({ "delete": { kind: named(table, name) } })).collect::<Vec<_>>()
        });
        flush.chain(delete).chain(strange).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn goal(underlay: &[&str], nodes: &[u8]) -> Goal {
        let local = Ipv4Addr::new(172, 16, 2, 200);
        Goal {
            underlay: underlay.iter().map(|&name| name.to_owned()).collect(),
            nodes: Some(nodes.iter().map(|last| (local, 8472, Ipv4Addr::new(172, 16, 2, *last))).collect()),
            partial: false,
        }
    }

    fn after(goal: &Goal) -> Elements {
        let mut elements = Elements::default();
        elements.settle(goal);
        elements
    }

    #[test]
    fn only_the_difference_is_written() {
        let old = after(&goal(&["und0"], &[11, 12]));
        assert_eq!(old.change("t", &goal(&["und0"], &[12, 11])), Vec::<Value>::new());
        assert_eq!(
            old.change("t", &goal(&["und0"], &[12, 13])),
            [
                json!({ "add": { "element": { "family": "inet", "table": "t", "name": "nodes",
                    "elem": [{ "concat": ["172.16.2.200", 8472, "172.16.2.13"] }] } } }),
                json!({ "delete": { "element": { "family": "inet", "table": "t", "name": "nodes",
                    "elem": [{ "concat": ["172.16.2.200", 8472, "172.16.2.11"] }] } } }),
            ]
        );
    }

    #[test]
    fn nodes_stay_while_none_are_known() {
        let old = after(&goal(&["und0"], &[11]));
        let unknown = Goal { nodes: None, ..goal(&["und0"], &[]) };
        assert_eq!(old.change("t", &unknown), Vec::<Value>::new());
        let mut settled = old.clone();
        settled.settle(&unknown);
        assert_eq!(settled, old);
        // Some are known: they come, and nobody goes.
        let some = Goal { partial: true, ..goal(&["und0"], &[12]) };
        assert_eq!(
            old.change("t", &some),
            [json!({ "add": { "element": { "family": "inet", "table": "t",
            "name": "nodes", "elem": [{ "concat": ["172.16.2.200", 8472, "172.16.2.12"] }] } } })]
        );
        settled.settle(&some);
        assert_eq!(settled.change("t", &goal(&["und0"], &[11, 12])), Vec::<Value>::new());
    }
}
