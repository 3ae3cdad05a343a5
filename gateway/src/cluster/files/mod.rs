//! A directory of Kubernetes manifests as source of cluster objects, watched while the gateway runs.
//!
//! Files `*.yaml`, `*.yml` and `*.json` directly in the directory count (also symbolic links, as in a mounted
//! ConfigMap); hidden files do not. They hold single objects, `List`s as `kubectl get -o yaml` prints them, or
//! several documents. Kinds other than Node and Pod are ignored.
//!
//! The source fails static: what cannot be read any more (a file half written, an object that became invalid, a
//! directory that is not mounted) keeps what it said before, and is reported until it is mended. Only an object that
//! is left out of a file that can be read, or a file that is removed, goes away.

mod directory;
mod manifest;
mod watch;

pub use directory::Directory;
pub use watch::watch;

#[cfg(test)]
mod tests;
