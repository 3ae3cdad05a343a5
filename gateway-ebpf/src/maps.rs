//! `Tables` over BPF maps, constants and helpers.

use core::cell::UnsafeCell;

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        BPF_FIB_LKUP_RET_FRAG_NEEDED, BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_NOT_FWDED,
        BPF_FIB_LKUP_RET_SUCCESS, bpf_fib_lookup as FibParameters, bpf_fib_lookup__bindgen_ty_1,
        bpf_fib_lookup__bindgen_ty_2, bpf_fib_lookup__bindgen_ty_3, bpf_fib_lookup__bindgen_ty_4,
        bpf_fib_lookup__bindgen_ty_5,
    },
    btf_maps::{Array, HashMap, LpmTrie, PerCpuArray, lpm_trie},
    helpers::generated::{bpf_fib_lookup, bpf_redirect},
    macros::btf_map,
    programs::XdpContext,
};
use gateway_common::{
    abi::{
        Config, Counter, Egress, LocalAddress, OUTCOME_CAPACITY, Outcome, OverlayAddress, PrefixKey, Route, Vtep,
    },
    engine::{Fib, FibQuery, Tables},
    wire::{Ipv4, Mac},
};

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
static COUNTERS: PerCpuArray<Counter, { OUTCOME_CAPACITY as usize }> = PerCpuArray::new();

/// Constants in `.rodata`, replaced by the loader. The cell keeps the compiler from using the initial value; the
/// verifier, which sees the final one in a frozen map, folds it.
#[repr(transparent)]
struct Constants(UnsafeCell<Config>);

// SAFETY: nobody writes: the kernel freezes the map before the program is loaded.
unsafe impl Sync for Constants {}

#[unsafe(no_mangle)]
#[unsafe(link_section = ".rodata")]
static CONFIG: Constants = Constants(UnsafeCell::new(Config::UNSET));

const AF_INET: u8 = 2;

/// Counts a packet of `bytes` bytes.
#[inline(always)]
pub(crate) fn count(outcome: Outcome, bytes: u32) {
    if let Some(counter) = COUNTERS.get_ptr_mut(outcome.number()) {
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
        PREFIXES.get(&lpm_trie::Key::new(PrefixKey::OVERLAY_BITS + Ipv4::BITS, key)).copied()
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
        unsafe { ADDRESSES.get(&address).copied() }
    }

    #[inline(always)]
    fn egress(&self, ifindex: u32) -> Option<Egress> {
        // SAFETY: as in `pod`.
        unsafe { EGRESS.get(&ifindex).copied() }
    }

    #[inline(always)]
    fn fib(&self, query: &FibQuery) -> Fib {
        let mut parameters = FibParameters {
            family: AF_INET,
            l4_protocol: query.protocol,
            sport: 0,
            dport: 0,
            __bindgen_anon_1: bpf_fib_lookup__bindgen_ty_1 { tot_len: query.total_length },
            ifindex: self.config().ifindex,
            __bindgen_anon_2: bpf_fib_lookup__bindgen_ty_2 { flowinfo: u32::from(query.tos) },
            __bindgen_anon_3: bpf_fib_lookup__bindgen_ty_3 { ipv6_src: [query.source.word(), 0, 0, 0] },
            __bindgen_anon_4: bpf_fib_lookup__bindgen_ty_4 { ipv6_dst: [query.destination.word(), 0, 0, 0] },
            __bindgen_anon_5: bpf_fib_lookup__bindgen_ty_5 { tbid: 0 },
            smac: [0; 6],
            dmac: [0; 6],
        };
        let size = size_of::<FibParameters>() as i32;
        // SAFETY: the parameters are initialised, and `size` is theirs.
        let answer = unsafe { bpf_fib_lookup(self.context.as_ptr(), &raw mut parameters, size, 0) };
        match answer as u32 {
            BPF_FIB_LKUP_RET_SUCCESS => Fib::Forward {
                ifindex: parameters.ifindex,
                source: Mac::new(parameters.smac),
                next_hop: Mac::new(parameters.dmac),
            },
            BPF_FIB_LKUP_RET_NOT_FWDED => Fib::NotForwarded,
            BPF_FIB_LKUP_RET_NO_NEIGH => Fib::NoNeighbour,
            BPF_FIB_LKUP_RET_FRAG_NEEDED => Fib::TooBig,
            _ => Fib::Refused,
        }
    }
}

