//! Memory that all projects share, so that none of them can take all of it.
//!
//! A project may hold as much as is left: alone it gets half of the room, with n others that want all they can get 1/(n + 2) of it,
//! and so much is always left for whoever comes next (the dynamic thresholds of shared-memory switches, Choudhury and Hahne,
//! 1998). Nobody has a share that lies idle, and nobody has to be asked how many projects there are.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use ensign_proto::ProjectId;
use tokio::sync::Notify;

/// The room.
#[derive(Clone)]
pub(crate) struct FairRoom(Arc<Inner>);

struct Inner {
    total: u64,
    state: Mutex<State>,
    freed: Notify,
}

#[derive(Default)]
struct State {
    used: u64,
    projects: HashMap<ProjectId, Tenant>,
}

#[derive(Default)]
struct Tenant {
    used: u64,
    /// Those who hold something or wait: the tenant is remembered for as long as there are any.
    guests: usize,
    /// Its requests are granted in order; only the first of them watches what is freed.
    turn: Arc<tokio::sync::Mutex<()>>,
}

impl fmt::Debug for FairRoom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FairRoom").field("total", &self.0.total).finish_non_exhaustive()
    }
}

impl State {
    /// Takes if the project may, and if there is so much.
    fn take(&mut self, total: u64, project: ProjectId, amount: u64) -> Option<()> {
        let left = (total - self.used).checked_sub(amount)?;
        let tenant = self.projects.get_mut(&project)?;
        // Whoever has nothing gets what there is: what is asked for at once may be larger than a share.
        if tenant.used > 0 && tenant.used + amount > left {
            return None;
        }
        tenant.used += amount;
        self.used += amount;
        Some(())
    }
}

/// A part of the room, given back when dropped; before it is granted, a place in the queue.
pub(crate) struct Share {
    room: FairRoom,
    project: ProjectId,
    amount: u64,
}

impl fmt::Debug for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Share").field("amount", &self.amount).finish_non_exhaustive()
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        {
            let mut state = self.room.state();
            state.used -= self.amount;
            let tenant = state.projects.get_mut(&self.project);
            let tenant = tenant.expect("a tenant is remembered for as long as it has guests");
            tenant.used -= self.amount;
            tenant.guests -= 1;
            if tenant.guests == 0 {
                state.projects.remove(&self.project);
            }
        }
        self.room.0.freed.notify_waiters();
    }
}

impl FairRoom {
    pub(crate) fn new(total: u64) -> Self {
        Self(Arc::new(Inner { total, state: Mutex::default(), freed: Notify::new() }))
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        // Every change is whole before anything could panic.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the project may hold `amount` more. More than the whole room counts as the whole room. Cancel safe.
    pub(crate) async fn acquire(&self, project: ProjectId, amount: u64) -> Share {
        let amount = amount.min(self.0.total);
        let (mut share, turn) = {
            let mut state = self.state();
            let tenant = state.projects.entry(project).or_default();
            tenant.guests += 1;
            (Share { room: self.clone(), project, amount: 0 }, Arc::clone(&tenant.turn))
        };
        let _turn = turn.lock().await;
        loop {
            let mut freed = std::pin::pin!(self.0.freed.notified());
            // Before looking: what is freed in between must not be missed.
            freed.as_mut().enable();
            if self.state().take(self.0.total, project, amount).is_some() {
                share.amount = amount;
                return share;
            }
            freed.await;
        }
    }

    /// How much nobody holds.
    #[cfg(test)]
    pub(crate) fn left(&self) -> u64 {
        self.0.total - self.state().used
    }

    /// How many hold something or wait.
    #[cfg(test)]
    pub(crate) fn guests(&self) -> usize {
        self.state().projects.values().map(|tenant| tenant.guests).sum()
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    fn project(n: u8) -> ProjectId {
        ProjectId::from_bytes([n; 16])
    }

    /// Takes one by one until it would have to wait.
    fn fill(room: &FairRoom, n: u8) -> Vec<Share> {
        std::iter::from_fn(|| room.acquire(project(n), 1).now_or_never()).collect()
    }

    #[test]
    fn a_flood_leaves_room_for_whoever_comes_next() {
        let room = FairRoom::new(256);
        let first = fill(&room, 1);
        assert_eq!((first.len(), room.left()), (128, 128), "alone: half of it");
        let second = fill(&room, 2);
        assert_eq!(second.len(), 64);
        let third = fill(&room, 3);
        assert_eq!((third.len(), room.left()), (32, 32));
        // Somebody with one large thing, and nothing else.
        assert!(room.acquire(project(4), 32).now_or_never().is_some());
        drop((first, second, third));
        assert_eq!((room.left(), room.guests()), (256, 0), "all is given back, and nobody is remembered");
    }

    #[test]
    fn floods_settle_at_equal_shares() {
        let room = FairRoom::new(300);
        let (mut first, mut second) = (fill(&room, 1), Vec::new());
        for _ in 0..1_000 {
            // Whatever is given back, both want again.
            first.pop();
            second.extend(room.acquire(project(2), 1).now_or_never());
            first.extend(room.acquire(project(1), 1).now_or_never());
        }
        assert!(first.len().abs_diff(100) <= 1 && second.len().abs_diff(100) <= 1, "{} {}", first.len(), second.len());
    }

    #[tokio::test]
    async fn what_is_freed_goes_to_those_who_wait_in_order_and_one_who_gives_up_is_passed_over() {
        let room = FairRoom::new(8);
        let held = [room.acquire(project(1), 2).await, room.acquire(project(1), 2).await];
        let mut waiting: Vec<_> = (0..3).map(|_| Box::pin(room.acquire(project(1), 2))).collect();
        for waiting in &mut waiting {
            assert!(waiting.now_or_never().is_none());
        }
        drop(waiting.remove(0));
        drop(held);
        let granted = waiting.remove(0).await;
        let next = waiting.remove(0).await;
        assert_eq!((room.left(), room.guests()), (4, 2));
        drop((granted, next));
        // Larger than the room: all of it.
        drop(room.acquire(project(2), 1 << 40).await);
        assert_eq!((room.left(), room.guests()), (8, 0));
    }
}
