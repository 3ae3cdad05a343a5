//! bpf(2), for what aya does not offer.

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

/// What is wrong, with what the kernel said: aya's own texts name the call alone.
pub(super) fn reason(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.contains(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        cause = error.source();
    }
    text
}

/// Lets every other thread go first (setpriority(2), which means a thread on Linux): the kernel's look at a program takes a
/// CPU for longer than a next hop may take to reach the tables.
pub(crate) fn yield_to_others() {
    const NICE: i32 = 10;
    // SAFETY: a system call without pointers; if it fails, the thread runs as before.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) };
}

/// Commands, `enum bpf_cmd` in `linux/bpf.h`.
#[derive(Clone, Copy)]
#[repr(u32)]
pub(super) enum Command {
    Lookup = 1,
    Update = 2,
    Delete = 3,
    ObjectGet = 7,
    LookupBatch = 24,
    UpdateBatch = 26,
    DeleteBatch = 27,
    LinkDetach = 34,
}

/// `union bpf_attr` for commands on one element.
#[repr(C)]
#[derive(Default)]
pub(super) struct ElementAttr {
    pub(super) map_fd: u32,
    pub(super) pad: u32,
    pub(super) key: u64,
    pub(super) value: u64,
    pub(super) flags: u64,
}

/// `union bpf_attr` for commands on batches.
#[repr(C)]
#[derive(Default)]
pub(super) struct BatchAttr {
    pub(super) in_batch: u64,
    pub(super) out_batch: u64,
    pub(super) keys: u64,
    pub(super) values: u64,
    /// In: entries offered. Out: entries done.
    pub(super) count: u32,
    pub(super) map_fd: u32,
    pub(super) element_flags: u64,
    pub(super) flags: u64,
}

/// `union bpf_attr` for [`Command::ObjectGet`].
#[repr(C)]
#[derive(Default)]
struct ObjectAttr {
    path: u64,
    fd: u32,
    flags: u32,
}

/// `union bpf_attr` for [`Command::LinkDetach`].
#[repr(C)]
#[derive(Default)]
struct LinkAttr {
    fd: u32,
}

const _: () = assert!(size_of::<ElementAttr>() == 32 && size_of::<BatchAttr>() == 56);
const _: () = assert!(size_of::<ObjectAttr>() == 16 && size_of::<LinkAttr>() == 4);

/// `attr` is the structure above that belongs to the command.
pub(super) fn bpf<A>(command: Command, attr: &mut A) -> io::Result<RawFd> {
    // SAFETY: `attr` is laid out as `union bpf_attr` for the command, and its pointers lead to a string that ends with
    // a zero, or to buffers of at least `count` keys and values of the map's sizes (see `batch::Map::new` and each caller).
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command as u32, std::ptr::from_mut(attr), size_of::<A>()) };
    RawFd::try_from(result).ok().filter(|result| *result >= 0).ok_or_else(io::Error::last_os_error)
}

/// Takes a pinned link off what it is attached to, at once: the kernel lets go of a link that merely lost its pin some
/// time later. The pin stays.
///
/// # Errors
///
/// What the kernel said.
pub(super) fn detach_link(pin: &Path) -> io::Result<()> {
    let path = CString::new(pin.as_os_str().as_bytes())?;
    let mut attr = ObjectAttr { path: path.as_ptr().expose_provenance() as u64, ..ObjectAttr::default() };
    let fd = bpf(Command::ObjectGet, &mut attr)?;
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
    let link = unsafe { OwnedFd::from_raw_fd(fd) };
    bpf(Command::LinkDetach, &mut LinkAttr { fd: link.as_raw_fd().cast_unsigned() }).map(drop)
}
