//! The reference object: its drivers, which give every round a fresh frame, and its programs.

use std::{fs, path::Path, sync::OnceLock};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use aya::{
    Ebpf, EbpfLoader, VerifierLogLevel,
    maps::{Array, MapData, PerCpuArray, ProgramArray},
    programs::{ProgramFd, TestRun as _, TestRunAttrs, TestRunOptions, Xdp},
};
use gateway::dataplane::batch::Map;
use gateway_common::{
    abi::{Counter, VtepSlot},
    checksum::Sum,
    wire::{Ipv4, Mac},
};

use super::flow::CLIENTS;

/// Which fields a driver writes anew in each round.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Shape {
    /// None: the same frame again.
    Still,
    /// Those of a client's TCP segment.
    Client,
    /// Those of a pod's TCP segment in the tunnel.
    Node,
}

impl Shape {
    const fn program(self) -> &'static str {
        match self {
            Self::Still => "drive_still",
            Self::Client => "drive_client",
            Self::Node => "drive_node",
        }
    }

    /// Where the packet begins whose flow changes.
    const fn packet(self) -> Option<usize> {
        match self {
            Self::Still => None,
            Self::Client => Some(14),
            Self::Node => Some(64),
        }
    }
}

/// What a driver is made from.
#[derive(Clone, Debug)]
pub(super) struct Feed {
    pub(super) shape: Shape,
    /// The frame of flow 0.
    pub(super) frame: Vec<u8>,
    /// By how much the beginning and the end of the frame have to move after the program; the beginning forward if
    /// positive.
    pub(super) undo: (i32, i32),
    /// How many flows, a power of two.
    pub(super) flows: u32,
    /// Addresses on the clients' side, and the first port there.
    pub(super) clients: [Ipv4; CLIENTS],
    pub(super) first_port: u16,
    /// The first pod.
    pub(super) pod: Ipv4,
    /// Tunnel and MAC addresses of the two nodes.
    pub(super) nodes: [(Ipv4, Mac); 2],
}

/// A driver with the program that it drives.
pub(super) struct Driver {
    ebpf: Ebpf,
    shape: Shape,
    frame: Vec<u8>,
    flow_mask: u32,
}

/// How a test run ended.
#[derive(Clone, Debug)]
pub(super) struct Run {
    /// Mean over the packets, in whole nanoseconds.
    pub(super) nanoseconds: f64,
    /// What the program returned last.
    pub(super) returned: u32,
    /// The last frame after the program.
    pub(super) output: Vec<u8>,
    /// Number of the last frame's flow.
    pub(super) flow: u32,
}

impl Driver {
    pub(super) fn new(feed: &Feed, driven: &ProgramFd) -> Result<Self> {
        let Feed { shape, frame, undo, flows, .. } = feed;
        ensure!(flows.is_power_of_two(), "{flows} flows are not a power of two");
        let flow_mask = flows - 1;
        let template = Template::new(*shape, frame)?;
        let length = u32::try_from(frame.len())?;
        let first_port = u32::from(feed.first_port);
        let nodes = feed.nodes.map(|(node, _)| node.octets).concat();
        let macs = feed.nodes.map(|(_, mac)| mac.octets).concat();
        let clients: Vec<u8> = feed.clients.iter().flat_map(|client| client.octets).collect();
        let mut loader = EbpfLoader::new();
        loader
            .verifier_log_level(VerifierLogLevel::DISABLE)
            .override_global("TEMPLATE", &template.bytes[..], true)
            .override_global("FRAME_LEN", &length, true)
            .override_global("UNDO_HEAD", &undo.0, true)
            .override_global("UNDO_TAIL", &undo.1, true)
            .override_global("FLOW_MASK", &flow_mask, true)
            .override_global("CLIENTS", &clients[..], true)
            .override_global("CLIENT_PORT", &first_port, true)
            .override_global("POD", &feed.pod, true)
            .override_global("NODES", &nodes[..], true)
            .override_global("NODE_MACS", &macs[..], true)
            .override_global("IP_SUM", &template.ip, true)
            .override_global("TCP_SUM", &template.tcp, true)
            .override_global("OUTER_SUM", &template.outer, true);
        let mut ebpf = loader.load(reference_object()?)?;
        program(&mut ebpf, shape.program())?;
        let mut array: ProgramArray<&mut MapData> =
            ebpf.map_mut("DRIVEN").context("the driver has no DRIVEN")?.try_into()?;
        array.set(0, driven, 0).context("the kernel does not let the driver call the program")?;
        Ok(Self { ebpf, shape: *shape, frame: frame.clone(), flow_mask })
    }

