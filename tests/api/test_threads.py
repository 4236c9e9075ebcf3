"""The list of threads and what is done to a thread."""

from __future__ import annotations

import asyncio
import base64
import random
import uuid
from typing import Any

import asyncpg
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.ids import IdKind, new_id, outside_id, parse_id
from models.pool import _PLAN_ONCE
from server.runtime import Server
from services.threads import _BOTTOM, _TOP, IN_TITLE, _list_query
from tests.api.test_forks import long_thread
from tests.client import Client, GraphQLErrors, connect
from tests.query_plans import nodes_of

LIST = """
query($first: Int, $after: Cursor, $last: Int, $before: Cursor) {
  threads(first: $first, after: $after, last: $last, before: $before) {
    edges { cursor node { id pinned updatedAt } }
    pageInfo { hasNextPage hasPreviousPage startCursor endCursor }
  }
}
"""


async def add_threads(server: Server, client: Client, times: list[tuple[bool, int]]) -> list[str]:
    """Threads of the client with these pins and ages in seconds; their ids in the order of the list."""
    owner = parse_id(IdKind.USER, client.id)
    rows = [(new_id(), owner, pinned, age) for pinned, age in times]
    connection = await asyncpg.connect(server.database.url)
    try:
        await connection.executemany(
            "INSERT INTO threads (id, owner_id, title, title_source, pinned, updated_at) "
            "VALUES ($1, $2, 't', 'TEXT', $3, timestamptz '2026-01-01' - make_interval(secs => $4))",
            rows,
        )
    finally:
        await connection.close()
    ordered = sorted(rows, key=lambda row: (row[2], -row[3], row[0]), reverse=True)
    return [f"thread_{row[0].hex}" for row in ordered]


async def walk(client: Client, size: int, *, backwards: bool, between: Any = None) -> list[str]:
    """Every id of the list, page by page; `between` is awaited after each page."""
    seen: list[str] = []
    cursor = None
    while True:
        arguments = {"last": size, "before": cursor} if backwards else {"first": size, "after": cursor}
        page = (await client.run(LIST, arguments))["threads"]
        ids = [edge["node"]["id"] for edge in page["edges"]]
        info = page["pageInfo"]
        assert len(ids) <= size
        if ids:
            assert (info["startCursor"], info["endCursor"]) == (page["edges"][0]["cursor"], page["edges"][-1]["cursor"])
        seen = ids + seen if backwards else seen + ids
        if not info["hasPreviousPage" if backwards else "hasNextPage"]:
            return seen
        cursor = info["startCursor" if backwards else "endCursor"]
        if between is not None:
            await between()


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    times=st.lists(st.tuples(st.booleans(), st.integers(0, 5)), max_size=25),
    size=st.integers(1, 9),
    backwards=st.booleans(),
)
async def test_every_thread_appears_once_however_the_list_is_paged(
    server: Server, times: list[tuple[bool, int]], size: int, backwards: bool
) -> None:
    async with connect(server.address) as client:
        await client.sign_in()
        ids = await add_threads(server, client, times)
        assert await walk(client, size, backwards=backwards) == ids


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), size=st.integers(1, 7), backwards=st.booleans())
async def test_every_untouched_thread_appears_once_while_others_are_inserted_and_pinned(
    server: Server, seed: int, size: int, backwards: bool
) -> None:
    chance = random.Random(seed)
    async with connect(server.address) as client:
        await client.sign_in()
        ids = await add_threads(server, client, [(chance.random() < 0.2, chance.randrange(8)) for _ in range(24)])
        touched = set(chance.sample(ids, 6))
        movers = list(touched)

        async def disturb() -> None:
            await add_threads(server, client, [(chance.random() < 0.5, chance.randrange(8)) for _ in range(2)])
            if movers:
                pin = {"id": movers.pop(), "pinned": chance.random() < 0.5}
                await client.run(
                    "mutation($id: ID!, $pinned: Boolean!) "
                    "{ pinThread(input: {threadId: $id, pinned: $pinned}) { thread { pinned } } }",
                    pin,
                )

        seen = await walk(client, size, backwards=backwards, between=disturb)
        untouched = [thread for thread in ids if thread not in touched]
        assert [thread for thread in seen if thread in set(untouched)] == untouched


async def test_a_pinned_thread_stands_first_and_activity_orders_the_rest(client: Client) -> None:
    threads = []
    for text in ("one", "two", "three"):
        turn = await client.send(text)
        await client.finish(turn["assistantMessage"]["id"])
        threads.append(turn["thread"]["id"])
    await client.run(
        "mutation($id: ID!) { pinThread(input: {threadId: $id, pinned: true}) { thread { id } } }", {"id": threads[0]}
    )
    turn = await client.send("again", threadId=threads[1])
    await client.finish(turn["assistantMessage"]["id"])
    assert await walk(client, 10, backwards=False) == [threads[0], threads[1], threads[2]]


