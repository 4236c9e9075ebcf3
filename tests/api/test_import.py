"""A file of an account, taken in: an equal account, or one error and nothing."""

from __future__ import annotations

import asyncio
import copy
import io
import os
import secrets
import zipfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import asyncpg
import pytest

import services.imports
from models.ids import new_id
from server.runtime import Server
from services.custom_providers import MAX_MODELS, MAX_PROVIDERS
from services.errors import ImportRefusedError, PayloadTooLargeError
from services.export_format import VERSION
from services.imports import Imports
from tests.accounts import (
    Filling,
    attach,
    comparable,
    download,
    files,
    key_of,
    link,
    members,
    packed,
    upload,
    viewer_of,
)
from tests.api.test_export import exports_of, read, token_of
from tests.client import DEADLINE_SECONDS, SELECT, Client, connect


@pytest.fixture
async def connection(server: Server) -> AsyncIterator[asyncpg.Connection]:
    """A connection beside the server's."""
    connection = await asyncpg.connect(server.database.url)
    yield connection
    await connection.close()


@pytest.mark.parametrize("seed", range(5))
async def test_an_imported_export_exports_as_it_was(
    client: Client, other: Client, connection: asyncpg.Connection, seed: int
) -> None:
    await Filling(connection, key_of(client), seed).all(threads=6)
    exported = await download(client)
    status, body = await upload(other, exported)
    assert (status, body) == (200, {"imported": members(exported)["manifest.json"][0]["counts"]})
    again = await download(other)
    assert comparable(again) == comparable(exported)
    # What the file does not say is kept all the same: by triggers.
    for query in (
        "SELECT name, thread_count FROM projects WHERE owner_id = $1 ORDER BY id",
        "SELECT began_at, model, requests, prompt_tokens, completion_tokens, reasoning_tokens, cached_tokens, "
        "priced_requests, cost_micros FROM usage_quarters WHERE owner_id = $1 ORDER BY began_at, model",
    ):
        rows = [await connection.fetch(query, key_of(user)) for user in (client, other)]
        assert rows[0] == rows[1] != []


@pytest.mark.parametrize("lines", [1_100, 2_200])
async def test_costs_that_could_not_be_added_up_are_refused(
    client: Client, connection: asyncpg.Connection, good: Contents, lines: int
) -> None:
    contents = copy.deepcopy(good)
    # In one quarter of an hour, whose sum no 64 bits hold (2,200), or leave no room for what comes (1,100).
    line = contents["usage.ndjson"][0] | {"costMicros": 2 * (2**31 - 1) * 10**6}
    contents["usage.ndjson"] = [line | {"messageId": f"message_{number:032x}"} for number in range(lines)]
    contents["manifest.json"][0]["counts"]["usage"] = lines
    before = await rows_of(connection, client)
    status, body = await upload(client, packed(contents))
    assert (status, body["errors"][0]["extensions"]) == (400, {"code": "BAD_USER_INPUT", "field": "usage.ndjson"})
    assert await rows_of(connection, client) == before


async def test_files_are_taken_along_with_the_messages_that_refer_to_them(
    server: Server, client: Client, other: Client, connection: asyncpg.Connection
) -> None:
    sent, gone, kept = [await attach(server, client, f"content {n} 🦉".encode(), f"{n}.txt") for n in range(3)]
    for attachment_id in (sent, gone):
        turn = await client.send("Look", attachmentIds=[attachment_id])
        await client.finish(turn["assistantMessage"]["id"])
    await client.run("mutation($id: ID!) { deleteAttachment(input: {attachmentId: $id}) { __typename } }", {"id": gone})
    exported = await download(client)
    assert files(exported) == {sent: "content 0 🦉".encode(), kept: "content 2 🦉".encode()}
    status, body = await upload(other, exported)
    assert (status, body["imported"]["attachments"]) == (200, 2)
    again = await download(other)
    assert comparable(again) == comparable(exported)
    assert not files(again).keys() & files(exported).keys()
    rows = await connection.fetch(
        """
        SELECT a.state, a.name, m.owner_id FROM attachments a LEFT JOIN attachment_links l ON l.attachment_id = a.id
        LEFT JOIN messages m ON m.id = l.message_id WHERE a.owner_id = $1 ORDER BY a.id
        """,
        key_of(other),
    )
    assert [tuple(row) for row in rows] == [("LINKED", "0.txt", key_of(other)), ("STORED", "2.txt", None)]
    async with client.http.get(await link(client, includeAttachments=False)) as response:
        without = await response.read()
    assert files(without) == {}
    assert (await upload(other, without))[1]["imported"]["attachments"] == 0


