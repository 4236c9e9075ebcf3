"""A database of 1,000,000 messages of 1,000 users, and how long `search` takes in it.

The words are made up, and as unevenly used as words are (the second is half as frequent as the first). One user has
100,000 of the messages, the others share the rest. `fill` makes the rows, for any benchmark that wants many;
`python -m bench.search_data` starts a PostgreSQL of its own, fills it and measures.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import asyncpg
import orjson

from models.database import Database
from models.embedded import EmbeddedPostgres
from services.paging import PageRequest
from services.search import Search
from services.viewer import Viewer

_WORDS = 20_000
_SENTENCES = 50_000
_SENTENCE_WORDS = 12
_THREAD_MESSAGES = 20
_DAYS = 365
_SYLLABLES = "ba be bi bo bu da de di do du fa fe fi ka ke ki ko la le li lo ma me mi mo na ne ni no ra re ri ro sa se si so ta te ti to va ve vi wa we za zo str pl"  # noqa: E501 - one list
_INDEXES = {
    "search_documents_words": "CREATE INDEX search_documents_words ON search_documents USING gin (document) "
    "WITH (fastupdate = off)",
}


class Vocabulary:
    """Made-up words, the most used first, and sentences of them."""

    def __init__(self, chance: random.Random) -> None:
        syllables = _SYLLABLES.split()
        words: dict[str, None] = {}
        while len(words) < _WORDS:
            # Frequent words are short.
            length = 1 + chance.randrange(2) if len(words) < 100 else 2 + chance.randrange(4)
            words["".join(chance.choices(syllables, k=length))] = None
        self.words = list(words)
        self.sentences = [
            " ".join(self.words[int(_WORDS ** chance.random()) - 1] for _ in range(_SENTENCE_WORDS))
            for _ in range(_SENTENCES)
        ]


async def fill(url: str, *, messages: int = 1_000_000, users: int = 1_000, heavy: int = 100_000) -> list[UUID]:
    """Fill a migrated, empty database; the users, the one with `heavy` messages first. The same at every run.

    Triggers do not run for these rows: what they would keep is made after them, in one go.
    """
    chance = random.Random(20)
    vocabulary = Vocabulary(chance)
    owners = [UUID(int=0x7 << 76 | 0b10 << 62 | chance.getrandbits(62)) for _ in range(users)]
    turns = _turns(chance, owners, messages, heavy)
    connection = await asyncpg.connect(url)
    try:
        await connection.execute("SET session_replication_role = replica")
        await connection.copy_records_to_table(
            "users", records=[(owner, True) for owner in owners], columns=["id", "anonymous"]
        )
        while batch := [thread for _, thread in zip(range(1_000), turns, strict=False)]:
            await _copy(connection, chance, vocabulary, batch)
        await connection.execute("VACUUM (ANALYZE) messages, threads")
    finally:
        await connection.close()
    await _make_documents(url)
    return owners


def _turns(chance: random.Random, owners: list[UUID], messages: int, heavy: int) -> Iterator[tuple[UUID, datetime]]:
    """Threads in the order of their beginning: whose, and when."""
    of_all = [owners[0]] * (heavy // _THREAD_MESSAGES)
    rest = messages // _THREAD_MESSAGES - len(of_all)
    of_all += [owners[1 + number % (len(owners) - 1)] for number in range(rest)]
    chance.shuffle(of_all)
    began = datetime.now(UTC) - timedelta(days=_DAYS)
    step = timedelta(days=_DAYS) / len(of_all)
    return ((owner, began + number * step) for number, owner in enumerate(of_all))


async def _copy(
    connection: asyncpg.Connection,
    chance: random.Random,
    vocabulary: Vocabulary,
    batch: list[tuple[UUID, datetime]],
) -> None:
    threads: list[tuple[object, ...]] = []
    messages: list[tuple[object, ...]] = []
    for owner, at in batch:
        thread_id = _id(chance, at)
        title = " ".join(chance.choice(vocabulary.sentences).split()[:6])
        threads.append((thread_id, owner, title, "TEXT", chance.random() < 0.1, at))
        parent = None
        for depth in range(_THREAD_MESSAGES):
            key = _id(chance, at + timedelta(seconds=20 * depth))
            sentences = chance.choices(vocabulary.sentences, k=chance.randint(6, 14) if depth % 2 else 1)
            parts = orjson.dumps([{"type": "text", "text": ". ".join(sentences)}]).decode()
            role = "ASSISTANT" if depth % 2 else "USER"
            messages.append((key, owner, thread_id, parent, depth, True, role, "COMPLETE", parts, at))
            parent = key
    await connection.copy_records_to_table(
        "threads", records=threads, columns=["id", "owner_id", "title", "title_source", "archived", "created_at"]
    )
    await connection.copy_records_to_table(
        "messages",
        records=messages,
        columns=[
            "id",
            "owner_id",
            "thread_id",
            "parent_id",
            "depth",
            "active",
            "role",
            "status",
            "parts",
            "created_at",
        ],
    )


def _id(chance: random.Random, at: datetime) -> UUID:
    return UUID(
        int=int(at.timestamp() * 1000) << 80
        | 0x7 << 76
        | chance.getrandbits(12) << 64
        | 0b10 << 62
        | chance.getrandbits(62)
    )


async def _make_documents(url: str) -> None:
    """What the triggers would have made; the index after the rows, which is ten times as fast."""

    async def make(half: int) -> None:
        connection = await asyncpg.connect(url)
        try:
            await connection.execute("SET session_replication_role = replica")
            await connection.execute(
                """
                INSERT INTO search_documents (id, owner_id, thread_id, message_id, document)
                SELECT id, owner_id, thread_id, id, search_document(owner_id, id, search_text(parts))
                FROM messages WHERE uuid_hash(thread_id) & 1 = $1
                """,
                half,
            )
        finally:
            await connection.close()

    connection = await asyncpg.connect(url)
    try:
        for index in _INDEXES:
            await connection.execute(f"DROP INDEX {index}")
        await asyncio.gather(make(0), make(1))
        await connection.execute("SET session_replication_role = replica")
        await connection.execute(
            """
            INSERT INTO search_documents (id, owner_id, thread_id, document)
            SELECT id, owner_id, id, search_document(owner_id, NULL, title) FROM threads
            """
        )
        await connection.execute("SET maintenance_work_mem = '512MB'")
        for statement in _INDEXES.values():
            await connection.execute(statement)
        await connection.execute("VACUUM (ANALYZE) search_documents")
    finally:
        await connection.close()


_WAYS: dict[str, Callable[[Vocabulary], str]] = {
    "a rare word": lambda words: f"{words.words[15_000]} ",
    "the most used word": lambda words: f"{words.words[0]} ",
    "two words": lambda words: f"{words.words[20]} {words.words[300]}",
    "the two most used": lambda words: f"{words.words[0]} {words.words[1]}",
    "a beginning (3 letters)": lambda words: words.words[200][:3],
    "a beginning (1 letter)": lambda words: words.words[0][0],
    "a phrase": lambda words: '"' + " ".join(words.sentences[7].split()[:3]) + '"',
    "one slip": lambda words: _slipped(words, 1),
    "two slips": lambda words: _slipped(words, 2),
}


def _slipped(words: Vocabulary, slips: int) -> str:
    word = next(word for word in words.words[1_000:] if len(word) >= 9)
    return word[:3] + "q" + word[4:6] + ("x" if slips > 1 else word[6]) + word[7:]


async def measure(url: str, owners: list[UUID], *, rounds: int = 7) -> None:
    """Print how long the first page takes, in all of its statements; the median, and the fastest, in milliseconds."""
    words = Vocabulary(random.Random(20))
    database = Database(url, pool_size=1, timeout_seconds=60)
    await database.connect()
    try:
        search = Search(database)
        for whose, owner in (("an average user", owners[len(owners) // 2]), ("the heavy user", owners[0])):
            viewer = Viewer(owner, anonymous=True, expires_at=2**31)
            print(f"\n| {whose} | hits | median ms | fastest ms |\n| --- | --- | --- | --- |")
            for name, make in _WAYS.items():
                took: list[float] = []
                for _ in range(rounds):
                    began = time.perf_counter()
                    page = await search.page(viewer, make(words), PageRequest(25, None, None, backwards=False))
                    took.append((time.perf_counter() - began) * 1000)
                hits = f"{len(page.records)}{'+' if page.has_next else ''}"
                print(f"| {name} | {hits} | {statistics.median(took):.1f} | {min(took):.1f} |")
        await _measure_storing(url, owners[1], words)
    finally:
        await database.close()


async def _measure_storing(url: str, owner: UUID, words: Vocabulary) -> None:
    """What the search documents add to storing an answer."""
    connection = await asyncpg.connect(url)
    try:
        print("\n| an answer of | with search, median ms | without |\n| --- | --- | --- |")
        answers = await connection.fetch(
            "SELECT id FROM messages WHERE owner_id = $1 AND role = 'ASSISTANT' LIMIT 25", owner
        )
        chance = random.Random(21)
        for size in (2_000, 50_000):
            medians = []
            for role in ("origin", "replica"):
                await connection.execute(f"SET session_replication_role = {role}")
                took = []
                for answer in answers:
                    text = ". ".join(chance.choices(words.sentences, k=size // 70))[:size]
                    parts = orjson.dumps([{"type": "text", "text": text}]).decode()
                    began = time.perf_counter()
                    await connection.execute("UPDATE messages SET parts = $2::jsonb WHERE id = $1", answer["id"], parts)
                    took.append((time.perf_counter() - began) * 1000)
                medians.append(statistics.median(took))
            print(f"| {size} bytes | {medians[0]:.1f} | {medians[1]:.1f} |")
    finally:
        await connection.close()


async def _main() -> None:
    with tempfile.TemporaryDirectory(prefix="threadgraph-search-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        with EmbeddedPostgres(folder / "postgres") as postgres:
            await Database(postgres.url, pool_size=1, timeout_seconds=60).migrate()
            await measure(postgres.url, await fill(postgres.url))


if __name__ == "__main__":
    asyncio.run(_main())
