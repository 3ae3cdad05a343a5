//! The program and the host engine side by side: whatever happens to one happens to the other.
//!
//! They must agree in verdict, bytes and counters of every frame, and in all that the session tables hold. The engine is
//! no oracle here, it is the same code: what this finds are faults of the shell, of the compiler and of the kernel's
//! answers. The oracle is [`invariant`]: what holds for every frame.
//!
//! The program takes the time from the kernel, the model gets the kernel's time from here. It stands still for 16.8 ms; if
//! it moved while the program ran, the model must agree at one of the times between. Sessions age by their time stamps, which
//! are set back in both.

use std::{collections::BTreeMap, rc::Rc};

use gateway::dataplane::sessions::now;
use gateway_common::{
    abi::{
        Forward, ForwardKey, Outcome, OverlayAddress, Reverse, ReverseKey, Route, SessionEvent, Slot, Sweep,
        SweepMode, Ticks, Vtep, map,
    },
    engine::{
        Action, Verdict,
        session::{self, Shared},
    },
    model::{HostSessions, HostTables},
};

use crate::{
    invariant,
    subject::{Counters, Returned, Subject},
    world::World,
};

/// All that the session tables hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Content {
    pub(crate) forward: BTreeMap<ForwardKey, Forward>,
    pub(crate) reverse: BTreeMap<ReverseKey, Reverse>,
    slots: BTreeMap<u32, ReverseKey>,
    hand: u32,
    events: BTreeMap<SessionEvent, u64>,
}

impl Content {
    fn of_model(sessions: &HostSessions) -> Self {
        let used =
            |(&index, &key): (&u32, &ReverseKey)| (key != ReverseKey::default()).then_some((index, key));
        Self {
            forward: sessions.forward.borrow().iter().map(|(&key, entry)| (key, entry.get())).collect(),
            reverse: sessions.reverse.borrow().iter().map(|(&key, entry)| (key, entry.get())).collect(),
            slots: sessions.slots.borrow().iter().filter_map(used).collect(),
            hand: sessions.hand.get(),
            events: sessions.events.borrow().clone(),
        }
    }

    pub(crate) fn of_program(subject: &Subject) -> Self {
        let used = |(index, slot): (u32, Slot)| {
            (slot.session != ReverseKey::default()).then_some((index, slot.session))
        };
        let hand = subject.table::<u32, u64>(map::HAND).lookup(&0).unwrap().unwrap_or_default();
        Self {
            forward: subject.table(map::FORWARD).read().unwrap().into_iter().collect(),
            reverse: subject.table(map::REVERSE).read().unwrap().into_iter().collect(),
            slots: subject.table(map::SLOTS).read().unwrap().into_iter().filter_map(used).collect(),
            hand: u32::try_from(hand & u64::from(u32::MAX)).unwrap(),
            events: subject.events(),
        }
    }

    fn restore(&self, sessions: &HostSessions) {
        sessions.forward.replace(shared(&self.forward));
        sessions.reverse.replace(shared(&self.reverse));
        sessions.slots.replace(self.slots.clone());
        sessions.hand.set(self.hand);
        sessions.events.replace(self.events.clone());
    }

    /// Where this and `other` differ, for a person.
    fn difference(&self, other: &Self) -> Option<String> {
        fn table<K: Ord + std::fmt::Debug, V: PartialEq + std::fmt::Debug>(
            name: &str,
            program: &BTreeMap<K, V>,
            model: &BTreeMap<K, V>,
        ) -> Option<String> {
            let key = program.keys().chain(model.keys()).find(|key| program.get(key) != model.get(key))?;
            Some(format!("{name}, {key:?}: {:?} and {:?}", program.get(key), model.get(key)))
        }
        table(map::FORWARD, &self.forward, &other.forward)
            .or_else(|| table(map::REVERSE, &self.reverse, &other.reverse))
            .or_else(|| table(map::SLOTS, &self.slots, &other.slots))
            .or_else(|| table(map::EVENTS, &self.events, &other.events))
            .or_else(|| (self.hand != other.hand).then(|| format!("hand: {} and {}", self.hand, other.hand)))
            .map(|what| format!("program and model hold in {what}"))
    }
}

fn shared<K: Ord + Copy, V: Copy>(table: &BTreeMap<K, V>) -> BTreeMap<K, Rc<Shared<V>>> {
    table.iter().map(|(&key, &value)| (key, Rc::new(Shared::new(value)))).collect()
}

