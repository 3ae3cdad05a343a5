//! How talking to an API server can fail, and what to do about it.

use std::{error::Error as StdError, io, time::Duration};

use http::StatusCode;
use kube::{client::AuthError, config::KubeconfigError};

use super::request::Right;
use crate::cluster::problem::Problem;

/// As whom a server takes requests without credentials, in its own words.
const ANONYMOUS: &str = "User \"system:anonymous\"";

/// Why there is no answer, or none that helps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The kubeconfig, or what it refers to, cannot be used.
    Config(String),
    /// Credentials could not be had: the exec plugin or the token file.
    Credentials(String),
    /// No connection.
    Unreachable(String),
    /// A connection, but no trust.
    Tls(String),
    /// The connection ended or fell silent in the middle.
    Broken(String),
    /// 401.
    Unauthorized,
    /// 403 because no credentials were sent; what the server says.
    Anonymous(String),
    /// 403: what was asked for, and what the server says.
    Forbidden(Right, String),
    /// 410: the history that was asked for is gone.
    Gone,
    /// Any other answer that is no success.
    Status {
        /// HTTP status.
        code: u16,
        /// What the server says.
        message: String,
        /// How long it wants to be left alone.
        retry_after: Option<Duration>,
    },
    /// The answer is not what the protocol promises.
    Nonsense(String),
}

impl Failure {
    /// Whether the next attempt should read the kubeconfig and the credentials anew.
    pub(super) fn wants_new_client(&self) -> bool {
        !matches!(self, Self::Gone | Self::Forbidden(..) | Self::Status { .. })
    }

    /// How long the server wants to be left alone.
    pub(super) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Status { retry_after, .. } => *retry_after,
            _ => None,
        }
    }

    /// For people: `place` is what could not be done, and `server` where.
    pub fn problem(&self, place: &str, server: &str) -> Problem {
        let (what, remedy) = match self {
            Self::Config(what) => (
                what.clone(),
                "mend the kubeconfig, or name another one by source.kubeconfig and source.context".to_owned(),
            ),
            Self::Credentials(what) => (
                format!("credentials for {server} cannot be had: {what}"),
                "run the plugin of the kubeconfig's user by hand, as the user that the gateway runs as".to_owned(),
            ),
            Self::Unreachable(what) => (
                format!("{server} cannot be reached: {what}"),
                "check the server's address in the kubeconfig, proxies and firewalls; what is known goes on being forwarded"
                    .to_owned(),
            ),
            Self::Tls(what) => (
                format!("{server} is not trusted: {what}"),
                "check certificate-authority and server in the kubeconfig, and the clocks of both hosts".to_owned(),
            ),
            Self::Broken(what) => (
                format!("the connection to {server} broke: {what}"),
                "it is made anew by itself; if this stays, look at what is between the gateway and the server".to_owned(),
            ),
            Self::Unauthorized => (
                format!("{server} does not accept the credentials (401)"),
                "renew the certificate or token of the kubeconfig's user: it may have expired".to_owned(),
            ),
            Self::Anonymous(message) => (
                format!("{server} takes the gateway for nobody, who may do nothing (403): {message}"),
                "give the kubeconfig's user a certificate, a token or an exec plugin".to_owned(),
            ),
            Self::Forbidden(right, message) => (
                format!("may not {right} (403): {message}"),
                "apply deploy/rbac.yaml, and bind its role to the user of the kubeconfig".to_owned(),
            ),
            Self::Gone => ("the server has forgotten what was asked for (410)".to_owned(), String::new()),
            Self::Status { code, message, .. } => (
                format!("{server} answers {code}: {message}"),
                "it is tried again by itself; if this stays, look at the API server".to_owned(),
            ),
            Self::Nonsense(what) => (
                format!("{server} answers what is no Kubernetes API: {what}"),
                "check that the kubeconfig's server is an API server, and not a proxy's error page".to_owned(),
            ),
        };
        Problem::error(place, what, remedy)
    }

    /// From the status of an answer, and its body.
    pub(super) fn of_status(
        right: Right,
        code: StatusCode,
        retry_after: Option<Duration>,
        body: &[u8],
    ) -> Self {
        let status: Option<kube::core::Status> = serde_json::from_slice(body).ok();
        let message = match status {
            Some(status) if !status.message.is_empty() => status.message,
            _ => {
                plain(body).unwrap_or_else(|| code.canonical_reason().unwrap_or("unknown status")).to_owned()
            }
        };
        match code {
            StatusCode::UNAUTHORIZED => Self::Unauthorized,
            StatusCode::FORBIDDEN if message.contains(ANONYMOUS) => Self::Anonymous(message),
            StatusCode::FORBIDDEN => Self::Forbidden(right, message),
            StatusCode::GONE => Self::Gone,
            code => Self::Status { code: code.as_u16(), message, retry_after },
        }
    }
}

/// An answer of few words, such as that of a server that is too busy to make an object of it; no page of a proxy.
fn plain(body: &[u8]) -> Option<&str> {
    const LONGEST: usize = 200;
    let text = str::from_utf8(body).ok()?.trim();
    let is_sentence =
        (1..=LONGEST).contains(&text.len()) && !text.starts_with(['<', '{']) && !text.contains('\n');
    is_sentence.then_some(text)
}

