"""Accounts for tests: filled at random, taken out as files, and compared whatever their ids are."""

from __future__ import annotations

import io
import random
import re
import time
import zipfile
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg
import orjson

from models.ids import IdKind, new_id, outside_id, parse_id
from server.runtime import Server
from services.viewer import Viewer
from tests.client import Client

EXPORT = "mutation($input: ExportDataInput!) { exportData(input: $input) { url expiresAt } }"
_TEXTS = [
    "plain",
    "Ω≈ç √∫ 🦉🦉",
    'quotes " and \\ and </script>',
    "two\nlines\r\nand\ttabs",
    "\x01\x1f\x7f",
    " ",
    "ا עברית",
    "a" * 500,
]


def key_of(client: Client) -> UUID:
    """The key behind the client's id."""
    return parse_id(IdKind.USER, client.id)


def viewer_of(client: Client) -> Viewer:
    """The client as the services know it."""
    return Viewer(key_of(client), anonymous=True, expires_at=time.time() + 60)


async def link(client: Client, **given: Any) -> str:
    """A link to the client's export."""
    return str((await client.run(EXPORT, {"input": given}))["exportData"]["url"])


async def download(client: Client) -> bytes:
    """The client's export."""
    async with client.http.get(await link(client)) as response:
        assert response.status == 200, await response.text()
        return await response.read()


async def upload(client: Client, data: Any, **headers: str) -> tuple[int, dict[str, Any]]:
    """Import a file; status and body."""
    given = {"Content-Type": "application/zip", "Authorization": f"Bearer {client.token}"} | headers
    async with client.http.post(f"{client.address}/import", data=data, headers=given) as response:
        return response.status, orjson.loads(await response.read())


def members(data: bytes) -> dict[str, list[dict[str, Any]]]:
    """The lines of each member; the manifest as its one line."""
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        assert file.testzip() is None
        return {
            name: [orjson.loads(line) for line in ([file.read(name)] if name == "manifest.json" else file.open(name))]
            for name in file.namelist()
            if not name.startswith("attachments/")
        }


def files(data: bytes) -> dict[str, bytes]:
    """The bytes of the attachments, by their ids."""
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        return {
            name.removeprefix("attachments/"): file.read(name)
            for name in file.namelist()
            if name.startswith("attachments/")
        }


