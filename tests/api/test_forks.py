"""Branches chosen and branches copied: what is told of a selection, and what a fork is."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import asyncpg
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.ids import IdKind, new_id, outside_id, parse_id
from server.runtime import Server
from services.forks import MAX_TOLD_MESSAGES
from tests.api.test_histories import wrongs
from tests.client import DEADLINE_SECONDS, SELECT, Client, GraphQLErrors, connect

THREAD = "id title pinned archived temporary expiresAt createdAt updatedAt project { id }"
FORK = f"mutation($input: ForkThreadInput!) {{ forkThread(input: $input) {{ thread {{ {THREAD} }} }} }}"
SIBLINGS = "query($id: ID!) { message(id: $id) { siblings { id text } } }"
# What of a message is a copy's own: its place, its owner, and what it is called.
OWN = {"id", "owner_id", "thread_id", "parent_id", "active_child_id", "active"}


@pytest.fixture
async def database(server: Server) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(server.database.url)
    yield connection
    await connection.close()


async def fork(client: Client, message_id: str, **more: Any) -> dict[str, Any]:
    forked = await client.run(FORK, {"input": {"messageId": message_id} | more})
    thread: dict[str, Any] = forked["forkThread"]["thread"]
    return thread


async def ended(client: Client, turn: dict[str, Any]) -> dict[str, Any]:
    await client.finish(turn["assistantMessage"]["id"])
    return turn


def said(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages without their names."""
    return [{key: value for key, value in message.items() if key != "id"} for message in messages]


async def changes(database: asyncpg.Connection, client: Client) -> list[tuple[str, UUID | None]]:
    """The viewer's feed."""
    owner = parse_id(IdKind.USER, client.id)
    rows = await database.fetch("SELECT kind, object_id FROM changes WHERE owner_id = $1 ORDER BY id", owner)
    return [(row["kind"], row["object_id"]) for row in rows]


async def counted(database: asyncpg.Connection, client: Client) -> list[Any]:
    """All that is counted as used."""
    owner = parse_id(IdKind.USER, client.id)
    found = []
    for table in ("usage_events", "usage_quarters"):
        found += await database.fetch(f"SELECT * FROM {table} WHERE owner_id = $1 ORDER BY id", owner)
    return found


async def branch_of(database: asyncpg.Connection, message_id: UUID) -> list[dict[str, Any]]:
    """The rows that lead to a message, found one by one."""
    found: list[dict[str, Any]] = []
    wanted: UUID | None = message_id
    while wanted is not None:
        found.insert(0, dict(await database.fetchrow("SELECT * FROM messages WHERE id = $1", wanted)))
        wanted = found[0]["parent_id"]
    return found


async def path_of(database: asyncpg.Connection, thread: str) -> list[dict[str, Any]]:
    """The rows of a thread's active path."""
    rows = await database.fetch(
        "SELECT * FROM messages WHERE thread_id = $1 AND active ORDER BY depth", parse_id(IdKind.THREAD, thread)
    )
    return [dict(row) for row in rows]


