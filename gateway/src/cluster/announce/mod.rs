//! Makes the gateway known to flannel: a Node of its own, kept as it should be, and removed as a whole.
//!
//! - [`choose`]: its subnet, where the configuration leaves that open.
//! - [`node`]: pure: what the Node says, whom it would collide with, and what to do about the one that is there.
//! - [`keep`]: carries that out, once or continuously, and keeps the Node's heart beating.

mod choose;
mod keep;
mod node;

pub use self::{
    choose::{Settled, settle},
    keep::{Done, Refusal, apply, keep, remove},
    node::Announcement,
};

#[cfg(test)]
mod tests;
