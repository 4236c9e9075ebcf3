"""Sharing: snapshots of threads, read by whoever has the link's token, and forks of them.

A share is a copy: later messages, edits and renames of the thread do not reach it, and nothing in it leads back. It is
found by its token and by nothing else; a token that is unknown, malformed, revoked or expired finds nothing, all alike.
Every page asks anew whether the share is still open, so a revocation ends it for readers in the middle of it too.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

import asyncpg

from models.database import Database
from models.ids import new_id
from models.records import (
    SHARE_COLUMNS,
    THREAD_COLUMNS,
    SharedMessageRecord,
    SharedThreadRecord,
    ShareRecord,
    ThreadRecord,
)
from services.attachments import Attachments
from services.errors import BadUserInputError, NotFoundError, UnauthenticatedError
from services.forks import check_copied, copying
from services.input import checked_expiry, checked_line
from services.paging import Page, PageRequest, SharedPosition
from services.rates import NO_RATE, UserRate
from services.threads import MAX_TITLE_BYTES
from services.viewer import Viewer

MAX_SHARES = 100
_TOKEN_BYTES = 32
_FILE_SECONDS = 60
# What `secrets.token_urlsafe` makes of 32 bytes. Nothing else is looked up.
_TOKEN = re.compile(r"[A-Za-z0-9_-]{43}", re.ASCII)

_LIVE = "(s.expires_at IS NULL OR s.expires_at > now())"
# For everybody: while it lives, while its thread does, and while nobody is deleting the account it belongs to.
_OPEN = f"""
s.token = $1 AND {_LIVE} AND EXISTS (
    SELECT FROM threads t JOIN users u ON u.id = t.owner_id
    WHERE t.id = s.thread_id AND (t.expires_at IS NULL OR t.expires_at > now()) AND u.deleted_at IS NULL
)
"""
# Positions have no gaps, so the last one tells how many there are.
_COUNT = "(SELECT coalesce(max(position) + 1, 0) FROM share_messages WHERE share_id = s.id)"
_S_COLUMNS = ", ".join(f"s.{name}" for name in SHARE_COLUMNS.split(", "))
_FIND = f"""
SELECT {_S_COLUMNS}, {_COUNT} AS message_count FROM shares s
WHERE s.id = ANY($1::uuid[]) AND s.owner_id = $2 AND {_LIVE}
"""  # noqa: S608
_OF_THREADS = f"""
SELECT s.*, {_COUNT} AS message_count FROM unnest($1::uuid[]) AS wanted (thread_id) CROSS JOIN LATERAL (
    SELECT {_S_COLUMNS} FROM shares s WHERE s.thread_id = wanted.thread_id AND s.owner_id = $2 AND {_LIVE}
    ORDER BY s.id DESC LIMIT {MAX_SHARES}
) s
"""  # noqa: S608

_LOCK_THREAD = "SELECT title FROM threads WHERE id = $1 AND owner_id = $2 FOR UPDATE"
# What has expired is read by nobody any more: it makes room.
_ROOM = f"""
WITH expired AS (
    DELETE FROM shares s WHERE s.thread_id = $1 AND NOT {_LIVE}
)
SELECT (SELECT count(*) FROM shares s WHERE s.thread_id = $1 AND {_LIVE}) AS shares,
    (SELECT count(*) FROM messages WHERE thread_id = $1 AND active) AS messages
