"""Imports: the file of an export, made into rows of the viewer's (docs/account-data.md).

The file is kept in a nameless file of the data folder while it is read, twice: first every line is checked, with no
database in it, then everything is written in one transaction. A file that is refused has changed nothing.
"""

from __future__ import annotations

import asyncio
import secrets
import tempfile
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from uuid import UUID

import asyncpg
import orjson

from models.database import Database, DatabaseUnavailableError
from models.parts import FilePart, Part, parts_from_json, parts_to_json
from services.attachments import Attachments
from services.custom_providers import MAX_MODELS, MAX_PROVIDERS, CustomProviders
from services.errors import (
    ImportRefusedError,
    NotFoundError,
    PayloadTooLargeError,
    UnauthenticatedError,
    UnavailableError,
)
from services.export_format import (
    ATTACHMENTS,
    CUSTOM_MODELS,
    CUSTOM_PROVIDERS,
    FORMAT,
    MANIFEST,
    MESSAGES,
    SETTINGS,
    SHAPES,
    SHARE_MESSAGES,
    SHARES,
    THREADS,
    USAGE,
    VERSION,
    Field,
    Id,
    LineError,
    Refers,
    Shape,
    bytes_name,
    member_name,
)
from services.messages import MAX_SIBLINGS
from services.viewer import Viewer

if TYPE_CHECKING:
    from asyncpg import Connection

AT_ONCE = 2
MAX_ROWS = 1_000_000
MAX_DEPTH = 100_000
MAX_LINE_BYTES = 32 * 1024 * 1024
# Text is rarely packed to less than a tenth; a file that grows more than this is made to.
MAX_GROWTH = 16
_MAX_MANIFEST_BYTES = 65_536
_MAX_DIRECTORY_BYTES = 8 * 1024 * 1024
_TOTAL_SECONDS = 1_800.0
_BATCH_ROWS, _BATCH_BYTES = 1_000, 1024 * 1024
_WRITE_BYTES = 1024 * 1024
# Two imports of one file at the same time have this many random bits between their ids, a row.
_ORDER_BITS, _RANDOM_BITS = 20, 54
# The most that an account has cost in all behind an import. Sums are of 64 bits, and one that does not fit would keep
# every later answer from its end: half of the room is left for those.
_MAX_TOTAL_COST = 2**62
_GONE = "The account of this token does not exist any more."

_LIVING = "SELECT true FROM users WHERE id = $1 AND deleted_at IS NULL"
# The feed is told once, at the end. Deferred triggers run now, while it is quiet, and not at the commit.
_QUIET = "SET LOCAL threadgraph.quiet = 'on'; SET CONSTRAINTS ALL IMMEDIATE"
_TELL = "SELECT set_config('threadgraph.quiet', 'off', true), record_change($1, 'RESET', NULL)"
_DATE_FILES = """
UPDATE attachments SET created_at = given.made_at FROM unnest($1::uuid[], $2::timestamptz[]) AS given (id, made_at)
WHERE attachments.id = given.id AND owner_id = $3
"""
_TOTAL_COST = "SELECT coalesce(sum(cost_micros), 0) FROM usage_quarters WHERE owner_id = $1"
_LINK_FILES = "UPDATE attachments SET state = 'LINKED', expires_at = NULL WHERE id = ANY($1::uuid[])"
# What the account has chosen already stays.
_ADD_SETTINGS = """
INSERT INTO settings AS own
    (id, owner_id, default_model, title_model, user_name, user_traits, user_context, created_at, updated_at)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)
ON CONFLICT (owner_id) DO UPDATE SET
    default_model = coalesce(own.default_model, excluded.default_model),
    title_model = coalesce(own.title_model, excluded.title_model),
    user_name = coalesce(own.user_name, excluded.user_name),
    user_traits = coalesce(own.user_traits, excluded.user_traits),
    user_context = coalesce(own.user_context, excluded.user_context)
"""


