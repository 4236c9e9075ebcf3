"""Files: taken in, looked at, sent along, served so that nothing runs, and swept when nobody needs them any more."""

from __future__ import annotations

import asyncio
import io
import os
import secrets
import struct
import uuid
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import asyncpg
import pytest

from models.ids import IdKind, new_id, parse_id
from providers.base import TextDelta
from server.runtime import Server
from services.attachments import MAX_UPLOADS_OF_ONE
from services.errors import UnavailableError
from storage.base import StorageUnavailableError
from storage.local import LocalStorage
from tests.client import CREATE_UPLOAD, Client, GraphQLErrors, connect
from tests.conftest import make_database, test_settings
from tests.scripts import SCRIPTS

MIB = 1024 * 1024
DELETE = "mutation($id: ID!) { deleteAttachment(input: {attachmentId: $id}) { deletedAttachmentId } }"
DELETE_THREAD = "mutation($id: ID!) { deleteThread(input: {threadId: $id}) { deletedThreadId } }"


def png(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + b"rest"


def jpeg(width: int, height: int, before: int = 30) -> bytes:
    segment = b"\xff\xe1" + struct.pack(">H", before + 2) + bytes(before)
    return b"\xff\xd8" + segment + b"\xff\xc2\x00\x11\x08" + struct.pack(">HH", height, width) + bytes(20)


def gif(width: int, height: int) -> bytes:
    return b"GIF89a" + struct.pack("<HH", width, height) + bytes(10)


def webp(kind: bytes, body: bytes) -> bytes:
    return b"RIFF" + struct.pack("<I", len(body) + 12) + b"WEBP" + kind + struct.pack("<I", len(body)) + body


def key_of(attachment_id: str) -> uuid.UUID:
    return parse_id(IdKind.ATTACHMENT, attachment_id)


@asynccontextmanager
async def database(server: Server) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(server.database.url)
    try:
        yield connection
    finally:
        await connection.close()


def attachments(server: Server) -> Any:
    return server.application._http._services.attachments


async def reserve(client: Client, size: int) -> dict[str, Any]:
    """`createUpload` of a text of so many bytes."""
    given = {"name": "x", "contentType": "text/plain", "size": size}
    upload: dict[str, Any] = (await client.run(CREATE_UPLOAD, {"input": given}))["createUpload"]
    return upload


async def sweep(server: Server) -> None:
    """Sweep until nothing is due."""
    async with asyncio.timeout(20):
        while await attachments(server).sweep(100):
            pass


async def later(server: Server) -> None:
    """Let a month pass for everything that is waited for."""
    async with database(server) as connection:
        await connection.execute("UPDATE sweep_tasks SET due_at = due_at - interval '30 days'")
        await connection.execute("UPDATE attachments SET expires_at = expires_at - interval '30 days'")


def files(server: Server) -> list[Path]:
    """Every file in the storage."""
    return [path for path in (server.settings.data_dir / "attachments").rglob("*") if path.is_file()]


def stored_path(server: Server, digest: bytes) -> list[Path]:
    return [path for path in files(server) if sha256(path.read_bytes()).digest() == digest]


def is_there(server: Server, content: bytes) -> bool:
    return bool(stored_path(server, sha256(content).digest()))


async def rows(server: Server, attachment_id: str) -> int:
    async with database(server) as connection:
        found: int = await connection.fetchval("SELECT count(*) FROM attachments WHERE id = $1", key_of(attachment_id))
        return found


@pytest.fixture(scope="module")
async def strict(postgres_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Server]:
    """A server with low limits, reached under another name."""
    settings = test_settings(
        await make_database(postgres_url),
        tmp_path_factory.mktemp("strict"),
        max_attachment_bytes=100_000,
        max_attachment_quota_bytes=550_000,
        max_history_chars=1_000,
        attachment_url_seconds=1,
        public_url="https://chat.example",
        allowed_origins=("https://app.example",),
    )
    server = Server(settings, providers=SCRIPTS.models())
    await server.start()
    yield server
    await server.close()


@pytest.fixture
async def limited(strict: Server) -> AsyncIterator[Client]:
    """A new anonymous user of that server."""
    async with connect(strict.address) as client:
        await client.sign_in()
        yield client


# Taking in


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"plain words", {"contentType": "text/plain", "tokens": 3}),
        ("grüße 🦉".encode(), {"contentType": "text/plain", "tokens": 3}),
        (b"<html><script>alert(1)</script>", {"contentType": "text/plain"}),
        (b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>", {"contentType": "text/plain"}),
        (png(640, 480), {"contentType": "image/png", "width": 640, "height": 480, "tokens": None}),
        (jpeg(800, 600), {"contentType": "image/jpeg", "width": 800, "height": 600}),
        (jpeg(800, 600, before=65_000), {"contentType": "image/jpeg", "width": 800, "height": 600}),
        (gif(10, 20), {"contentType": "image/gif", "width": 10, "height": 20}),
        (
            webp(b"VP8X", bytes(4) + (1919).to_bytes(3, "little") + (1079).to_bytes(3, "little")),
            {"contentType": "image/webp", "width": 1920, "height": 1080},
        ),
        (
            webp(b"VP8L", b"\x2f" + struct.pack("<I", 99 | 49 << 14)),
            {"contentType": "image/webp", "width": 100, "height": 50},
        ),
        (
            webp(b"VP8 ", bytes(3) + b"\x9d\x01\x2a" + struct.pack("<HH", 320, 240)),
            {"contentType": "image/webp", "width": 320, "height": 240},
        ),
        (b"text with a NUL \x00", {"contentType": "application/octet-stream", "tokens": None}),
        (b"MZ\x90\x00\xff", {"contentType": "application/octet-stream"}),
        ("half a character 🦉".encode()[:-1], {"contentType": "application/octet-stream"}),
    ],
)
async def test_a_file_is_what_its_content_is(client: Client, content: bytes, expected: dict[str, Any]) -> None:
    posted = await client.upload(content, "picture.svg")
    direct = await client.complete_upload(await client.upload_directly(content, name="picture.svg"))
    for attachment in (posted, direct):
        assert {name: attachment[name] for name in expected} == expected
        assert (attachment["name"], attachment["size"]) == ("picture.svg", len(content))
        async with client.http.get(attachment["url"]) as response:
            assert await response.read() == content