def packed(contents: dict[str, list[dict[str, Any]]], attached: dict[str, bytes] | None = None) -> bytes:
    """The file with these lines and attachments."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as file:
        for attachment_id, content in (attached or {}).items():
            file.writestr(f"attachments/{attachment_id}", content)
        for name, lines in contents.items():
            file.writestr(name, b"".join(orjson.dumps(line) + b"\n" for line in lines))
    return target.getvalue()


def comparable(data: bytes) -> dict[str, Any]:
    """What is in a file but for ids, which are numbered as they come, and for what is never twice the same."""
    contents = members(data)
    manifest = contents.pop("manifest.json")[0]
    names: dict[str, str] = {}

    def named(value: Any) -> Any:
        match value:
            case str() if re.fullmatch(r"[a-z]+_[0-9a-f]{32}", value):
                return names.setdefault(value, f"{value.split('_')[0]} {len(names)}")
            case list():
                return [named(item) for item in value]
            case dict():
                return {key: named(item) for key, item in value.items() if key != "token"}
        return value

    lines = {name: named(listed) for name, listed in contents.items()}
    return {"counts": manifest["counts"], "files": [*files(data).values()], **lines}


async def attach(server: Server, client: Client, content: bytes, name: str = "a file.txt") -> str:
    """A stored attachment; its id."""

    async def chunks() -> AsyncIterator[bytes]:
        yield content

    record = await server.attachments.store(viewer_of(client), chunks(), name=name)
    return outside_id(IdKind.ATTACHMENT, record.id)


class Filling:
    """Fills an account by SQL with what the API could have made, and more: every column takes different values."""

    def __init__(self, connection: asyncpg.Connection, owner_id: UUID, seed: int) -> None:
        self.connection = connection
        self.owner_id = owner_id
        self.chance = random.Random(seed)
        self.projects: list[UUID] = []
        self.threads: list[UUID] = []
        self.messages: list[UUID] = []

    async def all(self, *, threads: int = 4) -> None:
        """Something in every member of an export."""
        for _ in range(self.chance.randint(1, 3)):
            await self.project()
        for _ in range(threads):
            await self.thread()
        await self.share(self.threads[0])
        await self.usage()
        await self.choices()

    async def choices(self) -> None:
        """Settings, and an endpoint of their own with models."""
        await self.insert(
            "settings",
            id=new_id(),
            owner_id=self.owner_id,
            default_model="two-words",
            title_model=self.maybe(lambda: "slow"),
            user_name=self.maybe(self.text),
            user_traits=self.maybe(self.text),
            user_context=self.maybe(self.text),
            created_at=self.time(),
            updated_at=self.time(),
        )
        for slug in ("mine", "another"):
            await self.insert(
                "custom_providers",
                id=new_id(),
                owner_id=self.owner_id,
                slug=slug,
                name=self.text(),
                base_url=f"https://{slug}.example.com/v1",
                format=self.chance.choice(["CHAT_COMPLETIONS", "ANTHROPIC_MESSAGES"]),
                created_at=self.time(),
                updated_at=self.time(),
            )
        for provider in ("mine", "mine", "openai"):
            await self.insert(
                "custom_models",
                id=new_id(),
                owner_id=self.owner_id,
                provider=provider,
                vendor_name=f"vendor/model-{new_id().hex}",
                name=self.text(),
                abilities=["VISION", "TOOLS"] if self.flag() else [],
                context_tokens=self.maybe(lambda: 128_000),
                max_output_tokens=self.maybe(lambda: 4_096),
                created_at=self.time(),
                updated_at=self.time(),
            )

    def text(self) -> str:
        """Some text, in any script."""
        return "".join(self.chance.choices(_TEXTS, k=self.chance.randint(1, 4)))

    def maybe(self, value: Callable[[], Any]) -> Any:
        """The value, or None."""
        return value() if self.chance.random() < 0.6 else None

    def flag(self) -> bool:
        """True or false."""
        return self.chance.random() < 0.4

    def time(self) -> datetime:
        """Some time in the last years."""
        return datetime(2026, 1, 1, tzinfo=UTC) - timedelta(microseconds=self.chance.randrange(10**14))

    async def insert(self, table: str, **values: Any) -> None:
        """One row."""
        places = ", ".join(f"${place}" for place in range(1, len(values) + 1))
        await self.connection.execute(f"INSERT INTO {table} ({', '.join(values)}) VALUES ({places})", *values.values())

    async def project(self) -> UUID:
        """A project."""
        self.projects.append(new_id())
        await self.insert(
            "projects",
            id=self.projects[-1],
            owner_id=self.owner_id,
            name=self.text(),
            description=self.maybe(self.text),
            color=self.maybe(lambda: self.chance.choice(["RED", "TEAL"])),
            icon=self.maybe(lambda: "🦉"),
            prompt=self.maybe(self.text),
            default_model=self.maybe(lambda: "two-words"),
            archived=self.flag(),
            created_at=self.time(),
            updated_at=self.time(),
        )
        return self.projects[-1]

    async def thread(self, *, messages: int | None = None) -> UUID:
        """A thread with a tree of messages."""
        thread_id = new_id()
        self.threads.append(thread_id)
        temporary = self.flag()
        await self.insert(
            "threads",
            id=thread_id,
            owner_id=self.owner_id,
            project_id=self.maybe(lambda: self.chance.choice(self.projects)) if self.projects else None,
            title=self.text(),
            title_source=self.chance.choice(["TEXT", "MODEL", "USER"]),
            pinned=self.flag(),
            archived=self.flag(),
            temporary=temporary,
            expires_at=datetime.now(UTC) + timedelta(days=1) if temporary else None,
            created_at=self.time(),
            updated_at=self.time(),
        )
        await self._tree(thread_id, self.chance.randint(0, 12) if messages is None else messages)
        return thread_id

    async def _tree(self, thread_id: UUID, size: int) -> None:
        places: list[tuple[UUID, UUID | None, int]] = []
        for _ in range(size):
            parent = self.chance.choice(places) if places and self.chance.random() < 0.9 else None
            places.append((new_id(), parent[0] if parent else None, parent[2] + 1 if parent else 0))
        children: dict[UUID | None, list[UUID]] = {}
        for message_id, parent_id, _ in places:
            children.setdefault(parent_id, []).append(message_id)
        chosen = {parent: self.chance.choice(below) for parent, below in children.items()}
        active, step = set(), chosen.get(None)
        while step is not None:
            active.add(step)
            step = chosen.get(step)
        for message_id, parent_id, depth in places:
            remembered = chosen.get(message_id)
            if message_id not in active:
                remembered = self.maybe(lambda: remembered)  # noqa: B023 - called at once
            await self._message(message_id, thread_id, parent_id, remembered, depth, message_id in active)

    async def _message(
        self,
        message_id: UUID,
        thread_id: UUID,
        parent_id: UUID | None,
        remembered: UUID | None,
        depth: int,
        active: bool,
    ) -> None:
        self.messages.append(message_id)
        counted, failed = self.flag(), self.flag()
        parts: list[dict[str, Any]] = [{"type": "text", "text": self.text()}]
        if self.flag():
            parts += [
                {"type": "reasoning", "text": self.text()},
                {"type": "reasoning", "text": self.text(), "signature": self.text()},
                {
                    "type": "tool",
                    "callId": "c1",
                    "name": self.text(),
                    "arguments": {"q": [1.5, None, self.text()]},
                    "result": None,
                },
                {"type": "source", "url": "https://example.com/ü", "title": None},
            ]
        numbers = [self.chance.randrange(10**6) for _ in range(4)] if counted else [None] * 4
        await self.insert(
            "messages",
            id=message_id,
            owner_id=self.owner_id,
            thread_id=thread_id,
            parent_id=parent_id,
            active_child_id=remembered,
            depth=depth,
            active=active,
            role=self.chance.choice(["USER", "ASSISTANT", "SYSTEM"]),
            status="FAILED" if failed else self.chance.choice(["COMPLETE", "STOPPED", "INTERRUPTED"]),
            parts=orjson.dumps(parts).decode(),
            model=self.maybe(self.text),
            error_code="RATE_LIMITED" if failed else None,
            error_message=self.text() if failed else None,
            error_retry_after=7 if failed and counted else None,
            prompt_tokens=numbers[0],
            completion_tokens=numbers[1],
            reasoning_tokens=numbers[2],
            cached_tokens=numbers[3],
            tokens_estimated=self.flag(),
            duration_ms=self.maybe(lambda: 12),
            created_at=self.time(),
            updated_at=self.time(),
        )

    async def share(self, thread_id: UUID) -> UUID:
        """A share of a thread, with messages."""
        share_id = new_id()
        await self.insert(
            "shares",
            id=share_id,
            owner_id=self.owner_id,
            thread_id=thread_id,
            token=f"token-{share_id.hex}",
            title=self.text(),
            includes_attachments=self.flag(),
            expires_at=self.maybe(lambda: datetime.now(UTC) + timedelta(days=9)),
            created_at=self.time(),
        )
        for position in range(self.chance.randint(1, 3)):
            await self.insert(
                "share_messages",
                share_id=share_id,
                position=position,
                role="USER",
                status="COMPLETE",
                parts=orjson.dumps([{"type": "text", "text": self.text()}]).decode(),
                model=self.maybe(self.text),
                created_at=self.time(),
            )
        return share_id

    async def usage(self) -> None:
        """Usage of messages that are there, and of one that is not any more."""
        for message_id in [*self.messages[:3], new_id()]:
            for kind in ("ANSWER", "TITLE"):
                await self.insert(
                    "usage_events",
                    id=new_id(),
                    owner_id=self.owner_id,
                    message_id=message_id,
                    thread_id=self.maybe(lambda: self.chance.choice([*self.threads, new_id()])),
                    kind=kind,
                    model=self.chance.choice(["two-words", "slow"]),
                    status="COMPLETE",
                    prompt_tokens=self.chance.randrange(100),
                    completion_tokens=self.chance.randrange(100),
                    reasoning_tokens=self.chance.randrange(100),
                    cached_tokens=self.chance.randrange(100),
                    estimated=self.flag(),
                    prompt_price=self.maybe(lambda: 10**12),
                    cached_price=None,
                    completion_price=self.maybe(lambda: 5),
                    cost_micros=self.maybe(lambda: self.chance.randrange(2**40)),
                    created_at=self.time(),
                )
