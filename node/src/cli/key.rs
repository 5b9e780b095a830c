//! `ensign key`.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use ensign_client::{Revoke, Ring, admin_api as pb};
use ensign_proto::{KeyVersion, RingId};
use serde::Serialize;

use super::admin::id;
use super::args::{Algorithm, ClientArgs, KeyCommand, Output, RevokeArgs, RingArg, Stage, TargetArgs};
use super::connect::{Clients, connect};
use super::exit::{CopiesMissing, NotBuilt, UsageError};
use super::output::{agree, confirm, json, line, list, one, record, somebody_is_there, thousands, wire_time};
use super::watch::{Progress, wait};

/// As many names of what a ring seals as a question has.
const NAMED_MAX: usize = 10;

#[derive(Serialize)]
struct ShownRing {
    id: String,
    /// Absent for the ring that its project began with.
    name: Option<String>,
    project: String,
    state: &'static str,
    algorithm: &'static str,
    created: Option<String>,
    rotation_seconds: u64,
    /// Absent while no version is active.
    next_rotation: Option<String>,
    versions: Vec<ShownVersion>,
    scheduled: Vec<ShownScheduled>,
    /// Where one ring is described: what is sealed under it.
    #[serde(skip_serializing_if = "Option::is_none")]
    bindings: Option<Vec<ShownBinding>>,
    #[serde(skip_serializing_if = "is_zero")]
    bindings_left_out: u64,
    /// Of a change: where it stands in the vault's log.
    #[serde(skip_serializing_if = "is_zero")]
    log_index: u64,
}

#[derive(Serialize)]
struct ShownVersion {
    version: u32,
    state: &'static str,
    created: Option<String>,
    /// Since when it is in this state.
    changed: Option<String>,
    /// Public fingerprint of the key, in hex.
    kek_id: String,
    /// Revoked, and in no file of the vault any more.
    erased: bool,
}

#[derive(Serialize)]
struct ShownBinding {
    kind: &'static str,
    id: String,
    name: String,
}

impl From<&pb::RingBinding> for ShownBinding {
    fn from(binding: &pb::RingBinding) -> Self {
        use pb::ring_binding::Kind;
        let kind = match binding.kind() {
            Kind::Unspecified => "unknown",
            Kind::Project => "project",
            Kind::Topic => "topic",
            Kind::FormerTopic => "topic, before",
            Kind::ApiKey => "API key",
        };
        Self { kind, id: binding.id.clone(), name: binding.name.clone() }
    }
}

#[derive(Serialize)]
struct ShownScheduled {
    /// Absent for the whole ring.
    version: Option<u32>,
    ordered: Option<String>,
    by: String,
    after_seconds: u64,
    left_seconds: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

fn state_name(state: pb::KeyState) -> &'static str {
    match state {
        pb::KeyState::Unspecified => "unknown",
        pb::KeyState::Active => "active",
        pb::KeyState::Retired => "retired",
        pb::KeyState::Disabling => "disabling",
        pb::KeyState::Disabled => "disabled",
        pb::KeyState::Revoking => "revoking",
        pb::KeyState::Revoked => "revoked",
    }
}

fn ring_state_name(state: pb::KeyRingState) -> &'static str {
    match state {
        pb::KeyRingState::Unspecified => "unknown",
        pb::KeyRingState::Enabled => "enabled",
        pb::KeyRingState::Disabling => "disabling",
        pb::KeyRingState::Disabled => "disabled",
        pb::KeyRingState::Revoked => "revoked",
    }
}

fn algorithm_name(algorithm: pb::KeyAlgorithm) -> &'static str {
    match algorithm {
        pb::KeyAlgorithm::Unspecified => "unknown",
        pb::KeyAlgorithm::Aes256Gcm => "AES256_GCM",
        pb::KeyAlgorithm::Aes192Gcm => "AES192_GCM",
        pb::KeyAlgorithm::Aes128Gcm => "AES128_GCM",
    }
}

