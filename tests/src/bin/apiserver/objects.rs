//! Writing objects: what a real server fills in, refuses and merges.

use std::{
    collections::{BTreeMap, BTreeSet},
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
    /// What is written through `/status` is owned with all else.
    pub(crate) one_owner: bool,
}

impl Writer {
    fn subresource(&self) -> &'static str {
        if self.status && !self.one_owner { "status" } else { "" }
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
    check_namespace(store, namespace)?;
    if store.get(resource, &key).is_some() {
        return Err(Failure::exists(resource, &name));
    }
    if resource == Resource::Pod {
        // Where it runs is the kubelet's to say.
        object["status"] = json!({ "phase": "Pending", "qosClass": "BestEffort" });
    }
    own_all(resource, &mut object, writer);
    insert(store, resource, &key, object)
}

/// Nothing is made where there is no namespace.
fn check_namespace(store: &Store, namespace: &str) -> Result<(), Failure> {
    let known = namespace.is_empty() || store.get(Resource::Namespace, &Key::new("", namespace)).is_some();
    if known { Ok(()) } else { Err(Failure::not_found(Resource::Namespace, namespace)) }
}

fn insert(store: &mut Store, resource: Resource, key: &Key, mut object: Value) -> Result<Bytes, Failure> {
    object["apiVersion"] = json!(resource.api_version());
    object["kind"] = json!(resource.kind());
    let metadata = &mut object["metadata"];
    if !key.namespace.is_empty() {
        metadata["namespace"] = json!(key.namespace);
    }
    metadata["uid"] = json!(new_uid());
    metadata["creationTimestamp"] = json!(now());
    validate(resource, &key.name, &mut object, None)?;
    if resource == Resource::Node {
        fill_node_status(&mut object["status"]);
    }
    let made = store.put(resource, key.clone(), object);
    if resource == Resource::Node {
        touch_node(store, key, &made);
    }
    Ok(made)
}

/// What the controller manager does to a Node as soon as it sees it: whoever made it has an old version in his hands.
fn touch_node(store: &mut Store, key: &Key, made: &Bytes) {
    let writer = Writer { manager: "kube-controller-manager".to_owned(), status: false, one_owner: false };
    let mut object = parse(made);
    object["metadata"]["annotations"]["node.alpha.kubernetes.io/ttl"] = json!("0");
    // Nothing forbids another annotation.
    let _ = update(store, Resource::Node, key, &parse(made), object, &writer);
}

/// What stands in the status of every Node.
fn fill_node_status(status: &mut Value) {
    const TEXTS: [&str; 10] = [
        "architecture",
        "bootID",
        "containerRuntimeVersion",
        "kernelVersion",
        "kubeProxyVersion",
        "kubeletVersion",
        "machineID",
        "operatingSystem",
        "osImage",
        "systemUUID",
    ];
    for text in TEXTS {
        let text = &mut status["nodeInfo"][text];
        if text.is_null() {
            *text = json!("");
        }
    }
    let port = &mut status["daemonEndpoints"]["kubeletEndpoint"]["Port"];
    if port.is_null() {
        *port = json!(0);
    }
}

