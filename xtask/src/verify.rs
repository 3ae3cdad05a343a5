//! Checks the BPF object: first as a file, then by loading it into this kernel with full configurations.
//!
//! The kernel's figures are compared with those in `gateway-ebpf/budget.toml`, which `--record` rewrites.

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
    verified_instructions: BTreeMap<String, BTreeMap<String, u64>>,
}

/// What the `inspect-object` program of the tests crate prints.
#[derive(Deserialize)]
struct Inspection {
    loads: BTreeMap<String, Load>,
    maps: Vec<Map>,
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
        let figures = inspection.loads.iter().map(|(name, load)| (name.clone(), load.verified_instructions));
        budget.verified_instructions.insert(profile, figures.collect());
        return fs::write(&budget_path, render(&budget)?)
            .with_context(|| format!("cannot write {}", budget_path.display()));
    }
    refuse(&overspent(&budget, &profile, &inspection.loads))
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
fn overspent(budget: &Budget, profile: &str, loads: &BTreeMap<String, Load>) -> Vec<String> {
    let figures = budget.verified_instructions.get(profile);
    let mut faults = Vec::new();
    for (name, load) in loads {
        let found = load.verified_instructions;
        match figures.and_then(|figures| figures.get(name)) {
            None => faults.push(format!(
                "{BUDGET} has no figure for {profile}.{name}: look at the figures above, then `cargo xtask verify --record`"
            )),
            Some(recorded) if found * 100 > recorded * (100 + budget.tolerance_percent) => faults.push(format!(
                "{profile}.{name}: {found} verified instructions, {recorded} in {BUDGET} (tolerance {} %): \
                 make the program smaller, or `cargo xtask verify --record` and say why in the commit",
                budget.tolerance_percent
            )),
            Some(_) => {}
        }
    }
    faults
}

fn render(budget: &Budget) -> Result<String> {
    let figures = toml::to_string(budget)?;
    Ok(format!(
        "# Instructions that the verifier walks; written by `cargo xtask verify --record`.\n{figures}"
    ))
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
    let total: u64 = inspection.maps.iter().map(|map| map.memory_bytes).sum();
    let _ = writeln!(text, "{:<42} {:>10} KiB", "all maps, empty", total.div_ceil(1024));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn budget() -> Budget {
        let figures = BTreeMap::from([("full".to_owned(), 1000)]);
        Budget {
            tolerance_percent: 20,
            verified_instructions: BTreeMap::from([("fast".to_owned(), figures)]),
        }
    }

    fn loads(verified_instructions: u64) -> BTreeMap<String, Load> {
        BTreeMap::from([(
            "full".to_owned(),
            Load { verified_instructions, translated_bytes: 1, jited_bytes: 1 },
        )])
    }

    #[test]
    fn tolerance_is_inclusive() {
        assert!(overspent(&budget(), "fast", &loads(1200)).is_empty());
        assert_eq!(overspent(&budget(), "fast", &loads(1201)).len(), 1);
    }

    #[test]
    fn a_figure_without_budget_is_a_fault() {
        assert!(overspent(&budget(), "portable", &loads(1))[0].contains("--record"));
    }

    #[test]
    fn what_is_recorded_can_be_read_back() {
        let again: Budget = toml::from_str(&render(&budget()).unwrap()).unwrap();
        assert_eq!(again.verified_instructions, budget().verified_instructions);
        assert_eq!(again.tolerance_percent, 20);
    }

    #[test]
    fn the_budget_in_the_tree_is_valid() {
        let budget: Budget = toml::from_str(&fs::read_to_string(workspace().join(BUDGET)).unwrap()).unwrap();
        assert!(budget.verified_instructions.contains_key("fast"));
    }
}
