//! What is done to a ring beside making, rotating and revoking it: disabling, enabling, settings, revocations to come.
//!
//! ```text
//! version:  active ── rotate ──> retired         each of the two: disable ──> disabling ── no holder is left ──> disabled ── enable ──> back
//!              └──────────────────┴── revoke, whether disabled or not ──> revoking ── no holder is left ──> revoked, for ever
//! ```
//!
//! A switch is beside the state of a version and not one of its states: who enables gets back what was disabled. A ring has a switch of
//! its own, so that enabling it leaves alone what was disabled in it one by one.

use ensign_proto::pb::vault::v1 as pb;
use ensign_proto::{KeyVersion, LogIndex, RingId};
use ensign_storage::EntryId;

use super::command::{self, Command};
use super::receipts::DisableOrder;
use super::state::{Done, Outcome, Ring, State, Version, What, refuse};
use crate::link::{Reason, Refusal};
use crate::wire;

/// How long a version is active before its successor is made, unless the ring says otherwise: 90 days.
pub(crate) const ROTATION_DEFAULT_MS: u64 = 90 * DAY_MS;
/// One day, so that a ring's versions last for years; two years, as SP 800-57 part 1 (§5.3.6) has it for keys that wrap.
const ROTATION_MS: std::ops::RangeInclusive<u64> = DAY_MS..=730 * DAY_MS;
/// How long a revocation may cool off: a minute to a year.
const AFTER_MS: std::ops::RangeInclusive<u64> = 60_000..=365 * DAY_MS;
const DAY_MS: u64 = 24 * 60 * 60 * 1_000;
/// One step of waiting counts no more than this: what a leader slept through does not count.
pub(crate) const ELAPSE_MAX_MS: u64 = 2 * 60_000;
/// Rings of one project beside the one that it began with.
pub(super) const NAMED_MAX: usize = 1_000;
/// The longest name, in bytes.
const NAME_MAX: usize = 64;

/// Whether a ring or a version may be used as its state allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Switch {
    #[default]
    On,
    /// Ordered at this index: nothing is granted any more, but holders may be left.
    Disabling(LogIndex),
    /// Ordered at this index, and no holder is left.
    Off(LogIndex),
}

impl Switch {
    pub(crate) fn is_on(self) -> bool {
        self == Self::On
    }

    /// The order that it follows.
    pub(crate) fn ordered(self) -> Option<LogIndex> {
        match self {
            Self::On => None,
            Self::Disabling(index) | Self::Off(index) => Some(index),
        }
    }
}

/// A revocation to come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Scheduled {
    /// Where it was ordered.
    pub(crate) index: LogIndex,
    /// 0: all.
    pub(crate) version: KeyVersion,
    pub(crate) ordered_ms: u64,
    pub(crate) actor: String,
    pub(crate) after_ms: u64,
    /// How long leaders have been there since.
    pub(crate) waited_ms: u64,
}

impl Scheduled {
    pub(crate) fn is_due(&self) -> bool {
        self.waited_ms >= self.after_ms
    }

    pub(super) fn to_wire(&self) -> pb::Scheduled {
        pb::Scheduled {
            version: self.version.0,
            ordered_ms: self.ordered_ms,
            actor: self.actor.clone(),
            after_ms: self.after_ms,
            waited_ms: self.waited_ms,
            index: self.index.0,
        }
    }
}

/// The command that takes something back into use.
pub(crate) fn enable_with(ring: RingId, version: KeyVersion) -> String {
    match version {
        KeyVersion(0) => format!("`ensign key enable --ring {ring} --all`"),
        version => format!("`ensign key enable --ring {ring} --version {version}`"),
    }
}

/// The command that makes a new version.
fn rotate_with(ring: RingId) -> String {
    format!("`ensign key rotate --ring {ring}`")
}

/// A name for people: what a shell takes without quotes, and what is no id.
pub(super) fn check_name(name: &str) -> Result<(), Refusal> {
    let fits = (1..=NAME_MAX).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'))
        && name.starts_with(|first: char| first.is_ascii_alphanumeric())
        && name.parse::<RingId>().is_err();
    if fits {
        return Ok(());
    }
    let message = format!(
        "the name of a key ring has 1 to {NAME_MAX} letters, digits, '-', '_' and '.', begins with a letter or a digit, and does not \
         look like an id"
    );
    refuse(Reason::Invalid, message)
}

