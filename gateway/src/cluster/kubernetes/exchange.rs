//! One question and its answer.

use std::time::Duration;

use http::{Response, StatusCode, header};
use http_body_util::BodyExt as _;
use kube::client::Body;
use serde::de::DeserializeOwned;
use tokio::time::timeout;

use super::{access::Linked, failure::Failure, request::Right};

/// Sends a request and refuses what is no success. `patience` is how long the server may be silent.
pub(super) async fn ask(
    linked: &Linked,
    right: Right,
    request: Result<http::Request<Vec<u8>>, kube::core::request::Error>,
    patience: Duration,
) -> Result<Response<Body>, Failure> {
    let request = request.map_err(|error| Failure::Config(error.to_string()))?.map(Body::from);
    let response = timeout(patience, linked.client.send(request)).await.map_err(|_| silent(patience))??;
    if response.status().is_success() {
        return Ok(response);
    }
    let (code, retry_after) = (response.status(), retry_after(&response));
    let mut body = response.into_body();
    let mut text = Vec::new();
    // The status counts even if its explanation breaks off.
    while matches!(fill(&mut body, &mut text, patience).await, Ok(true)) {}
    Err(Failure::of_status(right, code, retry_after, &text))
}

/// Sends a request and reads the whole answer.
pub(in crate::cluster) async fn fetch<T: DeserializeOwned>(
    linked: &Linked,
    right: Right,
    request: Result<http::Request<Vec<u8>>, kube::core::request::Error>,
    patience: Duration,
) -> Result<T, Failure> {
    let mut body = ask(linked, right, request, patience).await?.into_body();
    let mut text = Vec::new();
    while fill(&mut body, &mut text, patience).await? {}
    serde_json::from_slice(&text).map_err(|error| Failure::Nonsense(error.to_string()))
}

/// Appends the next piece of a body, for which the server may be silent so long; false at its end.
pub(super) async fn fill(body: &mut Body, text: &mut Vec<u8>, patience: Duration) -> Result<bool, Failure> {
    timeout(patience, next(body, text)).await.map_err(|_| silent(patience))?
}

/// Appends the next piece of a body, whenever it comes; false at its end.
pub(super) async fn next(body: &mut Body, text: &mut Vec<u8>) -> Result<bool, Failure> {
    let Some(frame) = body.frame().await else { return Ok(false) };
    if let Some(data) = frame.map_err(broken)?.data_ref() {
        text.extend_from_slice(data);
    }
    Ok(true)
}

fn silent(patience: Duration) -> Failure {
    Failure::Broken(format!("nothing was heard for {} s", patience.as_secs()))
}

/// In the middle of an answer whatever happens is a broken connection.
fn broken(error: kube::Error) -> Failure {
    match Failure::from(error) {
        Failure::Unreachable(what) => Failure::Broken(what),
        other => other,
    }
}

/// The header `Retry-After`, where servers that are too busy write seconds.
fn retry_after(response: &Response<Body>) -> Option<Duration> {
    let busy = matches!(response.status(), StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE);
    let seconds = response.headers().get(header::RETRY_AFTER)?.to_str().ok()?.trim().parse().ok()?;
    busy.then_some(Duration::from_secs(seconds))
}
