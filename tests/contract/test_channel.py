"""What every backend of the channel must do: deliver in order to everyone who listens, and never fall silent.

The whole contract holds for the memory of a process and for a Valkey; for every other kind of Valkey the way there is
what differs, and is tried.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

import orjson
import pytest
from broadcaster import Broadcast
from broadcaster._backends.base import BroadcastBackend

import streams.valkey
from streams.channel import _WAITING_MESSAGES, BroadcastChannel, MemoryBackend
from streams.valkey import PREFIX, ValkeyBackend
from tests.valkey import KINDS, Valkey, ValkeyServer, scripts_run

DEADLINE_SECONDS = 30.0
MakeBackend = Callable[[int], BroadcastBackend]


class Prompt(ValkeyBackend):
    """One that publishes when the server knows what it listens to: others' notices are heard soon, its own now."""

    def __init__(self, valkey: Valkey, limit: int) -> None:
        super().__init__(valkey.url, limit)
        self._valkey = valkey
        self._known: set[str] = set()

    async def settled(self) -> None:
        """Wait until the server has heard of every name that is listened to, or not any more."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            while changed := self._names ^ self._known:
                name = changed.pop()
                listened, key = name in self._names, f"{PREFIX}{name}"
                if await self._valkey.run("PUBSUB", "NUMSUB", key) == [key.encode(), int(listened)]:
                    self._known ^= {name}
                else:
                    await asyncio.sleep(0.005)

    async def publish(self, channel: str, message: Any) -> None:
        """Send what is heard by this one, too, if it is to hear it, and by nobody who comes later."""
        await self.settled()
        await super().publish(channel, message)
        await self._all_sent.wait()

    async def disconnect(self) -> None:
        """As it is; the server knows of nothing any more."""
        await super().disconnect()
        self._known.clear()


@pytest.fixture(scope="module")
async def valkey() -> AsyncIterator[Valkey]:
    """A Valkey of this module, to whose backends new names are told at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams.valkey, "_LISTEN_SECONDS", 0.005)
        async with ValkeyServer() as server:
            yield server


@pytest.fixture(scope="module", params=KINDS.values(), ids=list(KINDS))
async def any_kind(request: pytest.FixtureRequest) -> AsyncIterator[Valkey]:
    """One of every kind."""
    async with request.param() as valkey:
        yield valkey


@pytest.fixture(params=["memory", "valkey"])
def make_backend(request: pytest.FixtureRequest, valkey: Valkey) -> MakeBackend:
    """Makes backends of one kind."""
    if request.param == "memory":
        return MemoryBackend
    return lambda limit: Prompt(valkey, limit)


async def arrived(backend: BroadcastBackend, message: str) -> None:
    """What was published last is there."""
    assert isinstance(backend, MemoryBackend | ValkeyBackend)
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not backend._pending or backend._pending[-1].message != message:
            await asyncio.sleep(0.005)


@pytest.fixture
async def channel(make_backend: MakeBackend) -> AsyncIterator[BroadcastChannel]:
    """A channel that routes."""
    channel = BroadcastChannel(make_backend(100_000))
    await channel.connect()
    yield channel
    await channel.close()


@pytest.fixture
async def broadcast(make_backend: MakeBackend) -> AsyncIterator[Broadcast]:
    """The router below a channel, whose subscribers can leave."""
    async with Broadcast(backend=make_backend(100_000)) as broadcast:
        yield broadcast


def new_name() -> str:
    """The name of a channel that nobody else uses."""
    return f"test-{uuid.uuid4().hex}"


