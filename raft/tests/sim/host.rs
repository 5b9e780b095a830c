//! One node of a simulation: log, runtime, peer server and a client that proposes wherever this node leads.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use ensign_proto::{ClusterVersion, GroupId, NodeId};
use ensign_raft::env::{BootTime, Clock, Lane, Pipe, Rng, SeededRng, Tasks, Transport, TransportError, UnixNanos};
use ensign_raft::testing::Journal;
use ensign_raft::{
    DiskReads, Group, GroupSpec, Limits, MembershipError, Mode, Runtime, RuntimeConfig, Timing, parting,
};
use ensign_storage::frame::Plant;
use ensign_storage::{Done, FaultDisk, FrameLog, LogConfig, LogError, NodeLog as _, OpenError, Writer};
use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::{mpsc, oneshot};
use tokio::time::sleep;
use turmoil::net::{TcpListener, TcpStream};

use crate::world::{Plan, Running, World};

pub(crate) const GROUP: GroupId = GroupId(16);
pub(crate) const TIMING: Timing = Timing {
    heartbeat: Duration::from_millis(60),
    election_min: Duration::from_millis(200),
    election_max: Duration::from_millis(400),
};
/// Short, so that groups sleep and wake often within a run.
const QUIESCE_AFTER: Duration = Duration::from_millis(500);
const PORT: u16 = 5357;

/// Bugs to find.
#[derive(Debug, Clone, Copy, Default)]
#[expect(clippy::struct_excessive_bools, reason = "each is a bug of its own, there or not")]
pub(crate) struct Plants {
    pub(crate) leader_restore: bool,
    pub(crate) deep_sleep: bool,
    /// A node that is no founder founds a group of its own instead of waiting to be added.
    pub(crate) refound: bool,
    /// A replica that leaves keeps nothing of what it promised.
    pub(crate) forgetful: bool,
    /// A leader takes its own word for who belongs to the group when it tells others that they may go.
    pub(crate) hearsay: bool,
    pub(crate) log: Option<Plant>,
}

pub(crate) fn name(node: NodeId) -> String {
    format!("n{node}")
}

struct SimClock;

impl Clock for SimClock {
    fn boot(&self) -> BootTime {
        BootTime(turmoil::sim_elapsed().unwrap_or_default())
    }

    fn wall(&self) -> UnixNanos {
        UnixNanos(turmoil::since_epoch().unwrap_or_default().as_nanos() as u64)
    }
}

/// Runs a node until its host is crashed.
pub(crate) async fn run(world: World, node: NodeId, voters: Vec<NodeId>, seed: u64, plants: Plants) -> turmoil::Result {
    let (disk, incarnation) = {
        let mut state = world.lock();
        let slot = state.nodes.entry(node).or_default();
        slot.incarnation += 1;
        (slot.disk.clone(), slot.incarnation)
    };
    let rng: Arc<dyn Rng> = Arc::new(SeededRng::new(seed ^ node.0 << 32 ^ incarnation << 40));
    let log_config = LogConfig { plant: plants.log, ..LogConfig::tiny() };
    let (log, writer) = loop {
        match FrameLog::open(Arc::new(disk.clone()), Path::new("log"), log_config) {
            Ok(opened) => break opened,
            Err(OpenError::Full { .. }) => sleep(Duration::from_millis(100)).await,
            Err(error) => failed_start(&disk, error).await?,
        }
    };
    let tasks = Tasks::new();
    let (disks, latencies) = (world.clone(), Arc::clone(&rng));
    tasks.spawn("sync", move |_stop| commit(disks, node, writer, latencies));

    let mut config =
        RuntimeConfig { timing: TIMING, disk_reads: DiskReads::Inline, incarnation, ..RuntimeConfig::new(node) };
    config.quiesce_after = Some(QUIESCE_AFTER);
    config.planted_leader_restore = plants.leader_restore;
    config.planted_deep_sleep = plants.deep_sleep;
    // Small, so that checkpoints happen within a short run.
    config.limits = Limits { checkpoint_entries: 64, ..Limits::default() };
    let transport = Arc::new(SimTransport { node, tasks: tasks.clone() });
    let runtime = Runtime::new(config, transport, Arc::new(SimClock), Arc::clone(&rng), tasks.clone());
    let listener = TcpListener::bind(("0.0.0.0", PORT)).await?;
    let (server, pipes) = (runtime.clone(), tasks.clone());
    tasks.spawn("listen", move |_stop| async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (server, pipes) = (server.clone(), pipes.clone());
            pipes.clone().spawn("handshake", move |_stop| async move {
                let _ = welcome(stream, &server, &pipes).await;
            });
        }
    });

    let founders: BTreeSet<NodeId> = voters.into_iter().collect();
    loop {
        if world.plan(node).holders.contains(&node) {
            let spec = spec(&world, node, &founders, plants);
            let group = match runtime.start(spec, log.group(GROUP), Journal::with_checkpoints()).await {
                Ok(group) => group,
                Err(error) => return failed_start(&disk, error).await,
            };
            started(&world, node, &group, &log, &tasks);
            client(&world, node, group, &tasks, &*rng, plants).await;
            runtime.stop(GROUP).await;
            if let Some(slot) = world.lock().nodes.get_mut(&node) {
                slot.running = None;
            }
        } else if let Err(error) = leave(&world, node, &log, plants).await {
            world.note(&format!("{} left and kept its log: {error}", name(node)));
        }
        sleep(Duration::from_millis(2 + rng.next_u64() % 30)).await;
    }
}