impl From<KubeconfigError> for Failure {
    fn from(error: KubeconfigError) -> Self {
        Self::Config(chain(&error))
    }
}

impl From<kube::Error> for Failure {
    fn from(error: kube::Error) -> Self {
        match &error {
            kube::Error::Auth(auth) => return Self::Credentials(of_auth(auth)),
            kube::Error::InferKubeconfig(_)
            | kube::Error::InferConfig(_)
            | kube::Error::RustlsTls(_)
            | kube::Error::TlsRequired => return Self::Config(chain(&error)),
            // Their own text has the whole URL, and so the password in it.
            kube::Error::ProxyProtocolDisabled { proxy_url, .. }
            | kube::Error::ProxyProtocolUnsupported { proxy_url } => {
                let scheme = proxy_url.scheme_str().unwrap_or_default();
                return Self::Config(format!("a proxy with the scheme {scheme:?} is not supported"));
            }
            _ => {}
        }
        let Some(found) = causes(&error).find_map(Cause::of) else {
            return Self::Unreachable(deepest(&error));
        };
        match found {
            Cause::Tls(what) => Self::Tls(what),
            Cause::Credentials(what) => Self::Credentials(what),
            Cause::Io(kind, what) if is_broken(kind) => Self::Broken(what),
            Cause::Io(_, what) => Self::Unreachable(what),
        }
    }
}

fn of_auth(error: &AuthError) -> String {
    match error {
        // Its own text has the environment of the plugin and what it printed: secrets.
        AuthError::AuthExecRun { out, .. } => {
            let said = out.stderr.rsplit(|byte| *byte == b'\n').find_map(plain).unwrap_or_default();
            format!("the exec plugin failed with {}; it said {said:?}", out.status)
        }
        other => chain(other),
    }
}

fn is_broken(kind: io::ErrorKind) -> bool {
    matches!(
        kind,
        io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::UnexpectedEof
    )
}

/// What is behind an error of the HTTP client.
enum Cause {
    Tls(String),
    Credentials(String),
    Io(io::ErrorKind, String),
}

impl Cause {
    fn of(error: &(dyn StdError + 'static)) -> Option<Self> {
        if let Some(tls) = error.downcast_ref::<rustls::Error>() {
            return Some(Self::Tls(tls.to_string()));
        }
        if let Some(kube::Error::Auth(auth)) = error.downcast_ref::<kube::Error>() {
            return Some(Self::Credentials(of_auth(auth)));
        }
        let io = error.downcast_ref::<io::Error>()?;
        // What an I/O error wraps is no source of it.
        match io.get_ref() {
            Some(inner) => {
                causes(inner).find_map(Self::of).or_else(|| Some(Self::Io(io.kind(), io.to_string())))
            }
            None => Some(Self::Io(io.kind(), io.to_string())),
        }
    }
}

fn causes<'e>(error: &'e (dyn StdError + 'static)) -> impl Iterator<Item = &'e (dyn StdError + 'static)> {
    std::iter::successors(Some(error), |error: &&'e (dyn StdError + 'static)| (*error).source())
}

fn deepest(error: &(dyn StdError + 'static)) -> String {
    causes(error).last().map_or_else(|| error.to_string(), ToString::to_string)
}

/// An error with its causes, unless it tells them itself.
fn chain(error: &(dyn StdError + 'static)) -> String {
    causes(error).skip(1).fold(error.to_string(), |text, cause| {
        let cause = cause.to_string();
        if text.contains(&cause) { text } else { format!("{text}: {cause}") }
    })
}

#[cfg(test)]
mod tests {
    use super::{super::request::Request, *};

    fn of(code: StatusCode, body: &str) -> Failure {
        Failure::of_status(Request::GetNode.right(), code, None, body.as_bytes())
    }

    /// As kube-apiserver 1.20.2 words it for whoever shows no credentials.
    #[test]
    fn who_is_taken_for_nobody_lacks_credentials_and_no_role() {
        let forbidden = |user: &str| {
            let message =
                format!(r#"nodes \"x\" is forbidden: User \"{user}\" cannot get resource \"nodes\""#);
            let body =
                format!(r#"{{"kind":"Status","message":"{message}","reason":"Forbidden","code":403}}"#);
            of(StatusCode::FORBIDDEN, &body)
        };
        let nobody = forbidden("system:anonymous");
        assert!(matches!(nobody, Failure::Anonymous(_)), "{nobody:?}");
        assert!(nobody.wants_new_client(), "mended in place, the kubeconfig is read again");
        assert!(nobody.problem("here", "it").remedy.contains("token"));
        assert!(matches!(forbidden("bob"), Failure::Forbidden(..)));
    }

    /// A server that is too busy answers in plain text; proxies answer with pages.
    #[test]
    fn a_sentence_is_told_and_a_page_is_not() {
        let told = |body: &str| match of(StatusCode::TOO_MANY_REQUESTS, body) {
            Failure::Status { message, .. } => message,
            other => panic!("{other:?}"),
        };
        let busy = "Too many requests, please try again later.";
        assert_eq!(told(&format!("{busy}\n")), busy);
        assert_eq!(told("<html><body>429</body></html>"), "Too Many Requests");
        assert_eq!(told(""), "Too Many Requests");
    }
}
