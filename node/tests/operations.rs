//! The operator's pages: their commands work as they stand, and every line that the log can say at WARN or ERROR is explained.

mod support;

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use ensign_node::authority::Authority;
use ensign_proto::NodeId;
use support::free_port;

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map(Path::to_owned).unwrap_or_default()
}

fn page(name: &str) -> anyhow::Result<String> {
    let path = repository().join("docs/operations").join(name);
    std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
}

/// The shell blocks of a page, in order.
fn blocks(page: &str) -> Vec<String> {
    let mut blocks = Vec::new();
    let mut lines = page.lines();
    while let Some(line) = lines.next() {
        if line == "```sh" {
            let block: Vec<&str> = lines.by_ref().take_while(|line| *line != "```").collect();
            blocks.push(block.join("\n"));
        }
    }
    blocks
}

/// A folder in which the commands of a page run, and the servers that they have started.
struct Shell {
    dir: tempfile::TempDir,
    path: std::ffi::OsString,
    servers: Vec<Child>,
}

impl Drop for Shell {
    fn drop(&mut self) {
        for server in &mut self.servers {
            let _ = server.kill();
            let _ = server.wait();
        }
    }
}

impl Shell {
    fn new() -> anyhow::Result<Self> {
        let binary = Path::new(env!("CARGO_BIN_EXE_ensign")).parent().context("the binary has a folder")?;
        let inherited = std::env::var_os("PATH").unwrap_or_default();
        let path = std::env::join_paths(std::iter::once(binary.to_owned()).chain(std::env::split_paths(&inherited)))?;
        Ok(Self { dir: tempfile::tempdir()?, path, servers: Vec::new() })
    }

    fn command(&self, script: &str) -> Command {
        let mut command = Command::new("sh");
        command.arg("-euc").arg(script).current_dir(self.dir.path()).env("PATH", &self.path).stdin(Stdio::null());
        for name in ["ENSIGN_ENDPOINT", "ENSIGN_AUTH_URL", "ENSIGN_INSECURE", "ENSIGN_CA_FILE", "ENSIGN_CREDENTIALS"] {
            command.env_remove(name);
        }
        command
    }

    /// Runs a block to its end; what it printed.
    fn run(&self, script: &str) -> anyhow::Result<String> {
        let output = self.command(script).output()?;
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        ensure!(output.status.success(), "{script}\nended with {}:\n{out}{err}", output.status);
        Ok(out.into_owned())
    }

