//! Laying a [`Wire`] type over bytes.

use super::Wire;

/// The first bytes of an array as a `T`, which must fit (checked at compile time).
#[inline(always)]
pub fn prefix<T: Wire, const N: usize>(bytes: &[u8; N]) -> &T {
    const { assert!(size_of::<T>() <= N && align_of::<T>() == 1) };
    // SAFETY: the array has at least as many bytes as `T`; `Wire` types have alignment 1 and take any bit pattern.
    unsafe { &*bytes.as_ptr().cast::<T>() }
}

/// The `T` at `offset`; `None` if the bytes end before it does.
#[cfg(any(test, feature = "model"))]
pub fn at<T: Wire>(bytes: &[u8], offset: usize) -> Option<&T> {
    let window = bytes.get(offset..)?.get(..size_of::<T>())?;
    // SAFETY: the window has exactly as many bytes as `T`; `Wire` types have alignment 1 and take any bit pattern.
    Some(unsafe { &*window.as_ptr().cast::<T>() })
}

/// The `T` at `offset`, for writing; `None` if the bytes end before it does.
#[cfg(any(test, feature = "model"))]
pub fn at_mut<T: Wire>(bytes: &mut [u8], offset: usize) -> Option<&mut T> {
    let window = bytes.get_mut(offset..)?.get_mut(..size_of::<T>())?;
    // SAFETY: as in `at`; the window is borrowed exclusively.
    Some(unsafe { &mut *window.as_mut_ptr().cast::<T>() })
}
