//! The engine on the host. Expectations come from etherparse, RFC tables and recorded frames, never from the engine.

mod fixture;

mod arp;
mod encapsulation;
mod fuzz;
mod ingress;
mod interleavings;
mod path_mtu;
mod snat;