    /// Starts a block that does not end by itself. Its log is `server-N.log`, from 1.
    fn serve(&mut self, script: &str) -> anyhow::Result<()> {
        let log = std::fs::File::create(self.file(&format!("server-{}.log", self.servers.len() + 1)))?;
        let mut command = self.command(&format!("exec {}", script.trim()));
        let server = command.stdout(log.try_clone()?).stderr(log).spawn()?;
        self.servers.push(server);
        Ok(())
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Waits until `seen`, unless a server ends before.
    fn wait(&mut self, what: &str, seen: impl Fn(&Self) -> bool) -> anyhow::Result<()> {
        let begun = tokio::time::Instant::now();
        while !seen(self) {
            let ended = self.servers.iter_mut().any(|server| matches!(server.try_wait(), Ok(Some(_)) | Err(_)));
            if ended || begun.elapsed() > Duration::from_mins(2) {
                let logs = (1..=self.servers.len()).map(|n| self.log(n)).collect::<Vec<_>>().join("\n--\n");
                bail!("{what}: {}\n{logs}", if ended { "a server ended" } else { "not in time" });
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    fn log(&self, server: usize) -> String {
        std::fs::read_to_string(self.file(&format!("server-{server}.log"))).unwrap_or_default()
    }
}

/// The page's ports, and free ones in their place.
fn on_free_ports(page: &str) -> anyhow::Result<String> {
    let mut text = page.to_owned();
    // `537$node` in the settings, `5372` in the commands.
    let mut settings = BTreeMap::new();
    for base in ["537", "809", "121", "536"] {
        for node in 1..=3 {
            let port = free_port()?.to_string();
            text = text.replace(&format!(":{base}{node}"), &format!(":{port}"));
            settings.entry(base).or_insert_with(Vec::new).push(port);
        }
    }
    for (base, ports) in settings {
        let chosen = format!(":$(echo {} | cut -d' ' -f$node)", ports.join(" "));
        text = text.replace(&format!(":{base}$node"), &chosen);
    }
    Ok(text)
}

/// Certificates without OpenSSL, in the same places.
fn issue_certificates(shell: &Shell) -> anyhow::Result<()> {
    let authority = Authority::generate("ensign peers")?;
    for node in 1..=3 {
        let folder = shell.file(&format!("node-{node}"));
        std::fs::create_dir_all(&folder)?;
        let issued = authority.issue(NodeId(node))?;
        std::fs::write(folder.join("node.pem"), issued.certificate)?;
        std::fs::write(folder.join("node.key"), issued.private_key)?;
        std::fs::write(folder.join("ca.pem"), authority.certificate())?;
    }
    Ok(())
}

#[test]
fn the_first_cluster_comes_to_be_by_the_documented_commands() -> anyhow::Result<()> {
    let mut shell = Shell::new()?;
    let has_openssl = Command::new("openssl").arg("version").output().is_ok_and(|output| output.status.success());
    let page = on_free_ports(&page("first-cluster.md")?)?;
    let mut output = String::new();
    for block in blocks(&page) {
        if block.starts_with("ensign serve") {
            shell.serve(&block)?;
            if block.contains("--bootstrap") {
                shell.wait("the root key", |shell| shell.file("node-1/root.key").exists())?;
            }
        } else if block.contains("openssl") && !has_openssl {
            writeln!(
                std::io::stderr(),
                "there is no openssl on this machine: the certificates are made by other means"
            )?;
            issue_certificates(&shell)?;
        } else {
            if block.contains("ENSIGN_CREDENTIALS") {
                for node in 1..=3 {
                    shell.wait(&format!("node {node}"), |shell| shell.log(node).lines().any(|line| line == "ready"))?;
                }
            }
            output = shell.run(&block)?;
        }
    }
    ensure!(shell.servers.len() == 3, "the page starts {} nodes", shell.servers.len());
    ensure!(output.contains("the first cluster"), "the event is not in what the commands printed:\n{output}");
    ensure!(!shell.log(2).contains("no root key"), "node 2 had no root key:\n{}", shell.log(2));
    Ok(())
}

/// The messages of `warn!` and `error!` in a source file: the last text between their parentheses.
fn messages(source: &str) -> Vec<String> {
    let mut found = Vec::new();
    for name in ["warn!(", "error!("] {
        for (at, _) in source.match_indices(name) {
            let (mut depth, mut last, mut text) = (1, None, None::<String>);
            let mut characters = source[at + name.len()..].chars();
            while depth > 0
                && let Some(character) = characters.next()
            {
                match (&mut text, character) {
                    (Some(_), '"') => last = text.take(),
                    (Some(text), '\\') => text.extend(characters.next()),
                    (Some(text), character) => text.push(character),
                    (None, '"') => text = Some(String::new()),
                    (None, '(' | '[' | '{') => depth += 1,
                    (None, ')' | ']' | '}') => depth -= 1,
                    (None, _) => {}
                }
            }
            found.extend(last);
        }
    }
    found
}

fn sources(folder: &Path, found: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            sources(&path, found)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") && !path.ends_with("plant.rs") {
            found.push(path);
        }
    }
    Ok(())
}

#[test]
fn every_warning_and_error_in_the_log_is_explained() -> anyhow::Result<()> {
    let page = page("log.md")?;
    let explained: Vec<&str> = page.lines().filter_map(|line| line.strip_prefix("| ")?.split(" | ").next()).collect();
    let mut files = Vec::new();
    for folder in ["node", "keyvault", "raft", "storage"] {
        sources(&repository().join(folder).join("src"), &mut files)?;
    }
    let mut said = Vec::new();
    for file in files {
        said.extend(messages(&std::fs::read_to_string(&file)?).into_iter().map(|message| (file.clone(), message)));
    }
    ensure!(said.len() > 50, "only {} messages were found in the sources", said.len());
    let missing: Vec<_> = said.iter().filter(|(_, message)| !explained.contains(&message.as_str())).collect();
    ensure!(missing.is_empty(), "docs/operations/log.md does not explain {missing:#?}");
    let gone: Vec<_> = explained
        .iter()
        .filter(|line| !line.starts_with("Line") && !said.iter().any(|(_, message)| message == *line))
        .collect();
    ensure!(gone.is_empty(), "docs/operations/log.md explains what nothing says: {gone:#?}");
    Ok(())
}