impl State {
    /// Step 1 of a disable: from here on nothing is granted under it. Enabling it takes the order back.
    pub(super) fn disable(&mut self, at: EntryId, command: &Command, change: &command::Target) -> Outcome {
        let (id, ring) = self.ring_mut(&change.ring)?;
        let switch = ring.living_switch_mut(id, KeyVersion(change.version))?;
        if let Some(ordered) = switch.ordered() {
            return Ok(Done::Disabling(ordered));
        }
        *switch = Switch::Disabling(at.index);
        let (version, actor) = (KeyVersion(change.version), command.actor.clone());
        ring.disablers.push(DisableOrder { id: at, version, ms: command.ms, actor });
        ring.touch(version, command.ms);
        self.event(at, What::Switched(id));
        self.record(at, command, "disabling", id.as_bytes(), change.version);
        Ok(Done::Disabling(at.index))
    }

    /// The last step: no holder is left.
    pub(super) fn settle_disable(
        &mut self,
        at: EntryId,
        command: &Command,
        change: &command::SettleDisable,
    ) -> Outcome {
        let (id, ring) = self.ring_mut(&change.ring)?;
        let order = LogIndex(change.disabling);
        // One order names one of them.
        let settled = if ring.switch.ordered() == Some(order) {
            Some((KeyVersion(0), &mut ring.switch))
        } else {
            let mut versions = ring.versions.iter_mut();
            versions.find(|(_, it)| it.switch.ordered() == Some(order)).map(|(which, it)| (*which, &mut it.switch))
        };
        let Some((version, switch)) = settled else {
            return refuse(Reason::Conflict, format!("what was disabled of key ring {id} was enabled again meanwhile"));
        };
        let first = !matches!(switch, Switch::Off(_));
        *switch = Switch::Off(order);
        let answer = ring.to_wire_at(id, order);
        let ordered = ring.disablers.iter().position(|it| it.id.index == order);
        let ordered = ordered.map(|place| ring.disablers.remove(place));
        if first {
            // As with a destruction: a vault that is set back to before it is not believed.
            self.epoch += 1;
            let prev = self.audit_head;
            self.record(at, command, "disabled", id.as_bytes(), version.0);
            if let Some(ordered) = ordered {
                self.attest_disabled(at, command, id, &ordered, change, prev);
            }
        }
        Ok(Done::Ring(answer))
    }

    pub(super) fn enable(&mut self, at: EntryId, command: &Command, change: &command::Target) -> Outcome {
        let (id, ring) = self.ring_mut(&change.ring)?;
        let switch = ring.living_switch_mut(id, KeyVersion(change.version))?;
        if switch.is_on() {
            return Ok(Done::Ring(ring.to_wire_at(id, at.index)));
        }
        let taken_back = switch.ordered();
        *switch = Switch::On;
        ring.disablers.retain(|it| Some(it.id.index) != taken_back);
        ring.touch(KeyVersion(change.version), command.ms);
        let answer = ring.to_wire_at(id, at.index);
        self.event(at, What::Switched(id));
        self.record(at, command, "enable", id.as_bytes(), change.version);
        Ok(Done::Ring(answer))
    }

    pub(super) fn set_ring(&mut self, at: EntryId, command: &Command, change: &command::SetRing) -> Outcome {
        let alg = if change.alg == 0 { None } else { Some(wire::algorithm_from(change.alg)?) };
        let rotation = (change.rotation_ms != 0).then_some(change.rotation_ms);
        if rotation.is_some_and(|rotation| !ROTATION_MS.contains(&rotation)) {
            return refuse(
                Reason::Invalid,
                "a key ring rotates at least every two years (730 days), and at most once a day",
            );
        }
        let (id, ring) = self.ring_mut(&change.ring)?;
        if ring.closed {
            return Err(closed(id));
        }
        let before = (ring.rotation_ms, ring.alg);
        ring.rotation_ms = rotation.unwrap_or(ring.rotation_ms);
        ring.alg = alg.unwrap_or(ring.alg);
        let (changed, answer) = (before != (ring.rotation_ms, ring.alg), ring.to_wire_at(id, at.index));
        if changed {
            let days = u32::try_from(change.rotation_ms / DAY_MS).unwrap_or(u32::MAX);
            self.record(at, command, "set ring", id.as_bytes(), days << 8 | change.alg);
        }
        Ok(Done::Ring(answer))
    }