@pytest.mark.parametrize(
    ("content", "declared"),
    [
        (b"<svg/>", "image/png"),
        (b"<html>", "application/pdf"),
        (png(1, 1), "image/jpeg"),
        (b"GIF8", "image/gif"),
        (png(1, 1)[:20], "image/png"),
        (png(1, 1)[:20], "application/octet-stream"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "image/png"),
        (png(640, 480).replace(b"\x00\x00\x02\x80", b"\x00\x00\x02\x81"), "image/png"),
        (jpeg(0, 600), "image/jpeg"),
        (b"\xff\xd8\xff\xda" + bytes(100), "image/jpeg"),
        (b"\xff\xd8" + b"\xff\xe1\x00\x02" * 50, "image/jpeg"),
        (webp(b"VP8X", b""), "image/webp"),
        (gif(65_535, 65_535), "image/gif"),
        (png(50_000, 50_000), "image/png"),
        (png(2**31, 2**31), "image/png"),
        (b"", "text/plain"),
    ],
)
async def test_what_is_broken_too_large_or_not_what_was_said_is_refused_and_leaves_nothing(
    server: Server, client: Client, content: bytes, declared: str
) -> None:
    before = len(files(server))
    with pytest.raises(GraphQLErrors) as refused:
        await client.upload(content, "x", **{"Content-Type": declared})
    assert refused.value.code == "BAD_USER_INPUT"
    if content:
        attachment_id = await client.upload_directly(content, content_type=declared)
        with pytest.raises(GraphQLErrors) as refused:
            await client.complete_upload(attachment_id)
        assert refused.value.code == "BAD_USER_INPUT"
        await client.run(DELETE, {"id": attachment_id})
    await later(server)
    await sweep(server)
    assert len(files(server)) <= before
    assert (await client.run("{ attachments { nodes { id } } }"))["attachments"]["nodes"] == []


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\windows\\evil.exe", "evil.exe"),
        ("a\r\nSet-Cookie: b=c", "aSet-Cookie: b=c"),
        ("nul\x00l.txt", "null.txt"),
        ("\u202egnp.exe", "gnp.exe"),
        ('say "hi".txt', 'say "hi".txt'),
        ("..", "file"),
        ("", "file"),
        ("x" * 300 + ".txt", "x" * 251 + ".txt"),
        ("é" * 300, "é" * 127),
        ("привет 👩‍👩‍👧.md", "привет 👩‍👩‍👧.md"),
    ],
)
async def test_a_name_is_for_people_and_never_a_path_or_a_header(client: Client, given: str, kept: str) -> None:
    posted = await client.upload(b"x", given)
    assert posted["name"] == kept
    direct = await client.complete_upload(await client.upload_directly(b"x", name=given))
    assert direct["name"] == kept
    async with client.http.get(posted["url"]) as response:
        shown = response.headers["Content-Disposition"]
        assert shown.startswith('attachment; filename="')
        assert shown.endswith(f"filename*=UTF-8''{quote(kept, safe='')}")
        assert shown.isascii()
        assert shown.count('"') == 2
        assert "Set-Cookie" not in response.headers


async def test_the_name_may_come_in_the_header_of_a_download(client: Client) -> None:
    headers = {
        "Authorization": f"Bearer {client.token}",
        "Content-Disposition": "attachment; filename*=UTF-8''%e2%82%ac.txt",
    }
    async with client.http.post(f"{client.address}/attachments", data=b"x", headers=headers) as response:
        assert response.status == 201
        assert (await response.json())["name"] == "€.txt"


async def test_an_upload_is_never_whole_in_memory(server: Server, client: Client) -> None:
    go_on = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        for _ in range(8):
            yield os.urandom(MIB)
        await go_on.wait()

    task = asyncio.create_task(client.upload(body()))
    async with asyncio.timeout(20):
        while sum(path.stat().st_size for path in files(server) if path.suffix == ".part") < 7 * MIB:
            await asyncio.sleep(0.02)
    go_on.set()
    assert (await task)["size"] == 8 * MIB


async def test_a_file_that_is_too_large_is_refused_announced_or_not(strict: Server, limited: Client) -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield bytes(1_000)

    assert (await limited.upload(b"x" * 100_000))["size"] == 100_000
    before = files(strict)
    for content in (b"x" * 100_001, endless()):
        with pytest.raises((GraphQLErrors, aiohttp.ClientError)) as refused:
            await limited.upload(content)
        if isinstance(refused.value, GraphQLErrors):
            assert refused.value.code == "PAYLOAD_TOO_LARGE"
    with pytest.raises(GraphQLErrors) as too_large:
        await reserve(limited, 100_001)
    assert (too_large.value.code, too_large.value.extensions["field"]) == ("PAYLOAD_TOO_LARGE", "size")
    assert files(strict) == before


