//! Links between network namespaces: a namespace for each node, a pair of virtual interfaces to a bridge, and a packet filter in each.
//!
//! ```text
//! hub: the test and its clients, 10.213.0.254, and the bridge ─┬─ node 1: 10.213.0.1, drops what comes from the addresses in `cut`
//!                                                              └─ node 2: 10.213.0.2, …
//! ```
//!
//! The program that tests runs in a namespace of its own, the hub, so nothing of the machine's network is touched: [`run_in_hub`]
//! makes all of them, starts the program again inside, and takes them away at the end.
//! Not here: delays and throttles; the kernel's `netem` is missing on many machines, and the proxy does it.

use std::fmt::Write as _;
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context as _, bail, ensure};

use super::{Links, Node, Shape, Way};

/// Tells the program that it runs in the hub, and the name that all namespaces begin with.
const HUB: &str = "ENSIGN_HOSTS_HUB";

/// Names begin with it, then comes the id of the process that made them.
const PREFIX: &str = "ensign-hosts-";

/// The namespaces of one run, seen from their hub.
#[derive(Debug)]
pub struct Namespaces {
    prefix: String,
}

/// The address of a node.
pub fn address(node: Node) -> Ipv4Addr {
    Ipv4Addr::new(10, 213, 0, node as u8)
}

fn run(program: &str, args: &[&str], input: &str) -> anyhow::Result<()> {
    use std::io::Write as _;
    let missing =
        || format!("cannot run `{program}`: is it installed? Links through a proxy need no program: --links proxy");
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(missing)?;
    // Dropped at once, which is the end of the input.
    child.stdin.take().context("its input is a pipe")?.write_all(input.as_bytes())?;
    let output = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "`{program} {}` failed: {}", args.join(" "), said.trim());
    Ok(())
}

fn ip(args: &str) -> anyhow::Result<()> {
    run("ip", &args.split(' ').collect::<Vec<_>>(), "")
}

/// Why this machine cannot do it, if it cannot: tries with a namespace that it takes away again.
///
/// # Errors
/// What failed.
pub fn check() -> anyhow::Result<()> {
    let name = format!("{PREFIX}{}-check", std::process::id());
    ip(&format!("netns add {name}"))?;
    let _remove = Remove(name.clone());
    ip(&format!("-n {name} link add bridge0 type bridge"))?;
    ip(&format!("-n {name} link add end0 type veth peer name end1"))?;
    run("ip", &["netns", "exec", &name, "nft", "-f", "-"], RULES)
}

/// The packet filter of a node's namespace.
const RULES: &str = "table inet ensign {
    set cut { type ipv4_addr; }
    chain input { type filter hook input priority 0; policy accept; ip saddr @cut drop; }
}
";

struct Remove(String);

impl Drop for Remove {
    fn drop(&mut self) {
        // Also when making it failed half way; what is in it goes with it.
        let _ = ip(&format!("netns delete {}", self.0));
    }
}

/// Whether this program runs in a hub.
pub fn in_hub() -> bool {
    std::env::var_os(HUB).is_some()
}

/// Makes the namespaces of `nodes` nodes, runs this program again in their hub with the same arguments, and takes them away again.
///
/// # Errors
/// A namespace cannot be made, or the program cannot be started.
pub fn run_in_hub(nodes: u64) -> anyhow::Result<ExitCode> {
    remove_left_over();
    ensure!((1..=200).contains(&nodes), "{nodes} nodes: there are addresses for 1 to 200");
    let prefix = format!("{PREFIX}{}", std::process::id());
    let hub = format!("{prefix}-hub");
    let mut made = Vec::new();
    let mut make = |name: &str| -> anyhow::Result<()> {
        ip(&format!("netns add {name}"))?;
        made.push(Remove(name.to_owned()));
        ip(&format!("-n {name} link set lo up"))
    };
    make(&hub)?;
    ip(&format!("-n {hub} link add bridge0 type bridge"))?;
    ip(&format!("-n {hub} addr add 10.213.0.254/24 dev bridge0"))?;
    ip(&format!("-n {hub} link set bridge0 up"))?;
    for node in 1..=nodes {
        let name = format!("{prefix}-{node}");
        make(&name)?;
        ip(&format!("-n {hub} link add node{node} type veth peer name eth0 netns {name}"))?;
        ip(&format!("-n {hub} link set node{node} master bridge0 up"))?;
        ip(&format!("-n {name} addr add {}/24 dev eth0", address(node)))?;
        ip(&format!("-n {name} link set eth0 up"))?;
        run("ip", &["netns", "exec", &name, "nft", "-f", "-"], RULES)?;
    }
    let status = Command::new("ip")
        .args(["netns", "exec", &hub])
        .arg(std::env::current_exe()?)
        .args(std::env::args_os().skip(1))
        .env(HUB, &prefix)
        .status()?;
    Ok(ExitCode::from(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1)))
}

/// Namespaces whose maker was killed.
fn remove_left_over() {
    let Ok(entries) = std::fs::read_dir("/run/netns") else { return };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let maker = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next());
        if maker.is_some_and(|maker| !Path::new("/proc").join(maker).exists()) {
            drop(Remove(name));
        }
    }
}

impl Namespaces {
    /// The namespaces that this program was started among.
    ///
    /// # Errors
    /// It does not run in a hub.
    pub fn of_this_hub() -> anyhow::Result<Self> {
        let prefix = std::env::var(HUB).context("this program does not run in a hub")?;
        Ok(Self { prefix })
    }

    /// The beginning of a command that runs in the node's namespace.
    pub fn command(&self, node: Node) -> Vec<String> {
        ["ip", "netns", "exec"].map(str::to_owned).into_iter().chain([format!("{}-{node}", self.prefix)]).collect()
    }
}

impl Links for Namespaces {
    fn shape(&mut self, (from, to): Way, shape: Shape) -> anyhow::Result<()> {
        if (Shape { cut: false, ..shape }) != Shape::default() {
            bail!("links between namespaces can be cut, not delayed or throttled: use --links proxy");
        }
        let verb = if shape.cut { "add" } else { "delete" };
        let mut rule = String::new();
        writeln!(rule, "{verb} element inet ensign cut {{ {} }}", address(from))?;
        run("ip", &["netns", "exec", &format!("{}-{to}", self.prefix), "nft", "-f", "-"], &rule)
    }
}