BAD_PAGES = [
    ({"first": 0}, "BAD_USER_INPUT", "first"),
    ({"first": -1}, "BAD_USER_INPUT", "first"),
    ({"first": 101}, "BAD_USER_INPUT", "first"),
    ({"last": 0}, "BAD_USER_INPUT", "last"),
    ({"first": 1, "last": 1}, "BAD_USER_INPUT", "last"),
    ({"after": ""}, "CURSOR_INVALID", "after"),
    ({"after": "nonsense"}, "CURSOR_INVALID", "after"),
    ({"last": 1, "before": "é" * 10}, "CURSOR_INVALID", "before"),
    ({"after": "A" * 10_000}, "CURSOR_INVALID", "after"),
    ({"after": base64.urlsafe_b64encode(b"M\0\0\0\1").decode()}, "CURSOR_INVALID", "after"),
    (
        {"after": base64.urlsafe_b64encode(b"T\1" + b"\x7f" * 24).decode().rstrip("=")},
        "CURSOR_INVALID",
        "after",
    ),
]


@pytest.mark.parametrize(("arguments", "code", "field"), BAD_PAGES)
async def test_a_page_that_makes_no_sense_is_refused(
    client: Client, arguments: dict[str, Any], code: str, field: str
) -> None:
    with pytest.raises(GraphQLErrors) as refused:
        await client.run(LIST, arguments)
    assert (refused.value.code, refused.value.extensions["field"]) == (code, field)


async def test_a_tampered_cursor_is_harmless(client: Client, other: Client) -> None:
    await other.send("Not yours")
    mine = (await client.send("Mine"))["thread"]["id"]
    cursor = (await client.run(LIST, {}))["threads"]["pageInfo"]["endCursor"]
    raw = bytearray(base64.urlsafe_b64decode(cursor + "=="))
    for place in range(len(raw)):
        changed = bytearray(raw)
        changed[place] ^= 0x01
        forged = base64.urlsafe_b64encode(changed).decode().rstrip("=")
        _, answer = await client.post(LIST, {"after": forged})
        if "errors" in answer:
            assert answer["errors"][0]["extensions"]["code"] == "CURSOR_INVALID"
        else:
            assert {edge["node"]["id"] for edge in answer["data"]["threads"]["edges"]} <= {mine}


async def test_a_rename_holds_against_a_models_title_and_is_bounded(client: Client) -> None:
    rename = """
    mutation($id: ID!, $title: String!) { renameThread(input: {threadId: $id, title: $title}) { thread { title } } }
    """
    thread = (await client.send("Name me"))["thread"]["id"]
    renamed = await client.run(rename, {"id": thread, "title": "  My \n own   name "})
    assert renamed["renameThread"]["thread"]["title"] == "My own name"
    for title, code in (("", "BAD_USER_INPUT"), ("x" * 801, "PAYLOAD_TOO_LARGE"), ("a\x00", "BAD_USER_INPUT")):
        with pytest.raises(GraphQLErrors) as refused:
            await client.run(rename, {"id": thread, "title": title})
        assert (refused.value.code, refused.value.extensions["field"]) == (code, "title")
    assert (await client.run("query($id: ID!) { thread(id: $id) { title } }", {"id": thread}))["thread"]["title"] == (
        "My own name"
    )


async def test_messages_are_paged_along_the_active_path_both_ways(client: Client) -> None:
    turn = await client.send("0")
    await client.finish(turn["assistantMessage"]["id"])
    thread = turn["thread"]["id"]
    for number in range(1, 4):
        await client.finish((await client.send(str(number), threadId=thread))["assistantMessage"]["id"])
    whole = [message["id"] for message in await client.path(thread)]
    page_query = """
    query($id: ID!, $first: Int, $after: Cursor, $last: Int, $before: Cursor) {
      thread(id: $id) { messages(first: $first, after: $after, last: $last, before: $before) {
        edges { node { id } } pageInfo { hasNextPage hasPreviousPage startCursor endCursor } } }
    }
    """
    for backwards in (False, True):
        for size in (1, 3, 8):
            seen: list[str] = []
            cursor = None
            while True:
                arguments = {"last": size, "before": cursor} if backwards else {"first": size, "after": cursor}
                page = (await client.run(page_query, {"id": thread} | arguments))["thread"]["messages"]
                ids = [edge["node"]["id"] for edge in page["edges"]]
                seen = ids + seen if backwards else seen + ids
                if not page["pageInfo"]["hasPreviousPage" if backwards else "hasNextPage"]:
                    break
                cursor = page["pageInfo"]["startCursor" if backwards else "endCursor"]
            assert seen == whole


