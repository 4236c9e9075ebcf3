"""RAW: the same answers without GraphQL, written by hand for four endpoints. The floor that the product is held to.

aiohttp, asyncpg, orjson and uvloop; one statement a request, tuples of columns straight into JSON, no objects between.
It checks the product's anonymous-session tokens (remembered once verified) and filters every row by its owner, as any
server has to. What it does not do: errors with codes, cursors for walking backwards, cost limits, stored, shared or
resumable streams (its producer writes straight to the one reader's socket), checkpoints, leases, drain.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import struct
import time
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections import OrderedDict
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import jwt
import orjson
import uvloop
from aiohttp import ClientConnectionResetError, WSMsgType, web

from providers.scripted import Beat

_POOL_SIZE = 10
_MAX_PAGE = 100
_CACHED_TOKENS = 10_000
_HEARTBEAT_SECONDS = 25.0
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_POSITION = struct.Struct(">cBq16s")
_TOP = (True, datetime(9999, 1, 1, tzinfo=UTC), UUID(int=2**128 - 1))
_TOKEN = " word"

_THREADS = """
SELECT t.id, t.title, t.pinned, t.created_at, t.updated_at, p.id, p.name FROM (
    SELECT id, title, pinned, created_at, updated_at, project_id FROM threads
    WHERE owner_id = $1 AND NOT archived AND NOT temporary AND (pinned, updated_at, id) < ($2, $3, $4)
    ORDER BY pinned DESC, updated_at DESC, id DESC LIMIT $5
) t LEFT JOIN projects p ON p.id = t.project_id AND p.owner_id = $1
ORDER BY t.pinned DESC, t.updated_at DESC, t.id DESC
"""
_HISTORIES = """
SELECT t.id, t.title, m.id, m.role, m.created_at,
    CASE WHEN jsonb_array_length(m.parts) = 1 AND m.parts -> 0 ->> 'type' = 'text' THEN m.parts -> 0 ->> 'text'
    ELSE (SELECT coalesce(string_agg(part ->> 'text', '' ORDER BY place) FILTER (WHERE part ->> 'type' = 'text'), '')
        FROM jsonb_array_elements(m.parts) WITH ORDINALITY AS each (part, place)) END
FROM (
    SELECT id, title, pinned, updated_at FROM threads
    WHERE owner_id = $1 AND NOT archived AND NOT temporary
    ORDER BY pinned DESC, updated_at DESC, id DESC LIMIT $2
) t LEFT JOIN LATERAL (
    SELECT id, depth, role, parts, created_at FROM messages
    WHERE thread_id = t.id AND owner_id = $1 AND active ORDER BY depth DESC LIMIT $3
) m ON true
ORDER BY t.pinned DESC, t.updated_at DESC, t.id DESC, m.depth
"""


class Sessions:
    """Verifies tokens; a verified one is remembered by its hash until it expires."""

    def __init__(self, secret: str) -> None:
        self._secret = secret
        self._verified: OrderedDict[bytes, tuple[UUID, float]] = OrderedDict()

    def user(self, request: web.Request) -> UUID:
        """The user a request's bearer token stands for; HTTPUnauthorized where there is none."""
        header = request.headers.get("Authorization", "")
        if not header.startswith("Bearer "):
            raise web.HTTPUnauthorized
        token = header[7:]
        digest = sha256(token.encode()).digest()
        user, expires_at = self._verified.get(digest) or self._verify(token, digest)
        if expires_at <= time.time():
            raise web.HTTPUnauthorized
        return user

    def _verify(self, token: str, digest: bytes) -> tuple[UUID, float]:
        try:
            claims = jwt.decode(token, self._secret, algorithms=["HS256"], issuer="threadgraph")
            verified = UUID(hex=claims["sub"].removeprefix("user_")), float(claims["exp"])
        except (jwt.PyJWTError, KeyError, ValueError) as error:
            raise web.HTTPUnauthorized from error
        self._verified[digest] = verified
        if len(self._verified) > _CACHED_TOKENS:
            self._verified.popitem(last=False)
        return verified


