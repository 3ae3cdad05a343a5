//! Sessions: what a translated connection is known by, and all that its packets need.
//!
//! Two tables, one for each direction, and one lookup serves a packet completely. Both values fill a cache line, which
//! the kernel's hash element puts right behind the key: a hit touches the bucket, the key's line and the value's.
//!
//! The life of a session is the [`State`] word of its reverse entry; whoever changes it does so by compare-and-swap.
//! Inserting the reverse entry claims the port, so a reverse entry is there before its forward entry and goes after it.

use bytemuck::{Pod, Zeroable};

use crate::{
    flow::Flow,
    wire::{Be16, Ipv4, Mac},
};

/// A unit of session time: 2^24 nanoseconds (16.8 ms) of the kernel's coarse monotonic clock. A power of two, because
/// the program has no cheap division. 32 bits of them last 2.2 years; only differences are used.
pub type Ticks = u32;

/// Nanoseconds of the monotonic clock to [`Ticks`]: shift right by this.
pub const TICK_SHIFT: u32 = 24;

/// Seconds in ticks, rounded up; at most half the range, so that differences keep their meaning.
pub const fn ticks(seconds: u32) -> Ticks {
    let ticks = ((seconds as u64) * 1_000_000_000).div_ceil(1 << TICK_SHIFT);
    if ticks > (i32::MAX as u64) {
        i32::MAX as u32
    } else {
        #[expect(clippy::cast_possible_truncation, reason = "compared above")]
        {
            ticks as u32
        }
    }
}

/// Key of the forward table: the connection as the client has it. Aligned, because it is compared and copied in words.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
pub struct ForwardKey {
    /// The client.
    pub client: Ipv4,
    /// Where it sends to: a pod, or a virtual server.
    pub destination: Ipv4,
    /// The client's port; for ICMP echo the identifier.
    pub client_port: Be16,
    /// The destination's port; 0 for ICMP echo.
    pub destination_port: Be16,
    /// IP protocol number: TCP, UDP or ICMP.
    pub protocol: u16,
    /// Always 0.
    pub pad: u16,
}

/// Key of the reverse table: the connection as the pod has it. It is unique by being a key, and so is the port.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
pub struct ReverseKey {
    /// The pod.
    pub pod: Ipv4,
    /// The SNAT address, which the pod takes for the client.
    pub address: Ipv4,
    /// The pod's port; 0 for ICMP echo.
    pub pod_port: Be16,
    /// The SNAT port; for ICMP echo the identifier.
    pub port: Be16,
    /// IP protocol number; 0 marks a free slot.
    pub protocol: u16,
    /// Overlay id.
    pub overlay: u16,
}

/// Where a client's packets come from, and so where the answers go: no FIB lookup, as BIG-IP's auto last hop.
///
/// One aligned word, which is replaced whole.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct LastHop {
    /// MAC address that sent the packet: the client's or a router's.
    pub mac: Mac,
    /// VLAN id in the low 12 bits (0 for none), index into [`Config::ports`](super::Config::ports) in the high 4.
    pub port_and_vlan: u16,
}

impl LastHop {
    /// From its parts; `port` is below 16.
    #[inline(always)]
    pub const fn new(mac: Mac, port: u16, vlan: u16) -> Self {
        Self { mac, port_and_vlan: port << 12 | vlan & 0xfff }
    }

    /// Index into [`Config::ports`](super::Config::ports).
    #[inline(always)]
    pub const fn port(self) -> u16 {
        self.port_and_vlan >> 12
    }

    /// VLAN id, 0 for none.
    #[inline(always)]
    pub const fn vlan(self) -> u16 {
        self.port_and_vlan & 0xfff
    }
}

