//! `Tables` over BPF maps, constants and helpers.

use core::{cell::UnsafeCell, ffi::c_void};

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        BPF_FIB_LKUP_RET_FRAG_NEEDED, BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_NOT_FWDED,
        BPF_FIB_LKUP_RET_SUCCESS, BPF_NOEXIST, bpf_fib_lookup as FibParameters,
    },
    btf_maps::{Array, HashMap, LpmTrie, PerCpuArray, lpm_trie},
    helpers::generated::{bpf_fib_lookup, bpf_ktime_get_coarse_ns, bpf_loop, bpf_redirect},
    macros::btf_map,
    programs::XdpContext,
};
use bytemuck::Zeroable as _;
use gateway_common::{
    abi::{
        Config, Counter, Egress, Forward, ForwardKey, LocalAddress, OUTCOME_CAPACITY, OverlayAddress,
        PrefixKey, Reverse, ReverseKey, Route, SessionEvent, Slot, State, TICK_SHIFT, Ticks, Vtep,
    },
    engine::{
        Fib, FibQuery, Inserted, Sessions, Tables, Verdict, WayOut,
        session::{Opening, Shared},
    },
    wire::{Ipv4, Mac},
};

use crate::atomic;

// Sizes are defaults; the daemon sets those of its configuration when it loads the object.
#[btf_map]
static PODS: HashMap<OverlayAddress, Route, 262_144> = HashMap::new();
#[btf_map]
static PREFIXES: LpmTrie<PrefixKey, Route, 16_384> = LpmTrie::new();
#[btf_map]
static VTEPS: Array<Vtep, 8192> = Array::new();
#[btf_map]
static SOURCES: HashMap<OverlayAddress, Route, 32_768> = HashMap::new();
#[btf_map]
static ADDRESSES: HashMap<Ipv4, LocalAddress, 4096> = HashMap::new();
#[btf_map]
static EGRESS: HashMap<u32, Egress, 256> = HashMap::new();
#[btf_map]
static SESSION_FORWARD: HashMap<ForwardKey, Forward, 263_168> = HashMap::new();
#[btf_map]
static SESSION_REVERSE: HashMap<ReverseKey, Reverse, 263_168> = HashMap::new();
#[btf_map]
static SESSION_SLOTS: Array<Slot, 262_144> = Array::new();
#[btf_map]
static SESSION_HAND: Array<u64, 1> = Array::new();
#[btf_map]
static SESSION_EVENTS: PerCpuArray<u64, { SessionEvent::ALL.len() }> = PerCpuArray::new();
#[btf_map]
static COUNTERS: PerCpuArray<Counter, { OUTCOME_CAPACITY as usize }> = PerCpuArray::new();

/// Allowance of ICMP errors of a CPU.
#[repr(C)]
struct Allowance {
    /// Errors that may still be sent in this period.
    left: u32,
    pad: u32,
    /// Coarse time at which the period began, nanoseconds.
    since: u64,
}

/// Errors that a CPU may send in a period; Linux' own default is 1,000 a second for the whole host.
const ALLOWANCE: u32 = 100;
const PERIOD: u64 = 100_000_000;

#[btf_map]
static ICMP_LIMIT: PerCpuArray<Allowance, 1> = PerCpuArray::new();

/// Flows of a CPU whose way out is remembered.
const WAYS_OUT: u32 = 2048;

#[btf_map]
static WAY_OUT: PerCpuArray<WayOut, { WAYS_OUT as usize }> = PerCpuArray::new();

/// Where values are put together that would fill the stack.
#[repr(C)]
struct Scratch {
    forward: Forward,
    reverse: Reverse,
    opening: Opening,
    fib: FibParameters,
    verdict: Verdict,
}

#[btf_map]
static SCRATCH: PerCpuArray<Scratch, 1> = PerCpuArray::new();

/// Constants in `.rodata`, replaced by the loader. The cell keeps the compiler from using the initial value; the
/// verifier, which sees the final one in a frozen map, folds it.
#[repr(transparent)]
struct Constants(UnsafeCell<Config>);

// SAFETY: nobody writes: the kernel freezes the map before the program is loaded.
unsafe impl Sync for Constants {}

