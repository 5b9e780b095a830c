//! Client commands against a real cluster: what they print for programs, and the codes they end with.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;

/// `ensign dev` with one replica, and a folder for what commands write.
struct Cluster {
    child: Child,
    dir: tempfile::TempDir,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // A test that failed must not leave a server behind.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn ensign() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ensign"));
    for name in ["ENSIGN_ENDPOINT", "ENSIGN_AUTH_URL", "ENSIGN_INSECURE", "ENSIGN_CA_FILE"] {
        command.env_remove(name);
    }
    command
}

impl Cluster {
    fn start() -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let credentials = dir.path().join("dev.json");
        let any = "127.0.0.1:0";
        let mut child = ensign()
            .args(["dev", "--nodes", "1", "--grpc", any, "--http", any, "--metrics", any, "--credentials"])
            .arg(&credentials)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("the command runs");
        let stdout = child.stdout.take().expect("its output");
        let mut lines = BufReader::new(stdout).lines().map_while(Result::ok);
        assert!(lines.any(|line| line == "ready"), "the cluster did not start");
        Self { child, dir }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn run_as(credentials: &Path, args: &[&str], input: &str) -> Output {
        let mut child = ensign()
            .args(args)
            .env("ENSIGN_CREDENTIALS", credentials)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the command runs");
        // A command that does not read its input has closed it.
        let _ = child.stdin.take().expect("its input").write_all(input.as_bytes());
        child.wait_with_output().expect("the command ends")
    }

    fn run(&self, args: &[&str], input: &str) -> Output {
        Self::run_as(&self.file("dev.json"), args, input)
    }

    /// Runs a command that must work, and reads its JSON: one value for each line.
    fn json(&self, args: &[&str], input: &str) -> Vec<Value> {
        let output = self.run(&[args, &["--output", "json"]].concat(), input);
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8(output.stdout).expect("text");
        text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
    }

    /// Runs a command that must fail; tells its code and what it said.
    fn failure(&self, args: &[&str]) -> (Option<i32>, String) {
        self.outcome(args, "")
    }

    fn outcome(&self, args: &[&str], input: &str) -> (Option<i32>, String) {
        let output = self.run(args, input);
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    }
}

#[test]
fn topics_and_events_from_the_command_line() {
    let cluster = Cluster::start();

    let created = cluster.json(&["topic", "create", "orders"], "");
    assert_eq!(created[0]["state"], "ready");
    assert_eq!(cluster.failure(&["topic", "create", "orders"]).0, Some(7));
    assert_eq!(cluster.failure(&["topic", "create", "or/ders"]).0, Some(2));

    let stored = cluster.json(&["publish", "orders", "--key-value", "from=test"], "{\"n\": 1.50}\n\n[2]\n");
    assert_eq!(stored[0]["events"], 2);
    let text = cluster.json(&["publish", "orders", "--mimetype", "text/plain", "--whole"], "one\ntwo\n");
    assert_eq!(text[0]["events"], 1);

    let events = cluster.json(&["subscribe", "orders", "--from", "earliest", "--count", "3"], "");
    let offsets: Vec<_> = events.iter().map(|event| event["offset"].as_u64().expect("a number")).collect();
    assert_eq!(offsets, [1, 2, 3]);
    assert_eq!(events[0]["data"]["n"].to_string(), "1.5");
    assert_eq!(events[0]["metadata"]["from"], "test");
    assert_eq!(events[2]["data"], "one\ntwo\n");
    assert_eq!(events[2]["mimetype"], "text/plain");

    let rows = cluster.json(&["query", "SELECT * FROM orders OFFSET 1 LIMIT 1"], "");
    assert_eq!(rows.len(), 1);
    assert_eq!(
        rows[0]["id"],
        events[usize::try_from(rows[0]["offset"].as_u64().expect("a number")).expect("small") - 1]["id"]
    );

    let described = cluster.json(&["topic", "describe", "orders"], "");
    assert_eq!(described[0]["events"], 3);
    assert_eq!(cluster.failure(&["topic", "describe", "nothing"]).0, Some(3));
    let (code, said) = cluster.failure(&["query", "SELECT * FROM nothing"]);
    assert!(code == Some(3) && said.contains("the query names a topic that is not in this project"), "{said}");
    for args in [&["subscribe", "nothing", "--count", "1"][..], &["publish", "nothing"]] {
        let output = cluster.run(args, "{}\n");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(3), "{said}");
        assert!(said.contains("there is no topic \"nothing\" in this project"), "{said}");
        assert!(said.contains("`ensign topic create nothing` makes it"), "{said}");
    }

    let (code, said) = cluster.failure(&["topic", "archive", "orders"]);
    assert!(code == Some(2) && said.contains("--yes"), "{said}");
    cluster.json(&["topic", "archive", "orders", "--yes"], "");
    let refused = cluster.run(&["publish", "orders"], "{}\n");
    assert_eq!(refused.status.code(), Some(7), "{}", String::from_utf8_lossy(&refused.stderr));
    assert_eq!(cluster.json(&["topic", "destroy", "orders", "--yes"], "")[0]["state"], "deleting");
}

