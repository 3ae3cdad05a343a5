//! A typed walk over a TOML document that goes on after a problem.
//!
//! serde stops at the first error; a person who wrote three of them wants to hear of three. So the document is
//! walked by hand: each value is taken once, what is left at the end is an unknown key, and problems are collected.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::Problem;

/// A problem before lines are counted.
struct Finding {
    certainty: Certainty,
    at: usize,
    key: String,
    what: String,
    remedy: String,
}

/// How a problem stands to errors of syntax: where the text cannot be read, what seems to be wrong or absent may not be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Certainty {
    Syntax,
    Present,
    Absent,
}

/// Collects problems of one document.
pub(super) struct Report<'t> {
    file: &'t str,
    text: &'t str,
    findings: RefCell<Vec<Finding>>,
}

impl<'t> Report<'t> {
    pub(super) fn new(file: &'t str, text: &'t str) -> Self {
        Self { file, text, findings: RefCell::default() }
    }

    /// Notes that something at byte `at` is wrong.
    pub(super) fn note(
        &self,
        at: usize,
        key: impl Into<String>,
        what: impl Into<String>,
        remedy: impl Into<String>,
    ) {
        self.push(Certainty::Present, at, key.into(), what.into(), remedy.into());
    }

    /// Notes that something is not there; `at` is where one would look for it.
    pub(super) fn missing(
        &self,
        at: usize,
        key: impl Into<String>,
        what: impl Into<String>,
        remedy: impl Into<String>,
    ) {
        self.push(Certainty::Absent, at, key.into(), what.into(), remedy.into());
    }

    /// Notes that the text is no TOML.
    pub(super) fn syntax(&self, at: usize, what: &str) {
        self.push(Certainty::Syntax, at, String::new(), what.to_owned(), "mend the TOML syntax".to_owned());
    }

    fn push(&self, certainty: Certainty, at: usize, key: String, what: String, remedy: String) {
        self.findings.borrow_mut().push(Finding { certainty, at, key, what, remedy });
    }

    pub(super) fn is_empty(&self) -> bool {
        self.findings.borrow().is_empty()
    }

    /// The problems in the order of the text.
    pub(super) fn into_problems(self) -> Vec<Problem> {
        let mut findings = self.findings.into_inner();
        findings.sort_by_key(|finding| finding.at);
        let locate = |at: usize| {
            let before = self.text.get(..at.min(self.text.len())).unwrap_or(self.text);
            let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
            (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1)
        };
        let broken: BTreeSet<usize> = findings
            .iter()
            .filter(|finding| finding.certainty == Certainty::Syntax)
            .map(|finding| locate(finding.at).0)
            .collect();
        findings
            .into_iter()
            .filter(|finding| match finding.certainty {
                Certainty::Syntax => true,
                Certainty::Present => !broken.contains(&locate(finding.at).0),
                Certainty::Absent => broken.is_empty(),
            })
            .map(|finding| {
                let (line, column) = locate(finding.at);
                let Finding { key, what, remedy, .. } = finding;
                Problem { file: self.file.to_owned(), line, column, key, what, remedy }
            })
            .collect()
    }
}

/// A value together with where it stands.
#[derive(Clone, Debug)]
pub(super) struct Located<T> {
    pub(super) value: T,
    pub(super) at: usize,
    pub(super) key: String,
}

impl<T> Located<T> {
    /// Notes that this value is wrong.
    pub(super) fn note(&self, report: &Report<'_>, what: impl Into<String>, remedy: impl Into<String>) {
        report.note(self.at, self.key.as_str(), what, remedy);
    }
}

/// A table whose keys are taken one after the other.
pub(super) struct Section<'t> {
    report: &'t Report<'t>,
    /// Path of the table, empty for the document.
    path: String,
    at: usize,
    rest: BTreeMap<String, (Range<usize>, Spanned<DeValue<'t>>)>,
    known: Vec<&'static str>,
}

impl<'t> Section<'t> {
    pub(super) fn new(report: &'t Report<'t>, path: String, at: usize, table: DeTable<'t>) -> Self {
        let rest = table
            .into_iter()
            .map(|(key, value)| {
                let span = key.span();
                (key.into_inner().into_owned(), (span, value))
            })
            .collect();
        Self { report, path, at, rest, known: Vec::new() }
    }

