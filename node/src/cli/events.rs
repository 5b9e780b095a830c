//! `ensign publish`, `subscribe` and `query`.

use std::borrow::Cow;
use std::collections::{HashMap, VecDeque};
use std::io::IsTerminal as _;
use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use ensign_client::{
    CallError, Consistency, DecodeEventError, Delivery, Event, EventSchema, Mime, PublishError, Publisher,
    PublisherOptions, Receipt, Start, SubscribeError, SubscriberOptions,
};
use ensign_proto::{Offset, Rlid};
use ensign_raft::env::{Clock as _, SystemClock};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use serde_json::json;
use tokio::io::{AsyncBufRead, AsyncBufReadExt as _, AsyncReadExt as _, BufReader};

use super::args::{ConsistencyArg, Output, PublishArgs, QueryArgs, SubscribeArgs};
use super::connect::connect;
use super::exit::{NO_TOPIC_IN_QUERY, NO_TOPICS, UsageError};
use super::output::{line, note, one, thousands, time};
use super::until_interrupted;

/// Media types and their numbers, from the wire's table; the first of a number is how it is printed.
const MEDIA_TYPES: &[(&str, Mime)] = &[
    ("application/octet-stream", Mime::Unspecified),
    ("text/plain", Mime::TextPlain),
    ("text/csv", Mime::TextCsv),
    ("text/html", Mime::TextHtml),
    ("text/calendar", Mime::TextCalendar),
    ("application/json", Mime::ApplicationJson),
    ("application/ld+json", Mime::ApplicationJsonLd),
    ("application/jsonlines", Mime::ApplicationJsonLines),
    ("application/ubjson", Mime::ApplicationUbjson),
    ("application/bson", Mime::ApplicationBson),
    ("application/xml", Mime::ApplicationXml),
    ("application/atom+xml", Mime::ApplicationAtom),
    ("application/msgpack", Mime::ApplicationMsgpack),
    ("application/parquet", Mime::ApplicationParquet),
    ("application/avro", Mime::ApplicationAvro),
    ("application/protobuf", Mime::ApplicationProtobuf),
    ("application/pdf", Mime::ApplicationPdf),
    ("application/java-archive", Mime::ApplicationJavaArchive),
    ("application/python-pickle", Mime::ApplicationPythonPickle),
];

/// How many bytes an input line may have: what no server would take is refused before it fills the memory.
const LINE_BYTES_MAX: usize = 16 << 20;

/// The media type of a number; one that we do not know is printed as `mimetype/NUMBER`.
pub(super) fn media_type(number: i32) -> Cow<'static, str> {
    let user = Mime::UserSpecified0 as i32;
    match MEDIA_TYPES.iter().find(|(_, mime)| *mime as i32 == number) {
        Some((name, _)) => Cow::Borrowed(name),
        None if (user..user + 10).contains(&number) => Cow::Owned(format!("user/format-{}", number - user)),
        None => Cow::Owned(format!("mimetype/{number}")),
    }
}

fn parse_media_type(text: &str) -> Result<i32, UsageError> {
    let plain = text.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    if let Some((_, mime)) = MEDIA_TYPES.iter().find(|(name, _)| *name == plain) {
        return Ok(*mime as i32);
    }
    if let Some(number) =
        plain.strip_prefix("user/format-").and_then(|it| it.parse().ok()).filter(|it| (0..10).contains(it))
    {
        return Ok(Mime::UserSpecified0 as i32 + number);
    }
    let known: Vec<_> = MEDIA_TYPES.iter().map(|(name, _)| *name).collect();
    Err(UsageError(format!(
        "unknown media type {text:?}; known are {} and user/format-0 to user/format-9",
        known.join(", ")
    )))
}

/// A schema as `name v1.2.3`.
pub(super) fn schema_name(schema: &EventSchema) -> String {
    // What publishers that name none are counted under.
    if schema.name.is_empty() || schema.name == "Unspecified" {
        return String::new();
    }
    format!("{} v{}.{}.{}", schema.name, schema.major_version, schema.minor_version, schema.patch_version)
}

