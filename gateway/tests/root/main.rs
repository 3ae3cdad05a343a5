//! What needs root and a real kernel: maps, pins, attachments, next hops, the kernel's tunnel device.
//!
//! Every test runs on a thread of its own in fresh network and mount namespaces, so nothing of the host is touched
//! and nothing is left behind.

mod device;
mod firewall;
mod programs;
mod restart;
mod sandbox;
mod sessions;
mod tables;
mod tampered;
mod underlay;
