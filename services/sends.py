"""A question at the end of a thread, or in a new one, written by one statement that is a transaction by itself.

Nearly all turns are such. The statement takes the key, sees where the thread ends, and writes question, answer and
stream; it waits for nobody's lock but that of an equal request. It writes all of that or nothing: nothing where what it
was made for is not so (any more), and then whoever asked goes the long way, which locks the thread and looks again
(`services.turns`, docs/decisions/0028-a-turn-is-one-statement.md).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID

import asyncpg

from models.records import MESSAGE_COLUMNS, THREAD_COLUMNS, MessageRecord, ThreadRecord, message_columns
from services.own_access import HAS_OWN
from services.personalization import PERSONALIZATION_COLUMNS, Personalization

if TYPE_CHECKING:
    from asyncpg import Connection

MAX_MESSAGES = 100_000
"""Most messages below one another in a thread."""
_MAX_KNOWN = 10_000
_MESSAGE_WIDTH = len(MessageRecord.columns)
_THREAD_WIDTH = len(THREAD_COLUMNS.split(", "))

# What is chosen where a turn names no model: its project's, else its owner's. The one that makes titles for its owner,
# and what they told of themselves.
ASKER = f"""
SELECT {HAS_OWN} AS has_own, s.title_model, s.default_model, (
    SELECT p.default_model FROM projects p WHERE p.owner_id = $1 AND p.id = {{project}}
) AS project_model, {", ".join(f"s.{name}" for name in PERSONALIZATION_COLUMNS.split(", "))}
FROM (VALUES (1)) AS one LEFT JOIN settings s ON s.owner_id = $1
"""  # noqa: S608 - texts of ours
PROJECT_OF_THREAD = "(SELECT t.project_id FROM threads t WHERE t.id = $2 AND t.owner_id = $1)"
TOUCHED = """
updated_at = now(), expires_at = CASE
    WHEN temporary THEN greatest(expires_at, now() + make_interval(secs => $10)) ELSE expires_at
END
"""
# The question below the place that what stands before gives, the answer's placeholder and the stream.
BOTH = f"""
said AS (
    INSERT INTO messages (id, owner_id, thread_id, parent_id, active_child_id, depth, active, role, status, parts,
        model, created_at, updated_at)
    SELECT said.id, $1, thread.id, said.parent_id, said.child_id, said.depth, true, said.role, said.status, said.parts,
        said.model, now(), now()
    FROM thread, place, LATERAL (
        VALUES ($3::uuid, place.parent_id, $4::uuid, place.depth, 'USER', 'COMPLETE', $5::jsonb, NULL::text),
            ($4, $3, NULL, place.depth + 1, 'ASSISTANT', 'STREAMING', '[]', $6)
    ) AS said (id, parent_id, child_id, depth, role, status, parts, model)
    ORDER BY said.depth RETURNING {MESSAGE_COLUMNS}
), stream AS (
    INSERT INTO streams (message_id, owner_id, holder, epoch, lease_expires_at, reasoning_effort)
    SELECT $4, $1, $7, 1, now() + make_interval(secs => $8), $9 FROM thread
)
"""  # noqa: S608 - only column names are put in
WRITTEN = f"""
{", ".join(message_columns(None, "said"))}, {", ".join(f"thread.{name}" for name in THREAD_COLUMNS.split(", "))}
"""
# Nothing where the key is taken, or where the asker is not who they were taken for.
_TAKEN = f"""
WITH asker AS MATERIALIZED (
    {ASKER.format(project=PROJECT_OF_THREAD)}
), taken AS (
    INSERT INTO turns (id, owner_id, idempotency_key, fingerprint, thread_id, user_message_id, assistant_message_id)
    SELECT $11, $1, $12, $13, $2, $3, $4 FROM asker
    WHERE ($14::boolean OR (NOT has_own AND (
        $15::boolean OR coalesce(project_model, default_model) IS NOT DISTINCT FROM $16::text
    ))) AND {{place}}
    ON CONFLICT (owner_id, idempotency_key) DO NOTHING RETURNING id
)
"""  # noqa: S608 - texts of ours
# Not for a thread of a project: that would have to be locked behind the key, and what one statement writes has no such
# order.
_BEGIN = f"""
{_TAKEN.format(place="true")}, place AS (
    SELECT NULL::uuid AS parent_id, 0 AS depth
), thread AS (
    INSERT INTO threads (id, owner_id, title, title_source, pinned, temporary, expires_at, created_at, updated_at)
    SELECT $2, $1, $17, 'TEXT', false, $18, CASE WHEN $18 THEN now() + make_interval(secs => $10) END, now(), now()
    FROM taken RETURNING {THREAD_COLUMNS}
), {BOTH}
SELECT {WRITTEN}, title_model, {PERSONALIZATION_COLUMNS} FROM said, thread, asker ORDER BY said.depth
"""  # noqa: S608 - only column names are put in
# What the statement sees is of the moment at which it began, and the thread is locked a moment later. So it must be the
# version of the thread that it sees, for whoever adds to the path writes the thread too; and the leaf must still be on
# the path, for whoever leads the path elsewhere writes the leaf. Where it is not so, or somebody has the lock, nothing
# may be left of the key either: the division fails. What it sees at once to be missing or busy needs no failure, which
# PostgreSQL would log. Not EXISTS for the thread: its page would be held for as long as an equal request is waited for.
_IDLE = """
(SELECT id FROM threads WHERE id = $2 AND owner_id = $1) IS NOT NULL
    AND NOT EXISTS (SELECT FROM messages WHERE thread_id = $2 AND status = 'STREAMING')