async def test_files_of_an_import_that_fails_are_not_kept(
    server: Server, client: Client, other: Client, connection: asyncpg.Connection
) -> None:
    for number in range(2):
        await attach(server, client, f"content {number}".encode())
    exported = await download(client)
    contents, attached = members(exported), files(exported)
    first, second = attached
    for wrong in (
        attached | {second: b""},  # an empty file is none
        attached | {"attachment" + SOMEBODY: b"x"},
        attached | {"../../x": b"x"},
    ):
        status, body = await upload(other, packed(contents, wrong))
        assert (status, body["errors"][0]["extensions"]["code"]) == (400, "BAD_USER_INPUT")
        assert await connection.fetchval("SELECT count(*) FROM attachments WHERE owner_id = $1", key_of(other)) == 0
    assert (await upload(other, packed(contents, {first: attached[first]})))[1]["imported"]["attachments"] == 1


async def test_an_imported_account_is_used_like_any_other(client: Client, other: Client) -> None:
    turn = await client.send("First")
    await client.finish(turn["assistantMessage"]["id"])
    edited = await client.edit(turn["userMessage"]["id"], "First, in other words")
    await client.finish(edited["assistantMessage"]["id"])
    await client.run(SELECT, {"id": turn["userMessage"]["id"]})
    assert (await upload(other, await download(client)))[0] == 200
    (thread,) = (await other.run("{ threads { nodes { id title } } }"))["threads"]["nodes"]
    assert thread["title"] == "First"
    path = await other.path(thread["id"])
    assert [message["text"] for message in path] == ["First", "Hello world"]
    await other.run(SELECT, {"id": (await siblings(other, path[0]["id"]))[1]})
    path = await other.path(thread["id"])
    assert [message["text"] for message in path] == ["First, in other words", "Hello world"]
    more = await other.send("And now?", threadId=thread["id"])
    assert (await other.finish(more["assistantMessage"]["id"]))["status"] == "COMPLETE"
    assert len(await other.path(thread["id"])) == 4
    assert len(await client.path(turn["thread"]["id"])) == 2


async def siblings(client: Client, message_id: str) -> list[str]:
    data = await client.run("query($id: ID!) { message(id: $id) { siblings { id } } }", {"id": message_id})
    return [sibling["id"] for sibling in data["message"]["siblings"]]


async def test_importing_twice_makes_copies_with_ids_and_links_of_their_own(
    client: Client, connection: asyncpg.Connection
) -> None:
    filling = Filling(connection, key_of(client), 9)
    await filling.all()
    exported = await download(client)
    for _ in range(2):
        assert (await upload(client, exported))[0] == 200
    found = members(await download(client))
    for name in ("projects", "threads", "messages", "shares"):
        ids = {line["id"] for line in found[f"{name}.ndjson"]}
        assert len(ids) == 3 * len(members(exported)[f"{name}.ndjson"])
    assert len({line["token"] for line in found["shares.ndjson"]}) == 3
    assert len(found["settings.ndjson"]) == 1


async def test_what_was_chosen_before_an_import_stays_chosen(
    client: Client, other: Client, connection: asyncpg.Connection
) -> None:
    await Filling(connection, key_of(client), 10).all()
    await connection.execute(
        "INSERT INTO settings (id, owner_id, default_model) VALUES (gen_random_uuid(), $1, 'slow')", key_of(other)
    )
    assert (await upload(other, await download(client)))[0] == 200
    assert members(await download(other))["settings.ndjson"][0]["defaultModelId"] == "slow"