class Inbox:
    """A handler that keeps what it is given."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self._arrived = asyncio.Condition()

    async def __call__(self, message: dict[str, Any]) -> None:
        async with self._arrived:
            self.messages.append(message)
            self._arrived.notify_all()

    async def holds(self, count: int) -> list[dict[str, Any]]:
        """The messages, once there are so many."""
        async with asyncio.timeout(DEADLINE_SECONDS), self._arrived:
            await self._arrived.wait_for(lambda: len(self.messages) >= count)
        return self.messages


def numbered(count: int) -> list[dict[str, Any]]:
    return [{"n": n} for n in range(count)]


async def test_messages_arrive_in_order_at_every_listener_of_the_name(channel: BroadcastChannel) -> None:
    name, other_name = new_name(), new_name()
    listeners, other = [Inbox() for _ in range(5)], Inbox()
    for inbox in listeners:
        await channel.listen(name, inbox)
    await channel.listen(other_name, other)
    for message in numbered(500):
        await channel.publish(name, message)
    await channel.publish(other_name, {"last": True})
    for inbox in listeners:
        assert await inbox.holds(500) == numbered(500)
    assert await other.holds(1) == [{"last": True}], "nothing of another name"


async def test_a_message_arrives_as_it_was_sent(channel: BroadcastChannel) -> None:
    message: dict[str, Any] = {
        "text": "Grüße 👩‍👩‍👧 \x00 \u2028\r\n\n",
        "list": [1, None, True, 1.5, {"deep": []}],
        "": "",
    }
    name, inbox = new_name(), Inbox()
    await channel.listen(name, inbox)
    await channel.publish(name, message)
    assert await inbox.holds(1) == [message]


async def test_notices_that_come_at_once_are_sent_by_few_commands_in_their_order(valkey: Valkey) -> None:
    backend = Prompt(valkey, 100_000)
    channel, inboxes = BroadcastChannel(backend), {new_name(): Inbox(), new_name(): Inbox()}
    await channel.connect()
    try:
        for name, inbox in inboxes.items():
            await channel.listen(name, inbox)
        await backend.settled()
        await ValkeyBackend.publish(backend, new_name(), "the script is there from now on")
        await backend._all_sent.wait()
        before = await scripts_run(valkey)
        for message in numbered(1_200):
            for name in inboxes:
                await ValkeyBackend.publish(backend, name, orjson.dumps(message).decode())
        for inbox in inboxes.values():
            assert await inbox.holds(1_200) == numbered(1_200)
        assert await scripts_run(valkey) - before == 5, "of 500 each"
    finally:
        await channel.close()


async def test_publishers_at_once_lose_nothing_and_keep_their_own_order(channel: BroadcastChannel) -> None:
    name, inbox = new_name(), Inbox()
    await channel.listen(name, inbox)

    async def publish(who: int) -> None:
        for n in range(50):
            await channel.publish(name, {"who": who, "n": n})
            await asyncio.sleep(0)

    await asyncio.gather(*(publish(who) for who in range(10)))
    messages = await inbox.holds(500)
    for who in range(10):
        assert [message["n"] for message in messages if message["who"] == who] == list(range(50))


async def test_two_first_listeners_at_once_both_get_everything(channel: BroadcastChannel) -> None:
    for _ in range(100):
        name, one, two = new_name(), Inbox(), Inbox()
        await asyncio.gather(channel.listen(name, one), channel.listen(name, two))
        for message in numbered(3):
            await channel.publish(name, message)
        assert await one.holds(3) == numbered(3)
        assert await two.holds(3) == numbered(3)


async def test_a_listener_is_served_from_the_moment_that_listen_returns(channel: BroadcastChannel) -> None:
    for _ in range(100):
        name, inbox = new_name(), Inbox()
        await channel.listen(name, inbox)
        await channel.publish(name, {"n": 0})
        assert await inbox.holds(1) == [{"n": 0}]


async def next_message(subscriber: Any) -> object:
    """The next message of a subscriber of the router."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        return (await subscriber.get()).message


async def test_who_comes_after_the_last_has_left_is_served(broadcast: Broadcast) -> None:
    name = new_name()
    for n in range(100):
        async with broadcast.subscribe(name) as subscriber:
            await broadcast.publish(name, str(n))
            assert await next_message(subscriber) == str(n)


