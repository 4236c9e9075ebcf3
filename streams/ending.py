"""The one write that ends an answer: by its producer, or by recovery in the place of a dead one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from models.database import Database
from models.ids import new_id
from models.parts import Part, parts_to_json
from models.prices import ModelPrices
from models.records import (
    MESSAGE_COLUMNS,
    MESSAGE_COLUMNS_BUT_PARTS,
    MessageFailure,
    MessageRecord,
    MessageStatus,
    MessageTokens,
)

# The thread is locked first, as everything that writes into a thread does: no deadlock with its deletion. Whoever does
# not hold the stream in the epoch it names finds nothing in `held` and changes nothing: whoever does hold it writes the
# usage event, which says what the message says. Where the thread was deleted meanwhile nobody does any more, and the
# event is written all the same, for what was consumed was consumed. Of a deleted account nothing comes back. What the
# turn had reserved of its owner's budget is in the stream's row: it goes as the event comes, and no reader sees neither
# or both.
_END = f"""
WITH thread AS (
    SELECT id, temporary FROM threads WHERE id = $17 FOR UPDATE
), held AS (
    DELETE FROM streams USING thread WHERE message_id = $1 AND epoch = $2 RETURNING message_id
), ended AS (
    UPDATE messages SET
        status = $3, parts = $4::jsonb, error_code = $5, error_message = $6, error_retry_after = $7,
        prompt_tokens = $8, completion_tokens = $9, reasoning_tokens = $10, cached_tokens = $11,
        tokens_estimated = $12, updated_at = now(),
        duration_ms = least(2147483647, extract(epoch FROM now() - created_at) * 1000)::int
    FROM held WHERE messages.id = held.message_id
    RETURNING {MESSAGE_COLUMNS_BUT_PARTS}
), touched AS (
    UPDATE threads SET updated_at = now() FROM ended WHERE threads.id = ended.thread_id
), used AS (
    INSERT INTO usage_events (id, owner_id, message_id, thread_id, kind, model, status, prompt_tokens,
        completion_tokens, reasoning_tokens, cached_tokens, estimated, prompt_price, cached_price, completion_price,
        cost_micros)
    SELECT $13, $14, $1, (SELECT id FROM thread WHERE NOT temporary), 'ANSWER', $15, $3, $8, $9, $10, $11, $12, $18,
        $19, $20, $21
    WHERE NOT $16 AND (EXISTS (SELECT FROM held) OR NOT EXISTS (SELECT FROM thread))
        AND EXISTS (SELECT FROM users WHERE id = $14 AND deleted_at IS NULL)
    ON CONFLICT (message_id, kind) DO NOTHING
)
SELECT {MESSAGE_COLUMNS_BUT_PARTS} FROM ended
"""  # noqa: S608 - only column names are put in

_FIND_WRITTEN = f"""
SELECT {MESSAGE_COLUMNS}, EXISTS (SELECT FROM streams WHERE message_id = messages.id) AS is_written
FROM messages WHERE id = ANY($1::uuid[])
"""  # noqa: S608 - only column names are put in


@dataclass(frozen=True, slots=True)
class AnswerEnd:
    """How an answer ended: final status, everything that came, why it is not whole, what it consumed."""

    status: MessageStatus
    parts: list[Part]
    failure: MessageFailure | None
    tokens: MessageTokens
    called_provider: bool = True
    """False where no model was asked: then there is nothing to bill."""


@dataclass(frozen=True, slots=True)
class StreamHold:
    """The right to write one stream: `epoch` is the one under which it was taken, `prices` what its model costs.

    `attempt` counts from 1 how often the answer was begun.
    """

    message_id: UUID
    thread_id: UUID
    owner_id: UUID
    epoch: int
    model: str
    prices: ModelPrices | None = None
    attempt: int = 1


@dataclass(frozen=True, slots=True)
class Written:
    """A message as the database has it, and which attempt to write it goes on; `attempt` None: none does."""

    record: MessageRecord
    attempt: int | None


async def find_written(database: Database, ids: Sequence[UUID]) -> dict[UUID, Written]:
    """Messages by their ids, whosever they are; those that are not there are left out.

    Raises:
        DatabaseUnavailableError: try again later.
    """
    async with database.acquire() as connection:
        rows = await connection.fetch(_FIND_WRITTEN, ids)
    return {
        row["id"]: Written(MessageRecord.from_row(row), row["attempt"] if row["is_written"] else None) for row in rows
    }


async def end_answer(database: Database, hold: StreamHold, end: AnswerEnd) -> MessageRecord | None:
    """Store the end of an answer, its usage event and the thread's activity in one statement.

    Returns:
        The message as it is stored now, or None where the hold was lost: somebody else ended it, or it was deleted.

    Raises:
        DatabaseUnavailableError: it is not known whether the end is stored; calling again is safe.
    """
    parts_json = parts_to_json(end.parts)
    failure, tokens, prices = end.failure, end.tokens, hold.prices
    async with database.acquire() as connection:
        row = await connection.fetchrow(
            _END,
            hold.message_id,
            hold.epoch,
            end.status.value,
            parts_json,
            failure.code if failure else None,
            failure.message if failure else None,
            failure.retry_after if failure else None,
            tokens.prompt,
            tokens.completion,
            tokens.reasoning,
            tokens.cached,
            tokens.estimated,
            new_id(),
            hold.owner_id,
            hold.model,
            not end.called_provider,
            hold.thread_id,
            *((prices.prompt, prices.cached, prices.completion) if prices else (None, None, None)),
            prices.cost_micros(tokens) if prices else None,
        )
    return None if row is None else MessageRecord.from_row(row, parts_json)
