//! Loads a BPF object into this kernel and prints what the kernel says of it, as JSON: for `cargo xtask verify`. And what
//! the engine asks of its tables for each case of the benchmark, which no kernel has to be asked.
//!
//! The verifier removes what a configuration switches off, so each load has a configuration that leaves everything
//! on. The log level is 0, as the daemon loads it.

use std::{collections::BTreeMap, env, fs, os::fd::AsRawFd as _};

use anyhow::{Context as _, Result, bail};
use aya::{
    EbpfLoader,
    maps::MapInfo,
    programs::{ProgramError, Xdp},
};
use gateway_common::{
    abi::{
        CONFIG_SYMBOL, Config, MAX_OVERLAYS, MAX_SNAT_RULES, MAX_VLANS, Overlay, OverlayFlags, PROGRAM, Port,
        Roles, SWEEP_PROGRAM, SnatRule, Timeouts, VlanPort,
    },
    wire::{Be16, Ipv4, Mac, Vni},
};
use gateway_tests::bench::program::lookups;
use serde::Serialize;

/// Symbol of the program's log level; `aya_log::LEVEL`.
const LOG_LEVEL: &str = "AYA_LOG_LEVEL";

#[derive(Serialize)]
struct Inspection {
    loads: BTreeMap<&'static str, Load>,
    maps: Vec<Map>,
    map_operations: lookups::Counts,
}

#[derive(Serialize)]
struct Load {
    verified_instructions: u32,
    translated_bytes: u32,
    jited_bytes: u32,
}

#[derive(Serialize)]
struct Map {
    name: String,
    kind: String,
    entries: u32,
    memory_bytes: u64,
}

fn main() -> Result<()> {
    let path = env::args_os().nth(1).context("usage: inspect-object OBJECT")?;
    let bytes = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut inspection = Inspection {
        loads: BTreeMap::new(),
        maps: Vec::new(),
        map_operations: lookups::count().context("counting operations on maps")?,
    };
    for (name, config) in [
        ("one-overlay", config(1, 0, OverlayFlags::SOURCE_CHECK.with(OverlayFlags::CLAMP_MSS))),
        (
            "one-overlay-snat",
            with_snat(config(1, 0, OverlayFlags::SOURCE_CHECK.with(OverlayFlags::CLAMP_MSS)), 1),
        ),
        ("everything", with_snat(config(MAX_OVERLAYS, MAX_VLANS, all_flags()), MAX_SNAT_RULES)),
    ] {
        let (load, maps) = load(&bytes, PROGRAM, &config).with_context(|| format!("configuration {name}"))?;
        inspection.loads.insert(name, load);
        inspection.maps = maps;
    }
    let config = with_snat(config(1, 0, OverlayFlags::NONE), 1);
    let (sweep, _) = load(&bytes, SWEEP_PROGRAM, &config).context("the sweep")?;
    inspection.loads.insert(SWEEP_PROGRAM, sweep);
    println!("{}", serde_json::to_string_pretty(&inspection)?);
    Ok(())
}

fn all_flags() -> OverlayFlags {
    OverlayFlags::SOURCE_CHECK
        .with(OverlayFlags::ALLOW_GBP)
        .with(OverlayFlags::DF_INHERIT)
        .with(OverlayFlags::CLAMP_MSS)
}

