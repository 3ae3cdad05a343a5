//! Answers that are no success: `Status` objects as the real server words them.

use hyper::StatusCode;
use serde_json::{Value, json};

use crate::resource::Resource;

/// A request that is refused.
#[derive(Clone, Debug)]
pub(crate) struct Failure {
    pub(crate) code: StatusCode,
    pub(crate) reason: &'static str,
    pub(crate) message: String,
    pub(crate) details: Value,
    pub(crate) retry_after: Option<u32>,
    /// Goes on with a list although its revision is forgotten.
    pub(crate) token: Option<String>,
    /// The message stands alone, as that of handlers that know nothing of objects.
    pub(crate) plain: bool,
}

impl Failure {
    pub(crate) fn new(code: StatusCode, reason: &'static str, message: impl Into<String>) -> Self {
        Self {
            code,
            reason,
            message: message.into(),
            details: json!({}),
            retry_after: None,
            token: None,
            plain: false,
        }
    }

    /// A refusal in plain text.
    pub(crate) fn plain(code: StatusCode, message: impl Into<String>) -> Self {
        Self { plain: true, ..Self::new(code, "", message) }
    }

    pub(crate) fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "BadRequest", message)
    }

    pub(crate) fn other_name(name: &Value, of_path: &str) -> Self {
        let name = name.as_str().unwrap_or_default();
        Self::bad_request(format!(
            "the name of the object ({name}) does not match the name on the URL ({of_path})"
        ))
    }

    pub(crate) fn not_found(resource: Resource, name: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, "NotFound", format!("{resource} {name:?} not found"))
            .about(resource, name)
    }

    pub(crate) fn no_such_path() -> Self {
        Self::plain(StatusCode::NOT_FOUND, "404 page not found")
    }

    /// Of a path in a group that is known.
    pub(crate) fn no_such_resource() -> Self {
        Self::new(StatusCode::NOT_FOUND, "NotFound", "the server could not find the requested resource")
    }

    pub(crate) fn exists(resource: Resource, name: &str) -> Self {
        Self::new(StatusCode::CONFLICT, "AlreadyExists", format!("{resource} {name:?} already exists"))
            .about(resource, name)
    }

    pub(crate) fn conflict(resource: Resource, name: &str, why: &str) -> Self {
        let message = format!("Operation cannot be fulfilled on {resource} {name:?}: {why}");
        Self::new(StatusCode::CONFLICT, "Conflict", message).about(resource, name)
    }

    pub(crate) fn invalid(resource: Resource, name: &str, field: &str, why: &str) -> Self {
        let message = format!("{} {name:?} is invalid: {field}: {why}", resource.kind());
        let mut failure = Self::new(StatusCode::UNPROCESSABLE_ENTITY, "Invalid", message);
        let reason = match why {
            _ if why.starts_with("Forbidden") => "FieldValueForbidden",
            _ if why.starts_with("Required") => "FieldValueRequired",
            _ if why.starts_with("Unsupported") => "FieldValueNotSupported",
            _ if why.starts_with("Duplicate") => "FieldValueDuplicate",
            _ => "FieldValueInvalid",
        };
        failure.details = json!({
            "name": name, "kind": resource.kind(),
            "causes": [{ "reason": reason, "field": field, "message": why }],
        });
        failure
    }

    pub(crate) fn expired(message: impl Into<String>) -> Self {
        Self::new(StatusCode::GONE, "Expired", message)
    }

    pub(crate) fn unauthorized() -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "Unauthorized", "Unauthorized")
    }

    fn about(mut self, resource: Resource, name: &str) -> Self {
        self.details = about(resource, name);
        self
    }

    /// The object that is sent.
    pub(crate) fn status(&self) -> Value {
        let mut details = self.details.clone();
        if let Some(seconds) = self.retry_after {
            details["retryAfterSeconds"] = json!(seconds);
        }
        let mut status = json!({
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message,
            "reason": self.reason,
            "code": self.code.as_u16(),
        });
        if let Some(token) = &self.token {
            status["metadata"]["continue"] = json!(token);
        }
        if details.as_object().is_some_and(|details| !details.is_empty()) {
            status["details"] = details;
        }
        status
    }
}

/// Which object an answer is about, without what is empty.
pub(crate) fn about(resource: Resource, name: &str) -> Value {
    let mut details = json!({ "kind": resource.plural() });
    for (key, text) in [("name", name), ("group", resource.group())] {
        if !text.is_empty() {
            details[key] = json!(text);
        }
    }
    details
}
