//! Whether the kernel, its settings and this process's rights are enough.

use std::{fs, path::Path};

use nix::{
    errno::Errno,
    sys::statfs::{BPF_FS_MAGIC, statfs},
};

use super::Finding;
use crate::config::Config;

/// Coarse clocks in XDP and multi-buffer XDP are there from here on.
const MIN_KERNEL: (u32, u32) = (6, 1);

const CAP_NET_ADMIN: u32 = 12;
/// Bits of a capability set (linux/capability.h).
const CAPABILITIES: [(u32, &str); 3] =
    [(CAP_NET_ADMIN, "CAP_NET_ADMIN"), (38, "CAP_PERFMON"), (39, "CAP_BPF")];
/// Includes what `CAP_PERFMON` and `CAP_BPF` allow.
const CAP_SYS_ADMIN: u32 = 21;

pub(super) fn findings(config: Option<&Config>) -> Vec<Finding> {
    let mut findings = vec![
        kernel(&read("/proc/sys/kernel/osrelease")),
        btf(Path::new("/sys/kernel/btf/vmlinux").exists()),
        jit(&read("/proc/sys/net/core/bpf_jit_enable")),
        capabilities(&read("/proc/self/status")),
    ];
    if let Some(config) = config {
        findings.push(bpffs(&config.datapath.bpffs));
    }
    findings
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn kernel(release: &str) -> Finding {
    let release = release.trim();
    let mut parts = release.split(|c: char| !c.is_ascii_digit()).map_while(|part| part.parse().ok());
    let version: Option<(u32, u32)> = parts.next().zip(parts.next());
    match version {
        Some(version) if version >= MIN_KERNEL => Finding::ok("kernel", release),
        _ => Finding::fail(
            "kernel",
            if release.is_empty() { "version unknown" } else { release },
            format!("{}.{} or later is needed", MIN_KERNEL.0, MIN_KERNEL.1),
        ),
    }
}

fn btf(present: bool) -> Finding {
    if present {
        Finding::ok("BTF", "/sys/kernel/btf/vmlinux")
    } else {
        Finding::warn(
            "BTF",
            "/sys/kernel/btf/vmlinux is missing",
            "use a kernel with CONFIG_DEBUG_INFO_BTF, or bpftool cannot name the fields of the tables",
        )
    }
}

fn jit(enabled: &str) -> Finding {
    match enabled.trim() {
        // Only root may read it, and without the file the JIT is always on.
        "1" | "2" | "" => Finding::ok("BPF JIT", "on"),
        _ => Finding::warn(
            "BPF JIT",
            "off",
            "sysctl -w net.core.bpf_jit_enable=1, or every packet is interpreted",
        ),
    }
}

fn capabilities(status: &str) -> Finding {
    let set = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok())
        .unwrap_or_default();
    let has = |bit: u32| set & (1 << bit) != 0;
    let missing: Vec<&str> = CAPABILITIES
        .iter()
        .filter(|(bit, _)| !has(*bit) && (*bit == CAP_NET_ADMIN || !has(CAP_SYS_ADMIN)))
        .map(|(_, name)| *name)
        .collect();
    if missing.is_empty() {
        Finding::ok("capabilities", "CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON")
    } else {
        Finding::fail(
            "capabilities",
            format!("{} missing", missing.join(", ")),
            "run as root, or give them to the service (AmbientCapabilities=)",
        )
    }
}

fn bpffs(path: &Path) -> Finding {
    let subject = path.display().to_string();
    match statfs(path) {
        Ok(fs) if fs.filesystem_type() == BPF_FS_MAGIC => Finding::ok(subject, "is a bpffs"),
        Ok(_) | Err(Errno::ENOENT) => Finding::ok(subject, "is no bpffs; `gateway run` mounts one there"),
        Err(error) => {
            let advice = format!("mount -t bpf bpf {subject}");
            Finding::fail(subject, format!("cannot be read: {}", error.desc()), advice)
        }
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;
    use crate::cli::check::Level;

    #[rstest]
    #[case("6.1.0-18-amd64\n", Level::Ok)]
    #[case("6.18.5", Level::Ok)]
    #[case("10.0-rc1", Level::Ok)]
    #[case("6.0.19", Level::Fail)]
    #[case("5.15.0-generic", Level::Fail)]
    #[case("", Level::Fail)]
    fn kernel_versions(#[case] release: &str, #[case] level: Level) {
        assert_eq!(kernel(release).level, level);
    }

    #[rstest]
    #[case::root("000001ffffffffff", None)]
    #[case::exactly("000000c000001000", None)]
    #[case::before_cap_bpf("0000000000201000", None)]
    #[case::no_net_admin("000000c000200000", Some("CAP_NET_ADMIN missing"))]
    #[case::nothing("0000000000000000", Some("CAP_NET_ADMIN, CAP_PERFMON, CAP_BPF missing"))]
    fn capability_sets(#[case] bits: &str, #[case] missing: Option<&str>) {
        let finding = capabilities(&format!("Name:\tx\nCapPrm:\t0\nCapEff:\t{bits}\n"));
        assert_eq!((finding.level == Level::Fail).then_some(finding.what.as_str()), missing);
    }

    #[test]
    fn a_bpffs_that_is_not_mounted_will_be() {
        let directory = tempfile::tempdir().unwrap();
        for path in [directory.path().to_owned(), directory.path().join("none")] {
            let finding = bpffs(&path);
            assert_eq!(finding.level, Level::Ok);
            assert!(finding.what.contains("`gateway run` mounts one"), "{finding:?}");
        }
        let file = directory.path().join("file");
        fs::write(&file, "").unwrap();
        assert_eq!(bpffs(&file.join("below")).level, Level::Fail);
    }
}
