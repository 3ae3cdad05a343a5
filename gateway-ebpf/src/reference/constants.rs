//! Constants that the benchmark replaces before the object is loaded.

use core::cell::UnsafeCell;

/// A constant. The cell keeps the compiler from using the initial value.
#[repr(transparent)]
pub(crate) struct Constant<T>(UnsafeCell<T>);

// SAFETY: nobody writes: the kernel freezes the map before the program is loaded.
unsafe impl<T> Sync for Constant<T> {}

impl<T: Copy> Constant<T> {
    pub(crate) const fn new(value: T) -> Self {
        Self(UnsafeCell::new(value))
    }

    #[inline(always)]
    pub(crate) fn get(&self) -> &T {
        // SAFETY: valid for the life of the program and never written.
        unsafe { &*self.0.get() }
    }
}

/// Defines constants under their names.
macro_rules! constants {
    ($($(#[$doc:meta])* $name:ident: $type:ty = $value:expr;)+) => {
        $(
            $(#[$doc])*
            #[unsafe(no_mangle)]
            #[unsafe(link_section = ".rodata.driver")]
            pub(crate) static $name: $crate::constants::Constant<$type> = $crate::constants::Constant::new($value);
        )+
    };
}

pub(crate) use constants;
