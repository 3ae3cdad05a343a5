//! The Kubernetes API as source of cluster objects.
//!
//! - [`access`]: which API server, and as whom.
//! - [`request`]: every request, and the right that it needs.
//! - [`exchange`]: one request and its answer.
//! - [`failure`]: how that can fail, for people.
//! - [`wire`]: what the server sends, cut down while it is read.
//! - [`follow`]: list, watch, and begin again: one kind of object.
//! - [`join`]: from kinds to one stream of events.
//! - [`netconf`]: whether flannel's configuration agrees with ours.
//! - [`health`]: how fresh the knowledge is.
//!
//! The source fails static. What it cannot hear of stays as it was; when the server is back, the watch goes on where it
//! ended, or, if that is forgotten, a list tells what changed and what is gone.

mod access;
pub(super) mod exchange;
mod failure;
mod follow;
mod health;
mod join;
mod netconf;
mod pause;
mod request;
mod wire;

use std::{sync::Arc, time::Duration};

use tokio::{sync::mpsc, task::JoinSet};

pub use self::{
    access::{Access, Link, Linked},
    failure::Failure,
    health::{Freshness, Health},
    netconf::{NetConf, compare, findings, is_of_flannel, read_net_conf},
    request::{FLANNEL_CONFIG, FLANNEL_NAMESPACES, LEASE_NAMESPACE, Request, Right},
};
use self::{
    follow::{Common, Follower},
    join::Join,
};
use super::{model::Event, problem::ProblemList};
use crate::config::Config;

/// A kind of object that is followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Nodes.
    Node,
    /// Pods of all namespaces.
    Pod,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Node, Self::Pod];

    fn plural(self) -> &'static str {
        match self {
            Self::Node => "nodes",
            Self::Pod => "pods",
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Node => "Node",
            Self::Pod => "Pod",
        }
    }
}

/// How patient the source is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// Objects of a page.
    pub page: u32,
    /// Pause after the first failure.
    pub first_pause: Duration,
    /// Pause after many failures in a row.
    pub longest_pause: Duration,
    /// How long an answer may take, and a watch may be silent; then everything is listed by another connection. Servers
    /// send bookmarks every minute once something has happened.
    pub idle: Duration,
    /// The server is asked to end a watch after this.
    pub watch: Duration,
    /// So often in a row something at one position may make no sense before everything is listed again.
    pub nonsense: u32,
    /// After so many failures in a row what the other kinds say is used without this one.
    pub partial: u32,
    /// How often flannel's configuration is looked at.
    pub net_conf: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            page: 500,
            first_pause: Duration::from_millis(250),
            longest_pause: Duration::from_secs(30),
            idle: Duration::from_secs(90),
            watch: Duration::from_secs(290),
            nonsense: 3,
            partial: 4,
            net_conf: Duration::from_mins(5),
        }
    }
}

/// Sends what the cluster says, and then what changes in it, until the receiver is dropped. What is wrong is kept in
/// `problems`, and how fresh the knowledge is in `health`.
pub async fn watch(
    link: Arc<Link>,
    config: Config,
    timing: Timing,
    events: mpsc::Sender<Event>,
    problems: ProblemList,
    health: Health,
) {
    if events.send(Event::Listing).await.is_err() {
        return;
    }
    let Config { overlays, interfaces, .. } = config;
    let prefixes = overlays.iter().map(|overlay| overlay.annotation_prefix.clone()).collect();
    let join = Arc::new(Join::default());
    let common = Common {
        timing,
        link: link.clone(),
        events: events.clone(),
        problems: problems.clone(),
        health,
        join,
        prefixes,
    };
    let mut tasks = JoinSet::new();
    for kind in Kind::ALL {
        tasks.spawn(Follower::new(kind, common.clone()).run());
    }
    drop(common);
    tasks.spawn(netconf::follow(link, overlays, interfaces, timing, problems));
    // The set ends its tasks when this one is cancelled.
    events.closed().await;
}

#[cfg(test)]
mod tests;
