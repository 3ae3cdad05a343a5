//! Whether the cluster's objects can be had, and what is wrong with them.

use std::{fmt::Write as _, sync::Arc, time::Duration};

use tokio::{
    sync::mpsc,
    time::{Instant, interval, timeout_at},
};

use super::Finding;
use crate::{
    cluster::{
        files::Directory,
        flannel::NodeSkip,
        kubernetes::{self, Access, Health, Link, Timing},
        model::Event,
        problem::ProblemList,
    },
    config::{Config, Source},
    kernel::host::Host,
    plan::Planner,
};

/// How long an API server may take to list everything.
const PATIENCE: Duration = Duration::from_mins(1);
/// How long one that has failed may take to do better.
const SECOND_CHANCE: Duration = Duration::from_secs(2);

/// Reads the source once, and plans what it says as the daemon would.
pub(super) async fn findings(config: &Config, host: &Host) -> Vec<Finding> {
    let problems = ProblemList::default();
    let mut planner = Planner::new(&config.overlays);
    planner.set_surroundings(host.surroundings(config));
    let (read, ignored) = match &config.source {
        Source::Files { path } => {
            let mut directory = Directory::new(path, problems.clone(), Duration::ZERO);
            let found = directory.rescan();
            for event in found.iter().flat_map(|found| &found.events).chain([&Event::Synced]) {
                planner.apply(event);
            }
            (found.is_some(), directory.ignored())
        }
        Source::Kubernetes(access) => (ask(access, config, &problems, &mut planner).await, 0),
    };
    let mut findings: Vec<Finding> = problems.all().into_iter().map(Finding::from).collect();
    if read {
        findings.extend(planner.problems().into_iter().map(Finding::from));
        findings.push(Finding::ok(config.source.to_string(), summary(&planner, ignored)));
        findings.extend(announcements(config, &planner));
    }
    findings
}

/// Lists what an API server has; tells whether at least the nodes could be had.
async fn ask(access: &Access, config: &Config, problems: &ProblemList, planner: &mut Planner) -> bool {
    let link = Arc::new(Link::new(access.clone()));
    let (sender, mut receiver) = mpsc::channel(1024);
    let source = tokio::spawn(kubernetes::watch(
        link.clone(),
        config.clone(),
        Timing::default(),
        sender,
        problems.clone(),
        Health::default(),
    ));
    let deadline = Instant::now() + PATIENCE;
    let mut give_up = None;
    let mut look = interval(Duration::from_millis(100));
    let read = loop {
        tokio::select! {
            event = timeout_at(deadline, receiver.recv()) => {
                let Ok(Some(event)) = event else { break false };
                planner.apply(&event);
                if matches!(event, Event::Synced | Event::Listed { .. }) {
                    break true;
                }
            }
            _ = look.tick() => {
                if problems.all().is_empty() {
                    give_up = None;
                } else if Instant::now() > *give_up.get_or_insert_with(|| Instant::now() + SECOND_CHANCE) {
                    break false;
                }
            }
        }
    };
    source.abort();
    if read
        && let Ok(linked) = link.get().await
        && let Ok(Some(conf)) = kubernetes::read_net_conf(&linked, &Timing::default()).await
    {
        problems.set("net-conf.json", kubernetes::findings(&conf, &config.overlays, &config.interfaces));
    }
    read
}

fn summary(planner: &Planner, ignored: usize) -> String {
    let desired = planner.desired();
    let mut summary = format!(
        "VTEPs: {}, pods: {}, pod CIDRs: {}",
        desired.vteps.len(),
        desired.pods.len(),
        desired.prefixes.len()
    );
    let skipped = planner.skipped_nodes().filter(|(_, _, reason)| *reason == NodeSkip::NotFlannel).count();
    if skipped > 0 {
        let _ = write!(summary, "; nodes that are not flannel's: {skipped}");
    }
    for (reason, count) in planner.skipped_pods() {
        let _ = write!(summary, "; pods left out ({reason}): {count}");
    }
    if ignored > 0 {
        let _ = write!(summary, "; objects of other kinds: {ignored}");
    }
    summary
}

/// Whether the cluster knows the gateway.
fn announcements(config: &Config, planner: &Planner) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (id, overlay) in (0..).zip(&config.overlays) {
        let own = planner.skipped_nodes().find(|(of, _, reason)| *of == id && *reason == NodeSkip::Own);
        findings.push(match own {
            Some((_, name, _)) => {
                Finding::ok(format!("overlay {}", overlay.name), format!("Node {name} announces this gateway"))
            }
            None => Finding::warn(
                format!("overlay {}", overlay.name),
                format!("no Node of the cluster announces this gateway ({}, {})", overlay.local, overlay.mac),
                format!(
                    "pods can answer only if the cluster has a Node with public-ip {}, VtepMAC {} and podCIDR {}",
                    overlay.local, overlay.mac, overlay.subnet
                ),
            ),
        });
    }
    findings
}
