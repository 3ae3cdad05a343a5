//! The resources that the server has.

use std::fmt;

/// A kind of object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Resource {
    Namespace,
    Node,
    Pod,
    ConfigMap,
    Lease,
}

impl Resource {
    pub(crate) const ALL: [Self; 5] = [Self::Namespace, Self::Node, Self::Pod, Self::ConfigMap, Self::Lease];

    /// API group, empty for the core.
    pub(crate) fn group(self) -> &'static str {
        match self {
            Self::Lease => "coordination.k8s.io",
            _ => "",
        }
    }

    pub(crate) fn api_version(self) -> &'static str {
        match self {
            Self::Lease => "coordination.k8s.io/v1",
            _ => "v1",
        }
    }

    /// Name in paths.
    pub(crate) fn plural(self) -> &'static str {
        match self {
            Self::Namespace => "namespaces",
            Self::Node => "nodes",
            Self::Pod => "pods",
            Self::ConfigMap => "configmaps",
            Self::Lease => "leases",
        }
    }

    pub(crate) fn kind(self) -> &'static str {
        match self {
            Self::Namespace => "Namespace",
            Self::Node => "Node",
            Self::Pod => "Pod",
            Self::ConfigMap => "ConfigMap",
            Self::Lease => "Lease",
        }
    }

    pub(crate) fn is_namespaced(self) -> bool {
        !matches!(self, Self::Namespace | Self::Node)
    }

    /// Whether status is written through a path of its own.
    pub(crate) fn has_status(self) -> bool {
        matches!(self, Self::Namespace | Self::Node | Self::Pod)
    }

    pub(crate) fn find(group: &str, plural: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|resource| resource.group() == group && resource.plural() == plural)
    }
}

impl fmt::Display for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.plural())?;
        if self.group().is_empty() { Ok(()) } else { write!(f, ".{}", self.group()) }
    }
}

/// Names an object of a resource; in the order in which lists have them.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Key {
    /// Empty for what has none.
    pub(crate) namespace: String,
    pub(crate) name: String,
}

impl Key {
    pub(crate) fn new(namespace: &str, name: &str) -> Self {
        Self { namespace: namespace.to_owned(), name: name.to_owned() }
    }
}
