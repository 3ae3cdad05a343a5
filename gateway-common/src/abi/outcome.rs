//! The numbered table of outcomes. Every packet ends in exactly one of them, and is counted there.
//!
//! The table is the only place that names them: metrics, the CLI and the documentation are made from it. A number is
//! never given to something else; an outcome that goes away leaves its number reserved.

use bytemuck::{Pod, Zeroable};

/// Entries of the counter table; room for outcomes to come without a new layout.
pub const OUTCOME_CAPACITY: u32 = 128;

/// What an outcome means for the packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// The XDP program sent it on.
    Forward,
    /// The kernel got it as it came.
    Pass,
    /// It ended here.
    Drop,
}

impl Class {
    /// Lower-case name.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Forward => "forward",
            Self::Pass => "pass",
            Self::Drop => "drop",
        }
    }
}

/// What an operator should think when the counter grows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// Ordinary traffic.
    Normal,
    /// Worth a look when it grows quickly.
    Notice,
    /// Something is configured wrongly or not reachable: traffic is lost.
    Fault,
    /// Nobody sends this by accident, or a peer is broken.
    Suspect,
}

impl Severity {
    /// Lower-case name.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Normal => "normal",
            Self::Notice => "notice",
            Self::Fault => "fault",
            Self::Suspect => "suspect",
        }
    }
}

/// A row of the table.
#[derive(Clone, Copy, Debug)]
pub struct OutcomeInfo {
    /// The outcome.
    pub outcome: Outcome,
    /// Stable `snake_case` name.
    pub label: &'static str,
    /// What happens to the packet.
    pub class: Class,
    /// How serious it is.
    pub severity: Severity,
    /// One sentence for an operator.
    pub help: &'static str,
}

/// Value of the counter table, one for each CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Counter {
    /// Packets that ended in the outcome.
    pub packets: u64,
    /// Bytes of their frames as they arrived, from the Ethernet header to the end.
    pub bytes: u64,
}

macro_rules! outcomes {
    ($($number:literal $name:ident $label:literal $class:ident $severity:ident $help:literal;)+) => {
        /// How a packet ended.
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Outcome {
            $(#[doc = $help] $name = $number,)+
        }

        impl Outcome {
            /// Every outcome, by number.
            pub const TABLE: &'static [OutcomeInfo] = &[
                $(OutcomeInfo {
                    outcome: Self::$name,
                    label: $label,
                    class: Class::$class,
                    severity: Severity::$severity,
                    help: $help,
                },)+
            ];
        }
    };
}