    fn xdp(&self) -> Result<&Xdp> {
        Ok(self.ebpf.program(self.shape.program()).context("no such driver")?.try_into()?)
    }

    /// Has the program send so many frames, which really leave.
    pub(super) fn send(&self, packets: u32) -> Result<()> {
        /// As many as a driver gives to XDP at once (`NAPI_POLL_WEIGHT`).
        const BATCH: u32 = 64;
        self.xdp()?.test_run(TestRunOptions {
            data_in: Some(&self.frame),
            repeat: packets,
            attrs: TestRunAttrs::new().xdp_live_frames(BATCH),
            ..TestRunOptions::default()
        })?;
        Ok(())
    }

    /// Runs the program on so many frames.
    pub(super) fn run(&self, packets: u32) -> Result<Run> {
        let mut output = vec![0; self.frame.len() + 128];
        let result = self.xdp()?.test_run(TestRunOptions {
            data_in: Some(&self.frame),
            data_out: Some(&mut output),
            repeat: packets,
            ..TestRunOptions::default()
        })?;
        output.truncate(usize::try_from(result.data_size_out)?);
        let state: Array<&MapData, u32> = self.ebpf.map("ROUND").context("no ROUND")?.try_into()?;
        Ok(Run {
            nanoseconds: nanoseconds(result.duration),
            returned: result.return_value,
            output,
            flow: state.get(&0, 0)? & self.flow_mask,
        })
    }
}

/// The kernel cuts the mean to whole nanoseconds; half a one makes that right on average.
fn nanoseconds(mean: std::time::Duration) -> f64 {
    mean.as_secs_f64() * 1e9 + 0.5
}

/// The headers of a frame without what differs from flow to flow, and what of them the checksums cover.
struct Template {
    bytes: [u8; 128],
    ip: u16,
    tcp: u16,
    outer: u16,
}

impl Template {
    fn new(shape: Shape, frame: &[u8]) -> Result<Self> {
        let mut frame = frame.to_vec();
        let mut template = Self { bytes: [0; 128], ip: 0, tcp: 0, outer: 0 };
        if let Some(at) = shape.packet() {
            ensure!(frame.len() >= at + 40, "{} bytes are no TCP segment in a {shape:?} frame", frame.len());
            // Checksums, addresses, and the port of the client's side.
            let port = if shape == Shape::Client { 20..22 } else { 22..24 };
            for field in [10..12, 12..20, port, 36..38] {
                frame[at + field.start..at + field.end].fill(0);
            }
            template.ip = Sum::of(&frame[at..at + 20]).fold();
            let segment = &frame[at + 20..];
            // RFC 9293 section 3.1: the pseudo header without the addresses.
            let length = u16::try_from(segment.len())?.to_be_bytes();
            template.tcp = Sum::new(Sum::of(segment).fold()).add([0, 6]).add(length).fold();
        }
        if shape == Shape::Node {
            for field in [24..26, 26..30, 56..62] {
                frame[field].fill(0);
            }
            template.outer = Sum::of(&frame[14..34]).fold();
        }
        let length = frame.len().min(template.bytes.len());
        template.bytes[..length].copy_from_slice(&frame[..length]);
        Ok(template)
    }
}

/// The reference programs, with a table of pods.
pub(super) struct Reference {
    ebpf: Ebpf,
}

/// Names of the programs in the object.
pub(super) const DROP: &str = "ref_drop";
pub(super) const TX: &str = "ref_tx";
pub(super) const ENCAP: &str = "ref_encap";
pub(super) const DECAP: &str = "ref_decap";
pub(super) const REDIRECT: &str = "ref_redirect";
/// Programs that do one thing and drop.
pub(super) const HEAD: &str = "piece_head";
pub(super) const HASH: &str = "piece_hash";
pub(super) const TIME: &str = "piece_time";
pub(super) const LENGTH: &str = "piece_length";
pub(super) const FIB: &str = "piece_fib";
pub(super) const SINK: &str = "sink";
pub(super) const SINK_TC: &str = "sink_tc";

