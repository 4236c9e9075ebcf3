"""Turns: a question and the answer that begins with it, made in one transaction and at most once a key.

The order inside is what the promises rest on. What can be refused without the database is refused first. The row of the
idempotency key is written first of all, so that equal requests wait for one another there. Then the thread is locked:
one writer at a time. The stream's buffer is open before the commit makes the message visible: no reader is too early.
Where there is a budget, the user's row is locked before everything else.

What a turn costs is round trips, so there are few: nearly every question is one statement (`services.sends`); what is
here is for the others (docs/decisions/0025-round-trips-of-a-turn.md and 0028-a-turn-is-one-statement.md).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar
from uuid import UUID

import asyncpg
import orjson

from models.database import Database
from models.ids import new_id
from models.parts import FilePart, TextPart, parts_from_json, parts_to_json
from models.records import MESSAGE_COLUMNS, THREAD_COLUMNS, MessageRecord, MessageRole, ThreadRecord
from providers.base import GenerationRequest, Provider, ReasoningEffort
from providers.catalog import Ability
from providers.registry import ModelRecord
from services.attachments import link_attachments, take_attachments
from services.budgets import Budgets, Reservation
from services.errors import (
    BadUserInputError,
    ConflictError,
    ModelUnavailableError,
    NotFoundError,
    ProviderKeyMissingError,
    ThreadBusyError,
    UnauthenticatedError,
    UnavailableError,
)
from services.generation import Generations
from services.history import PromptLimits, estimate_prompt, first_prompt, history
from services.input import checked_key, checked_text
from services.messages import MAX_SIBLINGS, leave_branch
from services.models import DefaultOf, Models
from services.rates import NO_RATE, UserRate
from services.sends import (
    ASKER,
    BOTH,
    MAX_MESSAGES,
    PROJECT_OF_THREAD,
    TOUCHED,
    WRITTEN,
    KnownAsker,
    KnownAskers,
    Sent,
    begin_thread,
    continue_thread,
    written,
)
from services.titles import Titles, title_from_text
from services.viewer import Viewer
from storage.base import Storage
from streams.buffer import StreamBuffer
from streams.ending import StreamHold
from streams.hub import Hub
from streams.leases import LeaseKeeper
from streams.recovery import AnswerWaitsError

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from asyncpg import Connection

T = TypeVar("T")

# The thread, where there is one, is locked behind the key. What it holds is read by the statements that follow: this
# one began before it had the lock, and would not see what was written until then.
_TAKE_KEY = """
WITH taken AS (
    INSERT INTO turns (id, owner_id, idempotency_key, fingerprint, thread_id, user_message_id, assistant_message_id)
    VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT (owner_id, idempotency_key) DO NOTHING RETURNING id
), thread AS (
    SELECT id FROM threads WHERE id = $5 AND owner_id = $2 AND EXISTS (SELECT FROM taken) FOR UPDATE
)
SELECT EXISTS (SELECT FROM taken) AS taken, EXISTS (SELECT FROM thread) AS locked
"""
_TAKEN_KEY = """
SELECT fingerprint, thread_id, user_message_id, assistant_message_id FROM turns
WHERE owner_id = $1 AND idempotency_key = $2
"""
_LEAF = """
SELECT EXISTS (SELECT FROM messages WHERE thread_id = $1 AND status = 'STREAMING') AS live, leaf.id, leaf.depth
FROM (VALUES (1)) AS one LEFT JOIN (
    SELECT id, depth FROM messages WHERE active AND (thread_id, depth) >= ($1, 0) AND thread_id <= $1
    ORDER BY thread_id DESC, depth DESC LIMIT 1
) AS leaf ON true
"""
_IS_LIVE = "SELECT EXISTS (SELECT FROM messages WHERE thread_id = $1 AND status = 'STREAMING')"
_PLACE = """
SELECT thread_id, parent_id, depth, role, parts, CASE WHEN parent_id IS NULL
    THEN (SELECT count(*) FROM messages root WHERE root.thread_id = m.thread_id AND root.depth = 0)
    ELSE (SELECT count(*) FROM messages child WHERE child.parent_id = m.parent_id)
