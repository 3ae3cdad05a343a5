//! What the API server sends, cut down to what the gateway uses while it is read.
//!
//! A Pod is several kilobytes of JSON and a few dozen bytes of facts, and there may be 150,000: nothing else of it is
//! ever in memory, apart from the page that it came with. An object that cannot be understood costs nobody else
//! anything.

use std::{collections::HashSet, fmt, marker::PhantomData, sync::Arc};

use k8s_openapi::{
    api::core::v1 as core,
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time},
};
use serde::{
    Deserialize,
    de::{
        DeserializeOwned, DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess,
        Visitor,
    },
};
use serde_json::value::RawValue;

use super::Kind;
use crate::cluster::{
    flannel::{PodReading, read_pod},
    model::{Object, ObjectRef, PodRef},
    problem::Problem,
};

/// An object as it was sent.
#[derive(Debug)]
pub(super) enum Item {
    /// It can be used.
    Good(ObjectRef, Arc<Object>),
    /// It is there, but makes no sense; which one it is, if that could be read.
    Bad(Option<ObjectRef>, Problem),
}

/// A page of a list.
#[derive(Debug, Default)]
pub(super) struct Page {
    pub(super) items: Vec<Item>,
}

/// What stands beside the items of a page.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct ListMeta {
    pub(super) resource_version: String,
    #[serde(rename = "continue")]
    pub(super) token: Option<String>,
}

/// An event of a watch.
#[derive(Debug)]
pub(super) enum WatchEvent {
    /// The object is there, or changed.
    Put(Item),
    /// It is gone.
    Gone(Option<ObjectRef>),
    /// Nothing happened up to a version.
    Bookmark,
    /// The watch is over; HTTP status and message.
    Error(u16, String),
}

