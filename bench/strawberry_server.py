"""Strawberry as one begins with it: its view for aiohttp, tables by Tortoise, loaders by its DataLoader.

It answers what the benchmark asks the product, from the same rows, for the same tokens and only to their owner, with
what Strawberry and Tortoise offer for speed: documents parsed and validated once, rows of a request fetched in batches,
uvloop. Nothing of the product is used but the tables' models.
"""

from __future__ import annotations

import asyncio
import os
import struct
import time
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections import OrderedDict
from collections.abc import AsyncGenerator
from datetime import UTC, datetime, timedelta
from enum import Enum
from functools import lru_cache
from typing import Annotated, Any, NewType
from urllib.parse import parse_qsl, urlsplit
from uuid import UUID, uuid4

import jwt
import strawberry
import uvloop
from aiohttp import web
from strawberry.aiohttp.views import GraphQLView
from strawberry.dataloader import DataLoader
from strawberry.extensions import ParserCache, ValidationCache
from strawberry.schema.config import StrawberryConfig
from strawberry.subscriptions import GRAPHQL_TRANSPORT_WS_PROTOCOL
from tortoise import Tortoise
from tortoise.expressions import Q

from models import tables
from providers.scripted import Beat

_RATE = 30
_POOL_SIZE = 10
_MAX_PAGE = 100
_CACHED_TOKENS = 10_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_POSITION = struct.Struct(">cBq16s")
_TOKEN = " word"
_beat_of = lru_cache(maxsize=1)(Beat)

# Tortoise's query sets have no limit for each of many parents.
_LAST_MESSAGES = """
SELECT m.* FROM unnest('{%s}'::uuid[]) AS wanted (thread_id) CROSS JOIN LATERAL (
    SELECT * FROM messages WHERE thread_id = wanted.thread_id AND owner_id = '%s' AND active
    ORDER BY depth DESC LIMIT %d
) m ORDER BY m.depth
"""

Cursor = NewType("Cursor", str)
CONFIG = StrawberryConfig(scalar_map={Cursor: strawberry.scalar(name="Cursor")})


@strawberry.enum
class MessageRole(Enum):
    """Who speaks."""

    USER = "USER"
    ASSISTANT = "ASSISTANT"
    SYSTEM = "SYSTEM"


@strawberry.enum
class MessageStatus(Enum):
    """How far a message is."""

    STREAMING = "STREAMING"
    COMPLETE = "COMPLETE"
    STOPPED = "STOPPED"
    FAILED = "FAILED"
    INTERRUPTED = "INTERRUPTED"


@strawberry.enum
class DeltaKind(Enum):
    """What a delta adds to."""

    TEXT = "TEXT"
    REASONING = "REASONING"


class RequestContext:
    """Who asks, and loaders that live as long as the request."""

    def __init__(self, user: UUID) -> None:
        self.user = user
        self.projects: DataLoader[UUID, Project | None] = DataLoader(self._projects)
        self._messages: dict[int, DataLoader[UUID, MessageConnection]] = {}

    def messages(self, last: int) -> DataLoader[UUID, MessageConnection]:
        """One loader for each number of messages that is asked for."""
        if last not in self._messages:

            async def load(keys: list[UUID]) -> list[MessageConnection]:
                return await _last_messages(self.user, keys, last)

            self._messages[last] = DataLoader(load)
        return self._messages[last]

    async def _projects(self, keys: list[UUID]) -> list[Project | None]:
        rows = await tables.Project.filter(id__in=keys, owner_id=self.user).only("id", "name")
        found = {row.id: Project(id=strawberry.ID(f"project_{row.id.hex}"), name=row.name) for row in rows}
        return [found.get(key) for key in keys]


Info = strawberry.Info[dict[str, Any], None]


@strawberry.type
class PageInfo:
    """Where a page lies."""

    has_next_page: bool
    has_previous_page: bool
    start_cursor: Cursor | None
    end_cursor: Cursor | None


@strawberry.type
class Project:
    """A folder of threads."""

    id: strawberry.ID
    name: str


@strawberry.type
class MessageError:
    """Why a message is not whole."""

    message: str


