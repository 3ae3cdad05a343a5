//! What is wrong with a cluster object: where, what, and how to mend it.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use serde::Serialize;

/// What a problem costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The object is used nevertheless.
    Warning,
    /// The object, or its newest version, is not used.
    Error,
}

/// A finding for a person.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Problem {
    /// What it costs.
    pub severity: Severity,
    /// Object or file, and the field in it.
    pub place: String,
    /// What is wrong.
    pub what: String,
    /// What would be right.
    pub remedy: String,
}

impl Problem {
    /// An object that is not used.
    pub fn error(place: impl Into<String>, what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { severity: Severity::Error, place: place.into(), what: what.into(), remedy: remedy.into() }
    }

    /// An object that is used nevertheless.
    pub fn warning(place: impl Into<String>, what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { severity: Severity::Warning, place: place.into(), what: what.into(), remedy: remedy.into() }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}; {}", self.place, self.what, self.remedy)
    }
}

/// The problems that a running source has now. Clones share one list.
#[derive(Clone, Debug, Default)]
pub struct ProblemList {
    by_place: Arc<Mutex<BTreeMap<String, Vec<Problem>>>>,
}

impl ProblemList {
    /// Replaces what is known about a place (a file, a directory); an empty list means that it is mended.
    pub fn set(&self, place: &str, problems: Vec<Problem>) {
        let mut by_place = self.lock();
        if problems.is_empty() {
            by_place.remove(place);
        } else {
            by_place.insert(place.to_owned(), problems);
        }
    }

    /// Everything, by place.
    pub fn all(&self) -> Vec<Problem> {
        self.lock().values().flatten().cloned().collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Vec<Problem>>> {
        // Every update is one map operation, so a panicking holder leaves no half-done state.
        self.by_place.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
