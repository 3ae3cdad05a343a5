//! One load of the program for each interface, because their constants differ; all loads share the pinned tables.
//!
//! The attachment is a BPF link pinned in the bpffs. So it outlives the daemon, and a new daemon (or new constants)
//! swaps the program under it atomically: no packet goes without one.

use std::{collections::BTreeMap, fs, io, thread, time::Duration};

use aya::{
    Ebpf, EbpfError, EbpfLoader, include_bytes_aligned,
    programs::{
        ProgramError, Xdp, XdpMode,
        links::{FdLink, LinkError, PinnedLink},
        loaded_links, loaded_programs,
        xdp::XdpLink,
    },
};
use aya_log::EbpfLogger;
use gateway_common::abi::{self, CONFIG_SYMBOL, PROGRAM, SWEEP_PROGRAM, Ticks, map};
use tracing::{info, warn};

use super::{
    bpf,
    pins::{MapSpec, PinError, Pins, SESSION_TABLES, spec},
    sessions::{self, Merged, SessionTables},
    sweep::Sweeper,
    tables::{self, MoveError},
};
use crate::{
    config::{self, Config, DatapathLog},
    kernel::host::{AttachMode, Link},
};

/// The BPF object, built by this crate's build script.
pub static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/gateway.bpf.o"));

/// Lines of the verifier's log that are worth showing: its complaint stands at the end.
const VERIFIER_TAIL: usize = 20;

/// How often the datapath log is read while it is on.
const LOG_INTERVAL: Duration = Duration::from_millis(20);

/// The program cannot be put on an interface.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A pin is wrong.
    #[error(transparent)]
    Pin(#[from] PinError),
    /// A table cannot get the size that the configuration asks for.
    #[error(transparent)]
    Move(#[from] MoveError),
    /// The object cannot be loaded.
    #[error("cannot load the BPF object: {0}{advice}", advice = load_advice(.0))]
    Object(#[from] EbpfError),
    /// The kernel refuses the program.
    #[error("the kernel refuses the XDP program for {interface}: {source}\n{log}")]
    Program {
        /// Interface, or the name of a program that is not attached.
        interface: String,
        /// What aya said.
        source: io::Error,
        /// End of the verifier's log.
        log: String,
    },
    /// The object is not the one that this daemon was built with.
    #[error("the BPF object has no XDP program named {0}: build the gateway anew")]
    NoProgram(&'static str),
    /// Somebody else's program is there.
    #[error(
        "interface {interface} already runs an XDP program that is not ours (id {id}, name {name}): it is left alone. \
         {remedy}, then start the gateway again"
    )]
    Foreign {
        /// Interface.
        interface: String,
        /// Program id.
        id: u32,
        /// Program name.
        name: String,
        /// How to remove it.
        remedy: String,
    },
    /// The driver cannot do XDP.
    #[error(
        "the driver of interface {interface} does not support XDP ({source}): set xdp_mode = \"generic\" under \
         [datapath] to use the kernel's slower generic hook"
    )]
    NoDriverSupport {
        /// Interface.
        interface: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// Attaching failed otherwise.
    #[error("cannot attach the XDP program to interface {interface}: {}", bpf::reason(source))]
    Attach {
        /// Interface.
        interface: String,
        /// What aya said.
        source: ProgramError,
    },
    /// The attachment cannot be read.
    #[error(
        "cannot use the pinned attachment of interface {interface}: {}; if somebody else pinned it, `gateway detach` \
         removes it",
        bpf::reason(source)
    )]
    Link {
        /// Interface.
        interface: String,
        /// What aya said.
        source: LinkError,
    },
    /// The attachment cannot be taken off.
    #[error("cannot release the attachment of interface {interface}: {source}")]
    Release {
        /// Interface.
        interface: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The attachment cannot be made to outlive the daemon.
    #[error("cannot pin the attachment of interface {interface}: {}", bpf::reason(source))]
    Pinning {
        /// Interface.
        interface: String,
        /// What aya said.
        source: aya::pin::PinError,
    },
}

fn load_advice(error: &EbpfError) -> &'static str {
    match error {
        EbpfError::MapError(aya::maps::MapError::CreateError { io_error, .. }) => {
            match io_error.raw_os_error() {
                Some(libc::EPERM) => " (root, or CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON, is needed)",
                Some(libc::ENOMEM | libc::E2BIG) => " (lower the table sizes under [datapath])",
                _ => "",
            }
        }
        _ => "",
    }
}