class Imports:
    """Takes in exports for viewers.

    Args:
        folder: where a file is kept while it is read; made where it is missing.
        max_bytes: longest file.
    """

    def __init__(
        self,
        database: Database,
        attachments: Attachments,
        custom_providers: CustomProviders,
        *,
        folder: Path,
        max_bytes: int,
    ) -> None:
        self._database = database
        self._attachments = attachments
        self._custom_providers = custom_providers
        self._folder = folder
        self._max_bytes = max_bytes
        self._running = 0

    async def take(self, viewer: Viewer, chunks: AsyncIterable[bytes], *, size: int | None = None) -> dict[str, int]:
        """Add everything in a file to the viewer's account, or nothing.

        Args:
            chunks: the file as it comes.
            size: how long it is said to be, where it is said.

        Returns:
            How many rows of each member were added.

        Raises:
            ImportRefusedError: the file is not an export, or not whole.
            PayloadTooLargeError: it is longer than the limit.
            UnauthenticatedError: the account was deleted.
            UnavailableError: too many imports run, or there is no room for the file.
        """
        if size is not None and size > self._max_bytes:
            raise self._too_large()
        if self._running >= AT_ONCE:
            raise UnavailableError("Too many imports are running; try again.", retry_after=30)
        self._running += 1
        try:
            async with self._database.acquire() as connection:
                living = await connection.fetchval(_LIVING, viewer.id)
            if living is None:
                raise UnauthenticatedError(_GONE)
            return await self._take(viewer, chunks)
        except TimeoutError as error:
            raise UnavailableError("The import took too long.", retry_after=60) from error
        except OSError as error:
            raise UnavailableError("There is no room for the file on this server.", retry_after=60) from error
        finally:
            self._running -= 1

    async def _take(self, viewer: Viewer, chunks: AsyncIterable[bytes]) -> dict[str, int]:
        # It has no name, so nothing of it is left, however the process ends.
        with await asyncio.to_thread(self._nameless) as file:
            await self._receive(file, chunks)
            async with asyncio.timeout(_TOTAL_SECONDS):
                source = await asyncio.to_thread(_Source, file, self._max_bytes * MAX_GROWTH)
                ids = _Ids()
                check = _Check(ids)
                for shape in SHAPES:
                    await _each(source.batches(shape), partial(check.take, shape))
                    check.end(shape)
                counts = source.checked_counts()
                source.check_files()
                providers = await self._custom_providers.acceptable(
                    await asyncio.to_thread(source.rows, CUSTOM_PROVIDERS)
                )
                stored: dict[UUID, datetime] = {}
                try:
                    await self._store(viewer, source, ids, stored)
                    counts |= await self._write(viewer, source, ids, stored, providers)
                except BaseException:
                    await asyncio.shield(self._discard(viewer, stored))
                    raise
        return counts | {ATTACHMENTS.name: len(stored)}

    def _nameless(self) -> IO[bytes]:
        self._folder.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryFile(dir=self._folder)

    async def _receive(self, file: IO[bytes], chunks: AsyncIterable[bytes]) -> None:
        size, piece = 0, bytearray()
        async for chunk in chunks:
            size += len(chunk)
            if size > self._max_bytes:
                raise self._too_large()
            piece += chunk
            if len(piece) >= _WRITE_BYTES:
                await asyncio.to_thread(file.write, bytes(piece))
                piece.clear()
        await asyncio.to_thread(file.write, bytes(piece))
        await asyncio.to_thread(file.flush)

    async def _store(self, viewer: Viewer, source: _Source, ids: _Ids, stored: dict[UUID, datetime]) -> None:
        """Take in the files, each like an upload: nothing refers to them yet, so they would go by themselves."""
        for batch in source.batches(ATTACHMENTS):
            for line in batch:
                row = line.row
                if not source.has_file(row["id"]):
                    continue
                async with aclosing(source.file(row["id"])) as chunks:
                    record = await self._attachments.store(
                        viewer, chunks, name=row["name"], content_type=row["content_type"], size=row["size"]
                    )
                stored[record.id] = row["created_at"]
                ids.set("attachment", row["id"], record.id)

    async def _discard(self, viewer: Viewer, stored: Iterable[UUID]) -> None:
        for attachment_id in stored:
            # What cannot be deleted now is swept, as any file that no message refers to.
            with suppress(NotFoundError, DatabaseUnavailableError):
                await self._attachments.delete(viewer, attachment_id)

    async def _write(
        self,
        viewer: Viewer,
        source: _Source,
        ids: _Ids,
        stored: dict[UUID, datetime],
        providers: Sequence[Mapping[str, Any]],
    ) -> dict[str, int]:
        """Write everything; how many rows of those were added that need not be as many as lines."""
        models = await asyncio.to_thread(source.rows, CUSTOM_MODELS)
        try:
            async with self._database.session() as connection, connection.transaction():
                await connection.execute(_QUIET)
                await connection.execute(_DATE_FILES, list(stored), list(stored.values()), viewer.id)
                for shape in SHAPES:
                    if shape in (ATTACHMENTS, CUSTOM_PROVIDERS, CUSTOM_MODELS):
                        continue
                    columns = ids.columns(shape)
                    batches = (ids.translated(shape, batch, viewer.id) for batch in source.batches(shape))
                    while rows := await asyncio.to_thread(next, batches, None):
                        if shape is SETTINGS:
                            await connection.executemany(_ADD_SETTINGS, rows)
                        else:
                            await connection.copy_records_to_table(shape.table, records=rows, columns=columns)
                        if shape is MESSAGES and stored:
                            await _link(connection, columns, rows, stored)
                added = await self._custom_providers.add(connection, viewer.id, providers, models)
                if await connection.fetchval(_TOTAL_COST, viewer.id) > _MAX_TOTAL_COST:
                    raise _too_dear()
                # The last statement: its lock must come behind all others (see `record_change` in the migrations).
                await connection.execute(_TELL, viewer.id)
        except asyncpg.ForeignKeyViolationError as error:
            raise UnauthenticatedError(_GONE) from error
        except asyncpg.NumericValueOutOfRangeError as error:
            # All values fit; it is the sums of a quarter of an hour that do not.
            raise _too_dear() from error
        return dict(zip((CUSTOM_PROVIDERS.name, CUSTOM_MODELS.name), added, strict=True))

    def _too_large(self) -> PayloadTooLargeError:
        return PayloadTooLargeError(f"The file is longer than {self._max_bytes} bytes.")


