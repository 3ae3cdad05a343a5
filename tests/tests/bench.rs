//! The benchmark works: every case gives the verdict and the bytes that it should, round after round. Nothing is asked of
//! the figures.

use gateway_tests::bench::{Effort, live, machine::Machine, program, report::compare};

#[test]
fn every_case_of_the_program_does_what_it_should() {
    let cases = compare(&program::run(Effort::SMOKE).unwrap());
    for name in [
        "program.arp",
        "program.encap.pod",
        "program.encap.prefix",
        "program.decap",
        "program.snat.new",
        "program.snat.established",
        "program.snat.reply",
        "program.too-big",
        "program.drop.unknown-vtep",
        "program.reference.drop",
        "program.reference.tx",
        "program.reference.encap",
        "program.reference.decap",
        "program.piece.redirect",
        "program.piece.head",
        "program.piece.hash",
        "program.piece.time",
        "program.piece.length",
        "program.piece.fib",
    ] {
        assert!(cases.iter().any(|case| case.name == name), "{name} was not measured");
    }
    for case in &cases {
        let reference = cases.iter().find(|other| {
            (&other.name, other.flows, other.pods, other.nodes)
                == (&case.reference, case.flows, case.pods, case.nodes)
        });
        assert!(reference.is_some(), "{} is compared with nothing", case.name);
    }
    assert!(!Machine::here().kernel.is_empty());
}

#[test]
fn every_live_frame_arrives() {
    let samples = live::run(Effort::SMOKE).unwrap();
    for name in [
        "live.drop",
        "live.redirect",
        "live.encap",
        "live.decap",
        "live.kernel.encap",
        "live.kernel.decap",
        "live.reference.encap",
        "live.reference.decap",
    ] {
        // For each length of frame.
        assert_eq!(samples.iter().filter(|samples| samples.name == name).count(), 2, "{name}");
    }
}