#[derive(Serialize)]
struct Published {
    topic: String,
    events: u64,
    bytes: u64,
    seconds: f64,
}

/// How long the outcome of what was on its way is waited for after a failure.
const REST: Duration = Duration::from_secs(5);

/// Says which topic is not there, and what to do, where the cluster says only that there is none.
fn named(topic: &str, error: anyhow::Error) -> anyhow::Error {
    let stream = match (error.downcast_ref(), error.downcast_ref()) {
        (Some(PublishError::Stream(cause)), _) | (_, Some(SubscribeError::Stream(cause))) => Some(cause),
        _ => error.downcast_ref::<CallError>(),
    };
    let message = match stream {
        Some(CallError::Precondition { message }) if message == NO_TOPICS => format!(
            "there is no topic {topic:?} in this project, or it is being destroyed: `ensign topic list` shows those that there are, `ensign topic \
             create {topic}` makes it"
        ),
        Some(CallError::Invalid { message }) if message == NO_TOPIC_IN_QUERY => {
            "the query names a topic that is not in this project: `ensign topic list` shows those that are".to_owned()
        }
        _ => return error,
    };
    CallError::NotFound { message }.into()
}

/// Runs `ensign publish`.
pub(super) async fn publish(args: PublishArgs) -> anyhow::Result<()> {
    let topic = args.topic.clone();
    publish_to(args).await.map_err(|error| named(&topic, error))
}

async fn publish_to(args: PublishArgs) -> anyhow::Result<()> {
    let mimetype = parse_media_type(&args.mimetype)?;
    let metadata = args.key_value.iter().map(|pair| key_value(pair)).collect::<Result<HashMap<_, _>, _>>()?;
    let mut input = open(&args.file).await?;
    let clients = connect(&args.client)?;
    let window = args.window as usize;
    let options = PublisherOptions { window_events: window, ..PublisherOptions::default() };
    let publisher = clients.project.publisher(&args.topic, options).await?;
    let bar = progress(args.client.output, &args.file);
    let started = tokio::time::Instant::now();
    let mut feed = Feed { publisher, receipts: VecDeque::new(), window, bar, events: 0, bytes: 0 };
    let work = async {
        if args.whole {
            let mut data = Vec::new();
            input.take(LINE_BYTES_MAX as u64).read_to_end(&mut data).await?;
            let event = Event { mimetype, metadata: metadata.clone(), ..Event::new(data) };
            feed.send(event, None).await?;
        } else {
            let mut number = 0_u64;
            loop {
                let next = {
                    let mut next = std::pin::pin!(next_line(&mut input, &mut number));
                    // Whoever writes the lines may pause: what becomes of those before is not to wait for the next one.
                    loop {
                        tokio::select! {
                            biased;
                            next = &mut next => break next?,
                            settled = feed.settle_one(), if feed.waits() => settled?,
                        }
                    }
                };
                let Some(data) = next else { break };
                let event = Event { mimetype, metadata: metadata.clone(), ..Event::new(data) };
                feed.send(event, Some(number)).await?;
            }
        }
        feed.settle(0).await
    };
    let outcome = until_interrupted(work).await;
    feed.bar.finish_and_clear();
    if outcome.is_err() {
        // What was on its way is stored, too, or may be.
        let unknown = feed.settle_rest().await;
        note(format_args!("{} events are stored", thousands(feed.events)));
        if unknown > 0 {
            note(format_args!("of {} more it is not known whether they are", thousands(unknown)));
        }
    }
    outcome?;
    feed.publisher.close().await;
    let published = Published {
        topic: args.topic,
        events: feed.events,
        bytes: feed.bytes,
        seconds: started.elapsed().as_secs_f64(),
    };
    let plural = if published.events == 1 { "" } else { "s" };
    one(
        args.client.output,
        &published,
        format_args!("stored {} event{plural} in {}", thousands(published.events), published.topic),
    )
}

