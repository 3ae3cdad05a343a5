//! What a driver says of itself: the two questions of `SIOCETHTOOL` that `check` asks (linux/ethtool.h).

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

const ETHTOOL_GDRVINFO: u32 = 0x03;
const ETHTOOL_GFLAGS: u32 = 0x25;
const ETH_FLAG_RXVLAN: u32 = 1 << 8;
const ETH_FLAG_LRO: u32 = 1 << 15;

/// `struct ethtool_drvinfo`.
#[repr(C)]
struct DriverInfo {
    command: u32,
    driver: [u8; 32],
    rest: [u8; 160],
}

/// `struct ethtool_value`.
#[repr(C)]
struct Value {
    command: u32,
    data: u32,
}

const _: () = assert!(size_of::<DriverInfo>() == 196 && size_of::<Value>() == 8);

/// A socket to ask by; it sees the devices of this network namespace.
pub(super) struct Ethtool {
    socket: OwnedFd,
}

impl Ethtool {
    pub(super) fn open() -> io::Result<Self> {
        let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
        Ok(Self { socket })
    }

    /// Name of the device's driver.
    pub(super) fn driver(&self, device: &str) -> io::Result<String> {
        let mut info = DriverInfo { command: ETHTOOL_GDRVINFO, driver: [0; 32], rest: [0; 160] };
        self.ask(device, &mut info)?;
        let length = info.driver.iter().position(|byte| *byte == 0).unwrap_or(info.driver.len());
        Ok(String::from_utf8_lossy(&info.driver[..length]).into_owned())
    }

    /// Whether the device takes VLAN tags out of frames, and whether it merges packets (LRO).
    pub(super) fn offloads(&self, device: &str) -> io::Result<(bool, bool)> {
        let mut flags = Value { command: ETHTOOL_GFLAGS, data: 0 };
        self.ask(device, &mut flags)?;
        Ok((flags.data & ETH_FLAG_RXVLAN != 0, flags.data & ETH_FLAG_LRO != 0))
    }

    /// `question` starts with the command and is as large as that command's structure.
    fn ask<T>(&self, device: &str, question: &mut T) -> io::Result<()> {
        let mut name = [0; libc::IFNAMSIZ];
        if device.len() >= name.len() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        for (to, from) in name.iter_mut().zip(device.bytes()) {
            *to = libc::c_char::from_ne_bytes([from]);
        }
        let data = std::ptr::from_mut(question).cast();
        let mut request =
            libc::ifreq { ifr_name: name, ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_data: data } };
        // SAFETY: the request lives through the call, its name ends with a zero, and its data points to a structure
        // of the size that the kernel reads and writes for the command in it.
        let result =
            unsafe { libc::ioctl(self.socket.as_raw_fd(), libc::SIOCETHTOOL as _, &raw mut request) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}
