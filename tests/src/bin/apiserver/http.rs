//! Requests and answers.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    fmt, io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures::{StreamExt as _, stream};
use http_body_util::{BodyExt as _, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Frame, Incoming},
    header::{self, HeaderValue},
};
use serde_json::{Value, json};
use tokio::{sync::watch as channel, time::sleep};

use crate::{
    access::{ANONYMOUS, Access, User, Wish},
    failure::{self, Failure},
    faults::{self, Delivery, Fault, Faults, What},
    objects::{self, Patch, Writer},
    resource::{Key, Resource},
    store::{Snapshot, Store},
    watch::{self, Pieces},
};

/// Body of an answer.
pub(crate) type Body = UnsyncBoxBody<Bytes, io::Error>;

/// What all connections share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) access: Access,
    pub(crate) bookmark_interval: Duration,
    /// Field managers own status and the rest as one.
    one_owner: bool,
    store: Mutex<Store>,
    faults: Mutex<Faults>,
    /// How often each thing was asked for.
    requests: Mutex<BTreeMap<String, Asked>>,
    /// Changes when all connections are to end.
    pub(crate) disconnect: channel::Sender<u64>,
}

impl Shared {
    pub(crate) fn new(access: Access, store: Store, bookmark_interval: Duration, one_owner: bool) -> Self {
        Self {
            access,
            bookmark_interval,
            one_owner,
            store: Mutex::new(store),
            faults: Mutex::default(),
            requests: Mutex::default(),
            disconnect: channel::Sender::new(0),
        }
    }

    pub(crate) fn store(&self) -> MutexGuard<'_, Store> {
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn faults(&self) -> MutexGuard<'_, Faults> {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Something that was asked for, and how often.
#[derive(Debug)]
struct Asked {
    entry: Value,
    count: u64,
}

/// Equality and inequality of labels and fields.
#[derive(Clone, Debug, Default)]
pub(crate) struct Selector {
    terms: Vec<Term>,
}

#[derive(Clone, Debug)]
struct Term {
    path: Vec<String>,
    value: String,
    equal: bool,
}

impl Selector {
    fn parse(labels: Option<&String>, fields: Option<&String>) -> Result<Self, Failure> {
        let mut terms = Vec::new();
        for (list, above) in [(labels, &["metadata", "labels"][..]), (fields, &[])] {
            let texts = list.map(String::as_str).unwrap_or_default().split(',');
            for text in texts.filter(|text| !text.is_empty()) {
                let (key, value, equal) = if let Some((key, value)) = text.split_once("!=") {
                    (key, value, false)
                } else if let Some((key, value)) = text.split_once('=') {
                    (key, value.trim_start_matches('='), true)
                } else {
                    return Err(Failure::bad_request(format!("selector {text:?} is not supported here")));
                };
                // The key of a label has dots that mean nothing.
                let steps: Vec<&str> =
                    if above.is_empty() { key.trim().split('.').collect() } else { vec![key.trim()] };
                let path = above.iter().chain(&steps).map(|step| (*step).to_owned()).collect();
                terms.push(Term { path, value: value.trim().to_owned(), equal });
            }
        }
        Ok(Self { terms })
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.terms.is_empty()
    }

