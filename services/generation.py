"""Answers being written by this process: one task each, owned here and not by the request that asked.

A generation reads the provider, appends to the shared buffer, and ends the message in one write. However it ends, it
ends once: by the provider, by a stop, by its deadlines, by the drain of the server, or by losing its stream to another.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias
from uuid import UUID

from models.database import Database, DatabaseUnavailableError
from models.log_fields import log_note, log_scope
from models.metrics import LONG_SECONDS, Histogram
from models.parts import DeltaKind, ToolPart
from models.records import MessageFailure, MessageRecord, MessageStatus, MessageTokens
from models.text import clean, storable_json
from models.tracing import NO_TRACING, Span, Tracing
from providers.base import (
    Finish,
    FinishReason,
    GenerationRequest,
    ImageOutput,
    Provider,
    ProviderFailure,
    ReasoningDelta,
    ReasoningSignature,
    TextDelta,
    TokenUsage,
    ToolCall,
)
from services.generated_images import GeneratedImages, ImageLostError
from services.wakeups import Wakeups
from storage.base import StorageError
from streams.buffer import StreamBuffer
from streams.channel import Channel
from streams.ending import AnswerEnd, StreamHold, end_answer
from streams.hub import Hub
from streams.leases import LeaseKeeper
from streams.tokens import Allowance, estimate

log = logging.getLogger(__name__)

RequestMaker: TypeAlias = "Callable[[], Awaitable[GenerationRequest]]"

STOP_CHANNEL = "stop"
_STOP_DEADLINE_SECONDS = 15.0
_CLOSE_DEADLINE_SECONDS = 5.0
_LONGEST_RETRY_PAUSE_SECONDS = 2.0
_ELSEWHERE_SECONDS = 3.0
_POLL_SECONDS = 0.1

_LIVE = "SELECT id FROM messages WHERE thread_id = $1 AND status = 'STREAMING'"
_STILL_LIVE = "SELECT message_id FROM streams WHERE message_id = ANY($1::uuid[])"

_SHUTDOWN = MessageFailure(
    "SERVER_SHUTDOWN", "The server was shut down while it answered. Retry to get a whole answer."
)
_HUNG_UP = MessageFailure("PROVIDER_HUNG_UP", "The model's provider ended the connection before the answer was whole.")
_EMPTY = MessageFailure("EMPTY_ANSWER", "The model ended without an answer. Retry, or ask in another way.")
_FILTERED = MessageFailure("CONTENT_FILTERED", "The model's provider withheld the answer by its content rules.")
_TIMEOUT = MessageFailure("PROVIDER_TIMEOUT", "The model was silent for too long. Retry later or with another model.")
_TOO_LONG = MessageFailure("OUTPUT_LIMIT", "The answer reached the greatest length this server keeps.")
_OVER_BUDGET = MessageFailure("BUDGET_EXCEEDED", "The answer reached the length that your budget leaves for it.")
_NO_FILES = MessageFailure(
    "ATTACHMENT_UNAVAILABLE", "A file that was sent along cannot be read right now. Retry in a while."
)
_DEFECT = MessageFailure("INTERNAL_SERVER_ERROR", "Something went wrong on this server while it answered. Retry.")


@dataclass(frozen=True, slots=True)
class GenerationLimits:
    """Seconds of silence and in all, and code points, after which a generation is ended."""

    idle_seconds: float
    total_seconds: float
    max_output_chars: int


@dataclass(frozen=True, slots=True)
class _Outcome:
    status: MessageStatus
    failure: MessageFailure | None = None


class Generation:
    """One answer being written.

    Args:
        request: makes the request for the provider (it reads the history); awaited once.
    """

    def __init__(
        self,
        hold: StreamHold,
        buffer: StreamBuffer,
        request: RequestMaker,
        provider: Provider,
        limits: GenerationLimits,
        images: GeneratedImages,
    ) -> None:
        self.hold = hold
        self.buffer = buffer
        # Until it is made: what is asked is not to be held for as long as the answer takes.
        self._request: RequestMaker | None = request
        self._provider = provider
        self._limits = limits
        self._images = images
        self._images_kept = 0
        self._lost_image: MessageFailure | None = None
        self._usage: TokenUsage | None = None
        self._prompt_tokens = 0
        self._called_provider = False
        self._started = self._last_event = 0.0
        self._reading: asyncio.Task[_Outcome] | None = None
        self._through: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._timer: asyncio.Handle | None = None
        self._forced: _Outcome | None = None

    async def read(self) -> AnswerEnd:
        """Stream the answer into the buffer and say how it ended. Never raises but for cancellation."""
        loop = asyncio.get_running_loop()
        self._last_event = self._started = loop.time()
        reading = self._reading = loop.create_task(self._consume(), name=f"provider {self.hold.message_id}")
        reading.add_done_callback(self._let_through)
        if self._forced is not None:
            self._let_go(reading)
        else:
            self._watch()
        try:
            await self._through
        finally:
            # Whoever ends it from here on comes too late. And a task that was cancelled leads back to this.
            self._reading = self._request = None
            if self._timer is not None:
                self._timer.cancel()
        outcome = self._outcome(reading)
        parts = self.buffer.parts()
        tokens = estimate(self._prompt_tokens, parts) if self._usage is None else reported_tokens(self._usage)
        return AnswerEnd(outcome.status, parts, outcome.failure, tokens, self._called_provider)

    def end_early(self, status: MessageStatus, failure: MessageFailure | None) -> None:
        """End with what has come, unless the provider is through already. The first reason given holds."""
        if self._forced is None:
            self._forced = _Outcome(status, failure)
            if self._reading is not None:
                self._let_go(self._reading)

    def _watch(self, *, over: bool = False) -> None:
        """Wait for the nearest deadline with one timer an answer, set anew only when it rings.

        Args:
            over: it was over in the turn of the loop before. What had come by then, while the process was held, is
                heard by now.
        """
        loop = asyncio.get_running_loop()
        due = min(self._last_event + self._limits.idle_seconds, self._started + self._limits.total_seconds)
        if loop.time() < due:
            self._timer = loop.call_at(due, self._watch)
        elif not over:
            self._timer = loop.call_soon(partial(self._watch, over=True))
        else:
            self.end_early(MessageStatus.FAILED, _TIMEOUT)

    def _let_go(self, reading: asyncio.Task[_Outcome]) -> None:
        """Close the provider's connection; one that does not let go is waited for so long and no longer."""
        reading.cancel()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(_CLOSE_DEADLINE_SECONDS, self._let_through)

    def _let_through(self, _: object = None) -> None:
        if not self._through.done():
            self._through.set_result(None)

    def _outcome(self, reading: asyncio.Task[_Outcome]) -> _Outcome:
        if reading.done() and not reading.cancelled():
            return reading.result()
        if not reading.done():
            log.error("a provider does not let go", extra={"message_id": str(self.hold.message_id)})
        return self._forced or _Outcome(MessageStatus.FAILED, _DEFECT)

    def _used_up(self, most_tokens: int | None) -> bool:
        """Whether the provider ended by our limit, and not by one of its own that lies below."""
        return most_tokens is not None and (self._usage is None or self._usage.completion >= most_tokens)

    async def _consume(self) -> _Outcome:
        try:
            asked = await self._ask()
            self._prompt_tokens, most_tokens = asked.prompt_tokens, asked.max_output_tokens
            self._called_provider = True
            stream = self._provider.stream(asked)
            del asked  # the bytes of its files are not to be held for as long as the answer takes
            async with aclosing(stream) as events:
                finish = await self._follow(events, most_tokens)
        except ProviderFailure as failure:
            return _Outcome(
                MessageStatus.FAILED,
                MessageFailure(failure.code.value, clean(failure.message), _bounded_or_none(failure.retry_after)),
            )
        except StorageError:
            return _Outcome(MessageStatus.FAILED, _NO_FILES)
        except _OutputLimitError:
            return _Outcome(MessageStatus.INTERRUPTED, _TOO_LONG)
        except _OverBudgetError:
            return _Outcome(MessageStatus.INTERRUPTED, _OVER_BUDGET)
        except Exception:
            log.exception("a generation failed", extra={"message_id": str(self.hold.message_id)})
            return _Outcome(MessageStatus.FAILED, _DEFECT)
        if finish is None:
            return _Outcome(MessageStatus.INTERRUPTED, _HUNG_UP)
        if finish.reason is FinishReason.LENGTH and self._used_up(most_tokens):
            return _Outcome(MessageStatus.INTERRUPTED, _OVER_BUDGET)
        if self._lost_image is not None:
            return _Outcome(MessageStatus.FAILED, self._lost_image)
        if self.buffer.length == 0:
            filtered = finish.reason is FinishReason.CONTENT_FILTER
            return _Outcome(MessageStatus.FAILED, _FILTERED if filtered else _EMPTY)
        return _Outcome(MessageStatus.COMPLETE)

    async def _ask(self) -> GenerationRequest:
        """What the provider is asked. A database that is away is waited for, for as long as a provider would be."""
        request, self._request = self._request, None
        assert request is not None, "an answer is asked for once"
        attempt = 0
        while True:
            try:
                asked = await request()
            except DatabaseUnavailableError as error:
                attempt += 1
                log.warning("a question waits for the database: %s", error)
                await asyncio.sleep(_retry_pause(attempt))
            else:
                return asked

    async def _follow(self, events: Any, most_tokens: int | None) -> Finish | None:
        buffer, now = self.buffer, asyncio.get_running_loop().time
        limit = self._limits.max_output_chars
        # A provider is told the limit too; it may not know it, or not keep it.
        allowance = None if most_tokens is None else Allowance(most_tokens)
        async for event in events:
            self._last_event = now()
            kind = type(event)
            if kind is TextDelta or kind is ReasoningDelta:
                name: DeltaKind = "TEXT" if kind is TextDelta else "REASONING"
                text = clean(event.text)
                allowed = text if allowance is None else allowance.take(name, text)
                buffer.append_text(name, allowed)
                if len(allowed) < len(text):
                    raise _OverBudgetError
            elif kind is ToolCall:
                part = ToolPart(clean(event.call_id), clean(event.name), storable_json(event.arguments))
                if allowance is not None and not allowance.take_part(part):
                    raise _OverBudgetError
                buffer.append_part(part)
            elif kind is TokenUsage:
                self._usage = event
            elif kind is ReasoningSignature:
                buffer.sign(event.signature)
            elif kind is ImageOutput:
                if allowance is not None and not allowance.take_image():
                    raise _OverBudgetError
                await self._take_image(event.data)
            else:
                assert isinstance(event, Finish)
                return event
            if buffer.length > limit:
                raise _OutputLimitError
        return None

    async def _take_image(self, data: bytes) -> None:
        """Keep an image and add it. The answer goes on without one that cannot be kept, and ends as FAILED."""
        try:
            part = await self._images.keep(self.hold, data, number=self._images_kept + 1)
        except ImageLostError as lost:
            self._lost_image = self._lost_image or lost.failure
        else:
            self._images_kept += 1
            self.buffer.append_part(part)
        self._last_event = asyncio.get_running_loop().time()


