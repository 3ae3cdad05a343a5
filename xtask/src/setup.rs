//! Provides what build, lab and tests need. Says what it installs; what it cannot install it names, with the command
//! that gets it.

use std::{
    env,
    fs::{self, File},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

use crate::{
    apt::{self, Apt},
    process::{capture, cargo, find, run as execute, workspace},
    vm,
};

/// The one version of bpf-linker whose output has been looked at.
const LINKER_VERSION: &str = include_str!("../../gateway-ebpf/bpf-linker.version");

/// Debian packages, each with a program by which it is recognised.
const PACKAGES: [(&str, &str); 10] = [
    ("bpftool", "bpftool"),
    ("curl", "curl"),
    ("ethtool", "ethtool"),
    ("iperf3", "iperf3"),
    ("iproute2", "ip"),
    ("iputils-ping", "ping"),
    ("nftables", "nft"),
    ("procps", "sysctl"),
    ("tcpdump", "tcpdump"),
    ("traceroute", "traceroute"),
];

/// The same for the suite `vm`.
const GUEST_PACKAGES: [(&str, &str); 2] = [("binutils", "strip"), ("xz-utils", "xz")];
const EMULATOR: &str = "qemu-system-x86";
/// QEMU 7.2 crashes now and then when it boots Linux 6.12.
const EMULATOR_VERSION: u32 = 8;

const BPFFS: &str = "/sys/fs/bpf";

/// What a verb may ask for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Need {
    /// To compile the BPF object: source of `core`, bpf-linker.
    Bpf,
    /// Programs that lab and tests run.
    Programs,
    /// The file system in which maps are pinned.
    Bpffs,
    /// To run other kernels: QEMU, and what makes something that it can boot.
    Emulator,
}

impl Need {
    /// What lab and tests need on this machine's kernel.
    pub(crate) const ALL: [Self; 3] = [Self::Bpf, Self::Programs, Self::Bpffs];
}