def copied(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without what is a copy's own."""
    return [{key: value for key, value in row.items() if key not in OWN} for row in rows]


async def test_the_versions_of_a_question_and_of_an_answer_can_be_paged_through(client: Client) -> None:
    first = await ended(client, await client.send("One"))
    question, answer = first["userMessage"]["id"], first["assistantMessage"]["id"]
    second = await ended(client, await client.edit(question, "Two"))
    third = await ended(client, await client.edit(second["userMessage"]["id"], "Three"))
    again = await ended(client, await client.retry(answer))
    for message in (question, second["userMessage"]["id"], third["userMessage"]["id"]):
        siblings = (await client.run(SIBLINGS, {"id": message}))["message"]["siblings"]
        assert [sibling["text"] for sibling in siblings] == ["One", "Two", "Three"]
        for sibling in siblings:
            await client.run(SELECT, {"id": sibling["id"]})
            path = await client.path(first["thread"]["id"])
            assert path[0]["id"] == sibling["id"]
            assert len(path) == 2, "an answer comes back with its question"
    await client.run(SELECT, {"id": question})
    assert (await client.path(first["thread"]["id"]))[1]["id"] == again["assistantMessage"]["id"]
    siblings = (await client.run(SIBLINGS, {"id": answer}))["message"]["siblings"]
    assert [sibling["id"] for sibling in siblings] == [answer, again["assistantMessage"]["id"]]


async def test_a_selection_is_told_once_by_the_end_of_the_new_path(
    client: Client, database: asyncpg.Connection
) -> None:
    turn = await ended(client, await client.send("One"))
    more = await ended(client, await client.send("More", threadId=turn["thread"]["id"]))
    edited = await ended(client, await client.edit(turn["userMessage"]["id"], "Two"))
    before = await changes(database, client)
    await client.run(SELECT, {"id": edited["userMessage"]["id"]})
    assert await changes(database, client) == before, "what is on the path already changes nothing"
    await client.run(SELECT, {"id": turn["assistantMessage"]["id"]})
    leaf = parse_id(IdKind.MESSAGE, more["assistantMessage"]["id"])
    assert await changes(database, client) == [*before, ("MESSAGE_SELECTED", leaf)]
    await client.run(SELECT, {"id": more["userMessage"]["id"]})
    await client.run(SELECT, {"id": edited["assistantMessage"]["id"]})
    leaves = [leaf, parse_id(IdKind.MESSAGE, edited["assistantMessage"]["id"])]
    assert await changes(database, client) == [*before, *(("MESSAGE_SELECTED", leaf) for leaf in leaves)]


async def test_a_fork_says_the_same_under_other_ids(client: Client) -> None:
    turn = await ended(client, await client.send("Look it up", model="thinks-and-calls"))
    thread = turn["thread"]["id"]
    for model in ("fails-midway", "two-words"):
        turn = await ended(client, await client.send("And then?", model=model, threadId=thread))
    path = await client.path(thread)
    forked = await fork(client, turn["assistantMessage"]["id"])
    copies = await client.path(forked["id"])
    assert said(copies) == said(path)
    assert [message["model"] for message in copies][1::2] == [
        {"id": model} for model in ("thinks-and-calls", "fails-midway", "two-words")
    ]
    assert {message["id"] for message in copies} & {message["id"] for message in path} == set()
    assert forked["id"] != thread
    for message in copies:
        whole = await client.run(
            "query($id: ID!) { message(id: $id) { thread { id } siblings { id } parent { id } } }",
            {"id": message["id"]},
        )
        assert whole["message"]["thread"]["id"] == forked["id"]
        assert whole["message"]["siblings"] == [{"id": message["id"]}], "the other versions stay where they are"


async def test_a_fork_ends_with_its_message_on_whichever_branch_that_is(client: Client) -> None:
    turn = await ended(client, await client.send("One"))
    thread = turn["thread"]["id"]
    more = await ended(client, await client.send("More", threadId=thread))
    await ended(client, await client.retry(more["assistantMessage"]["id"]))
    await ended(client, await client.edit(turn["userMessage"]["id"], "Two"))
    before = await client.path(thread)
    for message, texts in (
        (turn["userMessage"], ["One"]),
        (turn["assistantMessage"], ["One", "Hello world"]),
        (more["userMessage"], ["One", "Hello world", "More"]),
        (more["assistantMessage"], ["One", "Hello world", "More", "Hello world"]),
        (before[0], ["Two"]),
        (before[1], ["Two", "Hello world"]),
    ):
        forked = await fork(client, message["id"])
        assert [copy["text"] for copy in await client.path(forked["id"])] == texts
    assert await client.path(thread) == before


async def test_a_fork_and_its_source_do_not_touch_one_another(client: Client, server: Server) -> None:
    turn = await ended(client, await client.send("One"))
    thread = turn["thread"]["id"]
    forked = (await fork(client, turn["assistantMessage"]["id"]))["id"]
    path = await client.path(thread)
    copies = await client.path(forked)
    await ended(client, await client.send("In the fork", threadId=forked))
    await ended(client, await client.edit(copies[0]["id"], "Edited in the fork"))
    await ended(client, await client.retry(copies[1]["id"]))
    assert await client.path(thread) == path
    again = (await fork(client, copies[1]["id"]))["id"]
    await client.run("mutation($id: ID!) { deleteThread(input: {threadId: $id}) { deletedThreadId } }", {"id": thread})
    await client.run(SELECT, {"id": copies[1]["id"]})
    assert (await client.path(forked))[:2] == copies
    assert said(await client.path(again)) == said(path), "a fork of a fork"
    assert (await wrongs(server, client)).keys() == {"answer without its one usage event"}


async def test_a_fork_is_not_counted_as_used(client: Client, database: asyncpg.Connection) -> None:
    turn = await ended(client, await client.send("One"))
    before = await counted(database, client)
    assert len(before) == 2
    forked = await fork(client, turn["assistantMessage"]["id"])
    await fork(client, (await client.path(forked["id"]))[1]["id"])
    assert await counted(database, client) == before
    assert (await client.path(forked["id"]))[1]["usage"]["totalTokens"] == 9, "what it took to write it is kept"


async def test_a_fork_is_told_from_its_first_message_to_its_last(client: Client, database: asyncpg.Connection) -> None:
    turn = await ended(client, await client.send("One"))
    more = await ended(client, await client.send("More", threadId=turn["thread"]["id"]))
    before = await changes(database, client)
    forked = await fork(client, more["assistantMessage"]["id"])
    copies = await client.path(forked["id"])
    assert (await changes(database, client))[len(before) :] == [
        ("THREAD", parse_id(IdKind.THREAD, forked["id"])),
        *(("MESSAGE_ADDED", parse_id(IdKind.MESSAGE, message["id"])) for message in copies),
    ]


async def test_a_long_fork_is_told_by_one_reset(client: Client, database: asyncpg.Connection) -> None:
    ids = await long_thread(database, client, MAX_TOLD_MESSAGES + 1)
    before = await changes(database, client)
    told = await fork(client, outside_id(IdKind.MESSAGE, ids[-2]))
    assert len(await changes(database, client)) == len(before) + 1 + MAX_TOLD_MESSAGES
    reset = await fork(client, outside_id(IdKind.MESSAGE, ids[-1]))
    assert (await changes(database, client))[len(before) + 1 + MAX_TOLD_MESSAGES :] == [
        ("RESET", None),
        ("THREAD", parse_id(IdKind.THREAD, reset["id"])),
    ]
    after = await client.send("Told again", threadId=told["id"])
    assert ("MESSAGE_ADDED", parse_id(IdKind.MESSAGE, after["userMessage"]["id"])) in await changes(database, client)
    await client.finish(after["assistantMessage"]["id"])


async def test_an_answer_being_written_is_not_forked_and_what_stands_before_it_is(
    client: Client, database: asyncpg.Connection
) -> None:
    turn = await client.send("Wait", model="hangs")
    answer = turn["assistantMessage"]["id"]
    count = "SELECT count(*) FROM threads WHERE owner_id = $1"
    with pytest.raises(GraphQLErrors) as refused:
        await fork(client, answer)
    assert refused.value.code == "THREAD_BUSY"
    assert await database.fetchval(count, parse_id(IdKind.USER, client.id)) == 1
    forked = await fork(client, turn["userMessage"]["id"])
    assert [message["text"] for message in await client.path(forked["id"])] == ["Wait"]
    await client.stop(answer)
    forked = await fork(client, answer)
    assert [message["status"] for message in await client.path(forked["id"])] == ["COMPLETE", "STOPPED"]


async def test_a_fork_stands_where_its_source_does_but_is_neither_pinned_nor_archived(client: Client) -> None:
    created = await client.run('mutation { createProject(input: {name: "P"}) { project { id } } }')
    project = created["createProject"]["project"]["id"]
    turn = await ended(client, await client.send("A title to keep", projectId=project))
    thread, answer = turn["thread"]["id"], turn["assistantMessage"]["id"]
    await client.run(
        """
        mutation($id: ID!) {
          pinThread(input: {threadId: $id, pinned: true}) { thread { id } }
          archiveThread(input: {threadId: $id}) { thread { id } }
          setThreadExpiry(input: {threadId: $id, expiresAt: "2032-01-01T00:00:00Z"}) { thread { id } }
        }
        """,
        {"id": thread},
    )
    forked = await fork(client, answer)
    assert forked["title"] == "A title to keep"
    assert (forked["pinned"], forked["archived"], forked["temporary"]) == (False, False, False)
    assert forked["expiresAt"].startswith("2032-01-01")
    assert forked["project"] == {"id": project}
    of_project = await client.run("query($id: ID!) { project(id: $id) { threadCount } }", {"id": project})
    assert of_project["project"]["threadCount"] == 1, "the archived source does not count, the fork does"
    assert (await client.run("{ threads { nodes { id } } }"))["threads"]["nodes"] == [{"id": forked["id"]}]


async def test_a_fork_of_a_temporary_thread_is_temporary_and_expires_with_it(client: Client) -> None:
    turn = await ended(client, await client.send("Secret", temporary=True))
    query = f"query($id: ID!) {{ thread(id: $id) {{ {THREAD} }} }}"
    source = (await client.run(query, {"id": turn["thread"]["id"]}))["thread"]
    forked = await fork(client, turn["assistantMessage"]["id"])
    assert (forked["temporary"], forked["expiresAt"]) == (True, source["expiresAt"])
    assert (await client.run("{ threads { nodes { id } } }"))["threads"]["nodes"] == []


async def test_a_title_that_is_given_is_the_forks_and_a_bad_one_changes_nothing(
    client: Client, database: asyncpg.Connection
) -> None:
    turn = await ended(client, await client.send("One"))
    answer = turn["assistantMessage"]["id"]
    assert (await fork(client, answer, title=" Two \n words "))["title"] == "Two words"
    before = await changes(database, client)
    for title, code in (
        ("", "BAD_USER_INPUT"),
        (" \n", "BAD_USER_INPUT"),
        ("a\0b", "BAD_USER_INPUT"),
        ("é" * 401, "PAYLOAD_TOO_LARGE"),
    ):
        with pytest.raises(GraphQLErrors) as refused:
            await fork(client, answer, title=title)
        assert (refused.value.code, refused.value.extensions["field"]) == (code, "title")
    assert await changes(database, client) == before


@pytest.mark.parametrize("bad", ["", "message_", "thread_" + "0" * 32, "message_" + "G" * 32, "x" * 100_000, "🦉"])
async def test_what_is_no_message_id_cannot_be_forked(client: Client, bad: str) -> None:
    with pytest.raises(GraphQLErrors) as refused:
        await fork(client, bad)
    assert (refused.value.code, refused.value.extensions["field"]) == ("BAD_USER_INPUT", "messageId")


async def test_forks_made_at_once_are_each_whole_and_share_nothing(client: Client) -> None:
    turn = await ended(client, await client.send("One"))
    path = await client.path(turn["thread"]["id"])
    threads = await asyncio.gather(*(fork(client, turn["assistantMessage"]["id"]) for _ in range(10)))
    copies = [await client.path(thread["id"]) for thread in threads]
    assert all(said(copy) == said(path) for copy in copies)
    assert len({message["id"] for copy in copies for message in copy}) == 20


async def test_a_fork_beside_the_deletion_of_its_source_is_whole_or_not_made(client: Client) -> None:
    turn = await ended(client, await client.send("One"))
    thread, answer = turn["thread"]["id"], turn["assistantMessage"]["id"]
    delete = "mutation($id: ID!) { deleteThread(input: {threadId: $id}) { deletedThreadId } }"
    *forks, _ = await asyncio.gather(
        *(fork(client, answer) for _ in range(8)), client.run(delete, {"id": thread}), return_exceptions=True
    )
    made = [forked for forked in forks if isinstance(forked, dict)]
    refused = [forked for forked in forks if isinstance(forked, GraphQLErrors)]
    assert len(made) + len(refused) == 8
    assert {error.code for error in refused} <= {"NOT_FOUND"}
    for forked in made:
        assert [message["text"] for message in await client.path(forked["id"])] == ["One", "Hello world"]
    assert len((await client.run("{ threads { nodes { id } } }"))["threads"]["nodes"]) == len(made)


async def test_a_fork_whose_project_is_deleted_meanwhile_is_in_none(
    client: Client, database: asyncpg.Connection
) -> None:
    created = await client.run('mutation { createProject(input: {name: "P"}) { project { id } } }')
    project = created["createProject"]["project"]["id"]
    turn = await ended(client, await client.send("One", projectId=project))
    deleting = database.transaction()
    await deleting.start()
    # Its row is held before it is deleted, as by whoever counts its threads.
    key = parse_id(IdKind.PROJECT, project)
    await database.execute("UPDATE projects SET thread_count = thread_count WHERE id = $1", key)
    forking = asyncio.create_task(fork(client, turn["assistantMessage"]["id"]))
    waiting = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE pg_backend_pid() = ANY(pg_blocking_pids(pid)))"
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not await database.fetchval(waiting):
            await asyncio.sleep(0.01)
    await database.execute("DELETE FROM projects WHERE id = $1", key)
    await deleting.commit()
    assert (await forking)["project"] is None