/// One-armed, with this many overlays and VLANs.
fn config(overlays: usize, vlans: usize, flags: OverlayFlags) -> Config {
    let mut config = Config {
        ifindex: 2,
        mac: Mac { octets: [2, 0, 0, 0, 0, 1] },
        roles: Roles::BOTH,
        address: Ipv4 { octets: [192, 0, 2, 254] },
        vlan_count: u32::try_from(vlans).unwrap_or(u32::MAX),
        overlay_count: u32::try_from(overlays).unwrap_or(u32::MAX),
        ..Config::default()
    };
    for (vlan, port) in (100..).zip(config.vlans.iter_mut().take(vlans)) {
        *port = VlanPort { vlan, roles: Roles::BOTH };
    }
    for (index, overlay) in (1..).zip(config.overlays.iter_mut().take(overlays)) {
        *overlay = Overlay {
            local: Ipv4 { octets: [192, 0, 2, index] },
            port: Be16::new(8472),
            mac: Mac { octets: [2, 0, 0, 0, 1, index] },
            vni: Vni { bytes: [0, 0, index] },
            pad: 0,
            subnet: Ipv4 { octets: [10, index, 0, 0] },
            mask: Ipv4 { octets: [255, 255, 255, 0] },
            flags,
            snat_first: 0,
            snat_span: 0,
        };
    }
    config
}

/// With this many rules, each of a pool of four addresses.
fn with_snat(mut config: Config, rules: usize) -> Config {
    config.snat_rule_count = u32::try_from(rules).unwrap_or(u32::MAX);
    for (index, rule) in (0..).zip(config.snat_rules.iter_mut().take(rules)) {
        *rule = SnatRule { overlay: index % 4, first: index * 4, count: 4, ..SnatRule::default() };
    }
    for (index, address) in (0..=u8::MAX).zip(&mut config.snat_addresses) {
        *address = Ipv4 { octets: [10, 1, 0, index] };
    }
    for (index, port) in (2..).zip(&mut config.ports) {
        *port = Port { ifindex: index, mac: config.mac, mtu: 1500 };
    }
    for overlay in &mut config.overlays {
        overlay.snat_first = u32::from_be_bytes(overlay.subnet.octets);
        overlay.snat_span = 256;
    }
    config.session_slots = 262_144;
    config.timeouts = Timeouts::DEFAULT;
    config
}

fn load(bytes: &[u8], name: &str, config: &Config) -> Result<(Load, Vec<Map>)> {
    let mut ebpf = EbpfLoader::new()
        .override_global(CONFIG_SYMBOL, config, true)
        .override_global(LOG_LEVEL, &0u8, true)
        .load(bytes)
        .context("cannot create the maps")?;
    let program: &mut Xdp =
        ebpf.program_mut(name).with_context(|| format!("no program {name}"))?.try_into()?;
    match program.load() {
        Ok(()) => {}
        Err(ProgramError::LoadError { io_error, verifier_log }) => {
            let log = verifier_log.to_string();
            let lines: Vec<_> = log.lines().collect();
            bail!(
                "the verifier refuses it ({io_error}); its last words:\n{}",
                lines[lines.len().saturating_sub(40)..].join("\n")
            );
        }
        Err(error) => return Err(error.into()),
    }
    let info = program.info()?;
    let load = Load {
        verified_instructions: info
            .verified_instruction_count()
            .context("the kernel does not count instructions")?,
        translated_bytes: info.size_translated().context("the kernel hides the program's size")?,
        jited_bytes: info.size_jitted(),
    };
    let mut maps = Vec::new();
    for id in info.map_ids()?.unwrap_or_default() {
        let map = MapInfo::from_id(id)?;
        maps.push(Map {
            name: map.name_as_str().unwrap_or_default().to_owned(),
            kind: format!("{:?}", map.map_type()?),
            entries: map.max_entries(),
            memory_bytes: memory(&map)?,
        });
    }
    maps.sort_by(|a, b| a.name.cmp(&b.name));
    Ok((load, maps))
}

/// What the kernel spent on the map; exact since Linux 6.4, an estimate before.
fn memory(map: &MapInfo) -> Result<u64> {
    let fd = map.fd()?;
    let path = format!("/proc/self/fdinfo/{}", std::os::fd::AsFd::as_fd(&fd).as_raw_fd());
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let figure =
        text.lines().find_map(|line| line.strip_prefix("memlock:")).context("no memlock in fdinfo")?;
    Ok(figure.trim().parse()?)
}