def _too_dear() -> ImportRefusedError:
    return ImportRefusedError("What it costs in all is more than can be counted.", member=member_name(USAGE, 1))


@dataclass(slots=True)
class _Line:
    """A line that has the form of its member: where it stands, and its values by column."""

    member: str
    number: int
    row: dict[str, Any]

    def refused(self, message: str) -> ImportRefusedError:
        return ImportRefusedError(message, member=self.member, line=self.number)


async def _each(batches: Iterator[list[_Line]], work: Callable[[list[_Line]], None]) -> None:
    """Do the work on each batch in a thread, and let others have the processor in between."""

    def step() -> bool:
        batch = next(batches, None)
        if batch is not None:
            work(batch)
        return batch is not None

    while await asyncio.to_thread(step):
        pass


async def _link(
    connection: Connection, columns: tuple[str, ...], rows: list[tuple[Any, ...]], stored: dict[UUID, datetime]
) -> None:
    """Write down which of the files messages refer to."""
    place, parts = columns.index("id"), columns.index("parts")
    links = {
        (row[place], part.attachment_id)
        for row in rows
        if '"attachmentId"' in row[parts]
        for part in parts_from_json(row[parts])
        if isinstance(part, FilePart) and part.attachment_id in stored
    }
    if links:
        linked = sorted({attachment_id for _, attachment_id in links})
        await connection.execute(_LINK_FILES, linked)
        await connection.copy_records_to_table(
            "attachment_links", records=sorted(links), columns=("message_id", "attachment_id")
        )