async def test_an_upload_that_is_cut_midway_leaves_nothing(server: Server, client: Client) -> None:
    before = len(files(server))
    host, port = server.address.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    head = f"POST /attachments HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {client.token}\r\n"
    head += "Content-Length: 5000000\r\n\r\n"
    writer.write(head.encode() + bytes(3_000_000))
    await writer.drain()
    user = parse_id(IdKind.USER, client.id)
    async with database(server) as connection, asyncio.timeout(20):
        count = "SELECT count(*) FROM attachments WHERE owner_id = $1"
        while not await connection.fetchval(count, user):
            await asyncio.sleep(0.02)
        writer.transport.abort()
        while await connection.fetchval(count, user):
            await asyncio.sleep(0.02)
        while len(files(server)) > before:
            await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "multipart/form-data; boundary=x"}, 415),
        ({"Content-Encoding": "gzip"}, 415),
        ({"Authorization": "Bearer nonsense"}, 401),
        ({"Authorization": "Basic eDp5"}, 401),
    ],
)
async def test_what_is_no_plain_upload_is_refused_in_the_shape_of_graphql(
    client: Client, headers: dict[str, str], status: int
) -> None:
    given = {"Authorization": f"Bearer {client.token}"} | headers
    async with client.http.post(f"{client.address}/attachments", data=b"x", headers=given) as response:
        assert response.status == status
        assert set((await response.json())["errors"][0]) >= {"message", "extensions"}


async def test_nobody_uploads_without_a_token(server: Server, nobody: Client) -> None:
    before = len(files(server))
    with pytest.raises(GraphQLErrors) as refused:
        await nobody.upload(b"x")
    assert refused.value.code == "UNAUTHENTICATED"
    assert len(files(server)) == before


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"contentType": "nonsense"}, "contentType"),
        ({"contentType": "text/plain\r\nX-Evil: 1"}, "contentType"),
        ({"contentType": ""}, "contentType"),
        ({"contentType": "a/" + "b" * 1000}, "contentType"),
        ({"size": 0}, "size"),
        ({"size": -1}, "size"),
    ],
)
async def test_an_upload_that_cannot_be_is_not_made(client: Client, given: dict[str, Any], field: str) -> None:
    query = "mutation($input: CreateUploadInput!) { createUpload(input: $input) { url } }"
    with pytest.raises(GraphQLErrors) as refused:
        await client.run(query, {"input": {"name": "x", "contentType": "text/plain", "size": 1} | given})
    assert (refused.value.code, refused.value.extensions["field"]) == ("BAD_USER_INPUT", field)


async def test_what_was_not_uploaded_cannot_be_completed(client: Client) -> None:
    upload = await reserve(client, 4)
    assert upload["attachment"]["state"] == "RESERVED"
    assert upload["attachment"]["url"] is None
    with pytest.raises(GraphQLErrors) as refused:
        await client.complete_upload(upload["attachment"]["id"])
    assert (refused.value.code, refused.value.extensions["field"]) == ("BAD_USER_INPUT", "attachmentId")
    with pytest.raises(GraphQLErrors) as refused:
        await client.send("x", attachmentIds=[upload["attachment"]["id"]])
    assert refused.value.code == "NOT_FOUND"


async def test_completing_twice_or_at_once_is_one_completion(server: Server, client: Client) -> None:
    content = os.urandom(1000)
    attachment_id = await client.upload_directly(content, content_type="application/octet-stream")
    found = await asyncio.gather(*(client.complete_upload(attachment_id) for _ in range(6)))
    found.append(await client.complete_upload(attachment_id))
    assert {(one["id"], one["state"], one["size"]) for one in found} == {(attachment_id, "STORED", 1000)}
    assert len(stored_path(server, sha256(content).digest())) == 1


async def test_what_was_looked_at_is_what_is_served_even_if_it_is_written_again(client: Client) -> None:
    query = (
        'mutation { createUpload(input: {name: "x", contentType: "text/plain", size: 4}) { url attachment { id } } }'
    )
    upload = (await client.run(query))["createUpload"]
    headers = {"Content-Type": "text/plain"}
    async with client.http.put(upload["url"], data=b"good", headers=headers) as response:
        assert response.status == 204
    attachment = await client.complete_upload(upload["attachment"]["id"])
    async with client.http.put(upload["url"], data=b"evil", headers=headers):
        pass
    async with client.http.get(attachment["url"]) as response:
        assert await response.read() == b"good"


UPLOAD = (
    "mutation($file: Upload!) { uploadAttachment(input: {file: $file}) { attachment { id name contentType size } } }"
)


async def test_a_file_in_a_graphql_request_is_taken_in(client: Client) -> None:
    content = os.urandom(3 * MIB)
    done = await client.run_with_file(UPLOAD, content, name="../r\u202e.bin")
    attachment = done["uploadAttachment"]["attachment"]
    assert {**attachment, "id": None} == {
        "id": None,
        "name": "r.bin",
        "contentType": "application/octet-stream",
        "size": 3 * MIB,
    }
    link = (await client.run("{ attachments { nodes { id url } } }"))["attachments"]["nodes"][0]
    async with client.http.get(link["url"]) as response:
        assert await response.read() == content


async def test_a_form_that_another_origin_could_send_unasked_is_not_executed(client: Client) -> None:
    with pytest.raises(GraphQLErrors) as refused:
        await client.run_with_file(UPLOAD, b"x", **{"GraphQL-Preflight": ""})
    assert "GraphQL-Preflight" in refused.value.errors[0]["message"]
    assert (await client.run("{ attachments { nodes { id } } }"))["attachments"]["nodes"] == []
    await client.run_with_file(UPLOAD, b"x", **{"GraphQL-Preflight": "", "Apollo-Require-Preflight": "true"})


OPERATIONS = '{"query": "{ __typename }", "variables": {"file": null, "set": 1, "deep": {"file": null}}}'


