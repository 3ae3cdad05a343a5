//! The finished header of a VTEP: everything that does not differ from packet to packet.
//!
//! The program copies it in front of the inner packet and fills in the outer total length, the IP checksum, the UDP
//! length and the UDP source port; all of these are 0 here. The UDP checksum stays 0, as RFC 7348 section 5 asks for
//! over IPv4.

use bytemuck::{Zeroable as _, bytes_of};
use gateway_common::{
    abi::{
        HEADER_CAPACITY, HEADER_DIRECT, HEADER_DIRECT_TAGGED, HEADER_VXLAN, HEADER_VXLAN_TAGGED, VtepFlags,
        VtepSlot,
    },
    checksum::Sum,
    wire::{Be16, EtherType, Ethernet, Ipv4, Mac, Tag},
};

use crate::{
    config::{DontFragment, Overlay},
    kernel::underlay::{NextHop, Way},
    plan::{OverlayId, VtepSpec},
};

/// Bytes that a VXLAN tunnel over IPv4 takes from the path MTU: IPv4, UDP, VXLAN, inner Ethernet.
pub const VXLAN_OVERHEAD: u32 = 50;

const IPV4_LEN: usize = 20;
const IP_DONT_FRAGMENT: u16 = 0x4000;
const IP_PROTOCOL_UDP: u8 = 17;
const VXLAN_VNI_VALID: u8 = 0x08;

/// The slot of a node as VTEP of `overlay`. While the next hop is unresolved the slot only says whose it is.
pub fn slot(id: OverlayId, overlay: &Overlay, vtep: &VtepSpec, hop: &NextHop) -> VtepSlot {
    let mut slot = VtepSlot {
        // Ids are below `MAX_OVERLAYS`.
        overlay: u16::try_from(id).unwrap_or(u16::MAX),
        flags: VtepFlags::USED,
        endpoint: vtep.endpoint.into(),
        mac: vtep.mac,
        ..VtepSlot::zeroed()
    };
    let NextHop::Ready(hop) = hop else { return slot };
    let direct = vtep.direct && hop.on_link;
    let mut header = Header::new();
    header.link(hop.source, hop.destination, hop.vlan);
    if direct {
        slot.flags = slot.flags.with(VtepFlags::DIRECT);
        slot.mac = Mac::ZERO;
    } else {
        let ip = outer_ip(overlay, vtep);
        slot.checksum_base = Sum::of(&ip).fold();
        slot.ip_offset = header.len;
        header.push(&ip);
        header.tunnel(overlay, vtep);
    }
    slot.flags = slot.flags.with(VtepFlags::READY);
    slot.ifindex = hop.ifindex;
    slot.header_len = header.len;
    slot.mtu = inner_mtu(hop.mtu, direct);
    slot.header = header.bytes;
    slot.next_hop = hop.destination;
    slot
}

/// A slot whose next hop is looked up anew, with what is known meanwhile: our MAC address and the MTU of the path. A slot
/// that leads by another device or VLAN stays as it is.
pub fn along(slot: &VtepSlot, way: &Way) -> VtepSlot {
    const MACS: usize = 12;
    let mut slot = *slot;
    let mut header = Header::new();
    header.link(way.source, slot.next_hop, way.vlan);
    let len = usize::from(header.len);
    if slot.ifindex == way.ifindex && slot.header[MACS..len] == header.bytes[MACS..len] {
        slot.header[..MACS].copy_from_slice(&header.bytes[..MACS]);
        slot.mtu = inner_mtu(way.mtu, slot.flags.has(VtepFlags::DIRECT));
    }
    slot
}

/// The largest inner packet, by the largest one that the path takes.
fn inner_mtu(path: u32, direct: bool) -> u16 {
    let overhead = if direct { 0 } else { VXLAN_OVERHEAD };
    u16::try_from(path).unwrap_or(u16::MAX).saturating_sub(u16::try_from(overhead).unwrap_or(0))
}

fn outer_ip(overlay: &Overlay, vtep: &VtepSpec) -> [u8; IPV4_LEN] {
    let fragment = match overlay.dont_fragment {
        DontFragment::Set => IP_DONT_FRAGMENT,
        // The program copies the inner bit if it is told to inherit.
        DontFragment::Unset | DontFragment::Inherit => 0,
    };
    let mut ip = [0; IPV4_LEN];
    ip[0] = 0x45;
    ip[1] = overlay.dscp << 2;
    ip[6..8].copy_from_slice(&fragment.to_be_bytes());
    ip[8] = overlay.ttl;
    ip[9] = IP_PROTOCOL_UDP;
    ip[12..16].copy_from_slice(&overlay.local.octets());
    ip[16..20].copy_from_slice(&vtep.endpoint.octets());
    ip
}

/// A header as it grows.
struct Header {
    bytes: [u8; HEADER_CAPACITY],
    len: u16,
}

impl Header {
    fn new() -> Self {
        Self { bytes: [0; HEADER_CAPACITY], len: 0 }
    }