/// Value of the forward table: what a client's packet needs.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Forward {
    /// Flow hash of the key. A preallocated entry is recycled at once: if the tag is another flow's, so is the entry.
    pub tag: u32,
    /// When a packet of the client was seen last; written once a second.
    pub seen: Ticks,
    /// VTEP id of the pod's node.
    pub vtep: u32,
    /// The VTEP's generation when `vtep` was looked up.
    pub generation: u32,
    /// Where the client's packets came from.
    pub last_hop: LastHop,
    /// New source address: the SNAT address.
    pub source: Ipv4,
    /// New source port, or ICMP identifier.
    pub source_port: Be16,
    /// 1 once the session is established: its state word need not be looked at for ordinary packets.
    pub confirmed: u16,
    /// New destination address: the pod. Without a virtual server that of the key.
    pub destination: Ipv4,
    /// New destination port.
    pub destination_port: Be16,
    /// Overlay id.
    pub overlay: u16,
    /// What the address changes add to the sum of the IP header, folded.
    pub header_delta: u16,
    /// What all changes add to the sum of TCP, UDP (with the pseudo header) or ICMP (without), folded.
    pub transport_delta: u16,
    /// When the session was opened.
    pub created: Ticks,
    /// IP protocol number, as in the key: the verifier forgets what a packet's protocol was when it is read from here,
    /// and follows one way instead of one for each protocol.
    pub protocol: u16,
    /// Always 0.
    pub pad: [u16; 3],
    /// Always 0.
    pub reserved: u64,
}

/// Value of the reverse table: what a pod's packet needs, and the state of the session.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Reverse {
    /// The session's life.
    pub state: State,
    /// Where the answer goes.
    pub last_hop: LastHop,
    /// Hash of the key; as [`Forward::tag`].
    pub tag: u32,
    /// When a packet of the pod was seen last; written once a second.
    pub seen: Ticks,
    /// VTEP id of the pod's node: from elsewhere such packets do not come.
    pub vtep: u32,
    /// The session's index in the slot table.
    pub slot: u32,
    /// New destination address: the client.
    pub client: Ipv4,
    /// New destination port, or ICMP identifier.
    pub client_port: Be16,
    /// New source port: what the client sent to.
    pub destination_port: Be16,
    /// New source address: what the client sent to.
    pub destination: Ipv4,
    /// As [`Forward::header_delta`].
    pub header_delta: u16,
    /// As [`Forward::transport_delta`].
    pub transport_delta: u16,
    /// When the session was opened.
    pub created: Ticks,
    /// As [`Forward::protocol`].
    pub protocol: u16,
    /// Always 0.
    pub pad: u16,
    /// Always 0.
    pub reserved: u64,
}

impl Reverse {
    /// The key of the session's forward entry, for the entry under `key`.
    #[inline(always)]
    pub const fn forward_key(&self, key: &ReverseKey) -> ForwardKey {
        let client = (self.client, self.client_port);
        key.other_half(client, (self.destination, self.destination_port))
    }
}

impl ReverseKey {
    /// The forward key of the same session, by its client and where that sends to.
    #[inline(always)]
    pub const fn other_half(&self, client: (Ipv4, Be16), destination: (Ipv4, Be16)) -> ForwardKey {
        ForwardKey {
            client: client.0,
            destination: destination.0,
            client_port: client.1,
            destination_port: destination.1,
            protocol: self.protocol,
            pad: 0,
        }
    }

    /// A hash over the whole key; see [`Reverse::tag`].
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "IP protocol numbers have 8 bits")]
    pub const fn tag(&self) -> u32 {
        let ports = (self.pod_port, self.port);
        Flow::new(self.pod, self.address, ports, self.protocol as u8).hash() ^ self.overlay as u32
    }
}

impl ForwardKey {
    /// The reverse key of the same session, by its pod and what that takes for the client.
    #[inline(always)]
    pub const fn other_half(&self, pod: (Ipv4, Be16), address: (Ipv4, Be16), overlay: u16) -> ReverseKey {
        ReverseKey {
            pod: pod.0,
            address: address.0,
            pod_port: pod.1,
            port: address.1,
            protocol: self.protocol,
            overlay,
        }
    }

    /// The flow hash, which also spreads the flows over the tunnel's source ports; see [`Forward::tag`].
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "IP protocol numbers have 8 bits")]
    pub const fn tag(&self) -> u32 {
        let ports = (self.client_port, self.destination_port);
        Flow::new(self.client, self.destination, ports, self.protocol as u8).hash()
    }
}

impl Forward {
    /// The key of the session's reverse entry, for the entry under `key`.
    #[inline(always)]
    pub const fn reverse_key(&self, key: &ForwardKey) -> ReverseKey {
        let pod = (self.destination, self.destination_port);
        key.other_half(pod, (self.source, self.source_port), self.overlay)
    }
}

