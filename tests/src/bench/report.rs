//! The result of a benchmark. The JSON form is documented in `docs/performance.md`: fields may be added to it, but none is
//! ever taken away or given another meaning.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{machine::Machine, median};

/// Everything that one call measured.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct Report {
    /// Where.
    pub machine: Machine,
    /// What.
    pub cases: Vec<Case>,
}

/// The cost of a packet in one case.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Case {
    /// Stable name, such as `program.encap.pod`.
    pub name: String,
    /// Flows that took turns.
    pub flows: u32,
    /// Entries of the table of pods.
    pub pods: u32,
    /// Nodes in the tables.
    pub nodes: u32,
    /// Length of the frame that arrives.
    pub frame_bytes: u32,
    /// Median over the rounds, nanoseconds a packet.
    pub ns_median: f64,
    /// The cheapest round.
    pub ns_min: f64,
    /// The dearest round.
    pub ns_max: f64,
    /// Name of the case, of this report, that this one is compared with: for the same flows, pods and nodes,
    /// and the frame length that is next to its own.
    pub reference: String,
    /// `ns_median` of this case divided by that of the reference.
    pub ratio: f64,
}

/// What was measured of a case, before it is compared.
#[derive(Clone, Debug)]
pub struct Samples {
    /// As in [`Case`].
    pub name: &'static str,
    /// As in [`Case`].
    pub flows: u32,
    /// As in [`Case`].
    pub pods: u32,
    /// As in [`Case`].
    pub nodes: u32,
    /// As in [`Case`].
    pub frame_bytes: u32,
    /// As in [`Case`].
    pub reference: &'static str,
    /// Nanoseconds a packet, by round.
    pub rounds: Vec<f64>,
}

/// Compares what was measured in one run.
pub fn compare(samples: &[Samples]) -> Vec<Case> {
    samples
        .iter()
        .map(|own| {
            let ns_median = median(&own.rounds);
            let tenths = |ns: f64| (ns * 10.0).round() / 10.0;
            let reference = reference(samples, own).map_or(f64::NAN, |reference| median(&reference.rounds));
            Case {
                name: own.name.to_owned(),
                flows: own.flows,
                pods: own.pods,
                nodes: own.nodes,
                frame_bytes: own.frame_bytes,
                ns_median: tenths(ns_median),
                ns_min: tenths(own.rounds.iter().copied().fold(f64::INFINITY, f64::min)),
                ns_max: tenths(own.rounds.iter().copied().fold(f64::NEG_INFINITY, f64::max)),
                reference: own.reference.to_owned(),
                ratio: (ns_median / reference * 1000.0).round() / 1000.0,
            }
        })
        .collect()
}

/// The reference at the same size, with frames as long as possible alike.
fn reference<'a>(samples: &'a [Samples], own: &Samples) -> Option<&'a Samples> {
    let size = |of: &Samples| (of.flows, of.pods, of.nodes);
    samples
        .iter()
        .filter(|other| other.name == own.reference && size(other) == size(own))
        .min_by_key(|other| other.frame_bytes.abs_diff(own.frame_bytes))
}

impl fmt::Display for Report {
    /// A table for people.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}\n", self.machine)?;
        writeln!(
            f,
            "{:<28} {:>8} {:>7} {:>6} {:>6} {:>9} {:>17}  {:>6} of",
            "case", "flows", "pods", "nodes", "bytes", "ns", "range", "ratio"
        )?;
        for case in &self.cases {
            writeln!(
                f,
                "{:<28} {:>8} {:>7} {:>6} {:>6} {:>9.1} {:>8.1}–{:<8.1}  {:>6.2} {}",
                case.name,
                case.flows,
                case.pods,
                case.nodes,
                case.frame_bytes,
                case.ns_median,
                case.ns_min,
                case.ns_max,
                case.ratio,
                case.reference
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(name: &'static str, flows: u32, rounds: &[f64]) -> Samples {
        Samples {
            name,
            flows,
            pods: 10,
            nodes: 2,
            frame_bytes: 60,
            reference: "reference",
            rounds: rounds.to_vec(),
        }
    }

    #[test]
    fn a_case_is_compared_with_the_reference_at_its_own_size() {
        let cases = compare(&[
            samples("reference", 1, &[10.0, 20.0, 30.0]),
            samples("reference", 64, &[40.0]),
            samples("case", 1, &[25.0, 35.0, 30.0]),
        ]);
        let ratios: Vec<String> = cases.iter().map(|case| case.ratio.to_string()).collect();
        assert_eq!(ratios, ["1", "1", "1.5"]);
        assert_eq!(cases[2].ns_min.to_string() + " " + &cases[2].ns_max.to_string(), "25 35");
    }

    #[test]
    fn the_json_has_the_documented_fields() {
        let report =
            Report { machine: Machine::default(), cases: compare(&[samples("reference", 1, &[1.0])]) };
        let value = serde_json::to_value(&report).unwrap();
        let fields: Vec<&str> = value["cases"][0].as_object().unwrap().keys().map(String::as_str).collect();
        let mut expected = [
            "name",
            "flows",
            "pods",
            "nodes",
            "frame_bytes",
            "ns_median",
            "ns_min",
            "ns_max",
            "reference",
            "ratio",
        ];
        expected.sort_unstable();
        let mut found = fields;
        found.sort_unstable();
        assert_eq!(found, expected);
        assert!(value["machine"].is_object());
    }
}