/// The kernel lets go of an attachment some time after its pin is gone; so often and at this distance it is tried.
const RELEASE_ATTEMPTS: u32 = 1000;
const RELEASE_PAUSE: Duration = Duration::from_millis(1);

/// What became of the attachment that an earlier run left.
#[derive(Debug)]
enum Adoption {
    /// There was none.
    Nothing,
    /// It holds the device.
    Swap(XdpLink),
    /// It was of no use, and is being released.
    Released,
}

/// A program at work on an interface.
#[derive(Debug)]
struct Attachment {
    constants: abi::Config,
    program_id: u32,
    logger: Option<tokio::task::JoinHandle<()>>,
}

impl Drop for Attachment {
    fn drop(&mut self) {
        if let Some(logger) = &self.logger {
            logger.abort();
        }
    }
}

/// What it takes to load a program; the tables must be settled.
#[derive(Clone, Debug)]
pub struct Loader {
    pins: Pins,
    specs: Vec<MapSpec>,
    settings: config::Datapath,
}

/// A program that the kernel has verified, not yet on an interface.
#[derive(Debug)]
pub struct Loaded {
    ebpf: Ebpf,
    constants: abi::Config,
}

impl Loaded {
    /// Its constants.
    pub fn constants(&self) -> &abi::Config {
        &self.constants
    }

    /// The program itself.
    ///
    /// # Errors
    ///
    /// The object has none of that name.
    pub fn program(&mut self) -> Result<&mut Xdp, LoadError> {
        self.ebpf
            .program_mut(PROGRAM)
            .and_then(|program| program.try_into().ok())
            .ok_or(LoadError::NoProgram(PROGRAM))
    }
}

impl Loader {
    /// For tables that are there, of so many sessions, and for tools: the program's own log is off.
    pub fn of(pins: Pins, config: &Config, slots: u32) -> Self {
        let settings = config::Datapath { log: DatapathLog::Off, ..config.datapath.clone() };
        Self { pins, specs: spec::all(&settings, slots).to_vec(), settings }
    }

    /// Loads the program that removes sessions; `constants` has the timeouts.
    ///
    /// # Errors
    ///
    /// The kernel refuses it, and why.
    pub fn sweeper(&self, constants: &abi::Config) -> Result<Sweeper, LoadError> {
        let mut object = self.object(constants)?;
        let program: &mut Xdp = object
            .program_mut(SWEEP_PROGRAM)
            .and_then(|program| program.try_into().ok())
            .ok_or(LoadError::NoProgram(SWEEP_PROGRAM))?;
        program.load().map_err(|error| refused(SWEEP_PROGRAM, error))?;
        Ok(Sweeper::new(object))
    }

    /// Loads a program with these constants, meant for an interface of that name. Takes a tenth of a second and more,
    /// and changes nothing.
    ///
    /// # Errors
    ///
    /// The kernel refuses it, and why.
    pub fn load(&self, interface: &str, constants: &abi::Config) -> Result<Loaded, LoadError> {
        let mut loaded = Loaded { ebpf: self.object(constants)?, constants: *constants };
        loaded.program()?.load().map_err(|error| refused(interface, error))?;
        Ok(loaded)
    }

    fn object(&self, constants: &abi::Config) -> Result<Ebpf, LoadError> {
        let level: u8 = match self.settings.log {
            DatapathLog::Off => 0,
            DatapathLog::Debug => aya_log::Level::Debug as u8,
        };
        let mut loader = EbpfLoader::new();
        loader.override_global(CONFIG_SYMBOL, constants, true);
        loader.override_global(aya_log::LEVEL, &level, false);
        for spec in &self.specs {
            loader
                .map_pin_path(spec.name, self.pins.map(spec.name))
                .map_max_entries(spec.name, spec.max_entries);
        }
        Ok(loader.load(OBJECT)?)
    }
}

/// The programs of an instance.
#[derive(Debug)]
pub struct Programs {
    loader: Loader,
    slots: u32,
    /// Session tables that programs may still work on, until every one works on those of this run.
    predecessors: Vec<SessionTables>,
    /// A moment before their sessions were taken over first.
    taken_over: Ticks,
    attached: BTreeMap<String, Attachment>,
}

