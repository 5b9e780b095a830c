"""Real data goes in through the unmodified PyEnsign and comes out byte-identical and in order, live and by query."""

import asyncio
import csv
import io
import json
import os
import time
from pathlib import Path

import msgpack
import vega_datasets
from pyensign.events import Event
from pyensign.exceptions import EnsignRPCError, QueryNoRows

from harness import Live, ServerCase, close, publish, query

DATA = Path(vega_datasets.__file__).parent / "_data"


def json_rows(name):
    return [json.dumps(row).encode() for row in json.loads((DATA / name).read_text())]


def csv_rows(name):
    return [line.encode() for line in (DATA / name).read_text().splitlines()[1:]]


def msgpack_rows(name):
    with open(DATA / name, newline="") as file:
        return [msgpack.packb(row) for row in csv.DictReader(file)]


# Topic, format, payloads: 13,251 events.
DATASETS = [
    ("cars", "application/json", lambda: json_rows("cars.json")),
    ("iris", "application/json", lambda: json_rows("iris.json")),
    ("airports", "text/csv", lambda: csv_rows("airports.csv")),
    ("seattle-temps", "text/csv", lambda: csv_rows("seattle-temps.csv")),
    ("stocks", "application/msgpack", lambda: msgpack_rows("stocks.csv")),
]


def events_of(topic, mimetype, payloads):
    return [
        Event(
            data=payload, mimetype=mimetype, schema_name=topic, schema_version="1.2.3",
            meta={"topic": topic, "place": str(place), "from": "vega \N{SNOWMAN}"},
        )  # fmt: skip
        for place, payload in enumerate(payloads)
    ]


def shape(event):
    """Everything of an event that its publisher chose."""
    return (
        bytes(event.data),
        event.mimetype,
        event.type.name,
        event.type.semver(),
        dict(event.meta),
        event.created.seconds,
        event.created.nanos,
    )


