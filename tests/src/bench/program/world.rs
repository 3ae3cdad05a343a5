//! A gateway as the daemon sets it up, without the daemon: its programs are loaded and its tables filled by the daemon's own
//! code.

use std::path::Path;

use anyhow::{Context as _, Result, anyhow};
use aya::{
    maps::{MapData, PerCpuArray, PerCpuValues},
    programs::{TestRun as _, TestRunOptions, Xdp},
    util::nr_cpus,
};
use gateway::{
    dataplane::{
        batch::Map,
        load::{Loaded, Programs},
        pins::Pins,
        sessions::now,
        tables::TrieKey,
    },
    kernel::{host::Host, netlink},
};
use gateway_common::{
    abi::{
        Counter, Forward, ForwardKey, Outcome, OverlayAddress, PrefixKey, Reverse, ReverseKey, Route,
        SessionEvent, TICK_SHIFT, Vtep, VtepSlot, map,
    },
    model::HostTables,
    wire::Ipv4,
};

use crate::bench::{
    flow::{Flow, UNDERLAY},
    place::{self, Place, Scale, Side},
};

/// A gateway with its tables.
pub(super) struct World {
    pub(super) place: Place,
    /// Index of the interface that faces the nodes.
    pub(super) out: u32,
    pins: Pins,
    external: Loaded,
    underlay: Loaded,
}

impl World {
    pub(super) fn new(bpffs: &Path, name: &str, scale: Scale) -> Result<Self> {
        let config = place::config(bpffs, name, scale)?;
        let host = read_host()?;
        let mut programs = Programs::prepare(Pins::new(bpffs, name), &config)?;
        programs.create_tables()?;
        programs.settle_tables()?;
        let load = |side| -> Result<Loaded> {
            let constants = place::program_constants(&config, &host, side, programs.session_slots())?;
            Ok(programs.loader().load(name, &constants)?)
        };
        let mut world = Self {
            place: Place::new(scale, &host)?,
            out: place::link(&host, UNDERLAY)?.index,
            pins: Pins::new(bpffs, name),
            external: load(Side::External)?,
            underlay: load(Side::Underlay)?,
        };
        world.fill(&place::tables(&config, &host, scale)?)?;
        let program = world.external.program()?;
        world.place.choose_clients(|frame| {
            let mut output = vec![0; frame.len() + 128];
            program.test_run(TestRunOptions {
                data_in: Some(frame),
                data_out: Some(&mut output),
                ..TestRunOptions::default()
            })?;
            Ok(output)
        })?;
        world.forget_all()?;
        Ok(world)
    }

    fn fill(&self, tables: &HostTables) -> Result<()> {
        self.put(map::VTEPS, &tables.vteps)?;
        self.put(map::PODS, &tables.pods)?;
        self.put(map::SOURCES, &tables.sources)?;
        let prefixes = tables.prefixes.iter().map(|(&(overlay, length, address), route)| {
            let data = PrefixKey { overlay, address };
            (TrieKey { length: PrefixKey::OVERLAY_BITS + u32::from(length), data }, *route)
        });
        self.put(map::PREFIXES, prefixes.collect::<Vec<_>>().iter().map(|(key, route)| (key, route)))?;
        self.put(map::ADDRESSES, &tables.addresses)?;
        self.put(map::EGRESS, &tables.egress)
    }

