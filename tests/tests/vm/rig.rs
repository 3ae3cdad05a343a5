//! The lab with its gateway, and what every test asks of it.

use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddrV4},
    thread,
};

use gateway_common::abi::{Class, Outcome};
use gateway_tests::lab::{Flannel, Gateway, Host, flannel::NIC, traffic};

/// Bytes of a transfer.
const BODY: usize = 100_000;
const PORT: u16 = 8080;

pub(crate) struct Rig {
    pub(crate) gateway: Gateway,
    pub(crate) lab: Flannel,
}

impl Rig {
    pub(crate) fn start(lab: Flannel) -> Self {
        let mut gateway = Gateway::start(&lab).unwrap();
        gateway.wait_settled(lab.gateway()).unwrap();
        gateway.wait_ready(&lab).unwrap();
        Self { gateway, lab }
    }

    pub(crate) fn counters(&self) -> BTreeMap<String, u64> {
        self.gateway.counters(self.lab.gateway()).unwrap()
    }

    /// What has been counted under an outcome since.
    pub(crate) fn since(&self, before: &BTreeMap<String, u64>, outcome: Outcome) -> u64 {
        let label = Outcome::by_number(outcome.number()).unwrap().label;
        self.counters()[label] - before[label]
    }

    pub(crate) fn assert_nothing_dropped(&self, before: &BTreeMap<String, u64>) {
        for row in Outcome::TABLE.iter().filter(|row| row.class == Class::Drop) {
            assert_eq!(self.since(before, row.outcome), 0, "{}", row.label);
        }
    }

    /// That the interfaces' drivers run the program themselves.
    pub(crate) fn assert_native(&self, interfaces: &[&str]) {
        let status = self.gateway.json(self.lab.gateway(), &["status"]).unwrap();
        let shown = status["interfaces"].as_array().unwrap();
        for name in interfaces {
            let interface = shown.iter().find(|shown| shown["name"] == *name).unwrap();
            assert_eq!(interface["mode"], "driver", "{interface:#}");
        }
    }

    /// Echo requests and TCP in both directions, between both clients and a pod of every node.
    pub(crate) fn exchange(&self) {
        let before = self.counters();
        for node in self.lab.nodes() {
            for number in [1, 2] {
                let (client, pod) = (self.lab.client(number), self.lab.pod(node, number));
                let (client_address, pod_address) = (client.address(NIC).unwrap(), node.pod_address(number));
                for (from, to, address) in [(client, pod, pod_address), (pod, client, client_address)] {
                    converse(from, to, address);
                }
            }
        }
        let (encap, decap) = (self.since(&before, Outcome::Encap), self.since(&before, Outcome::Decap));
        println!("{encap} packets to pods, {decap} from pods");
        assert!(
            encap > 1000 && decap > 1000,
            "the program did not forward it all: {encap} to pods, {decap} from pods"
        );
        self.assert_nothing_dropped(&before);
    }
}

/// Five echo requests, and a transfer in each direction over one connection.
pub(crate) fn converse(from: &Host, to: &Host, address: Ipv4Addr) {
    let pings = traffic::ping(from, address, 5, &[]).unwrap();
    assert_eq!(pings.received, 5, "{} to {address}: {pings:?}", from.name());
    transfer(from, to, address);
}

fn transfer(from: &Host, to: &Host, address: Ipv4Addr) {
    let (there, back) = (body(from.name()), body(to.name()));
    let listener = to.listen(address, PORT).unwrap();
    thread::scope(|scope| {
        let server = scope.spawn(|| {
            let (mut stream, _) = listener.accept().unwrap();
            let mut got = vec![0; BODY];
            stream.read_exact(&mut got).unwrap();
            stream.write_all(&back).unwrap();
            got
        });
        let mut stream = from
            .connect(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0), SocketAddrV4::new(address, PORT))
            .unwrap();
        stream.write_all(&there).unwrap();
        let mut got = Vec::new();
        stream.read_to_end(&mut got).unwrap();
        assert!(got == back, "{} got something else from {}", from.name(), to.name());
        assert!(server.join().unwrap() == there, "{} got something else from {}", to.name(), from.name());
    });
}

/// Bytes that depend on the place and on who sends them.
fn body(sender: &str) -> Vec<u8> {
    let name = sender.bytes().fold(0_u32, |sum, byte| sum.wrapping_mul(31).wrapping_add(byte.into()));
    let words = (0..).map(|index: u32| index.wrapping_mul(0x9e37_79b9) ^ name);
    words.flat_map(u32::to_be_bytes).take(BODY).collect()
}
