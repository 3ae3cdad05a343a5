//! What Prometheus sees, where `[metrics] listen` says.
//!
//! Counters are read from the pinned tables when somebody asks; sessions are those of the last walk over them, and what
//! the daemon knows is that of its last report. Forwarding does not wait for any of it, nor does the daemon's own loop.
//!
//! - [`families`]: pure: names, labels and values. `docs/metrics.md` is made from it.
//! - `server`: HTTP.

pub mod families;
mod server;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use gateway_common::abi::{Vtep, VtepFlags};
use tokio::{net::TcpListener, sync::watch, time::sleep};
use tracing::info;

use self::families::{MapUse, Reading};
use crate::{
    cluster::{
        kubernetes::Health,
        problem::{Problem, ProblemList},
    },
    daemon::{Walk, report::Report},
    dataplane::tables::{TableError, Tables},
};

/// Before the next attempt to listen.
const PAUSE: Duration = Duration::from_secs(5);
/// Where problems of this are.
const PLACE: &str = "metrics";

/// Where everything is read from.
pub(crate) struct Sources {
    /// Tables of the datapath.
    pub(crate) tables: Tables,
    /// What the last walk over the sessions found.
    pub(crate) walks: watch::Receiver<Walk>,
    /// What the daemon published last.
    pub(crate) report: watch::Receiver<Option<Arc<Report>>>,
    /// Freshness of a source that knows it.
    pub(crate) health: Option<Health>,
}

impl Sources {
    fn read(&self) -> Result<Reading, TableError> {
        let tables = &self.tables;
        let sessions = self.walks.borrow().sessions.clone();
        let (mut ready, mut unresolved) = (0, 0);
        tables.vteps.each_batch(|_, vteps| {
            for slot in vteps.iter().map(Vtep::slot).filter(|slot| slot.flags.has(VtepFlags::USED)) {
                let count = if slot.flags.has(VtepFlags::READY) { &mut ready } else { &mut unresolved };
                *count += 1;
            }
            Ok::<_, TableError>(())
        })?;
        let row = |map, entries, capacity| MapUse { map, entries, capacity };
        let maps = vec![
            row(tables.pods.name(), tables.pods.count()?, tables.pods.capacity()),
            row(tables.prefixes.name(), tables.prefixes.count()?, tables.prefixes.capacity()),
            row(tables.vteps.name(), ready + unresolved, tables.vteps.capacity()),
            row(tables.sources.name(), tables.sources.count()?, tables.sources.capacity()),
            row(tables.addresses.name(), tables.addresses.count()?, tables.addresses.capacity()),
            row(tables.egress.name(), tables.egress.count()?, tables.egress.capacity()),
            row(tables.sessions.reverse.name(), sessions.sessions, tables.sessions.slots.capacity()),
        ];
        Ok(Reading {
            counters: tables.counters.read()?,
            events: tables.events.read()?,
            maps,
            nodes_ready: ready,
            nodes_unresolved: unresolved,
            sessions,
            report: self.report.borrow().clone(),
            freshness: self.health.as_ref().map(Health::freshness),
        })
    }
}

/// Serves until it is aborted. An address that cannot be had is a problem, and tried again.
pub(crate) async fn serve(listen: SocketAddr, sources: Sources, problems: ProblemList) {
    let listener = loop {
        match TcpListener::bind(listen).await {
            Ok(listener) => break listener,
            Err(error) => {
                let problem = Problem::error(
                    PLACE,
                    format!("cannot listen on {listen}: {error}"),
                    "free the port, or choose another listen under [metrics]",
                );
                problems.set(PLACE, vec![problem]);
                sleep(PAUSE).await;
            }
        }
    };
    problems.set(PLACE, Vec::new());
    info!("metrics are at http://{listen}/metrics");
    server::run(listener, Arc::new(server::Page::new(sources))).await;
}
