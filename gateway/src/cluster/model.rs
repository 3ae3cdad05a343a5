//! The events that every source of cluster objects sends.
//!
//! A source begins with [`Event::Listing`], sends everything that exists, and says [`Event::Synced`]. What was known
//! before and was not named in between is gone. After that it sends what changes, and may list again at any time.
//! Until `Synced` nothing that was known goes away, so a source that restarts never takes entries from under traffic.
//! A source of which a part cannot be read says [`Event::Listed`] first: what it named counts, what it did not name
//! stays as it was.

use std::{fmt, sync::Arc};

use k8s_openapi::api::core::v1::{Node, Pod};

use super::flannel::{PodReading, read_pod};

/// A cluster object that matters to the gateway.
///
/// What a Node means depends on the overlay, so it comes as it is. A Pod means the same to all of them, and there are
/// many: what was read of it is a tenth of the object.
#[derive(Clone, Debug, PartialEq)]
pub enum Object {
    /// A Node, and where the source has it from (file and item), for people; empty if the name says enough.
    Node(Box<Node>, Arc<str>),
    /// A Pod, and where it is.
    Pod(PodRef, PodReading),
}

impl Object {
    /// What matters of a Pod. Without a namespace it is in `default`, as `kubectl apply` would put it.
    pub fn pod(pod: &Pod) -> Self {
        let reference = PodRef {
            namespace: pod
                .metadata
                .namespace
                .as_deref()
                .filter(|text| !text.is_empty())
                .unwrap_or("default")
                .into(),
            name: pod.metadata.name.as_deref().unwrap_or_default().into(),
        };
        let reading = read_pod(pod, &reference);
        Self::Pod(reference, reading)
    }

    /// Its identity.
    pub fn reference(&self) -> ObjectRef {
        match self {
            Self::Node(node, _) => ObjectRef::node(node.metadata.name.as_deref().unwrap_or_default()),
            Self::Pod(pod, _) => ObjectRef::Pod(pod.clone()),
        }
    }
}

/// Names an object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ObjectRef {
    /// A Node by name.
    Node(Arc<str>),
    /// A Pod.
    Pod(PodRef),
}

/// Names a Pod.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PodRef {
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its name within the namespace.
    pub name: Arc<str>,
}

impl ObjectRef {
    /// Names a Node.
    pub fn node(name: &str) -> Self {
        Self::Node(name.into())
    }

    /// Names a Pod.
    pub fn pod(namespace: &str, name: &str) -> Self {
        Self::Pod(PodRef { namespace: namespace.into(), name: name.into() })
    }
}

impl fmt::Display for PodRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pod {}/{}", self.namespace, self.name)
    }
}

impl fmt::Display for ObjectRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Node(name) => write!(f, "Node {name}"),
            Self::Pod(pod) => pod.fmt(f),
        }
    }
}

/// What a source says.
#[derive(Clone, Debug)]
pub enum Event {
    /// A full listing begins.
    Listing,
    /// The object exists, and this is what it says now.
    Apply(Arc<Object>),
    /// The object is gone.
    Delete(ObjectRef),
    /// The listing is complete.
    Synced,
    /// Everything that can be read has been named; [`Self::Synced`] follows when the rest has been read as well.
    Listed {
        /// Pods are among it. If not, only some may have been named, and those say nothing without the others: another
        /// pod may have a better claim to their addresses.
        pods: bool,
    },
}