fn wire_algorithm(algorithm: Algorithm) -> pb::KeyAlgorithm {
    match algorithm {
        Algorithm::Aes256 => pb::KeyAlgorithm::Aes256Gcm,
        Algorithm::Aes192 => pb::KeyAlgorithm::Aes192Gcm,
        Algorithm::Aes128 => pb::KeyAlgorithm::Aes128Gcm,
    }
}

fn seconds(span: Option<prost_types::Duration>) -> u64 {
    span.and_then(|span| Duration::try_from(span).ok()).unwrap_or_default().as_secs()
}

/// `7776000` as `90d`: days where they come out even, else as it is written by hand.
fn span(seconds: u64) -> String {
    const DAY: u64 = 24 * 60 * 60;
    if seconds >= DAY && seconds.is_multiple_of(DAY) {
        return format!("{}d", seconds / DAY);
    }
    humantime::format_duration(Duration::from_secs(seconds)).to_string()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

impl From<pb::KeyRing> for ShownRing {
    fn from(ring: pb::KeyRing) -> Self {
        let versions = ring.versions.iter().map(|it| ShownVersion {
            version: it.version,
            state: state_name(it.state()),
            created: wire_time(it.created.as_ref()),
            changed: wire_time(it.changed.as_ref()),
            kek_id: hex(&it.kek_id),
            erased: it.erased,
        });
        let scheduled = ring.scheduled.iter().map(|it| ShownScheduled {
            version: (it.version != 0).then_some(it.version),
            ordered: wire_time(it.ordered.as_ref()),
            by: it.actor.clone(),
            after_seconds: seconds(it.after),
            left_seconds: seconds(it.left),
        });
        Self {
            versions: versions.collect(),
            scheduled: scheduled.collect(),
            bindings: None,
            bindings_left_out: ring.bindings_left_out,
            state: ring_state_name(ring.state()),
            algorithm: algorithm_name(ring.algorithm()),
            created: wire_time(ring.created.as_ref()),
            rotation_seconds: seconds(ring.rotation),
            next_rotation: wire_time(ring.next_rotation.as_ref()),
            log_index: ring.index,
            id: ring.id,
            name: (!ring.name.is_empty()).then_some(ring.name),
            project: ring.project_id,
        }
    }
}

impl ShownScheduled {
    fn line(&self) -> String {
        let what = self.version.map_or_else(|| "all of it".to_owned(), |version| format!("version {version}"));
        format!("{what} is destroyed in {} or later, by order of {}", span(self.left_seconds), self.by)
    }
}

#[derive(Serialize)]
struct Rotated {
    ring: String,
    version: u32,
}

#[derive(Serialize)]
struct Revoked {
    ring: String,
    versions: Vec<u32>,
    /// How far it is: revoked, erased.
    stage: &'static str,
    /// Empty while the cluster is being upgraded from a version that made none.
    receipt: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    erased_receipt: Option<String>,
    /// Nodes that had a copy of the key, were removed, and never said that it is gone from theirs.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    missing: Vec<u64>,
    waited_seconds: f64,
}

#[derive(Serialize)]
struct ShownReceipt {
    kind: &'static str,
    versions: Vec<u32>,
    time: Option<String>,
    log_index: u64,
    /// Empty for what was committed before the vault had a receipt key.
    receipt: String,
}

/// The ring that was named, by id or by name, or that of the project that the credentials are for.
async fn the_ring(clients: &Clients, named: RingArg) -> anyhow::Result<Ring> {
    if let Some(named) = named.ring {
        return Ok(match named.parse::<RingId>() {
            Ok(ring) => Ring::Id(ring),
            Err(_) => Ring::Name(named, clients.project_id().await?),
        });
    }
    Ok(clients.project_id().await?.map_or(Ring::Own, Ring::Project))
}

/// What a command acts on, and how people read it.
struct Target {
    ring: Ring,
    which: Revoke,
    text: String,
}

async fn the_target(clients: &Clients, target: TargetArgs) -> anyhow::Result<Target> {
    let named = target.ring.ring.clone();
    let ring = the_ring(clients, target.ring).await?;
    let whose = named.map_or_else(|| "the project's key ring".to_owned(), |named| format!("key ring {named}"));
    Ok(match target.version {
        Some(version) => {
            let text = format!("version {version} of {whose}");
            Target { ring, which: Revoke::Version(KeyVersion(version)), text }
        }
        None => Target { ring, which: Revoke::All, text: whose },
    })
}

/// What becomes unreadable, as far as the command line alone says it.
fn stake(version: Option<u32>) -> String {
    match version {
        Some(version) => format!("What was sealed in the era of version {version} becomes unreadable for everybody."),
        None => "Everything that was ever sealed under this ring becomes unreadable for everybody.".to_owned(),
    }
}

/// The same with the ring before one: of which project, and published when, so that a slip of the finger is seen.
fn stake_of(ring: &pb::KeyRing, version: Option<u32>) -> String {
    let whose = format!("that was published to project {} under key ring {}{}", ring.project_id, ring.id, seals(ring));
    let Some(version) = version else {
        let living = ring.versions.iter().filter(|it| it.state() != pb::KeyState::Revoked).count();
        return format!("Everything {whose}, in the eras of {living} versions, becomes unreadable for everybody.");
    };
    let mut later = ring.versions.iter().skip_while(|it| it.version != version);
    let begin = later.next().and_then(|it| wire_time(it.created.as_ref()));
    let Some(begin) = begin else { return stake(Some(version)) };
    let end = later.next().and_then(|next| wire_time(next.created.as_ref()));
    let end = end.map_or_else(|| "until now".to_owned(), |end| format!("until {end}"));
    format!("Everything {whose} in the era of version {version}, from {begin} {end}, becomes unreadable for everybody.")
}

/// What is bound to a ring, for people who are about to destroy it.
pub(super) fn seals(ring: &pb::KeyRing) -> String {
    let names = ring.bindings.iter().map(ShownBinding::from).map(|it| format!("{} {}", it.kind, it.name));
    let mut names: Vec<String> = names.collect();
    if names.is_empty() {
        return String::new();
    }
    let left_out = (names.len().saturating_sub(NAMED_MAX) as u64).saturating_add(ring.bindings_left_out);
    names.truncate(NAMED_MAX);
    let more = if left_out > 0 { format!(", and {} more", thousands(left_out)) } else { String::new() };
    format!(" ({}{more})", names.join(", "))
}

/// What a person who is asked is shown. A person who is not there gets the answer without a cluster.
async fn what_is_at_stake(clients: &Clients, target: &TargetArgs) -> anyhow::Result<String> {
    if !somebody_is_there() {
        return Ok(stake(target.version));
    }
    let ring = the_ring(clients, target.ring.clone()).await?;
    let ring = clients.admin()?.key_ring(ring).await?;
    Ok(stake_of(&ring, target.version))
}

/// What stops while a ring, or a version of it, is disabled: a sentence without its full stop.
fn stop_of(ring: &pb::KeyRing, version: Option<u32>) -> String {
    let which = version.map_or_else(String::new, |version| format!("version {version} of "));
    format!(
        "Nobody reads what was published to project {} under {which}key ring {}{}, and nobody publishes under it, until it is enabled again",
        ring.project_id,
        ring.id,
        seals(ring)
    )
}

/// The same for a person who is asked. One who is not there gets the answer without a cluster.
async fn what_stops(clients: &Clients, target: &TargetArgs) -> anyhow::Result<String> {
    if !somebody_is_there() {
        let what = target.version.map_or_else(|| "it".to_owned(), |version| format!("version {version} of it"));
        let whose = target.ring.ring.as_deref().unwrap_or("of the project");
        return Ok(format!("Key ring {whose}: nobody reads or publishes under {what} until it is enabled again"));
    }
    let ring = the_ring(clients, target.ring.clone()).await?;
    Ok(stop_of(&clients.admin()?.key_ring(ring).await?, target.version))
}

/// Prints what a change of a ring left, with a sentence for people.
fn changed(output: Output, ring: pb::KeyRing, sentence: impl FnOnce(&ShownRing) -> String) -> anyhow::Result<()> {
    let ring = ShownRing::from(ring);
    let sentence = format!("{} (log index {})", sentence(&ring), ring.log_index);
    one(output, &ring, sentence)
}

/// Runs one of the key commands.
pub(super) async fn run(command: KeyCommand) -> anyhow::Result<()> {
    match command {
        KeyCommand::Create { name, algorithm, project, client } => {
            let clients = connect(&client)?;
            let project = match id(project)? {
                Some(project) => Some(project),
                None => clients.project_id().await?,
            };
            let ring = clients.admin()?.create_key_ring(&name, project, wire_algorithm(algorithm)).await?;
            changed(client.output, ring, |ring| format!("made key ring {name}: {}", ring.id))
        }
        KeyCommand::Describe { ring, client } => describe(ring, &client).await,
        KeyCommand::List { project, client } => {
            let project = id(project)?;
            let rings = connect(&client)?.admin()?.key_rings(project).await?;
            let rings: Vec<ShownRing> = rings.into_iter().map(Into::into).collect();
            let row = |ring: &ShownRing| {
                let versions = ring.versions.iter().map(|it| format!("{} {}", it.version, it.state));
                let name = ring.name.clone().unwrap_or_default();
                let versions = versions.collect::<Vec<_>>().join("\n");
                vec![ring.id.clone(), name, ring.project.clone(), ring.state.to_owned(), versions]
            };
            list(client.output, &["ring", "name", "project", "state", "versions"], &rings, row, "no key rings")
        }
        KeyCommand::Rotate { ring, client } => {
            let clients = connect(&client)?;
            let reply = clients.admin()?.rotate_key(the_ring(&clients, ring).await?).await?;
            let rotated = Rotated { ring: reply.ring_id, version: reply.version };
            one(client.output, &rotated, format_args!("version {} of ring {} is active", rotated.version, rotated.ring))
        }
        KeyCommand::Disable { target, yes, client } => {
            let clients = connect(&client)?;
            let admin = clients.admin()?;
            if !yes {
                agree(yes, &what_stops(&clients, &target).await?)?;
            }
            let target = the_target(&clients, target).await?;
            let ring = admin.disable_key(target.ring, target.which).await?;
            changed(client.output, ring, |_| {
                format!("{} is disabled; no node seals or opens under it until it is enabled", target.text)
            })
        }
        KeyCommand::Enable { target, client } => {
            let clients = connect(&client)?;
            let target = the_target(&clients, target).await?;
            let ring = clients.admin()?.enable_key(target.ring, target.which).await?;
            changed(client.output, ring, |ring| {
                format!("{} is enabled; ring {} is {}", target.text, ring.id, ring.state)
            })
        }
        KeyCommand::Revoke(args) => revoke(args).await,
        KeyCommand::Receipts { ring, receipt, client } => receipts(ring, receipt.as_deref(), &client).await,
        KeyCommand::ScheduleRevoke { target, after, yes, client } => {
            let clients = connect(&client)?;
            let admin = clients.admin()?;
            let in_time = span(after.as_secs());
            if !yes {
                let stake = what_is_at_stake(&clients, &target).await?;
                let what = format!("In {in_time}: {stake} Until then `ensign key cancel-revoke` takes it back");
                agree(yes, &what)?;
            }
            let target = the_target(&clients, target).await?;
            let ring = admin.schedule_revoke_key(target.ring, target.which, Some(after)).await?;
            changed(client.output, ring, |_| {
                format!("{} is destroyed in {in_time} or later, unless that is cancelled", target.text)
            })
        }
        KeyCommand::CancelRevoke { target, client } => {
            let clients = connect(&client)?;
            let target = the_target(&clients, target).await?;
            let ring = clients.admin()?.cancel_revoke_key(target.ring, target.which).await?;
            changed(client.output, ring, |_| format!("{} is not destroyed: its revocation is cancelled", target.text))
        }
        KeyCommand::Set { ring, rotation, algorithm, client } => {
            let clients = connect(&client)?;
            let ring = the_ring(&clients, ring).await?;
            let ring = clients.admin()?.set_key(ring, rotation, algorithm.map(wire_algorithm)).await?;
            changed(client.output, ring, |ring| {
                let every = span(ring.rotation_seconds);
                format!("ring {} rotates every {every} and seals with {}", ring.id, ring.algorithm)
            })
        }
    }
}

async fn describe(ring: RingArg, client: &ClientArgs) -> anyhow::Result<()> {
    let clients = connect(client)?;
    let ring = clients.admin()?.key_ring(the_ring(&clients, ring).await?).await?;
    let bindings = ring.bindings.iter().map(Into::into).collect();
    let ring = ShownRing { bindings: Some(bindings), ..ring.into() };
    if client.output == Output::Json {
        return json(&ring);
    }
    let or_none = |text: &Option<String>| text.clone().unwrap_or_else(|| "none".to_owned());
    let fields = [
        ("ring", ring.id.clone()),
        ("name", ring.name.clone().unwrap_or_else(|| "the project's own".to_owned())),
        ("project", ring.project.clone()),
        ("state", ring.state.to_owned()),
        ("algorithm", ring.algorithm.to_owned()),
        ("created", or_none(&ring.created)),
        ("rotates every", span(ring.rotation_seconds)),
        ("next rotation", or_none(&ring.next_rotation)),
    ];
    record(client.output, &ring, &fields)?;
    for scheduled in &ring.scheduled {
        line(scheduled.line())?;
    }
    let bindings = ring.bindings.as_deref().unwrap_or_default();
    let binding_row = |it: &ShownBinding| vec![it.kind.to_owned(), it.name.clone(), it.id.clone()];
    list(client.output, &["seals", "name", "id"], bindings, binding_row, "nothing is bound to it")?;
    if ring.bindings_left_out > 0 {
        line(format_args!("and {} more", thousands(ring.bindings_left_out)))?;
    }
    let row = |it: &ShownVersion| {
        let or_empty = |text: &Option<String>| text.clone().unwrap_or_default();
        vec![
            it.version.to_string(),
            if it.erased { format!("{}, erased", it.state) } else { it.state.to_owned() },
            or_empty(&it.created),
            or_empty(&it.changed),
            it.kek_id.clone(),
        ]
    };
    list(client.output, &["version", "state", "made", "state since", "key id"], &ring.versions, row, "no versions")
}

async fn revoke(args: RevokeArgs) -> anyhow::Result<()> {
    let RevokeArgs { target, yes, wait: stage, timeout, receipt: file, client } = args;
    if stage == Stage::Unrecoverable {
        // Before anything is destroyed.
        return Err(NotBuilt(
            "--wait unrecoverable: destroying the root key that wrapped a key is not built yet (there is no `ensign vault rotate-root`), \
             so no revocation gets that far; nothing was revoked. --wait erased goes as far as this release can",
        )
        .into());
    }
    let clients = connect(&client)?;
    let admin = clients.admin()?;
    if !yes {
        confirm(yes, &what_is_at_stake(&clients, &target).await?)?;
    }
    let target = the_target(&clients, target).await?;
    let _reserved = file.as_deref().map(Reserved::new).transpose()?;
    let reply = admin.revoke_key(target.ring, target.which).await?;
    if let Some(file) = &file {
        save(file, [reply.receipt.as_str()])?;
    }
    let waited = reply.waited.and_then(|it| Duration::try_from(it).ok()).unwrap_or_default();
    let mut revoked = Revoked {
        ring: reply.ring_id,
        versions: reply.versions,
        stage: "revoked",
        receipt: reply.receipt,
        erased_receipt: None,
        missing: Vec::new(),
        waited_seconds: waited.as_secs_f64(),
    };
    if stage == Stage::Erased {
        let ring: RingId = revoked.ring.parse()?;
        let erased = erased(&clients, ring, &revoked.versions, timeout).await?;
        if let Some(file) = &file {
            save(file, [revoked.receipt.as_str(), erased.receipt.as_str()])?;
        }
        (revoked.stage, revoked.missing) = ("erased", erased.missing);
        revoked.erased_receipt = (!erased.receipt.is_empty()).then_some(erased.receipt);
    }
    let versions: Vec<_> = revoked.versions.iter().map(ToString::to_string).collect();
    let mut sentence =
        format!("revoked version {} of ring {}; no node opens it any more", versions.join(", "), revoked.ring);
    if stage == Stage::Erased {
        sentence += ", and its key is in no file of the vault";
    }
    if !revoked.missing.is_empty() {
        let nodes: Vec<_> = revoked.missing.iter().map(ToString::to_string).collect();
        let _ = write!(
            sentence,
            " on the nodes of the cluster. Nodes {} had a copy, were removed, and never said that it is gone: destroy their disks",
            nodes.join(", ")
        );
    }
    let receipt = file.map_or_else(|| revoked.receipt.clone(), |file| file.display().to_string());
    if !receipt.is_empty() {
        let _ = write!(sentence, "\nreceipt: {receipt}");
    }
    one(client.output, &revoked, sentence)?;
    if revoked.missing.is_empty() { Ok(()) } else { Err(CopiesMissing.into()) }
}

/// Waits until versions are erased, all of a ring where there are none, and returns the receipt of it.
async fn erased(
    clients: &Clients,
    ring: RingId,
    versions: &[u32],
    limit: Option<Duration>,
) -> anyhow::Result<pb::KeyReceipt> {
    let look = async || {
        let known = clients.admin()?.key_receipts(Ring::Id(ring)).await?;
        if let Some(done) = erasure_of(&known, versions) {
            return Ok(Progress::Over(done));
        }
        let missing = missing(&known);
        Ok(Progress::On(if missing.is_empty() {
            "ensign: waiting for the vault's leader to hear from its members".to_owned()
        } else {
            format!("ensign: waiting for these nodes to erase it from their vault's file: {missing}")
        }))
    };
    wait("it is revoked; the erasure".to_owned(), limit, look).await
}

/// What tells that these versions are erased. Without a version everything of the ring has to be, since an order to revoke all of it
/// names those alone that were there still.
fn erasure_of(known: &pb::ListKeyReceiptsReply, versions: &[u32]) -> Option<pb::KeyReceipt> {
    let mut erased = known.receipts.iter().filter(|it| it.kind() == pb::KeyReceiptKind::Erased);
    if versions.is_empty() {
        return (known.erase_through == 0).then(|| erased.next_back().cloned().unwrap_or_default());
    }
    erased.rfind(|it| versions.iter().all(|version| it.versions.contains(version))).cloned()
}

/// The nodes that have still to erase something of a ring.
fn missing(known: &pb::ListKeyReceiptsReply) -> String {
    let open = known.erasers.iter().filter(|it| it.erased_through < known.erase_through);
    open.map(|it| it.node_id.to_string()).collect::<Vec<_>>().join(", ")
}

async fn receipts(ring: RingArg, file: Option<&Path>, client: &ClientArgs) -> anyhow::Result<()> {
    let clients = connect(client)?;
    let known = clients.admin()?.key_receipts(the_ring(&clients, ring).await?).await?;
    let shown: Vec<ShownReceipt> = known
        .receipts
        .iter()
        .map(|it| ShownReceipt {
            kind: match it.kind() {
                pb::KeyReceiptKind::Unspecified => "unknown",
                pb::KeyReceiptKind::Revoked => "revoked",
                pb::KeyReceiptKind::Disabled => "disabled",
                pb::KeyReceiptKind::Erased => "erased",
            },
            versions: it.versions.clone(),
            time: wire_time(it.time.as_ref()),
            log_index: it.index,
            receipt: it.receipt.clone(),
        })
        .collect();
    if let Some(file) = file {
        save(file, shown.iter().map(|it| it.receipt.as_str()))?;
    }
    let row = |it: &ShownReceipt| {
        let versions: Vec<_> = it.versions.iter().map(ToString::to_string).collect();
        let signed = if it.receipt.is_empty() { "not signed" } else { "signed" };
        let time = it.time.clone().unwrap_or_default();
        vec![it.kind.to_owned(), versions.join(", "), time, it.log_index.to_string(), signed.to_owned()]
    };
    list(client.output, &["what", "versions", "time", "log index", "receipt"], &shown, row, "no receipts")?;
    if client.output == Output::Human && known.erase_through != 0 {
        line(format_args!("still to be erased from the vault's file on nodes: {}", missing(&known)))?;
    }
    Ok(())
}

/// Writes receipts, one a line; what is not signed is left out.
fn save<'a>(file: &Path, receipts: impl IntoIterator<Item = &'a str>) -> anyhow::Result<()> {
    let mut text = String::new();
    for receipt in receipts.into_iter().filter(|receipt| !receipt.is_empty()) {
        text.push_str(receipt);
        text.push('\n');
    }
    std::fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))
}

