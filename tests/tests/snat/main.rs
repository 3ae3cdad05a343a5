//! End to end: clients from outside reach pods by source translation, with real stacks at both ends. In every test the wire
//! is watched on both sides: nothing untranslated leaves.

mod cluster;
mod errors;
mod interruptions;
mod lifecycle;
mod metrics;
mod rig;
mod rules;
mod serve;
mod tcp;
mod traffic;