/// A frame on which they disagree, or that breaks an invariant.
pub(crate) struct Fault {
    pub(crate) what: String,
    input: Vec<u8>,
    program: Vec<u8>,
    engine: Vec<u8>,
}

impl Fault {
    /// Before, after the program, after the engine.
    pub(crate) fn frames(&self) -> [&[u8]; 3] {
        [&self.input, &self.program, &self.engine]
    }
}

/// Program and model with the same tables.
pub(crate) struct Mirror {
    pub(crate) subject: Subject,
    pub(crate) tables: HostTables,
    /// What was counted before the frame, by outcome.
    counted: BTreeMap<u32, (u64, u64)>,
}

impl Mirror {
    pub(crate) fn new(world: &World) -> Self {
        let tables = world.with(|_| {}).tables;
        Self { subject: Subject::load(&tables), tables, counted: BTreeMap::new() }
    }

    fn sessions(&self) -> &HostSessions {
        &self.tables.sessions
    }

    /// Runs both on a frame; the outcome if they agree.
    pub(crate) fn run(&mut self, frame: &[u8]) -> Result<Outcome, Fault> {
        // The limit of ICMP errors, which depends on the time, has a test of its own.
        self.subject.renew_allowance_if_needed();
        let before = now();
        let (returned, program) = self.subject.run(frame);
        let after = now();
        let agrees =
            |(verdict, engine): &(Verdict, Vec<u8>)| returned == returned_for(*verdict) && program == *engine;
        let (verdict, engine) = self.at_one_of(before, after, |tables| tables.run(frame), agrees);
        let outcome = verdict.info().expect("a verdict has an outcome").outcome;
        // Looked up under the outcome that the engine gives it; nothing may be counted elsewhere.
        let total = self.subject.counter(outcome.number());
        let counted = self.counted.entry(outcome.number()).or_default();
        let grown = (total.0 - counted.0, total.1 - counted.1);
        *counted = total;
        let broken = invariant::check(outcome, frame, &program).err();
        if agrees(&(verdict, engine.clone())) && grown == (1, frame.len() as u64) && broken.is_none() {
            return Ok(outcome);
        }
        let what = format!(
            "the engine says {verdict:?}, the program returned {returned:?} and counted {grown:?} there{}; the frame \
             before, after the program, after the engine",
            broken.map(|what| format!("; {what}")).unwrap_or_default()
        );
        Err(Fault { what, input: frame.to_vec(), program, engine })
    }

    /// Removes sessions as the daemon does.
    pub(crate) fn sweep(&mut self, keys: &[ReverseKey], mode: SweepMode) -> Result<(), String> {
        let mut input = Sweep { mode, ..bytemuck::zeroed() };
        input.sessions[..keys.len()].copy_from_slice(keys);
        let before = now();
        let program = self.subject.sweep(&input);
        let after = now();
        let model = |tables: &HostTables| {
            let mut output = input;
            for key in output.sessions.iter_mut().filter(|key| key.protocol != 0) {
                if session::sweep(tables, key, mode) {
                    key.protocol = 0;
                }
            }
            output
        };
        let engine = self.at_one_of(before, after, model, |output| *output == program);
        if engine == program { Ok(()) } else { Err(format!("{mode:?} of {keys:?} removes others")) }
    }

    /// What the model does at the time when the program ran, which was one of these.
    fn at_one_of<T>(
        &self,
        before: Ticks,
        after: Ticks,
        work: impl Fn(&HostTables) -> T,
        agrees: impl Fn(&T) -> bool,
    ) -> T {
        self.sessions().now.set(before);
        if before == after {
            return work(&self.tables);
        }
        let (content, counters) = (Content::of_model(self.sessions()), self.tables.counters.borrow().clone());
        let program = Content::of_program(&self.subject);
        for passed in 0..after.wrapping_sub(before) {
            self.sessions().now.set(before.wrapping_add(passed));
            let result = work(&self.tables);
            if agrees(&result) && Content::of_model(self.sessions()) == program {
                return result;
            }
            content.restore(self.sessions());
            self.tables.counters.replace(counters.clone());
        }
        self.sessions().now.set(after);
        work(&self.tables)
    }

