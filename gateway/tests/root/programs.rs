//! Attachments: made, found again, swapped, refused.

use std::{path::Path, time::Duration};

use aya::programs::links::{FdLink, PinnedLink};
use gateway::{
    config::{Config, XdpMode},
    dataplane::{
        constants::{Sessions, constants},
        load::{LoadError, Programs},
        pins::Pins,
    },
    kernel::{
        host::{AttachMode, Host, Link},
        netlink,
    },
};
use tokio::time::{sleep, timeout};

use crate::sandbox::{config, isolated, sh};

pub(crate) async fn link(name: &str) -> Link {
    let host = Host::read(&netlink::connect().unwrap()).await.unwrap();
    host.by_name(name).unwrap_or_else(|| panic!("no {name}")).clone()
}

pub(crate) fn programs(config: &Config) -> Programs {
    Programs::prepare(Pins::new(&config.datapath.bpffs, &config.instance), config).unwrap()
}

pub(crate) async fn attach(programs: &mut Programs, config: &Config, name: &str) -> Result<(), LoadError> {
    let link = link(name).await;
    let constants = constants(config, &Host::default(), &link, &Sessions::default()).unwrap();
    let loaded = programs.loader().load(name, &constants)?;
    programs.attach(&link, loaded)
}

#[test]
fn an_attachment_outlives_the_daemon_and_is_swapped() {
    isolated(async |bpffs: &Path| {
        sh("ip link add und type veth peer name far; ip link set und up; ip link set far up");
        let config = config(bpffs);
        let mut first = programs(&config);
        attach(&mut first, &config, "und").await.unwrap();
        let before = link("und").await;
        assert_eq!(before.xdp.mode, Some(AttachMode::Driver));
        assert!(before.xdp.program.is_some());
        assert!(first.is_current(
            &before,
            &constants(&config, &Host::default(), &before, &Sessions::default()).unwrap()
        ));
        drop(first);
        assert_eq!(link("und").await.xdp, before.xdp, "nobody detaches when the daemon ends");

        let path = Pins::new(bpffs, "test").link("und");
        let link_id = || FdLink::from(PinnedLink::from_pin(&path).unwrap()).info().unwrap().id();
        let id = link_id();
        let mut second = programs(&config);
        attach(&mut second, &config, "und").await.unwrap();
        let after = link("und").await;
        assert_ne!(after.xdp.program, before.xdp.program);
        assert_eq!(link_id(), id, "the link is the same: the swap was atomic");

        // Another mode cannot be swapped in: the link is made anew.
        let mut generic = config.clone();
        generic.datapath.xdp_mode = XdpMode::Generic;
        let mut third = programs(&generic);
        attach(&mut third, &generic, "und").await.unwrap();
        assert_eq!(link("und").await.xdp.mode, Some(AttachMode::Generic));

        third.detach_others(|_| false).unwrap();
        wait_detached("und").await;
    });
}

/// The kernel lets go of a link that lost its pin a moment later.
pub(crate) async fn wait_detached(name: &str) {
    timeout(Duration::from_secs(2), async {
        while link(name).await.xdp.program.is_some() {
            sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .expect("the program is still there");
}

#[test]
fn a_device_that_comes_back_is_attached_again() {
    isolated(async |bpffs: &Path| {
        let create = "ip link add und.5 type veth peer name far; ip link set und.5 up; ip link set far up";
        sh(create);
        let config = config(bpffs);
        let mut programs = programs(&config);
        attach(&mut programs, &config, "und.5").await.unwrap();
        assert_eq!(programs.pins().linked_interfaces().unwrap(), ["und.5"]);
        sh("ip link del und.5");
        sh(create);
        assert_eq!(link("und.5").await.xdp.program, None);
        attach(&mut programs, &config, "und.5").await.unwrap();
        assert!(link("und.5").await.xdp.program.is_some());
    });
}

#[test]
fn a_foreign_program_is_left_alone() {
    isolated(async |bpffs: &Path| {
        sh("ip link add und type veth peer name far; ip link set und up");
        let mut theirs = config(bpffs);
        theirs.instance = "other".to_owned();
        attach(&mut programs(&theirs), &theirs, "und").await.unwrap();
        let before = link("und").await.xdp;

        let ours = config(bpffs);
        let error = attach(&mut programs(&ours), &ours, "und").await.unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, LoadError::Foreign { .. }), "{text}");
        let id = format!("id {}", before.program.unwrap());
        for word in ["und", "name gateway", &id, "gateway detach --instance other"] {
            assert!(text.contains(word), "{word} in: {text}");
        }
        assert_eq!(link("und").await.xdp, before);

        // A link of somebody else's: `ip link set xdp off` would be refused.
        std::fs::rename(Pins::new(bpffs, "other").link("und"), bpffs.join("theirs")).unwrap();
        let text = attach(&mut programs(&ours), &ours, "und").await.unwrap_err().to_string();
        let advice = text.split('`').nth(1).unwrap();
        assert!(advice.starts_with("bpftool link detach id "), "{text}");
        sh(advice);
        attach(&mut programs(&ours), &ours, "und").await.unwrap();
    });
}

#[test]
fn a_driver_without_xdp_is_named_with_the_remedy() {
    isolated(async |bpffs: &Path| {
        sh("ip link add und type bridge; ip link set und up");
        let config = config(bpffs);
        let error = attach(&mut programs(&config), &config, "und").await.unwrap_err();
        assert!(matches!(error, LoadError::NoDriverSupport { .. }), "{error}");
        assert!(error.to_string().contains("xdp_mode = \"generic\""), "{error}");

        let mut generic = config.clone();
        generic.datapath.xdp_mode = XdpMode::Generic;
        attach(&mut programs(&generic), &generic, "und").await.unwrap();
        assert_eq!(link("und").await.xdp.mode, Some(AttachMode::Generic));
    });
}
