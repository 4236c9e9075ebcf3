"""Exports: everything a user has, in one zip that is written while it is read (docs/account-data.md).

All of it is of one moment: rows are read by cursors in one read-only transaction with a snapshot. That transaction is
held while a client reads, as no other is, so it has a connection of its own, there are few of them at once, and both
the client's pace and the whole have deadlines (docs/decisions/0015-export-format.md).
"""

from __future__ import annotations

import asyncio
import hmac
import time
import zipfile
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from typing import IO, TYPE_CHECKING, Any
from uuid import UUID, uuid4

import jwt
import orjson

from models.database import Database
from models.ids import IdKind, MalformedIdError, outside_id, parse_id
from models.parts import parts_from_json, parts_to_json
from models.records import MessageStatus
from services.errors import ForbiddenError, UnauthenticatedError, UnavailableError
from services.export_format import (
    ATTACHMENTS,
    FORMAT,
    MANIFEST,
    MEMBER_BYTES,
    MESSAGES,
    SHAPES,
    SHARE_MESSAGES,
    VERSION,
    Shape,
    bytes_name,
    member_name,
)
from services.viewer import Viewer
from storage.base import NoSuchKeyError, Storage
from streams.buffer import join_parts

if TYPE_CHECKING:
    from asyncpg import Connection

LINK_SECONDS = 900
AT_ONCE = 4
# An answer may be megabytes long, so few rows with parts are fetched at a time, and many of the others.
_ROWS, _ROWS_WITH_PARTS, _THREADS = 500, 16, 100
_PIECE_BYTES = 256 * 1024
_AUDIENCE = "export"
_ISSUER = "threadgraph"
_ALGORITHM = "HS256"
_MAX_TOKEN_CHARS = 2_048

_USER = "SELECT id, anonymous, issuer, subject, created_at FROM users WHERE id = $1 AND deleted_at IS NULL"
_THREAD_IDS = "SELECT id FROM threads WHERE owner_id = $1 ORDER BY id"
# Parents before their children, and the messages of a thread together. What was remembered and is gone is left out.
_MESSAGES = f"""
SELECT {", ".join(f"m.{column}" for column in MESSAGES.columns if column != "active_child_id")}, c.id AS active_child_id
FROM messages m LEFT JOIN messages c ON c.id = m.active_child_id AND c.parent_id = m.id
WHERE m.thread_id = ANY($1::uuid[]) AND m.owner_id = $2 ORDER BY m.thread_id, m.depth, m.id
"""  # noqa: S608 - names of ours
# The files of a link are references of its own and not exported: a link comes back without them.
_SHARE_MESSAGES = """
SELECT m.share_id, m.position, m.role, m.status, m.model, m.created_at, (
    SELECT coalesce(jsonb_agg(part ORDER BY place), '[]')
    FROM jsonb_array_elements(m.parts) WITH ORDINALITY AS listed (part, place) WHERE part ->> 'type' <> 'file'
) AS parts
FROM shares s JOIN share_messages m ON m.share_id = s.id WHERE s.owner_id = $1 ORDER BY s.id, m.position
"""
_FILES = """
SELECT a.id, b.key FROM attachments a JOIN blobs b ON b.id = a.blob_id WHERE a.owner_id = $1 ORDER BY a.id
"""
_CHECKPOINTS = "SELECT parts FROM stream_checkpoints WHERE stream_id = $1 ORDER BY from_offset"


@dataclass(frozen=True, slots=True)
class ExportLink:
    """Where to download an export, until when."""

    url: str
    expires_at: datetime


