"""A restart loses nothing that was acked, neither when the server is asked to end nor when it is killed."""

import asyncio

from pyensign.events import Event

from harness import Case, Live, Server, publish, query


def numbered(numbers):
    return [Event(data=f"event {number}".encode(), mimetype="text/plain", meta={"n": str(number)}) for number in numbers]


def numbers_of(events):
    return [int(event.meta["n"]) for event in events]


class Restart(Case):
    def setUp(self):
        self.server = Server()
        self.addCleanup(self.server.remove)
        self.server.start()

    async def test_a_clean_restart_keeps_credentials_topics_and_events(self):
        keys = self.server.keys()
        client, reader = self.client(), self.client()
        await client.create_topic("numbers")
        first, second = numbered(range(2000)), numbered(range(2000, 4000))
        async with Live(reader, "numbers") as live:
            await publish(client, "numbers", first)
            await live.wait_for(len(first))
            [stream] = reader.client.subscribers.values()
            before = stream.stream
            self.server.stop()
            self.server.start()
            self.assertEqual(self.server.keys(), keys, "the credentials stay")

            # What is there after the restart, to a client that has never seen the server before.
            rows = await query(self.client(), "SELECT * FROM numbers")
            self.assertEqual(numbers_of(rows), list(range(2000)))
            self.assertEqual([event.id.bytes for event in rows], [event.id.bytes for event in live.events])

            # The same clients carry on: the SDK reconnects by itself, at the live tail.
            await self.reconnected(stream, before)
            await publish(client, "numbers", second)
            await live.wait_for(len(first) + len(second))
        self.assertEqual(numbers_of(live.events), list(range(4000)))
        rows = await query(self.client(), "SELECT * FROM numbers")
        self.assertEqual(numbers_of(rows), list(range(4000)))
        ids = [event.id.bytes for event in rows]
        self.assertEqual(ids, sorted(set(ids)), "ids never go back, also over a restart")

    async def test_what_was_acked_survives_a_kill(self):
        client = self.client()
        await client.create_topic("numbers")
        sent = []
        for round in range(3):
            if round:
                self.server.start()
            events = numbered(range(5000 * round, 5000 * (round + 1)))
            sent += events
            publisher = self.client()
            publishing = asyncio.create_task(publisher.publish("numbers", *events))
            while sum(event.acked() for event in events) < 500:
                self.assertFalse(publishing.done() and publishing.exception(), "publishing failed")
                await asyncio.sleep(0.01)
            self.server.kill()
            publishing.cancel()
            await asyncio.gather(publishing, return_exceptions=True)
            await asyncio.sleep(0.5)
        self.server.start()

        # Before the query: publishers that reconnect meanwhile get more acks.
        acked = [int(event.meta["n"]) for event in sent if event.acked()]
        rows = numbers_of(await query(self.client(), "SELECT * FROM numbers"))
        self.assertGreaterEqual(len(acked), 1500)
        self.assertEqual(len(rows), len(set(rows)), "each once")
        # A publisher of an earlier round reconnects and goes on, so rounds mix; within a round the order is kept.
        for round in range(3):
            stored = [n for n in rows if n // 5000 == round]
            self.assertEqual(stored, sorted(stored), "in the order they were published")
        self.assertEqual(set(acked) - set(rows), set(), "every acked event is there")
        print(f"\n3 kills: {len(acked)} events acked, {len(rows)} stored", flush=True)

    async def reconnected(self, stream, before):
        """Waits for the SDK's own reconnect, which it tries every 750 ms."""
        for _ in range(600):
            if stream.stream is not before and not stream.stream.done():
                await asyncio.sleep(1)
                return
            await asyncio.sleep(0.1)
        raise AssertionError("the subscriber did not reconnect in 60 s")