END AS siblings
FROM messages m WHERE id = $1 AND owner_id = $2
"""
# Nothing is added where the project is not the owner's. Locked as its count will be: behind a weaker lock, waiting for
# the stronger one could meet the project's deletion waiting for us.
_ADD_THREAD = """
INSERT INTO threads (id, owner_id, title, title_source, pinned, project_id, temporary, created_at, updated_at)
SELECT $1, $2, $3, 'TEXT', false, $4, $5, now(), now()
WHERE $4::uuid IS NULL OR EXISTS (SELECT FROM projects WHERE id = $4 AND owner_id = $2 FOR NO KEY UPDATE)
RETURNING id
"""
_ASKER = ASKER.format(project=f"coalesce($3, {PROJECT_OF_THREAD})")
_TOUCH = f"UPDATE threads SET {TOUCHED} WHERE id = $2 RETURNING {THREAD_COLUMNS}"  # noqa: S608 - texts of ours
# Question, answer and stream below a message, in a thread that is locked.
_CONTINUE = f"""
WITH parent AS (
    UPDATE messages SET active_child_id = $3 WHERE id = $11
), place AS (
    SELECT $11::uuid AS parent_id, $12::int AS depth
), thread AS ({_TOUCH}), {BOTH}
SELECT {WRITTEN} FROM said, thread ORDER BY said.depth
"""  # noqa: S608 - texts of ours
_ADD_QUESTION = """
WITH parent AS (
    UPDATE messages SET active_child_id = $1 WHERE id = $4
)
INSERT INTO messages (id, owner_id, thread_id, parent_id, depth, active, role, status, parts, created_at, updated_at)
VALUES ($1, $2, $3, $4, $5, true, 'USER', 'COMPLETE', $6::jsonb, now(), now())
"""
# The answer alone, to a question that is there.
_ADD_ANSWER = f"""
WITH parent AS (
    UPDATE messages SET active_child_id = $4 WHERE id = $3
), answer AS (
    INSERT INTO messages (id, owner_id, thread_id, parent_id, depth, active, role, status, parts, model, created_at,
        updated_at)
    VALUES ($4, $1, $2, $3, $5, true, 'ASSISTANT', 'STREAMING', '[]', $6, now(), now())
), stream AS (
    INSERT INTO streams (message_id, owner_id, holder, epoch, lease_expires_at, reasoning_effort, reserved_tokens,
        reserved_cost_micros, answer_tokens)
    VALUES ($4, $1, $7, 1, now() + make_interval(secs => $8), $9, $11, $12, $13)
)
{_TOUCH}
"""  # noqa: S608 - texts of ours
_BEGIN_ANEW = """
WITH stream AS (
    UPDATE streams SET holder = $4, lease_expires_at = now() + make_interval(secs => $5)
    WHERE message_id = $1 AND epoch = $2 RETURNING reasoning_effort, answer_tokens
)
UPDATE messages SET attempt = messages.attempt + 1 FROM stream WHERE messages.id = $1 AND messages.attempt = $3
RETURNING parent_id, reasoning_effort, answer_tokens
"""
# The question first.
_FIND = f"""
SELECT {MESSAGE_COLUMNS} FROM messages WHERE id = ANY($1::uuid[]) AND owner_id = $2 ORDER BY depth
"""  # noqa: S608 - only column names are put in


@dataclass(frozen=True, slots=True)
class Turn:
    """A question and its answer, which may still be being written."""

    thread: ThreadRecord
    user_message: MessageRecord
    assistant_message: MessageRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnRequest:
    """What all turns are asked with. `model_id` None: the default."""

    idempotency_key: str
    model_id: str | None = None
    reasoning_effort: ReasoningEffort | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NewThread:
    """What a thread that a send makes is like."""

    project_id: UUID | None = None
    temporary: bool = False


@dataclass(frozen=True, slots=True)
class _NewTurn:
    """The ids of a turn, chosen before anything is written, and who answers it.

    Attributes:
        assumed: what the asker was taken to be like; None: that was read.
        title_model: of the asker, where it was read.
    """

    viewer: Viewer
    request: TurnRequest
    fingerprint: bytes
    thread_id: UUID
    user_message_id: UUID
    answer_id: UUID
    model: ModelRecord
    provider: Provider
    assumed: KnownAsker | None
    title_model: str | None


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a model is asked, and with what.

    Attributes:
        answer_tokens: what a budget leaves.
        told: who asked the first question of a thread, which is all of its prompt; None: that has to be read.
    """

    question_id: UUID
    effort: ReasoningEffort | None
    answer_tokens: int | None
    told: Sent | None = None


