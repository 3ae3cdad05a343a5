//! A frame, and what must become of it.

use gateway_common::abi::Outcome;

use crate::{
    evidence,
    packet::{Address, IPV4, Ip, Link, UDP, vxlan, vxlan_header},
    subject::{Counters, Returned, Subject},
    world::{Node, World},
};

/// The frame after the program.
pub(crate) enum Output {
    /// As it came.
    Same,
    /// These bytes.
    Bytes(Vec<u8>),
    /// These bytes, given the UDP source port that the program chose. It lies at the offset, and must be one of those that
    /// RFC 7348 section 5 recommends.
    WithSourcePort(usize, Box<dyn Fn(u16) -> Vec<u8>>),
}

/// One case.
pub(crate) struct Case {
    /// Also the name of the pcap file.
    pub(crate) name: String,
    pub(crate) outcome: Outcome,
    pub(crate) returned: Returned,
    pub(crate) input: Vec<u8>,
    pub(crate) output: Output,
    /// Whether there is hardly any room in front of the frame.
    is_cramped: bool,
    /// What comes before: frames, changes of tables.
    before: Vec<Step>,
}

/// What happens before the frame of a case.
type Step = Box<dyn Fn(&Subject)>;

impl Case {
    fn new(
        name: impl Into<String>,
        outcome: Outcome,
        returned: Returned,
        input: Vec<u8>,
        output: Output,
    ) -> Self {
        Self { name: name.into(), outcome, returned, input, output, is_cramped: false, before: Vec::new() }
    }

    /// The same after `work`, which comes after what was there already.
    pub(crate) fn once(mut self, work: impl Fn(&Subject) + 'static) -> Self {
        self.before.push(Box::new(work));
        self
    }

    /// The same after these frames.
    pub(crate) fn after<const N: usize>(self, frames: [Vec<u8>; N]) -> Self {
        self.once(move |subject| {
            for frame in &frames {
                subject.run(frame);
            }
        })
    }

    /// The same with hardly any room in front of the frame.
    pub(crate) fn cramped(self) -> Self {
        Self { is_cramped: true, ..self }
    }

    /// Goes to the kernel as it came.
    pub(crate) fn pass(name: impl Into<String>, outcome: Outcome, input: Vec<u8>) -> Self {
        Self::new(name, outcome, Returned::Pass, input, Output::Same)
    }

    /// Ends here.
    pub(crate) fn drop(name: impl Into<String>, outcome: Outcome, input: Vec<u8>) -> Self {
        Self::new(name, outcome, Returned::Drop, input, Output::Same)
    }

    /// Leaves by the interface it came from.
    pub(crate) fn transmit(
        name: impl Into<String>,
        outcome: Outcome,
        input: Vec<u8>,
        output: Vec<u8>,
    ) -> Self {
        Self::new(name, outcome, Returned::Transmit, input, Output::Bytes(output))
    }

    /// Leaves by another interface.
    pub(crate) fn redirect(
        name: impl Into<String>,
        outcome: Outcome,
        input: Vec<u8>,
        output: Vec<u8>,
    ) -> Self {
        Self::new(name, outcome, Returned::Redirect, input, Output::Bytes(output))
    }

    /// Leaves towards `node`; `output` makes the frame for a UDP source port.
    pub(crate) fn to_node(
        name: impl Into<String>,
        world: &World,
        outcome: Outcome,
        node: &Node,
        input: Vec<u8>,
        output: impl Fn(u16) -> Vec<u8> + 'static,
    ) -> Self {
        let same = node.ifindex == world.ports.own.index;
        let returned = if same { Returned::Transmit } else { Returned::Redirect };
        Self::new(
            name,
            outcome,
            returned,
            input,
            Output::WithSourcePort(node.link.length() + 20, Box::new(output)),
        )
    }

    /// A client's packet that leaves through the tunnel to node `id`.
    pub(crate) fn encap(name: impl Into<String>, world: &World, id: u32, link: Link, packet: &Ip) -> Self {
        let (node, config, inner) = (world.nodes[&id].clone(), *world.config(), packet.clone());
        Self::to_node(name, world, Outcome::Encap, &node.clone(), link.ip(packet), move |port| {
            node.carries(&config, &inner, port)
        })
    }