async def long_thread(database: asyncpg.Connection, client: Client, length: int) -> list[UUID]:
    """A thread of this many messages in one line; their ids."""
    owner, thread = parse_id(IdKind.USER, client.id), new_id()
    ids = [new_id() for _ in range(length)]
    async with database.transaction():
        await database.execute("SET LOCAL threadgraph.quiet = 'on'; SET CONSTRAINTS ALL IMMEDIATE")
        await database.execute(
            "INSERT INTO threads (id, owner_id, title, title_source) VALUES ($1, $2, 'Long', 'TEXT')", thread, owner
        )
        await database.execute(
            """
            INSERT INTO messages (id, owner_id, thread_id, parent_id, active_child_id, depth, active, role, status,
                parts)
            SELECT ($3::uuid[])[n], $1, $2, ($3::uuid[])[n - 1], ($3::uuid[])[n + 1], n - 1, true, 'USER', 'COMPLETE',
                jsonb_build_array(jsonb_build_object('type', 'text', 'text', 'message ' || n))
            FROM generate_series(1, cardinality($3::uuid[])) AS n
            """,
            *(owner, thread, ids),
        )
    return ids


async def test_ten_thousand_messages_are_copied_at_once_and_no_more(
    client: Client, database: asyncpg.Connection
) -> None:
    ids = await long_thread(database, client, 10_001)
    with pytest.raises(GraphQLErrors) as refused:
        await fork(client, outside_id(IdKind.MESSAGE, ids[-1]))
    assert (refused.value.code, refused.value.extensions["field"]) == ("BAD_USER_INPUT", "messageId")
    forked = await fork(client, outside_id(IdKind.MESSAGE, ids[-2]))
    copies = await path_of(database, forked["id"])
    assert len(copies) == 10_000
    assert [copy["parent_id"] for copy in copies] == [None, *(copy["id"] for copy in copies[:-1])]
    assert [copy["active_child_id"] for copy in copies] == [*(copy["id"] for copy in copies[1:]), None]
    assert orjson.loads(copies[-1]["parts"])[0]["text"] == "message 10000"


TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=5)
PARTS = st.lists(
    st.one_of(
        st.fixed_dictionaries({"type": st.sampled_from(["text", "reasoning"]), "text": TEXTS}),
        st.fixed_dictionaries(
            {"type": st.just("tool"), "callId": TEXTS, "name": TEXTS, "arguments": TEXTS, "result": st.none()}
        ),
        st.fixed_dictionaries({"type": st.just("source"), "url": TEXTS, "title": st.none() | TEXTS}),
        st.fixed_dictionaries({"type": st.just("file"), "attachmentId": st.uuids().map(str), "name": TEXTS}),
    ),
    max_size=4,
)


@st.composite
def trees(draw: st.DrawFn) -> list[tuple[int | None, list[dict[str, Any]]]]:
    """Messages in the order in which they were made: the place of each one's parent (None: a root), and its parts."""
    size = draw(st.integers(1, 14))
    return [(draw(st.none() | st.integers(0, place - 1)) if place else None, draw(PARTS)) for place in range(size)]


async def plant(database: asyncpg.Connection, client: Client, tree: list[tuple[int | None, Any]]) -> list[UUID]:
    """A thread of this shape, the last message at the end of the active path; the ids of its messages."""
    owner, thread = parse_id(IdKind.USER, client.id), new_id()
    ids = [uuid.uuid4() for _ in tree]
    active: set[int] = set()
    place: int | None = len(tree) - 1
    while place is not None:
        active.add(place)
        place = tree[place][0]
    depths: list[int] = []
    rows = []
    for place, (parent, parts) in enumerate(tree):
        depths.append(0 if parent is None else depths[parent] + 1)
        answer = depths[place] % 2 == 1
        rows.append(
            (
                *(ids[place], owner, thread, None if parent is None else ids[parent], depths[place], place in active),
                *(
                    ("ASSISTANT", "FAILED", "two-words", "EMPTY_ANSWER", 5)
                    if answer
                    else ("USER", "COMPLETE") + (None,) * 3
                ),
                orjson.dumps(parts).decode(),
                place,
            )
        )
    async with database.transaction():
        await database.execute(
            "INSERT INTO threads (id, owner_id, title, title_source) VALUES ($1, $2, 'Tree', 'TEXT')", thread, owner
        )
        await database.executemany(
            """
            INSERT INTO messages (id, owner_id, thread_id, parent_id, depth, active, role, status, model, error_code,
                duration_ms, parts, created_at)
            VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12::jsonb,
                timestamptz '2026-01-01' + make_interval(secs => $13))
            """,
            rows,
        )
    return ids


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=trees(), data=st.data())
async def test_a_fork_equals_its_branch_part_for_part(
    server: Server, database: asyncpg.Connection, tree: list[tuple[int | None, Any]], data: st.DataObject
) -> None:
    async with connect(server.address) as client:
        await client.sign_in()
        ids = await plant(database, client, tree)
        source = ids[data.draw(st.integers(0, len(ids) - 1), label="forked at")]
        branch = await branch_of(database, source)
        before = await database.fetch("SELECT * FROM messages WHERE id = ANY($1::uuid[]) ORDER BY id", ids)
        for _ in range(2):  # the second time, the fork itself is forked
            forked = await fork(client, outside_id(IdKind.MESSAGE, source))
            copies = await path_of(database, forked["id"])
            assert copied(copies) == copied(branch)
            assert await branch_of(database, copies[-1]["id"]) == copies
            assert {copy["id"] for copy in copies} & set(ids) == set()
            source = copies[-1]["id"]
        assert await database.fetch("SELECT * FROM messages WHERE id = ANY($1::uuid[]) ORDER BY id", ids) == before
        assert (await wrongs(server, client)).keys() <= {"answer without its one usage event"}
