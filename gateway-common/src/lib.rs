//! The gateway's packet engine and the layouts it shares with userspace.
//!
//! Reading guide:
//! - [`engine`]: the way of a packet; every decision and every edit. Start at [`engine::process`].
//! - [`abi`]: what lies in BPF maps and constants: table keys and values, configuration, outcomes.
//! - [`wire`]: header types that carry their byte order; what `network-types` lacks.
//! - [`checksum`], [`flow`]: one's-complement arithmetic and the flow hash.
//! - `model` (feature `model`): a frame and tables for the host, so that the same engine runs under `cargo test`.
//!
//! Nothing here does I/O, allocates, panics or knows aya: the crate is compiled into the XDP program.

#![cfg_attr(not(any(test, feature = "model")), no_std)]

pub mod abi;
pub mod checksum;
pub mod engine;
pub mod flow;
#[cfg(any(test, feature = "model"))]
pub mod model;
pub mod wire;
