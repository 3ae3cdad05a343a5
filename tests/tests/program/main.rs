//! The loaded XDP program under `BPF_PROG_TEST_RUN`: real verifier, real maps, real FIB, one frame at a time.
//!
//! - [`golden`]: frames with what must become of them, written by etherparse from the RFCs.
//! - [`agreement`], [`sequences`]: random frames, and sequences of them, on which program and host engine must agree.
//! - [`hammer`]: sessions under packets, evictions and sweeps of all CPUs at once.
//! - [`flood`]: forged clients against sessions that live.
//! - [`limits`]: truncation at every byte, frames larger than a page, the two slots of a VTEP.
//! - [`live`]: frames that really leave, by the interface that was meant.
//! - [`layout`]: what bpftool shows of the tables.
//!
//! Needs root. Each test loads its own program and maps, in a network namespace of its own. Frames before and after
//! are kept as `target/program/<case>.pcap`.

mod agreement;
mod case;
mod evidence;
mod flood;
mod golden;
mod hammer;
mod invariant;
mod layout;
mod limits;
mod live;
mod mirror;
mod rig;
mod sequences;
mod subject;
mod world;

use gateway_tests::packet;
