//! `ensign topic create` for many topics.

use std::collections::HashSet;
use std::io::{IsTerminal as _, Read as _};
use std::path::Path;

use anyhow::Context as _;
use ensign_client::admin_api::CreatedTopic;
use ensign_client::admin_api::created_topic::Outcome;
use ensign_client::{CallError, Client, TOPICS_BATCH_BYTES_MAX, TOPICS_BATCH_MAX};
use ensign_proto::TopicName;
use indicatif::ProgressBar;
use serde::Serialize;

use super::args::{ClientArgs, Output};
use super::connect::connect;
use super::exit::UsageError;
use super::output::{json, line, note, thousands};

/// What became of a name, as it is printed.
#[derive(Debug, Serialize)]
struct Shown {
    name: String,
    outcome: &'static str,
    id: Option<String>,
    message: Option<String>,
}

impl From<&CreatedTopic> for Shown {
    fn from(topic: &CreatedTopic) -> Self {
        let some = |text: &String| (!text.is_empty()).then(|| text.clone());
        Self {
            name: topic.name.clone(),
            outcome: word(topic.outcome()),
            id: some(&topic.id),
            message: some(&topic.message),
        }
    }
}

fn word(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Created => "created",
        Outcome::Exists => "exists",
        Outcome::Refused => "refused",
        Outcome::Unavailable => "unavailable",
        Outcome::Unknown | Outcome::Unspecified => "unknown",
    }
}

/// Creates topics of these names and of those in the file.
pub(super) async fn create(
    mut names: Vec<String>,
    from: Option<&Path>,
    if_missing: bool,
    ring: Option<&str>,
    client: &ClientArgs,
) -> anyhow::Result<()> {
    if let Some(file) = from {
        names.extend(read(file)?);
    }
    check(&names)?;
    let project = connect(client)?.project;
    let total = names.len();
    let progress = Progress::new(total);
    let mut topics = Vec::with_capacity(total);
    for batch in batches(names) {
        match create_batch(&project, &batch, ring).await {
            Ok(made) => topics.extend(made),
            // What was made before this is told all the same.
            Err(error) if topics.is_empty() => return Err(error.into()),
            Err(error) => {
                progress.finish();
                print(client.output, &topics, if_missing)?;
                let left = total - topics.len();
                return Err(error)
                    .context(format!("{} topics are not made, or not known to be", thousands(left as u64)));
            }
        }
        progress.at(topics.len());
    }
    progress.finish();
    print(client.output, &topics, if_missing)?;
    verdict(&topics, if_missing).map_or(Ok(()), |error| Err(error.into()))
}

/// One batch. After an answer that got lost it is asked again once: what had been made is then found to exist.
async fn create_batch(client: &Client, names: &[String], ring: Option<&str>) -> Result<Vec<CreatedTopic>, CallError> {
    match client.create_topics_under(names, ring).await {
        Err(CallError::OutcomeUnknown { .. }) => client.create_topics_under(names, ring).await,
        settled => settled,
    }
}

/// The names in a file, one a line.
fn read(file: &Path) -> anyhow::Result<Vec<String>> {
    let mut text = String::new();
    if file == Path::new("-") {
        std::io::stdin().read_to_string(&mut text).context("cannot read names from standard input")?;
    } else {
        text = std::fs::read_to_string(file)
            .map_err(|error| UsageError(format!("cannot read names from {}: {error}", file.display())))?;
    }
    let lines = text.lines().map(|line| line.split('#').next().unwrap_or_default().trim());
    Ok(lines.filter(|line| !line.is_empty()).map(str::to_owned).collect())
}

/// Refuses what no server would take before anything is made.
fn check(names: &[String]) -> Result<(), UsageError> {
    if names.is_empty() {
        return Err(UsageError("no topic is named: the file has no names in it".to_owned()));
    }
    let mut seen = HashSet::new();
    for name in names {
        name.parse::<TopicName>().map_err(|error| UsageError(format!("{name:?}: {error}; nothing was made")))?;
        if !seen.insert(name) {
            return Err(UsageError(format!("{name} is named twice; nothing was made")));
        }
    }
    Ok(())
}

/// The names in order, cut into what one call takes.
fn batches(names: Vec<String>) -> Vec<Vec<String>> {
    let mut batches: Vec<Vec<String>> = Vec::new();
    let mut bytes = 0;
    for name in names {
        bytes += name.len() + 4;
        match batches.last_mut() {
            Some(batch) if batch.len() < TOPICS_BATCH_MAX && bytes <= TOPICS_BATCH_BYTES_MAX => batch.push(name),
            _ => {
                bytes = name.len() + 4;
                batches.push(vec![name]);
            }
        }
    }
    batches
}

