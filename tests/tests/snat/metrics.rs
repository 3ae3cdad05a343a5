//! What Prometheus gets from a gateway that translates.

use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddrV4, TcpStream},
    time::Duration,
};

use gateway_tests::lab::{
    outside::{AUTOMAP, GUEST},
    wait_until,
};
use openmetrics_parser::{MetricNumber, OpenMetricsValue, openmetrics::parse_openmetrics};

use crate::{
    rig::{ONE, Rig, SOON},
    serve::{BodyServer, fetch},
};

const HTTP: u16 = 80;
const LISTEN: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 9472);
const KEYS: &str = "[metrics]\nlisten = \"127.0.0.1:9472\"\n";
const SCRAPE: &str = "GET /metrics HTTP/1.1\r\nHost: gateway\r\n\r\n";
/// The same page is given for a second.
const STALE: Duration = Duration::from_millis(1100);

fn connect(rig: &Rig) -> TcpStream {
    rig.host().connect(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0), LISTEN).unwrap()
}

/// Head and body of the answer.
fn ask(rig: &Rig, request: &str) -> (String, String) {
    let mut stream = connect(rig);
    stream.set_read_timeout(Some(SOON * 3)).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("answered {text:?}"));
    (head.to_owned(), body.to_owned())
}

/// Every value, by its name and the values of its labels.
fn scrape(rig: &Rig) -> BTreeMap<String, f64> {
    std::thread::sleep(STALE);
    let (head, body) = ask(rig, SCRAPE);
    assert!(head.starts_with("HTTP/1.1 200 ") && head.contains("application/openmetrics-text"), "{head}");
    let page = parse_openmetrics(&body).unwrap_or_else(|error| panic!("{error}:\n{body}"));
    let mut values = BTreeMap::new();
    for (name, family) in &page.families {
        for sample in family.iter_samples() {
            let value = match &sample.value {
                OpenMetricsValue::Counter(counter) => counter.value,
                OpenMetricsValue::Gauge(value) => *value,
                other => panic!("{name}: {other:?}"),
            };
            let value = match value {
                MetricNumber::Float(value) => value,
                #[expect(clippy::cast_precision_loss, reason = "small in this test")]
                MetricNumber::Int(value) => value as f64,
            };
            let labels = sample.get_labelset().unwrap();
            let labels: Vec<&str> = labels.iter_values().map(String::as_str).collect();
            values.insert(format!("{name} {}", labels.join(" ")).trim_end().to_owned(), value);
        }
    }
    values
}

/// The same things as `status` and `show counters` say.
#[test]
fn a_scrape_tells_what_status_tells() {
    let mut rig = Rig::configured("metrics", KEYS, &[AUTOMAP]);
    let _server = BodyServer::start(rig.pod(1), HTTP);
    let to = SocketAddrV4::new(ONE.pod_address(1), HTTP);
    let stream = rig.guest().connect(SocketAddrV4::new(GUEST, 0), to).unwrap();
    fetch(&stream, &ONE.pod(1), 1, 1000).unwrap();
    let values = wait_until("the connection is counted", SOON, || {
        let values = scrape(&rig);
        Ok((values["gateway_sessions tcp established"] > 0.5).then_some(values))
    })
    .unwrap();
    let is = |name: &str, expected: u64| {
        let found = values.get(name).unwrap_or_else(|| panic!("no {name} in {values:#?}"));
        assert_eq!(format!("{found:.0}"), expected.to_string(), "{name}");
    };
    is("gateway_sessions tcp established", 1);
    is("gateway_sessions udp established", 0);
    is(&format!("gateway_snat_address_sessions {AUTOMAP} automap"), 1);
    is(&format!("gateway_snat_address_ports_used {AUTOMAP} automap"), 1);
    is("gateway_map_entries SESSION_REVERSE", 1);
    is("gateway_problems error", 0);
    is("gateway_nodes unresolved", 0);
    is("gateway_nodes ready", rig.lab.nodes().count() as u64);
    is("gateway_source_synchronised", 1);
    let (counters, status) = (rig.counters(), rig.status());
    for outcome in ["snat_new", "snat_forward", "snat_reply", "snat_race"] {
        let name = values
            .keys()
            .find(|name| name.starts_with("gateway_packets ") && name.contains(&format!(" {outcome} ")))
            .unwrap();
        is(name, counters[outcome]);
    }
    for table in status["tables"].as_array().unwrap() {
        let name = table["name"].as_str().unwrap();
        is(&format!("gateway_map_capacity {name}"), table["capacity"].as_u64().unwrap());
    }
    is("gateway_session_events opened", status["sessions"]["events"]["opened"].as_u64().unwrap());

    for (request, expected) in [
        ("GET / HTTP/1.1\r\nHost: gateway\r\n\r\n", "404"),
        ("POST /metrics HTTP/1.1\r\nHost: gateway\r\nContent-Length: 0\r\n\r\n", "405"),
        ("nonsense\r\n\r\n", "400"),
    ] {
        let (head, _) = ask(&rig, request);
        assert_eq!(head.split(' ').nth(1), Some(expected), "{head}");
    }

    // Those who connect and say nothing keep others out for a while only, and nobody's packets.
    let silent: Vec<TcpStream> = (0..20).map(|_| connect(&rig)).collect();
    fetch(&stream, &ONE.pod(1), 2, 1000).unwrap();
    let later = scrape(&rig);
    drop(silent);

    // Somebody else has the port when the daemon comes back.
    assert!(rig.gateway.stop().unwrap().success());
    let squatter = rig.host().listen(*LISTEN.ip(), LISTEN.port()).unwrap();
    rig.come_back();
    let problems = || {
        let output = rig.gateway.output(rig.host(), &["show", "problems"]).unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    wait_until("the problem is told", SOON, || {
        let text = problems();
        Ok((text.contains("cannot listen on 127.0.0.1:9472") && text.contains("[metrics]")).then_some(()))
    })
    .unwrap();
    fetch(&stream, &ONE.pod(1), 3, 1000).unwrap();
    drop(squatter);
    wait_until("it is solved", SOON * 2, || Ok((!problems().contains("cannot listen")).then_some(())))
        .unwrap();
    let again = scrape(&rig);
    for (name, value) in later.iter().filter(|(name, _)| name.starts_with("gateway_packets ")) {
        assert!(again[name] >= *value, "{name} went back from {value} to {}", again[name]);
    }
    rig.finish();
}
