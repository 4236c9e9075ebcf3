"""A deleted account leaves no row, whatever tables there are: they are asked for in the database's own catalogue."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from models.ids import new_id
from models.parts import TextPart
from models.records import MessageStatus, MessageTokens
from server.runtime import Server
from services.accounts import Accounts
from streams.ending import AnswerEnd, StreamHold, end_answer
from tests.accounts import EXPORT, Filling, attach, key_of, upload, viewer_of
from tests.client import DEADLINE_SECONDS, Client, GraphQLErrors
from tests.scripts import SCRIPTS, TextDelta

DELETE = "mutation($input: DeleteAccountInput!) { deleteAccount(input: $input) { deletedUserId } }"
CONFIRMED = {"input": {"confirmation": "DELETE MY ACCOUNT"}}
# Tables from which no foreign key leads to a user, with the reason.
NOBODYS = {
    "backfills": "the operator's",
    "blobs": "what refers to them has an owner",
    "sweep_tasks": "the sweeper's",
}


@pytest.fixture
async def connection(server: Server) -> AsyncIterator[asyncpg.Connection]:
    """A connection beside the server's."""
    connection = await asyncpg.connect(server.database.url)
    yield connection
    await connection.close()


# Every one of them, also where they stand side by side: what stands behind is only looked at.
_KEY = re.compile(r"(?=([0-9a-f]{32}))")


async def tables_of(connection: asyncpg.Connection) -> set[str]:
    """Every table of ours."""
    rows = await connection.fetch(
        """
        SELECT relname::text FROM pg_class
        WHERE relkind IN ('r', 'p') AND relnamespace = 'public'::regnamespace AND relname <> 'tortoise_migrations'
        """
    )
    return {row[0] for row in rows}


async def ways_to_users(connection: asyncpg.Connection) -> dict[str, str]:
    """Of each table from which foreign keys lead to a user: the rows of the user $1, as a condition."""
    rows = await connection.fetch(
        """
        SELECT conrelid::regclass::text AS child, attname::text AS key, confrelid::regclass::text AS parent
        FROM pg_constraint JOIN pg_attribute ON attrelid = conrelid AND attnum = conkey[1] WHERE contype = 'f'
        """
    )
    found = {"users": "id = $1"}
    grown = True
    while grown:
        grown = False
        for row in rows:
            if row["child"] not in found and row["parent"] in found:
                whole = await connection.fetchval(
                    """
                    SELECT attname::text FROM pg_constraint
                    JOIN pg_attribute ON attrelid = conrelid AND attnum = conkey[1]
                    WHERE contype = 'p' AND conrelid = $1::text::regclass
                    """,
                    row["parent"],
                )
                below = f"SELECT {whole} FROM {row['parent']} WHERE {found[row['parent']]}"
                found[row["child"]] = f"{row['key']} IN ({below})"
                grown = True
    return found


async def rows_of(connection: asyncpg.Connection, user_id: UUID) -> dict[str, list[str]]:
    """Every row of a user in every table, as text."""
    return {
        table: [
            row[0]
            for row in await connection.fetch(f"SELECT t::text FROM {table} t WHERE {condition} ORDER BY 1", user_id)
        ]
        for table, condition in (await ways_to_users(connection)).items()
    }


async def keys_of(connection: asyncpg.Connection, user_id: UUID) -> set[str]:
    """Everything that can point to a user: their key, and the key of each row of theirs."""
    keys = {str(user_id)}
    for table, condition in (await ways_to_users(connection)).items():
        for (key,) in await connection.fetch(f"SELECT to_jsonb(t) ->> 'id' FROM {table} t WHERE {condition}", user_id):
            if key is not None and len(key) == 36:
                keys.add(key)
    return keys


async def traces_of(connection: asyncpg.Connection, keys: set[str]) -> set[str]:
    """The tables in which a row holds one of the keys in any column of any type, with dashes or without."""
    plain = {key.replace("-", "") for key in keys}
    found: set[str] = set()
    for table in await tables_of(connection):
        async with connection.transaction():
            # Looked through here: the database's patterns take minutes for hundreds of keys.
            async for (row,) in connection.cursor(f"SELECT t::text FROM {table} t", prefetch=500):
                if not plain.isdisjoint(_KEY.findall(row.replace("-", ""))):
                    found.add(table)
                    break
    return found


async def fill_everything(server: Server, client: Client, connection: asyncpg.Connection, seed: int) -> None:
    """A row of the user in every table there is, and an answer that is being written."""
    filling = Filling(connection, key_of(client), seed)
    await filling.all()
    await server.provider_keys.set(viewer_of(client), "openai", "a-key-of-openai")
    attachment_id = await attach(server, client, b"content")
    await attach(server, client, b"of no message")
    await client.send("Not over yet", model="hangs", attachmentIds=[attachment_id])
    await connection.execute(
        """
        INSERT INTO share_attachments (share_id, position, blob_id, name, content_type, size)
        SELECT s.id, 0, a.blob_id, 'n', 't', 7
        FROM shares s JOIN attachments a USING (owner_id) WHERE owner_id = $1 LIMIT 1
        """,
        key_of(client),
    )
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not await connection.fetchval(
            "SELECT count(*) FROM stream_checkpoints JOIN streams ON message_id = stream_id WHERE owner_id = $1",
            key_of(client),
        ):
            await asyncio.sleep(0.02)