/// An event on its way.
struct Sent {
    receipt: Receipt,
    size: u64,
    /// Which line of the input it is; absent for the whole of it.
    line: Option<u64>,
}

/// Says of which line it is.
fn of_line<T>(line: Option<u64>, outcome: Result<T, PublishError>) -> anyhow::Result<T> {
    match line {
        Some(line) => outcome.with_context(|| format!("line {line}")),
        None => Ok(outcome?),
    }
}

/// Events on their way.
struct Feed {
    publisher: Publisher,
    receipts: VecDeque<Sent>,
    window: usize,
    bar: ProgressBar,
    events: u64,
    bytes: u64,
}

impl Feed {
    async fn send(&mut self, event: Event, line: Option<u64>) -> anyhow::Result<()> {
        let size = event.data.len() as u64;
        let receipt = of_line(line, self.publisher.publish(event).await)?;
        self.receipts.push_back(Sent { receipt, size, line });
        if self.receipts.len() >= self.window {
            self.settle(self.window / 2).await?;
        }
        Ok(())
    }

    /// After a failure: counts what is stored all the same, and returns of how many events that is not known.
    async fn settle_rest(&mut self) -> u64 {
        let deadline = tokio::time::Instant::now() + REST;
        let mut unknown = 0;
        for Sent { receipt, size, .. } in self.receipts.drain(..) {
            match tokio::time::timeout_at(deadline, receipt).await {
                Ok(Ok(_)) => {
                    self.events += 1;
                    self.bytes += size;
                }
                Ok(Err(PublishError::OutcomeUnknown { .. })) | Err(_) => unknown += 1,
                Ok(Err(_)) => {}
            }
        }
        unknown
    }

    /// Waits until at most `most` events are without an answer.
    async fn settle(&mut self, most: usize) -> anyhow::Result<()> {
        while self.receipts.len() > most {
            self.settle_one().await?;
        }
        Ok(())
    }

    fn waits(&self) -> bool {
        !self.receipts.is_empty()
    }

    /// Waits for the oldest event without an answer. Cancel safe.
    async fn settle_one(&mut self) -> anyhow::Result<()> {
        let Some(Sent { receipt, size, line }) = self.receipts.front_mut() else { return Ok(()) };
        let (size, line) = (*size, *line);
        // It leaves the queue only with its outcome: an interruption must not lose it.
        let outcome = receipt.await;
        self.receipts.pop_front();
        of_line(line, outcome)?;
        self.events += 1;
        self.bytes += size;
        self.bar.inc(1);
        Ok(())
    }
}

fn key_value(pair: &str) -> Result<(String, String), UsageError> {
    match pair.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err(UsageError(format!("{pair:?} is not KEY=VALUE"))),
    }
}

type Input = Box<dyn AsyncBufRead + Unpin + Send>;

async fn open(path: &Path) -> anyhow::Result<Input> {
    if path == Path::new("-") {
        if std::io::stdin().is_terminal() {
            note("reading events from the terminal, one a line; end with Ctrl-D");
        }
        return Ok(Box::new(BufReader::new(tokio::io::stdin())));
    }
    let file = tokio::fs::File::open(path)
        .await
        .map_err(|error| UsageError(format!("cannot read {}: {error}", path.display())))?;
    Ok(Box::new(BufReader::with_capacity(256 << 10, file)))
}

/// The next line that is not empty, without its end.
async fn next_line(input: &mut Input, number: &mut u64) -> anyhow::Result<Option<Vec<u8>>> {
    loop {
        let mut data = Vec::new();
        let mut limited = input.take(LINE_BYTES_MAX as u64);
        if limited.read_until(b'\n', &mut data).await? == 0 {
            return Ok(None);
        }
        *number += 1;
        let ended = data.last() == Some(&b'\n');
        if !ended && data.len() == LINE_BYTES_MAX {
            return Err(UsageError(format!(
                "line {number} has more than {LINE_BYTES_MAX} bytes; --whole sends a file as one event"
            ))
            .into());
        }
        while data.last().is_some_and(|byte| matches!(byte, b'\n' | b'\r')) {
            data.pop();
        }
        if !data.is_empty() {
            return Ok(Some(data));
        }
    }
}

