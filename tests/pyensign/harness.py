"""Runs `ensign dev` as a user would, and talks to it with the unmodified PyEnsign.

`ENSIGN_BIN` names the binary. Everything a server writes stays in a temporary folder; its output is shown when a test fails
to start or to stop it.
"""

import asyncio
import contextlib
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import unittest
from pathlib import Path

from pyensign.ensign import Ensign

# The SDK reports every broken stream as a warning; here they are broken on purpose.
logging.getLogger().setLevel(logging.ERROR)
# It also leaves tasks behind when a stream it would open again is closed meanwhile.
logging.getLogger("asyncio").setLevel(logging.CRITICAL)

BINARY = os.environ.get("ENSIGN_BIN", "target/release/ensign")
START_SECONDS = 120
STOP_SECONDS = 60


def free_ports(count):
    """Ports that nothing listens on. All are held until all are known, so they differ."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        return [item.getsockname()[1] for item in sockets]


class Server:
    """One `ensign dev`: the same data folder, ports and credentials over all its starts."""

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="ensign-pyensign-"))
        self.data = self.folder / "data"
        self.credentials = self.folder / "credentials.json"
        self.log = self.folder / "output.log"
        grpc, http, metrics = free_ports(3)
        self.endpoint = f"127.0.0.1:{grpc}"
        self.auth_url = f"http://127.0.0.1:{http}"
        self.metrics_url = f"http://127.0.0.1:{metrics}"
        self.command = [
            BINARY, "dev", "--data", str(self.data), "--credentials", str(self.credentials),
            "--grpc", self.endpoint, "--http", f"127.0.0.1:{http}", "--metrics", f"127.0.0.1:{metrics}",
        ]  # fmt: skip
        self.process = None

    def environment(self):
        """Ours, without settings that were meant for another server or client."""
        return {name: value for name, value in os.environ.items() if not name.startswith("ENSIGN_")}

    def start(self):
        """Returns once the server says that it is ready."""
        with open(self.log, "ab") as log:
            position = log.tell()
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                cwd=self.folder, env=self.environment(),
            )  # fmt: skip
        deadline = time.monotonic() + START_SECONDS
        while "ready" not in self.lines(position):
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended with {self.process.returncode}:\n{self.tail()}")
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"the server was not ready in {START_SECONDS} s:\n{self.tail()}")
            time.sleep(0.05)
        return self

    def stop(self):
        """Asks the server to end, and insists that it does so cleanly."""
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the server did not end in {STOP_SECONDS} s:\n{self.tail()}") from None
        if code != 0:
            raise AssertionError(f"the server ended with {code}:\n{self.tail()}")

    def kill(self):
        """Ends the server without asking it."""
        self.process.kill()
        self.process.wait()

    def remove(self):
        """Ends the server, if it runs, and deletes what it wrote."""
        if self.process and self.process.poll() is None:
            self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def lines(self, position=0):
        with open(self.log, errors="replace") as log:
            log.seek(position)
            return [line.strip() for line in log]

    def tail(self):
        return "\n".join(self.lines()[-40:])

    def keys(self):
        return json.loads(self.credentials.read_text())

    def client(self, **changes):
        """A PyEnsign client, made in the way that the snippet `ensign dev` prints makes it."""
        settings = {
            "cred_path": str(self.credentials),
            "endpoint": self.endpoint,
            "insecure": True,
            "auth_url": self.auth_url,
        }
        return Ensign(**{**settings, **changes})

    def ensign(self, *arguments, check=True, data=None):
        """Runs one of our own client commands and returns its output."""
        command = [BINARY, *arguments, "--credentials", str(self.credentials)]
        done = subprocess.run(
            command, input=data, capture_output=True, timeout=120, env=self.environment(), cwd=self.folder
        )
        if check and done.returncode != 0:
            raise AssertionError(f"{command} ended with {done.returncode}:\n{done.stderr.decode(errors='replace')}")
        return done.stdout if check else done


class Case(unittest.IsolatedAsyncioTestCase):
    """A test with a `server`; the clients it makes are closed when it ends."""

    def client(self, **changes):
        # unittest turns asyncio's debug mode on, which makes a stream four times slower.
        asyncio.get_running_loop().set_debug(False)
        client = self.server.client(**changes)
        self.addAsyncCleanup(close, client)
        return client


class ServerCase(Case):
    """Tests that share one running server."""

    @classmethod
    def setUpClass(cls):
        cls.server = Server()
        cls.addClassCleanup(cls.server.remove)
        cls.server.start()


async def close(client):
    """Closes a client; a test that has failed must not hang here."""
    client.client._ensure_ready()
    with contextlib.suppress(asyncio.TimeoutError, asyncio.CancelledError):
        await asyncio.wait_for(client.close(), 10)


async def publish(client, topic, events, seconds=300):
    """Publishes events and waits until each is answered."""
    await asyncio.wait_for(client.publish(topic, *events), seconds)
    await answered(events, seconds)


async def answered(events, seconds=300):
    """Waits until each of the events is acked or nacked."""
    deadline = time.monotonic() + seconds
    for place, event in enumerate(events):
        while not (event.acked() or event.nacked()):
            if time.monotonic() > deadline:
                raise AssertionError(f"{len(events) - place} of {len(events)} events were not answered in {seconds} s")
            await asyncio.sleep(0.01)


class Live:
    """A subscriber that runs in the background and keeps what it gets."""

    def __init__(self, client, *topics):
        self.client, self.topics, self.events, self.error = client, topics, [], None
        self.task = None

    async def __aenter__(self):
        self.task = asyncio.create_task(self.run())
        # What is published from now on must arrive, so wait for the server's `ready`, which fills this map.
        while not any(stream._topics for stream in self.client.client.subscribers.values()):
            if self.task.done():
                await self.task
                raise AssertionError("the subscription ended")
            await asyncio.sleep(0.01)
        return self

    async def run(self):
        async for event in self.client.subscribe(*self.topics):
            self.events.append(event)

    async def wait_for(self, count, seconds=300):
        deadline = time.monotonic() + seconds
        while len(self.events) < count:
            if self.task.done():
                await self.task
                raise AssertionError("the subscription ended")
            if time.monotonic() > deadline:
                raise AssertionError(f"{len(self.events)} of {count} events arrived in {seconds} s")
            await asyncio.sleep(0.01)

    async def __aexit__(self, *_):
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await self.task


async def query(client, text, seconds=300):
    """All rows of a query."""
    cursor = await asyncio.wait_for(client.query(text), seconds)
    return await asyncio.wait_for(cursor.fetchall(), seconds)
