//! Ends sessions that are idle for too long or whose pod is gone, and counts the others.
//!
//! A thread of its own walks over the sessions in batches and rests in between, so that it takes a small part of one CPU
//! however many there are. Whether a session ends is judged by the program ([`Sweeper`]) at that moment; here candidates
//! are found. Without the daemon nothing depends on it: the program takes expired sessions away when it needs room.

use std::{
    collections::BTreeSet,
    sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    thread,
    time::{Duration, Instant},
};

use gateway_common::abi::{self, OverlayAddress, SweepMode};
use tokio::sync::watch;
use tracing::debug;

use crate::{
    config::Snat,
    dataplane::{
        load::Loader,
        sessions::{SessionTables, elapsed, now},
        sweep::Sweeper,
    },
    sessions::census::{Census, Sessions},
};

/// Between two walks.
const PAUSE: Duration = Duration::from_secs(2);
/// After a batch the thread rests so many times as long as it worked: 2 % of a CPU.
const REST: u32 = 49;
/// The same while sessions of pods that are gone wait to be ended: 20 % of a CPU.
const SHORT_REST: u32 = 4;

/// What a walk found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Walk {
    /// Sessions that were there.
    pub(crate) sessions: Sessions,
    /// What kept it from its work, for people.
    pub(super) fault: Option<String>,
}

/// The thread, from outside. It ends when this is dropped.
#[derive(Debug)]
pub(super) struct Ageing {
    pods: Sender<Vec<OverlayAddress>>,
    walks: watch::Receiver<Walk>,
}

impl Ageing {
    /// Starts the thread.
    ///
    /// # Errors
    ///
    /// There cannot be another thread.
    pub(super) fn start(
        tables: SessionTables,
        loader: Loader,
        constants: &abi::Config,
        snat: &Snat,
    ) -> std::io::Result<Self> {
        let (pods, requests) = channel();
        let (found, walks) = watch::channel(Walk::default());
        let (snat, constants) = (snat.clone(), *constants);
        thread::Builder::new().name("ageing".to_owned()).spawn(move || {
            // Here, because the kernel takes its time to look at a program.
            match loader.sweeper(&constants) {
                Ok(sweeper) => {
                    Walker { tables, sweeper, snat, requests, doomed: BTreeSet::new() }.run(&found);
                }
                Err(error) => {
                    let _ = found.send(Walk { fault: Some(error.to_string()), ..Walk::default() });
                }
            }
        })?;
        Ok(Self { pods, walks })
    }

    /// Ends the sessions of pods that are gone.
    pub(super) fn end(&self, pods: Vec<OverlayAddress>) {
        if !pods.is_empty() {
            // The thread goes only with this.
            let _ = self.pods.send(pods);
        }
    }

    /// For others that want to know what the last walk found.
    pub(super) fn walks(&self) -> watch::Receiver<Walk> {
        self.walks.clone()
    }

    /// Waits for the next walk.
    pub(super) async fn next(&mut self) -> Walk {
        if self.walks.changed().await.is_err() {
            // The thread is gone; nobody else looks for sessions.
            std::future::pending::<()>().await;
        }
        self.walks.borrow_and_update().clone()
    }
}

struct Walker {
    tables: SessionTables,
    sweeper: Sweeper,
    snat: Snat,
    requests: Receiver<Vec<OverlayAddress>>,
    /// Pods that are gone since the last walk began.
    doomed: BTreeSet<OverlayAddress>,
}

/// The daemon stops.
struct Stopped;

impl Walker {
    fn run(mut self, found: &watch::Sender<Walk>) {
        loop {
            let begin = Instant::now();
            let walk = match self.walk() {
                Ok(Ok(sessions)) => Walk { sessions, fault: None },
                Ok(Err(fault)) => Walk { fault: Some(fault.to_string()), ..Walk::default() },
                Err(Stopped) => return,
            };
            debug!(sessions = walk.sessions.sessions, took = ?begin.elapsed(), "walked over the sessions");
            if found.send(walk).is_err() || self.wait(PAUSE).is_err() {
                return;
            }
        }
    }

    /// One walk over all sessions.
    fn walk(&mut self) -> Result<anyhow::Result<Sessions>, Stopped> {
        let doomed = std::mem::take(&mut self.doomed);
        let rest = if doomed.is_empty() { REST } else { SHORT_REST };
        let mut census = Census::default();
        let Self { tables, sweeper, snat, requests, doomed: next } = self;
        let mut stopped = false;
        let mut work = || -> anyhow::Result<()> {
            tables.reverse.each_batch(|keys, values| {
                let begin = Instant::now();
                let now = now();
                let (mut expired, mut orphans) = (Vec::new(), Vec::new());
                for (key, value) in keys.iter().zip(values) {
                    let pod = OverlayAddress { overlay: key.overlay.into(), address: key.pod };
                    if doomed.contains(&pod) {
                        orphans.push(*key);
                    } else {
                        census.add(key, value);
                        if elapsed(value.seen, now) > snat.timeouts.of(key.protocol, value.state) {
                            expired.push(*key);
                        }
                    }
                }
                sweeper.remove(&expired, SweepMode::EXPIRED)?;
                sweeper.remove(&orphans, SweepMode::ALL)?;
                stopped = gather(requests, next, begin.elapsed() * rest).is_err();
                anyhow::ensure!(!stopped, "the daemon stops");
                Ok(())
            })
        };
        let result = work();
        if stopped {
            return Err(Stopped);
        }
        if result.is_err() {
            self.doomed.extend(doomed);
        }
        Ok(result.map(|()| census.finish(self.tables.slots.capacity(), &self.snat)))
    }

    /// Waits for the next walk; pods that are gone do not wait.
    fn wait(&mut self, pause: Duration) -> Result<(), Stopped> {
        if !self.doomed.is_empty() {
            return Ok(());
        }
        match self.requests.recv_timeout(pause) {
            Ok(pods) => self.doomed.extend(pods),
            Err(RecvTimeoutError::Timeout) => return Ok(()),
            Err(RecvTimeoutError::Disconnected) => return Err(Stopped),
        }
        Ok(())
    }
}

/// Rests, and takes what is asked meanwhile.
fn gather(
    requests: &Receiver<Vec<OverlayAddress>>,
    doomed: &mut BTreeSet<OverlayAddress>,
    rest: Duration,
) -> Result<(), Stopped> {
    let until = Instant::now() + rest;
    loop {
        match requests.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(pods) => doomed.extend(pods),
            Err(RecvTimeoutError::Timeout) => return Ok(()),
            Err(RecvTimeoutError::Disconnected) => return Err(Stopped),
        }
    }
}
