//! Programs for the interfaces, loaded beside the daemon's other work: the kernel's look at a program takes as long as
//! a next hop may take to reach the tables.

use std::{collections::BTreeMap, thread};

use gateway_common::abi;
use tokio::{
    sync::oneshot::{self, error::RecvError},
    task::JoinSet,
};

use crate::dataplane::{
    bpf,
    load::{LoadError, Loaded, Loader},
};

/// A load that has ended.
#[derive(Debug)]
pub(super) struct Finished {
    pub(super) interface: String,
    constants: abi::Config,
    pub(super) result: Result<Loaded, LoadError>,
}

/// Loads under way, and what was wrong with the last ones.
#[derive(Debug, Default)]
pub(super) struct Interfaces {
    loads: JoinSet<Result<Finished, RecvError>>,
    under_way: BTreeMap<String, abi::Config>,
    faults: BTreeMap<String, String>,
}

impl Interfaces {
    /// Loads a program for an interface, unless that is under way.
    pub(super) fn load(&mut self, loader: Loader, interface: &str, constants: &abi::Config) {
        if self.under_way.get(interface) == Some(constants) {
            return;
        }
        let constants = *constants;
        self.under_way.insert(interface.to_owned(), constants);
        let interface = interface.to_owned();
        let (done, finished) = oneshot::channel();
        // A thread of its own: those of the pool do other work too.
        thread::spawn(move || {
            bpf::yield_to_others();
            let result = loader.load(&interface, &constants);
            // Nobody waits when the daemon stops.
            let _ = done.send(Finished { interface, constants, result });
        });
        self.loads.spawn(finished);
    }

    /// Waits for the next load that ends; `None` if none is under way.
    pub(super) async fn next(&mut self) -> Option<Finished> {
        let finished = self.loads.join_next().await?;
        // Loads are not cancelled, so only a panic of theirs leaves nothing.
        let finished = finished.expect("waiting does not panic").expect("a load does not panic");
        if self.under_way.get(&finished.interface) == Some(&finished.constants) {
            self.under_way.remove(&finished.interface);
        }
        Some(finished)
    }

    /// Notes what is wrong with an interface, for people; `None` if nothing is.
    pub(super) fn note(&mut self, interface: &str, fault: Option<String>) {
        match fault {
            Some(fault) => self.faults.insert(interface.to_owned(), fault),
            None => self.faults.remove(interface),
        };
    }

    /// What is wrong, by interface.
    pub(super) fn faults(&self) -> Vec<String> {
        self.faults.values().cloned().collect()
    }
}
