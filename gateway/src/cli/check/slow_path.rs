//! Whether the kernel can be the slow path: firewall, settings, and what it lacks where it is the only path.

use super::Finding;
use crate::{
    config::{Config, XdpMode},
    kernel::{firewall, host::Host, sysctl},
    modes,
};

pub(super) async fn findings(config: &Config, host: &Host) -> Vec<Finding> {
    let mut findings = vec![match firewall::probe(config, host).await {
        Ok(version) => Finding::ok("firewall", version),
        Err(error) => {
            Finding::fail("firewall", error.to_string(), "the gateway does not run without its firewall")
        }
    }];
    findings.extend(settings(config, host));
    if config.datapath.xdp_mode == XdpMode::Off {
        findings.extend(modes::OFF.iter().map(|lack| {
            Finding::warn(
                format!("xdp_mode off, {}", lack.what),
                lack.off,
                format!("with the program: {}", lack.with_program),
            )
        }));
    }
    findings
}

/// Settings that are not as needed: the daemon's to change, or the user's.
fn settings(config: &Config, host: &Host) -> Vec<Finding> {
    let deviations = sysctl::deviations(config, host);
    if deviations.is_empty() {
        return vec![Finding::ok("kernel settings", "as forwarding needs them")];
    }
    deviations
        .into_iter()
        .map(|(key, have, want)| {
            if config.host.manage_sysctl {
                Finding::ok(key.to_string(), format!("is {have}; `gateway run` sets {want}"))
            } else {
                Finding::fail(
                    key.to_string(),
                    format!("is {have}, but forwarding needs {want}"),
                    format!("sysctl -w {}, or set manage_sysctl = true under [host]", key.assignment(want)),
                )
            }
        })
        .collect()
}
