//! From the listings of single kinds to the one listing of the event model.

use std::collections::BTreeMap;

use tokio::sync::{Mutex, mpsc};

use super::{Kind, follow::Abandoned};
use crate::cluster::model::Event;

/// How far the first listing of a kind has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Progress {
    #[default]
    Under,
    /// It cannot be had at present.
    Failed,
    /// All but what cannot be understood has been named.
    Partial,
    Complete,
}

/// Waits for all kinds.
#[derive(Debug, Default)]
pub(super) struct Join {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    kinds: BTreeMap<Kind, Progress>,
    /// What can be read has been told of; pods among it or not.
    listed: Option<bool>,
    synced: bool,
}

impl Join {
    /// A kind has been listed, and everything of it was sent; `complete` if nothing in it was beyond understanding.
    pub(super) async fn listed(
        &self,
        kind: Kind,
        complete: bool,
        events: &mpsc::Sender<Event>,
    ) -> Result<(), Abandoned> {
        self.note(kind, if complete { Progress::Complete } else { Progress::Partial }, events).await
    }

    /// A kind cannot be listed at present.
    pub(super) async fn failed(&self, kind: Kind, events: &mpsc::Sender<Event>) -> Result<(), Abandoned> {
        self.note(kind, Progress::Failed, events).await
    }

    async fn note(
        &self,
        kind: Kind,
        progress: Progress,
        events: &mpsc::Sender<Event>,
    ) -> Result<(), Abandoned> {
        // Held while sending: what is said about the whole comes behind what was said about its parts.
        let mut state = self.state.lock().await;
        if state.synced {
            return Ok(());
        }
        let known = state.kinds.entry(kind).or_default();
        // Once listed, a kind is followed: what fails later takes nothing back.
        if progress != Progress::Failed || *known == Progress::Under {
            *known = progress;
        }
        let of = |kind: &Kind| state.kinds.get(kind).copied().unwrap_or_default();
        let is_named = |kind| matches!(of(&kind), Progress::Partial | Progress::Complete);
        let pods = is_named(Kind::Pod);
        let event = if Kind::ALL.iter().all(|kind| of(kind) == Progress::Complete) {
            state.synced = true;
            Event::Synced
        } else if (state.listed.is_none() || (state.listed == Some(false) && pods))
            && is_named(Kind::Node)
            && Kind::ALL.iter().all(|kind| of(kind) != Progress::Under)
        {
            // Nodes alone forward by their prefixes.
            state.listed = Some(pods);
            Event::Listed { pods }
        } else {
            return Ok(());
        };
        events.send(event).await.map_err(|_| Abandoned)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drain(receiver: &mut mpsc::Receiver<Event>) -> Vec<&'static str> {
        std::iter::from_fn(|| receiver.try_recv().ok())
            .map(|event| match event {
                Event::Synced => "synced",
                Event::Listed { pods: true } => "listed",
                Event::Listed { pods: false } => "listed without pods",
                _ => "other",
            })
            .collect()
    }

    #[tokio::test]
    async fn all_kinds_make_one_listing() {
        let (sender, mut receiver) = mpsc::channel(8);
        let join = Join::default();
        join.listed(Kind::Pod, true, &sender).await.unwrap();
        assert!(drain(&mut receiver).is_empty());
        join.listed(Kind::Node, true, &sender).await.unwrap();
        join.listed(Kind::Node, true, &sender).await.unwrap();
        assert_eq!(drain(&mut receiver), ["synced"], "once");
    }

    #[tokio::test]
    async fn what_can_be_read_counts_without_the_rest() {
        let (sender, mut receiver) = mpsc::channel(8);
        let join = Join::default();
        join.failed(Kind::Pod, &sender).await.unwrap();
        join.listed(Kind::Node, false, &sender).await.unwrap();
        assert_eq!(drain(&mut receiver), ["listed without pods"]);
        join.failed(Kind::Node, &sender).await.unwrap();
        assert!(drain(&mut receiver).is_empty(), "once");
        join.listed(Kind::Pod, true, &sender).await.unwrap();
        assert_eq!(drain(&mut receiver), ["listed"], "an object of a Node is not understood yet");
        join.listed(Kind::Node, true, &sender).await.unwrap();
        assert_eq!(drain(&mut receiver), ["synced"]);
    }
}