    fn put<'a, K: bytemuck::Pod, V: bytemuck::Pod>(
        &self,
        table: &str,
        entries: impl IntoIterator<Item = (&'a K, &'a V)>,
    ) -> Result<()> {
        let entries: Vec<(K, V)> = entries.into_iter().map(|(key, value)| (*key, *value)).collect();
        self.table(table)?
            .update(&entries)
            .map_err(|(done, error)| anyhow!("{table} took {done} of {} entries: {error}", entries.len()))
    }

    fn table<K: bytemuck::Pod, V: bytemuck::Pod>(&self, name: &str) -> Result<Map<K, V>> {
        let data = MapData::from_pin(self.pins.map(name)).with_context(|| format!("no table {name}"))?;
        Ok(Map::new(data)?)
    }

    /// Every pod with the header that leads to it, and how many entries its table has room for.
    pub(super) fn headers(&self) -> Result<(Vec<(Ipv4, VtepSlot)>, u32)> {
        let vteps = self.table::<u32, Vtep>(map::VTEPS)?.read()?;
        let pods = self.table::<OverlayAddress, Route>(map::PODS)?;
        let headers = pods.read()?.into_iter().map(|(pod, route)| {
            let (_, vtep) = vteps.get(usize::try_from(route.vtep)?).context("a pod on no node")?;
            Ok((pod.address, *vtep.slot()))
        });
        Ok((headers.collect::<Result<_>>()?, pods.data().info()?.max_entries()))
    }

    /// The program of that side, as the kernel has it.
    pub(super) fn program(&mut self, side: Side) -> Result<&mut Xdp> {
        Ok(match side {
            Side::External => self.external.program()?,
            Side::Underlay => self.underlay.program()?,
        })
    }

    fn forget_all(&self) -> Result<()> {
        let forward = self.table::<ForwardKey, Forward>(map::FORWARD)?;
        let reverse = self.table::<ReverseKey, Reverse>(map::REVERSE)?;
        let forward_keys: Vec<_> = forward.read()?.into_iter().map(|(key, _)| key).collect();
        let reverse_keys: Vec<_> = reverse.read()?.into_iter().map(|(key, _)| key).collect();
        remove(&forward, &forward_keys)?;
        remove(&reverse, &reverse_keys)
    }

    /// Ends the sessions of these flows.
    pub(super) fn forget(&self, flows: impl Iterator<Item = Flow> + Clone) -> Result<()> {
        let Place { clients, snat, .. } = &self.place;
        let forward: Vec<_> = flows.clone().map(|flow| flow.forward_key(clients[flow.client])).collect();
        let reverse: Vec<_> = flows.map(|flow| flow.reverse_key(snat[flow.client])).collect();
        remove(&self.table::<_, Forward>(map::FORWARD)?, &forward)?;
        remove(&self.table::<_, Reverse>(map::REVERSE)?, &reverse)
    }

    /// Packets that had this outcome so far.
    pub(super) fn counted(&self, outcome: Outcome) -> Result<u64> {
        let data = MapData::from_pin(self.pins.map(map::COUNTERS))?;
        let table: PerCpuArray<_, Counter> = aya::maps::Map::PerCpuArray(data).try_into()?;
        Ok(table.get(&outcome.number(), 0)?.iter().map(|counter| counter.packets).sum())
    }

    /// Sessions to which this happened so far.
    pub(super) fn happened(&self, event: SessionEvent) -> Result<u64> {
        let data = MapData::from_pin(self.pins.map(map::EVENTS))?;
        let table: PerCpuArray<_, u64> = aya::maps::Map::PerCpuArray(data).try_into()?;
        Ok(table.get(&(event as u32), 0)?.iter().sum())
    }

    /// Lets the program of the clients' side send any number of ICMP errors for the next tenth of a second.
    pub(super) fn allow_errors(&mut self) -> Result<()> {
        /// The program's own table of what a CPU may still send.
        const TABLE: &str = "ICMP_LIMIT";
        let ids = self.program(Side::External)?.info()?.map_ids()?.unwrap_or_default();
        for id in ids {
            let data = MapData::from_id(id)?;
            if data.info()?.name_as_str() == Some(TABLE) {
                let mut table: PerCpuArray<_, [u64; 2]> = aya::maps::Map::PerCpuArray(data).try_into()?;
                let cpus = nr_cpus().map_err(|(what, error)| anyhow!("{what}: {error}"))?;
                // Two fields of 32 bits and one of 64: how many, nothing, since when in nanoseconds.
                let since = u64::from(now()) << TICK_SHIFT;
                let values = vec![[u64::from(u32::MAX), since]; cpus];
                return Ok(table.set(0, PerCpuValues::try_from(values)?, 0)?);
            }
        }
        Err(anyhow!("the program has no table {TABLE}"))
    }
}

fn remove<K: bytemuck::Pod, V: bytemuck::Pod>(table: &Map<K, V>, keys: &[K]) -> Result<()> {
    table.delete(keys).map_err(|(done, error)| anyhow!("{done} of {} sessions ended: {error}", keys.len()))
}

fn read_host() -> Result<Host> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async { Ok(Host::read(&netlink::connect()?).await?) })
}
