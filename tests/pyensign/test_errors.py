"""What goes wrong says so: bad credentials, unknown topics, refused events and malformed queries."""

import os

import grpc
from pyensign.api.v1beta1 import ensign_pb2, ensign_pb2_grpc, event_pb2, query_pb2, topic_pb2
from pyensign.events import Event
from pyensign.exceptions import (
    EnsignInvalidArgument,
    EnsignRPCError,
    InvalidQueryError,
    NackError,
    QueryNoRows,
    UnknownTopicError,
)
from ulid import ULID

from harness import ServerCase, publish, query

LARGEST_EVENT = 5_243_000


def text(data):
    return Event(data=data, mimetype="text/plain")


class Errors(ServerCase):
    async def asyncSetUp(self):
        self.ensign = self.client()
        await self.ensign.ensure_topic_exists("present")

    async def test_wrong_credentials_do_not_log_in(self):
        keys = self.server.keys()
        wrong = [
            {"client_id": keys["ClientID"], "client_secret": "x" * 64},
            {"client_id": "x" * 32, "client_secret": keys["ClientSecret"]},
        ]
        for credentials in wrong:
            with self.subTest(credentials=credentials["client_id"]), self.assertRaises(EnsignRPCError) as refused:
                await self.client(cred_path="", **credentials).get_topics()
            self.assertEqual(refused.exception.name, "UNAUTHENTICATED")
            self.assertEqual(refused.exception.details, "Failed to authenticate with API credentials: 403 error returned")

    async def test_a_call_without_a_good_token_is_refused(self):
        async with grpc.aio.insecure_channel(self.server.endpoint) as channel:
            stub = ensign_pb2_grpc.EnsignStub(channel)
            for metadata, message in [
                ((), "missing credentials"),
                ((("authorization", "Bearer nonsense"),), "invalid credentials"),
                ((("authorization", "Basic bm9uc2Vuc2U="),), "credentials"),
            ]:
                with self.subTest(metadata=metadata):
                    with self.assertRaises(grpc.aio.AioRpcError) as refused:
                        await stub.ListTopics(ensign_pb2.PageInfo(), metadata=metadata)
                    self.assertEqual(refused.exception.code(), grpc.StatusCode.UNAUTHENTICATED)
                    self.assertIn(message, refused.exception.details())
            self.assertEqual((await stub.Status(ensign_pb2.HealthCheck())).status, 1, "Status needs no token")

    async def test_an_unknown_topic_is_refused(self):
        with self.assertRaises(UnknownTopicError):
            await self.ensign.publish("absent", text(b"."))
        with self.assertRaises(UnknownTopicError):
            await self.ensign.publish(str(ULID()), text(b"."))
        with self.assertRaises(EnsignRPCError) as refused:
            await anext(self.client().subscribe("absent"))
        self.assertEqual((refused.exception.name, refused.exception.details),
                         ("FAILED_PRECONDITION", "no topics available"))  # fmt: skip
        with self.assertRaisesRegex(InvalidQueryError, "unknown topic"):
            await query(self.ensign, "SELECT * FROM absent")

    async def test_an_oversize_event_is_nacked_and_the_stream_lives_on(self):
        before, large, after = text(b"before"), text(os.urandom(LARGEST_EVENT + 1)), text(b"after")
        await publish(self.ensign, "present", [before, large, after])
        self.assertTrue(before.acked() and after.acked())
        self.assertEqual(large.nack_error().code, ensign_pb2.Nack.MAX_EVENT_SIZE_EXCEEDED)
        with self.assertRaises(NackError):
            await large.wait_for_ack()

    async def test_the_largest_event_is_accepted(self):
        # The limit is on the serialized event: 5,243,000 bytes with everything around the payload.
        around = len(text(b"x").proto().SerializeToString()) + 8
        largest = text(os.urandom(LARGEST_EVENT - around))
        await publish(self.ensign, "present", [largest])
        self.assertTrue(largest.acked())

    async def test_an_archived_topic_takes_no_event_and_can_be_read(self):
        topic = await self.ensign.create_topic("archived")
        kept = text(b"kept")
        await publish(self.ensign, "archived", [kept])
        _, state = await self.ensign.client.archive_topic(topic)
        self.assertEqual(state, topic_pb2.READONLY)
        # On the stream that was open when it was archived, and on a new one.
        for client in [self.ensign, self.client()]:
            refused = text(b"refused")
            await publish(client, "archived", [refused])
            self.assertEqual(refused.nack_error().code, ensign_pb2.Nack.TOPIC_ARCHIVED)
        self.assertEqual([bytes(event.data) for event in await query(self.ensign, "SELECT * FROM archived")], [b"kept"])

    async def test_a_destroyed_topic_takes_no_event(self):
        topic = await self.ensign.create_topic("destroyed")
        await publish(self.ensign, "destroyed", [text(b"gone")])
        await self.ensign.client.destroy_topic(topic)
        refused = text(b"refused")
        await publish(self.ensign, "destroyed", [refused])
        self.assertIn(refused.nack_error().code, [ensign_pb2.Nack.TOPIC_DELETED, ensign_pb2.Nack.TOPIC_UNKNOWN])

    async def test_a_name_that_is_taken_or_malformed_is_refused(self):
        with self.assertRaises(EnsignRPCError) as refused:
            await self.ensign.create_topic("present")
        self.assertEqual((refused.exception.name, refused.exception.details),
                         ("ALREADY_EXISTS", "topic name already exists in project"))  # fmt: skip
        for name, message in [
            ("", "missing name field"),
            ("x" * 513, "topic name is too long"),
            ("a/b", "topic name is invalid"),
            ("1st", "topic name is invalid"),
        ]:
            with self.subTest(name=name[:10]), self.assertRaises(EnsignInvalidArgument) as refused:
                await self.ensign.create_topic(name)
            self.assertEqual(refused.exception.details, message)

    async def test_a_malformed_query_is_refused_with_a_reason(self):
        for text_of_query in [
            "WHERE",
            "SELECT",
            "SELECT FROM present",
            "INSERT INTO present",
            "SELECT * FROM present LIMIT 7.77",
            "SELECT * FROM present OFFSET abcd",
            "SELECT * FROM present; and more",
            'SELECT * FROM "present"',
        ]:
            with self.subTest(text_of_query), self.assertRaises(InvalidQueryError) as refused:
                await query(self.ensign, text_of_query)
            self.assertTrue(str(refused.exception))

    async def test_a_query_without_rows_says_so(self):
        await self.ensign.create_topic("empty")
        with self.assertRaises(QueryNoRows):
            await query(self.ensign, "SELECT * FROM empty")

    async def test_a_stream_must_begin_with_its_opening_message(self):
        stub, metadata = await self.stub()
        wrong = ensign_pb2.PublisherRequest(event=event_pb2.EventWrapper(local_id=ULID().bytes))
        with self.assertRaises(grpc.aio.AioRpcError) as refused:
            stream = stub.Publish(metadata=metadata)
            await stream.write(wrong)
            await stream.read()
        self.assertEqual(refused.exception.code(), grpc.StatusCode.FAILED_PRECONDITION)

        opening = ensign_pb2.PublisherRequest(open_stream=ensign_pb2.OpenStream(client_id="twice"))
        stream = stub.Publish(metadata=metadata)
        await stream.write(opening)
        self.assertEqual((await stream.read()).WhichOneof("embed"), "ready")
        await stream.write(opening)
        self.assertEqual((await stream.read()).WhichOneof("embed"), "close_stream")
        with self.assertRaises(grpc.aio.AioRpcError) as refused:
            await stream.read()
        self.assertEqual(refused.exception.code(), grpc.StatusCode.ABORTED)

    async def test_no_ack_is_lost_at_half_close(self):
        topic = await self.ensign.create_topic("half-close")
        stub, metadata = await self.stub()
        stream = stub.Publish(metadata=metadata)
        await stream.write(ensign_pb2.PublisherRequest(open_stream=ensign_pb2.OpenStream(client_id="half")))
        ids = [ULID().bytes for _ in range(500)]
        for local_id in ids:
            wrapper = event_pb2.EventWrapper(
                local_id=local_id, topic_id=ULID.from_str(topic).bytes, event=text(b"x").proto().SerializeToString()
            )
            await stream.write(ensign_pb2.PublisherRequest(event=wrapper))
        await stream.done_writing()
        replies = [reply async for reply in stream]
        kinds = [reply.WhichOneof("embed") for reply in replies]
        self.assertEqual(kinds, ["ready"] + ["ack"] * 500 + ["close_stream"])
        self.assertEqual([reply.ack.id for reply in replies[1:-1]], ids)
        summary = replies[-1].close_stream
        self.assertEqual((summary.events, summary.topics, summary.acks, summary.nacks), (500, 1, 500, 0))

    async def test_an_event_without_a_known_topic_is_nacked(self):
        stub, metadata = await self.stub()
        stream = stub.Publish(metadata=metadata)
        await stream.write(ensign_pb2.PublisherRequest(open_stream=ensign_pb2.OpenStream(client_id="nack")))
        self.assertEqual((await stream.read()).WhichOneof("embed"), "ready")
        for topic_id, message in [
            (b"", "no topic id specified"),
            (b"short", "invalid topic id"),
            (ULID().bytes, "topic unknown or unhandled"),
        ]:
            wrapper = event_pb2.EventWrapper(local_id=ULID().bytes, topic_id=topic_id, event=b"x")
            await stream.write(ensign_pb2.PublisherRequest(event=wrapper))
            nack = (await stream.read()).nack
            self.assertEqual((nack.id, nack.code, nack.error), (wrapper.local_id, ensign_pb2.Nack.TOPIC_UNKNOWN, message))
        stream.cancel()

    async def test_an_event_carries_what_the_server_knows(self):
        await publish(self.ensign, "present", [text(b"known")])
        stub, metadata = await self.stub()
        rows = [row async for row in stub.EnSQL(query_pb2.Query(query="SELECT * FROM present"), metadata=metadata)
                if row.ByteSize() < 1000]  # fmt: skip
        row = rows[-1]
        self.assertGreaterEqual(row.offset, 1)
        self.assertGreaterEqual(row.epoch, 1)
        self.assertGreater(row.committed.seconds, 1_600_000_000)
        self.assertEqual(row.local_id, b"")
        self.assertIn("pyensign/", row.publisher.user_agent)
        self.assertTrue(row.publisher.ipaddr.startswith("127.0.0.1:"))
        self.assertEqual(len(ULID.from_str(row.publisher.publisher_id).bytes), 16)

    async def stub(self):
        """The generated client and the token that PyEnsign got."""
        channel = grpc.aio.insecure_channel(
            self.server.endpoint, options=[("grpc.max_receive_message_length", 8 * 1024 * 1024)]
        )
        self.addAsyncCleanup(channel.close)
        token = self.ensign.client.connection.auth.credentials()
        return ensign_pb2_grpc.EnsignStub(channel), (token,)