/// A file that receipts will go to, made before there are any: whoever destroys a key hears before that if its receipt cannot be kept.
/// One that nothing was written to goes again.
#[derive(Debug)]
struct Reserved(PathBuf);

impl Reserved {
    fn new(file: &Path) -> anyhow::Result<Self> {
        let made = std::fs::OpenOptions::new().write(true).create_new(true).open(file);
        let told = match made {
            Ok(_) => return Ok(Self(file.to_owned())),
            // As a command leaves it that was cut off.
            Err(_) if is_empty(file) => return Ok(Self(file.to_owned())),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => format!(
                "{} exists already and is not overwritten; nothing was revoked. Name a file that does not exist yet; `ensign key receipts` \
                 has the receipts of what was revoked before",
                file.display()
            ),
            Err(error) => format!("cannot write {}: {error}; nothing was revoked", file.display()),
        };
        Err(UsageError(told).into())
    }
}

fn is_empty(file: &Path) -> bool {
    std::fs::metadata(file).is_ok_and(|it| it.is_file() && it.len() == 0)
}

impl Drop for Reserved {
    fn drop(&mut self) {
        if is_empty(&self.0) {
            let _ = std::fs::remove_file(&self.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_receipt_has_its_file_before_a_key_is_destroyed_and_no_other_is_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("revoked.jws");
        drop(Reserved::new(&file).unwrap());
        assert!(!file.exists(), "a revocation that failed leaves no empty file");
        let reserved = Reserved::new(&file).unwrap();
        save(&file, ["receipt"]).unwrap();
        drop(reserved);
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "receipt\n");
        let told = Reserved::new(&file).unwrap_err().to_string();
        assert!(told.contains("exists already") && told.contains("nothing was revoked"), "{told}");
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "receipt\n");
        let told = Reserved::new(&folder.path().join("none/revoked.jws")).unwrap_err().to_string();
        assert!(told.starts_with("cannot write") && told.ends_with("nothing was revoked"), "{told}");
    }

