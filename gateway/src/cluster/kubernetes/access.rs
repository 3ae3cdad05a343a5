//! The way to an API server: as kubectl finds it, and kept until it fails.

use std::{env, io, path::PathBuf, time::Duration};

use http::{HeaderValue, Uri, header};
use hyper_util::client::proxy::matcher::Matcher;
use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig, KubeconfigError},
};
use tokio::{sync::Mutex, task, time::timeout};

use super::failure::Failure;

/// Longest wait for a connection.
const CONNECT: Duration = Duration::from_secs(10);
/// Longest wait for an exec plugin.
const PLUGIN: Duration = Duration::from_mins(1);

/// Which API server, and as whom.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// The kubeconfig. If absent: `KUBECONFIG`, `~/.kube/config`, or the service account of the pod that this runs in.
    pub kubeconfig: Option<PathBuf>,
    /// The kubeconfig's context; its current one if absent.
    pub context: Option<String>,
}

impl Access {
    /// What people know it by.
    pub fn describe(&self) -> String {
        let from = match &self.kubeconfig {
            Some(path) => format!("kubernetes ({}", path.display()),
            None => "kubernetes (kubeconfig of the environment".to_owned(),
        };
        match &self.context {
            Some(context) => format!("{from}, context {context})"),
            None => format!("{from})"),
        }
    }

    async fn config(&self) -> Result<Config, Failure> {
        let options = KubeConfigOptions { context: self.context.clone(), ..KubeConfigOptions::default() };
        let kubeconfig = match &self.kubeconfig {
            Some(path) => Some(Kubeconfig::read_from(path)?),
            None => match Kubeconfig::read() {
                Ok(kubeconfig) => Some(kubeconfig),
                Err(error) if self.context.is_none() && is_absent(&error) => None,
                Err(error) => return Err(error.into()),
            },
        };
        let own_proxy = kubeconfig.as_ref().and_then(|kubeconfig| self.proxy_of(kubeconfig));
        let mut config = match kubeconfig {
            Some(kubeconfig) => Config::from_custom_kubeconfig(kubeconfig, &options).await?,
            None => Config::incluster().map_err(|_| {
                Failure::Config(
                    "there is no kubeconfig: source.kubeconfig and KUBECONFIG are not set, ~/.kube/config does not \
                     exist, and this is no pod of the cluster"
                        .to_owned(),
                )
            })?,
        };
        config.proxy_url = proxy(own_proxy, &config.cluster_url)?;
        config.connect_timeout = Some(CONNECT);
        // Done by those who ask: they know what is urgent.
        config.default_retry = false;
        let agent = HeaderValue::from_static(concat!("xdp-gateway/", env!("CARGO_PKG_VERSION")));
        config.headers.push((header::USER_AGENT, agent));
        Ok(config)
    }

    /// The proxy that a kubeconfig names for the cluster of the context.
    fn proxy_of(&self, kubeconfig: &Kubeconfig) -> Option<String> {
        let context = self.context.as_ref().or(kubeconfig.current_context.as_ref())?;
        let context = kubeconfig.contexts.iter().find(|entry| entry.name == *context)?.context.as_ref()?;
        let cluster = kubeconfig.clusters.iter().find(|entry| entry.name == context.cluster)?;
        cluster.cluster.as_ref()?.proxy_url.clone().filter(|url| !url.is_empty())
    }

    /// Reads the configuration and makes a client; nothing is asked of the server yet, but an exec plugin runs.
    ///
    /// # Errors
    ///
    /// The kubeconfig or the credentials cannot be used.
    pub async fn connect(&self) -> Result<(Client, String), Failure> {
        let config = self.config().await?;
        let server = config.cluster_url.to_string().trim_end_matches('/').to_owned();
        // It waits for the plugin without letting others run.
        let client = task::spawn_blocking(move || Client::try_from(config));
        match timeout(PLUGIN, client).await {
            Ok(Ok(client)) => Ok((client?, server)),
            Ok(Err(error)) => Err(Failure::Credentials(error.to_string())),
            Err(_) => Err(Failure::Credentials(format!("the exec plugin gave nothing within {PLUGIN:?}"))),
        }
    }
}

/// The proxy towards a server: the kubeconfig's, else that of the environment, unless `NO_PROXY` exempts the server. (kube
/// would look the proxy itself up in `NO_PROXY`.)
fn proxy(own: Option<String>, server: &Uri) -> Result<Option<Uri>, Failure> {
    let of_environment = || {
        let url = ["HTTPS_PROXY", "https_proxy"].into_iter().find_map(|name| env::var(name).ok())?;
        Some(url).filter(|url| !url.is_empty() && Matcher::from_env().intercept(server).is_some())
    };
    let Some(url) = own.or_else(of_environment) else { return Ok(None) };
    url.parse().map(Some).map_err(|error| {
        // In front of the host there may be a password.
        let host = url.rsplit('@').next().unwrap_or_default();
        Failure::Config(format!("the proxy at {host:?} has no valid URL: {error}"))
    })
}

/// Whether there is no kubeconfig at all, and none was asked for.
fn is_absent(error: &KubeconfigError) -> bool {
    let missing = match error {
        KubeconfigError::ReadConfig(error, _) => error.kind() == io::ErrorKind::NotFound,
        KubeconfigError::FindPath => true,
        _ => false,
    };
    missing && env::var_os("KUBECONFIG").is_none_or(|paths| paths.is_empty())
}

/// A client that several tasks share, made anew when one of them finds that it no longer works.
#[derive(Debug)]
pub struct Link {
    access: Access,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    generation: u64,
    client: Option<(Client, String)>,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State").field("generation", &self.generation).finish_non_exhaustive()
    }
}

/// A client, and which one it is.
#[derive(Clone)]
pub struct Linked {
    /// For [`Link::discard`].
    pub(super) generation: u64,
    /// The client.
    pub(super) client: Client,
    /// URL of the server.
    pub server: String,
}

impl Link {
    /// A way that has not been gone yet.
    pub fn new(access: Access) -> Self {
        Self { access, state: Mutex::default() }
    }

    /// What people know it by.
    pub fn describe(&self) -> String {
        self.access.describe()
    }

    /// The client.
    ///
    /// # Errors
    ///
    /// The kubeconfig or the credentials cannot be used.
    pub async fn get(&self) -> Result<Linked, Failure> {
        let mut state = self.state.lock().await;
        if state.client.is_none() {
            state.client = Some(self.access.connect().await?);
            state.generation += 1;
        }
        let (client, server) = state.client.clone().expect("made above");
        Ok(Linked { generation: state.generation, client, server })
    }

    /// Forgets a client that failed, unless that has been done.
    pub(super) async fn discard(&self, generation: u64) {
        let mut state = self.state.lock().await;
        if state.generation == generation {
            state.client = None;
        }
    }
}