class RoundTrip(ServerCase):
    async def test_a_real_data_set_comes_back_live_and_by_query(self):
        client = self.client()
        sent = {}
        for topic, mimetype, payloads in DATASETS:
            await client.create_topic(topic)
            sent[topic] = events_of(topic, mimetype, payloads())
        total = sum(len(events) for events in sent.values())
        self.assertGreaterEqual(total, 10_000)

        started = time.monotonic()
        reader = self.client()
        async with Live(reader, *sent) as live:
            await asyncio.gather(*(publish(client, topic, events) for topic, events in sent.items()))
            await live.wait_for(total)
        print(f"\n{total} events published and delivered live in {time.monotonic() - started:.1f} s", flush=True)

        for topic, events in sent.items():
            with self.subTest(topic):
                self.assertEqual([event.acked() for event in events], [True] * len(events))
                arrived = [event for event in live.events if event.meta["topic"] == topic]
                self.assertEqual([shape(event) for event in arrived], [shape(event) for event in events])
                ids = [event.id.bytes for event in arrived]
                self.assertEqual(ids, sorted(set(ids)), "ids strictly increase")
                rows = await query(reader, f"SELECT * FROM {topic}")
                self.assertEqual([shape(event) for event in rows], [shape(event) for event in events])
                self.assertEqual([event.id.bytes for event in rows], ids)

        rows = await query(reader, "SELECT * FROM airports OFFSET 3000 LIMIT 100")
        self.assertEqual([shape(event) for event in rows], [shape(event) for event in sent["airports"][3000:3100]])

        info = await reader.info()
        self.assertEqual(info.num_topics, len(sent))
        self.assertEqual(info.events, total)
        self.assertEqual({str(topic.id): topic.events for topic in info.topics},
                         {await reader.topic_id(topic): len(events) for topic, events in sent.items()})  # fmt: skip

    async def test_the_smallest_and_the_largest_event_that_the_sdk_can_receive(self):
        client = self.client()
        await client.create_topic("extremes")
        sizes = [1, 2, 255, 65_536, 1_000_000, 4_000_000]
        sent = events_of("extremes", "application/octet-stream", [os.urandom(size) for size in sizes])
        async with Live(self.client(), "extremes") as live:
            await publish(client, "extremes", sent)
            await live.wait_for(len(sent))
        self.assertEqual([shape(event) for event in live.events], [shape(event) for event in sent])
        rows = await query(self.client(), "SELECT * FROM extremes")
        self.assertEqual([shape(event) for event in rows], [shape(event) for event in sent])

    async def test_a_reply_over_4_mib_is_a_clear_error_and_never_a_stuck_stream(self):
        client = self.client()
        await client.create_topic("large")
        payload = os.urandom(4_900_000)
        [large, small] = events_of("large", "application/octet-stream", [payload, b"."])
        reader = self.client()
        async with Live(reader, "large") as live:
            await publish(client, "large", [large])
            self.assertTrue(large.acked())
            # The SDK drops the stream that carried too much, and subscribes anew at the live tail: keep publishing until
            # the new stream is there.
            deadline = time.monotonic() + 60
            while not live.events:
                self.assertLess(time.monotonic(), deadline, "the subscriber is stuck")
                await publish(client, "large", events_of("large", "text/plain", [b"after"]))
                await asyncio.sleep(0.2)
            self.assertEqual(bytes(live.events[0].data), b"after")

        with self.assertRaises(EnsignRPCError) as refused:
            await query(self.client(), "SELECT * FROM large LIMIT 1")
        self.assertEqual(refused.exception.name, "RESOURCE_EXHAUSTED")
        rows = await query(self.client(), "SELECT * FROM large OFFSET 1 LIMIT 1")
        self.assertEqual(bytes(rows[0].data), b"after")

    async def test_a_topic_is_created_found_and_destroyed(self):
        client = self.client()
        topic = await client.create_topic("short-lived")
        await publish(client, "short-lived", events_of("short-lived", "text/plain", [b"one", b"two"]))
        self.assertTrue(await self.client().topic_exists("short-lived"))
        self.assertEqual(await self.client().topic_id("short-lived"), topic)
        self.assertIn("short-lived", [found.name for found in await self.client().get_topics()])
        self.assertEqual((await self.client().info([topic])).events, 2)

        _, state = await client.client.destroy_topic(topic)
        self.assertEqual(state.name, "DELETING")
        deadline = time.monotonic() + 60
        while await self.client().topic_exists("short-lived"):
            self.assertLess(time.monotonic(), deadline, "the topic is still there")
            await asyncio.sleep(0.1)
        again = await self.client().create_topic("short-lived")
        self.assertNotEqual(again, topic)
        with self.assertRaises(QueryNoRows):
            await query(self.client(), "SELECT * FROM short-lived")

    async def test_topics_come_in_pages(self):
        client = self.client()
        names = [f"page-{place:02}" for place in range(12)]
        for name in names:
            await client.create_topic(name)
        found, sizes, token = [], [], ""
        while token or not sizes:
            page, token = await client.client.list_topics(page_size=5, next_page_token=token)
            found += [topic.name for topic in page]
            sizes.append(len(page))
        self.assertEqual([name for name in found if name in names], names)
        self.assertEqual(set(sizes[:-1]), {5})
        self.assertEqual(len(found), len(set(found)))

    async def test_the_server_says_that_it_is_well(self):
        status = await self.client().status()
        self.assertEqual(status.status, 1)
        self.assertTrue(status.version)


class TopicNames(ServerCase):
    async def test_topics_are_known_by_the_hash_of_their_name(self):
        client = self.client()
        topic = await client.create_topic("testing.testapp.foo")
        names, token = await client.client.topic_names()
        self.assertEqual(token, "")
        self.assertEqual([(name.topic_id, name.name) for name in names], [(topic, "F4zgRRnbgjfip7Xj0rNGIg")])
        await close(client)
