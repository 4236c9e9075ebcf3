"""One suite for both storages: S3 against a server that checks signatures, the folder behind the product's route."""

from __future__ import annotations

import asyncio
import builtins
import os
import re
import signal
import socket
import sys
import textwrap
import threading
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import aiohttp
import pytest
from aiohttp import web

import storage.local
from server.files import FileLinks
from storage.base import (
    NoSuchKeyError,
    Storage,
    StorageFullError,
    StorageUnavailableError,
    TooManyBytesError,
    new_key,
)
from storage.local import LocalStorage
from storage.s3 import _THREADS, S3Settings, S3Storage

ROOT = Path(__file__).parent.parent.parent
ACCESS_KEY, SECRET_KEY, BUCKET = "tester", "t" * 40, "files"


@dataclass
class Case:
    """A storage and the folder that its bytes end up in."""

    storage: Storage
    folder: Path

    def left(self) -> list[Path]:
        """Every file that is there, also of writes broken off."""
        return [path for path in self.folder.rglob("*") if path.is_file() and ".nanio" not in str(path)]


@pytest.fixture(scope="module")
async def local(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Case]:
    folder = tmp_path_factory.mktemp("local")
    address = ""
    files = LocalStorage(folder / "attachments", secret="s" * 32, address=lambda: address)
    application = web.Application()
    FileLinks(files).add_routes(application.router)
    runner = web.AppRunner(application)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    address = "http://{}:{}".format(*runner.addresses[0][:2])
    yield Case(files, folder)
    await runner.cleanup()
    await files.close()


@pytest.fixture(scope="module")
async def s3(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Case]:
    folder = tmp_path_factory.mktemp("s3")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ("-m", "nanio", "serve", "--host", "127.0.0.1", "--port", str(port), "--data-dir", str(folder))
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *(*command, "--log-level", "error", "--no-access-log"),
        env={**os.environ, "NANIO_ACCESS_KEY": ACCESS_KEY, "NANIO_SECRET_KEY": SECRET_KEY},
    )
    endpoint = f"http://127.0.0.1:{port}"
    files = s3_storage(endpoint)
    try:
        async with asyncio.timeout(30):
            while True:
                with suppress(OSError):
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                    writer.close()
                    break
                await asyncio.sleep(0.05)
        await files._call("create_bucket", Bucket=BUCKET)
        yield Case(files, folder)
    finally:
        await files.close()
        process.terminate()
        await process.wait()


def s3_storage(endpoint: str) -> S3Storage:
    return S3Storage(
        S3Settings(
            bucket=BUCKET,
            prefix="threadgraph/",
            endpoint=endpoint,
            region="us-east-1",
            access_key_id=ACCESS_KEY,
            secret_access_key=SECRET_KEY,
        )
    )


@pytest.fixture(params=["local", "s3"])
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.getfixturevalue(request.param)
    return found


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