    pub(super) fn schedule_revoke(
        &mut self,
        at: EntryId,
        command: &Command,
        change: &command::ScheduleRevoke,
    ) -> Outcome {
        if !AFTER_MS.contains(&change.after_ms) {
            return refuse(
                Reason::Invalid,
                "a scheduled revocation cools off for a minute at least, and a year at most",
            );
        }
        let (id, ring) = self.ring_mut(&change.ring)?;
        let version = KeyVersion(change.version);
        ring.living_switch_mut(id, version)?;
        if let Some(known) = ring.scheduled.iter().find(|known| known.version == version) {
            // A repetition is not another order, and does not begin to wait anew.
            return if known.after_ms == change.after_ms && known.actor == command.actor {
                Ok(Done::Ring(ring.to_wire_at(id, known.index)))
            } else {
                let what = named(id, version);
                refuse(Reason::Conflict, format!("{what} is scheduled to be revoked already: cancel that first"))
            };
        }
        ring.scheduled.push(Scheduled {
            index: at.index,
            version,
            ordered_ms: command.ms,
            actor: command.actor.clone(),
            after_ms: change.after_ms,
            waited_ms: 0,
        });
        let answer = ring.to_wire_at(id, at.index);
        self.record(at, command, "schedule revoke", id.as_bytes(), change.version);
        Ok(Done::Ring(answer))
    }

    pub(super) fn cancel_revoke(&mut self, at: EntryId, command: &Command, change: &command::Target) -> Outcome {
        let (id, ring) = self.ring_mut(&change.ring)?;
        let version = KeyVersion(change.version);
        let Some(place) = ring.scheduled.iter().position(|known| known.version == version) else {
            // Destroyed already is a worse piece of news than never ordered.
            ring.living_switch_mut(id, version)?;
            return refuse(Reason::NotFound, format!("{} is not scheduled to be revoked", named(id, version)));
        };
        ring.scheduled.remove(place);
        let answer = ring.to_wire_at(id, at.index);
        self.record(at, command, "cancel revoke", id.as_bytes(), change.version);
        Ok(Done::Ring(answer))
    }

    /// Everything that is scheduled has waited for so long more.
    pub(super) fn elapse(&mut self, change: &command::Elapse) -> Done {
        let more = change.ms.min(ELAPSE_MAX_MS);
        for scheduled in self.rings.values_mut().flat_map(|ring| &mut ring.scheduled) {
            scheduled.waited_ms = scheduled.waited_ms.saturating_add(more);
        }
        Done::Elapsed
    }

    /// What was scheduled is ordered now, in the name of who scheduled it: unless it was cancelled, or is not due.
    pub(super) fn revoke_due(&mut self, at: EntryId, command: &Command, change: &command::RevokeDue) -> Outcome {
        let (id, ring) = self.ring_mut(&change.ring)?;
        let due = ring.scheduled.iter().find(|known| known.index.0 == change.scheduled && known.is_due());
        let Some(due) = due.cloned() else {
            return refuse(Reason::Conflict, format!("no such revocation of key ring {id} is due"));
        };
        let command = Command { actor: due.actor, ..command.clone() };
        self.revoke(at, &command, &command::Revoke { ring: change.ring.clone(), version: due.version.0 })
    }
}

fn named(ring: RingId, version: KeyVersion) -> String {
    match version {
        KeyVersion(0) => format!("key ring {ring}"),
        version => format!("version {version} of key ring {ring}"),
    }
}

pub(super) fn closed(id: RingId) -> Refusal {
    let message = format!("key ring {id} was revoked: it is destroyed, for ever");
    Refusal::new(Reason::Revoked, message).of_version(id, KeyVersion(0))
}

pub(super) fn disabled(id: RingId) -> Refusal {
    let message = format!("key ring {id} is disabled until {}", enable_with(id, KeyVersion(0)));
    Refusal::new(Reason::Disabled, message).of_version(id, KeyVersion(0))
}

impl Version {
    /// What others see of its state.
    pub(super) fn shown(&self) -> pb::VersionState {
        use super::state::VersionState;
        match (self.state, self.switch) {
            (VersionState::Revoking, _) => pb::VersionState::Revoking,
            (VersionState::Revoked, _) => pb::VersionState::Revoked,
            (_, Switch::Disabling(_)) => pb::VersionState::Disabling,
            (_, Switch::Off(_)) => pb::VersionState::Disabled,
            (VersionState::Active, Switch::On) => pb::VersionState::Active,
            (VersionState::Retired, Switch::On) => pb::VersionState::Retired,
        }
    }
}

