//! Objects by revision, as etcd keeps them: the current ones, and what changed until the last compaction.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use hyper::body::Bytes;
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::{
    failure::Failure,
    resource::{Key, Resource},
};

/// What happened to an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Added,
    Modified,
    Deleted,
}

impl Kind {
    /// The word that watches use.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Added => "ADDED",
            Self::Modified => "MODIFIED",
            Self::Deleted => "DELETED",
        }
    }
}

/// A step of the history.
#[derive(Clone, Debug)]
pub(crate) struct Change {
    pub(crate) revision: u64,
    pub(crate) resource: Resource,
    pub(crate) kind: Kind,
    pub(crate) key: Key,
    /// The object as it is, or as it was when it was deleted.
    pub(crate) text: Bytes,
    /// What was there before.
    pub(crate) previous: Option<Bytes>,
}

/// Objects of a resource at a revision, in order.
pub(crate) type Snapshot = Arc<Vec<(Key, Bytes)>>;

/// Everything.
#[derive(Debug)]
pub(crate) struct Store {
    revision: u64,
    /// What happened up to here is forgotten.
    compacted: u64,
    tables: BTreeMap<Resource, BTreeMap<Key, Bytes>>,
    history: VecDeque<Change>,
    /// When each resource changed last.
    touched: BTreeMap<Resource, u64>,
    /// What lists that are being paged through go on with.
    snapshots: BTreeMap<(Resource, u64), Snapshot>,
    latest: watch::Sender<u64>,
}

impl Store {
    pub(crate) fn new() -> Self {
        Self {
            revision: 1,
            compacted: 0,
            tables: BTreeMap::new(),
            history: VecDeque::new(),
            touched: BTreeMap::new(),
            snapshots: BTreeMap::new(),
            latest: watch::Sender::new(1),
        }
    }

    /// The same objects, for writes that are to have no effect.
    pub(crate) fn fork(&self) -> Self {
        Self { tables: self.tables.clone(), revision: self.revision, ..Self::new() }
    }

    pub(crate) fn revision(&self) -> u64 {
        self.revision
    }

    /// When a resource changed last.
    pub(crate) fn touched(&self, resource: Resource) -> u64 {
        self.touched.get(&resource).copied().unwrap_or_default()
    }

    pub(crate) fn compacted(&self) -> u64 {
        self.compacted
    }

    /// Tells when the revision rises.
    pub(crate) fn latest(&self) -> watch::Receiver<u64> {
        self.latest.subscribe()
    }

    pub(crate) fn get(&self, resource: Resource, key: &Key) -> Option<&Bytes> {
        self.tables.get(&resource)?.get(key)
    }

    pub(crate) fn objects(&self, resource: Resource) -> impl Iterator<Item = (&Key, &Bytes)> {
        self.tables.get(&resource).into_iter().flatten()
    }

    /// Writes an object at a new revision; returns it as it is now.
    pub(crate) fn put(&mut self, resource: Resource, key: Key, mut object: Value) -> Bytes {
        let revision = self.revision + 1;
        object["metadata"]["resourceVersion"] = json!(revision.to_string());
        let text = Bytes::from(object.to_string());
        let previous = self.tables.entry(resource).or_default().insert(key.clone(), text.clone());
        let kind = if previous.is_some() { Kind::Modified } else { Kind::Added };
        self.record(Change { revision, resource, kind, key, text: text.clone(), previous });
        text
    }

    /// Removes an object; returns its last state.
    pub(crate) fn delete(&mut self, resource: Resource, key: &Key) -> Option<Bytes> {
        let previous = self.tables.get_mut(&resource)?.remove(key)?;
        let revision = self.revision + 1;
        let mut object: Value = serde_json::from_slice(&previous).unwrap_or_default();
        object["metadata"]["resourceVersion"] = json!(revision.to_string());
        let text = Bytes::from(object.to_string());
        self.record(Change {
            revision,
            resource,
            kind: Kind::Deleted,
            key: key.clone(),
            text: text.clone(),
            previous: Some(previous),
        });
        Some(text)
    }

    fn record(&mut self, change: Change) {
        self.revision = change.revision;
        self.touched.insert(change.resource, change.revision);
        self.history.push_back(change);
        self.latest.send_replace(self.revision);
    }