@pytest.mark.parametrize("backwards", [False, True])
async def test_ten_thousand_messages_are_each_paged_once_while_others_are_written(
    client: Client, server: Server, backwards: bool
) -> None:
    database = await asyncpg.connect(server.database.url)
    try:
        ids = [outside_id(IdKind.MESSAGE, key) for key in await long_thread(database, client, 10_000)]
    finally:
        await database.close()
    thread = (await client.run("{ threads { nodes { id } } }"))["threads"]["nodes"][0]["id"]
    done = asyncio.Event()
    written: list[str] = []

    async def write() -> None:
        while not done.is_set():
            turn = await client.send("In between", threadId=thread)
            written.extend((turn["userMessage"]["id"], turn["assistantMessage"]["id"]))
            await client.finish(turn["assistantMessage"]["id"])

    writing = asyncio.create_task(write())
    backward = ("last", "before", "hasPreviousPage", "startCursor")
    size, place, has_more, next_place = backward if backwards else ("first", "after", "hasNextPage", "endCursor")
    query = f"""
    query($id: ID!, $cursor: Cursor) {{
      thread(id: $id) {{ messages({size}: 100, {place}: $cursor) {{
        nodes {{ id }} pageInfo {{ {has_more} {next_place} }} }} }}
    }}
    """
    seen: list[str] = []
    cursor, more = None, True
    while more:
        page = (await client.run(query, {"id": thread, "cursor": cursor}))["thread"]["messages"]
        found = [node["id"] for node in page["nodes"]]
        seen = found + seen if backwards else seen + found
        cursor, more = page["pageInfo"][next_place], page["pageInfo"][has_more]
        if len(seen) > 10_000:
            done.set()
    done.set()
    await writing
    assert len(written) >= 2
    # What was written meanwhile follows, as far as it was there when its page was read.
    assert seen[:10_000] == ids
    assert seen[10_000:] == written[: len(seen) - 10_000]


async def test_nodes_finds_threads_and_messages_in_order(client: Client, other: Client) -> None:
    turn = await client.send("Node")
    foreign = await other.send("Foreign")
    ids = [
        turn["userMessage"]["id"],
        foreign["thread"]["id"],
        turn["thread"]["id"],
        f"thread_{uuid.uuid4().hex}",
        turn["userMessage"]["id"],
    ]
    nodes = (await client.run("query($ids: [ID!]!) { nodes(ids: $ids) { __typename id } }", {"ids": ids}))["nodes"]
    assert nodes == [
        {"__typename": "Message", "id": ids[0]},
        None,
        {"__typename": "Thread", "id": ids[2]},
        None,
        {"__typename": "Message", "id": ids[0]},
    ]
    with pytest.raises(GraphQLErrors) as refused:
        await client.run("query($ids: [ID!]!) { nodes(ids: $ids) { id } }", {"ids": ids * 21})
    assert refused.value.code == "BAD_USER_INPUT"


BAD_IDS = [
    "",
    "x",
    "thread_",
    "thread_" + "g" * 32,
    "THREAD_" + "0" * 32,
    "thread_" + "0" * 33,
    " thread_" + "0" * 32,
    "٠" * 32,
]


@pytest.mark.parametrize("bad", [*BAD_IDS, "message_" + "0" * 32, "x" * 100_000])
async def test_what_is_no_id_of_the_kind_is_bad_input(client: Client, bad: str) -> None:
    with pytest.raises(GraphQLErrors) as refused:
        await client.run("query($id: ID!) { thread(id: $id) { id } }", {"id": bad})
    assert (refused.value.code, refused.value.extensions["field"]) == ("BAD_USER_INPUT", "id")


async def test_a_page_of_many_threads_asks_as_often_as_one_of_few(client: Client, server: Server) -> None:
    query = """
    { threads(first: 20) { nodes {
        messages(last: 2) { nodes { text thread { id } parent { id } siblings { id } } } liveMessage { id }
    } } }
    """
    counts = []
    for number in (2, 10):
        for _ in range(number):
            await client.finish((await client.send("Thread"))["assistantMessage"]["id"])
        # The least of some: the server's own tasks take connections, too.
        counts.append(min([await count_statements(server, lambda: client.run(query)) for _ in range(3)]))
    assert counts[0] == counts[1] <= 8