/// Fields of the metadata of any object.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Metadata {
    name: Option<String>,
    namespace: Option<String>,
    creation_timestamp: Option<Time>,
    deletion_timestamp: Option<Time>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Pod {
    metadata: Metadata,
    #[serde(default)]
    spec: Option<PodSpec>,
    #[serde(default)]
    status: Option<PodStatus>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct PodSpec {
    node_name: Option<String>,
    host_network: Option<bool>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct PodStatus {
    phase: Option<String>,
    #[serde(rename = "podIP")]
    pod_ip: Option<String>,
    #[serde(rename = "podIPs")]
    pod_ips: Option<Vec<core::PodIP>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Node {
    metadata: NodeMetadata,
    #[serde(default)]
    spec: Option<NodeSpec>,
    #[serde(default)]
    status: Option<NodeStatus>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct NodeMetadata {
    name: Option<String>,
    creation_timestamp: Option<Time>,
    deletion_timestamp: Option<Time>,
    annotations: Option<std::collections::BTreeMap<String, String>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct NodeSpec {
    #[serde(rename = "podCIDR")]
    pod_cidr: Option<String>,
    #[serde(rename = "podCIDRs")]
    pod_cidrs: Option<Vec<String>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct NodeStatus {
    addresses: Option<Vec<core::NodeAddress>>,
}

/// Reads objects of one kind. It keeps the names that many objects share, so that each is in memory once.
#[derive(Debug)]
pub(super) struct Decoder {
    kind: Kind,
    /// What stands before the annotations that matter.
    prefixes: Arc<[String]>,
    names: HashSet<Arc<str>>,
}

impl Decoder {
    pub(super) fn new(kind: Kind, prefixes: Arc<[String]>) -> Self {
        Self { kind, prefixes, names: HashSet::new() }
    }

    /// Reads a page. `head` is told what stands beside the items as soon as that is known, which on real servers is
    /// before the items are read.
    ///
    /// # Errors
    ///
    /// It is no page at all.
    pub(super) fn page(&mut self, text: &[u8], mut head: impl FnMut(ListMeta)) -> Result<Page, String> {
        let read = match self.kind {
            Kind::Node => self.typed_page::<Node>(text, &mut head),
            Kind::Pod => self.typed_page::<Pod>(text, &mut head),
        };
        // One bad item spoils the whole page for that reader; this one takes them one by one.
        read.or_else(|_| self.page_by_items(text, head))
    }

    fn typed_page<T: Trimmed>(
        &mut self,
        text: &[u8],
        head: &mut impl FnMut(ListMeta),
    ) -> Result<Page, serde_json::Error> {
        let mut page = Page::default();
        let mut items = |object: T| page.items.push(object.item(self));
        let seed = PageSeed { head, items: &mut items, of: PhantomData };
        let mut reader = serde_json::Deserializer::from_slice(text);
        seed.deserialize(&mut reader)?;
        reader.end()?;
        Ok(page)
    }

    fn page_by_items(&mut self, text: &[u8], mut head: impl FnMut(ListMeta)) -> Result<Page, String> {
        #[derive(Deserialize)]
        struct Raw<'a> {
            metadata: ListMeta,
            #[serde(borrow)]
            items: &'a RawValue,
        }
        let raw: Raw<'_> = serde_json::from_slice(text).map_err(|error| error.to_string())?;
        let items: Option<Vec<&RawValue>> =
            serde_json::from_str(raw.items.get()).map_err(|error| error.to_string())?;
        head(raw.metadata);
        let items = items.into_iter().flatten().map(|item| self.object(item)).collect();
        Ok(Page { items })
    }

    /// Reads one line of a watch; with the object's version.
    ///
    /// # Errors
    ///
    /// It is no event at all.
    pub(super) fn line(&mut self, line: &[u8]) -> Result<(WatchEvent, Option<String>), String> {
        #[derive(Deserialize)]
        struct Line<'a> {
            #[serde(rename = "type")]
            kind: &'a str,
            #[serde(borrow)]
            object: &'a RawValue,
        }
        let line: Line<'_> = serde_json::from_slice(line).map_err(|error| error.to_string())?;
        let version = version(line.object);
        let event = match line.kind {
            "ADDED" | "MODIFIED" => WatchEvent::Put(self.object(line.object)),
            "DELETED" => WatchEvent::Gone(self.reference(line.object)),
            "BOOKMARK" => WatchEvent::Bookmark,
            "ERROR" => {
                let status: kube::core::Status =
                    serde_json::from_str(line.object.get()).map_err(|error| error.to_string())?;
                WatchEvent::Error(status.code, status.message)
            }
            other => return Err(format!("an event of unknown type {other:?}")),
        };
        Ok((event, version))
    }

    /// Reads an object that stands alone.
    fn object(&mut self, text: &RawValue) -> Item {
        let read = match self.kind {
            Kind::Node => typed::<Node>(text).map(|node| node.item(self)),
            Kind::Pod => typed::<Pod>(text).map(|pod| pod.item(self)),
        };
        read.unwrap_or_else(|(path, what)| {
            let reference = self.reference(text);
            let name = reference.as_ref().map_or_else(|| format!("a {}", self.kind.name()), ToString::to_string);
            let problem = Problem::error(
                format!("{name}, {path}"),
                what,
                "the API server sends what its own schema forbids: what was known of the object stays in force until then",
            );
            Item::Bad(reference, problem)
        })
    }

    /// Which object it is.
    fn reference(&mut self, text: &RawValue) -> Option<ObjectRef> {
        #[derive(Deserialize)]
        struct Named {
            metadata: Metadata,
        }
        let Named { metadata } = serde_json::from_str(text.get()).ok()?;
        let name = metadata.name.filter(|name| !name.is_empty())?;
        Some(match self.kind {
            Kind::Node => ObjectRef::node(&name),
            Kind::Pod => ObjectRef::Pod(PodRef {
                namespace: self.name(metadata.namespace.as_deref().unwrap_or_default()),
                name: name.into(),
            }),
        })
    }

    /// The one copy of a name that many objects have.
    fn name(&mut self, text: &str) -> Arc<str> {
        if let Some(known) = self.names.get(text) {
            return known.clone();
        }
        let name: Arc<str> = text.into();
        self.names.insert(name.clone());
        name
    }
}

/// An object that was cut down.
trait Trimmed: DeserializeOwned {
    fn item(self, decoder: &mut Decoder) -> Item;
}

impl Trimmed for Pod {
    fn item(self, decoder: &mut Decoder) -> Item {
        let Self { metadata, spec, status } = self;
        let Some(name) = metadata.name.filter(|name| !name.is_empty()) else { return nameless("Pod") };
        let reference = PodRef {
            namespace: decoder.name(metadata.namespace.as_deref().unwrap_or_default()),
            name: name.into(),
        };
        let PodSpec { node_name, host_network } = spec.unwrap_or_default();
        let PodStatus { phase, pod_ip, pod_ips } = status.unwrap_or_default();
        let pod = core::Pod {
            metadata: ObjectMeta {
                creation_timestamp: metadata.creation_timestamp,
                deletion_timestamp: metadata.deletion_timestamp,
                ..ObjectMeta::default()
            },
            spec: Some(core::PodSpec { node_name, host_network, ..core::PodSpec::default() }),
            status: Some(core::PodStatus { phase, pod_ip, pod_ips, ..core::PodStatus::default() }),
        };
        let mut reading = read_pod(&pod, &reference);
        if let PodReading::Placed(facts) = &mut reading {
            facts.node = decoder.name(&facts.node);
        }
        Item::Good(ObjectRef::Pod(reference.clone()), Arc::new(Object::Pod(reference, reading)))
    }
}

impl Trimmed for Node {
    fn item(self, decoder: &mut Decoder) -> Item {
        let Self { metadata, spec, status } = self;
        let Some(name) = metadata.name.filter(|name| !name.is_empty()) else { return nameless("Node") };
        let mut annotations = metadata.annotations.unwrap_or_default();
        annotations.retain(|key, _| decoder.prefixes.iter().any(|prefix| key.starts_with(prefix)));
        let reference = ObjectRef::node(&name);
        let node = core::Node {
            metadata: ObjectMeta {
                name: Some(name),
                creation_timestamp: metadata.creation_timestamp,
                deletion_timestamp: metadata.deletion_timestamp,
                annotations: Some(annotations),
                ..ObjectMeta::default()
            },
            spec: spec.map(|spec| core::NodeSpec {
                pod_cidr: spec.pod_cidr,
                pod_cidrs: spec.pod_cidrs,
                ..core::NodeSpec::default()
            }),
            status: status.map(|status| core::NodeStatus {
                addresses: status.addresses,
                ..core::NodeStatus::default()
            }),
        };
        Item::Good(reference, Arc::new(Object::Node(Box::new(node), "".into())))
    }
}

fn nameless(kind: &str) -> Item {
    let problem = Problem::error(format!("a {kind}, metadata.name"), "is missing", "look at the API server");
    Item::Bad(None, problem)
}

fn typed<T: DeserializeOwned>(text: &RawValue) -> Result<T, (String, String)> {
    let mut reader = serde_json::Deserializer::from_str(text.get());
    serde_path_to_error::deserialize(&mut reader)
        .map_err(|error| (error.path().to_string(), error.inner().to_string()))
}

/// An object's version, wherever else it makes no sense.
fn version(object: &RawValue) -> Option<String> {
    #[derive(Deserialize)]
    struct Versioned {
        metadata: Meta,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Meta {
        resource_version: Option<String>,
    }
    serde_json::from_str::<Versioned>(object.get()).ok()?.metadata.resource_version
}

/// Reads a page, handing over what it finds on the way.
struct PageSeed<'a, T, H, I> {
    head: &'a mut H,
    items: &'a mut I,
    of: PhantomData<T>,
}

impl<'de, T: Trimmed, H: FnMut(ListMeta), I: FnMut(T)> DeserializeSeed<'de> for PageSeed<'_, T, H, I> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de, T: Trimmed, H: FnMut(ListMeta), I: FnMut(T)> Visitor<'de> for PageSeed<'_, T, H, I> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of objects")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        enum Key {
            Metadata,
            Items,
            #[serde(other)]
            Other,
        }
        let (mut headed, mut listed) = (false, false);
        while let Some(key) = map.next_key::<Key>()? {
            match key {
                Key::Metadata => {
                    (self.head)(map.next_value()?);
                    headed = true;
                }
                Key::Items => {
                    map.next_value_seed(ItemsSeed { items: &mut *self.items, of: PhantomData })?;
                    listed = true;
                }
                Key::Other => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        // An empty list has items too. What has none is some other object, and says nothing about what exists.
        match (headed, listed) {
            (true, true) => Ok(()),
            (false, _) => Err(A::Error::missing_field("metadata")),
            (true, false) => Err(A::Error::missing_field("items")),
        }
    }
}

struct ItemsSeed<'a, T, I> {
    items: &'a mut I,
    of: PhantomData<T>,
}

impl<'de, T: Trimmed, I: FnMut(T)> DeserializeSeed<'de> for ItemsSeed<'_, T, I> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de, T: Trimmed, I: FnMut(T)> Visitor<'de> for ItemsSeed<'_, T, I> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("objects")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<(), A::Error> {
        while let Some(object) = sequence.next_element()? {
            (self.items)(object);
        }
        Ok(())
    }

    /// Go writes an empty list as null.
    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }
}
