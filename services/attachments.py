"""Attachments: files of a viewer, from their upload to the last reference to their bytes.

An attachment is RESERVED before its bytes are there, STORED when they are and were looked at, LINKED once a message
refers to it. Bytes (a blob) belong to nobody; attachments and shares refer to them, and a foreign key forbids that a
blob is deleted while anything does.

Nothing is lost and nothing is left, whenever a server dies: that the bytes of a key are to be deleted is written down
before the first of them comes, and taken back in the transaction that writes the blob's row; and written down again in
the transaction that deletes that row. The sweeper does what is written down and due.
"""

from __future__ import annotations

import asyncio
import logging
import re
import tempfile
from collections import Counter
from collections.abc import AsyncIterable, AsyncIterator, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING
from uuid import UUID

from models.database import Database, DatabaseUnavailableError
from models.ids import new_id
from models.parts import FilePart
from models.records import ATTACHMENT_COLUMNS, AttachmentRecord, AttachmentState
from services.errors import (
    BadUserInputError,
    NotFoundError,
    PayloadTooLargeError,
    QuotaExceededError,
    UnauthenticatedError,
    UnavailableError,
)
from services.file_types import PDF, UNKNOWN, FileFacts, Inspection, disposition, file_name, served_type
from services.paging import AttachmentPosition, Page, PageRequest
from services.pdf import MAX_BYTES, count_pages
from services.rates import NO_RATE, UserRate
from services.viewer import Viewer
from storage.base import NoSuchKeyError, Storage, StorageError, StorageFullError, TooManyBytesError, new_key

if TYPE_CHECKING:
    from asyncpg import Connection

log = logging.getLogger(__name__)

MAX_ATTACHMENTS = 20
MAX_UPLOADS = 100
MAX_UPLOADS_OF_ONE = 20
_COUNTING_AT_ONCE = 2
# A million empty files are not free either.
_LEAST_COUNTED_BYTES = 4_096
# How long after the last moment of an upload its bytes are waited for; longer than any upload may take.
_PATIENCE_SECONDS = 3_600
_TAKEN_SECONDS = 600
_TYPE = re.compile(
    r"[a-z0-9][a-z0-9!#$&^_.+-]{0,60}/[a-z0-9][a-z0-9!#$&^_.+-]{0,80}(; ?[a-z0-9-]{1,20}=[a-z0-9-]{1,40})?"
)

_FROM = "FROM attachments a LEFT JOIN blobs b ON b.id = a.blob_id"
_FIND = f"SELECT {ATTACHMENT_COLUMNS} {_FROM} WHERE a.id = ANY($1::uuid[]) AND a.owner_id = $2"


def _list_query(order: str) -> str:
    return f"""
    SELECT {ATTACHMENT_COLUMNS} {_FROM}
    WHERE a.owner_id = $1 AND a.id < $2 AND a.id > $3 AND a.state <> 'RESERVED' ORDER BY a.id {order} LIMIT $4
    """


_LIST = _list_query("DESC")
_LIST_BACKWARDS = _list_query("ASC")
_NEWEST, _OLDEST = UUID(int=2**128 - 1), UUID(int=0)

