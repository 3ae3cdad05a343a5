//! The gateway's daemon as a library; the binary is `main.rs` and the verbs in [`cli`].
//!
//! Reading guide, in the direction in which facts flow:
//! - [`config`]: the one TOML file, validated as a whole.
//! - [`cluster`]: sources of Kubernetes objects, and what flannel wrote on them.
//! - [`plan`]: pure: objects to the tables that should be.
//! - [`kernel`]: facts of this host (links, addresses, next hops) by rtnetlink, and the slow path: the kernel's tunnel
//!   device, firewall and settings.
//! - [`modes`]: what the kernel alone lacks.
//! - [`dataplane`]: the BPF object: load, pin, attach, and the reconciler that makes the maps equal to the plan.
//! - [`sessions`]: translated connections for people: states, filters, counts.
//! - [`daemon`]: the loop that joins them, and the state that it publishes.
//! - [`metrics`]: all that is counted and measured, for Prometheus.
//! - [`cli`]: one file for each verb.

pub mod cli;
pub mod cluster;
pub mod config;
pub mod daemon;
pub mod dataplane;
pub mod kernel;
pub mod metrics;
pub mod modes;
pub mod plan;
pub mod sessions;
