//! What a person sees.

use std::{
    env,
    io::{self, IsTerminal, Write},
    time::{Duration, Instant},
};

use anyhow::Result;

/// Columns of the screen.
pub(crate) const WIDTH: usize = 100;

const GREEN: &str = "32";
const RED: &str = "31";
const BOLD: &str = "1";
const DIM: &str = "2";

/// The screen, and how many checks held.
pub(crate) struct Screen {
    colour: bool,
    passed: u32,
    failed: u32,
    start: Instant,
}

impl Screen {
    /// Colours only for a terminal, and not if `NO_COLOR` is set (see no-color.org).
    pub(crate) fn new() -> Self {
        let colour =
            io::stdout().is_terminal() && env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        Self { colour, passed: 0, failed: 0, start: Instant::now() }
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    /// Prints a heading.
    pub(crate) fn heading(&self, text: &str) -> Result<()> {
        writeln!(io::stdout(), "{}", self.paint(BOLD, text))?;
        Ok(())
    }

    /// Does something that can fail, and prints one line with its result and how long it took. A failure is counted and
    /// does not end the demo: `None`.
    pub(crate) fn check<T>(
        &mut self,
        subject: &str,
        work: impl FnOnce() -> Result<(String, T)>,
    ) -> Result<Option<T>> {
        let start = Instant::now();
        let result = work();
        let time = format!("{:>6.2} s", start.elapsed().as_secs_f64());
        let mut out = io::stdout().lock();
        match result {
            Ok((detail, value)) => {
                self.passed += 1;
                // Mark, subject and time take 13 + 2 + 8 columns.
                let detail: String = detail.chars().take(WIDTH - 23).collect();
                let gap = " ".repeat(WIDTH - 23 - detail.chars().count());
                let (mark, time) = (self.paint(GREEN, "✔"), self.paint(DIM, &time));
                writeln!(out, " {mark} {subject:<10}{detail}{gap}  {time}")?;
                Ok(Some(value))
            }
            Err(error) => {
                self.failed += 1;
                writeln!(out, " {} {subject:<10}{error:#}", self.paint(RED, "✘"))?;
                Ok(None)
            }
        }
    }

    /// Prints the sum; whether every check held.
    pub(crate) fn finish(&self, evidence: &str) -> Result<bool> {
        let time = self.start.elapsed();
        let verdict = if self.failed == 0 {
            self.paint(GREEN, &format!("All {} checks passed", self.passed))
        } else {
            self.paint(RED, &format!("{} of {} checks failed", self.failed, self.passed + self.failed))
        };
        writeln!(io::stdout(), "{verdict} in {:.1} s; captures and logs: {evidence}", time.as_secs_f64())?;
        Ok(self.failed == 0)
    }
}

/// Prints lines as they are, cut to the width.
pub(crate) fn text(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    for line in text.lines() {
        writeln!(out, "{}", line.chars().take(WIDTH).collect::<String>().trim_end())?;
    }
    Ok(())
}

/// A rate for people.
pub(crate) fn rate(bits: f64) -> String {
    if bits >= 1e9 { format!("{:.1} Gbit/s", bits / 1e9) } else { format!("{:.0} Mbit/s", bits / 1e6) }
}

/// A duration for people.
pub(crate) fn milliseconds(time: Duration) -> String {
    format!("{:.0} ms", time.as_secs_f64() * 1e3)
}
