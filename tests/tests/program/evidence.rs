//! What a case put in and got out, kept for a viewer: `target/program/<case>.pcap`.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    time::Duration,
};

use pcap_file::pcap::{PcapPacket, PcapWriter};

/// Where the program's inputs and outputs of `case` lie.
fn path(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/program").join(format!("{case}.pcap"))
}

/// Writes the frames in this order, and gives the path for the message of a failure.
pub(crate) fn keep(case: &str, frames: &[&[u8]]) -> String {
    let path = path(case);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let mut writer = PcapWriter::new(File::create(&path).unwrap()).unwrap();
    for (second, frame) in (0u64..).zip(frames) {
        let length = u32::try_from(frame.len()).unwrap();
        writer.write_packet(&PcapPacket::new(Duration::from_secs(second), length, frame)).unwrap();
    }
    path.canonicalize().unwrap().display().to_string()
}
