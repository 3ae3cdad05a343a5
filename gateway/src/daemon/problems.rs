//! What is wrong now, and since when.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use super::report::now;
use crate::{
    cluster::problem::{Problem, ProblemList},
    plan::Planner,
};

/// So many new or solved problems are logged one by one; the rest is counted.
const LOGGED: usize = 20;

/// A part of the daemon; each replaces its own problems.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    Interfaces,
    Tables,
    HostTables,
    Devices,
    Firewall,
    Settings,
    Netlink,
    Translation,
    Sessions,
}

impl Part {
    fn label(self) -> &'static str {
        match self {
            Self::Interfaces => "interfaces",
            Self::Tables => "tables",
            Self::HostTables => "tables of this host",
            Self::Devices => "slow path",
            Self::Firewall => "firewall",
            Self::Settings => "kernel settings",
            Self::Netlink => "netlink",
            Self::Translation => "source translation",
            Self::Sessions => "sessions",
        }
    }

    /// Whether another attempt may mend it without an event that tells so.
    fn is_retried(self) -> bool {
        !matches!(self, Self::Interfaces | Self::Translation | Self::Sessions)
    }
}

/// A problem as it is published.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProblemReport {
    /// What and where.
    #[serde(flatten)]
    pub problem: Problem,
    /// When it was first seen: seconds since 1970.
    pub since: u64,
}

/// Everything that is wrong.
#[derive(Debug, Default)]
pub(super) struct Problems {
    source: ProblemList,
    parts: BTreeMap<Part, Vec<String>>,
    parts_changed: bool,
    /// Revisions of planner and source that `since` is of.
    seen: Option<(u64, u64)>,
    since: BTreeMap<Problem, u64>,
}

impl Problems {
    /// Where the source keeps its own.
    pub(super) fn source(&self) -> ProblemList {
        self.source.clone()
    }

    /// Replaces what is wrong with a part.
    pub(super) fn set(&mut self, part: Part, problems: Vec<String>) {
        if self.parts.get(&part).map_or(&[][..], Vec::as_slice) != problems {
            self.parts_changed = true;
            self.parts.insert(part, problems);
        }
    }

    /// Whether something failed that should be tried again.
    pub(super) fn want_retry(&self) -> bool {
        self.parts.iter().any(|(part, problems)| part.is_retried() && !problems.is_empty())
    }

    /// Looks for what is new and what is solved, and logs it. Tells whether anything changed. If nothing did in planner,
    /// source and parts, this costs nothing.
    pub(super) fn refresh(&mut self, planner: &Planner) -> bool {
        let revisions = Some((planner.revision(), self.source.revision()));
        if self.seen == revisions && !self.parts_changed {
            return false;
        }
        self.seen = revisions;
        self.parts_changed = false;
        let parts = self.parts.iter().flat_map(|(part, problems)| {
            problems.iter().map(|problem| Problem::error(part.label(), problem.as_str(), ""))
        });
        let current: BTreeSet<Problem> =
            planner.problems().into_iter().chain(self.source.all()).chain(parts).collect();
        let solved: Vec<&Problem> = self.since.keys().filter(|known| !current.contains(known)).collect();
        let new: Vec<&Problem> = current.iter().filter(|found| !self.since.contains_key(found)).collect();
        if new.is_empty() && solved.is_empty() {
            return false;
        }
        new.iter().take(LOGGED).for_each(|problem| warn!("{problem}"));
        solved.iter().take(LOGGED).for_each(|problem| info!("solved: {problem}"));
        for (count, what) in [(new.len(), "new"), (solved.len(), "solved")] {
            if count > LOGGED {
                warn!(
                    "{} more problems are {what}; `gateway show problems` lists what is wrong",
                    count - LOGGED
                );
            }
        }
        let now = now();
        let known = std::mem::take(&mut self.since);
        self.since = current
            .into_iter()
            .map(|problem| {
                let since = known.get(&problem).copied().unwrap_or(now);
                (problem, since)
            })
            .collect();
        true
    }

    /// For publication, in order of place.
    pub(super) fn reports(&self) -> Vec<ProblemReport> {
        let mut reports: Vec<ProblemReport> = self
            .since
            .iter()
            .map(|(problem, since)| ProblemReport { problem: problem.clone(), since: *since })
            .collect();
        reports.sort_by(|a, b| (&a.problem.place, &a.problem).cmp(&(&b.problem.place, &b.problem)));
        reports
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_keeps_its_beginning_until_it_is_solved() {
        let planner = Planner::new(&[]);
        let mut problems = Problems::default();
        problems.source().set("a.yaml", vec![Problem::error("a.yaml", "is empty", "fill it")]);
        assert!(problems.refresh(&planner));
        let begun = problems.reports();
        assert_eq!(begun.len(), 1);
        assert!(!problems.refresh(&planner), "nothing changed");
        // As if it had been seen long ago.
        problems.since.values_mut().for_each(|since| *since = 7);
        problems.set(Part::Tables, vec!["full".to_owned()]);
        assert!(problems.refresh(&planner) && problems.want_retry());
        let since: Vec<_> = problems.reports().into_iter().map(|report| report.since == 7).collect();
        assert_eq!(since, [true, false], "in order of place");
        problems.source().set("a.yaml", Vec::new());
        problems.set(Part::Tables, Vec::new());
        assert!(problems.refresh(&planner));
        assert!(problems.reports().is_empty() && !problems.want_retry());
    }

    #[test]
    fn an_absent_interface_is_waited_for_without_retries() {
        let mut problems = Problems::default();
        problems.set(Part::Interfaces, vec!["eth9 does not exist".to_owned()]);
        assert!(!problems.want_retry());
    }
}