@pytest.mark.parametrize(
    "fields",
    [
        [],
        [("operations", OPERATIONS)],
        [("map", "{}"), ("operations", OPERATIONS)],
        [("operations", "[]"), ("map", '{"0": ["variables.file"]}'), ("0", "x")],
        [("operations", "{"), ("map", "{}"), ("0", "x")],
        [("operations", OPERATIONS), ("map", "{}"), ("0", "x")],
        [("operations", OPERATIONS), ("map", '{"0": ["variables.file", "variables.deep.file"]}'), ("0", "x")],
        [("operations", OPERATIONS), ("map", '{"0": ["variables.file"], "1": ["variables.deep.file"]}'), ("0", "x")],
        [("operations", OPERATIONS), ("map", '{"0": ["variables.set"]}'), ("0", "x")],
        [("operations", OPERATIONS), ("map", '{"0": ["variables.missing"]}'), ("0", "x")],
        [("operations", OPERATIONS), ("map", '{"0": ["variables.set.file"]}'), ("0", "x")],
        [("operations", OPERATIONS), ("map", '{"0": ["query"]}'), ("0", "x")],
        [("operations", OPERATIONS), ("map", '{"0": [7]}'), ("0", "x")],
        [("operations", OPERATIONS), ("map", '{"0": ["variables.file"]}'), ("1", "x")],
        [("operations", OPERATIONS), ("map", '{"0": ["variables.file"]}')],
        [(f"field{n}", "x") for n in range(1_000)],
    ],
)
async def test_a_form_of_another_shape_is_refused(client: Client, fields: list[tuple[str, str]]) -> None:
    form = aiohttp.FormData(default_to_multipart=True)
    for name, value in fields:
        form.add_field(name, value)
    headers = {"Authorization": f"Bearer {client.token}", "GraphQL-Preflight": "1"}
    async with client.http.post(client.url, data=form, headers=headers) as response:
        assert response.status == 400
        assert (await response.json())["errors"][0]["extensions"]["code"] == "BAD_USER_INPUT"


async def test_the_operation_of_a_form_is_bounded(client: Client) -> None:
    form = aiohttp.FormData(default_to_multipart=True)
    form.add_field("operations", io.BytesIO(b"x" * 2 * MIB))
    headers = {"Authorization": f"Bearer {client.token}", "GraphQL-Preflight": "1"}
    async with client.http.post(client.url, data=form, headers=headers) as response:
        assert response.status == 413


async def test_a_string_is_no_file(client: Client) -> None:
    for query in (UPLOAD, UPLOAD.replace("file: $file", 'file: "x"').replace("($file: Upload!)", "")):
        status, body = await client.post(query, {"file": "x"} if "$file" in query else None)
        assert status == 200
        assert body["errors"][0]["extensions"]["code"] in ("BAD_USER_INPUT", "GRAPHQL_VALIDATION_FAILED")


async def test_a_page_of_an_allowed_origin_may_send_and_read_files(strict: Server, limited: Client) -> None:
    link = (await limited.upload(b"x"))["url"].replace("https://chat.example", strict.address)
    origin = {"Origin": "https://app.example"}
    async with limited.http.get(link, headers=origin) as response:
        assert response.headers["Access-Control-Allow-Origin"] == "https://app.example"
    asking = {"Access-Control-Request-Method": "PUT", "Access-Control-Request-Headers": "content-type"}
    async with limited.http.options(link, headers=origin | asking) as response:
        assert response.status == 204
        assert "PUT" in response.headers["Access-Control-Allow-Methods"]
    async with limited.http.options(link, headers={"Origin": "https://evil.example"} | asking) as response:
        assert response.status == 403


async def test_nobody_takes_all_the_uploads(client: Client, other: Client) -> None:
    go_on = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield b"x"
        await go_on.wait()

    running = [asyncio.create_task(client.upload(body())) for _ in range(MAX_UPLOADS_OF_ONE + 5)]
    async with asyncio.timeout(20):
        done, _ = await asyncio.wait(running, timeout=20, return_when=asyncio.FIRST_COMPLETED)
        await other.upload(b"x")
    go_on.set()
    outcomes = await asyncio.gather(*running, return_exceptions=True)
    assert done
    refused = [outcome for outcome in outcomes if not isinstance(outcome, dict)]
    assert len(refused) == 5
    assert all(error.code == "UNAVAILABLE" for error in refused if isinstance(error, GraphQLErrors))


# Quota


async def test_ten_uploads_at_once_do_not_pass_the_quota(limited: Client, strict: Server) -> None:
    async def chunked() -> AsyncIterator[bytes]:
        yield bytes(100_000)

    outcomes = await asyncio.gather(*(limited.upload(bytes(100_000)) for _ in range(10)), return_exceptions=True)
    stored = [outcome for outcome in outcomes if isinstance(outcome, dict)]
    refused = [outcome.code for outcome in outcomes if isinstance(outcome, GraphQLErrors)]
    assert (len(stored), refused) == (5, ["QUOTA_EXCEEDED"] * 5)
    with pytest.raises(GraphQLErrors) as direct:
        await reserve(limited, 100_000)
    assert direct.value.code == "QUOTA_EXCEEDED"
    with pytest.raises((GraphQLErrors, aiohttp.ClientError)) as unannounced:
        await limited.upload(chunked())
    if isinstance(unannounced.value, GraphQLErrors):
        assert unannounced.value.code == "QUOTA_EXCEEDED"
    await limited.run(DELETE, {"id": stored[0]["id"]})
    await limited.upload(chunked())
    # Room that is promised is taken.
    await limited.run(DELETE, {"id": stored[1]["id"]})
    await reserve(limited, 100_000)
    with pytest.raises(GraphQLErrors):
        await limited.upload(bytes(100_000))
    async with connect(strict.address) as another:
        await another.sign_in()
        await another.upload(bytes(100_000))