/// What the admission plugin `TaintNodesByCondition` does to a Node that is new: the taint stays until a controller sees
/// that it is ready.
fn admit_node(spec: &mut Value) {
    const NOT_READY: &str = "node.kubernetes.io/not-ready";
    let taints = &mut spec["taints"];
    if !taints.is_array() {
        *taints = json!([]);
    }
    let Some(taints) = taints.as_array_mut() else { return };
    if !taints.iter().any(|taint| taint["key"] == NOT_READY && taint["effect"] == "NoSchedule") {
        taints.push(json!({ "key": NOT_READY, "effect": "NoSchedule" }));
    }
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
    if body["metadata"]["name"].as_str().is_some_and(|name| name != key.name) {
        return Err(Failure::other_name(&body["metadata"]["name"], &key.name));
    }
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

/// What a write may change: the object without its status, or without its spec.
fn restrict(resource: Resource, live: &Value, mut object: Value, status: bool) -> Value {
    if !resource.has_status() {
        return object;
    }
    let fixed = fixed(status);
    match live.get(fixed) {
        Some(value) => object[fixed] = value.clone(),
        None => {
            if let Some(fields) = object.as_object_mut() {
                fields.remove(fixed);
            }
        }
    }
    object
}

/// What a write leaves as it is. Annotations and labels are written by both paths.
fn fixed(status: bool) -> &'static str {
    if status { "spec" } else { "status" }
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
    if config["metadata"]["name"].as_str().is_some_and(|name| name != key.name) {
        return Err(Failure::other_name(&config["metadata"]["name"], &key.name));
    }
    if config["metadata"]["managedFields"].as_array().is_some_and(|entries| !entries.is_empty()) {
        return Err(Failure::bad_request("metadata.managedFields must be nil"));
    }
    if config["apiVersion"] != resource.api_version() || config["kind"] != resource.kind() {
        return Err(Failure::bad_request("apiVersion and kind of the patch do not fit the resource"));
    }
    let mut config = config.clone();
    if resource.has_status()
        && let Some(fields) = config.as_object_mut()
    {
        fields.remove(fixed(writer.status));
    }
    let wanted = fields::leaves(resource, &config);
    let Some(live) = live else {
        if writer.status {
            return Err(Failure::not_found(resource, &key.name));
        }
        check_namespace(store, &key.namespace)?;
        config["metadata"]["name"] = json!(key.name);
        let mut owners = Vec::new();
        add(&mut owners, writer, "Apply", wanted);
        fields::set_owners(resource, &mut config, &owners);
        return insert(store, resource, key, config);
    };
    check_preconditions(resource, key, &live, &config["metadata"])?;
    let mut owners = fields::owners(&live);
    let conflicts = conflicts(&live, &config, &wanted, &owners, writer);
    if !conflicts.is_empty() && !force {
        return Err(conflict(resource, &conflicts, &owners));
    }
    let own = owners.iter().find(|owner| is_of(owner, writer, "Apply")).map(|owner| owner.fields.clone());
    for (at, path) in &conflicts {
        owners[*at].fields.remove(path);
    }
    owners.retain(|owner| !is_of(owner, writer, "Apply"));
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

/// Fields that another manager owns with another value; with its place among the owners.
fn conflicts(
    live: &Value,
    config: &Value,
    wanted: &BTreeSet<Path>,
    owners: &[Owner],
    writer: &Writer,
) -> Vec<(usize, Path)> {
    let others = owners.iter().enumerate().filter(|(_, owner)| !is_of(owner, writer, "Apply"));
    others
        .flat_map(|(at, owner)| owner.fields.iter().map(move |path| (at, path)))
        .filter(|(_, path)| wanted.contains(*path) && fields::get(live, path) != fields::get(config, path))
        .map(|(at, path)| (at, path.clone()))
        .collect()
}

fn conflict(resource: Resource, conflicts: &[(usize, Path)], owners: &[Owner]) -> Failure {
    let title = |at: usize| {
        let Owner { manager, operation, subresource, .. } = &owners[at];
        let part =
            if subresource.is_empty() { String::new() } else { format!(" with subresource {subresource:?}") };
        let version =
            if operation == "Update" { format!(" using {}", resource.api_version()) } else { String::new() };
        format!("{manager:?}{part}{version}")
    };
    let message = match conflicts {
        [(at, path)] => format!("1 conflict: conflict with {}: {}", title(*at), fields::display(path)),
        several => {
            let mut by_owner: BTreeMap<usize, String> = BTreeMap::new();
            for (at, path) in several {
                let list = by_owner.entry(*at).or_insert_with(|| format!("conflicts with {}:", title(*at)));
                list.push_str("\n- ");
                list.push_str(&fields::display(path));
            }
            let lists: Vec<String> = by_owner.into_values().collect();
            format!("{} conflicts: {}", several.len(), lists.join("\n"))
        }
    };
    let message = format!("Apply failed with {message}");
    let mut failure = Failure::new(hyper::StatusCode::CONFLICT, "Conflict", message);
    failure.details["causes"] = conflicts
        .iter()
        .map(|(at, path)| {
            json!({
                "reason": "FieldManagerConflict",
                "message": format!("conflict with {}", title(*at)),
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
    for (field, title) in [("uid", "UID"), ("resourceVersion", "ResourceVersion")] {
        let found = live["metadata"][field].as_str().unwrap_or_default();
        if let Some(wanted) = preconditions[field].as_str()
            && found != wanted
        {
            let why = format!(
                "the {title} in the precondition ({wanted}) does not match the {title} in record ({found})"
            );
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
        let why = format!("Invalid value: {uid:?}: field is immutable");
        return Err(Failure::invalid(resource, &key.name, "metadata.uid", &why));
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
            "Invalid value: a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.'",
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
    match resource {
        Resource::Node => validate_node(name, object, live),
        Resource::Lease => validate_lease(object),
        _ => Ok(()),
    }
}

fn validate_node(name: &str, object: &mut Value, live: Option<&Value>) -> Result<(), Failure> {
    let invalid = |field: &str, why: &str| Failure::invalid(Resource::Node, name, field, why);
    if object.get("spec").is_none() {
        object["spec"] = json!({});
    }
    let spec = &mut object["spec"];
    if live.is_none() {
        admit_node(spec);
    }
    if let Some(cidr) = spec["podCIDR"].as_str().filter(|cidr| !cidr.is_empty()).map(str::to_owned) {
        // The first of the list is the same field: a patch of one of them alone changes both.
        if spec["podCIDRs"].get(0).and_then(Value::as_str) != Some(&cidr) {
            spec["podCIDRs"] = json!([cidr]);
        }
    } else if let Some(first) = spec["podCIDRs"].get(0).cloned() {
        spec["podCIDR"] = first;
    }
    let list = spec["podCIDRs"].as_array().cloned().unwrap_or_default();
    let mut families = BTreeSet::new();
    for (at, cidr) in list.iter().enumerate() {
        // Host bits do not matter here.
        let Some(net) = cidr.as_str().and_then(|text| text.parse::<IpNet>().ok()) else {
            let why = format!("Invalid value: []string{{{cidr}}}: must be valid CIDR");
            return Err(invalid(&format!("spec.podCIDRs[{at}]"), &why));
        };
        if !families.insert(net.addr().is_ipv4()) {
            let why = "Invalid value: may specify no more than one CIDR for each IP family";
            return Err(invalid("spec.podCIDRs", why));
        }
    }
    validate_taints(name, spec)?;
    if let Some(fields) = spec.as_object_mut() {
        fields.retain(|_, value| !value.is_null());
    }
    let Some(live) = live else { return Ok(()) };
    let before = &live["spec"];
    let had = before["podCIDRs"].as_array().is_some_and(|list| !list.is_empty());
    if had && before["podCIDRs"] != object["spec"]["podCIDRs"] {
        let why = "Forbidden: node updates may not change podCIDR except from \"\" to valid";
        return Err(invalid("spec.podCIDRs", why));
    }
    if before["providerID"].as_str().is_some_and(|id| !id.is_empty())
        && before["providerID"] != object["spec"]["providerID"]
    {
        let why = "Forbidden: node updates may not change providerID except from \"\" to valid";
        return Err(invalid("spec.providerID", why));
    }
    Ok(())
}

fn validate_taints(name: &str, spec: &Value) -> Result<(), Failure> {
    let mut seen = BTreeSet::new();
    for (at, taint) in spec["taints"].as_array().into_iter().flatten().enumerate() {
        let text = |field: &str| taint[field].as_str().unwrap_or_default().to_owned();
        let (key, effect) = (text("key"), text("effect"));
        let invalid = |field: &str, why: &str| {
            Failure::invalid(Resource::Node, name, &format!("metadata.taints[{at}]{field}"), why)
        };
        if key.is_empty() {
            return Err(invalid(".key", "Invalid value: \"\": name part must be non-empty"));
        }
        if !matches!(effect.as_str(), "NoSchedule" | "PreferNoSchedule" | "NoExecute") {
            let known = r#"supported values: "NoSchedule", "PreferNoSchedule", "NoExecute""#;
            return Err(invalid(".effect", &format!("Unsupported value: {effect:?}: {known}")));
        }
        if !seen.insert((key, effect)) {
            let why = format!("Duplicate value: {taint}: taints must be unique by key and effect pair");
            return Err(invalid("", &why));
        }
    }
    Ok(())
}

/// Times with fractions have six digits of them, neither more nor fewer.
fn validate_lease(object: &Value) -> Result<(), Failure> {
    for field in ["acquireTime", "renewTime"] {
        let Some(text) = object["spec"][field].as_str() else { continue };
        let fraction = text.strip_suffix('Z').and_then(|text| text.split_once('.')).map(|(_, digits)| digits);
        if text.parse::<Timestamp>().is_err() || fraction.is_none_or(|digits| digits.len() != 6) {
            let message = format!("unable to convert unstructured object: parsing time {text:?}");
            return Err(Failure::new(hyper::StatusCode::INTERNAL_SERVER_ERROR, "", message));
        }
    }
    Ok(())
}