class Exports:
    """Links to exports, and the downloads behind them.

    Args:
        secret: the server's; a key of its own is made from it, so that nothing else signed with it passes for a link.
        address: where this server is reached, asked for with every link.
        at_once: most downloads of this process.
        member_bytes: how long a member of the zip may grow before the next goes on.
    """

    def __init__(
        self,
        database: Database,
        storage: Storage,
        *,
        secret: str,
        address: Callable[[], str],
        at_once: int = AT_ONCE,
        member_bytes: int = MEMBER_BYTES,
    ) -> None:
        self._database = database
        self._storage = storage
        self._key = hmac.digest(secret.encode(), b"threadgraph export links", sha256)
        self._address = address
        self._at_once = at_once
        self._member_bytes = member_bytes
        self._open = 0

    def __len__(self) -> int:
        """How many downloads are open."""
        return self._open

    async def link(self, viewer: Viewer, *, include_attachments: bool) -> ExportLink:
        """A link that anyone may download the viewer's data with for 15 minutes.

        Raises:
            UnauthenticatedError: the account was deleted.
        """
        async with self._database.acquire() as connection:
            if await connection.fetchrow(_USER, viewer.id) is None:
                raise UnauthenticatedError("The account of this token does not exist any more.")
        now = int(time.time())
        claims = {
            "iss": _ISSUER,
            "aud": _AUDIENCE,
            "sub": outside_id(IdKind.USER, viewer.id),
            "iat": now,
            "exp": now + LINK_SECONDS,
            "attachments": include_attachments,
        }
        token = jwt.encode(claims, self._key, algorithm=_ALGORITHM)
        return ExportLink(f"{self._address()}/export/{token}", datetime.fromtimestamp(now + LINK_SECONDS, UTC))

    @asynccontextmanager
    async def open(self, token: str) -> AsyncIterator[Export]:
        """The export behind a link's token, as it is at this moment. Nothing of it is read before it is asked for.

        Raises:
            ForbiddenError: not a link of ours, or not any more.
            UnavailableError: too many downloads run.
        """
        user_id, include_attachments = self._opened(token)
        if self._open >= self._at_once:
            raise UnavailableError("Too many exports are being downloaded; try again.", retry_after=30)
        self._open += 1
        try:
            async with AsyncExitStack() as stack:
                connection = await stack.enter_async_context(self._database.session())
                await stack.enter_async_context(connection.transaction(isolation="repeatable_read", readonly=True))
                user = await connection.fetchrow(_USER, user_id)
                if user is None:
                    raise _refused()
                storage = self._storage if include_attachments else None
                yield Export(connection, storage, user, member_bytes=self._member_bytes)
        finally:
            self._open -= 1

    def _opened(self, token: str) -> tuple[UUID, bool]:
        if len(token) > _MAX_TOKEN_CHARS or not token.isascii():
            raise _refused()
        try:
            claims = jwt.decode(
                token,
                self._key,
                algorithms=[_ALGORITHM],
                issuer=_ISSUER,
                audience=_AUDIENCE,
                options={"require": ["exp", "iat", "sub", "iss", "aud"]},
            )
            return parse_id(IdKind.USER, claims["sub"]), claims["attachments"] is True
        except (jwt.PyJWTError, MalformedIdError, KeyError, TypeError, ValueError) as error:
            raise _refused() from error


def _refused() -> ForbiddenError:
    return ForbiddenError("This link is not valid, or not any more; ask for a new one by exportData.")