/// How the replica starts. As in a cluster, only who belonged to the group from the first may create it, and only when it is sure that
/// nobody can have moved it.
fn spec(world: &World, node: NodeId, founders: &BTreeSet<NodeId>, plants: Plants) -> GroupSpec {
    if plants.refound && !founders.contains(&node) {
        return GroupSpec { id: GROUP, voters: [node].into(), mode: Mode::Found };
    }
    let is_first = world.confirmed_plan(node).is_some_and(|plan| plan.settled == 0);
    if founders.contains(&node) && is_first {
        return GroupSpec { id: GROUP, voters: founders.clone(), mode: Mode::Found };
    }
    GroupSpec { id: GROUP, voters: world.plan(node).wanted, mode: Mode::Member }
}

fn started(world: &World, node: NodeId, group: &Group<Journal>, log: &FrameLog, tasks: &Tasks) {
    let back = {
        let mut state = world.lock();
        let Some(slot) = state.nodes.get_mut(&node) else { return };
        slot.lives += 1;
        let back = std::mem::take(&mut slot.gone);
        let (group, log, tasks) = (group.clone(), log.group(GROUP), tasks.clone());
        slot.running = Some(Running { life: slot.lives, group, log, tasks });
        state.returns += u64::from(back);
        back
    };
    world.note(&format!("{} {}", name(node), if back { "is back" } else { "started" }));
}

/// Gives up the log of a replica that runs no more, but for what it promised. Asks only now whether it is really not wanted.
async fn leave(world: &World, node: NodeId, log: &FrameLog, plants: Plants) -> Result<(), LogError> {
    let state = log.group(GROUP).state();
    let is_unwanted = world.confirmed_plan(node).is_some_and(|plan| !plan.holders.contains(&node));
    if !is_unwanted {
        return Ok(());
    }
    if state.last.is_some() {
        let kept = parting(&state).expect("the simulation's disks lose writes, and change none");
        let (sender, done) = oneshot::channel();
        let told: Done = Box::new(|outcome| drop(sender.send(outcome)));
        match kept {
            Some(vote) if !plants.forgetful => log.forget(GROUP, vote, told),
            _ => log.remove(GROUP, told),
        }
        done.await.unwrap_or(Err(LogError::Closed))?;
        world.note(&format!("{} left", name(node)));
    }
    if let Some(slot) = world.lock().nodes.get_mut(&node) {
        slot.gone = slot.lives > 0;
    }
    Ok(())
}

/// A start may lose its power too: then the test crashes this host and starts it again. Anything else is a finding.
async fn failed_start(disk: &FaultDisk, error: impl std::error::Error + 'static) -> turmoil::Result {
    if disk.powered_off() {
        std::future::pending::<()>().await;
    }
    Err(error.into())
}

/// The writer's thread, as a task: a sync takes a few milliseconds, or as long as the test holds it.
async fn commit(world: World, node: NodeId, mut writer: Writer, rng: Arc<dyn Rng>) {
    loop {
        sleep(Duration::from_millis(1 + rng.next_u64() % 4)).await;
        let held = world.lock().nodes.get(&node).is_some_and(|slot| slot.held);
        if held {
            continue;
        }
        match writer.commit_queued() {
            Ok(_) | Err(LogError::Full { .. }) => {}
            Err(error) => {
                world.note(&format!("{} log: {error}", name(node)));
                return;
            }
        }
    }
}

/// Proposes, and reads, as long as this node leads; returns once its replica's place is elsewhere.
async fn client(world: &World, node: NodeId, group: Group<Journal>, tasks: &Tasks, rng: &dyn Rng, plants: Plants) {
    loop {
        sleep(Duration::from_millis(2 + rng.next_u64() % 14)).await;
        if !world.plan(node).holders.contains(&node) {
            return;
        }
        let (busy, compact) = {
            let mut state = world.lock();
            let busy = state.busy;
            let slot = state.nodes.entry(node).or_default();
            (busy, std::mem::take(&mut slot.compact))
        };
        if compact {
            let outcome = group.compact(3).await.map_err(|error| error.to_string());
            world.note(&format!("{} compacted: {outcome:?}", name(node)));
        }
        let leadership = *group.leadership().borrow();
        if leadership.ready && leadership.leads(node) && rng.next_u64().is_multiple_of(4) {
            let (world, group) = (world.clone(), group.clone());
            tasks.spawn("members", move |_stop| change_members(world, node, group, plants));
        }
        if !busy || !leadership.ready || !leadership.leads(node) {
            continue;
        }
        if rng.next_u64().is_multiple_of(8) {
            let (world, group) = (world.clone(), group.clone());
            tasks.spawn("read", move |_stop| read(world, group));
        }
        for _ in 0..=rng.next_u64() % 4 {
            let payload = world.next_payload(node);
            match group.submit(Some(leadership.term), payload.clone()).await {
                Err(error) => world.settle(payload, Err(error)),
                Ok(pending) => {
                    let world = world.clone();
                    tasks.spawn("propose", move |_stop| async move {
                        let outcome = pending.await.map(|committed| committed.id);
                        world.settle(payload, outcome);
                    });
                }
            }
        }
    }
}

