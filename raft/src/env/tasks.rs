//! Tasks with a name, an owner and an end.

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::Mutex;
use std::time::Duration;

use futures::FutureExt as _;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{Instrument as _, error, error_span};

use super::Lane;

/// Asks a task to end. Clones ask the same.
pub type Stop = CancellationToken;

/// Spawns tasks, stops them, waits for them. A panic in one of them asks the whole node to stop.
///
/// Clones share one set; [`Tasks::child`] makes a set that ends with its parent but can be stopped alone.
#[derive(Clone, Debug)]
pub struct Tasks {
    tracker: TaskTracker,
    stop: Stop,
    panicked: Arc<Mutex<Option<String>>>,
    root: Stop,
    /// Threads for the control lane alone.
    control: Option<Handle>,
    /// Where this clone spawns, if not where it is called.
    on: Option<Handle>,
}

impl Default for Tasks {
    fn default() -> Self {
        Self::new()
    }
}

impl Tasks {
    /// An empty set.
    pub fn new() -> Self {
        let stop = Stop::new();
        Self {
            tracker: TaskTracker::new(),
            stop: stop.clone(),
            panicked: Arc::default(),
            root: stop,
            control: None,
            on: None,
        }
    }

    /// With a runtime of its own for what serves the control lane; see [`Tasks::for_lane`]. Children made from here on have it too.
    #[must_use]
    pub fn with_control(self, runtime: Handle) -> Self {
        Self { control: Some(runtime), ..self }
    }

    /// The runtime of the control lane, if it has one of its own.
    pub fn control(&self) -> Option<&Handle> {
        self.control.as_ref()
    }

    /// The same set, for tasks that serve `lane`. A node with all cores taken has thousands of tasks in line; those of the
    /// control lane do not stand in that line, so that the node's peers do not take it for dead.
    #[must_use]
    pub fn for_lane(&self, lane: Lane) -> Self {
        let on = match lane {
            Lane::Bulk => None,
            Lane::Control => self.control.clone(),
        };
        Self { on, ..self.clone() }
    }

    /// A set that stops when this one does.
    pub fn child(&self) -> Self {
        Self {
            tracker: TaskTracker::new(),
            stop: self.stop.child_token(),
            panicked: Arc::clone(&self.panicked),
            root: self.root.clone(),
            control: self.control.clone(),
            on: self.on.clone(),
        }
    }

    /// Runs `task` until it ends; it should end soon after its [`Stop`] is cancelled.
    pub fn spawn<F, T>(&self, name: &'static str, task: F)
    where
        F: FnOnce(Stop) -> T,
        T: Future<Output = ()> + Send + 'static,
    {
        let future = task(self.stop.clone()).instrument(error_span!("task", name));
        let (panicked, root) = (Arc::clone(&self.panicked), self.root.clone());
        let guarded = async move {
            if let Err(panic) = AssertUnwindSafe(future).catch_unwind().await {
                let message = panic_message(&*panic);
                error!(task = name, message, "a task panicked; the node stops");
                let mut first = panicked.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                first.get_or_insert_with(|| format!("task {name}: {message}"));
                root.cancel();
            }
        };
        #[allow(clippy::disallowed_methods, reason = "this is the one place that spawns")]
        match &self.on {
            Some(runtime) => self.tracker.spawn_on(guarded, runtime),
            None => self.tracker.spawn(guarded),
        };
    }

    /// The token that this set's tasks watch.
    pub fn stop_token(&self) -> &Stop {
        &self.stop
    }

    /// The first panic of any task, with the task's name.
    pub fn panicked(&self) -> Option<String> {
        self.panicked.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    /// Asks every task to end and waits for them; `false` when some still ran after `deadline`.
    pub async fn shut_down(&self, deadline: Duration) -> bool {
        self.stop.cancel();
        self.tracker.close();
        tokio::time::timeout(deadline, self.tracker.wait()).await.is_ok()
    }
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> &str {
    panic
        .downcast_ref::<&'static str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}

#[cfg(test)]
mod tests {
    use tokio::runtime::Builder;
    use tokio::sync::oneshot;

    use super::*;

    async fn thread_of(tasks: &Tasks) -> Option<String> {
        let (tell, told) = oneshot::channel();
        tasks.spawn("says where it runs", |_stop| async move {
            let _ = tell.send(std::thread::current().name().map(str::to_owned));
        });
        told.await.expect("the task runs")
    }

    #[tokio::test]
    async fn what_serves_the_control_lane_runs_apart_and_ends_with_the_rest() {
        let control = Builder::new_multi_thread().worker_threads(1).thread_name("apart").build().expect("a runtime");
        let tasks = Tasks::new().with_control(control.handle().clone());
        let apart = Some("apart".to_owned());
        assert_eq!(thread_of(&tasks.for_lane(Lane::Control)).await, apart);
        assert_eq!(thread_of(&tasks.child().for_lane(Lane::Control)).await, apart);
        for here in [tasks.clone(), tasks.for_lane(Lane::Bulk), tasks.for_lane(Lane::Control).for_lane(Lane::Bulk)] {
            assert_ne!(thread_of(&here).await, apart);
        }
        assert_ne!(thread_of(&Tasks::new().for_lane(Lane::Control)).await, apart, "without one, all run together");
        tasks.for_lane(Lane::Control).spawn("waits", tokio_util::sync::CancellationToken::cancelled_owned);
        assert!(tasks.shut_down(Duration::from_secs(5)).await, "it was waited for");
        control.shutdown_background();
    }
}
