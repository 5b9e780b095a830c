//! The alert rules and the dashboard name metrics that exist, and every alert has a runbook.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map(Path::to_owned).unwrap_or_default()
}

fn page(name: &str) -> anyhow::Result<String> {
    let path = repository().join("docs/operations").join(name);
    std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
}

/// Every word of `text` that looks like a metric of ours, without the suffixes that Prometheus adds.
fn metrics_in(text: &str) -> BTreeSet<String> {
    text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'))
        .filter(|word| word.starts_with("ensign_"))
        .map(|word| word.trim_end_matches("_bucket").to_owned())
        .collect()
}

/// The string literals of all sources that begin with `ensign_`.
fn metrics_of_sources() -> anyhow::Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    let mut folders: Vec<PathBuf> =
        ["storage", "raft", "keyvault", "node"].iter().map(|it| repository().join(it).join("src")).collect();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|it| it == "rs") {
                let source = std::fs::read_to_string(&path)?;
                found.extend(source.split('"').filter(|it| it.starts_with("ensign_")).map(str::to_owned));
            }
        }
    }
    Ok(found)
}

#[test]
fn rules_and_dashboard_rest_on_metrics_that_exist() -> anyhow::Result<()> {
    let known = metrics_of_sources()?;
    for file in ["alerts.yaml", "dashboard.json"] {
        let named = metrics_in(&page(file)?);
        ensure!(named.len() > 10, "{file} names hardly any metric");
        let unknown: Vec<_> = named.difference(&known).collect();
        assert!(unknown.is_empty(), "{file} names metrics that no source has: {unknown:?}");
    }
    Ok(())
}

#[test]
fn every_alert_has_a_runbook() -> anyhow::Result<()> {
    let runbooks = page("runbooks.md")?;
    let anchors: BTreeSet<String> =
        runbooks.lines().filter_map(|line| line.strip_prefix("## ")).map(|title| title.replace(' ', "-")).collect();
    let rules = page("alerts.yaml")?;
    let alerts = rules.lines().filter(|line| line.trim_start().starts_with("- alert:")).count();
    let links: Vec<_> =
        rules.lines().filter_map(|line| line.trim().strip_prefix("runbook_url: runbooks.md#")).collect();
    assert_eq!(links.len(), alerts, "an alert without a runbook");
    let missing: Vec<_> = links.iter().filter(|link| !anchors.contains(**link)).collect();
    assert!(missing.is_empty(), "no such sections in runbooks.md: {missing:?}");
    Ok(())
}

#[test]
fn the_dashboard_is_json_whose_panels_do_not_overlap() -> anyhow::Result<()> {
    let dashboard: serde_json::Value = serde_json::from_str(&page("dashboard.json")?)?;
    let mut taken = BTreeSet::new();
    for panel in dashboard["panels"].as_array().context("panels")? {
        let place = |key: &str| panel["gridPos"][key].as_u64().context("a place");
        for x in place("x")?..place("x")? + place("w")? {
            for y in place("y")?..place("y")? + place("h")? {
                ensure!(taken.insert((x, y)), "{} lies on another panel", panel["title"]);
            }
        }
    }
    Ok(())
}