/// One step towards the members that the test wants. A crash may cut it short anywhere.
async fn change_members(world: World, node: NodeId, group: Group<Journal>, plants: Plants) {
    let plan = world.plan(node);
    let Plan { ref wanted, number, .. } = plan;
    let members = group.members();
    let missing = wanted.iter().copied().find(|node| !members.contains(*node));
    let extra = members.learners.iter().copied().find(|node| !wanted.contains(node));
    let (what, outcome) = if members.is_joint() {
        ("finish", group.change_voters(&members.voters, members.voters.clone()).await)
    } else if let Some(node) = missing {
        ("add", group.add_learner(node).await)
    } else if members.voters != *wanted {
        ("change", group.change_voters(&members.voters, wanted.clone()).await)
    } else if let Some(node) = extra {
        ("remove", group.remove_learner(node).await)
    } else {
        if !plan.is_settled() {
            settle(&world, node, &group, number, plants).await;
        }
        return;
    };
    if !matches!(outcome, Err(MembershipError::InProgress | MembershipError::Behind { .. })) {
        world.note(&format!("{what} from {members:?}: {outcome:?}"));
    }
    if outcome.is_ok() && matches!(what, "change" | "finish") {
        world.lock().changes += 1;
    }
}

/// The group looks as plan `number` wants it: says so to all others, if it is true.
async fn settle(world: &World, node: NodeId, group: &Group<Journal>, number: u64, plants: Plants) {
    let confirmed = if plants.hearsay { Ok(group.members()) } else { group.confirmed_members().await };
    let Ok(members) = confirmed else { return };
    let news = world.confirmed_plan(node).is_some() && {
        let plan = &mut world.lock().plan;
        let is_so = members.voters == plan.wanted && members.outgoing.is_empty() && members.learners.is_empty();
        is_so && plan.settle(number)
    };
    if news {
        world.note(&format!("settled: {members:?}"));
    }
}

/// A read index must cover everything that was acknowledged before it was asked for.
async fn read(world: World, group: Group<Journal>) {
    let before = world.lock().acked_through;
    if let Ok(index) = group.read_index().await {
        let applied = *group.applied().borrow();
        if index < before || applied < index {
            let what = format!("a read index of {index} (applied {applied}) after {before} was acknowledged");
            world.lock().broken.get_or_insert(what);
        }
    }
}

struct SimTransport {
    node: NodeId,
    tasks: Tasks,
}

impl Transport for SimTransport {
    fn connect(&self, peer: NodeId, lane: Lane) -> BoxFuture<'static, Result<Pipe, TransportError>> {
        let (node, tasks) = (self.node, self.tasks.clone());
        let opening = async move {
            let failed = |error: std::io::Error| TransportError { peer, cause: error.to_string() };
            let mut stream = TcpStream::connect((name(peer), PORT)).await.map_err(failed)?;
            let hello = [&node.0.to_be_bytes()[..], &[u8::from(lane == Lane::Bulk)]].concat();
            stream.write_all(&hello).await.map_err(failed)?;
            Ok(pipe(stream, &tasks))
        };
        opening.boxed()
    }
}

async fn welcome(mut stream: TcpStream, runtime: &Runtime, tasks: &Tasks) -> std::io::Result<()> {
    let peer = NodeId(stream.read_u64().await?);
    let lane = if stream.read_u8().await? == 1 { Lane::Bulk } else { Lane::Control };
    runtime.accept(peer, lane, pipe(stream, tasks));
    Ok(())
}

/// Messages over TCP, each with its length in front.
fn pipe(stream: TcpStream, tasks: &Tasks) -> Pipe {
    let (mut reader, mut writer) = stream.into_split();
    let (outgoing, mut accepted) = mpsc::channel::<Bytes>(64);
    let (delivery, incoming) = mpsc::channel(64);
    tasks.spawn("tcp-write", move |_stop| async move {
        while let Some(message) = accepted.recv().await {
            let framed = [&(message.len() as u32).to_be_bytes()[..], &message].concat();
            if writer.write_all(&framed).await.is_err() {
                return;
            }
        }
    });
    tasks.spawn("tcp-read", move |_stop| async move {
        while let Ok(length) = reader.read_u32().await {
            let mut message = vec![0; length as usize];
            if reader.read_exact(&mut message).await.is_err() || delivery.send(message.into()).await.is_err() {
                return;
            }
        }
    });
    Pipe { outgoing, incoming, version: ClusterVersion::NEWEST }
}
