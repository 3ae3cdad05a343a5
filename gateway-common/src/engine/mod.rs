//! The way of a packet, on one screen: [`process`].
//!
//! Parse at offsets, decide, then edit: growing, shrinking, TTL and ECN come last, so that whatever is passed to the
//! kernel is passed as it came. The engine sees the packet through [`Frame`] and everything else through [`Tables`];
//! in the kernel these are the XDP context and BPF maps, on the host a vector and ordinary maps.

#![expect(
    clippy::cast_possible_truncation,
    reason = "lengths of headers and of one packet fit the narrower type"
)]

mod arp;
mod classify;
mod emit;
mod guard;
mod ingress;
mod mss;
mod outward;
mod pod;
pub mod session;
mod tables;
mod too_big;
mod verdict;

pub use tables::{Fib, FibQuery, Frame, Inserted, Sessions, Tables, WayOut};
pub use verdict::{Action, Verdict};

use crate::{
    abi::{Outcome, Roles},
    wire::EtherType,
};

/// Decides what becomes of a frame, and edits it accordingly.
#[inline(always)]
pub fn process<F: Frame, T: Tables>(frame: &mut F, tables: &T) -> Verdict {
    let (Ok(mut verdict) | Err(mut verdict)) = decide(frame, tables);
    if verdict.mtu() != 0 {
        let _ = mss::clamp(frame, tables, &mut verdict);
    }
    verdict
}

/// `Err` is an early end, not an error.
#[inline(always)]
fn decide<F: Frame, T: Tables>(frame: &mut F, tables: &T) -> Result<Verdict, Verdict> {
    let config = tables.config();
    let link = classify::link(frame, config)?;
    let reason = if link.roles == Roles::NONE {
        Some(Outcome::NoRole)
    } else if link.kind == EtherType::ARP {
        return arp::from_outside(frame, tables, link);
    } else if link.kind != EtherType::IPV4 {
        Some(Outcome::NotIp)
    } else if link.destination != config.mac {
        Some(Outcome::NotForUs)
    } else {
        None
    };
    if let Some(reason) = reason {
        guard::left_alone(frame, tables, link)?;
        return Err(Verdict::pass(reason));
    }
    let packet = classify::ipv4(frame, config, link)?;
    let arrived = if let Some(tunnel) = classify::tunnel(frame, config, packet)? {
        Some(ingress::from_tunnel(frame, tables, link, packet, tunnel)?)
    } else if link.roles.has(Roles::UNDERLAY) {
        ingress::from_direct_node(frame, tables, packet)?
    } else {
        None
    };
    if let Some(arrived) = arrived {
        return ingress::to_client(frame, tables, arrived);
    }
    if link.roles.has(Roles::EXTERNAL) {
        pod::from_outside(frame, tables, link, packet)?;
    }
    guard::to_the_kernel(frame, tables, link, packet)?;
    Err(Verdict::pass(Outcome::NoRoute))
}

#[cfg(test)]
mod tests;