fn progress(output: Output, file: &Path) -> ProgressBar {
    let typing = file == Path::new("-") && std::io::stdin().is_terminal();
    if output == Output::Json || typing || !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new_spinner();
    if let Ok(style) = ProgressStyle::with_template("{spinner} {human_pos} events stored, {per_sec}, {elapsed}") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

/// Runs `ensign subscribe`.
pub(super) async fn subscribe(args: SubscribeArgs) -> anyhow::Result<()> {
    let topic = args.topic.clone();
    subscribe_to(args).await.map_err(|error| named(&topic, error))
}

async fn subscribe_to(args: SubscribeArgs) -> anyhow::Result<()> {
    let start = parse_start(&args.from, now())?;
    let output = args.client.output;
    let clients = connect(&args.client)?;
    if args.count == Some(0) {
        return Ok(());
    }
    let options = SubscriberOptions { consistency: consistency(args.consistency), ..SubscriberOptions::default() };
    let work = async {
        let mut subscriber = clients.project.subscribe(&args.topic, start, options).await?;
        if output == Output::Human {
            note(format_args!("subscribed to {}; Ctrl-C ends it", args.topic));
        }
        let mut left = args.count;
        while left != Some(0) {
            let delivery = match subscriber.next().await {
                Err(SubscribeError::Unavailable(error)) => {
                    note(format_args!("ensign: {error}; still trying"));
                    continue;
                }
                delivery => delivery?,
            };
            show(output, &delivery)?;
            left = left.map(|left| left - 1);
        }
        Ok(())
    };
    match until_interrupted(work).await {
        // The usual end of a subscription that has no count.
        Err(error) if error.is::<super::Interrupted>() && args.count.is_none() => Ok(()),
        outcome => outcome,
    }
}

/// Runs `ensign query`.
pub(super) async fn query(args: QueryArgs) -> anyhow::Result<()> {
    let output = args.client.output;
    let clients = connect(&args.client)?;
    let work = async {
        let mut results = clients.project.query_with(&args.query, consistency(args.consistency)).await?;
        let mut rows = 0_u64;
        while let Some(delivery) = results.next().await? {
            show(output, &delivery)?;
            rows += 1;
        }
        if output == Output::Human && rows == 0 {
            note("no events");
        }
        Ok(())
    };
    until_interrupted(work).await.map_err(|error| named("", error))
}

fn consistency(asked: Option<ConsistencyArg>) -> Consistency {
    match asked {
        None => Consistency::Default,
        Some(ConsistencyArg::Latest) => Consistency::Latest,
        Some(ConsistencyArg::Local) => Consistency::Local,
    }
}

fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_nanos(SystemClock.wall().0)
}

fn parse_start(text: &str, now: SystemTime) -> Result<Start, UsageError> {
    match text.to_ascii_lowercase().as_str() {
        "latest" | "live" => return Ok(Start::Live),
        "earliest" => return Ok(Start::Earliest),
        _ => {}
    }
    if let Ok(offset) = text.parse::<u64>() {
        if offset == 0 {
            return Err(UsageError("offsets begin with 1".to_owned()));
        }
        return Ok(Start::Offset(Offset(offset)));
    }
    if let Ok(time) = text.parse::<jiff::Timestamp>() {
        return Ok(Start::Time(time.into()));
    }
    if let Some(time) = humantime::parse_duration(text).ok().and_then(|ago| now.checked_sub(ago)) {
        return Ok(Start::Time(time));
    }
    if let Ok(id) = text.parse::<Rlid>() {
        return Ok(Start::After(id));
    }
    Err(UsageError(format!(
        "{text:?} is no place to begin: latest, earliest, an offset, a time such as 2026-01-31T12:00:00Z, 15m, or an event id"
    )))
}