async def test_choices_are_merged_field_by_field(client: Client, other: Client, connection: asyncpg.Connection) -> None:
    await connection.execute(
        "INSERT INTO settings (id, owner_id, default_model, user_name, user_traits) "
        "VALUES (gen_random_uuid(), $1, 'two-words', 'Ada', 'brief')",
        key_of(client),
    )
    await connection.execute(
        "INSERT INTO settings (id, owner_id, user_name, user_context) VALUES (gen_random_uuid(), $1, 'Grace', 'COBOL')",
        key_of(other),
    )
    assert (await upload(other, await download(client)))[0] == 200
    (chosen,) = members(await download(other))["settings.ndjson"]
    assert [chosen[name] for name in ("defaultModelId", "userName", "userTraits", "userContext")] == [
        "two-words",
        "Grace",
        "brief",
        "COBOL",
    ]


async def test_a_file_of_the_version_before_is_taken(
    client: Client, other: Client, connection: asyncpg.Connection
) -> None:
    await Filling(connection, key_of(client), 13).all()
    contents = members(await download(client))
    before = copy.deepcopy(contents)
    manifest = before["manifest.json"][0]
    manifest["version"] = 1
    for name in ("custom_providers", "custom_models"):
        del before[f"{name}.ndjson"], manifest["counts"][name]
    for name in ("titleModelId", "userName", "userTraits", "userContext"):
        del before["settings.ndjson"][0][name]
    assert (await upload(other, packed(before)))[0] == 200
    again = members(await download(other))
    assert (again["custom_providers.ndjson"], again["custom_models.ndjson"]) == ([], [])
    assert again["settings.ndjson"][0]["defaultModelId"] == "two-words"
    assert len(again["messages.ndjson"]) == len(contents["messages.ndjson"])
    # What that version had not is no part of its files.
    manifest["version"] = 1
    before["custom_models.ndjson"] = []
    assert (await upload(other, packed(before)))[0] == 400


async def endpoints(client: Client) -> tuple[dict[str, str], set[str]]:
    """The client's providers with their names, and ids of the models."""
    data = await client.run("{ settings { customProviders { slug name } customModels { modelId } } }")
    providers = {one["slug"]: one["name"] for one in data["settings"]["customProviders"]}
    return providers, {one["modelId"] for one in data["settings"]["customModels"]}


async def test_endpoints_come_without_keys_and_those_that_could_not_be_saved_are_left_out_with_their_models(
    client: Client, other: Client, connection: asyncpg.Connection
) -> None:
    await Filling(connection, key_of(client), 14).choices()
    await connection.execute("DELETE FROM custom_models WHERE owner_id = $1", key_of(client))
    values = {"name": "x", "abilities": []}
    for slug, base_url in (
        ("inside", "file:///etc/passwd"),
        ("openai", "https://a.example"),
        ("taken", "https://b.example"),
    ):
        await Filling(connection, key_of(client), 0).insert(
            "custom_providers",
            id=new_id(),
            owner_id=key_of(client),
            slug=slug,
            name="Imported",
            base_url=base_url,
            format="CHAT_COMPLETIONS",
        )
        await Filling(connection, key_of(client), 0).insert(
            "custom_models", id=new_id(), owner_id=key_of(client), provider=slug, vendor_name="m", **values
        )
    await Filling(connection, key_of(client), 0).insert(
        "custom_models", id=new_id(), owner_id=key_of(client), provider="mine", vendor_name="m", **values
    )
    save = (
        'mutation { saveCustomProvider(input: {slug: "taken", name: "Own", baseUrl: "https://own.example", '
        'key: "key-of-own-endpoint"}) { __typename } }'
    )
    await other.run(save)
    status, body = await upload(other, await download(client))
    assert (status, body["imported"]["custom_providers"], body["imported"]["custom_models"]) == (200, 2, 2)
    providers, models = await endpoints(other)
    assert providers.keys() == {"taken", "mine", "another"}
    assert providers["taken"] == "Own"
    # The model of "openai" is one of the provider that the server knows.
    assert models == {"custom:mine/m", "custom:openai/m"}
    keys = await connection.fetch("SELECT provider FROM provider_keys WHERE owner_id = $1", key_of(other))
    assert [row["provider"] for row in keys] == ["custom:taken"]