    pub(crate) fn matches(&self, object: &Value) -> bool {
        self.terms.iter().all(|term| {
            let found = term.path.iter().try_fold(object, |value, step| value.get(step));
            let found = found.and_then(Value::as_str).unwrap_or_default();
            (found == term.value) == term.equal
        })
    }
}

/// What a path means.
#[derive(Debug)]
enum Target {
    Resource {
        resource: Resource,
        namespace: String,
        name: String,
        status: bool,
    },
    Control(String),
    Discovery(Value),
    /// In a group that is known.
    NoResource,
    Nothing,
}

fn target(path: &str) -> Target {
    let steps: Vec<&str> = path.split('/').filter(|step| !step.is_empty()).collect();
    let (group, rest) = match steps.as_slice() {
        ["control", rest @ ..] => return Target::Control(rest.join("/")),
        ["healthz" | "livez" | "readyz"] => return Target::Discovery(json!("ok")),
        ["version"] => {
            return Target::Discovery(
                json!({ "major": "1", "minor": "36", "gitVersion": "v1.36.0-test", "platform": "linux/amd64" }),
            );
        }
        ["api"] => return Target::Discovery(json!({ "kind": "APIVersions", "versions": ["v1"] })),
        ["apis"] => {
            let version = json!({ "groupVersion": "coordination.k8s.io/v1", "version": "v1" });
            return Target::Discovery(json!({
                "kind": "APIGroupList", "apiVersion": "v1",
                "groups": [{ "name": "coordination.k8s.io", "versions": [version], "preferredVersion": version }],
            }));
        }
        ["api", "v1", rest @ ..] => ("", rest),
        ["apis", group, "v1", rest @ ..] => (*group, rest),
        _ => return Target::Nothing,
    };
    let known = Resource::ALL.into_iter().any(|resource| resource.group() == group);
    let nothing = || if known { Target::NoResource } else { Target::Nothing };
    let found = |plural: &str| Resource::find(group, plural);
    let resource = |resource, namespace: &str, name: &str, status| Target::Resource {
        resource,
        namespace: namespace.to_owned(),
        name: name.to_owned(),
        status,
    };
    match rest {
        [] => resources(group),
        ["namespaces", name, "status"] => resource(Resource::Namespace, "", name, true),
        ["namespaces", namespace, plural, tail @ ..] => match (found(plural), tail) {
            (Some(r), []) if r.is_namespaced() => resource(r, namespace, "", false),
            (Some(r), [name]) if r.is_namespaced() => resource(r, namespace, name, false),
            (Some(r), [name, "status"]) if r.is_namespaced() && r.has_status() => {
                resource(r, namespace, name, true)
            }
            _ => nothing(),
        },
        [plural] => found(plural).map_or_else(nothing, |r| resource(r, "", "", false)),
        [plural, name] => match found(plural) {
            Some(r) if !r.is_namespaced() => resource(r, "", name, false),
            _ => nothing(),
        },
        [plural, name, "status"] => match found(plural) {
            Some(r) if !r.is_namespaced() && r.has_status() => resource(r, "", name, true),
            _ => nothing(),
        },
        _ => nothing(),
    }
}

/// What discovery says of a group.
fn resources(group: &str) -> Target {
    let all: Vec<Value> = Resource::ALL
        .into_iter()
        .filter(|resource| resource.group() == group)
        .map(|resource| {
            json!({
                "name": resource.plural(), "singularName": resource.kind().to_lowercase(),
                "namespaced": resource.is_namespaced(), "kind": resource.kind(),
                "verbs": ["create", "delete", "get", "list", "patch", "update", "watch"],
            })
        })
        .collect();
    if all.is_empty() {
        return Target::Nothing;
    }
    let version = if group.is_empty() { "v1".to_owned() } else { format!("{group}/v1") };
    Target::Discovery(
        json!({ "kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": all }),
    )
}

fn query(request: &Request<Incoming>) -> BTreeMap<String, String> {
    let text = request.uri().query().unwrap_or_default();
    text.split('&')
        .filter(|pair| !pair.is_empty())
        .map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            (decode(key), decode(value))
        })
        .collect()
}

