//! `Frame` over the XDP context: the one place where addresses become references.

use aya_ebpf::{
    EbpfContext as _,
    helpers::generated::{bpf_xdp_adjust_head, bpf_xdp_adjust_tail, bpf_xdp_get_buff_len},
    programs::XdpContext,
};
use gateway_common::{engine::Frame, wire::Wire};

/// No driver's first buffer is shorter than an ordinary frame with a tag, so no frame up to this length has fragments.
const UNFRAGMENTED: u32 = 1518;

/// The frame of one run of the program.
///
/// Pointers into it die when it is resized; references borrow from it, and resizing takes it exclusively, so stale
/// use does not compile.
pub(crate) struct XdpFrame<'a> {
    context: &'a XdpContext,
    len: u32,
    /// Length before the frame was resized.
    arrived: u32,
}

impl<'a> XdpFrame<'a> {
    #[inline(always)]
    pub(crate) fn new(context: &'a XdpContext) -> Self {
        let mut frame = Self { context, len: 0, arrived: 0 };
        let (data, end) = frame.bounds();
        frame.set_len((end as usize - data as usize) as u32);
        // Only what fills a driver's first buffer has fragments, but for headers that a card split off.
        if frame.len > UNFRAGMENTED {
            frame.measure();
        }
        frame
    }

    #[inline(always)]
    fn set_len(&mut self, len: u32) {
        (self.len, self.arrived) = (len, len);
    }

    /// Bytes of the frame as it came; those in fragments as in [`Frame::len`].
    #[inline(always)]
    pub(crate) fn arrived(&self) -> u32 {
        self.arrived
    }

    /// Addresses of the frame's first byte and of the one behind its last. To the compiler they are numbers of 32 bits:
    /// loads that it might merge with others it would narrow to that, and the verifier would no longer see an address.
    #[inline(always)]
    fn bounds(&self) -> (u32, u32) {
        // SAFETY: the context is the one that the kernel gave this program; the reference ends before a helper changes it.
        let context = unsafe { &*self.context.ctx };
        // SAFETY: reads through a reference.
        let data = unsafe { (&raw const context.data).read_volatile() };
        // SAFETY: as above.
        let end = unsafe { (&raw const context.data_end).read_volatile() };
        (data, end)
    }

    /// Address of a `T` at `offset`, if it lies inside the frame. The comparison is in the form that the verifier
    /// takes as proof.
    #[inline(always)]
    fn address<T: Wire>(&self, offset: usize) -> Option<usize> {
        let (data, end) = self.bounds();
        let start = data as usize + offset;
        if start + size_of::<T>() > end as usize { None } else { Some(start) }
    }
}

impl Frame for XdpFrame<'_> {
    #[inline(always)]
    fn len(&self) -> u32 {
        self.len
    }

    #[inline(always)]
    fn measure(&mut self) {
        // SAFETY: the context is the one that the kernel gave this program.
        self.set_len(unsafe { bpf_xdp_get_buff_len(self.context.ctx) } as u32);
    }

    #[inline(always)]
    fn read<T: Wire>(&self, offset: usize) -> Option<&T> {
        let address = self.address::<T>(offset)?;
        // SAFETY: inside the frame (checked above); `Wire` types have alignment 1 and take any bit pattern; the borrow
        // of `self` keeps the frame from being resized or written.
        Some(unsafe { &*(address as *const T) })
    }

    #[inline(always)]
    fn write<T: Wire>(&mut self, offset: usize) -> Option<&mut T> {
        let address = self.address::<T>(offset)?;
        // SAFETY: as in `read`; the borrow is exclusive.
        Some(unsafe { &mut *(address as *mut T) })
    }

    #[inline(always)]
    fn grow_front(&mut self, by: i32) -> bool {
        // SAFETY: no reference into the frame is alive, as `self` is borrowed exclusively.
        let done = unsafe { bpf_xdp_adjust_head(self.context.as_ptr().cast(), by.wrapping_neg()) } == 0;
        if done {
            self.len = self.len.wrapping_add_signed(by);
        }
        done
    }

    #[inline(always)]
    fn truncate(&mut self, len: u32) -> bool {
        let by = (len as i32).wrapping_sub(self.len as i32);
        // SAFETY: as in `grow_front`. A jumbo frame loses whole fragments.
        let done = unsafe { bpf_xdp_adjust_tail(self.context.as_ptr().cast(), by) } == 0;
        if done {
            self.len = len;
        }
        done
    }
}