    /// Compares counters and sessions.
    pub(crate) fn check_tables(&self) -> Result<Content, String> {
        let counters = self.tables.counters.borrow();
        let expected = counters.iter().map(|(&number, counter)| (number, (counter.packets, counter.bytes)));
        let (counted, expected) = (self.subject.counters(), Counters(expected.collect()));
        if counted != expected {
            return Err(format!("the program counted {counted:?}, the engine {expected:?}"));
        }
        let content = Content::of_program(&self.subject);
        match content.difference(&Content::of_model(self.sessions())) {
            None => Ok(content),
            Some(what) => Err(what),
        }
    }

    /// Sets both tables of sessions of both, after they were compared.
    pub(crate) fn change(&mut self, change: impl FnOnce(&mut Content)) -> Result<(), String> {
        let old = self.check_tables()?;
        let mut new = old.clone();
        change(&mut new);
        self.replace(&old.forward, &new.forward, map::FORWARD);
        self.replace(&old.reverse, &new.reverse, map::REVERSE);
        new.restore(self.sessions());
        Ok(())
    }

    fn replace<K: bytemuck::Pod + Ord, V: bytemuck::Pod + PartialEq>(
        &self,
        old: &BTreeMap<K, V>,
        new: &BTreeMap<K, V>,
        name: &str,
    ) {
        let table = self.subject.table::<K, V>(name);
        let gone: Vec<K> = old.keys().filter(|key| !new.contains_key(key)).copied().collect();
        table.delete(&gone).unwrap();
        let written: Vec<(K, V)> =
            new.iter().filter(|(key, value)| old.get(key) != Some(value)).map(|(&k, &v)| (k, v)).collect();
        // In place, one by one: a table that is full takes no batch.
        for (key, value) in written {
            if !table.replace(&key, &value).unwrap() {
                assert!(table.insert(&key, &value).unwrap());
            }
        }
    }

    /// The session that the engine would open for a frame.
    pub(crate) fn would_claim(&self, frame: &[u8]) -> Option<ReverseKey> {
        let (content, counters) = (Content::of_model(self.sessions()), self.tables.counters.borrow().clone());
        self.sessions().now.set(now());
        self.tables.run(frame);
        let opened =
            self.sessions().reverse.borrow().keys().find(|key| !content.reverse.contains_key(key)).copied();
        content.restore(self.sessions());
        self.tables.counters.replace(counters);
        opened
    }

    /// Forgets all sessions, and where the search for slots was.
    pub(crate) fn clear(&mut self) {
        let old = Content::of_program(&self.subject);
        self.subject.table::<ForwardKey, Forward>(map::FORWARD).delete(&keys(&old.forward)).unwrap();
        self.subject.table::<ReverseKey, Reverse>(map::REVERSE).delete(&keys(&old.reverse)).unwrap();
        let slots: Vec<(u32, Slot)> = old.slots.keys().map(|&index| (index, Slot::default())).collect();
        self.subject.table(map::SLOTS).update(&slots).unwrap();
        self.subject.table(map::HAND).update(&[(0_u32, 0_u64)]).unwrap();
        Content { events: old.events, ..Content::default() }.restore(self.sessions());
    }

    /// Says where a pod is, or that it is nowhere.
    pub(crate) fn set_pod(&mut self, key: OverlayAddress, route: Option<Route>) {
        let table = self.subject.table::<OverlayAddress, Route>(map::PODS);
        if let Some(route) = route {
            table.update(&[(key, route)]).unwrap();
            self.tables.pods.insert(key, route);
        } else {
            table.delete(&[key]).unwrap();
            self.tables.pods.remove(&key);
        }
    }

    /// Changes an entry of the VTEP table.
    pub(crate) fn change_vtep(&mut self, id: u32, change: impl FnOnce(&mut Vtep)) {
        let vtep = self.tables.vteps.get_mut(&id).expect("there is every entry");
        change(vtep);
        let vtep = *vtep;
        self.subject.set_vtep(id, vtep);
    }
}

fn keys<K: Copy, V>(table: &BTreeMap<K, V>) -> Vec<K> {
    table.keys().copied().collect()
}

/// The kernel's test run does not tell where a redirect leads; `live` looks at that.
fn returned_for(verdict: Verdict) -> Returned {
    match verdict.action() {
        Action::Pass => Returned::Pass,
        Action::Drop => Returned::Drop,
        Action::Transmit => Returned::Transmit,
        Action::Redirect(_) => Returned::Redirect,
    }
}