/// Undoes percent encoding.
fn decode(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        rest = tail;
        bytes.push(match first {
            b'+' => b' ',
            b'%' => {
                match tail.get(..2).and_then(|hex| u8::from_str_radix(str::from_utf8(hex).ok()?, 16).ok()) {
                    Some(byte) => {
                        rest = &tail[2..];
                        byte
                    }
                    None => b'%',
                }
            }
            other => other,
        });
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Answers a request of somebody whose certificate was recognised, or not.
pub(crate) async fn answer(
    shared: Arc<Shared>,
    certificate: Option<User>,
    request: Request<Incoming>,
) -> Result<Response<Body>, Infallible> {
    Ok(match handle(&shared, certificate, request).await {
        Ok(response) => response,
        Err(failure) => refuse(&failure),
    })
}

fn refuse(failure: &Failure) -> Response<Body> {
    let mut response = if failure.plain {
        text(failure.code, format!("{}\n", failure.message))
    } else {
        reply(failure.code, &failure.status())
    };
    if let Some(seconds) = failure.retry_after {
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
    }
    response
}

fn text(code: StatusCode, text: String) -> Response<Body> {
    let mut response = whole(code, text.into());
    let kind = HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}

fn reply(code: StatusCode, value: &Value) -> Response<Body> {
    whole(code, value.to_string().into())
}

fn whole(code: StatusCode, text: Bytes) -> Response<Body> {
    let body = Full::new(text).map_err(|never| match never {}).boxed_unsync();
    let mut response = Response::new(body);
    *response.status_mut() = code;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

fn streamed(pieces: Pieces) -> Response<Body> {
    let body = StreamBody::new(pieces.map(|piece| piece.map(Frame::data))).boxed_unsync();
    let mut response = Response::new(body);
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

async fn handle(
    shared: &Arc<Shared>,
    certificate: Option<User>,
    request: Request<Incoming>,
) -> Result<Response<Body>, Failure> {
    let user = identify(shared, certificate, &request)?;
    let query = query(&request);
    let path = request.uri().path().to_owned();
    match target(&path) {
        Target::NoResource | Target::Nothing | Target::Discovery(_)
            if user.is_anonymous() && !is_public(&path) =>
        {
            let verb = request.method().as_str().to_lowercase();
            let message = format!("forbidden: User {ANONYMOUS:?} cannot {verb} path {path:?}");
            Err(Failure::new(StatusCode::FORBIDDEN, "Forbidden", message))
        }
        Target::Nothing => Err(Failure::no_such_path()),
        Target::NoResource => Err(Failure::no_such_resource()),
        Target::Discovery(Value::String(word)) => Ok(text(StatusCode::OK, word)),
        Target::Discovery(value) => Ok(reply(StatusCode::OK, &value)),
        Target::Control(what) => {
            if !user.is_admin() {
                return Err(Failure::new(
                    StatusCode::FORBIDDEN,
                    "Forbidden",
                    "the controls are the administrator's",
                ));
            }
            let method = request.method().clone();
            let body = read(request).await?;
            control(shared, &method, &what, &body)
        }
        Target::Resource { resource, namespace, name, status } => {
            let watching = matches!(query.get("watch").map(String::as_str), Some("true" | "1"));
            let verb = match *request.method() {
                Method::GET if watching => "watch",
                Method::GET if name.is_empty() => "list",
                Method::GET => "get",
                Method::POST => "create",
                Method::PUT => "update",
                Method::PATCH => "patch",
                Method::DELETE if name.is_empty() => "deletecollection",
                Method::DELETE => "delete",
                _ => {
                    return Err(Failure::new(
                        StatusCode::METHOD_NOT_ALLOWED,
                        "MethodNotAllowed",
                        "no such verb",
                    ));
                }
            };
            let wish = Wish { verb, resource, status, namespace, name };
            record(shared, &user, &wish);
            let fault = shared.faults().take(verb, Some(resource), &user.name, user.is_admin());
            let mut delivery = Delivery::default();
            match fault {
                Some(What::Status { code, retry_after }) => {
                    if code == 403 {
                        return Err(forbidden(&wish, &user));
                    }
                    return Err(faults::failure(code, retry_after));
                }
                Some(What::Stall) => {
                    let _ = shared.disconnect.subscribe().changed().await;
                    return Err(faults::failure(503, None));
                }
                Some(what) => delivery = Delivery::of(&what),
                None => {}
            }
            if !shared.access.allows(&user, &wish) {
                return Err(forbidden(&wish, &user));
            }
            serve(shared, &user, wish, &query, request, delivery).await
        }
    }
}

/// What the role `system:public-info-viewer` lets everybody read.
fn is_public(path: &str) -> bool {
    matches!(path, "/healthz" | "/livez" | "/readyz" | "/version")
}

fn forbidden(wish: &Wish, user: &User) -> Failure {
    Failure {
        details: failure::about(wish.resource, &wish.name),
        ..Failure::new(StatusCode::FORBIDDEN, "Forbidden", wish.forbidden(&user.name))
    }
}

fn identify(
    shared: &Shared,
    certificate: Option<User>,
    request: &Request<Incoming>,
) -> Result<User, Failure> {
    let user = match request.headers().get(header::AUTHORIZATION) {
        Some(value) => value
            .to_str()
            .ok()
            .and_then(|text| text.strip_prefix("Bearer "))
            .and_then(|t| shared.access.token(t)),
        // Whoever shows nothing is somebody, too, who may do nothing here.
        None => certificate.or_else(|| Some(User { name: ANONYMOUS.to_owned() })),
    };
    user.ok_or_else(Failure::unauthorized)
}

fn record(shared: &Shared, user: &User, wish: &Wish) {
    let entry = json!({
        "user": user.name, "verb": wish.verb, "group": wish.resource.group(), "resource": wish.resource(),
        "namespace": wish.namespace, "name": wish.name,
    });
    let mut requests = shared.requests.lock().unwrap_or_else(PoisonError::into_inner);
    requests.entry(entry.to_string()).or_insert(Asked { entry, count: 0 }).count += 1;
}

async fn read(request: Request<Incoming>) -> Result<Bytes, Failure> {
    let body = request.into_body().collect().await;
    Ok(body.map_err(|error| Failure::bad_request(format!("the body broke off: {error}")))?.to_bytes())
}

/// JSON, or the YAML that kubectl sends.
fn parse(body: &[u8]) -> Result<Value, Failure> {
    if body.is_empty() {
        return Ok(Value::Null);
    }
    if let Ok(value) = serde_json::from_slice(body) {
        return Ok(value);
    }
    serde_saphyr::from_slice(body)
        .map_err(|error| Failure::bad_request(format!("the body cannot be read: {error}")))
}

async fn serve(
    shared: &Arc<Shared>,
    user: &User,
    wish: Wish,
    query: &BTreeMap<String, String>,
    request: Request<Incoming>,
    delivery: Delivery,
) -> Result<Response<Body>, Failure> {
    let Wish { verb, resource, status, namespace, name } = &wish;
    let (resource, status) = (*resource, *status);
    let key = Key::new(namespace, name);
    let agent = request.headers().get(header::USER_AGENT).and_then(|agent| agent.to_str().ok());
    let agent = agent.and_then(|agent| agent.split('/').next()).unwrap_or(&user.name).to_owned();
    let manager = query.get("fieldManager").cloned().unwrap_or(agent);
    let writer = Writer { manager, status, one_owner: shared.one_owner };
    match *verb {
        "watch" => {
            let watch = watch_request(resource, namespace.clone(), name, query, &delivery)?;
            return Ok(deliver(watch::pieces(shared.clone(), watch), &delivery));
        }
        "list" => {
            let page = list(shared, resource, namespace, query, delivery.malformed.as_deref())?;
            return Ok(deliver(Box::pin(stream::once(async { Ok(page) })), &delivery));
        }
        "get" => {
            let object = shared.store().get(resource, &key).cloned();
            let object = object.ok_or_else(|| Failure::not_found(resource, name))?;
            return Ok(deliver(Box::pin(stream::once(async { Ok(object) })), &delivery));
        }
        _ => {}
    }
    let content = request.headers().get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    let content = content.unwrap_or_default().split(';').next().unwrap_or_default().to_owned();
    let body = parse(&read(request).await?)?;
    let (code, object) = write(shared, user, &wish, query, &content, body, &writer)?;
    Ok(match delivery.cut {
        // The write has been done; its author does not learn of it.
        Some(_) => deliver(Box::pin(stream::once(async { Ok(object) })), &delivery),
        None => whole(code, object),
    })
}

/// Carries out what changes objects.
fn write(
    shared: &Shared,
    user: &User,
    wish: &Wish,
    query: &BTreeMap<String, String>,
    content: &str,
    body: Value,
    writer: &Writer,
) -> Result<(StatusCode, Bytes), Failure> {
    let Wish { verb, resource, status, namespace, name } = wish;
    let (resource, status) = (*resource, *status);
    let key = Key::new(namespace, name);
    let mut store = shared.store();
    let mut fork = None;
    let store: &mut Store = match query.get("dryRun").map(String::as_str) {
        None => &mut store,
        Some("All") => fork.insert(store.fork()),
        Some(other) => return Err(Failure::bad_request(format!("dryRun of {other:?} is not supported"))),
    };
    Ok(match *verb {
        "create" => (StatusCode::CREATED, objects::create(store, resource, namespace, body, writer)?),
        "update" => (StatusCode::OK, objects::replace(store, resource, &key, body, writer)?),
        "patch" => {
            let patch = match content {
                "application/merge-patch+json" => Patch::Merge,
                "application/strategic-merge-patch+json" => Patch::Strategic,
                "application/apply-patch+yaml" => {
                    if !query.contains_key("fieldManager") {
                        return Err(Failure::new(
                            StatusCode::UNPROCESSABLE_ENTITY,
                            "Invalid",
                            "PatchOptions.meta.k8s.io \"\" is invalid: fieldManager: Required value: is required for apply \
                             patch",
                        ));
                    }
                    Patch::Apply { force: query.get("force").is_some_and(|force| force == "true") }
                }
                _ => {
                    return Err(Failure::new(
                        StatusCode::UNSUPPORTED_MEDIA_TYPE,
                        "UnsupportedMediaType",
                        "415: Unsupported Media Type",
                    ));
                }
            };
            let known = store.get(resource, &key).is_some();
            if !known && matches!(patch, Patch::Apply { .. }) && !status {
                let create = Wish {
                    verb: "create",
                    resource,
                    status,
                    namespace: namespace.clone(),
                    name: name.clone(),
                };
                record(shared, user, &create);
                if !shared.access.allows(user, &create) {
                    return Err(forbidden(&create, user));
                }
            }
            let code = if known { StatusCode::OK } else { StatusCode::CREATED };
            (code, objects::patch(store, resource, &key, &body, patch, writer)?)
        }
        "delete" => {
            let mut options = if body.is_object() { body } else { json!({}) };
            if let Some(grace) = query.get("gracePeriodSeconds").and_then(|text| text.parse::<i64>().ok()) {
                options["gracePeriodSeconds"] = json!(grace);
            }
            let last = objects::delete(store, resource, &key, &options)?;
            // The last state of pods alone is told.
            (StatusCode::OK, if resource == Resource::Pod { last } else { deleted(resource, &last) })
        }
        "deletecollection" => {
            let selector = Selector::parse(query.get("labelSelector"), query.get("fieldSelector"))?;
            let keys: Vec<Key> = store
                .objects(resource)
                .filter(|(key, _)| namespace.is_empty() || key.namespace == *namespace)
                .filter(|(_, text)| selector.matches(&serde_json::from_slice(text).unwrap_or_default()))
                .map(|(key, _)| key.clone())
                .collect();
            for key in keys {
                objects::delete(store, resource, &key, &body)?;
            }
            (
                StatusCode::OK,
                json!({ "kind": "Status", "apiVersion": "v1", "status": "Success" }).to_string().into(),
            )
        }
        _ => return Err(Failure::no_such_path()),
    })
}

/// The answer to a deletion.
fn deleted(resource: Resource, last: &[u8]) -> Bytes {
    let last: Value = serde_json::from_slice(last).unwrap_or_default();
    let mut details = failure::about(resource, last["metadata"]["name"].as_str().unwrap_or_default());
    details["uid"] = last["metadata"]["uid"].clone();
    let status = json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details,
    });
    status.to_string().into()
}

fn number(query: &BTreeMap<String, String>, key: &str) -> Result<Option<u64>, Failure> {
    let Some(text) = query.get(key).filter(|text| !text.is_empty()) else { return Ok(None) };
    text.parse().map(Some).map_err(|_| Failure::bad_request(format!("invalid {key}: {text:?}")))
}

fn watch_request(
    resource: Resource,
    namespace: String,
    name: &str,
    query: &BTreeMap<String, String>,
    delivery: &Delivery,
) -> Result<watch::Request, Failure> {
    let is = |key: &str| query.get(key).is_some_and(|value| value == "true" || value == "1");
    let mut selector = Selector::parse(query.get("labelSelector"), query.get("fieldSelector"))?;
    if !name.is_empty() {
        selector.terms.push(Term {
            path: vec!["metadata".to_owned(), "name".to_owned()],
            value: name.to_owned(),
            equal: true,
        });
    }
    let initial_events = is("sendInitialEvents");
    let after = number(query, "resourceVersion")?.filter(|after| *after > 0 && !initial_events);
    Ok(watch::Request {
        resource,
        namespace,
        selector,
        after,
        bookmarks: is("allowWatchBookmarks"),
        initial_events,
        timeout: Duration::from_secs(number(query, "timeoutSeconds")?.unwrap_or(1800)),
        repeat: delivery.repeat,
        error: delivery.error,
        malformed: delivery.malformed.clone(),
    })
}

/// Where a list goes on: the revision, 0 for whatever there is then, and the last key.
struct Continue(u64, Key);

impl Continue {
    fn at(revision: u64, last: &Key) -> Self {
        Self(revision, last.clone())
    }

    /// At no revision: what comes does not fit what was there before.
    fn anyway(last: &Key) -> Self {
        Self(0, last.clone())
    }

    fn parse(token: &str) -> Option<Self> {
        let mut parts = token.split('_');
        let revision = parts.next()?.parse().ok()?;
        Some(Self(revision, Key::new(parts.next()?, parts.next()?)))
    }

    fn place(self) -> (Option<u64>, Key) {
        ((self.0 > 0).then_some(self.0), self.1)
    }
}

impl fmt::Display for Continue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}_{}_{}", self.0, self.1.namespace, self.1.name)
    }
}

