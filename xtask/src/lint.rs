//! Format and lints of every crate. Clippy sees the BPF crate for the BPF target, all others for the host.

use anyhow::Result;

use crate::{
    process::{cargo, run as execute},
    setup,
};

pub(crate) fn run() -> Result<()> {
    setup::run(&[setup::Need::Bpf])?;
    execute(cargo().args(["fmt", "--all", "--check"]))?;
    execute(cargo().args(["clippy", "--all-targets", "--", "--deny", "warnings"]))?;
    execute(
        cargo()
            .env("RUSTC_BOOTSTRAP", "1")
            .args([
                "clippy",
                "--package",
                "gateway-ebpf",
                "--target",
                "bpfel-unknown-none",
                "-Zbuild-std=core",
            ])
            .args(["--target-dir", "target/bpf/lint", "--", "--deny", "warnings"]),
    )
}