#[test]
fn projects_keys_and_rights_from_the_command_line() {
    let cluster = Cluster::start();

    let projects = cluster.json(&["project", "list"], "");
    assert_eq!(projects[0].as_array().expect("a list").len(), 1);
    let other = cluster.json(&["project", "create", "other"], "");
    assert_eq!(cluster.failure(&["project", "create", "other"]).0, Some(7));
    assert_eq!(cluster.failure(&["project", "create", " "]).0, Some(2));
    assert_eq!(cluster.failure(&["project", "list", "--organization", "nonsense"]).0, Some(2));

    // A key that may only read sees what it may, and nothing of another project.
    let reader = cluster.file("reader.json");
    let path = reader.to_str().expect("text");
    let key = cluster.json(&["apikey", "create", "reader", "--permission", "subscriber", "--save", path], "");
    assert!(key[0].get("client_secret").is_none(), "a secret was printed");
    cluster.json(&["topic", "create", "orders"], "");
    cluster.json(&["publish", "orders"], "{}\n");
    assert!(Cluster::run_as(&reader, &["query", "SELECT * FROM orders"], "").status.success());
    assert_eq!(Cluster::run_as(&reader, &["publish", "orders"], "{}\n").status.code(), Some(4));
    assert_eq!(Cluster::run_as(&reader, &["topic", "create", "more"], "").status.code(), Some(4));
    assert_eq!(Cluster::run_as(&reader, &["project", "list"], "").status.code(), Some(4));
    let stranger = cluster.file("stranger.json");
    let other_id = other[0]["id"].as_str().expect("an id");
    let path = stranger.to_str().expect("text");
    cluster.json(&["apikey", "create", "stranger", "--project", other_id, "--save", path], "");
    assert_eq!(Cluster::run_as(&stranger, &["query", "SELECT * FROM orders"], "").status.code(), Some(3));
    assert_eq!(cluster.failure(&["apikey", "create", "again", "--save", path]).0, Some(2));
    assert_eq!(cluster.failure(&["apikey", "create", "x", "--permission", "apikeys:edit", "--save", "-"]).0, Some(2));

    // Revoking a key ends its rights.
    cluster.json(&["apikey", "revoke", key[0]["id"].as_str().expect("an id"), "--yes"], "");
    assert_eq!(Cluster::run_as(&reader, &["query", "SELECT * FROM orders"], "").status.code(), Some(4));
    assert_eq!(cluster.failure(&["apikey", "revoke", "nobody", "--yes"]).0, Some(3));

    let status = cluster.json(&["status"], "");
    assert_eq!(status[0]["nodes"].as_array().expect("a list").len(), 1);
    let names: Vec<_> = status[0]["groups"].as_array().expect("a list").iter().map(|group| &group["name"]).collect();
    assert_eq!(names, ["catalog", "vault", "orders"]);
}

#[test]
fn a_revoked_key_makes_its_events_unreadable_and_no_others() {
    let cluster = Cluster::start();
    let other = cluster.json(&["project", "create", "other"], "");
    let other_id = other[0]["id"].as_str().expect("an id");
    let neighbour = cluster.file("neighbour.json");
    let path = neighbour.to_str().expect("text");
    cluster.json(&["apikey", "create", "neighbour", "--project", other_id, "--save", path], "");
    assert!(Cluster::run_as(&neighbour, &["topic", "create", "diary"], "").status.success());
    assert!(Cluster::run_as(&neighbour, &["publish", "diary"], "{}\n").status.success());
    cluster.json(&["topic", "create", "orders"], "");
    cluster.json(&["publish", "orders"], "{}\n");

    assert_eq!(cluster.json(&["key", "rotate"], "")[0]["version"], 2);
    assert_eq!(cluster.json(&["query", "SELECT * FROM orders"], "").len(), 1);
    let (code, said) = cluster.failure(&["key", "revoke", "--version", "1"]);
    assert!(code == Some(2) && said.contains("--yes"), "{said}");
    assert_eq!(cluster.failure(&["key", "revoke", "--version", "9", "--yes"]).0, Some(3));

    let revoked = cluster.json(&["key", "revoke", "--version", "1", "--yes"], "");
    assert_eq!(revoked[0]["versions"], serde_json::json!([1]));
    let (code, said) = cluster.failure(&["query", "SELECT * FROM orders"]);
    assert!(code == Some(7) && said.contains("was revoked"), "{code:?} {said}");
    let rings = cluster.json(&["key", "list"], "");
    let states: Vec<_> = rings[0][0]["versions"].as_array().expect("a list").iter().map(|it| &it["state"]).collect();
    assert_eq!(states, ["revoked", "active"]);
    assert!(Cluster::run_as(&neighbour, &["query", "SELECT * FROM diary"], "").status.success());
}