impl Programs {
    /// Prepares the bpffs and checks the pins of an earlier run; loads nothing yet.
    ///
    /// # Errors
    ///
    /// A pin that is not what this version expects.
    pub fn prepare(mut pins: Pins, config: &Config) -> Result<Self, LoadError> {
        pins.prepare()?;
        let taken_over = sessions::now();
        let predecessors = adopt_left_over(&pins)?.into_iter().collect();
        pins.clear_staging()?;
        let slots = slots(&pins, config.snat.slots())?;
        let specs = spec::all(&config.datapath, slots).to_vec();
        pins.check(&specs)?;
        let loader = Loader { pins, specs, settings: config.datapath.clone() };
        Ok(Self { loader, slots, predecessors, taken_over, attached: BTreeMap::new() })
    }

    /// How many sessions the tables have room for. More than configured, if more are open.
    pub fn session_slots(&self) -> u32 {
        self.slots
    }

    /// The pins.
    pub fn pins(&self) -> &Pins {
        &self.loader.pins
    }

    /// What loads programs, for use beside other work.
    pub fn loader(&self) -> Loader {
        self.loader.clone()
    }

    /// Makes the tables, or adopts them, without attaching anything. Those that get another size are copied.
    ///
    /// # Errors
    ///
    /// The object cannot be loaded, or what a table holds does not fit its new size. What ran before goes on running.
    pub fn create_tables(&mut self) -> Result<(), LoadError> {
        // Dropped again at once: the pins keep the tables.
        self.loader.object(&abi::Config::UNSET)?;
        for name in self.pins().staged().iter().filter(|name| !SESSION_TABLES.contains(name)) {
            let copied = tables::fill_successor(self.pins(), name)?;
            info!(table = name, entries = copied, "table moved to its new size");
        }
        if self.pins().staged().contains(map::REVERSE) {
            let old = SessionTables::open(&self.pins().without_staging())?;
            let new = SessionTables::open(self.pins())?;
            let merged = sessions::merge(&old, &new, None).map_err(MoveError::from)?;
            report(merged, "sessions moved to tables of the new size");
            self.predecessors.push(old);
        }
        Ok(())
    }

    /// Makes the tables the ones that an instance is known by, when every program uses them. What happened to sessions
    /// while programs were swapped is taken over.
    ///
    /// # Errors
    ///
    /// A table that cannot be read or written, a pin that cannot be put in its place.
    pub fn settle_tables(&mut self) -> Result<(), LoadError> {
        if !self.predecessors.is_empty() {
            let new = SessionTables::open(self.pins())?;
            for old in self.predecessors.drain(..) {
                let merged = sessions::merge(&old, &new, Some(self.taken_over)).map_err(MoveError::from)?;
                report(merged, "sessions of the meantime taken over");
            }
        }
        Ok(self.loader.pins.settle()?)
    }

    /// Whether the interface runs a program with these constants.
    pub fn is_current(&self, link: &Link, constants: &abi::Config) -> bool {
        self.attached.get(&link.name).is_some_and(|attachment| {
            attachment.constants == *constants && link.xdp.program == Some(attachment.program_id)
        })
    }

    /// Puts a loaded program on an interface: swaps the one of the pinned link, or attaches and pins. `link` must be as
    /// it is now.
    ///
    /// # Errors
    ///
    /// What is in the way, and how to remove it. What ran before goes on running.
    pub fn attach(&mut self, link: &Link, mut loaded: Loaded) -> Result<(), LoadError> {
        let interface = &link.name;
        let settings = &self.loader.settings;
        let logger = (settings.log != DatapathLog::Off).then(|| follow_log(&mut loaded.ebpf)).flatten();
        let constants = loaded.constants;
        let program = loaded.program()?;
        let fault = |source| LoadError::Attach { interface: interface.clone(), source };
        let program_id = program.info().map_err(fault)?.id();

        let how = match self.adopt(link)? {
            Adoption::Swap(pinned) => {
                program.attach_to_link(pinned).map_err(fault)?;
                "swapped"
            }
            Adoption::Nothing => {
                self.attach_new(program, link, 1)?;
                "attached"
            }
            Adoption::Released => {
                self.attach_new(program, link, RELEASE_ATTEMPTS)?;
                "attached anew"
            }
        };
        info!(interface, program = program_id, mode = ?settings.xdp_mode, "XDP program {how}");
        self.attached.insert(interface.clone(), Attachment { constants, program_id, logger });
        Ok(())
    }

