//! The page of metrics over HTTP, for few who ask seldom.

use std::{convert::Infallible, sync::Arc, time::Duration};

use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::{
    body::{Bytes, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Mutex, Semaphore},
    task::spawn_blocking,
    time::{Instant, sleep, timeout},
};
use tracing::debug;

use super::{Sources, families};

/// At a time; others wait.
const CONNECTIONS: usize = 8;
/// For all of a connection.
const PATIENCE: Duration = Duration::from_secs(5);
/// Who asks again so soon gets the same page.
const FRESH: Duration = Duration::from_secs(1);
/// After a connection could not be accepted.
const PAUSE: Duration = Duration::from_millis(100);

const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The page and what it is made from.
pub(super) struct Page {
    sources: Sources,
    last: Mutex<Option<(Instant, Bytes)>>,
}

impl Page {
    pub(super) fn new(sources: Sources) -> Self {
        Self { sources, last: Mutex::default() }
    }

    /// The page of now, or of a moment ago. It is made once, however many ask.
    async fn text(self: Arc<Self>) -> anyhow::Result<Bytes> {
        let mut last = self.last.lock().await;
        if let Some((at, text)) = &*last
            && at.elapsed() < FRESH
        {
            return Ok(text.clone());
        }
        let page = Arc::clone(&self);
        let text = spawn_blocking(move || anyhow::Ok(families::text(&page.sources.read()?)?)).await??;
        let text = Bytes::from(text);
        *last = Some((Instant::now(), text.clone()));
        Ok(text)
    }
}

/// Serves for ever.
pub(super) async fn run(listener: TcpListener, page: Arc<Page>) {
    let seats = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(seat) = Arc::clone(&seats).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let page = Arc::clone(&page);
                tokio::spawn(async move {
                    converse(stream, page).await;
                    drop(seat);
                });
            }
            Err(error) => {
                debug!("a connection for metrics could not be accepted: {error}");
                sleep(PAUSE).await;
            }
        }
    }
}

async fn converse(stream: TcpStream, page: Arc<Page>) {
    let service = service_fn(move |request| answer(request, Arc::clone(&page)));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    match timeout(PATIENCE, connection).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => debug!("a connection for metrics broke: {error}"),
        Err(_) => debug!("a connection for metrics took too long"),
    }
}

async fn answer(request: Request<Incoming>, page: Arc<Page>) -> Result<Response<Full<Bytes>>, Infallible> {
    let plain = |status, text: String| {
        let mut response = Response::new(Full::new(Bytes::from(text)));
        *response.status_mut() = status;
        response
    };
    if request.uri().path() != "/metrics" {
        return Ok(plain(StatusCode::NOT_FOUND, "metrics are at /metrics\n".to_owned()));
    }
    if ![Method::GET, Method::HEAD].contains(request.method()) {
        let mut response = plain(StatusCode::METHOD_NOT_ALLOWED, "GET reads the metrics\n".to_owned());
        response.headers_mut().insert(header::ALLOW, header::HeaderValue::from_static("GET, HEAD"));
        return Ok(response);
    }
    Ok(match page.text().await {
        Ok(text) => {
            let mut response = Response::new(Full::new(text));
            let kind = header::HeaderValue::from_static(CONTENT_TYPE);
            response.headers_mut().insert(header::CONTENT_TYPE, kind);
            response
        }
        Err(error) => plain(StatusCode::INTERNAL_SERVER_ERROR, format!("{error:#}\n")),
    })
}
