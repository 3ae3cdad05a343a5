//! Frames that really arrive and leave: client → gateway → node and back, over veth, on one CPU.
//!
//! The generator is the kernel's own test run with live frames; a driver writes every header anew, because the kernel recycles
//! the frames. A sink at the other end counts them and drops them. Runs in which a frame is missing do not count. The cost of a
//! packet is the time that a run took divided by its packets, generator and sink included: rows are to be compared with one
//! another and with `live.drop`, where the frame ends at the first interface.
//!
//! Each forwarder has a network of its own ([`lane`]), so that they take turns without being set up anew.

mod lane;
mod sink;
pub mod throughput;

use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use self::lane::{Direction, Forwarder, Lane};
use super::{Effort, Extent, report::Samples, stay_on_one_cpu};

/// Lengths of the frames before they are encapsulated.
const LENGTHS: [usize; 2] = [64, 1400];
/// How often a run is repeated in which frames are missing.
const ATTEMPTS: usize = 20;
/// What a call costs besides its packets is measured with so many.
const FEW: u32 = 64;

/// A row.
struct Course {
    name: &'static str,
    reference: &'static str,
    forwarder: Forwarder,
    direction: Direction,
}

const DROP: &str = "live.drop";
const REDIRECT: &str = "live.redirect";

/// Every row; each is measured for every length.
const COURSES: [Course; 8] = [
    Course { name: DROP, reference: DROP, forwarder: Forwarder::Drop, direction: Direction::Inward },
    Course { name: REDIRECT, reference: DROP, forwarder: Forwarder::Redirect, direction: Direction::Inward },
    Course {
        name: "live.reference.encap",
        reference: REDIRECT,
        forwarder: Forwarder::Reference,
        direction: Direction::Inward,
    },
    Course {
        name: "live.reference.decap",
        reference: REDIRECT,
        forwarder: Forwarder::Reference,
        direction: Direction::Outward,
    },
    Course {
        name: "live.encap",
        reference: "live.kernel.encap",
        forwarder: Forwarder::Program,
        direction: Direction::Inward,
    },
    Course {
        name: "live.kernel.encap",
        reference: REDIRECT,
        forwarder: Forwarder::Kernel,
        direction: Direction::Inward,
    },
    Course {
        name: "live.decap",
        reference: "live.kernel.decap",
        forwarder: Forwarder::Program,
        direction: Direction::Outward,
    },
    Course {
        name: "live.kernel.decap",
        reference: REDIRECT,
        forwarder: Forwarder::Kernel,
        direction: Direction::Outward,
    },
];

/// Measures every row.
///
/// # Errors
/// When something cannot be set up (it needs root), and when frames are missing again and again.
pub fn run(effort: Effort) -> Result<Vec<Samples>> {
    stay_on_one_cpu()?;
    let packets = match effort.extent {
        Extent::Full => effort.packets * 4,
        Extent::Smoke => effort.packets,
    };
    let lanes = Forwarder::ALL.map(|forwarder| {
        Lane::new(forwarder).with_context(|| format!("setting up the network of {forwarder:?}"))
    });
    let lanes: Vec<Lane> = lanes.into_iter().collect::<Result<_>>()?;
    let mut samples: Vec<Samples> = Vec::new();
    let mut tracks = Vec::new();
    for length in LENGTHS {
        for course in &COURSES {
            let lane = lanes.iter().find(|lane| lane.forwarder() == course.forwarder);
            let track = lane.context("no such network")?.track(course.direction, length)?;
            samples.push(Samples {
                name: course.name,
                flows: 1,
                pods: lane::PODS,
                nodes: lane::NODES,
                frame_bytes: u32::try_from(track.frame_bytes())?,
                reference: course.reference,
                rounds: Vec::new(),
            });
            tracks.push(track);
        }
    }
    for _ in 0..effort.rounds {
        for (track, samples) in tracks.iter().zip(&mut samples) {
            let nanoseconds = complete(packets, |packets| track.run(packets));
            samples.rounds.push(nanoseconds.with_context(|| samples.name)?);
        }
    }
    Ok(samples)
}

/// Nanoseconds a packet, of a run in which none is missing.
fn complete(packets: u32, run: impl Fn(u32) -> Result<(Duration, u64)>) -> Result<f64> {
    let mut lost = 0;
    for _ in 0..ATTEMPTS {
        // A call takes tens of milliseconds for itself.
        let (few, _) = run(FEW)?;
        let (many, arrived) = run(packets)?;
        if arrived == u64::from(packets) {
            return Ok((many.as_secs_f64() - few.as_secs_f64()) * 1e9 / f64::from(packets - FEW));
        }
        lost = u64::from(packets).saturating_sub(arrived);
    }
    bail!("{lost} of {packets} frames are missing, and so it is in {ATTEMPTS} runs: is the machine busy?")
}
