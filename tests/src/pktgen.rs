//! Load by the kernel's packet generator (`Documentation/networking/pktgen.rst`): one kernel thread for each CPU makes
//! UDP packets and hands them to the driver.

use std::{
    fs, io,
    net::Ipv4Addr,
    ops::RangeInclusive,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use gateway_common::wire::Mac;

/// Of the calling thread's network namespace: each has generators of its own.
const CONTROL: &str = "/proc/thread-self/net/pktgen";

/// What is to be sent.
#[derive(Clone, Debug)]
pub struct Load {
    /// Where it leaves.
    pub interface: String,
    /// MAC address that it is sent to.
    pub to: Mac,
    /// Source address.
    pub source: Ipv4Addr,
    /// Destination addresses; each packet goes to one of them.
    pub destinations: RangeInclusive<Ipv4Addr>,
    /// UDP source ports; each packet has one of them.
    pub source_ports: RangeInclusive<u16>,
    /// UDP destination port.
    pub port: u16,
    /// Bytes of a frame, with its header, without its checksum.
    pub size: u16,
    /// Frames, over all CPUs.
    pub count: u64,
    /// Frames a second over all CPUs, if that is limited.
    pub rate: Option<u64>,
    /// Frames handed to the driver at once; only drivers of network cards take more than one.
    pub burst: u32,
    /// CPUs whose threads send. Each has the transmit queue of its number.
    pub cpus: Vec<usize>,
}

/// What one thread did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sent {
    /// Its CPU.
    pub cpu: usize,
    /// Frames that the driver took.
    pub frames: u64,
    /// Frames that could not be sent.
    pub errors: u64,
    /// How long it took.
    pub duration: Duration,
}

impl Load {
    /// Sends everything; returns when the driver has taken it.
    ///
    /// # Errors
    ///
    /// The kernel has no packet generator, or refuses a setting; the error names it.
    pub fn send(&self) -> Result<Vec<Sent>> {
        // To the generator, no frames are endlessly many.
        ensure!(
            !self.cpus.is_empty() && self.count >= self.cpus.len() as u64,
            "{} frames are too few for {} CPUs",
            self.count,
            self.cpus.len()
        );
        ensure!(
            Path::new(CONTROL).join("pgctrl").exists(),
            "this kernel has no packet generator loaded: modprobe pktgen (CONFIG_NET_PKTGEN)"
        );
        // Settings of an earlier load would take part.
        command("pgctrl", "reset")?;
        for (position, cpu) in self.cpus.iter().enumerate() {
            command(&format!("kpktgend_{cpu}"), &format!("add_device {}", self.device(*cpu)))?;
            for setting in self.settings(position) {
                command(&self.device(*cpu), &setting)?;
            }
        }
        let start = Instant::now();
        command("pgctrl", "start")?;
        let duration = start.elapsed();
        let sent = self.cpus.iter().map(|cpu| self.result(*cpu, duration)).collect();
        command("pgctrl", "reset")?;
        sent
    }

    /// Interface and thread: the name of the generator's file for both.
    fn device(&self, cpu: usize) -> String {
        format!("{}@{cpu}", self.interface)
    }

    fn settings(&self, position: usize) -> Vec<String> {
        let (destinations, ports, port) = (&self.destinations, &self.source_ports, self.port);
        let share = |total: u64| {
            let (threads, position) = (self.cpus.len() as u64, position as u64);
            total / threads + u64::from(position < total % threads)
        };
        let mut settings = vec![
            format!("count {}", share(self.count)),
            format!("pkt_size {}", self.size),
            format!("dst_mac {}", self.to),
            format!("src_min {}", self.source),
            format!("src_max {}", self.source),
            format!("dst_min {}", destinations.start()),
            format!("dst_max {}", destinations.end()),
            format!("udp_src_min {}", ports.start()),
            format!("udp_src_max {}", ports.end()),
            format!("udp_dst_min {port}"),
            format!("udp_dst_max {port}"),
            "flag QUEUE_MAP_CPU".to_owned(),
        ];
        if destinations.start() != destinations.end() {
            settings.push("flag IPDST_RND".to_owned());
        }
        if ports.start() != ports.end() {
            settings.push("flag UDPSRC_RND".to_owned());
        }
        if self.burst > 1 {
            settings.push(format!("burst {}", self.burst));
        }
        if let Some(rate) = self.rate {
            settings.push(format!("ratep {}", share(rate).max(1)));
        }
        settings
    }

