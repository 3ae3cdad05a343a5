//! The source `kubernetes` against an API server: the test server of this crate, or, with `GATEWAY_TEST_API=real` and
//! `KUBECONFIG` as `cargo xtask test kubernetes` sets them, a real one. On that, only objects are touched that carry the label of the run.

mod access;
mod announce;
mod convergence;
mod faults;
mod objects;
mod observer;
mod protocol;
mod rights;
mod source;
mod subject;
