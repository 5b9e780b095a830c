//! What the leader does by the clock: rotate rings whose active version is old enough, and revoke what has cooled off.
//!
//! A rotation compares the wall clock with when the active version was made, and names that version: however many leaders find it
//! due, one of them makes the next. A revocation destroys, so no wall clock is believed: it waits for time in which the vault had a
//! leader, counted on leaders' boot clocks in steps that are committed. Who cancels it has at least that long.

use std::time::Duration;

use ensign_proto::Term;
use ensign_proto::{KeyVersion, LogIndex, RingId};
use ensign_raft::Leadership;
use ensign_raft::env::BootTime;
use tokio::time::timeout;
use tracing::{debug, info, warn};

use super::Vault;
use super::rotate::TELL_WITHIN;
use crate::link::{Reason, Refusal};
use crate::machine::{Change, ELAPSE_MAX_MS, Elapse, RevokeDue, Scheduled};
use crate::metrics;
use crate::wire;

/// Rotations of one look: when many are due at once, publishers of all of them need not fetch keys in the same second.
const ROTATIONS_MAX: usize = 16;
/// Between two steps of waiting, while nothing is due sooner.
const STEP: Duration = Duration::from_mins(1);
const ACTOR: &str = "schedule";

/// What one leadership remembers.
#[derive(Debug, Default)]
pub(super) struct ScheduleCare {
    /// Up to when its time is committed.
    counted: Option<(Term, BootTime)>,
}

/// What the state asks of its leader.
#[derive(Debug, Default)]
struct Due {
    rotations: Vec<(RingId, KeyVersion)>,
    revocations: Vec<(RingId, LogIndex)>,
    /// How long the next scheduled revocation still waits.
    next: Option<Duration>,
    /// The age of the oldest version that seals.
    oldest: Duration,
}

impl Vault {
    /// One look. What fails is found due again at the next one.
    pub(super) async fn tend_schedules(&self, care: &mut ScheduleCare, leadership: Leadership) {
        if !leadership.ready {
            care.counted = None;
            metrics::vault_active_age(Duration::ZERO);
            return;
        }
        let now = self.0.clock.boot();
        let counted = match care.counted {
            Some((term, counted)) if term == leadership.term => counted,
            _ => now,
        };
        care.counted = Some((leadership.term, counted));
        let Ok(due) = self.due() else { return };
        metrics::vault_active_age(due.oldest);
        self.rotate_due(due.rotations).await;
        for (ring, scheduled) in due.revocations {
            let change = RevokeDue { ring: wire::bytes(ring.as_bytes()), scheduled: scheduled.0 };
            match self.propose_in(Some(leadership.term), ACTOR, Change::RevokeDue(change)).await {
                Ok(_) => {
                    info!(%ring, "a scheduled revocation has cooled off, and begins");
                    self.0.ordered.notify_one();
                }
                Err(refusal) if refusal.reason == Reason::Conflict => {
                    debug!(%ring, %refusal, "nothing is due after all");
                }
                Err(refusal) => warn!(%ring, %refusal, "a scheduled revocation has not begun yet"),
            }
        }
        let Some(next) = due.next else {
            // Nothing waits: the time until something does is nobody's.
            care.counted = Some((leadership.term, now));
            return;
        };
        let passed = now.0.saturating_sub(counted.0);
        if passed < next.min(STEP) {
            return;
        }
        // Not counted twice, whatever becomes of it: a wait may be longer than was asked for, and never shorter.
        care.counted = Some((leadership.term, now));
        let ms = u64::try_from(passed.as_millis()).unwrap_or(u64::MAX).min(ELAPSE_MAX_MS);
        if let Err(refusal) = self.propose_in(Some(leadership.term), ACTOR, Change::Elapse(Elapse { ms })).await {
            warn!(%refusal, "a step of waiting for a scheduled revocation is not committed");
        }
    }

    fn due(&self) -> Result<Due, Refusal> {
        let now_ms = self.0.clock.wall().as_millis();
        self.inspect(|state| {
            let mut due = Due::default();
            for (id, ring) in &state.rings {
                if let Some(active) = ring.due_rotation(now_ms).filter(|_| due.rotations.len() < ROTATIONS_MAX) {
                    due.rotations.push((*id, active));
                }
                let made = ring.active().and_then(|active| Some(ring.versions.get(&active)?.created_ms));
                let age = made.map_or(0, |made| now_ms.saturating_sub(made));
                due.oldest = due.oldest.max(Duration::from_millis(age));
                for scheduled in &ring.scheduled {
                    if scheduled.is_due() {
                        due.revocations.push((*id, scheduled.index));
                    } else {
                        let left = left_of(scheduled);
                        due.next = Some(due.next.map_or(left, |next| next.min(left)));
                    }
                }
            }
            Ok(due)
        })
    }

    async fn rotate_due(&self, due: Vec<(RingId, KeyVersion)>) {
        let mut rotated = 0_usize;
        for (ring, active) in due {
            match self.rotate_one(ACTOR, ring, active.0).await {
                Ok(_) => rotated += 1,
                Err(refusal) if refusal.reason == Reason::Conflict => {
                    debug!(%ring, %refusal, "another leader rotated it");
                }
                Err(refusal) => warn!(%ring, %refusal, "a key ring is due for rotation, and was not rotated"),
            }
        }
        if rotated == 0 {
            return;
        }
        info!(rings = rotated, "key rings were rotated by their schedule");
        let Ok(applied) = self.inspect(|state| Ok(state.applied)) else { return };
        if timeout(TELL_WITHIN, self.tell_holders(applied)).await.is_err() {
            debug!("some holders hear of a rotation with their next renewal only");
        }
    }
}

fn left_of(scheduled: &Scheduled) -> Duration {
    Duration::from_millis(scheduled.after_ms.saturating_sub(scheduled.waited_ms))
}
