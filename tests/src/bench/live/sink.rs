//! Where frames end and are counted.

use anyhow::{Context as _, Result, anyhow};
use aya::{
    Ebpf,
    maps::{MapData, PerCpuArray},
    programs::{SchedClassifier, TcAttachType, XdpMode},
};
use gateway::dataplane::batch::Map;
use gateway_common::abi::Counter;
use nix::net::if_::if_nametoindex;

use crate::{bench::driver, lab::Host};

/// Where on the way into a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// In the driver, for frames that XDP sent.
    Driver,
    /// Behind it, for packets of the kernel: for XDP they would be copied first, and the kernel should not pay for that.
    Kernel,
}

/// A counter of arriving frames of one length, which end here; others pass.
pub(super) struct Sink {
    expected: Map<u32, u32>,
    arrived: PerCpuArray<MapData, Counter>,
    /// Stays attached as long as it lives.
    _object: Ebpf,
}

impl Sink {
    pub(super) fn attach(host: &Host, interface: &str, place: Place) -> Result<Self> {
        let mut object = driver::load(0, &[], 1)?;
        host.namespace().enter(|| {
            if place == Place::Driver {
                let index = if_nametoindex(interface).map_err(|errno| anyhow!("{interface}: {errno}"))?;
                driver::program(&mut object, driver::SINK)?.attach_to_if_index(index, XdpMode::Driver)?;
            } else {
                let program: &mut SchedClassifier =
                    object.program_mut(driver::SINK_TC).context("no sink for the kernel")?.try_into()?;
                program.load()?;
                program.attach(interface, TcAttachType::Ingress)?;
            }
            Ok(())
        })?;
        let Some(aya::maps::Map::Array(expected)) = object.map("EXPECTED") else {
            return Err(anyhow!("no EXPECTED"));
        };
        let expected = Map::new(MapData::from_id(expected.info()?.id())?)?;
        let arrived = object.take_map("ARRIVED").context("no ARRIVED")?.try_into()?;
        Ok(Self { expected, arrived, _object: object })
    }

    /// Counts frames of this length from now on.
    pub(super) fn expect(&self, bytes: u32) -> Result<()> {
        self.expected.update(&[(0, bytes)]).map_err(|(_, error)| error.into())
    }

    /// How many came so far.
    pub(super) fn arrived(&self) -> Result<u64> {
        Ok(self.arrived.get(&0, 0)?.iter().map(|counter| counter.packets).sum())
    }
}
