//! The source `kubernetes` against an API server: the test server of this crate, or, with `GATEWAY_TEST_API=real` and
//! `KUBECONFIG` as `cargo xtask test kubernetes` sets them, a real one.
//!
//! On a real server only objects are touched that carry the label of the run, and the source has the rights of
//! `deploy/rbac.yaml` there too. What needs a test server, because it makes faults, writes flannel's own objects or looks at
//! what was asked for, is in [`access`], [`faults`] and [`rights`]: `cargo xtask test` leaves them out there, and says so.

mod access;
mod account;
mod announce;
mod convergence;
mod faults;
mod objects;
mod observer;
mod protocol;
mod rights;
mod source;
mod subject;