    /// Path of one of the table's keys.
    pub(super) fn path(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    /// Where the table starts.
    pub(super) fn at(&self) -> usize {
        self.at
    }

    /// Whether a key is there and has not been taken.
    pub(super) fn has(&self, key: &str) -> bool {
        self.rest.contains_key(key)
    }

    /// Takes a value as it is.
    pub(super) fn take(&mut self, key: &'static str) -> Option<Located<DeValue<'t>>> {
        self.known.push(key);
        let (_, value) = self.rest.remove(key)?;
        let at = value.span().start;
        Some(Located { value: value.into_inner(), at, key: self.path(key) })
    }

    /// Takes a value of a type. `None` if it is absent or wrong; what is wrong has been noted.
    pub(super) fn read<T>(&mut self, key: &'static str, parse: Parse<T>) -> Option<Located<T>> {
        let found = self.take(key)?;
        convert(self.report, &found, parse)
    }

    /// As [`read`](Self::read), but an absent key is a problem.
    pub(super) fn require<T>(
        &mut self,
        key: &'static str,
        parse: Parse<T>,
        remedy: &str,
    ) -> Option<Located<T>> {
        if !self.has(key) {
            self.known.push(key);
            self.missing(key, remedy);
        }
        self.read(key, parse)
    }

    /// Notes that a key is missing.
    pub(super) fn missing(&self, key: &str, remedy: &str) {
        self.report.missing(self.at, self.path(key), "is missing", remedy);
    }

    /// Takes a table; an absent one counts as empty.
    pub(super) fn section(&mut self, key: &'static str) -> Self {
        let report = self.report;
        match self.take(key) {
            None => Self::new(report, self.path(key), self.at, DeTable::new()),
            Some(Located { value: DeValue::Table(table), at, key }) => Self::new(report, key, at, table),
            Some(found) => {
                found.note(
                    report,
                    format!("is {}", kind(&found.value)),
                    format!("write a table: [{}]", found.key),
                );
                Self::new(report, found.key, found.at, DeTable::new())
            }
        }
    }

    /// Takes an array of tables; an absent one counts as empty. `None` if it is something else.
    pub(super) fn sections(&mut self, key: &'static str) -> Option<Vec<Self>> {
        let report = self.report;
        let Some(found) = self.take(key) else { return Some(Vec::new()) };
        // A table in an array has no header of its own to write.
        let remedy = if found.key.contains('[') {
            format!("write an array of tables: {key} = [{{ … }}]")
        } else {
            format!("write an array of tables: [[{}]]", found.key)
        };
        let DeValue::Array(array) = found.value else {
            report.note(found.at, found.key, format!("is {}", kind(&found.value)), remedy);
            return None;
        };
        let mut sections = Vec::new();
        for (index, item) in array.into_iter().enumerate() {
            let at = item.span().start;
            let path = format!("{}[{index}]", found.key);
            match item.into_inner() {
                DeValue::Table(table) => sections.push(Self::new(report, path, at, table)),
                other => report.note(at, path, format!("is {}", kind(&other)), remedy.as_str()),
            }
        }
        Some(sections)
    }

    /// Notes every key that nobody took.
    pub(super) fn finish(self) {
        for (key, (span, _)) in &self.rest {
            let closest = self
                .known
                .iter()
                .map(|known| (distance(known, key), *known))
                .min()
                .filter(|(distance, _)| *distance <= 2 + key.len() / 4);
            let remedy = match closest {
                Some((_, known)) => format!("did you mean {known:?}?"),
                None => format!("known keys here: {}", self.known.join(", ")),
            };
            self.report.note(span.start, self.path(key), "is no key of the configuration", remedy);
        }
    }
}

/// How a type is read from TOML: what it should look like, and a function that takes the value or says what is wrong.
pub(super) struct Parse<T> {
    pub(super) expected: &'static str,
    pub(super) parse: fn(&DeValue<'_>) -> Result<T, String>,
}

impl<T> Clone for Parse<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Parse<T> {}

/// Reads a value; what is wrong with it is noted.
pub(super) fn convert<T>(
    report: &Report<'_>,
    found: &Located<DeValue<'_>>,
    parse: Parse<T>,
) -> Option<Located<T>> {
    match (parse.parse)(&found.value) {
        Ok(value) => Some(Located { value, at: found.at, key: found.key.clone() }),
        Err(what) => {
            found.note(report, what, format!("write {}", parse.expected));
            None
        }
    }
}

/// What a value is, for people.
pub(super) fn kind(value: &DeValue<'_>) -> String {
    match value {
        DeValue::String(text) => format!("the text {text:?}"),
        DeValue::Integer(number) => format!("the number {number}"),
        DeValue::Float(number) => format!("the number {number}"),
        DeValue::Boolean(value) => format!("{value}"),
        DeValue::Datetime(_) => "a date".to_owned(),
        DeValue::Array(_) => "an array".to_owned(),
        DeValue::Table(_) => "a table".to_owned(),
    }
}

/// Levenshtein's distance in bytes.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, left) in a.bytes().enumerate() {
        let mut diagonal = i;
        row[0] = i + 1;
        for (j, right) in b.bytes().enumerate() {
            let replaced = diagonal + usize::from(left != right);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}
