"""The users of a fault run: they ask at any server, read at any other, and come back after every failure."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import aiohttp

from tests.client import Client, GraphQLErrors
from tests.faults.vendor import MODEL, Script
from tests.faults.world import World

T = TypeVar("T")
_Ask = Callable[..., Awaitable[dict[str, Any]]]
_PATIENCE_SECONDS = 60.0
_PAUSE_SECONDS = 0.1
# A server that is frozen answers nothing: a user tries the next one.
_REQUEST_SECONDS = 5.0
# What a server says that cannot help now, and another or the same one soon can.
RETRYABLE = {"UNAVAILABLE"}

FEED = """
subscription($after: Cursor) {
  changes(after: $after) {
    __typename
    ... on ChangesReset { cursor reason }
    ... on ThreadChanged { cursor thread { id } }
    ... on ThreadDeleted { cursor threadId }
    ... on MessageAdded { cursor message { id } }
    ... on MessageFinished { cursor message { id } }
    ... on MessageSelected { cursor }
    ... on UsageChanged { cursor }
    ... on SettingsChanged { cursor }
    ... on ProjectChanged { cursor }
    ... on ProjectDeleted { cursor }
    ... on ShareChanged { cursor }
    ... on ShareRevoked { cursor }
  }
}
"""


class Violation(Exception):  # noqa: N818 - it is not the run's error
    """Something happened that may not."""


@dataclass
class Reader:
    """One tab with one answer: what it holds, over all its connections."""

    message_id: str
    held: str = ""
    cursor: str | None = None
    parts: int = 0
    resets: int = 0
    connections: int = 0
    ended: dict[str, Any] | None = None
    is_gone: bool = False
    most_held: str = ""

    def take(self, event: dict[str, Any]) -> None:
        """One event, as a client of ours applies it."""
        if self.ended is not None:
            raise Violation(f"{self.message_id}: {event['__typename']} behind MessageEnded")
        match event["__typename"]:
            case "MessageDelta":
                if event["partIndex"] not in (max(0, self.parts - 1), self.parts):
                    raise Violation(f"{self.message_id}: part {event['partIndex']} behind {self.parts} parts")
                self.parts = event["partIndex"] + 1
                self.held += event["text"]
            case "MessageReset":
                self.most_held = max(self.most_held, self.held, key=len)
                self.resets += 1
                self.held = event["message"]["text"]
                self.parts = len(event["message"]["parts"])
            case "MessageEnded":
                self.ended = event["message"]
        self.cursor = event["cursor"]


@dataclass
class Feed:
    """What a user's feed has told."""

    cursor: str | None = None
    threads: set[str] = field(default_factory=set)
    deleted: set[str] = field(default_factory=set)
    added: set[str] = field(default_factory=set)
    finished: set[str] = field(default_factory=set)
    resets: list[str] = field(default_factory=list)

    def take(self, event: dict[str, Any]) -> None:
        """One change."""
        match event["__typename"]:
            case "ThreadChanged":
                self.threads.add(event["thread"]["id"])
            case "ThreadDeleted":
                self.deleted.add(event["threadId"])
            case "MessageAdded":
                self.added.add(event["message"]["id"])
            case "MessageFinished":
                self.finished.add(event["message"]["id"])
            case "ChangesReset":
                self.resets.append(event["reason"])
        self.cursor = event["cursor"]


@dataclass
class Asked:
    """A turn that a user knows to have been taken."""

    thread_id: str
    question_id: str
    answer_id: str
    tag: str


