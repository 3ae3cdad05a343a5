//! Field ownership: what server-side apply knows of managers, in the form of `metadata.managedFields`.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use crate::resource::Resource;

/// One step into an object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Step {
    /// Field of a map.
    Field(String),
    /// Item of a list of maps, by its key fields as JSON.
    Item(String),
    /// Member of a list that is a set, as JSON.
    Member(String),
}

/// Where a value is in an object.
pub(crate) type Path = Vec<Step>;

/// How a list is merged.
enum List {
    /// As one value.
    Atomic,
    /// By members.
    Set,
    /// By a key field of its items.
    Map(&'static str),
}

/// The merge rules of the API's schema for the lists that matter here; all others are taken as one value.
fn list_rule(resource: Resource, path: &[Step]) -> List {
    let names: Vec<&str> = path
        .iter()
        .filter_map(|step| match step {
            Step::Field(name) => Some(name.as_str()),
            Step::Item(_) | Step::Member(_) => None,
        })
        .collect();
    match (resource, names.as_slice()) {
        (_, ["metadata", "ownerReferences"]) => List::Map("uid"),
        (_, ["metadata", "finalizers"]) | (Resource::Node, ["spec", "podCIDRs"]) => List::Set,
        (Resource::Node | Resource::Pod, ["status", "conditions"])
        | (Resource::Node, ["status", "addresses"]) => List::Map("type"),
        (Resource::Pod, ["spec", "containers"]) => List::Map("name"),
        (Resource::Pod, ["status", "podIPs"]) => List::Map("ip"),
        _ => List::Atomic,
    }
}

/// Nobody owns these.
fn is_system(path: &[Step]) -> bool {
    const METADATA: [&str; 9] = [
        "name",
        "namespace",
        "uid",
        "resourceVersion",
        "creationTimestamp",
        "generation",
        "managedFields",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
    ];
    match path {
        [Step::Field(top)] => top == "apiVersion" || top == "kind",
        [Step::Field(top), Step::Field(name)] => top == "metadata" && METADATA.contains(&name.as_str()),
        _ => false,
    }
}

/// The leaves of an object.
pub(crate) fn leaves(resource: Resource, object: &Value) -> BTreeSet<Path> {
    let mut found = BTreeSet::new();
    walk(resource, object, &mut Vec::new(), &mut found);
    found
}

fn walk(resource: Resource, value: &Value, path: &mut Path, found: &mut BTreeSet<Path>) {
    if is_system(path) {
        return;
    }
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            for (name, value) in fields {
                path.push(Step::Field(name.clone()));
                walk(resource, value, path, found);
                path.pop();
            }
        }
        Value::Array(items) if !items.is_empty() => match list_rule(resource, path) {
            List::Atomic => {
                found.insert(path.clone());
            }
            List::Set => found.extend(items.iter().map(|item| {
                let mut path = path.clone();
                path.push(Step::Member(item.to_string()));
                path
            })),
            List::Map(key) => {
                for item in items {
                    path.push(Step::Item(json!({ key: item[key] }).to_string()));
                    walk(resource, item, path, found);
                    path.pop();
                }
            }
        },
        _ => {
            if !path.is_empty() {
                found.insert(path.clone());
            }
        }
    }
}

/// The value at a path.
pub(crate) fn get<'v>(value: &'v Value, path: &[Step]) -> Option<&'v Value> {
    path.iter().try_fold(value, |value, step| match step {
        Step::Field(name) => value.get(name),
        Step::Item(key) => value.as_array()?.iter().find(|item| is_item(item, key)),
        Step::Member(member) => value.as_array()?.iter().find(|item| is_member(item, member)),
    })
}

/// Whether an item of a list has the key fields.
fn is_item(item: &Value, key: &str) -> bool {
    let Ok(Value::Object(key)) = serde_json::from_str(key) else { return false };
    key.iter().all(|(name, value)| item.get(name) == Some(value))
}

/// Whether an item of a set is the one that JSON text stands for.
fn is_member(item: &Value, member: &str) -> bool {
    serde_json::from_str::<Value>(member).is_ok_and(|member| member == *item)
}

/// Puts a value at a path, with what is needed on the way.
pub(crate) fn set(target: &mut Value, path: &[Step], value: Value) {
    let Some((step, rest)) = path.split_first() else {
        *target = value;
        return;
    };
    match step {
        Step::Field(name) => {
            if !target.is_object() {
                *target = json!({});
            }
            set(&mut target[name.as_str()], rest, value);
        }
        Step::Item(key) => {
            if !target.is_array() {
                *target = json!([]);
            }
            let Some(items) = target.as_array_mut() else { return };
            let at = items.iter().position(|item| is_item(item, key)).unwrap_or_else(|| {
                items.push(serde_json::from_str(key).unwrap_or_default());
                items.len() - 1
            });
            set(&mut items[at], rest, value);
        }
        Step::Member(member) => {
            if !target.is_array() {
                *target = json!([]);
            }
            let Some(items) = target.as_array_mut() else { return };
            if !items.iter().any(|item| is_member(item, member)) {
                items.push(value);
            }
        }
    }
}