outcomes! {
    // Forwarded by the XDP program.
    1 Encap "encap" Forward Normal "Routed to a pod through the tunnel.";
    2 RouteDirect "route_direct" Forward Normal "Routed to a pod on a node that is reached without a tunnel.";
    3 Decap "decap" Forward Normal "Taken out of the tunnel and sent to the outside.";
    4 DirectIn "direct_in" Forward Normal "Came from a pod on a directly reached node and was sent to the outside.";
    5 ArpReply "arp_reply" Forward Normal "ARP request from outside for a pod, its prefix or a SNAT address, answered with this interface's MAC address.";
    6 ArpReplyTunnel "arp_reply_tunnel" Forward Normal "ARP request in the tunnel for an overlay address of the gateway, answered with the VTEP's MAC address.";
    7 TooBigReply "too_big_reply" Forward Notice "Larger than the path to the pod takes, with DF: the client gets ICMP fragmentation needed.";
    8 SnatNew "snat_new" Forward Normal "First packet of a translated connection, sent to the pod.";
    9 SnatForward "snat_forward" Forward Normal "Of a translated connection, sent to the pod.";
    10 SnatReply "snat_reply" Forward Normal "From a pod, translated back and sent to the client.";
    11 SnatErrorForward "snat_error_forward" Forward Normal "ICMP error about a translated connection, sent to the pod.";
    12 SnatErrorReply "snat_error_reply" Forward Normal "ICMP error about a translated connection, sent to the client.";
    13 SnatTooBigReply "snat_too_big_reply" Forward Notice "From a pod, translated, larger than the client's link takes, with DF: the pod gets ICMP fragmentation needed.";

    // Passed to the kernel as they came.
    16 NoRole "no_role" Pass Normal "Arrived on an interface or VLAN without a role.";
    17 NotIp "not_ip" Pass Normal "Neither IPv4 nor ARP.";
    18 NotForUs "not_for_us" Pass Normal "Destination MAC address is not this interface's (multicast, broadcast, other hosts).";
    19 NoRoute "no_route" Pass Normal "Destination is no pod: the gateway host itself, or somewhere the kernel routes.";
    20 TtlExpired "ttl_expired" Pass Notice "TTL ends at the gateway; the kernel answers with ICMP time exceeded.";
    21 IpOptions "ip_options" Pass Notice "IPv4 header with options; the kernel forwards it.";
    22 Oversize "oversize" Pass Notice "Larger than the path to the pod takes, and may be fragmented: the kernel does it.";
    23 ArpOther "arp_other" Pass Normal "ARP that is not the gateway's to answer: replies, announcements, addresses that are no pod's.";
    24 ArpMalformed "arp_malformed" Pass Notice "ARP that is truncated, not for IPv4 over Ethernet, or from an impossible sender.";
    26 OutLocal "out_local" Pass Normal "From a pod to an address that the kernel delivers or rejects itself.";
    27 OutNoNeighbour "out_no_neighbour" Pass Notice "From a pod to a next hop that is not resolved yet; the kernel resolves it.";
    28 OutOtherInterface "out_other_interface" Pass Notice "From a pod towards an interface that the gateway does not drive; the kernel forwards it.";
    29 OutTtlExpired "out_ttl_expired" Pass Notice "From a pod with a TTL that ends here; the kernel answers.";
    30 OutIpOptions "out_ip_options" Pass Notice "From a pod with IPv4 options; the kernel forwards it.";
    31 OutOversize "out_oversize" Pass Notice "From a pod and too large for the way out; the kernel fragments it or answers.";
    32 TunnelArp "tunnel_arp" Pass Normal "ARP in the tunnel that is not the gateway's to answer.";
    33 OutRefused "out_refused" Pass Notice "From a pod; the kernel's FIB gave no way out (forwarding off, unreachable, blackhole); the kernel decides.";
    34 NoHeadroom "no_headroom" Pass Fault "The driver left no room in front of the frame; the kernel forwards it.";

    // Dropped on the way to a pod.
    64 VtepUnresolved "vtep_unresolved" Drop Fault "The node's next hop is not resolved: is the node up and on the underlay?";
    65 VtepMissing "vtep_missing" Drop Fault "A route points to no VTEP; the daemon repairs it.";
    66 ClientForeign "client_foreign" Drop Fault "Client outside the gateway's own subnet: the pod could not answer it without SNAT.";
    67 Ipv4Malformed "ipv4_malformed" Drop Suspect "IPv4 header that is truncated or contradicts the frame (RFC 1812 section 5.2.2).";
    68 ResizeFailed "resize_failed" Drop Fault "The frame could not be edited after it was resized; a defect of the driver or of this program.";
    69 TooBigLimited "too_big_limited" Drop Notice "As too_big_reply, but the limit of ICMP errors per second was reached.";
    70 TooBigSilent "too_big_silent" Drop Notice "Larger than the path takes, and an ICMP error or later fragment, about which no error is sent (RFC 1122 section 3.2.2).";

    // Dropped for its link layer.
    72 VlanDepth "vlan_depth" Drop Suspect "Four or more VLAN tags: the kernel might look behind them, the gateway does not.";

    // Dropped out of the tunnel.
    80 TunnelPortExternal "tunnel_port_external" Drop Suspect "Tunnel packet on an interface or VLAN that is not underlay.";
    81 TunnelAddress "tunnel_address" Drop Suspect "Tunnel packet to an address of this host that is not the VTEP's.";
    82 OuterFragment "outer_fragment" Drop Fault "Fragment of a tunnel packet: the underlay's MTU is too small (RFC 7348 section 4.3).";
    83 OuterMalformed "outer_malformed" Drop Suspect "Outer IPv4 header truncated or contradicting the frame.";
    84 OuterUdpLength "outer_udp_length" Drop Suspect "Outer UDP length contradicts the IP length, or leaves no room for an inner frame.";
    85 VxlanFlags "vxlan_flags" Drop Suspect "VXLAN flags byte is not exactly the I bit (RFC 7348 section 5).";
    86 VxlanReserved "vxlan_reserved" Drop Suspect "Reserved bytes of the VXLAN header are not zero.";
    87 VniUnknown "vni_unknown" Drop Fault "VNI that no overlay uses.";
    88 OuterSource "outer_source" Drop Suspect "Outer source is no known node's address.";
    89 InnerTruncated "inner_truncated" Drop Suspect "The datagram ends inside the inner headers.";
    90 InnerDestinationMac "inner_destination_mac" Drop Fault "Inner destination MAC address is not our VTEP's: the node has a stale entry.";
    91 InnerSourceMac "inner_source_mac" Drop Suspect "Inner source MAC address is zero or a group.";
    92 InnerLoop "inner_loop" Drop Suspect "Inner source MAC address is our own: the packet came back.";
    93 InnerVlan "inner_vlan" Drop Suspect "Inner frame with a VLAN tag (RFC 7348 section 6.1).";
    94 InnerEtherType "inner_ethertype" Drop Suspect "Inner frame is neither IP nor ARP.";
    95 InnerIpv6 "inner_ipv6" Drop Notice "Inner IPv6, which this gateway does not carry yet.";
    96 InnerMalformed "inner_malformed" Drop Suspect "Inner IPv4 header truncated or contradicting the datagram.";
    97 InnerSource "inner_source" Drop Suspect "Inner source address does not belong to the node that sent the packet.";
    98 InnerBroadcast "inner_broadcast" Drop Suspect "Inner IPv4 in an Ethernet broadcast: routers do not forward those (RFC 1812 section 5.3.4).";
    99 EcnIllegal "ecn_illegal" Drop Notice "Outer says congestion experienced, inner does not know ECN (RFC 6040).";
    100 TunnelToTunnel "tunnel_to_tunnel" Drop Suspect "From the tunnel towards the tunnel: nodes reach one another without us.";
    101 DirectSource "direct_source" Drop Suspect "Plain packet with a pod's source address that its directly reached node did not send.";

    // Dropped because it cannot be translated; under SNAT nothing leaves untranslated.
    104 SnatProtocol "snat_protocol" Drop Notice "Neither TCP, UDP nor ICMP echo (SCTP, ESP, other ICMP): cannot be translated.";
    105 SnatFragment "snat_fragment" Drop Notice "Fragment of what would have to be translated; lower the sender's MTU or datagram size.";
    106 SnatMalformed "snat_malformed" Drop Suspect "The transport header of what would have to be translated is truncated.";
    107 SnatOptions "snat_options" Drop Notice "IPv4 options on what would have to be translated.";
    108 SnatOversize "snat_oversize" Drop Notice "Larger than the path to the pod takes, may be fragmented, and would have to be translated.";
    109 SnatTableFull "snat_table_full" Drop Fault "No room for a new session: all are established. Raise snat.max_sessions.";
    110 SnatPortsExhausted "snat_ports_exhausted" Drop Fault "No free port towards this pod on the rule's SNAT addresses: add addresses to the pool.";
    111 SnatRace "snat_race" Drop Notice "Another packet opened or ended the same session at this moment; the client sends again.";
    112 SnatNoSession "snat_no_session" Drop Notice "To a SNAT address, but of no session: it expired, or somebody began on his own.";
    113 SnatErrorUnrelated "snat_error_unrelated" Drop Suspect "ICMP error about no session of ours.";
    114 SnatPodGone "snat_pod_gone" Drop Notice "The session's pod is gone; the session ends.";
    115 SnatReplySource "snat_reply_source" Drop Suspect "Of a session, but from another node than its pod's.";
    116 SnatReplyOversize "snat_reply_oversize" Drop Notice "From a pod, translated, larger than the client's link takes, and may be fragmented.";
    117 SnatNoPort "snat_no_port" Drop Fault "The interface that the session's client is behind is absent.";
    118 SnatSource "snat_source" Drop Suspect "From outside, with a source that no client has: a SNAT address, one that is not unicast, or a group's MAC address.";
}