def _retry_pause(attempt: int) -> float:
    """Seconds before a try at the database, the more the more have failed."""
    return min(_LONGEST_RETRY_PAUSE_SECONDS, 0.05 * 2.0 ** min(attempt, 10)) * random.uniform(0.5, 1)  # noqa: S311


def reported_tokens(usage: TokenUsage) -> MessageTokens:
    """What a provider reported, as it can be stored: a count is from 0 to 2^31 - 1, whatever it says."""
    return MessageTokens(
        prompt=_bounded(usage.prompt),
        completion=_bounded(usage.completion),
        reasoning=_bounded(usage.reasoning),
        cached=_bounded(usage.cached),
        estimated=False,
    )


def _bounded(count: int) -> int:
    return max(0, min(count, 2**31 - 1))


def _bounded_or_none(count: int | None) -> int | None:
    return None if count is None else _bounded(count)


class _OutputLimitError(Exception):
    """The answer is longer than is kept."""


class _OverBudgetError(Exception):
    """The answer would be longer than its owner's budget leaves."""


class AnswerCounts:
    """For metrics: how answers of this process ended, after how long, and what they consumed."""

    def __init__(self) -> None:
        self.ends: Counter[tuple[str, str]] = Counter()
        self.tokens: Counter[str] = Counter()
        self.seconds = Histogram(LONG_SECONDS)
        self.first_seconds = Histogram(LONG_SECONDS)

    def count(self, end: AnswerEnd, buffer: StreamBuffer, started: float, span: Span, *, stored: bool) -> None:
        """Count one end.

        Args:
            started: when its task began.
            stored: whether it was this process's to end; otherwise it was deleted, or somebody else ended it.
        """
        status, code = end.status.value if stored else "LOST", end.failure.code if stored and end.failure else ""
        tokens = end.tokens
        self.ends[status, code] += 1
        self.seconds.observe(time.monotonic() - started)
        if buffer.begun_at is not None:
            self.first_seconds.observe(buffer.begun_at - started)
        if end.called_provider:
            self.tokens["prompt"] += tokens.prompt
            self.tokens["completion"] += tokens.completion
            self.tokens["reasoning"] += tokens.reasoning
            self.tokens["cached"] += tokens.cached
        span.note(
            {
                "threadgraph.status": status,
                "threadgraph.pieces": buffer.appends,
                "gen_ai.usage.input_tokens": tokens.prompt,
                "gen_ai.usage.output_tokens": tokens.completion,
            }
        )
        if code:
            span.fail(code)


