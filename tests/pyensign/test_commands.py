"""The SDK and our own commands see one and the same thing."""

import asyncio
import base64
import json
import os
import time
from pathlib import Path

from pyensign.events import Event
from pyensign.exceptions import EnsignRPCError

from harness import Live, ServerCase, close, publish, query


def rows_of(output):
    return [json.loads(line) for line in output.splitlines()]


class Commands(ServerCase):
    async def ensign(self, *arguments, **options):
        return await asyncio.to_thread(self.server.ensign, *arguments, **options)

    async def test_an_event_too_large_for_the_sdk_is_read_with_our_client(self):
        client = self.client()
        await client.create_topic("large")
        sizes = [1, 4_900_000, 5_200_000]
        sent = [Event(data=os.urandom(size), mimetype="application/octet-stream", meta={"n": str(size)}) for size in sizes]
        await publish(client, "large", sent)
        self.assertTrue(all(event.acked() for event in sent))
        for command in [("subscribe", "large", "--from", "earliest", "--count", "3"), ("query", "SELECT * FROM large")]:
            with self.subTest(command[0]):
                rows = rows_of(await self.ensign(*command, "--output", "json"))
                self.assertEqual([row["offset"] for row in rows], [1, 2, 3])
                self.assertEqual([row["metadata"]["n"] for row in rows], [str(size) for size in sizes])
                self.assertEqual([self.data(row) for row in rows], [event.data for event in sent])

    def data(self, row):
        return base64.b64decode(row["data_base64"]) if "data_base64" in row else row["data"].encode()

    async def test_what_our_command_publishes_the_sdk_reads(self):
        await self.ensign("topic", "create", "lines")
        lines = [json.dumps({"line": number, "text": "snow \N{SNOWMAN}"}).encode() for number in range(1000)]
        async with Live(self.client(), "lines") as live:
            await self.ensign("publish", "lines", "--key-value", "by=ensign", data=b"\n".join(lines))
            await live.wait_for(len(lines))
        rows = await query(self.client(), "SELECT * FROM lines")
        for events in [live.events, rows]:
            self.assertEqual([bytes(event.data) for event in events], lines)
            self.assertEqual({(event.mimetype, event.meta["by"]) for event in events}, {(50, "ensign")})

    async def test_an_api_key_does_what_it_may_until_it_is_revoked(self):
        admin = self.client()
        await admin.create_topic("guarded")
        await publish(admin, "guarded", [Event(data=b"secret", mimetype="text/plain")])
        file = self.server.folder / "reader.json"
        await self.ensign("apikey", "create", "reader", "--permission", "subscriber", "--permission", "topics:read",
                          "--save", str(file))  # fmt: skip
        self.assertEqual(file.stat().st_mode & 0o777, 0o600)

        reader = self.client(cred_path=str(file))
        self.assertEqual([bytes(event.data) for event in await query(reader, "SELECT * FROM guarded")], [b"secret"])
        for refused in [
            reader.create_topic("forbidden"),
            reader.info(),
            reader.publish("guarded", Event(data=b"x", mimetype="text/plain")),
        ]:
            with self.assertRaises(EnsignRPCError) as denied:
                await refused
            self.assertEqual((denied.exception.name, denied.exception.details),
                             ("PERMISSION_DENIED", "not authorized to perform this action"))  # fmt: skip

        # The token that the reader holds is good for an hour, and ends with its key all the same.
        await self.ensign("apikey", "revoke", json.loads(file.read_text())["ClientID"], "--yes")
        deadline = time.monotonic() + 20
        while True:
            try:
                await query(reader, "SELECT * FROM guarded")
            except EnsignRPCError as error:
                self.assertEqual(error.name, "UNAUTHENTICATED")
                break
            self.assertLess(time.monotonic(), deadline, "the key's token still works")
            await asyncio.sleep(0.1)
        with self.assertRaises(EnsignRPCError) as refused:
            await query(self.client(cred_path=str(file)), "SELECT * FROM guarded")
        self.assertIn("403", refused.exception.details, "it does not log in again either")
        self.assertEqual(len(await query(self.client(), "SELECT * FROM guarded")), 1, "other keys read on")


class Revoked(ServerCase):
    async def test_a_revoked_key_shreds_its_project_and_no_other(self):
        run = lambda *arguments: asyncio.to_thread(self.server.ensign, *arguments)
        client = self.client()
        await client.create_topic("shredded")
        await publish(client, "shredded", [Event(data=b"gone for ever", mimetype="text/plain")])

        project = json.loads(await run("project", "create", "other", "--output", "json"))
        file = self.server.folder / "other.json"
        await run("apikey", "create", "other", "--project", project["id"], "--save", str(file))
        other = self.client(cred_path=str(file))
        await other.create_topic("kept")
        await publish(other, "kept", [Event(data=b"still here", mimetype="text/plain")])

        await run("key", "rotate")
        await publish(client, "shredded", [Event(data=b"gone as well", mimetype="text/plain")])
        self.assertEqual(len(await query(client, "SELECT * FROM shredded")), 2, "a rotation rewrites nothing")

        await run("key", "revoke", "--all", "--yes")
        for restarted in [False, True]:
            with self.subTest(restarted=restarted):
                if restarted:
                    await asyncio.to_thread(self.server.stop)
                    await asyncio.to_thread(self.server.start)
                # A cluster that has just started may still be electing leaders, and says so; plaintext it never gives.
                for _ in range(60):
                    with self.assertRaises(EnsignRPCError) as refused:
                        await query(self.client(), "SELECT * FROM shredded")
                    if refused.exception.name != "UNAVAILABLE":
                        break
                    await asyncio.sleep(0.5)
                self.assertEqual(refused.exception.name, "FAILED_PRECONDITION", refused.exception.details)
                self.assertIn("revoked", refused.exception.details)
                done = await asyncio.to_thread(
                    self.server.ensign, "subscribe", "shredded", "--from", "earliest", "--count", "1", check=False)  # fmt: skip
                self.assertNotEqual(done.returncode, 0)
                self.assertNotIn(b"gone", done.stdout)
                rows = await query(self.client(cred_path=str(file)), "SELECT * FROM kept")
                self.assertEqual([bytes(event.data) for event in rows], [b"still here"])


class Hidden(ServerCase):
    async def test_event_bytes_are_in_no_file(self):
        client = self.client()
        await client.create_topic("sealed")
        pattern = b"a pattern that nobody would write by chance: 7f3a91"
        events = [Event(data=pattern + str(n).encode(), mimetype="text/plain", meta={"m": "meta-" + "7f3a91" * 4}) for n in range(500)]
        await publish(client, "sealed", events)
        self.assertEqual(len(await query(self.client(), "SELECT * FROM sealed")), len(events))
        await close(client)
        await asyncio.to_thread(self.server.stop)
        secret = self.server.keys()["ClientSecret"].encode()
        found, searched = {"data": [], "metadata": [], "secret": []}, 0
        for path in filter(Path.is_file, self.server.data.rglob("*")):
            content = path.read_bytes()
            searched += len(content)
            for what, needle in [("data", pattern), ("metadata", b"7f3a91" * 4), ("secret", secret)]:
                if needle in content:
                    found[what].append(path.name)
        # `dev` keeps its credentials, so the search must see the secret there, and nowhere else.
        self.assertEqual(found, {"data": [], "metadata": [], "secret": ["credentials.json"]})
        self.assertGreater(searched, 1_000_000)