    fn result(&self, cpu: usize, duration: Duration) -> Result<Sent> {
        let path = file(&self.device(cpu));
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let (frames, errors) = counts(&text).with_context(|| format!("no result in {text}"))?;
        Ok(Sent { cpu, frames, errors, duration: duration_of(&text).unwrap_or(duration) })
    }
}

/// Frames and errors in what the generator says of a device.
fn counts(text: &str) -> Option<(u64, u64)> {
    let line = text.lines().find(|line| line.contains("pkts-sofar:"))?;
    let mut words = line.split_whitespace();
    let mut after = |name: &str| words.find(|word| *word == name).and_then(|_| words.next()?.parse().ok());
    Some((after("pkts-sofar:")?, after("errors:")?))
}

/// Time in `Result: OK: 19283(c19000+d283) usec, …`.
fn duration_of(text: &str) -> Option<Duration> {
    let line = text.lines().find_map(|line| line.strip_prefix("Result: OK: "))?;
    Some(Duration::from_micros(line.split('(').next()?.parse().ok()?))
}

fn file(name: &str) -> PathBuf {
    Path::new(CONTROL).join(name)
}

fn command(name: &str, text: &str) -> Result<()> {
    let path = file(name);
    match fs::write(&path, format!("{text}\n")) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            bail!("{} does not exist: is there such an interface, and such a CPU?", path.display())
        }
        Err(error) => Err(error).with_context(|| format!("the packet generator refuses `{text}` for {name}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load() -> Load {
        Load {
            interface: "eth0".to_owned(),
            to: Mac::new([2, 0, 0, 0, 0, 1]),
            source: Ipv4Addr::new(10, 244, 30, 10),
            destinations: Ipv4Addr::new(10, 244, 1, 2)..=Ipv4Addr::new(10, 244, 1, 2),
            source_ports: 1000..=1000,
            port: 9,
            size: 60,
            count: 10,
            rate: None,
            burst: 1,
            cpus: vec![0, 1, 2],
        }
    }

    #[test]
    fn threads_share_the_work() {
        let counts: Vec<_> = (0..3).map(|position| load().settings(position).swap_remove(0)).collect();
        assert_eq!(counts, ["count 4", "count 3", "count 3"]);
    }

    #[test]
    fn settings_that_change_nothing_are_left_out() {
        let plain = load().settings(0);
        assert!(!plain.iter().any(|setting| setting.contains("RND") || setting.starts_with("burst")));
        let varied = Load {
            destinations: Ipv4Addr::new(10, 244, 1, 2)..=Ipv4Addr::new(10, 244, 1, 9),
            source_ports: 1000..=2000,
            rate: Some(9),
            burst: 32,
            ..load()
        };
        for setting in ["flag IPDST_RND", "flag UDPSRC_RND", "burst 32", "ratep 3", "dst_max 10.244.1.9"] {
            assert!(varied.settings(0).iter().any(|found| found == setting), "{setting}");
        }
    }

    #[test]
    fn reads_what_the_generator_says() {
        let text = "Params: count 1000  min_pkt_size: 60  max_pkt_size: 60\nCurrent:\n     pkts-sofar: 1000  errors: 3\n\
                    Result: OK: 19283(c19000+d283) usec, 1000 (60byte,0frags)\n  51859pps 24Mb/sec errors: 3\n";
        assert_eq!(counts(text), Some((1000, 3)));
        assert_eq!(duration_of(text), Some(Duration::from_micros(19283)));
        assert_eq!((counts("Result: Idle\n"), duration_of("Result: Idle\n")), (None, None));
    }
}
