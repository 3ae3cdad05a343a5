//! What is wrong with a configuration file: where, what, and what would be right.

use std::{error::Error, fmt, io};

use serde::Serialize;

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// The file.
    pub file: String,
    /// Line, from 1; 0 if it is about the file as a whole.
    pub line: usize,
    /// Column in characters, from 1; 0 if it is about the file as a whole.
    pub column: usize,
    /// Path of the key, such as `overlay[0].vni`; empty if it is about the file's syntax.
    pub key: String,
    /// What is wrong.
    pub what: String,
    /// What would be right.
    pub remedy: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.file)?;
        if self.line > 0 {
            write!(f, ":{}:{}", self.line, self.column)?;
        }
        if !self.key.is_empty() {
            write!(f, ": {}", self.key)?;
        }
        write!(f, ": {}", self.what)?;
        if !self.remedy.is_empty() {
            write!(f, "; {}", self.remedy)?;
        }
        Ok(())
    }
}

/// Everything that is wrong with a configuration file, in the order of the file. Never empty.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Problems(pub Vec<Problem>);

impl Problems {
    pub(super) fn unreadable(file: &str, error: &io::Error) -> Self {
        Self(vec![Problem {
            file: file.to_owned(),
            line: 0,
            column: 0,
            key: String::new(),
            what: format!("cannot be read: {error}"),
            remedy: "name the configuration file with --config or GATEWAY_CONFIG".to_owned(),
        }])
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = self.0.len();
        writeln!(f, "the configuration has {count} problem{}:", if count == 1 { "" } else { "s" })?;
        for (index, problem) in self.0.iter().enumerate() {
            write!(f, "{}  {problem}", if index > 0 { "\n" } else { "" })?;
        }
        Ok(())
    }
}

impl Error for Problems {}
