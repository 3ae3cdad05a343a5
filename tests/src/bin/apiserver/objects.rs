//! Writing objects: what a real server fills in, refuses and merges.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::atomic::{AtomicU64, Ordering},
};

use hyper::body::Bytes;
use ipnet::IpNet;
use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};

use crate::{
    failure::Failure,
    fields::{self, Owner, Path},
    resource::{Key, Resource},
    store::Store,
};

/// Whose write it is, and what of.
#[derive(Clone, Debug)]
pub(crate) struct Writer {
    /// Field manager.
    pub(crate) manager: String,
    /// Through `/status`.
    pub(crate) status: bool,
}

impl Writer {
    fn subresource(&self) -> &'static str {
        if self.status { "status" } else { "" }
    }
}

/// How a patch is to be understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Patch {
    /// RFC 7386.
    Merge,
    /// Kubernetes' own: like a merge, but lists with a key field are merged by it.
    Strategic,
    /// Server-side apply.
    Apply { force: bool },
}

/// Seconds, as objects have them.
pub(crate) fn now() -> String {
    format!("{}Z", Timestamp::now().strftime("%Y-%m-%dT%H:%M:%S"))
}

fn new_uid() -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let nanoseconds = Timestamp::now().as_nanosecond().cast_unsigned();
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    format!(
        "{:08x}-{:04x}-4{:03x}-8{:03x}-{:012x}",
        (nanoseconds >> 32) & 0xffff_ffff,
        (nanoseconds >> 16) & 0xffff,
        nanoseconds & 0xfff,
        count >> 48,
        count & 0xffff_ffff_ffff
    )
}

fn parse(text: &Bytes) -> Value {
    serde_json::from_slice(text).unwrap_or_default()
}

/// Creates an object.
pub(crate) fn create(
    store: &mut Store,
    resource: Resource,
    namespace: &str,
    mut object: Value,
    writer: &Writer,
) -> Result<Bytes, Failure> {
    let name = object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
    let key = Key::new(namespace, &name);
    if store.get(resource, &key).is_some() {
        return Err(Failure::exists(resource, &name));
    }
    if resource == Resource::Pod {
        // Where it runs is the kubelet's to say.
        object["status"] = json!({ "phase": "Pending", "qosClass": "BestEffort" });
    }
    own_all(resource, &mut object, writer);
    insert(store, resource, key, object)
}

fn insert(store: &mut Store, resource: Resource, key: Key, mut object: Value) -> Result<Bytes, Failure> {
    object["apiVersion"] = json!(resource.api_version());
    object["kind"] = json!(resource.kind());
    let metadata = &mut object["metadata"];
    if !key.namespace.is_empty() {
        metadata["namespace"] = json!(key.namespace);
    }
    metadata["uid"] = json!(new_uid());
    metadata["creationTimestamp"] = json!(now());
    validate(resource, &key.name, &mut object, None)?;
    Ok(store.put(resource, key, object))
}

fn own_all(resource: Resource, object: &mut Value, writer: &Writer) {
    let owner = Owner {
        manager: writer.manager.clone(),
        operation: "Update".to_owned(),
        subresource: writer.subresource().to_owned(),
        time: now(),
        fields: fields::leaves(resource, object),
    };
    fields::set_owners(resource, object, &[owner]);
}

/// Replaces an object.
pub(crate) fn replace(
    store: &mut Store,
    resource: Resource,
    key: &Key,
    object: Value,
    writer: &Writer,
) -> Result<Bytes, Failure> {
    let live = parse(store.get(resource, key).ok_or_else(|| Failure::not_found(resource, &key.name))?);
    update(store, resource, key, &live, object, writer)
}

