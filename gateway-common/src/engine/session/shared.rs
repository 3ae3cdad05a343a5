//! Table entries that other CPUs read and write at the same time.

use core::cell::UnsafeCell;

use crate::{
    abi::{Forward, ForwardKey, LastHop, Reverse, ReverseKey, State, Ticks},
    wire::{Be16, Ipv4},
};

/// An entry in its place in a table.
///
/// Fields are read and written one by one, each in one access; none is changed together with another. A reader that
/// depends on several looks at the tag afterwards: the entry may have been recycled for another session.
#[repr(transparent)]
#[derive(Debug)]
pub struct Shared<V>(UnsafeCell<V>);

impl<V> Shared<V> {
    /// An entry of the host's model.
    #[cfg(any(test, feature = "model"))]
    pub const fn new(value: V) -> Self {
        Self(UnsafeCell::new(value))
    }

    /// The whole entry; not at one moment.
    #[cfg(any(test, feature = "model"))]
    pub fn get(&self) -> V
    where
        V: Copy,
    {
        // SAFETY: the pointer is valid; the host's model runs on one thread at a time.
        unsafe { *self.0.get() }
    }

    /// Replaces the whole entry, as a table does that takes it for another session.
    #[cfg(test)]
    pub(in crate::engine) fn set(&self, value: V) {
        // SAFETY: as for reading.
        unsafe { *self.0.get() = value }
    }
}

#[cfg(any(test, feature = "model"))]
impl Shared<Reverse> {
    /// Compare-and-swap of the state, on one thread; whether it was `old`.
    pub fn exchange(&self, old: State, new: State) -> bool {
        let is_old = self.state() == old;
        if is_old {
            // SAFETY: the pointer is valid; the host's model runs on one thread at a time.
            unsafe { (*self.0.get()).state = new };
        }
        is_old
    }
}

macro_rules! fields {
    ($entry:ident: $($(#[$doc:meta])* $field:ident $($set:ident)?: $type:ty as $word:ty;)+) => {
        impl Shared<$entry> {
            $(
                $(#[$doc])*
                #[inline(always)]
                pub fn $field(&self) -> $type {
                    const INDEX: usize = core::mem::offset_of!($entry, $field) / size_of::<$word>();
                    const { assert!(core::mem::offset_of!($entry, $field) % size_of::<$word>() == 0) };
                    // SAFETY: points into the entry, which outlives the borrow and is aligned for words; any bit
                    // pattern is valid.
                    let word: $word = unsafe { self.0.get().cast::<$word>().add(INDEX).read_volatile() };
                    bytemuck::must_cast(word)
                }

                $(
                    /// Replaces the field above.
                    #[inline(always)]
                    pub fn $set(&self, value: $type) {
                        const INDEX: usize = core::mem::offset_of!($entry, $field) / size_of::<$word>();
                        let word: $word = bytemuck::must_cast(value);
                        // SAFETY: as for reading.
                        unsafe { self.0.get().cast::<$word>().add(INDEX).write_volatile(word) }
                    }
                )?
            )+
        }
    };
}

fields! { Forward:
    /// [`Forward::tag`].
    tag: u32 as u32;
    /// [`Forward::seen`].
    seen set_seen: Ticks as u32;
    /// [`Forward::vtep`].
    vtep set_vtep: u32 as u32;
    /// [`Forward::generation`].
    generation set_generation: u32 as u32;
    /// [`Forward::last_hop`].
    last_hop set_last_hop: LastHop as u64;
    /// [`Forward::source`].
    source: Ipv4 as u32;
    /// [`Forward::source_port`].
    source_port: Be16 as u16;
    /// [`Forward::confirmed`].
    confirmed set_confirmed: u16 as u16;
    /// [`Forward::destination`].
    destination: Ipv4 as u32;
    /// [`Forward::destination_port`].
    destination_port: Be16 as u16;
    /// [`Forward::overlay`].
    overlay: u16 as u16;
    /// [`Forward::header_delta`].
    header_delta: u16 as u16;
    /// [`Forward::transport_delta`].
    transport_delta: u16 as u16;
    /// [`Forward::created`].
    created: Ticks as u32;
    /// [`Forward::protocol`].
    protocol: u16 as u16;
}

fields! { Reverse:
    /// [`Reverse::state`].
    state: State as u64;
    /// [`Reverse::last_hop`].
    last_hop set_last_hop: LastHop as u64;
    /// [`Reverse::tag`].
    tag: u32 as u32;
    /// [`Reverse::seen`].
    seen set_seen: Ticks as u32;
    /// [`Reverse::vtep`].
    vtep set_vtep: u32 as u32;
    /// [`Reverse::slot`].
    slot: u32 as u32;
    /// [`Reverse::client`].
    client: Ipv4 as u32;
    /// [`Reverse::client_port`].
    client_port: Be16 as u16;
    /// [`Reverse::destination`].
    destination: Ipv4 as u32;
    /// [`Reverse::destination_port`].
    destination_port: Be16 as u16;
    /// [`Reverse::header_delta`].
    header_delta: u16 as u16;
    /// [`Reverse::transport_delta`].
    transport_delta: u16 as u16;
    /// [`Reverse::protocol`].
    protocol: u16 as u16;
}

impl Shared<Reverse> {
    /// Where the state is, for a compare-and-swap.
    #[inline(always)]
    pub const fn state_word(&self) -> *mut u64 {
        const { assert!(core::mem::offset_of!(Reverse, state) == 0) };
        self.0.get().cast()
    }

    /// [`Reverse::forward_key`].
    #[inline(always)]
    pub fn forward_key(&self, key: &ReverseKey) -> ForwardKey {
        let client = (self.client(), self.client_port());
        key.other_half(client, (self.destination(), self.destination_port()))
    }
}

impl Shared<Forward> {
    /// [`Forward::reverse_key`].
    #[inline(always)]
    pub fn reverse_key(&self, key: &ForwardKey) -> ReverseKey {
        let pod = (self.destination(), self.destination_port());
        key.other_half(pod, (self.source(), self.source_port()), self.overlay())
    }
}
