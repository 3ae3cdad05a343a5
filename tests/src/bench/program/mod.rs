//! The XDP program under `BPF_PROG_TEST_RUN`, as the daemon loads it, with tables of real sizes.
//!
//! What is measured is never measured on its own output: a driver makes a fresh frame before each round and tail-calls the
//! program. In every round each case is measured once, with what its driver costs beside it, and the order turns round from
//! round to round. After every test run the program's counters must say that each packet had the outcome that was meant,
//! and the last frame must be, to the byte, what it should have become.
//!
//! - [`cases`]: what is measured.
//! - [`network`], [`world`]: the gateway in the kernel.
//! - [`lookups`]: operations on tables, counted.

mod cases;
pub mod lookups;
mod network;
mod world;

use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use gateway_common::abi::SessionEvent;

use self::{
    cases::{CASES, Case, FLOOR, NEW_FLOWS, Subject, XDP_DROP},
    world::World,
};
use super::{
    Effort, Extent,
    driver::{self, DROP, Driver, Feed, Reference, Run, Shape},
    place::{Place, Scale},
    report::Samples,
    stay_on_one_cpu,
};

/// Measures every case.
///
/// # Errors
/// When something cannot be set up (it needs root), and when a packet became anything but what it should have.
pub fn run(effort: Effort) -> Result<Vec<Samples>> {
    let mut samples = Vec::new();
    for scales in groups(effort.extent) {
        samples.extend(network::isolated(|bpffs| {
            stay_on_one_cpu()?;
            let mut group = Group::new(bpffs, &scales)?;
            for round in 0..effort.rounds {
                group.measure(round, effort)?;
            }
            Ok(group.samples())
        })?);
    }
    Ok(samples)
}

/// Sizes that are measured in the same rounds.
fn groups(extent: Extent) -> Vec<Vec<Scale>> {
    let scale = |pods, nodes, flows| Scale { pods, nodes, flows };
    match extent {
        Extent::Smoke => vec![vec![scale(10, 2, 1), scale(300, 20, 64)]],
        Extent::Full => vec![
            vec![scale(10, 2, 1), scale(10, 5000, 1), scale(10_000, 5000, 1), scale(150_000, 5000, 1)],
            vec![scale(10, 2, 1 << 16), scale(150_000, 5000, 1 << 16)],
            vec![scale(10, 2, 1 << 20), scale(150_000, 5000, 1 << 20)],
        ],
    }
}

/// A driver that calls a program that drops.
struct Baseline {
    shape: Shape,
    flows: u32,
    length: usize,
    driver: Driver,
    /// This round's.
    nanoseconds: f64,
}

/// A case in a world.
struct Contender {
    world: usize,
    case: &'static Case,
    feed: Feed,
    driver: Driver,
    baseline: usize,
    rounds: Vec<f64>,
}

/// Worlds, and what is measured in them round by round.
struct Group {
    worlds: Vec<(World, Reference)>,
    baselines: Vec<Baseline>,
    contenders: Vec<Contender>,
    floor: Vec<f64>,
}

impl Group {
    fn new(bpffs: &Path, scales: &[Scale]) -> Result<Self> {
        let mut group =
            Self { worlds: Vec::new(), baselines: Vec::new(), contenders: Vec::new(), floor: Vec::new() };
        for (index, scale) in scales.iter().enumerate() {
            let mut world =
                World::new(bpffs, &format!("bench-{index}"), *scale).with_context(|| format!("{scale:?}"))?;
            let (headers, entries) = world.headers()?;
            open_sessions(&mut world).with_context(|| format!("opening the sessions of {scale:?}"))?;
            let reference = Reference::new(world.out, &headers, entries)?;
            group.worlds.push((world, reference));
        }
        for world in 0..group.worlds.len() {
            for case in &CASES {
                group.add(world, case).with_context(|| case.name.to_owned())?;
            }
        }
        Ok(group)
    }

    fn add(&mut self, index: usize, case: &'static Case) -> Result<()> {
        let (world, reference) = &mut self.worlds[index];
        let feed = (case.feed)(&world.place);
        if world.place.scale.flows > 1 && feed.shape == Shape::Still {
            return Ok(());
        }
        let driver = match case.subject {
            Subject::Gateway(side, _) => Driver::new(&feed, world.program(side)?.fd()?)?,
            Subject::Reference(name) => Driver::new(&feed, reference.program(name)?)?,
        };
        let same = |baseline: &Baseline| {
            (baseline.shape, baseline.flows, baseline.length) == (feed.shape, feed.flows, feed.frame.len())
        };
        let found = self.baselines.iter().position(same);
        let baseline = if let Some(found) = found {
            found
        } else {
            self.baselines.push(Baseline {
                shape: feed.shape,
                flows: feed.flows,
                length: feed.frame.len(),
                driver: Driver::new(&feed, reference.program(DROP)?)?,
                nanoseconds: 0.0,
            });
            self.baselines.len() - 1
        };
        self.contenders.push(Contender { world: index, case, feed, driver, baseline, rounds: Vec::new() });
        Ok(())
    }