async def test_an_import_stops_at_the_limit_of_endpoints(
    client: Client, other: Client, connection: asyncpg.Connection
) -> None:
    await Filling(connection, key_of(client), 15).choices()
    await connection.execute(
        "INSERT INTO custom_providers (id, owner_id, slug, name, base_url, format) "
        "SELECT gen_random_uuid(), $1, 's' || n, 'x', 'https://a.example', 'CHAT_COMPLETIONS' "
        "FROM generate_series(2, $2::int) n",
        *(key_of(other), MAX_PROVIDERS),
    )
    _, body = await upload(other, await download(client))
    assert body["imported"]["custom_providers"] == 1
    assert len((await endpoints(other))[0]) == MAX_PROVIDERS


async def test_an_import_is_one_change_of_the_feed(
    client: Client, other: Client, connection: asyncpg.Connection
) -> None:
    await Filling(connection, key_of(client), 11).all()
    exported = await download(client)
    assert (await upload(other, exported))[0] == 200
    rows = await connection.fetch("SELECT kind, object_id FROM changes WHERE owner_id = $1", key_of(other))
    assert [tuple(row) for row in rows] == [("RESET", None)]


async def test_an_export_in_many_members_is_imported_whole(
    server: Server, client: Client, other: Client, connection: asyncpg.Connection
) -> None:
    await Filling(connection, key_of(client), 12).all(threads=30)
    exports = exports_of(server, member_bytes=1)
    async with exports.open(await token_of(exports, client)) as export:
        exported = await read(export)
    assert (await upload(other, exported))[0] == 200
    assert comparable(await download(other)) == comparable(await download(client))


# What is wrong, by its name: a change of the lines of a good file, and where it is found.
Contents = dict[str, list[dict[str, Any]]]
Change = Callable[[Contents], object]
SOMEBODY = "_" + "a" * 32
TOOL = {"type": "tool", "callId": "c", "name": "n", "arguments": {"\x00": 1}, "result": None}


def put(member: str, line: int, **values: Any) -> tuple[Change, str, int]:
    """Other values in one line; callables are given the contents."""

    def change(contents: Contents) -> None:
        given = {key: value(contents) if callable(value) else value for key, value in values.items()}
        contents[f"{member}.ndjson"][line - 1].update(given)

    return change, f"{member}.ndjson", line


def id_of(member: str, line: int) -> Callable[[Contents], str]:
    """The id that another line has."""
    return lambda contents: str(contents[f"{member}.ndjson"][line - 1]["id"])


def again(member: str) -> tuple[Change, str, int]:
    """The first line twice."""

    def change(contents: Contents) -> None:
        contents[f"{member}.ndjson"].insert(1, contents[f"{member}.ndjson"][0])

    return change, f"{member}.ndjson", 2


def many(member: str, name: str, most: int) -> tuple[Change, str, int]:
    """One line more than there may be."""

    def change(contents: Contents) -> None:
        lines = contents[f"{member}.ndjson"]
        lines[:] = [lines[0] | {name: f"number-{n}"} for n in range(most + 1)]

    return change, f"{member}.ndjson", most + 1


def parted(contents: Contents) -> None:
    """Another thread's messages between those of the first."""
    lines = contents["messages.ndjson"]
    lines.append(lines.pop(2))


