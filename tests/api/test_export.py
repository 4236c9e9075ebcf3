"""Everything of an account in one file: by a link, of one moment, in little memory."""

from __future__ import annotations

import asyncio
import gc
import io
import time
import tracemalloc
import zipfile
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import asyncpg
import jwt
import orjson
import pytest

from graph.types.message import MessageErrorCode
from models.ids import IdKind, new_id, outside_id
from server.runtime import Server
from services.errors import ForbiddenError, UnavailableError
from services.export_format import ERROR_CODES, SHAPES
from services.exports import LINK_SECONDS, Export, Exports
from tests.accounts import EXPORT, Filling, comparable, download, key_of, link, members, viewer_of
from tests.client import DEADLINE_SECONDS, Client, GraphQLErrors

SECRET = "s" * 32


@pytest.fixture
async def connection(server: Server) -> AsyncIterator[asyncpg.Connection]:
    """A connection beside the server's."""
    connection = await asyncpg.connect(server.database.url)
    yield connection
    await connection.close()


def exports_of(server: Server, **given: Any) -> Exports:
    return Exports(
        server.database,
        server.storage,
        secret=SECRET,
        address=lambda: server.address,
        **given,
    )


async def token_of(exports: Exports, client: Client) -> str:
    return (await exports.link(viewer_of(client), include_attachments=True)).url.rsplit("/", 1)[1]


async def read(export: Export) -> bytes:
    async with aclosing(export.chunks()) as chunks:
        return b"".join([chunk async for chunk in chunks])


async def test_a_browser_gets_a_file_by_the_link_alone(client: Client, nobody: Client) -> None:
    turn = await client.send("What is in it?")
    await client.finish(turn["assistantMessage"]["id"])
    async with nobody.http.get(await link(client)) as response:
        assert response.status == 200
        headers = response.headers
        data = await response.read()
    assert headers["Content-Type"] == "application/zip"
    assert headers["Content-Disposition"].startswith('attachment; filename="threadgraph-export-20')
    assert headers["Content-Disposition"].endswith('.zip"')
    assert headers["Cache-Control"] == "no-store"
    assert headers["X-Content-Type-Options"] == "nosniff"
    found = members(data)
    assert list(found) == ["manifest.json", *(f"{shape.name}.ndjson" for shape in SHAPES)]
    manifest = found["manifest.json"][0]
    assert (manifest["format"], manifest["version"], manifest["user"]["id"]) == ("threadgraph-export", 2, client.id)
    assert manifest["counts"] == {shape.name: len(found[f"{shape.name}.ndjson"]) for shape in SHAPES}
    assert [line["id"] for line in found["threads.ndjson"]] == [turn["thread"]["id"]]
    question, answer = found["messages.ndjson"]
    assert (question["id"], question["parentId"], question["activeChildId"]) == (
        turn["userMessage"]["id"],
        None,
        turn["assistantMessage"]["id"],
    )
    assert answer["parts"] == [{"text": "Hello world", "type": "text"}]
    assert (answer["promptTokens"], answer["cachedTokens"], answer["status"]) == (7, 3, "COMPLETE")
    assert [(line["messageId"], line["kind"]) for line in found["usage.ndjson"]] == [(answer["id"], "ANSWER")]


async def test_an_export_has_what_its_owner_has_and_nothing_of_others(
    client: Client, other: Client, connection: asyncpg.Connection
) -> None:
    await Filling(connection, key_of(client), 1).all()
    before = await download(client)
    await Filling(connection, key_of(other), 2).all()
    assert comparable(await download(client)) == comparable(before)
    counts = members(before)["manifest.json"][0]["counts"]
    assert {name for name, count in counts.items() if not count} == {"attachments"}
    theirs = {
        line["id"]
        for name in ("projects", "threads", "messages")
        for line in members(await download(other))[f"{name}.ndjson"]
    }
    assert not any(key.encode() in zipfile.ZipFile(io.BytesIO(before)).read("messages.ndjson") for key in theirs)


