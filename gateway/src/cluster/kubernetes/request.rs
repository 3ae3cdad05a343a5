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
    /// The gateway's own Node.
    GetNode,
    /// Server-side apply makes it, too.
    CreateNode,
    /// Change it.
    PatchNode,
    /// Remove it.
    DeleteNode,
    /// Say that it is ready.
    PatchNodeStatus,
    /// Make its lease.
    CreateLease,
    /// Renew it.
    PatchLease,
    /// Remove it.
    DeleteLease,
}

impl Request {
    /// Every request there is.
    pub fn all() -> impl Iterator<Item = Self> {
        let kinds = Kind::ALL.into_iter().flat_map(|kind| [Self::List(kind), Self::Watch(kind)]);
        kinds.chain(FLANNEL_NAMESPACES.map(Self::NetConf)).chain([
            Self::GetNode,
            Self::CreateNode,
            Self::PatchNode,
            Self::DeleteNode,
            Self::PatchNodeStatus,
            Self::CreateLease,
            Self::PatchLease,
            Self::DeleteLease,
        ])
    }

    /// What it needs.
    pub fn right(self) -> Right {
        let core = |verb, resource, namespace| Right { verb, group: "", resource, namespace };
        let lease = |verb| Right {
            verb,
            group: "coordination.k8s.io",
            resource: "leases",
            namespace: Some(LEASE_NAMESPACE),
        };
        match self {
            Self::List(kind) => core("list", kind.plural(), None),
            Self::Watch(kind) => core("watch", kind.plural(), None),
            Self::NetConf(namespace) => core("get", "configmaps", Some(namespace)),
            Self::GetNode => core("get", "nodes", None),
            Self::CreateNode => core("create", "nodes", None),
            Self::PatchNode => core("patch", "nodes", None),
            Self::DeleteNode => core("delete", "nodes", None),
            Self::PatchNodeStatus => core("patch", "nodes/status", None),
            Self::CreateLease => lease("create"),
            Self::PatchLease => lease("patch"),
            Self::DeleteLease => lease("delete"),
        }
    }
}
