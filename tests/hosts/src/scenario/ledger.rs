//! The ledger: publishers and subscribers of both clients, faults from a seed, and at the end a verdict on every topic.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, bail};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};

use super::{on_cluster, say};
use crate::balancer::Balancer;
use crate::checker::{Verdict, judge};
use crate::cluster::{Cluster, Plan};
use crate::faults::{Schedule, end, inject};
use crate::history::{History, Published, Received};
use crate::links::Node;
use crate::workload::{Finish, Pulse, ours, pyensign};

/// Topics of our client.
const TOPICS: [&str; 3] = ["ledger-1", "ledger-2", "ledger-3"];
/// The topic of PyEnsign.
const PYENSIGN: &str = "ledger-pyensign";
/// Its publisher's number.
const PYENSIGN_PUBLISHER: u32 = 1000;
/// Publishers of our client on each topic.
const PUBLISHERS: u32 = 2;
/// How long after its last fault a cluster may take to answer everything.
const CALM: Duration = Duration::from_mins(5);

/// What to run.
#[derive(Debug, Clone)]
pub struct Ledger {
    /// The cluster.
    pub plan: Plan,
    /// How long faults go on.
    pub length: Duration,
    /// What the faults are drawn from.
    pub seed: u64,
    /// A Python with PyEnsign; none goes without.
    pub python: Option<PathBuf>,
    /// Each publisher's events a second.
    pub rate: u32,
}