/// Changes an object.
pub(crate) fn patch(
    store: &mut Store,
    resource: Resource,
    key: &Key,
    body: &Value,
    kind: Patch,
    writer: &Writer,
) -> Result<Bytes, Failure> {
    let live = store.get(resource, key).map(parse);
    if let Patch::Apply { force } = kind {
        return apply(store, resource, key, live, body, force, writer);
    }
    let live = live.ok_or_else(|| Failure::not_found(resource, &key.name))?;
    let mut object = live.clone();
    merge(&mut object, body, kind == Patch::Strategic);
    update(store, resource, key, &live, object, writer)
}

fn merge(target: &mut Value, patch: &Value, strategic: bool) {
    let Value::Object(fields) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    for (name, value) in fields {
        if value.is_null() {
            if let Some(target) = target.as_object_mut() {
                target.remove(name);
            }
        } else if strategic
            && matches!(name.as_str(), "conditions" | "addresses" | "taints")
            && let (Some(items), Value::Array(new)) = (target[name.as_str()].as_array_mut(), value)
        {
            let key = if name == "taints" { "key" } else { "type" };
            for item in new {
                match items.iter_mut().find(|known| known[key] == item[key]) {
                    Some(known) => merge(known, item, true),
                    None => items.push(item.clone()),
                }
            }
        } else {
            merge(&mut target[name.as_str()], value, strategic);
        }
    }
}

/// What a write may change: the object without its status, or the status alone.
fn restrict(resource: Resource, live: &Value, mut object: Value, status: bool) -> Value {
    if !resource.has_status() {
        return object;
    }
    if status {
        let mut changed = live.clone();
        changed["status"] = object["status"].take();
        changed["metadata"]["resourceVersion"] = object["metadata"]["resourceVersion"].take();
        changed["metadata"]["managedFields"] = object["metadata"]["managedFields"].take();
        return changed;
    }
    match live.get("status") {
        Some(status) => object["status"] = status.clone(),
        None => {
            if let Some(fields) = object.as_object_mut() {
                fields.remove("status");
            }
        }
    }
    object
}

fn update(
    store: &mut Store,
    resource: Resource,
    key: &Key,
    live: &Value,
    object: Value,
    writer: &Writer,
) -> Result<Bytes, Failure> {
    let mut object = restrict(resource, live, object, writer.status);
    check_preconditions(resource, key, live, &object["metadata"])?;
    keep_system_fields(live, &mut object);
    validate(resource, &key.name, &mut object, Some(live))?;
    if same(live, &object) {
        return Ok(store.get(resource, key).cloned().unwrap_or_default());
    }
    let (before, after) = (fields::leaves(resource, live), fields::leaves(resource, &object));
    let changed: BTreeSet<Path> = after
        .iter()
        .filter(|path| !before.contains(*path) || fields::get(live, path) != fields::get(&object, path))
        .cloned()
        .collect();
    let mut owners = fields::owners(live);
    for owner in &mut owners {
        owner.fields.retain(|path| after.contains(path) && !changed.contains(path));
    }
    add(&mut owners, writer, "Update", changed);
    fields::set_owners(resource, &mut object, &owners);
    Ok(store.put(resource, key.clone(), object))
}

/// Adds to what a manager owns by an operation.
fn add(owners: &mut Vec<Owner>, writer: &Writer, operation: &str, changed: BTreeSet<Path>) {
    match owners.iter_mut().find(|owner| is_of(owner, writer, operation)) {
        Some(owner) => {
            owner.fields.extend(changed);
            owner.time = now();
        }
        None => owners.push(Owner {
            manager: writer.manager.clone(),
            operation: operation.to_owned(),
            subresource: writer.subresource().to_owned(),
            time: now(),
            fields: changed,
        }),
    }
}

fn is_of(owner: &Owner, writer: &Writer, operation: &str) -> bool {
    owner.manager == writer.manager
        && owner.operation == operation
        && owner.subresource == writer.subresource()
}

