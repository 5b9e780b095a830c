//! The command provider: a program of the operator's wraps and unwraps, and we neither know nor care how.
//!
//! ```text
//! wrap    in   {"version":1,"operation":"wrap","cluster":"ULID","epoch":1,"key":"base64"}
//!         out  {"key_id":"text","key_version":1,"blob":"base64"}
//! unwrap  in   {"version":1,"operation":"unwrap","cluster":"ULID","epoch":1,"key_id":"text","key_version":1,"blob":"base64"}
//!         out  {"key":"base64"}
//! either  out  {"error":"text"}, or an exit code that is not 0
//! ```
//!
//! One JSON object on standard input, one on standard output, at most 64 KiB each, within ten seconds. No shell, no arguments and an
//! empty environment: nothing that could be seen in a list of processes, nothing that whoever started the node could slip in.

use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use ensign_keyvault::{
    MasterName, Passphrase, RootError, RootKind, RootProvider, Unwrapped, WrappedMaster, check_kind,
};
use futures::future::BoxFuture;
use rustix::process::{Pid, Signal, kill_process_group};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::Command;
use tokio::time::timeout;
use tracing::warn;
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

use super::outside::{self, Made};

/// How long the program may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// The most that it is told, and that it may answer.
const BYTES_MAX: usize = 64 << 10;
/// The most of what it says on standard error that is logged.
const SAID_MAX: usize = 2 << 10;
/// Of the protocol.
const VERSION: u32 = 1;

#[derive(Serialize)]
struct Asked<'a> {
    version: u32,
    operation: &'static str,
    cluster: String,
    epoch: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    key_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    key_version: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    blob: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrapAnswer {
    #[serde(default)]
    key_id: String,
    #[serde(default)]
    key_version: u32,
    #[serde(default)]
    blob: String,
    #[serde(default)]
    error: String,
}

#[derive(Deserialize, Zeroize, ZeroizeOnDrop)]
#[serde(deny_unknown_fields)]
struct UnwrapAnswer {
    #[serde(default)]
    key: String,
    #[serde(default)]
    error: String,
}

/// A program that keeps the root key, or reaches what does.
#[derive(Debug)]
pub(super) struct CommandRoot {
    program: PathBuf,
    patience: Duration,
}

impl CommandRoot {
    /// The program of this absolute path.
    pub(super) fn new(program: PathBuf) -> Self {
        Self { program, patience: PATIENCE }
    }

    fn failure(&self, what: impl std::fmt::Display) -> RootError {
        RootError::provider(format!("root.command {}: {what}", self.program.display()))
    }

    /// Runs it once.
    async fn run(&self, asked: &Asked<'_>) -> Result<Zeroizing<Vec<u8>>, RootError> {
        check_program(&self.program).map_err(|error| self.failure(error))?;
        // Never grown, so that no copy of a key stays behind.
        let mut input = Zeroizing::new(Vec::with_capacity(BYTES_MAX));
        serde_json::to_writer(&mut *input, asked).map_err(|error| self.failure(error))?;
        if input.len() > BYTES_MAX {
            return Err(self.failure("what it is to be told is longer than 64 KiB"));
        }
        let ran = timeout(self.patience, exchange(&self.program, &input)).await;
        let ran = ran.map_err(|_| self.failure(format_args!("no answer within {} s", self.patience.as_secs())))?;
        let Ran { status, output, said } = ran.map_err(|error| self.failure(error))?;
        if !said.is_empty() {
            warn!(program = %self.program.display(), said = outside::words(&String::from_utf8_lossy(&said)), "the root command says something");
        }
        if output.len() > BYTES_MAX {
            return Err(self.failure("it answered more than 64 KiB"));
        }
        if !status.success() && output.is_empty() {
            return Err(self.failure(format_args!("it failed ({status}); the log has what it said")));
        }
        Ok(output)
    }

    fn parse<'a, T: Deserialize<'a>>(&self, output: &'a [u8]) -> Result<T, RootError> {
        // What is wrong with the text is not said: it may be a key.
        serde_json::from_slice(output).map_err(|error| {
            let place = format!("line {}, column {}", error.line(), error.column());
            self.failure(format_args!("its answer is not the JSON object that the protocol wants ({place})"))
        })
    }
}

/// What one run gave.
struct Ran {
    status: ExitStatus,
    output: Zeroizing<Vec<u8>>,
    said: Vec<u8>,
}

/// Whoever can change the program has the root key.
fn check_program(program: &Path) -> io::Result<()> {
    let metadata = std::fs::metadata(program)?;
    if !metadata.is_file() {
        return Err(io::Error::other("it is not a file"));
    }
    if metadata.mode() & 0o022 != 0 {
        return Err(io::Error::other("others than its owner may change it (chmod go-w)"));
    }
    Ok(())
}

