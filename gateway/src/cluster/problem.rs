//! What is wrong with a cluster object: where, what, and how to mend it.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use serde::{Deserialize, Serialize};

/// What a problem costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The object is used nevertheless.
    Warning,
    /// The object, or its newest version, is not used.
    Error,
}

impl Severity {
    /// A word for it.
    pub fn label(self) -> &'static str {
        match self {
            Self::Warning => "warning",
            Self::Error => "error",
        }
    }
}

/// What a text keeps of a field that somebody filled with a megabyte, in bytes.
const LONGEST: usize = 400;

/// Makes a text fit for a terminal: cuts what nobody would read to its end, and shows control characters instead of
/// sending them, as a name or a value may hold any.
fn clip(mut text: String) -> String {
    let hidden = |c: char| c.is_control() && c != '\n';
    if text.contains(hidden) {
        let mut shown = String::with_capacity(text.len());
        for c in text.chars() {
            if hidden(c) {
                shown.extend(c.escape_default());
            } else {
                shown.push(c);
            }
        }
        text = shown;
    }
    if text.len() > LONGEST {
        text.truncate(text.floor_char_boundary(LONGEST));
        text.push('…');
    }
    text
}

/// A finding for a person.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Problem {
    /// What it costs.
    pub severity: Severity,
    /// Object or file, and the field in it.
    pub place: String,
    /// What is wrong.
    pub what: String,
    /// What would be right; empty if `what` says so.
    pub remedy: String,
}

impl Problem {
    /// An object that is not used.
    pub fn error(place: impl Into<String>, what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            severity: Severity::Error,
            place: clip(place.into()),
            what: clip(what.into()),
            remedy: remedy.into(),
        }
    }

    /// An object that is used nevertheless.
    pub fn warning(place: impl Into<String>, what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            severity: Severity::Warning,
            place: clip(place.into()),
            what: clip(what.into()),
            remedy: remedy.into(),
        }
    }
}

/// Where a source has an object from, for people: a file, or an item in it. `None` if the name says enough.
pub type Origin = Option<Arc<str>>;

impl Problem {
    /// Puts where the object comes from in front of its place.
    pub fn locate(&mut self, origin: &Origin) {
        if let Some(origin) = origin {
            self.place = clip(format!("{origin}, {}", self.place));
        }
    }

    /// The same problem, located.
    pub fn located(mut self, origin: &Origin) -> Self {
        self.locate(origin);
        self
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.what)?;
        if self.remedy.is_empty() { Ok(()) } else { write!(f, "; {}", self.remedy) }
    }
}

/// The problems that a running source has now. Clones share one list.
#[derive(Clone, Debug, Default)]
pub struct ProblemList {
    content: Arc<Mutex<Content>>,
}

#[derive(Debug, Default)]
struct Content {
    by_place: BTreeMap<String, Vec<Problem>>,
    revision: u64,
}

impl ProblemList {
    /// Replaces what is known about a place (a file, a directory); an empty list means that it is mended.
    pub fn set(&self, place: &str, problems: Vec<Problem>) {
        let mut content = self.lock();
        if content.by_place.get(place).map_or(&[][..], Vec::as_slice) == problems {
            return;
        }
        content.revision += 1;
        if problems.is_empty() {
            content.by_place.remove(place);
        } else {
            content.by_place.insert(place.to_owned(), problems);
        }
    }

    /// Everything, by place.
    pub fn all(&self) -> Vec<Problem> {
        self.lock().by_place.values().flatten().cloned().collect()
    }

    /// Rises when something changed.
    pub fn revision(&self) -> u64 {
        self.lock().revision
    }

    fn lock(&self) -> MutexGuard<'_, Content> {
        // A holder that panics between two of the steps leaves a revision that is too high, which does no harm.
        self.content.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_is_not_at_the_mercy_of_a_name() {
        let mut problem = Problem::error("Node \u{1b}]0;owned\u{7}", "line\r\none", "");
        problem.locate(&Some("\u{1b}[2J.yaml".into()));
        assert_eq!(problem.place, r"\u{1b}[2J.yaml, Node \u{1b}]0;owned\u{7}");
        assert_eq!(problem.what, "line\\r\none");
        let long = Problem::error("x".repeat(1 << 20), "", "");
        assert!(long.place.len() < 500);
    }
}
