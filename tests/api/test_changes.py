"""The viewer's feed: everything that changes, in order, resumable; and what a client makes of it is what there is."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import random
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest

from models.ids import IdKind, new_id, parse_id
from server.runtime import Server
from services.sweeper import Retention, Sweeper
from tests.client import Client, GraphQLErrors, Subscription

T = "fragment T on Thread { id title pinned archived temporary expiresAt project { id } updatedAt }"
G = "fragment G on Message { id thread { id } parent { id } role status text }"
P = "fragment P on Project { id name description color icon prompt archived threadCount updatedAt }"
O = """
fragment O on Settings {
  defaultModel { id } titleModel { id } personalization { name traits context }
  providerKeys { provider lastFour usable updatedAt }
  customProviders { slug name baseUrl lastFour updatedAt } customModels { modelId name updatedAt }
}
"""  # noqa: E741
S = "fragment S on Share { id title expiresAt messageCount thread { id } }"
CHANGES = (
    T
    + G
    + P
    + S
    + O
    + """
subscription($after: Cursor) {
  changes(after: $after) {
    __typename
    ... on ChangesReset { cursor reason }
    ... on ThreadChanged { cursor thread { ...T } }
    ... on ThreadDeleted { cursor threadId }
    ... on MessageAdded { cursor message { ...G } }
    ... on MessageFinished { cursor message { ...G } }
    ... on MessageSelected { cursor message { ...G } }
    ... on ProjectChanged { cursor project { ...P } }
    ... on ProjectDeleted { cursor projectId }
    ... on ShareChanged { cursor share { ...S } }
    ... on ShareRevoked { cursor shareId }
    ... on SettingsChanged { cursor settings { ...O } }
    ... on UsageChanged { cursor }
  }
}
"""
)


LISTS = (
    T
    + P
    + O
    + """
query($archived: Boolean!, $temporary: Boolean!) {
  threads(first: 100, filter: {archived: $archived, temporary: $temporary}) { nodes { ...T } }
  projects(first: 100, filter: {archived: $archived}) { nodes { ...P } }
  settings { ...O }
}
"""
)
PATH = (
    G
    + S
    + "query($id: ID!) { thread(id: $id) { shares { ...S } messages(first: 100) { nodes { id siblings { ...G } } } } }"
)


@asynccontextmanager
async def following(client: Client, after: str | None = None) -> AsyncIterator[Subscription]:
    """The client's feed on a socket of its own."""
    async with client.subscribe(CHANGES, {"after": after}) as subscription:
        yield subscription


async def next_change(subscription: Subscription) -> dict[str, Any]:
    """The next event."""
    payload = await subscription.next()
    assert payload is not None
    change: dict[str, Any] = payload["data"]["changes"]
    return change


async def until(subscription: Subscription, kind: str) -> list[dict[str, Any]]:
    """The events up to the first of this type."""
    seen = []
    while True:
        seen.append(await next_change(subscription))
        if seen[-1]["__typename"] == kind:
            return seen


async def now(client: Client) -> str:
    """The cursor of now."""
    async with following(client) as feed:
        return str((await next_change(feed))["cursor"])


async def create_project(client: Client, name: str = "P") -> str:
    query = "mutation($name: String!) { createProject(input: {name: $name}) { project { id } } }"
    return str((await client.run(query, {"name": name}))["createProject"]["project"]["id"])


async def mutate(client: Client, name: str, given: dict[str, Any]) -> None:
    """A mutation of which only the effect matters."""
    kind = f"{name[0].upper()}{name[1:]}Input"
    await client.run(f"mutation($input: {kind}!) {{ {name}(input: $input) {{ __typename }} }}", {"input": given})


async def test_without_a_cursor_the_feed_says_where_it_begins(client: Client) -> None:
    async with following(client) as feed:
        first = await next_change(feed)
        assert first["__typename"] == "ChangesReset"
        assert first["reason"] == "STARTED"
        await create_project(client)
        assert (await next_change(feed))["__typename"] == "ProjectChanged"


