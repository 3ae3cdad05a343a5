//! Where something was measured, by what the machine itself says.

use std::{fmt, fs, process::Command, thread};

use serde::{Deserialize, Serialize};

/// A machine. What it does not tell is empty or 0.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct Machine {
    /// Model of the CPUs.
    pub cpu: String,
    /// CPUs that this process may use.
    pub cpus: usize,
    /// Clock of the CPUs as the kernel sees it, MHz.
    pub mhz: f64,
    /// Largest cache that one CPU sees, KiB.
    pub cache_kib: u64,
    /// Memory, MiB.
    pub memory_mib: u64,
    /// Hypervisor, if the CPU says that there is one.
    pub virtual_machine: bool,
    /// Kernel release.
    pub kernel: String,
    /// Whether BPF is compiled (`net.core.bpf_jit_enable`); empty if the kernel always does.
    pub bpf_jit: String,
    /// Version of the compiler.
    pub rustc: String,
    /// Load average of the last minute when the measurement began: what else was going on.
    pub load: f64,
}

impl Machine {
    /// This machine, now.
    pub fn here() -> Self {
        let processor = read("/proc/cpuinfo");
        let memory = read("/proc/meminfo");
        let kibibytes = field(&memory, "MemTotal").split(' ').next().and_then(|n| n.parse::<u64>().ok());
        Self {
            cpu: field(&processor, "model name"),
            cpus: thread::available_parallelism().map_or(0, usize::from),
            mhz: field(&processor, "cpu MHz").parse().unwrap_or_default(),
            cache_kib: cache(),
            memory_mib: kibibytes.unwrap_or_default() / 1024,
            virtual_machine: field(&processor, "flags").split(' ').any(|flag| flag == "hypervisor"),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            bpf_jit: read("/proc/sys/net/core/bpf_jit_enable").trim().to_owned(),
            rustc: output("rustc", &["--version"]),
            load: read("/proc/loadavg").split(' ').next().and_then(|n| n.parse().ok()).unwrap_or_default(),
        }
    }
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn output(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()).unwrap_or_default()
}

/// The value behind the first line `name : value`.
fn field(text: &str, name: &str) -> String {
    let lines = text.lines().filter_map(|line| line.split_once(':'));
    let found = lines.map(|(key, value)| (key.trim(), value.trim())).find(|(key, _)| *key == name);
    found.map(|(_, value)| value.to_owned()).unwrap_or_default()
}

/// Size of the largest cache of CPU 0, KiB.
fn cache() -> u64 {
    (0..8)
        .map(|index| read(&format!("/sys/devices/system/cpu/cpu0/cache/index{index}/size")))
        .filter_map(|size| size.trim().trim_end_matches('K').parse().ok())
        .max()
        .unwrap_or_default()
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.virtual_machine { "virtual CPUs" } else { "CPUs" };
        write!(
            f,
            "{} {kind}, {} at {:.0} MHz, cache {} KiB, {} MiB of memory, Linux {}, {}, load {:.2}",
            self.cpus,
            self.cpu,
            self.mhz,
            self.cache_kib,
            self.memory_mib,
            self.kernel,
            self.rustc,
            self.load
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_proc() {
        let text = "processor\t: 0\nmodel name\t: Some CPU @ 2.60GHz\nflags\t\t: fpu hypervisor\n";
        assert_eq!(field(text, "model name"), "Some CPU @ 2.60GHz");
        assert_eq!(field(text, "absent"), "");
    }
}
