//! A million frames, most of them nearly right.

use super::{encapsulation::fix, fixture::*};
use crate::{abi::Outcome, engine::Action, model::HostTables};

/// xorshift64*: quick, and the same frames on every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() >> 33) as usize % limit
    }
}

fn seeds() -> Vec<Vec<u8>> {
    let arp: Vec<u8> = [&[0, 1, 8, 0, 6, 4, 0, 1][..], &CLIENT_NIC, &CLIENT, &[0; 6], &POD].concat();
    let question = ethernet([0xff; 6], NODE_VTEP, 0x0806, &arp);
    vec![
        client_udp(64, 1, (1000, 80), b"request"),
        pod_udp(0, 64, 2, b"response"),
        ethernet([0xff; 6], CLIENT_NIC, 0x0806, &arp),
        tunnel(NODE, 1, VNI_1, &question),
    ]
}

fn mutate(frame: &mut Vec<u8>, random: &mut Random) {
    for _ in 0..random.below(3) {
        let at = random.below(frame.len().max(1));
        match random.below(4) {
            0 => frame[at] ^= 1 << random.below(8),
            1 => frame[at] = random.next() as u8,
            2 => frame.truncate(at.max(14)),
            _ => frame.push(random.next() as u8),
        }
    }
}

/// Whatever comes in: no panic, one outcome, passed frames unchanged (checked by `run`); a forwarded frame has a
/// correct outer header, and the TTL went down by one.
#[test]
fn a_million_frames() {
    let tables = gateway();
    let seeds = seeds();
    let mut random = Random(0x5eed_0001);
    let mut forwarded = 0u32;
    for _ in 0..1_000_000 {
        let mut frame = seeds[random.below(seeds.len())].clone();
        mutate(&mut frame, &mut random);
        forwarded += u32::from(check(&tables, &frame));
    }
    assert!(forwarded > 200_000, "the generator makes too little of use: {forwarded}");
}

fn check(tables: &HostTables, frame: &[u8]) -> bool {
    let (outcome, action, after) = run(tables, frame);
    match outcome {
        Outcome::Encap => {
            assert_eq!(after.len(), frame.len() + 50);
            let mut outer = after[14..34].to_vec();
            fix(&mut outer);
            assert_eq!(outer, after[14..34]);
            assert_eq!(after[72], frame[22] - 1);
            assert!(frame[26..29] == [10, 244, 30]);
        }
        Outcome::Decap => {
            assert!(after.len() < frame.len());
            assert_eq!(action, Action::Redirect(OUTSIDE));
            assert_eq!(frame[26..30], NODE);
            assert_eq!(after[26..29], [10, 244, 1]);
        }
        _ => {}
    }
    action != Action::Pass && action != Action::Drop
}