async def test_every_column_of_what_is_exported_is_in_the_file_or_left_out_on_purpose(
    connection: asyncpg.Connection,
) -> None:
    # Whose it is says the file as a whole; counts are kept by triggers; an id that nothing refers to is made anew.
    left_out = {"owner_id", "projects.thread_count", "settings.id", "usage_events.id", "share_messages.id"}
    left_out |= {"custom_providers.id", "custom_models.id"}
    # Where the bytes are, and whether a message refers to them, is found again.
    left_out |= {f"attachments.{column}" for column in ("blob_id", "state", "upload_key", "expires_at")}
    # Says which cursors are good for a message of this id; an import has new ids.
    left_out |= {"messages.attempt"}
    for shape in SHAPES:
        rows = await connection.fetch(
            "SELECT column_name::text FROM information_schema.columns WHERE table_name = $1", shape.table
        )
        columns = {row[0] for row in rows if not {row[0], f"{shape.table}.{row[0]}"} & left_out}
        assert columns == set(shape.columns), shape.name


async def test_an_answer_that_is_being_written_is_exported_as_cut_off_with_its_text(
    client: Client, connection: asyncpg.Connection
) -> None:
    turn = await client.send("Say something", model="hangs")
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not await connection.fetchval(
            "SELECT count(*) FROM stream_checkpoints JOIN streams ON message_id = stream_id WHERE owner_id = $1",
            key_of(client),
        ):
            await asyncio.sleep(0.02)
    answer = members(await download(client))["messages.ndjson"][1]
    assert (answer["status"], answer["errorCode"]) == ("INTERRUPTED", None)
    assert answer["parts"] == [{"type": "text", "text": "one two "}]
    await client.stop(turn["assistantMessage"]["id"])


async def test_an_export_is_of_one_moment(server: Server, client: Client, connection: asyncpg.Connection) -> None:
    filling = Filling(connection, key_of(client), 3)
    await filling.all()
    before = comparable(await download(client))
    exports = exports_of(server)
    async with exports.open(await token_of(exports, client)) as export, aclosing(export.chunks()) as chunks:
        data = await anext(chunks)
        await filling.thread(messages=3)
        await connection.execute("DELETE FROM threads WHERE id = $1", filling.threads[0])
        await connection.execute("UPDATE projects SET name = 'changed' WHERE owner_id = $1", key_of(client))
        async for chunk in chunks:
            data += chunk
    assert comparable(data) == before
    assert comparable(await download(client)) != before


async def test_a_member_that_grows_too_long_goes_on_in_the_next(
    server: Server, client: Client, connection: asyncpg.Connection
) -> None:
    filling = Filling(connection, key_of(client), 4)
    await add_messages(filling, 60, 20_000)
    exports = exports_of(server, member_bytes=600_000)
    async with exports.open(await token_of(exports, client)) as export:
        found = members(await read(export))
    numbers = [len(lines) for name, lines in found.items() if name.startswith("messages")]
    assert [name for name in found if name.startswith("mess")] == [
        "messages.ndjson",
        "messages-2.ndjson",
        "messages-3.ndjson",
    ]
    assert (len(numbers), sum(numbers)) == (3, 60)


async def add_messages(filling: Filling, count: int, size: int) -> None:
    """A thread with a long path of long messages."""
    thread_id = await filling.thread(messages=0)
    ids = [new_id() for _ in range(count)]
    await filling.connection.execute(
        """
        INSERT INTO messages (id, owner_id, thread_id, parent_id, depth, active, role, status, parts)
        SELECT ($1::uuid[])[n], $2, $3, ($1::uuid[])[n - 1], n - 1, true, 'USER', 'COMPLETE',
            jsonb_build_array(jsonb_build_object('type', 'text', 'text',
                (SELECT string_agg(md5((n * 10000 + i)::text), '') FROM generate_series(1, $5::int / 32) i)))
        FROM generate_series(1, $4::int) n
        """,
        *(ids, filling.owner_id, thread_id, count, size),
    )