fn apply(
    store: &mut Store,
    resource: Resource,
    key: &Key,
    live: Option<Value>,
    config: &Value,
    force: bool,
    writer: &Writer,
) -> Result<Bytes, Failure> {
    if config["metadata"]["managedFields"].as_array().is_some_and(|entries| !entries.is_empty()) {
        return Err(Failure::bad_request("metadata.managedFields must be nil"));
    }
    if config["apiVersion"] != resource.api_version() || config["kind"] != resource.kind() {
        return Err(Failure::bad_request("apiVersion and kind of the patch do not fit the resource"));
    }
    let mut config = config.clone();
    if resource.has_status() {
        let skeleton = json!({ "metadata": { "name": key.name } });
        if writer.status {
            config = json!({ "metadata": skeleton["metadata"], "status": config["status"] });
        } else if let Some(fields) = config.as_object_mut() {
            fields.remove("status");
        }
    }
    let wanted = fields::leaves(resource, &config);
    let Some(live) = live else {
        if writer.status {
            return Err(Failure::not_found(resource, &key.name));
        }
        config["metadata"]["name"] = json!(key.name);
        let mut owners = Vec::new();
        add(&mut owners, writer, "Apply", wanted);
        fields::set_owners(resource, &mut config, &owners);
        return insert(store, resource, key.clone(), config);
    };
    check_preconditions(resource, key, &live, &config["metadata"])?;
    let mut owners = fields::owners(&live);
    let conflicts = conflicts(&live, &config, &wanted, &owners, writer);
    if !conflicts.is_empty() && !force {
        return Err(conflict(&conflicts));
    }
    let own = owners.iter().find(|owner| is_of(owner, writer, "Apply")).map(|owner| owner.fields.clone());
    owners.retain(|owner| !is_of(owner, writer, "Apply"));
    for owner in &mut owners {
        let lost: Vec<&Path> =
            conflicts.iter().filter(|(manager, _)| *manager == owner.manager).map(|(_, path)| path).collect();
        owner.fields.retain(|path| !lost.contains(&path));
    }
    let mut object = live.clone();
    for path in own.iter().flatten().filter(|path| !wanted.contains(*path)) {
        if !owners.iter().any(|owner| owner.fields.contains(path)) {
            fields::remove(&mut object, path);
        }
    }
    for path in &wanted {
        if let Some(value) = fields::get(&config, path) {
            fields::set(&mut object, path, value.clone());
        }
    }
    let changed_owner = own.as_ref() != Some(&wanted);
    add(&mut owners, writer, "Apply", wanted);
    fields::set_owners(resource, &mut object, &owners);
    keep_system_fields(&live, &mut object);
    validate(resource, &key.name, &mut object, Some(&live))?;
    if same(&live, &object) && !changed_owner {
        return Ok(store.get(resource, key).cloned().unwrap_or_default());
    }
    Ok(store.put(resource, key.clone(), object))
}

/// Fields that another manager owns with another value.
fn conflicts(
    live: &Value,
    config: &Value,
    wanted: &BTreeSet<Path>,
    owners: &[Owner],
    writer: &Writer,
) -> Vec<(String, Path)> {
    let others = owners.iter().filter(|owner| !is_of(owner, writer, "Apply"));
    others
        .flat_map(|owner| owner.fields.iter().map(|path| (&owner.manager, path)))
        .filter(|(_, path)| wanted.contains(*path) && fields::get(live, path) != fields::get(config, path))
        .map(|(manager, path)| (manager.clone(), path.clone()))
        .collect()
}

fn conflict(conflicts: &[(String, Path)]) -> Failure {
    let mut by_manager: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (manager, path) in conflicts {
        by_manager.entry(manager.clone()).or_default().push(fields::display(path));
    }
    let count = conflicts.len();
    let list: Vec<String> =
        by_manager.iter().map(|(manager, paths)| format!("{manager:?}: {}", paths.join(", "))).collect();
    let mut failure = Failure::new(
        hyper::StatusCode::CONFLICT,
        "Conflict",
        format!(
            "Apply failed with {count} conflict{}: conflicts with {}",
            if count == 1 { "" } else { "s" },
            list.join("; ")
        ),
    );
    failure.details["causes"] = conflicts
        .iter()
        .map(|(manager, path)| {
            json!({
                "reason": "FieldManagerConflict",
                "message": format!("conflict with {manager:?}"),
                "field": fields::display(path),
            })
        })
        .collect();
    failure
}

