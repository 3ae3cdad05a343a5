//! What `xdp_mode = "off"` does differently: the kernel alone forwards, by the tunnel device, its routes and the
//! firewall.
//!
//! [`OFF`] is the only place that says so: `check`, `status` and docs/modes.md are made from it.

/// Something that the XDP program does and the kernel alone does not, or does in another way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Lack {
    /// What it is about.
    pub what: &'static str,
    /// With the program.
    pub with_program: &'static str,
    /// Without it.
    pub off: &'static str,
}

/// Every difference.
pub const OFF: &[Lack] = &[
    Lack {
        what: "outer source",
        with_program: "must be an address of a known node",
        off: "the same, by the firewall; an overlay with source_check = \"off\" opens the port for all others at the same address and port",
    },
    Lack {
        what: "inner source",
        with_program: "must be a pod of the node that sent the packet",
        off: "must be in some node's podCIDR (strict rp_filter on the tunnel device); not checked with direct_routing, \
              or where net.ipv4.conf.all.rp_filter is 2",
    },
    Lack {
        what: "tunnel header",
        with_program: "reserved bits, lengths, inner VLAN tags and fragments are checked and counted one by one",
        off: "the kernel checks flags and reserved bits; fragments of tunnel packets are reassembled and accepted",
    },
    Lack {
        what: "keys df, ttl, dscp, allow_gbp",
        with_program: "as configured",
        off: "the kernel's defaults; other values are errors of the configuration",
    },
    Lack {
        what: "ARP on external interfaces",
        with_program: "answered for pods and pod CIDRs, also when a station probes whether an address is free",
        off: "proxy_arp: answered for every address that the kernel routes through another interface, so also by the \
              default route; probes are not answered",
    },
    Lack {
        what: "ARP in the tunnel",
        with_program: "answered for addresses of the gateway, by the sending node's configured endpoint",
        off: "answered by the kernel's device, by its FDB: the same for known nodes",
    },
    Lack {
        what: "clients outside of the subnet",
        with_program: "translated, routed or refused by the rules of [snat]",
        off: "routed by rules with action = \"route\", else refused; a configuration that translates is an error",
    },
    Lack {
        what: "packets that do not fit the path",
        with_program: "ICMP fragmentation needed, within limits; TCP handshakes announce what fits (mss_clamp)",
        off: "ICMP by the kernel; handshakes are not changed",
    },
    Lack {
        what: "pods that moved out of their node's podCIDR",
        with_program: "reached by the table of exact pods",
        off: "not reached: the kernel has the routes of podCIDRs only",
    },
    Lack {
        what: "foreign clients of directly reached nodes",
        with_program: "dropped as client_foreign",
        off: "forwarded: the firewall looks at what goes into the tunnel",
    },
    Lack {
        what: "counters",
        with_program: "every packet in exactly one outcome",
        off: "interface statistics, and the firewall's two counters",
    },
    Lack {
        what: "VLANs",
        with_program: "tags are read and written by the program",
        off: "the host needs a VLAN device for each",
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    const DOCUMENT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/modes.md");
    const BEGIN: &str = "<!-- differences: generated from gateway/src/modes.rs -->\n";
    const END: &str = "<!-- end of differences -->\n";

    /// `UPDATE_DOCS=1 cargo test -p gateway modes` writes the section anew.
    #[test]
    fn the_document_lists_every_difference() {
        let document = std::fs::read_to_string(DOCUMENT).unwrap();
        let (before, rest) = document.split_once(BEGIN).expect("the document has the section");
        let (section, after) = rest.split_once(END).expect("the section ends");
        let rows = OFF.iter().map(|row| format!("| {} | {} | {} |\n", row.what, row.with_program, row.off));
        let current =
            ["\n| | with the program | off |\n|---|---|---|\n".to_owned(), rows.collect(), "\n".into()];
        let current = current.concat();
        if std::env::var_os("UPDATE_DOCS").is_some() && section != current {
            std::fs::write(DOCUMENT, [before, BEGIN, &current, END, after].concat()).unwrap();
        }
        assert!(
            section == current,
            "run UPDATE_DOCS=1 cargo test -p gateway modes, and look at the difference"
        );
    }
}