    #[test]
    fn disabling_names_the_project_the_ring_and_what_it_seals() {
        let binding = |kind: pb::ring_binding::Kind, name: &str| pb::RingBinding {
            kind: kind.into(),
            id: "I".to_owned(),
            name: name.to_owned(),
        };
        let bindings = vec![binding(pb::ring_binding::Kind::Topic, "pay")];
        let ring = pb::KeyRing { id: "R".to_owned(), project_id: "P".to_owned(), bindings, ..Default::default() };
        let told = "Nobody reads what was published to project P under key ring R (topic pay), and nobody publishes under it, until it \
                    is enabled again";
        assert_eq!(stop_of(&ring, None), told);
        assert!(stop_of(&ring, Some(3)).contains("under version 3 of key ring R (topic pay)"));
    }

    #[test]
    fn spans_are_days_where_they_come_out_even() {
        assert_eq!(span(90 * 86_400), "90d");
        assert_eq!(span(3_600), "1h");
        assert_eq!(span(86_401), "1day 1s");
    }

    #[test]
    fn revoking_names_what_becomes_unreadable_and_when_it_was_published() {
        let time = |seconds| Some(prost_types::Timestamp { seconds, nanos: 0 });
        let version = |version, seconds| pb::KeyRingVersion { version, created: time(seconds), ..Default::default() };
        let ring = pb::KeyRing {
            id: "R".to_owned(),
            project_id: "P".to_owned(),
            versions: vec![version(1, 1_700_000_000), version(2, 1_710_000_000)],
            ..Default::default()
        };
        let first = "Everything that was published to project P under key ring R in the era of version 1, from \
                     2023-11-14T22:13:20.000Z until 2024-03-09T16:00:00.000Z, becomes unreadable for everybody.";
        assert_eq!(stake_of(&ring, Some(1)), first);
        assert!(stake_of(&ring, Some(2)).contains("from 2024-03-09T16:00:00.000Z until now"));
        assert!(stake_of(&ring, None).contains("in the eras of 2 versions"));
        assert_eq!(stake_of(&ring, Some(7)), stake(Some(7)), "what is not there is refused by the cluster");
    }