async def test_a_turn_is_told_to_every_device(client: Client) -> None:
    async with following(client) as phone, following(client) as laptop:
        await next_change(phone)
        await next_change(laptop)
        turn = await client.send("Tell them")
        await client.finish(turn["assistantMessage"]["id"])
        told = [await until(feed, "UsageChanged") for feed in (phone, laptop)]
    for events in told:
        kinds = [event["__typename"] for event in events]
        assert kinds.index("ThreadChanged") < kinds.index("MessageAdded") < kinds.index("MessageFinished")
        added = [event["message"]["id"] for event in events if event["__typename"] == "MessageAdded"]
        assert added == [turn["userMessage"]["id"], turn["assistantMessage"]["id"]]
        finished = next(event["message"] for event in events if event["__typename"] == "MessageFinished")
        assert (finished["status"], finished["text"]) == ("COMPLETE", "Hello world")


async def test_from_every_cursor_on_exactly_the_rest_is_told(client: Client) -> None:
    start = await now(client)
    project = await create_project(client)
    turn = await client.send("Rest", projectId=project)
    await client.finish(turn["assistantMessage"]["id"])
    await mutate(client, "pinThread", {"threadId": turn["thread"]["id"], "pinned": True})
    await mutate(client, "updateSettings", {"defaultModelId": "two-words"})
    async with following(client, start) as feed:
        events = await until(feed, "SettingsChanged")
    cursors = [event["cursor"] for event in events]
    assert len(set(cursors)) == len(cursors)
    for place, cursor in enumerate(cursors[:-1]):
        async with following(client, cursor) as feed:
            rest = await until(feed, "SettingsChanged")
        # A thing that changed before and behind the cursor is told behind it too; from the start it was told once.
        assert [event["cursor"] for event in rest if event["cursor"] in cursors] == cursors[place + 1 :]


async def test_what_is_gone_by_now_is_told_as_gone_and_no_more(client: Client) -> None:
    start = await now(client)
    turn = await client.send("Gone")
    await client.finish(turn["assistantMessage"]["id"])
    await mutate(client, "deleteThread", {"threadId": turn["thread"]["id"]})
    async with following(client, start) as feed:
        events = await until(feed, "ThreadDeleted")
    assert {event["__typename"] for event in events} <= {"UsageChanged", "ThreadDeleted"}
    assert events[-1]["threadId"] == turn["thread"]["id"]


async def test_nobody_is_told_of_anothers_changes(client: Client, other: Client) -> None:
    async with following(other) as feed:
        await next_change(feed)
        await client.send("Not yours")
        await create_project(other, "Mine")
        event = await next_change(feed)
        assert event["__typename"] == "ProjectChanged"
        assert event["project"]["name"] == "Mine"


async def test_cursors_say_which_failure(client: Client, other: Client) -> None:
    mine, theirs = await now(client), await now(other)
    turn = await client.send("x")
    events = await client.read(turn["assistantMessage"]["id"])
    raw = base64.urlsafe_b64decode(mine + "=" * (-len(mine) % 4))
    ahead = base64.urlsafe_b64encode(raw[:9] + (2**62).to_bytes(8, "big")).rstrip(b"=").decode()
    negative = base64.urlsafe_b64encode(raw[:9] + b"\xff" * 8).rstrip(b"=").decode()
    for after, code in (
        ("", "CURSOR_INVALID"),
        ("nonsense", "CURSOR_INVALID"),
        ("\u0000", "CURSOR_INVALID"),
        (mine + "A", "CURSOR_INVALID"),
        ("x" * 100_000, "CURSOR_INVALID"),
        (events[-1]["cursor"], "CURSOR_INVALID"),
        (negative, "CURSOR_INVALID"),
        (theirs, "CURSOR_MISMATCH"),
        (ahead, "CURSOR_AHEAD"),
    ):
        with pytest.raises(GraphQLErrors) as refused:
            async with following(client, after) as feed:
                await next_change(feed)
        assert refused.value.code == code, after[:80]
        assert refused.value.extensions["field"] == "after"