class User:
    """One user with some threads. Everything they do is tried until it is certain whether it was done.

    Args:
        chance: chooses servers and moments.
    """

    def __init__(self, world: World, name: str, chance: random.Random) -> None:
        self.world = world
        self.name = name
        self.chance = chance
        self.token = ""
        self.id = ""
        self.threads: list[str] = []
        self.deleted: set[str] = set()
        self.asked: list[Asked] = []
        self.readers: list[Reader] = []
        self.feed = Feed()
        self._tags = 0
        self._unsettled: list[tuple[_Ask, str, str]] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._stack = AsyncExitStack()
        self._http: aiohttp.ClientSession | None = None

    async def begin(self) -> None:
        """Sign in, and follow the feed from now on."""
        self._http = await self._stack.enter_async_context(
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True))
        )

        async def sign_in(client: Client) -> None:
            await client.sign_in()
            self.token, self.id = client.token or "", client.id

        await self.somewhere(sign_in)
        self._tasks.append(asyncio.create_task(self._follow_feed(), name=f"feed of {self.name}"))

    async def end(self) -> None:
        """Leave. What a reader met that may not be is raised here."""
        for task in self._tasks:
            task.cancel()
        results = await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        await self._stack.aclose()
        for result in results:
            if isinstance(result, Exception):
                raise result

    async def read_out(self) -> None:
        """Wait until every reader is through."""
        reading = [task for task in self._tasks if task.get_name().startswith("reader")]
        async with asyncio.timeout(_PATIENCE_SECONDS):
            await asyncio.gather(*reading)

    def script(self) -> Script:
        """A new question."""
        chance = self.chance
        self._tags += 1
        return Script(
            f"{self.name}.{self._tags}",
            think_seconds=chance.choice([0, 0, 0.2, 3]),
            pieces=chance.choice([1, 10, 40, 80, 80]),
            every_seconds=chance.choice([0, 0.05, 0.1, 0.1]),
            is_cut=chance.random() < 0.1,
        )

    async def send(self, place: int | None, *, twice: bool = False, script: Script | None = None) -> None:
        """Ask in a thread, or in a new one; `twice`: once more with the same key, at another server."""
        script = script or self.script()
        thread_id = self._thread(place)
        more = {"threadId": thread_id} if thread_id else {}
        await self._ask(
            lambda client, **key: client.send(script.question, model=MODEL, **more, **key), script.tag, twice
        )

    async def edit(self, place: int, *, twice: bool = False) -> None:
        """Ask a question anew."""
        if asked := self._turn(place):
            script = self.script()
            await self._ask(
                lambda client, **key: client.edit(asked.question_id, script.question, model=MODEL, **key),
                script.tag,
                twice,
            )

    async def retry(self, place: int, *, twice: bool = False) -> None:
        """Have an answer written again."""
        if asked := self._turn(place):
            await self._ask(lambda client, **key: client.retry(asked.answer_id, model=MODEL, **key), asked.tag, twice)

    async def stop(self, place: int) -> None:
        """Stop an answer, the last one if it is still there."""
        if asked := self._turn(place):
            await self._unless_deleted(asked.thread_id, lambda client: client.stop(asked.answer_id))

    async def delete(self, place: int) -> None:
        """Delete a thread."""
        if thread_id := self._thread(place):
            self.deleted.add(thread_id)
            mutation = "mutation($id: ID!) { deleteThread(input: {threadId: $id}) { deletedThreadId } }"
            await self._unless_deleted(thread_id, lambda client: client.run(mutation, {"id": thread_id}))

    def read(self, message_id: str, *, thread_id: str) -> None:
        """Open a tab on an answer."""
        reader = Reader(message_id)
        self.readers.append(reader)
        chance = random.Random(f"{self.name} {len(self.readers)}")
        self._tasks.append(asyncio.create_task(self._read(reader, thread_id, chance), name=f"reader of {message_id}"))

    async def read_again(self, place: int) -> None:
        """Open one more tab on an answer that may be old."""
        if asked := self._turn(place):
            self.read(asked.answer_id, thread_id=asked.thread_id)

    async def somewhere(self, work: Callable[[Client], Awaitable[T]]) -> T:
        """Do something at any server, and at another one until it is answered.

        Raises:
            GraphQLErrors: the answer was an error that will stay.
            TimeoutError: nobody answered.
        """
        async with asyncio.timeout(_PATIENCE_SECONDS):
            while True:
                try:
                    async with self.client() as client, asyncio.timeout(_REQUEST_SECONDS):
                        return await work(client)
                except GraphQLErrors as error:
                    if error.code not in RETRYABLE:
                        raise
                except (OSError, TimeoutError, aiohttp.ClientError):
                    pass
                await asyncio.sleep(_PAUSE_SECONDS)

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        """A caller at any server that is there."""
        addresses = [node.address for node in self.world.nodes if node.address]
        if not addresses:
            raise ConnectionError("no server is there")
        assert self._http is not None
        client = Client(self._http, self.chance.choice(addresses))
        client.token, client.id = self.token or None, self.id
        yield client

    def _thread(self, place: int | None) -> str | None:
        living = [thread_id for thread_id in self.threads if thread_id not in self.deleted]
        return None if place is None or not living else living[place % len(living)]

    def _turn(self, place: int) -> Asked | None:
        living = [asked for asked in self.asked if asked.thread_id not in self.deleted]
        return living[-1 - place % min(3, len(living))] if living else None

    async def settle(self) -> None:
        """Ask once more for the turns of which it is not certain whether they were taken, until it is."""
        async with asyncio.timeout(_PATIENCE_SECONDS):
            while self._unsettled:
                ask, tag, key = self._unsettled.pop()
                await self._ask(ask, tag, twice=False, key=key)
                await asyncio.sleep(_PAUSE_SECONDS)

    async def _ask(self, ask: _Ask, tag: str, twice: bool, key: str | None = None) -> None:
        is_unsettled = key is not None
        key = key or str(uuid.UUID(int=self.chance.getrandbits(128)))
        made: dict[str, Any] | None = None
        tries = 0

        async def asking(client: Client) -> dict[str, Any]:
            nonlocal tries
            tries += 1
            return await ask(client, idempotencyKey=key)

        for _ in range(1 + twice):
            try:
                turn = await self.somewhere(asking)
            except GraphQLErrors as error:
                if made is not None and not (error.code == "NOT_FOUND" and made["thread"]["id"] in self.deleted):
                    raise Violation(f"a repeated key gave {error.code}") from error
                if error.code == "THREAD_BUSY" and (is_unsettled or tries > 1):
                    # What was not answered may lie with a server that is frozen, and be done once that wakes.
                    self._unsettled.insert(0, (ask, tag, key))
                    return
                if error.code in ("THREAD_BUSY", "NOT_FOUND"):
                    return
                raise
            ids = (turn["userMessage"]["id"], turn["assistantMessage"]["id"])
            if made is not None and ids != (made["userMessage"]["id"], made["assistantMessage"]["id"]):
                raise Violation(f"a key made two turns: {made} and {turn}")
            made = turn
        assert made is not None
        thread_id, answer_id = made["thread"]["id"], made["assistantMessage"]["id"]
        if thread_id not in self.threads:
            self.threads.append(thread_id)
        self.asked.append(Asked(thread_id, made["userMessage"]["id"], answer_id, tag))
        for _ in range(self.chance.choice([1, 1, 2])):
            self.read(answer_id, thread_id=thread_id)

    async def _unless_deleted(self, thread_id: str, work: Callable[[Client], Awaitable[object]]) -> None:
        try:
            await self.somewhere(work)
        except GraphQLErrors as error:
            if error.code != "NOT_FOUND" or thread_id not in self.deleted:
                raise

    async def _read(self, reader: Reader, thread_id: str, chance: random.Random) -> None:
        while reader.ended is None and not reader.is_gone:
            reader.connections += 1
            try:
                async with self.client() as client, client.reading(reader.message_id, reader.cursor) as subscription:
                    stays = chance.choice([3, 20, 1_000])
                    async for event in subscription.events():
                        reader.take(event)
                        stays -= 1
                        if stays == 0:
                            subscription.abort()
                            break
            except GraphQLErrors as error:
                if error.code == "NOT_FOUND" and thread_id in self.deleted:
                    reader.is_gone = True
                elif error.code not in RETRYABLE:
                    raise Violation(f"a reader of {reader.message_id} at {reader.cursor}: {error}") from error
            except (OSError, TimeoutError, aiohttp.ClientError):
                pass
            await asyncio.sleep(_PAUSE_SECONDS)

    async def _follow_feed(self) -> None:
        while True:
            try:
                variables = {"after": self.feed.cursor}
                async with self.client() as client, client.subscribe(FEED, variables) as subscription:
                    while (payload := await subscription.next()) is not None:
                        self.feed.take(payload["data"]["changes"])
            except GraphQLErrors as error:
                if error.code not in RETRYABLE:
                    raise Violation(f"the feed at {self.feed.cursor}: {error}") from error
            except (OSError, TimeoutError, aiohttp.ClientError):
                pass
            await asyncio.sleep(_PAUSE_SECONDS)
