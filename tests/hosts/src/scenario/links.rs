//! Whether links do what they are told: between two probes, without a cluster.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, Command};
use tokio::time::{Instant, timeout};

use super::say;
use crate::cluster::Mechanism;
use crate::links::{Links, Namespaces, Network, Proxy, Way, namespaces, patterns};

/// Long enough that what is not cut has arrived, on any machine; what is cut never does.
const SURELY: Duration = Duration::from_secs(20);
/// How long something is awaited that must not arrive.
const A_WHILE: Duration = Duration::from_millis(400);

/// Two programs that talk over one connection, made by node 1: each line that one says, the other repeats.
struct Probe {
    /// Node 2, which listens. Lives as long as the probe.
    _answerer: Child,
    /// Node 1.
    caller: Child,
    lines: tokio::io::Lines<BufReader<tokio::process::ChildStdout>>,
}

/// The other side of the probe: repeats every line of every connection, one connection after the other. Never returns in success.
///
/// # Errors
/// The address cannot be listened on.
pub async fn answer(listen: SocketAddr) -> anyhow::Result<()> {
    let listener = TcpListener::bind(listen).await?;
    say("up");
    loop {
        let (stream, _) = listener.accept().await?;
        let (mut read, mut write) = stream.into_split();
        // Its end, in whatever way, is the caller's business.
        let _ = tokio::io::copy(&mut read, &mut write).await;
    }
}

/// The probe's own side: what it reads goes there, what comes back it says.
///
/// # Errors
/// The address cannot be connected to, or the connection breaks.
pub async fn call(to: SocketAddr) -> anyhow::Result<()> {
    let (mut read, mut write) = TcpStream::connect(to).await?.into_split();
    let (mut stdin, mut stdout) = (tokio::io::stdin(), tokio::io::stdout());
    tokio::select! {
        sent = tokio::io::copy(&mut stdin, &mut write) => sent?,
        heard = tokio::io::copy(&mut read, &mut stdout) => heard?,
    };
    Ok(())
}

impl Probe {
    async fn start(
        command: impl Fn(u64) -> Vec<String>,
        listen: SocketAddr,
        through: SocketAddr,
    ) -> anyhow::Result<Self> {
        let this = std::env::current_exe()?.display().to_string();
        let side = |node: u64, name: &str, address: SocketAddr| {
            let words: Vec<String> = command(node).into_iter().chain([this.clone()]).collect();
            let mut command = Command::new(&words[0]);
            command.args(&words[1..]).args([name, &address.to_string()]);
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
            command
        };
        let mut answerer = side(2, "probe-answer", listen).spawn().context("cannot start the probe")?;
        let mut up = BufReader::new(answerer.stdout.take().context("piped")?).lines();
        timeout(SURELY, up.next_line()).await.context("the probe does not start")??;
        let mut caller = side(1, "probe-call", through).spawn().context("cannot start the probe")?;
        let lines = BufReader::new(caller.stdout.take().context("piped")?).lines();
        Ok(Self { _answerer: answerer, caller, lines })
    }

    async fn send(&mut self, line: &str) -> anyhow::Result<()> {
        let stdin = self.caller.stdin.as_mut().context("piped")?;
        stdin.write_all(format!("{line}\n").as_bytes()).await?;
        Ok(stdin.flush().await?)
    }

    /// The next line that comes back, if one does within `limit`.
    async fn hear(&mut self, limit: Duration) -> anyhow::Result<Option<String>> {
        match timeout(limit, self.lines.next_line()).await {
            Ok(line) => Ok(Some(line?.context("the probe ended")?)),
            Err(_) => Ok(None),
        }
    }
}

/// Cuts each way in turn, and both, and heals them, while one connection stays open; delays where the mechanism can.
///
/// # Errors
/// What a link did that it should not have done.
pub async fn run(mechanism: Mechanism) -> anyhow::Result<()> {
    let nodes = [1, 2].into();
    let port = |ip: std::net::IpAddr| -> anyhow::Result<SocketAddr> {
        Ok(SocketAddr::new(ip, std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port()))
    };
    let (links, listen, through): (Box<dyn Links>, _, _) = match mechanism {
        Mechanism::Netns => {
            let address = port(namespaces::address(2).into())?;
            (Box::new(Namespaces::of_this_hub()?), address, address)
        }
        Mechanism::Proxy => {
            let real = port(std::net::Ipv4Addr::LOCALHOST.into())?;
            let (proxy, addresses): (_, BTreeMap<Way, SocketAddr>) = Proxy::start(patterns::ways(&nodes), |_| real)?;
            (Box::new(proxy), real, addresses[&(1, 2)])
        }
    };
    let mut network = Network::new(nodes, links);
    let command = |node| match mechanism {
        Mechanism::Netns => Namespaces::of_this_hub().map(|it| it.command(node)).unwrap_or_default(),
        Mechanism::Proxy => Vec::new(),
    };
    let mut probe = Probe::start(command, listen, through).await?;
    probe.send("hello").await?;
    ensure!(probe.hear(SURELY).await?.as_deref() == Some("hello"), "a sound link carries nothing");
    for (what, ways) in [("1->2", vec![(1, 2)]), ("2->1", vec![(2, 1)]), ("1->2 and 2->1", vec![(1, 2), (2, 1)])] {
        network.cut(ways)?;
        probe.send(what).await?;
        let heard = probe.hear(A_WHILE).await?;
        ensure!(heard.is_none(), "with {what} cut, {heard:?} came back");
        network.heal()?;
        let heard = probe.hear(SURELY).await?;
        ensure!(heard.as_deref() == Some(what), "{what} is healed, and {heard:?} came back instead of what had waited");
        say(format!("cut {what}: nothing passed; healed: what had waited arrived"));
    }
    if mechanism == Mechanism::Proxy {
        let late = Duration::from_millis(150);
        network.delay([(1, 2), (2, 1)], late)?;
        let begun = Instant::now();
        probe.send("late").await?;
        probe.hear(SURELY).await?;
        ensure!(begun.elapsed() >= late * 2, "a round trip over two delays took {:?}", begun.elapsed());
        say(format!("delay of {late:?} each way: a round trip took {:?}", begun.elapsed()));
    }
    Ok(())
}
