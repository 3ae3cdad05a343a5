//! The BPF side: the object, its pins and its tables.
//!
//! - [`pins`]: where things lie in the bpffs, who may use them, and whether what lies there is what is expected.
//! - [`load`]: one load of the program for each interface; attach, adopt, swap, detach.
//! - [`constants`]: the constants of a load, from configuration and host facts.
//! - [`tables`]: typed handles to the pinned maps, for the daemon and for `show`.
//! - [`batch`]: map operations in batches.
//! - `bpf`: the system call, for what aya does not offer; the only `unsafe` code of the daemon.
//! - [`template`]: the finished header of a VTEP.
//! - [`reconcile`]: makes the tables equal to the plan.
//! - [`sessions`]: the tables of sessions, and how they move to another size while the program works on them.
//! - [`sweep`]: removes sessions, by a program.

pub mod batch;
pub(crate) mod bpf;
pub mod constants;
pub mod load;
pub mod pins;
pub mod reconcile;
pub mod sessions;
pub mod sweep;
pub mod tables;
pub mod template;