async def test_many_tiny_files_count_for_what_they_cost(limited: Client) -> None:
    for _ in range(5):
        await reserve(limited, 100_000)
    for _ in range(50_000 // 4_096):
        await reserve(limited, 1)
    with pytest.raises(GraphQLErrors) as refused:
        await limited.upload(b"x")
    assert refused.value.code == "QUOTA_EXCEEDED"


async def sent_by_link(server: Server, client: Client, size: int) -> str:
    """An attachment of so many bytes, uploaded and completed."""
    upload = await reserve(client, size)
    link = upload["url"].replace("https://chat.example", server.address)
    async with client.http.put(link, data=bytes([97]) * size, headers={"Content-Type": "text/plain"}) as response:
        assert response.status == 204
    await client.complete_upload(upload["attachment"]["id"])
    return str(upload["attachment"]["id"])


@pytest.mark.parametrize("who", ["its owner", "a sweeper"])
async def test_who_deletes_an_attachment_holds_nothing_while_they_wait_for_its_owner(
    server: Server, client: Client, who: str
) -> None:
    attachment_id = (await reserve(client, 100_000))["attachment"]["id"]
    attachment, owner = key_of(attachment_id), parse_id(IdKind.USER, client.id)
    if who == "a sweeper":
        async with database(server) as connection:
            await connection.execute("UPDATE attachments SET expires_at = now() WHERE id = $1", attachment)
            await connection.execute("UPDATE sweep_tasks SET due_at = now() WHERE subject = $1", str(attachment))
    async with database(server) as claim, asyncio.timeout(20):
        async with claim.transaction():
            # As a claim does it: the users, then what is theirs.
            await claim.execute("SELECT FROM users WHERE id = $1 FOR UPDATE", owner)
            deletion = asyncio.create_task(
                sweep(server) if who == "a sweeper" else client.run(DELETE, {"id": attachment_id})
            )
            # Fresh each time: within a transaction, what other sessions do is read once.
            async with database(server) as watcher:
                waiting = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE $1 = ANY(pg_blocking_pids(pid)))"
                while not await watcher.fetchval(waiting, claim.get_server_pid()):
                    await asyncio.sleep(0.01)
            await claim.execute("SELECT FROM attachments WHERE id = $1 FOR UPDATE NOWAIT", attachment)
        await deletion
    assert not await rows(server, attachment_id)


@pytest.mark.parametrize("completed", [False, True])
async def test_a_link_counts_as_long_as_it_can_be_used_though_its_attachment_was_deleted(
    strict: Server, limited: Client, completed: bool
) -> None:
    for _ in range(5):
        if completed:
            attachment_id = await sent_by_link(strict, limited, 100_000)
        else:
            attachment_id = (await reserve(limited, 100_000))["attachment"]["id"]
        await limited.run(DELETE, {"id": attachment_id})
    with pytest.raises(GraphQLErrors) as refused:
        await reserve(limited, 100_000)
    assert refused.value.code == "QUOTA_EXCEEDED"
    await later(strict)
    await sweep(strict)
    await reserve(limited, 100_000)


async def test_a_link_counts_as_long_as_it_can_be_used_though_its_file_was_swept(
    strict: Server, limited: Client
) -> None:
    swept = [await sent_by_link(strict, limited, 100_000) for _ in range(5)]
    async with database(strict) as connection:
        # As the last message with it leaves it.
        ids = [key_of(attachment_id) for attachment_id in swept]
        await connection.execute("UPDATE attachments SET state = 'LINKED' WHERE id = ANY($1::uuid[])", ids)
        await connection.execute(
            "INSERT INTO sweep_tasks (kind, subject) SELECT 'ATTACHMENT', unnest($1::uuid[])::text", ids
        )
    await sweep(strict)
    assert not await rows(strict, swept[0])
    with pytest.raises(GraphQLErrors) as refused:
        await reserve(limited, 100_000)
    assert refused.value.code == "QUOTA_EXCEEDED"


# Serving


@pytest.mark.parametrize(
    ("content", "content_type", "kind"),
    [
        (b"<script>alert(1)</script>", "text/plain; charset=utf-8", "attachment"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "text/plain; charset=utf-8", "attachment"),
        (b"%PDF-1.4\n<script>", "application/pdf", "attachment"),
        (b"\x00<html>", "application/octet-stream", "attachment"),
        (b"GIF89a\x01\x00\x01\x00/*<script>*/", "image/gif", "inline"),
    ],
)
async def test_nothing_is_served_in_a_way_that_runs(
    client: Client, content: bytes, content_type: str, kind: str
) -> None:
    attachment = await client.upload(content, "page.html", **{"Content-Type": "text/html"})
    async with client.http.get(attachment["url"]) as response:
        assert await response.read() == content
        assert response.headers["Content-Type"] == content_type
        assert response.headers["Content-Disposition"].split(";")[0] == kind
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert response.headers["Content-Security-Policy"] == "sandbox; default-src 'none'"


async def test_the_owner_is_led_to_the_file_and_others_are_not(client: Client, other: Client, nobody: Client) -> None:
    attachment = await client.upload(b"mine")
    where = f"{client.address}/attachments/{attachment['id']}"

    async def status(caller: Client, url: str) -> int:
        headers = {"Authorization": f"Bearer {caller.token}"} if caller.token else {}
        async with client.http.get(url, headers=headers, allow_redirects=False) as response:
            return response.status

    headers = {"Authorization": f"Bearer {client.token}"}
    async with client.http.get(where, headers=headers) as response:
        assert await response.read() == b"mine"
        assert response.history[0].status == 302
        assert response.history[0].headers["Cache-Control"] == "no-store"
    assert await status(other, where) == 404
    assert await status(nobody, where) == 401
    for wrong in ("attachment_" + "0" * 32, "thread_" + "0" * 32, "..%2f..%2fsession.key", "x" * 5000):
        assert await status(client, f"{client.address}/attachments/{wrong}") == 404


