"""Made-up data, as much as is wanted: for looking at the product, and for measuring it at sizes that hurt.

Users have projects, threads of very different lengths with a few branches, and usage over the last 60 days. The same
seed makes the same data at the same moment; ids and times move with the clock, so that a second run adds to the first.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any
from uuid import UUID

from models.database import Database
from models.ids import id_of_time
from models.parts import ReasoningPart, TextPart, parts_to_json

if TYPE_CHECKING:
    from asyncpg import Connection

DAYS = 60
_BATCH_MESSAGES = 5_000
_STATEMENT_SECONDS = 600.0

_SPOKEN = (
    "a the of and in to is that for with as by on it from this are be or an which at not can has more one stream "
    "cursor message thread model answer reader server database row index page token event buffer because while before "
    "after however every another whole often slowly exactly once again together column query plan cache network "
    "request client browser function test file folder disk memory time zone name number list order key value user "
    "price limit question word sentence paragraph letter language translation summary example reason result error "
    "change version release branch merge review deploy rollback backup restore migrate measure compare explain write"
)
_SYLLABLES = "ba ce di fo gu ha je ki lo mu na pe ro su ta ve wi xo yu za bre cli fle gri plo"
_RARE_WORDS = 6_000
_TOPICS = ("Work", "Research", "Recipes", "Garden", "Thesis", "House", "Music", "Travel", "Server", "Novel")
_COLORS = ("ORANGE", "GREEN", "BLUE", "PURPLE", None)


@dataclass(frozen=True, slots=True)
class _Model:
    """A model by its id, with prices in millionths of the currency for a million tokens: prompt, cached, completion."""

    id: str
    prices: tuple[int, int, int] | None
    reasons: bool


_MODELS = (
    _Model("gpt-5-mini", (250_000, 25_000, 2_000_000), reasons=False),
    _Model("gpt-5", (1_250_000, 125_000, 10_000_000), reasons=True),
    _Model("scripted", None, reasons=False),
)
_MODEL_WEIGHTS = (6, 3, 1)
_COLUMNS = {
    "users": ("id", "anonymous", "created_at"),
    "projects": ("id", "owner_id", "name", "description", "color", "prompt", "created_at", "updated_at"),
    "threads": (
        *("id", "owner_id", "title", "title_source", "pinned", "archived", "temporary", "project_id", "expires_at"),
        *("created_at", "updated_at"),
    ),
    "messages": (
        *("id", "owner_id", "thread_id", "parent_id", "active_child_id", "depth", "active", "role", "status", "parts"),
        *("model", "error_code", "error_message", "prompt_tokens", "completion_tokens", "reasoning_tokens"),
        *("cached_tokens", "tokens_estimated", "duration_ms", "created_at", "updated_at"),
    ),
    "usage_events": (
        *("id", "owner_id", "message_id", "thread_id", "kind", "model", "status", "prompt_tokens", "completion_tokens"),
        *("reasoning_tokens", "cached_tokens", "estimated", "prompt_price", "cached_price", "completion_price"),
        *("cost_micros", "created_at"),
    ),
}
_ACTIVE_CHILD = _COLUMNS["messages"].index("active_child_id")
_ERRORS = {
    "FAILED": ("PROVIDER_UNAVAILABLE", "The provider of the model failed."),
    "INTERRUPTED": ("SERVER_LOST", "The server that wrote this answer stopped."),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedPlan:
    """How much to make, in all: exactly so many users, threads and messages. `now` is the end of the 60 days."""

    users: int
    threads: int
    messages: int
    seed: int
    now: datetime

    def __post_init__(self) -> None:
        if min(self.users, self.threads) < 1:
            raise ValueError("there must be a user and a thread at least")
        if self.messages < self.threads:
            raise ValueError("a thread has a message at least")


@dataclass(slots=True)
class SeedBatch:
    """Rows by table, in the order of `_COLUMNS`; whole threads."""

    rows: dict[str, list[Any]] = field(default_factory=lambda: {table: [] for table in _COLUMNS})

    @property
    def messages(self) -> int:
        """How many messages it has."""
        return len(self.rows["messages"])


async def seed(database: Database, plan: SeedPlan, tell: Callable[[int], None] = lambda messages: None) -> UUID:
    """Make the data, a batch a transaction, and leave it with statistics as autovacuum would.

    The counts of projects, the sums of usage and all else that triggers keep is kept; the feeds of the new users are
    not told of each row.

    Args:
        tell: called behind every batch with the number of messages so far.

    Returns:
        The first user, who has more than others.

    Raises:
        DatabaseUnavailableError: the database went away; what was made before stays.
    """
    batches = seed_batches(plan)
    first_user: UUID | None = None
    messages = 0
    async with database.session(statement_seconds=_STATEMENT_SECONDS) as connection:
        tell(0)
        batch = next(batches, None)
        while batch is not None:
            if first_user is None:
                first_user = batch.rows["users"][0][0]
            # The next one is made while the database takes this one in.
            made, _ = await asyncio.gather(asyncio.to_thread(next, batches, None), _write(connection, batch))
            messages += batch.messages
            tell(messages)
            batch = made
        for table in await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'"):
            await connection.execute(f'VACUUM (ANALYZE) "{table[0]}"')
    assert first_user is not None
    return first_user


async def _write(connection: Connection, batch: SeedBatch) -> None:
    async with connection.transaction():
        await connection.execute("SET LOCAL threadgraph.quiet = 'on'")
        for table, rows in batch.rows.items():
            if rows:
                await connection.copy_records_to_table(table, records=rows, columns=_COLUMNS[table])


def seed_batches(plan: SeedPlan) -> Iterator[SeedBatch]:
    """The rows of a plan, in transactions' worth: owners come before what they own."""
    chance = random.Random(f"{plan.seed}/shape")
    words = _Words(random.Random(f"{plan.seed}/words"), min(20_000, 200 + plan.messages))
    threads_of_users = _shares(plan.threads, [3.0, *(chance.uniform(0.3, 1.7) for _ in range(plan.users - 1))], 0)
    lengths = iter(_shares(plan.messages, [chance.lognormvariate(0, 1.2) for _ in range(plan.threads)], 1))
    batch = SeedBatch()
    for number, count in enumerate(threads_of_users):
        user = _User(batch, plan, random.Random(f"{plan.seed}/{number}"), words)
        for _ in range(count):
            user.add_thread(batch, next(lengths))
            if batch.messages >= _BATCH_MESSAGES:
                yield batch
                batch = SeedBatch()
    yield batch