@pytest.mark.parametrize("leaves_first", [True, False])
async def test_who_comes_while_the_last_leaves_is_served(broadcast: Broadcast, leaves_first: bool) -> None:
    name = new_name()
    for n in range(100):
        leaving, gone, here = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def last(leaving: asyncio.Event, here: asyncio.Event) -> None:
            async with broadcast.subscribe(name):
                here.set()
                await leaving.wait()

        async def first(gone: asyncio.Event, n: int) -> object:
            async with broadcast.subscribe(name) as subscriber:
                await gone.wait()
                await broadcast.publish(name, str(n))
                return await next_message(subscriber)

        old = asyncio.create_task(last(leaving, here))
        await here.wait()
        if leaves_first:
            leaving.set()
        new = asyncio.create_task(first(gone, n))
        leaving.set()
        await old
        gone.set()
        assert await new == str(n)


async def test_a_listener_that_leaves_takes_nothing_from_one_that_stays(broadcast: Broadcast) -> None:
    name = new_name()
    async with broadcast.subscribe(name) as stays:
        for n in range(100):
            async with broadcast.subscribe(name) as leaves:
                await broadcast.publish(name, str(n))
                assert await next_message(leaves) == str(n)
            assert await next_message(stays) == str(n)


async def test_a_handler_that_raises_does_not_end_the_listening(
    channel: BroadcastChannel, caplog: pytest.LogCaptureFixture
) -> None:
    name, healthy, calls = new_name(), Inbox(), Inbox()

    async def broken(message: dict[str, Any]) -> None:
        await calls(message)
        if message["n"] < 3:
            raise RuntimeError("the handler has a defect")

    await channel.listen(name, broken)
    await channel.listen(name, healthy)
    for message in numbered(5):
        await channel.publish(name, message)
    assert await calls.holds(5) == numbered(5)
    assert await healthy.holds(5) == numbered(5)
    logged = [record for record in caplog.records if record.name == "streams.channel"]
    assert len(logged) == 3
    assert all(name in record.getMessage() and record.exc_info for record in logged)


async def test_a_message_that_is_no_json_does_not_end_the_listening(
    channel: BroadcastChannel, caplog: pytest.LogCaptureFixture
) -> None:
    name, inbox = new_name(), Inbox()
    await channel.listen(name, inbox)
    await channel._broadcast.publish(name, "{")
    await channel.publish(name, {"n": 1})
    assert await inbox.holds(1) == [{"n": 1}]
    assert "a handler of channel" in caplog.text


async def test_messages_are_handled_one_after_another(channel: BroadcastChannel) -> None:
    name, inbox, running, most = new_name(), Inbox(), 0, 0

    async def slow(message: dict[str, Any]) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        for _ in range(5):
            await asyncio.sleep(0)
        running -= 1
        await inbox(message)

    await channel.listen(name, slow)
    for message in numbered(20):
        await channel.publish(name, message)
    assert await inbox.holds(20) == numbered(20)
    assert most == 1


async def test_a_slow_listener_does_not_delay_another(channel: BroadcastChannel) -> None:
    name, quick, released = new_name(), Inbox(), asyncio.Event()

    async def stuck(message: dict[str, Any]) -> None:
        await released.wait()

    await channel.listen(name, stuck)
    await channel.listen(name, quick)
    for message in numbered(50):
        await channel.publish(name, message)
    assert await quick.holds(50) == numbered(50)


async def test_what_is_published_to_nobody_is_dropped(channel: BroadcastChannel) -> None:
    name, inbox = new_name(), Inbox()
    for message in numbered(10):
        await channel.publish(name, message)
    await channel.listen(name, inbox)
    await channel.publish(name, {"n": "first"})
    await channel.publish(name, {"n": "second"})
    assert await inbox.holds(2) == [{"n": "first"}, {"n": "second"}]


