//! From the text of one manifest file to objects.
//!
//! Every object is read by itself, so a bad one costs nobody else anything. Before it is read, it is reduced to the
//! fields that the gateway uses, so nonsense in a field that nobody reads does no harm. Items of a list are reduced as
//! they come: 150,000 Pods fit into memory, but their text as a tree of values does not.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::Arc,
};

use k8s_openapi::api::core::v1::{Node, Pod};
use serde::de::{Deserialize, DeserializeOwned, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use crate::cluster::{
    flannel::PodReading,
    model::{Object, ObjectRef},
    problem::Problem,
};

/// What a file says.
#[derive(Debug)]
pub(super) struct Manifest {
    file: Arc<str>,
    /// Its objects; the first one if it names one twice.
    pub(super) objects: BTreeMap<ObjectRef, Arc<Object>>,
    /// Objects that are there but cannot be read.
    pub(super) broken: BTreeSet<ObjectRef>,
    /// What is wrong.
    pub(super) problems: Vec<Problem>,
    /// Whether the file could be read to its end. If not, what is not in `objects` may still be meant.
    pub(super) complete: bool,
    /// How many objects were of kinds that the gateway does not use.
    pub(super) ignored: usize,
}

const NODE_FIELDS: Fields = &[
    ("metadata", &["name", "creationTimestamp", "deletionTimestamp", "annotations"]),
    ("spec", &["podCIDR", "podCIDRs"]),
    ("status", &["addresses"]),
];
const POD_FIELDS: Fields = &[
    ("metadata", &["name", "namespace", "creationTimestamp", "deletionTimestamp"]),
    ("spec", &["nodeName", "hostNetwork"]),
    ("status", &["phase", "podIP", "podIPs"]),
];
type Fields = &'static [(&'static str, &'static [&'static str])];

impl Manifest {
    /// Reads YAML: one or several documents.
    pub(super) fn from_yaml(file: &Arc<str>, text: &[u8]) -> Self {
        let options = serde_saphyr::options! {
            budget: serde_saphyr::budget! {
                // An event takes at least a byte of text, so honest files never meet these; what makes much out of
                // little (anchors, aliases, merge keys, depth) keeps the parser's own limits.
                max_reader_input_bytes: None,
                max_events: text.len() + 16,
                max_nodes: text.len() + 16,
                max_documents: text.len() + 16,
                max_total_scalar_bytes: text.len().max(1 << 20) * 4,
            },
            strict_booleans: true,
            with_snippet: false,
        };
        let mut reader = text;
        let documents = serde_saphyr::read_with_options::<_, Document>(&mut reader, options);
        Self::collect(file, documents.map(|document| document.map_err(|error| error.to_string())))
    }

    /// Reads JSON: one value, or several in a row.
    pub(super) fn from_json(file: &Arc<str>, text: &[u8]) -> Self {
        let documents = serde_json::Deserializer::from_slice(text).into_iter::<Document>();
        Self::collect(file, documents.map(|document| document.map_err(|error| error.to_string())))
    }

    fn collect(file: &Arc<str>, documents: impl Iterator<Item = Result<Document, String>>) -> Self {
        let mut manifest = Self {
            file: file.clone(),
            objects: BTreeMap::new(),
            broken: BTreeSet::new(),
            problems: Vec::new(),
            complete: true,
            ignored: 0,
        };
        let mut count = 0;
        for document in documents {
            count += 1;
            let place = format!("{file}, document {count}");
            match document {
                Ok(Document(Item::Object(reading))) => manifest.take(&place, *reading),
                Ok(Document(Item::Other(value))) => manifest.read(&place, value, None),
                Ok(Document(Item::List(object, items))) => manifest.list(&place, &object, items),
                Err(error) => {
                    manifest.complete = false;
                    manifest.problems.push(Problem::error(
                        place,
                        error,
                        "mend the syntax; until then what the file said before stays in force",
                    ));
                }
            }
        }
        if count == 0 {
            // A file that an editor has just truncated looks like this.
            manifest.complete = false;
            manifest.problems.push(Problem::error(
                file.as_ref(),
                "is empty",
                "remove the file to remove its objects, or write a List without items; until then what it said before stays in force",
            ));
        }
        manifest
    }

