//! One's-complement arithmetic of the Internet checksum (RFC 1071), and its incremental update (RFC 1624).
//!
//! The sum of 16-bit words does not care about byte order as long as all words are read in the same one
//! (RFC 1071 section 2 B). So everything here adds words as they lie in memory, without swapping, and a finished
//! checksum is stored as it is.

/// A running one's-complement sum of 16-bit words in memory order.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sum(u32);

impl Sum {
    /// Starts from an earlier [`fold`](Self::fold).
    #[inline(always)]
    pub const fn new(folded: u16) -> Self {
        Self(folded as u32)
    }

    /// Adds two bytes as they lie in memory. At most 65,535 words may be added before folding.
    #[inline(always)]
    pub const fn add(self, word: [u8; 2]) -> Self {
        Self(self.0 + u16::from_ne_bytes(word) as u32)
    }

    /// Takes two bytes out again: adds their complement (RFC 1624 equation 3).
    #[inline(always)]
    pub const fn remove(self, word: [u8; 2]) -> Self {
        Self(self.0 + !u16::from_ne_bytes(word) as u32)
    }

    /// The sum in 16 bits.
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "the second fold leaves 16 bits")]
    pub const fn fold(self) -> u16 {
        let once = (self.0 & 0xffff) + (self.0 >> 16);
        let twice = (once & 0xffff) + (once >> 16);
        twice as u16
    }

    /// The checksum field for this sum, as it is stored.
    #[inline(always)]
    pub const fn checksum(self) -> [u8; 2] {
        (!self.fold()).to_ne_bytes()
    }

    /// The sum of a header of an even number of bytes; an odd last byte is padded with zero.
    pub const fn of(bytes: &[u8]) -> Self {
        let mut sum = Self(0);
        let mut rest = bytes;
        loop {
            match rest {
                [a, b, tail @ ..] => {
                    sum = Self(sum.add([*a, *b]).fold() as u32);
                    rest = tail;
                }
                [a] => return sum.add([*a, 0]),
                [] => return sum,
            }
        }
    }
}

/// Updates a stored checksum for one 16-bit word that changes from `old` to `new` (RFC 1624 equation 3:
/// `HC' = ~(~HC + ~m + m')`).
#[inline(always)]
pub const fn update(check: [u8; 2], old: [u8; 2], new: [u8; 2]) -> [u8; 2] {
    Sum(0).remove(check).remove(old).add(new).checksum()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// RFC 1071 section 3, the numerical example: the sum of 00 01 f2 03 f4 f5 f6 f7 is ddf2.
    #[test]
    fn rfc_1071_example() {
        let sum = Sum::of(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]);
        assert_eq!(sum.fold().to_ne_bytes(), [0xdd, 0xf2]);
    }

    /// RFC 1624 section 4: DD2F, 5555 to 3285, gives 0000 and not FFFF.
    #[test]
    fn rfc_1624_corner_case() {
        assert_eq!(update([0xdd, 0x2f], [0x55, 0x55], [0x32, 0x85]), [0, 0]);
    }

    proptest! {
        #[test]
        fn agrees_with_etherparse(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let expected = etherparse::checksum::Sum16BitWords::new().add_slice(&bytes).ones_complement();
            prop_assert_eq!(u16::from_ne_bytes(Sum::of(&bytes).checksum()), expected);
        }

        #[test]
        fn update_equals_recomputation(mut header in any::<[u8; 20]>(), index in 0..9usize, new in any::<[u8; 2]>()) {
            // Word 9 serves as the checksum field; an all-zero header has no update (RFC 1624 section 5).
            header[0] |= 1;
            header[18..].fill(0);
            let check = Sum::of(&header).checksum();
            let at = index * 2;
            let old = [header[at], header[at + 1]];
            header[at..at + 2].copy_from_slice(&new);
            prop_assume!(header[..18].iter().any(|byte| *byte != 0));
            prop_assert_eq!(update(check, old, new), Sum::of(&header).checksum());
        }
    }
}