/// Removes an object, or marks it as being removed.
pub(crate) fn delete(
    store: &mut Store,
    resource: Resource,
    key: &Key,
    options: &Value,
) -> Result<Bytes, Failure> {
    let live = parse(store.get(resource, key).ok_or_else(|| Failure::not_found(resource, &key.name))?);
    let preconditions = &options["preconditions"];
    for field in ["uid", "resourceVersion"] {
        if let Some(wanted) = preconditions[field].as_str()
            && live["metadata"][field].as_str() != Some(wanted)
        {
            let why = format!("the {field} in the precondition ({wanted}) does not match");
            return Err(Failure::conflict(resource, &key.name, &why));
        }
    }
    let grace = options["gracePeriodSeconds"].as_i64().unwrap_or(30);
    let finished = matches!(live["status"]["phase"].as_str(), Some("Succeeded" | "Failed"));
    let placed = live["spec"]["nodeName"].as_str().is_some_and(|node| !node.is_empty());
    if resource == Resource::Pod && placed && !finished && grace > 0 {
        if live["metadata"]["deletionTimestamp"].is_string() {
            return Ok(store.get(resource, key).cloned().unwrap_or_default());
        }
        let mut object = live;
        object["metadata"]["deletionTimestamp"] = json!(now());
        object["metadata"]["deletionGracePeriodSeconds"] = json!(grace);
        return Ok(store.put(resource, key.clone(), object));
    }
    store.delete(resource, key).ok_or_else(|| Failure::not_found(resource, &key.name))
}

fn check_preconditions(resource: Resource, key: &Key, live: &Value, metadata: &Value) -> Result<(), Failure> {
    if let Some(version) = metadata["resourceVersion"].as_str().filter(|version| !version.is_empty())
        && live["metadata"]["resourceVersion"].as_str() != Some(version)
    {
        let why =
            "the object has been modified; please apply your changes to the latest version and try again";
        return Err(Failure::conflict(resource, &key.name, why));
    }
    if let Some(uid) = metadata["uid"].as_str().filter(|uid| !uid.is_empty())
        && live["metadata"]["uid"].as_str() != Some(uid)
    {
        return Err(Failure::conflict(resource, &key.name, "the UID does not match"));
    }
    Ok(())
}