def _shares(total: int, weights: list[float], least: int) -> list[int]:
    """A whole number for each weight, in proportion and at least so much, that add up to the total exactly."""
    free = total - least * len(weights)
    sums = list(accumulate(weights))
    marks = [0, *(round(free * sum_so_far / sums[-1]) for sum_so_far in sums)]
    return [least + after - before for before, after in pairwise(marks)]


class _Words:
    """Sentences with a few words that are everywhere and thousands that are rare, as search meets them."""

    def __init__(self, chance: random.Random, sentences: int) -> None:
        spoken, syllables = _SPOKEN.split(), _SYLLABLES.split()
        rare = ["".join(chance.choices(syllables, k=chance.randint(2, 4))) for _ in range(_RARE_WORDS)]
        words = spoken + rare
        # After Zipf: the n-th word is n times as rare as the first.
        weights = list(accumulate(1 / (place + 8) for place in range(len(words))))
        lengths = [chance.randint(5, 18) for _ in range(sentences)]
        drawn = iter(chance.choices(words, cum_weights=weights, k=sum(lengths)))
        self._sentences = [" ".join(next(drawn) for _ in range(length)).capitalize() for length in lengths]

    def title(self, chance: random.Random) -> str:
        return " ".join(chance.choice(self._sentences).split()[:6])

    def text(self, chance: random.Random, sentences: int) -> str:
        return ". ".join(chance.choices(self._sentences, k=sentences)) + "."


class _User:
    """One user's rows; made with them and their projects."""

    def __init__(self, batch: SeedBatch, plan: SeedPlan, chance: random.Random, words: _Words) -> None:
        self._plan = plan
        self.chance = chance
        self.words = words
        began = plan.now - timedelta(days=DAYS)
        self.id = self.key(began)
        batch.rows["users"].append((self.id, True, began))
        self._projects: list[UUID | None] = [None, None, None]
        for name in chance.sample(_TOPICS, chance.randint(1, 4)):
            project_id, at = self.key(began), began + timedelta(minutes=len(self._projects))
            prompt = words.text(chance, 2) if chance.random() < 0.5 else None
            about = words.title(chance)
            batch.rows["projects"].append((project_id, self.id, name, about, chance.choice(_COLORS), prompt, at, at))
            self._projects.append(project_id)

    def add_thread(self, batch: SeedBatch, length: int) -> None:
        """A thread with exactly so many messages."""
        chance, now = self.chance, self._plan.now
        age_hours = DAYS * 24 * chance.random() ** 1.5
        began = now - timedelta(hours=age_hours)
        # A turn every few minutes; a long thread fits into the time there is.
        pace = min(timedelta(minutes=chance.uniform(1, 20)), (now - began) / (length + 1))
        temporary = chance.random() < 0.01
        thread = _Tree(self, batch, self.key(began), began, pace, temporary=temporary)
        thread.grow(length)
        batch.rows["threads"].append(
            (
                *(thread.id, self.id, self.words.title(chance), chance.choice(("TEXT", "MODEL", "USER"))),
                *(chance.random() < 0.02, chance.random() < 0.08, temporary),
                None if temporary else chance.choice(self._projects),
                now + timedelta(days=1) if temporary else None,
                *(began, thread.last_at),
            )
        )

    def key(self, at: datetime) -> UUID:
        """A new id of this moment."""
        return id_of_time(round(at.timestamp() * 1000), self.chance.getrandbits(74))


