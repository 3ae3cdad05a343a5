//! Watches: what changed after a revision, as it happens.

use std::{collections::VecDeque, io, pin::Pin, sync::Arc, time::Duration};

use futures::{Stream, stream};
use hyper::body::Bytes;
use serde_json::{Value, json};
use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};

use crate::{
    failure::Failure,
    faults,
    http::{Selector, Shared},
    resource::Resource,
    store::{Change, Kind},
};

/// A body in pieces.
pub(crate) type Pieces = Pin<Box<dyn Stream<Item = io::Result<Bytes>> + Send>>;

/// What a watch was asked for.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) resource: Resource,
    /// Empty for all.
    pub(crate) namespace: String,
    pub(crate) selector: Selector,
    /// Goes on after it; `None` begins with everything that exists.
    pub(crate) after: Option<u64>,
    pub(crate) bookmarks: bool,
    /// Marks the end of what existed by a bookmark.
    pub(crate) initial_events: bool,
    pub(crate) timeout: Duration,
    pub(crate) repeat: usize,
    pub(crate) error: Option<u16>,
    pub(crate) malformed: Option<String>,
}

struct State {
    shared: Arc<Shared>,
    request: Request,
    /// Where it began.
    start: u64,
    cursor: u64,
    queue: VecDeque<Bytes>,
    latest: watch::Receiver<u64>,
    disconnect: watch::Receiver<u64>,
    bookmark_at: Instant,
    end: Instant,
    /// After what is in the queue.
    ended: bool,
}

/// The body of a watch.
pub(crate) fn pieces(shared: Arc<Shared>, request: Request) -> Pieces {
    let now = Instant::now();
    let disconnect = shared.disconnect.subscribe();
    let mut state = {
        let store = shared.store();
        let mut queue = VecDeque::new();
        // One that is still to come is waited for, in silence.
        let cursor = if let Some(after) = request.after {
            after
        } else {
            for (key, text) in store.objects(request.resource) {
                if request.namespace.is_empty() || key.namespace == request.namespace {
                    let object: Value = serde_json::from_slice(text).unwrap_or_default();
                    if request.selector.matches(&object) {
                        queue.push_back(line("ADDED", text));
                    }
                }
            }
            if request.initial_events {
                queue.push_back(bookmark(request.resource, store.revision(), true));
            }
            store.revision()
        };
        if request.repeat > 0 {
            let again = store.last_changes(request.resource, request.repeat);
            queue.extend(again.iter().filter_map(|change| event(&request, change)));
        }
        let latest = store.latest();
        drop(store);
        State {
            latest,
            disconnect,
            bookmark_at: now + shared.bookmark_interval,
            end: now + request.timeout,
            ended: false,
            shared,
            request,
            start: cursor,
            cursor,
            queue,
        }
    };
    if let Some(code) = state.request.error {
        state.queue.push_front(error_line(&faults::failure(code, None)));
        state.ended = true;
    }
    Box::pin(stream::unfold(Some(state), |state| async move {
        let mut state = state?;
        match state.next().await {
            Ok(Some(piece)) => Some((Ok(piece), Some(state))),
            Ok(None) => None,
            Err(error) => Some((Err(error), None)),
        }
    }))
}

impl State {
    async fn next(&mut self) -> io::Result<Option<Bytes>> {
        loop {
            if let Some(first) = self.queue.pop_front() {
                // What is there goes out as one piece.
                let mut piece = first.to_vec();
                for more in self.queue.drain(..) {
                    piece.extend_from_slice(&more);
                }
                return Ok(Some(piece.into()));
            }
            if self.ended {
                return Ok(None);
            }
            self.latest.borrow_and_update();
            self.fill();
            if !self.queue.is_empty() {
                continue;
            }
            tokio::select! {
                _ = self.disconnect.changed() => {
                    return Err(io::Error::new(io::ErrorKind::ConnectionReset, "disconnected on demand"));
                }
                () = sleep_until(self.end) => return Ok(None),
                () = sleep_until(self.bookmark_at), if self.request.bookmarks => {
                    self.bookmark_at = Instant::now() + self.shared.bookmark_interval;
                    self.latest.borrow_and_update();
                    self.fill();
                    // The watch cache knows of its own resource alone, and has nothing to say before that has changed.
                    let resource = self.request.resource;
                    let touched = self.shared.store().touched(resource);
                    if !self.ended && touched > self.start {
                        self.queue.push_back(bookmark(resource, touched, false));
                    }
                }
                changed = self.latest.changed() => if changed.is_err() { return Ok(None) },
            }
        }
    }

    /// Takes what happened since the last look.
    fn fill(&mut self) {
        let store = self.shared.store();
        match store.changes(self.request.resource, self.cursor) {
            Ok(changes) => {
                self.queue.extend(changes.iter().filter_map(|change| event(&self.request, change)));
                self.cursor = self.cursor.max(store.revision());
            }
            Err(failure) => {
                self.queue.push_back(error_line(&failure));
                self.ended = true;
            }
        }
    }
}

/// The line of a change, if the watch is to see it.
fn event(request: &Request, change: &Change) -> Option<Bytes> {
    if !request.namespace.is_empty() && change.key.namespace != request.namespace {
        return None;
    }
    if request.malformed.as_ref() == Some(&change.key.name) {
        return Some(line(change.kind.word(), &malform(&change.text)));
    }
    if request.selector.is_empty() {
        return Some(line(change.kind.word(), &change.text));
    }
    let matches = |text: &Bytes| request.selector.matches(&serde_json::from_slice(text).unwrap_or_default());
    let before = change.previous.as_ref().is_some_and(matches);
    let after = change.kind != Kind::Deleted && matches(&change.text);
    let word = match (before, after) {
        (false, false) => return None,
        (false, true) => Kind::Added.word(),
        (true, true) => Kind::Modified.word(),
        (true, false) => Kind::Deleted.word(),
    };
    Some(line(word, &change.text))
}

fn line(word: &str, object: &[u8]) -> Bytes {
    let mut line = Vec::with_capacity(object.len() + 40);
    line.extend_from_slice(format!(r#"{{"type":"{word}","object":"#).as_bytes());
    line.extend_from_slice(object);
    line.extend_from_slice(b"}\n");
    line.into()
}

fn error_line(failure: &Failure) -> Bytes {
    line("ERROR", failure.status().to_string().as_bytes())
}

fn bookmark(resource: Resource, revision: u64, end_of_initial: bool) -> Bytes {
    let mut metadata = json!({ "resourceVersion": revision.to_string(), "creationTimestamp": null });
    if end_of_initial {
        metadata["annotations"] = json!({ "k8s.io/initial-events-end": "true" });
    }
    let object =
        json!({ "kind": resource.kind(), "apiVersion": resource.api_version(), "metadata": metadata });
    line("BOOKMARK", object.to_string().as_bytes())
}

/// An object that says who it is, and otherwise nonsense.
pub(crate) fn malform(text: &[u8]) -> Bytes {
    let mut object: Value = serde_json::from_slice(text).unwrap_or_default();
    object["spec"] = json!(17);
    object["status"] = json!(["nonsense"]);
    object.to_string().into()
}