class Generations:
    """All generations of this process. Made by the composition root, ended by `drain`.

    Stops arrive over the channel, so that a stop asked of any process reaches the one that writes.

    Args:
        wakeups: who tells the user's subscriptions of each end that is stored.
        images: keeps the images that models make.
        tracing: who begins a span for each answer.
    """

    def __init__(
        self,
        database: Database,
        hub: Hub,
        leases: LeaseKeeper,
        channel: Channel,
        wakeups: Wakeups,
        limits: GenerationLimits,
        images: GeneratedImages,
        tracing: Tracing = NO_TRACING,
    ) -> None:
        self._database = database
        self._hub = hub
        self._leases = leases
        self._channel = channel
        self._wakeups = wakeups
        self._limits = limits
        self._images = images
        self._running: dict[UUID, Generation] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.draining = False
        self.counts = AnswerCounts()
        self._tracing = tracing

    def __len__(self) -> int:
        return len(self._running)

    async def listen(self) -> None:
        """Begin to take stops from the channel."""
        await self._channel.listen(STOP_CHANNEL, self._on_stop)

    def start(self, hold: StreamHold, buffer: StreamBuffer, request: RequestMaker, provider: Provider) -> None:
        """Write an answer in a task of its own. The buffer is open in the hub already.

        Args:
            request: makes the request for the provider (it reads the history); awaited in the task.
        """
        generation = Generation(hold, buffer, request, provider, self._limits, self._images)
        self._running[hold.message_id] = generation
        self._leases.keep(buffer)
        log_note(thread_id=hold.thread_id, message_id=hold.message_id)
        task = asyncio.create_task(self._run(generation), name=f"generation {hold.message_id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def stop(self, message_id: UUID) -> None:
        """Ask whoever writes this message to stop. Does not wait."""
        # Here at once, for the channel may be out of reach; and there, for who writes it here may have been given up.
        self._end_early(message_id)
        await self._channel.publish(STOP_CHANNEL, {"messageId": message_id.hex})

    async def wait_ended(self, message_id: UUID) -> bool:
        """Whether the answer, if it is written here, ends within the deadline for stops."""
        buffer = self._hub.get(message_id)
        if buffer is None or not self._hub.writes(message_id):
            return True
        try:
            async with asyncio.timeout(_STOP_DEADLINE_SECONDS):
                while not buffer.closed:
                    await buffer.wait(buffer.length)
        except TimeoutError:
            return False
        return True

    async def end_live(self, thread_id: UUID) -> None:
        """Stop the answer being written in a thread, by whichever process it is written, and wait for its end.

        Raises:
            DatabaseUnavailableError: try again later.
        """
        async with self._database.acquire() as connection:
            rows = await connection.fetch(_LIVE, thread_id)
        live = {row["id"] for row in rows}
        live |= {
            generation.hold.message_id
            for generation in self._running.values()
            if generation.hold.thread_id == thread_id
        }
        await self._end(live)

    async def end_owned(self, owner_id: UUID) -> None:
        """Stop every answer of a user, by whichever process it is written, and wait for the end of all.

        Also of those whose rows are gone, and which would notice it only when they renew their lease.

        Raises:
            DatabaseUnavailableError: try again later.
        """
        async with self._database.acquire() as connection:
            rows = await connection.fetch("SELECT message_id FROM streams WHERE owner_id = $1", owner_id)
        live = {row["message_id"] for row in rows}
        live |= {
            generation.hold.message_id for generation in self._running.values() if generation.hold.owner_id == owner_id
        }
        await self._end(live)

    async def _end(self, live: Collection[UUID]) -> None:
        """Stop these answers and wait for their ends; for those of other processes a moment only.

        What a process does not hear of, it finds out when it renews its leases.
        """
        elsewhere = [message_id for message_id in live if not self._hub.writes(message_id)]
        for message_id in live:
            await self.stop(message_id)
        await asyncio.gather(*(self.wait_ended(message_id) for message_id in live))
        deadline = time.monotonic() + _ELSEWHERE_SECONDS
        while elsewhere and time.monotonic() < deadline:
            async with self._database.acquire() as connection:
                elsewhere = [row["message_id"] for row in await connection.fetch(_STILL_LIVE, elsewhere)]
            if elsewhere:
                await asyncio.sleep(_POLL_SECONDS)

    def lose(self, message_id: UUID) -> None:
        """The stream was deleted or taken over: stop writing what nobody may see."""
        if generation := self._running.get(message_id):
            generation.end_early(MessageStatus.INTERRUPTED, _SHUTDOWN)

    async def drain(self, grace_seconds: float) -> None:
        """Let running answers end for so long, then end the rest as INTERRUPTED with their text. No new ones begin,
        but for turns that were being made already: they have what is left of the time.
        """
        self.draining = True
        deadline = time.monotonic() + grace_seconds
        while self._tasks and (left := deadline - time.monotonic()) > 0:
            await asyncio.wait(self._tasks, timeout=left)
        for generation in list(self._running.values()):
            generation.end_early(MessageStatus.INTERRUPTED, _SHUTDOWN)
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=_STOP_DEADLINE_SECONDS)
            for task in late:
                task.cancel()

    async def _on_stop(self, message: dict[str, Any]) -> None:
        self._end_early(UUID(hex=message["messageId"]))

    def _end_early(self, message_id: UUID) -> None:
        if generation := self._running.get(message_id):
            generation.end_early(MessageStatus.STOPPED, None)

    async def _run(self, generation: Generation) -> None:
        hold = generation.hold
        message_id, buffer = hold.message_id, generation.buffer
        record: MessageRecord | None = None
        with (
            log_scope(user_id=hold.owner_id, thread_id=hold.thread_id, message_id=message_id),
            self._tracing.span("answer") as span,
        ):
            span.note({"threadgraph.message_id": str(message_id), "threadgraph.thread_id": str(hold.thread_id)})
            started = time.monotonic()
            try:
                end = await generation.read()
                record = await self._store(hold, end)
                # Also where the thread was deleted meanwhile: what was consumed is counted all the same.
                await self._wakeups.ring(hold.owner_id)
                self.counts.count(end, buffer, started, span, stored=record is not None)
                log.info(
                    "answer ended",
                    extra={
                        "status": end.status.value if record else "LOST",
                        "seconds": round(time.monotonic() - started, 3),
                    },
                )
            finally:
                # In this order: a reader that comes now finds the stored message, one that is here is told of it.
                self._leases.release(message_id)
                self._hub.remove(message_id)
                self._running.pop(message_id, None)
                if record is not None:
                    buffer.end(record)
                else:
                    buffer.close()

    async def _store(self, hold: StreamHold, end: AnswerEnd) -> MessageRecord | None:
        """Write the end until it holds: the lease keeps the stream ours meanwhile."""
        attempt = 0
        while True:
            try:
                return await end_answer(self._database, hold, end)
            except DatabaseUnavailableError as error:
                attempt += 1
                log.warning("the end of an answer waits for the database: %s", error)
            except Exception:
                attempt += 1
                if attempt > 5:
                    raise
                log.exception("storing the end of an answer failed; trying again")
            await asyncio.sleep(_retry_pause(attempt))