async def test_a_link_is_made_anew_with_every_reading_and_ends(strict: Server, limited: Client) -> None:
    def reached(url: str) -> str:
        assert url.startswith("https://chat.example/files/")
        return url.replace("https://chat.example", strict.address)

    attachment = await limited.upload(b"x")
    await asyncio.sleep(1.1)
    async with limited.http.get(reached(attachment["url"])) as response:
        assert response.status == 403
    query = "query($id: ID!) { node(id: $id) { ... on Attachment { url } } }"
    again = (await limited.run(query, {"id": attachment["id"]}))["node"]["url"]
    assert again != attachment["url"]


async def test_the_list_is_paged_newest_first_and_shows_nothing_reserved(client: Client, other: Client) -> None:
    ids = [(await client.upload(b"x", f"{n}"))["id"] for n in range(5)][::-1]
    await client.upload_directly(b"x")
    await other.upload(b"x")
    query = "query($f: Int, $a: Cursor, $l: Int, $b: Cursor) { attachments(first: $f, after: $a, last: $l, before: $b) "
    query += "{ nodes { id } pageInfo { hasNextPage hasPreviousPage startCursor endCursor } } }"
    first = (await client.run(query, {"f": 2}))["attachments"]
    assert [node["id"] for node in first["nodes"]] == ids[:2]
    second = (await client.run(query, {"f": 9, "a": first["pageInfo"]["endCursor"]}))["attachments"]
    assert [node["id"] for node in second["nodes"]] == ids[2:]
    assert not second["pageInfo"]["hasNextPage"]
    back = (await client.run(query, {"l": 2, "b": second["pageInfo"]["startCursor"]}))["attachments"]
    assert [node["id"] for node in back["nodes"]] == ids[:2]
    with pytest.raises(GraphQLErrors) as refused:
        await client.run(query, {"a": "VA"})
    assert refused.value.code == "CURSOR_INVALID"


# Sending along


async def test_files_stand_before_the_text_in_their_order_and_lead_to_the_attachments(client: Client) -> None:
    sent = [await client.upload(b"one", "1.txt"), await client.upload(png(2, 2), "2.png")][::-1]
    turn = await client.send("What is this?", attachmentIds=[one["id"] for one in sent])
    question = await client.message(turn["userMessage"]["id"])
    assert question["parts"] == [
        {
            "__typename": "FilePart",
            "name": one["name"],
            "contentType": one["contentType"],
            "size": one["size"],
            "attachment": {"id": one["id"]},
        }
        for one in sent
    ] + [{"__typename": "TextPart", "text": "What is this?"}]
    assert question["text"] == "What is this?"
    state = await client.run("query($id: ID!) { node(id: $id) { ... on Attachment { state } } }", {"id": sent[0]["id"]})
    assert state["node"]["state"] == "LINKED"


async def test_a_deleted_file_is_remembered_by_its_name(server: Server, client: Client) -> None:
    sent = await client.upload(b"secret words", "s.txt")
    turn = await client.send("x", attachmentIds=[sent["id"]])
    await client.finish(turn["assistantMessage"]["id"])
    await client.run(DELETE, {"id": sent["id"]})
    await sweep(server)
    assert not is_there(server, b"secret words")
    question = await client.message(turn["userMessage"]["id"])
    assert (question["parts"][0]["name"], question["parts"][0]["attachment"]) == ("s.txt", None)
    again = await client.retry(turn["assistantMessage"]["id"])
    assert (await client.finish(again["assistantMessage"]["id"]))["status"] == "COMPLETE"


@pytest.mark.parametrize(
    ("ids", "code"),
    [
        (["attachment_" + "0" * 32], "NOT_FOUND"),
        (["own", "attachment_" + "0" * 32], "NOT_FOUND"),
        (["foreign"], "NOT_FOUND"),
        (["own", "own"], "BAD_USER_INPUT"),
        (["nonsense"], "BAD_USER_INPUT"),
        (["thread_" + "0" * 32], "BAD_USER_INPUT"),
        (["attachment_" + f"{n:032x}" for n in range(21)], "BAD_USER_INPUT"),
    ],
)
async def test_what_is_not_an_attachment_of_the_viewers_is_not_sent_and_changes_nothing(
    server: Server, client: Client, other: Client, ids: list[str], code: str
) -> None:
    known = {"own": (await client.upload(b"own"))["id"], "foreign": (await other.upload(b"foreign"))["id"]}
    with pytest.raises(GraphQLErrors) as refused:
        await client.send("x", attachmentIds=[known.get(text, text) for text in ids])
    assert (refused.value.code, refused.value.extensions["field"]) == (code, "attachmentIds")
    assert (await client.run("{ threads { nodes { id } } }"))["threads"]["nodes"] == []
    async with database(server) as connection:
        states = await connection.fetch(
            "SELECT state FROM attachments WHERE id = ANY($1::uuid[])", [key_of(text) for text in known.values()]
        )
    assert [row["state"] for row in states] == ["STORED", "STORED"]


async def test_a_key_stands_for_the_files_too(client: Client) -> None:
    one, two = (await client.upload(b"1"))["id"], (await client.upload(b"2"))["id"]
    key = str(uuid.uuid4())
    first = await client.send("x", idempotencyKey=key, attachmentIds=[one])
    again = await client.send("x", idempotencyKey=key, attachmentIds=[one])
    assert first["userMessage"]["id"] == again["userMessage"]["id"]
    for other_files in ([two], [one, two], [], None):
        with pytest.raises(GraphQLErrors) as refused:
            await client.send("x", idempotencyKey=key, attachmentIds=other_files)
        assert refused.value.code == "CONFLICT"