async def test_an_old_cursor_is_told_to_fetch_anew_and_goes_on_from_now(server: Server, client: Client) -> None:
    start = await now(client)
    await create_project(client)
    late = await now(client)
    await create_project(client, "Second")
    owner = parse_id(IdKind.USER, client.id)
    connection = await asyncpg.connect(server.database.url)
    try:
        # All but the last change of this user grow old.
        await connection.execute(
            "UPDATE changes SET created_at = now() - interval '30 days' WHERE owner_id = $1 AND id < "
            "(SELECT max(id) FROM changes WHERE owner_id = $1)",
            owner,
        )
        keep = Retention(threads=None, changes=20 * 86_400, idempotency_keys=86_400)
        await Sweeper(server.database, keep, end_live=server.generations.end_live, every_seconds=60).sweep()
        assert await connection.fetchval("SELECT count(*) FROM changes WHERE owner_id = $1", owner) == 1
    finally:
        await connection.close()
    async with following(client, start) as feed:
        reset = await next_change(feed)
        assert (reset["__typename"], reset["reason"]) == ("ChangesReset", "EXPIRED")
        await create_project(client, "Third")
        assert (await next_change(feed))["project"]["name"] == "Third"
    async with following(client, late) as feed:
        assert (await next_change(feed))["project"]["name"] == "Second"


async def test_a_feed_whose_last_change_is_purged_before_others_goes_on(server: Server, client: Client) -> None:
    start = await now(client)
    for name in ("First", "Second"):
        await create_project(client, name)
    last = await now(client)
    connection = await asyncpg.connect(server.database.url)
    try:
        # As by an import, which began long before the change that it was committed behind.
        await connection.execute(
            "UPDATE changes SET created_at = now() - interval '30 days' WHERE owner_id = $1 AND id = "
            "(SELECT max(id) FROM changes WHERE owner_id = $1)",
            parse_id(IdKind.USER, client.id),
        )
        keep = Retention(threads=None, changes=20 * 86_400, idempotency_keys=86_400)
        await Sweeper(server.database, keep, end_live=server.generations.end_live, every_seconds=60).sweep()
    finally:
        await connection.close()
    async with following(client, start) as behind, following(client, last) as up_to_date:
        reset = await next_change(behind)
        assert (reset["__typename"], reset["reason"], reset["cursor"]) == ("ChangesReset", "EXPIRED", last)
        await create_project(client, "Third")
        for feed in (behind, up_to_date):
            change = await next_change(feed)
            assert (change["__typename"], change["project"]["name"]) == ("ProjectChanged", "Third")


async def test_a_change_that_nobody_rang_for_is_found_by_looking(server: Server, client: Client) -> None:
    async with following(client) as feed:
        await next_change(feed)
        connection = await asyncpg.connect(server.database.url)
        try:
            await connection.execute(
                "INSERT INTO projects (id, owner_id, name) VALUES ($1, $2, 'By hand')",
                new_id(),
                parse_id(IdKind.USER, client.id),
            )
        finally:
            await connection.close()
        assert (await next_change(feed))["project"]["name"] == "By hand"


async def test_what_was_rolled_back_is_never_told(server: Server, client: Client) -> None:
    async with following(client) as feed:
        await next_change(feed)
        connection = await asyncpg.connect(server.database.url)
        try:
            transaction = connection.transaction()
            await transaction.start()
            await connection.execute(
                "INSERT INTO projects (id, owner_id, name) VALUES ($1, $2, 'Phantom')",
                new_id(),
                parse_id(IdKind.USER, client.id),
            )
            await connection.execute("SET CONSTRAINTS ALL IMMEDIATE")
            await transaction.rollback()
        finally:
            await connection.close()
        await create_project(client, "Real")
        assert (await next_change(feed))["project"]["name"] == "Real"


# Whether somebody waits to write a change of the user $1.
WAITS = """
SELECT EXISTS (
    SELECT FROM pg_locks WHERE locktype = 'advisory' AND classid = 1952999269 AND NOT granted
    AND objid = (hashtext($1) & 4294967295::bigint)::oid
)
"""


async def test_no_change_is_passed_by_one_that_is_written_after_it(server: Server, client: Client) -> None:
    user_id = parse_id(IdKind.USER, client.id)
    connection = await asyncpg.connect(server.database.url)
    try:
        async with following(client) as feed:
            await next_change(feed)
            async with connection.transaction():
                await connection.execute(
                    "INSERT INTO projects (id, owner_id, name) VALUES ($1, $2, 'First')", new_id(), user_id
                )
                await connection.execute("SET CONSTRAINTS ALL IMMEDIATE")
                second = asyncio.create_task(create_project(client, "Second"))
                while not second.done() and not await connection.fetchval(WAITS, str(user_id)):
                    await asyncio.sleep(0.01)
                assert not second.done(), "a reader would go on behind it, and never come back for the first"
            await second
            assert [(await next_change(feed))["project"]["name"] for _ in range(2)] == ["First", "Second"]
    finally:
        await connection.close()


