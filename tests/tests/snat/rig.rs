//! The lab with clients from outside, a gateway, and a watch over the wires.

use std::{collections::BTreeMap, fs, net::Ipv4Addr, time::Duration};

use gateway_tests::lab::{
    Flannel, Gateway, Host,
    flannel::Node,
    outside::{AUTOMAP, Watch},
    traffic, wait_until,
};
use serde_json::Value;

pub(crate) const SOON: Duration = Duration::from_secs(5);
/// The pod that most tests talk to.
pub(crate) const ONE: Node = Node::new(1);

pub(crate) struct Rig {
    pub(crate) gateway: Gateway,
    pub(crate) lab: Flannel,
    watch: Option<Watch>,
    configuration: String,
}

impl Rig {
    /// Automap, as it is without any configuration.
    pub(crate) fn start(label: &str) -> Self {
        Self::configured(label, "", &[AUTOMAP])
    }

    /// With keys at the end of the configuration that make these SNAT addresses.
    pub(crate) fn configured(label: &str, keys: &str, addresses: &[Ipv4Addr]) -> Self {
        let mut lab = Flannel::start(&format!("snat-{label}")).unwrap();
        lab.add_outside().unwrap();
        let configuration = fs::read_to_string(lab.config()).unwrap();
        fs::write(lab.config(), format!("{configuration}{keys}")).unwrap();
        let watch = Watch::start(&lab, addresses).unwrap();
        let mut gateway = Gateway::start(&lab).unwrap();
        gateway.wait_ready(&lab).unwrap();
        gateway.wait_settled(lab.gateway()).unwrap();
        Self { gateway, lab, watch: Some(watch), configuration }
    }

    /// Other keys at the end of the configuration, from the next start on.
    pub(crate) fn configure(&self, keys: &str) {
        fs::write(self.lab.config(), format!("{}{keys}", self.configuration)).unwrap();
    }

    pub(crate) fn host(&self) -> &Host {
        self.lab.gateway()
    }

    pub(crate) fn guest(&self) -> &Host {
        self.lab.guest()
    }

    pub(crate) fn pod(&self, number: u8) -> &Host {
        self.lab.pod(ONE, number)
    }

    /// Starts the daemon again.
    pub(crate) fn come_back(&mut self) {
        self.gateway.restart(self.lab.gateway()).unwrap();
        self.gateway.wait_settled(self.lab.gateway()).unwrap();
    }

    pub(crate) fn counters(&self) -> BTreeMap<String, u64> {
        self.gateway.counters(self.host()).unwrap()
    }

    /// How often an outcome happened since `before`.
    pub(crate) fn since(&self, before: &BTreeMap<String, u64>, outcome: &str) -> u64 {
        self.counters()[outcome] - before[outcome]
    }

    /// Waits until an outcome has happened so often since `before`.
    pub(crate) fn wait_count(&self, before: &BTreeMap<String, u64>, outcome: &str, count: u64) {
        wait_until(&format!("{count} times {outcome}"), SOON, || {
            Ok((self.since(before, outcome) >= count).then_some(()))
        })
        .unwrap();
    }

    /// The sessions that `gateway show sessions` prints with these arguments.
    pub(crate) fn sessions(&self, arguments: &[&str]) -> Vec<Value> {
        let text =
            self.gateway.text(self.host(), &[&["show", "sessions", "--json"], arguments].concat()).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// What `gateway status` tells of sessions.
    pub(crate) fn status(&self) -> Value {
        let output = self.gateway.output(self.host(), &["status", "--json"]).unwrap();
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// Every node's first pod answers the client.
    pub(crate) fn assert_reaches_all(&self, client: &Host) {
        for node in self.lab.nodes() {
            let pings = traffic::ping(client, node.pod_address(1), 3, &[]).unwrap();
            assert_eq!(pings.received, 3, "{} to {node:?}: {pings:?}", client.name());
        }
    }

    /// What was seen on the wire: nothing.
    pub(crate) fn finish(mut self) {
        self.watch.take().unwrap().finish().unwrap();
    }

    /// The watch, for a test in which there is something to see.
    pub(crate) fn take_watch(&mut self) -> Watch {
        self.watch.take().unwrap()
    }
}