    /// Forgets the history: watches and pages that go on from it are told that it is gone.
    pub(crate) fn compact(&mut self) {
        self.compacted = self.revision;
        self.history.clear();
        self.snapshots.clear();
        self.latest.send_replace(self.revision);
    }

    /// What happened to a resource after a revision.
    pub(crate) fn changes(&self, resource: Resource, after: u64) -> Result<Vec<Change>, Failure> {
        if after < self.compacted {
            return Err(Failure::expired(format!("too old resource version: {after} ({})", self.compacted)));
        }
        let start = self.history.partition_point(|change| change.revision <= after);
        Ok(self.history.range(start..).filter(|change| change.resource == resource).cloned().collect())
    }

    /// The last changes of a resource, oldest first.
    pub(crate) fn last_changes(&self, resource: Resource, count: usize) -> Vec<Change> {
        let mut last: Vec<Change> = self
            .history
            .iter()
            .rev()
            .filter(|change| change.resource == resource)
            .take(count)
            .cloned()
            .collect();
        last.reverse();
        last
    }

    /// The objects of a resource at a revision. `keep` holds them for the pages that follow.
    pub(crate) fn snapshot(
        &mut self,
        resource: Resource,
        revision: u64,
        keep: bool,
    ) -> Result<Snapshot, Failure> {
        if revision > self.revision {
            let mut failure = Failure::new(
                hyper::StatusCode::GATEWAY_TIMEOUT,
                "Timeout",
                format!("Too large resource version: {revision}, current: {}", self.revision),
            );
            failure.retry_after = Some(1);
            failure.details["causes"] =
                json!([{ "reason": "ResourceVersionTooLarge", "message": "Too large resource version" }]);
            return Err(failure);
        }
        if let Some(snapshot) = self.snapshots.get(&(resource, revision)) {
            return Ok(snapshot.clone());
        }
        if revision < self.compacted {
            return Err(Failure::expired(
                "The provided continue parameter is too old to display a consistent list result. You can start a new \
                 list without the continue parameter, or use the continue token in this response to retrieve the \
                 remainder of the results. Continuing with the provided token results in an inconsistent list - \
                 objects that were created, modified, or deleted between the time the first chunk was returned and \
                 now may show up in the list.",
            ));
        }
        let mut objects = self.tables.get(&resource).cloned().unwrap_or_default();
        let start = self.history.partition_point(|change| change.revision <= revision);
        for change in self.history.range(start..).rev().filter(|change| change.resource == resource) {
            match &change.previous {
                Some(previous) => objects.insert(change.key.clone(), previous.clone()),
                None => objects.remove(&change.key),
            };
        }
        let snapshot = Arc::new(objects.into_iter().collect::<Vec<_>>());
        if keep {
            self.snapshots.insert((resource, revision), snapshot.clone());
        }
        Ok(snapshot)
    }

    /// A page list has come to its end.
    pub(crate) fn forget_snapshot(&mut self, resource: Resource, revision: u64) {
        self.snapshots.remove(&(resource, revision));
    }

    /// Everything, for the next run.
    pub(crate) fn dump(&self) -> Value {
        let tables: Vec<Value> = self
            .tables
            .iter()
            .flat_map(|(resource, objects)| {
                objects.values().map(|text| {
                    let object: Value = serde_json::from_slice(text).unwrap_or_default();
                    json!({ "group": resource.group(), "resource": resource.plural(), "object": object })
                })
            })
            .collect();
        json!({ "revision": self.revision, "objects": tables })
    }

    /// The store of an earlier run. Its history is gone, as that of a real server's watch cache.
    pub(crate) fn restore(dump: &Value) -> Option<Self> {
        let mut store = Self::new();
        for entry in dump["objects"].as_array()? {
            let resource = Resource::find(entry["group"].as_str()?, entry["resource"].as_str()?)?;
            let metadata = &entry["object"]["metadata"];
            let key =
                Key::new(metadata["namespace"].as_str().unwrap_or_default(), metadata["name"].as_str()?);
            let text = Bytes::from(entry["object"].to_string());
            let revision: Option<u64> =
                metadata["resourceVersion"].as_str().and_then(|text| text.parse().ok());
            let touched = store.touched.entry(resource).or_default();
            *touched = revision.unwrap_or_default().max(*touched);
            store.tables.entry(resource).or_default().insert(key, text);
        }
        store.revision = dump["revision"].as_u64()?;
        store.compacted = store.revision;
        store.latest.send_replace(store.revision);
        Some(store)
    }
}