#[unsafe(no_mangle)]
#[unsafe(link_section = ".rodata.config")]
static CONFIG: Constants = Constants(UnsafeCell::new(Config::UNSET));

/// The trie's key is packed, its data behind a 32-bit length. The compiler may store the data in one 8-byte write,
/// which the verifier wants aligned on the stack: so it starts 8 bytes into an aligned struct.
#[repr(C, align(8))]
struct AlignedKey {
    pad: u32,
    key: lpm_trie::Key<PrefixKey>,
}

const AF_INET: u8 = 2;

/// Counts a packet of `bytes` bytes under the outcome with this number.
#[inline(always)]
pub(crate) fn count(outcome: u32, bytes: u32) {
    if let Some(counter) = COUNTERS.get_ptr_mut(outcome) {
        // SAFETY: the slot belongs to this CPU, and XDP programs do not interrupt one another on a CPU.
        let counter = unsafe { &mut *counter };
        counter.packets += 1;
        counter.bytes += u64::from(bytes);
    }
}

/// Hands the frame to another interface; the action for the driver.
#[inline(always)]
pub(crate) fn redirect(ifindex: u32) -> u32 {
    // SAFETY: a helper without pointers.
    unsafe { bpf_redirect(ifindex, 0) as u32 }
}

/// A MAC address that may come to lie on the stack at an offset that is no multiple of 4: the verifier refuses wide
/// accesses there, and volatile ones of single bytes are not merged.
#[inline(always)]
fn by_octets(octets: &[u8; 6]) -> Mac {
    // SAFETY: reads through a reference.
    Mac::new(octets.each_ref().map(|octet| unsafe { core::ptr::from_ref(octet).read_volatile() }))
}

/// The kernel's side of the engine's tables.
pub(crate) struct KernelTables<'a> {
    context: &'a XdpContext,
}

impl<'a> KernelTables<'a> {
    #[inline(always)]
    pub(crate) const fn new(context: &'a XdpContext) -> Self {
        Self { context }
    }
}

/// How the kernel says that a key is there already (`EEXIST`), and that another CPU holds the bucket (`EBUSY`).
const EXISTS: [i32; 2] = [-17, -16];

/// Inserts a value that is put together in its `place` of the scratch space.
#[inline(always)]
fn insert<K, V, const N: usize>(
    table: &HashMap<K, V, N>,
    key: &K,
    place: impl FnOnce(&mut Scratch) -> &mut V,
    value: impl FnOnce() -> V,
) -> Inserted {
    let Some(scratch) = SCRATCH.get_ptr_mut(0) else {
        return Inserted::Full;
    };
    // SAFETY: the entry belongs to this CPU, and XDP programs do not interrupt one another on a CPU.
    let place = place(unsafe { &mut *scratch });
    *place = value();
    match table.insert(key, &*place, BPF_NOEXIST.into()) {
        Ok(()) => Inserted::Done,
        Err(code) if EXISTS.contains(&code) => Inserted::Exists,
        Err(_) => Inserted::Full,
    }
}