async def test_nothing_of_a_deleted_account_is_left_in_any_table_and_nothing_of_others_is_touched(
    server: Server, client: Client, other: Client, connection: asyncpg.Connection
) -> None:
    await fill_everything(server, client, connection, 1)
    await attach(server, other, b"content")
    await Filling(connection, key_of(other), 2).all()
    mine, theirs = await rows_of(connection, key_of(client)), await rows_of(connection, key_of(other))
    empty = {table for table, rows in mine.items() if not rows}
    assert empty == set(), "fill these, too: see fill_everything"
    assert await tables_of(connection) - mine.keys() == NOBODYS.keys()
    keys = await keys_of(connection, key_of(client))
    stored = "SELECT b.key FROM attachments a JOIN blobs b ON b.id = a.blob_id WHERE a.owner_id = $1"
    my_files = [row["key"] for row in await connection.fetch(stored, key_of(client))]
    their_files = [row["key"] for row in await connection.fetch(stored, key_of(other))]
    assert len(keys) > 20
    assert await traces_of(connection, keys) >= {"users", "threads", "messages", "changes"}
    data = await client.run(DELETE, CONFIRMED)
    assert data["deleteAccount"]["deletedUserId"] == client.id
    assert await traces_of(connection, keys) == set()
    assert await rows_of(connection, key_of(other)) == theirs
    while await server.attachments.sweep(500):
        pass
    assert [await server.storage.size(key) for key in my_files] == [None, None]
    assert await traces_of(connection, set(my_files)) == set()
    assert [await server.storage.size(key) for key in their_files] == [7]


async def test_who_reads_an_answer_of_a_deleted_account_is_let_go_and_the_model_too(client: Client) -> None:
    question = f"Driven {new_id()}"
    turn = await client.send(question, model="driven")
    SCRIPTS.driven.queue(question).put_nowait(TextDelta("Some"))
    async with client.reading(turn["assistantMessage"]["id"]) as subscription:
        assert await subscription.next()
        await client.run(DELETE, CONFIRMED)
        async with asyncio.timeout(DEADLINE_SECONDS):
            await SCRIPTS.driven.closing(question).wait()
            events = [event async for event in subscription.events()]
    assert events[-1]["message"]["status"] == "STOPPED"


@pytest.mark.parametrize("confirmation", ["", "yes", "delete my account", " DELETE MY ACCOUNT", "DELETE\x00MY ACCOUNT"])
async def test_only_the_words_themselves_delete_an_account(
    client: Client, connection: asyncpg.Connection, confirmation: str
) -> None:
    await client.send("Stay")
    with pytest.raises(GraphQLErrors) as refused:
        await client.run(DELETE, {"input": {"confirmation": confirmation}})
    assert (refused.value.code, refused.value.extensions["field"]) == ("BAD_USER_INPUT", "confirmation")
    assert await connection.fetchval("SELECT deleted_at FROM users WHERE id = $1", key_of(client)) is None


async def test_nothing_is_begun_in_an_account_that_is_deleted_or_being_deleted(
    client: Client, connection: asyncpg.Connection
) -> None:
    turn = await client.send("Before")
    await client.finish(turn["assistantMessage"]["id"])

    async def refused() -> set[str]:
        codes = set()
        thread = turn["thread"]["id"]
        for attempt in (
            client.send("After"),
            client.send("After", threadId=thread),
            client.edit(turn["userMessage"]["id"], "After"),
            client.retry(turn["assistantMessage"]["id"]),
            client.run(EXPORT, {"input": {}}),
        ):
            with pytest.raises(GraphQLErrors) as error:
                await attempt
            codes.add(error.value.code)
        _, body = await upload(client, b"")
        return codes | {body["errors"][0]["extensions"]["code"]}

    await connection.execute("UPDATE users SET deleted_at = now() WHERE id = $1", key_of(client))
    before = await rows_of(connection, key_of(client))
    assert await refused() == {"UNAUTHENTICATED"}
    refused_rows: dict[str, dict[str, Any]] = {
        "threads": {"title": "x", "title_source": "TEXT"},
        "projects": {"name": "x"},
        "settings": {},
        "provider_keys": {"provider": "openai", "ciphertext": b"x", "last_four": ""},
        "custom_providers": {"slug": "x", "name": "x", "base_url": "x", "format": "CHAT_COMPLETIONS"},
        "custom_models": {"provider": "x", "vendor_name": "x", "name": "x", "abilities": []},
    }
    for table, values in refused_rows.items():
        with pytest.raises(asyncpg.ForeignKeyViolationError):
            await Filling(connection, key_of(client), 1).insert(table, id=new_id(), owner_id=key_of(client), **values)
    assert await rows_of(connection, key_of(client)) == before
    await client.run(DELETE, CONFIRMED)
    assert await refused() <= {"UNAUTHENTICATED", "NOT_FOUND"}
    with pytest.raises(GraphQLErrors) as gone:
        await client.run(DELETE, CONFIRMED)
    assert gone.value.code == "UNAUTHENTICATED"
    assert await rows_of(connection, key_of(client)) == {table: [] for table in before}


