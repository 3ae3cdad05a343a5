//! The source and the planner as the daemon runs them, with tables that are written as the daemon writes its own.

use std::{
    collections::BTreeMap,
    fmt::Debug,
    sync::{Arc, Mutex, MutexGuard},
    thread,
    time::{Duration, Instant},
};

use gateway::{
    cluster::{
        kubernetes::{self, Health, Link, Timing},
        model::Event,
        problem::{Problem, ProblemList},
    },
    config::Config,
    plan::{Desired, Planner},
};
use tokio::{sync::mpsc, task::JoinHandle};

use crate::{
    objects::config,
    subject::{RUNTIME, Subject},
};

/// Patience for everything that has no reason to take long.
pub(crate) const SOON: Duration = Duration::from_secs(20);

/// As in production, but in a hurry.
pub(crate) const TIMING: Timing = Timing {
    page: 3,
    first_pause: Duration::from_millis(5),
    longest_pause: Duration::from_millis(100),
    idle: Duration::from_secs(1),
    watch: Duration::from_secs(5),
    nonsense: 3,
    partial: 3,
    net_conf: Duration::from_millis(200),
};

/// A running source.
pub(crate) struct Observer {
    state: Arc<Mutex<State>>,
    pub(crate) problems: ProblemList,
    pub(crate) health: Health,
    tasks: Vec<JoinHandle<()>>,
}

struct State {
    planner: Planner,
    table: Desired,
    /// Entries that are right all the time: they must always be there.
    steady: Desired,
    faults: Vec<String>,
    events: Vec<String>,
}

impl State {
    /// Takes an event and writes what it changes, as the daemon does: nothing before the source has been listed, no pods
    /// before all of them have been, and before it is complete nothing is removed.
    fn take(&mut self, event: &Event) {
        let (listed, synced) = (self.planner.is_listed(), self.planner.is_synced());
        let had_pods = self.planner.has_pods();
        let changes = self.planner.apply(event);
        let (goal, complete) = (self.planner.desired(), self.planner.is_synced());
        let has_pods = self.planner.has_pods();
        if complete && !synced {
            self.table = goal.clone();
        } else if (self.planner.is_listed() && !listed) || (has_pods && !had_pods) {
            let Desired { vteps, pods, prefixes, sources } = goal.clone();
            self.table.vteps.extend(vteps);
            if has_pods {
                self.table.pods.extend(pods);
            }
            self.table.prefixes.extend(prefixes);
            self.table.sources.extend(sources);
        } else if listed {
            for key in &changes.vteps {
                write(&mut self.table.vteps, &goal.vteps, key, complete);
            }
            for key in changes.pods.iter().filter(|_| has_pods) {
                write(&mut self.table.pods, &goal.pods, key, complete);
            }
            for key in &changes.prefixes {
                write(&mut self.table.prefixes, &goal.prefixes, key, complete);
            }
            for key in &changes.sources {
                write(&mut self.table.sources, &goal.sources, key, complete);
            }
        }
        let missing = absent(&self.steady, &self.table);
        self.events.push(format!("{event:?}").chars().take(160).collect());
        if !missing.is_empty() {
            let last = self.events.iter().rev().take(5).collect::<Vec<_>>();
            self.faults.push(format!("{missing:?} after {last:?}"));
        }
    }
}

fn write<K: Ord + Clone, V: Clone>(
    table: &mut BTreeMap<K, V>,
    goal: &BTreeMap<K, V>,
    key: &K,
    complete: bool,
) {
    match goal.get(key) {
        Some(value) => {
            table.insert(key.clone(), value.clone());
        }
        None if complete => {
            table.remove(key);
        }
        None => {}
    }
}

/// What should be there and is not.
fn absent(wanted: &Desired, found: &Desired) -> Vec<String> {
    fn of<K: Ord + Debug, V: PartialEq + Debug>(
        wanted: &BTreeMap<K, V>,
        found: &BTreeMap<K, V>,
    ) -> Vec<String> {
        wanted
            .iter()
            .filter(|(key, value)| found.get(key) != Some(value))
            .map(|(key, value)| format!("{key:?} -> {value:?}"))
            .collect()
    }
    [
        of(&wanted.vteps, &found.vteps),
        of(&wanted.pods, &found.pods),
        of(&wanted.prefixes, &found.prefixes),
        of(&wanted.sources, &found.sources),
    ]
    .concat()
}

