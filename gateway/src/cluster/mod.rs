//! Cluster objects: where they come from, and what the overlay network wrote on them.
//!
//! - [`model`]: the events that every source sends.
//! - [`kubernetes`]: the Kubernetes API.
//! - [`files`]: a watched directory of Kubernetes manifests.
//! - [`flannel`]: what flannel's annotations say about a Node, and where a Pod is.
//! - [`announce`]: the gateway's own Node.
//! - [`problem`]: what is wrong with an object, for people.

pub mod announce;
pub mod files;
pub mod flannel;
pub mod kubernetes;
pub mod model;
pub mod problem;