class Handlers:
    """The four endpoints."""

    def __init__(self, pool: Any, sessions: Sessions) -> None:
        self._pool = pool
        self._sessions = sessions
        self._beat = Beat(asyncio.get_running_loop())
        self._audience: set[web.WebSocketResponse] = set()
        self._speaking: asyncio.Task[None] | None = None

    async def threads(self, request: web.Request) -> web.Response:
        """A page of threads with their projects: `?first=50&after=<cursor>`."""
        user = self._sessions.user(request)
        first = _number(request, "first")
        after = request.query.get("after")
        async with self._pool.acquire() as connection:
            rows = await connection.fetch(_THREADS, user, *(_TOP if after is None else _position(after)), first + 1)
        more = len(rows) > first
        if more:
            rows.pop()
        nodes = [
            {
                "id": f"thread_{key.hex}",
                "title": title,
                "pinned": pinned,
                "createdAt": created,
                "updatedAt": updated,
                "project": None if project_id is None else {"id": f"project_{project_id.hex}", "name": project_name},
            }
            for key, title, pinned, created, updated, project_id, project_name in rows
        ]
        page_info = {
            "hasNextPage": more,
            "hasPreviousPage": after is not None,
            "startCursor": _cursor(rows[0]) if rows else None,
            "endCursor": _cursor(rows[-1]) if rows else None,
        }
        return _json({"data": {"threads": {"nodes": nodes, "pageInfo": page_info}}})

    async def histories(self, request: web.Request) -> web.Response:
        """The first threads with their last messages: `?threads=10&messages=10`."""
        user = self._sessions.user(request)
        threads, messages = _number(request, "threads"), _number(request, "messages")
        async with self._pool.acquire() as connection:
            rows = await connection.fetch(_HISTORIES, user, threads, messages)
        nodes: list[dict[str, Any]] = []
        last: UUID | None = None
        said: list[dict[str, Any]] = []
        for thread_id, title, key, role, created, text in rows:
            if thread_id != last:
                last, said = thread_id, []
                nodes.append({"id": f"thread_{thread_id.hex}", "title": title, "messages": {"nodes": said}})
            if key is not None:
                said.append({"id": f"message_{key.hex}", "role": role, "text": text, "createdAt": created})
        return _json({"data": {"threads": {"nodes": nodes}}})

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """A socket that is sent `?rate=30` tokens a second until it closes, after `&silence=4` seconds."""
        self._sessions.user(request)
        rate, silence = _number(request, "rate"), _number(request, "silence")
        ws = web.WebSocketResponse(heartbeat=_HEARTBEAT_SECONDS, compress=False)
        await ws.prepare(request)
        producer = asyncio.create_task(_produce(ws, self._beat, rate, silence))
        try:
            async for _ in ws:
                pass
        finally:
            producer.cancel()
            await asyncio.gather(producer, return_exceptions=True)
        return ws

    async def fanout(self, request: web.Request) -> web.StreamResponse:
        """A socket that is sent what all these sockets are sent: `?rate=30` tokens a second, from the first one on."""
        self._sessions.user(request)
        rate = _number(request, "rate")
        ws = web.WebSocketResponse(heartbeat=_HEARTBEAT_SECONDS, compress=False)
        await ws.prepare(request)
        self._audience.add(ws)
        if self._speaking is None:
            self._speaking = asyncio.create_task(_produce_for_all(self._audience, rate))
        try:
            async for _ in ws:
                pass
        finally:
            self._audience.discard(ws)
        return ws


async def _produce_for_all(audience: set[web.WebSocketResponse], rate: int) -> None:
    loop = asyncio.get_running_loop()
    prefix = urlsafe_b64encode(uuid4().bytes)[:22].decode() + "."
    pause, due, offset = 1 / rate, loop.time(), 0
    while True:
        due += pause
        await asyncio.sleep(max(0.0, due - loop.time()))
        offset += len(_TOKEN)
        event = orjson.dumps({"cursor": f"{prefix}{offset}", "kind": "TEXT", "text": _TOKEN})
        for ws in list(audience):
            with contextlib.suppress(ClientConnectionResetError, ConnectionResetError):
                await ws.send_frame(event, WSMsgType.TEXT)


async def _produce(ws: web.WebSocketResponse, beat: Beat, rate: int, silence: int) -> None:
    loop = beat.loop
    prefix = urlsafe_b64encode(uuid4().bytes)[:22].decode() + "."
    pause, due, offset, sent = 1 / rate, loop.time() + silence, 0, 0
    with contextlib.suppress(ClientConnectionResetError, ConnectionResetError):
        while True:
            # Due times, not pauses in a row: the speed holds however late the loop wakes us.
            due += pause
            sent += 1
            if due > loop.time():
                await beat.until(due)
            elif sent % 64 == 0:
                await asyncio.sleep(0)
            offset += len(_TOKEN)
            event = {"cursor": f"{prefix}{offset}", "kind": "TEXT", "text": _TOKEN}
            await ws.send_frame(orjson.dumps(event), WSMsgType.TEXT)


def _number(request: web.Request, name: str) -> int:
    try:
        number = int(request.query[name])
    except (KeyError, ValueError) as error:
        raise web.HTTPBadRequest from error
    if not 1 <= number <= _MAX_PAGE:
        raise web.HTTPBadRequest
    return number


def _cursor(row: Any) -> str:
    key, _, pinned, _, updated, _, _ = row
    micros = (updated - _EPOCH) // _MICROSECOND
    return urlsafe_b64encode(_POSITION.pack(b"T", pinned, micros, key.bytes)).rstrip(b"=").decode()


def _position(cursor: str) -> tuple[bool, datetime, UUID]:
    try:
        _, pinned, micros, key = _POSITION.unpack(urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
        return bool(pinned), _EPOCH + timedelta(microseconds=micros), UUID(bytes=key)
    except (ValueError, struct.error, OverflowError) as error:
        raise web.HTTPBadRequest from error


def _json(value: Any) -> web.Response:
    return web.Response(body=orjson.dumps(value), content_type="application/json")


async def _no_reset(connection: Any) -> None:
    """No statement leaves anything behind in its session, so there is nothing to reset by another round trip."""


async def main() -> None:
    """Serve on 127.0.0.1 until the process is ended."""
    url = os.environ["DATABASE_URL"]
    async with asyncpg.create_pool(url, min_size=_POOL_SIZE, max_size=_POOL_SIZE, reset=_no_reset) as pool:
        handlers = Handlers(pool, Sessions(os.environ["SESSION_SECRET"]))
        app = web.Application()
        app.router.add_get("/threads", handlers.threads)
        app.router.add_get("/histories", handlers.histories)
        app.router.add_get("/stream", handlers.stream)
        app.router.add_get("/fanout", handlers.fanout)
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