impl Outcome {
    /// The row with this number.
    pub fn by_number(number: u32) -> Option<&'static OutcomeInfo> {
        let position = Self::TABLE.binary_search_by_key(&number, |row| row.outcome.number()).ok()?;
        Self::TABLE.get(position)
    }

    /// The row with this label.
    pub fn by_label(label: &str) -> Option<&'static OutcomeInfo> {
        Self::TABLE.iter().find(|row| row.label == label)
    }

    /// Its number: the index in the counter table.
    #[inline(always)]
    pub const fn number(self) -> u32 {
        self as u32
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn table_is_sorted_unique_and_fits() {
        assert!(Outcome::TABLE.is_sorted_by(|a, b| a.outcome < b.outcome));
        let labels: BTreeSet<_> = Outcome::TABLE.iter().map(|row| row.label).collect();
        assert_eq!(labels.len(), Outcome::TABLE.len());
        assert!(Outcome::TABLE.iter().all(|row| row.outcome.number() < OUTCOME_CAPACITY));
    }

    #[test]
    fn every_outcome_finds_its_own_row() {
        for row in Outcome::TABLE {
            assert_eq!(
                Outcome::by_number(row.outcome.number()).map(|found| found.outcome),
                Some(row.outcome)
            );
            assert_eq!(Outcome::by_label(row.label).map(|found| found.outcome), Some(row.outcome));
        }
    }

    #[test]
    fn labels_are_snake_case_and_help_is_a_sentence() {
        for row in Outcome::TABLE {
            assert!(
                row.label.bytes().all(|b| b.is_ascii_lowercase() || b == b'_' || b.is_ascii_digit()),
                "{}",
                row.label
            );
            assert!(row.help.ends_with(['.', '?']), "{}", row.help);
        }
    }

    const README: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../README.md");
    const BEGIN: &str = "<!-- counters: generated from gateway-common/src/abi/outcome.rs -->\n";
    const END: &str = "<!-- end of counters -->\n";

    fn glossary() -> String {
        use core::fmt::Write as _;

        let mut text =
            String::from("\n| number | counter | class | severity | meaning |\n|---|---|---|---|---|\n");
        for row in Outcome::TABLE {
            let (number, class, severity) = (row.outcome.number(), row.class.label(), row.severity.label());
            writeln!(text, "| {number} | `{}` | {class} | {severity} | {} |", row.label, row.help).unwrap();
        }
        text.push('\n');
        text
    }

    /// `UPDATE_DOCS=1 cargo test -p gateway-common readme` writes the section anew.
    #[test]
    fn the_readme_lists_every_counter() {
        let readme = std::fs::read_to_string(README).unwrap();
        let (before, rest) = readme.split_once(BEGIN).expect("the README has the section of counters");
        let (section, after) = rest.split_once(END).expect("the section of counters has an end");
        let current = glossary();
        if std::env::var_os("UPDATE_DOCS").is_some() && section != current {
            std::fs::write(README, [before, BEGIN, &current, END, after].concat()).unwrap();
        }
        assert!(
            section == current,
            "run UPDATE_DOCS=1 cargo test -p gateway-common readme, and look at the difference"
        );
    }
}