"""  # noqa: S608
# An answer that is being written is left out, and so are instructions to the model: they are no part of what is shown.
# A file goes in only where that was chosen, with a reference to its bytes that is the share's own, and without the id
# by which its owner finds it. Signatures of reasoning stay behind: they are for the model's vendor alone.
_SHARE = f"""
WITH share AS (
    INSERT INTO shares (id, owner_id, thread_id, token, title, includes_attachments, expires_at)
    VALUES ($1, $2, $3, $4, $5, $6, $7) RETURNING {SHARE_COLUMNS}
), shown AS (
    SELECT * FROM messages
    WHERE thread_id = $3 AND active AND status <> 'STREAMING' AND role <> 'SYSTEM'
), files AS (
    SELECT m.id AS message_id, place, row_number() OVER (ORDER BY m.depth, place) - 1 AS position, a.blob_id, a.name,
        a.content_type, a.size, a.width, a.height
    FROM shown m CROSS JOIN jsonb_array_elements(m.parts) WITH ORDINALITY AS listed (part, place)
    JOIN attachments a ON a.id = (part ->> 'attachmentId')::uuid AND a.owner_id = $2 AND a.blob_id IS NOT NULL
    WHERE $6 AND part ->> 'type' = 'file'
), references_ AS (
    INSERT INTO share_attachments (share_id, position, blob_id, name, content_type, size, width, height)
    SELECT share.id, position, blob_id, name, content_type, size, width, height FROM share CROSS JOIN files
), copies AS (
    INSERT INTO share_messages (share_id, position, role, status, parts, model, created_at)
    SELECT share.id, row_number() OVER (ORDER BY m.depth) - 1, m.role, m.status, (
        SELECT coalesce(jsonb_agg(CASE WHEN f.position IS NULL THEN part - 'signature'
            ELSE part - 'attachmentId' || jsonb_build_object('position', f.position) END ORDER BY listed.place), '[]')
        FROM jsonb_array_elements(m.parts) WITH ORDINALITY AS listed (part, place)
        LEFT JOIN files f ON f.message_id = m.id AND f.place = listed.place
        WHERE f.position IS NOT NULL OR part ->> 'type' <> 'file'
    ), m.model, m.created_at
    FROM share CROSS JOIN shown m
    RETURNING position
)
SELECT {SHARE_COLUMNS}, (SELECT count(*) FROM copies) AS message_count FROM share
"""  # noqa: S608
_T_COLUMNS = ", ".join(f"t.{name}" for name in THREAD_COLUMNS.split(", "))
_REVOKE = f"""
DELETE FROM shares s USING threads t WHERE s.id = $1 AND s.owner_id = $2 AND t.id = s.thread_id RETURNING {_T_COLUMNS}
"""  # noqa: S608

_READ = f"SELECT s.token, s.title, s.includes_attachments, s.expires_at, s.created_at FROM shares s WHERE {_OPEN}"  # noqa: S608


def _page_query(order: str) -> str:
    # No row: the share is not open. A row without a position: it is, and this page is empty.
    return f"""
    SELECT m.position, m.role, m.status, m.parts, m.model, m.created_at FROM shares s LEFT JOIN LATERAL (
        SELECT * FROM share_messages WHERE share_id = s.id AND position > $2 AND position < $3
        ORDER BY position {order} LIMIT $4
    ) m ON true
    WHERE {_OPEN} ORDER BY m.position {order}
    """  # noqa: S608


_PAGE = _page_query("ASC")
_PAGE_BACKWARDS = _page_query("DESC")
_MAX_POSITION = 2**31 - 1

_FILE = f"""
SELECT b.key, f.content_type, f.name
FROM shares s JOIN share_attachments f ON f.share_id = s.id AND f.position = $2 JOIN blobs b ON b.id = f.blob_id
WHERE {_OPEN}
"""  # noqa: S608
_LENGTH = f"""
SELECT {_COUNT} AS messages, (SELECT count(*) FROM share_attachments WHERE share_id = s.id) AS files
FROM shares s WHERE {_OPEN}
"""  # noqa: S608
# One statement, one snapshot, as `_FORK` in services/forks.py. Files become the forker's by a reference to their bytes;
# what was counted in those is known of any file that has them, and models are sent no PDF without it.
_FORK = f"""
WITH share AS (
    SELECT s.id, s.title FROM shares s WHERE {_OPEN}
), thread AS (
    INSERT INTO threads (id, owner_id, title, title_source, pinned)
    SELECT $3, $2, title, 'USER', false FROM share
    RETURNING {THREAD_COLUMNS}
), copies AS (
    INSERT INTO messages (id, owner_id, thread_id, parent_id, active_child_id, depth, active, role, status, parts,
        model, created_at, updated_at)
    SELECT ($4::uuid[])[m.position + 1], $2, thread.id, ($4::uuid[])[m.position], ($4::uuid[])[m.position + 2],
        m.position, true, m.role, m.status, (
            SELECT coalesce(jsonb_agg(CASE WHEN part ->> 'type' = 'file' THEN part - 'position' || jsonb_build_object(
                'attachmentId', replace((($5::uuid[])[(part ->> 'position')::int + 1])::text, '-', '')) ELSE part END
                ORDER BY place), '[]')
            FROM jsonb_array_elements(m.parts) WITH ORDINALITY AS listed (part, place)
        ), m.model, m.created_at, m.created_at
    FROM thread CROSS JOIN share JOIN share_messages m ON m.share_id = share.id ORDER BY m.position
), files AS (
    INSERT INTO attachments (id, owner_id, blob_id, state, name, content_type, size, tokens, pages, width, height)
    SELECT ($5::uuid[])[f.position + 1], $2, f.blob_id, 'LINKED', f.name, f.content_type, f.size, counted.tokens,
        counted.pages, f.width, f.height
    FROM share JOIN share_attachments f ON f.share_id = share.id CROSS JOIN LATERAL (
        SELECT max(tokens) AS tokens, max(pages) AS pages FROM attachments WHERE blob_id = f.blob_id
    ) counted
), links AS (
    INSERT INTO attachment_links (attachment_id, message_id)
    SELECT ($5::uuid[])[(part ->> 'position')::int + 1], ($4::uuid[])[m.position + 1]
    FROM share JOIN share_messages m ON m.share_id = share.id, jsonb_array_elements(m.parts) AS part
    WHERE part ->> 'type' = 'file'
)
SELECT {THREAD_COLUMNS} FROM thread
"""  # noqa: S608


class Sharing:
    """Shares of the viewer's threads, and what anybody with a token sees of them."""

    def __init__(self, database: Database, attachments: Attachments, rate: UserRate = NO_RATE) -> None:
        self._database = database
        self._rate = rate
        self._attachments = attachments

    async def share(
        self,
        viewer: Viewer,
        thread_id: UUID,
        *,
        title: str | None,
        include_attachments: bool,
        expires_at: datetime | None,
    ) -> ShareRecord:
        """A snapshot of a thread's active path as it is now, under a new token.

        Args:
            title: what its readers see; None takes the thread's.
            expires_at: when the link ends by itself, if ever.

        Raises:
            BadUserInputError: title or time cannot be accepted, the thread has 100 links, or is too long to copy.
            NotFoundError: no such thread of the viewer's.
            RateLimitedError: the viewer has made too many, or forked too often, a moment ago.
        """
        if title is not None:
            title = checked_line(title, field="title", max_bytes=MAX_TITLE_BYTES)
        if expires_at is not None:
            expires_at = checked_expiry(expires_at)
        self._rate.check(viewer.id)
        async with self._database.transaction() as connection:
            thread = await connection.fetchrow(_LOCK_THREAD, thread_id, viewer.id)
            if thread is None:
                raise NotFoundError("thread", field="threadId")
            room = await connection.fetchrow(_ROOM, thread_id)
            if room["shares"] >= MAX_SHARES:
                raise BadUserInputError(f"A thread has at most {MAX_SHARES} links; revoke one.", field="threadId")
            check_copied(room["messages"], field="threadId")
            row = await connection.fetchrow(
                _SHARE,
                *(new_id(), viewer.id, thread_id, secrets.token_urlsafe(_TOKEN_BYTES)),
                *(thread["title"] if title is None else title, include_attachments, expires_at),
            )
        return ShareRecord.from_row(row)

    async def find_many(self, viewer: Viewer, ids: Sequence[UUID]) -> list[ShareRecord | None]:
        """Shares in the order of the ids; None where there is none of the viewer's, or it has expired."""
        async with self._database.acquire() as connection:
            rows = await connection.fetch(_FIND, ids, viewer.id)
        found = {row["id"]: ShareRecord.from_row(row) for row in rows}
        return [found.get(share_id) for share_id in ids]

    async def of_threads(self, viewer: Viewer, thread_ids: Sequence[UUID]) -> list[list[ShareRecord]]:
        """The links of each thread that have not expired, newest first."""
        async with self._database.acquire() as connection:
            rows = await connection.fetch(_OF_THREADS, thread_ids, viewer.id)
        by_thread: dict[UUID, list[ShareRecord]] = {thread_id: [] for thread_id in thread_ids}
        for row in sorted(rows, key=lambda row: row["id"], reverse=True):
            by_thread[row["thread_id"]].append(ShareRecord.from_row(row))
        return [by_thread[thread_id] for thread_id in thread_ids]

    async def revoke(self, viewer: Viewer, share_id: UUID) -> ThreadRecord:
        """Delete a share with its snapshot: its token finds nothing from here on. The thread it was of.

        Raises:
            NotFoundError: no such share of the viewer's, or it was revoked before.
        """
        async with self._database.acquire() as connection:
            row = await connection.fetchrow(_REVOKE, share_id, viewer.id)
        if row is None:
            raise NotFoundError("share", field="shareId")
        return ThreadRecord.from_row(row)

    async def read(self, token: str) -> SharedThreadRecord | None:
        """What anybody with the token sees of a share but for its messages; None where it opens nothing."""
        if _TOKEN.fullmatch(token) is None:
            return None
        async with self._database.acquire() as connection:
            row = await connection.fetchrow(_READ, token)
        return None if row is None else SharedThreadRecord.from_row(row)

    async def page(self, shared: SharedThreadRecord, request: PageRequest[SharedPosition]) -> Page[SharedMessageRecord]:
        """One page of a shared thread's messages.

        Raises:
            NotFoundError: the share was revoked or has expired since it was read.
        """
        async with self._database.acquire() as connection:
            rows = await connection.fetch(
                _PAGE_BACKWARDS if request.backwards else _PAGE,
                shared.token,
                request.after.position if request.after else -1,
                request.before.position if request.before else _MAX_POSITION,
                request.limit + 1,
            )
        if not rows:
            raise NotFoundError("shared thread")
        return Page.of(request, [SharedMessageRecord.from_row(row) for row in rows if row["position"] is not None])

    async def file_url(self, token: str, position: int) -> str:
        """A link to a file of a share; it ends a minute later, so whoever has it has it not for long.

        Raises:
            NotFoundError: the token opens nothing, or there is no such file in the share.
        """
        row = None
        if _TOKEN.fullmatch(token) is not None and 0 <= position <= _MAX_POSITION:
            async with self._database.acquire() as connection:
                row = await connection.fetchrow(_FILE, token, position)
        if row is None:
            raise NotFoundError("file")
        return await self._attachments.link(row["key"], row["content_type"], row["name"], seconds=_FILE_SECONDS)

    async def fork(self, viewer: Viewer, token: str) -> ThreadRecord:
        """A thread of the viewer's own with copies of a shared thread's messages, and its files by reference.

        Raises:
            NotFoundError: the token opens nothing.
            RateLimitedError: as for `share`.
        """
        if _TOKEN.fullmatch(token) is None:
            raise NotFoundError("shared thread", field="token")
        self._rate.check(viewer.id)
        try:
            async with self._database.transaction() as connection:
                length = await connection.fetchrow(_LENGTH, token)
                if length is None:
                    raise NotFoundError("shared thread", field="token")
                ids = [new_id() for _ in range(length["messages"])]
                files = [new_id() for _ in range(length["files"])]
                async with copying(connection, viewer, len(ids)):
                    row = await connection.fetchrow(_FORK, token, viewer.id, new_id(), ids, files)
                if row is None:
                    raise NotFoundError("shared thread", field="token")
        except asyncpg.ForeignKeyViolationError as error:
            raise UnauthenticatedError("The account of this token does not exist any more.") from error
        return ThreadRecord.from_row(row)