fn print(output: Output, topics: &[CreatedTopic], if_missing: bool) -> anyhow::Result<()> {
    if output == Output::Json {
        return json(&topics.iter().map(Shown::from).collect::<Vec<_>>());
    }
    let count = |outcome| topics.iter().filter(|topic| topic.outcome() == outcome).count() as u64;
    for topic in topics {
        match topic.outcome() {
            Outcome::Created => {}
            Outcome::Exists if if_missing => {}
            Outcome::Exists => line(format_args!("{}: exists already ({})", topic.name, topic.id))?,
            outcome => line(format_args!("{}: {}: {}", topic.name, word(outcome), topic.message))?,
        }
    }
    let existing = match count(Outcome::Exists) {
        0 => String::new(),
        some => format!(", {} existed already", thousands(some)),
    };
    let (made, of) = (thousands(count(Outcome::Created)), thousands(topics.len() as u64));
    line(format_args!("created {made} of {of} topics{existing}"))
}

/// The error to end with: of the names that are not there, the one that needs the most care.
fn verdict(topics: &[CreatedTopic], if_missing: bool) -> Option<CallError> {
    let count = |outcome| topics.iter().filter(|topic| topic.outcome() == outcome).count() as u64;
    let (unknown, unavailable) = (count(Outcome::Unknown) + count(Outcome::Unspecified), count(Outcome::Unavailable));
    let (refused, existing) = (count(Outcome::Refused), count(Outcome::Exists));
    if unknown > 0 {
        let message = format!("{} topics may have been made: run it again with --if-missing", thousands(unknown));
        Some(CallError::OutcomeUnknown { message })
    } else if unavailable > 0 {
        let message = format!("{} topics were not made: run it again with --if-missing", thousands(unavailable));
        Some(CallError::Unavailable { message })
    } else if refused > 0 {
        Some(CallError::Precondition { message: format!("{} topics were refused", thousands(refused)) })
    } else if existing > 0 && !if_missing {
        Some(CallError::AlreadyExists { message: format!("{} topics exist already", thousands(existing)) })
    } else {
        None
    }
}

/// How far it is: a bar on a terminal, a line a batch elsewhere, nothing when there is one batch.
struct Progress {
    bar: Option<ProgressBar>,
    total: usize,
}

impl Progress {
    fn new(total: usize) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| ProgressBar::new(total as u64));
        Self { bar, total }
    }

    fn at(&self, done: usize) {
        match &self.bar {
            Some(bar) => bar.set_position(done as u64),
            None if self.total > TOPICS_BATCH_MAX => {
                note(format_args!("{} of {} topics", thousands(done as u64), thousands(self.total as u64)));
            }
            None => {}
        }
    }

    fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn topic(name: &str, outcome: Outcome) -> CreatedTopic {
        CreatedTopic { name: name.to_owned(), outcome: outcome.into(), ..CreatedTopic::default() }
    }

    #[test]
    fn names_are_cut_by_count_and_by_bytes_and_keep_their_order() {
        let names: Vec<String> = (0..600).map(|n| format!("t{n}")).collect();
        let cut = batches(names.clone());
        assert_eq!(cut.iter().map(Vec::len).collect::<Vec<_>>(), [256, 256, 88]);
        assert_eq!(cut.concat(), names);
        let long: Vec<String> = (0..250).map(|n| format!("t{n}-{}", "x".repeat(500))).collect();
        let cut = batches(long.clone());
        assert!(cut.len() > 1 && cut.iter().flatten().count() == 250);
        assert!(
            cut.iter().all(|batch| batch.iter().map(|name| name.len() + 4).sum::<usize>() <= TOPICS_BATCH_BYTES_MAX)
        );
        assert_eq!(cut.concat(), long);
    }

    #[test]
    fn a_bad_list_is_refused_before_anything_is_made() {
        let list = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        assert!(check(&list(&["a", "b"])).is_ok());
        let message = |names: &[&str]| check(&list(names)).unwrap_err().to_string();
        assert_eq!(message(&["a", "b", "a"]), "a is named twice; nothing was made");
        assert!(message(&["a", "not a name"]).starts_with("\"not a name\": "), "{}", message(&["a", "not a name"]));
        assert!(message(&[]).contains("no topic is named"));
    }

    #[test]
    fn the_exit_tells_of_what_needs_the_most_care() {
        use Outcome::{Created, Exists, Refused, Unavailable, Unknown};

        use crate::cli::{Exit, exit_code};
        let of = |outcomes: &[Outcome], if_missing| {
            let topics: Vec<_> = outcomes.iter().map(|outcome| topic("t", *outcome)).collect();
            verdict(&topics, if_missing).map(|error| exit_code(&error.into()))
        };
        assert_eq!(of(&[Created, Created], false), None);
        assert_eq!(of(&[Created, Exists], false), Some(Exit::Refused));
        assert_eq!(of(&[Created, Exists], true), None);
        assert_eq!(of(&[Refused, Exists], true), Some(Exit::Refused));
        assert_eq!(of(&[Refused, Unavailable], true), Some(Exit::Unavailable));
        assert_eq!(of(&[Refused, Unavailable, Unknown], true), Some(Exit::OutcomeUnknown));
    }
}
