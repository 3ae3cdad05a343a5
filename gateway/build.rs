//! Builds the XDP program of `gateway-ebpf` for the BPF target, so that the daemon can embed it.
//!
//! A nested cargo with its own target directory does the work. The object lands in `$OUT_DIR/gateway.bpf.o`, with a
//! copy at `target/bpf/gateway.bpf.o` for `cargo xtask verify` and for people. With the same flags it builds what the
//! benchmark compares it with, which is embedded nowhere: `target/bpf/reference.bpf.o`.
//!
//! Environment:
//! - `GATEWAY_BPF_PROFILE`: `fast` (the default) or `portable`, see [`Profile`].
//! - `GATEWAY_BPF_LINKER`: path of a bpf-linker to use instead of the one that `cargo xtask setup` installs.

use std::{
    env,
    ffi::OsStr,
    fs, io,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

const TARGET: &str = "bpfel-unknown-none";
const OBJECT: &str = "gateway.bpf.o";
const REFERENCE: &str = "reference.bpf.o";
const LINKER_VERSION: &str = include_str!("../gateway-ebpf/bpf-linker.version");
/// LLVM knows this feature, rustc does not, and says so once for each crate.
const MISALIGNED: &str = "allows-misaligned-mem-access";
const SETUP: &str = "run `cargo xtask setup`, which installs what the build needs";

/// Code generation settings.
#[derive(Clone, Copy)]
enum Profile {
    /// For kernels on x86-64 and arm64: packet headers are read in whole words although they are not aligned, and
    /// copies of constant length become plain loads and stores. A third fewer instructions than `Portable`.
    Fast,
    /// Aligned access only: for machines whose verifier insists on it. Copies of headers are calls to loops over
    /// bytes here; expanded in place, byte by byte, they need more stack than there is.
    Portable,
}

impl Profile {
    const VARIABLE: &str = "GATEWAY_BPF_PROFILE";

    fn from_env() -> Result<Self, String> {
        match env::var(Self::VARIABLE).as_deref() {
            Err(env::VarError::NotPresent) | Ok("" | "fast") => Ok(Self::Fast),
            Ok("portable") => Ok(Self::Portable),
            Ok(other) => Err(format!("{} is {other:?}: use \"fast\" or \"portable\"", Self::VARIABLE)),
            Err(error) => Err(format!("{}: {error}: use \"fast\" or \"portable\"", Self::VARIABLE)),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Fast => "fast",
            Self::Portable => "portable",
        }
    }

    fn rustflags(self, linker: &Path) -> String {
        let mut flags = vec![
            format!("-Clinker={}", linker.display()),
            // 32-bit registers and atomics with a result: Linux 5.12.
            "-Ctarget-cpu=v3".to_owned(),
            // BTF is made from full debug information.
            "-Cdebuginfo=2".to_owned(),
            "-Clink-arg=--btf".to_owned(),
        ];
        if matches!(self, Self::Fast) {
            flags.push(format!("-Ctarget-feature=+{MISALIGNED}"));
            flags.push("-Clink-arg=--disable-expand-memcpy-in-order".to_owned());
        }
        flags.join("\x1f")
    }
}

fn main() -> ExitCode {
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("{message}");
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<(), String> {
    let workspace = PathBuf::from(variable("CARGO_MANIFEST_DIR")?)
        .parent()
        .ok_or("the gateway crate is not inside its workspace")?
        .to_owned();
    for input in [
        "Cargo.toml",
        "Cargo.lock",
        "rust-toolchain.toml",
        "gateway-common/Cargo.toml",
        "gateway-common/src",
        "gateway-ebpf/Cargo.toml",
        "gateway-ebpf/src",
        "gateway-ebpf/bpf-linker.version",
    ] {
        println!("cargo::rerun-if-changed={}", workspace.join(input).display());
    }
    println!("cargo::rerun-if-changed=build.rs");

    println!("cargo::rerun-if-env-changed={}", Profile::VARIABLE);
    let profile = Profile::from_env()?;
    let linker = find_linker(&workspace)?;
    println!("cargo::rerun-if-changed={}", linker.display());
    require_core_source()?;

    let target_dir = workspace.join("target/bpf");
    let built = run_cargo(&workspace, &target_dir.join(profile.name()), profile, &linker)?;
    let own = PathBuf::from(variable("OUT_DIR")?);
    for (program, directory, name) in [
        ("gateway-ebpf", &own, OBJECT),
        ("gateway-ebpf", &target_dir, OBJECT),
        ("reference", &target_dir, REFERENCE),
    ] {
        let object = built.join(program);
        place(&object, directory, name).map_err(|error| {
            format!("cannot copy {} to {}: {error}", object.display(), directory.display())
        })?;
    }
    Ok(())
}

fn variable(name: &str) -> Result<String, String> {
    env::var(name).map_err(|error| format!("{name}: {error} (cargo sets it for build scripts)"))
}

/// The linker that the user names, else the one under `target/tools`, else one in `PATH` of the right version.
fn find_linker(workspace: &Path) -> Result<PathBuf, String> {
    const VARIABLE: &str = "GATEWAY_BPF_LINKER";
    println!("cargo::rerun-if-env-changed={VARIABLE}");
    let wanted = LINKER_VERSION.trim();
    let check = |path: &Path| -> Result<(), String> {
        let output = Command::new(path)
            .arg("--version")
            .output()
            .map_err(|error| format!("{} does not run: {error}", path.display()))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let version = text.lines().next().unwrap_or_default().trim();
        match version.strip_prefix("bpf-linker ") {
            Some(found) if found == wanted => Ok(()),
            _ => Err(format!("{} is {version:?}, not bpf-linker {wanted}", path.display())),
        }
    };

    if let Some(named) = env::var_os(VARIABLE) {
        let path = PathBuf::from(named);
        return check(&path).map(|()| path).map_err(|error| format!("{VARIABLE}: {error}"));
    }
    let own = workspace.join("target/tools/bin/bpf-linker");
    let own_fault = match check(&own) {
        Ok(()) => return Ok(own),
        Err(fault) => fault,
    };
    let path = env::var_os("PATH").unwrap_or_default();
    if let Some(found) =
        env::split_paths(&path).map(|entry| entry.join("bpf-linker")).find(|file| check(file).is_ok())
    {
        return Ok(found);
    }
    Err(format!("bpf-linker {wanted} is missing ({own_fault}): {SETUP}"))
}

/// `core` is compiled for the BPF target, so its source must be there.
fn require_core_source() -> Result<(), String> {
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let output = Command::new(&rustc)
        .args(["--print", "sysroot"])
        .output()
        .map_err(|error| format!("{} does not run: {error}", Path::new(&rustc).display()))?;
    let core = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim())
        .join("lib/rustlib/src/rust/library/core/src/lib.rs");
    if core.exists() {
        Ok(())
    } else {
        Err(format!("the toolchain lacks the component rust-src ({} is missing): {SETUP}", core.display()))
    }
}

/// Builds the crate's programs; the directory in which they lie.
fn run_cargo(
    workspace: &Path,
    target_dir: &Path,
    profile: Profile,
    linker: &Path,
) -> Result<PathBuf, String> {
    let mut cargo = Command::new(variable("CARGO")?);
    // What configures the outer build (its flags, wrappers such as clippy's, its target) is not meant for this one.
    for (name, _) in env::vars_os().filter(|(name, _)| configures_cargo(name)) {
        cargo.env_remove(name);
    }
    cargo
        .current_dir(workspace)
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_ENCODED_RUSTFLAGS", profile.rustflags(linker))
        // One module, or frames of several functions add up to more than the kernel's 512 bytes of stack.
        .env("CARGO_PROFILE_RELEASE_LTO", "fat")
        .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "1")
        .args(["build", "--quiet", "--release", "--locked", "--package", "gateway-ebpf", "--bins"])
        .args(["-Zbuild-std=core", "--target", TARGET, "--target-dir"])
        .arg(target_dir);
    let output = cargo.output().map_err(|error| format!("cargo does not run: {error}"))?;
    let messages = String::from_utf8_lossy(&output.stderr);
    let diagnostics: Vec<&str> = messages.split("\n\n").filter(|block| !block.contains(MISALIGNED)).collect();
    if !output.status.success() {
        return Err(format!("building gateway-ebpf for {TARGET}:\n{}", diagnostics.join("\n\n")));
    }
    // Those of gateway-common are seen in the outer build already.
    for line in
        diagnostics.iter().filter(|block| block.contains("--> gateway-ebpf")).flat_map(|block| block.lines())
    {
        println!("cargo::warning={line}");
    }
    Ok(target_dir.join(TARGET).join("release"))
}

fn configures_cargo(name: &OsStr) -> bool {
    const KEPT: [&str; 5] = ["CARGO_HOME", "CARGO_HTTP_", "CARGO_MAKEFLAGS", "CARGO_NET_", "CARGO_REGISTR"];
    let Some(name) = name.to_str() else { return false };
    let kept = KEPT.iter().any(|prefix| name.starts_with(prefix));
    (name.starts_with("CARGO_") && !kept)
        || ["RUSTC", "RUSTDOC", "RUSTFLAGS"].iter().any(|p| name.starts_with(p))
}

/// Copies in one step: another build may read or write the same place.
fn place(object: &Path, directory: &Path, name: &str) -> io::Result<()> {
    let scratch = directory.join(format!("{name}.{}", std::process::id()));
    fs::copy(object, &scratch)?;
    fs::rename(&scratch, directory.join(name))
}