# One at a time for each owner; references to the user's row do not wait for it.
_LOCK_OWNER = "SELECT true FROM users WHERE id = $1 AND deleted_at IS NULL FOR NO KEY UPDATE"
_USED = f"""
SELECT coalesce(sum(greatest(size, {_LEAST_COUNTED_BYTES})), 0)::bigint FROM attachments WHERE owner_id = $1
"""  # noqa: S608
_RESERVE = """
WITH tasks AS (
    INSERT INTO sweep_tasks (kind, subject, due_at) VALUES
        ('ATTACHMENT', $1::uuid::text, now() + make_interval(secs => $7)),
        ('KEY', $6, now() + make_interval(secs => $7))
)
INSERT INTO attachments (id, owner_id, state, name, content_type, size, upload_key, expires_at)
VALUES ($1, $2, 'RESERVED', $3, $4, $5, $6, now() + make_interval(secs => $7))
"""
_STORE = f"""
WITH claimed AS (
    DELETE FROM sweep_tasks WHERE kind = 'KEY' AND subject = $3 AND NOT taken RETURNING id
), blob AS (
    INSERT INTO blobs (id, key, size, sha256, content_type) SELECT $4, $3, $5, $6, $7 FROM claimed RETURNING id, key
), b AS (
    SELECT id, key FROM blob
), a AS (
    UPDATE attachments SET state = 'STORED', blob_id = b.id, content_type = $7, size = $5, tokens = $8, pages = $9,
        width = $10, height = $11,
        upload_key = nullif(upload_key, $3), expires_at = now() + make_interval(secs => $12)
    FROM b WHERE attachments.id = $1 AND owner_id = $2 AND state = 'RESERVED' RETURNING attachments.*
), task AS (
    INSERT INTO sweep_tasks (kind, subject, due_at) SELECT 'ATTACHMENT', id::text, expires_at FROM a
)
SELECT {ATTACHMENT_COLUMNS} FROM a, b
"""  # noqa: S608
_AWAIT_BYTES = """
INSERT INTO sweep_tasks (kind, subject, due_at) VALUES ('KEY', $1, now() + make_interval(secs => $2))
"""
_TAKE = """
WITH mine AS (
    SELECT id FROM attachments WHERE id = ANY($1::uuid[]) AND owner_id = $2 AND state <> 'RESERVED'
    ORDER BY id FOR NO KEY UPDATE
)
UPDATE attachments SET state = 'LINKED', expires_at = NULL FROM mine WHERE attachments.id = mine.id
RETURNING attachments.id, name, content_type, size
"""
# An attachment goes, and a link to write its bytes stays: what can be written, or was, counts until it is swept. The
# reservation that stands for it has an id that nobody is told.
_KEPT_PROMISES = """
kept AS (
    INSERT INTO attachments (id, owner_id, state, name, content_type, size, expires_at)
    SELECT gen_random_uuid(), gone.owner_id, 'RESERVED', '', gone.content_type, gone.size, awaited.due_at
    FROM gone JOIN sweep_tasks awaited ON awaited.subject = gone.upload_key
    WHERE awaited.kind = 'KEY' AND NOT awaited.taken AND awaited.due_at > now()
    RETURNING id, expires_at
), kept_tasks AS (
    INSERT INTO sweep_tasks (kind, subject, due_at) SELECT 'ATTACHMENT', id::text, expires_at FROM kept
)
"""
# The owner before the attachment, as a claim and the end of an account lock them: what is kept refers to the owner.
_DELETE = f"""
WITH gone AS (
    DELETE FROM attachments
    WHERE id = $1 AND owner_id = (SELECT id FROM users WHERE id = $2 FOR KEY SHARE) RETURNING *
), {_KEPT_PROMISES}
SELECT id FROM gone
"""  # noqa: S608
_LINK = "INSERT INTO attachment_links (message_id, attachment_id) SELECT $1, unnest($2::uuid[])"

# Rows first and in one order, then the look at them: what is seen then cannot change any more.
_DUE = """
SELECT id, subject FROM sweep_tasks WHERE kind = $1 AND due_at <= now() ORDER BY due_at LIMIT $2 FOR UPDATE SKIP LOCKED
"""
_DONE = "DELETE FROM sweep_tasks WHERE id = ANY($1::bigint[])"
_LOCK_OWNERS = """
SELECT FROM users WHERE id IN (SELECT owner_id FROM attachments WHERE id = ANY($1::uuid[])) ORDER BY id FOR KEY SHARE
"""
_LOCK_ATTACHMENTS = "SELECT id FROM attachments WHERE id = ANY($1::uuid[]) ORDER BY id FOR UPDATE"
_DELETE_ATTACHMENTS = f"""
WITH gone AS (
    DELETE FROM attachments a WHERE id = ANY($1::uuid[]) AND CASE state
        WHEN 'LINKED' THEN NOT EXISTS (SELECT FROM attachment_links WHERE attachment_id = a.id)
        ELSE expires_at <= now() END
    RETURNING *
), {_KEPT_PROMISES}
SELECT count(*) FROM gone
"""  # noqa: S608
_LOCK_BLOBS = "SELECT id FROM blobs WHERE id = ANY($1::uuid[]) ORDER BY id FOR UPDATE"
_DELETE_BLOBS = """
WITH gone AS (
    DELETE FROM blobs b WHERE id = ANY($1::uuid[])
        AND NOT EXISTS (SELECT FROM attachments WHERE blob_id = b.id)
        AND NOT EXISTS (SELECT FROM share_attachments WHERE blob_id = b.id)
    RETURNING key
)
INSERT INTO sweep_tasks (kind, subject) SELECT 'KEY', key FROM gone
"""
_TAKE_KEYS = """
UPDATE sweep_tasks SET taken = true, due_at = now() + make_interval(secs => $2)
WHERE id IN (
    SELECT id FROM sweep_tasks WHERE kind = 'KEY' AND due_at <= now() ORDER BY due_at LIMIT $1 FOR UPDATE SKIP LOCKED
)
RETURNING id, subject
"""


