//! How long to wait before another attempt.

use std::time::Duration;

use rand::RngExt as _;

/// The server may ask for more patience, but not for any amount.
const LONGEST_WISH: Duration = Duration::from_mins(5);

/// Doubles with every failure in a row, and is never quite the same: gateways that lost their server together must not
/// come back together.
#[derive(Clone, Debug)]
pub(super) struct Pause {
    first: Duration,
    longest: Duration,
    failures: u32,
}

impl Pause {
    pub(super) fn new(first: Duration, longest: Duration) -> Self {
        Self { first, longest, failures: 0 }
    }

    /// It worked.
    pub(super) fn reset(&mut self) {
        self.failures = 0;
    }

    /// How often it failed since it last worked.
    pub(super) fn failures(&self) -> u32 {
        self.failures
    }

    /// After a failure: between half and all of what is due, and not before the server wants it.
    pub(super) fn next(&mut self, wish: Option<Duration>) -> Duration {
        let due = self.first.saturating_mul(1 << self.failures.min(20)).min(self.longest);
        self.failures = self.failures.saturating_add(1);
        let jittered = due.mul_f64(rand::rng().random_range(0.5..=1.0));
        match wish {
            // Later than wished is polite, earlier is not.
            Some(wish) => wish.min(LONGEST_WISH) + jittered.min(self.first),
            None => jittered,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: Duration = Duration::from_millis(250);
    const LONGEST: Duration = Duration::from_secs(30);

    #[test]
    fn it_doubles_up_to_the_longest_and_varies() {
        let mut pause = Pause::new(FIRST, LONGEST);
        let mut due = FIRST;
        for _ in 0..40 {
            let next = pause.next(None);
            assert!(next >= due / 2 && next <= due, "{next:?} of {due:?}");
            due = (due * 2).min(LONGEST);
        }
        let varied: std::collections::BTreeSet<Duration> = (0..20).map(|_| pause.next(None)).collect();
        assert!(varied.len() > 1);
        pause.reset();
        assert!(pause.next(None) <= FIRST);
    }

    #[test]
    fn the_server_is_left_alone_as_long_as_it_wishes() {
        let mut pause = Pause::new(FIRST, LONGEST);
        let wish = Duration::from_secs(7);
        let next = pause.next(Some(wish));
        assert!(next > wish && next <= wish + FIRST, "{next:?}");
        assert!(pause.next(Some(Duration::from_hours(24))) <= LONGEST_WISH + FIRST);
    }
}
