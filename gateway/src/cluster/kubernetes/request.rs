//! What is asked of the API server, and the right that each question needs.
//!
//! Every request is one of [`Request`]'s, so `deploy/rbac.yaml` can be compared with them; a test does.

use std::fmt;

use super::Kind;

/// The right that a request needs, as RBAC rules name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Right {
    /// What it does.
    pub verb: &'static str,
    /// API group, empty for the core.
    pub group: &'static str,
    /// Resource, and subresource behind a slash.
    pub resource: &'static str,
    /// Where; `None` is the whole cluster.
    pub namespace: Option<&'static str>,
}

impl fmt::Display for Right {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.verb, self.resource)?;
        if !self.group.is_empty() {
            write!(f, ".{}", self.group)?;
        }
        match self.namespace {
            Some(namespace) => write!(f, " in namespace {namespace}"),
            None => Ok(()),
        }
    }
}

/// Where flannel's own manifest, and older ones, keep its configuration.
pub const FLANNEL_NAMESPACES: [&str; 2] = ["kube-flannel", "kube-system"];
/// Where nodes' leases are.
pub const LEASE_NAMESPACE: &str = "kube-node-lease";
/// The ConfigMap that has flannel's `net-conf.json`.
pub const FLANNEL_CONFIG: &str = "kube-flannel-cfg";

/// A question or command to the API server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// All objects of a kind.
    List(Kind),
    /// What changes in a kind.
    Watch(Kind),
    /// flannel's configuration.
    NetConf(&'static str),
}

impl Request {
    /// Every request there is.
    pub fn all() -> impl Iterator<Item = Self> {
        let kinds = Kind::ALL.into_iter().flat_map(|kind| [Self::List(kind), Self::Watch(kind)]);
        kinds.chain(FLANNEL_NAMESPACES.map(Self::NetConf))
    }

    /// What it needs.
    pub fn right(self) -> Right {
        let core = |verb, resource, namespace| Right { verb, group: "", resource, namespace };
        match self {
            Self::List(kind) => core("list", kind.plural(), None),
            Self::Watch(kind) => core("watch", kind.plural(), None),
            Self::NetConf(namespace) => core("get", "configmaps", Some(namespace)),
        }
    }
}