/// Loads the object for programs that send by the interface with the index `out`, or if that is 0 by the one they were
/// called on; with these pods and the headers of their nodes, in a table of so many entries.
pub(super) fn load(out: u32, pods: &[(Ipv4, VtepSlot)], entries: u32) -> Result<Ebpf> {
    let mut loader = EbpfLoader::new();
    loader
        .verifier_log_level(VerifierLogLevel::DISABLE)
        .override_global("OUT", &out, true)
        .map_max_entries("REF_PODS", entries);
    let ebpf = loader.load(reference_object()?)?;
    let Some(aya::maps::Map::HashMap(data)) = ebpf.map("REF_PODS") else { bail!("no REF_PODS") };
    let table: Map<Ipv4, VtepSlot> = Map::new(MapData::from_id(data.info()?.id())?)?;
    table.update(pods).map_err(|(done, error)| anyhow!("REF_PODS took {done} entries: {error}"))?;
    Ok(ebpf)
}

/// Gives an XDP program of the object to the kernel.
pub(super) fn program<'a>(object: &'a mut Ebpf, name: &str) -> Result<&'a mut Xdp> {
    let program: &mut Xdp = object.program_mut(name).with_context(|| format!("no {name}"))?.try_into()?;
    program.load().with_context(|| format!("the kernel refuses {name}"))?;
    Ok(program)
}

impl Reference {
    /// As [`load`].
    pub(super) fn new(out: u32, pods: &[(Ipv4, VtepSlot)], entries: u32) -> Result<Self> {
        let mut ebpf = load(out, pods, entries)?;
        for name in [DROP, TX, REDIRECT, ENCAP, DECAP, HEAD, HASH, TIME, LENGTH, FIB] {
            program(&mut ebpf, name)?;
        }
        Ok(Self { ebpf })
    }

    fn xdp(&self, name: &str) -> Result<&Xdp> {
        Ok(self.ebpf.program(name).context("no such program")?.try_into()?)
    }

    pub(super) fn program(&self, name: &str) -> Result<&ProgramFd> {
        Ok(self.xdp(name)?.fd()?)
    }

    /// What the kernel says it costs to call a program that does nothing, nanoseconds.
    pub(super) fn floor(&self, packets: u32) -> Result<f64> {
        let options =
            TestRunOptions { data_in: Some(&[0; 60]), repeat: packets, ..TestRunOptions::default() };
        Ok(nanoseconds(self.xdp(DROP)?.test_run(options)?.duration))
    }

    /// Packets that were encapsulated or decapsulated so far.
    pub(super) fn counted(&self) -> Result<u64> {
        let table: PerCpuArray<&MapData, Counter> =
            self.ebpf.map("REF_COUNTER").context("no REF_COUNTER")?.try_into()?;
        Ok(table.get(&0, 0)?.iter().map(|counter| counter.packets).sum())
    }
}

/// The object that gateway's build script made with the flags of the program.
///
/// # Errors
///
/// It was not built, or cannot be read.
pub fn reference_object() -> Result<&'static [u8]> {
    static OBJECT: OnceLock<Vec<u8>> = OnceLock::new();
    if let Some(bytes) = OBJECT.get() {
        return Ok(bytes);
    }
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("the crate is in no workspace")?;
    let path = workspace.join("target/bpf/reference.bpf.o");
    let bytes = fs::read(&path)
        .map_err(|error| anyhow!("cannot read {}: {error}; run `cargo build -p gateway`", path.display()))?;
    Ok(OBJECT.get_or_init(|| bytes))
}

#[cfg(test)]
mod tests {
    use etherparse::checksum::Sum16BitWords;

    use super::*;

    #[test]
    fn a_template_and_its_sums_make_the_frame_again() {
        let packet =
            crate::packet::Ip::segment([10, 0, 0, 1], [10, 64, 0, 2], (1024, 80), 16, (1, 2), b"6bytes");
        let frame = crate::packet::Link::new(Mac::ZERO, Mac::BROADCAST).ip(&packet);
        let template = Template::new(Shape::Client, &frame).unwrap();
        let add = |sum: u16, bytes: &[u8]| {
            let sum = Sum::new(sum).add([bytes[0], bytes[1]]).add([bytes[2], bytes[3]]);
            sum.add([bytes[4], bytes[5]]).add([bytes[6], bytes[7]])
        };
        assert_eq!(add(template.ip, &frame[26..34]).checksum(), frame[24..26]);
        assert_eq!(add(template.tcp, &frame[26..34]).add([frame[34], frame[35]]).checksum(), frame[50..52]);
        assert_eq!(Sum16BitWords::new().add_slice(&frame[14..34]).ones_complement(), 0);
        assert_eq!(template.bytes[26..36], [0; 10]);
    }
}