impl Observer {
    pub(crate) fn start(subject: &Subject) -> Self {
        Self::with(subject, Link::new(subject.access()), TIMING)
    }

    /// With flannel's own annotations, and whatever network its configuration has.
    pub(crate) fn of_flannel(subject: &Subject) -> Self {
        let mut config = config(subject.access());
        "flannel.alpha.coreos.com/".clone_into(&mut config.overlays[0].annotation_prefix);
        config.overlays[0].network = None;
        Self::of(config, Link::new(subject.access()), TIMING)
    }

    pub(crate) fn with(subject: &Subject, link: Link, timing: Timing) -> Self {
        Self::of(config(subject.access()), link, timing)
    }

    fn of(config: Config, link: Link, timing: Timing) -> Self {
        let state = State {
            planner: Planner::new(&config.overlays),
            table: Desired::default(),
            steady: Desired::default(),
            faults: Vec::new(),
            events: Vec::new(),
        };
        let mut observer = Self {
            state: Arc::new(Mutex::new(state)),
            problems: ProblemList::default(),
            health: Health::default(),
            tasks: Vec::new(),
        };
        observer.run(config, link, timing);
        observer
    }

    fn run(&mut self, config: Config, link: Link, timing: Timing) {
        let (sender, mut receiver) = mpsc::channel(16);
        let (problems, health) = (self.problems.clone(), self.health.clone());
        let source = kubernetes::watch(Arc::new(link), config, timing, sender, problems, health);
        let state = self.state.clone();
        self.tasks = vec![
            RUNTIME.spawn(source),
            RUNTIME.spawn(async move {
                while let Some(event) = receiver.recv().await {
                    state.lock().unwrap().take(&event);
                }
            }),
        ];
    }

    /// The daemon ends and starts again: what it knew is gone, the tables stay.
    pub(crate) fn restart(&mut self, subject: &Subject) {
        self.stop();
        let config = config(subject.access());
        self.lock().planner = Planner::new(&config.overlays);
        self.run(config, Link::new(subject.access()), TIMING);
    }

    fn stop(&mut self) {
        for task in self.tasks.drain(..) {
            task.abort();
            // Cancelled is how it should end.
            let _ = RUNTIME.block_on(task);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub(crate) fn table(&self) -> Desired {
        self.lock().table.clone()
    }

    pub(crate) fn is_synced(&self) -> bool {
        self.lock().planner.is_synced()
    }

    pub(crate) fn is_listed(&self) -> bool {
        self.lock().planner.is_listed()
    }

    pub(crate) fn events(&self) -> usize {
        self.lock().events.len()
    }

    /// Waits until something holds.
    pub(crate) fn wait(&self, what: &str, holds: impl Fn(&Self) -> bool) {
        let begin = Instant::now();
        while !holds(self) {
            assert!(
                begin.elapsed() < SOON,
                "not within {SOON:?}: {what}\ntable: {:#?}\nproblems: {:#?}",
                self.table(),
                self.problems.all()
            );
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until the tables say what the server has; from then on all of it is steady.
    pub(crate) fn converge(&self, subject: &Subject) {
        let expected = subject.expected();
        self.wait("the tables say what the server has", |observer| {
            observer.is_synced() && observer.table() == expected
        });
        self.lock().steady = expected;
        self.assert_steady();
    }

    /// From now on some entries may change.
    pub(crate) fn release(&self, goes: impl FnOnce(&mut Desired)) {
        goes(&mut self.lock().steady);
    }

    /// Nothing that was right has been absent.
    pub(crate) fn assert_steady(&self) {
        let faults = self.lock().faults.clone();
        assert!(faults.is_empty(), "correct entries were absent: {faults:#?}");
    }

    /// Waits for a problem.
    pub(crate) fn wait_problem(&self, fits: impl Fn(&Problem) -> bool) -> Problem {
        self.wait("a problem is told", |observer| observer.problems.all().iter().any(&fits));
        self.problems.all().into_iter().find(fits).unwrap()
    }

    /// Waits until nothing is wrong.
    pub(crate) fn wait_healthy(&self) {
        self.wait("everything is well", |observer| {
            observer.problems.all().is_empty() && observer.health.freshness().connected
        });
    }
}

impl Drop for Observer {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}
