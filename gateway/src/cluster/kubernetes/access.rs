//! The way to an API server: as kubectl finds it, and kept until it fails.

use std::{env, io, path::PathBuf, time::Duration};

use http::{HeaderValue, header};
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
        let mut config = match &self.kubeconfig {
            Some(path) => {
                let kubeconfig = Kubeconfig::read_from(path)?;
                Config::from_custom_kubeconfig(kubeconfig, &options).await?
            }
            None => match Config::from_kubeconfig(&options).await {
                Ok(config) => config,
                Err(error) if self.context.is_none() && is_absent(&error) => {
                    Config::incluster().map_err(|_| {
                        Failure::Config(
                            "there is no kubeconfig: source.kubeconfig and KUBECONFIG are not set, ~/.kube/config does \
                             not exist, and this is no pod of the cluster"
                                .to_owned(),
                        )
                    })?
                }
                Err(error) => return Err(error.into()),
            },
        };
        config.connect_timeout = Some(CONNECT);
        // Done by those who ask: they know what is urgent.
        config.default_retry = false;
        let agent = HeaderValue::from_static(concat!("xdp-gateway/", env!("CARGO_PKG_VERSION")));
        config.headers.push((header::USER_AGENT, agent));
        Ok(config)
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