/// Something that is not there.
enum Missing {
    CoreSource { toolchain: PathBuf },
    Linker { reason: String },
    Packages(Vec<&'static str>),
    Bpffs,
    Emulator { reason: String },
}

/// Makes sure that what is needed is there.
pub(crate) fn run(needs: &[Need]) -> Result<()> {
    if missing(needs)?.is_empty() {
        return Ok(());
    }
    let tools = workspace().join("target/tools");
    fs::create_dir_all(&tools).with_context(|| format!("cannot create {}", tools.display()))?;
    let lock_path = tools.join("setup.lock");
    let lock = File::create(&lock_path).with_context(|| format!("cannot create {}", lock_path.display()))?;
    if lock.try_lock().is_err() {
        eprintln!("setup: waiting for another one that is at work");
        lock.lock().with_context(|| format!("cannot lock {}", lock_path.display()))?;
    }

    // Another set-up may have done it while this one waited for the lock.
    let mut failures = Vec::new();
    for item in missing(needs)? {
        eprintln!("setup: {}", item.announcement());
        if let Err(error) = item.install() {
            failures.push(format!("{}: {error:#}\n  to get it: {}", item.name(), item.remedy()));
        }
    }
    for item in missing(needs)? {
        if !failures.iter().any(|failure| failure.starts_with(&item.name())) {
            failures.push(format!(
                "{}: still missing after installation\n  to get it: {}",
                item.name(),
                item.remedy()
            ));
        }
    }
    if failures.is_empty() {
        return Ok(());
    }
    bail!("set-up is not complete\n{}", failures.join("\n"))
}

fn missing(needs: &[Need]) -> Result<Vec<Missing>> {
    let mut found = Vec::new();
    if needs.contains(&Need::Bpf) {
        found.extend(missing_core_source()?);
        found.extend(missing_linker());
    }
    if needs.contains(&Need::Programs) {
        found.extend(missing_packages(&PACKAGES));
    }
    if needs.contains(&Need::Emulator) {
        found.extend(missing_packages(&GUEST_PACKAGES));
        found.extend(emulator_fault().map(|reason| Missing::Emulator { reason }));
    }
    if needs.contains(&Need::Bpffs) {
        let mounts = fs::read_to_string("/proc/mounts").context("cannot read /proc/mounts")?;
        if !is_mounted(&mounts) {
            found.push(Missing::Bpffs);
        }
    }
    Ok(found)
}

fn missing_packages(packages: &[(&'static str, &str)]) -> Option<Missing> {
    let absent = packages.iter().filter(|(_, program)| find(program).is_none());
    let names: Vec<_> = absent.map(|(package, _)| *package).collect();
    (!names.is_empty()).then_some(Missing::Packages(names))
}

fn emulator_fault() -> Option<String> {
    if find(vm::PROGRAM).is_none() {
        return Some("not installed".to_owned());
    }
    match capture(Command::new(vm::PROGRAM).arg("--version")) {
        Ok(text) if emulator_version(&text).is_some_and(|version| version >= EMULATOR_VERSION) => None,
        Ok(text) => Some(format!("{:?} is there", text.lines().next().unwrap_or_default())),
        Err(error) => Some(format!("it does not run: {error:#}")),
    }
}

/// The first number of the version in the output of `qemu-system-x86_64 --version`.
fn emulator_version(text: &str) -> Option<u32> {
    text.strip_prefix("QEMU emulator version ")?.split('.').next()?.parse().ok()
}

fn missing_core_source() -> Result<Option<Missing>> {
    let sysroot = capture(Command::new("rustc").args(["--print", "sysroot"]).current_dir(workspace()))?;
    let toolchain = PathBuf::from(sysroot.trim());
    let present = toolchain.join("lib/rustlib/src/rust/library/core/src/lib.rs").exists();
    Ok((!present).then_some(Missing::CoreSource { toolchain }))
}

fn missing_linker() -> Option<Missing> {
    let reason = match env::var_os("GATEWAY_BPF_LINKER") {
        // The build checks it and speaks of it by this name.
        Some(_) => return None,
        None => linker_fault(&linker()),
    };
    reason.map(|reason| Missing::Linker { reason })
}

fn linker() -> PathBuf {
    workspace().join("target/tools/bin/bpf-linker")
}

fn linker_fault(path: &Path) -> Option<String> {
    if !path.exists() {
        return Some("not installed".to_owned());
    }
    match capture(Command::new(path).arg("--version")) {
        Ok(text) if linker_version(&text) == Some(LINKER_VERSION.trim()) => None,
        Ok(text) => Some(format!("{:?} is there", text.trim())),
        Err(error) => Some(format!("it does not run: {error:#}")),
    }
}

/// The version in the output of `bpf-linker --version`.
fn linker_version(text: &str) -> Option<&str> {
    text.trim().strip_prefix("bpf-linker ")?.split_whitespace().next()
}

/// Whether the table of mounts has a BPF file system at its usual place.
fn is_mounted(mounts: &str) -> bool {
    mounts.lines().any(|line| {
        let mut fields = line.split(' ').skip(1);
        fields.next() == Some(BPFFS) && fields.next() == Some("bpf")
    })
}

fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0)
}

/// Whether the text of `/etc/os-release` names Debian or a relative.
fn is_debian(os_release: &str) -> bool {
    os_release
        .lines()
        .filter_map(|line| line.strip_prefix("ID=").or_else(|| line.strip_prefix("ID_LIKE=")))
        .flat_map(|value| value.trim_matches('"').split(' '))
        .any(|id| id == "debian" || id == "ubuntu")
}

impl Missing {
    fn name(&self) -> String {
        match self {
            Self::CoreSource { .. } => "rust-src".to_owned(),
            Self::Linker { .. } => format!("bpf-linker {}", LINKER_VERSION.trim()),
            Self::Packages(packages) => packages.join(" "),
            Self::Bpffs => format!("BPF file system at {BPFFS}"),
            Self::Emulator { .. } => format!("{EMULATOR} {EMULATOR_VERSION} or later"),
        }
    }

    fn announcement(&self) -> String {
        match self {
            Self::CoreSource { toolchain } => {
                format!("adding the component rust-src to the toolchain {}", toolchain.display())
            }
            Self::Linker { reason } => {
                format!("building {} into target/tools, a minute or two ({reason})", self.name())
            }
            Self::Packages(packages) => format!("installing Debian packages: {}", packages.join(" ")),
            Self::Bpffs => format!("mounting a {}", self.name()),
            Self::Emulator { reason } => format!("installing {} ({reason})", self.name()),
        }
    }

    fn remedy(&self) -> String {
        match self {
            Self::CoreSource { .. } => "rustup component add rust-src".to_owned(),
            Self::Linker { .. } => {
                format!(
                    "cargo install --locked --version {} --root target/tools bpf-linker",
                    LINKER_VERSION.trim()
                )
            }
            Self::Packages(packages) => {
                format!("as root: apt-get update && apt-get install {}", packages.join(" "))
            }
            Self::Bpffs => format!("as root: mount -t bpf bpf {BPFFS}"),
            Self::Emulator { .. } => {
                format!("as root: apt-get install {EMULATOR}, on Debian 12 from bookworm-backports")
            }
        }
    }

