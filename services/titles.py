"""Titles of new threads: from the question at once, then by a model where one is set. A title never costs a turn."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from contextlib import aclosing
from uuid import UUID

from models.database import Database
from models.ids import new_id
from models.records import MessageTokens
from models.text import clean
from providers.base import Finish, GenerationRequest, PromptMessage, TextDelta, TokenUsage
from services.errors import CallerError
from services.generation import reported_tokens
from services.models import Models
from services.viewer import Viewer
from services.wakeups import Wakeups
from streams.tokens import estimate_tokens

log = logging.getLogger(__name__)

MAX_TITLE_CHARS = 80
# What a model says beyond this is not waited for. No limit is sent to the vendor: its tokens would have to do for the
# thinking too, and a model that thinks for longer would say nothing at all.
_ENOUGH_CHARS = MAX_TITLE_CHARS * 4
_DEADLINE_SECONDS = 30.0
_QUESTION_CHARS = 4_000
_INSTRUCTION = (
    "Write a title of at most six words for a conversation that begins with the text below, in the language of that "
    "text. Answer with the title alone: no quotes, no full stop.\n\n"
)
# Only a title that was made from the text is replaced: never the user's own.
_SET = "UPDATE threads SET title = $2, title_source = 'MODEL' WHERE id = $1 AND title_source = 'TEXT'"
_USED = """
INSERT INTO usage_events (id, owner_id, message_id, kind, model, status, prompt_tokens, completion_tokens,
    reasoning_tokens, cached_tokens, estimated, thread_id, prompt_price, cached_price, completion_price, cost_micros)
SELECT $1, $2, $3, 'TITLE', $4, 'COMPLETE', $5, $6, $7, $8, $9,
    (SELECT id FROM threads WHERE id = $10 AND NOT temporary), $11, $12, $13, $14
WHERE EXISTS (SELECT FROM users WHERE id = $2 AND deleted_at IS NULL)
ON CONFLICT (message_id, kind) DO NOTHING
"""


def title_from_text(text: str) -> str:
    """The first line with anything in it, cut at a word to at most 80 code points."""
    line = next((line for line in text.splitlines() if line.strip()), text)
    words = " ".join(line.split())
    if len(words) <= MAX_TITLE_CHARS:
        return words
    cut = words[: MAX_TITLE_CHARS - 1]
    if words[MAX_TITLE_CHARS - 1] == " ":
        return cut.rstrip() + "…"
    return (cut.rsplit(" ", 1)[0] if " " in cut[MAX_TITLE_CHARS // 2 :] else cut) + "…"


_QUOTES = (('"', '"'), ("'", "'"), ("“", "”"), ("„", "“"), ("«", "»"), ("»", "«"))


def _unquoted(title: str) -> str:
    """Without the quotes that models put around a title; quotes within it stay."""
    title = title.strip()
    for opening, closing in _QUOTES:
        inner = title[1:-1]
        if len(title) > 1 and title[0] == opening and title[-1] == closing and not {opening, closing} & set(inner):
            return inner.strip()
    return title if title.strip("\"'“”„«» ") else ""


class Titles:
    """Titles by a model, each in a task of its own that ends by its deadline or with `close`.

    Args:
        model_id: the model to ask for users who chose none; None leaves their titles as they were made from the text.
    """

    def __init__(self, database: Database, models: Models, wakeups: Wakeups, model_id: str | None) -> None:
        self._database = database
        self._models = models
        self._wakeups = wakeups
        self._model_id = model_id
        self._tasks: set[asyncio.Task[None]] = set()
        # For metrics: by how it went.
        self.outcomes: Counter[str] = Counter()

    def begin(
        self, viewer: Viewer, thread_id: UUID, assistant_message_id: UUID, question: str, chosen: str | None
    ) -> None:
        """Start to title a new thread by its first question; its usage is counted with the first answer's message.

        Args:
            chosen: the model that the viewer chose for titles, if any.
        """
        model_id = chosen or self._model_id
        if model_id is None:
            return
        title = self._title(viewer, thread_id, assistant_message_id, question, model_id)
        task = asyncio.create_task(title, name="title")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Give up titles that are not done."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _title(self, viewer: Viewer, thread_id: UUID, message_id: UUID, question: str, model_id: str) -> None:
        try:
            async with asyncio.timeout(_DEADLINE_SECONDS):
                async with self._database.acquire() as connection:
                    model, provider = await self._models.resolve(connection, viewer, model_id)
                prompt = _INSTRUCTION + question[:_QUESTION_CHARS]
                request = GenerationRequest(
                    model.vendor_name,
                    (PromptMessage.of("user", prompt),),
                    possible_output_tokens=model.possible_answer(estimate_tokens(prompt)),
                )
                said, usage = "", None
                async with aclosing(provider.stream(request)) as events:
                    async for event in events:
                        match event:
                            case TextDelta(text):
                                said += text
                                if len(said) >= _ENOUGH_CHARS:
                                    break
                            case TokenUsage():
                                usage = event
                            case Finish():
                                break
                said = clean(said)
                if usage is None:
                    tokens = MessageTokens(estimate_tokens(prompt), estimate_tokens(said), 0, 0, estimated=True)
                else:
                    tokens = reported_tokens(usage)
                title = _unquoted(title_from_text(said))
                prices = model.prices
                async with self._database.acquire() as connection:
                    if title:
                        await connection.execute(_SET, thread_id, title)
                    await connection.execute(
                        _USED,
                        *(new_id(), viewer.id, message_id, model.id),
                        *(tokens.prompt, tokens.completion, tokens.reasoning, tokens.cached, tokens.estimated),
                        thread_id,
                        *((prices.prompt, prices.cached, prices.completion) if prices else (None, None, None)),
                        prices.cost_micros(tokens) if prices else None,
                    )
                self.outcomes["made"] += 1
                await self._wakeups.ring(viewer.id)
        except CallerError:
            self.outcomes["no_model"] += 1
            log.debug("no key leads this user to the model of titles")
        except Exception as error:
            self.outcomes["failed"] += 1
            log.warning("a title could not be made: %s", type(error).__name__)