"""
_CONTINUE = f"""
{_TAKEN.format(place=_IDLE)}, locked AS (
    SELECT id, xmin AS version FROM threads WHERE id = $2 AND owner_id = $1 AND EXISTS (SELECT FROM taken)
    FOR UPDATE SKIP LOCKED
), place AS MATERIALIZED (
    SELECT leaf.id AS parent_id, coalesce(leaf.depth + 1, 0) AS depth
    FROM locked LEFT JOIN LATERAL (
        SELECT id, depth FROM messages WHERE active AND (thread_id, depth) >= ($2, 0) AND thread_id <= $2
        ORDER BY thread_id DESC, depth DESC LIMIT 1
    ) AS leaf ON true
    WHERE version = (SELECT xmin FROM threads WHERE id = $2) AND coalesce(leaf.depth + 1, 0) + 2 <= $17
), parent AS (
    UPDATE messages SET active_child_id = $3 FROM place WHERE messages.id = place.parent_id AND messages.active
    RETURNING messages.id
), thread AS (
    UPDATE threads SET {TOUCHED} FROM place
    WHERE threads.id = $2 AND (place.parent_id IS NULL OR EXISTS (SELECT FROM parent)) RETURNING {THREAD_COLUMNS}
), {BOTH}, whole AS MATERIALIZED (
    SELECT 1 / (SELECT count(*) FROM thread) AS once FROM taken
)
SELECT {WRITTEN}, asker.title_model, {", ".join(f"asker.{name}" for name in PERSONALIZATION_COLUMNS.split(", "))}
FROM whole LEFT JOIN said ON true LEFT JOIN thread ON true CROSS JOIN asker WHERE once = 1 ORDER BY said.depth
"""  # noqa: S608 - only column names are put in


@dataclass(frozen=True, slots=True)
class KnownAsker:
    """What decides how a user's turns are answered, as it was when it was last read.

    Attributes:
        has_own: whether there are keys or models of their own.
        default_model: what is chosen where they name none; None: the server's default.
    """

    has_own: bool
    default_model: str | None


class KnownAskers:
    """Users who asked a moment ago, so that it need not be read again before each turn: the statement checks it."""

    def __init__(self) -> None:
        self._known: OrderedDict[UUID, KnownAsker] = OrderedDict()

    def get(self, user_id: UUID) -> KnownAsker | None:
        """What was noted last."""
        if (asker := self._known.get(user_id)) is not None:
            self._known.move_to_end(user_id)
        return asker

    def note(self, user_id: UUID, asker: KnownAsker) -> None:
        """Remember it; of many users, the ones that were here last."""
        self._known[user_id] = asker
        self._known.move_to_end(user_id)
        if len(self._known) > _MAX_KNOWN:
            self._known.popitem(last=False)


@dataclass(frozen=True, slots=True)
class Sent:
    """What a send wrote, and what it found out about its asker."""

    thread: ThreadRecord
    user_message: MessageRecord
    assistant_message: MessageRecord
    title_model: str | None
    personalization: Personalization

    @classmethod
    def of(cls, rows: Sequence[asyncpg.Record]) -> Sent:
        """From the rows of the two messages, each with the thread's and the asker's columns behind it."""
        first: Mapping[str, Any] = rows[0]
        return cls(*written(rows), first["title_model"], Personalization.from_row(first))


def written(rows: Sequence[asyncpg.Record]) -> tuple[ThreadRecord, MessageRecord, MessageRecord]:
    """The thread, the question and the answer, from the two rows that `WRITTEN` selects."""
    question, answer = (MessageRecord.of(row[:_MESSAGE_WIDTH]) for row in rows)
    return ThreadRecord.of(rows[0][_MESSAGE_WIDTH : _MESSAGE_WIDTH + _THREAD_WIDTH]), question, answer


async def begin_thread(connection: Connection, both: Sequence[Any], key: Sequence[Any], *place: Any) -> Sent | None:
    """Ask in a new thread outside of projects. Not in a transaction.

    Args:
        both: the parameters of `BOTH`.
        key: the turn's id, its key, its fingerprint; whether the asker was read just now, else whether the turn names
            its model, and the default that was chosen for it.
        place: the title, and whether the thread is temporary.

    Returns:
        None where nothing was written.
    """
    rows = await connection.fetch(_BEGIN, *both, *key, *place)
    return Sent.of(rows) if rows else None


async def continue_thread(connection: Connection, both: Sequence[Any], key: Sequence[Any]) -> Sent | None:
    """Ask at the end of a thread's active path. As `begin_thread`."""
    try:
        rows = await connection.fetch(_CONTINUE, *both, *key, MAX_MESSAGES)
    except asyncpg.DivisionByZeroError:
        return None
    return Sent.of(rows) if rows else None
