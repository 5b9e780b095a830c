//! What keeps the cluster from a version, for whoever is refused for want of it: asked around once in a while, however many ask.

use std::sync::Arc;
use std::time::Duration;

use ensign_proto::ClusterVersion;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio::sync::Mutex;
use tokio::time::Instant;

use super::Survey;
use crate::catalog::WhyNotYet;

/// From one round of questions to the next. Changes are refused as fast as clients send them, and a round asks every node.
const ASK_EVERY: Duration = Duration::from_secs(5);

/// The last round.
struct Asked {
    begun: Instant,
    /// None if nobody could be asked, or whoever asked did not wait for the answers.
    survey: Option<Survey>,
}

/// Answers from what `ask` finds out, which is called at most once in [`ASK_EVERY`]; meanwhile all get the same answer.
pub(super) fn why_not_yet(
    ask: impl Fn() -> BoxFuture<'static, Option<Survey>> + Send + Sync + 'static,
) -> Arc<WhyNotYet> {
    let (ask, last) = (Arc::new(ask), Arc::new(Mutex::new(None::<Asked>)));
    Arc::new(move |needs| {
        let (ask, last) = (Arc::clone(&ask), Arc::clone(&last));
        let asking = async move {
            let mut last = last.lock().await;
            if last.as_ref().is_none_or(|asked| asked.begun.elapsed() >= ASK_EVERY) {
                // Noted first, so that callers who do not wait bring about no more questions than those who do.
                let asked = last.insert(Asked { begun: Instant::now(), survey: None });
                asked.survey = ask().await;
            }
            Some(explain(last.as_ref()?.survey.as_ref()?, needs))
        };
        asking.boxed()
    })
}

fn explain(survey: &Survey, needs: ClusterVersion) -> String {
    let soon = || "every node speaks it, and the version rises within seconds: try again".to_owned();
    survey.in_the_way(needs).unwrap_or_else(soon)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use ensign_proto::NodeId;
    use tokio::time::{advance, sleep};

    use super::super::{Said, Surveyed};
    use super::*;
    use crate::peers::Speaks;

    /// A round finds that the node of its own number is behind, and takes a second.
    fn asking(rounds: &Arc<AtomicUsize>) -> Arc<WhyNotYet> {
        let rounds = Arc::clone(rounds);
        why_not_yet(move || {
            let node = NodeId(rounds.fetch_add(1, Ordering::SeqCst) as u64 + 1);
            let speaks = Speaks { newest: ClusterVersion::V1, held: false };
            let nodes = vec![Surveyed { node, says: Ok(Said { speaks, release: String::new() }) }];
            let survey = Survey { active: ClusterVersion::V1, nodes };
            async move {
                sleep(Duration::from_secs(1)).await;
                Some(survey)
            }
            .boxed()
        })
    }

    fn behind(node: u64) -> String {
        format!("node {node} speaks version 1: run the new version of ensign on it")
    }

    #[tokio::test(start_paused = true)]
    async fn however_many_are_refused_the_nodes_are_asked_once_in_a_while() {
        let rounds = Arc::default();
        let why = asking(&rounds);
        let answers = futures::future::join_all((0..100).map(|_| why(ClusterVersion::V2))).await;
        assert!(answers.iter().flatten().all(|answer| *answer == behind(1)), "{answers:?}");
        assert_eq!(answers.iter().flatten().count(), 100);
        // The round took a second.
        advance(Duration::from_millis(3_999)).await;
        assert_eq!((why(ClusterVersion::V2).await, rounds.load(Ordering::SeqCst)), (Some(behind(1)), 1));
        advance(Duration::from_millis(1)).await;
        assert_eq!((why(ClusterVersion::V2).await, rounds.load(Ordering::SeqCst)), (Some(behind(2)), 2));
    }

    #[tokio::test(start_paused = true)]
    async fn callers_that_do_not_wait_for_the_answer_bring_about_no_more_questions() {
        let rounds = Arc::default();
        let why = asking(&rounds);
        for _ in 0..10 {
            assert!(why(ClusterVersion::V2).now_or_never().is_none_or(|answer| answer.is_none()));
        }
        assert_eq!(rounds.load(Ordering::SeqCst), 1);
        advance(ASK_EVERY).await;
        assert_eq!(why(ClusterVersion::V2).await, Some(behind(2)));
    }
}
