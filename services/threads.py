"""Threads of a viewer: listed, found, renamed, pinned, archived, moved, deleted, and when they expire."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any
from uuid import UUID

from models.database import Database
from models.records import (
    THREAD_COLUMNS,
    MessageRecord,
    ThreadRecord,
    message_columns,
    project_columns,
    thread_columns,
)
from services.errors import BadUserInputError, NotFoundError
from services.input import checked_expiry, checked_line, checked_text, escaped_like
from services.messages import path_arguments, path_rows
from services.paging import Page, PageRequest, PathPosition, ThreadPosition
from services.thread_deletion import delete_threads
from services.viewer import Viewer

MAX_TITLE_BYTES = 800
_FIND = f"SELECT {THREAD_COLUMNS} FROM threads WHERE id = ANY($1::uuid[]) AND owner_id = $2"  # noqa: S608
_LOCK = "SELECT project_id FROM threads WHERE id = $1 AND owner_id = $2 FOR UPDATE"
_LOCK_PROJECTS = """
SELECT id FROM projects WHERE id = ANY($1::uuid[]) AND owner_id = $2 ORDER BY id FOR NO KEY UPDATE
"""
_MOVE = f"UPDATE threads SET project_id = $2 WHERE id = $1 RETURNING {THREAD_COLUMNS}"  # noqa: S608
_PROJECT = "SELECT id FROM projects WHERE id = $1 AND owner_id = $2"


def _rows_query(
    key: tuple[str, str], order: str, conditions: tuple[str, ...], columns: str = THREAD_COLUMNS, more: str = ""
) -> str:
    """The threads of one owner or project that lie between two places of the list.

    Whole keys of the index are compared, and rows asked for in its order: what lies between two keys of one owner is
    that owner's. Told of the owner apart, PostgreSQL expects as few threads as most users have, and takes all of one
    who has many, to sort them for a page. Conditions that were not asked for are left out: with `$12 IS NULL OR …` it
    plans every page anew, half of a page's time.

    Args:
        key: the first column of the index, and what it is.
    """
    of = f"{key[0]}, archived, temporary, pinned, updated_at, id"
    more += "".join(f" AND {condition}".format(f"${n}") for n, condition in enumerate(conditions, _FIRST_CONDITION))
    return f"""
    SELECT {columns} FROM threads t
    WHERE ({of}) < ({key[1]}, $2, $3, $4, $5, $6) AND ({of}) > ({key[1]}, $2, $3, $7, $8, $9){more}
    ORDER BY {of.replace(",", f" {order},")} {order} LIMIT $10
    """  # noqa: S608


@lru_cache(maxsize=256)
def _list_query(order: str, conditions: tuple[str, ...], wanted: frozenset[str] | None) -> str:
    """Behind the columns of a thread, those of its project where any are wanted."""
    if not (of_project := _of_project(wanted)):
        return _rows_query(_OF_OWNER, order, conditions, thread_columns(wanted, whole=False))
    return f"""
    SELECT {thread_columns(wanted, whole=True)}, {project_columns(of_project | {"id"})}
    FROM ({_rows_query(_OF_OWNER, order, conditions, "*")}) t
    LEFT JOIN projects p ON p.id = t.project_id AND p.owner_id = $1
    ORDER BY t.pinned {order}, t.updated_at {order}, t.id {order}
    """  # noqa: S608 - only column names are put in


@lru_cache(maxsize=256)
def _paths_query(
    order: str,
    conditions: tuple[str, ...],
    wanted: frozenset[str] | None,
    along: str,
    of_messages: frozenset[str] | None,
) -> str:
    """What `_list_query` reads, behind the columns of each message of a page of the threads' active paths.

    Args:
        along: the order of the messages of a thread.
    """
    of_project = _of_project(wanted)
    more = f", {project_columns(of_project | {'id'})}" if of_project else ""
    return f"""
    SELECT {", ".join(message_columns(of_messages))}, {thread_columns(wanted, whole=bool(more))}{more}
    FROM ({_rows_query(_OF_OWNER, order, conditions, "*")}) t
    {"LEFT JOIN projects p ON p.id = t.project_id AND p.owner_id = $1" if more else ""}
    LEFT JOIN LATERAL ({path_rows(along, _FIRST_CONDITION + len(conditions))}) m ON true
    ORDER BY t.pinned {order}, t.updated_at {order}, t.id {order}, m.depth {along}
    """  # noqa: S608 - only column names are put in


def _of_project(wanted: frozenset[str] | None) -> frozenset[str]:
    prefix = "project."
    return frozenset(name.removeprefix(prefix) for name in wanted or () if name.startswith(prefix))


@lru_cache(maxsize=64)
def _project_query(order: str, conditions: tuple[str, ...]) -> str:
    """The projects' ids are behind the values of the conditions."""
    rows = _rows_query(("project_id", "wanted.id"), order, conditions, more=" AND owner_id = $1")
    return f"""
    SELECT t.* FROM unnest(${_FIRST_CONDITION + len(conditions)}::uuid[]) AS wanted (id) CROSS JOIN LATERAL ({rows}) t
    """  # noqa: S608


