//! Checks the BPF object: first as a file, then by loading it into this kernel with full configurations.
//!
//! The kernel's figures, and what the engine asks of its tables, are compared with `gateway-ebpf/budget.toml`, which
//! `--record` rewrites. None of them depends on how busy the machine is.

use std::{collections::BTreeMap, env, fmt::Write as _, fs, process::Command};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::{
    build, object,
    process::{capture, cargo, workspace},
    setup,
};

/// The profile of gateway's build script that may call memory functions.
const PORTABLE: &str = "portable";
const BUDGET: &str = "gateway-ebpf/budget.toml";

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Make the figures of this object the new budget
    #[arg(long)]
    record: bool,
}

/// What may not be exceeded, for each code generation profile and configuration.
#[derive(Debug, Deserialize, Serialize)]
struct Budget {
    /// How much more than recorded is accepted, percent; kernels differ a little.
    tolerance_percent: u64,
    /// Profile, then configuration, to instructions that the verifier walked.
    verified_instructions: Figures,
    /// The same to bytes of the program after the verifier took out what the configuration switches off.
    translated_bytes: Figures,
    /// Case of the benchmark, then table, to operations on it for one packet. Exact: the host's engine counts them.
    map_operations: Figures,
}

type Figures = BTreeMap<String, BTreeMap<String, u64>>;

/// What the `inspect-object` program of the tests crate prints.
#[derive(Deserialize)]
struct Inspection {
    loads: BTreeMap<String, Load>,
    maps: Vec<Map>,
    map_operations: Figures,
}

impl Inspection {
    fn of_loads(&self, figure: impl Fn(&Load) -> u64) -> BTreeMap<String, u64> {
        self.loads.iter().map(|(name, load)| (name.clone(), figure(load))).collect()
    }
}

#[derive(Deserialize)]
struct Load {
    verified_instructions: u64,
    translated_bytes: u64,
    jited_bytes: u64,
}

#[derive(Deserialize)]
struct Map {
    name: String,
    kind: String,
    entries: u64,
    memory_bytes: u64,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    setup::run(&[setup::Need::Bpf])?;
    build::run(&build::Options { release: false })?;

    let profile = match env::var("GATEWAY_BPF_PROFILE") {
        Ok(name) if !name.is_empty() => name,
        _ => "fast".to_owned(),
    };
    // The nested build's own output: the copy in target/bpf may be another profile's.
    let path = workspace().join("target/bpf").join(&profile).join("bpfel-unknown-none/release/gateway-ebpf");
    let bytes = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let report = object::scan(&bytes).with_context(|| format!("cannot make sense of {}", path.display()))?;
    for program in &report.programs {
        println!(
            "program {}: {} instructions, {} of {} bytes of stack",
            program.name,
            program.instructions,
            program.stack,
            object::STACK_LIMIT
        );
    }
    let mut faults = report.faults;
    if profile == PORTABLE {
        for call in &report.byte_loops {
            println!("{call}: the price of the {PORTABLE} profile");
        }
    } else {
        faults.extend(report.byte_loops);
    }
    refuse(&faults)?;

    let mut inspect = cargo();
    inspect
        .args(["run", "--quiet", "--package", "gateway-tests", "--bin", "inspect-object", "--"])
        .arg(&path);
    let inspection: Inspection = serde_json::from_str(&run_inspection(&mut inspect)?)
        .context("inspect-object did not print what verify expects")?;
    print!("{}", tables(&inspection));

    let budget_path = workspace().join(BUDGET);
    let mut budget: Budget = toml::from_str(
        &fs::read_to_string(&budget_path)
            .with_context(|| format!("cannot read {}", budget_path.display()))?,
    )
    .with_context(|| format!("{BUDGET} is not valid"))?;
    if options.record {
        let verified = inspection.of_loads(|load| load.verified_instructions);
        budget.verified_instructions.insert(profile.clone(), verified);
        budget.translated_bytes.insert(profile, inspection.of_loads(|load| load.translated_bytes));
        budget.map_operations = inspection.map_operations;
        return fs::write(&budget_path, render(&budget)?)
            .with_context(|| format!("cannot write {}", budget_path.display()));
    }
    refuse(&overspent(&budget, &profile, &inspection))
}

fn run_inspection(command: &mut Command) -> Result<String> {
    capture(command).context("the object does not load into this kernel (that needs root and BPF)")
}

fn refuse(faults: &[String]) -> Result<()> {
    if faults.is_empty() {
        return Ok(());
    }
    bail!("the object is refused:\n  {}", faults.join("\n  "))
}

/// Where the figures are above the budget, or have none.
fn overspent(budget: &Budget, profile: &str, inspection: &Inspection) -> Vec<String> {
    let mut faults = Vec::new();
    for (what, recorded, found) in [
        (
            "verified instructions",
            &budget.verified_instructions,
            inspection.of_loads(|load| load.verified_instructions),
        ),
        ("translated bytes", &budget.translated_bytes, inspection.of_loads(|load| load.translated_bytes)),
    ] {
        faults.extend(above(what, profile, recorded.get(profile), &found, budget.tolerance_percent));
    }
    for (case, found) in &inspection.map_operations {
        faults.extend(above("operations on maps", case, budget.map_operations.get(case), found, 0));
    }
    faults
}

