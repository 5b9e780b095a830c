"""A PyEnsign publisher and subscriber that say on stdout, line by line, what happens to them.

    begun COUNT         events 0 to COUNT - 1 have been given to the SDK
    ack NUMBER          the SDK says that this event was acked
    nack NUMBER WHY     … or nacked
    got ID PAYLOAD      the subscriber got this event
    trouble WHAT        an error that the SDK raised; it is made anew and goes on
    ready               both streams are open

Payloads are `PUBLISHER:NUMBER`. It ends once its input does. The SDK never sends an event twice; neither do we.
"""

import asyncio
import contextlib
import logging
import sys
import threading

from pyensign.ensign import Ensign
from pyensign.events import Event

logging.getLogger().setLevel(logging.CRITICAL)
logging.getLogger("asyncio").setLevel(logging.CRITICAL)

endpoint, auth_url, credentials, topic, publisher, rate = sys.argv[1:7]
BURSTS = 10
finish = threading.Event()


def say(line):
    print(line, flush=True)


def client():
    return Ensign(cred_path=credentials, endpoint=endpoint, insecure=True, auth_url=auth_url)


async def close(ensign):
    with contextlib.suppress(Exception, asyncio.CancelledError):
        ensign.client._ensure_ready()
        await asyncio.wait_for(ensign.close(), 5)


def words(error):
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


async def publish(opened):
    number = 0
    waiting = {}
    while not finish.is_set():
        ensign = client()
        try:
            while not finish.is_set():
                burst = max(1, int(rate) // BURSTS)
                events = [
                    Event(data=f"{publisher}:{n}".encode(), mimetype="text/plain") for n in range(number, number + burst)
                ]
                # Said before it is done: the SDK may fail half way.
                waiting.update(zip(range(number, number + burst), events))
                number += burst
                say(f"begun {number}")
                await asyncio.wait_for(ensign.publish(topic, *events), 30)
                opened.set()
                await asyncio.sleep(1 / BURSTS)
                report(waiting)
        except Exception as error:
            say(f"trouble {words(error)}")
            await asyncio.sleep(0.5)
        # What is under way may still be answered, on this client's stream only.
        for _ in range(50):
            report(waiting)
            if not waiting:
                break
            await asyncio.sleep(0.1)
        await close(ensign)
        report(waiting)
        waiting.clear()


def report(waiting):
    for number, event in list(waiting.items()):
        if event.acked():
            say(f"ack {number}")
            del waiting[number]
        elif event.nacked():
            say(f"nack {number} {' '.join(str(event.error).split())}")
            del waiting[number]
    # The SDK forgets nothing that was never answered; neither a stream that broke nor we will ever hear of the oldest again.
    while len(waiting) > 20_000:
        del waiting[next(iter(waiting))]


async def subscribe(opened):
    while True:
        ensign = client()
        watch = asyncio.create_task(until_ready(ensign, opened))
        try:
            async for event in ensign.subscribe(topic):
                say(f"got {event.id.bytes.hex()} {event.data.decode()}")
        except asyncio.CancelledError:
            await close(ensign)
            raise
        except Exception as error:
            say(f"trouble {words(error)}")
            await asyncio.sleep(0.5)
        finally:
            watch.cancel()
        await close(ensign)


async def until_ready(ensign, opened):
    while not any(stream._topics for stream in ensign.client.subscribers.values()):
        await asyncio.sleep(0.05)
    opened.set()


async def main():
    threading.Thread(target=lambda: (sys.stdin.read(), finish.set()), daemon=True).start()
    subscribed, published = asyncio.Event(), asyncio.Event()
    subscriber = asyncio.create_task(subscribe(subscribed))
    await subscribed.wait()
    publishing = asyncio.create_task(publish(published))
    await published.wait()
    say("ready")
    await publishing
    # The last events are on their way to the subscriber.
    await asyncio.sleep(2)
    subscriber.cancel()
    with contextlib.suppress(asyncio.CancelledError, asyncio.TimeoutError):
        await asyncio.wait_for(subscriber, 10)


asyncio.run(main())
