//! Which sessions are meant.

use std::net::Ipv4Addr;

use clap::Args;
use gateway_common::abi::{Reverse, ReverseKey};
use ipnet::Ipv4Net;

use super::{Protocol, Stage};

/// What a session must be; all that is given must hold.
#[derive(Args, Clone, Debug, Default, PartialEq, Eq)]
#[command(next_help_heading = "Which sessions")]
pub struct Filter {
    /// Of clients in this prefix
    #[arg(long, value_name = "PREFIX", value_parser = prefix)]
    pub client: Option<Ipv4Net>,
    /// To pods in this prefix
    #[arg(long, value_name = "PREFIX", value_parser = prefix)]
    pub pod: Option<Ipv4Net>,
    /// With SNAT addresses in this prefix
    #[arg(long, value_name = "PREFIX", value_parser = prefix)]
    pub snat_address: Option<Ipv4Net>,
    /// Of this protocol
    #[arg(long)]
    pub protocol: Option<Protocol>,
    /// In this state
    #[arg(long)]
    pub state: Option<Stage>,
    /// With this port of client, pod or SNAT address; for ICMP echo the identifier
    #[arg(long)]
    pub port: Option<u16>,
    /// To this port of the pod
    #[arg(long)]
    pub pod_port: Option<u16>,
}

/// An address or a prefix.
fn prefix(text: &str) -> Result<Ipv4Net, String> {
    let net = text.parse::<Ipv4Addr>().map(Ipv4Net::from).or_else(|_| text.parse::<Ipv4Net>());
    net.map(|net| net.trunc()).map_err(|_| "write an IPv4 address or prefix, such as 192.0.2.0/24".to_owned())
}

impl Filter {
    /// Whether every session is meant.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Whether this session is meant.
    pub fn matches(&self, key: &ReverseKey, reverse: &Reverse) -> bool {
        let Some(protocol) = Protocol::of(key.protocol) else { return false };
        let within = |net: &Option<Ipv4Net>, address: Ipv4Addr| net.is_none_or(|net| net.contains(&address));
        let ports = [reverse.client_port, key.pod_port, key.port].map(gateway_common::wire::Be16::get);
        within(&self.client, reverse.client.into())
            && within(&self.pod, key.pod.into())
            && within(&self.snat_address, key.address.into())
            && self.protocol.is_none_or(|wanted| wanted == protocol)
            && self.state.is_none_or(|wanted| wanted == Stage::of(protocol, reverse.state))
            && self.port.is_none_or(|port| ports.contains(&port))
            && self.pod_port.is_none_or(|port| key.pod_port.get() == port)
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use gateway_common::{
        abi::{Phase, State},
        wire::{Be16, Ipv4},
    };
    use rstest::rstest;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        filter: Filter,
    }

    fn filter(line: &str) -> Filter {
        let words = std::iter::once("x").chain(line.split_whitespace());
        Cli::try_parse_from(words).unwrap().filter
    }

    #[rstest]
    #[case("", true)]
    #[case("--client 192.0.2.7", true)]
    #[case("--client 192.0.2.9/24 --pod 10.244.1.2 --snat-address 10.244.30.254", true)]
    #[case("--client 192.0.3.0/24", false)]
    #[case("--pod 10.244.2.0/24", false)]
    #[case("--snat-address 10.244.30.1", false)]
    #[case("--protocol tcp --state established", true)]
    #[case("--protocol udp", false)]
    #[case("--state opening", false)]
    #[case("--port 4711", true)]
    #[case("--port 80", true)]
    #[case("--port 1024", true)]
    #[case("--port 81", false)]
    #[case("--pod-port 80", true)]
    #[case("--pod-port 4711", false)]
    fn everything_that_is_given_must_hold(#[case] line: &str, #[case] expected: bool) {
        let key = ReverseKey {
            pod: Ipv4::new([10, 244, 1, 2]),
            address: Ipv4::new([10, 244, 30, 254]),
            pod_port: Be16::new(80),
            port: Be16::new(1024),
            protocol: 6,
            ..ReverseKey::default()
        };
        let reverse = Reverse {
            state: State::new(Phase::Live),
            client: Ipv4::new([192, 0, 2, 7]),
            client_port: Be16::new(4711),
            ..Reverse::default()
        };
        let filter = filter(line);
        assert_eq!(filter.matches(&key, &reverse), expected, "{filter:?}");
        assert_eq!(filter.is_empty(), line.is_empty());
        assert!(!filter.matches(&ReverseKey::default(), &reverse), "what no program writes");
    }

    #[test]
    fn a_wrong_prefix_is_explained() {
        let error = Cli::try_parse_from(["x", "--client", "192.0.2"]).err().unwrap().to_string();
        assert!(error.contains("IPv4 address or prefix"), "{error}");
    }
}
