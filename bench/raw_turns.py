"""RAW for turns: a question asked, its answer streamed, stored and ended, written by hand without GraphQL.

It writes the rows that the product writes, in as few statements as there can be: the question, the placeholder of the
answer, the stream with its lease and the idempotency key in one; what answers grew by, for all of them at once, as
often as the product; leases; the end with its usage event in one. It checks tokens as `bench.raw_server` does. What it
does not do: errors with codes, other models than one that says a word again and again, budgets, attachments, branches,
resuming, recovery of what a lost server left, stops, titles by a model, logs, metrics.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
from base64 import urlsafe_b64encode
from hashlib import sha256
from typing import Any
from uuid import UUID

import asyncpg
import orjson
import uvloop
from aiohttp import ClientConnectionResetError, WSMsgType, web

from bench.raw_server import Sessions, _json, _no_reset
from models.ids import new_id

_POOL_SIZE = 10
_LEASE_SECONDS = 7.0
_CHECKPOINT_SECONDS = 0.5
_HEARTBEAT_SECONDS = 25.0
_MOST_TEXT = 262_144
_TITLE_CHARS = 80
_TOKEN = " word"

# A repeat of the key writes nothing and answers nothing; which turn it made is asked then.
_ASK = """
WITH taken AS (
    INSERT INTO turns (id, owner_id, idempotency_key, fingerprint, thread_id, user_message_id, assistant_message_id)
    VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT (owner_id, idempotency_key) DO NOTHING RETURNING id
), thread AS (
    INSERT INTO threads (id, owner_id, title, title_source, pinned, temporary, created_at, updated_at)
    SELECT $5, $2, $8, 'TEXT', false, false, now(), now() FROM taken
), said AS (
    INSERT INTO messages (id, owner_id, thread_id, parent_id, active_child_id, depth, active, role, status, parts,
        model, created_at, updated_at)
    SELECT $6, $2, $5, NULL::uuid, $7, 0, true, 'USER', 'COMPLETE', $9::jsonb, NULL::text, now(), now() FROM taken
    UNION ALL
    SELECT $7, $2, $5, $6, NULL, 1, true, 'ASSISTANT', 'STREAMING', '[]', $10, now(), now() FROM taken
), stream AS (
    INSERT INTO streams (message_id, owner_id, holder, epoch, lease_expires_at)
    SELECT $7, $2, $11, 1, now() + make_interval(secs => $12) FROM taken
)
SELECT now() FROM taken
"""
_TAKEN = "SELECT fingerprint, thread_id, assistant_message_id FROM turns WHERE owner_id = $1 AND idempotency_key = $2"
_PROMPT = "SELECT role, parts FROM messages WHERE thread_id = $1 AND depth < $2 AND active ORDER BY depth"
_RENEW = """
UPDATE streams SET lease_expires_at = now() + make_interval(secs => $3)
WHERE message_id = ANY($1::uuid[]) AND holder = $2
"""
_CHECKPOINT = """
WITH mine AS (
    SELECT message_id FROM streams WHERE message_id = ANY($1::uuid[]) AND holder = $4 FOR KEY SHARE SKIP LOCKED
)
INSERT INTO stream_checkpoints (stream_id, from_offset, parts)
SELECT message_id, from_offset, parts FROM unnest($1::uuid[], $2::bigint[], $3::jsonb[])
    AS growth (message_id, from_offset, parts)
JOIN mine USING (message_id)
ON CONFLICT (stream_id, from_offset) DO UPDATE SET parts = excluded.parts
"""
_END = """
WITH thread AS (
    SELECT id FROM threads WHERE id = $2 FOR UPDATE
), held AS (
    DELETE FROM streams USING thread WHERE message_id = $1 AND epoch = 1 RETURNING message_id
), ended AS (
    UPDATE messages SET status = 'COMPLETE', parts = $3::jsonb, prompt_tokens = $4, completion_tokens = $5,
        reasoning_tokens = 0, cached_tokens = 0, updated_at = now(),
        duration_ms = (extract(epoch FROM now() - created_at) * 1000)::int
    FROM held WHERE messages.id = held.message_id RETURNING messages.thread_id
), touched AS (
    UPDATE threads SET updated_at = now() FROM ended WHERE threads.id = ended.thread_id
)
INSERT INTO usage_events (id, owner_id, message_id, thread_id, kind, model, status, prompt_tokens, completion_tokens,
    reasoning_tokens, cached_tokens, estimated)