/// What a publisher saw, and its client's subscriber where it has one: of a topic, under a number.
type Finished = (&'static str, u32, Published, Option<Received>);

/// Publishers and subscribers that run, and what they return.
#[derive(Default)]
struct Work {
    publishers: JoinSet<anyhow::Result<Finished>>,
    subscribers: JoinSet<anyhow::Result<(&'static str, Received)>>,
    ends: BTreeMap<&'static str, watch::Sender<Option<u64>>>,
    pulses: BTreeMap<&'static str, Pulse>,
    finish: Finish,
    /// What PyEnsign connects to.
    balancers: Vec<Balancer>,
}

/// Runs it.
///
/// # Errors
/// A promise was broken, or the run could not be carried out. The cluster's directory is kept then, and named.
pub async fn run(ledger: Ledger) -> anyhow::Result<()> {
    let Ledger { plan, length, seed, rate, .. } = &ledger;
    say(format!(
        "seed {seed}, {} nodes, links by {:?}, {length:?} of faults, {rate} events/s a publisher",
        plan.nodes, plan.mechanism
    ));
    let outcome = on_cluster(plan, async |cluster| ledger.on(cluster).await).await;
    if outcome.is_err() {
        say(format!("the same faults again: --seed {seed} --nodes {}", plan.nodes));
    }
    outcome
}

impl Ledger {
    async fn on(&self, cluster: &mut Cluster) -> anyhow::Result<()> {
        let mut work = Work::default();
        let mut history: BTreeMap<&'static str, History> = BTreeMap::new();
        for (topic, first) in TOPICS.into_iter().zip((1..=self.plan.nodes).cycle()) {
            history.insert(topic, History::default());
            self.start_ours(cluster, &mut work, topic, first).await?;
        }
        if let Some(python) = &self.python {
            history.insert(PYENSIGN, History::default());
            self.start_pyensign(cluster, &mut work, python.clone()).await?;
        }
        let counts = self.faults(cluster).await?;
        let calm = Instant::now();
        say("all faults are over; publishers finish");
        for node in cluster.running() {
            cluster.ready(node).await?;
        }
        work.finish.now();
        let finished = tokio::time::timeout(CALM, async {
            while let Some(publisher) = work.publishers.join_next().await {
                let (topic, number, published, received) = publisher??;
                let history = history.entry(topic).or_default();
                history.published.insert(number, published);
                history.received.extend(received);
            }
            anyhow::Ok(())
        });
        finished.await.with_context(|| format!("publishers do not finish within {CALM:?}"))??;
        say(format!("every publisher has its answers, {:.1} s after the last fault", calm.elapsed().as_secs_f64()));
        for (topic, history) in &mut history {
            for node in cluster.running() {
                let rows = ours::read(&cluster.client(&[node])?, topic).await?;
                history.read.insert(format!("node {node}"), rows);
            }
            if let Some(end) = work.ends.get(topic) {
                end.send_replace(history.read.values().map(|rows| rows.len() as u64).max());
            }
        }
        let followed = tokio::time::timeout(CALM, async {
            while let Some(subscriber) = work.subscribers.join_next().await {
                let (topic, received) = subscriber??;
                history.entry(topic).or_default().received.push(received);
            }
            anyhow::Ok(())
        });
        followed.await.with_context(|| format!("subscribers do not get everything within {CALM:?}"))??;
        cluster.nobody_died()?;
        report(&history, &work.pulses, &counts)
    }

    async fn start_ours(
        &self,
        cluster: &Cluster,
        work: &mut Work,
        topic: &'static str,
        first: Node,
    ) -> anyhow::Result<()> {
        cluster.client_from(first)?.create_topic(topic).await?;
        let pulse = Pulse::default();
        let pace =
            ours::Pace { every: Duration::from_millis(100), events: u64::from(self.rate / 10).max(1), window: 4096 };
        for publisher in 0..PUBLISHERS {
            // Each begins at another node, so that some are connected to whichever is hit.
            let client = cluster.client_from((first + u64::from(publisher)) % self.plan.nodes + 1)?;
            let beat = (work.finish.clone(), pulse.clone());
            work.publishers.spawn(async move {
                Ok((topic, publisher, ours::publish(client, topic.to_owned(), publisher, pace, beat).await?, None))
            });
        }
        let (end, until) = watch::channel(None);
        let client = cluster.client_from(first)?;
        work.subscribers.spawn(async move {
            Ok((topic, ours::follow(client, topic.to_owned(), format!("our subscriber of {topic}"), until).await?))
        });
        work.ends.insert(topic, end);
        work.pulses.insert(topic, pulse);
        Ok(())
    }

    async fn start_pyensign(&self, cluster: &Cluster, work: &mut Work, python: PathBuf) -> anyhow::Result<()> {
        cluster.client_from(1)?.create_topic(PYENSIGN).await?;
        let nodes: Vec<_> = cluster.network.nodes().iter().map(|node| cluster.addresses(*node)).collect();
        let grpc = Balancer::start(nodes.iter().map(|it| (it.grpc, it.metrics))).await?;
        let http = Balancer::start(nodes.iter().map(|it| (it.http, it.metrics))).await?;
        let job = pyensign::Job {
            python,
            endpoint: grpc.address().to_string(),
            auth_url: format!("http://{}", http.address()),
            credentials: cluster.credentials(),
            topic: PYENSIGN.to_owned(),
            publisher: PYENSIGN_PUBLISHER,
            rate: self.rate,
        };
        let worker = pyensign::Worker::start(&job).await?;
        work.balancers = vec![grpc, http];
        work.pulses.insert(PYENSIGN, worker.pulse());
        let finish = work.finish.clone();
        work.publishers.spawn(async move {
            let told = async {
                while !finish.is_time() {
                    sleep(Duration::from_millis(100)).await;
                }
            };
            let (published, received) = worker.run(PYENSIGN_PUBLISHER, told).await?;
            Ok((PYENSIGN, PYENSIGN_PUBLISHER, published, Some(received)))
        });
        Ok(())
    }

    /// Lets things go wrong, one step after the other, until the time is up. How often each kind came up.
    async fn faults(&self, cluster: &mut Cluster) -> anyhow::Result<BTreeMap<&'static str, u64>> {
        let begun = Instant::now();
        let last = begun + self.length;
        let mut counts = BTreeMap::new();
        sleep(Duration::from_secs(2)).await;
        for step in Schedule::new(self.seed, self.plan.nodes) {
            if Instant::now() + step.hold > last {
                break;
            }
            let at = begun.elapsed().as_secs_f64();
            let what: Vec<String> = step.faults.iter().map(ToString::to_string).collect();
            say(format!("{at:7.1} s  {}, for {:.1} s", what.join(" and "), step.hold.as_secs_f64()));
            for fault in &step.faults {
                *counts.entry(fault.kind()).or_default() += 1;
                inject(cluster, fault)?;
            }
            sleep(step.hold).await;
            cluster.nobody_died()?;
            for fault in &step.faults {
                end(cluster, fault)?;
            }
            sleep_until(last.min(Instant::now() + step.rest)).await;
        }
        cluster.network.heal()?;
        Ok(counts)
    }
}

fn report(
    history: &BTreeMap<&'static str, History>,
    pulses: &BTreeMap<&'static str, Pulse>,
    counts: &BTreeMap<&'static str, u64>,
) -> anyhow::Result<()> {
    let mut verdict = Verdict::default();
    say("\nfaults");
    for (kind, count) in counts {
        say(format!("  {count:5}  {kind}"));
    }
    say("\ntopic              begun    acked   refused     read    longest gap without an ack   delivered");
    for (topic, history) in history {
        let sum = |count: fn(&Published) -> u64| history.published.values().map(count).sum::<u64>();
        let read = history.read.values().next().map_or(0, Vec::len);
        let delivered: Vec<String> = history.received.iter().map(|it| it.rows.len().to_string()).collect();
        let (gap, _) = pulses.get(topic).map(Pulse::take).unwrap_or_default();
        say(format!(
            "{topic:16} {:7} {:8} {:9} {read:8} {:10.2} s, until {:7.1} s   {}",
            sum(|it| it.begun),
            sum(|it| it.acked.len() as u64),
            sum(|it| it.refused.len() as u64),
            gap.length.as_secs_f64(),
            gap.ended.as_secs_f64(),
            delivered.join(", "),
        ));
        verdict.merge(topic, judge(history));
    }
    let acked: usize = history.values().flat_map(|it| it.published.values()).map(|it| it.acked.len()).sum();
    let of = |rule: &str| verdict.broken.get(rule).copied().unwrap_or(0);
    say(format!(
        "\n{acked} events acked: {} lost, {} duplicated, {} reordered",
        of("lost"),
        of("duplicated"),
        of("reordered") + of("moved"),
    ));
    for what in &verdict.told {
        say(format!("  {what}"));
    }
    if acked == 0 {
        bail!("nothing was acked: the run shows nothing");
    }
    if !verdict.holds() {
        say("verdict: BROKEN");
        bail!("promises were broken: {:?}", verdict.broken);
    }
    say("verdict: every promise held");
    Ok(())
}
