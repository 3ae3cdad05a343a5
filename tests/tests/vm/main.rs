//! End to end inside of a virtual machine (`cargo xtask test vm`): the flannel lab with a network card in it.
//!
//! What a virtual machine adds to the lab is a driver that runs XDP itself, and another kernel. So one wire of the lab goes
//! through the machine's two virtio network interfaces ([`cable`]); everything else is as in the other suites.

mod cable;
mod load;
mod rig;
mod virtio;
mod vlan;
