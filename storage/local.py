"""Files in a folder: whole or not there, and still there after the power went.

A file is written beside its place, flushed to the disk, and moved into its place; then the folder is flushed, which is
what makes the move last. Links carry what they allow and are signed by HMAC-SHA256; the server's route for them is the
only way in (`server/files.py`).
"""

from __future__ import annotations

import asyncio
import errno
import hmac
import os
import secrets
import threading
import time
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import AsyncGenerator, AsyncIterable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import orjson

from storage.base import (
    NoSuchKeyError,
    StorageError,
    StorageFullError,
    StorageUnavailableError,
    bounded,
    checked_key,
)

T = TypeVar("T")
_THREADS = 8
_PIECE_BYTES = 256 * 1024
_MAX_LINK_CHARS = 4_096


@dataclass(frozen=True, slots=True)
class FileLink:
    """What a link allows: one method on one key. `size` counts for PUT, `disposition` for GET."""

    method: str
    key: str
    expires_at: int
    content_type: str
    disposition: str
    size: int


class LinkRefusedError(Exception):
    """Not a link of ours, one for another method, or one that has expired."""


class LocalStorage:
    """Files under a folder, spread over 65,536 folders by the first digits of their keys.

    Args:
        folder: made where it is missing.
        secret: signs links; whoever has it can read every file.
        address: where this server is reached, asked for with every link.
    """

    def __init__(self, folder: Path, *, secret: str, address: Callable[[], str]) -> None:
        self._folder = folder
        # A key of its own: nothing that is signed for another purpose can ever pass for a link.
        self._secret = hmac.digest(secret.encode(), b"threadgraph file links", sha256)
        self._address = address
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="files")

    async def put(self, key: str, chunks: AsyncIterable[bytes], *, max_bytes: int) -> int:
        """See `Storage.put`."""
        writing = _Writing(self.path(key))
        size, piece = 0, bytearray()
        try:
            await self._run(writing.open)
            async for chunk in bounded(chunks, max_bytes):
                size += len(chunk)
                piece += chunk
                if len(piece) >= _PIECE_BYTES:
                    await self._run(writing.write, bytes(piece))
                    piece.clear()
            await self._run(writing.write, bytes(piece))
            await self._run(writing.commit)
        except BaseException:
            # Waited for, also when this task is being cancelled: nothing may be left when the caller goes on.
            await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._pool, writing.abort))
            raise
        return size

    async def read(self, key: str) -> AsyncGenerator[bytes, None]:
        """See `Storage.read`."""
        file = await self._open(key)
        try:
            while piece := await self._run(file.read, _PIECE_BYTES):
                yield piece
        finally:
            file.close()

    async def size(self, key: str) -> int | None:
        """See `Storage.size`."""
        try:
            found: os.stat_result = await self._run(self.path(key).stat)
        except NoSuchKeyError:
            return None
        return found.st_size

    async def copy(self, source: str, target: str) -> None:
        """See `Storage.copy`. A second name for the same file; writing replaces files and never changes one."""
        await self._run(_link, self.path(source), self.path(target))

    async def delete(self, key: str) -> None:
        """See `Storage.delete`."""
        await self._run(_delete, self.path(key))

    async def signed_get(self, key: str, *, content_type: str, disposition: str, seconds: int) -> str:
        """See `Storage.signed_get`."""
        return self._sign(FileLink("GET", key, int(time.time()) + seconds, content_type, disposition, 0))

    async def signed_put(self, key: str, *, content_type: str, size: int, seconds: int) -> str:
        """See `Storage.signed_put`."""
        return self._sign(FileLink("PUT", key, int(time.time()) + seconds, content_type, "", size))

    async def close(self) -> None:
        """See `Storage.close`."""
        await asyncio.to_thread(self._pool.shutdown)

    def path(self, key: str) -> Path:
        """Where the bytes of a key are."""
        checked_key(key)
        return self._folder / key[:2] / key[2:4] / key

    def opened(self, token: str, method: str) -> FileLink:
        """What a link's token allows.

        Raises:
            LinkRefusedError: this method is not among it.
        """
        payload, _, signature = token.partition(".")
        if len(token) > _MAX_LINK_CHARS or not token.isascii():
            raise LinkRefusedError
        if not hmac.compare_digest(signature.encode(), self._signature(payload)):
            raise LinkRefusedError
        link = FileLink(*orjson.loads(urlsafe_b64decode(payload + "=" * (-len(payload) % 4))))
        if link.method != method or link.expires_at <= time.time():
            raise LinkRefusedError
        return link

    def _sign(self, link: FileLink) -> str:
        checked_key(link.key)
        fields = [link.method, link.key, link.expires_at, link.content_type, link.disposition, link.size]
        payload = urlsafe_b64encode(orjson.dumps(fields)).rstrip(b"=").decode()
        return f"{self._address()}/files/{payload}.{self._signature(payload).decode()}"

    def _signature(self, payload: str) -> bytes:
        return urlsafe_b64encode(hmac.digest(self._secret, payload.encode(), sha256)).rstrip(b"=")

    async def _open(self, key: str) -> BinaryIO:
        opening: asyncio.Future[BinaryIO] = asyncio.get_running_loop().run_in_executor(
            self._pool, open, self.path(key), "rb"
        )
        try:
            # Shielded: a thread cannot be called back, and what it opens for somebody who has left must be closed.
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_close_unread)
            raise
        except OSError as error:
            raise _failure(error) from error

    async def _run(self, work: Callable[..., T], *arguments: Any) -> T:
        """The result of blocking work, its failures as ours."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, work, *arguments)
        except OSError as error:
            raise _failure(error) from error


def _close_unread(opening: asyncio.Future[BinaryIO]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()


class _Writing:
    """A file that is being written beside its place. Each method runs in some thread, none while another does."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
        self._lock = threading.Lock()
        self._file: int | None = None

    def open(self) -> None:
        with self._lock:
            _make_folder(self._path.parent)
            self._file = os.open(self._part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def write(self, piece: bytes) -> None:
        with self._lock:
            assert self._file is not None
            rest = memoryview(piece)
            while rest:
                rest = rest[os.write(self._file, rest) :]

    def commit(self) -> None:
        with self._lock:
            assert self._file is not None
            os.fsync(self._file)
            file, self._file = self._file, None
            os.close(file)
            self._part.replace(self._path)
            _flush_folder(self._path.parent)

    def abort(self) -> None:
        with self._lock:
            if self._file is not None:
                file, self._file = self._file, None
                with suppress(OSError):
                    os.close(file)
            with suppress(OSError):
                self._part.unlink()


def _link(source: Path, target: Path) -> None:
    _make_folder(target.parent)
    os.link(source, target)
    _flush_folder(target.parent)


def _delete(path: Path) -> None:
    path.unlink(missing_ok=True)
    for part in path.parent.glob(f"{path.name}.*.part"):
        part.unlink(missing_ok=True)


def _make_folder(folder: Path) -> None:
    """Make a folder and those above it, each flushed into the one above: a file in a lost folder is lost."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(mode=0o700, exist_ok=True)
    _flush_folder(folder.parent)


def _flush_folder(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _failure(error: OSError) -> StorageError:
    if isinstance(error, FileNotFoundError):
        return NoSuchKeyError()
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StorageFullError(os.strerror(error.errno))
    return StorageUnavailableError(type(error).__name__)
