//! The loop that turns events into tables.
//!
//! Four things wake it: the source of cluster objects, rtnetlink, what is found among the sessions, and a clock. Each only
//! marks what must be looked at again ([`Pending`]); then one piece of work brings everything marked up to date. Whatever fails stays marked by
//! being different, and the clock's full pass finds it.

mod ageing;
mod chores;
mod interfaces;
mod problems;
pub mod report;
mod slow_path;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use gateway_common::abi::{self, OverlayAddress, VtepFlags, VtepSlot};
use rtnetlink::Handle;
use tokio::{
    sync::{Notify, mpsc, watch},
    task::JoinHandle,
    time::{MissedTickBehavior, interval, sleep, sleep_until},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

pub(crate) use self::ageing::Walk;
pub use self::problems::ProblemReport;
use self::{
    ageing::Ageing,
    chores::{Chore, Chores},
    interfaces::{Finished, Interfaces},
    problems::{Part, Problems},
    report::{Report, SourceReport, VtepReport, now},
    slow_path::{Look, SlowPath},
};
use crate::{
    cluster::{
        self, announce,
        kubernetes::{self, Health, Timing},
        model::{self, ObjectRef},
    },
    config::{Config, Overlay, Source, XdpMode, snat::session_memory_text},
    dataplane::{
        constants::{self, Sessions, TooMany, constants},
        load::{LoadError, Loaded, Programs},
        pins::{InstanceLock, Pins},
        reconcile::{Pass, Reconciler, Scope},
        sessions::SessionTables,
        tables::Tables,
        template,
    },
    kernel::{
        device::{Device, Goal, device_name},
        host::{Host, Link},
        netlink::{self, Subscription},
        underlay::{NextHop, Path, ReadyHop, Underlay},
    },
    metrics,
    plan::{Changes, Planner, VtepKey, VtepSpec},
    sessions::census::{self, Census},
};

/// How often everything is read anew and compared.
const VERIFY_INTERVAL: Duration = Duration::from_secs(30);
/// How often a changed state is published.
const REPORT_INTERVAL: Duration = Duration::from_millis(200);
/// Publishing takes at most this part of the time, however large the cluster is.
const REPORT_SHARE: u32 = 20;
/// What failed is tried again so soon; then after twice that, and so on up to [`VERIFY_INTERVAL`].
const FIRST_RETRY: Duration = Duration::from_millis(100);
/// Netlink tells one change in several messages; so long is waited for the rest.
const SETTLE: Duration = Duration::from_millis(10);
/// Events of the source taken before the tables are brought up to date.
const BURST: usize = 4096;
/// So long the kernel may take to detach a program that nobody holds any more.
const RELEASE: Duration = Duration::from_secs(1);
/// MTU of the underlay while its interface is absent.
const DEFAULT_MTU: u32 = 1500;

/// What must be looked at again.
#[derive(Debug, Default)]
struct Pending {
    /// Links and addresses.
    host: bool,
    /// Routes towards endpoints.
    routes: bool,
    /// Neighbours were lost sight of.
    neighbours: bool,
    /// A next hop moved.
    hops: bool,
    /// Somebody changed the firewall.
    firewall: bool,
    /// Keys of the plan.
    changes: Changes,
    /// Everything.
    verify: bool,
    /// What follows from the tables and takes its time.
    chores: Chores,
}

impl Pending {
    fn everything() -> Self {
        Self {
            host: true,
            routes: true,
            neighbours: true,
            hops: true,
            firewall: true,
            verify: true,
            changes: Changes::default(),
            chores: Chores::default(),
        }
    }

    /// Adds everything to what is marked.
    fn extend_to_everything(&mut self) {
        let (changes, chores) = (std::mem::take(&mut self.changes), std::mem::take(&mut self.chores));
        *self = Self { changes, chores, ..Self::everything() };
    }
}

/// When to try again what failed.
#[derive(Debug, Default)]
struct Retry {
    at: Option<Instant>,
    pause: Duration,
}

impl Retry {
    /// After an attempt.
    fn note(&mut self, failed: bool) {
        if !failed {
            *self = Self::default();
        } else if self.at.is_none() {
            self.pause = (self.pause * 2).clamp(FIRST_RETRY, VERIFY_INTERVAL);
            self.at = Some(Instant::now() + self.pause);
        }
    }

    /// Waits until it is time, for ever if nothing failed.
    async fn due(&self) {
        match self.at {
            Some(at) => sleep_until(at.into()).await,
            None => std::future::pending().await,
        }
    }
}

/// Addresses that sessions use although the configuration does not name them; those that are in no overlay's subnet any
/// more get no answers anyway.
fn draining(config: &Config, found: &census::Sessions) -> BTreeSet<Ipv4Addr> {
    let mut draining = found.draining();
    draining.retain(|address| config.overlays.iter().any(|overlay| overlay.subnet.contains(address)));
    draining
}

/// Links and addresses, if no foreign program is on an interface that gets one. The kernel lets go of what a daemon that
/// was killed had not pinned a moment after its end.
async fn own_host(handle: &Handle, config: &Config, programs: &Programs) -> anyhow::Result<Host> {
    let deadline = Instant::now() + RELEASE;
    loop {
        let host = Host::read(handle).await?;
        if config.datapath.xdp_mode == XdpMode::Off {
            return Ok(host);
        }
        let mut links = config.interfaces.iter().filter_map(|interface| host.by_name(&interface.name));
        match links.try_for_each(|link| programs.refuse_foreign(link)) {
            Ok(()) => return Ok(host),
            Err(error) if Instant::now() > deadline => return Err(error.into()),
            Err(_) => sleep(RELEASE / 20).await,
        }
    }
}

/// The daemon of an instance.
#[derive(Debug)]
pub struct Daemon {
    config: Config,
    handle: Handle,
    programs: Programs,
    interfaces: Interfaces,
    /// What programs have to know of sessions.
    sessions: Sessions,
    reconciler: Reconciler,
    planner: Planner,
    underlay: Underlay,
    devices: Vec<Device>,
    slow_path: SlowPath,
    host: Host,
    hops: BTreeMap<VtepKey, NextHop>,
    slots: BTreeMap<VtepKey, VtepSlot>,
    problems: Problems,
    /// The last report, for whoever wants it.
    published: watch::Sender<Option<Arc<Report>>>,
    started: u64,
    last_event: Option<u64>,
    /// Of a source that knows it.
    health: Option<Health>,
    /// The Node that announces this gateway may have changed.
    own_node_changed: Arc<Notify>,
    _lock: InstanceLock,
}

impl Daemon {
    /// Takes the instance, makes or adopts its tables, and puts the program on every interface that is there.
    ///
    /// # Errors
    ///
    /// Whatever keeps the datapath from running, with the remedy. Absent interfaces do not: they are waited for.
    pub async fn start(config: Config) -> anyhow::Result<Self> {
        let lock = InstanceLock::take(&config.instance)?;
        let pins = Pins::new(&config.datapath.bpffs, &config.instance);
        for path in pins.other_versions()? {
            warn!(
                "{} belongs to another version of the tables and is left alone: if that version is not to come back, \
                 remove everything with `gateway detach` once",
                path.display()
            );
        }
        let mut programs = Programs::prepare(pins, &config)?;
        let handle = netlink::connect().context("cannot open a netlink connection")?;
        let host = own_host(&handle, &config, &programs).await?;
        programs.create_tables()?;
        let tables = Tables::open(programs.pins())?;
        let mut census = Census::default();
        tables.sessions.each(|key, value| census.add(key, value))?;
        let census = census.finish(programs.session_slots(), &config.snat);
        let sessions = Sessions { slots: programs.session_slots(), draining: draining(&config, &census) };
        if config.snat.is_on() {
            info!(open = census.sessions, "room for {}", session_memory_text(sessions.slots));
        }
        let reconciler = Reconciler::adopt(tables)?;
        let slow_path = SlowPath::start(&config, &host).await?;
        let mut daemon = Self {
            planner: Planner::new(&config.overlays),
            underlay: Underlay::new(handle.clone()),
            devices: config
                .overlays
                .iter()
                .map(|overlay| Device::new(handle.clone(), &config.instance, overlay))
                .collect(),
            handle,
            programs,
            interfaces: Interfaces::default(),
            sessions,
            reconciler,
            slow_path,
            host,
            hops: BTreeMap::new(),
            slots: BTreeMap::new(),
            problems: Problems::default(),
            published: watch::Sender::default(),
            started: now(),
            last_event: None,
            health: None,
            own_node_changed: Arc::default(),
            config,
            _lock: lock,
        };
        let names: BTreeSet<String> = daemon.interface_names();
        daemon.programs.detach_others(|name| names.contains(name))?;
        daemon.apply_host_tables();
        // All are loaded before the first one is attached: interfaces whose programs work on different session tables
        // know nothing of each other's new clients.
        let mut loaded = Vec::new();
        for name in &names {
            if let Some((link, constants)) = daemon.wanted(name)? {
                loaded.push((link, daemon.programs.loader().load(name, &constants)?));
            }
        }
        for (link, program) in loaded {
            daemon.programs.attach(&link, program)?;
        }
        daemon.programs.settle_tables()?;
        Ok(daemon)
    }

    /// Works until cancelled. The datapath goes on without the daemon.
    ///
    /// # Errors
    ///
    /// rtnetlink cannot be subscribed to.
    pub async fn run(mut self, cancel: CancellationToken) -> anyhow::Result<()> {
        let Subscription { events: mut netlink, mut slow_path } =
            netlink::subscribe().context("cannot subscribe to netlink events")?;
        let mut firewall =
            SlowPath::watch(&self.config).context("cannot subscribe to changes of nftables")?;
        let mut ageing = self.age()?;
        let (sender, mut source) = mpsc::channel(BURST);
        let mut announcer = None;
        let watcher = match &self.config.source {
            Source::Files { path } => {
                tokio::spawn(cluster::files::watch(path.clone(), sender, self.problems.source()))
            }
            Source::Kubernetes(access) => {
                let link = Arc::new(kubernetes::Link::new(access.clone()));
                let (config, problems) = (self.config.clone(), self.problems.source());
                if config.flannel.register || config.flannel.heartbeat {
                    let changed = self.own_node_changed.clone();
                    let kept = announce::keep(
                        link.clone(),
                        config.clone(),
                        Timing::default(),
                        changed,
                        problems.clone(),
                    );
                    announcer = Some(tokio::spawn(kept));
                }
                let health = self.health.insert(Health::default()).clone();
                tokio::spawn(kubernetes::watch(link, config, Timing::default(), sender, problems, health))
            }
        };
        let metrics = self.serve_metrics(&ageing)?;
        let mut verify = interval(VERIFY_INTERVAL);
        verify.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut publish = interval(REPORT_INTERVAL);
        publish.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut unpublished;
        let mut publish_from = Instant::now();
        let mut retry = Retry::default();
        // What happened between the first look and the subscription has no event.
        let mut pending = Pending::everything();
        loop {
            tokio::select! {
                biased;
                () = cancel.cancelled() => break,
                () = self.work(&mut pending, &mut netlink, &ageing) => {}
            }
            unpublished = true;
            retry.note(self.problems.want_retry());
            'wait: loop {
                // Fair: a storm of netlink events must not keep the others waiting.
                tokio::select! {
                    () = cancel.cancelled() => break 'wait,
                    () = std::future::ready(()), if !pending.chores.is_empty() => break 'wait,
                    Some(event) = netlink.recv() => {
                        if self.take_netlink(&event, &mut pending) {
                            break 'wait;
                        }
                    }
                    Some(event) = source.recv() => {
                        self.take_source(&event, &mut pending);
                        for _ in 0..BURST {
                            match source.try_recv() {
                                Ok(event) => self.take_source(&event, &mut pending),
                                Err(_) => break,
                            }
                        }
                        break 'wait;
                    }
                    walk = ageing.next() => {
                        if self.take_walk(walk) {
                            pending.host = true;
                            break 'wait;
                        }
                    }
                    Some(()) = slow_path.recv() => {
                        pending.chores.add(Chore::Devices);
                        break 'wait;
                    }
                    Some(()) = firewall.recv() => {
                        pending.firewall = true;
                        break 'wait;
                    }
                    Some(finished) = self.interfaces.next() => {
                        self.install(finished, &mut pending.chores).await;
                        unpublished = true;
                    }
                    _ = verify.tick() => {
                        pending.extend_to_everything();
                        break 'wait;
                    }
                    () = retry.due() => {
                        retry.at = None;
                        pending.extend_to_everything();
                        break 'wait;
                    }
                    _ = publish.tick() => {
                        // The source finds problems in what makes no event.
                        if Instant::now() >= publish_from && (self.problems.refresh(&self.planner) || unpublished) {
                            let begin = Instant::now();
                            unpublished = false;
                            self.publish();
                            publish_from = Instant::now() + begin.elapsed() * REPORT_SHARE;
                        }
                    }
                }
            }
            if cancel.is_cancelled() {
                break;
            }
        }
        watcher.abort();
        for task in [announcer, metrics].into_iter().flatten() {
            task.abort();
        }
        self.publish();
        info!("stopping; the datapath keeps forwarding (`gateway detach` removes it)");
        Ok(())
    }

    /// Starts the ageing of sessions.
    fn age(&self) -> anyhow::Result<Ageing> {
        let pins = self.programs.pins();
        let constants = constants::common(&self.config, &self.host, &self.sessions)?;
        let tables = SessionTables::open(pins)?;
        Ageing::start(tables, self.programs.loader(), &constants, &self.config.snat)
            .context("cannot start the thread that ages sessions")
    }

    /// Starts the page of metrics, if it is wanted.
    fn serve_metrics(&self, ageing: &Ageing) -> anyhow::Result<Option<JoinHandle<()>>> {
        let Some(listen) = self.config.metrics.listen else { return Ok(None) };
        let sources = metrics::Sources {
            tables: Tables::open(self.programs.pins())?,
            walks: ageing.walks(),
            report: self.published.subscribe(),
            health: self.health.clone(),
        };
        Ok(Some(tokio::spawn(metrics::serve(listen, sources, self.problems.source()))))
    }

    /// Notes what was found among the sessions; tells whether addresses have drained.
    fn take_walk(&mut self, walk: Walk) -> bool {
        let mut problems = walk.sessions.problems();
        let failed = walk.fault.is_some();
        problems.extend(walk.fault);
        self.problems.set(Part::Sessions, problems);
        if failed {
            return false;
        }
        let draining = draining(&self.config, &walk.sessions);
        let drained = draining != self.sessions.draining;
        if drained {
            let gone: Vec<String> =
                self.sessions.draining.difference(&draining).map(ToString::to_string).collect();
            if !gone.is_empty() {
                info!("no session uses these former SNAT addresses any more: {}", gone.join(", "));
            }
            self.sessions.draining = draining;
        }
        drained
    }

    /// Interfaces that get a program.
    fn interface_names(&self) -> BTreeSet<String> {
        if self.config.datapath.xdp_mode == XdpMode::Off {
            return BTreeSet::new();
        }
        self.config.interfaces.iter().map(|interface| interface.name.clone()).collect()
    }

    /// Notes an event; tells whether there is work.
    fn take_netlink(&mut self, event: &netlink::Event, pending: &mut Pending) -> bool {
        match event {
            netlink::Event::Links | netlink::Event::Addresses => {
                pending.host = true;
                pending.routes = true;
            }
            netlink::Event::Route(prefix) if !self.underlay.concerns(*prefix) => return false,
            netlink::Event::Route(_) | netlink::Event::PathMtu => pending.routes = true,
            netlink::Event::Neighbour(message) => {
                if !self.underlay.neighbour_event(message, false) {
                    return false;
                }
                pending.hops = true;
            }
            netlink::Event::NeighbourGone(message) => {
                if !self.underlay.neighbour_event(message, true) {
                    return false;
                }
                pending.hops = true;
            }
            netlink::Event::Lost => {
                pending.extend_to_everything();
            }
        }
        true
    }

    /// Whether an event tells of a Node that announces this gateway, by the name that it was given.
    fn is_about_own_node(&self, event: &model::Event) -> bool {
        let is_own = |name: &str| name.starts_with(self.config.flannel.node.as_str());
        match event {
            model::Event::Apply(object) => {
                matches!(object.reference(), ObjectRef::Node(name) if is_own(&name))
            }
            model::Event::Delete(ObjectRef::Node(name)) => is_own(name),
            _ => false,
        }
    }

    fn take_source(&mut self, event: &model::Event, pending: &mut Pending) {
        self.last_event = Some(now());
        if self.is_about_own_node(event) {
            self.own_node_changed.notify_one();
        }
        let (listed, synced) = (self.planner.is_listed(), self.planner.is_synced());
        let had_pods = self.planner.has_pods();
        pending.changes.merge(self.planner.apply(event));
        if !listed && self.planner.is_listed() && !self.planner.is_synced() {
            info!(
                "a part of the source cannot be read: what it does not name stays as it was until it can be"
            );
            pending.verify = true;
        }
        if !had_pods && self.planner.has_pods() {
            pending.verify = true;
        }
        if !synced && self.planner.is_synced() {
            let desired = self.planner.desired();
            info!(
                nodes = desired.vteps.len(),
                pods = desired.pods.len(),
                prefixes = desired.prefixes.len(),
                "the source is synchronised"
            );
            // Before this, what the tables held from an earlier run was left as it was.
            pending.verify = true;
        }
    }

    /// Brings the tables up to date, and does one of the chores: a next hop that moves meanwhile must not wait for
    /// all of them.
    async fn work(
        &mut self,
        pending: &mut Pending,
        netlink: &mut mpsc::Receiver<netlink::Event>,
        ageing: &Ageing,
    ) {
        if pending.host || pending.routes {
            sleep(SETTLE).await;
            while let Ok(event) = netlink.try_recv() {
                self.take_netlink(&event, pending);
            }
        }
        // Taken only now: if the work is cancelled half-way, the daemon stops anyway.
        let Pending { host, routes, neighbours, hops, firewall, mut changes, verify, mut chores } =
            std::mem::take(pending);
        let mut netlink_problems = Vec::new();
        if host || verify {
            match Host::read(&self.handle).await {
                Ok(host) => self.host = host,
                Err(error) => netlink_problems.push(error.to_string()),
            }
            chores.add(Chore::Programs);
            chores.add(Chore::Settings);
        }
        if verify && let Err(error) = self.reconciler.reread() {
            netlink_problems.push(error.to_string());
        }
        if host || verify {
            self.apply_host_tables();
            changes.merge(self.planner.set_surroundings(self.host.surroundings(&self.config)));
        }
        if neighbours {
            if let Err(error) = self.underlay.resync().await {
                netlink_problems.push(error.to_string());
            }
        } else if routes {
            self.underlay.reroute().await;
        }
        self.problems.set(Part::Netlink, netlink_problems);
        if firewall || verify {
            chores.add(Chore::Firewall(Look::Table));
        } else if host || !changes.sources.is_empty() {
            chores.add(Chore::Firewall(Look::Goal));
        }

        if self.planner.is_listed() {
            self.reconciler.hold_removals(!self.planner.is_synced());
            self.reconciler.hold_pods(!self.planner.has_pods());
            if verify || !changes.vteps.is_empty() {
                let paths = self.planner.desired().vteps.keys().filter_map(|key| self.path(key)).collect();
                self.underlay.track(&paths).await;
            }
            let moved = hops || host || routes || neighbours || verify || !changes.vteps.is_empty();
            let hops_moved = moved && self.update_hops(&mut changes);
            let gone = self.apply_tables(if verify { Scope::Everything } else { Scope::Only(&changes) });
            ageing.end(gone);
            if hops {
                // A neighbour that went must be asked for again.
                self.underlay.resolve().await;
            }
            if verify || hops_moved || host || !changes.vteps.is_empty() || !changes.prefixes.is_empty() {
                chores.add(Chore::Devices);
            }
        } else {
            self.follow_adopted().await;
        }
        if let Some(chore) = chores.take() {
            self.perform(chore).await;
        }
        pending.chores = chores;
    }

    async fn perform(&mut self, chore: Chore) {
        match chore {
            Chore::Programs => self.reload(),
            Chore::Firewall(look) => self.protect(look).await,
            Chore::Settings => {
                let problems = self.slow_path.set(&self.config, &self.host);
                self.problems.set(Part::Settings, problems);
            }
            Chore::Devices => self.apply_devices().await,
        }
    }

    /// Brings the firewall up to date.
    async fn protect(&mut self, look: Look) {
        let desired = self.planner.is_listed().then(|| self.planner.desired());
        let partial = !self.planner.is_synced();
        let problem = self.slow_path.protect(&self.config, &self.host, desired, partial, look).await;
        self.problems.set(Part::Firewall, problem.into_iter().collect());
    }

    fn path(&self, key: &VtepKey) -> Option<Path> {
        let overlay = self.config.overlays.get(key.overlay as usize)?;
        let vtep = self.planner.desired().vteps.get(key)?;
        Some(Path { local: overlay.local, endpoint: vtep.endpoint })
    }

    /// Until the source says which nodes there are, the entries of the last run tell; their next hops may move.
    async fn follow_adopted(&mut self) {
        let nodes: Vec<(u32, VtepSlot, &Overlay)> = self
            .reconciler
            .adopted()
            .filter_map(|(id, slot)| Some((id, *slot, self.config.overlays.get(usize::from(slot.overlay))?)))
            .collect();
        let path = |slot: &VtepSlot, overlay: &Overlay| Path {
            local: overlay.local,
            endpoint: slot.endpoint.into(),
        };
        let paths = nodes.iter().map(|(_, slot, overlay)| path(slot, overlay)).collect();
        self.underlay.track(&paths).await;
        let mut changes = Vec::new();
        for (id, slot, overlay) in nodes {
            let hop = self.underlay.next_hop(path(&slot, overlay), &self.host, &self.config);
            let vtep = VtepSpec {
                endpoint: slot.endpoint.into(),
                mac: slot.mac,
                direct: slot.flags.has(VtepFlags::DIRECT),
            };
            let moved = template::slot(slot.overlay.into(), overlay, &vtep, &hop);
            // A direct node's entry does not tell the MAC that a tunnel would need.
            let complete =
                moved.flags.has(VtepFlags::READY) && moved.flags.has(VtepFlags::DIRECT) == vtep.direct;
            if complete && moved != slot {
                changes.push((id, moved));
            }
        }
        let pass = self.reconciler.refresh(&changes);
        self.problems.set(Part::Tables, pass.problems);
    }

    /// The slot of a node. While its next hop is merely not known yet, the one by which it is reached now, with what
    /// is known of the way.
    fn slot(&self, key: &VtepKey, overlay: &Overlay, vtep: &VtepSpec, hop: &NextHop) -> VtepSlot {
        let slot = template::slot(key.overlay, overlay, vtep, hop);
        let NextHop::Pending { way, .. } = hop else { return slot };
        let usable = |slot: &&VtepSlot| self.host.links.get(&slot.ifindex).is_some_and(|link| link.up);
        match (self.reconciler.standing(key, &slot).filter(usable), way) {
            (Some(standing), Some(way)) => template::along(standing, way),
            (Some(standing), None) => *standing,
            (None, _) => slot,
        }
    }

    /// Computes next hops and slots, adds the nodes whose slot is another one, and tells whether any hop moved.
    fn update_hops(&mut self, changes: &mut Changes) -> bool {
        let mut hops = BTreeMap::new();
        let mut slots = BTreeMap::new();
        for (key, vtep) in &self.planner.desired().vteps {
            let Some(overlay) = self.config.overlays.get(key.overlay as usize) else { continue };
            let path = Path { local: overlay.local, endpoint: vtep.endpoint };
            let hop = self.underlay.next_hop(path, &self.host, &self.config);
            let slot = self.slot(key, overlay, vtep, &hop);
            if self.slots.get(key) != Some(&slot) {
                changes.vteps.insert(key.clone());
            }
            slots.insert(key.clone(), slot);
            hops.insert(key.clone(), hop);
        }
        let moved = hops != self.hops;
        self.hops = hops;
        self.slots = slots;
        moved
    }

    /// Makes the tables those of the plan; gives the pods that went.
    fn apply_tables(&mut self, scope: Scope<'_>) -> Vec<OverlayAddress> {
        let begin = Instant::now();
        let pass = self.reconciler.apply(self.planner.desired(), &self.slots, scope);
        if pass.written + pass.deleted > 0 {
            debug!(written = pass.written, deleted = pass.deleted, took = ?begin.elapsed(), "tables changed");
        }
        // A problem seen in a full pass lasts until another full pass does not see it.
        let full = matches!(scope, Scope::Everything);
        if full || !pass.problems.is_empty() {
            self.problems.set(Part::Tables, pass.problems);
        }
        pass.gone_pods
    }

    fn apply_host_tables(&mut self) {
        let devices: BTreeSet<String> = self.config.overlays.iter().map(device_name).collect();
        let addresses = self.host.address_table(&self.config, &self.sessions.draining);
        let egress = self.host.egress_table(&self.config, |name| devices.contains(name));
        let Pass { mut problems, .. } = self.reconciler.apply_host(&addresses, &egress);
        problems.extend(constants::local_prefix_problem(&self.host));
        self.problems.set(Part::HostTables, problems);
        self.problems.set(Part::Translation, self.translation_problems());
    }

    /// What is wrong with the addresses and tables of source translation, for people.
    fn translation_problems(&self) -> Vec<String> {
        let mut problems: Vec<String> = self.host.misused(&self.config.snat).map(|(_, text)| text).collect();
        let (slots, wanted) = (self.sessions.slots, self.config.snat.slots());
        if slots > wanted {
            problems.push(format!(
                "the session tables keep room for {slots} sessions instead of {wanted}, because more were open at the \
                 start: start the gateway again when fewer are, or end some with `gateway sessions flush`"
            ));
        }
        problems
    }

    async fn apply_devices(&mut self) {
        let mut problems = Vec::new();
        // The devices must be seen as they are: one that was made a moment ago has no event yet.
        match Host::read(&self.handle).await {
            Ok(host) => self.host = host,
            Err(error) => problems.push(error.to_string()),
        }
        for (id, device) in (0_u32..).zip(&self.devices) {
            let mut goal = Goal::new(id, self.planner.desired(), &self.hops, |hop| self.kernel_device(hop));
            goal.partial = !self.planner.is_synced();
            problems.extend(device.apply(&goal, &self.host, self.underlay_mtu(id)).await);
        }
        self.problems.set(Part::Devices, problems);
    }

    /// The device that the kernel sends by: the VLAN device where the program tags by itself.
    fn kernel_device(&self, hop: &ReadyHop) -> Option<u32> {
        let matches = |link: &&Link| {
            self.host.port(link).is_some_and(|(port, vlan)| port.index == hop.ifindex && vlan == hop.vlan)
        };
        self.host.links.values().find(matches).map(|link| link.index)
    }

    fn underlay_mtu(&self, overlay: u32) -> u32 {
        let local = self.config.overlays.get(overlay as usize).map(|overlay| overlay.local);
        let carrier = self.host.addresses.iter().find(|(address, _)| Some(*address) == local);
        carrier.and_then(|(_, index)| self.host.links.get(index)).map_or(DEFAULT_MTU, |link| link.mtu)
    }

    /// The device of an interface and the constants that its program should have; `None`, which is noted, if the
    /// interface is absent.
    fn wanted(&mut self, name: &str) -> Result<Option<(Link, abi::Config)>, TooMany> {
        let Some(link) = self.host.by_name(name) else {
            let fault = format!("interface {name} does not exist; it is attached as soon as it appears");
            self.interfaces.note(name, Some(fault));
            return Ok(None);
        };
        Ok(Some((link.clone(), constants(&self.config, &self.host, link, &self.sessions)?)))
    }

    /// Interfaces come back with another index, or get another address; somebody may remove the program.
    fn reload(&mut self) {
        for name in self.interface_names() {
            match self.wanted(&name) {
                Ok(None) => {}
                Ok(Some((link, constants))) if self.programs.is_current(&link, &constants) => {
                    self.interfaces.note(&name, None);
                }
                Ok(Some((_, constants))) => self.interfaces.load(self.programs.loader(), &name, &constants),
                Err(error) => self.interfaces.note(&name, Some(error.to_string())),
            }
        }
        self.problems.set(Part::Interfaces, self.interfaces.faults());
    }

    /// Puts a program on its interface, if it is still the one that should be there.
    async fn install(&mut self, finished: Finished, chores: &mut Chores) {
        let Finished { interface, result, .. } = finished;
        let fault = match self.try_install(&interface, result, chores).await {
            Ok(()) => None,
            Err(error) => Some(error.to_string()),
        };
        self.interfaces.note(&interface, fault);
        self.problems.set(Part::Interfaces, self.interfaces.faults());
    }

    async fn try_install(
        &mut self,
        interface: &str,
        result: Result<Loaded, LoadError>,
        chores: &mut Chores,
    ) -> anyhow::Result<()> {
        let loaded = result?;
        // What is there now is told by the id of its program.
        self.host = Host::read(&self.handle).await?;
        match self.wanted(interface)? {
            Some((link, constants)) if constants == *loaded.constants() => {
                self.programs.attach(&link, loaded)?;
            }
            _ => chores.add(Chore::Programs),
        }
        Ok(())
    }

    /// Writes the state for `status` and `show`.
    fn publish(&mut self) {
        self.problems.refresh(&self.planner);
        let report = Report {
            instance: self.config.instance.clone(),
            pid: std::process::id(),
            started: self.started,
            written: now(),
            xdp_mode: self.config.datapath.xdp_mode,
            source: SourceReport {
                location: self.config.source.to_string(),
                synchronised: self.planner.is_synced(),
                last_event: self.last_event,
                freshness: self.health.as_ref().map(Health::freshness),
            },
            vteps: self.vtep_reports(),
            problems: self.problems.reports(),
            devices: self.config.overlays.iter().map(device_name).collect(),
        };
        if let Err(error) = report.write() {
            error!("{error:#}");
        }
        if self.published.receiver_count() > 0 {
            self.published.send_replace(Some(Arc::new(report)));
        }
    }

    /// Why a node cannot be reached, for people.
    fn obstacle(&self, key: &VtepKey) -> Option<String> {
        if self.reconciler.vtep_id(key).is_none() {
            return Some("it has no entry in the table VTEPS: see the problems".to_owned());
        }
        if self.slots.get(key).is_some_and(|slot| slot.flags.has(VtepFlags::READY)) {
            return None;
        }
        let known = self.hops.get(key).and_then(NextHop::obstacle);
        Some(known.unwrap_or("not looked up yet").to_owned())
    }

    fn vtep_reports(&self) -> Vec<VtepReport> {
        let vteps = self.planner.desired().vteps.iter();
        vteps
            .map(|(key, vtep)| VtepReport {
                overlay: key.overlay,
                node: key.node.to_string(),
                id: self.reconciler.vtep_id(key),
                endpoint: vtep.endpoint,
                direct: self.slots.get(key).is_some_and(|slot| slot.flags.has(VtepFlags::DIRECT)),
                unresolved: self.obstacle(key),
            })
            .collect()
    }
}