/// A page of a list.
fn list(
    shared: &Shared,
    resource: Resource,
    namespace: &str,
    query: &BTreeMap<String, String>,
    malformed: Option<&str>,
) -> Result<Bytes, Failure> {
    let selector = Selector::parse(query.get("labelSelector"), query.get("fieldSelector"))?;
    let limit =
        number(query, "limit")?.and_then(|limit| usize::try_from(limit).ok()).filter(|limit| *limit > 0);
    let wanted = number(query, "resourceVersion")?;
    let mut store = shared.store();
    let (revision, after) = match query.get("continue").filter(|token| !token.is_empty()) {
        Some(_) if wanted.is_some() => {
            return Err(Failure::bad_request(
                "specifying resource version is not allowed when using continue",
            ));
        }
        Some(token) => {
            let (revision, after) = Continue::parse(token)
                .ok_or_else(|| Failure::bad_request("invalid continue token: continue key is not valid"))?
                .place();
            (revision.unwrap_or(store.revision()), Some(after))
        }
        None => match (wanted, query.get("resourceVersionMatch").map(String::as_str)) {
            (Some(exact), Some("Exact")) => {
                if exact < store.compacted() {
                    return Err(Failure::expired(format!(
                        "The resourceVersion for the provided list is too old: {exact}"
                    )));
                }
                (exact, None)
            }
            (Some(least), _) if least > store.revision() => {
                store.snapshot(resource, least, false)?;
                (least, None)
            }
            _ => (store.revision(), None),
        },
    };
    // The real server answers from the compacted state only what is the newest.
    let snapshot = store.snapshot(resource, revision, limit.is_some()).map_err(|failure| match &after {
        Some(after) if failure.code == StatusCode::GONE => {
            Failure { token: Some(Continue::anyway(after).to_string()), ..failure }
        }
        _ => failure,
    })?;
    let start = after.map_or(0, |after| snapshot.partition_point(|(key, _)| *key <= after));
    let (items, end) = page(&snapshot, start, limit, namespace, &selector, malformed);
    let more = end < snapshot.len();
    if !more && limit.is_some() {
        store.forget_snapshot(resource, revision);
    }
    drop(store);
    let mut metadata = json!({ "resourceVersion": revision.to_string() });
    if more {
        metadata["continue"] = json!(Continue::at(revision, &snapshot[end - 1].0).to_string());
        if selector.is_empty() && namespace.is_empty() {
            metadata["remainingItemCount"] = json!(snapshot.len() - end);
        }
    }
    let mut text = Vec::with_capacity(items.iter().map(|item| item.len() + 1).sum::<usize>() + 256);
    // What the list is of stands once, in front.
    let types = format!(r#"{{"apiVersion":"{}","kind":"{}","#, resource.api_version(), resource.kind());
    let head = json!({ "kind": format!("{}List", resource.kind()), "apiVersion": resource.api_version(), "metadata": metadata });
    let head = head.to_string();
    text.extend_from_slice(&head.as_bytes()[..head.len() - 1]);
    text.extend_from_slice(b",\"items\":[");
    for (index, item) in items.iter().enumerate() {
        if index > 0 {
            text.push(b',');
        }
        match item.strip_prefix(types.as_bytes()) {
            Some(rest) => {
                text.push(b'{');
                text.extend_from_slice(rest);
            }
            None => text.extend_from_slice(item),
        }
    }
    text.extend_from_slice(b"]}\n");
    Ok(text.into())
}

/// The objects of a page, and where the next one begins.
fn page(
    snapshot: &Snapshot,
    start: usize,
    limit: Option<usize>,
    namespace: &str,
    selector: &Selector,
    malformed: Option<&str>,
) -> (Vec<Bytes>, usize) {
    let mut items = Vec::new();
    let mut at = start;
    while at < snapshot.len() && limit.is_none_or(|limit| items.len() < limit) {
        let (key, text) = &snapshot[at];
        at += 1;
        let fits = (namespace.is_empty() || key.namespace == namespace)
            && (selector.is_empty() || selector.matches(&serde_json::from_slice(text).unwrap_or_default()));
        if fits {
            items.push(if malformed == Some(&key.name) { watch::malform(text) } else { text.clone() });
        }
    }
    (items, at)
}

/// Sends a body as the fault wants it.
fn deliver(pieces: Pieces, delivery: &Delivery) -> Response<Body> {
    let Delivery { cut, slow, garbage, .. } = delivery.clone();
    let mut pieces = pieces;
    if garbage {
        pieces = Box::pin(stream::once(async {
            Ok(Bytes::from_static(b"{\"kind\": <html>502 Bad Gateway</html>\n"))
        }));
    }
    if let Some((bytes, pause)) = slow {
        pieces = Box::pin(pieces.flat_map(move |piece| {
            let parts: Vec<io::Result<Bytes>> = match piece {
                Ok(piece) => piece.chunks(bytes).map(|part| Ok(Bytes::copy_from_slice(part))).collect(),
                Err(error) => vec![Err(error)],
            };
            stream::iter(parts).then(move |part| async move {
                sleep(pause).await;
                part
            })
        }));
    }
    if let Some(limit) = cut {
        let broken = || io::Error::new(io::ErrorKind::ConnectionReset, "cut on demand");
        pieces = Box::pin(stream::unfold(Some((pieces, limit)), move |state| async move {
            let (mut pieces, left) = state?;
            if left == 0 {
                return Some((Err(broken()), None));
            }
            match pieces.next().await {
                Some(Ok(mut piece)) => {
                    piece.truncate(left);
                    let left = left - piece.len();
                    Some((Ok(piece), Some((pieces, left))))
                }
                Some(Err(error)) => Some((Err(error), None)),
                None => Some((Err(broken()), None)),
            }
        }));
    }
    streamed(pieces)
}

/// The controls of this server.
fn control(shared: &Shared, method: &Method, what: &str, body: &[u8]) -> Result<Response<Body>, Failure> {
    let done = || Ok(reply(StatusCode::OK, &json!({ "kind": "Status", "status": "Success" })));
    match (method, what) {
        (&Method::POST, "faults") => {
            let body = parse(body)?;
            let list = if body.is_array() { body } else { json!([body]) };
            let faults: Vec<Fault> = serde_json::from_value(list)
                .map_err(|error| Failure::bad_request(format!("no fault: {error}")))?;
            for fault in faults {
                shared.faults().add(fault);
            }
            done()
        }
        (&Method::GET, "faults") => Ok(reply(StatusCode::OK, &json!(shared.faults().list()))),
        (&Method::DELETE, "faults") => {
            shared.faults().clear();
            done()
        }
        (&Method::POST, "compact") => {
            shared.store().compact();
            done()
        }
        (&Method::POST, "disconnect") => {
            shared.disconnect.send_modify(|count| *count += 1);
            done()
        }
        (&Method::GET, "requests") => {
            let requests = shared.requests.lock().unwrap_or_else(PoisonError::into_inner);
            let list: Vec<Value> = requests
                .values()
                .map(|asked| {
                    let mut entry = asked.entry.clone();
                    entry["count"] = json!(asked.count);
                    entry
                })
                .collect();
            Ok(reply(StatusCode::OK, &json!(list)))
        }
        (&Method::DELETE, "requests") => {
            shared.requests.lock().unwrap_or_else(PoisonError::into_inner).clear();
            done()
        }
        _ => Err(Failure::no_such_path()),
    }
}