/// An event as JSON: `data` is the value itself for JSON and a string for text. What is neither is base64 in `data_base64`,
/// and what claims to be JSON and is not goes as it is in `data_text`.
#[derive(Serialize)]
struct Shown<'a> {
    offset: u64,
    id: String,
    committed: Option<String>,
    created: Option<String>,
    mimetype: Cow<'static, str>,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    schema: Option<String>,
    #[serde(skip_serializing_if = "HashMap::is_empty")]
    metadata: &'a HashMap<String, String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data_text: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data_base64: Option<String>,
}

fn show(output: Output, delivery: &Delivery) -> anyhow::Result<()> {
    let event = match delivery.event() {
        Ok(event) => event,
        // Somebody published what no event is; those behind it are none the worse for it.
        Err(error) => return show_undecodable(output, delivery, &error),
    };
    match output {
        Output::Json => line(as_json(delivery, &event)?),
        Output::Human => {
            let committed = delivery.committed.map(time).unwrap_or_default();
            let kind = media_type(event.mimetype);
            let data = match std::str::from_utf8(&event.data) {
                // Control characters could take the terminal over.
                Ok(text) if !text.chars().any(|c| c.is_control() && !matches!(c, '\n' | '\t')) => Cow::Borrowed(text),
                _ => Cow::Owned(format!("({} bytes)", thousands(event.data.len() as u64))),
            };
            line(format_args!("{:>8}  {committed}  {kind}  {data}", delivery.offset.0))
        }
    }
}

fn show_undecodable(output: Output, delivery: &Delivery, error: &DecodeEventError) -> anyhow::Result<()> {
    let (offset, size) = (delivery.offset.0, thousands(delivery.bytes.len() as u64));
    match output {
        Output::Json => {
            let base64 = BASE64.encode(&delivery.bytes);
            line(
                json!({ "offset": offset, "id": delivery.id.to_string(), "undecodable": base64, "error": error.to_string() }),
            )
        }
        Output::Human => line(format_args!("{offset:>8}  (undecodable, {size} bytes: {error})")),
    }
}

fn as_json(delivery: &Delivery, event: &Event) -> anyhow::Result<String> {
    let text = std::str::from_utf8(&event.data).ok();
    let is_json = matches!(media_type(event.mimetype).as_ref(), "application/json" | "application/ld+json");
    // Verbatim, so that a number keeps every digit. Within JSON, line ends are only between tokens.
    let value = text.filter(|text| is_json && is_valid_json(text)).map(|text| text.replace(['\n', '\r'], " "));
    let shown = Shown {
        offset: delivery.offset.0,
        id: delivery.id.to_string(),
        committed: delivery.committed.map(time),
        created: event.created.map(time),
        mimetype: media_type(event.mimetype),
        schema: event.event_type.as_ref().map(|it| format!("{} v{}.{}.{}", it.name, it.major, it.minor, it.patch)),
        metadata: &event.metadata,
        data_base64: text.is_none().then(|| BASE64.encode(&event.data)),
        data: text.filter(|_| !is_json),
        data_text: text.filter(|_| is_json && value.is_none()),
    };
    let mut line = serde_json::to_string(&shown)?;
    if let Some(value) = value {
        line.pop();
        line.push_str(",\"data\":");
        line.push_str(&value);
        line.push('}');
    }
    Ok(line)
}

fn is_valid_json(text: &str) -> bool {
    serde_json::from_str::<serde::de::IgnoredAny>(text).is_ok()
}

#[cfg(test)]
mod tests {
    use ensign_proto::{Term, TopicId};

    use super::*;