async def pieces(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


async def put(files: Storage, *chunks: bytes) -> str:
    key = new_key()
    await files.put(key, pieces(*chunks), max_bytes=2**30)
    return key


async def whole(files: Storage, key: str) -> bytes:
    return b"".join([piece async for piece in files.read(key)])


async def test_what_was_put_is_read_as_it_was(case: Case) -> None:
    content = os.urandom(100_000)
    key = new_key()
    assert await case.storage.put(key, pieces(content[:7], b"", content[7:]), max_bytes=100_000) == 100_000
    assert await case.storage.size(key) == 100_000
    assert await whole(case.storage, key) == content


async def test_a_file_of_many_parts_is_read_as_it_was(case: Case) -> None:
    chunks = [os.urandom(1024 * 1024) for _ in range(17)]
    key = await put(case.storage, *chunks, b"end")
    assert await case.storage.size(key) == 17 * 1024 * 1024 + 3
    assert await whole(case.storage, key) == b"".join(chunks) + b"end"


async def test_a_reader_may_leave_early(case: Case) -> None:
    key = await put(case.storage, bytes(3 * 1024 * 1024))
    async with aclosing(case.storage.read(key)) as reading:
        async for piece in reading:
            assert 0 < len(piece) < 1024 * 1024
            break
    assert await case.storage.size(key) == 3 * 1024 * 1024


async def test_an_empty_file_is_a_file(case: Case) -> None:
    key = await put(case.storage)
    assert await case.storage.size(key) == 0
    assert await whole(case.storage, key) == b""


async def test_nothing_is_there_before_it_is_put_and_after_it_is_deleted(case: Case) -> None:
    key = new_key()
    assert await case.storage.size(key) is None
    with pytest.raises(NoSuchKeyError):
        await whole(case.storage, key)
    with pytest.raises(NoSuchKeyError):
        await case.storage.copy(key, new_key())
    await case.storage.put(key, pieces(b"x"), max_bytes=1)
    await case.storage.delete(key)
    await case.storage.delete(key)
    assert await case.storage.size(key) is None


async def test_a_copy_stays_as_it_was_when_the_first_is_written_again_and_deleted(case: Case) -> None:
    key, copy = await put(case.storage, b"first"), new_key()
    await case.storage.copy(key, copy)
    await case.storage.put(key, pieces(b"second"), max_bytes=10)
    assert await whole(case.storage, copy) == b"first"
    await case.storage.delete(key)
    assert await whole(case.storage, copy) == b"first"


@pytest.mark.parametrize("chunks", [1, 20], ids=["small", "in parts"])
async def test_a_write_that_breaks_off_leaves_nothing(case: Case, chunks: int) -> None:
    async def broken() -> AsyncIterator[bytes]:
        for _ in range(chunks):
            yield bytes(1024 * 1024)
        raise ConnectionResetError

    before, key = case.left(), new_key()
    with pytest.raises(ConnectionResetError):
        await case.storage.put(key, broken(), max_bytes=2**30)
    assert await case.storage.size(key) is None
    assert case.left() == before


@pytest.mark.parametrize("chunks", [1, 20], ids=["small", "in parts"])
async def test_a_write_that_is_cancelled_leaves_nothing(case: Case, chunks: int) -> None:
    waiting = asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        for _ in range(chunks):
            yield bytes(1024 * 1024)
        waiting.set()
        await asyncio.Event().wait()

    before, key = case.left(), new_key()
    task = asyncio.create_task(case.storage.put(key, slow(), max_bytes=2**30))
    await asyncio.wait_for(waiting.wait(), 20)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await case.storage.size(key) is None
    assert case.left() == before


async def test_more_than_is_allowed_is_refused_before_all_of_it_came(case: Case) -> None:
    came = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal came
        while True:
            came += 1
            yield bytes(1024)

    before, key = case.left(), new_key()
    with pytest.raises(TooManyBytesError):
        await case.storage.put(key, endless(), max_bytes=10_000)
    assert came == 10
    assert await case.storage.size(key) is None
    assert case.left() == before


async def test_two_writers_of_one_key_do_not_mix(case: Case) -> None:
    key, contents = new_key(), [bytes([n]) * 300_000 for n in range(6)]
    await asyncio.gather(*(case.storage.put(key, pieces(c[:1], c[1:]), max_bytes=2**20) for c in contents))
    assert await whole(case.storage, key) in contents


@pytest.mark.parametrize("key", ["", "..", "../" * 10 + "etc/passwd", "A" * 32, "a" * 31 + "\n", "a" * 33])
async def test_a_key_that_is_not_ours_reaches_nothing(case: Case, key: str) -> None:
    with pytest.raises(ValueError, match="key"):
        await case.storage.put(key, pieces(b""), max_bytes=1)
    with pytest.raises(ValueError, match="key"):
        await case.storage.delete(key)
    with pytest.raises(ValueError, match="key"):
        await case.storage.signed_get(key, content_type="a/b", disposition="inline", seconds=60)


# Links


async def get_link(case: Case, key: str, **changes: Any) -> str:
    given: dict[str, Any] = {"content_type": "text/plain", "disposition": "attachment", "seconds": 60} | changes
    return await case.storage.signed_get(key, **given)


async def put_link(case: Case, key: str, **changes: Any) -> str:
    given: dict[str, Any] = {"content_type": "image/png", "size": 4, "seconds": 60} | changes
    return await case.storage.signed_put(key, **given)


async def status(http: aiohttp.ClientSession, method: str, url: str, **given: Any) -> int:
    async with http.request(method, url, **given) as response:
        await response.read()
        return response.status


PNG = {"Content-Type": "image/png"}


async def test_a_link_reads_the_file_and_ranges_of_it(case: Case, http: aiohttp.ClientSession) -> None:
    link = await get_link(case, await put(case.storage, b"0123456789"))
    async with http.get(link) as response:
        assert (response.status, await response.read()) == (200, b"0123456789")
        assert response.headers["Accept-Ranges"] == "bytes"
    ranges = [
        ("bytes=2-4", b"234", "bytes 2-4/10"),
        ("bytes=7-", b"789", "bytes 7-9/10"),
    ]
    if isinstance(case.storage, LocalStorage):  # what S3 does, too, and nanio does not
        ranges += [("bytes=5-999", b"56789", "bytes 5-9/10"), ("bytes=-2", b"89", "bytes 8-9/10")]
    for asked, expected, where in ranges:
        async with http.get(link, headers={"Range": asked}) as response:
            assert (response.status, await response.read()) == (206, expected)
            assert response.headers["Content-Range"] == where
    assert await status(http, "GET", link, headers={"Range": "bytes=10-"}) in (400, 416)


@pytest.mark.parametrize("asked", ["bytes=0-1,5-6", "bytes=4-2", "bytes=-", "bytes=x", "lines=0-1", "bytes"])
async def test_what_is_no_range_of_bytes_is_passed_over(local: Case, http: aiohttp.ClientSession, asked: str) -> None:
    link = await get_link(local, await put(local.storage, b"0123456789"))
    async with http.get(link, headers={"Range": asked}) as response:
        assert (response.status, await response.read()) == (200, b"0123456789")
        assert response.headers["Content-Security-Policy"].startswith("sandbox")


async def test_a_link_writes_the_file_it_was_made_for(case: Case, http: aiohttp.ClientSession) -> None:
    key = new_key()
    link = await put_link(case, key)
    assert await status(http, "PUT", link, data=b"four", headers=PNG) in (200, 204)
    assert await whole(case.storage, key) == b"four"


async def test_a_link_to_write_takes_no_other_size_or_type(case: Case, http: aiohttp.ClientSession) -> None:
    key = new_key()
    link = await put_link(case, key)
    before = case.left()
    assert await status(http, "PUT", link, data=b"longer", headers=PNG) in range(400, 500)
    assert await status(http, "PUT", link, data=b"sho", headers=PNG) in range(400, 500)
    assert await status(http, "PUT", link, data=b"four", headers={"Content-Type": "text/html"}) in range(400, 500)
    assert await case.storage.size(key) is None
    assert case.left() == before


async def test_a_link_of_one_method_is_none_of_another(case: Case, http: aiohttp.ClientSession) -> None:
    key = await put(case.storage, b"kept")
    reading, writing = await get_link(case, key), await put_link(case, key)
    assert await status(http, "PUT", reading, data=b"evil", headers=PNG) in (403, 405)
    assert await status(http, "GET", writing) in (403, 405)
    assert await status(http, "DELETE", reading) in (403, 405)
    assert await status(http, "DELETE", writing) in (403, 405)
    assert await whole(case.storage, key) == b"kept"


async def test_a_link_does_not_lead_to_another_key(case: Case, http: aiohttp.ClientSession) -> None:
    mine, theirs = await put(case.storage, b"mine"), await put(case.storage, b"theirs")
    link = await get_link(case, mine)
    if mine in link:
        forged = link.replace(mine, theirs)
    else:
        own, other = (re.search(r"/files/([^.]+)\.(.+)", url) for url in (link, await get_link(case, theirs)))
        assert own
        assert other
        forged = link.replace(own[1], other[1])
    assert await status(http, "GET", forged) == 403
    assert await status(http, "GET", link) == 200


async def test_a_changed_link_is_refused(case: Case, http: aiohttp.ClientSession) -> None:
    link = await get_link(case, await put(case.storage, b"x"))
    assert await status(http, "GET", link[:-1] + ("0" if link[-1] != "0" else "1")) == 403
    assert await status(http, "GET", link.split("?")[0].rsplit("/", 1)[0] + "/x.y") in (403, 404)


async def test_a_link_ends_when_it_said(case: Case, http: aiohttp.ClientSession) -> None:
    key = await put(case.storage, b"x")
    reading, writing = await get_link(case, key, seconds=1), await put_link(case, new_key(), seconds=1)
    await asyncio.sleep(1.1)
    assert await status(http, "GET", reading) == 403
    assert await status(http, "PUT", writing, data=b"four", headers=PNG) == 403


async def test_a_link_to_what_was_deleted_finds_nothing(case: Case, http: aiohttp.ClientSession) -> None:
    key = await put(case.storage, b"x")
    link = await get_link(case, key)
    await case.storage.delete(key)
    assert await status(http, "GET", link) == 404


async def test_nothing_is_listed(case: Case, http: aiohttp.ClientSession) -> None:
    link = await get_link(case, await put(case.storage, b"x"))
    folder = link.split("?")[0]
    for _ in range(3):
        folder = folder.rsplit("/", 1)[0]
        if folder.count("/") > 2:
            assert await status(http, "GET", folder + "/") in (403, 404, 405)


async def test_a_link_of_s3_says_how_the_file_is_served(s3: Case) -> None:
    link = await get_link(s3, new_key(), content_type="text/plain", disposition='attachment; filename="a"')
    assert "response-content-type=text%2Fplain" in link
    assert "response-content-disposition=attachment" in link


async def test_a_link_of_the_folder_serves_the_file_so_that_nothing_runs(
    local: Case, http: aiohttp.ClientSession
) -> None:
    key = await put(local.storage, b"<script>alert(1)</script>")
    async with http.get(await get_link(local, key, disposition='attachment; filename="a.html"')) as response:
        assert response.headers["Content-Type"] == "text/plain"
        assert response.headers["Content-Disposition"] == 'attachment; filename="a.html"'
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert response.headers["Content-Security-Policy"] == "sandbox; default-src 'none'"
        assert response.headers["Cache-Control"].startswith("private")


async def test_a_link_with_a_foreign_secret_is_refused(
    local: Case, http: aiohttp.ClientSession, tmp_path: Path
) -> None:
    key = await put(local.storage, b"x")
    link = await get_link(local, key)
    forger = LocalStorage(tmp_path, secret="t" * 32, address=lambda: link.split("/files/")[0])
    forged = await forger.signed_get(key, content_type="text/plain", disposition="inline", seconds=60)
    assert await status(http, "GET", forged) == 403
    await forger.close()


# What goes wrong


async def test_a_storage_that_is_not_there_says_so_and_keeps_nobody_waiting() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        files = s3_storage(f"http://127.0.0.1:{free.getsockname()[1]}")
        async with asyncio.timeout(10):
            with pytest.raises(StorageUnavailableError):
                await files.put(new_key(), pieces(b"x"), max_bytes=1)
            with pytest.raises(StorageUnavailableError):
                await whole(files, new_key())
            with pytest.raises(StorageUnavailableError):
                await files.size(new_key())
        await files.close()


async def test_a_storage_that_hangs_ends_by_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.s3._CALL_SECONDS", 0.3)
    letting_go = asyncio.Event()

    async def silent(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await letting_go.wait()
        writer.close()

    hung = await asyncio.start_server(silent, "127.0.0.1", 0)
    files = s3_storage(f"http://127.0.0.1:{hung.sockets[0].getsockname()[1]}")
    async with asyncio.timeout(10):
        # More than there are threads: those that find none free are let go by the deadline, too.
        calls = (files.size(new_key()) for _ in range(40))
        results = await asyncio.gather(*calls, return_exceptions=True)
    assert {type(result) for result in results} == {StorageUnavailableError}
    letting_go.set()
    hung.close()
    await files.close()


async def test_links_are_made_though_every_call_to_the_storage_hangs() -> None:
    letting_go = asyncio.Event()
    came = asyncio.Semaphore(0)

    async def silent(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came.release()
        await letting_go.wait()
        writer.close()

    hung = await asyncio.start_server(silent, "127.0.0.1", 0)
    files = s3_storage(f"http://127.0.0.1:{hung.sockets[0].getsockname()[1]}")
    calls = [asyncio.create_task(files.size(new_key())) for _ in range(40)]
    async with asyncio.timeout(10):
        for _ in range(_THREADS):
            await came.acquire()
        link = await files.signed_get(new_key(), content_type="image/png", disposition="inline", seconds=60)
    assert "X-Amz-Signature=" in link
    assert not any(call.done() for call in calls)
    letting_go.set()
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    hung.close()
    await files.close()


async def test_a_storage_with_wrong_keys_says_that_it_does_not_work(s3: Case) -> None:
    endpoint = s3.storage._client.meta.endpoint_url  # type: ignore[attr-defined]
    files = S3Storage(
        S3Settings(
            bucket=BUCKET,
            prefix="",
            endpoint=endpoint,
            region="us-east-1",
            access_key_id=ACCESS_KEY,
            secret_access_key="w" * 40,
        )
    )
    with pytest.raises(StorageUnavailableError):
        await files.put(new_key(), pieces(b"x"), max_bytes=1)
    await files.close()


def test_a_secret_is_not_shown() -> None:
    settings = S3Settings(
        bucket="b", prefix="", endpoint=None, region="auto", access_key_id="id", secret_access_key="hunter2"
    )
    assert "hunter2" not in repr(settings)


@pytest.mark.parametrize(
    ("call", "number", "expected"),
    [
        ("write", 28, StorageFullError),
        ("fsync", 5, StorageUnavailableError),
        ("open", 30, StorageUnavailableError),
    ],
    ids=["full", "broken", "read-only"],
)
async def test_a_disk_that_fails_is_a_typed_error_and_leaves_nothing(
    local: Case, monkeypatch: pytest.MonkeyPatch, call: str, number: int, expected: type[Exception]
) -> None:
    def fail(*_arguments: object, **_more: object) -> None:
        raise OSError(number, "injected")

    before, key = local.left(), new_key()
    with monkeypatch.context() as patched:
        patched.setattr(os, call, fail)
        with pytest.raises(expected):
            await local.storage.put(key, pieces(b"x" * 500_000), max_bytes=2**20)
    assert await local.storage.size(key) is None
    assert local.left() == before


async def test_a_file_that_was_opened_for_somebody_who_left_is_closed(
    local: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = new_key()
    await local.storage.put(key, pieces(b"there"), max_bytes=10)
    asked, allowed, opened = asyncio.Event(), threading.Event(), asyncio.Queue[BinaryIO]()
    loop = asyncio.get_running_loop()

    def slow_open(path: Path, mode: str) -> BinaryIO:
        loop.call_soon_threadsafe(asked.set)
        assert allowed.wait(10)
        file = cast("BinaryIO", builtins.open(path, mode))  # noqa: SIM115 - whoever asked closes it
        loop.call_soon_threadsafe(opened.put_nowait, file)
        return file

    monkeypatch.setattr(storage.local, "open", slow_open, raising=False)
    reading = asyncio.ensure_future(anext(local.storage.read(key)))
    await asked.wait()
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    allowed.set()
    async with asyncio.timeout(10):
        file = await opened.get()
        while not file.closed:
            await asyncio.sleep(0)


async def test_a_write_that_is_taken_in_pieces_is_whole(local: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, bytes(data[:1000])))
    content = os.urandom(10_500)
    assert await whole(local.storage, await put(local.storage, content)) == content


async def test_a_process_killed_in_the_middle_of_a_write_leaves_no_file(tmp_path: Path) -> None:
    program = """
        import asyncio, sys
        from pathlib import Path
        from storage.local import LocalStorage

        async def chunks():
            for _ in range(8):
                yield bytes(1024 * 1024)
            print("midway", flush=True)
            await asyncio.sleep(60)

        files = LocalStorage(Path(sys.argv[1]), secret="s", address=str)
        asyncio.run(files.put("ab" * 16, chunks(), max_bytes=2**30))
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", textwrap.dedent(program), str(tmp_path), cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout
    assert await asyncio.wait_for(process.stdout.readline(), 30) == b"midway\n"
    process.send_signal(signal.SIGKILL)
    await process.wait()
    files = LocalStorage(tmp_path, secret="s", address=str)
    assert await files.size("ab" * 16) is None
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".part"]
    # What the sweeper does about the key, which it knows from before the write.
    await files.delete("ab" * 16)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    await files.close()


async def test_the_file_is_on_the_disk_before_it_is_in_its_place_and_its_place_before_it_is_said(
    local: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(file: int) -> None:
        done.append("file" if os.path.isfile(f"/proc/self/fd/{file}") else "folder")
        fsync(file)

    def noted_replace(self: Path, target: Path) -> Path:
        done.append("move")
        return replace(self, target)

    key = await put(local.storage, b"x")
    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    await local.storage.put(key, pieces(b"y"), max_bytes=1)
    assert done == ["file", "move", "folder"]
