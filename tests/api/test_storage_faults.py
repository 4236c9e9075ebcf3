"""A storage that refuses, hangs or fails: whoever needs it is told so in time, and nobody else notices."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from server.runtime import Server
from tests.client import GraphQLErrors, connect
from tests.conftest import make_database, test_settings
from tests.scripts import SCRIPTS

FAILURE = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


@asynccontextmanager
async def storage(behaviour: str) -> AsyncIterator[str]:
    """The address of something that should be S3."""
    letting_go = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if behaviour == "hangs":
            await letting_go.wait()
        elif behaviour == "fails":
            await reader.readuntil(b"\r\n\r\n")
            writer.write(FAILURE)
            await writer.drain()
        writer.transport.abort()

    listening = await asyncio.start_server(answer, "127.0.0.1", 0)
    address = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    if behaviour == "is not there":
        listening.close()
    try:
        yield address
    finally:
        letting_go.set()
        listening.close()


@pytest.mark.parametrize("behaviour", ["hangs", "fails", "resets", "is not there"])
async def test_chats_go_on_while_uploads_are_told_that_the_storage(
    postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behaviour: str
) -> None:
    monkeypatch.setattr("storage.s3._CALL_SECONDS", 3.0)
    async with storage(behaviour) as address:
        settings = test_settings(
            *(await make_database(postgres_url), tmp_path),
            storage_url="s3://bucket",
            s3_endpoint_url=address,
            s3_access_key_id="key",
            s3_secret_access_key="secret",
        )
        server = Server(settings, providers=SCRIPTS.models())
        await server.start()
        try:
            async with connect(server.address) as client:
                await client.sign_in()

                async def upload() -> tuple[str, int]:
                    with pytest.raises(GraphQLErrors) as refused:
                        await client.upload(b"words")
                    return refused.value.code, refused.value.extensions.get("retryAfter", 0)

                begun = time.monotonic()
                uploads = [asyncio.create_task(upload()) for _ in range(40)]
                for _ in range(5):
                    turn = await client.send("plain chat")
                    assert (await client.finish(turn["assistantMessage"]["id"]))["status"] == "COMPLETE"
                if behaviour == "hangs":
                    # Those beyond what one user may send at once are refused before; the others wait still.
                    assert not all(task.done() for task in uploads)
                told = set(await asyncio.gather(*uploads))
                assert {code for code, _ in told} <= {"UNAVAILABLE", "RATE_LIMITED"}
                assert ("UNAVAILABLE", 5) in told
                assert time.monotonic() - begun < 30
        finally:
            await server.drain()
            await server.close()