@dataclass(frozen=True, slots=True)
class AttachmentLimits:
    """Bytes of one file and of all of a viewer's; seconds that links and files without a message live."""

    max_bytes: int
    quota_bytes: int
    url_seconds: int
    unlinked_seconds: int


@dataclass(frozen=True, slots=True)
class Upload:
    """Where to send the bytes of a reserved attachment, with which header, until when."""

    record: AttachmentRecord
    url: str
    content_type: str
    expires_at: datetime


class Attachments:
    """The viewer's files."""

    def __init__(
        self, database: Database, storage: Storage, limits: AttachmentLimits, rate: UserRate = NO_RATE
    ) -> None:
        self._database = database
        self._storage = storage
        self._limits = limits
        self._rate = rate
        self._uploads: Counter[UUID] = Counter()
        self._counting = asyncio.Semaphore(_COUNTING_AT_ONCE)

    async def find_many(self, viewer: Viewer, ids: Sequence[UUID]) -> list[AttachmentRecord | None]:
        """Attachments in the order of the ids; None where there is none of the viewer's."""
        async with self._database.acquire() as connection:
            rows = await connection.fetch(_FIND, ids, viewer.id)
        found = {row["id"]: AttachmentRecord.from_row(row) for row in rows}
        return [found.get(attachment_id) for attachment_id in ids]

    async def find(self, viewer: Viewer, attachment_id: UUID) -> AttachmentRecord | None:
        """One attachment, or None where there is none of the viewer's."""
        return (await self.find_many(viewer, [attachment_id]))[0]

    async def page(self, viewer: Viewer, request: PageRequest[AttachmentPosition]) -> Page[AttachmentRecord]:
        """One page of what is stored, newest first."""
        async with self._database.acquire() as connection:
            rows = await connection.fetch(
                _LIST_BACKWARDS if request.backwards else _LIST,
                viewer.id,
                request.after.id if request.after else _NEWEST,
                request.before.id if request.before else _OLDEST,
                request.limit + 1,
            )
        return Page.of(request, [AttachmentRecord.from_row(row) for row in rows])

    async def url(self, record: AttachmentRecord) -> str | None:
        """A link to the file that lives for minutes; None before there is one."""
        if record.key is None:
            return None
        return await self.link(record.key, record.content_type, record.name)

    async def upload(
        self,
        viewer: Viewer,
        chunks: AsyncIterable[bytes],
        *,
        name: str,
        content_type: str | None = None,
        size: int | None = None,
    ) -> AttachmentRecord:
        """`store` for a file that the viewer sends: how many, is bounded. Of those that the server makes it is not.

        Raises:
            RateLimitedError: the viewer has sent or announced too many a moment ago.
            CallerError: as `store`.
        """
        self._rate.check(viewer.id)
        return await self.store(viewer, chunks, name=name, content_type=content_type, size=size)

    async def store(
        self,
        viewer: Viewer,
        chunks: AsyncIterable[bytes],
        *,
        name: str,
        content_type: str | None = None,
        size: int | None = None,
    ) -> AttachmentRecord:
        """Take in a file as it comes.

        Args:
            content_type: what its sender says it is; true for images and PDFs, or it is refused.
            size: how many bytes its sender announced, where it did.

        Raises:
            BadUserInputError: the file is empty, broken or not what was said.
            PayloadTooLargeError, QuotaExceededError: it is too large.
            UnavailableError: the storage does not work, or too many uploads run.
        """
        with self._slot(viewer):
            attachment_id, key, reserved = await self._reserve(viewer, name, UNKNOWN, size, _PATIENCE_SECONDS)
            try:
                async with _storage_failures():
                    inspection = Inspection()
                    try:
                        await self._storage.put(key, inspection.through(chunks), max_bytes=reserved)
                    except TooManyBytesError as error:
                        raise self._too_large(reserved) from error
                    facts = inspection.facts(content_type)
                    pages = await self._pages(key, facts)
                return await self._stored(viewer, attachment_id, key, facts, pages)
            except BaseException as error:
                await asyncio.shield(self._give_up(key, attachment_id))
                if isinstance(error, _NotReservedError):
                    raise _broken_off() from error
                raise

    async def reserve(self, viewer: Viewer, *, name: str, content_type: str, size: int) -> Upload:
        """Make room for a file that its sender puts into the storage directly; `complete` takes it in.

        Raises:
            BadUserInputError: the type or the size cannot be.
            PayloadTooLargeError, QuotaExceededError: it is too large.
            UnavailableError: the storage does not work.
            RateLimitedError: as for `upload`.
        """
        content_type = content_type.strip().lower()
        if _TYPE.fullmatch(content_type) is None:
            raise BadUserInputError("This is not a content type such as image/png.", field="contentType")
        if size < 1:
            raise BadUserInputError("A file has at least one byte.", field="size")
        self._rate.check(viewer.id)
        seconds = self._limits.url_seconds
        attachment_id, key, _ = await self._reserve(viewer, name, content_type, size, seconds + _PATIENCE_SECONDS)
        async with _storage_failures():
            url = await self._storage.signed_put(key, content_type=content_type, size=size, seconds=seconds)
        async with self._database.acquire() as connection:
            row = await connection.fetchrow(_FIND, [attachment_id], viewer.id)
            expires_at = await connection.fetchval("SELECT now() + make_interval(secs => $1)", seconds)
        return Upload(AttachmentRecord.from_row(row), url, content_type, expires_at)

    async def complete(self, viewer: Viewer, attachment_id: UUID) -> AttachmentRecord:
        """Take in a file that was put into the storage. Doing so twice is no error.

        What was looked at is what is kept: the file is copied to a key that no link to write was ever made for.

        Raises:
            NotFoundError: no such attachment of the viewer's.
            BadUserInputError: nothing was put there, or it is not what was announced.
            UnavailableError: the storage does not work.
        """
        async with self._database.acquire() as connection:
            row = await connection.fetchrow(
                "SELECT state, upload_key, size, content_type FROM attachments WHERE id = $1 AND owner_id = $2",
                attachment_id,
                viewer.id,
            )
            if row is None:
                raise NotFoundError("attachment", field="attachmentId")
            key = new_key()
            if row["state"] == AttachmentState.RESERVED:
                await connection.execute(_AWAIT_BYTES, key, _PATIENCE_SECONDS)
        if row["state"] != AttachmentState.RESERVED:
            return await self._found(viewer, attachment_id)
        try:
            with self._slot(viewer):
                async with _storage_failures():
                    facts = await self._look(row["upload_key"], key, row["size"], row["content_type"])
                    pages = await self._pages(key, facts)
                record = await self._stored(viewer, attachment_id, key, facts, pages)
        except BaseException as error:
            await asyncio.shield(self._give_up(key))
            if isinstance(error, _NotReservedError | BadUserInputError):
                # Another completion may have been faster, and have cleared away what this one was looking for.
                record = await self._found(viewer, attachment_id)
                if record.key is not None:
                    return record
            if isinstance(error, _NotReservedError):
                raise _broken_off() from error
            raise
        # Deleted again when the link to write has expired: until then it can be used.
        with suppress(StorageError):
            await self._storage.delete(row["upload_key"])
        return record

    async def delete(self, viewer: Viewer, attachment_id: UUID) -> None:
        """Delete an attachment; messages that refer to it remember its name.

        Its room is free at once, unless a link to write it was made that may still be used.

        Raises:
            NotFoundError: no such attachment of the viewer's.
        """
        async with self._database.acquire() as connection:
            deleted = await connection.fetchval(_DELETE, attachment_id, viewer.id)
        if deleted is None:
            raise NotFoundError("attachment", field="attachmentId")

    async def sweep(self, limit: int) -> int:
        """Do at most `limit` of each kind of task that is due; how many were done or begun. Safe on many servers.

        Raises:
            DatabaseUnavailableError: the rest waits for the next time.
        """
        done = 0
        async with self._database.transaction() as connection:
            tasks = await connection.fetch(_DUE, "ATTACHMENT", limit)
            ids = sorted({UUID(task["subject"]) for task in tasks})
            await connection.execute(_LOCK_OWNERS, ids)
            await connection.fetch(_LOCK_ATTACHMENTS, ids)
            await connection.execute(_DELETE_ATTACHMENTS, ids)
            await connection.execute(_DONE, [task["id"] for task in tasks])
            done += len(tasks)
        async with self._database.transaction() as connection:
            tasks = await connection.fetch(_DUE, "BLOB", limit)
            ids = sorted({UUID(task["subject"]) for task in tasks})
            await connection.fetch(_LOCK_BLOBS, ids)
            await connection.execute(_DELETE_BLOBS, ids)
            await connection.execute(_DONE, [task["id"] for task in tasks])
            done += len(tasks)
        async with self._database.acquire() as connection:
            taken = await connection.fetch(_TAKE_KEYS, limit, _TAKEN_SECONDS)
        for task in taken:
            try:
                await self._storage.delete(task["subject"])
            except StorageError as error:
                log.warning("the bytes of a file could not be deleted; they will be: %s", type(error).__name__)
                continue
            async with self._database.acquire() as connection:
                await connection.execute(_DONE, [task["id"]])
        return done + len(taken)

    async def _reserve(
        self, viewer: Viewer, name: str, content_type: str, size: int | None, seconds: int
    ) -> tuple[UUID, str, int]:
        """The id and the key of a new reservation, and how many bytes it may have."""
        limits = self._limits
        if size is not None and size > limits.max_bytes:
            raise self._too_large(limits.max_bytes)
        attachment_id, key = new_id(), new_key()
        async with self._database.transaction() as connection:
            if not await connection.fetchval(_LOCK_OWNER, viewer.id):
                raise UnauthenticatedError("The account of this token does not exist any more.")
            room = limits.quota_bytes - await connection.fetchval(_USED, viewer.id)
            wanted = min(limits.max_bytes, max(room, _LEAST_COUNTED_BYTES)) if size is None else size
            if max(wanted, _LEAST_COUNTED_BYTES) > room:
                raise self._no_room()
            await connection.execute(
                _RESERVE, attachment_id, viewer.id, file_name(name), content_type, wanted, key, seconds
            )
        return attachment_id, key, wanted

    async def _look(self, upload_key: str, key: str, size: int, content_type: str) -> FileFacts:
        """Copy what was uploaded to its key, and look at the copy."""
        try:
            await self._storage.copy(upload_key, key)
        except NoSuchKeyError as error:
            raise BadUserInputError("Nothing was uploaded yet.", field="attachmentId") from error
        if await self._storage.size(key) != size:
            raise BadUserInputError("The file has not the size that was announced.", field="size")
        inspection = Inspection()
        async with aclosing(self._storage.read(key)) as chunks, aclosing(inspection.through(chunks)) as looked_at:
            async for _ in looked_at:
                pass
        return inspection.facts(content_type)

    async def _pages(self, key: str, facts: FileFacts) -> int | None:
        """The pages of a PDF, counted in a file that nobody else has."""
        if facts.content_type != PDF or facts.size > MAX_BYTES:
            return None
        async with self._counting:
            with tempfile.TemporaryFile() as file:
                async with aclosing(self._storage.read(key)) as pieces:
                    async for piece in pieces:
                        await asyncio.to_thread(file.write, piece)
                return await asyncio.to_thread(count_pages, file)

    async def _stored(
        self, viewer: Viewer, attachment_id: UUID, key: str, facts: FileFacts, pages: int | None
    ) -> AttachmentRecord:
        async with self._database.transaction() as connection:
            row = await connection.fetchrow(
                _STORE,
                *(attachment_id, viewer.id, key, new_id(), facts.size, facts.sha256, facts.content_type),
                *(facts.tokens, pages, facts.width, facts.height, self._limits.unlinked_seconds),
            )
            if row is None:
                # Rolls back: a blob that nothing refers to is not written.
                raise _NotReservedError
        return AttachmentRecord.from_row(row)

    async def _found(self, viewer: Viewer, attachment_id: UUID) -> AttachmentRecord:
        record = await self.find(viewer, attachment_id)
        if record is None:
            raise NotFoundError("attachment", field="attachmentId")
        return record

    async def _give_up(self, key: str, attachment_id: UUID | None = None) -> None:
        """Undo what was begun. What cannot be undone now, the sweeper will."""
        try:
            async with self._database.transaction() as connection:
                await connection.execute("DELETE FROM attachments WHERE id = $1 AND state = 'RESERVED'", attachment_id)
                # Waits for a commit that is still on its way: of a broken connection nobody knows what came of it.
                await connection.execute("DELETE FROM sweep_tasks WHERE kind = 'KEY' AND subject = $1", key)
                task = await connection.fetchval(
                    """
                    INSERT INTO sweep_tasks (kind, subject)
                    SELECT 'KEY', $1 WHERE NOT EXISTS (SELECT FROM blobs WHERE key = $1) RETURNING id
                    """,
                    key,
                )
            if task is not None:
                await self._storage.delete(key)
                async with self._database.acquire() as connection:
                    await connection.execute(_DONE, [task])
        except (DatabaseUnavailableError, StorageError) as error:
            log.warning("a broken upload is left to the sweeper: %s", type(error).__name__)

    async def link(self, key: str, content_type: str, name: str, *, seconds: int | None = None) -> str:
        """A link to bytes, for whoever the caller found to be allowed it. It lives as set, unless shorter is asked."""
        async with _storage_failures():
            return await self._storage.signed_get(
                key,
                content_type=served_type(content_type),
                disposition=disposition(content_type, name),
                seconds=min(seconds or self._limits.url_seconds, self._limits.url_seconds),
            )

    @contextmanager
    def _slot(self, viewer: Viewer) -> Iterator[None]:
        """One of the uploads that may run at once; nobody takes them all."""
        if self._uploads[viewer.id] >= MAX_UPLOADS_OF_ONE or self._uploads.total() >= MAX_UPLOADS:
            raise UnavailableError("Too many uploads are running; try again.")
        self._uploads[viewer.id] += 1
        try:
            yield
        finally:
            self._uploads[viewer.id] -= 1
            self._uploads += Counter()  # drops those at nought

    def _too_large(self, allowed: int) -> PayloadTooLargeError | QuotaExceededError:
        if allowed < self._limits.max_bytes:
            return self._no_room()
        return PayloadTooLargeError(f"A file has at most {self._limits.max_bytes} bytes.", field="size")

    def _no_room(self) -> QuotaExceededError:
        return QuotaExceededError(
            f"Your files may take {self._limits.quota_bytes} bytes in all; delete some.", field="size"
        )