class Copy:
    """What a client holds that applies the feed and nothing else."""

    def __init__(self) -> None:
        self.threads: dict[str, Any] = {}
        self.messages: dict[str, Any] = {}
        self.leaves: dict[str, str] = {}
        self.projects: dict[str, Any] = {}
        self.shares: dict[str, Any] = {}
        self.settings: Any = None
        self.cursor: str | None = None

    def apply(self, event: dict[str, Any]) -> None:
        self.cursor = event["cursor"]
        match event["__typename"]:
            case "ThreadChanged":
                self.threads[event["thread"]["id"]] = event["thread"]
            case "ThreadDeleted":
                self.threads.pop(event["threadId"], None)
                gone = event["threadId"]
                self.leaves.pop(gone, None)
                self.messages = {key: one for key, one in self.messages.items() if one["thread"]["id"] != gone}
                self.shares = {key: one for key, one in self.shares.items() if one["thread"]["id"] != gone}
            case "MessageAdded" | "MessageFinished" | "MessageSelected" as kind:
                message = event["message"]
                self.messages[message["id"]] = message
                if kind != "MessageFinished":
                    self.leaves[message["thread"]["id"]] = message["id"]
            case "ProjectChanged":
                self.projects[event["project"]["id"]] = event["project"]
            case "ProjectDeleted":
                self.projects.pop(event["projectId"], None)
            case "ShareChanged":
                self.shares[event["share"]["id"]] = event["share"]
            case "ShareRevoked":
                self.shares.pop(event["shareId"], None)
            case "SettingsChanged":
                self.settings = event["settings"]

    @classmethod
    async def of(cls, client: Client) -> Copy:
        """What there is, asked for by queries."""
        copy = cls()
        # Twice, for what is brought back from the archive between the two lists.
        for archived in (False, True, False):
            for temporary in (False, True):
                data = await client.run(LISTS, {"archived": archived, "temporary": temporary})
                for thread in data["threads"]["nodes"]:
                    copy.threads[thread["id"]] = thread
                    path = await client.run(PATH, {"id": thread["id"]})
                    for share in path["thread"]["shares"] if path["thread"] else ():
                        copy.shares[share["id"]] = share
                    for message in path["thread"]["messages"]["nodes"] if path["thread"] else ():
                        copy.leaves[thread["id"]] = message["id"]
                        for sibling in message["siblings"]:
                            copy.messages[sibling["id"]] = sibling
                for project in data["projects"]["nodes"]:
                    copy.projects[project["id"]] = project
                copy.settings = data["settings"]
        return copy