    /// The pinned link, if it still holds this very device in the configured mode.
    fn adopt(&self, link: &Link) -> Result<Adoption, LoadError> {
        let path = self.pins().link(&link.name);
        if !path.exists() {
            return Ok(Adoption::Nothing);
        }
        let fault = |source| LoadError::Link { interface: link.name.clone(), source };
        let pinned = FdLink::from(PinnedLink::from_pin(&path).map_err(fault)?);
        let ours = Some(pinned.info().map_err(fault)?.program_id());
        let mode = match self.loader.settings.xdp_mode {
            config::XdpMode::Driver => AttachMode::Driver,
            config::XdpMode::Generic => AttachMode::Generic,
            config::XdpMode::Off => return Ok(Adoption::Nothing),
        };
        if link.xdp.program == ours && link.xdp.mode == Some(mode) {
            return XdpLink::try_from(pinned).map(Adoption::Swap).map_err(fault);
        }
        // A device that went away leaves its link behind. The mode of a link cannot change, and the kernel takes no two
        // modes at once: until the new program is attached, which is ready by now, the kernel forwards alone.
        if link.xdp.program == ours {
            bpf::detach_link(&path)
                .map_err(|source| LoadError::Release { interface: link.name.clone(), source })?;
        }
        self.unpin(&link.name)?;
        Ok(Adoption::Released)
    }

    fn attach_new(&self, program: &mut Xdp, link: &Link, attempts: u32) -> Result<(), LoadError> {
        let interface = &link.name;
        let mode = match self.loader.settings.xdp_mode {
            config::XdpMode::Driver => XdpMode::Driver,
            config::XdpMode::Generic => XdpMode::Skb,
            config::XdpMode::Off => return Ok(()),
        };
        let mut attached = program.attach_to_if_index(link.index, mode);
        for _ in 1..attempts {
            match &attached {
                Err(error) if errno(error) == Some(libc::EBUSY) => thread::sleep(RELEASE_PAUSE),
                _ => break,
            }
            attached = program.attach_to_if_index(link.index, mode);
        }
        let id = attached.map_err(|error| match errno(&error) {
            Some(libc::EBUSY | libc::EEXIST) => self.foreign(link),
            Some(code @ (libc::EOPNOTSUPP | libc::EINVAL)) if mode == XdpMode::Driver => {
                LoadError::NoDriverSupport {
                    interface: interface.clone(),
                    source: io::Error::from_raw_os_error(code),
                }
            }
            _ => LoadError::Attach { interface: interface.clone(), source: error },
        })?;
        let attach = |source| LoadError::Attach { interface: interface.clone(), source };
        let attached = program.take_link(id).map_err(attach)?;
        let fault = |source| LoadError::Link { interface: interface.clone(), source };
        let attached = FdLink::try_from(attached).map_err(fault)?;
        attached
            .pin(self.pins().link(interface))
            .map_err(|source| LoadError::Pinning { interface: interface.clone(), source })?;
        Ok(())
    }

    /// Looks for a program on the interface that is not of this instance: before anything is made, as what is made for
    /// an instance that cannot run is in the way of those that do.
    ///
    /// # Errors
    ///
    /// Whose it is, and how to remove it.
    pub fn refuse_foreign(&self, link: &Link) -> Result<(), LoadError> {
        match link.xdp.program {
            Some(program) if !self.pins().holds(&link.name, program) => Err(self.foreign(link)),
            _ => Ok(()),
        }
    }

    /// Who runs on the interface, for the error.
    fn foreign(&self, link: &Link) -> LoadError {
        let interface = link.name.clone();
        let id = link.xdp.program.unwrap_or(0);
        let name = program_name(id).unwrap_or_else(|| "unknown".to_owned());
        let remedy = if let Some(other) = self.pins().other_instance(&interface) {
            format!(
                "It is of the gateway's instance {other}: take the interface out of that one's configuration and restart \
                 it, or remove it altogether with `gateway detach --instance {other}`"
            )
        } else if let Some(link) = loaded_links().filter_map(Result::ok).find(|link| link.program_id() == id)
        {
            format!("Remove it with the tool that attached it, or by `bpftool link detach id {}`", link.id())
        } else {
            format!(
                "Remove it with the tool that attached it, or by `ip link set dev {interface} xdp off` or \
                 `bpftool net detach xdp dev {interface}`"
            )
        };
        LoadError::Foreign { interface, id, name, remedy }
    }

