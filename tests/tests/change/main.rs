//! Change: a cluster that moves under the gateway, and manifests that are wrong, through the daemon that users run.

mod churn;
mod cluster;
mod problems;
mod scenarios;
mod stream;
mod tables;