fn keep_system_fields(live: &Value, object: &mut Value) {
    object["apiVersion"] = live["apiVersion"].clone();
    object["kind"] = live["kind"].clone();
    for field in
        ["name", "namespace", "uid", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds"]
    {
        match live["metadata"].get(field) {
            Some(value) => object["metadata"][field] = value.clone(),
            None => {
                if let Some(metadata) = object["metadata"].as_object_mut() {
                    metadata.remove(field);
                }
            }
        }
    }
}

/// Whether a write changes nothing.
fn same(live: &Value, object: &Value) -> bool {
    let bare = |object: &Value| {
        let mut object = object.clone();
        if let Some(metadata) = object["metadata"].as_object_mut() {
            metadata.remove("resourceVersion");
            metadata.remove("managedFields");
        }
        object
    };
    bare(live) == bare(object)
}

fn validate(resource: Resource, name: &str, object: &mut Value, live: Option<&Value>) -> Result<(), Failure> {
    let fits = (1..=253).contains(&name.len())
        && name.split('.').all(|label| {
            !label.is_empty()
                && label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
                && !label.starts_with('-')
                && !label.ends_with('-')
        });
    if !fits {
        return Err(Failure::invalid(
            resource,
            name,
            "metadata.name",
            "must be a lowercase RFC 1123 subdomain",
        ));
    }
    for (place, required) in [("metadata", true), ("spec", false), ("status", false)] {
        match object.get(place) {
            Some(Value::Object(_)) => {}
            None if !required => {}
            Some(Value::Null) if !required => {
                object.as_object_mut().map(|fields| fields.remove(place));
            }
            _ => return Err(Failure::bad_request(format!("{place} of {} is no object", resource.kind()))),
        }
    }
    for place in ["annotations", "labels"] {
        let values = object["metadata"].get(place).and_then(Value::as_object);
        if values.is_some_and(|values| values.values().any(|value| !value.is_string())) {
            return Err(Failure::bad_request(format!(
                "cannot unmarshal a value of metadata.{place} into a string"
            )));
        }
    }
    if resource == Resource::Node { validate_node(name, object, live) } else { Ok(()) }
}

fn validate_node(name: &str, object: &mut Value, live: Option<&Value>) -> Result<(), Failure> {
    let invalid = |field: &str, why: &str| Failure::invalid(Resource::Node, name, field, why);
    if object.get("spec").is_none() {
        object["spec"] = json!({});
    }
    let spec = &mut object["spec"];
    if let Some(cidr) = spec["podCIDR"].as_str().filter(|cidr| !cidr.is_empty()).map(str::to_owned) {
        let list = spec["podCIDRs"].as_array().filter(|list| !list.is_empty());
        match list.map(|list| list[0].as_str() == Some(&cidr)) {
            Some(true) => {}
            Some(false) => return Err(invalid("spec.podCIDRs", "podCIDR does not match podCIDRs[0]")),
            None => spec["podCIDRs"] = json!([cidr]),
        }
    } else if let Some(first) = spec["podCIDRs"].get(0).cloned() {
        spec["podCIDR"] = first;
    }
    let list = spec["podCIDRs"].as_array().cloned().unwrap_or_default();
    let mut families = BTreeSet::new();
    for cidr in &list {
        let net = cidr.as_str().and_then(|text| text.parse::<IpNet>().ok());
        match net {
            Some(net) if net.addr() == net.network() => {
                if !families.insert(net.addr().is_ipv4()) {
                    return Err(invalid(
                        "spec.podCIDRs",
                        "may specify no more than one CIDR for each IP family",
                    ));
                }
            }
            _ => return Err(invalid("spec.podCIDRs", "must be a valid CIDR value, (e.g. 10.9.8.0/24)")),
        }
    }
    if let Some(fields) = spec.as_object_mut() {
        fields.retain(|_, value| !value.is_null());
    }
    for taint in spec["taints"].as_array().into_iter().flatten() {
        let effect = taint["effect"].as_str().unwrap_or_default();
        if taint["key"].as_str().is_none_or(str::is_empty)
            || !matches!(effect, "NoSchedule" | "PreferNoSchedule" | "NoExecute")
        {
            return Err(invalid("spec.taints", "needs a key and a known effect"));
        }
    }
    if let Some(fields) = spec.as_object_mut() {
        fields.retain(|_, value| !value.is_null());
    }
    for address in object["status"]["addresses"].as_array().into_iter().flatten() {
        let is_ip = matches!(address["type"].as_str(), Some("InternalIP" | "ExternalIP"));
        if is_ip && address["address"].as_str().is_none_or(|text| text.parse::<IpAddr>().is_err()) {
            return Err(invalid("status.addresses", "must be a valid IP address"));
        }
    }
    let Some(live) = live else { return Ok(()) };
    let before = &live["spec"];
    let had = before["podCIDRs"].as_array().is_some_and(|list| !list.is_empty());
    if had && before["podCIDRs"] != object["spec"]["podCIDRs"] {
        return Err(invalid(
            "spec.podCIDRs",
            "node updates may not change podCIDR except from \"\" to valid",
        ));
    }
    if before["providerID"].as_str().is_some_and(|id| !id.is_empty())
        && before["providerID"] != object["spec"]["providerID"]
    {
        return Err(invalid(
            "spec.providerID",
            "Forbidden: node updates may not change providerID except from \"\" to valid",
        ));
    }
    Ok(())
}