class _DirectoryLimit:
    """The file as `zipfile` reads it, which takes in the whole directory at once: not more of it than this."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size if 0 <= size <= _MAX_DIRECTORY_BYTES else _MAX_DIRECTORY_BYTES + 1)
        if len(data) > _MAX_DIRECTORY_BYTES:
            raise ImportRefusedError("The zip has too many members.")
        return data


class _Source:
    """The members of a zip, line by line. Used by one thread at a time."""

    def __init__(self, file: IO[bytes], max_bytes: int) -> None:
        """Look at what there is, without unpacking more than the manifest.

        Raises:
            ImportRefusedError: it is no export that this version reads.
        """
        try:
            self._zip = zipfile.ZipFile(_DirectoryLimit(file))
        except (zipfile.BadZipFile, NotImplementedError, ValueError, UnicodeDecodeError) as error:
            raise ImportRefusedError("This is not a zip file, or not all of one.") from error
        self._counts: Counter[str] = Counter()
        self._announced: dict[str, Any] = {}
        self._version = VERSION
        members = self._zip.infolist()
        names = [member.filename for member in members]
        if len(set(names)) < len(names):
            raise ImportRefusedError("The zip has two members of one name.")
        for member in members:
            if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ImportRefusedError("It is encrypted, or packed in a way that exports are not.", member=MANIFEST)
        if sum(member.file_size for member in members) > max_bytes:
            raise PayloadTooLargeError(f"The file is longer than {max_bytes} bytes when it is unpacked.")
        self._check_manifest()
        known = {MANIFEST} | {
            member for shape in SHAPES if shape.since <= self._version for member in self._members(shape)
        }
        self._files = {name for name in names if name.startswith("attachments/")}
        for name in names:
            if name not in known and name not in self._files:
                raise ImportRefusedError("The zip has a member that is not of this version of the format.")

    def _check_manifest(self) -> None:
        try:
            with self._zip.open(MANIFEST) as file:
                manifest = orjson.loads(file.read(_MAX_MANIFEST_BYTES))
        except (KeyError, *_BROKEN, orjson.JSONDecodeError) as error:
            raise ImportRefusedError("This is not an export: it has no manifest.", member=MANIFEST) from error
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise ImportRefusedError("This is not an export of an account.", member=MANIFEST)
        version = manifest.get("version")
        if not isinstance(version, int) or not 1 <= version <= VERSION:
            raise ImportRefusedError(f"This server reads the format up to version {VERSION}.", member=MANIFEST)
        counts = manifest.get("counts")
        if not isinstance(counts, dict) or counts.keys() != {s.name for s in SHAPES if s.since <= version}:
            raise ImportRefusedError("The counts are not there.", member=MANIFEST)
        self._version, self._announced = version, counts

    def _members(self, shape: Shape) -> Iterator[str]:
        number = 1
        while (name := member_name(shape, number)) in self._zip.NameToInfo:
            yield name
            number += 1

    def batches(self, shape: Shape) -> Iterator[list[_Line]]:
        """The lines of all members of a shape, some at a time.

        Raises:
            ImportRefusedError: a line is not what it should be.
        """
        self._counts[shape.name] = 0
        batch: list[_Line] = []
        size = 0
        for name in self._members(shape):
            try:
                with self._zip.open(name) as file:
                    for number, line in enumerate(_lines(file, name), 1):
                        batch.append(self._line(shape, name, number, line))
                        size += len(line)
                        if len(batch) >= _BATCH_ROWS or size >= _BATCH_BYTES:
                            yield batch
                            batch, size = [], 0
            except _BROKEN as error:
                raise ImportRefusedError("It is damaged.", member=name) from error
        if batch:
            yield batch

    def rows(self, shape: Shape) -> list[dict[str, Any]]:
        """All rows of a shape that has few."""
        return [line.row for batch in self.batches(shape) for line in batch]

    def _line(self, shape: Shape, member: str, number: int, line: bytes) -> _Line:
        self._counts[shape.name] += 1
        if sum(self._counts.values()) > MAX_ROWS:
            raise PayloadTooLargeError(f"The file has more than {MAX_ROWS} lines.")
        try:
            return _Line(member, number, shape.row(line, self._version))
        except LineError as error:
            raise ImportRefusedError(str(error), member=member, line=number) from error

    def has_file(self, attachment_id: UUID) -> bool:
        """Whether the bytes of an attachment are there."""
        return bytes_name(attachment_id) in self._files

    async def file(self, attachment_id: UUID) -> AsyncGenerator[bytes, None]:
        """The bytes of an attachment."""
        name = bytes_name(attachment_id)
        try:
            with self._zip.open(name) as file:
                while piece := await asyncio.to_thread(file.read, _WRITE_BYTES):
                    yield piece
        except _BROKEN as error:
            raise ImportRefusedError("It is damaged.", member=name) from error

    def check_files(self) -> None:
        """Look whether all files are of attachments.

        Raises:
            ImportRefusedError: one is not.
        """
        listed = {bytes_name(line.row["id"]) for batch in self.batches(ATTACHMENTS) for line in batch}
        if not self._files <= listed:
            raise ImportRefusedError("The zip has a file that is no attachment's.", member=member_name(ATTACHMENTS, 1))

    def checked_counts(self) -> dict[str, int]:
        """How many lines each shape has.

        Raises:
            ImportRefusedError: they are not as many as there were.
        """
        for shape in SHAPES:
            if self._counts[shape.name] != self._announced.get(shape.name, 0):
                raise ImportRefusedError("It has not as many lines as the manifest says.", member=member_name(shape, 1))
        return dict(self._counts)


_BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)


def _lines(file: IO[bytes], member: str) -> Iterator[bytes]:
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise ImportRefusedError(f"It is longer than {MAX_LINE_BYTES} bytes.", member=member, line=number)
        yield line


class _Ids:
    """The new ids of what is imported. In the order of the old ones, because lists and versions are ordered by id.

    A new id has the old one's time, then its place in the file, then random bits. Kept as numbers: there may be a
    million.
    """

    def __init__(self) -> None:
        self._new: dict[str, dict[int, int]] = {}
        self._made = 0

    def add(self, noun: str, old: UUID) -> bool:
        """Make a new id for one that the file defines; False where it did before."""
        of_noun = self._new.setdefault(noun, {})
        if old.int in of_noun:
            return False
        of_noun[old.int] = self._make(old)
        return True

    def set(self, noun: str, old: UUID, new: UUID) -> None:
        """Give an old id a new one that was made elsewhere."""
        self._new[noun][old.int] = new.int

    def has(self, noun: str, old: UUID) -> bool:
        """Whether the file has defined it."""
        return old.int in self._new.get(noun, {})

    def new(self, noun: str, old: UUID) -> UUID:
        """The new id of an old one; one of its own for what is not in the file, the same each time."""
        of_noun = self._new.setdefault(noun, {})
        if old.int not in of_noun:
            of_noun[old.int] = self._make(old)
        return UUID(int=of_noun[old.int])

    def columns(self, shape: Shape) -> tuple[str, ...]:
        """The columns of `translated`."""
        if shape is SHARE_MESSAGES:
            return shape.columns
        own = () if shape.columns[0] == "id" else ("id",)
        return (*own, "owner_id", *shape.columns)

    def translated(self, shape: Shape, lines: list[_Line], owner_id: UUID) -> list[tuple[Any, ...]]:
        """Rows with new ids and their owner."""
        nouns = {entry.column: entry.kind.noun for entry in shape.fields if isinstance(entry.kind, Id)}
        rows = []
        for line in lines:
            row = line.row
            for column, noun in nouns.items():
                if row[column] is not None:
                    row[column] = self.new(noun, row[column])
            if shape is MESSAGES and '"attachmentId"' in row["parts"]:
                row["parts"] = parts_to_json([self._with_new_file(part) for part in parts_from_json(row["parts"])])
            if shape is SHARES:
                row["token"] = secrets.token_urlsafe(32)
            values = tuple(row.values())
            if shape is SHARE_MESSAGES:
                rows.append(values)
            elif shape.columns[0] == "id":
                rows.append((owner_id, *values))
            else:
                rows.append((UUID(int=self._make(None)), owner_id, *values))
        return rows

    def _with_new_file(self, part: Part) -> Part:
        if not isinstance(part, FilePart):
            return part
        return replace(part, attachment_id=self.new("attachment", part.attachment_id))

    def _make(self, old: UUID | None) -> int:
        milliseconds = old.int >> 80 if old is not None and old.version == 7 else time.time_ns() // 1_000_000
        self._made += 1
        bits = (self._made % 2**_ORDER_BITS) << _RANDOM_BITS | secrets.randbits(_RANDOM_BITS)
        new: int = (milliseconds << 80) | (0x7 << 76) | (bits >> 62 << 64) | (0b10 << 62) | (bits & (2**62 - 1))
        return new


@dataclass(slots=True)
class _Node:
    """What is remembered of a message until its thread ends."""

    member: str
    line: int
    parent: UUID | None
    depth: int
    active: bool
    remembers: UUID | None
    children: int = 0


class _Check:
    """Whether lines fit together; gives everything that the file defines its new id."""

    def __init__(self, ids: _Ids) -> None:
        self._ids = ids
        self._once: set[object] = set()
        self._lines: Counter[str] = Counter()
        self._thread: UUID | None = None
        self._tree: dict[UUID, _Node] = {}
        self._roots = 0
        self._active_depths: set[int] = set()

    def take(self, shape: Shape, lines: list[_Line]) -> None:
        """Look at the next lines.

        Raises:
            ImportRefusedError: one contradicts another.
        """
        references = [entry for entry in shape.fields if isinstance(entry.kind, Id)]
        for line in lines:
            for entry in references:
                self._refer(shape, entry, line)
            row = line.row
            if shape is SETTINGS:
                self._only_once(line, "settings")
            elif shape is CUSTOM_PROVIDERS:
                self._only_once(line, ("provider", row["slug"]))
                self._few(line, shape, MAX_PROVIDERS)
            elif shape is CUSTOM_MODELS:
                self._only_once(line, ("model", row["provider"], row["vendor_name"]))
                self._few(line, shape, MAX_MODELS)
            elif shape is THREADS and row["temporary"] and row["expires_at"] is None:
                raise line.refused("A temporary thread has an expiresAt.")
            elif shape is MESSAGES:
                self._message(line)
            elif shape is SHARE_MESSAGES:
                self._only_once(line, (row["share_id"].int, row["position"]))
            elif shape is USAGE:
                self._only_once(line, (row["message_id"].int, row["kind"]))

    def end(self, shape: Shape) -> None:
        """All lines of the shape have been taken.

        Raises:
            ImportRefusedError: something is missing.
        """
        if shape is MESSAGES:
            self._end_thread()

    def _refer(self, shape: Shape, entry: Field, line: _Line) -> None:
        kind, value = entry.kind, line.row[entry.column]
        assert isinstance(kind, Id)
        if value is None or kind.refers is Refers.FREE or (shape is MESSAGES and entry.column in _WITHIN_TREE):
            return
        if kind.refers is Refers.OWN:
            if not self._ids.add(kind.noun, value):
                raise line.refused(f"This {kind.noun} stands in the file twice.")
        elif not self._ids.has(kind.noun, value):
            raise line.refused(f"{entry.name} is the id of a {kind.noun} that is not in the file.")

    def _few(self, line: _Line, shape: Shape, most: int) -> None:
        self._lines[shape.name] += 1
        if self._lines[shape.name] > most:
            raise line.refused(f"There are at most {most} of these.")

    def _only_once(self, line: _Line, key: object) -> None:
        if key in self._once:
            raise line.refused("This stands in the file twice.")
        self._once.add(key)

    def _message(self, line: _Line) -> None:
        row = line.row
        if row["thread_id"] != self._thread:
            self._end_thread()
            self._thread = row["thread_id"]
            if self._thread in self._once:
                raise line.refused("The messages of a thread must stand together.")
            self._once.add(self._thread)
        parent_id, depth = row["parent_id"], row["depth"]
        if parent_id is None:
            parent_depth, parent_active = -1, True
            self._roots += 1
            siblings = self._roots
        else:
            parent = self._tree.get(parent_id)
            if parent is None:
                raise line.refused("parentId is the id of no message of the thread that stands above it.")
            parent_depth, parent_active = parent.depth, parent.active
            parent.children += 1
            siblings = parent.children
        if depth != parent_depth + 1:
            raise line.refused("depth is not one more than that of the message it answers.")
        if depth >= MAX_DEPTH or siblings > MAX_SIBLINGS:
            raise line.refused(f"A thread is at most {MAX_DEPTH} messages deep, with {MAX_SIBLINGS} versions of each.")
        if row["active"]:
            if not parent_active or depth in self._active_depths:
                raise line.refused("The active messages of a thread are not one path from its start.")
            self._active_depths.add(depth)
        if len({row[column] is None for column in _TOKENS}) > 1:
            raise line.refused("The numbers of tokens are all given, or none.")
        if row["error_code"] is None and (row["error_message"] is not None or row["error_retry_after"] is not None):
            raise line.refused("An error has an errorCode.")
        self._tree[row["id"]] = _Node(line.member, line.number, parent_id, depth, row["active"], row["active_child_id"])

    def _end_thread(self) -> None:
        for message_id, node in self._tree.items():
            if node.remembers is not None:
                child = self._tree.get(node.remembers)
                if child is None or child.parent != message_id:
                    message = "activeChildId is the id of no message that answers this one."
                    raise ImportRefusedError(message, member=node.member, line=node.line)
        self._thread, self._tree, self._roots, self._active_depths = None, {}, 0, set()


_WITHIN_TREE = ("parent_id", "active_child_id")
_TOKENS = ("prompt_tokens", "completion_tokens", "reasoning_tokens", "cached_tokens")