impl Sessions for KernelTables<'_> {
    type Forward<'a>
        = &'a Shared<Forward>
    where
        Self: 'a;
    type Reverse<'a>
        = &'a Shared<Reverse>
    where
        Self: 'a;

    #[inline(always)]
    fn ticks(&self) -> Ticks {
        // SAFETY: a helper without arguments.
        let now = unsafe { bpf_ktime_get_coarse_ns() };
        (now >> TICK_SHIFT) as u32
    }

    #[inline(always)]
    fn forward(&self, key: &ForwardKey) -> Option<Self::Forward<'_>> {
        let entry = SESSION_FORWARD.get_ptr(key)?;
        // SAFETY: `Shared` is transparent, and made for entries that others write; values of maps are never unmapped
        // while a program runs.
        Some(unsafe { &*entry.cast() })
    }

    #[inline(always)]
    fn reverse(&self, key: &ReverseKey) -> Option<Self::Reverse<'_>> {
        let entry = SESSION_REVERSE.get_ptr(key)?;
        // SAFETY: as in `forward`.
        Some(unsafe { &*entry.cast() })
    }

    #[inline(always)]
    fn insert_forward(&self, key: &ForwardKey, value: impl FnOnce() -> Forward) -> Inserted {
        insert(&SESSION_FORWARD, key, |scratch| &mut scratch.forward, value)
    }

    #[inline(always)]
    fn insert_reverse(&self, key: &ReverseKey, value: impl FnOnce() -> Reverse) -> Inserted {
        insert(&SESSION_REVERSE, key, |scratch| &mut scratch.reverse, value)
    }

    #[inline(always)]
    fn remove_forward(&self, key: &ForwardKey) {
        // It may be gone already.
        let _ = SESSION_FORWARD.remove(key);
    }

    #[inline(always)]
    fn remove_reverse(&self, key: &ReverseKey) {
        // As above.
        let _ = SESSION_REVERSE.remove(key);
    }

    #[inline(always)]
    fn exchange(&self, session: &Shared<Reverse>, old: State, new: State) -> bool {
        atomic::exchange(session, old, new)
    }

    #[inline(always)]
    fn advance_hand(&self, by: u32) -> u32 {
        match SESSION_HAND.get_ptr_mut(0) {
            Some(hand) => atomic::add(hand, u64::from(by)) as u32,
            None => 0,
        }
    }

    #[inline(always)]
    fn slot(&self, index: u32) -> ReverseKey {
        match SESSION_SLOTS.get(index) {
            Some(slot) => slot.session,
            None => ReverseKey::zeroed(),
        }
    }

    #[inline(always)]
    fn set_slot(&self, index: u32, session: &ReverseKey) {
        if let Some(slot) = SESSION_SLOTS.get_ptr_mut(index) {
            // SAFETY: the slot was taken by this CPU; a reader checks what it finds against the session.
            unsafe { (*slot).session = *session };
        }
    }

    #[inline(always)]
    fn note(&self, event: SessionEvent) {
        if let Some(counter) = SESSION_EVENTS.get_ptr_mut(event as u32) {
            // SAFETY: the slot belongs to this CPU, and XDP programs do not interrupt one another on a CPU.
            unsafe { *counter += 1 };
        }
    }

    #[inline(always)]
    fn with_opening(&self, work: impl FnOnce(&mut Opening) -> u64) -> u64 {
        match SCRATCH.get_ptr_mut(0) {
            // SAFETY: as in `insert`.
            Some(scratch) => work(unsafe { &mut (*scratch).opening }),
            None => 0,
        }
    }

    #[inline(always)]
    fn repeat(&self, count: u32, mut step: impl FnMut(u32) -> bool) {
        extern "C" fn call<S: FnMut(u32) -> bool>(index: u32, step: *mut S) -> i64 {
            // SAFETY: the pointer that `repeat` gave, and nobody else uses the closure meanwhile.
            i64::from(unsafe { (*step)(index) })
        }
        fn callback<S: FnMut(u32) -> bool>(_: &S) -> extern "C" fn(u32, *mut S) -> i64 {
            call::<S>
        }
        let function = callback(&step);
        // SAFETY: the helper calls the function with the closure, and returns after that.
        unsafe { bpf_loop(count, function as *mut c_void, (&raw mut step).cast(), 0) };
    }
}

