"""A pooler between a server and PostgreSQL: in transaction mode it is refused at the start, else it goes unnoticed.

The pooler is ours, as small as one can be, and does what PgBouncer does: a client that says something is given a
session, which belongs to it until its transaction has ended, or for ever.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TypeAlias
from urllib.parse import parse_qs, urlsplit

import pytest

from config import SettingsError
from server.runtime import Server
from tests.client import connect
from tests.conftest import make_database, test_settings

Said: TypeAlias = "asyncio.Task[tuple[bytes, bytes]]"
_SSL_REQUEST = 80_877_103
_CANCEL_REQUEST = 80_877_102


async def message(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """The next message: its type, and all of it."""
    head = await reader.readexactly(5)
    (length,) = struct.unpack("!I", head[1:])
    return head[:1], head + await reader.readexactly(length - 4)


class Session:
    """One connection to PostgreSQL, and who may use it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, greeting: bytes) -> None:
        self.reader = reader
        self.writer = writer
        self.greeting = greeting
        self.lock = asyncio.Lock()

    @classmethod
    async def open(cls, path: str, startup: bytes) -> Session:
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(startup)
        greeting, kind = b"", b""
        while kind != b"Z":
            kind, whole = await message(reader)
            greeting += whole
        return cls(reader, writer, greeting)


class Pooler:
    """Listens on 127.0.0.1 and leads to the socket of a PostgreSQL."""

    def __init__(self, path: str, *, sessions: int | None) -> None:
        self._path = path
        # None: each client has its own.
        self._most = sessions
        self._sessions: list[Session] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._next = 0

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[int]:
        async with await asyncio.start_server(self._serve, "127.0.0.1", 0) as server:
            try:
                yield server.sockets[0].getsockname()[1]
            finally:
                for task in list(self._tasks):
                    task.cancel()
                await asyncio.gather(*self._tasks, return_exceptions=True)
                for session in self._sessions:
                    session.writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            with suppress(asyncio.IncompleteReadError, OSError):
                await self._client(reader, writer)
        finally:
            writer.transport.abort()
            self._tasks.discard(task)

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await reader.readexactly(8)
            length, code = struct.unpack("!II", head)
            if code == _CANCEL_REQUEST:
                return
            if code != _SSL_REQUEST:
                break
            writer.write(b"N")
        startup = head + await reader.readexactly(length - 8)
        own = await Session.open(self._path, startup) if self._most is None else None
        if own is not None or len(self._sessions) < (self._most or 0):
            self._sessions.append(own or await Session.open(self._path, startup))
        writer.write((own or self._sessions[0]).greeting)
        said = asyncio.create_task(message(reader))
        try:
            while True:
                await asyncio.wait([said])
                session = own or self._session()
                async with session.lock:
                    said = await self._transaction(session, said, reader, writer)
        finally:
            said.cancel()

    def _session(self) -> Session:
        """One after another, though none is preferred."""
        self._next += 1
        return self._sessions[self._next % len(self._sessions)]

    async def _transaction(
        self, session: Session, said: Said, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> Said:
        """Carry messages both ways until the session is idle again; what the client says after that."""
        heard = asyncio.create_task(message(session.reader))
        asked = 0
        try:
            while True:
                await asyncio.wait([said, heard], return_when=asyncio.FIRST_COMPLETED)
                if said.done():
                    kind, whole = await said
                    if kind == b"X":
                        raise ConnectionResetError
                    asked += kind in b"SQ"
                    session.writer.write(whole)
                    said = asyncio.create_task(message(reader))
                if heard.done():
                    kind, whole = await heard
                    writer.write(whole)
                    asked -= kind == b"Z"
                    if kind == b"Z" and whole[-1:] == b"I" and asked == 0:
                        return said
                    heard = asyncio.create_task(message(session.reader))
        finally:
            heard.cancel()


def through(url: str, port: int) -> tuple[str, str]:
    """The socket that an address means, and the address that leads through a pooler."""
    parts = urlsplit(url)
    (folder,) = parse_qs(parts.query)["host"]
    return f"{folder}/.s.PGSQL.5432", f"postgresql://{parts.username}@127.0.0.1:{port}{parts.path}"


@pytest.mark.parametrize("sessions", [1, 3])
async def test_a_pooler_in_transaction_mode_is_refused_with_what_to_do(
    postgres_url: str, tmp_path: Path, sessions: int
) -> None:
    url = await make_database(postgres_url)
    async with Pooler(through(url, 0)[0], sessions=sessions).listening() as port:
        server = Server(test_settings(through(url, port)[1], tmp_path))
        with pytest.raises(SettingsError, match=r"DATABASE_URL: a pooler in transaction mode .* session mode"):
            await server.start()


async def test_a_pooler_in_session_mode_goes_unnoticed(postgres_url: str, tmp_path: Path) -> None:
    url = await make_database(postgres_url)
    async with Pooler(through(url, 0)[0], sessions=None).listening() as port:
        server = Server(test_settings(through(url, port)[1], tmp_path))
        await server.start()
        try:
            async with connect(server.address) as client:
                await client.sign_in()
                turn = await client.send("Through a pooler", model="scripted-echo")
                assert (await client.finish(turn["assistantMessage"]["id"]))["text"] == "Through a pooler"
        finally:
            await server.drain()
            await server.close()