class _Tree:
    """The messages of a thread, as they are written: a path, and here and there an older version beside it."""

    def __init__(
        self, user: _User, batch: SeedBatch, thread_id: UUID, began: datetime, pace: timedelta, *, temporary: bool
    ) -> None:
        self.id = thread_id
        self.last_at = began
        self._user = user
        self._chance = user.chance
        self._words = user.words
        self._batch = batch
        self._pace = pace
        self._temporary = temporary
        self._history_chars = 0
        self._leaf: list[Any] | None = None
        self._depth = 0

    def grow(self, length: int) -> None:
        """So many messages, and the usage of their answers."""
        chance, left = self._chance, length
        while left > 0:
            parent = self._leaf
            if left >= 4 and chance.random() < 0.03:
                # The question was asked in other words first.
                question = self._add_question(parent, active=False)
                self._add_answer(question, active=False)
                left -= 2
            question = self._add_question(parent, active=True)
            left -= 1
            if left >= 2 and chance.random() < 0.04:
                # The answer was asked for again.
                self._add_answer(question, active=False)
                left -= 1
            self._leaf = question
            if left > 0:
                self._leaf = self._add_answer(question, active=True)
                left -= 1
            self._depth += 2

    def _add_question(self, parent: list[Any] | None, *, active: bool) -> list[Any]:
        text = self._words.text(self._chance, self._chance.randint(1, 4))
        self.last_at += self._pace / 2
        return self._add(parent, active, "USER", "COMPLETE", parts_to_json([TextPart(text)]), len(text))

    def _add_answer(self, question: list[Any], *, active: bool) -> list[Any]:
        chance = self._chance
        model = chance.choices(_MODELS, _MODEL_WEIGHTS)[0]
        status = chance.choices(("COMPLETE", "STOPPED", "INTERRUPTED", "FAILED"), (96, 2, 1, 1))[0]
        text = self._words.text(chance, chance.randint(3, 14))
        thought = self._words.text(chance, 3) if model.reasons else ""
        parts = parts_to_json([*([ReasoningPart(thought)] if thought else []), TextPart(text)])
        prompt_tokens = self._history_chars // 4 + 20
        cached_tokens = prompt_tokens // 2 if prompt_tokens > 1_024 else 0
        reasoning_tokens = len(thought) // 4
        completion_tokens = len(text) // 4 + reasoning_tokens
        self.last_at += min(self._pace / 2, timedelta(seconds=completion_tokens / 40))
        tokens = (prompt_tokens, completion_tokens, reasoning_tokens, cached_tokens)
        message = self._add(
            question, active, "ASSISTANT", status, parts, len(text), model.id, tokens, completion_tokens * 25
        )
        self._add_usage(message, model, status, tokens)
        return message

    def _add(
        self,
        parent: list[Any] | None,
        active: bool,
        role: str,
        status: str,
        parts: str,
        chars: int,
        model: str | None = None,
        tokens: tuple[int, int, int, int] | None = None,
        duration_ms: int | None = None,
    ) -> list[Any]:
        key = self._user.key(self.last_at)
        depth = self._depth + (role == "ASSISTANT")
        row = [
            *(key, self._user.id, self.id, parent[0] if parent else None, None),
            *(depth, active, role, status, parts, model),
            *_ERRORS.get(status, (None, None)),
            *(tokens or (None, None, None, None)),
            *(False, duration_ms, self.last_at, self.last_at),
        ]
        # The one on the path comes last, and is what the parent remembers.
        if parent is not None:
            parent[_ACTIVE_CHILD] = key
        self._batch.rows["messages"].append(row)
        if active:
            self._history_chars += chars
        return row

    def _add_usage(self, message: list[Any], model: _Model, status: str, tokens: tuple[int, int, int, int]) -> None:
        prompt, completion, _, cached = tokens
        cost = None
        if model.prices is not None:
            prompt_price, cached_price, completion_price = model.prices
            exact = (prompt - cached) * prompt_price + cached * cached_price + completion * completion_price
            cost = (exact + 500_000) // 1_000_000
        self._batch.rows["usage_events"].append(
            (
                *(self._user.key(self.last_at), self._user.id, message[0]),
                *(None if self._temporary else self.id, "ANSWER", model.id, status, *tokens, False),
                *(model.prices or (None, None, None)),
                *(cost, self.last_at),
            )
        )
