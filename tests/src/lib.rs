//! The lab: network namespaces that play a client LAN, the gateway host and a flannel cluster.
//!
//! The cluster's side is the kernel's own VXLAN, bridges and routes, set up as flannel sets them up; none of it is
//! code of the gateway. So a suite that passes here says something about real nodes.
//!
//! - [`lab`]: hosts, wires, topologies, traffic, captures.
//! - [`api`]: a Kubernetes API server for tests, a process of its own.
//! - [`packet`]: frames, written by etherparse.
//! - [`bench`]: what the XDP program costs, measured and checked.
//! - [`pktgen`]: load by the kernel's packet generator.

pub mod api;
pub mod bench;
pub mod lab;
pub mod packet;
pub mod pktgen;