/// Value of the slot table: the session that holds the slot. As many sessions fit as there are slots; who opens one
/// takes the next slot that is free, expired or held by a session that is not established (a clock, never an LRU).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Slot {
    /// The session's reverse key. The slot is its only while [`Reverse::slot`] says so too.
    pub session: ReverseKey,
}

/// How far a session is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Phase {
    /// Being opened or reopened; nobody else may touch it.
    Claimed,
    /// Not confirmed: half-open TCP, UDP or echo that was not answered and taken up again. Evicted when room is needed.
    Opening,
    /// Established: never evicted.
    Live,
    /// Being removed, by whoever set this.
    Dead,
}

/// The state word of a session: phase and flags in the low half; in the high half the acknowledgement number that
/// confirms a TCP handshake, before the pod's first segment and for other protocols the tag of the client's flow, and of a
/// dead session the time when it died.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct State {
    /// The word, for compare-and-swap.
    pub word: u64,
}

impl State {
    /// The pod answered; `acknowledgement` is valid.
    pub const REPLIED: u32 = 1 << 8;
    /// The client has sent its FIN.
    pub const FIN_CLIENT: u32 = 1 << 9;
    /// The pod has sent its FIN.
    pub const FIN_POD: u32 = 1 << 10;
    /// The client has sent RST, and nothing else since.
    pub const RESET_CLIENT: u32 = 1 << 11;
    /// The pod has sent RST, and nothing else since.
    pub const RESET_POD: u32 = 1 << 12;

    const PHASE_MASK: u32 = 0xff;

    /// A state without flags.
    #[inline(always)]
    pub const fn new(phase: Phase) -> Self {
        Self { word: Self::code(phase) as u64 }
    }

    /// A state without flags, which is this flow's alone until the pod's first segment. A port that was given up may be
    /// another flow's at once, in the same entry of the table: who judged the session before must not take it for that.
    #[inline(always)]
    pub const fn of_flow(phase: Phase, tag: u32) -> Self {
        Self::new(phase).expecting(tag)
    }

    #[inline(always)]
    const fn code(phase: Phase) -> u32 {
        match phase {
            Phase::Claimed => 1,
            Phase::Opening => 2,
            Phase::Live => 3,
            Phase::Dead => 4,
        }
    }

    /// How far the session is; what no program wrote counts as dead.
    #[inline(always)]
    pub const fn phase(self) -> Phase {
        match self.bits() & Self::PHASE_MASK {
            1 => Phase::Claimed,
            2 => Phase::Opening,
            3 => Phase::Live,
            _ => Phase::Dead,
        }
    }

    /// The same with another phase.
    #[inline(always)]
    pub const fn in_phase(self, phase: Phase) -> Self {
        Self { word: self.word & !(Self::PHASE_MASK as u64) | Self::code(phase) as u64 }
    }

    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "the low half")]
    const fn bits(self) -> u32 {
        self.word as u32
    }

    /// Whether any of these flags is set.
    #[inline(always)]
    pub const fn any(self, flags: u32) -> bool {
        self.bits() & flags != 0
    }

    /// Whether all of these flags are set.
    #[inline(always)]
    pub const fn all(self, flags: u32) -> bool {
        self.bits() & flags == flags
    }

    /// The same with these flags.
    #[inline(always)]
    pub const fn with(self, flags: u32) -> Self {
        Self { word: self.word | flags as u64 }
    }

    /// The same without these flags.
    #[inline(always)]
    pub const fn without(self, flags: u32) -> Self {
        Self { word: self.word & !(flags as u64) }
    }

    /// The acknowledgement number that confirms the handshake.
    #[inline(always)]
    pub const fn acknowledgement(self) -> u32 {
        (self.word >> 32) as u32
    }

    /// The same with another acknowledgement number.
    #[inline(always)]
    pub const fn expecting(self, acknowledgement: u32) -> Self {
        Self { word: (acknowledgement as u64) << 32 | self.bits() as u64 }
    }
}

/// How long a session of each kind may be idle.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Timeouts {
    /// TCP before the handshake is complete.
    pub tcp_opening: Ticks,
    /// TCP established or half closed.
    pub tcp_established: Ticks,
    /// TCP closed by both sides.
    pub tcp_closing: Ticks,
    /// TCP after RST.
    pub tcp_reset: Ticks,
    /// UDP before the client went on after an answer.
    pub udp_opening: Ticks,
    /// UDP in both directions.
    pub udp: Ticks,
    /// ICMP echo.
    pub icmp: Ticks,
}

