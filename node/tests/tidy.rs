//! The shape of the house, read from the manifests: an arrow that turns back fails here.
//!
//! ```text
//! proto ← storage ← raft ← keyvault ← node      an arrow points at what may be named
//!   ↖── client ←── chaos, jepsen                the CLI in node uses client as well
//! ```

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use toml::{Table, Value};

/// Every crate, and the crates that it may name.
const HOUSE: [(&str, &[&str]); 9] = [
    ("proto", &[]),
    ("storage", &["proto"]),
    ("raft", &["proto", "storage"]),
    ("keyvault", &["proto", "storage", "raft"]),
    ("client", &["proto"]),
    ("node", &["proto", "storage", "raft", "keyvault", "client"]),
    ("chaos", &["proto", "client"]),
    ("jepsen", &["proto", "client"]),
    ("tests/hosts", &["client"]),
];

/// Dependencies that one crate hides from all others.
const HIDDEN: [(&str, &str); 6] = [
    ("redb", "storage"),
    ("openraft", "raft"),
    ("openraft-rt", "raft"),
    ("hpke", "keyvault"),
    ("aes-gcm", "keyvault"),
    ("axum", "node"),
];

/// Features that give tests a way in. Nothing that is built for users may turn one on.
const TEST_FEATURES: [&str; 3] = ["testing", "simulation", "planted-bugs"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn manifest(path: &Path) -> Table {
    let text = fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    text.parse().unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn members() -> BTreeMap<String, Table> {
    let workspace = manifest(&root().join("Cargo.toml"));
    let members = workspace["workspace"]["members"].as_array().expect("a workspace has members");
    members
        .iter()
        .map(|member| member.as_str().expect("a member is a path"))
        .map(|member| (member.to_owned(), manifest(&root().join(member).join("Cargo.toml"))))
        .collect()
}

/// Every dependency of a manifest: the kind of its table, its name, and its entry.
fn dependencies(manifest: &Table) -> Vec<(&'static str, String, Value)> {
    let mut tables = vec![manifest];
    let targets = manifest.get("target").and_then(Value::as_table);
    tables.extend(targets.into_iter().flat_map(Table::values).filter_map(Value::as_table));

    let mut found = Vec::new();
    for table in tables {
        for kind in ["dependencies", "dev-dependencies", "build-dependencies"] {
            for (name, entry) in table.get(kind).and_then(Value::as_table).into_iter().flatten() {
                let package = entry.get("package").and_then(Value::as_str).unwrap_or(name);
                found.push((kind, package.to_owned(), entry.clone()));
            }
        }
    }
    found
}

/// What is wrong with the crate in `folder`.
fn violations(folder: &str, manifest: &Table) -> Vec<String> {
    let Some((_, allowed)) = HOUSE.iter().find(|(name, _)| *name == folder) else {
        return vec![format!("{folder} has no place in the house: give it one here and in ARCHITECTURE.md")];
    };
    let mut wrong = Vec::new();
    let last = folder.rsplit('/').next().unwrap_or(folder);
    if manifest["package"]["name"].as_str() != Some(&format!("ensign-{last}")) {
        wrong.push(format!("{folder} is not named ensign-{last}"));
    }
    if manifest.get("lints").and_then(|lints| lints.get("workspace")).and_then(Value::as_bool) != Some(true) {
        wrong.push(format!("{folder} does not take the lints of the workspace"));
    }
    for (kind, name, entry) in dependencies(manifest) {
        let tests_only = kind == "dev-dependencies";
        if let Some(ours) = name.strip_prefix("ensign-") {
            // A crate may name itself among its dev-dependencies, to turn its own test features on.
            let itself = ours == folder && tests_only;
            if !itself && !allowed.contains(&ours) {
                wrong.push(format!("{folder} names {ours} in its {kind}: the arrow turns back"));
            }
            let features = entry.get("features").and_then(Value::as_array).into_iter().flatten();
            for feature in features.filter_map(Value::as_str) {
                if !tests_only && TEST_FEATURES.contains(&feature) {
                    wrong.push(format!("{folder} turns on {name}/{feature} outside of tests"));
                }
            }
        }
        if let Some((_, owner)) = HIDDEN.iter().find(|(hidden, owner)| *hidden == name && *owner != folder) {
            wrong.push(format!("{folder} names {name}, which only {owner} may know"));
        }
    }
    let default = manifest.get("features").and_then(|features| features.get("default"));
    if default.and_then(Value::as_array).is_some_and(|features| !features.is_empty()) {
        wrong.push(format!("{folder} has default features"));
    }
    wrong
}

#[test]
fn no_arrow_turns_back() {
    let wrong: Vec<_> = members().iter().flat_map(|(folder, manifest)| violations(folder, manifest)).collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn an_arrow_that_turns_back_is_seen() {
    let wrong = |text: &str| violations("storage", &text.parse().unwrap());
    let head = "package = { name = 'ensign-storage' }\nlints = { workspace = true }\n";
    assert_eq!(wrong(&format!("{head}[dependencies]\nensign-proto.workspace = true")), Vec::<String>::new());
    for (bad, message) in [
        (
            "[dependencies]\nensign-raft.workspace = true",
            "storage names raft in its dependencies: the arrow turns back",
        ),
        (
            "[dev-dependencies]\nx = { package = 'ensign-node', path = '' }",
            "storage names node in its dev-dependencies: the arrow turns back",
        ),
        (
            "[target.'cfg(unix)'.build-dependencies]\nensign-raft = '1'",
            "storage names raft in its build-dependencies: the arrow turns back",
        ),
        ("[dependencies]\nopenraft.workspace = true", "storage names openraft, which only raft may know"),
        (
            "[dependencies]\nensign-proto = { features = ['testing'] }",
            "storage turns on ensign-proto/testing outside of tests",
        ),
        ("[features]\ndefault = ['testing']", "storage has default features"),
    ] {
        assert_eq!(wrong(&format!("{head}{bad}")), [message]);
    }
    assert_eq!(wrong("package = { name = 'ensign-storage' }"), ["storage does not take the lints of the workspace"]);
    assert_eq!(violations("utils", &head.parse().unwrap()).len(), 1);
}

#[test]
fn openraft_is_pinned_exactly() {
    let workspace = manifest(&root().join("Cargo.toml"));
    for name in ["openraft", "openraft-rt"] {
        let entry = &workspace["workspace"]["dependencies"][name];
        let version = entry.as_str().or_else(|| entry.get("version")?.as_str()).expect("it has a version");
        assert!(version.starts_with('='), "{name} {version}: an alpha may change its storage contract at any time");
    }
}

/// The documents that a newcomer reads first.
fn documents() -> Vec<PathBuf> {
    let mut found = vec![root().join("README.md"), root().join("ARCHITECTURE.md"), root().join("CHANGELOG.md")];
    for folder in ["docs", "docs/adr"] {
        let entries = fs::read_dir(root().join(folder)).expect("the folder is part of the project");
        found.extend(entries.map(|entry| entry.expect("it can be read").path()));
    }
    found.retain(|path| path.extension().is_some_and(|extension| extension == "md"));
    found
}

/// The paths that a document names: targets of links, and code that begins with the folder of a crate.
fn named_paths(text: &str) -> Vec<String> {
    let prose: String = text.split("```").step_by(2).collect();
    let links = prose.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(target, _)| target.to_owned());
    let links = links.filter(|target| !target.contains("://") && !target.starts_with('#'));
    let code = prose.split('`').skip(1).step_by(2).filter(|code| {
        let (folder, rest) = code.split_once('/').unwrap_or((code, ""));
        HOUSE.iter().any(|(name, _)| *name == folder) && !rest.is_empty() && !code.contains([' ', '{', '*', '…'])
    });
    links.chain(code.map(str::to_owned)).collect()
}

#[test]
fn every_path_that_a_document_names_is_there() {
    let mut missing = Vec::new();
    for document in documents() {
        let text = fs::read_to_string(&document).expect("it was listed");
        for name in named_paths(&text) {
            // A link starts from its document, code from the root.
            let beside = document.parent().expect("it lies in a folder").join(&name);
            if !beside.exists() && !root().join(&name).exists() {
                missing.push(format!("{} names {name}", document.display()));
            }
        }
    }
    assert!(missing.is_empty(), "{missing:#?}");
}

#[test]
fn a_path_is_found_in_links_and_in_code() {
    let text =
        "[a](b.md) `raft/src/x.rs` ```\n`raft/not`\n``` [web](https://x) `raft` `raft/{a,b}` [here](#a) `tests/x`";
    assert_eq!(named_paths(text), ["b.md", "raft/src/x.rs"]);
}

/// Every metric has a help text: a name alone tells nobody what to do.
#[test]
fn every_metric_is_described() {
    let mut missing = Vec::new();
    let places = ["storage/src", "raft/src", "keyvault/src", "node/src/partition", "node/src/identity"];
    for place in places {
        let text = fs::read_to_string(root().join(place).join("metrics.rs")).unwrap();
        // A constant stands for its name.
        let constants: Vec<(&str, &str)> = text
            .lines()
            .filter_map(|line| line.split_once("const ")?.1.split_once(": &str = "))
            .map(|(constant, name)| (constant, name.trim_end_matches(';')))
            .collect();
        let described: Vec<&str> = text
            .split("describe_")
            .skip(1)
            .filter_map(|call| call.split_once('!')?.1.trim_start_matches(['(', ' ', '\n']).split([',', ')']).next())
            .map(|name| constants.iter().find(|(constant, _)| *constant == name).map_or(name, |(_, name)| *name))
            .collect();
        let named =
            text.split('"').skip(1).step_by(2).filter(|name| name.starts_with("ensign_") && !name.contains(' '));
        missing.extend(named.map(|name| format!("\"{name}\"")).filter(|name| !described.contains(&name.as_str())));
    }
    assert!(missing.is_empty(), "no help for {missing:?}");
}
