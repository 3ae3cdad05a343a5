//! The loaded XDP program under `BPF_PROG_TEST_RUN`: real verifier, real maps, real FIB, one frame at a time.
//!
//! - [`golden`]: frames with what must become of them, written by etherparse from the RFCs.
//!
//! Needs root. Each test loads its own program and maps, in a network namespace of its own. Frames before and after
//! are kept as `target/program/<case>.pcap`.

mod case;
mod evidence;
mod golden;
mod packet;
mod rig;
mod subject;
mod world;