#[test]
fn a_running_cluster_is_measured_and_left_as_it_was() {
    let cluster = Cluster::start();
    let text = std::fs::read_to_string(cluster.file("dev.json")).expect("the credentials");
    let credentials: Value = serde_json::from_str(&text).expect("JSON");
    let endpoint = credentials["endpoint"].as_str().expect("an endpoint");
    let common = ["--endpoint", endpoint, "--events", "600", "--size", "100", "--publishers", "2", "--window", "16"];
    let published = cluster.json(&[&["bench", "publish", "--warm-up", "20"], &common[..]].concat(), "");
    let read = cluster.json(&[&["bench", "subscribe", "--subscribers", "2"], &common[..]].concat(), "");
    for figures in [published.last().expect("an object"), read.last().expect("an object")] {
        assert!(figures["events_per_second"].as_f64().is_some_and(|rate| rate > 0.0), "{figures}");
        // What only the cluster's own machine can tell is left open.
        assert!(figures["server_cpu_seconds"].is_null(), "{figures}");
    }
    assert!(published.last().expect("an object")["ack_p50_us"].as_f64().is_some_and(|p50| p50 > 0.0));
    let left = cluster.json(&["topic", "list"], "");
    let states: Vec<_> = left.iter().flat_map(|page| page.as_array().into_iter().flatten()).collect();
    assert!(states.iter().all(|topic| topic["state"] == "deleting"), "{left:?}");
}

#[test]
fn a_client_that_wants_tls_is_told_that_the_server_has_none() {
    let cluster = Cluster::start();
    let (code, said) = cluster.failure(&["topic", "list", "--insecure=false"]);
    assert_eq!(code, Some(5), "{said}");
    assert!(said.contains("speaks no TLS"), "{said}");
}

#[test]
fn many_topics_are_created_from_a_list_and_each_is_answered_for() {
    let cluster = Cluster::start();
    let list = cluster.file("topics.txt");
    let names: Vec<String> = (0..300).map(|n| format!("listed-{n}")).collect();
    std::fs::write(&list, format!("# ours\n\n{}\n", names.join("\n"))).expect("a file");
    let from = format!("--from={}", list.display());
    cluster.json(&["topic", "create", "listed-7"], "");
    // One of them is there already: the others are made, and the command fails.
    let output = cluster.run(&["topic", "create", "first", &from], "");
    assert_eq!(output.status.code(), Some(7));
    let text = String::from_utf8(output.stdout).expect("text");
    assert!(
        text.contains("listed-7: exists already (") && text.ends_with("created 300 of 301 topics, 1 existed already\n")
    );
    assert!(String::from_utf8_lossy(&output.stderr).contains("1 topics exist already"));
    // Again, and without a complaint.
    let answers = cluster.json(&["topic", "create", "--if-missing", "--from", "-", "last"], &names.join("\n"));
    let answers = answers[0].as_array().expect("an array").clone();
    assert_eq!(answers.len(), 301);
    assert_eq!((answers[0]["name"].as_str(), answers[0]["outcome"].as_str()), (Some("last"), Some("created")));
    assert!(answers[1..].iter().all(|topic| topic["outcome"] == "exists" && topic["id"].is_string()));
    let listed = cluster.json(&["topic", "list"], "");
    assert_eq!(listed[0].as_array().expect("an array").len(), 302);
    // What is wrong with a list is said before anything is made.
    for (names, complaint) in [(&["a", "a"][..], "a is named twice"), (&["a", "b c"], "\"b c\": ")] {
        let (code, message) = cluster.failure(&[&["topic", "create"], names].concat());
        assert!(code == Some(2) && message.contains(complaint), "{code:?} {message}");
    }
    let (code, message) = cluster.failure(&["topic", "create", "--from", "/nowhere/at/all"]);
    assert!(code == Some(2) && message.contains("/nowhere/at/all"), "{code:?} {message}");
    assert_eq!(cluster.json(&["topic", "list"], "")[0].as_array().expect("an array").len(), 302);
}