    fn push(&mut self, part: &[u8]) {
        let at = usize::from(self.len);
        self.bytes[at..at + part.len()].copy_from_slice(part);
        self.len += u16::try_from(part.len()).expect("parts are shorter than the header's capacity");
    }

    fn link(&mut self, source: Mac, destination: Mac, vlan: Option<u16>) {
        let mut ethernet = Ethernet { dst: destination, src: source, kind: EtherType::IPV4 };
        match vlan {
            None => self.push(bytes_of(&ethernet)),
            Some(vlan) => {
                ethernet.kind = EtherType::VLAN;
                self.push(bytes_of(&ethernet));
                self.push(bytes_of(&Tag { tci: Be16::new(vlan), kind: EtherType::IPV4 }));
            }
        }
    }

    fn tunnel(&mut self, overlay: &Overlay, vtep: &VtepSpec) {
        self.push(&[0; 2]);
        self.push(&Be16::new(overlay.port).bytes);
        self.push(&[0; 4]);
        self.push(&[VXLAN_VNI_VALID, 0, 0, 0]);
        self.push(&overlay.vni.bytes);
        self.push(&[0]);
        self.push(bytes_of(&Ethernet { dst: vtep.mac, src: overlay.mac, kind: EtherType::IPV4 }));
    }
}

/// What a slot is recognised by after a restart: overlay, endpoint and, with a tunnel, the VTEP's MAC address.
pub fn belongs(slot: &VtepSlot, wanted: &VtepSlot) -> bool {
    slot.overlay == wanted.overlay
        && slot.endpoint == wanted.endpoint
        && (slot.mac == wanted.mac || slot.mac == Mac::ZERO || wanted.mac == Mac::ZERO)
}

/// The part of [`belongs`] that can be looked up.
pub fn identity(slot: &VtepSlot) -> (u16, Ipv4) {
    (slot.overlay, slot.endpoint)
}

