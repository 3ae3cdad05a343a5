//! The metrics: names, labels, and the value of each from what was read.

use std::{
    fmt,
    sync::{Arc, atomic::AtomicU64},
};

use gateway_common::abi::{Counter as Counted, OutcomeInfo};
use prometheus_client::{
    encoding::text::encode,
    metrics::{counter::Counter, family, gauge::Gauge},
    registry::Registry,
};

use crate::{
    cluster::{kubernetes::Freshness, problem::Severity},
    daemon::report::Report,
    sessions::{
        Protocol, Stage,
        census::{AddressUse, PORTS, Sessions},
    },
};

/// What was read at one time.
#[derive(Debug, Default)]
pub struct Reading {
    /// Packets and bytes of every outcome.
    pub counters: Vec<(&'static OutcomeInfo, Counted)>,
    /// What became of sessions.
    pub events: Vec<(&'static str, u64)>,
    /// Tables.
    pub maps: Vec<MapUse>,
    /// Nodes that traffic can be sent to.
    pub nodes_ready: u64,
    /// Nodes that it cannot be sent to.
    pub nodes_unresolved: u64,
    /// Sessions.
    pub sessions: Sessions,
    /// What the daemon published; absent until it does for the first time.
    pub report: Option<Arc<Report>>,
    /// Freshness of the source, if it is one that knows it.
    pub freshness: Option<Freshness>,
}

/// How full a table is.
#[derive(Clone, Copy, Debug)]
pub struct MapUse {
    /// Name of the map.
    pub map: &'static str,
    /// Entries in it.
    pub entries: u64,
    /// Entries that fit.
    pub capacity: u32,
}

/// Values of one metric, with those of its labels.
type Samples<N> = Vec<(Vec<String>, N)>;

/// What a metric is, and where its values are.
#[derive(Clone, Copy)]
enum Kind {
    Counter(fn(&Reading) -> Samples<u64>),
    Gauge(fn(&Reading) -> Samples<f64>),
}

/// A metric.
#[derive(Clone, Copy)]
struct Family {
    /// Without `gateway_`, and without the `_total` of counters.
    name: &'static str,
    labels: &'static [&'static str],
    /// The format's encoder ends the sentence.
    help: &'static str,
    kind: Kind,
}

const PREFIX: &str = "gateway";

/// Every metric, in the order of the page.
const FAMILIES: [Family; 17] = [
    Family {
        name: "build_info",
        labels: &["version"],
        help: "The daemon's version; always 1",
        kind: Kind::Gauge(|_| vec![(vec![env!("CARGO_PKG_VERSION").to_owned()], 1.0)]),
    },
    Family {
        name: "start_timestamp_seconds",
        labels: &[],
        help: "When the daemon started, seconds since 1970",
        kind: Kind::Gauge(|reading| single(reading.report.as_ref().map(|report| seconds(report.started)))),
    },
    Family {
        name: "packets",
        labels: &["outcome", "class", "severity"],
        help: "Packets by what became of them, since the tables were made; every packet has one outcome",
        kind: Kind::Counter(|reading| outcomes(reading, |counter| counter.packets)),
    },
    Family {
        name: "bytes",
        labels: &["outcome", "class", "severity"],
        help: "Bytes of these packets' frames as they arrived",
        kind: Kind::Counter(|reading| outcomes(reading, |counter| counter.bytes)),
    },
    Family {
        name: "sessions",
        labels: &["protocol", "state"],
        help: "Translated connections, when they were last walked over",
        kind: Kind::Gauge(sessions),
    },
    Family {
        name: "session_events",
        labels: &["event"],
        help: "What became of translated connections since the tables were made",
        kind: Kind::Counter(|reading| {
            reading.events.iter().map(|(event, count)| (vec![(*event).to_owned()], *count)).collect()
        }),
    },
    Family {
        name: "snat_address_sessions",
        labels: &["address", "pool"],
        help: "Translated connections of a SNAT address; without a pool it drains",
        kind: Kind::Gauge(|reading| addresses(reading, |found| wide(found.sessions))),
    },
    Family {
        name: "snat_address_ports_used",
        labels: &["address", "pool"],
        help: "Ports of a SNAT address that are used towards that port of a pod where most are",
        kind: Kind::Gauge(|reading| {
            addresses(reading, |found| found.busiest.map_or(0.0, |busiest| f64::from(busiest.used)))
        }),
    },
    Family {
        name: "snat_address_ports",
        labels: &[],
        help: "Ports that a SNAT address has towards every port of a pod",
        kind: Kind::Gauge(|_| single(Some(f64::from(PORTS)))),
    },
    Family {
        name: "map_entries",
        labels: &["map"],
        help: "Entries of a table",
        kind: Kind::Gauge(|reading| maps(reading, |found| wide(found.entries))),
    },
    Family {
        name: "map_capacity",
        labels: &["map"],
        help: "Entries that fit a table; of SESSION_REVERSE max_sessions",
        kind: Kind::Gauge(|reading| maps(reading, |found| f64::from(found.capacity))),
    },
    Family {
        name: "nodes",
        labels: &["state"],
        help: "Nodes of all overlays, by whether traffic can be sent to them",
        kind: Kind::Gauge(|reading| {
            vec![
                (vec!["ready".to_owned()], wide(reading.nodes_ready)),
                (vec!["unresolved".to_owned()], wide(reading.nodes_unresolved)),
            ]
        }),
    },
    Family {
        name: "problems",
        labels: &["severity"],
        help: "What `gateway show problems` lists",
        kind: Kind::Gauge(problems),
    },
    Family {
        name: "source_synchronised",
        labels: &[],
        help: "Whether the source of cluster objects was read completely since the start",
        kind: Kind::Gauge(|reading| {
            single(reading.report.as_ref().map(|report| truth(report.source.synchronised)))
        }),
    },
    Family {
        name: "source_connected",
        labels: &[],
        help: "Whether changes arrive as they happen; absent for a directory of files",
        kind: Kind::Gauge(|reading| single(reading.freshness.map(|freshness| truth(freshness.connected)))),
    },
    Family {
        name: "source_known_timestamp_seconds",
        labels: &[],
        help: "Until when the knowledge of the cluster is complete, seconds since 1970; absent for a directory of files",
        kind: Kind::Gauge(|reading| {
            single(reading.freshness.and_then(|freshness| freshness.heard).map(seconds))
        }),
    },
    Family {
        name: "source_last_event_timestamp_seconds",
        labels: &[],
        help: "When a cluster object changed last, seconds since 1970",
        kind: Kind::Gauge(|reading| {
            single(reading.report.as_ref().and_then(|report| report.source.last_event).map(seconds))
        }),
    },
];

/// Kinds of sessions that there can be: those that there are none of are told, too.
const KINDS: [(Protocol, &[Stage]); 3] = [
    (Protocol::Tcp, &[Stage::Opening, Stage::Established, Stage::Closing, Stage::Reset, Stage::Ending]),
    (Protocol::Udp, &[Stage::Opening, Stage::Established, Stage::Ending]),
    (Protocol::Icmp, &[Stage::Opening, Stage::Ending]),
];

fn single(value: Option<f64>) -> Samples<f64> {
    value.map(|value| (Vec::new(), value)).into_iter().collect()
}

/// Exact up to 2^53.
#[expect(clippy::cast_precision_loss, reason = "gauges are floating point numbers in this format")]
fn wide(value: u64) -> f64 {
    value as f64
}

fn seconds(since: u64) -> f64 {
    wide(since)
}

fn truth(value: bool) -> f64 {
    f64::from(u8::from(value))
}

fn outcomes(reading: &Reading, value: fn(&Counted) -> u64) -> Samples<u64> {
    reading
        .counters
        .iter()
        .map(|(info, counter)| {
            let labels = [info.label, info.class.label(), info.severity.label()];
            (labels.map(str::to_owned).to_vec(), value(counter))
        })
        .collect()
}

fn sessions(reading: &Reading) -> Samples<f64> {
    let count = |protocol, state| {
        let kinds = reading.sessions.kinds.iter();
        kinds.filter(|kind| (kind.protocol, kind.state) == (protocol, state)).map(|kind| kind.sessions).sum()
    };
    KINDS
        .iter()
        .flat_map(|(protocol, states)| states.iter().map(|state| (*protocol, *state)))
        .map(|(protocol, state)| {
            (vec![protocol.label().to_owned(), state.label().to_owned()], wide(count(protocol, state)))
        })
        .collect()
}

fn addresses(reading: &Reading, value: fn(&AddressUse) -> f64) -> Samples<f64> {
    let labels = |found: &AddressUse| vec![found.address.to_string(), found.pool.clone().unwrap_or_default()];
    reading.sessions.addresses.iter().map(|found| (labels(found), value(found))).collect()
}

fn maps(reading: &Reading, value: fn(&MapUse) -> f64) -> Samples<f64> {
    reading.maps.iter().map(|found| (vec![found.map.to_owned()], value(found))).collect()
}

fn problems(reading: &Reading) -> Samples<f64> {
    let Some(report) = &reading.report else { return Vec::new() };
    let count = |severity| {
        let problems = report.problems.iter();
        wide(problems.filter(|report| report.problem.severity == severity).count() as u64)
    };
    [Severity::Warning, Severity::Error]
        .map(|severity| (vec![severity.label().to_owned()], count(severity)))
        .into()
}

/// Labels of one value.
type Labels = Vec<(&'static str, String)>;

impl Family {
    fn register(&self, reading: &Reading, registry: &mut Registry) {
        match self.kind {
            Kind::Counter(samples) => {
                let values = family::Family::<Labels, Counter>::default();
                for (labels, value) in samples(reading) {
                    values.get_or_create(&self.named(labels)).inc_by(value);
                }
                registry.register(self.name, self.help, values);
            }
            Kind::Gauge(samples) => {
                let values = family::Family::<Labels, Gauge<f64, AtomicU64>>::default();
                for (labels, value) in samples(reading) {
                    values.get_or_create(&self.named(labels)).set(value);
                }
                registry.register(self.name, self.help, values);
            }
        }
    }

    fn named(&self, values: Vec<String>) -> Labels {
        self.labels.iter().copied().zip(values).collect()
    }
}

/// The page: OpenMetrics 1.0 text.
///
/// # Errors
///
/// None that a string makes.
pub fn text(reading: &Reading) -> Result<String, fmt::Error> {
    let mut registry = Registry::with_prefix(PREFIX);
    for family in FAMILIES {
        family.register(reading, &mut registry);
    }
    let mut text = String::new();
    encode(&mut text, &registry)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, fs, net::Ipv4Addr};

    use gateway_common::abi::Outcome;
    use openmetrics_parser::{
        MetricNumber, OpenMetricsType, OpenMetricsValue, openmetrics::parse_openmetrics,
    };

    use super::*;
    use crate::{
        cluster::problem::Problem,
        config::XdpMode,
        daemon::{ProblemReport, report::SourceReport},
        sessions::census::{Busiest, KindCount},
    };

    /// Names with labels, which the parser sorts, and values, as an independent parser reads them.
    fn parsed(text: &str) -> BTreeMap<String, f64> {
        let page = parse_openmetrics(text).unwrap_or_else(|error| panic!("{error}:\n{text}"));
        let mut values = BTreeMap::new();
        for (name, family) in &page.families {
            assert!(name.starts_with("gateway_") && family.help.ends_with('.'), "{name}: {}", family.help);
            for sample in family.iter_samples() {
                let labels = sample.get_labelset().unwrap();
                let labels: Vec<String> =
                    labels.iter().map(|(name, value)| format!("{name}={value}")).collect();
                let value = match (&family.family_type, &sample.value) {
                    (OpenMetricsType::Counter, OpenMetricsValue::Counter(counter)) => counter.value,
                    (OpenMetricsType::Gauge, OpenMetricsValue::Gauge(value)) => *value,
                    other => panic!("{name}: {other:?}"),
                };
                let value = match value {
                    MetricNumber::Float(value) => value,
                    MetricNumber::Int(value) => wide(value.try_into().unwrap()),
                };
                let old = values.insert(format!("{name}{{{}}}", labels.join(",")), value);
                assert!(old.is_none(), "{name} {labels:?} is there twice");
            }
        }
        values
    }

    fn reading() -> Reading {
        let counted = |outcome| if outcome == Outcome::SnatNew { (7, 700) } else { (0, 0) };
        let address = |last, pool: Option<&str>, sessions, busiest| AddressUse {
            address: Ipv4Addr::new(10, 244, 30, last),
            pool: pool.map(str::to_owned),
            sessions,
            busiest,
        };
        let busiest =
            Busiest { pod: Ipv4Addr::new(10, 244, 1, 2), port: 80, protocol: Protocol::Tcp, used: 4 };
        let found = |problem| ProblemReport { problem, since: 1 };
        Reading {
            counters: Outcome::TABLE
                .iter()
                .map(|info| {
                    let (packets, bytes) = counted(info.outcome);
                    (info, Counted { packets, bytes })
                })
                .collect(),
            events: vec![("opened", 9), ("evicted", 0)],
            maps: vec![MapUse { map: "PODS", entries: 3, capacity: 8 }],
            nodes_ready: 2,
            nodes_unresolved: 1,
            sessions: Sessions {
                slots: 8,
                sessions: 5,
                kinds: vec![KindCount { protocol: Protocol::Tcp, state: Stage::Established, sessions: 5 }],
                addresses: vec![address(16, Some("we\"b"), 5, Some(busiest)), address(17, None, 0, None)],
            },
            report: Some(Arc::new(Report {
                instance: "default".to_owned(),
                pid: 1,
                started: 1_700_000_000,
                written: 1_700_000_009,
                xdp_mode: XdpMode::Driver,
                source: SourceReport {
                    location: "/m".to_owned(),
                    synchronised: true,
                    last_event: Some(1_700_000_005),
                    freshness: None,
                },
                vteps: Vec::new(),
                problems: vec![
                    found(Problem::warning("a", "b", "c")),
                    found(Problem::warning("d", "e", "f")),
                ],
                devices: Vec::new(),
            })),
            freshness: Some(Freshness { connected: false, heard: Some(1_700_000_004) }),
        }
    }

    #[test]
    fn every_value_is_on_the_page() {
        let values = parsed(&text(&reading()).unwrap());
        let expect = |name: &str, value: f64| {
            assert_eq!(
                values.get(name).map(|found| found.to_bits()),
                Some(value.to_bits()),
                "{name} in {values:#?}"
            );
        };
        expect("gateway_packets{class=forward,outcome=snat_new,severity=normal}", 7.0);
        expect("gateway_bytes{class=forward,outcome=snat_new,severity=normal}", 700.0);
        expect("gateway_packets{class=drop,outcome=snat_race,severity=notice}", 0.0);
        expect("gateway_session_events{event=opened}", 9.0);
        expect("gateway_sessions{protocol=tcp,state=established}", 5.0);
        expect("gateway_sessions{protocol=udp,state=opening}", 0.0);
        expect("gateway_snat_address_sessions{address=10.244.30.17,pool=}", 0.0);
        expect("gateway_snat_address_ports{}", 64_512.0);
        expect("gateway_map_entries{map=PODS}", 3.0);
        expect("gateway_map_capacity{map=PODS}", 8.0);
        expect("gateway_nodes{state=ready}", 2.0);
        expect("gateway_nodes{state=unresolved}", 1.0);
        expect("gateway_problems{severity=warning}", 2.0);
        expect("gateway_problems{severity=error}", 0.0);
        expect("gateway_start_timestamp_seconds{}", 1_700_000_000.0);
        expect("gateway_source_synchronised{}", 1.0);
        expect("gateway_source_connected{}", 0.0);
        expect("gateway_source_known_timestamp_seconds{}", 1_700_000_004.0);
        expect("gateway_source_last_event_timestamp_seconds{}", 1_700_000_005.0);
        expect(&format!("gateway_build_info{{version={}}}", env!("CARGO_PKG_VERSION")), 1.0);
        let quoted = values
            .keys()
            .find(|name| name.starts_with("gateway_snat_address_ports_used{address=10.244.30.16"));
        assert!(quoted.is_some_and(|name| name.contains("we") && values[name] > 3.0), "{quoted:?}");
        assert_eq!(
            values.keys().filter(|name| name.starts_with("gateway_packets{")).count(),
            Outcome::TABLE.len()
        );
    }

    #[test]
    fn what_is_not_known_is_not_told() {
        let values = parsed(&text(&Reading::default()).unwrap());
        for name in ["start_timestamp_seconds", "source_synchronised", "source_connected", "problems"] {
            assert!(
                !values.keys().any(|key| key.starts_with(&format!("gateway_{name}"))),
                "{name}: {values:?}"
            );
        }
    }

    const DOCUMENT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/metrics.md");
    const BEGIN: &str = "<!-- metrics: generated from gateway/src/metrics/families.rs -->\n";
    const END: &str = "<!-- end of metrics -->\n";

    fn table() -> String {
        let mut text = String::from("\n| metric | type | labels | meaning |\n|---|---|---|---|\n");
        for Family { name, labels, help, kind } in FAMILIES {
            let (suffix, kind) = match kind {
                Kind::Counter(_) => ("_total", "counter"),
                Kind::Gauge(_) => ("", "gauge"),
            };
            let labels: Vec<String> = labels.iter().map(|label| format!("`{label}`")).collect();
            let row = format!("| `{PREFIX}_{name}{suffix}` | {kind} | {} | {help}. |\n", labels.join(", "));
            text.push_str(&row);
        }
        text.push('\n');
        text
    }

    /// With `GATEWAY_BLESS` set the document is made anew.
    #[test]
    fn the_document_names_every_metric() {
        let document = fs::read_to_string(DOCUMENT).unwrap();
        let (before, rest) = document.split_once(BEGIN).expect("the beginning is marked");
        let (found, after) = rest.split_once(END).expect("the end is marked");
        if std::env::var_os("GATEWAY_BLESS").is_some() {
            fs::write(DOCUMENT, [before, BEGIN, &table(), END, after].concat()).unwrap();
            return;
        }
        assert_eq!(found, table(), "run this test with GATEWAY_BLESS=1");
    }
}
