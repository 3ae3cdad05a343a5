//! Clients and nodes are in VLANs of one trunk. Their ends of it are the kernel's VLAN devices; at the gateway the program
//! reads and writes the tags.

use std::fs;

use gateway_tests::lab::{
    Flannel,
    flannel::{
        EXTERNAL, GATEWAY_ENDPOINT, GATEWAY_ROUTER, INTERFACES, LAN, SWITCH, UNDERLAY, UNDERLAY_SWITCH,
    },
    wiring,
};
use ipnet::Ipv4Net;

use crate::{cable, rig::Rig};

const TAGGED: &str = r#"[[interface]]
name = "und0"
vlan = 200
roles = ["external"]

[[interface]]
name = "und0"
vlan = 100
roles = ["underlay"]
"#;

/// The lab with the cable as the gateway's only one.
fn trunk() -> Flannel {
    let lab = Flannel::start("virtio-vlan").unwrap();
    let (gateway, lan, underlay) =
        (lab.gateway(), lab.host(LAN).unwrap(), lab.host(UNDERLAY_SWITCH).unwrap());
    wiring::delete(gateway.namespace(), EXTERNAL).unwrap();
    cable::replace(gateway, UNDERLAY, underlay).unwrap();

    for (vlan, address) in [("100", GATEWAY_ENDPOINT), ("200", GATEWAY_ROUTER)] {
        let device = format!("{UNDERLAY}.{vlan}");
        gateway
            .run(&["ip", "link", "add", "link", UNDERLAY, "name", &device, "type", "vlan", "id", vlan])
            .unwrap();
        wiring::up(gateway.namespace(), &device).unwrap();
        wiring::address(gateway.namespace(), &device, Ipv4Net::new(address, 24).unwrap()).unwrap();
    }
    // The cable's far end is a port of no bridge; the devices of its VLANs are.
    underlay.run(&["ip", "link", "set", "dev", gateway.name(), "nomaster"]).unwrap();
    for (vlan, switch) in [("100", underlay), ("200", lan)] {
        // Old kernels also refuse a name that is in use where the command comes from.
        let trunk = format!("trunk.{vlan}");
        let add = ["ip", "link", "add", "link", gateway.name(), "name", &trunk];
        let place = ["netns", switch.namespace().name(), "type", "vlan", "id", vlan];
        underlay.run(&[&add[..], &place].concat()).unwrap();
        wiring::up(switch.namespace(), &trunk).unwrap();
        wiring::enslave(switch.namespace(), &trunk, SWITCH).unwrap();
    }

    let text = fs::read_to_string(lab.config()).unwrap();
    assert!(text.contains(INTERFACES), "the lab's configuration has changed:\n{text}");
    fs::write(lab.config(), text.replace(INTERFACES, TAGGED)).unwrap();
    lab
}

#[test]
fn clients_and_nodes_are_in_vlans() {
    let rig = Rig::start(trunk());
    rig.assert_native(&[UNDERLAY]);
    rig.exchange();
}