    fn install(&self) -> Result<()> {
        match self {
            Self::CoreSource { .. } => {
                if find("rustup").is_none() {
                    bail!("the toolchain does not come from rustup");
                }
                execute(
                    Command::new("rustup").args(["component", "add", "rust-src"]).current_dir(workspace()),
                )
            }
            Self::Linker { .. } => {
                let root = workspace().join("target/tools");
                let mut install = cargo();
                install
                    .env_remove("CARGO_TARGET_DIR")
                    .env_remove("CARGO_BUILD_TARGET")
                    .args([
                        "install",
                        "--quiet",
                        "--locked",
                        "--force",
                        "--version",
                        LINKER_VERSION.trim(),
                        "--root",
                    ])
                    .arg(root)
                    .arg("bpf-linker");
                execute(&mut install)
            }
            Self::Packages(packages) => install_packages(packages),
            Self::Bpffs => {
                if !is_root() {
                    bail!("only root can mount it");
                }
                capture(Command::new("mount").args(["-t", "bpf", "bpf", BPFFS])).map(drop)
            }
            Self::Emulator { .. } => install_emulator(),
        }
    }
}

fn install_emulator() -> Result<()> {
    const OLD: &str = "bookworm";
    const NEWER: &str = "bookworm-backports";
    if apt::codename().as_deref() != Some(OLD) {
        return install_packages(&[EMULATOR]);
    }
    may_install()?;
    Apt::open(&workspace().join("target/tools/apt"), &[OLD, NEWER])?.install(&[EMULATOR], NEWER)
}

/// Whether packages can be installed on this machine.
fn may_install() -> Result<()> {
    if !is_debian(&fs::read_to_string("/etc/os-release").unwrap_or_default()) || find("apt-get").is_none() {
        bail!(
            "this is neither Debian nor Ubuntu; its own package manager has them under these or similar names"
        );
    }
    if !is_root() {
        bail!("only root can install packages");
    }
    Ok(())
}

fn install_packages(packages: &[&str]) -> Result<()> {
    may_install()?;
    let apt = |arguments: &[&str]| {
        let mut command = Command::new("apt-get");
        command
            .env("DEBIAN_FRONTEND", "noninteractive")
            .args(["-qq", "-o", "DPkg::Lock::Timeout=300"])
            .args(arguments);
        capture(&mut command)
    };
    let install: Vec<_> =
        ["install", "--yes", "--no-install-recommends"].iter().chain(packages).copied().collect();
    // Package lists that are absent or old show only when packages are fetched.
    if apt(&install).is_err() {
        apt(&["update"])?;
        apt(&install)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_linker_version() {
        assert_eq!(linker_version("bpf-linker 0.10.3\n"), Some("0.10.3"));
        assert_eq!(linker_version("bpf-linker 0.10.3 (LLVM 22)\n"), Some("0.10.3"));
        assert_eq!(linker_version("ld 2.40\n"), None);
        assert_eq!(linker_version(""), None);
    }

    #[test]
    fn a_linker_of_another_version_does_not_pass() {
        use std::os::unix::fs::PermissionsExt;

        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("bpf-linker");
        assert_eq!(linker_fault(&path).as_deref(), Some("not installed"));
        let fake = |version: &str| {
            fs::write(&path, format!("#!/bin/sh\necho bpf-linker {version}\n")).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        };
        fake("0.9.0");
        assert!(linker_fault(&path).unwrap().contains("0.9.0"));
        fake(LINKER_VERSION.trim());
        assert_eq!(linker_fault(&path), None);
    }

    #[test]
    fn reads_the_emulator_version() {
        assert_eq!(
            emulator_version("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)\nCopyright"),
            Some(10)
        );
        assert_eq!(emulator_version("QEMU emulator version 7.2.19\n"), Some(7));
        assert_eq!(emulator_version("something else"), None);
    }

    #[test]
    fn knows_debian_and_its_relatives() {
        assert!(is_debian("PRETTY_NAME=\"Debian GNU/Linux 12\"\nID=debian\n"));
        assert!(is_debian("ID=linuxmint\nID_LIKE=\"ubuntu debian\"\n"));
        assert!(!is_debian("ID=fedora\nHOME_URL=\"https://debian.example\"\n"));
        assert!(!is_debian(""));
    }

    #[test]
    fn finds_the_bpf_file_system_among_mounts() {
        assert!(is_mounted("proc /proc proc rw 0 0\nbpf /sys/fs/bpf bpf rw,nosuid 0 0\n"));
        assert!(!is_mounted("none /sys/fs/bpf tmpfs rw 0 0\n"));
        assert!(!is_mounted("bpf /mnt/bpf bpf rw 0 0\n"));
    }
}