WRONG: dict[str, tuple[Change, str, int | None]] = {
    "another format": (lambda c: c["manifest.json"][0].update(format="zip"), "manifest.json", None),
    "a version to come": (lambda c: c["manifest.json"][0].update(version=VERSION + 1), "manifest.json", None),
    "no manifest": (lambda c: c.pop("manifest.json"), "manifest.json", None),
    "a line that is missing": (lambda c: c["usage.ndjson"].pop(), "usage.ndjson", None),
    "a member of no version": (lambda c: c.update({"keys.ndjson": []}), "", None),
    "a member that climbs": (lambda c: c.update({"../threads.ndjson": []}), "", None),
    "a line that is no object": (lambda c: c["threads.ndjson"].insert(1, 5), "threads.ndjson", 2),  # type: ignore[arg-type]
    "a field too few": (lambda c: c["threads.ndjson"][1].pop("title"), "threads.ndjson", 2),
    "a field too much": put("threads", 1, owner="x"),
    "a NUL": put("threads", 1, title="a\x00b"),
    "a title too long": put("threads", 1, title="x" * 4_001),
    "a title that is none": put("threads", 1, title=None),
    "a flag that is none": put("threads", 1, pinned=1),
    "an id of another kind": put("threads", 1, id=id_of("projects", 1)),
    "an id in another spelling": put("projects", 1, id="project_" + "A" * 32),
    "a project of somebody": put("threads", 1, projectId="project" + SOMEBODY),
    "a thread of somebody": put("shares", 1, threadId="thread" + SOMEBODY),
    "a share of somebody": put("share_messages", 1, shareId="share" + SOMEBODY),
    "a message in somebody's thread": put("messages", 1, threadId="thread" + SOMEBODY),
    "a thread twice": put("threads", 2, id=id_of("threads", 1)),
    "a temporary thread for ever": put("threads", 1, temporary=True, expiresAt=None),
    "a time without a zone": put("threads", 1, createdAt="2026-01-01T00:00:00"),
    "a time that nobody sees": put("threads", 1, createdAt="9999-01-01T00:00:00Z"),
    "an unknown role": put("messages", 3, role="ADMIN"),
    "an answer still streaming": put("messages", 3, status="STREAMING"),
    "an unknown color": put("projects", 1, color="BEIGE"),
    "an unknown error": put("messages", 1, errorCode="OOPS"),
    "an error without a code": put("messages", 1, errorCode=None, errorMessage="x"),
    "tokens of one kind": put("messages", 1, promptTokens=1, completionTokens=None),
    "too many tokens": put("usage", 1, promptTokens=2**31),
    "fewer tokens than none": put("usage", 1, promptTokens=-1),
    "a cost beyond all": put("usage", 1, costMicros=2**63),
    "a cost that no answer has": put("usage", 1, costMicros=2**62),
    "a price that no model has": put("usage", 1, promptPrice=10**12 + 1),
    "an unknown part": put("messages", 1, parts=[{"type": "video"}]),
    "a part without its text": put("messages", 1, parts=[{"type": "text"}]),
    "an empty text part": put("messages", 1, parts=[{"type": "text", "text": ""}]),
    "a signature that is no text": put("messages", 1, parts=[{"type": "reasoning", "text": "x", "signature": 5}]),
    "a signature of a text": put("messages", 1, parts=[{"type": "text", "text": "x", "signature": "x"}]),
    "a NUL deep in a tool's key": put("messages", 1, parts=[TOOL]),
    "a child before its parent": (lambda c: c["messages.ndjson"].reverse(), "messages.ndjson", 1),
    "a message that answers itself": put("messages", 2, parentId=id_of("messages", 2)),
    "a cycle": put("messages", 1, parentId=id_of("messages", 2)),
    "a parent in another thread": put("messages", 5, parentId=id_of("messages", 1)),
    "a depth that is not": put("messages", 2, depth=5),
    "a path with a hole": (put("messages", 1, active=False)[0], "messages.ndjson", 2),
    "a child that is remembered and is none": put("messages", 1, activeChildId=id_of("messages", 3)),
    "a thread in two places": (parted, "messages.ndjson", 2),
    "a message twice": again("messages"),
    "usage twice": again("usage"),
    "settings twice": again("settings"),
    "a position twice": again("share_messages"),
    "an endpoint twice": again("custom_providers"),
    "a model twice": again("custom_models"),
    "an endpoint with a key": put("custom_providers", 1, key="sk-1"),
    "a slug that is none": put("custom_providers", 1, slug="../x"),
    "a format that nobody speaks": put("custom_providers", 1, format="GOPHER"),
    "an unknown ability": put("custom_models", 1, abilities=["FLIGHT"]),
    "an ability twice": put("custom_models", 1, abilities=["TOOLS", "TOOLS"]),
    "a model without room": put("custom_models", 1, contextTokens=0),
    "too many endpoints": many("custom_providers", "slug", MAX_PROVIDERS),
    "too many models": many("custom_models", "vendorName", MAX_MODELS),
}