    fn delivery(event: &Event) -> Delivery {
        Delivery {
            id: Rlid::new(1_700_000_000_000, 7),
            topic: TopicId::new(1, [0; 10]),
            offset: Offset(42),
            epoch: Term(3),
            committed: Some(SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000)),
            publisher: String::new(),
            key: bytes::Bytes::new(),
            bytes: event.data.clone(),
        }
    }

    fn printed(event: &Event) -> String {
        let event = Event { created: None, ..event.clone() };
        as_json(&delivery(&event), &event).unwrap()
    }

    #[test]
    fn an_event_of_json_is_printed_as_a_value_with_every_digit() {
        let event = Event::new(r#"{"n": 12345678901234567890.10}"#).with_mimetype(Mime::ApplicationJson);
        insta::assert_snapshot!(printed(&event), @r#"{"offset":42,"id":"065wzsb800000007","committed":"2023-11-14T22:13:20.000Z","created":null,"mimetype":"application/json","data":{"n": 12345678901234567890.10}}"#);
    }

    #[test]
    fn an_event_that_is_no_text_is_printed_in_base64() {
        let event = Event::new(&[0xff_u8, 0x00][..]).with_metadata("k", "v");
        insta::assert_snapshot!(printed(&event), @r#"{"offset":42,"id":"065wzsb800000007","committed":"2023-11-14T22:13:20.000Z","created":null,"mimetype":"application/octet-stream","metadata":{"k":"v"},"data_base64":"/wA="}"#);
    }

    #[test]
    fn an_event_that_claims_to_be_json_and_is_not_is_printed_as_text() {
        let event = Event::new("{broken").with_mimetype(Mime::ApplicationJson);
        assert!(printed(&event).ends_with(r#""data_text":"{broken"}"#), "{}", printed(&event));
    }

    #[test]
    fn json_over_several_lines_is_printed_as_a_value_on_one() {
        let event = Event::new("{\n  \"a\": [1,\r\n 2]\n}").with_mimetype(Mime::ApplicationJson);
        let shown = printed(&event);
        assert!(!shown.contains('\n') && shown.ends_with(r#""data":{   "a": [1,   2] }}"#), "{shown}");
    }

    #[test]
    fn a_media_type_is_found_whatever_its_case_and_parameters() {
        assert_eq!(parse_media_type("Application/JSON; charset=utf-8").unwrap(), Mime::ApplicationJson as i32);
        assert_eq!(parse_media_type("user/format-3").unwrap(), Mime::UserSpecified3 as i32);
        assert!(parse_media_type("user/format-10").is_err());
        assert!(parse_media_type("json").unwrap_err().to_string().contains("application/json"));
        assert_eq!(media_type(Mime::UserSpecified3 as i32), "user/format-3");
        assert_eq!(media_type(77), "mimetype/77");
    }

    #[test]
    fn a_subscription_begins_where_it_is_told() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000);
        let start = |text: &str| parse_start(text, now).unwrap();
        assert_eq!(start("latest"), Start::Live);
        assert_eq!(start("earliest"), Start::Earliest);
        assert_eq!(start("17"), Start::Offset(Offset(17)));
        assert_eq!(start("1970-01-01T00:00:10Z"), Start::Time(SystemTime::UNIX_EPOCH + Duration::from_secs(10)));
        assert_eq!(start("15m"), Start::Time(SystemTime::UNIX_EPOCH + Duration::from_secs(100)));
        assert_eq!(start("061m4qv6dw06ztvb"), Start::After("061m4qv6dw06ztvb".parse().unwrap()));
        assert!(parse_start("0", now).is_err());
        assert!(parse_start("yesterday", now).is_err());
    }

    #[tokio::test]
    async fn lines_are_events_and_empty_ones_are_not() {
        let mut input: Input = Box::new(BufReader::new(&b"one\r\n\n\ntwo\nthree"[..]));
        let (mut number, mut lines) = (0, Vec::new());
        while let Some(line) = next_line(&mut input, &mut number).await.unwrap() {
            lines.push((number, String::from_utf8(line).unwrap()));
        }
        assert_eq!(lines, [(1, "one".to_owned()), (4, "two".to_owned()), (5, "three".to_owned())]);
    }
}
