//! The command line as people meet it: its help, and what it does before it talks to anyone.

use std::fmt::Write as _;
use std::process::{Command, Output};

use clap::CommandFactory as _;
use ensign_node::cli::Cli;

fn ensign(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ensign"));
    // Variables of whoever runs the tests must not change them.
    for name in ["ENSIGN_CREDENTIALS", "ENSIGN_ENDPOINT", "ENSIGN_AUTH_URL", "ENSIGN_INSECURE", "ENSIGN_CA_FILE"] {
        command.env_remove(name);
    }
    command.args(args).stdin(std::process::Stdio::null()).output().expect("the command runs")
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The help of every command, except the settings of a server, which have their own snapshot.
#[test]
fn help_reads_as_it_did() {
    fn visit(command: &mut clap::Command, path: &str, text: &mut String) {
        let path = format!("{path}{}", command.get_name());
        if command.get_name() != "help" {
            let help = command.clone().term_width(110).render_long_help();
            writeln!(text, "=== {path} ===\n{help}").expect("a string takes everything");
        }
        let path = format!("{path} ");
        for sub in command.get_subcommands_mut() {
            if !matches!(sub.get_name(), "serve" | "dev" | "config") {
                visit(sub, &path, text);
            }
        }
    }
    let mut text = String::new();
    let mut root = Cli::command();
    root.build();
    visit(&mut root, "", &mut text);
    insta::assert_snapshot!(text);
}

#[test]
fn the_command_tree_is_sound() {
    Cli::command().debug_assert();
}

#[test]
fn a_wrong_command_line_ends_with_2() {
    for args in [
        &["topik"][..],
        &["publish"],
        &["key", "revoke"],
        &["key", "revoke", "--version", "0"],
        &["bench", "publish", "--size", "0"],
    ] {
        assert_eq!(ensign(args).status.code(), Some(2), "{args:?}");
    }
}

#[test]
fn no_credentials_end_with_2_and_a_hint() {
    let output = ensign(&["topic", "list", "--credentials", "/no/such/file.json"]);
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(
        stderr(&output),
        "ensign: there is no credentials file /no/such/file.json: name one with --credentials or ENSIGN_CREDENTIALS \
         (`ensign dev` writes ensign-dev.json)\n"
    );
}

#[test]
fn a_cluster_that_is_not_there_ends_with_5() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("key.json");
    // Port 1 of this machine: nobody answers.
    std::fs::write(
        &file,
        r#"{"ClientID":"abc","ClientSecret":"hush-hush","endpoint":"127.0.0.1:1","auth_url":"http://127.0.0.1:1","insecure":true}"#,
    )
    .unwrap();
    let output = ensign(&["topic", "list", "--credentials", file.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(5), "{}", stderr(&output));
    assert!(stderr(&output).starts_with("ensign: cannot log in at http://127.0.0.1:1"), "{}", stderr(&output));
    assert!(!stderr(&output).contains("hush-hush"));
}

#[test]
fn what_cannot_be_undone_needs_yes_where_nobody_can_be_asked() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("key.json");
    let key = r#"{"ClientID":"a","ClientSecret":"b","admin":{"ClientID":"c","ClientSecret":"d"}}"#;
    std::fs::write(&file, key).unwrap();
    let output = ensign(&["key", "revoke", "--all", "--credentials", file.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("confirm with --yes"), "{}", stderr(&output));
}

#[test]
fn an_administrators_command_without_such_a_key_says_what_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("key.json");
    std::fs::write(&file, r#"{"ClientID":"a","ClientSecret":"b"}"#).unwrap();
    let output = ensign(&["project", "list", "--credentials", file.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(4));
    assert!(stderr(&output).contains("no administrator's key"), "{}", stderr(&output));
}

#[test]
fn a_configuration_is_checked() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("ensign.toml");
    std::fs::write(&file, "[node]\nid = 3\n[cluster]\npeers = [\"3=h:1\"]\n").unwrap();
    let output = ensign(&["config", "check", "--config", file.to_str().unwrap(), "--without-files"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(String::from_utf8_lossy(&output.stdout).contains("id = 3"));
    std::fs::write(&file, "[node]\nidd = 3\n").unwrap();
    let output = ensign(&["config", "check", "--config", file.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("idd"), "{}", stderr(&output));
}

#[test]
fn every_shell_gets_its_completions() {
    for shell in ["bash", "zsh", "fish"] {
        let output = ensign(&["completions", shell]);
        assert_eq!(output.status.code(), Some(0));
        assert!(String::from_utf8_lossy(&output.stdout).contains("subscribe"), "{shell}");
    }
}

#[test]
#[cfg(target_os = "linux")]
fn a_bench_in_memory_is_refused() {
    if std::path::Path::new("/dev/shm").exists() {
        let output = ensign(&["bench", "publish", "--dir", "/dev/shm"]);
        assert_eq!(output.status.code(), Some(2));
        assert!(stderr(&output).contains("in memory"), "{}", stderr(&output));
    }
}

#[test]
fn a_development_cluster_keeps_its_root_key_in_a_file() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ensign"));
    let output =
        command.arg("dev").env("ENSIGN_SERVER_ROOT_PROVIDER", "passphrase").output().expect("the command runs");
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    assert!(stderr(&output).contains("`ensign dev` keeps its root key in a file"), "{}", stderr(&output));
}