VALUES ($6, $7, $1, $2, 'ANSWER', $8, 'COMPLETE', $4, $5, 0, 0, false)
ON CONFLICT (message_id, kind) DO NOTHING
"""


class Answer:
    """An answer that is being written, and the sockets that read it."""

    def __init__(self, message_id: UUID, thread_id: UUID, owner_id: UUID) -> None:
        self.message_id = message_id
        self.thread_id = thread_id
        self.owner_id = owner_id
        self.prefix = urlsafe_b64encode(message_id.bytes)[:22].decode() + "."
        self.words: list[str] = []
        self.length = 0
        self.saved_words = 0
        self.saved_length = 0
        self.ended = False
        self.readers: list[web.WebSocketResponse] = []

    def event(self, text: str) -> bytes:
        """A delta that ends where the answer does now."""
        return orjson.dumps({"cursor": f"{self.prefix}{self.length}", "kind": "TEXT", "text": text})

    async def tell(self, event: bytes) -> None:
        """Send it to everybody who reads."""
        for ws in list(self.readers):
            with contextlib.suppress(ClientConnectionResetError, ConnectionResetError):
                await ws.send_frame(event, WSMsgType.TEXT)


class Turns:
    """The two endpoints, and what keeps answers while they are written."""

    def __init__(self, pool: Any, sessions: Sessions) -> None:
        self._pool = pool
        self._sessions = sessions
        self._holder = new_id()
        self._answers: dict[UUID, Answer] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Begin to keep answers."""
        self._own(self._every(_LEASE_SECONDS / 3, self._renew))
        self._own(self._every(_CHECKPOINT_SECONDS, self._checkpoint))

    async def ask(self, request: web.Request) -> web.Response:
        """A question in a new thread: text and key, how many words are answered, how fast, after how much thought."""
        owner_id = self._sessions.user(request)
        body = await request.read()
        asked = orjson.loads(body)
        key, text, words, rate = asked["idempotencyKey"], asked["text"], asked["words"], asked["rate"]
        thought = asked["thought"]
        if not isinstance(key, str) or not isinstance(text, str) or not text.strip() or len(text) > _MOST_TEXT:
            raise web.HTTPBadRequest
        thread_id, question_id, answer_id = new_id(), new_id(), new_id()
        fingerprint = sha256(orjson.dumps([text, words, rate])).digest()
        parts = orjson.dumps([{"type": "text", "text": text}]).decode()
        async with self._pool.acquire() as connection:
            created = await connection.fetchval(
                _ASK,
                *(new_id(), owner_id, key, fingerprint, thread_id, question_id, answer_id),
                *(text.strip()[:_TITLE_CHARS], parts, "raw", self._holder, _LEASE_SECONDS),
            )
            if created is None:
                before = await connection.fetchrow(_TAKEN, owner_id, key)
                if before["fingerprint"] != fingerprint:
                    raise web.HTTPConflict
                thread_id, answer_id = before["thread_id"], before["assistant_message_id"]
        if created is not None:
            answer = self._answers[answer_id] = Answer(answer_id, thread_id, owner_id)
            self._own(self._write(answer, words, rate, thought))
        return _json({"threadId": f"thread_{thread_id.hex}", "messageId": f"message_{answer_id.hex}"})

    async def read(self, request: web.Request) -> web.StreamResponse:
        """A socket on which each text is the id of an answer to be read, from its start to its end."""
        owner_id = self._sessions.user(request)
        ws = web.WebSocketResponse(heartbeat=_HEARTBEAT_SECONDS, compress=False)
        await ws.prepare(request)
        async for message in ws:
            answer = self._answers.get(UUID(hex=message.data.removeprefix("message_")))
            if answer is None or answer.owner_id != owner_id:
                await ws.send_str('{"ended":true}')
                continue
            if answer.words:
                await ws.send_frame(answer.event("".join(answer.words)), WSMsgType.TEXT)
            answer.readers.append(ws)
        return ws

    async def _write(self, answer: Answer, words: int, rate: float, thought: float) -> None:
        async with self._pool.acquire() as connection:
            rows = await connection.fetch(_PROMPT, answer.thread_id, 1)
        said = ["".join(part["text"] for part in orjson.loads(parts)) for _, parts in rows]
        if thought:
            await asyncio.sleep(thought)
        loop = asyncio.get_running_loop()
        pause, due = 1 / rate if rate else 0.0, loop.time()
        for number in range(words):
            due += pause
            if (early := due - loop.time()) > 0:
                await asyncio.sleep(early)
            elif number % 64 == 63:
                await asyncio.sleep(0)
            answer.words.append(_TOKEN)
            answer.length += len(_TOKEN)
            if answer.readers:
                await answer.tell(answer.event(_TOKEN))
        parts = orjson.dumps([{"type": "text", "text": "".join(answer.words)}]).decode()
        prompt_tokens = sum(len(text.split()) for text in said)
        async with self._pool.acquire() as connection:
            await connection.execute(
                _END,
                *(answer.message_id, answer.thread_id, parts, prompt_tokens, words, new_id(), answer.owner_id, "raw"),
            )
        del self._answers[answer.message_id]
        await answer.tell(b'{"ended":true}')

    async def _renew(self) -> None:
        if self._answers:
            async with self._pool.acquire() as connection:
                await connection.execute(_RENEW, list(self._answers), self._holder, _LEASE_SECONDS)

    async def _checkpoint(self) -> None:
        grown = []
        for answer in self._answers.values():
            if answer.length > answer.saved_length:
                text = "".join(answer.words[answer.saved_words :])
                parts = orjson.dumps([{"type": "text", "text": text}]).decode()
                grown.append((answer.message_id, answer.saved_length, parts))
                answer.saved_words, answer.saved_length = len(answer.words), answer.length
        if grown:
            async with self._pool.acquire() as connection:
                await connection.execute(_CHECKPOINT, *map(list, zip(*grown, strict=True)), self._holder)

    async def _every(self, seconds: float, tick: Any) -> None:
        while True:
            await asyncio.sleep(seconds)
            await tick()

    def _own(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def main() -> None:
    """Serve on 127.0.0.1 until the process is ended."""
    url = os.environ["DATABASE_URL"]
    async with asyncpg.create_pool(url, min_size=_POOL_SIZE, max_size=_POOL_SIZE, reset=_no_reset) as pool:
        turns = Turns(pool, Sessions(os.environ["SESSION_SECRET"]))
        turns.start()
        app = web.Application()
        app.router.add_post("/turns", turns.ask)
        app.router.add_get("/read", turns.read)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", int(os.environ["PORT"])).start()
        # As the product does: full collections of what lives for ever stop a server for nothing.
        gc.collect()
        gc.freeze()
        gc.set_threshold(20_000, 20, 100)
        await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main())
