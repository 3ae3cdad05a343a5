//! How fresh the knowledge is.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use serde::{Deserialize, Serialize};

use super::Kind;

/// What a running source knows of its own freshness. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Health {
    kinds: Arc<Mutex<BTreeMap<Kind, KindHealth>>>,
}

#[derive(Clone, Copy, Debug, Default)]
struct KindHealth {
    connected: bool,
    heard: Option<u64>,
}

/// Freshness of all kinds together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Freshness {
    /// Changes of every kind arrive as they happen.
    pub connected: bool,
    /// Until when the knowledge is known to have been complete: seconds since 1970.
    pub heard: Option<u64>,
}

impl Health {
    /// The server said something about a kind at a time.
    pub(super) fn heard(&self, kind: Kind, now: u64) {
        self.lock().insert(kind, KindHealth { connected: true, heard: Some(now) });
    }

    /// Nothing will be heard of a kind for now.
    pub(super) fn lost(&self, kind: Kind) {
        self.lock().entry(kind).or_default().connected = false;
    }

    /// The worst of all kinds.
    pub fn freshness(&self) -> Freshness {
        let kinds = self.lock();
        let of = |kind: &Kind| kinds.get(kind).copied().unwrap_or_default();
        Freshness {
            connected: Kind::ALL.iter().all(|kind| of(kind).connected),
            heard: Kind::ALL.iter().map(|kind| of(kind).heard).min().flatten(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Kind, KindHealth>> {
        self.kinds.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knowledge_is_as_old_as_its_oldest_part() {
        let health = Health::default();
        health.heard(Kind::Node, 100);
        assert_eq!(health.freshness(), Freshness { connected: false, heard: None });
        health.heard(Kind::Pod, 90);
        assert_eq!(health.freshness(), Freshness { connected: true, heard: Some(90) });
        health.lost(Kind::Pod);
        health.heard(Kind::Node, 200);
        assert_eq!(health.freshness(), Freshness { connected: false, heard: Some(90) });
    }
}
