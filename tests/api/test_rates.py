"""What one user may do in a minute: over every transport, counted together, and nothing written beyond it.

CHECKLIST S58.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from server.runtime import Server
from tests.api.test_claim import SAVE_PROVIDER, SET_KEY
from tests.api.test_custom_providers import a_provider
from tests.api.test_provider_keys import keys_of
from tests.api.test_sharing import FORK_SHARED, share
from tests.client import CREATE_UPLOAD, SEND, Client, GraphQLErrors, connect
from tests.conftest import make_database, public_names, test_settings
from tests.scripts import SCRIPTS
from tests.unit.test_rates import Clock

SEND_TWO = (
    "mutation($a: SendMessageInput!, $b: SendMessageInput!) "
    "{ a: sendMessage(input: $a) { thread { id } } b: sendMessage(input: $b) { thread { id } } }"
)
UPLOAD = "mutation($file: Upload!) { uploadAttachment(input: {file: $file}) { attachment { id } } }"


@asynccontextmanager
async def serving(postgres_url: str, folder: Path, clock: Clock, **rates: int) -> AsyncIterator[Server]:
    """A server that allows this much, by a clock that stands."""
    settings = test_settings(await make_database(postgres_url), folder, **rates)
    server = Server(settings, providers=SCRIPTS.models(), resolve=public_names, clock=clock)
    await server.start()
    try:
        yield server
    finally:
        await server.close()


@asynccontextmanager
async def user(server: Server) -> AsyncIterator[Client]:
    async with connect(server.address) as client:
        await client.sign_in()
        yield client


async def count(server: Server, table: str) -> int:
    connection = await asyncpg.connect(server.database.url)
    try:
        found: int = await connection.fetchval(f"SELECT count(*) FROM {table}")
        return found
    finally:
        await connection.close()


def question(text: str) -> dict[str, Any]:
    return {"idempotencyKey": str(uuid.uuid4()), "text": text, "modelId": "two-words"}


async def test_nobody_asks_more_in_a_minute_than_is_allowed_and_later_they_may_again(
    postgres_url: str, tmp_path: Path
) -> None:
    clock = Clock()
    async with (
        serving(postgres_url, tmp_path, clock, turns_per_minute=3) as server,
        user(server) as client,
        user(server) as other,
    ):
        # Aliases and operations of a socket count as much as requests.
        await client.run(SEND_TWO, {"a": question("One"), "b": question("Two")})
        two = {"a": question("Three"), "b": question("Four")}
        async with client.subscribe(SEND_TWO, two) as operation:
            with pytest.raises(GraphQLErrors) as refused:
                await operation.next()
        assert (refused.value.code, refused.value.errors[0]["path"]) == ("RATE_LIMITED", ["b"])
        assert refused.value.extensions["retryAfter"] == 20
        with pytest.raises(GraphQLErrors, match="Too many questions"):
            await client.send("Five")
        assert [await count(server, table) for table in ("threads", "turns", "messages")] == [3, 3, 6]
        assert (await other.send("Mine"))["userMessage"]["text"] == "Mine"
        clock.time += 19
        with pytest.raises(GraphQLErrors, match="RATE_LIMITED"):
            await client.run(SEND, {"input": two["b"]})
        clock.time += 1
        assert (await client.run(SEND, {"input": two["b"]}))["sendMessage"]["userMessage"]["text"] == "Four"


async def test_edits_and_retries_count_as_questions(postgres_url: str, tmp_path: Path) -> None:
    async with serving(postgres_url, tmp_path, Clock(), turns_per_minute=3) as server, user(server) as client:
        turn = await client.send("One")
        question_id, answer_id = turn["userMessage"]["id"], turn["assistantMessage"]["id"]
        await client.finish(answer_id)
        again = await client.edit(question_id, "Another")
        await client.finish(again["assistantMessage"]["id"])
        last = await client.retry(answer_id)
        await client.finish(last["assistantMessage"]["id"])
        written = await count(server, "messages")
        for attempt in (client.send("Two"), client.edit(question_id, "Third"), client.retry(answer_id)):
            with pytest.raises(GraphQLErrors) as refused:
                await attempt
            assert refused.value.code == "RATE_LIMITED"
        assert (await count(server, "messages"), await count(server, "turns")) == (written, 3)


async def test_the_answer_of_a_key_is_found_when_no_more_may_be_asked(postgres_url: str, tmp_path: Path) -> None:
    async with serving(postgres_url, tmp_path, Clock(), turns_per_minute=1) as server, user(server) as client:
        turn = await client.send("One", idempotencyKey="a-key")
        repeated = await client.send("One", idempotencyKey="a-key")
        assert repeated["assistantMessage"]["id"] == turn["assistantMessage"]["id"]
        with pytest.raises(GraphQLErrors) as conflict:
            await client.send("Two", idempotencyKey="a-key")
        assert conflict.value.code == "CONFLICT"
        with pytest.raises(GraphQLErrors) as refused:
            await client.send("One", idempotencyKey="b-key")
        assert refused.value.code == "RATE_LIMITED"


async def test_uploads_of_all_kinds_are_bounded_together(postgres_url: str, tmp_path: Path) -> None:
    async with (
        serving(postgres_url, tmp_path, Clock(), uploads_per_minute=3) as server,
        user(server) as client,
        user(server) as other,
    ):
        announced = {"input": {"name": "a.txt", "contentType": "text/plain", "size": 5}}
        await client.upload(b"bytes")
        await client.run_with_file(UPLOAD, b"bytes")
        await client.run(CREATE_UPLOAD, announced)
        for attempt in (
            client.upload(b"bytes"),
            client.run_with_file(UPLOAD, b"bytes"),
            client.run(CREATE_UPLOAD, announced),
        ):
            with pytest.raises(GraphQLErrors) as refused:
                await attempt
            assert (refused.value.code, refused.value.extensions["retryAfter"]) == ("RATE_LIMITED", 20)
        headers = {"Authorization": f"Bearer {client.token}"}
        async with client.http.post(f"{client.address}/attachments", data=b"bytes", headers=headers) as response:
            assert (response.status, response.headers["Retry-After"]) == (429, "20")
        assert await count(server, "attachments") == 3
        await other.upload(b"bytes")


async def test_links_and_forks_are_bounded_together(postgres_url: str, tmp_path: Path) -> None:
    async with (
        serving(postgres_url, tmp_path, Clock(), shares_per_minute=2) as server,
        user(server) as client,
        user(server) as other,
    ):
        turn = await client.send("One")
        await client.finish(turn["assistantMessage"]["id"])
        link = await share(client, turn["thread"]["id"])
        await client.run(FORK_SHARED, {"token": link["token"]})
        for attempt in (share(client, turn["thread"]["id"]), client.run(FORK_SHARED, {"token": link["token"]})):
            with pytest.raises(GraphQLErrors) as refused:
                await attempt
            assert (refused.value.code, refused.value.extensions["retryAfter"]) == ("RATE_LIMITED", 30)
        assert (await count(server, "shares"), await count(server, "threads")) == (1, 2)
        await other.run(FORK_SHARED, {"token": link["token"]})


async def test_changes_of_keys_and_endpoints_are_bounded_together(postgres_url: str, tmp_path: Path) -> None:
    async with (
        serving(postgres_url, tmp_path, Clock(), key_changes_per_minute=2) as server,
        user(server) as client,
        user(server) as other,
    ):
        key = {"input": {"provider": "openai", "key": "sk-the-first-1234"}}
        await client.run(SET_KEY, key)
        await client.run(SAVE_PROVIDER, {"input": a_provider()})
        changed = {"input": {"provider": "openai", "key": "sk-the-other-5678"}}
        for query, given in ((SET_KEY, changed), (SAVE_PROVIDER, {"input": a_provider(slug="another")})):
            with pytest.raises(GraphQLErrors) as refused:
                await client.run(query, given)
            assert (refused.value.code, refused.value.extensions["retryAfter"]) == ("RATE_LIMITED", 30)
        assert [one["lastFour"] for one in await keys_of(client)] == ["1234"]
        assert await count(server, "custom_providers") == 1
        await other.run(SET_KEY, key)