@pytest.fixture(scope="module")
async def good(server: Server) -> Contents:
    """A file with three messages in the first thread, one below the other."""
    async with connect(server.address) as client:
        await client.sign_in()
        connection = await asyncpg.connect(server.database.url)
        try:
            filling = Filling(connection, key_of(client), 21)
            await filling.all(threads=2)
            for thread_id in filling.threads:
                await connection.execute("DELETE FROM messages WHERE thread_id = $1", thread_id)
                chain = [secrets.token_hex(16) for _ in range(3)]
                for depth, key in enumerate(chain):
                    await filling.insert(
                        "messages",
                        id=key,
                        owner_id=filling.owner_id,
                        thread_id=thread_id,
                        parent_id=chain[depth - 1] if depth else None,
                        active_child_id=chain[depth + 1] if depth < 2 else None,
                        depth=depth,
                        active=True,
                        role="USER",
                        status="COMPLETE",
                        parts='[{"type": "text", "text": "x"}]',
                    )
        finally:
            await connection.close()
        return members(await download(client))


async def rows_of(connection: asyncpg.Connection, client: Client) -> list[int]:
    tables = ("projects", "threads", "messages", "shares", "usage_events", "settings", "usage_quarters", "changes")
    return [
        await connection.fetchval(f"SELECT count(*) FROM {table} WHERE owner_id = $1", key_of(client))
        for table in tables
    ]


async def test_a_good_file_is_taken(client: Client, good: Contents) -> None:
    assert (await upload(client, packed(good)))[0] == 200


@pytest.mark.parametrize("name", WRONG)
async def test_a_wrong_file_is_refused_where_it_is_wrong_and_changes_nothing(
    client: Client, connection: asyncpg.Connection, good: Contents, name: str
) -> None:
    change, member, line = WRONG[name]
    contents = copy.deepcopy(good)
    change(contents)
    if "manifest.json" in contents and name != "a line that is missing":
        counts = contents["manifest.json"][0]["counts"]
        counts |= {key: len(contents[f"{key}.ndjson"]) for key in counts}
    status, body = await upload(client, packed(contents))
    (error,) = body["errors"]
    assert (status, error["extensions"]["code"]) == (400, "BAD_USER_INPUT")
    assert error["extensions"].get("field", "") == member
    assert error["extensions"].get("line") == line
    assert "x" * 100 not in error["message"]
    assert await rows_of(connection, client) == [0] * 8


def bytes_of(name: str, good: Contents) -> bytes:
    whole = packed(good)
    match name:
        case "nothing":
            return b""
        case "no zip":
            return b"PK\x03\x04" + b"x" * 1_000
        case "half":
            return whole[: len(whole) // 2]
        case "damaged":
            place = whole.index(b"messages.ndjson") + 40
            return whole[:place] + bytes(byte ^ 0xFF for byte in whole[place : place + 10]) + whole[place + 10 :]
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_LZMA if name == "packed otherwise" else zipfile.ZIP_DEFLATED) as file:
        for member, data in _entries(whole):
            file.writestr(member, data)
        if name == "two of a name":
            with pytest.warns(UserWarning, match="Duplicate"):
                file.writestr("threads.ndjson", b"")
    return target.getvalue()


def _entries(data: bytes) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        return [(name, file.read(name)) for name in file.namelist()]


@pytest.mark.parametrize(
    "name",
    ["nothing", "no zip", "half", "damaged", "packed otherwise", "two of a name"],
)
async def test_what_is_no_whole_export_is_refused(
    client: Client, connection: asyncpg.Connection, good: Contents, name: str
) -> None:
    status, body = await upload(client, bytes_of(name, good))
    assert (status, body["errors"][0]["extensions"]["code"]) == (400, "BAD_USER_INPUT")
    assert await rows_of(connection, client) == [0] * 8


def imports_of(server: Server, folder: Path, **given: Any) -> Imports:
    limits = {"max_bytes": 1_000_000} | given
    return Imports(server.database, server.attachments, server.custom_providers, folder=folder, **limits)


async def once(data: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(data), 65_536):
        yield data[start : start + 65_536]


async def test_a_file_that_grows_beyond_measure_is_not_unpacked(
    server: Server, client: Client, good: Contents, tmp_path: Path
) -> None:
    contents = copy.deepcopy(good)
    contents["messages.ndjson"][0]["parts"] = [{"type": "text", "text": "x" * 20_000_000}]
    bomb = packed(contents)
    assert len(bomb) < 100_000
    with pytest.raises(PayloadTooLargeError, match="unpacked"):
        await imports_of(server, tmp_path).take(viewer_of(client), once(bomb))