    /// Takes one object or a list. Items of typed lists have no kind of their own: `kind_of_list` is theirs.
    fn read(&mut self, place: &str, value: Value, kind_of_list: Option<&str>) {
        let Value::Object(mut object) = value else {
            self.unknown(place, "is not an object");
            return;
        };
        if object.contains_key("items") && kind_of(&object).is_some_and(|(_, kind)| kind.ends_with("List")) {
            match object.remove("items") {
                Some(Value::Array(items)) => {
                    let items = items.into_iter().map(Item::Other).collect();
                    self.list(place, &object, items);
                }
                // Go writes an empty list as null.
                Some(Value::Null) | None => {}
                Some(_) => {
                    self.problems.push(Problem::error(
                        format!("{place}, items"),
                        "is not a list",
                        "write one object under each dash",
                    ));
                    self.complete = false;
                }
            }
            return;
        }
        let of_list =
            kind_of_list.filter(|_| !object.contains_key("apiVersion") && !object.contains_key("kind"));
        let Some((version, kind)) = of_list.map(|kind| ("v1", kind)).or_else(|| kind_of(&object)) else {
            self.unknown(place, missing(&object));
            return;
        };
        match Reading::of(version, kind, &object) {
            Some(reading) => self.take(place, reading),
            None => self.ignored += 1,
        }
    }

    /// Takes a list, `object` being what is beside its items.
    fn list(&mut self, place: &str, object: &Map<String, Value>, items: Vec<Item>) {
        let Some((_, kind)) = kind_of(object) else {
            // A list that is cut off has no kind either: kubectl writes it behind the items.
            self.unknown(place, missing(object));
            return;
        };
        let Some(kind) = kind.strip_suffix("List") else {
            if items.iter().any(|item| matches!(item, Item::Object(_))) {
                self.unknown(place, &format!("has items, but is of kind {kind:?} instead of List"));
            } else {
                self.ignored += 1;
            }
            return;
        };
        let kind = Some(kind).filter(|kind| !kind.is_empty());
        for (index, item) in items.into_iter().enumerate() {
            let place = format!("{place}, item {}", index + 1);
            match item {
                Item::Object(reading) => self.take(&place, *reading),
                Item::Other(value) => self.read(&place, value, kind),
                Item::List(object, items) => self.list(&place, &object, items),
            }
        }
    }

    /// Notes that something is there, but not what it is; so nothing that was known may be taken as gone.
    fn unknown(&mut self, place: &str, what: &str) {
        self.problems.push(Problem::error(
            place,
            what,
            "a manifest has apiVersion and kind, such as apiVersion: v1 and kind: Node; until then what the file said \
             before stays in force",
        ));
        self.complete = false;
    }

    /// Takes an object.
    fn take(&mut self, place: &str, reading: Reading) {
        let (reference, object) = match reading {
            Reading::Nameless(kind) => {
                self.problems.push(Problem::error(
                    format!("{place}, {kind}, metadata.name"),
                    "is missing or no text",
                    "give the object the name that it has in the cluster",
                ));
                self.complete = false;
                return;
            }
            Reading::Named(reference, object) => (reference, object),
        };
        if self.objects.contains_key(&reference) || self.broken.contains(&reference) {
            self.problems.push(Problem::error(
                format!("{place}, {reference}"),
                "was already named earlier in this file",
                "remove one of the two; the first one counts",
            ));
            return;
        }
        match object {
            Ok(mut object) => {
                match &mut object {
                    Object::Node(_, origin) => *origin = place.into(),
                    Object::Pod(_, PodReading::Rejected(problem)) => problem.locate(&Some(place.into())),
                    // There are many, so all of a file share its name.
                    Object::Pod(_, PodReading::Placed(facts)) => facts.origin = Some(self.file.clone()),
                    Object::Pod(..) => {}
                }
                self.objects.insert(reference, Arc::new(object));
            }
            Err(Fault { path, what }) => {
                self.problems.push(Problem::error(
                    format!("{place}, {reference}, {path}"),
                    what,
                    "write the field as kubectl get -o yaml prints it; until then what the object said before stays in force",
                ));
                self.broken.insert(reference);
            }
        }
    }
}

/// Version and kind, if both are there.
fn kind_of(object: &Map<String, Value>) -> Option<(&str, &str)> {
    Some((object.get("apiVersion")?.as_str()?, object.get("kind")?.as_str()?))
}

fn missing(object: &Map<String, Value>) -> &'static str {
    if object.get("apiVersion").is_some_and(Value::is_string) { "has no kind" } else { "has no apiVersion" }
}

/// A field that cannot be read.
struct Fault {
    path: String,
    what: String,
}

