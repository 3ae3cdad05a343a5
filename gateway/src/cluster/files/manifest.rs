//! From the text of one manifest file to objects.
//!
//! Every object is read by itself, so a bad one costs nobody else anything. Before it is read, it is reduced to the
//! fields that the gateway uses: 150,000 Pods fit into memory, and nonsense in a field that nobody reads does no harm.

use std::{collections::BTreeMap, sync::Arc};

use k8s_openapi::api::core::v1::{Node, Pod};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::cluster::{
    model::{Object, ObjectRef},
    problem::Problem,
};

/// What a file says.
#[derive(Debug, Default)]
pub(super) struct Manifest {
    /// Its objects; the first one if it names one twice.
    pub(super) objects: BTreeMap<ObjectRef, Arc<Object>>,
    /// Objects that are there but cannot be read.
    pub(super) broken: Vec<ObjectRef>,
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
    pub(super) fn from_yaml(file: &str, text: &[u8]) -> Self {
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
        let documents = serde_saphyr::read_with_options::<_, Value>(&mut reader, options);
        Self::collect(file, documents.map(|document| document.map_err(|error| error.to_string())))
    }

    /// Reads JSON: one value, or several in a row.
    pub(super) fn from_json(file: &str, text: &[u8]) -> Self {
        let documents = serde_json::Deserializer::from_slice(text).into_iter::<Value>();
        Self::collect(file, documents.map(|document| document.map_err(|error| error.to_string())))
    }

    fn collect(file: &str, documents: impl Iterator<Item = Result<Value, String>>) -> Self {
        let mut manifest = Self { complete: true, ..Self::default() };
        let mut count = 0;
        for document in documents {
            count += 1;
            let place = format!("{file}, document {count}");
            match document {
                Ok(value) => manifest.read(&place, value, None),
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
                file,
                "is empty",
                "remove the file to remove its objects, or write a List without items; until then what it said before stays in force",
            ));
        }
        manifest
    }

    /// Takes one object or a list. Items of typed lists have no kind of their own: `kind_of_list` is theirs.
    fn read(&mut self, place: &str, value: Value, kind_of_list: Option<&str>) {
        let Value::Object(mut object) = value else {
            self.problems.push(Problem::error(
                place,
                "is not an object",
                "a manifest starts with apiVersion and kind",
            ));
            return;
        };
        let text = |key: &str| object.get(key).and_then(Value::as_str).map(str::to_owned);
        let (version, kind) = match (text("apiVersion"), text("kind"), kind_of_list) {
            (Some(version), Some(kind), _) => (version, kind),
            (None, None, Some(kind)) => ("v1".to_owned(), kind.to_owned()),
            (version, _, _) => {
                let missing = if version.is_none() { "apiVersion" } else { "kind" };
                self.problems.push(Problem::error(
                    place,
                    format!("has no {missing}"),
                    "a manifest starts with apiVersion and kind, such as apiVersion: v1 and kind: Node",
                ));
                return;
            }
        };
        match (version.as_str(), kind.as_str()) {
            ("v1", "Node") => {
                self.object::<Node>(place, &object, &kind, NODE_FIELDS, |node| Object::Node(Box::new(node)));
            }
            ("v1", "Pod") => {
                self.object::<Pod>(place, &object, &kind, POD_FIELDS, |pod| Object::Pod(Box::new(pod)));
            }
            (_, list) if list.ends_with("List") && object.contains_key("items") => {
                let kind = list.strip_suffix("List").filter(|kind| !kind.is_empty());
                match object.remove("items") {
                    Some(Value::Array(items)) => {
                        for (index, item) in items.into_iter().enumerate() {
                            self.read(&format!("{place}, item {}", index + 1), item, kind);
                        }
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
            }
            _ => self.ignored += 1,
        }
    }

    fn object<T: DeserializeOwned>(
        &mut self,
        place: &str,
        object: &Map<String, Value>,
        kind: &str,
        fields: Fields,
        wrap: impl Fn(T) -> Object,
    ) {
        let metadata = |key: &str| object.get("metadata")?.get(key)?.as_str().filter(|text| !text.is_empty());
        let Some(name) = metadata("name") else {
            self.problems.push(Problem::error(
                format!("{place}, {kind}, metadata.name"),
                "is missing or no text",
                "give the object the name that it has in the cluster",
            ));
            self.complete = false;
            return;
        };
        let reference = match kind {
            "Node" => ObjectRef::node(name),
            _ => ObjectRef::pod(metadata("namespace").unwrap_or("default"), name),
        };
        if self.objects.contains_key(&reference) || self.broken.contains(&reference) {
            self.problems.push(Problem::error(
                format!("{place}, {reference}"),
                "was already named earlier in this file",
                "remove one of the two; the first one counts",
            ));
            return;
        }
        let reduced = Value::Object(reduce(object, fields));
        match serde_path_to_error::deserialize::<_, T>(&reduced) {
            Ok(typed) => {
                self.objects.insert(reference, Arc::new(wrap(typed)));
            }
            Err(error) => {
                self.problems.push(Problem::error(
                    format!("{place}, {reference}, {}", error.path()),
                    error.inner().to_string(),
                    "write the field as kubectl get -o yaml prints it; until then what the object said before stays in force",
                ));
                self.broken.push(reference);
            }
        }
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