async def test_a_page_of_threads_is_read_with_its_projects(client: Client, server: Server) -> None:
    project = "mutation($name: String!) { createProject(input: {name: $name}) { project { id } } }"
    ids = [(await client.run(project, {"name": name}))["createProject"]["project"]["id"] for name in ("One", "Two")]
    for project_id in (*ids, None, ids[0]):
        turn = await client.send("Question", projectId=project_id)
        await client.finish(turn["assistantMessage"]["id"])
    query = "{ threads { nodes { project { id name } } } }"
    shown = [thread["project"] for thread in (await client.run(query))["threads"]["nodes"]]
    assert shown == [{"id": ids[0], "name": "One"}, None, {"id": ids[1], "name": "Two"}, {"id": ids[0], "name": "One"}]
    assert min([await count_statements(server, lambda: client.run(query)) for _ in range(3)]) == 1


async def count_statements(server: Server, action: Any) -> int:
    """How many times the action takes a connection."""
    count = 0
    acquire = server.database.acquire

    def counting() -> Any:
        nonlocal count
        count += 1
        return acquire()

    server.database.acquire = counting  # type: ignore[method-assign]
    try:
        await action()
    finally:
        del server.database.acquire
    return count


@pytest.mark.parametrize("order", ["DESC", "ASC"])
@pytest.mark.parametrize(
    "conditions", [(), ("pinned = {}", IN_TITLE, "(project_id IS NOT NULL) = {}")], ids=["all", "some"]
)
@pytest.mark.parametrize(
    "wanted", [None, frozenset({"id", "project_id", "project.id", "project.name"})], ids=["alone", "with projects"]
)
async def test_the_list_is_served_by_its_index(
    server: Server, client: Client, order: str, conditions: tuple[str, ...], wanted: frozenset[str] | None
) -> None:
    await add_threads(server, client, [(n % 7 == 0, n) for n in range(5_000)])
    connection = await asyncpg.connect(server.database.url)
    try:
        await connection.execute("ANALYZE threads")
        # What it is served by once PostgreSQL has seen it a few times.
        await connection.execute(f"PREPARE listed AS {_list_query(order, conditions, wanted)}")
        await connection.execute(_PLAN_ONCE)
        nulls = ", ".join(["NULL"] * (10 + len(conditions)))
        plan = await connection.fetch(f"EXPLAIN (FORMAT JSON) EXECUTE listed ({nulls})")
    finally:
        await connection.close()
    # Projects are joined to the page: how, and in what order, is for as few rows as it has.
    (limit,) = [node for node in nodes_of(orjson.loads(plan[0][0])[0]["Plan"]) if node["Node Type"] == "Limit"]
    below = list(nodes_of(limit))[1:]
    assert {node["Index Name"] for node in below if "Index Name" in node} == {"threads_listed"}
    assert not {node["Node Type"] for node in below} & {"Seq Scan", "Incremental Sort"}
    # What passes conditions may be thought to be so little that it is sooner sorted than read in its order.
    assert conditions or [node["Node Type"] for node in below] == ["Index Scan"]


@pytest.mark.parametrize(
    "wanted", [None, frozenset({"id", "project_id", "project.id"})], ids=["alone", "with projects"]
)
async def test_the_list_is_not_planned_anew_for_every_page(
    server: Server, client: Client, wanted: frozenset[str] | None
) -> None:
    await add_threads(server, client, [(n % 7 == 0, n) for n in range(500)])
    bounds = [value for place in (_TOP, _BOTTOM) for value in (place.pinned, place.updated_at, place.id)]
    arguments = (parse_id(IdKind.USER, client.id), False, False, *bounds, 51)
    query = _list_query("DESC", (), wanted)
    async with server.database.acquire() as connection:
        for _ in range(10):
            await connection.fetch(query, *arguments)
        # It may have been prepared for others with another class of records.
        generic, custom = await connection.fetchrow(
            "SELECT sum(generic_plans), sum(custom_plans) FROM pg_prepared_statements WHERE statement = $1", query
        )
    assert generic >= 10
    assert custom == 0


async def test_deleting_twice_or_at_once_is_not_found_once_gone(client: Client) -> None:
    turn = await client.send("Delete")
    await client.finish(turn["assistantMessage"]["id"])
    delete = "mutation($id: ID!) { deleteThread(input: {threadId: $id}) { deletedThreadId } }"
    results = await asyncio.gather(*(client.run(delete, turn["thread"]) for _ in range(5)), return_exceptions=True)
    codes = [result.code for result in results if isinstance(result, GraphQLErrors)]
    assert codes == ["NOT_FOUND"] * 4