    #[test]
    fn an_older_erasure_does_not_speak_for_what_is_still_to_be_erased() {
        let receipt = |kind: pb::KeyReceiptKind, version, index| pb::KeyReceipt {
            kind: kind.into(),
            versions: vec![version],
            index,
            ..Default::default()
        };
        let (revoked, erased) = (pb::KeyReceiptKind::Revoked, pb::KeyReceiptKind::Erased);
        let mut known = pb::ListKeyReceiptsReply {
            receipts: vec![receipt(revoked, 1, 5), receipt(erased, 1, 6), receipt(revoked, 2, 8)],
            erase_through: 8,
            ..Default::default()
        };
        assert_eq!(erasure_of(&known, &[1]).map(|it| it.index), Some(6));
        assert_eq!(erasure_of(&known, &[2]), None);
        assert_eq!(erasure_of(&known, &[]), None, "version 2 is still in a file");
        known.receipts.push(receipt(erased, 2, 9));
        known.erase_through = 0;
        assert_eq!(erasure_of(&known, &[2]).map(|it| it.index), Some(9));
        assert_eq!(erasure_of(&known, &[]).map(|it| it.index), Some(9));
        known.receipts.clear();
        assert_eq!(erasure_of(&known, &[]), Some(pb::KeyReceipt::default()), "a ring of which nothing was ever sealed");
    }

    #[test]
    fn a_revocation_to_come_says_what_when_and_by_whom() {
        let all = ShownScheduled {
            version: None,
            ordered: None,
            by: "apikey:X".to_owned(),
            after_seconds: 120,
            left_seconds: 60,
        };
        assert_eq!(all.line(), "all of it is destroyed in 1m or later, by order of apikey:X");
    }
}