@pytest.mark.parametrize(("given", "kept"), [(None, 1), ([], 0)], ids=["null", "none"])
async def test_an_edit_keeps_the_files_unless_it_says_others(
    client: Client, given: list[str] | None, kept: int
) -> None:
    sent = await client.upload(b"1")
    turn = await client.send("x", attachmentIds=[sent["id"]])
    await client.finish(turn["assistantMessage"]["id"])
    edited = await client.edit(turn["userMessage"]["id"], "y", attachmentIds=given)
    question = await client.message(edited["userMessage"]["id"])
    assert len(question["parts"]) == kept + 1
    await client.finish(edited["assistantMessage"]["id"])
    retried = await client.retry(edited["assistantMessage"]["id"])
    assert retried["userMessage"]["id"] == edited["userMessage"]["id"]


async def prompt(client: Client, text: str, **more: Any) -> str:
    """Send with the driven model, end its answer; what it was told as the last message."""
    SCRIPTS.driven.queue(text).put_nowait(TextDelta("seen"))
    SCRIPTS.driven.queue(text).put_nowait(None)
    turn = await client.send(text, model="driven", **more)
    ended = await client.finish(turn["assistantMessage"]["id"])
    assert ended["status"] == "COMPLETE"
    return SCRIPTS.driven.requests[text].messages[-1].text


async def test_a_model_is_told_the_text_of_files_and_the_names_of_others(client: Client) -> None:
    text, program = await client.upload("grüße".encode(), "n.md"), await client.upload(b"MZ\x90\x00\xff", "p.exe")
    told = (
        '[File "n.md" (text/plain, 7 bytes):]\ngrüße\n[End of the file.]\n\n'
        '[File "p.exe" (application/octet-stream, 5 bytes): its content is not shown here.]\n\nRead this'
    )
    assert await prompt(client, "Read this", attachmentIds=[text["id"], program["id"]]) == told


async def test_a_model_is_told_no_more_of_a_file_than_there_is_room(limited: Client) -> None:
    content = ("🦉" * 20_000).encode()
    sent = await limited.upload(content, "owls.txt")
    told = (
        f'[File "owls.txt" (text/plain, {len(content)} bytes):]\n{"🦉" * 995}\n'
        "[The rest of the file is left out.]\n\nCount"
    )
    assert await prompt(limited, "Count", attachmentIds=[sent["id"]]) == told


