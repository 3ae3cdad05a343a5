//! Follows one kind of object: lists it, then watches it, and begins again wherever it was interrupted.

use std::{
    collections::{BTreeMap, HashSet},
    sync::Arc,
};

use kube::core::params::{ListParams, WatchParams};
use tokio::{
    sync::{mpsc, oneshot},
    task,
    time::{sleep, timeout},
};
use tracing::{debug, info};

use super::{
    Kind, Timing,
    access::{Link, Linked},
    exchange,
    failure::Failure,
    health::Health,
    join::Join,
    pause::Pause,
    request::{Request, Right},
    wire::{Decoder, Item, ListMeta, Page, WatchEvent},
};
use crate::{
    cluster::{
        model::{Event, ObjectRef},
        problem::{Problem, ProblemList},
    },
    daemon::report::now,
};

/// The receiver of the events is gone.
#[derive(Debug)]
pub(super) struct Abandoned;

/// The decoder comes back with what it read.
type Decoded = (Decoder, Result<Page, String>);

/// How an attempt ended.
type Outcome = Result<Result<(), Failure>, Abandoned>;

/// Follows one kind.
#[derive(Debug)]
pub(super) struct Follower {
    kind: Kind,
    timing: Timing,
    link: Arc<Link>,
    events: mpsc::Sender<Event>,
    problems: ProblemList,
    health: Health,
    join: Arc<Join>,
    decoder: Option<Decoder>,
    /// What exists, as far as it was told.
    known: HashSet<ObjectRef>,
    /// What cannot be understood.
    broken: BTreeMap<ObjectRef, Problem>,
    /// Where to go on; `None` asks for a list.
    position: Option<Position>,
    pause: Pause,
    /// Failures to make sense of what comes at one position.
    nonsense: u32,
}

/// A place in the history.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Position {
    version: String,
    /// As a number, which versions are since Kubernetes 1.35; older ones were, too.
    number: Option<u64>,
}

impl Position {
    fn new(version: String) -> Self {
        Self { number: version.parse().ok(), version }
    }

    /// Whether an event of that version has been seen: a server or proxy that repeats itself must not take anything
    /// back to what it was.
    fn covers(&self, version: &Self) -> bool {
        matches!((self.number, version.number), (Some(own), Some(other)) if other <= own)
    }
}

/// What followers of all kinds share.
#[derive(Clone, Debug)]
pub(super) struct Common {
    pub(super) timing: Timing,
    pub(super) link: Arc<Link>,
    pub(super) events: mpsc::Sender<Event>,
    pub(super) problems: ProblemList,
    pub(super) health: Health,
    pub(super) join: Arc<Join>,
    pub(super) prefixes: Arc<[String]>,
}

impl Follower {
    pub(super) fn new(kind: Kind, common: Common) -> Self {
        let Common { timing, link, events, problems, health, join, prefixes } = common;
        Self {
            kind,
            timing,
            link,
            events,
            problems,
            health,
            join,
            decoder: Some(Decoder::new(kind, prefixes)),
            known: HashSet::new(),
            broken: BTreeMap::new(),
            position: None,
            pause: Pause::new(timing.first_pause, timing.longest_pause),
            nonsense: 0,
        }
    }

    /// Works until nobody wants the events any more.
    pub(super) async fn run(mut self) {
        loop {
            let attempt = self.attempt().await;
            let failure = match attempt {
                Err(Abandoned) => return,
                Ok(Ok(())) => continue,
                Ok(Err(failure)) => failure,
            };
            if self.events.is_closed() || self.recover(failure).await.is_err() {
                return;
            }
        }
    }

    /// Takes the next step: a list, or a watch until it ends.
    async fn attempt(&mut self) -> Outcome {
        let linked = match self.link.get().await {
            Ok(linked) => linked,
            Err(failure) => return Ok(Err(failure)),
        };
        let outcome = match self.position.clone() {
            None => self.list(&linked).await,
            Some(position) => self.watch(&linked, position).await,
        };
        if let Ok(Err(failure)) = &outcome
            && failure.wants_new_client()
        {
            self.link.discard(linked.generation).await;
        }
        outcome
    }

    /// Tells what went wrong, and waits as long as is due.
    async fn recover(&mut self, failure: Failure) -> Result<(), Abandoned> {
        if failure == Failure::Gone {
            // What is known stays; the list will tell what went meanwhile.
            info!(
                "{}: the server has forgotten what happened since the last event; listing again",
                self.kind.plural()
            );
            self.position = None;
            if self.pause.failures() == 0 {
                // Counted: a server that forgets at once must not be asked without pause.
                self.pause.next(None);
                return Ok(());
            }
        } else if matches!(failure, Failure::Nonsense(_)) {
            self.nonsense += 1;
            if self.nonsense >= self.timing.nonsense {
                self.nonsense = 0;
                self.position = None;
            }
        }
        self.health.lost(self.kind);
        if failure != Failure::Gone {
            self.tell(Some(&failure)).await;
        }
        let pause = self.pause.next(failure.retry_after());
        if self.pause.failures() >= self.timing.partial {
            self.join.failed(self.kind, &self.events).await?;
        }
        debug!("{}: {failure:?}; trying again in {pause:?}", self.kind.plural());
        tokio::select! {
            () = sleep(pause) => Ok(()),
            () = self.events.closed() => Err(Abandoned),
        }
    }