async def take_attachments(connection: Connection, owner_id: UUID, ids: Sequence[UUID]) -> list[FilePart]:
    """The parts of a message that refers to these attachments of its owner; those that there are, in their order.

    Their rows are locked and will not be swept. `link_attachments` has to follow, once the message is there.
    """
    rows = {row["id"]: row for row in await connection.fetch(_TAKE, ids, owner_id)} if ids else {}
    return [
        FilePart(row["id"], row["name"], row["content_type"], row["size"])
        for row in map(rows.get, ids)
        if row is not None
    ]


async def link_attachments(connection: Connection, message_id: UUID, parts: Sequence[FilePart]) -> None:
    """Write down that a message refers to the attachments of its parts."""
    if parts:
        await connection.execute(_LINK, message_id, [part.attachment_id for part in parts])


class _NotReservedError(Exception):
    """The reservation is gone: completed by another, or swept."""


def _broken_off() -> UnavailableError:
    return UnavailableError("The upload was broken off by the server; try again.")


@asynccontextmanager
async def _storage_failures() -> AsyncIterator[None]:
    """Failures of the storage as callers are told of them."""
    try:
        yield
    except StorageFullError as error:
        raise UnavailableError("There is no room for files on this server.", retry_after=60) from error
    except StorageError as error:
        raise UnavailableError("The file storage does not work right now; try again.", retry_after=5) from error
