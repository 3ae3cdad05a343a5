//! Kills a program between two system calls of its choice, as a power failure would stop it.
//!
//! The program runs under ptrace(2). Calls that change something outside of the process are counted on entry, over all
//! threads; instead of the N-th one the process dies.

use std::{
    fs::File,
    os::unix::process::CommandExt as _,
    process::{Command, Stdio},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::Duration,
};

use anyhow::{Context, Result};
use nix::{
    sys::{
        ptrace,
        signal::{Signal, kill},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};

use super::host::Host;

/// Calls that may change what outlives a process: pins, links, table entries, files, netlink.
const CHANGING: [(libc::c_long, &str); 15] = [
    (libc::SYS_bpf, "bpf"),
    (libc::SYS_openat, "openat"),
    (libc::SYS_write, "write"),
    (libc::SYS_pwrite64, "pwrite64"),
    (libc::SYS_ftruncate, "ftruncate"),
    (libc::SYS_flock, "flock"),
    (libc::SYS_mkdir, "mkdir"),
    (libc::SYS_rmdir, "rmdir"),
    (libc::SYS_rename, "rename"),
    (libc::SYS_renameat2, "renameat2"),
    (libc::SYS_unlink, "unlink"),
    (libc::SYS_unlinkat, "unlinkat"),
    (libc::SYS_mount, "mount"),
    (libc::SYS_sendto, "sendto"),
    (libc::SYS_sendmsg, "sendmsg"),
];

/// Commands of bpf(2) whose effect ends with the process (Linux `include/uapi/linux/bpf.h`, `enum bpf_cmd`): a process
/// that dies before one of them leaves what it leaves before the next call. Maps, programs and BTF are gone unless pinned,
/// which takes a call of its own; the others only read.
const TRACELESS: [u64; 18] = [
    0,  // MAP_CREATE
    1,  // MAP_LOOKUP_ELEM
    4,  // MAP_GET_NEXT_KEY
    5,  // PROG_LOAD
    7,  // OBJ_GET
    11, // PROG_GET_NEXT_ID
    12, // MAP_GET_NEXT_ID
    13, // PROG_GET_FD_BY_ID
    14, // MAP_GET_FD_BY_ID
    15, // OBJ_GET_INFO_BY_FD
    16, // PROG_QUERY
    18, // BTF_LOAD
    19, // BTF_GET_FD_BY_ID
    22, // MAP_FREEZE
    23, // BTF_GET_NEXT_ID
    24, // MAP_LOOKUP_BATCH
    30, // LINK_GET_FD_BY_ID
    31, // LINK_GET_NEXT_ID
];

/// Flags of openat(2) by which the call itself changes something.
const CREATES: u64 = (libc::O_CREAT | libc::O_TRUNC) as u64;

/// How a traced run came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End {
    /// Changing calls that were let through.
    pub calls: usize,
    /// The call that was not made any more; `None` if time ran out, or the program ended by itself.
    pub instead_of: Option<&'static str>,
}

/// Runs a command on a host until its `last`-th changing call, or for at most `limit`, and kills it there.
///
/// # Errors
/// When the command cannot be started or traced.
pub fn run_until(host: &Host, command: &[String], last: usize, limit: Duration) -> Result<End> {
    let (program, arguments) = command.split_first().context("empty command")?;
    let log = host.evidence_file("traced.log");
    let file = File::create(&log).with_context(|| format!("cannot create {}", log.display()))?;
    // A process is traced by the thread that made it.
    host.namespace().enter(|| {
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file.try_clone()?);
        // SAFETY: ptrace(2) is one system call, and touches no memory of the process.
        unsafe {
            command.pre_exec(|| Ok(ptrace::traceme()?));
        }
        let child = command.spawn().with_context(|| format!("cannot run {program}"))?;
        let pid = Pid::from_raw(i32::try_from(child.id())?);
        let (over, is_over) = mpsc::channel::<()>();
        let end = thread::scope(|scope| {
            scope.spawn(move || {
                if is_over.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
                    // One that has ended meanwhile is still there to be reaped, so nobody else has its number.
                    let _ = kill(pid, Signal::SIGKILL);
                }
            });
            let end = trace(pid, last);
            drop(over);
            end
        });
        // However tracing ended, nothing of it may live on. Its threads are reaped by their tracer, one by one.
        let _ = kill(pid, Signal::SIGKILL);
        while waitpid(None, Some(WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD)).is_ok() {}
        end.with_context(|| format!("log: {}", log.display()))
    })
}

fn trace(pid: Pid, last: usize) -> Result<End> {
    let ours = WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD;
    // The stop at the end of exec.
    waitpid(pid, Some(WaitPidFlag::__WALL)).context("cannot wait for the traced program")?;
    let options = ptrace::Options::PTRACE_O_TRACECLONE
        | ptrace::Options::PTRACE_O_TRACESYSGOOD
        | ptrace::Options::PTRACE_O_EXITKILL;
    ptrace::setoptions(pid, options).context("cannot trace")?;
    ptrace::syscall(pid, None).context("cannot trace")?;
    let mut calls = 0;
    loop {
        let status = waitpid(None, Some(ours)).context("cannot wait for the traced program")?;
        let (stopped, signal) = match status {
            WaitStatus::PtraceSyscall(thread) => {
                if let Some(name) = entering(thread) {
                    calls += 1;
                    if calls == last {
                        return Ok(End { calls: calls - 1, instead_of: Some(name) });
                    }
                }
                (thread, None)
            }
            // The first stop of a new thread is not a signal to it.
            WaitStatus::Stopped(thread, Signal::SIGSTOP) | WaitStatus::PtraceEvent(thread, _, _) => {
                (thread, None)
            }
            WaitStatus::Stopped(thread, signal) => (thread, Some(signal)),
            WaitStatus::Exited(gone, _) | WaitStatus::Signaled(gone, _, _) if gone == pid => break,
            _ => continue,
        };
        // A thread that died meanwhile needs no going on.
        let _ = ptrace::syscall(stopped, signal);
    }
    Ok(End { calls, instead_of: None })
}

/// The name of the changing call that a stopped thread is about to make.
fn entering(thread: Pid) -> Option<&'static str> {
    let info = ptrace::syscall_info(thread).ok()?;
    if info.op != libc::PTRACE_SYSCALL_INFO_ENTRY {
        return None;
    }
    // SAFETY: at an entry the kernel has filled in this member.
    let entry = unsafe { info.u.entry };
    let number = libc::c_long::try_from(entry.nr).ok()?;
    let (_, name) = CHANGING.iter().find(|(changing, _)| *changing == number)?;
    let traceless = match number {
        libc::SYS_bpf => TRACELESS.contains(&entry.args[0]),
        libc::SYS_openat => entry.args[2] & CREATES == 0,
        _ => false,
    };
    if traceless { None } else { Some(name) }
}