class Writers:
    """Several devices of one user that change everything at once."""

    def __init__(self, client: Client, seed: int) -> None:
        self.client = client
        self.chance = random.Random(seed)
        self.threads: list[str] = []
        self.projects: list[str] = []
        self.answers: list[str] = []
        self.shares: list[str] = []

    async def run(self, steps: int) -> None:
        for _ in range(steps):
            try:
                await self.step()
            except GraphQLErrors as refused:
                if refused.code not in {"THREAD_BUSY", "NOT_FOUND", "BAD_USER_INPUT"}:
                    raise

    async def step(self) -> None:
        client, chance = self.client, self.chance
        project = chance.choice([*self.projects, None])
        thread = chance.choice(self.threads) if self.threads else None
        # One that hangs is added and ends in two changes that are far apart: its end is told, or the copy is wrong.
        model = chance.choice(["two-words", "fails-midway", "hangs-up", "hangs"])
        match chance.randrange(19):
            case 0:
                self.projects.append(await create_project(client, f"p{chance.random()}"))
            case 1 | 2 | 3:
                turn = await client.send(
                    f"q{chance.random()}", model=model, projectId=project, temporary=chance.random() < 0.2
                )
                self.threads.append(turn["thread"]["id"])
                self.answers.append(turn["assistantMessage"]["id"])
            case 4 if thread:
                self.answers.append((await client.send("more", model=model, threadId=thread))["assistantMessage"]["id"])
            case 5 if self.answers:
                turn = await client.retry(chance.choice(self.answers), model=model)
                self.answers.append(turn["assistantMessage"]["id"])
            case 6 if thread:
                await mutate(client, "moveThread", {"threadId": thread, "projectId": project})
            case 7 if thread:
                await mutate(client, "archiveThread", {"threadId": thread, "archived": chance.random() < 0.5})
            case 8 if thread:
                await mutate(client, "renameThread", {"threadId": thread, "title": f"t{chance.random()}"})
            case 9 if project:
                await mutate(client, "updateProject", {"projectId": project, "icon": f"{chance.randrange(9)}"})
            case 10 if project and chance.random() < 0.4:
                await mutate(client, "deleteProject", {"projectId": project, "deleteThreads": chance.random() < 0.5})
            case 11 if thread and chance.random() < 0.4:
                await mutate(client, "deleteThread", {"threadId": thread})
            case 12 if self.answers:
                query = "mutation($id: ID!) { forkThread(input: {messageId: $id}) { thread { id } } }"
                forked = await client.run(query, {"id": chance.choice(self.answers)})
                self.threads.append(forked["forkThread"]["thread"]["id"])
            case 13 if thread:
                query = "mutation($id: ID!) { shareThread(input: {threadId: $id}) { share { id } } }"
                self.shares.append((await client.run(query, {"id": thread}))["shareThread"]["share"]["id"])
            case 14 if self.shares:
                await mutate(client, "revokeShare", {"shareId": chance.choice(self.shares)})
            case 15 | 16 if self.answers:
                await mutate(client, "selectMessage", {"messageId": chance.choice(self.answers)})
            case 17 | 18 if self.answers:
                await client.stop(chance.choice(self.answers))
            case _:
                await mutate(client, "updateSettings", {"defaultModelId": chance.choice(["two-words", None])})


@pytest.mark.parametrize("seed", range(4))
async def test_a_state_and_the_changes_after_it_are_the_state_now(client: Client, seed: int) -> None:
    writers = Writers(client, seed)
    await writers.run(8)
    chance = random.Random(seed)

    async def device(begun: asyncio.Event, midway: asyncio.Event) -> Copy:
        """Read in several connections that are cut anywhere, until told that all is done."""
        cursor = await now(client)
        copy = await Copy.of(client)
        copy.cursor = cursor
        begun.set()
        while True:
            async with following(client, copy.cursor) as feed:
                for _ in range(chance.randrange(1, 12)):
                    event = await next_change(feed)
                    copy.apply(event)
                    match event:
                        case {"__typename": "ProjectChanged", "project": {"name": name}} if name == middle:
                            midway.set()
                        case {"__typename": "ProjectChanged", "project": {"name": name}} if name == last:
                            return copy
                feed.abort()

    middle, last = str(uuid.uuid4()), str(uuid.uuid4())
    # One is there before all of it, and is told of answers while they are written; others begin in the midst of it.
    begun, midway = asyncio.Event(), asyncio.Event()
    devices = [asyncio.create_task(device(begun, midway))]
    await asyncio.wait_for(begun.wait(), 60)
    devices += [asyncio.create_task(device(asyncio.Event(), asyncio.Event())) for _ in range(2)]
    await asyncio.gather(*(writers.run(15) for _ in range(4)))
    writers.answers.append((await client.send("Without an end", model="hangs"))["assistantMessage"]["id"])
    await create_project(client, middle)
    await asyncio.wait_for(midway.wait(), 60)
    for answer in writers.answers:
        # Gone with its thread, or to its end.
        with contextlib.suppress(GraphQLErrors):
            await client.stop(answer)
            await client.read(answer)
    while any(message["status"] == "STREAMING" for message in (await Copy.of(client)).messages.values()):
        await asyncio.sleep(0.05)
    await create_project(client, last)
    copies = await asyncio.wait_for(asyncio.gather(*devices), 60)
    there_is = await Copy.of(client)
    for copy in copies:
        assert copy.threads == there_is.threads
        assert copy.projects == there_is.projects
        assert copy.shares == there_is.shares
        assert copy.settings == there_is.settings
        assert copy.leaves == there_is.leaves
        # A query of the active paths shows their siblings, not every branch; what it shows the copy must hold.
        assert {key: copy.messages.get(key) for key in there_is.messages} == there_is.messages
        assert {one["thread"]["id"] for one in copy.messages.values()} <= set(there_is.threads)