#[test]
fn quotas_from_the_command_line() {
    let cluster = Cluster::start();
    let projects = cluster.json(&["project", "list"], "");
    let project = projects[0][0]["id"].as_str().expect("an id");
    let limits = |quota: &Value| -> Vec<(String, Value, String)> {
        let limits = quota["limits"].as_array().expect("a list").iter();
        let text = |value: &Value| value.as_str().expect("text").to_owned();
        limits.map(|limit| (text(&limit["limit"]), limit["at"].clone(), text(&limit["from"]))).collect()
    };
    let of = |name: &str, at: Value, from: &str| (name.to_owned(), at, from.to_owned());

    cluster.json(&["quota", "set", "--default", "--events-per-second", "5,000", "--streams", "unlimited"], "");
    let set = cluster.json(&["quota", "set", "--project", project, "--topics", "1", "--stored-bytes", "2MB"], "");
    assert_eq!(set[0]["project"], project);
    let shown = cluster.json(&["quota", "show"], "");
    assert_eq!(shown[0].as_array().expect("a list").len(), 2, "the default, and the one project");
    let expected = [
        of("events-per-second", 5_000.into(), "default"),
        of("bytes-per-second", Value::Null, "built-in"),
        of("stored-bytes", 2_000_000.into(), "project"),
        of("topics", 1.into(), "project"),
        of("streams", Value::Null, "default"),
    ];
    assert_eq!(limits(&shown[0][1]), expected);

    cluster.json(&["topic", "create", "first"], "");
    let (code, said) = cluster.failure(&["topic", "create", "second"]);
    assert!(code == Some(7) && said.contains("its limit of 1 topics"), "{code:?} {said}");
    let shown = cluster.json(&["quota", "show", "--project", project], "");
    assert_eq!(shown[0][0]["limits"][3]["used"], 1);
    let table = cluster.run(&["quota", "show", "--project", project], "");
    let table = String::from_utf8_lossy(&table.stdout).into_owned();
    assert!(table.contains("100 %") && table.contains("2,000,000"), "{table}");

    cluster.json(&["quota", "unset", "--project", project, "topics"], "");
    cluster.json(&["topic", "create", "second"], "");
    let shown = cluster.json(&["quota", "show", "--project", project], "");
    assert_eq!(
        limits(&shown[0][0])[2..4],
        [of("stored-bytes", 2_000_000.into(), "project"), of("topics", Value::Null, "built-in")]
    );
    cluster.json(&["quota", "unset", "--default"], "");

    // A quota that time does not help is said at once, not when the publisher's patience ends; and only while it lasts.
    cluster.json(&["quota", "set", "--project", project, "--stored-bytes", "1kB"], "");
    let line = "x".repeat(600);
    let (code, said) = (0..40)
        .map(|_| cluster.outcome(&["publish", "first"], &line))
        .find(|(code, _)| *code != Some(0))
        .expect("a quota that does not hold");
    assert!(code == Some(7) && said.contains("may store 1000: destroy topics"), "{code:?} {said}");
    // It names the first line that is not stored, however far the input was read.
    let (code, said) = cluster.outcome(&["publish", "first"], &"{\"n\":1}\n".repeat(100));
    assert!(code == Some(7) && said.contains("line 1: "), "{code:?} {said}");
    // Nor does it wait for another line: whoever writes them may pause.
    let mut child = ensign()
        .args(["publish", "first"])
        .env("ENSIGN_CREDENTIALS", cluster.file("dev.json"))
        .stdin(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("the command runs");
    let mut pipe = child.stdin.take().expect("its input");
    pipe.write_all(b"{\"n\":1}\n").expect("it reads");
    let ended = (0..600).find_map(|_| {
        std::thread::sleep(std::time::Duration::from_millis(100));
        child.try_wait().expect("it can be asked")
    });
    drop((pipe, child.kill()));
    assert_eq!(ended.and_then(|status| status.code()), Some(7), "it waits for a line that does not come");
    cluster.json(&["quota", "unset", "--project", project, "stored-bytes"], "");
    let (code, said) = cluster.outcome(&["publish", "first"], &line);
    assert_eq!(code, Some(0), "{said}");

    // What cannot be, and who may not.
    assert_eq!(cluster.failure(&["quota", "set", "--project", project]).0, Some(2));
    assert_eq!(cluster.failure(&["quota", "set", "--topics", "5"]).0, Some(2));
    assert_eq!(cluster.failure(&["quota", "set", "--default", "--topics", "many"]).0, Some(2));
    assert_eq!(cluster.failure(&["quota", "set", "--project", "nonsense", "--topics", "5"]).0, Some(2));
    let nobody = "01HXXXXXXXXXXXXXXXXXXXXXXX";
    assert_eq!(cluster.failure(&["quota", "set", "--project", nobody, "--topics", "5"]).0, Some(3));
    let tenant = cluster.file("tenant.json");
    cluster.json(&["apikey", "create", "tenant", "--save", tenant.to_str().expect("text")], "");
    assert_eq!(Cluster::run_as(&tenant, &["quota", "set", "--default", "--topics", "9"], "").status.code(), Some(4));
}