const _: () = {
    assert!(HEADER_DIRECT as usize == Ethernet::LEN);
    assert!(HEADER_DIRECT_TAGGED as usize == Ethernet::LEN + Tag::LEN);
    assert!(HEADER_VXLAN as u32 == HEADER_DIRECT as u32 + VXLAN_OVERHEAD);
    assert!(HEADER_VXLAN_TAGGED as u32 == HEADER_DIRECT_TAGGED as u32 + VXLAN_OVERHEAD);
};

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use gateway_common::wire::Vni;
    use rstest::rstest;

    use super::*;
    use crate::{config::SourceCheck, kernel::underlay::ReadyHop};

    fn hex(text: &str) -> Vec<u8> {
        (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
    }

    /// A flannel gateway's packet, written down by hand from RFC 791, RFC 768 and RFC 7348: outer Ethernet to inner
    /// Ethernet. Total length 0x56, IP checksum 0x1da5, UDP source port 53812, UDP length 0x42.
    const VECTOR: &str = "52540000000a5254000000010800450000560000000040111da5ac1002c8ac10020ad23421180042\
                          00000800000000000100de70bcb6ca8d0e11223344550800";

    fn overlay() -> Overlay {
        Overlay {
            name: "flannel".to_owned(),
            vni: Vni::new(1).unwrap(),
            port: 8472,
            local: Ipv4Addr::new(172, 16, 2, 200),
            mac: "0e:11:22:33:44:55".parse().unwrap(),
            subnet: "10.244.30.0/24".parse().unwrap(),
            address: Ipv4Addr::new(10, 244, 30, 0),
            network: None,
            direct_routing: false,
            source_check: SourceCheck::Node,
            extra_sources: Vec::new(),
            dont_fragment: DontFragment::Unset,
            ttl: 64,
            dscp: 0,
            allow_gbp: false,
            mss_clamp: true,
            annotation_prefix: "flannel.alpha.coreos.com/".to_owned(),
        }
    }

    fn vtep(direct: bool) -> VtepSpec {
        VtepSpec {
            endpoint: Ipv4Addr::new(172, 16, 2, 10),
            mac: "de:70:bc:b6:ca:8d".parse().unwrap(),
            direct,
        }
    }

    fn hop(vlan: Option<u16>, on_link: bool) -> NextHop {
        NextHop::Ready(ReadyHop {
            ifindex: 7,
            vlan,
            source: "52:54:00:00:00:01".parse().unwrap(),
            destination: "52:54:00:00:00:0a".parse().unwrap(),
            mtu: 1500,
            on_link,
        })
    }

    /// The vector with the program's fields set to zero.
    fn blank_vector() -> Vec<u8> {
        let mut bytes = hex(VECTOR);
        for range in [16..18, 24..26, 34..36, 38..40] {
            bytes[range].fill(0);
        }
        bytes
    }

    #[test]
    fn equals_the_vector() {
        let slot = slot(2, &overlay(), &vtep(false), &hop(None, true));
        assert_eq!(slot.header[..64], blank_vector());
        assert_eq!(
            (slot.header_len, slot.ip_offset, slot.mtu, slot.ifindex, slot.overlay),
            (64, 14, 1450, 7, 2)
        );
        assert_eq!(slot.flags, VtepFlags::USED.with(VtepFlags::READY));
        // The base plus the total length gives the vector's checksum.
        assert_eq!(Sum::new(slot.checksum_base).add([0x00, 0x56]).checksum(), [0x1d, 0xa5]);
    }

    #[test]
    fn a_tag_goes_between_the_addresses_and_the_type() {
        let slot = slot(0, &overlay(), &vtep(false), &hop(Some(0x123), true));
        let mut expected = blank_vector();
        expected.splice(12..12, [0x81, 0x00, 0x01, 0x23]);
        assert_eq!(slot.header[..68], expected);
        assert_eq!((slot.header_len, slot.ip_offset, slot.mtu), (68, 18, 1450));
    }

    #[rstest]
    #[case(DontFragment::Set, [0x40, 0])]
    #[case(DontFragment::Unset, [0, 0])]
    #[case(DontFragment::Inherit, [0, 0])]
    fn outer_header_follows_the_configuration(#[case] dont_fragment: DontFragment, #[case] flags: [u8; 2]) {
        let overlay = Overlay { dont_fragment, ttl: 9, dscp: 46, ..overlay() };
        let slot = slot(0, &overlay, &vtep(false), &hop(None, true));
        assert_eq!(slot.header[15], 0xb8, "expedited forwarding, not ECN-capable");
        assert_eq!(slot.header[20..22], flags);
        assert_eq!(slot.header[22], 9);
        assert_eq!(slot.checksum_base, Sum::of(&slot.header[14..34]).fold());
    }

    #[rstest]
    #[case(None, 14)]
    #[case(Some(7), 18)]
    fn direct_nodes_get_a_plain_header(#[case] vlan: Option<u16>, #[case] length: u16) {
        let slot = slot(0, &overlay(), &vtep(true), &hop(vlan, true));
        assert!(slot.flags.has(VtepFlags::DIRECT) && slot.flags.has(VtepFlags::READY));
        assert_eq!((slot.header_len, slot.mtu, slot.checksum_base, slot.mac), (length, 1500, 0, Mac::ZERO));
        assert_eq!(slot.header[..12], hex(VECTOR)[..12]);
        assert_eq!(slot.header[usize::from(length) - 2..usize::from(length)], [0x08, 0x00]);
        assert!(slot.header[usize::from(length)..].iter().all(|byte| *byte == 0));
    }

    /// flannel nodes behind a router are tunnelled to, DirectRouting or not.
    #[test]
    fn direct_needs_an_on_link_node() {
        let slot = slot(0, &overlay(), &vtep(true), &hop(None, false));
        assert!(!slot.flags.has(VtepFlags::DIRECT));
        assert_eq!(slot.header_len, HEADER_VXLAN);
    }

    #[test]
    fn unresolved_names_its_owner_only() {
        let slot = slot(1, &overlay(), &vtep(true), &NextHop::Unresolved("no route".to_owned()));
        assert_eq!(slot.flags, VtepFlags::USED);
        assert_eq!(
            (slot.header_len, slot.endpoint, slot.mac),
            (0, vtep(true).endpoint.into(), vtep(true).mac)
        );
    }

    fn way(vlan: Option<u16>) -> Way {
        Way { ifindex: 7, vlan, source: "52:54:00:00:00:77".parse().unwrap(), mtu: 1400 }
    }

    #[rstest]
    #[case(false, None, 1350)]
    #[case(false, Some(7), 1350)]
    #[case(true, None, 1400)]
    #[case(true, Some(7), 1400)]
    fn our_own_address_and_the_mtu_do_not_wait_for_the_next_hop(
        #[case] direct: bool,
        #[case] vlan: Option<u16>,
        #[case] mtu: u16,
    ) {
        let standing = slot(0, &overlay(), &vtep(direct), &hop(vlan, true));
        let mut expected = standing;
        expected.header[6..12].copy_from_slice(&way(vlan).source.octets);
        expected.mtu = mtu;
        assert_eq!(along(&standing, &way(vlan)), expected);
    }

    #[test]
    fn a_slot_stays_while_another_way_is_looked_up() {
        for vlan in [None, Some(7)] {
            let standing = slot(0, &overlay(), &vtep(false), &hop(vlan, true));
            let elsewhere = [Way { ifindex: 8, ..way(vlan) }, way(Some(8)), way(vlan.xor(Some(7)))];
            for way in elsewhere {
                assert_eq!(along(&standing, &way), standing, "{way:?}");
            }
        }
    }

    #[test]
    fn jumbo_mtu_stays_in_16_bits() {
        let NextHop::Ready(hop) = hop(None, true) else { unreachable!("made ready above") };
        let slot = slot(0, &overlay(), &vtep(false), &NextHop::Ready(ReadyHop { mtu: 65_536, ..hop }));
        assert_eq!(slot.mtu, 65_485);
    }
}