impl Timeouts {
    /// Defaults: established and closing TCP by RFC 5382 REQ-5 (2 h 4 min, 4 min), UDP by RFC 4787 REQ-5 (5 min), echo
    /// by RFC 5508 REQ-1 (60 s). TCP that is opening: Linux' SYN_RECV (60 s); after RST: Linux' CLOSE (10 s); UDP
    /// one-way: Linux' 30 s (net/netfilter/nf_conntrack_proto_{tcp,udp}.c). Those three are shorter than the RFCs'
    /// transitory timeout because anybody can open such sessions with forged sources.
    pub const DEFAULT: Self = Self {
        tcp_opening: ticks(60),
        tcp_established: ticks(7440),
        tcp_closing: ticks(240),
        tcp_reset: ticks(10),
        udp_opening: ticks(30),
        udp: ticks(300),
        icmp: ticks(60),
    };

    /// How long a session in this state may be idle.
    #[inline(always)]
    pub const fn of(&self, protocol: u16, state: State) -> Ticks {
        const TCP: u16 = 6;
        const UDP: u16 = 17;
        /// Being claimed or removed takes microseconds; after this long, whoever did it is gone.
        const STUCK: Ticks = ticks(5);
        let opening = match state.phase() {
            Phase::Claimed | Phase::Dead => return STUCK,
            Phase::Opening => true,
            Phase::Live => false,
        };
        match protocol {
            TCP if state.any(State::RESET_CLIENT | State::RESET_POD) => self.tcp_reset,
            TCP if opening => self.tcp_opening,
            TCP if state.all(State::FIN_CLIENT | State::FIN_POD) => self.tcp_closing,
            TCP => self.tcp_established,
            UDP if opening => self.udp_opening,
            UDP => self.udp,
            _ => self.icmp,
        }
    }
}

/// What happens to sessions, counted for each CPU.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SessionEvent {
    /// Opened.
    Opened = 0,
    /// Established.
    Confirmed = 1,
    /// Not established and removed because its slot or port was needed.
    Evicted = 2,
    /// Expired and removed by the program because its slot or port was needed.
    Reclaimed = 3,
    /// Expired and removed by the daemon.
    Expired = 4,
    /// Removed by order: flushed, or its pod is gone.
    Flushed = 5,
}

impl SessionEvent {
    /// Every event, by number, with its `snake_case` name.
    pub const ALL: [(Self, &'static str); 6] = [
        (Self::Opened, "opened"),
        (Self::Confirmed, "confirmed"),
        (Self::Evicted, "evicted"),
        (Self::Reclaimed, "reclaimed"),
        (Self::Expired, "expired"),
        (Self::Flushed, "flushed"),
    ];
}

/// How many sessions one run of the sweep takes.
pub const SWEEP_CAPACITY: usize = 64;

/// The input of the sweep program, in place of a frame: sessions to remove. What was removed is marked in the output by
/// [`ReverseKey::protocol`] 0.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Sweep {
    /// Which of them to remove.
    pub mode: SweepMode,
    /// Always 0.
    pub pad: [u8; 12],
    /// Their reverse keys; the rest all zero.
    pub sessions: [ReverseKey; SWEEP_CAPACITY],
}

/// Which of the sessions of a [`Sweep`] are removed.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct SweepMode {
    /// [`Self::EXPIRED`] or [`Self::ALL`].
    pub code: u32,
}

impl SweepMode {
    /// Those that are expired by now.
    pub const EXPIRED: Self = Self { code: 0 };
    /// All of them, unless another removes them already.
    pub const ALL: Self = Self { code: 1 };
}

const _: () = {
    assert!(size_of::<ForwardKey>() == 16 && size_of::<ReverseKey>() == 16 && size_of::<Slot>() == 16);
    assert!(size_of::<Forward>() == 64 && size_of::<Reverse>() == 64);
    assert!(SWEEP_CAPACITY.is_power_of_two());
    assert!(align_of::<Forward>() == 8 && align_of::<Reverse>() == 8);
    assert!(size_of::<LastHop>() == 8 && align_of::<LastHop>() == 8);
};