    fn unpin(&self, interface: &str) -> Result<(), PinError> {
        let path = self.pins().link(interface);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(PinError::Io { verb: "remove", path, source: error })
            }
            _ => Ok(()),
        }
    }

    /// Detaches interfaces that the configuration no longer names.
    ///
    /// # Errors
    ///
    /// A pin that cannot be listed or removed.
    pub fn detach_others(&mut self, keep: impl Fn(&str) -> bool) -> Result<(), PinError> {
        for interface in self.pins().linked_interfaces()? {
            if !keep(&interface) {
                self.unpin(&interface)?;
                self.attached.remove(&interface);
                info!(
                    interface,
                    "XDP program detached: the configuration does not name the interface any more"
                );
            }
        }
        Ok(())
    }
}

/// Sessions of a start that was cut off are put with the others; the tables that they are from, as programs may still
/// work on them.
fn adopt_left_over(pins: &Pins) -> Result<Option<SessionTables>, LoadError> {
    let left = match SessionTables::open(&pins.left_over()) {
        Ok(left) => left,
        Err(PinError::Absent(_)) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let own = SessionTables::open(pins)?;
    report(
        sessions::merge(&left, &own, None).map_err(MoveError::from)?,
        "sessions of a start that was cut off taken over",
    );
    Ok(Some(left))
}

/// How many slots the tables get: as many as are wanted, unless more sessions are open.
fn slots(pins: &Pins, wanted: u32) -> Result<u32, LoadError> {
    let own = match SessionTables::open(pins) {
        Ok(own) => own,
        Err(PinError::Absent(_)) => return Ok(wanted),
        Err(error) => return Err(error.into()),
    };
    let capacity = own.slots.capacity();
    if wanted >= capacity || own.count().map_err(MoveError::from)? <= wanted as usize {
        return Ok(wanted);
    }
    Ok(capacity)
}

fn report(merged: Merged, what: &str) {
    let Merged { added, updated, lost } = merged;
    if lost > 0 {
        warn!(
            added,
            updated, lost, "{what}; those that are lost had no room, or their ports were given away"
        );
    } else {
        info!(added, updated, "{what}");
    }
}

/// Name of a loaded program.
pub fn program_name(id: u32) -> Option<String> {
    loaded_programs().filter_map(Result::ok).find(|info| info.id() == id)?.name_as_str().map(str::to_owned)
}

fn refused(interface: &str, error: ProgramError) -> LoadError {
    match error {
        ProgramError::LoadError { io_error, verifier_log } => {
            let log = verifier_log.to_string();
            let lines: Vec<&str> = log.lines().collect();
            let tail = lines.get(lines.len().saturating_sub(VERIFIER_TAIL)..).unwrap_or_default();
            LoadError::Program { interface: interface.to_owned(), source: io_error, log: tail.join("\n") }
        }
        source => LoadError::Attach { interface: interface.to_owned(), source },
    }
}

fn errno(error: &ProgramError) -> Option<i32> {
    // aya wraps the error of the system call once or twice.
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if let Some(code) = error.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error) {
            return Some(code);
        }
        if let Some(syscall) = error.downcast_ref::<aya::sys::SyscallError>() {
            return syscall.io_error.raw_os_error();
        }
        cause = error.source();
    }
    match error {
        ProgramError::SyscallError(syscall) => syscall.io_error.raw_os_error(),
        _ => None,
    }
}

/// Hands the program's log records to the daemon's log, until the attachment goes.
fn follow_log(ebpf: &mut Ebpf) -> Option<tokio::task::JoinHandle<()>> {
    match EbpfLogger::init(ebpf) {
        Ok(mut logger) => Some(tokio::spawn(async move {
            let mut ticks = tokio::time::interval(LOG_INTERVAL);
            loop {
                ticks.tick().await;
                logger.flush();
            }
        })),
        Err(error) => {
            warn!(%error, "no datapath log");
            None
        }
    }
}
