//! Faults on demand.

use std::time::Duration;

use hyper::StatusCode;
use serde::{Deserialize, Serialize};

use crate::{failure::Failure, resource::Resource};

/// What goes wrong.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub(crate) enum What {
    /// The request is answered by an error.
    Status {
        code: u16,
        /// Seconds of the header `Retry-After`.
        retry_after: Option<u32>,
    },
    /// No answer ever.
    Stall,
    /// The connection is closed after so many bytes of the answer's body.
    Cut { bytes: usize },
    /// The body comes in pieces of so many bytes, with a pause after each.
    Slow { bytes: usize, pause_ms: u64 },
    /// The body is not the JSON that it should be.
    Garbage,
    /// In the list or watch, the object of this name has a spec and status that cannot be understood.
    MalformedObject { name: String },
    /// The watch first sends the last events again.
    Repeat { events: usize },
    /// The watch begins with an ERROR event.
    WatchError { code: u16 },
}

/// A fault, and which requests have it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Fault {
    #[serde(rename = "fault")]
    pub(crate) what: What,
    /// Only requests with this verb; all if absent.
    pub(crate) verb: Option<String>,
    /// Only requests for this resource; all if absent.
    pub(crate) resource: Option<String>,
    /// Only requests of this user; all but administrators if absent.
    pub(crate) user: Option<String>,
    /// How many requests; all until it is taken back if absent.
    pub(crate) times: Option<u32>,
}

/// Faults in force.
#[derive(Debug, Default)]
pub(crate) struct Faults {
    list: Vec<Fault>,
}

impl Faults {
    pub(crate) fn add(&mut self, fault: Fault) {
        self.list.push(fault);
    }

    pub(crate) fn clear(&mut self) {
        self.list.clear();
    }

    pub(crate) fn list(&self) -> &[Fault] {
        &self.list
    }

    /// The fault of a request, if it has one; counts it.
    pub(crate) fn take(
        &mut self,
        verb: &str,
        resource: Option<Resource>,
        user: &str,
        is_admin: bool,
    ) -> Option<What> {
        let plural = resource.map(Resource::plural);
        let at = self.list.iter().position(|fault| {
            fault.verb.as_deref().is_none_or(|wanted| wanted == verb)
                && fault.resource.as_deref().is_none_or(|wanted| Some(wanted) == plural)
                && fault.user.as_deref().map_or(!is_admin, |wanted| wanted == user)
        })?;
        let fault = &mut self.list[at];
        let what = fault.what.clone();
        if let Some(times) = &mut fault.times {
            *times = times.saturating_sub(1);
            if *times == 0 {
                self.list.remove(at);
            }
        }
        Some(what)
    }
}

/// How a body is sent.
#[derive(Clone, Debug, Default)]
pub(crate) struct Delivery {
    /// The connection ends after so many bytes.
    pub(crate) cut: Option<usize>,
    /// Pieces and pauses.
    pub(crate) slow: Option<(usize, Duration)>,
    /// It is no JSON.
    pub(crate) garbage: bool,
    /// Objects that cannot be understood.
    pub(crate) malformed: Option<String>,
    /// Events sent again.
    pub(crate) repeat: usize,
    /// First event of a watch.
    pub(crate) error: Option<u16>,
}

impl Delivery {
    pub(crate) fn of(what: &What) -> Self {
        let mut delivery = Self::default();
        match what {
            What::Cut { bytes } => delivery.cut = Some(*bytes),
            What::Slow { bytes, pause_ms } => {
                delivery.slow = Some(((*bytes).max(1), Duration::from_millis(*pause_ms)));
            }
            What::Garbage => delivery.garbage = true,
            What::MalformedObject { name } => delivery.malformed = Some(name.clone()),
            What::Repeat { events } => delivery.repeat = *events,
            What::WatchError { code } => delivery.error = Some(*code),
            What::Status { .. } | What::Stall => {}
        }
        delivery
    }
}

/// The answer that a status fault makes.
pub(crate) fn failure(code: u16, retry_after: Option<u32>) -> Failure {
    let code = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let (reason, message) = match code.as_u16() {
        401 => return Failure::unauthorized(),
        403 => ("Forbidden", "forbidden by a fault"),
        410 => ("Expired", "too old resource version"),
        429 => {
            let busy = Failure::plain(code, "Too many requests, please try again later.");
            return Failure { retry_after, ..busy };
        }
        503 => ("ServiceUnavailable", "the server is currently unable to handle the request"),
        _ => ("InternalError", "Internal error occurred: a fault was asked for"),
    };
    Failure { retry_after, ..Failure::new(code, reason, message) }
}