class Export:
    """One download. `chunks` can be read once."""

    def __init__(
        self, connection: Connection, storage: Storage | None, user: Mapping[str, Any], *, member_bytes: int
    ) -> None:
        self._connection = connection
        self._storage = storage
        self._user = user
        self._member_bytes = member_bytes
        self._at = datetime.now(UTC)

    @property
    def file_name(self) -> str:
        """What to call it."""
        return f"threadgraph-export-{self._at:%Y-%m-%d}.zip"

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The bytes of the zip, in pieces that may be empty.

        As much is held as a piece and a few rows, however much there is.
        """
        target = _Zip(self._at)
        try:
            manifest = orjson.dumps(await self._manifest(), option=orjson.OPT_INDENT_2 | orjson.OPT_UTC_Z)
            target.begin(MANIFEST)
            yield await target.write(manifest)
            for shape in SHAPES:
                async with aclosing(self._lines(shape)) as lines:
                    number, size = 1, 0
                    target.begin(member_name(shape, number))
                    async for piece in lines:
                        if size and size + len(piece) > self._member_bytes:
                            number, size = number + 1, 0
                            target.begin(member_name(shape, number))
                        size += len(piece)
                        yield await target.write(piece)
            if self._storage is not None:
                async with aclosing(self._files(target, self._storage)) as pieces:
                    async for piece in pieces:
                        yield piece
            yield target.close()
        finally:
            target.abandon()

    async def _files(self, target: _Zip, storage: Storage) -> AsyncGenerator[bytes, None]:
        """The bytes of the attachments, each a member; those that are gone are left out."""
        async for row in self._connection.cursor(_FILES, self._user["id"], prefetch=_ROWS):
            with suppress(NoSuchKeyError):
                async with aclosing(storage.read(row["key"])) as pieces:
                    begun = False
                    async for piece in pieces:
                        if not begun:
                            target.begin(bytes_name(row["id"]))
                            begun = True
                        yield await target.write(piece)

    async def _manifest(self) -> dict[str, Any]:
        counts = {shape.name: await self._connection.fetchval(_count(shape), self._user["id"]) for shape in SHAPES}
        return {
            "format": FORMAT,
            "version": VERSION,
            "id": uuid4().hex,
            "exportedAt": self._at,
            "user": {
                "id": outside_id(IdKind.USER, self._user["id"]),
                "anonymous": self._user["anonymous"],
                "issuer": self._user["issuer"],
                "subject": self._user["subject"],
                "createdAt": self._user["created_at"],
            },
            "counts": counts,
        }

    async def _lines(self, shape: Shape) -> AsyncGenerator[bytes, None]:
        """The lines of a member, many at a time."""
        piece = bytearray()
        async with aclosing(self._rows(shape)) as rows:
            async for row in rows:
                piece += shape.line(row)
                if len(piece) >= _PIECE_BYTES:
                    yield bytes(piece)
                    piece.clear()
        if piece:
            yield bytes(piece)

    async def _rows(self, shape: Shape) -> AsyncGenerator[Mapping[str, Any], None]:
        if shape is not MESSAGES:
            prefetch = _ROWS_WITH_PARTS if shape is SHARE_MESSAGES else _ROWS
            async for row in self._connection.cursor(_query(shape), self._user["id"], prefetch=prefetch):
                yield row
            return
        threads = await self._connection.cursor(_THREAD_IDS, self._user["id"])
        while ids := [row["id"] for row in await threads.fetch(_THREADS)]:
            async for row in self._connection.cursor(_MESSAGES, ids, self._user["id"], prefetch=_ROWS_WITH_PARTS):
                yield row if row["status"] != MessageStatus.STREAMING else await self._so_far(row)

    async def _so_far(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """An answer that is being written, as if it had been cut off now: with what was saved of it."""
        stretches = await self._connection.fetch(_CHECKPOINTS, row["id"])
        parts = join_parts([parts_from_json(stretch["parts"]) for stretch in stretches])
        return {**row, "status": MessageStatus.INTERRUPTED.value, "parts": parts_to_json(parts)}


def _query(shape: Shape) -> str:
    if shape is SHARE_MESSAGES:
        return _SHARE_MESSAGES
    return f"SELECT {', '.join(shape.columns)} FROM {shape.table} WHERE {_mine(shape)} ORDER BY id"  # noqa: S608


def _count(shape: Shape) -> str:
    if shape is SHARE_MESSAGES:
        return "SELECT count(*) FROM shares s JOIN share_messages m ON m.share_id = s.id WHERE s.owner_id = $1"
    return f"SELECT count(*) FROM {shape.table} WHERE {_mine(shape)}"  # noqa: S608


def _mine(shape: Shape) -> str:
    # What is reserved only has no bytes, and may never have any.
    return "owner_id = $1 AND state <> 'RESERVED'" if shape is ATTACHMENTS else "owner_id = $1"


class _Sink:
    """What a zip is written to: something that cannot be read, or gone back in, so sizes stand behind the bytes."""

    def __init__(self) -> None:
        self._written = bytearray()

    def write(self, data: bytes) -> int:
        self._written += data
        return len(data)

    def flush(self) -> None:
        """Nothing: what is written is taken."""

    def close(self) -> None:
        """Nothing."""

    def take(self) -> bytes:
        taken = bytes(self._written)
        self._written.clear()
        return taken


class _Zip:
    """A zip that is written member by member, from its first byte on. Compresses in a thread."""

    def __init__(self, at: datetime) -> None:
        self._sink = _Sink()
        self._zip = zipfile.ZipFile(self._sink, "w")
        self._time = at.timetuple()[:6]
        self._member: IO[bytes] | None = None

    def begin(self, name: str) -> None:
        """End the member before, and begin the next."""
        if self._member is not None:
            self._member.close()
        info = zipfile.ZipInfo(name, self._time)
        info.compress_type = zipfile.ZIP_DEFLATED
        info.external_attr = 0o600 << 16
        self._member = self._zip.open(info, "w")

    async def write(self, data: bytes) -> bytes:
        """Add to the member; what there is to send."""
        assert self._member is not None
        await asyncio.to_thread(self._member.write, data)
        return self._sink.take()

    def close(self) -> bytes:
        """End the last member and the zip; the last there is to send."""
        assert self._member is not None
        self._member.close()
        self._zip.close()
        return self._sink.take()

    def abandon(self) -> None:
        """Close what is open, for nobody."""
        with suppress(ValueError):
            if self._member is not None:
                self._member.close()
            self._zip.close()