@strawberry.type
class Message:
    """A message."""

    id: strawberry.ID
    role: MessageRole
    status: MessageStatus
    created_at: datetime
    error: MessageError | None
    parts: strawberry.Private[list[dict[str, Any]]]

    @strawberry.field
    def text(self) -> str:
        """Its text parts, joined."""
        return "".join(part["text"] for part in self.parts if part["type"] == "text")


@strawberry.type
class MessageConnection:
    """A page of messages."""

    nodes: list[Message]


@strawberry.type
class Thread:
    """A conversation."""

    id: strawberry.ID
    title: str
    pinned: bool
    created_at: datetime
    updated_at: datetime
    key: strawberry.Private[UUID]
    project_key: strawberry.Private[UUID | None]

    @strawberry.field
    async def project(self, info: Info) -> Project | None:
        """The project it is in."""
        if self.project_key is None:
            return None
        return await _context(info).projects.load(self.project_key)

    @strawberry.field
    async def messages(self, info: Info, last: int = 25) -> MessageConnection:
        """Its last messages, oldest first."""
        return await _context(info).messages(last).load(self.key)


@strawberry.type
class ThreadConnection:
    """A page of threads."""

    nodes: list[Thread]
    page_info: PageInfo


@strawberry.type
class MessageDelta:
    """More text."""

    cursor: Cursor
    kind: DeltaKind
    text: str


@strawberry.type
class MessagePartAdded:
    """A part that came whole."""

    cursor: Cursor


@strawberry.type
class MessageReset:
    """All of it, from the start."""

    cursor: Cursor
    message: Message


@strawberry.type
class MessageEnded:
    """The end."""

    cursor: Cursor
    message: Message


MessageStreamEvent = Annotated[
    MessageDelta | MessagePartAdded | MessageReset | MessageEnded, strawberry.union("MessageStreamEvent")
]


@strawberry.type
class Query:
    """Reads."""

    @strawberry.field
    async def threads(self, info: Info, first: int = 25, after: Cursor | None = None) -> ThreadConnection:
        """The caller's threads: pinned ones first, then by last activity."""
        if not 1 <= first <= _MAX_PAGE:
            raise ValueError(f"A page has 1 to {_MAX_PAGE} entries.")
        found = tables.Thread.filter(owner_id=_context(info).user, archived=False, temporary=False)
        if after is not None:
            found = found.filter(_behind(after))
        columns = ("id", "title", "pinned", "created_at", "updated_at", "project_id")
        rows = await found.order_by("-pinned", "-updated_at", "-id").limit(first + 1).only(*columns)
        shown = rows[:first]
        return ThreadConnection(
            nodes=[
                Thread(
                    id=strawberry.ID(f"thread_{row.id.hex}"),
                    title=row.title,
                    pinned=row.pinned,
                    created_at=row.created_at,
                    updated_at=row.updated_at,
                    key=row.id,
                    project_key=row.project_id,  # type: ignore[attr-defined]  # Tortoise adds it
                )
                for row in shown
            ],
            page_info=PageInfo(
                has_next_page=len(rows) > first,
                has_previous_page=after is not None,
                start_cursor=_cursor(shown[0]) if shown else None,
                end_cursor=_cursor(shown[-1]) if shown else None,
            ),
        )


@strawberry.type
class Subscription:
    """Streams."""

    @strawberry.subscription
    async def message_stream(
        self, message_id: strawberry.ID, after: Cursor | None = None
    ) -> AsyncGenerator[MessageStreamEvent, None]:
        """Words without end after so many seconds, each at its due time."""
        del after
        loop = asyncio.get_running_loop()
        beat = _beat_of(loop)
        prefix = urlsafe_b64encode(uuid4().bytes)[:22].decode() + "."
        due, offset, sent = loop.time() + float(message_id), 0, 0
        while True:
            due += 1 / _RATE
            sent += 1
            if due > loop.time():
                await beat.until(due)
            elif sent % 64 == 0:
                await asyncio.sleep(0)
            offset += len(_TOKEN)
            yield MessageDelta(cursor=Cursor(f"{prefix}{offset}"), kind=DeltaKind.TEXT, text=_TOKEN)