@dataclass(frozen=True, slots=True)
class _Written:
    """What the transaction of a turn wrote."""

    turn: Turn
    reservation: Reservation = field(default_factory=Reservation)
    sent: Sent | None = None


# None: nothing was written.
_Write: TypeAlias = "Callable[[Connection], Awaitable[_Written | None]]"


class Turns:
    """Makes turns for viewers."""

    def __init__(
        self,
        database: Database,
        hub: Hub,
        leases: LeaseKeeper,
        generations: Generations,
        models: Models,
        titles: Titles,
        budgets: Budgets,
        *,
        max_message_bytes: int,
        max_history_chars: int,
        temporary_seconds: float,
        storage: Storage,
        rate: UserRate = NO_RATE,
    ) -> None:
        self._database = database
        self._hub = hub
        self._leases = leases
        self._generations = generations
        self._models = models
        self._titles = titles
        self._budgets = budgets
        self._max_message_bytes = max_message_bytes
        self._max_history_chars = max_history_chars
        self._storage = storage
        self._rate = rate
        self._temporary_seconds = temporary_seconds
        self._askers = KnownAskers()
        self._tasks: set[asyncio.Task[Any]] = set()

    async def send(
        self,
        viewer: Viewer,
        request: TurnRequest,
        *,
        place: UUID | NewThread,
        text: str,
        attachment_ids: Sequence[UUID] = (),
    ) -> Turn:
        """Ask a question at the end of a thread's active path, or in a new thread.

        Raises:
            BadUserInputError: the text or the key cannot be accepted.
            ModelUnavailableError: the model is not offered.
            ProviderKeyMissingError: it is, but no key leads the viewer to it.
            NotFoundError: no such thread, project or attachment of the viewer's.
            ThreadBusyError: an answer is being written in the thread.
            ConflictError: the key was used for something else.
            BudgetExceededError: the viewer's budget leaves no room for an answer.
            RateLimitedError: the viewer has asked too much a moment ago.
        """
        text = checked_text(text, field="text", max_bytes=self._max_message_bytes)
        thread_id, begun = (None, place) if isinstance(place, NewThread) else (place, NewThread())
        project = begun.project_id.hex if begun.project_id else None
        said = (thread_id.hex if thread_id else None, text, project, begun.temporary)
        fingerprint = _fingerprint("send", request, *said, *_fingerprinted(attachment_ids or None))
        title = title_from_text(text)
        # Only what is one statement checks what was assumed of its asker.
        is_one_statement = begun.project_id is None and not attachment_ids and not self._budgets.any
        ids = (thread_id or new_id(), new_id())
        new = await self._prepare(
            viewer, request, fingerprint, *ids, project_id=begun.project_id, assume=is_one_statement
        )
        turn = None
        if is_one_statement:

            async def send(connection: Connection) -> _Written | None:
                assumed = new.assumed or KnownAsker(has_own=False, default_model=None)
                both = self._both(new, text)
                key = (
                    *(new_id(), request.idempotency_key, fingerprint),
                    *(new.assumed is None, request.model_id is not None, assumed.default_model),
                )
                if thread_id is None:
                    sent = await begin_thread(connection, both, key, title, begun.temporary)
                else:
                    sent = await continue_thread(connection, both, key)
                if sent is None:
                    return None
                return _Written(Turn(sent.thread, sent.user_message, sent.assistant_message), sent=sent)

            made = await self._own(self._make(new, self._database.acquire, send))
            if made is not None:
                assert made.sent is not None
                turn, title_model = made.turn, made.sent.title_model
            elif new.assumed is not None:
                new = await self._read(viewer, request, fingerprint, thread_id or new_id(), new_id())
            else:
                # What was begun for the first one has been ended.
                new = replace(new, answer_id=new_id())

        async def write(connection: Connection) -> _Written:
            parent_id, depth = None, 0
            if thread_id is None:
                thread = (new.thread_id, viewer.id, title, begun.project_id, begun.temporary)
                if await connection.fetchval(_ADD_THREAD, *thread) is None:
                    raise NotFoundError("project", field="projectId")
            else:
                leaf = await connection.fetchrow(_LEAF, thread_id)
                if leaf["live"]:
                    raise ThreadBusyError
                if leaf["id"] is not None:
                    parent_id, depth = leaf["id"], leaf["depth"] + 1
            if depth + 2 > MAX_MESSAGES:
                raise BadUserInputError("This thread is full; begin a new one.", field="threadId")
            files = await self._take(connection, viewer, attachment_ids)
            return await self._add(connection, new, parent_id, depth, text, files)

        if turn is None:
            turn = await self._once(new, write, locks=None if thread_id is None else "thread", field="threadId")
            title_model = new.title_model
        if thread_id is None and turn.assistant_message.id == new.answer_id:
            self._titles.begin(viewer, new.thread_id, new.answer_id, text, title_model)
        return turn

    async def edit(
        self,
        viewer: Viewer,
        request: TurnRequest,
        *,
        message_id: UUID,
        text: str,
        attachment_ids: Sequence[UUID] | None = None,
    ) -> Turn:
        """Ask a user's message anew, in other words: a sibling of it with an answer of its own becomes active.

        Args:
            attachment_ids: None keeps the message's, as far as they are still there.

        Raises:
            as `send`; BadUserInputError also where the message is not a user's, or has 100 versions.
        """
        text = checked_text(text, field="text", max_bytes=self._max_message_bytes)
        place = await self._place(viewer, message_id, MessageRole.USER)
        fingerprint = _fingerprint("edit", request, message_id.hex, text, *_fingerprinted(attachment_ids))
        new = await self._prepare(viewer, request, fingerprint, place["thread_id"], new_id())

        async def write(connection: Connection) -> _Written:
            await _refuse_busy(connection, new.thread_id)
            await leave_branch(connection, new.thread_id, place["parent_id"])
            if attachment_ids is None:
                kept = [part.attachment_id for part in parts_from_json(place["parts"]) if isinstance(part, FilePart)]
                files = await take_attachments(connection, viewer.id, kept)
            else:
                files = await self._take(connection, viewer, attachment_ids)
            return await self._add(connection, new, place["parent_id"], place["depth"], text, files)

        return await self._once(new, write, locks="message", field="messageId")

    async def retry(self, viewer: Viewer, request: TurnRequest, *, message_id: UUID) -> Turn:
        """Have an answer written again: another answer beside it becomes active.

        Raises:
            as `send`; BadUserInputError also where the message is not an answer, or has 100 versions.
        """
        place = await self._place(viewer, message_id, MessageRole.ASSISTANT)
        fingerprint = _fingerprint("retry", request, message_id.hex)
        new = await self._prepare(viewer, request, fingerprint, place["thread_id"], place["parent_id"])

        async def write(connection: Connection) -> _Written:
            await _refuse_busy(connection, new.thread_id)
            await leave_branch(connection, new.thread_id, new.user_message_id)
            return await self._add(connection, new, new.user_message_id, place["depth"], None)

        return await self._once(new, write, locks="message", field="messageId")

    async def _prepare(
        self,
        viewer: Viewer,
        request: TurnRequest,
        fingerprint: bytes,
        thread_id: UUID,
        user_message_id: UUID,
        *,
        project_id: UUID | None = None,
        assume: bool = False,
    ) -> _NewTurn:
        """Count the request, and choose who answers it.

        Args:
            assume: whether the asker may be taken to be as they were a moment ago.
        """
        checked_key(request.idempotency_key)
        self._refuse_while_draining()
        wait = self._rate.take(viewer.id)
        if assume and not wait:
            asker = self._askers.get(viewer.id)
            if asker is not None and not asker.has_own:
                model_id = asker.default_model if request.model_id is None else request.model_id
                if (chosen := self._models.of_operator(model_id)) is not None:
                    ids = (thread_id, user_message_id, new_id())
                    return _NewTurn(viewer, request, fingerprint, *ids, *chosen, assumed=asker, title_model=None)
        return await self._read(viewer, request, fingerprint, thread_id, user_message_id, project_id, wait)

    async def _read(
        self,
        viewer: Viewer,
        request: TurnRequest,
        fingerprint: bytes,
        thread_id: UUID,
        user_message_id: UUID,
        project_id: UUID | None = None,
        wait: int = 0,
    ) -> _NewTurn:
        """As `_prepare`, by what the database has now.

        Args:
            wait: seconds for which the viewer asks too early.
        """
        async with self._database.acquire() as connection:
            # Who asks for the answer that a key has made before is no reason to begin another.
            if wait and await connection.fetchrow(_TAKEN_KEY, viewer.id, request.idempotency_key) is None:
                raise self._rate.refusal(wait)
            asker = await connection.fetchrow(_ASKER, viewer.id, thread_id, project_id)
            chosen = (
                (request.model_id, None),
                (asker["project_model"], DefaultOf.PROJECT),
                (asker["default_model"], DefaultOf.SETTINGS),
            )
            default = next((model_id for model_id, _ in chosen[1:] if model_id is not None), None)
            self._askers.note(viewer.id, KnownAsker(asker["has_own"], default))
            model_id, default_of = next((one for one in chosen if one[0] is not None), (None, None))
            model, provider = await self._models.resolve(
                connection, viewer, model_id, default_of=default_of, has_own=asker["has_own"]
            )
        ids = (thread_id, user_message_id, new_id())
        title_model = asker["title_model"]
        return _NewTurn(viewer, request, fingerprint, *ids, model, provider, assumed=None, title_model=title_model)

    async def _place(self, viewer: Viewer, message_id: UUID, role: MessageRole) -> asyncpg.Record:
        async with self._database.acquire() as connection:
            place = await connection.fetchrow(_PLACE, message_id, viewer.id)
        if place is None:
            raise NotFoundError("message", field="messageId")
        if place["role"] != role:
            wanted = "a user's message" if role is MessageRole.USER else "an answer"
            raise BadUserInputError(f"This takes {wanted}.", field="messageId")
        if place["siblings"] >= MAX_SIBLINGS:
            raise BadUserInputError(f"A message has at most {MAX_SIBLINGS} versions.", field="messageId")
        return place

    async def _take(self, connection: Connection, viewer: Viewer, ids: Sequence[UUID]) -> list[FilePart]:
        files = await take_attachments(connection, viewer.id, ids)
        if len(files) < len(ids):
            raise NotFoundError("attachment", field="attachmentIds")
        return files

    async def _add(
        self,
        connection: Connection,
        new: _NewTurn,
        parent_id: UUID | None,
        depth: int,
        text: str | None,
        files: Sequence[FilePart] = (),
    ) -> _Written:
        """Write the question (None: there already, as `parent_id`) and its answer's placeholder with its stream."""
        if text is not None and not self._budgets.any:
            rows = await connection.fetch(_CONTINUE, *self._both(new, text, files), parent_id, depth)
            await link_attachments(connection, new.user_message_id, files)
            return _Written(Turn(*written(rows)))
        owner_id = new.viewer.id
        if text is not None:
            parts = parts_to_json([*files, TextPart(text)])
            await connection.execute(
                _ADD_QUESTION, new.user_message_id, owner_id, new.thread_id, parent_id, depth, parts
            )
            await link_attachments(connection, new.user_message_id, files)
            depth += 1
        reservation = Reservation()
        if self._budgets.any:
            tokens = await estimate_prompt(connection, new.user_message_id, self._prompt_limits(new.model))
            reservation = await self._budgets.reserve(connection, new.viewer, tokens, new.model.prices)
        row = await connection.fetchrow(
            _ADD_ANSWER,
            *(owner_id, new.thread_id, new.user_message_id, new.answer_id, depth, new.model.id),
            *(self._leases.holder, self._leases.lease_seconds, new.request.reasoning_effort, self._temporary_seconds),
            *(reservation.tokens, reservation.cost_micros, reservation.answer_tokens),
        )
        thread = ThreadRecord.from_row(row)
        rows = await connection.fetch(_FIND, [new.user_message_id, new.answer_id], new.viewer.id)
        return _Written(Turn(thread, *map(MessageRecord.from_row, rows)), reservation)

    def _both(self, new: _NewTurn, text: str, files: Sequence[FilePart] = ()) -> tuple[Any, ...]:
        """The parameters of `BOTH`."""
        return (
            *(new.viewer.id, new.thread_id, new.user_message_id, new.answer_id),
            *(parts_to_json([*files, TextPart(text)]), new.model.id),
            *(self._leases.holder, self._leases.lease_seconds, new.request.reasoning_effort, self._temporary_seconds),
        )

    async def _once(self, new: _NewTurn, write: _Write, *, locks: str | None, field: str) -> Turn:
        """Make the turn in a transaction, or find the one that its key made before.

        Args:
            write: writes it; the key is taken, and the thread is locked.
            locks: what is missing where there is no such thread to be locked; None: it is made by `write`.
            field: which field of the input named it.
        """

        async def keyed(connection: Connection) -> _Written | None:
            if self._budgets.any:
                await self._budgets.lock(connection, new.viewer)
            key = await connection.fetchrow(
                _TAKE_KEY,
                *(new_id(), new.viewer.id, new.request.idempotency_key, new.fingerprint),
                *(new.thread_id, new.user_message_id, new.answer_id),
            )
            if not key["taken"]:
                return None
            if locks is not None and not key["locked"]:
                raise NotFoundError(locks, field=field)
            return await write(connection)

        made = await self._own(self._make(new, self._database.transaction, keyed))
        return await self._repeated(new) if made is None else made.turn

    def _refuse_while_draining(self) -> None:
        if self._generations.draining:
            raise UnavailableError("The server is shutting down; try again.")

    async def _make(
        self, new: _NewTurn, connect: Callable[[], AbstractAsyncContextManager[Connection]], write: _Write
    ) -> _Written | None:
        """Write the turn and begin its answer; None where nothing was written.

        In a task of its own: a caller that leaves between the commit and the start of the answer must not part the two.

        Args:
            connect: gives the connection, in a transaction where `write` is more than one statement.
        """
        # Once more: from here on, the drain waits for it.
        self._refuse_while_draining()
        buffer = self._hub.open(new.answer_id, new.viewer.id)
        started = False
        try:
            async with connect() as connection:
                written = await write(connection)
            if written is None:
                return None
            hold = StreamHold(new.answer_id, new.thread_id, new.viewer.id, 1, new.model.id, new.model.prices)
            turn = written.turn
            told = None if turn.user_message.depth or turn.thread.project_id else written.sent
            asked = _Asked(new.user_message_id, new.request.reasoning_effort, written.reservation.answer_tokens, told)
            self._start(hold, buffer, asked, new.model, new.provider)
            started = True
        except asyncpg.UniqueViolationError as error:
            # The index that allows one live answer a thread; the lock makes it all but impossible to meet.
            raise ThreadBusyError from error
        except asyncpg.ForeignKeyViolationError as error:
            raise UnauthenticatedError("The account of this token does not exist any more.") from error
        finally:
            if not started:
                self._hub.discard(new.answer_id)
                buffer.close()
        return written

    async def settled(self, within: float) -> None:
        """Wait until no turn is being made, for so many seconds at most: new ones are refused by then."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=within)

    async def restart(self, hold: StreamHold) -> bool:
        """Begin an answer anew of which nothing had come when its server was lost, in the place of the caller's hold.

        What it was asked with is as it was: model, effort, what the budget leaves. The keys that lead to the model are
        looked up anew.

        Returns:
            False where it cannot be begun (any more): no key leads to the model, or the hold was lost.

        Raises:
            AnswerWaitsError: this server is shutting down.
            DatabaseUnavailableError: try again with another hold.
        """
        if self._generations.draining:
            raise AnswerWaitsError("this server is shutting down")
        return await self._own(self._restart(hold))

    async def _restart(self, hold: StreamHold) -> bool:
        attempt = hold.attempt + 1
        buffer = self._hub.open(hold.message_id, hold.owner_id, attempt)
        started = False
        try:
            async with self._database.transaction() as connection:
                values = (hold.message_id, hold.epoch, hold.attempt, self._leases.holder, self._leases.lease_seconds)
                row = await connection.fetchrow(_BEGIN_ANEW, *values)
                if row is None:
                    return False
                model, provider = await self._models.resolve_for(connection, hold.owner_id, hold.model)
            asked = _Asked(row["parent_id"], row["reasoning_effort"], row["answer_tokens"])
            hold = replace(hold, model=model.id, prices=model.prices, attempt=attempt)
            self._start(hold, buffer, asked, model, provider)
            started = True
        except (ModelUnavailableError, ProviderKeyMissingError):
            return False
        finally:
            if not started:
                self._hub.discard(hold.message_id)
                buffer.close()
        return True

    def _start(
        self, hold: StreamHold, buffer: StreamBuffer, asked: _Asked, model: ModelRecord, provider: Provider
    ) -> None:
        # Left out where the model knows none: vendors refuse what they do not know.
        effort = asked.effort if model.can(Ability.EFFORT, unless_known=True) else None

        async def request() -> GenerationRequest:
            limits = self._prompt_limits(model)
            if asked.told is None:
                prompt = await history(self._database, self._storage, asked.question_id, limits)
            else:
                sent = asked.told
                prompt = await first_prompt(sent.user_message, sent.personalization, self._storage, limits)
            return GenerationRequest(
                model.vendor_name,
                prompt.messages,
                effort,
                max_output_tokens=asked.answer_tokens,
                image_output=model.can(Ability.IMAGE_OUTPUT),
                prompt_tokens=prompt.tokens,
                possible_output_tokens=model.possible_answer(prompt.tokens),
            )

        self._generations.start(hold, buffer, request, provider)

    def _prompt_limits(self, model: ModelRecord) -> PromptLimits:
        """What a model takes. One of which nobody said that it can see is shown neither images nor PDFs: most that
        cannot would refuse the request, and every later one of the thread.
        """
        return PromptLimits(
            max_chars=self._max_history_chars,
            context_tokens=model.context_tokens,
            reserved_tokens=model.reserved_tokens,
            vision=model.can(Ability.VISION),
            pdf=model.can(Ability.PDF),
            model_id=model.id,
        )

    async def _repeated(self, new: _NewTurn) -> Turn:
        """The turn that this key made before."""
        async with self._database.acquire() as connection:
            before = await connection.fetchrow(_TAKEN_KEY, new.viewer.id, new.request.idempotency_key)
            if before["fingerprint"] != new.fingerprint:
                raise ConflictError("This idempotency key was used with other input.", field="idempotencyKey")
            thread = await connection.fetchrow(
                f"SELECT {THREAD_COLUMNS} FROM threads WHERE id = $1 AND owner_id = $2",  # noqa: S608
                before["thread_id"],
                new.viewer.id,
            )
            ids = [before["user_message_id"], before["assistant_message_id"]]
            rows = await connection.fetch(_FIND, ids, new.viewer.id)
        if thread is None or len(rows) < 2:
            raise NotFoundError("thread: it was deleted after this key was used for it", field="idempotencyKey")
        return Turn(ThreadRecord.from_row(thread), *map(MessageRecord.from_row, rows))

    async def _own(self, work: Coroutine[Any, Any, T]) -> T:
        task = asyncio.create_task(work, name="turn")
        self._tasks.add(task)
        task.add_done_callback(self._disown)
        return await asyncio.shield(task)

    def _disown(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        # Asked for here, because a caller that left will not: what failed then was rolled back and concerns nobody.
        if not task.cancelled() and (error := task.exception()) is not None:
            log.debug("a turn was not made: %s", type(error).__name__)


async def _refuse_busy(connection: Connection, thread_id: UUID) -> None:
    if await connection.fetchval(_IS_LIVE, thread_id):
        raise ThreadBusyError


def _fingerprint(kind: str, request: TurnRequest, *said: object) -> bytes:
    """What a key stands for, so that it is known when it is used for something else."""
    return sha256(orjson.dumps([kind, *said, request.model_id, request.reasoning_effort])).digest()


def _fingerprinted(ids: Sequence[UUID] | None) -> list[list[str]]:
    """Nothing where nothing was said, so that keys of requests without files mean what they always did."""
    return [] if ids is None else [[key.hex for key in ids]]