async def test_a_line_without_an_end_is_not_held(
    server: Server, client: Client, good: Contents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services.imports, "MAX_LINE_BYTES", 10_000)
    contents = copy.deepcopy(good)
    contents["messages.ndjson"][1]["parts"] = [{"type": "text", "text": "x" * 20_000}]
    with pytest.raises(ImportRefusedError) as refused:
        await imports_of(server, tmp_path).take(viewer_of(client), once(packed(contents)))
    assert (refused.value.field, refused.value.line) == ("messages.ndjson", 2)


async def test_a_directory_of_a_million_members_is_not_read(
    server: Server, client: Client, good: Contents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services.imports, "_MAX_DIRECTORY_BYTES", 100_000)
    crowd: Contents = {f"{number:0>80}": [] for number in range(1_000)}
    with pytest.raises(ImportRefusedError, match="members"):
        await imports_of(server, tmp_path).take(viewer_of(client), once(packed(good | crowd)))


async def test_more_lines_than_are_allowed_are_refused(
    server: Server, client: Client, good: Contents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services.imports, "MAX_ROWS", 5)
    with pytest.raises(PayloadTooLargeError, match="lines"):
        await imports_of(server, tmp_path).take(viewer_of(client), once(packed(good)))


@pytest.mark.parametrize("announced", [True, False])
async def test_a_file_that_is_too_long_is_refused_before_it_is_read(
    server: Server, client: Client, tmp_path: Path, announced: bool
) -> None:
    imports = imports_of(server, tmp_path, max_bytes=100_000)
    read: list[bytes] = []

    async def noted() -> AsyncIterator[bytes]:
        async for chunk in once(os.urandom(1_000_000)):
            read.append(chunk)
            yield chunk

    with pytest.raises(PayloadTooLargeError):
        await imports.take(viewer_of(client), noted(), size=1_000_000 if announced else None)
    assert len(read) == (0 if announced else 2)
    assert list(tmp_path.iterdir()) == []


async def test_an_upload_that_breaks_off_leaves_nothing(
    server: Server, client: Client, connection: asyncpg.Connection, good: Contents
) -> None:
    data = packed(good)
    gone = asyncio.Event()

    async def half() -> AsyncIterator[bytes]:
        yield data[: len(data) // 2]
        gone.set()
        await asyncio.sleep(DEADLINE_SECONDS)

    sending = asyncio.create_task(upload(client, half()))
    await gone.wait()
    sending.cancel()
    await asyncio.gather(sending, return_exceptions=True)
    assert (await upload(client, data))[0] == 200
    assert list((server.settings.data_dir / "imports").iterdir()) == []


@pytest.mark.parametrize("token", ["", "Bearer not.a.token"])
async def test_an_import_needs_a_token(client: Client, good: Contents, token: str) -> None:
    status, body = await upload(client, packed(good), Authorization=token)
    assert (status, body["errors"][0]["extensions"]["code"]) == (401, "UNAUTHENTICATED")


async def test_an_import_is_a_zip_by_its_type(client: Client, good: Contents) -> None:
    status, body = await upload(client, packed(good), **{"Content-Type": "text/plain"})
    assert (status, body["errors"][0]["extensions"]["code"]) == (415, "BAD_USER_INPUT")


async def test_no_more_imports_than_are_allowed_run_at_once(server: Server, client: Client, good: Contents) -> None:
    waiting, go_on = [asyncio.Event() for _ in range(2)], asyncio.Event()
    data = packed(good)

    async def slowly(begun: asyncio.Event) -> AsyncIterator[bytes]:
        yield data[:100]
        begun.set()
        await go_on.wait()
        yield data[100:]

    running = [asyncio.create_task(upload(client, slowly(begun))) for begun in waiting]
    try:
        for begun in waiting:
            await begun.wait()
        async with asyncio.timeout(DEADLINE_SECONDS):
            while server.imports._running < len(running):
                await asyncio.sleep(0.01)
        answer = await upload(client, data)
        assert answer[0] == 503
        assert answer[1]["errors"][0]["extensions"] == {"code": "UNAVAILABLE", "retryAfter": 30}
    finally:
        go_on.set()
    assert [status for status, _ in await asyncio.gather(*running)] == [200, 200]