    /// One round.
    fn measure(&mut self, round: usize, effort: Effort) -> Result<()> {
        let (_, reference) = self.worlds.first().context("no world")?;
        let floor = mean(effort.calls, || reference.floor(effort.packets))?;
        self.floor.push(floor);
        for baseline in &mut self.baselines {
            baseline.nanoseconds = mean(effort.calls, || {
                let run = baseline.driver.run(effort.packets)?;
                ensure!(
                    run.returned == XDP_DROP,
                    "{:?}: the driver returned {}",
                    baseline.shape,
                    run.returned
                );
                Ok(run.nanoseconds)
            })?;
        }
        let mut order: Vec<&mut Contender> = self.contenders.iter_mut().collect();
        if round % 2 == 1 {
            order.reverse();
        }
        for contender in order {
            let (world, reference) = &mut self.worlds[contender.world];
            // Sessions take their time to be forgotten again.
            let calls = if contender.case.opens_sessions() { 1 } else { effort.calls };
            let all = mean(calls, || contender.run(world, reference, effort.packets))
                .with_context(|| format!("{} at {:?}", contender.case.name, world.place.scale))?;
            // The driver's share of a run: what it adds to a program that drops.
            let driver = self.baselines[contender.baseline].nanoseconds - floor;
            contender.rounds.push(all - driver);
        }
        Ok(())
    }

    fn samples(self) -> Vec<Samples> {
        let floors = self.worlds.iter().map(|(world, _)| Samples {
            name: FLOOR,
            flows: world.place.scale.flows,
            pods: world.place.scale.pods,
            nodes: world.place.scale.nodes,
            frame_bytes: 60,
            reference: FLOOR,
            rounds: self.floor.clone(),
        });
        let cases = self.contenders.into_iter().map(|contender| {
            let scale = self.worlds[contender.world].0.place.scale;
            Samples {
                name: contender.case.name,
                flows: scale.flows,
                pods: scale.pods,
                nodes: scale.nodes,
                frame_bytes: u32::try_from(contender.feed.frame.len()).unwrap_or(u32::MAX),
                reference: contender.case.reference,
                rounds: contender.rounds,
            }
        });
        floors.chain(cases).collect()
    }
}

fn mean(calls: u32, mut call: impl FnMut() -> Result<f64>) -> Result<f64> {
    let mut sum = 0.0;
    for _ in 0..calls {
        sum += call()?;
    }
    Ok(sum / f64::from(calls))
}

impl Contender {
    /// One test run, with everything around it that the case needs; nanoseconds.
    fn run(&self, world: &mut World, reference: &Reference, packets: u32) -> Result<f64> {
        /// The program sets its allowance of ICMP errors anew every tenth of a second: runs are short, and tried so often.
        const ERRORS: u32 = 10_000;
        const ATTEMPTS: usize = 50;
        if self.case.opens_sessions() {
            let packets = packets.min(NEW_FLOWS);
            let run = self.counted(world, reference, packets)?;
            let flows = (0..NEW_FLOWS).map(|number| cases::flow(&self.feed, number));
            world.forget(flows)?;
            return Ok(run.nanoseconds);
        }
        if !self.case.sends_errors() {
            return Ok(self.counted(world, reference, packets)?.nanoseconds);
        }
        let mut attempts = 0;
        loop {
            world.allow_errors()?;
            match self.counted(world, reference, packets.min(ERRORS)) {
                Ok(run) => return Ok(run.nanoseconds),
                Err(error) if attempts == ATTEMPTS => return Err(error),
                Err(_) => attempts += 1,
            }
        }
    }

    /// One test run, and whether every packet became what it should have.
    fn counted(&self, world: &World, reference: &Reference, packets: u32) -> Result<Run> {
        let count = || match self.case.subject {
            Subject::Gateway(_, outcome) => world.counted(outcome).map(Some),
            Subject::Reference(driver::ENCAP | driver::DECAP) => reference.counted().map(Some),
            Subject::Reference(_) => Ok(None),
        };
        let before = count()?;
        let run = self.driver.run(packets)?;
        if let (Some(before), Some(after)) = (before, count()?) {
            ensure!(
                after - before == u64::from(packets),
                "{} of {packets} packets had the outcome that was meant; the last run returned {}",
                after - before,
                run.returned
            );
        }
        self.check(&world.place, &run)?;
        Ok(run)
    }

    /// Whether the last frame became what it should have.
    fn check(&self, place: &Place, run: &Run) -> Result<()> {
        ensure!(
            run.returned == self.case.returned,
            "the program returned {} instead of {}",
            run.returned,
            self.case.returned
        );
        let flow = cases::flow(&self.feed, run.flow);
        let expected = (self.case.output)(place, flow, &run.output);
        if expected != run.output {
            let at = expected.iter().zip(&run.output).position(|(a, b)| a != b);
            bail!(
                "{flow:?}: the frame is not what it should be from byte {} on:\n  is     {}\n  should {}",
                at.unwrap_or(expected.len().min(run.output.len())),
                hex(&run.output),
                hex(&expected)
            );
        }
        Ok(())
    }
}

fn hex(bytes: &[u8]) -> String {
    let octets: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    octets.concat()
}

/// Opens and confirms a session for each flow.
fn open_sessions(world: &mut World) -> Result<()> {
    let flows = world.place.scale.flows;
    let events = [SessionEvent::Opened, SessionEvent::Confirmed, SessionEvent::Evicted];
    let before = events.map(|event| world.happened(event));
    for (side, outcome, feed) in cases::handshake(&world.place) {
        let driver = Driver::new(&feed, world.program(side)?.fd()?)?;
        let counted = world.counted(outcome)?;
        driver.run(flows)?;
        let counted = world.counted(outcome)? - counted;
        ensure!(counted == u64::from(flows), "{counted} of {flows} packets are {outcome:?}");
    }
    for ((event, before), expected) in events.into_iter().zip(before).zip([flows, flows, 0]) {
        let happened = world.happened(event)? - before?;
        ensure!(happened == u64::from(expected), "{happened} sessions instead of {expected} are {event:?}");
    }
    Ok(())
}
