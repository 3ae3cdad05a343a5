//! Whatever happens to the daemon and its configuration, connections go on.

use std::{
    env,
    net::{Ipv4Addr, SocketAddrV4},
    path::PathBuf,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::Duration,
};

use gateway_tests::lab::{
    gateway,
    outside::{AUTOMAP, GUEST},
    wait_until,
};

use crate::{
    rig::{ONE, Rig, SOON},
    serve::{BodyServer, fetch},
    traffic::{assert_complete, pair, streams},
};

const HTTP: u16 = 80;
const PORT: u16 = 7000;
/// Datagrams per second and direction.
const RATE: u32 = 1000;
const TRANSFERS: u64 = 4;
const BODY: usize = 1 << 18;
/// Between two bodies: the daemon needs a part of the CPUs, too.
const BREATH: Duration = Duration::from_millis(20);
/// A gateway with another BPF object; `cargo xtask test --full` builds it.
const VARIANT: &str = "GATEWAY_VARIANT_BIN";

const POOL_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 244, 30, 77);
const POOL: &str =
    "[snat]\nmode = \"pool\"\n[[snat.pool]]\nname = \"other\"\naddresses = [\"10.244.30.77\"]\n";

/// One long connection after the other would hide what happens to one: these last through everything.
#[test]
fn transfers_outlive_every_interruption() {
    let mut rig = Rig::configured("interruptions", "", &[AUTOMAP, POOL_ADDRESS]);
    let _server = BodyServer::start(rig.pod(2), HTTP);
    let datagrams = streams(pair(&rig, rig.pod(1), ONE.pod_address(1), PORT, AUTOMAP), RATE);
    let over = AtomicBool::new(false);
    let transferred = AtomicU64::new(0);
    let connect = |rig: &Rig| {
        rig.guest().connect(SocketAddrV4::new(GUEST, 0), SocketAddrV4::new(ONE.pod_address(2), HTTP)).unwrap()
    };
    let connections: Vec<_> = (0..TRANSFERS).map(|_| connect(&rig)).collect();
    let before = rig.counters();
    thread::scope(|scope| {
        for (index, stream) in (0..).zip(&connections) {
            let (over, transferred) = (&over, &transferred);
            scope.spawn(move || {
                let name = ONE.pod(2);
                for round in 0.. {
                    if over.load(Ordering::Relaxed) {
                        break;
                    }
                    fetch(stream, &name, index << 32 | round, BODY).unwrap();
                    transferred.fetch_add(1, Ordering::Relaxed);
                    thread::sleep(BREATH);
                }
            });
        }
        let _end = End(&over);
        interrupt(&mut rig, &transferred);
    });
    println!("{} bodies of {BODY} bytes compared", transferred.load(Ordering::Relaxed));
    for (name, stream) in ["to the pod", "to the client"].into_iter().zip(datagrams) {
        assert_complete(name, stream.finish().unwrap());
    }
    // Nobody was told that a connection is over.
    assert_eq!(rig.since(&before, "snat_no_session"), 0);

    // A session on an address that left the pools drains; new ones get the new address.
    let late = connect(&rig);
    let used = |address: Ipv4Addr| {
        let list = rig.sessions(&["--snat-address", &address.to_string(), "--protocol", "tcp"]);
        list.iter().filter(|session| session["state"] == "established").count()
    };
    assert_eq!(used(POOL_ADDRESS), 1);
    let address_use = |address: Ipv4Addr| {
        let status = rig.status();
        let list = status["sessions"]["addresses"].as_array().unwrap().clone();
        list.into_iter().find(|row| row["address"] == address.to_string())
    };
    let draining = address_use(AUTOMAP).unwrap();
    assert!(draining["pool"].is_null() && draining["sessions"].as_u64() >= Some(TRANSFERS), "{draining}");
    rig.gateway.text(rig.host(), &["sessions", "flush", "--snat-address", &AUTOMAP.to_string()]).unwrap();
    wait_until("the former address is forgotten", SOON, || Ok(address_use(AUTOMAP).is_none().then_some(())))
        .unwrap();
    fetch(&late, &ONE.pod(2), 9, 1000).unwrap();
    rig.finish();
}

/// Ends the transfers, also when what goes on beside them fails.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn interrupt(rig: &mut Rig, transferred: &AtomicU64) {
    let own = gateway::program().unwrap();
    let variant = env::var_os(VARIANT).map(PathBuf::from);
    let sizes = "[snat]\nmax_sessions = ";
    let steps: [(&str, Option<String>, Option<PathBuf>); 7] = [
        ("killed", None, None),
        ("stopped", None, None),
        ("upgraded", None, variant),
        ("larger", Some(format!("{sizes}500000\n")), Some(own)),
        ("smaller", Some(format!("{sizes}3000\n")), None),
        ("the default size", Some(String::new()), None),
        ("another pool", Some(POOL.to_owned()), None),
    ];
    for (name, keys, program) in steps {
        if name == "killed" {
            rig.gateway.kill().unwrap();
        } else {
            assert!(rig.gateway.stop().unwrap().success());
        }
        let at = transferred.load(Ordering::Relaxed);
        wait_until("transfers go on without the daemon", SOON, || {
            Ok((transferred.load(Ordering::Relaxed) > at + TRANSFERS).then_some(()))
        })
        .unwrap();
        if let Some(keys) = keys {
            rig.configure(&keys);
        }
        if let Some(program) = program {
            rig.gateway.set_program(&program);
        }
        rig.come_back();
        let at = transferred.load(Ordering::Relaxed);
        wait_until(&format!("transfers go on: {name}"), SOON, || {
            Ok((transferred.load(Ordering::Relaxed) > at + TRANSFERS).then_some(()))
        })
        .unwrap();
        let slots = rig.status()["sessions"]["slots"].as_u64().unwrap();
        println!("{name}: slots {slots}");
        match name {
            "larger" => assert_eq!(slots, 500_000),
            "smaller" => assert_eq!(slots, 3000),
            _ => {}
        }
        thread::sleep(Duration::from_millis(50));
    }
}
