//! Links that do what they are told, with the mechanism that every machine has. `.ci/run hosts` tries the other one as well.

use std::process::Command;

#[test]
fn a_proxy_cuts_each_direction_heals_it_and_delays() {
    let output = Command::new(env!("CARGO_BIN_EXE_hosts")).args(["links", "--links", "proxy"]).output().unwrap();
    let (said, failed) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}{failed}");
    for what in ["cut 1->2: nothing passed", "cut 2->1: nothing passed", "delay of 150ms"] {
        assert!(said.contains(what), "{said}");
    }
}

#[test]
fn a_server_that_is_not_there_is_said_to_be_missing() {
    let args = ["ledger", "--without-pyensign", "--binary", "nowhere/ensign"];
    let output = Command::new(env!("CARGO_BIN_EXE_hosts")).args(args).output().unwrap();
    let failed = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && failed.contains("there is no server at nowhere/ensign"), "{failed}");
    assert!(failed.contains("cargo build --release"), "{failed}");
}
