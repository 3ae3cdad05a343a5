//! Where the configuration file is, and what overrides it.

use std::path::PathBuf;

use clap::Args;

use super::{Config, DatapathLog, Problems, Subnets, XdpMode, parse::check_instance};

/// Command line arguments and environment variables of every verb: which gateway.
#[derive(Args, Clone, Debug)]
pub struct Location {
    /// Configuration file
    #[arg(
        long,
        global = true,
        env = "GATEWAY_CONFIG",
        value_name = "FILE",
        default_value = "/etc/gateway/gateway.toml"
    )]
    pub config: PathBuf,
    /// Name of this gateway on the host, instead of the configuration's `instance`
    #[arg(long, global = true, env = "GATEWAY_INSTANCE", value_name = "NAME", value_parser = parse_instance)]
    pub instance: Option<String>,
}

impl Location {
    /// Reads and validates the configuration.
    pub fn load(&self) -> Result<Config, Problems> {
        Config::load(&self.config, &self.overrides())
    }

    /// What goes before the file.
    pub fn overrides(&self) -> Overrides {
        Overrides { instance: self.instance.clone(), ..Overrides::default() }
    }
}

/// Command line arguments and environment variables of verbs for which every setting matters.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Which gateway.
    #[command(flatten)]
    pub location: Location,
    /// Settings of that run.
    #[command(flatten)]
    pub settings: Settings,
}

/// Settings that go before the file's on the command line of a run.
#[derive(Args, Clone, Debug)]
pub struct Settings {
    /// Directory of manifests, instead of the configuration's `source.path`
    #[arg(long, env = "GATEWAY_SOURCE_PATH", value_name = "DIRECTORY")]
    pub source_path: Option<PathBuf>,
    /// How the program is attached, instead of the configuration's `datapath.xdp_mode`
    #[arg(long, env = "GATEWAY_XDP_MODE", value_name = "MODE")]
    pub xdp_mode: Option<XdpMode>,
    /// Per-packet log of the program, instead of the configuration's `datapath.log`
    #[arg(long, env = "GATEWAY_DATAPATH_LOG", value_name = "LEVEL")]
    pub datapath_log: Option<DatapathLog>,
}

impl Options {
    /// What goes before the file.
    pub fn overrides(&self) -> Overrides {
        let Settings { source_path, xdp_mode, datapath_log } = self.settings.clone();
        Overrides { source_path, xdp_mode, datapath_log, ..self.location.overrides() }
    }
}

/// Settings that go before the file's; `None` leaves the file's.
#[derive(Clone, Debug, Default)]
pub struct Overrides {
    /// Name of this gateway on the host.
    pub instance: Option<String>,
    /// Directory of manifests.
    pub source_path: Option<PathBuf>,
    /// How the program is attached.
    pub xdp_mode: Option<XdpMode>,
    /// Per-packet log of the program.
    pub datapath_log: Option<DatapathLog>,
    /// Subnets for overlays of which the file has none; what the file has goes before them.
    pub subnets: Subnets,
}

fn parse_instance(text: &str) -> Result<String, String> {
    match check_instance(text) {
        Ok(()) => Ok(text.to_owned()),
        Err((what, remedy)) => Err(format!("{what}; {remedy}")),
    }
}