    /// Publishes why nothing is heard; `None` if something is.
    async fn tell(&self, failure: Option<&Failure>) {
        let place = format!("{}, {}", self.link.describe(), self.kind.plural());
        let problems = match failure {
            Some(failure) => {
                let server = self
                    .link
                    .get()
                    .await
                    .map_or_else(|_| "the API server".to_owned(), |linked| linked.server);
                vec![failure.problem(&place, &server)]
            }
            None => Vec::new(),
        };
        self.problems.set(&place, problems);
    }

    /// Something was heard.
    async fn heard(&mut self) {
        self.health.heard(self.kind, now());
        if self.pause.failures() > 0 {
            self.pause.reset();
            self.tell(None).await;
        }
    }

    /// Lists everything, page by page, and takes away what is no longer there.
    async fn list(&mut self, linked: &Linked) -> Outcome {
        let begin = now();
        let right = Request::List(self.kind).right();
        let mut seen = HashSet::new();
        let mut nameless = false;
        let mut broken = BTreeMap::new();
        let mut version = String::new();
        let mut body = match self.page(linked, right, None).await {
            Ok(body) => Some(body),
            Err(failure) => return Ok(Err(failure)),
        };
        while let Some(text) = body.take() {
            // While this page is read, the next one is on its way.
            let (head, decoded) = self.decode(text);
            let next = async {
                let Ok(head) = head.await else { return Ok(None) };
                let text = match head.token.as_deref().filter(|token| !token.is_empty()) {
                    Some(token) => Some(self.page(linked, right, Some(token)).await?),
                    None => None,
                };
                Ok::<_, Failure>(Some((head, text)))
            };
            let (next, decoded) = tokio::join!(next, decoded);
            let Ok((decoder, page)) = decoded else {
                return Ok(Err(Failure::Nonsense("a page could not be read".to_owned())));
            };
            self.decoder = Some(decoder);
            let page = match page {
                Ok(page) => page,
                Err(what) => return Ok(Err(Failure::Nonsense(what))),
            };
            for item in page.items {
                match item {
                    Item::Good(reference, object) => {
                        seen.insert(reference.clone());
                        self.known.insert(reference);
                        self.send(Event::Apply(object)).await?;
                    }
                    Item::Bad(Some(reference), problem) => {
                        seen.insert(reference.clone());
                        broken.insert(reference, problem);
                    }
                    // It may be any of those that are known.
                    Item::Bad(None, problem) => {
                        nameless = true;
                        broken.insert(ObjectRef::node(&problem.place), problem);
                    }
                }
            }
            match next {
                Ok(Some((head, text))) => {
                    version = head.resource_version;
                    body = text;
                }
                Ok(None) => return Ok(Err(Failure::Nonsense("a page without metadata".to_owned()))),
                Err(failure) => return Ok(Err(failure)),
            }
        }
        if version.is_empty() {
            return Ok(Err(Failure::Nonsense("a list without a resourceVersion".to_owned())));
        }
        if !nameless {
            let gone: Vec<ObjectRef> =
                self.known.iter().filter(|known| !seen.contains(known)).cloned().collect();
            for reference in gone {
                self.known.remove(&reference);
                self.send(Event::Delete(reference)).await?;
            }
        }
        self.broken = broken;
        self.position = Some(Position::new(version));
        self.heard().await;
        // What the list says is as old as the list.
        self.health.heard(self.kind, begin);
        self.settle().await?;
        Ok(Ok(()))
    }

    /// Tells of objects that cannot be understood, and whether all others have been named.
    async fn settle(&mut self) -> Result<(), Abandoned> {
        let place = format!("{}, objects of {}", self.link.describe(), self.kind.plural());
        self.problems.set(&place, self.broken.values().cloned().collect());
        self.join.listed(self.kind, self.broken.is_empty(), &self.events).await
    }

    /// Reads a page on another thread; what stands beside its items comes first.
    fn decode(&mut self, text: Vec<u8>) -> (oneshot::Receiver<ListMeta>, task::JoinHandle<Decoded>) {
        let (sender, receiver) = oneshot::channel();
        let mut decoder = self.decoder.take().expect("put back after every page");
        let work = task::spawn_blocking(move || {
            let mut sender = Some(sender);
            let page = decoder.page(&text, |head| {
                if let Some(sender) = sender.take() {
                    // Whoever waited may have given up.
                    let _ = sender.send(head);
                }
            });
            (decoder, page)
        });
        (receiver, work)
    }