/// Ends a program and what it started, whatever becomes of whoever waits.
struct Group(Option<Pid>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(group) = self.0.take() {
            // It may be gone already.
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
}

async fn exchange(program: &Path, input: &[u8]) -> io::Result<Ran> {
    let mut child = Command::new(program)
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true)
        .spawn()?;
    let mut group = Group(child.id().and_then(|id| Pid::from_raw(id.cast_signed())));
    let missing = || io::Error::other("a pipe is missing");
    let mut stdin = child.stdin.take().ok_or_else(missing)?;
    let stdout = child.stdout.take().ok_or_else(missing)?;
    let stderr = child.stderr.take().ok_or_else(missing)?;
    let tell = async move {
        // A program that has heard enough may close its end.
        let _ = stdin.write_all(input).await;
        let _ = stdin.shutdown().await;
    };
    let (output, said, ()) = tokio::join!(bounded(stdout, BYTES_MAX + 1), bounded(stderr, SAID_MAX), tell);
    let (output, said) = (output?, said?);
    if output.len() > BYTES_MAX {
        // It would wait for ever for somebody to read on.
        return Ok(Ran { status: ExitStatus::default(), output, said: said.to_vec() });
    }
    let status = child.wait().await?;
    // It has ended by itself: its number may be somebody else's by now.
    group.0 = None;
    Ok(Ran { status, output, said: said.to_vec() })
}

/// Up to so many bytes, in a buffer that never grows.
async fn bounded(from: impl AsyncRead + Unpin, limit: usize) -> io::Result<Zeroizing<Vec<u8>>> {
    let mut bytes = Zeroizing::new(Vec::with_capacity(limit + 1));
    from.take(limit as u64).read_to_end(&mut bytes).await?;
    Ok(bytes)
}

impl RootProvider for CommandRoot {
    fn kind(&self) -> RootKind {
        RootKind::Command
    }

    fn wrap<'a>(
        &'a self,
        name: MasterName,
        key: &'a [u8; 32],
        _phrase: Option<&'a Passphrase>,
    ) -> BoxFuture<'a, Result<WrappedMaster, RootError>> {
        Box::pin(async move {
            let text = Zeroizing::new(BASE64_STANDARD.encode(key));
            let asked = Asked { key: Some(&text), ..Asked::new("wrap", name) };
            let output = self.run(&asked).await?;
            let answer: WrapAnswer = self.parse(&output)?;
            if !answer.error.is_empty() {
                return Err(self.failure(outside::words(&answer.error)));
            }
            let made = BASE64_STANDARD.decode(&answer.blob).map_err(|_| self.failure("its blob is not base64"))?;
            let made = Made { reference: answer.key_id, version: answer.key_version, made: &made };
            outside::keep(RootKind::Command, name, key, &made).map_err(|error| self.failure(error))
        })
    }

    fn unwrap<'a>(
        &'a self,
        name: MasterName,
        wrapped: &'a WrappedMaster,
        _phrase: Option<&'a Passphrase>,
    ) -> BoxFuture<'a, Result<Unwrapped, RootError>> {
        Box::pin(async move {
            check_kind(wrapped, RootKind::Command)?;
            let (id, made) = outside::kept(wrapped)?;
            let asked = Asked {
                key_id: Some(&wrapped.reference),
                key_version: Some(wrapped.version),
                blob: Some(BASE64_STANDARD.encode(made)),
                ..Asked::new("unwrap", name)
            };
            let output = self.run(&asked).await?;
            let answer: UnwrapAnswer = self.parse(&output)?;
            if !answer.error.is_empty() {
                return Err(self.failure(outside::words(&answer.error)));
            }
            let mut key = Zeroizing::new([0; 33]);
            let length = BASE64_STANDARD.decode_slice(&answer.key, &mut *key);
            let length = length.map_err(|_| self.failure("its key is not 32 bytes in base64"))?;
            outside::unwrapped(name, id, &key[..length]).map_err(|error| self.failure(error))
        })
    }
}

