//! Looking again: `--watch`, which never ends by itself, and `--wait`, which ends when something is over.

use std::time::Duration;

use thiserror::Error;
use tokio::time::{Instant, sleep, timeout_at};

use super::args::Output;
use super::exit::{Exit, exit_code};
use super::output::{line, note};
use super::until_interrupted;

/// Between two looks of `--wait`.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How often `--wait` says how it stands although nothing has changed.
const SAY_EVERY: Duration = Duration::from_secs(30);

/// The time that `--timeout` allows was not enough. What was begun goes on.
#[derive(Debug, Error)]
#[error("{what} is not over after {} (--timeout), and goes on by itself: {last}", humantime::format_duration(*.after))]
pub(super) struct TimeUp {
    what: String,
    after: Duration,
    /// How far it was.
    last: String,
}

/// What a look of `--wait` has seen.
pub(super) enum Progress<T> {
    /// It is over.
    Over(T),
    /// How far it is: lines for people.
    On(String),
}

/// Looks once, or again and again with this pause, until it is interrupted.
///
/// # Errors
/// Without a pause, what the look says. With one, a failure is told, and looked past: a cluster in trouble answers late or not at all, and
/// whoever watches it wants to see it come back.
pub(super) async fn watched(
    pause: Option<Duration>,
    output: Output,
    mut look: impl AsyncFnMut() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let Some(pause) = pause else { return look().await };
    until_interrupted(async {
        loop {
            match look().await {
                Ok(()) => {}
                Err(error) if passes(&error) => note(format_args!("ensign: {error:#}")),
                Err(error) => return Err(error),
            }
            sleep(pause).await;
            if output == Output::Human {
                line(format_args!("\n{}", "─".repeat(40)))?;
            }
        }
    })
    .await
}

/// Whether it may work later. What the command line or the credentials have wrong does not become right.
fn passes(error: &anyhow::Error) -> bool {
    matches!(exit_code(error), Exit::Unavailable | Exit::OutcomeUnknown | Exit::Failure)
        && !super::is_broken_pipe(error)
}

/// Looks until `what` is over, and says how far it is: whenever that changes, and every half minute.
///
/// # Errors
/// [`TimeUp`]; or what a look says, unless that may pass.
pub(super) async fn wait<T>(
    what: String,
    limit: Option<Duration>,
    look: impl AsyncFn() -> anyhow::Result<Progress<T>>,
) -> anyhow::Result<T> {
    let end = limit.map(|limit| Instant::now() + limit);
    let mut said: Option<(String, Instant)> = None;
    let waiting = async {
        loop {
            let now = match look().await {
                Ok(Progress::Over(seen)) => return Ok(seen),
                Ok(Progress::On(now)) => now,
                Err(error) if exit_code(&error) == Exit::Unavailable => format!("{error:#}"),
                Err(error) => return Err(error),
            };
            if said.as_ref().is_none_or(|(last, when)| *last != now || when.elapsed() >= SAY_EVERY) {
                note(&now);
                said = Some((now, Instant::now()));
            }
            sleep(LOOK_EVERY).await;
        }
    };
    let over = until_interrupted(async {
        match end {
            None => waiting.await.map(Some),
            Some(end) => match timeout_at(end, waiting).await {
                Ok(over) => over.map(Some),
                Err(_elapsed) => Ok(None),
            },
        }
    })
    .await?;
    over.ok_or_else(|| {
        let last = said.map_or_else(|| "the cluster has not answered yet".to_owned(), |(last, _)| last);
        TimeUp { what, after: limit.unwrap_or_default(), last }.into()
    })
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use ensign_client::CallError;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_wait_ends_when_it_is_over_and_outlives_a_node_that_does_not_answer() {
        let looks = Cell::new(0);
        let look = async || {
            looks.set(looks.get() + 1);
            match looks.get() {
                1 => Ok(Progress::On("3 left".to_owned())),
                2 => Err(CallError::Unavailable { message: "no leader".to_owned() }.into()),
                n => Ok(Progress::Over(n)),
            }
        };
        assert_eq!(wait("it".to_owned(), Some(Duration::from_mins(1)), look).await.unwrap(), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn a_wait_that_takes_too_long_says_what_it_waited_for_and_ends_with_a_code_of_its_own() {
        let look = async || Ok(Progress::<()>::On("node 3: 2 replicas left".to_owned()));
        let error = wait("the drain of node 3".to_owned(), Some(Duration::from_secs(90)), look).await.unwrap_err();
        assert_eq!(
            error.to_string(),
            "the drain of node 3 is not over after 1m 30s (--timeout), and goes on by itself: node 3: 2 replicas left"
        );
        assert_eq!(exit_code(&error), Exit::TimeUp);
    }

    #[tokio::test(start_paused = true)]
    async fn a_wait_for_what_is_refused_ends_at_once() {
        let look = async || Err(CallError::Precondition { message: "undrained".to_owned() }.into());
        let error = wait::<()>("it".to_owned(), None, look).await.unwrap_err();
        assert_eq!(exit_code(&error), Exit::Refused);
    }

    #[tokio::test(start_paused = true)]
    async fn a_watch_looks_past_a_node_that_does_not_answer_and_not_past_bad_credentials() {
        let looks = Cell::new(0);
        let look = async || {
            looks.set(looks.get() + 1);
            let message = "words".to_owned();
            match looks.get() {
                1 => Err(CallError::Unavailable { message }.into()),
                2 => Ok(()),
                _ => Err(CallError::PermissionDenied { message }.into()),
            }
        };
        let error = watched(Some(Duration::from_secs(1)), Output::Json, look).await.unwrap_err();
        assert_eq!((exit_code(&error), looks.get()), (Exit::Denied, 3));
    }
}