async def test_the_memory_of_an_export_does_not_grow_with_the_account(
    server: Server, client: Client, connection: asyncpg.Connection
) -> None:
    await add_messages(Filling(connection, key_of(client), 5), 1_200, 8_000)
    exports = exports_of(server)
    async with exports.open(await token_of(exports, client)) as export, aclosing(export.chunks()) as chunks:
        await anext(chunks)
        gc.collect()
        tracemalloc.start()
        try:
            size = 0
            async for chunk in chunks:
                size += len(chunk)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert size > 4_000_000, "what is left when the text is packed"
    assert peak < 3_000_000


async def test_no_more_downloads_than_are_allowed_run_at_once(server: Server, client: Client) -> None:
    exports = exports_of(server, at_once=1)
    token = await token_of(exports, client)
    async with exports.open(token):
        with pytest.raises(UnavailableError) as refused:
            async with exports.open(token):
                pass
        assert refused.value.retry_after
    assert len(exports) == 0
    async with exports.open(token) as export:
        assert await read(export)


async def test_a_download_that_nobody_reads_any_more_is_let_go_at_once(
    server: Server, client: Client, connection: asyncpg.Connection
) -> None:
    await add_messages(Filling(connection, key_of(client), 6), 1_500, 16_000)
    url = await link(client)
    response = await client.http.get(url)
    assert await response.content.read(1000)
    transactions = """
    SELECT count(*) FROM pg_stat_activity
    WHERE state LIKE 'idle in transaction%' AND datname = current_database() AND query LIKE '%FROM messages m%'
    """

    async def until(wanted: bool) -> None:
        async with asyncio.timeout(DEADLINE_SECONDS):
            while bool(await connection.fetchval(transactions)) is not wanted:
                await asyncio.sleep(0.02)

    await until(True)
    assert response.connection is not None
    transport = response.connection.transport
    assert transport is not None
    transport.abort()
    await until(False)
    response.close()


@pytest.mark.parametrize("change", ["signature", "expired", "session", "audience", "none", "subject", "nonsense"])
async def test_only_a_link_opens_an_export(server: Server, client: Client, other: Client, change: str) -> None:
    exports = exports_of(server)
    claims = {
        "iss": "threadgraph",
        "aud": "export",
        "sub": client.id,
        "iat": 1,
        "exp": int(time.time()) + 60,
        "attachments": True,
    }
    key: Any = exports._key
    match change:
        case "signature":
            token = (await token_of(exports, client))[:-4] + "AAAA"
        case "expired":
            token = jwt.encode(claims | {"exp": int(time.time()) - 1}, key, algorithm="HS256")
        case "session":
            token = str(client.token)
        case "audience":
            token = jwt.encode(claims | {"aud": "other"}, key, algorithm="HS256")
        case "none":
            token = jwt.encode(claims, "", algorithm="none")
        case "subject":
            token = jwt.encode(claims | {"sub": outside_id(IdKind.USER, new_id())}, key, algorithm="HS256")
        case _:
            token = "x" * 5_000
    async with client.http.get(f"{client.address}/export/{token}") as response:
        assert response.status == 403
        assert orjson.loads(await response.read())["errors"][0]["extensions"]["code"] == "FORBIDDEN"
    with pytest.raises(ForbiddenError):
        async with exports.open(token):
            pass


async def test_a_link_is_no_session_and_lives_for_minutes(client: Client, nobody: Client) -> None:
    made = (await client.run(EXPORT, {"input": {"includeAttachments": False}}))["exportData"]
    nobody.token = made["url"].rsplit("/", 1)[1]
    claims = jwt.decode(nobody.token, options={"verify_signature": False})
    assert claims["exp"] - claims["iat"] == LINK_SECONDS <= 900
    with pytest.raises(GraphQLErrors) as refused:
        await nobody.run("{ viewer { id } }")
    assert refused.value.code == "UNAUTHENTICATED"


def test_the_errors_that_the_format_knows_are_those_of_the_schema() -> None:
    assert set(MessageErrorCode.__members__) == ERROR_CODES
