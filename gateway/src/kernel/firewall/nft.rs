//! Runs the program `nft` with JSON (libnftables-json(5)).

use std::{io, process::Stdio};

use serde_json::{Value, json};
use tokio::{
    io::AsyncWriteExt as _,
    process::{Child, Command},
};

const PROGRAM: &str = "nft";

/// nft cannot do what it should.
#[derive(Debug, thiserror::Error)]
pub enum NftError {
    /// It cannot be run.
    #[error("cannot run {PROGRAM}: {0}; install it (package nftables), and see that it is in the PATH")]
    Run(#[from] io::Error),
    /// It ended with an error.
    #[error("nft refuses: {0}{advice}", advice = advice(.0))]
    Refused(String),
    /// It printed something else than JSON.
    #[error("nft printed what is no JSON ({0}): version 0.9.3 or later with JSON support is needed")]
    Output(#[from] serde_json::Error),
}

fn advice(text: &str) -> &'static str {
    if text.contains("not permitted") {
        " (root, or CAP_NET_ADMIN, is needed)"
    } else if text.contains("not supported") || text.contains("protocol") {
        " (the kernel needs nf_tables with the family inet)"
    } else {
        ""
    }
}

/// Runs a transaction: all of it is done, or nothing.
pub(super) async fn run(options: &[&str], objects: &[Value]) -> Result<(), NftError> {
    let input = serde_json::to_vec(&json!({ "nftables": objects }))?;
    let mut command = Command::new(PROGRAM);
    command.args(options).args(["--json", "--file", "-"]).stdin(Stdio::piped());
    let mut child = spawn(&mut command)?;
    if let Some(mut stdin) = child.stdin.take() {
        // nft that ends early says why on stderr.
        let _ = stdin.write_all(&input).await;
    }
    finish(child).await.map(drop)
}

/// Lists a table of the family `inet`; `None` if there is none.
pub(super) async fn list(table: &str) -> Result<Option<Vec<Value>>, NftError> {
    let mut command = Command::new(PROGRAM);
    command.args(["--json", "list", "table", "inet", table]).stdin(Stdio::null());
    let text = match finish(spawn(&mut command)?).await {
        Ok(text) => text,
        Err(NftError::Refused(text)) if text.contains("No such file") => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut listed: Value = serde_json::from_slice(&text)?;
    Ok(match listed["nftables"].take() {
        Value::Array(objects) => Some(objects),
        _ => Some(Vec::new()),
    })
}

/// What nft calls itself.
pub(super) async fn version() -> Result<String, NftError> {
    let mut command = Command::new(PROGRAM);
    command.arg("--version").stdin(Stdio::null());
    let text = finish(spawn(&mut command)?).await?;
    Ok(String::from_utf8_lossy(&text).trim().to_owned())
}

fn spawn(command: &mut Command) -> io::Result<Child> {
    // Errors are told by their text, which would be in the user's language.
    command.env("LC_ALL", "C").stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true).spawn()
}

async fn finish(child: Child) -> Result<Vec<u8>, NftError> {
    let output = child.wait_with_output().await?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let text = String::from_utf8_lossy(&output.stderr);
    // The lines after the first repeat the input.
    let first = text.lines().find(|line| !line.trim().is_empty()).unwrap_or_default();
    Err(NftError::Refused(if first.is_empty() { output.status.to_string() } else { first.trim().to_owned() }))
}