_OF_OWNER = ("owner_id", "$1")
_FIRST_CONDITION = 11
# Not ILIKE: where the locale is C, as in the embedded database, it knows the two cases of ASCII alone.
IN_TITLE = "search_lower(title) LIKE search_lower({})"
# Ends of the list that no row reaches.
_TOP = ThreadPosition(True, datetime(9999, 1, 1, tzinfo=UTC), UUID(int=2**128 - 1))
_BOTTOM = ThreadPosition(False, datetime(1, 1, 2, tzinfo=UTC), UUID(int=0))


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreadFilter:
    """Which threads to list: archived and temporary ones only where they are asked for, and then only they.

    `title` is any part of the title, in any case; `in_project` false lists those outside any project.
    """

    archived: bool = False
    temporary: bool = False
    pinned: bool | None = None
    title: str | None = None
    project_id: UUID | None = None
    in_project: bool | None = None


ALL_LISTED = ThreadFilter()


class Threads:
    """The viewer's threads: pinned first, then by last activity.

    Args:
        end_live: ends the answer that is being written in a thread, waiting for its end (see `Generations`).
    """

    def __init__(self, database: Database, *, end_live: Callable[[UUID], Awaitable[None]]) -> None:
        self._database = database
        self._end_live = end_live

    async def page(
        self,
        viewer: Viewer,
        request: PageRequest[ThreadPosition],
        listed: ThreadFilter = ALL_LISTED,
        wanted: frozenset[str] | None = None,
    ) -> Page[ThreadRecord]:
        """One page of the list.

        Args:
            wanted: the fields of the records that will be looked at, and, as `project.name`, those of their projects'
                records, which are read with them then, and `WHETHER_MORE`; the others may be None. None: all of the
                threads.

        Raises:
            BadUserInputError: the title to look for cannot be one.
            NotFoundError: no such project of the viewer's.
        """
        if listed.project_id is not None:
            async with self._database.acquire() as connection:
                if await connection.fetchval(_PROJECT, listed.project_id, viewer.id) is None:
                    raise NotFoundError("project", field="projectId")
            if listed.in_project is False:
                return Page.of(request, [])
            return (await self.pages_of_projects(viewer, [listed.project_id], request, listed))[0]
        conditions = _conditions(listed)
        query = _list_query(_order(request), tuple(conditions), wanted)
        arguments = _arguments(viewer, request, listed, request.rows(wanted), conditions)
        async with self._database.acquire() as connection:
            rows = await connection.fetch(query, *arguments, record_class=ThreadRecord.fetched)
        return Page.of(request, rows)

    async def page_with_messages(
        self,
        viewer: Viewer,
        request: PageRequest[ThreadPosition],
        listed: ThreadFilter,
        wanted: frozenset[str] | None,
        path: PageRequest[PathPosition],
        wanted_of_messages: frozenset[str] | None,
    ) -> tuple[Page[ThreadRecord], dict[UUID, Page[MessageRecord]]]:
        """One page of the list, and of each of its threads one page of the active path, in one query.

        Args:
            listed: names no project.
            wanted: as that of `page`; the id is among them.
            wanted_of_messages: as that of `Messages.pages`.

        Raises:
            BadUserInputError: the title to look for cannot be one.
        """
        conditions = _conditions(listed)
        of_messages = None if wanted_of_messages is None else wanted_of_messages | {"id"}
        width = len(message_columns(of_messages))
        along = "DESC" if path.backwards else "ASC"
        query = _paths_query(_order(request), tuple(conditions), wanted, along, of_messages)
        arguments = (
            *_arguments(viewer, request, listed, request.rows(wanted), conditions),
            *path_arguments(path, wanted_of_messages),
        )
        async with self._database.acquire() as connection:
            rows = await connection.fetch(query, *arguments, record_class=MessageRecord.fetched)
        threads: list[ThreadRecord] = []
        messages: dict[UUID, Page[MessageRecord]] = {}
        most = arguments[-1]
        at, end = 0, len(rows)
        while at < end:
            key = rows[at][width]
            # Most threads have more than a page: their rows need not be looked at one by one.
            behind = at + most
            if behind > end or rows[behind - 1][width] != key:
                behind = at + 1
                while behind < end and rows[behind][width] == key:
                    behind += 1
            threads.append(ThreadRecord.of(rows[at][width:]))
            # A thread without messages has a row all the same.
            messages[key] = Page.of(path, rows[at:behind] if rows[at][0] is not None else [])
            at = behind
        return Page.of(request, threads), messages

    async def pages_of_projects(
        self,
        viewer: Viewer,
        project_ids: Sequence[UUID],
        request: PageRequest[ThreadPosition],
        listed: ThreadFilter = ALL_LISTED,
    ) -> list[Page[ThreadRecord]]:
        """One page of each project's threads, in one query."""
        conditions = _conditions(listed)
        query = _project_query(_order(request), tuple(conditions))
        arguments = *_arguments(viewer, request, listed, request.limit + 1, conditions), project_ids
        async with self._database.acquire() as connection:
            rows = await connection.fetch(query, *arguments, record_class=ThreadRecord.fetched)
        by_project: dict[UUID | None, list[ThreadRecord]] = {project_id: [] for project_id in project_ids}
        for row in rows:
            by_project[row.project_id].append(row)
        return [Page.of(request, by_project[project_id]) for project_id in project_ids]

    async def find(self, viewer: Viewer, thread_id: UUID) -> ThreadRecord | None:
        """One thread, or None where there is none of the viewer's."""
        return (await self.find_many(viewer, [thread_id]))[0]

    async def find_many(self, viewer: Viewer, ids: Sequence[UUID]) -> list[ThreadRecord | None]:
        """Threads in the order of the ids; None where there is none of the viewer's."""
        async with self._database.acquire() as connection:
            rows = await connection.fetch(_FIND, ids, viewer.id, record_class=ThreadRecord.fetched)
        found = {row.id: row for row in rows}
        return [found.get(thread_id) for thread_id in ids]

    async def rename(self, viewer: Viewer, thread_id: UUID, title: str) -> ThreadRecord:
        """Give a thread the title its user chose; no model will overwrite it.

        Raises:
            BadUserInputError: the title is blank, too long or cannot be stored.
            NotFoundError: no such thread of the viewer's.
        """
        title = checked_line(title, field="title", max_bytes=MAX_TITLE_BYTES)
        return await self._change("title = $3, title_source = 'USER'", viewer, thread_id, title)

    async def pin(self, viewer: Viewer, thread_id: UUID, *, pinned: bool) -> ThreadRecord:
        """Move a thread to the top of the list, or back.

        Raises:
            NotFoundError: no such thread of the viewer's.
        """
        return await self._change("pinned = $3", viewer, thread_id, pinned)

    async def archive(self, viewer: Viewer, thread_id: UUID, *, archived: bool) -> ThreadRecord:
        """Take a thread out of the list, or back into it.

        Raises:
            NotFoundError: no such thread of the viewer's.
        """
        return await self._change("archived = $3", viewer, thread_id, archived)

    async def move(self, viewer: Viewer, thread_id: UUID, project_id: UUID | None) -> ThreadRecord:
        """Move a thread into a project, or out of any (None).

        Raises:
            NotFoundError: no such thread, or no such project, of the viewer's.
        """
        async with self._database.transaction() as connection:
            # The thread, then both projects in the order of their ids: as deletions of threads and of projects lock.
            thread = await connection.fetchrow(_LOCK, thread_id, viewer.id)
            if thread is None:
                raise NotFoundError("thread", field="threadId")
            locked = await connection.fetch(_LOCK_PROJECTS, [thread["project_id"], project_id], viewer.id)
            if project_id is not None and project_id not in {row["id"] for row in locked}:
                raise NotFoundError("project", field="projectId")
            row = await connection.fetchrow(_MOVE, thread_id, project_id)
        return ThreadRecord.from_row(row)

    async def set_expiry(self, viewer: Viewer, thread_id: UUID, expires_at: datetime | None) -> ThreadRecord:
        """Have a thread deleted at a time, or kept (None).

        Raises:
            BadUserInputError: the time is not in the future; or None for a temporary thread, which always expires.
            NotFoundError: no such thread of the viewer's.
        """
        if expires_at is not None:
            expires_at = checked_expiry(expires_at)
        else:
            record = await self.find(viewer, thread_id)
            if record is not None and record.temporary:
                raise BadUserInputError("A temporary thread always expires.", field="expiresAt")
        return await self._change("expires_at = $3", viewer, thread_id, expires_at)

    async def delete(self, viewer: Viewer, thread_id: UUID) -> None:
        """Delete a thread and all that hangs on it; a live answer is ended first. What was used stays counted.

        Raises:
            NotFoundError: no such thread of the viewer's.
        """
        if await self.find(viewer, thread_id) is None:
            raise NotFoundError("thread", field="threadId")
        await self._end_live(thread_id)
        async with self._database.transaction() as connection:
            if await connection.fetchrow(_LOCK, thread_id, viewer.id) is None:
                raise NotFoundError("thread", field="threadId")
            await delete_threads(connection, [thread_id])
        # An answer that began since then has lost its stream row; this makes it notice at once.
        await self._end_live(thread_id)

    async def _change(self, assignment: str, viewer: Viewer, thread_id: UUID, value: Any) -> ThreadRecord:
        async with self._database.acquire() as connection:
            row = await connection.fetchrow(
                f"UPDATE threads SET {assignment} WHERE id = $1 AND owner_id = $2 RETURNING {THREAD_COLUMNS}",  # noqa: S608
                thread_id,
                viewer.id,
                value,
            )
        if row is None:
            raise NotFoundError("thread", field="threadId")
        return ThreadRecord.from_row(row)


def _arguments(
    viewer: Viewer,
    request: PageRequest[ThreadPosition],
    listed: ThreadFilter,
    rows: int,
    conditions: Mapping[str, Any],
) -> tuple[Any, ...]:
    above, below = request.after or _TOP, request.before or _BOTTOM
    return (
        viewer.id,
        *(listed.archived, listed.temporary),
        *(above.pinned, above.updated_at, above.id),
        *(below.pinned, below.updated_at, below.id),
        rows,
        *conditions.values(),
    )


def _order(request: PageRequest[ThreadPosition]) -> str:
    return "ASC" if request.backwards else "DESC"


def _conditions(listed: ThreadFilter) -> dict[str, Any]:
    """What a thread has to fulfil besides, each with the value for its braces."""
    conditions: dict[str, Any] = {}
    if listed.pinned is not None:
        conditions["pinned = {}"] = listed.pinned
    if listed.title is not None:
        title = checked_text(listed.title, field="title", max_bytes=MAX_TITLE_BYTES)
        conditions[IN_TITLE] = f"%{escaped_like(title)}%"
    if listed.in_project is not None:
        conditions["(project_id IS NOT NULL) = {}"] = listed.in_project
    return conditions