impl Asked<'_> {
    fn new(operation: &'static str, name: MasterName) -> Self {
        Self {
            version: VERSION,
            operation,
            cluster: name.cluster.to_string(),
            epoch: name.epoch,
            key: None,
            key_id: None,
            key_version: None,
            blob: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt as _;

    use ensign_proto::ClusterId;

    use super::*;

    const NAME: MasterName = MasterName { cluster: ClusterId::from_bytes([3; 16]), epoch: 1 };

    struct Script {
        _folder: tempfile::TempDir,
        root: CommandRoot,
        path: PathBuf,
    }

    /// A provider whose program is a shell script.
    fn script(text: &str) -> Script {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("program");
        fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o700)).unwrap();
        Script { _folder: folder, root: CommandRoot::new(path.clone()), path }
    }

    fn wrapped() -> WrappedMaster {
        let made = Made { reference: "kms/a".to_owned(), version: 3, made: b"opaque" };
        outside::keep(RootKind::Command, NAME, &[9; 32], &made).unwrap()
    }

    async fn refusal(text: &str) -> String {
        let script = script(text);
        let refused = script.root.unwrap(NAME, &wrapped(), None).await.unwrap_err().to_string();
        let prefix = format!("root.command {}: ", script.path.display());
        refused.strip_prefix(&prefix).unwrap_or_else(|| panic!("{refused}")).to_owned()
    }

    #[tokio::test]
    async fn a_program_is_told_what_the_protocol_says_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let (told, seen) = (folder.path().join("told"), folder.path().join("seen"));
        let answer = r#"{"key_id":"kms/a","key_version":3,"blob":"b3BhcXVl"}"#;
        let script = script(&format!(
            "/bin/cat > {}\n{{ echo $#; /usr/bin/env; pwd; }} > {}\necho '{answer}'",
            told.display(),
            seen.display()
        ));
        assert_eq!(script.root.wrap(NAME, &[9; 32], None).await.unwrap(), wrapped());
        let told: serde_json::Value = serde_json::from_slice(&fs::read(told).unwrap()).unwrap();
        let expected = serde_json::json!({
            "version": 1, "operation": "wrap", "cluster": NAME.cluster.to_string(), "epoch": 1,
            "key": BASE64_STANDARD.encode([9; 32]),
        });
        assert_eq!(told, expected);
        // A shell sets some variables by itself; none of ours may be among them.
        let seen = fs::read_to_string(seen).unwrap();
        assert!(seen.starts_with("0\n") && seen.ends_with("\n/\n"), "{seen}");
        let set: Vec<_> = seen.lines().filter_map(|line| line.split_once('=')).map(|(name, _)| name).collect();
        assert!(set.iter().all(|name| ["PWD", "SHLVL", "_", "OLDPWD"].contains(name)), "{seen}");
    }

    #[tokio::test]
    async fn each_way_to_fail_is_told_apart() {
        assert!(refusal("echo '{\"error\":\"access denied\"}'; exit 1").await == "access denied");
        assert!(refusal("echo why >&2; exit 3").await.starts_with("it failed (exit status: 3)"));
        assert!(refusal("echo nonsense").await.contains("not the JSON object that the protocol wants (line 1"));
        assert!(refusal("echo '{\"key\":\"AAAA\",\"more\":1}'").await.contains("not the JSON object"));
        assert_eq!(refusal("echo '{\"key\":\"AAAA\"}'").await, "it answered a key of 3 bytes, not of 32");
        assert_eq!(refusal("echo '{\"key\":\"*\"}'").await, "its key is not 32 bytes in base64");
        let other = BASE64_STANDARD.encode([8; 32]);
        assert_eq!(
            refusal(&format!("echo '{{\"key\":\"{other}\"}}'")).await,
            "it answered another key than it was given to wrap"
        );
        assert_eq!(refusal("/usr/bin/head -c 70000 /dev/zero").await, "it answered more than 64 KiB");
    }

    #[tokio::test]
    async fn a_program_that_hangs_is_ended_with_what_it_started() {
        let folder = tempfile::tempdir().unwrap();
        let number = folder.path().join("number");
        let mut script = script(&format!("/bin/sleep 1000 & echo $! > {}\nwait", number.display()));
        script.root.patience = Duration::from_secs(1);
        let refused = script.root.unwrap(NAME, &wrapped(), None).await.unwrap_err().to_string();
        assert!(refused.ends_with("no answer within 1 s"), "{refused}");
        let number = fs::read_to_string(number).unwrap();
        let state = || fs::read_to_string(format!("/proc/{}/stat", number.trim())).unwrap_or_default();
        // Gone, or dead and not yet reaped by whoever is process 1 here.
        while !(state().is_empty() || state().contains(") Z ")) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    #[tokio::test]
    async fn a_program_that_others_could_change_is_not_run() {
        let script = script("echo '{}'");
        fs::set_permissions(&script.path, Permissions::from_mode(0o722)).unwrap();
        let refused = script.root.unwrap(NAME, &wrapped(), None).await.unwrap_err().to_string();
        assert!(refused.ends_with("others than its owner may change it (chmod go-w)"), "{refused}");
        let gone = CommandRoot::new("/nowhere/at/all".into());
        let refused = gone.unwrap(NAME, &wrapped(), None).await.unwrap_err().to_string();
        assert!(refused.starts_with("root.command /nowhere/at/all: No such file"), "{refused}");
    }
}