/// A Node or Pod as it was read.
enum Reading {
    /// It does not say which one it is; its kind.
    Nameless(&'static str),
    Named(ObjectRef, Result<Object, Fault>),
}

impl Reading {
    /// Reads an object; `None` if it is of a kind that the gateway does not use.
    fn of(version: &str, kind: &str, object: &Map<String, Value>) -> Option<Self> {
        let metadata = |key: &str| object.get("metadata")?.get(key)?.as_str().filter(|text| !text.is_empty());
        let name = metadata("name");
        match (version, kind) {
            ("v1", "Node") => Some(match name {
                None => Self::Nameless("Node"),
                Some(name) => Self::Named(
                    ObjectRef::node(name),
                    typed(object, NODE_FIELDS).map(|node: Node| Object::Node(Box::new(node), "".into())),
                ),
            }),
            ("v1", "Pod") => Some(match name {
                None => Self::Nameless("Pod"),
                Some(name) => match typed(object, POD_FIELDS).map(|pod: Pod| Object::pod(&pod)) {
                    Ok(object) => Self::Named(object.reference(), Ok(object)),
                    Err(fault) => {
                        let namespace = metadata("namespace").unwrap_or("default");
                        Self::Named(ObjectRef::pod(namespace, name), Err(fault))
                    }
                },
            }),
            _ => None,
        }
    }
}

fn typed<T: DeserializeOwned>(object: &Map<String, Value>, fields: Fields) -> Result<T, Fault> {
    serde_path_to_error::deserialize(&Value::Object(reduce(object, fields)))
        .map_err(|error| Fault { path: error.path().to_string(), what: error.inner().to_string() })
}

/// One document of a file.
struct Document(Item);

/// A document, or an item of a list.
enum Item {
    /// A Node or Pod, read already.
    Object(Box<Reading>),
    /// A list: what is beside its items, and these.
    List(Map<String, Value>, Vec<Self>),
    /// Anything else.
    Other(Value),
}

impl<'de> Deserialize<'de> for Item {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        let reading = value.as_object().and_then(|object| {
            let (version, kind) = kind_of(object)?;
            Reading::of(version, kind, object)
        });
        Ok(reading.map_or(Self::Other(value), |reading| Self::Object(Box::new(reading))))
    }
}

impl<'de> Deserialize<'de> for Document {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Top;

        impl<'de> Visitor<'de> for Top {
            type Value = Document;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object with apiVersion and kind")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Document, A::Error> {
                let mut object = Map::new();
                let mut list = None;
                while let Some(key) = map.next_key::<String>()? {
                    if key == "items" {
                        match map.next_value()? {
                            Items::List(items) => list = Some(items),
                            Items::Other(value) => {
                                object.insert(key, value);
                            }
                        }
                    } else {
                        object.insert(key, map.next_value()?);
                    }
                }
                Ok(Document(match list {
                    Some(items) => Item::List(object, items),
                    None => Item::Other(Value::Object(object)),
                }))
            }
        }

        deserializer.deserialize_map(Top)
    }
}

/// What stands under `items`.
enum Items {
    List(Vec<Item>),
    Other(Value),
}

impl<'de> Deserialize<'de> for Items {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Sequence;

        impl<'de> Visitor<'de> for Sequence {
            type Value = Items;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of objects")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Items, A::Error> {
                let mut items = Vec::new();
                while let Some(item) = sequence.next_element()? {
                    items.push(item);
                }
                Ok(Items::List(items))
            }

            fn visit_unit<E>(self) -> Result<Items, E> {
                Ok(Items::Other(Value::Null))
            }

            fn visit_none<E>(self) -> Result<Items, E> {
                Ok(Items::Other(Value::Null))
            }

            fn visit_bool<E>(self, value: bool) -> Result<Items, E> {
                Ok(Items::Other(value.into()))
            }

            fn visit_i64<E>(self, value: i64) -> Result<Items, E> {
                Ok(Items::Other(value.into()))
            }

            fn visit_u64<E>(self, value: u64) -> Result<Items, E> {
                Ok(Items::Other(value.into()))
            }

            fn visit_f64<E>(self, value: f64) -> Result<Items, E> {
                Ok(Items::Other(value.into()))
            }

            fn visit_str<E>(self, value: &str) -> Result<Items, E> {
                Ok(Items::Other(value.into()))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Items, A::Error> {
                let mut object = Map::new();
                while let Some((key, value)) = map.next_entry()? {
                    object.insert(key, value);
                }
                Ok(Items::Other(Value::Object(object)))
            }
        }

        deserializer.deserialize_any(Sequence)
    }
}

/// Keeps the fields that the gateway uses. A section of the wrong type stays, so that it is reported.
fn reduce(object: &Map<String, Value>, fields: Fields) -> Map<String, Value> {
    fields
        .iter()
        .filter_map(|(section, keys)| {
            let value = match object.get(*section)? {
                Value::Object(content) => Value::Object(
                    keys.iter()
                        .filter_map(|key| Some(((*key).to_owned(), content.get(*key)?.clone())))
                        .collect(),
                ),
                other => other.clone(),
            };
            Some(((*section).to_owned(), value))
        })
        .collect()
}