/// Removes the value at a path, and maps and items that are empty then.
pub(crate) fn remove(target: &mut Value, path: &[Step]) {
    let Some((step, rest)) = path.split_first() else { return };
    match step {
        Step::Field(name) => {
            let Some(fields) = target.as_object_mut() else { return };
            if let Some(value) = fields.get_mut(name)
                && !rest.is_empty()
            {
                remove(value, rest);
                let empty = value.as_object().is_some_and(Map::is_empty)
                    || value.as_array().is_some_and(Vec::is_empty);
                if !empty {
                    return;
                }
            }
            fields.remove(name);
        }
        Step::Item(key) => {
            let Some(items) = target.as_array_mut() else { return };
            let Some(at) = items.iter().position(|item| is_item(item, key)) else { return };
            remove(&mut items[at], rest);
            let only_key = items[at].as_object().is_none_or(|item| item.len() <= 1);
            if rest.is_empty() || only_key {
                items.remove(at);
            }
        }
        Step::Member(member) => {
            if let Some(items) = target.as_array_mut() {
                items.retain(|item| !is_member(item, member));
            }
        }
    }
}

/// As a person reads it: `.metadata.annotations.example`.
pub(crate) fn display(path: &[Step]) -> String {
    path.iter()
        .map(|step| match step {
            Step::Field(name) => format!(".{name}"),
            Step::Item(key) => {
                let Ok(Value::Object(key)) = serde_json::from_str(key) else { return String::new() };
                let fields: Vec<String> = key.iter().map(|(name, value)| format!("{name}={value}")).collect();
                format!("[{}]", fields.join(","))
            }
            Step::Member(member) => format!("[={member}]"),
        })
        .collect()
}

/// The form of `fieldsV1`.
pub(crate) fn encode(paths: &BTreeSet<Path>) -> Value {
    let mut root = json!({});
    for path in paths {
        let mut at = &mut root;
        for step in path {
            let name = match step {
                Step::Field(name) => format!("f:{name}"),
                Step::Item(key) => format!("k:{key}"),
                Step::Member(member) => format!("v:{member}"),
            };
            at = &mut at[name];
            if at.is_null() {
                *at = json!({});
            }
        }
    }
    root
}

pub(crate) fn decode(fields: &Value) -> BTreeSet<Path> {
    fn descend(fields: &Value, path: &mut Path, found: &mut BTreeSet<Path>) {
        let Some(entries) = fields.as_object() else { return };
        let mut leaf = true;
        for (name, below) in entries {
            let step = match name.split_once(':') {
                Some(("f", name)) => Step::Field(name.to_owned()),
                Some(("k", key)) => Step::Item(key.to_owned()),
                Some(("v", member)) => Step::Member(member.to_owned()),
                _ => continue,
            };
            leaf = false;
            path.push(step);
            descend(below, path, found);
            path.pop();
        }
        if leaf && !path.is_empty() {
            found.insert(path.clone());
        }
    }
    let mut found = BTreeSet::new();
    descend(fields, &mut Vec::new(), &mut found);
    found
}

/// What a manager owns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Owner {
    pub(crate) manager: String,
    /// `Apply` or `Update`.
    pub(crate) operation: String,
    pub(crate) subresource: String,
    pub(crate) time: String,
    pub(crate) fields: BTreeSet<Path>,
}

/// Who owns what of an object.
pub(crate) fn owners(object: &Value) -> Vec<Owner> {
    let text = |entry: &Value, key: &str| entry[key].as_str().unwrap_or_default().to_owned();
    object["metadata"]["managedFields"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|entry| Owner {
            manager: text(entry, "manager"),
            operation: text(entry, "operation"),
            subresource: text(entry, "subresource"),
            time: text(entry, "time"),
            fields: decode(&entry["fieldsV1"]),
        })
        .collect()
}

/// Writes who owns what.
pub(crate) fn set_owners(resource: Resource, object: &mut Value, owners: &[Owner]) {
    let entries: Vec<Value> = owners
        .iter()
        .filter(|owner| !owner.fields.is_empty())
        .map(|owner| {
            let mut entry = json!({
                "manager": owner.manager,
                "operation": owner.operation,
                "apiVersion": resource.api_version(),
                "time": owner.time,
                "fieldsType": "FieldsV1",
                "fieldsV1": encode(&owner.fields),
            });
            if !owner.subresource.is_empty() {
                entry["subresource"] = json!(owner.subresource);
            }
            entry
        })
        .collect();
    object["metadata"]["managedFields"] = Value::Array(entries);
}