@pytest.mark.parametrize("gone", [False, True])
async def test_an_end_that_comes_too_late_brings_nothing_back(
    server: Server, client: Client, connection: asyncpg.Connection, gone: bool
) -> None:
    user_id = key_of(client)
    if gone:
        await client.run(DELETE, CONFIRMED)
    else:
        await connection.execute("UPDATE users SET deleted_at = now() WHERE id = $1", user_id)
    hold = StreamHold(new_id(), new_id(), user_id, 1, "two-words")
    end = AnswerEnd(MessageStatus.COMPLETE, [TextPart("late")], None, MessageTokens(1, 2, 3, 4, estimated=False))
    assert await end_answer(server.database, hold, end) is None
    rows = await rows_of(connection, user_id)
    assert {table for table, found in rows.items() if found} == (set() if gone else {"users"})


async def many_threads(connection: asyncpg.Connection, user_id: UUID, count: int) -> list[UUID]:
    """Threads with two messages each, in the order of their ids."""
    ids = sorted(new_id() for _ in range(count))
    await connection.execute(
        "INSERT INTO threads (id, owner_id, title, title_source) SELECT unnest($1::uuid[]), $2, 'x', 'TEXT'",
        ids,
        user_id,
    )
    for depth in range(2):
        await connection.execute(
            """
            INSERT INTO messages (id, owner_id, thread_id, depth, active, role, status, parts)
            SELECT gen_random_uuid(), $2, unnest($1::uuid[]), $3, true, 'USER', 'COMPLETE', '[]'
            """,
            *(ids, user_id, depth),
        )
    return ids


async def threads_left(connection: asyncpg.Connection, user_id: UUID) -> int:
    count: int = await connection.fetchval("SELECT count(*) FROM threads WHERE owner_id = $1", user_id)
    return count


async def until_threads(connection: asyncpg.Connection, user_id: UUID, count: int) -> None:
    async with asyncio.timeout(DEADLINE_SECONDS):
        while await threads_left(connection, user_id) > count:
            await asyncio.sleep(0.02)


async def test_a_deletion_that_died_midway_is_finished_by_a_sweep(
    server: Server, client: Client, other: Client, connection: asyncpg.Connection
) -> None:
    user_id = key_of(client)
    ids = await many_threads(connection, user_id, 230)
    await many_threads(connection, key_of(other), 3)
    keys = await keys_of(connection, user_id)
    killed = Accounts(server.database, server.generations)
    sweeping = Accounts(server.database, server.generations)
    async with connection.transaction():
        # The third batch stops here.
        await connection.execute("SELECT FROM threads WHERE id = $1 FOR UPDATE", ids[-1])
        watching = await asyncpg.connect(server.database.url)
        try:
            await watching.execute("UPDATE users SET deleted_at = now() WHERE id = $1", user_id)
            deletion = asyncio.create_task(killed.sweep(10))
            await until_threads(watching, user_id, 30)
            # Another process finds it taken, and does not wait.
            assert await sweeping.sweep(10) == 0
            deletion.cancel()
            await asyncio.gather(deletion, return_exceptions=True)
            assert await threads_left(watching, user_id) == 30
        finally:
            await watching.close()
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not await sweeping.sweep(10):
            await asyncio.sleep(0.02)
    assert await traces_of(connection, keys) == set()
    assert await threads_left(connection, key_of(other)) == 3
    assert await sweeping.sweep(10) == 0


async def test_a_deletion_goes_on_when_its_caller_has_left(
    server: Server, client: Client, connection: asyncpg.Connection
) -> None:
    user_id = key_of(client)
    ids = await many_threads(connection, user_id, 130)
    watching = await asyncpg.connect(server.database.url)
    try:
        async with connection.transaction():
            await connection.execute("SELECT FROM threads WHERE id = $1 FOR UPDATE", ids[-1])
            asking = asyncio.create_task(client.run(DELETE, CONFIRMED))
            await until_threads(watching, user_id, 30)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
        await until_threads(watching, user_id, 0)
        async with asyncio.timeout(DEADLINE_SECONDS):
            while await watching.fetchval("SELECT count(*) FROM users WHERE id = $1", user_id):
                await asyncio.sleep(0.02)
    finally:
        await watching.close()


async def test_two_devices_may_delete_an_account_at_once(client: Client, connection: asyncpg.Connection) -> None:
    await many_threads(connection, key_of(client), 250)
    outcomes: list[Any] = await asyncio.gather(
        *(client.run(DELETE, CONFIRMED) for _ in range(4)), return_exceptions=True
    )
    codes = {outcome.code for outcome in outcomes if isinstance(outcome, GraphQLErrors)}
    assert codes <= {"UNAUTHENTICATED"}
    assert any(isinstance(outcome, dict) for outcome in outcomes)
    assert not any((await rows_of(connection, key_of(client))).values())