    /// Runs the case; a fault is told with the place of the pcap file.
    pub(crate) fn check(&self, subject: &Subject) -> Result<(), String> {
        self.before.iter().for_each(|work| work(subject));
        let before = subject.counters();
        let (returned, output) =
            if self.is_cramped { subject.run_cramped(&self.input) } else { subject.run(&self.input) };
        let counted = &subject.counters() - &before;
        let expected = self.expected(&output);
        let shown = expected.as_deref().unwrap_or_default();
        let path = evidence::keep(&self.name, &[&self.input, &output, shown]);
        let fault = |what: String| {
            Err(format!("{}: {what}\n  {path} has the frame before, after, and as it should be", self.name))
        };
        let one = Counters([(self.outcome.number(), (1, self.input.len() as u64))].into());
        if counted != one {
            return fault(format!(
                "{:?} should be counted once, but (packets, bytes) are {counted:?}",
                self.outcome
            ));
        }
        if returned != self.returned {
            return fault(format!("returned {returned:?} instead of {:?}", self.returned));
        }
        match expected {
            None => fault("the UDP source port is not in 49152 to 65535".to_owned()),
            Some(expected) if expected != output => {
                let at = expected.iter().zip(&output).position(|(a, b)| a != b);
                let at = at.unwrap_or(expected.len().min(output.len()));
                fault(format!(
                    "{} bytes instead of {}, different from byte {at}",
                    output.len(),
                    expected.len()
                ))
            }
            Some(_) => Ok(()),
        }
    }

    fn expected(&self, output: &[u8]) -> Option<Vec<u8>> {
        match &self.output {
            Output::Same => Some(self.input.clone()),
            Output::Bytes(bytes) => Some(bytes.clone()),
            Output::WithSourcePort(at, make) => {
                let port = u16::from_be_bytes(output.get(*at..at + 2)?.try_into().ok()?);
                (port >= 49_152).then(|| make(port))
            }
        }
    }
}

/// Runs all cases and tells all faults.
pub(crate) fn check_all<'a>(subject: &Subject, cases: impl IntoIterator<Item = &'a Case>) {
    let faults: Vec<String> = cases.into_iter().filter_map(|case| case.check(subject).err()).collect();
    assert!(faults.is_empty(), "{} cases fail:\n{}", faults.len(), faults.join("\n"));
}

/// A tunnel packet of a node, to be bent.
#[derive(Clone, Debug)]
pub(crate) struct FromNode {
    pub(crate) link: Link,
    /// Outer addresses, TTL and the rest; the payload is made anew.
    pub(crate) outer: Ip,
    pub(crate) port: u16,
    pub(crate) header: [u8; 8],
    pub(crate) inner_link: Link,
    pub(crate) kind: u16,
    pub(crate) inner: Vec<u8>,
}

impl FromNode {
    /// What node `id` sends: `inner` to our VTEP.
    pub(crate) fn new(world: &World, id: u32, inner: &Ip) -> Self {
        let node = &world.nodes[&id];
        let overlay = world.config().overlays[node.overlay];
        Self {
            link: world.underlay_link(),
            outer: Ip::new(node.endpoint, overlay.local.octets, UDP, Vec::new()),
            port: overlay.port.get(),
            header: vxlan_header(overlay.vni.get()),
            inner_link: Link::new(overlay.mac, node.mac),
            kind: IPV4,
            inner: inner.bytes(),
        }
    }

    pub(crate) fn datagram(&self) -> Vec<u8> {
        vxlan(49_999, self.port, self.header, &self.inner_link.frame(self.kind, &self.inner))
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.link.ip(&Ip { payload: self.datagram(), ..self.outer.clone() })
    }

    /// The same with another field.
    pub(crate) fn with(&self, change: impl FnOnce(&mut Self)) -> Self {
        let mut changed = self.clone();
        change(&mut changed);
        changed
    }

    pub(crate) fn from(&self, source: Address) -> Self {
        self.with(|packet| packet.outer.source = source)
    }
}