impl Ring {
    /// The switch of a version, or with 0 of the ring; what is revoked has none.
    fn living_switch_mut(&mut self, id: RingId, which: KeyVersion) -> Result<&mut Switch, Refusal> {
        if self.closed {
            return Err(closed(id));
        }
        if which == KeyVersion(0) {
            return Ok(&mut self.switch);
        }
        let Some(version) = self.versions.get_mut(&which) else {
            return refuse(Reason::NotFound, format!("key ring {id} has no version {which}"));
        };
        if !version.is_living() {
            let message = format!("version {which} of key ring {id} was revoked: it is destroyed, for ever");
            return Err(Refusal::new(Reason::Revoked, message).of_version(id, which));
        }
        Ok(&mut version.switch)
    }

    /// The switch of a version, or with 0 of the ring.
    pub(crate) fn switch_of(&self, which: KeyVersion) -> Option<Switch> {
        if which == KeyVersion(0) { Some(self.switch) } else { Some(self.versions.get(&which)?.switch) }
    }

    /// The version that new data keys are wrapped under; or why there is none, and what would change that.
    pub(crate) fn sealable(&self, id: RingId) -> Result<KeyVersion, Refusal> {
        if let Some(active) = self.active() {
            return Ok(active);
        }
        if self.closed {
            let message = format!("key ring {id} is revoked");
            return Err(Refusal::new(Reason::Revoked, message).of_version(id, KeyVersion(0)));
        }
        if !self.switch.is_on() {
            return Err(disabled(id));
        }
        let rotate = rotate_with(id);
        let message = match self.newest() {
            Some(version) => {
                let enable = enable_with(id, version);
                format!(
                    "key ring {id} has no active version, since version {version} is disabled: {enable} takes it back into use, \
                     {rotate} makes another"
                )
            }
            None => format!("key ring {id} has no active version: {rotate} makes one"),
        };
        Err(Refusal::new(Reason::NoActiveVersion, message).of_version(id, KeyVersion(0)))
    }

    /// The version, if data keys under it may be unwrapped.
    pub(crate) fn openable(&self, id: RingId, which: KeyVersion) -> Result<&Version, Refusal> {
        let Some(version) = self.versions.get(&which) else {
            return refuse(Reason::Damaged, format!("key ring {id} has no version {which}"));
        };
        if !version.is_living() {
            let message = format!("version {which} of key ring {id} was revoked");
            return Err(Refusal::new(Reason::Revoked, message).of_version(id, which));
        }
        if !self.switch.is_on() {
            return Err(disabled(id));
        }
        if !version.switch.is_on() {
            let message = format!("version {which} of key ring {id} is disabled until {}", enable_with(id, which));
            return Err(Refusal::new(Reason::Disabled, message).of_version(id, which));
        }
        Ok(version)
    }

    fn touch(&mut self, which: KeyVersion, ms: u64) {
        if let Some(version) = self.versions.get_mut(&which) {
            version.changed_ms = ms;
        }
    }

    /// How long a version of it is active before the next one is made.
    pub(crate) fn rotation_ms(&self) -> u64 {
        if self.rotation_ms == 0 { ROTATION_DEFAULT_MS } else { self.rotation_ms }
    }

    /// The version that is to be succeeded at `now_ms`. One that is out of use is not: whoever disabled it would be overruled.
    pub(crate) fn due_rotation(&self, now_ms: u64) -> Option<KeyVersion> {
        let active = self.active().filter(|_| !self.closed)?;
        let made = self.versions.get(&active)?.created_ms;
        (now_ms >= made.saturating_add(self.rotation_ms())).then_some(active)
    }

    /// The orders to disable something that have holders to wait for.
    pub(crate) fn disablings(&self) -> impl Iterator<Item = LogIndex> {
        let switches = std::iter::once(&self.switch).chain(self.versions.values().map(|version| &version.switch));
        switches.filter_map(|switch| match switch {
            Switch::Disabling(order) => Some(*order),
            Switch::On | Switch::Off(_) => None,
        })
    }

    /// All that holders must know about what is disabled.
    pub(crate) fn switched(&self, id: RingId, index: LogIndex) -> pb::Switched {
        let off = self.versions.iter().filter(|(_, version)| !version.switch.is_on() && version.is_living());
        pb::Switched {
            ring: wire::bytes(id.as_bytes()),
            all: !self.switch.is_on(),
            versions: off.map(|(version, _)| version.0).collect(),
            index: index.0,
        }
    }

    /// Whether anything of it is disabled.
    pub(crate) fn has_switched_off(&self) -> bool {
        !self.switch.is_on() || self.versions.values().any(|version| !version.switch.is_on() && version.is_living())
    }

    pub(crate) fn to_wire_at(&self, id: RingId, index: LogIndex) -> pb::Ring {
        pb::Ring { index: index.0, ..self.to_wire(id) }
    }
}