fn above(
    what: &str,
    group: &str,
    recorded: Option<&BTreeMap<String, u64>>,
    found: &BTreeMap<String, u64>,
    tolerance: u64,
) -> Vec<String> {
    let fault = |(name, found): (&String, &u64)| match recorded.and_then(|figures| figures.get(name)) {
        None => Some(format!(
            "{BUDGET} has no figure for the {found} {what} of {group}.{name}: look at the figures above, then `cargo \
             xtask verify --record`"
        )),
        Some(recorded) if found * 100 > recorded * (100 + tolerance) => Some(format!(
            "{group}.{name}: {found} {what}, {recorded} in {BUDGET} (tolerance {tolerance} %): make the program smaller, \
             or `cargo xtask verify --record` and say why in the commit"
        )),
        Some(_) => None,
    };
    found.iter().filter_map(fault).collect()
}

fn render(budget: &Budget) -> Result<String> {
    let figures = toml::to_string(budget)?;
    Ok(format!("# What the object may cost; written by `cargo xtask verify --record`.\n{figures}"))
}

fn tables(inspection: &Inspection) -> String {
    let mut text =
        format!("{:<16} {:>10} {:>12} {:>10}\n", "configuration", "verified", "translated", "JITed");
    for (name, load) in &inspection.loads {
        let _ = writeln!(
            text,
            "{name:<16} {:>10} {:>10} B {:>8} B",
            load.verified_instructions, load.translated_bytes, load.jited_bytes
        );
    }
    let _ = writeln!(text, "\n{:<16} {:<14} {:>10} {:>14}", "map", "type", "entries", "memory");
    for map in &inspection.maps {
        // Tries allocate their nodes when they are filled.
        let memory = match map.memory_bytes {
            0 => "as used".to_owned(),
            bytes => format!("{} KiB", bytes.div_ceil(1024)),
        };
        let _ = writeln!(text, "{:<16} {:<14} {:>10} {memory:>14}", map.name, map.kind, map.entries);
    }
    let _ = writeln!(text, "\n{:<28} operations on maps for one packet", "case");
    for (case, tables) in &inspection.map_operations {
        let tables: Vec<String> = tables.iter().map(|(table, count)| format!("{table} {count}")).collect();
        let _ = writeln!(text, "{case:<28} {}", tables.join(", "));
    }
    let total: u64 = inspection.maps.iter().map(|map| map.memory_bytes).sum();
    let _ = writeln!(text, "{:<42} {:>10} KiB", "all maps, empty", total.div_ceil(1024));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures(group: &str, name: &str, figure: u64) -> Figures {
        BTreeMap::from([(group.to_owned(), BTreeMap::from([(name.to_owned(), figure)]))])
    }

    fn budget() -> Budget {
        Budget {
            tolerance_percent: 20,
            verified_instructions: figures("fast", "full", 1000),
            translated_bytes: figures("fast", "full", 10),
            map_operations: figures("program.arp", "PODS", 1),
        }
    }

    fn inspection(verified_instructions: u64, pods: u64) -> Inspection {
        let load = Load { verified_instructions, translated_bytes: 12, jited_bytes: 1 };
        Inspection {
            loads: BTreeMap::from([("full".to_owned(), load)]),
            maps: Vec::new(),
            map_operations: figures("program.arp", "PODS", pods),
        }
    }

    #[test]
    fn tolerance_is_inclusive() {
        assert!(overspent(&budget(), "fast", &inspection(1200, 1)).is_empty());
        assert_eq!(overspent(&budget(), "fast", &inspection(1201, 1)).len(), 1);
    }

    #[test]
    fn one_more_look_up_is_a_fault() {
        let faults = overspent(&budget(), "fast", &inspection(1, 2));
        assert!(faults[0].starts_with("program.arp.PODS: 2 operations on maps"), "{faults:?}");
    }

    #[test]
    fn a_figure_without_budget_is_a_fault() {
        assert!(overspent(&budget(), "portable", &inspection(1, 1))[0].contains("--record"));
    }

    #[test]
    fn what_is_recorded_can_be_read_back() {
        let again: Budget = toml::from_str(&render(&budget()).unwrap()).unwrap();
        assert_eq!(again.verified_instructions, budget().verified_instructions);
        assert_eq!(again.map_operations, budget().map_operations);
        assert_eq!(again.tolerance_percent, 20);
    }

    #[test]
    fn the_budget_in_the_tree_is_valid() {
        let budget: Budget = toml::from_str(&fs::read_to_string(workspace().join(BUDGET)).unwrap()).unwrap();
        assert!(budget.verified_instructions.contains_key("fast"));
        assert!(budget.map_operations.contains_key("program.encap.pod"));
    }
}
