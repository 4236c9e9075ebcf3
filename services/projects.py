"""Projects of a viewer: folders of threads, with what turns in them are told and asked of."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields
from functools import cache
from typing import TYPE_CHECKING
from uuid import UUID

import asyncpg

from models.database import Database
from models.ids import new_id
from models.records import PROJECT_COLUMNS, ProjectRecord
from services import thread_deletion
from services.errors import BadUserInputError, NotFoundError, UnauthenticatedError
from services.input import checked_line, checked_text, escaped_like
from services.models import Models
from services.paging import FIRST_ID, LAST_ID, AgePosition, Page, PageRequest
from services.viewer import Viewer

if TYPE_CHECKING:
    from asyncpg import Connection

MAX_NAME_BYTES = 400
MAX_DESCRIPTION_BYTES = 4_000
MAX_ICON_BYTES = 64
MAX_PROMPT_BYTES = 32_768
# More threads than these are not told one by one when their project ends: who follows the feed is told to fetch anew.
MAX_TOLD_THREADS = 1_000
_DELETED_AT_ONCE = 100
# One statement may move the threads of years.
_STATEMENT_SECONDS = 50.0

_FIND = f"SELECT {PROJECT_COLUMNS} FROM projects WHERE id = ANY($1::uuid[]) AND owner_id = $2"  # noqa: S608
_ADD = f"""
INSERT INTO projects (id, owner_id, name, description, color, icon, prompt, default_model)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8) RETURNING {PROJECT_COLUMNS}
"""  # noqa: S608
_LOCK_THREADS = "SELECT id FROM threads WHERE project_id = $1 AND owner_id = $2 ORDER BY id FOR UPDATE"
_LIVE_THREADS = """
SELECT t.id FROM threads t JOIN messages m ON m.thread_id = t.id AND m.status = 'STREAMING'
WHERE t.project_id = $1 AND t.owner_id = $2
"""


@cache
def _list_query(order: str, *, named: bool) -> str:
    # Not ILIKE: see `IN_TITLE` in services/threads.py.
    name = " AND search_lower(name) LIKE search_lower($6)" if named else ""
    return f"""
    SELECT {PROJECT_COLUMNS} FROM projects
    WHERE owner_id = $1 AND id < $2 AND id > $3 AND archived = $4{name}
    ORDER BY id {order} LIMIT $5
    """  # noqa: S608


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectValues:
    """What a user sets of a project. In an update, a field that is not among the given ones stays as it is."""

    name: str | None = None
    description: str | None = None
    color: str | None = None
    icon: str | None = None
    prompt: str | None = None
    default_model: str | None = None


_VALUES = tuple(field.name for field in fields(ProjectValues))


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectFilter:
    """Which projects to list: `name` is any part of the name, in any case."""

    archived: bool = False
    name: str | None = None


class Projects:
    """The viewer's projects: newest first.

    Args:
        end_live: ends the answer that is being written in a thread, waiting for its end (see `Generations`).
    """

    def __init__(self, database: Database, models: Models, *, end_live: Callable[[UUID], Awaitable[None]]) -> None:
        self._database = database
        self._models = models
        self._end_live = end_live

    async def page(
        self, viewer: Viewer, request: PageRequest[AgePosition], wanted: ProjectFilter
    ) -> Page[ProjectRecord]:
        """One page of the list.

        Raises:
            BadUserInputError: the name to look for cannot be one.
        """
        named = []
        if wanted.name is not None:
            named = [f"%{escaped_like(checked_text(wanted.name, field='name', max_bytes=MAX_NAME_BYTES))}%"]
        async with self._database.acquire() as connection:
            rows = await connection.fetch(
                _list_query("ASC" if request.backwards else "DESC", named=bool(named)),
                viewer.id,
                request.after.id if request.after else LAST_ID,
                request.before.id if request.before else FIRST_ID,
                wanted.archived,
                request.limit + 1,
                *named,
                record_class=ProjectRecord.fetched,
            )
        return Page.of(request, rows)

    async def find(self, viewer: Viewer, project_id: UUID) -> ProjectRecord | None:
        """One project, or None where there is none of the viewer's."""
        return (await self.find_many(viewer, [project_id]))[0]

    async def find_many(self, viewer: Viewer, ids: Sequence[UUID]) -> list[ProjectRecord | None]:
        """Projects in the order of the ids; None where there is none of the viewer's."""
        async with self._database.acquire() as connection:
            rows = await connection.fetch(_FIND, ids, viewer.id, record_class=ProjectRecord.fetched)
        found = {row.id: row for row in rows}
        return [found.get(project_id) for project_id in ids]

    async def create(self, viewer: Viewer, values: ProjectValues) -> ProjectRecord:
        """Make a project.

        Raises:
            BadUserInputError: a value cannot be accepted.
            ModelUnavailableError: the default model is not offered.
        """
        checked = await self._checked(viewer, values, set(_VALUES))
        try:
            async with self._database.acquire() as connection:
                row = await connection.fetchrow(_ADD, new_id(), viewer.id, *(checked[name] for name in _VALUES))
        except asyncpg.ForeignKeyViolationError as error:
            raise UnauthenticatedError("The account of this token does not exist any more.") from error
        return ProjectRecord.from_row(row)

    async def update(self, viewer: Viewer, project_id: UUID, values: ProjectValues, given: set[str]) -> ProjectRecord:
        """Change the given fields and no other.

        Args:
            given: names of the fields of `values` to set; None clears all but the name.

        Raises:
            as `create`; NotFoundError: no such project of the viewer's.
        """
        checked = await self._checked(viewer, values, given)
        assignments = [f"{name} = ${place}" for place, name in enumerate(checked, 3)]
        return await self._change(viewer, project_id, assignments, list(checked.values()))

    async def archive(self, viewer: Viewer, project_id: UUID, *, archived: bool) -> ProjectRecord:
        """Take a project out of the list, or back into it. Its threads stay as they are.

        Raises:
            NotFoundError: no such project of the viewer's.
        """
        return await self._change(viewer, project_id, ["archived = $3"], [archived])

    async def delete(self, viewer: Viewer, project_id: UUID, *, delete_threads: bool) -> None:
        """Delete a project; its threads are moved out of it, or deleted with all that hangs on them.

        All or nothing: in one transaction. Answers being written in threads that go are ended first.

        Raises:
            NotFoundError: no such project of the viewer's.
        """
        live: set[UUID] = set()
        if delete_threads:
            async with self._database.acquire() as connection:
                live = {row["id"] for row in await connection.fetch(_LIVE_THREADS, project_id, viewer.id)}
            for thread_id in live:
                await self._end_live(thread_id)
        async with self._database.transaction() as connection:
            # Threads before their project, as every move locks them.
            rows = await connection.fetch(_LOCK_THREADS, project_id, viewer.id, timeout=_STATEMENT_SECONDS)
            thread_ids = [row["id"] for row in rows]
            async with _telling(connection, viewer, len(thread_ids)):
                # The foreign key moves the threads out: of a project that is there each would write the count anew.
                deleted = await connection.fetchval(
                    "DELETE FROM projects WHERE id = $1 AND owner_id = $2 RETURNING id",
                    *(project_id, viewer.id),
                    timeout=_STATEMENT_SECONDS,
                )
                if deleted is None:
                    raise NotFoundError("project", field="projectId")
                if delete_threads:
                    for start in range(0, len(thread_ids), _DELETED_AT_ONCE):
                        some = thread_ids[start : start + _DELETED_AT_ONCE]
                        await thread_deletion.delete_threads(connection, some)
        for thread_id in live:
            # An answer that began since then has lost its stream row; this makes it notice at once.
            await self._end_live(thread_id)

    async def _checked(self, viewer: Viewer, values: ProjectValues, given: set[str]) -> dict[str, str | None]:
        checked: dict[str, str | None] = {}
        if "name" in given:
            if values.name is None:
                raise BadUserInputError("A project has a name.", field="name")
            checked["name"] = checked_line(values.name, field="name", max_bytes=MAX_NAME_BYTES)
        for name, limit in (("description", MAX_DESCRIPTION_BYTES), ("prompt", MAX_PROMPT_BYTES)):
            if name in given:
                text = getattr(values, name)
                checked[name] = None if text is None else checked_text(text, field=name, max_bytes=limit)
        if "icon" in given:
            icon = values.icon
            checked["icon"] = None if icon is None else checked_line(icon, field="icon", max_bytes=MAX_ICON_BYTES)
        if "color" in given:
            checked["color"] = values.color
        if "default_model" in given:
            await self._models.check(viewer, values.default_model, field="defaultModelId")
            checked["default_model"] = values.default_model
        return checked

    async def _change(
        self, viewer: Viewer, project_id: UUID, assignments: list[str], values: list[object]
    ) -> ProjectRecord:
        async with self._database.acquire() as connection:
            row = await connection.fetchrow(
                f"UPDATE projects SET {', '.join([*assignments, 'updated_at = now()'])} "  # noqa: S608 - our own names
                f"WHERE id = $1 AND owner_id = $2 RETURNING {PROJECT_COLUMNS}",
                project_id,
                viewer.id,
                *values,
            )
        if row is None:
            raise NotFoundError("project", field="projectId")
        return ProjectRecord.from_row(row)


@asynccontextmanager
async def _telling(connection: Connection, viewer: Viewer, threads: int) -> AsyncIterator[None]:
    """For the last statements of a transaction, which change so many threads: tells of a great many by one reset."""
    if threads <= MAX_TOLD_THREADS:
        yield
        return
    await connection.execute("SET LOCAL threadgraph.quiet = 'on'")
    yield
    # The triggers that would tell of every row run now, while it is quiet, and not at the commit.
    await connection.execute("SET CONSTRAINTS ALL IMMEDIATE", timeout=_STATEMENT_SECONDS)
    await connection.execute("SET LOCAL threadgraph.quiet = 'off'")
    await connection.execute("SELECT record_change($1, 'RESET', NULL)", viewer.id)