class View(GraphQLView[dict[str, Any], None]):
    """The endpoint: it tells resolvers who asks."""

    def __init__(self, schema: strawberry.Schema, secret: str) -> None:
        super().__init__(
            schema, graphql_ide=None, subscription_protocols=[GRAPHQL_TRANSPORT_WS_PROTOCOL], keep_alive=False
        )
        self._secret = secret
        self._verified: OrderedDict[str, tuple[UUID, float]] = OrderedDict()

    async def get_context(self, request: web.Request, response: web.Response | web.WebSocketResponse) -> dict[str, Any]:
        """Of a request. A socket has said nothing yet."""
        header = request.headers.get("Authorization")
        return {"request": RequestContext(self._user(header))} if header is not None else {}

    async def on_ws_connect(self, context: dict[str, Any]) -> Any:
        """Of a socket: what it says first."""
        parameters = context.get("connection_params") or {}
        context["request"] = RequestContext(self._user(parameters.get("authorization", "")))
        return strawberry.UNSET

    def _user(self, header: str) -> UUID:
        if not header.startswith("Bearer "):
            raise web.HTTPUnauthorized
        token = header[7:]
        user, expires_at = self._verified.get(token) or self._verify(token)
        if expires_at <= time.time():
            raise web.HTTPUnauthorized
        return user

    def _verify(self, token: str) -> tuple[UUID, float]:
        try:
            claims = jwt.decode(token, self._secret, algorithms=["HS256"], issuer="threadgraph")
        except jwt.PyJWTError as error:
            raise web.HTTPUnauthorized from error
        verified = UUID(hex=claims["sub"].removeprefix("user_")), float(claims["exp"])
        self._verified[token] = verified
        if len(self._verified) > _CACHED_TOKENS:
            self._verified.popitem(last=False)
        return verified


async def _last_messages(user: UUID, keys: list[UUID], last: int) -> list[MessageConnection]:
    if not 1 <= last <= _MAX_PAGE:
        raise ValueError(f"A page has 1 to {_MAX_PAGE} entries.")
    found: dict[UUID, MessageConnection] = {key: MessageConnection(nodes=[]) for key in keys}
    # Keys and numbers, no texts: `raw` takes no arguments.
    rows: Any = await tables.Message.raw(_LAST_MESSAGES % (",".join(map(str, keys)), user, last))
    for row in rows:
        found[row.thread_id].nodes.append(
            Message(
                id=strawberry.ID(f"message_{row.id.hex}"),
                role=MessageRole(row.role),
                status=MessageStatus(row.status),
                created_at=row.created_at,
                error=None if row.error_message is None else MessageError(message=row.error_message),
                parts=row.parts,
            )
        )
    return [found[key] for key in keys]


def _context(info: Info) -> RequestContext:
    context: RequestContext = info.context["request"]
    return context


def _cursor(row: tables.Thread) -> Cursor:
    micros = (row.updated_at - _EPOCH) // _MICROSECOND
    return Cursor(urlsafe_b64encode(_POSITION.pack(b"T", row.pinned, micros, row.id.bytes)).rstrip(b"=").decode())


def _behind(cursor: str) -> Q:
    _, pinned, micros, key = _POSITION.unpack(urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
    at = _EPOCH + timedelta(microseconds=micros)
    as_pinned = Q(pinned=bool(pinned)) & (Q(updated_at__lt=at) | Q(updated_at=at, id__lt=UUID(bytes=key)))
    return Q(as_pinned, Q(pinned=False), join_type="OR") if pinned else as_pinned


async def main() -> None:
    """Serve on 127.0.0.1 until the process is ended."""
    url = urlsplit(os.environ["DATABASE_URL"])
    credentials = {
        "host": dict(parse_qsl(url.query)).get("host") or url.hostname,
        "port": url.port or 5432,
        "user": url.username,
        "password": url.password,
        "database": url.path.lstrip("/"),
        "minsize": _POOL_SIZE,
        "maxsize": _POOL_SIZE,
    }
    await Tortoise.init(
        config={
            "connections": {"default": {"engine": "tortoise.backends.asyncpg", "credentials": credentials}},
            "apps": {"threadgraph": {"models": ["models.tables"], "default_connection": "default"}},
            "use_tz": True,
        },
    )
    schema = strawberry.Schema(
        Query, subscription=Subscription, config=CONFIG, extensions=[ParserCache, ValidationCache]
    )
    app = web.Application()
    app.router.add_route("*", "/graphql", View(schema, os.environ["SESSION_SECRET"]))
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
    await runner.setup()
    await web.TCPSite(runner, os.environ["HOST"], int(os.environ["PORT"])).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main())
