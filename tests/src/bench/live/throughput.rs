//! iperf3 through the gateway: not a measure of the gateway, but what people try first.

use std::{fs, path::Path};

use anyhow::Result;

use crate::{
    bench::median,
    lab::{
        Flannel, Gateway, gateway,
        registry::Claim,
        traffic::{self, Transport},
    },
};

/// What the figures mean, for people.
pub const EXPLANATION: &str = "\
iperf3, one TCP stream from a client to a pod, over veth. This shows that the way carries a stream, and what the end hosts\n\
make of it. It does not compare the two ways of forwarding: with xdp_mode = \"off\" the kernel carries segments of up to 64 KB\n\
whole from end to end, because no network card is in between, and on XDP every packet is one of 1450 bytes. On network\n\
cards the packet is the unit for both.";

/// Gbit/s of one TCP stream, by how the gateway forwards.
#[derive(Clone, Copy, Debug)]
pub struct Throughput {
    /// By its XDP program.
    pub program: f64,
    /// With `xdp_mode = "off"`.
    pub kernel: f64,
}

/// Runs iperf3 so many times in each of the two ways, one second each, in turns; the medians.
pub fn run(rounds: usize) -> Result<Throughput> {
    let directory = tempfile::tempdir()?;
    let lab = |name: &str, settings: &str| -> Result<(Flannel, Gateway)> {
        let path = directory.path().join(name);
        fs::create_dir(&path)?;
        start(&path, settings)
    };
    let ways = [lab("program", "")?, lab("kernel", gateway::OFF)?];
    let mut figures = [Vec::new(), Vec::new()];
    for _ in 0..rounds {
        for ((lab, _), figures) in ways.iter().zip(&mut figures) {
            let Some(node) = lab.nodes().next() else { continue };
            let pod = lab.pod(node, 1);
            let run = traffic::iperf(lab.client(2), pod, node.pod_address(1), Transport::Tcp, &[])?;
            figures.push(run.bits / 1e9);
        }
    }
    let [program, kernel] = figures.map(|figures| median(&figures));
    Ok(Throughput { program, kernel })
}

fn start(directory: &Path, settings: &str) -> Result<(Flannel, Gateway)> {
    let lab = Flannel::build(Claim::transient()?, directory, None)?;
    let config = fs::read_to_string(lab.config())?;
    fs::write(lab.config(), config + settings)?;
    let gateway = Gateway::start(&lab)?;
    gateway.wait_ready(&lab)?;
    Ok((lab, gateway))
}