impl Tables for KernelTables<'_> {
    #[inline(always)]
    fn config(&self) -> &Config {
        // SAFETY: valid for the life of the program and never written.
        unsafe { &*CONFIG.0.get() }
    }

    #[inline(always)]
    fn pod(&self, key: &OverlayAddress) -> Option<Route> {
        // SAFETY: copied out at once; the value is replaced whole by userspace.
        unsafe { PODS.get(key).copied() }
    }

    #[inline(always)]
    fn prefix(&self, key: PrefixKey) -> Option<Route> {
        let key = lpm_trie::Key::new(PrefixKey::OVERLAY_BITS + Ipv4::BITS, key);
        PREFIXES.get(&AlignedKey { pad: 0, key }.key).copied()
    }

    #[inline(always)]
    fn vtep(&self, id: u32) -> Option<&Vtep> {
        VTEPS.get(id)
    }

    #[inline(always)]
    fn source(&self, key: &OverlayAddress) -> Option<Route> {
        // SAFETY: as in `pod`.
        unsafe { SOURCES.get(key).copied() }
    }

    #[inline(always)]
    fn address(&self, address: Ipv4) -> Option<LocalAddress> {
        // SAFETY: as in `pod`.
        unsafe { ADDRESSES.get(address).copied() }
    }

    #[inline(always)]
    fn egress(&self, ifindex: u32) -> Option<Egress> {
        // SAFETY: as in `pod`.
        unsafe { EGRESS.get(ifindex).copied() }
    }

    #[inline(always)]
    fn with_way_out<R>(&self, query: &FibQuery, work: impl FnOnce(&mut WayOut) -> R) -> Option<R> {
        // Fibonacci hashing; different factors, as addresses of clients and pods often count alike.
        let hash = query.source.word().wrapping_mul(0x9e37_79b1)
            ^ query.destination.word().wrapping_mul(0x85eb_ca6b);
        let way = WAY_OUT.get_ptr_mut(hash >> (u32::BITS - WAYS_OUT.ilog2()))?;
        // SAFETY: the entry belongs to this CPU, and XDP programs do not interrupt one another on a CPU.
        Some(work(unsafe { &mut *way }))
    }

    #[inline(always)]
    fn may_answer(&self) -> bool {
        let Some(allowance) = ICMP_LIMIT.get_ptr_mut(0) else {
            return false;
        };
        // SAFETY: the slot belongs to this CPU, and XDP programs do not interrupt one another on a CPU.
        let allowance = unsafe { &mut *allowance };
        // SAFETY: a helper without arguments.
        let now = unsafe { bpf_ktime_get_coarse_ns() };
        if now.wrapping_sub(allowance.since) >= PERIOD {
            allowance.since = now;
            allowance.left = ALLOWANCE;
        }
        if allowance.left == 0 {
            return false;
        }
        allowance.left -= 1;
        true
    }

    #[inline(always)]
    fn forget(&self, verdict: Verdict) -> Verdict {
        let Some(scratch) = SCRATCH.get_ptr_mut(0) else {
            return verdict;
        };
        // SAFETY: as in `insert`.
        let place = &raw mut *unsafe { &mut (*scratch).verdict };
        // SAFETY: valid, as a reference a moment ago. Volatile, so that the compiler does not remember it either.
        unsafe { place.write_volatile(verdict) };
        // SAFETY: as above.
        unsafe { place.read_volatile() }
    }

    #[inline(always)]
    fn fib(&self, query: &FibQuery) -> Fib {
        let Some(scratch) = SCRATCH.get_ptr_mut(0) else {
            return Fib::Refused;
        };
        // SAFETY: as in `insert`.
        let parameters = unsafe { &mut (*scratch).fib };
        // SAFETY: a C struct of integers and unions of integers: all zero is a value of it.
        *parameters = unsafe { core::mem::zeroed() };
        parameters.family = AF_INET;
        parameters.l4_protocol = query.protocol;
        parameters.ifindex = self.config().ifindex;
        // Writing a union's field is safe; the rest of the union stays zero.
        parameters.__bindgen_anon_1.tot_len = query.total_length;
        parameters.__bindgen_anon_2.tos = query.tos;
        parameters.__bindgen_anon_3.ipv4_src = query.source.word();
        parameters.__bindgen_anon_4.ipv4_dst = query.destination.word();
        let size = size_of::<FibParameters>() as i32;
        // SAFETY: the parameters are initialised, and `size` is theirs.
        let answer = unsafe { bpf_fib_lookup(self.context.as_ptr(), &raw mut *parameters, size, 0) };
        match answer as u32 {
            BPF_FIB_LKUP_RET_SUCCESS => Fib::Forward {
                ifindex: parameters.ifindex,
                source: Mac::new(parameters.smac),
                next_hop: by_octets(&parameters.dmac),
                // SAFETY: the kernel wrote the MTU over the length.
                mtu: unsafe { parameters.__bindgen_anon_1.mtu_result },
            },
            BPF_FIB_LKUP_RET_NOT_FWDED => Fib::NotForwarded,
            BPF_FIB_LKUP_RET_NO_NEIGH => Fib::NoNeighbour,
            BPF_FIB_LKUP_RET_FRAG_NEEDED => Fib::TooBig,
            _ => Fib::Refused,
        }
    }
}
