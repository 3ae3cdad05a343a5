//! An XDP program that passes everything, for the far end of veth devices.
//!
//! What XDP sends out of a veth device arrives only if the far end polls, and for `XDP_TX` Linux wakes the far end only if
//! it has an XDP program itself (`veth_xdp_flush` in drivers/net/veth.c). Any program will do: this one is two
//! instructions, so that nothing of the gateway is needed to build the lab.

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
};

use anyhow::{Context, Result, anyhow};
use netlink_packet_route::link::{LinkAttribute, LinkXdp};
use nix::net::if_::if_nametoindex;
use rtnetlink::LinkUnspec;

use super::{netns::Namespace, wiring};

const PROG_LOAD: libc::c_long = 5;
const TYPE_XDP: u32 = 6;
/// `BPF_F_XDP_HAS_FRAGS`: without it veth refuses an MTU that does not fit a page.
const TAKES_FRAGMENTS: u32 = 1 << 5;
/// `r0 = XDP_PASS; exit`.
const INSTRUCTIONS: [[u8; 8]; 2] = [[0xb7, 0, 0, 0, 2, 0, 0, 0], [0x95, 0, 0, 0, 0, 0, 0, 0]];

/// The beginning of the kernel's `union bpf_attr` for `BPF_PROG_LOAD`.
#[repr(C)]
struct LoadAttributes {
    kind: u32,
    count: u32,
    instructions: *const [u8; 8],
    license: *const libc::c_char,
    log_level: u32,
    log_size: u32,
    log: *mut u8,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
}

/// Attaches the program to an interface, where it stays as long as the interface does.
pub fn attach(namespace: &Namespace, interface: &str) -> Result<()> {
    let program = load()?;
    wiring::netlink(namespace, &format!("XDP program on {interface}"), async |handle| {
        let index = if_nametoindex(interface).map_err(|errno| anyhow!("interface {interface}: {errno}"))?;
        let xdp = LinkAttribute::Xdp(vec![LinkXdp::Fd(program.as_raw_fd())]);
        let message = LinkUnspec::new_with_index(index).append_extra_attribute(xdp).build();
        Ok(handle.link().set(message).execute().await?)
    })
}

fn load() -> Result<OwnedFd> {
    let attributes = LoadAttributes {
        kind: TYPE_XDP,
        count: u32::try_from(INSTRUCTIONS.len())?,
        instructions: INSTRUCTIONS.as_ptr(),
        license: c"GPL".as_ptr(),
        log_level: 0,
        log_size: 0,
        log: std::ptr::null_mut(),
        kernel_version: 0,
        flags: TAKES_FRAGMENTS,
        name: *b"lab_pass\0\0\0\0\0\0\0\0",
    };
    // SAFETY: the kernel reads `size_of` bytes of the attributes, and the instructions and the licence that they point
    // to; all of them live until the call returns.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, PROG_LOAD, &raw const attributes, size_of::<LoadAttributes>())
    };
    if result < 0 {
        return Err(io::Error::last_os_error()).context("cannot load the lab's XDP program; run as root");
    }
    // SAFETY: a successful call returns a new file descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(RawFd::try_from(result)?) })
}