    /// Gets a page.
    async fn page(&self, linked: &Linked, right: Right, token: Option<&str>) -> Result<Vec<u8>, Failure> {
        let mut parameters = ListParams::default().limit(self.timing.page);
        parameters.continue_token = token.map(str::to_owned);
        let request = self.path().list(&parameters);
        let mut body = exchange::ask(linked, right, request, self.timing.idle).await?.into_body();
        let mut text = Vec::new();
        while exchange::fill(&mut body, &mut text, self.timing.idle).await? {}
        Ok(text)
    }

    fn path(&self) -> kube::core::Request {
        kube::core::Request::new(format!("/api/v1/{}", self.kind.plural()))
    }

    /// Watches until the server ends it, or says nothing.
    ///
    /// Silence has three reasons. The connection may be dead. Nothing of this kind may have changed: real servers send
    /// bookmarks, but none that is not newer than where the watch began. Or the server was restored from a backup and has
    /// not come as far yet: it tells nothing until then. A list by a new connection is right in all three.
    async fn watch(&mut self, linked: &Linked, mut position: Position) -> Outcome {
        let right = Request::Watch(self.kind).right();
        let seconds = u32::try_from(self.timing.watch.as_secs()).unwrap_or(u32::MAX).max(1);
        let parameters = WatchParams::default().timeout(seconds);
        let request = self.path().watch(&parameters, &position.version);
        let response = match exchange::ask(linked, right, request, self.timing.idle).await {
            Ok(response) => response,
            Err(failure) => return Ok(Err(failure)),
        };
        // The server goes on from there: until now nothing was missed.
        self.heard().await;
        let mut body = response.into_body();
        let mut buffer = Vec::new();
        loop {
            match timeout(self.timing.idle, exchange::next(&mut body, &mut buffer)).await {
                Ok(Ok(true)) => {}
                Ok(Ok(false)) => return Ok(Ok(())),
                Ok(Err(failure)) => return Ok(Err(failure)),
                Err(_) => {
                    debug!("{}: nothing was heard; listing again", self.kind.plural());
                    self.link.discard(linked.generation).await;
                    self.position = None;
                    return Ok(Ok(()));
                }
            }
            let mut begin = 0;
            while let Some(length) = buffer[begin..].iter().position(|byte| *byte == b'\n') {
                let line = begin..begin + length;
                begin += length + 1;
                match self.line(&buffer[line], &mut position).await? {
                    Ok(()) => self.position = Some(position.clone()),
                    Err(failure) => return Ok(Err(failure)),
                }
            }
            buffer.drain(..begin);
            if begin > 0 {
                self.nonsense = 0;
                self.heard().await;
            }
        }
    }

    /// Takes a line of a watch.
    async fn line(&mut self, line: &[u8], position: &mut Position) -> Outcome {
        if line.iter().all(u8::is_ascii_whitespace) {
            return Ok(Ok(()));
        }
        let decoder = self.decoder.as_mut().expect("no page is being read");
        let (event, version) = match decoder.line(line) {
            Ok(read) => read,
            Err(what) => return Ok(Err(Failure::Nonsense(what))),
        };
        let version = version.filter(|version| !version.is_empty()).map(Position::new);
        if let WatchEvent::Error(code, message) = event {
            return Ok(Err(match code {
                410 => Failure::Gone,
                code => Failure::Status { code, message, retry_after: None },
            }));
        }
        if version.as_ref().is_some_and(|version| position.covers(version)) {
            return Ok(Ok(()));
        }
        match event {
            WatchEvent::Put(Item::Good(reference, object)) => {
                let mended = self.broken.remove(&reference).is_some();
                self.known.insert(reference);
                self.send(Event::Apply(object)).await?;
                if mended {
                    self.settle().await?;
                }
            }
            WatchEvent::Put(Item::Bad(reference, problem)) => {
                let reference = reference.unwrap_or_else(|| ObjectRef::node(&problem.place));
                self.broken.insert(reference, problem);
                self.settle().await?;
            }
            WatchEvent::Gone(Some(reference)) => {
                let mended = self.broken.remove(&reference).is_some();
                if self.known.remove(&reference) {
                    self.send(Event::Delete(reference)).await?;
                }
                if mended {
                    self.settle().await?;
                }
            }
            // Which one is not known: the list will tell.
            WatchEvent::Gone(None) => return Ok(Err(Failure::Gone)),
            WatchEvent::Bookmark | WatchEvent::Error(..) => {}
        }
        if let Some(version) = version {
            *position = version;
        }
        Ok(Ok(()))
    }

    async fn send(&self, event: Event) -> Result<(), Abandoned> {
        self.events.send(event).await.map_err(|_| Abandoned)
    }
}
