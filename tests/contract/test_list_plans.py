"""Every list is read by an index that gives its order, and no further than its page, on rows of many users."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import asyncpg
import orjson
import pytest

from models.database import Database
from services import attachments, changes, forks, history, messages, projects, sharing, threads, turns
from services.paging import FIRST_ID, LAST_ID
from services.seed import SeedPlan, seed
from tests.conftest import make_database
from tests.query_plans import nodes_of, rows_read

PAGE = 10
LIMIT = PAGE + 1
OWNED = 500
LARGE = {"projects", "threads", "messages", "attachments", "blobs", "changes", "shares", "share_messages"}
# What `seed` makes none or few of: as much for every user.
_MORE = (
    f"""
    INSERT INTO projects (id, owner_id, name)
    SELECT gen_random_uuid(), id, 'One of many' FROM users, generate_series(1, {OWNED})
    """,
    f"""
    INSERT INTO blobs (id, key, size, sha256, content_type)
    SELECT gen_random_uuid(), 'key' || n, 1, '', 'text/plain' FROM generate_series(1, {OWNED}) n
    """,
    """
    INSERT INTO attachments (id, owner_id, blob_id, state, name, content_type, size)
    SELECT gen_random_uuid(), users.id, blobs.id, 'LINKED', 'a.txt', 'text/plain', 1 FROM users, blobs
    """,
    f"INSERT INTO changes (owner_id, kind) SELECT id, 'SETTINGS' FROM generate_series(1, {OWNED}), users",
    """
    INSERT INTO shares (id, owner_id, thread_id, token, title, includes_attachments)
    SELECT gen_random_uuid(), owner_id, id, id::text, title, false FROM threads
    """,
    f"""
    INSERT INTO share_messages (share_id, position, role, status, parts)
    SELECT id, n, 'USER', 'COMPLETE', '[]' FROM shares, generate_series(0, {2 * PAGE}) n
    """,
)
# A page is a small part of these.
_LONGER = f"""
INSERT INTO messages (id, owner_id, thread_id, depth, active, role, status, parts)
SELECT gen_random_uuid(), owner_id, id, 1000 + n, true, 'USER', 'COMPLETE', '[]'
FROM threads, generate_series(1, {OWNED}) n WHERE id = ANY($1::uuid[])
"""


@dataclass(frozen=True, slots=True)
class Filled:
    """A database of 40 users, and what the first of them has.

    Attributes:
        thread_ids: threads with more messages than a page.
        project_ids: projects with more threads than a page.
    """

    url: str
    owner_id: UUID
    thread_ids: list[UUID]
    project_ids: list[UUID]
    share_token: str

    @property
    def bounds(self) -> tuple[Any, ...]:
        """Of a page of threads that begins at the top."""
        top, bottom = threads._TOP, threads._BOTTOM
        return (top.pinned, top.updated_at, top.id, bottom.pinned, bottom.updated_at, bottom.id)


@pytest.fixture(scope="module")
async def filled(postgres_url: str) -> Filled:
    """Made once."""
    database = Database(await make_database(postgres_url), pool_size=2, timeout_seconds=60)
    await database.migrate()
    plan = SeedPlan(users=40, threads=8_000, messages=20_000, seed=5, now=datetime(2026, 1, 1, tzinfo=UTC))
    owner_id = await seed(database, plan)
    connection = await asyncpg.connect(database.url)
    try:
        await connection.execute("SET session_replication_role = replica")
        for statement in _MORE:
            await connection.execute(statement)
        long = await connection.fetch(
            "SELECT thread_id FROM messages WHERE owner_id = $1 AND active GROUP BY 1 HAVING count(*) > $2 LIMIT 5",
            *(owner_id, PAGE),
        )
        await connection.execute(_LONGER, [row[0] for row in long])
        await connection.execute("VACUUM ANALYZE")
        full = await connection.fetch(
            """
            SELECT project_id FROM threads WHERE owner_id = $1 AND project_id IS NOT NULL AND NOT archived
            GROUP BY 1 HAVING count(*) > $2
            """,
            *(owner_id, PAGE),
        )
        token = await connection.fetchval("SELECT token FROM shares LIMIT 1")
    finally:
        await connection.close()
    assert long
    assert full
    return Filled(database.url, owner_id, [row[0] for row in long], [row[0] for row in full], token)


@dataclass(frozen=True, slots=True)
class List:
    """One list.

    Attributes:
        query: its statement.
        arguments: of it.
        indexes: any of them has its order.
        pages: how many pages it reads at once.
    """

    query: str
    arguments: tuple[Any, ...]
    indexes: tuple[str, ...]
    pages: int = 1


def lists(order: str, filled: Filled) -> dict[str, List]:
    """All of them, in one direction."""
    owner = filled.owner_id
    path = (filled.thread_ids, owner, -1, 2**31 - 1, LIMIT)
    of_projects = (owner, False, False, *filled.bounds, LIMIT, filled.project_ids)
    by_age = (owner, LAST_ID, FIRST_ID)
    down = order == "DESC"
    in_path = ("messages_active_path", "messages_by_depth")
    return {
        "messages of threads": List(messages._path_query(order, None), path, in_path, len(path[0])),
        "some columns of messages": List(
            messages._path_query(order, frozenset({"id", "role", "parts"})), path, in_path, len(path[0])
        ),
        "threads of projects": List(
            threads._project_query(order, ()), of_projects, ("threads_of_project",), len(filled.project_ids)
        ),
        "projects": List(projects._list_query(order, named=False), (*by_age, False, LIMIT), ("projects_by_age",)),
        "attachments": List(
            attachments._LIST if down else attachments._LIST_BACKWARDS, (*by_age, LIMIT), ("attachments_by_age",)
        ),
        "changes": List(changes._AFTER, (owner, 0, LIMIT), ("changes_in_order",)),
        "messages of a share": List(
            sharing._PAGE_BACKWARDS if down else sharing._PAGE,
            (filled.share_token, -1, 2**31 - 1, LIMIT),
            ("share_messages_once",),
        ),
    }


@pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])
@pytest.mark.parametrize("order", ["DESC", "ASC"])
@pytest.mark.parametrize(
    "name",
    [
        "messages of threads",
        "some columns of messages",
        "threads of projects",
        "projects",
        "attachments",
        "changes",
        "messages of a share",
    ],
)
async def test_a_page_is_read_by_its_index_and_no_further(filled: Filled, name: str, order: str, mode: str) -> None:
    one = lists(order, filled)[name]
    count, nodes = await explained(filled.url, mode, one.query, one.arguments)
    assert count == LIMIT * one.pages, "there is more than a page of it"
    assert {node.get("Index Name") for node in nodes} & {*one.indexes}
    assert too_much(nodes, LIMIT * one.pages + PAGE) == []


@pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])
@pytest.mark.parametrize("order", ["DESC", "ASC"])
async def test_threads_and_a_page_of_the_messages_of_each_are_read_no_further(
    filled: Filled, order: str, mode: str
) -> None:
    of_messages = frozenset({"id", "read_text"})
    query = threads._paths_query(order, (), frozenset({"id", "title", "project.name"}), order, of_messages)
    arguments = (filled.owner_id, False, False, *filled.bounds, LIMIT, -1, 2**31 - 1, LIMIT)
    count, nodes = await explained(filled.url, mode, query, arguments)
    assert count >= LIMIT
    assert "threads_listed" in {node.get("Index Name") for node in nodes}
    assert too_much(nodes, LIMIT * LIMIT + PAGE) == []


@pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])
async def test_the_end_of_a_long_thread_is_found_without_the_rest(filled: Filled, mode: str) -> None:
    count, nodes = await explained(filled.url, mode, turns._LEAF, filled.thread_ids[:1])
    assert count == 1
    assert too_much(nodes, 1) == []


async def explained(url: str, mode: str, query: str, arguments: Sequence[Any]) -> tuple[int, list[dict[str, Any]]]:
    """How many rows a statement gives, and the nodes of its plan with what they read of large tables."""
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(f"SET plan_cache_mode = {mode}")
        told = await connection.fetchval(f"EXPLAIN (ANALYZE, FORMAT JSON) {query}", *arguments)
        rows = await connection.fetch(query, *arguments)
    finally:
        await connection.close()
    return len(rows), list(nodes_of(orjson.loads(told)[0]["Plan"]))


def too_much(nodes: list[dict[str, Any]], rows: int) -> list[dict[str, Any]]:
    """The nodes that read a large table in no order, or more than so many rows of it."""
    large = [node for node in nodes if node.get("Relation Name") in LARGE]
    return [node for node in large if node["Node Type"] == "Seq Scan" or rows_read(node) > rows]


BRANCHES = {
    "a fork": (forks._FORK, 5),
    "a prompt": (history._BRANCH, 2),
    "the way up": (messages._CLIMB, 1),
    "the way down": (messages._DESCEND, 1),
}


@pytest.mark.parametrize("name", BRANCHES)
async def test_a_plan_that_was_made_when_there_was_little_follows_a_long_branch_by_keys(
    postgres_url: str, name: str
) -> None:
    """Ten messages are read in one go sooner than by keys; but the plan is kept, and soon there are ten thousand."""
    query, parameters = BRANCHES[name]
    database = Database(await make_database(postgres_url), pool_size=1, timeout_seconds=60)
    await database.migrate()
    await database.connect()
    try:
        await seed(database, SeedPlan(users=1, threads=2, messages=10, seed=5, now=datetime(2026, 1, 1, tzinfo=UTC)))
        async with database.acquire() as connection:
            await connection.execute("ANALYZE")
            await connection.execute(f"PREPARE asked AS {query}")
            nulls = ", ".join(["NULL"] * parameters)
            (told,) = await connection.fetch(f"EXPLAIN (FORMAT JSON) EXECUTE asked ({nulls})")
    finally:
        await database.close()
    reads = [node for node in nodes_of(orjson.loads(told[0])[0]["Plan"]) if node.get("Relation Name") == "messages"]
    reads = [node for node in reads if node["Node Type"] != "ModifyTable"]
    assert reads
    assert [node["Node Type"] for node in reads if "Index Cond" not in node] == []