async def test_an_answer_fails_as_retriable_when_the_storage_does_not_answer(
    server: Server, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = await client.upload(b"words")
    with monkeypatch.context() as patched:

        def refuse(*_: object, **_more: object) -> None:
            raise StorageUnavailableError

        patched.setattr(LocalStorage, "read", refuse)
        patched.setattr(LocalStorage, "signed_get", refuse)
        patched.setattr(LocalStorage, "put", refuse)
        turn = await client.send("x", attachmentIds=[sent["id"]])
        ended = await client.finish(turn["assistantMessage"]["id"])
        assert (ended["status"], ended["error"]["code"]) == ("FAILED", "ATTACHMENT_UNAVAILABLE")
        plain = await client.send("plain chat")
        assert (await client.finish(plain["assistantMessage"]["id"]))["status"] == "COMPLETE"
        with pytest.raises(GraphQLErrors) as refused:
            await client.upload(b"x")
        assert (refused.value.code, refused.value.extensions["retryAfter"]) == ("UNAVAILABLE", 5)
    retried = await client.retry(turn["assistantMessage"]["id"])
    assert (await client.finish(retried["assistantMessage"]["id"]))["status"] == "COMPLETE"


# Sweeping


async def test_what_was_never_sent_along_is_swept_when_its_time_has_come(server: Server, client: Client) -> None:
    content = os.urandom(50)
    sent = await client.upload(content)
    reserved = await client.upload_directly(os.urandom(51), content_type="application/octet-stream")
    await sweep(server)
    assert is_there(server, content)
    assert await rows(server, reserved) == 1
    await later(server)
    await sweep(server)
    assert not is_there(server, content)
    assert (await rows(server, sent["id"]), await rows(server, reserved)) == (0, 0)
    assert not any(path.stat().st_size == 51 for path in files(server))


async def test_what_a_message_refers_to_is_never_swept_and_with_its_last_message_it_is(
    server: Server, client: Client
) -> None:
    content = os.urandom(50)
    sent = await client.upload(content)
    turns = [await client.send("x", attachmentIds=[sent["id"]]) for _ in range(2)]
    for turn in turns:
        await client.finish(turn["assistantMessage"]["id"])
        await later(server)
        await sweep(server)
        assert is_there(server, content)
        assert await rows(server, sent["id"]) == 1
        await client.run(DELETE_THREAD, {"id": turn["thread"]["id"]})
    await sweep(server)
    assert not is_there(server, content)
    assert await rows(server, sent["id"]) == 0


async def test_bytes_live_as_long_as_any_owner_or_share_refers_to_them(
    server: Server, client: Client, other: Client
) -> None:
    content = os.urandom(50)
    sent = await client.upload(content, "shared.bin")
    turn = await client.send("x", attachmentIds=[sent["id"]])
    await client.finish(turn["assistantMessage"]["id"])
    theirs, share, token = new_id(), new_id(), secrets.token_urlsafe(32)
    path = f"{client.address}/shared/{token}/files"
    async with database(server) as connection:
        blob = await connection.fetchval("SELECT blob_id FROM attachments WHERE id = $1", key_of(sent["id"]))
        await connection.execute(
            """
            INSERT INTO attachments (id, owner_id, blob_id, state, name, content_type, size)
            SELECT $1, $2, blob_id, 'LINKED', name, content_type, size FROM attachments WHERE id = $3
            """,
            *(theirs, parse_id(IdKind.USER, other.id), key_of(sent["id"])),
        )
        await connection.execute(
            """
            INSERT INTO shares (id, owner_id, thread_id, token, title, includes_attachments)
            VALUES ($1, $2, $3, $4, 'x', true)
            """,
            *(share, parse_id(IdKind.USER, client.id), parse_id(IdKind.THREAD, turn["thread"]["id"]), token),
        )
        await connection.execute(
            """
            INSERT INTO share_attachments (share_id, position, blob_id, name, content_type, size)
            VALUES ($1, 0, $2, 'shared.bin', 'application/octet-stream', 50)
            """,
            *(share, blob),
        )
        async with client.http.get(f"{path}/0") as response:
            assert await response.read() == content
        async with client.http.get(f"{path}/1") as response:
            assert response.status == 404
        with pytest.raises(asyncpg.ForeignKeyViolationError):
            await connection.execute("DELETE FROM blobs WHERE id = $1", blob)
        await client.run(DELETE, {"id": sent["id"]})
        await later(server)
        await sweep(server)
        assert is_there(server, content)
        await connection.execute("DELETE FROM shares WHERE id = $1", share)
        async with client.http.get(f"{path}/0") as response:
            assert response.status == 404
        await sweep(server)
        assert is_there(server, content)
        await connection.execute("DELETE FROM users WHERE id = $1", parse_id(IdKind.USER, other.id))
    await sweep(server)
    assert not is_there(server, content)


async def test_a_file_that_is_sent_while_it_is_swept_is_either_sent_or_not_found(
    server: Server, client: Client
) -> None:
    contents = [os.urandom(50) for _ in range(12)]
    sent = [await client.upload(content) for content in contents]
    await later(server)

    async def send(attachment_id: str) -> str:
        try:
            await client.send("x", attachmentIds=[attachment_id])
        except GraphQLErrors as refused:
            return refused.code
        return "SENT"

    sweeps = [attachments(server).sweep(limit) for limit in (1, 2, 3, 4, 100)]
    outcomes = await asyncio.gather(*(send(one["id"]) for one in sent), *sweeps)
    await later(server)
    await sweep(server)
    assert set(outcomes[:12]) <= {"SENT", "NOT_FOUND"}
    for content, one, outcome in zip(contents, sent, outcomes[:12], strict=True):
        assert is_there(server, content) == (outcome == "SENT")
        assert await rows(server, one["id"]) == (outcome == "SENT")


async def test_a_reference_that_is_being_written_holds_the_bytes(server: Server, client: Client) -> None:
    content = os.urandom(50)
    sent = await client.upload(content)
    copy = """
    INSERT INTO attachments (id, owner_id, blob_id, state, name, content_type, size)
    SELECT $1, owner_id, blob_id, 'LINKED', name, content_type, size FROM attachments WHERE id = $2
    """
    async with database(server) as connection:
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute(copy, new_id(), key_of(sent["id"]))
        async with database(server) as another:
            await another.execute("DELETE FROM attachments WHERE id = $1", key_of(sent["id"]))
        sweeping = asyncio.create_task(sweep(server))
        await asyncio.sleep(0.2)
        await transaction.commit()
        await sweeping
    assert is_there(server, content)


async def test_bytes_whose_upload_was_swept_cannot_be_had_any_more(server: Server, client: Client) -> None:
    """The sweeper has begun to delete them: an upload that ends only now must not refer to them."""
    service = attachments(server)
    viewer = server.application._http._services.sessions.read(client.token or "")
    go_on, content = asyncio.Event(), os.urandom(50)

    async def slow() -> AsyncIterator[bytes]:
        yield content
        await go_on.wait()

    upload = asyncio.create_task(service.store(viewer, slow(), name="x"))
    async with database(server) as connection, asyncio.timeout(20):
        while not await connection.fetchval("SELECT true FROM attachments WHERE owner_id = $1", viewer.id):
            await asyncio.sleep(0.02)
    async with database(server) as connection:
        await connection.execute(
            """
            UPDATE sweep_tasks SET due_at = now() WHERE kind = 'KEY'
                AND subject = (SELECT upload_key FROM attachments WHERE owner_id = $1)
            """,
            viewer.id,
        )
    await sweep(server)
    go_on.set()
    with pytest.raises(UnavailableError):
        await upload
    assert not is_there(server, content)


async def test_a_deletion_that_the_storage_refuses_is_tried_again(
    server: Server, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = os.urandom(50)
    await client.upload(content)
    await later(server)

    async def refuse(*_: object) -> None:
        raise StorageUnavailableError

    with monkeypatch.context() as patched:
        patched.setattr(LocalStorage, "delete", refuse)
        await sweep(server)
    assert is_there(server, content)
    await later(server)
    await sweep(server)
    assert not is_there(server, content)


async def test_a_server_that_dies_at_any_point_leaves_nothing_for_ever(server: Server, client: Client) -> None:
    """What is on the disk after each step of an upload has a row that leads to it."""
    async with database(server) as connection:
        at_risk = """
        SELECT $1 IN (SELECT key FROM blobs) OR $1 IN (SELECT subject FROM sweep_tasks WHERE kind = 'KEY')
        """
        attachment_id = await client.upload_directly(b"left")
        for step in (lambda: client.complete_upload(attachment_id), lambda: sweep(server)):
            for path in files(server):
                assert await connection.fetchval(at_risk, path.name.split(".")[0])
            await step()
        for path in files(server):
            assert await connection.fetchval(at_risk, path.name.split(".")[0])


async def test_files_of_a_user_who_is_being_deleted_are_not_taken(server: Server, client: Client) -> None:
    async with database(server) as connection:
        await connection.execute("UPDATE users SET deleted_at = now() WHERE id = $1", parse_id(IdKind.USER, client.id))
    with pytest.raises(GraphQLErrors) as refused:
        await client.upload(b"x")
    assert refused.value.code == "UNAUTHENTICATED"