async def test_beyond_its_bound_the_oldest_that_waits_is_dropped(make_backend: MakeBackend) -> None:
    name, backend = new_name(), make_backend(3)
    await backend.connect()
    await backend.subscribe(name)
    for n in range(10):
        await backend.publish(name, str(n))
    await arrived(backend, "9")
    async with asyncio.timeout(DEADLINE_SECONDS):
        assert [(await backend.next_published()).message for _ in range(3)] == ["7", "8", "9"]
    await backend.publish(name, "after")
    assert (await backend.next_published()).message == "after"
    await backend.disconnect()


async def test_what_nobody_listens_to_takes_no_place_in_the_queue(make_backend: MakeBackend) -> None:
    name, backend = new_name(), make_backend(3)
    await backend.connect()
    await backend.publish(name, "too early")
    await backend.subscribe(name)
    await backend.publish(name, "heard")
    for n in range(10):
        await backend.publish(new_name(), str(n))
    async with asyncio.timeout(DEADLINE_SECONDS):
        assert (await backend.next_published()).message == "heard"
    await backend.disconnect()


async def test_a_handler_that_is_stuck_keeps_only_the_newest_messages(
    channel: BroadcastChannel, caplog: pytest.LogCaptureFixture
) -> None:
    name, stuck, quick, released = new_name(), Inbox(), Inbox(), asyncio.Event()

    async def handle(message: dict[str, Any]) -> None:
        await stuck(message)
        await released.wait()

    await channel.listen(name, handle)
    await channel.publish(name, {"n": "in hand"})
    await stuck.holds(1)
    await channel.listen(name, quick)
    for start in range(0, _WAITING_MESSAGES + 50, 50):
        for message in numbered(50):
            await channel.publish(name, {"n": start + message["n"]})
        await quick.holds(start + 50)
    released.set()
    held = await stuck.holds(1 + _WAITING_MESSAGES)
    assert held == [{"n": "in hand"}, *numbered(_WAITING_MESSAGES + 50)[50:]]
    assert name in caplog.text, "the operator is told"


async def test_closing_ends_every_task_also_of_handlers_that_hang(make_backend: MakeBackend) -> None:
    before = asyncio.all_tasks()
    channel, name, reached = BroadcastChannel(make_backend(100)), new_name(), Inbox()
    await channel.connect()
    cancelled = asyncio.Event()

    async def hangs(message: dict[str, Any]) -> None:
        await reached(message)
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    await channel.listen(name, hangs)
    for _ in range(20):
        await channel.listen(new_name(), Inbox())
    await channel.publish(name, {"n": 1})
    await reached.holds(1)
    ours = asyncio.all_tasks() - before
    assert len(ours) >= 21
    async with asyncio.timeout(DEADLINE_SECONDS):
        await channel.close()
        await asyncio.wait(ours)
    assert cancelled.is_set()


async def test_a_closed_channel_delivers_nothing_more(make_backend: MakeBackend) -> None:
    backend, name, inbox = make_backend(100), new_name(), Inbox()
    first = BroadcastChannel(backend)
    await first.connect()
    await first.listen(name, inbox)
    await first.publish(name, {"n": 1})
    await inbox.holds(1)
    await first.close()
    # The same backend, so that what the first would still be given goes through it.
    second, later = BroadcastChannel(backend), Inbox()
    await second.connect()
    await second.listen(name, later)
    await second.publish(name, {"n": 2})
    assert await later.holds(1) == [{"n": 2}]
    await second.close()
    assert inbox.messages == [{"n": 1}]


async def test_at_every_kind_of_valkey_notices_cross_in_order(any_kind: Valkey) -> None:
    ears = Prompt(any_kind, 1_000)
    here, there = BroadcastChannel(ValkeyBackend(any_kind.url)), BroadcastChannel(ears)
    for channel in (here, there):
        await channel.connect()
    try:
        name, inbox, other = new_name(), Inbox(), Inbox()
        await there.listen(name, inbox)
        await there.listen(new_name(), other)
        await ears.settled()
        for message in numbered(100):
            await here.publish(name, message)
        assert await inbox.holds(100) == numbered(100)
        assert other.messages == []
    finally:
        await here.close()
        await there.close()
