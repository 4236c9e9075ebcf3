"""What must be true when every fault is over, seen from the outside: by users, by the vendor, and in the rows."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import Any

import asyncpg

from models.ids import IdKind, parse_id
from tests.client import Client
from tests.faults.users import Asked, User, Violation
from tests.faults.vendor import Answered
from tests.faults.world import World
from tests.valkey import unbounded

_END_SECONDS = 60.0
_AGREE_SECONDS = 20.0
# Of a server at rest: pools of connections to PostgreSQL and Valkey, a few to the vendor, files.
_MOST_DESCRIPTORS = 60
# Those that go on for as long as the server does, and the one that tells.
_MOST_TASKS = 30
_LIVE = "{ threads(first: 100) { nodes { id liveMessage { id } } } }"
_ADRIFT = """
SELECT (SELECT count(*) FROM streams), (SELECT count(*) FROM stream_checkpoints),
    (SELECT count(*) FROM messages WHERE status = 'STREAMING')
"""
# Each active message but a root stands under an active one, and no two at one depth (which an index says, too).
_BROKEN_PATHS = """
SELECT count(*) FROM messages child LEFT JOIN messages parent ON parent.id = child.parent_id
WHERE child.active AND child.parent_id IS NOT NULL AND (parent.active IS NOT TRUE OR parent.depth + 1 <> child.depth)
"""
_MESSAGES = "SELECT id, role, attempt FROM messages WHERE owner_id = $1"
_EVENTS = """
SELECT message_id, prompt_tokens, completion_tokens, estimated FROM usage_events WHERE owner_id = $1 AND kind = 'ANSWER'
"""
_USAGE = "{ usage(timeframe: DAY) { totals { requests promptTokens completionTokens } } }"


async def check(world: World, users: list[User]) -> dict[str, int]:
    """Check everything; all faults are healed. What was seen: readers, resets, and answers by why they ended.

    Raises:
        Violation: what is wrong.
    """
    for user in users:
        await user.settle()
    await _all_ended(world)
    for user in users:
        await user.read_out()
    seen: Counter[str] = Counter()
    for user in users:
        await _check_user(world, user, seen)
    for user in users:
        await user.end()
    await _check_rows(world)
    await _check_nodes(world)
    if kept := await unbounded(world.valkey):
        raise Violation(f"keys that stay in Valkey: {kept}")
    return dict(seen)


async def _all_ended(world: World) -> None:
    """No message is live, and no thread: at the latest a minute after all is well."""
    deadline = time.monotonic() + _END_SECONDS
    connection = await asyncpg.connect(world.database_url)
    try:
        while any(row := tuple(await connection.fetchrow(_ADRIFT))):
            if time.monotonic() > deadline:
                raise Violation(f"streams, checkpoints, live messages that stay: {row}")
            await asyncio.sleep(0.1)
    finally:
        await connection.close()


async def _check_user(world: World, user: User, seen: Counter[str]) -> None:
    living = [asked for asked in user.asked if asked.thread_id not in user.deleted]
    messages: dict[str, dict[str, Any]] = {}
    for asked in living:
        told = await asyncio.gather(*(_at(user, node.address, asked.answer_id) for node in world.nodes))
        if any(message != told[0] for message in told):
            raise Violation(f"servers differ in {asked.answer_id}: {told}")
        messages[asked.answer_id] = told[0]
        _check_answer(world, asked, told[0])
        seen[told[0]["error"]["code"] if told[0]["error"] else told[0]["status"]] += 1
    for reader in user.readers:
        seen["readers"] += 1
        seen["resets"] += reader.resets
        message = messages.get(reader.message_id)
        if message is None:
            continue  # its thread is gone
        if reader.ended is None or reader.ended != message:
            raise Violation(f"a reader of {reader.message_id} was told another end: {reader.ended} but {message}")
        if reader.held != message["text"]:
            raise Violation(f"a reader holds {reader.held!r}, stored is {message['text']!r}")
        if reader.resets and not (world.writers_lost and world.data_lost):
            raise Violation(f"a reader of {reader.message_id} was set back, though nothing could be lost")
    data = await user.somewhere(lambda client: client.run(_LIVE))
    if live := [thread for thread in data["threads"]["nodes"] if thread["liveMessage"]]:
        raise Violation(f"threads that stay live: {live}")
    if {thread["id"] for thread in data["threads"]["nodes"]} != set(user.threads) - user.deleted:
        raise Violation(f"threads of {user.name} are {data} instead of {set(user.threads) - user.deleted}")
    await _check_messages(world, user, living)
    await _check_usage(world, user, messages)
    await _check_feed(user, messages)


async def _at(user: User, address: str | None, message_id: str) -> dict[str, Any]:
    assert address is not None
    assert user._http is not None
    client = Client(user._http, address)
    client.token = user.token
    return await client.message(message_id)


def _check_answer(world: World, asked: Asked, message: dict[str, Any]) -> None:
    text, status, requests = message["text"], message["status"], world.vendor.to(asked.tag)
    said = _source(requests, text)
    error = message["error"]["code"] if message["error"] else None
    match status:
        case "COMPLETE":
            right = said is not None and said.is_whole and text == said.text
        case "INTERRUPTED" | "STOPPED":
            right = text == "" or (said is not None and said.text.startswith(text))
        case _:
            right = False
    if right and error == "PROVIDER_HUNG_UP":
        right = said is not None and text == said.text and not said.is_whole
    if not right:
        raise Violation(f"{asked} is {status} ({error}) with {text!r}, the vendor said {requests}")
    usage = message["usage"]
    if status == "COMPLETE" and said is not None:
        counted = (usage["promptTokens"], usage["completionTokens"], usage["estimated"])
        if counted != (said.prompt_tokens, said.completion_tokens, False):
            raise Violation(f"{asked} is counted {counted}, the vendor counted {said}")


def _source(requests: list[Answered], text: str) -> Answered | None:
    """The request that a text is the answer to."""
    return next((answered for answered in requests if text.startswith(answered.head)), None)


async def _check_messages(world: World, user: User, living: list[Asked]) -> None:
    """There is what was asked and nothing else, and the vendor was asked no more often than an answer was begun."""
    connection = await asyncpg.connect(world.database_url)
    try:
        rows = await connection.fetch(_MESSAGES, parse_id(IdKind.USER, user.id))
    finally:
        await connection.close()
    known = {parse_id(IdKind.MESSAGE, key) for asked in living for key in (asked.question_id, asked.answer_id)}
    if (there := {row["id"] for row in rows}) != known:
        raise Violation(f"messages of {user.name} that nobody asked for: {there - known}; missing: {known - there}")
    attempts = {row["id"]: row["attempt"] for row in rows}
    begun: Counter[str] = Counter()
    for asked in living:
        begun[asked.tag] += attempts[parse_id(IdKind.MESSAGE, asked.answer_id)]
    for tag, times in begun.items():
        if len(requests := world.vendor.to(tag)) > times:
            raise Violation(f"{tag} was begun {times} times, and the vendor was asked {len(requests)} times")


async def _check_usage(world: World, user: User, messages: dict[str, dict[str, Any]]) -> None:
    """Each answer is counted once, with what is stored of it; the report is the sum of all."""
    connection = await asyncpg.connect(world.database_url)
    try:
        events = await connection.fetch(_EVENTS, parse_id(IdKind.USER, user.id))
    finally:
        await connection.close()
    by_message = {event["message_id"]: event for event in events}
    if len(by_message) != len(events):
        raise Violation(f"answers of {user.name} are counted twice")
    for message_id, message in messages.items():
        event = by_message.get(parse_id(IdKind.MESSAGE, message_id))
        if event is None and message["text"]:
            raise Violation(f"{message_id} is not counted: {message}")
        if event is not None and (event["prompt_tokens"], event["completion_tokens"]) != (
            message["usage"]["promptTokens"],
            message["usage"]["completionTokens"],
        ):
            raise Violation(f"{message_id} is counted as {dict(event)}, and stored as {message['usage']}")
    totals = (await user.somewhere(lambda client: client.run(_USAGE)))["usage"]["totals"]
    expected = {
        "requests": len(events),
        "promptTokens": sum(event["prompt_tokens"] for event in events),
        "completionTokens": sum(event["completion_tokens"] for event in events),
    }
    if {name: int(value) for name, value in totals.items()} != expected:
        raise Violation(f"the usage of {user.name} is {totals}, its events are {expected}")


async def _check_feed(user: User, messages: dict[str, dict[str, Any]]) -> None:
    """The feed has told of everything that is there and of everything that is gone, and of nothing else."""
    feed, threads = user.feed, set(user.threads)
    deadline = time.monotonic() + _AGREE_SECONDS
    while True:
        why = None
        if not messages.keys() <= feed.finished:
            why = f"ends that were not told: {messages.keys() - feed.finished}"
        elif not user.deleted <= feed.deleted:
            why = f"deletions that were not told: {user.deleted - feed.deleted}"
        elif not threads - user.deleted <= feed.threads:
            why = f"threads that were not told: {threads - user.deleted - feed.threads}"
        if why is None:
            break
        if time.monotonic() > deadline:
            raise Violation(f"the feed of {user.name}: {why}")
        await asyncio.sleep(0.1)
    if feed.deleted - user.deleted or feed.threads - threads:
        raise Violation(f"the feed of {user.name} tells of threads that never were: {feed}, {threads}, {user.deleted}")
    if feed.resets[1:]:
        raise Violation(f"the feed of {user.name} began anew: {feed.resets}")


async def _check_rows(world: World) -> None:
    connection = await asyncpg.connect(world.database_url)
    try:
        if broken := await connection.fetchval(_BROKEN_PATHS):
            raise Violation(f"{broken} active messages stand under none")
    finally:
        await connection.close()


async def _check_nodes(world: World) -> None:
    """At rest nothing is left open, and no server has complained."""

    def at_rest(numbers: dict[str, float]) -> bool:
        return not any(_rest(numbers).values())

    for node, numbers in zip(world.nodes, await world.until_quiet(at_rest), strict=True):
        if not at_rest(numbers):
            raise Violation(f"server {node.number} is not at rest: {_rest(numbers)}")
        if (complaint := node.complaint()) is not None:
            raise Violation(f"server {node.number} says: {complaint}")
        deadline = time.monotonic() + _AGREE_SECONDS
        while node.descriptors > _MOST_DESCRIPTORS:
            if time.monotonic() > deadline:
                raise Violation(f"server {node.number} has {node.descriptors} descriptors open")
            await asyncio.sleep(0.2)


def _rest(numbers: dict[str, float]) -> dict[str, float]:
    """What is 0 at a server that is at rest."""
    names = ("streams_live", "stream_readers", "sockets_open", "token_log_followed", "token_log_unlogged_characters")
    left = {name: numbers[f"threadgraph_{name}"] for name in names}
    left["tasks"] = max(0, numbers["threadgraph_event_loop_tasks"] - _MOST_TASKS)
    connections = [numbers[f"threadgraph_database_connections_{name}"] for name in ("open", "idle")]
    return left | {"connections in use": connections[0] - connections[1]}
